"""How a token is selected from logits: the checkpoint's generation settings first, then argmax or sampling.

The decoding loop makes one `TokenSelector` for each text and also gives it to the drafter, so that draft tokens are selected exactly as
the target selects its own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from feature_alignment.decoding.sampling import Sampler
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.generation import GenerationRules
from feature_alignment.models.state import Prompt


class Selected(NamedTuple):
    """One selected token.

    Args:
        token: [1] int64
        probs: [1, v], the distribution it was drawn from; None if it is an argmax
        confidence: the highest probability under its logits; 1 if it was not requested
        scores: [1, v], the processed logits; None where they cover only some ids
    """

    token: Tensor
    probs: Tensor | None
    confidence: float
    scores: Tensor | None = None


@dataclass(frozen=True)
class TokenSelector:
    """How the tokens of one text follow from logits, and where the text ends.

    Args:
        rules: generation settings of the target's checkpoint and of flags, for this text
        sampler: draws tokens; None for greedy decoding
    """

    rules: GenerationRules = field(default_factory=GenerationRules)
    sampler: Sampler | None = None

    @classmethod
    def of(cls, target: Decoder, prompt: Prompt, sampler: Sampler | None = None) -> TokenSelector:
        """The selector for the target's answer to a prompt."""
        return cls(target.rules(prompt.ids), sampler)

    @property
    def eos_ids(self) -> Collection[int]:
        """Token ids that end a text."""
        return self.rules.eos_ids

    @property
    def is_plain_argmax(self) -> bool:
        """Whether a token is the argmax of its logits alone, whatever the text before it."""
        return self.sampler is None and not self.rules.processors

    def select(self, logits: Tensor, text: Sequence[int], confidence: bool = False) -> Selected:
        """Select the token that follows a text.

        Args:
            logits: [1, v]
            text: token ids of the answer so far
            confidence: also compute the highest probability
        """
        scores = self.rules.scores(logits, text)
        if self.sampler is None:
            return Selected(scores.argmax(-1), None, float(scores[0].float().softmax(-1).max()) if confidence else 1.0, scores)
        probs = self.sampler.probs(scores, self.rules.warpers)
        return Selected(self.sampler.draw(probs, len(text)), probs, float(probs[0].max()) if confidence else 1.0, scores)

    def accept(self, drafts: Tensor, probs: Tensor | None, scores: Tensor, text: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Apply the token rule to the draft tokens of a round of sampling.

        Args:
            drafts: [g] int64
            probs: at least [g, v], the distribution each was drawn from; None if none was drawn
            scores: at least [g + 1, v], the target's processed logits at the position of each draft token and after the last one
            text: token ids before the draft tokens

        Returns:
            accepted [g] bool, and the target's token after the accepted ones, []
        """
        assert self.sampler is not None  # greedy decoding compares token ids
        return self.sampler.accept(drafts, probs, self.sampler.probs(scores, self.rules.warpers), len(text))
