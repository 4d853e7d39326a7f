"""What a number means: counts from tensors, rates with intervals from counts.

Rows are texts, columns their positions; `mask` marks real ones. A rate is kept as (count, total) per row and divided at the edge.
Intervals are 95 % percentile bootstrap intervals that resample clips: tokens of one clip are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Counts:
    """A rate before its division. count, total: [n] float64, one entry per row."""

    count: np.ndarray
    total: np.ndarray

    @property
    def value(self) -> float:
        total = float(self.total.sum())
        return float(self.count.sum()) / total if total else float("nan")

    def rate(self, clips: Sequence[str]) -> dict[str, Any]:
        """{"value", "count", "total", "ci95"}; the interval resamples the clips that rows belong to."""
        lo, hi = bootstrap_ratio(self.count, self.total, clips)
        return {"value": self.value, "count": float(self.count.sum()), "total": float(self.total.sum()), "ci95": [lo, hi]}


def counts(values: Tensor, mask: Tensor) -> Counts:
    """Sum of `values` [n, s] or [n, s, g] over real places, and their number, per row."""
    return Counts((values.double() * mask).flatten(1).sum(1).numpy(), mask.flatten(1).sum(1).double().numpy())


def bootstrap_ratio(count: np.ndarray, total: np.ndarray, clips: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """95 % interval of sum(count) / sum(total), resampling clips with replacement."""
    names, cluster = np.unique(np.asarray(clips), return_inverse=True)
    c, t = np.bincount(cluster, count, len(names)), np.bincount(cluster, total, len(names))
    if len(names) < 2 or t.sum() == 0:
        return float("nan"), float("nan")
    weights = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=BOOTSTRAPS)
    totals = weights @ t
    ratios = (weights @ c)[totals > 0] / totals[totals > 0]
    lo, hi = np.percentile(ratios, (2.5, 97.5))
    return float(lo), float(hi)


def leading_run(bits: Tensor, mask: Tensor) -> Tensor:
    """Ones before the first zero (or the end), per row: [n, s] -> [n]."""
    return (bits & mask).int().cumprod(1).sum(1)


def run_from(bits: Tensor, mask: Tensor) -> Tensor:
    """At each position, how many ones follow without a break, itself included: [n, s] -> [n, s]."""
    runs = torch.zeros_like(bits, dtype=torch.long)
    follow = torch.zeros(len(bits), dtype=torch.long)
    for t in range(bits.shape[1] - 1, -1, -1):
        follow = torch.where((bits & mask)[:, t], follow + 1, 0)
        runs[:, t] = follow
    return runs


@dataclass(frozen=True)
class Blocks:
    """The rounds decoding would form, read off one teacher-forced pass (semantics: the trace identity).

    rows, starts: [r] which text, and the position of the round's first draft
    offered:      [r] drafts that count: num_draft_tokens, fewer at the end of a text, none for the last token of one cut off
    accepted:     [r] leading drafts kept
    """

    rows: np.ndarray
    starts: np.ndarray
    offered: np.ndarray
    accepted: np.ndarray

    def acceptance_rate(self, n: int) -> Counts:
        """Kept / reached, per row: the draft after the last kept one was reached too, where there was one."""
        reached = np.minimum(self.accepted + 1, self.offered)
        return Counts(np.bincount(self.rows, self.accepted, n), np.bincount(self.rows, reached, n))

    def consecutive_accept(self, n: int) -> Counts:
        """num_accepted / offered drafts, per row."""
        return Counts(np.bincount(self.rows, self.accepted, n), np.bincount(self.rows, self.offered, n))

    def consecutive_length(self, n: int) -> Counts:
        """num_accepted per round, per row."""
        return Counts(np.bincount(self.rows, self.accepted, n), np.bincount(self.rows, self.offered > 0, n))

    def tokens_per_pass(self, lengths: Tensor) -> float:
        """Emitted tokens after the first of each text / verifications. A text that ends with its first token needs none."""
        return float((lengths - 1).clamp(min=0).sum()) / max(1, len(self.rows))


def decoding_blocks(bits: Tensor, mask: Tensor, num_draft_tokens: int, ended: Tensor | None = None) -> Blocks:
    """Form the rounds: position 0 comes from the target's prefill, a round at t keeps min(g, run of ones from t), and its extra
    token takes the place behind them.

    bits: [n, s] bool  draft kept at this position, given everything before it is the target's own text;
          [n, s, g]    where drafts depend on where their round began: [:, t, k] is draft k of a round at t, for position t + k
    mask: [n, s] bool  real positions, EOS included
    ended: [n] bool    texts that end with EOS (default all). One cut off at the length limit gets its last token without a draft,
                       because every round also emits a token of the target's own
    """
    runs = run_from(bits, mask) if bits.ndim == 2 else bits.long().cumprod(-1).sum(-1)
    lengths = mask.sum(1)
    out: list[tuple[int, int, int, int]] = []
    for row in range(len(bits)):
        t, n = 1, int(lengths[row])
        while t < n:
            offered = min(num_draft_tokens, n - t - (0 if ended is None or bool(ended[row]) else 1))
            kept = min(offered, int(runs[row, t]))
            out.append((row, t, offered, kept))
            t += kept + 1
    table = np.array(out, dtype=np.int64).reshape(-1, 4)
    return Blocks(*table.T)


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve (Mann-Whitney), ties counted half; nan if one class is missing."""
    positive = positive.astype(bool)
    n1, n0 = int(positive.sum()), int((~positive).sum())
    if not n1 or not n0:
        return float("nan")
    _, inverse, count = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    rank = (last - (count - 1) / 2)[inverse]  # mean rank of equal scores, from 1
    return float((rank[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


# ------------------------------------------------------------------------------------------------------------ speed (formulas)


def tokens_per_pass_iid(acceptance_rate: float, num_draft_tokens: int) -> float:
    """E = (1 - a^(g+1)) / (1 - a), Leviathan et al. 2211.17192: expected tokens of one round if acceptance is independent."""
    a, g = acceptance_rate, num_draft_tokens
    return float(g + 1) if a >= 1 else (1 - a ** (g + 1)) / (1 - a)


def modelled_speedup(tokens: float, overhead: float, rejection_cost: float = 0.0) -> float:
    """E / (1 + overhead + rejection cost), as TASKS.md writes it; overhead = (time of all drafts + adapter) / target step."""
    return tokens / (1 + overhead + rejection_cost)


def corrected_speedup(tokens: float, num_draft_tokens: float, c: float, v: float) -> float:
    """S = E / (g c + v): c = one draft, adapter and head included, v = one verification, both in target steps."""
    return tokens / (num_draft_tokens * c + v)


def break_even(overhead: float, num_draft_tokens: int, goal: float = 1.0) -> float:
    """Acceptance above which relaxed decoding pays, as TASKS.md writes it: goal (1 + overhead) / g."""
    return goal * (1 + overhead) / num_draft_tokens
