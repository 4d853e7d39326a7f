"""Who drafts. A proposer reads what has been emitted and proposes the next tokens; it may say which target states it expects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from feature_alignment.chained_adapter import ChainedAdapter
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.models.pair import Decoder, Prompt, State


@dataclass(frozen=True)
class Draft:
    """token_ids [g] int64; aligned [g, d_target] = A(g_t), the target states expected to emit them, or None."""

    token_ids: Tensor
    aligned: Tensor | None


class Proposer(Protocol):
    def start(self, prompt: Prompt, watch: Stopwatch) -> None:
        """Read a new prompt."""

    def propose(self, emitted: Sequence[int], states: Tensor, num_tokens: int, watch: Stopwatch) -> Draft:
        """Draft the tokens after `emitted` (all text so far, never shorter than in the call before).

        states: [n, d_target], the target's own states that emitted the first n of them
        """


class ModelProposer:
    """EventGPT drafts, token by token, and is fed what it drafted.

    target_head: W, target states -> logits. Given, the drafts are `aligned` = argmax W A(g); without it they are the drafter's
                 `own` = argmax of its own head.
    adapter:     A; without it (own drafts) no state is expected, and only the `token` rule can judge the drafts
    """

    def __init__(self, draft: Decoder, adapter: Callable[[Tensor], Tensor] | None, target_head: Callable[[Tensor], Tensor] | None) -> None:
        if target_head is not None and adapter is None:
            raise ValueError("aligned drafts need an adapter")
        self._draft, self._adapter, self._target_head = draft, adapter, target_head
        self._state: State | None = None
        self._read: list[int] = []  # tokens in the drafter's cache behind the prompt

    def start(self, prompt: Prompt, watch: Stopwatch) -> None:
        with watch("draft_prefill"):
            self._state = self._draft.prefill([prompt])
        self._read = []

    @torch.inference_mode()
    def propose(self, emitted: Sequence[int], states: Tensor, num_tokens: int, watch: Stopwatch) -> Draft:
        with watch("draft"):
            hidden = self._catch_up(emitted)
        tokens, aligned = [], []
        for i in range(num_tokens):
            if i:
                with watch("draft"):
                    hidden = self._draft.step(self._state, tokens[-1][None])[:, -1]
            expected = None
            if self._adapter is not None:
                with watch("adapter"):
                    expected = self._adapter(hidden)
                aligned.append(expected)
            with watch("head"):
                logits = self._draft.lm_head(hidden) if self._target_head is None else self._target_head(expected)
                tokens.append(logits.argmax(-1))
        token_ids = torch.cat(tokens)
        self._read += token_ids[:-1].tolist()  # the last draft has not been read
        return Draft(token_ids, torch.cat(aligned) if aligned else None)

    def _catch_up(self, emitted: Sequence[int]) -> Tensor:
        """Roll back what was not kept, read what was emitted instead; returns the state behind the last emitted token."""
        same = 0
        while same < min(len(self._read), len(emitted) - 1) and self._read[same] == emitted[same]:
            same += 1
        self._draft.rollback(self._state, len(self._read) - same)
        missing = torch.tensor([list(emitted[same:])], device=self._draft.device)
        self._read = list(emitted)
        return self._draft.step(self._state, missing)[:, -1]


class ChainedProposer:
    """The chained adapter drafts from the target's last verified state; EventGPT is asked once, for what it sees.

    target_head: W, target states -> logits
    embeddings:  [v, d_target], the target's input embeddings of the shared ids
    """

    def __init__(self, draft: Decoder, adapter: ChainedAdapter, target_head: Callable[[Tensor], Tensor], embeddings: Tensor) -> None:
        self._draft, self._adapter, self._target_head = draft, adapter, target_head
        with torch.inference_mode():
            self._tokens = adapter.tokens(embeddings)

    @torch.inference_mode()
    def start(self, prompt: Prompt, watch: Stopwatch) -> None:
        with watch("draft_prefill"):
            self._seen = self._adapter.see(self._draft.vision_states(prompt.ids[None], self._draft.encode_vision(prompt.pixels[None])))
        self._memory: Tensor | None = None
        self._read = 0  # how many tokens of the text the memory holds

    @torch.inference_mode()
    def propose(self, emitted: Sequence[int], states: Tensor, num_tokens: int, watch: Stopwatch) -> Draft:
        with watch("adapter"):
            new = torch.tensor([emitted[self._read :]], device=states.device)
            memories = self._adapter.read(states[None, self._read :], self._tokens[new], self._memory)
            self._memory, self._read = memories[:, -1], len(emitted)  # verified; drafts below do not touch it
            memory = memories[:, -1:]
        tokens, expected = [], []
        for i in range(num_tokens):
            with watch("adapter"):
                if i:
                    memory = self._adapter.read(expected[-1], self._tokens[tokens[-1]][:, None], memory[:, -1])
                expected.append(self._adapter.expect(memory, self._seen))
            with watch("head"):
                tokens.append(self._target_head(expected[-1][:, 0]).argmax(-1))
        return Draft(torch.cat(tokens), torch.cat(expected, 1)[0])
