"""Counts from tensors, and rates with confidence intervals from counts.

Rows are texts, columns their positions; `mask` is False where a text is padded. Functions return (count, total) per row, which are
divided only when they are reported. Intervals are 95 % percentile bootstrap intervals that resample clips, because the tokens of one
clip are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from feature_alignment.adapters.rounds import rounds
from feature_alignment.cli.console import rate_text
from feature_alignment.measurement.records import Record

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Rate(Record):
    """A ratio of sums.

    Args:
        value: count / total; nan if total is 0
        count: numerator, summed over rows
        total: denominator, summed over rows
        ci95: 95 % interval (low, high); nan where fewer than two clips were measured
    """

    value: float
    count: float
    total: float
    ci95: tuple[float, float]

    def text(self, digits: int = 4, scale: float = 1.0, unit: str = "") -> str:
        """`value unit [low, high]` for tables; "-" if the value is nan, no interval if there is none."""
        return rate_text({"value": self.value, "ci95": self.ci95}, digits, scale, unit)


@dataclass(frozen=True)
class Counts:
    """A rate before the division.

    Args:
        count: [n] float64, numerator of each row
        total: [n] float64, denominator of each row
    """

    count: np.ndarray
    total: np.ndarray

    @property
    def value(self) -> float:
        """Sum of counts / sum of totals; nan if the latter is 0."""
        total = float(self.total.sum())
        return float(self.count.sum()) / total if total else float("nan")

    def rate(self, clips: Sequence[str]) -> Rate:
        """The rate over all rows, with its interval.

        Args:
            clips: clip of each row
        """
        interval = bootstrap_ratio(self.count, self.total, clips)
        return Rate(self.value, float(self.count.sum()), float(self.total.sum()), interval)


def counts(values: Tensor, mask: Tensor) -> Counts:
    """Sum `values` over the valid positions of each row, and count those positions.

    Args:
        values: [n, s] or [n, s, g], bool or float
        mask: bool, same shape, True at valid positions
    """
    return Counts((values.double() * mask).flatten(1).sum(1).numpy(), mask.flatten(1).sum(1).double().numpy())


def bootstrap_ratio(count: np.ndarray, total: np.ndarray, clips: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of sum(count) / sum(total), resampling clips with replacement.

    Args:
        count: [n] float64
        total: [n] float64
        clips: clip of each row
        seed: of the resampling

    Returns:
        (low, high); nan if there are fewer than two clips or the total is 0
    """
    names, cluster = np.unique(np.asarray(clips), return_inverse=True)
    c, t = np.bincount(cluster, count, len(names)), np.bincount(cluster, total, len(names))
    if len(names) < 2 or t.sum() == 0:
        return float("nan"), float("nan")
    weights = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=NUM_RESAMPLES)
    totals = weights @ t
    ratios = (weights @ c)[totals > 0] / totals[totals > 0]
    lo, hi = np.percentile(ratios, (2.5, 97.5))
    return float(lo), float(hi)


def leading_run(bits: Tensor, mask: Tensor) -> Tensor:
    """Number of leading ones in each row.

    Args:
        bits: [n, s] bool
        mask: [n, s] bool, valid positions

    Returns:
        [n] int64
    """
    return (bits & mask).int().cumprod(1).sum(1)


@dataclass(frozen=True)
class Blocks:
    """The rounds that greedy decoding would form, derived from one teacher-forced pass.

    Args:
        rows: [r] int64, text of each round
        starts: [r] int64, position of the round's first draft token
        offered: [r] int64, draft tokens that count: num_draft_tokens, fewer at the end of a text
        accepted: [r] int64, leading draft tokens that are accepted
    """

    rows: np.ndarray
    starts: np.ndarray
    offered: np.ndarray
    accepted: np.ndarray

    def acceptance_rate(self, n: int) -> Counts:
        """Accepted / reached draft tokens of each of `n` texts; the first rejected draft token counts as reached."""
        reached = np.minimum(self.accepted + 1, self.offered)
        return Counts(np.bincount(self.rows, self.accepted, n), np.bincount(self.rows, reached, n))

    def consecutive_accept(self, n: int) -> Counts:
        """Accepted / offered draft tokens of each of `n` texts."""
        return Counts(np.bincount(self.rows, self.accepted, n), np.bincount(self.rows, self.offered, n))

    def consecutive_length(self, n: int) -> Counts:
        """Accepted draft tokens per round of each of `n` texts."""
        return Counts(np.bincount(self.rows, self.accepted, n), np.bincount(self.rows, self.offered > 0, n))

    def tokens_per_pass(self, lengths: Tensor) -> float:
        """Tokens after the first of each text, per verification.

        Args:
            lengths: [n] int64, tokens of each text
        """
        return float((lengths - 1).clamp(min=0).sum()) / max(1, len(self.rows))


def decoding_blocks(bits: Tensor, mask: Tensor, num_draft_tokens: int, ended: Tensor | None = None) -> Blocks:
    """The rounds of decoding; arguments as in `adapters.rounds.rounds`."""
    return Blocks(*rounds(bits, mask, num_draft_tokens, ended).T)


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve (Mann-Whitney statistic, ties count half).

    Args:
        scores: [p] float
        positive: [p] bool

    Returns:
        The area; nan if one class is empty.
    """
    positive = positive.astype(bool)
    n1, n0 = int(positive.sum()), int((~positive).sum())
    if not n1 or not n0:
        return float("nan")
    _, inverse, count = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    rank = (last - (count - 1) / 2)[inverse]  # mean rank of equal scores, from 1
    return float((rank[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


# ---- formulas of speed


def tokens_per_pass_iid(acceptance_rate: float, num_draft_tokens: int) -> float:
    """Expected tokens of one round if draft tokens are accepted independently: E = (1 - a^(g+1)) / (1 - a) (Leviathan et al. 2211.17192).

    Args:
        acceptance_rate: a
        num_draft_tokens: g
    """
    a, g = acceptance_rate, num_draft_tokens
    return float(g + 1) if a >= 1 else (1 - a ** (g + 1)) / (1 - a)


def modelled_speedup(tokens: float, overhead: float, rejection_cost: float = 0.0) -> float:
    """TASKS.md's formula: E / (1 + overhead + rejection cost).

    Args:
        tokens: E, expected tokens of one round
        overhead: time of all draft steps and adapter calls of a round, in target steps
        rejection_cost: time of reading rejected positions again, in target steps
    """
    return tokens / (1 + overhead + rejection_cost)


def corrected_speedup(tokens: float, num_draft_tokens: float, c: float, v: float) -> float:
    """The corrected formula: S = E / (g c + v).

    Args:
        tokens: E, expected tokens of one round
        num_draft_tokens: g
        c: one draft token, adapter and LM head included, in target steps
        v: one verification, in target steps
    """
    return tokens / (num_draft_tokens * c + v)


def break_even(overhead: float, num_draft_tokens: int, goal: float = 1.0) -> float:
    """TASKS.md's break-even acceptance of relaxed decoding: goal (1 + overhead) / g.

    Args:
        overhead: time of all draft steps and adapter calls of a round, in target steps
        num_draft_tokens: g
        goal: wanted speed-up
    """
    return goal * (1 + overhead) / num_draft_tokens
