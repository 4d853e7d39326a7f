"""Speculative decoding of one prompt, a round at a time.

One round, with g draft tokens d1..dg after the last emitted token x:

    target reads     x    d1   d2   ...  dg         one forward pass
    its own tokens   t1   t2   t3   ...  t(g+1)     t(i) judges d(i); after n accepted draft tokens, t(n+1) is emitted as well

Before each round the target's cache holds the prompt and all emitted tokens but the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from feature_alignment.decoding.acceptance import Rule, accepted_drafts, cosine_per_position, rule_score
from feature_alignment.decoding.draft_length import DraftLengthController
from feature_alignment.decoding.generation import DRAFT_STAGES, Generation, Round, relative_spans
from feature_alignment.decoding.overlap import drafter_reading
from feature_alignment.decoding.proposers import Draft, Proposer
from feature_alignment.decoding.sampling import Sampler
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.decoding.token_selection import TokenSelector
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.state import Prompt, State


def speculate(
    target: Decoder,
    proposer: Proposer,
    prompt: Prompt,
    draft_prompt: Prompt,
    *,
    accept: Rule = "token",
    threshold: float = 0.9,
    num_draft_tokens: int = 5,
    max_new_tokens: int = 64,
    sampler: Sampler | None = None,
    controller: DraftLengthController | None = None,
    overlap: bool = False,
    cosines: bool = True,
) -> Generation:
    """Decode one prompt speculatively, until the text ends or has exactly `max_new_tokens` tokens.

    Args:
        target: the model whose text is reproduced
        proposer: the drafter
        prompt: the target's
        draft_prompt: the drafter's, of the same sample
        accept: a rule of `acceptance.py`. `token` is lossless: it emits exactly what `greedy` emits; with a sampler the text has the
            distribution of plain sampling, with a sampler of shared noise it is the same text. After rejections of `relaxed` the target
            reads the corrected block again (stage "recompute", the rejection cost)
        threshold: of the lossy rules
        num_draft_tokens: draft length; with a controller the maximum
        max_new_tokens: longest answer, EOS included
        sampler: draws tokens; `token` rule only
        controller: chooses draft lengths from measured time. A sampled text then depends on timing, unless the noise is shared
        overlap: the drafter reads its prompt in a second thread while the target reads its own; the stage "draft_prefill" is then the
            time spent waiting for it
        cosines: record the cosine of each draft token under the `token` rule too
    """
    speculation = Speculation(target, proposer, prompt, max_new_tokens, accept, threshold, num_draft_tokens, sampler, controller, cosines)
    speculation.prefill(draft_prompt, overlap)
    while not speculation.is_finished:
        speculation.advance()
    return speculation.finish()


class Verification(NamedTuple):
    """What the target computed over the last emitted token and g draft tokens.

    Args:
        hidden: [g + 1, d_target], its hidden states
        scores: [g + 1, v], its processed logits
        proposed: [g] draft token ids, up to and including the first that ends the text
        target_tokens: its own greedy token ids, at least [g + 1]
        cosine: [g] of predicted and real states, or None
        score: [g] what a lossy rule compares with its threshold, or None
    """

    hidden: Tensor
    scores: Tensor
    proposed: list[int]
    target_tokens: list[int]
    cosine: Tensor | None
    score: Tensor | None


class Acceptance(NamedTuple):
    """What a round emits.

    Args:
        accepted: [g] whether each draft token was accepted
        tokens: token ids to emit: accepted draft tokens, or the corrected block (`relaxed`), then the target's own token
        hidden: the target's hidden states that emitted them, one row each at least
        recomputed: the target read the corrected block again
    """

    accepted: list[bool]
    tokens: list[int]
    hidden: Tensor
    recomputed: bool


class Speculation:
    """Speculative decoding of one prompt, one round at a time: propose, verify, accept, commit. Arguments as in `speculate`.

    After each `advance`, `emitted` is the text so far.
    """

    def __init__(
        self,
        target: Decoder,
        proposer: Proposer,
        prompt: Prompt,
        max_new_tokens: int,
        accept: Rule,
        threshold: float,
        num_draft_tokens: int,
        sampler: Sampler | None,
        controller: DraftLengthController | None,
        cosines: bool,
    ) -> None:
        if sampler is not None and accept != "token":
            raise ValueError(f"sampling is lossless under the token rule only, got {accept!r}")
        self._target, self._proposer, self._prompt, self._max_new_tokens = target, proposer, prompt, max_new_tokens
        self._rule, self._threshold, self._num_draft_tokens, self._controller = accept, threshold, num_draft_tokens, controller
        self._cosines = cosines or accept not in ("token", "typical", "kl")
        self._selector = proposer.selector = TokenSelector.of(target, prompt, sampler)
        self._watch, self._overlapped = Stopwatch(target.device), Stopwatch(target.device)
        self._start_ms = self._last_ms = self._watch.now()
        self._draft_prompt: Prompt | None = None  # not read yet
        self.emitted: list[int] = []
        self.rounds: list[Round] = []
        self.passes = 0

    @torch.inference_mode()
    def prefill(self, draft_prompt: Prompt, overlap: bool = False) -> None:
        """Read both prompts and emit the first token. The drafter's prompt may wait until drafting is expected to pay."""
        target, watch, controller = self._target, self._watch, self._controller
        reads_now = controller is None or not self._proposer.reads_prompt or controller.needs_prefill
        self._draft_prompt = draft_prompt
        with drafter_reading(lambda: self._proposer.start(draft_prompt, self._overlapped), target.device, overlap and reads_now) as reading:
            with watch("target_prefill"):
                self._state: State = target.prefill([self._prompt])
                token = int(self._selector.select(target.lm_head(self._state.last), []).token)
            if controller is not None:
                controller.record_prefill(watch.ms["target_prefill"])
            if reads_now:
                self._start_drafter(reading)
        self._states = self._state.last.new_empty(self._max_new_tokens, target.hidden_size)  # row i emitted token i
        self._states[0] = self._state.last[0]
        self.emitted = [token]
        if controller is not None:
            self._last_ms = watch.now()  # from here on all time is reported to the controller, its own included

    @property
    def is_finished(self) -> bool:
        """Whether the text has ended or is as long as allowed."""
        return len(self.emitted) >= self._max_new_tokens or self._selector.rules.end_of(self.emitted[:-1], self.emitted[-1:]) is not None

    @torch.inference_mode()
    def advance(self) -> list[int]:
        """One round, or steps of plain decoding where drafting does not pay; returns the new token ids."""
        before, first, num_rounds = dict(self._watch.ms), len(self.emitted), len(self.rounds)
        room = min(self._num_draft_tokens, self._max_new_tokens - first - 1)  # a round also emits a token of the target
        floor = None if room <= 0 else 0.0 if self._controller is None else self._controller.next_confidence_floor()
        if floor is None:
            self._step_plainly(record=room > 0)
        else:
            self._run_round(room, floor)
        spent = {stage: ms - before.get(stage, 0.0) for stage, ms in self._watch.ms.items() if ms > before.get(stage, 0.0)}
        new, rounds = self.emitted[first:], self.rounds[num_rounds:]
        for r in rounds:
            r.ms = spent if floor is not None else {"verify": spent["verify"] / len(new)}
        if self._controller is not None:
            self._report(sum(len(r.proposed) for r in rounds), len(new), spent)
        return new

    def finish(self) -> Generation:
        """The finished text and its measurements."""
        if self._draft_prompt is None:
            self._proposer.finish(self.emitted)
        watch = self._watch
        spans = [*watch.spans, *((f"{stage}, overlapped", begin, end) for stage, begin, end in self._overlapped.spans)]
        total_ms = watch.now() - self._start_ms
        return Generation(self.emitted, self.passes, total_ms, watch.ms, self.rounds, relative_spans(spans, self._start_ms))

    # ---- one round

    def _run_round(self, room: int, floor: float) -> None:
        if self._draft_prompt is not None:
            self._start_drafter(None)
        if self._controller is not None:
            room = min(room, self._controller.max_draft_tokens(floor, self._proposer.has_confidence))
        draft = self._proposer.propose(self.emitted, self._states[: len(self.emitted)], room, self._watch, floor)
        verification = self._verify(draft)
        stop_reason = self._stop_reason(verification.proposed, room, floor > 0 and self._proposer.has_confidence)
        acceptance = self._accept(draft, verification)
        self._commit(verification, acceptance, stop_reason, draft.confidence if floor > 0 else None)

    def _verify(self, draft: Draft) -> Verification:
        """Read the last emitted token and all draft tokens in one pass. Greedy decoding reads one small tensor from the device."""
        target, selector = self._target, self._selector
        drafts = draft.token_ids.to(target.device)
        g = len(drafts)
        with self._watch("verify"):
            last = torch.tensor([self.emitted[-1]], device=target.device)
            hidden = target.step(self._state, torch.cat([last, drafts])[None])[0]
            logits = target.lm_head(hidden)
            scores = logits if not selector.rules.processors else selector.rules.scores(logits, self.emitted, drafts.tolist())
            read = torch.cat([drafts, scores.argmax(-1)]).tolist()
            self.passes += 1
        proposed, target_tokens = read[:g], read[g:]
        end = next((i + 1 for i, token in enumerate(proposed) if token in selector.eos_ids), g)
        with self._watch("accept"):
            cosine = None
            if self._cosines and draft.predicted is not None:
                cosine = cosine_per_position(draft.predicted()[:end], hidden[:end])
            score = rule_score(self._rule, drafts[:end], scores[:end], draft.logits, cosine)
        return Verification(hidden, scores, proposed[:end], target_tokens, cosine, score)

    def _accept(self, draft: Draft, verification: Verification) -> Acceptance:
        """Apply the acceptance rule, and roll the target's cache back to the accepted tokens."""
        proposed, target_tokens = verification.proposed, verification.target_tokens
        g, num_read = len(proposed), len(draft.token_ids)
        with self._watch("accept"):
            accepted, following = self._judge(draft, verification)
        if self._rule == "relaxed":
            with self._watch("rollback"):
                self._target.rollback(self._state, num_read - g)
            return self._corrected(verification, accepted)
        n = sum(accepted)
        with self._watch("rollback"):
            self._target.rollback(self._state, num_read - n)
        following = target_tokens[n] if following is None else following
        return Acceptance(accepted, [*proposed[:n], following], verification.hidden, False)

    def _judge(self, draft: Draft, verification: Verification) -> tuple[list[bool], int | None]:
        """Which draft tokens are accepted; with a sampler also the token drawn after them."""
        proposed, target_tokens, g = verification.proposed, verification.target_tokens, len(verification.proposed)
        if self._rule == "token" and self._selector.sampler is None:
            n = next((i for i, (d, t) in enumerate(zip(proposed, target_tokens, strict=False)) if d != t), g)
            return [i < n for i in range(g)], None
        drafts = draft.token_ids[:g].to(verification.hidden.device)
        if self._rule == "token":
            accepted, token = self._selector.accept(drafts, draft.probs, verification.scores, self.emitted)
            return accepted.tolist(), int(token)
        if not g:
            return [], None
        own = torch.tensor(target_tokens[:g], device=drafts.device)
        return accepted_drafts(self._rule, drafts, own, verification.score, self._threshold).tolist(), None

    def _corrected(self, verification: Verification, accepted: list[bool]) -> Acceptance:
        """The `relaxed` rule's block: rejected draft tokens are replaced by the target's own, which the target then reads again."""
        g = len(accepted)
        tokens = [d if a else t for a, d, t in zip(accepted, verification.proposed, verification.target_tokens, strict=False)]
        if all(accepted):
            return Acceptance(accepted, [*tokens, verification.target_tokens[g]], verification.hidden, False)
        with self._watch("recompute"):
            n = g - accepted.index(False)
            self._target.rollback(self._state, n)
            block = torch.tensor([tokens[-n:]], device=self._target.device)
            hidden = torch.cat([verification.hidden[: g + 1 - n], self._target.step(self._state, block)[0]])
            token = self._selector.select(self._target.lm_head(hidden[-1:]), [*self.emitted, *tokens]).token
            self.passes += 1
            return Acceptance(accepted, [*tokens, int(token)], hidden, True)

    def _commit(self, verification: Verification, acceptance: Acceptance, stop_reason: str, confidence: Sequence[float] | None) -> None:
        """Emit the tokens of a round up to the end of the text, keep the states that emitted them, record the round."""
        new, g = acceptance.tokens, len(acceptance.accepted)
        end = self._selector.rules.end_of(self.emitted, new) or len(new)
        self._states[len(self.emitted) : len(self.emitted) + end] = acceptance.hidden[:end]
        self.emitted += new[:end]
        self.rounds.append(
            Round(
                proposed=verification.proposed,
                target_tokens=verification.target_tokens[:g],
                accepted=[a and i < end for i, a in enumerate(acceptance.accepted)],  # nothing after the end of the text counts
                cosine=None if verification.cosine is None else verification.cosine.tolist(),
                extra_token=new[-1] if end == len(new) else None,
                recomputed=acceptance.recomputed,
                ms={},
                stop_reason=stop_reason,
                confidence=None if confidence is None else list(confidence),
                score=None if verification.score is None else verification.score.tolist(),
                num_before_end=end if end < g else None,
            )
        )

    def _step_plainly(self, record: bool) -> None:
        """Steps of plain decoding: room for the last token only, or drafting does not pay. `record` adds a round for each step."""
        first, hidden = len(self.emitted), []
        num_tokens = min(1 if self._controller is None else self._controller.plain_steps, self._max_new_tokens - first)
        last = torch.tensor([self.emitted[-1]], device=self._target.device)
        with self._watch("verify"):
            for _ in range(num_tokens):
                hidden.append(self._target.step(self._state, last[None])[:, -1])
                last = self._selector.select(self._target.lm_head(hidden[-1]), self.emitted).token
                self.emitted.append(int(last))
                if self.is_finished:
                    break
        self._states[first : len(self.emitted)] = torch.cat(hidden)
        self.passes += len(hidden)
        if record:
            self.rounds += [Round([], [], [], None, token, False, {}, "off") for token in self.emitted[first:]]

    def _start_drafter(self, reading: Future[None] | None) -> None:
        """Let the drafter read its prompt, or wait until the second thread has read it."""
        assert self._draft_prompt is not None
        if reading is None:
            self._proposer.start(self._draft_prompt, self._watch)
        else:
            with self._watch("draft_prefill"):
                reading.result()
        self._draft_prompt = None
        self._proposer.read_target_prompt(self._prompt, self._state.read_prompt(), self._watch)
        if self._controller is not None:
            self._controller.record_draft_prefill(self._watch.ms.get("draft_prefill", 0.0))

    def _report(self, num_drafts: int, num_tokens: int, spent: dict[str, float]) -> None:
        """Report a round, or steps of plain decoding, to the controller; time between rounds counts as well."""
        assert self._controller is not None
        now = self._watch.now()
        elapsed = now - self._last_ms - spent.get("draft_prefill", 0.0)
        plain_ms = spent["verify"] + spent.get("accept", 0.0)  # what the target takes without draft tokens
        draft_ms = sum(spent.get(stage, 0.0) for stage in DRAFT_STAGES) if num_drafts else elapsed - plain_ms
        self._controller.record_round(num_drafts, num_tokens, draft_ms, elapsed - draft_ms)
        self._last_ms = now

    def _stop_reason(self, drafts: Sequence[int], room: int, stops_at_floor: bool) -> str:
        """Why no more was drafted.

        Args:
            drafts: the draft tokens
            room: maximum number of draft tokens
            stops_at_floor: the drafter stops where the chance of its draft tokens is below a floor above 0
        """
        if drafts and drafts[-1] in self._selector.eos_ids:
            return "EOS"
        if len(drafts) == room:
            return "length"
        return "low confidence" if drafts and stops_at_floor else "no candidate"
