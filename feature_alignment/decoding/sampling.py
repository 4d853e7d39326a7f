"""Sampling without loss: draft tokens are kept and replaced so that the text has the law of sampling from the target alone.

Draft token x was drawn from q; the target's own law at its position is p. Two couplings of the two draws, both exact:

    maximal       keep x with probability min(1, p(x) / q(x)); the first one not kept is replaced by a draw from max(0, p - q), normalized
                  (Leviathan et al. 2211.17192, Chen et al. 2302.01318). No coupling keeps more draft tokens, but which random number
                  decides a position depends on where its round began
    shared noise  each position of a text has its own noise E[v], made from the seed and the position alone. The target's token is
                  argmin(E / p), the draft token argmin(E / q), and a draft token is kept where the two are equal (Gumbel-max coupling;
                  Daliri et al. 2408.07978). The text is that of plain decoding with the same seed, whatever was drafted, so it cannot
                  depend on time. It keeps somewhat fewer draft tokens: at least (1 - d) / (1 + d), for d the total variation distance

A draft token that was not drawn (an argmax, a table's entry) has all of q on itself: both couplings keep it with probability p(x).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Sampler:
    """Draws tokens from softmax(logits / temperature); the same seed draws the same.

    Args:
        temperature: above 0.
        seed: of all draws of a text; see `restart`.
        device: where logits are.
        shared_noise: draw by noise per position instead of by one stream of random numbers.
    """

    def __init__(self, temperature: float, seed: int = 0, device: torch.device | str = "cpu", shared_noise: bool = False) -> None:
        if temperature <= 0:
            raise ValueError(f"sampling wants a temperature above 0, got {temperature}")
        self.temperature, self.shared_noise = temperature, shared_noise
        self._generator = torch.Generator(device)
        self.restart(seed)

    def restart(self, seed: int) -> None:
        """Draw as a new sampler with this seed does. With shared noise, two texts with one seed have the same noise."""
        self._seed = seed
        self._generator.manual_seed(seed)

    def probs(self, logits: Tensor, narrows: Callable[..., Tensor] | None = None) -> Tensor:
        """The law of logits [n, v]: [n, v] float32. narrows: transformers' processors after the temperature, such as top-p"""
        scores = logits.float() / self.temperature
        return (narrows(None, scores) if narrows else scores).softmax(-1)

    def draw(self, probs: Tensor, position: int = 0) -> Tensor:
        """One token per row, at successive positions of the text: [n, v] -> [n] int64. Rows need not be normalized.

        Args:
            probs: [n, v], the law of each position.
            position: of the first row in the text, counted from its first token; without shared noise it does not matter.
        """
        if not self.shared_noise:
            return torch.multinomial(probs, 1, generator=self._generator)[:, 0]
        noise = np.stack([self._noise(position + i, probs.shape[-1]) for i in range(len(probs))])
        return (probs / torch.from_numpy(noise).to(probs)).argmax(-1)

    def judge(self, draft_ids: Tensor, draft_probs: Tensor | None, target_probs: Tensor, position: int = 0) -> tuple[Tensor, Tensor]:
        """Which draft tokens are kept [g] bool, up to the first that is not, and the token after them [].

        Args:
            draft_ids: [g] int64.
            draft_probs: [g, v], what each was drawn from; None: point masses.
            target_probs: [g + 1, v], the target's law at each draft token's position, and after the last one.
            position: of the first draft token in the text.
        """
        g, v = len(draft_ids), target_probs.shape[-1]
        if self.shared_noise:
            says = self.draw(target_probs, position)
            kept = (draft_ids == says[:g]).cumprod(0).bool()
            return kept, says[int(kept.sum())]
        q = F.one_hot(draft_ids, v).to(target_probs.dtype) if draft_probs is None else draft_probs.to(target_probs)
        place = draft_ids[:, None]
        bets = torch.rand(g, generator=self._generator, device=target_probs.device)
        kept = (bets * q.gather(1, place)[:, 0] < target_probs[:g].gather(1, place)[:, 0]).cumprod(0).bool()
        n = int(kept.sum())
        left = target_probs[n] if n == g else (target_probs[n] - q[n]).clamp(min=0)
        if not left.any():  # p and q differ by rounding only
            left = target_probs[n]
        return kept, self.draw(left[None])[0]

    def _noise(self, position: int, v: int) -> np.ndarray:
        """Exponential variates [v] float32, above 0, that depend on seed and position alone (Philox, a counter-based generator)."""
        source = np.random.Generator(np.random.Philox(key=np.array([self._seed % 2**64, position], np.uint64)))
        return np.maximum(source.standard_exponential(v), 1e-30).astype(np.float32)
