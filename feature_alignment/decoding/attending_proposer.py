"""The attending adapter as a drafter: it drafts from the target's verified states and keeps a key-value cache of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from feature_alignment.adapters.attending import AttendingAdapter
from feature_alignment.adapters.attending_drafts import FoldedAttending
from feature_alignment.adapters.tables import question_number
from feature_alignment.decoding.proposers import Draft, Proposer
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.decoding.token_selection import Selected
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.state import Prompt, ReadPrompt

Proposed = list[tuple[int, int]]


class AttendingProposer(Proposer):
    """The attending adapter drafts; EventGPT runs once for its event states.

    Args:
        draft: EventGPT; it does not run for an adapter without events
        adapter: the trained attending adapter
        target: for its LM head and embeddings
    """

    def __init__(self, draft: Decoder, adapter: AttendingAdapter, target: Decoder) -> None:
        self._draft, self._target = draft, target
        self._blind, self._num_prompt = "events" in adapter.without, adapter.num_prompt
        self._folded = FoldedAttending(adapter, target.head_weight, target.embeddings)

    @torch.inference_mode()
    def start(self, prompt: Prompt, watch: Stopwatch) -> None:
        """See `Proposer`."""
        if not self._blind:
            with watch("draft_prefill"):
                self._folded.start(self._draft.vision_states(prompt.ids[None], self._draft.encode_vision(prompt.pixels[None])))
        self._verified = 0  # tokens cached with target states
        self._outputs: list[Tensor] = []  # [1, w] after the last verified token and after each draft token cached after it
        self._text: list[int] = []  # tokens with candidates, at least all that are cached
        self._proposed: list[Proposed] = []  # candidates after each of them

    @torch.inference_mode()
    def read_target_prompt(self, prompt: Prompt, read: ReadPrompt, watch: Stopwatch) -> None:
        """See `Proposer`."""
        with watch("draft_prefill"):
            most = self._num_prompt
            self._prompt, self._question = self._target.text_ids(prompt.ids[-most - 1 :].tolist()), question_number(prompt.question)
            first = max(0, len(read.states) - 1 - most)
            self._folded.read_prompt(read.states[first:-1], read.inputs[first + 1 :])

    @torch.inference_mode()
    def propose(self, emitted: Sequence[int], states: Tensor, num_tokens: int, watch: Stopwatch, confidence_floor: float = 0.0) -> Draft:
        """See `Proposer`."""
        with watch("read"):
            self._catch_up(emitted, states)
        text, most = list(emitted), len(emitted) + num_tokens
        selected: list[Selected] = []
        expected: list[Tensor] = []
        chance = 1.0
        while not selected or (len(text) < most and chance >= confidence_floor and text[-1] not in self.selector.eos_ids):
            if selected:
                with watch("adapter"):
                    self._read_draft(text)
            expected.append(self._outputs[-1])
            with watch("head"):
                selected.append(self._select(text, confidence_floor > 0))
                text.append(int(selected[-1].token))
            chance *= selected[-1].confidence
        return Draft.of(selected, lambda: self._folded.states(expected))

    def _catch_up(self, emitted: Sequence[int], states: Tensor) -> None:
        """Cache newly verified tokens with the target's states, then the tokens after them with predicted states."""
        n, known = len(states), self._verified
        same = known
        while same < min(len(emitted), len(self._text)) and self._text[same] == emitted[same]:
            same += 1
        del self._text[same:], self._proposed[same:]
        if n > known:
            for end in range(same + 1, n + 1):
                self._find_candidates(emitted[:end])
            before = emitted[known - 1] if known else self._prompt[-1]
            self._outputs = [self._folded.read(known, states[known:], [before, *emitted[known:n]], self._proposed[known:n])]
            self._verified = n
        else:
            del self._outputs[same - n + 1 :]
        for end in range(n + len(self._outputs), len(emitted) + 1):
            self._read_draft(emitted[:end])

    def _read_draft(self, text: Sequence[int]) -> None:
        """Cache the last token of `text`, which is not verified."""
        last = len(text) - 1
        if last == len(self._text):
            self._find_candidates(text)
        self._outputs.append(self._folded.go_on(last, self._outputs[-1], text[-2:], self._proposed[last]))

    def _find_candidates(self, text: Sequence[int]) -> None:
        self._text.append(text[-1])
        self._proposed.append(self._folded.candidates(self._question, self._prompt, text))

    def _select(self, text: Sequence[int], confidence: bool) -> Selected:
        """Select the next draft token, from logits over the ids that may be drafted."""
        logits = self._folded.logits(self._outputs[-1], self._proposed[len(text) - 1])
        if not self.selector.is_plain_argmax:
            return self.selector.select(self._folded.over_all_ids(logits), text, confidence)
        token = self._folded.ids.index_select(0, logits.argmax(-1))
        return Selected(token, None, float(logits[0].float().softmax(-1).max()) if confidence else 1.0)
