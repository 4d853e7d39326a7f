"""Who drafts. A proposer reads what has been emitted and proposes the next tokens; it may say which target states it expects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from feature_alignment.adapters.chained import ChainedAdapter, Seen
from feature_alignment.decoding.law import Law, Pick
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.models.decoder import Decoder, Prompt, State
from feature_alignment.models.fixed import captured


@dataclass(frozen=True)
class Draft:
    """Proposed tokens, possibly none.

    token_ids:  [g] int64
    aligned:    [g, d_target] = A(g_t), the target states expected to emit them, or None
    probs:      [g, v], what each token was drawn from; None: none was drawn
    confidence: the chance of each to be kept once all before it are, as far as it was asked for; None: it was not
    """

    token_ids: Tensor
    aligned: Tensor | None = None
    probs: Tensor | None = None
    confidence: Sequence[float] | None = None

    @classmethod
    def of(cls, picks: Sequence[Pick], aligned: Sequence[Tensor | None]) -> Draft:
        """From one token after the other, at least one: a pick of one row and [1, d_target] each; all expected and drawn, or none."""
        states, probs = ([x for x in found if x is not None] for found in (aligned, [p.probs for p in picks]))
        token_ids = torch.cat([p.token for p in picks])
        return cls(token_ids, torch.cat(states) if states else None, torch.cat(probs) if probs else None, [p.confidence for p in picks])


class Proposer(Protocol):
    reads_prompt: bool = True  # which takes time
    knows_chance: bool = True  # of its drafts, and stops where that is below the floor
    law: Law = Law()  # of the text that is being written; the decoding loop sets it before `start`

    def start(self, prompt: Prompt, watch: Stopwatch) -> None:
        """Read a new prompt."""

    def target_read(self, prompt: Prompt, states: Tensor, watch: Stopwatch) -> None:
        """The target has read its own prompt: its states there [s, d_target]. Called once a text, after `start`."""
        return None

    def propose(self, emitted: Sequence[int], states: Tensor, num_tokens: int, watch: Stopwatch, floor: float = 0.0) -> Draft:
        """Draft at most num_tokens tokens after `emitted` (the text so far; what the target has said of it never changes), none
        after one of `law.eos_ids`.

        states: [n, d_target], the target's own states that emitted the first n tokens; the others are drafts themselves
        floor:  the draft whose chance to be kept, with all before it, is below this is the last; ignored by who does not know it
        """

    def finish(self, emitted: Sequence[int]) -> None:
        """The text is complete."""
        return None


class ModelProposer(Proposer):
    """EventGPT drafts, token by token, and is fed what it drafted.

    target_head: W, target states -> logits. Given, the drafts are `aligned`, from W A(g); without it they are the drafter's `own`,
                 from its own head.
    adapter:     A; without it (own drafts) no state is expected, and only the `token` rule can judge the drafts
    """

    def __init__(
        self,
        draft: Decoder,
        adapter: Callable[[Tensor], Tensor] | None,
        target_head: Callable[[Tensor], Tensor] | None,
    ) -> None:
        if target_head is not None and adapter is None:
            raise ValueError("aligned drafts need an adapter")
        self._draft, self._target_head = draft, target_head
        self._adapter = None if adapter is None else captured(adapter, draft.steps)
        self._state: State  # of the prompt that was started
        self._read: list[int] = []  # tokens in the drafter's cache behind the prompt

    def start(self, prompt: Prompt, watch: Stopwatch) -> None:
        with watch("draft_prefill"):
            self._state = self._draft.prefill([prompt])
        self._read = []

    @torch.inference_mode()
    def propose(self, emitted: Sequence[int], states: Tensor, num_tokens: int, watch: Stopwatch, floor: float = 0.0) -> Draft:
        with watch("draft"):
            hidden = self._catch_up(emitted)
        text: list[int] = []
        picks: list[Pick] = []
        aligned: list[Tensor | None] = []
        chance = 1.0
        while not text or (len(text) < num_tokens and chance >= floor and text[-1] not in self.law.eos_ids):
            if picks:
                with watch("draft"):
                    hidden = self._draft.step(self._state, picks[-1].token[None])[:, -1]
            with watch("adapter"):
                expected = None if self._adapter is None else self._adapter(hidden)
                aligned.append(expected)
            with watch("head"):
                logits = self._draft.lm_head(hidden) if self._target_head is None or expected is None else self._target_head(expected)
                picks.append(self.law.pick(logits, [*emitted, *text], confidence=floor > 0))
                text.append(int(picks[-1].token))
            chance *= picks[-1].confidence
        self._read += text[:-1]  # the last draft has not been read
        return Draft.of(picks, aligned)

    def _catch_up(self, emitted: Sequence[int]) -> Tensor:
        """Roll back what was not kept, read what was emitted instead; returns the state behind the last emitted token."""
        same = 0
        while same < min(len(self._read), len(emitted) - 1) and self._read[same] == emitted[same]:
            same += 1
        self._draft.rollback(self._state, len(self._read) - same)
        missing = torch.tensor([list(emitted[same:])], device=self._draft.device)
        self._read = list(emitted)
        return self._draft.step(self._state, missing)[:, -1]


class ChainedProposer(Proposer):
    """The chained adapter drafts from the target's last verified state; EventGPT is asked once, for what it sees.

    target_head: W, target states -> logits
    embeddings:  [v, d_target], the target's input embeddings of the shared ids
    """

    def __init__(
        self,
        draft: Decoder,
        adapter: ChainedAdapter,
        target_head: Callable[[Tensor], Tensor],
        embeddings: Tensor,
    ) -> None:
        self._draft, self._adapter, self._target_head = draft, adapter, target_head
        with torch.inference_mode():
            self._tokens = adapter.tokens(embeddings)
        self._seen: Seen | None = None
        self._expect, self._go_on = captured(self._expect_next, draft.steps), captured(self._read_and_expect, draft.steps)

    @torch.inference_mode()
    def start(self, prompt: Prompt, watch: Stopwatch) -> None:
        with watch("draft_prefill"):
            seen = self._adapter.see(self._draft.vision_states(prompt.ids[None], self._draft.encode_vision(prompt.pixels[None])))
            self._seen = self._seen or seen
            for place, new in zip(self._seen, seen, strict=True):
                place.copy_(new)  # a recorded step finds it where the last prompt's was
        self._memory: Tensor | None = None  # [1, w] of the verified text
        self._read = 0  # how many tokens that is
        self._ahead: list[int] = []  # drafts read behind it,
        self._chain: Tensor  # and the memory [1, 1, w] with them

    @torch.inference_mode()
    def propose(self, emitted: Sequence[int], states: Tensor, num_tokens: int, watch: Stopwatch, floor: float = 0.0) -> Draft:
        with watch("adapter"):
            self._catch_up(emitted, states)
        text: list[int] = []
        picks: list[Pick] = []
        expected: list[Tensor] = []
        chance = 1.0
        while not text or (len(text) < num_tokens and chance >= floor and text[-1] not in self.law.eos_ids):
            with watch("adapter"):
                if picks:
                    self._chain, state = self._go_on(expected[-1], picks[-1].token, self._chain)
                else:
                    state = self._expect(self._chain)
                expected.append(state)
            with watch("head"):
                picks.append(self.law.pick(self._target_head(expected[-1]), [*emitted, *text], confidence=floor > 0))
                text.append(int(picks[-1].token))
            chance *= picks[-1].confidence
        self._ahead += text[:-1]
        return Draft.of(picks, expected)

    def _catch_up(self, emitted: Sequence[int], states: Tensor) -> None:
        """Read what has been verified since the last call; then the tokens behind it, for which only expected states are there."""
        n = len(states)
        if n > self._read:
            new = torch.tensor([emitted[self._read : n]], device=states.device)
            memories = self._adapter.read(states[None, self._read :], self._tokens[new], self._memory)
            self._memory, self._read = memories[:, -1], n
            self._ahead, self._chain = [], memories[:, -1:]
        behind = list(emitted[n:])
        if behind[: len(self._ahead)] != self._ahead:
            assert self._memory is not None  # the target's prefill has emitted a token
            self._ahead, self._chain = [], self._memory[:, None]
        for token in behind[len(self._ahead) :]:
            ids = torch.tensor([token], device=states.device)
            self._chain = self._read_draft(self._expect(self._chain), ids, self._chain)
        self._ahead = behind

    def _expect_next(self, chain: Tensor) -> Tensor:
        """The target's next state [1, d_target], for the memory [1, 1, w] of all before it."""
        assert self._seen is not None  # a prompt was started
        return self._adapter.expect(chain, self._seen)[:, 0]

    def _read_draft(self, state: Tensor, token: Tensor, chain: Tensor) -> Tensor:
        """The memory [1, 1, w] behind one more draft: its expected state [1, d_target] and token [1]."""
        return self._adapter.read(state[:, None], self._tokens[token][:, None], chain[:, -1])

    def _read_and_expect(self, state: Tensor, token: Tensor, chain: Tensor) -> tuple[Tensor, Tensor]:
        chain = self._read_draft(state, token, chain)
        return chain, self._expect_next(chain)
