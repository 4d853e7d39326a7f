"""What decides the tokens of one text: the target's logits under its checkpoint's rules, and argmax or a sampler over them.

The decoding loop makes one `Law` a text and hands it to the drafter as well, so that draft tokens are chosen as the target chooses.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from feature_alignment.decoding.sampling import Sampler
from feature_alignment.models.decoder import Decoder, Prompt
from feature_alignment.models.generation import GenerationRules


class Pick(NamedTuple):
    """A token [1], what it was drawn from [1, v] (None: not drawn, the most likely one), and the highest probability there, where it was
    asked for (else 1)."""

    token: Tensor
    probs: Tensor | None
    confidence: float


@dataclass(frozen=True)
class Law:
    """How a token follows from logits, and where a text ends.

    Args:
        rules: of the target's checkpoint and of flags, at work on this text.
        sampler: draws tokens; None for greedy decoding.
    """

    rules: GenerationRules = field(default_factory=GenerationRules)
    sampler: Sampler | None = None

    @classmethod
    def of(cls, target: Decoder, prompt: Prompt, sampler: Sampler | None = None) -> Law:
        """The law of the target's answer to this prompt."""
        return cls(target.rules(prompt.ids), sampler)

    @property
    def eos_ids(self) -> Collection[int]:
        return self.rules.eos_ids

    def pick(self, logits: Tensor, text: Sequence[int], confidence: bool = False) -> Pick:
        """The token after `text`, from its logits [1, v]. confidence: ask for the highest probability."""
        scores = self.rules.scores(logits, text)
        if self.sampler is None:
            return Pick(scores.argmax(-1), None, float(scores[0].float().softmax(-1).max()) if confidence else 1.0)
        probs = self.sampler.probs(scores, self.rules.warpers)
        return Pick(self.sampler.draw(probs, len(text)), probs, float(probs[0].max()) if confidence else 1.0)

    def kept_of(self, drafts: Tensor, probs: Tensor | None, scores: Tensor, text: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Which draft tokens after `text` are kept under the token rule [g] bool, and the target's token after those [].

        Args:
            drafts: [g] int64.
            probs: [g, v], what each was drawn from; None: none was drawn.
            scores: [g + 1, v], the target's at each draft token's position and after the last one, as the rules changed them.
            text: tokens before the draft tokens.
        """
        if self.sampler is not None:
            return self.sampler.judge(drafts, probs, self.sampler.probs(scores, self.rules.warpers), len(text))
        says = scores.argmax(-1)
        kept = (drafts == says[:-1]).cumprod(0).bool()
        return kept, says[int(kept.sum())]
