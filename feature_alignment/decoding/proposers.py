"""Drafters that use a model. A proposer reads the text so far and proposes draft tokens; it may predict the target's hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.decoding.token_selection import Selected, TokenSelector
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.fixed import captured
from feature_alignment.models.state import Prompt, ReadPrompt, State


@dataclass(frozen=True)
class Draft:
    """The draft tokens of one round, possibly none.

    Args:
        token_ids: [g] int64, on any device
        predicted: computes [g, d_target], the predicted target states; None if the drafter predicts none. A function, because only
            the cosine rules and traces need them
        probs: [g, v], the distribution each token was drawn from; None if none was drawn
        confidence: for each token, its chance to be accepted if all before it are; None if it was not computed
        logits: computes [g, v], the logits each token was selected from; None if there are none over all ids. Only `kl` needs them
    """

    token_ids: Tensor
    predicted: Callable[[], Tensor] | None = None
    probs: Tensor | None = None
    confidence: Sequence[float] | None = None
    logits: Callable[[], Tensor] | None = None

    @classmethod
    def of(cls, selected: Sequence[Selected], predicted: Callable[[], Tensor] | None) -> Draft:
        """A draft of at least one selected token; either all or none were drawn."""
        probs = [s.probs for s in selected if s.probs is not None]
        scores = [s.scores for s in selected if s.scores is not None]
        token_ids, confidence = torch.cat([s.token for s in selected]), [s.confidence for s in selected]
        return cls(token_ids, predicted, torch.cat(probs) if probs else None, confidence, (lambda: torch.cat(scores)) if scores else None)


class Proposer(Protocol):
    """A drafter. Subclasses implement `start` and `propose`."""

    reads_prompt: bool = True  # `start` takes time
    has_confidence: bool = True  # computes the chance of its draft tokens and stops at the confidence floor
    selector: TokenSelector = TokenSelector()  # of the current text; the decoding loop sets it before `start`

    def start(self, prompt: Prompt, watch: Stopwatch) -> None:
        """Read a new prompt."""

    def read_target_prompt(self, prompt: Prompt, read: ReadPrompt, watch: Stopwatch) -> None:
        """Receive the target's prompt and what it read there, [s, d_target] each; called once for each text, after `start`."""
        return None

    def propose(self, emitted: Sequence[int], states: Tensor, num_tokens: int, watch: Stopwatch, confidence_floor: float = 0.0) -> Draft:
        """Propose at most `num_tokens` draft tokens, none after a token that ends the text.

        Args:
            emitted: token ids of the text so far; tokens that the target has verified never change
            states: [n, d_target], the target's hidden states that emitted the first n tokens; later tokens are draft tokens themselves
            num_tokens: at least 1
            watch: books the time
            confidence_floor: drafting ends with the token whose chance to be accepted, with all before it, is below this; ignored
                without `has_confidence`
        """

    def finish(self, emitted: Sequence[int]) -> None:
        """The text is complete."""
        return None


class ModelProposer(Proposer):
    """EventGPT drafts token by token and reads each of its draft tokens.

    Args:
        draft: EventGPT
        adapter: maps its hidden states to predicted target states; without it only the `token` rule can judge the draft tokens
        target_head: target states -> logits. With it, draft tokens are read from the predicted states (`aligned`); without it, from
            EventGPT's own head (`own`)
    """

    def __init__(
        self,
        draft: Decoder,
        adapter: Callable[[Tensor], Tensor] | None,
        target_head: Callable[[Tensor], Tensor] | None,
    ) -> None:
        if target_head is not None and adapter is None:
            raise ValueError("aligned draft tokens need an adapter")
        self._draft, self._target_head = draft, target_head
        self._adapter = None if adapter is None else captured(adapter, draft.steps)
        self._state: State  # of the current prompt
        self._read: list[int] = []  # tokens in EventGPT's cache after the prompt

    def start(self, prompt: Prompt, watch: Stopwatch) -> None:
        """See `Proposer`."""
        with watch("draft_prefill"):
            self._state = self._draft.prefill([prompt])
        self._read = []

    @torch.inference_mode()
    def propose(self, emitted: Sequence[int], states: Tensor, num_tokens: int, watch: Stopwatch, confidence_floor: float = 0.0) -> Draft:
        """See `Proposer`."""
        with watch("draft"):
            hidden = self._catch_up(emitted)
        text: list[int] = []
        selected: list[Selected] = []
        predicted: list[Tensor] = []
        chance = 1.0
        while not text or (len(text) < num_tokens and chance >= confidence_floor and text[-1] not in self.selector.eos_ids):
            if selected:
                with watch("draft"):
                    hidden = self._draft.step(self._state, selected[-1].token[None])[:, -1]
            if self._adapter is not None:
                with watch("adapter"):
                    predicted.append(self._adapter(hidden))
            with watch("head"):
                logits = self._draft.lm_head(hidden) if self._target_head is None else self._target_head(predicted[-1])
                selected.append(self.selector.select(logits, [*emitted, *text], confidence=confidence_floor > 0))
                text.append(int(selected[-1].token))
            chance *= selected[-1].confidence
        self._read += text[:-1]  # the last draft token has not been read
        return Draft.of(selected, (lambda: torch.cat(predicted)) if predicted else None)

    def _catch_up(self, emitted: Sequence[int]) -> Tensor:
        """Roll back rejected tokens and read the emitted ones; returns the state [1, d_draft] after the last emitted token."""
        same = 0
        while same < min(len(self._read), len(emitted) - 1) and self._read[same] == emitted[same]:
            same += 1
        self._draft.rollback(self._state, len(self._read) - same)
        missing = torch.tensor([list(emitted[same:])], device=self._draft.device)
        self._read = list(emitted)
        return self._draft.step(self._state, missing)[:, -1]
