"""What decides the tokens of one text: argmax or a sampler over the target's logits, and the ids after which a text ends.

The decoding loop makes one `Law` a text and hands it to the drafter as well, so that draft tokens are chosen as the target chooses.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from feature_alignment.decoding.sampling import Pick, Sampler, pick
from feature_alignment.models.decoder import Decoder, Prompt


@dataclass(frozen=True)
class Law:
    """How a token follows from logits, and where a text ends.

    Args:
        eos_ids: token ids that end a text.
        sampler: draws tokens; None for greedy decoding.
    """

    eos_ids: Collection[int] = ()
    sampler: Sampler | None = None

    @classmethod
    def of(cls, target: Decoder, prompt: Prompt, sampler: Sampler | None = None) -> Law:
        """The law of the target's answer to this prompt."""
        return cls(target.eos_ids, sampler)

    def pick(self, logits: Tensor, text: Sequence[int], confidence: bool = False) -> Pick:
        """The token after `text`, from its logits [1, v]. confidence: ask for its probability."""
        return pick(logits, self.sampler, confidence, len(text))

    def kept_of(self, drafts: Tensor, probs: Tensor | None, logits: Tensor, text: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Which draft tokens after `text` are kept under the token rule [g] bool, and the target's token after those [].

        Args:
            drafts: [g] int64.
            probs: [g, v], what each was drawn from; None: none was drawn.
            logits: [g + 1, v], the target's at each draft token's position and after the last one.
            text: tokens before the draft tokens.
        """
        if self.sampler is not None:
            return self.sampler.judge(drafts, probs, self.sampler.probs(logits), len(text))
        says = logits.argmax(-1)
        kept = (drafts == says[:-1]).cumprod(0).bool()
        return kept, says[int(kept.sum())]

    def end_of(self, tokens: Sequence[int]) -> int | None:
        """How many of `tokens` there are up to and including the first that ends a text; None: none does."""
        return next((i + 1 for i, token in enumerate(tokens) if token in self.eos_ids), None)
