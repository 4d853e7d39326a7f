"""The rounds that greedy decoding would form, derived from one teacher-forced pass over the target's own texts.

    bits        accepted draft tokens of a round at each position
    round at t  accepts the run of ones from t; the next one starts after its extra token

Training chooses its best epoch by the tokens per pass of these rounds; `measurement.metrics` derives its rates from them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ROUND_DRAFT_TOKENS = 5  # draft length of the rounds on validation texts


def run_from(bits: Tensor, mask: Tensor) -> Tensor:
    """Length of the run of ones that starts at each position.

    Args:
        bits: [n, s] bool
        mask: [n, s] bool, valid positions

    Returns:
        [n, s] int64; 0 where the bit is 0
    """
    runs = torch.zeros_like(bits, dtype=torch.long)
    follow = torch.zeros(len(bits), dtype=torch.long)
    for t in range(bits.shape[1] - 1, -1, -1):
        follow = torch.where((bits & mask)[:, t], follow + 1, 0)
        runs[:, t] = follow
    return runs


def rounds(bits: Tensor, mask: Tensor, num_draft_tokens: int, ended: Tensor | None = None) -> np.ndarray:
    """Form the rounds of decoding. Position 0 comes from the target's prefill.

    Args:
        bits: bool; [n, s] whether the draft token at this position is accepted if everything before it is the target's own text; or
            [n, s, g] for drafters that depend on the start of the round: [:, t, k] is draft token k of a round at t, for position t + k
        mask: [n, s] bool, valid positions, EOS included
        num_draft_tokens: draft length
        ended: [n] bool, texts that end with EOS (default: all). The last token of a text that was cut off at the length limit is never
            drafted, because every round also emits a token of the target's own

    Returns:
        [r, 4] int64: text, position of the first draft token, draft tokens that count, accepted draft tokens
    """
    runs = (run_from(bits, mask) if bits.ndim == 2 else bits.long().cumprod(-1).sum(-1)).tolist()
    lengths = mask.sum(1).tolist()
    found: list[tuple[int, int, int, int]] = []
    for row, n in enumerate(lengths):
        t = 1
        while t < n:
            offered = min(num_draft_tokens, n - t - (0 if ended is None or bool(ended[row]) else 1))
            accepted = min(offered, runs[row][t])
            found.append((row, t, offered, accepted))
            t += accepted + 1
    return np.array(found, dtype=np.int64).reshape(-1, 4)


def tokens_per_pass(bits: Tensor, mask: Tensor, ended: Tensor | None = None) -> float:
    """Tokens after the first of each text, per verification, in rounds of `ROUND_DRAFT_TOKENS`; arguments as in `rounds`."""
    return float((mask.sum(1) - 1).clamp(min=0).sum()) / max(1, len(rounds(bits, mask, ROUND_DRAFT_TOKENS, ended)))
