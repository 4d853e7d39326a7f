"""Lossless sampling: draft tokens are accepted and replaced so that the text has the distribution of sampling from the target alone.

Draft token x was drawn from q; the target's distribution at its position is p. Two couplings of the two draws, both exact:

    maximal       accept x with probability min(1, p(x) / q(x)); replace the first rejected token by a draw from max(0, p - q), normalized
                  (Leviathan et al. 2211.17192, Chen et al. 2302.01318). No coupling accepts more draft tokens, but which random number
                  decides a position depends on where its round began.
    shared noise  each position of a text has its own noise E[v], computed from the seed and the position. The target's token is
                  argmin(E / p), the draft token argmin(E / q); a draft token is accepted if both are equal (Gumbel-max coupling;
                  Daliri et al. 2408.07978). The text equals plain decoding with the same seed, whatever was drafted, so it does not
                  depend on timing. It accepts somewhat fewer draft tokens: at least (1 - d) / (1 + d), d = total variation distance.

A draft token that was not drawn (an argmax, a table entry) has all of q on itself: both couplings accept it with probability p(x).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Sampler:
    """Draws tokens from softmax(logits / temperature), reproducibly.

    Args:
        temperature: above 0
        seed: of all draws of a text; see `restart`
        device: where logits are
        shared_noise: draw with noise per position instead of one stream of random numbers
    """

    def __init__(self, temperature: float, seed: int = 0, device: torch.device | str = "cpu", shared_noise: bool = False) -> None:
        if temperature <= 0:
            raise ValueError(f"sampling needs a temperature above 0, got {temperature}")
        self.temperature, self.shared_noise = temperature, shared_noise
        self._generator = torch.Generator(device)
        self.restart(seed)

    def restart(self, seed: int) -> None:
        """Draw like a new sampler with this seed. With shared noise, two texts with one seed have the same noise."""
        self._seed = seed
        self._generator.manual_seed(seed)

    def probs(self, logits: Tensor, warpers: Callable[..., Tensor] | None = None) -> Tensor:
        """The distribution that tokens are drawn from.

        Args:
            logits: [n, v]
            warpers: transformers' processors that follow the temperature, for example top-p

        Returns:
            [n, v] float32
        """
        scores = logits.float() / self.temperature
        return (warpers(None, scores) if warpers else scores).softmax(-1)

    def draw(self, probs: Tensor, position: int = 0) -> Tensor:
        """Draw one token per row, for successive positions of the text.

        Args:
            probs: [n, v], the distribution at each position; rows need not be normalized
            position: of the first row in the text, counted from its first token; used with shared noise only

        Returns:
            [n] int64
        """
        if not self.shared_noise:
            return torch.multinomial(probs, 1, generator=self._generator)[:, 0]
        noise = np.stack([self._noise(position + i, probs.shape[-1]) for i in range(len(probs))])
        return (probs / torch.from_numpy(noise).to(probs)).argmax(-1)

    def accept(self, draft_ids: Tensor, draft_probs: Tensor | None, target_probs: Tensor, position: int = 0) -> tuple[Tensor, Tensor]:
        """Accept draft tokens up to the first rejected one, and draw the target's token after them.

        Args:
            draft_ids: [g] int64
            draft_probs: at least [g, v], the distribution each was drawn from; None: point masses
            target_probs: at least [g + 1, v], the target's distribution at the position of each draft token and after the last one
            position: of the first draft token in the text

        Returns:
            accepted [g] bool, and the token after the accepted ones, []
        """
        g, v = len(draft_ids), target_probs.shape[-1]
        if self.shared_noise:
            target_tokens = self.draw(target_probs, position)
            accepted = (draft_ids == target_tokens[:g]).cumprod(0).bool()
            return accepted, target_tokens[int(accepted.sum())]
        q = F.one_hot(draft_ids, v).to(target_probs.dtype) if draft_probs is None else draft_probs.to(target_probs)
        index = draft_ids[:, None]
        uniform = torch.rand(g, generator=self._generator, device=target_probs.device)
        accepted = (uniform * q.gather(1, index)[:, 0] < target_probs[:g].gather(1, index)[:, 0]).cumprod(0).bool()
        n = int(accepted.sum())
        residual = target_probs[n] if n == g else (target_probs[n] - q[n]).clamp(min=0)
        if not residual.any():  # p and q differ by rounding only
            residual = target_probs[n]
        return accepted, self.draw(residual[None])[0]

    def _noise(self, position: int, v: int) -> np.ndarray:
        """Exponential variates [v] float32 above 0, a function of seed and position (Philox, a counter-based generator)."""
        source = np.random.Generator(np.random.Philox(key=np.array([self._seed % 2**64, position], np.uint64)))
        return np.maximum(source.standard_exponential(v), 1e-30).astype(np.float32)
