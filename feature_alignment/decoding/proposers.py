"""Who drafts. A proposer reads what has been emitted and proposes the next tokens; it may say which target states it expects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

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

    def propose(self, emitted: Sequence[int], num_tokens: int, watch: Stopwatch) -> Draft:
        """Draft the tokens after `emitted` (all text so far, never shorter than in the call before)."""


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
    def propose(self, emitted: Sequence[int], num_tokens: int, watch: Stopwatch) -> Draft:
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
