"""Sampling without loss: drafts are kept and replaced so that the text has the law of sampling from the target alone.

Draft x was drawn from q; the target's own law in its place is p (Leviathan et al. 2211.17192, Chen et al. 2302.01318):

    keep x with probability min(1, p(x) / q(x)); the first one not kept is replaced by a draw from max(0, p - q), normalised

A draft that was not drawn (an argmax, a table's entry) has all of q on itself: it is kept with probability p(x).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Sampler:
    """Draws tokens from softmax(logits / temperature); the same seed draws the same."""

    def __init__(self, temperature: float, seed: int = 0, device: torch.device | str = "cpu") -> None:
        if temperature <= 0:
            raise ValueError(f"sampling wants a temperature above 0, got {temperature}")
        self.temperature = temperature
        self._generator = torch.Generator(device).manual_seed(seed)

    def probs(self, logits: Tensor) -> Tensor:
        """[.., v] float32."""
        return (logits.float() / self.temperature).softmax(-1)

    def draw(self, probs: Tensor) -> Tensor:
        """One token per row: [n, v] -> [n] int64. Rows need not be normalised."""
        return torch.multinomial(probs, 1, generator=self._generator)[:, 0]

    def judge(self, draft_ids: Tensor, draft_probs: Tensor | None, target_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Which drafts are kept [g] bool, up to the first that is not, and the token behind them [].

        draft_ids:    [g] int64
        draft_probs:  [g, v], what each was drawn from; None: point masses
        target_probs: [g + 1, v], the target's law in each place, and behind the last draft
        """
        g, v = len(draft_ids), target_probs.shape[-1]
        q = F.one_hot(draft_ids, v).to(target_probs.dtype) if draft_probs is None else draft_probs
        place = draft_ids[:, None]
        bets = torch.rand(g, generator=self._generator, device=target_probs.device)
        kept = (bets * q.gather(1, place)[:, 0] < target_probs[:g].gather(1, place)[:, 0]).cumprod(0).bool()
        n = int(kept.sum())
        left = target_probs[n] if n == g else (target_probs[n] - q[n]).clamp(min=0)
        return kept, self.draw(left[None])[0]


class Pick(NamedTuple):
    """Tokens [n], what they were drawn from [n, v] (None: not drawn, the most likely ones), and the share of the first one's
    probability, where it was asked for (else 1)."""

    token: Tensor
    probs: Tensor | None
    confidence: float


def pick(logits: Tensor, sampler: Sampler | None, confidence: bool = False) -> Pick:
    """The next token of each row of logits [n, v]: drawn by the sampler, without one the argmax."""
    if sampler is None:
        return Pick(logits.argmax(-1), None, float(logits[0].float().softmax(-1).max()) if confidence else 1.0)
    probs = sampler.probs(logits)
    return Pick(sampler.draw(probs), probs, float(probs[0].max()) if confidence else 1.0)
