"""Plain decoding and speculative decoding of one prompt, over the same target and the same token counter.

One round, with g drafts d1..dg after the last emitted token x:

    target reads     x    d1   d2   …   dg          one forward pass
    it would say     p1   p2   p3   …   p(g+1)      p(i) judges d(i); after n kept drafts, p(n+1) is the extra token

Before each round the target's cache holds the prompt and all emitted tokens but the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from feature_alignment.decoding.acceptance import Rule, cosine_per_position, kept_drafts
from feature_alignment.decoding.draft_length import Pace
from feature_alignment.decoding.law import Law
from feature_alignment.decoding.proposers import Draft, Proposer
from feature_alignment.decoding.sampling import Sampler
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.models.decoder import Decoder, Prompt, State

PREFILL_STAGES = ("target_prefill", "draft_prefill")
DRAFT_STAGES = ("draft", "adapter", "head")


@dataclass
class Round:
    """One verification: what was proposed, what the target would have said there, what was kept (and at which cosine), and the
    target's own token after it."""

    proposed: list[int]
    target_says: list[int]
    kept: list[bool]
    cosine: list[float] | None
    extra_token: int | None
    recomputed: bool
    ms: dict[str, float]
    stopped: str  # why no more was drafted: "length", "EOS", "unsure", "no idea", or "off" where drafting does not pay
    confidence: list[float] | None = None  # chance of each draft token to be accepted if all before it are, where the drafter computed it

    @property
    def num_accepted(self) -> int:
        return sum(self.kept)


@dataclass
class Generation:
    """A finished text. `passes` counts the target's forward passes after its prefill, which already yields the first token."""

    token_ids: list[int]
    passes: int
    total_ms: float
    ms: dict[str, float]
    rounds: list[Round] = field(default_factory=list)
    spans: list[tuple[str, float, float]] = field(default_factory=list)  # (stage, begin, end), in ms from the start on

    @property
    def decode_ms(self) -> float:
        return self.total_ms - sum(self.ms.get(stage, 0.0) for stage in PREFILL_STAGES)

    @property
    def tokens_per_pass(self) -> float:
        return (len(self.token_ids) - 1) / self.passes if self.passes else float("nan")

    def as_dict(self) -> dict[str, Any]:
        return {
            "token_ids": self.token_ids,
            "passes": self.passes,
            "tokens_per_pass": self.tokens_per_pass,
            "total_ms": self.total_ms,
            "ms": dict(self.ms),
            "rounds": [vars(r) for r in self.rounds],
        }


@torch.inference_mode()
def plain(target: Decoder, prompt: Prompt, max_new_tokens: int, sampler: Sampler | None = None) -> Generation:
    """The baseline: the target alone, one token per pass, up to and including the first EOS; greedy without a sampler."""
    watch = Stopwatch(target.device)
    start = watch.now()
    law = Law.of(target, prompt, sampler)
    with watch("target_prefill"):
        state = target.prefill([prompt])
        token = law.pick(target.lm_head(state.last), []).token
    emitted = [int(token)]
    with watch("verify"):
        while law.rules.end_of(emitted[:-1], emitted[-1:]) is None and len(emitted) < max_new_tokens:
            token = law.pick(target.lm_head(target.step(state, token[None])[:, -1]), emitted).token
            emitted.append(int(token))
    return Generation(emitted, len(emitted) - 1, watch.now() - start, watch.ms, spans=_since(start, watch.spans))


def greedy(target: Decoder, prompt: Prompt, max_new_tokens: int) -> Generation:
    return plain(target, prompt, max_new_tokens)


@torch.inference_mode()
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
    pace: Pace | None = None,
    overlap: bool = False,
) -> Generation:
    """Draft, verify, accept, roll back, until EOS or exactly `max_new_tokens`.

    accept="token" emits exactly what `greedy` emits; with a sampler it has the law of `plain` with one, and with a sampler of shared
    noise it emits exactly what `plain` does. The other rules are lossy: `feature` keeps drafts whose expected state has a cosine above
    `threshold`, up to the first rejection; `relaxed` keeps any such draft, puts the target's own token in the other places, and lets
    the target read the corrected block again (its time is the stage "recompute", the rejection cost). With a pace, `num_draft_tokens`
    is the most that are drafted; how many are depends on time, and so does a sampled text unless the noise is shared.

    overlap: the drafter reads its prompt in a thread of its own while the target reads its own (for a second core); the stage
             "draft_prefill" is then what is waited for it
    """
    if sampler is not None and accept != "token":
        raise ValueError(f"sampling is lossless under the token rule only, got {accept!r}")
    proposer.law = law = Law.of(target, prompt, sampler)
    watch, beside = Stopwatch(target.device), Stopwatch(target.device)
    start = watch.now()
    started = pace is None or not proposer.reads_prompt or pace.drafting
    with _reading(proposer, draft_prompt, beside, target.device, overlap and started) as reading:
        with watch("target_prefill"):
            state = target.prefill([prompt])
            token = law.pick(target.lm_head(state.last), []).token
        if pace is not None:
            pace.prompted(watch.ms["target_prefill"])
        if started:
            _start(proposer, draft_prompt, watch, pace, reading)
            _hand_over(proposer, prompt, state, watch)
    states = state.last.new_empty(max_new_tokens, target.hidden_size)  # states[i] emitted emitted[i]
    states[0] = state.last[0]
    text = _Text(target, law, watch, state, states, [int(token)])
    since = 0.0 if pace is None else watch.now()  # the pace is told of all time, that of keeping its books included
    while not text.ended and len(text.emitted) < max_new_tokens:
        before = dict(watch.ms)
        room = min(num_draft_tokens, max_new_tokens - len(text.emitted) - 1)  # the round also emits a token of the target's own
        floor = None if room <= 0 else 0.0 if pace is None else pace.next_floor()
        if floor is None:  # room for the last token only, or drafts do not pay: as in plain decoding
            first = len(text.emitted)
            text.step(min(1 if pace is None else pace.rest, max_new_tokens - first))
            g, new = 0, text.emitted[first:]
            spent = _spent(watch, before)
            if room > 0:
                ms = {"verify": spent["verify"] / len(new)}
                text.rounds += [Round([], [], [], None, token, False, ms, "off") for token in new]
        else:
            if not started:
                _start(proposer, draft_prompt, watch, pace)
                _hand_over(proposer, prompt, state, watch)
                started = True
            room = room if pace is None else min(room, pace.most(floor, proposer.knows_chance))
            draft = proposer.propose(text.emitted, states[: len(text.emitted)], room, watch, floor)
            stopped = _why(draft.token_ids.tolist(), room, law, floor > 0 and proposer.knows_chance)
            g, new = text.verify(draft, accept, threshold, stopped)
            spent = _spent(watch, before)
            text.rounds[-1].ms = spent
            if floor > 0 and draft.confidence is not None:
                text.rounds[-1].confidence = list(draft.confidence)
        if pace is not None:
            since = _tell(pace, g, len(new), spent, since, watch.now())
    if started:
        proposer.finish(text.emitted)
    spans = [*watch.spans, *((f"{stage}, beside", begin, end) for stage, begin, end in beside.spans)]
    return Generation(text.emitted, text.passes, watch.now() - start, watch.ms, text.rounds, _since(start, spans))


@dataclass
class _Text:
    """The text of one prompt as it grows.

    states: [max_new_tokens, d], of which states[i] emitted emitted[i]
    """

    target: Decoder
    law: Law
    watch: Stopwatch
    state: State
    states: Tensor
    emitted: list[int]
    rounds: list[Round] = field(default_factory=list)
    passes: int = 0

    @property
    def ended(self) -> bool:
        return self.law.rules.end_of(self.emitted[:-1], self.emitted[-1:]) is not None

    def step(self, num_tokens: int) -> None:
        """At most num_tokens tokens of plain decoding."""
        first, read = len(self.emitted), []
        last = torch.tensor([self.emitted[-1]], device=self.target.device)
        with self.watch("verify"):
            for _ in range(num_tokens):
                read.append(self.target.step(self.state, last[None])[:, -1])
                last = self.law.pick(self.target.lm_head(read[-1]), self.emitted).token
                self.emitted.append(int(last))
                if self.ended:
                    break
        self.states[first : len(self.emitted)] = torch.cat(read)
        self.passes += len(read)

    def verify(self, draft: Draft, accept: Rule, threshold: float, stopped: str) -> tuple[int, list[int]]:
        """One round over these draft tokens; returns how many they are and the tokens it emits."""
        drafts = draft.token_ids.to(self.target.device)
        g, last = len(drafts), torch.tensor([self.emitted[-1]], device=self.target.device)
        with self.watch("verify"):
            hidden = self.target.step(self.state, torch.cat([last, drafts])[None])[0]  # [g + 1, d]
            scores = self.law.rules.scores(self.target.lm_head(hidden), self.emitted, draft.token_ids.tolist())
            says = scores.argmax(-1)  # [g + 1]
            self.passes += 1
        with self.watch("accept"):
            cosine = None if draft.aligned is None else cosine_per_position(draft.aligned, hidden[:g])
            if accept == "token":
                kept, after = self.law.kept_of(drafts, draft.probs, scores, self.emitted)
                n, extra = int(kept.sum()), int(after)
            else:
                kept = kept_drafts(accept, drafts, says[:g], cosine, threshold) if g else drafts.bool()
                n = int(kept.sum())
                extra = int(says[n if accept != "relaxed" else g])
        tokens, recomputed = drafts[:n], False
        if accept == "relaxed":
            tokens = torch.where(kept, drafts, says[:g])
            recomputed = not bool(kept.all())
            if recomputed:
                with self.watch("recompute"):
                    n = g - int(kept.int().argmin())
                    reread = _reread(self.target, self.state, tokens, n)
                    hidden = torch.cat([hidden[: g + 1 - n], reread])
                    extra = int(self.law.pick(self.target.lm_head(reread[-1:]), [*self.emitted, *tokens.tolist()]).token)
                    self.passes += 1
        else:
            with self.watch("rollback"):
                self.target.rollback(self.state, g - n)
        new = [*tokens.tolist(), extra]
        end = self.law.rules.end_of(self.emitted, new) or len(new)
        self.states[len(self.emitted) : len(self.emitted) + end] = hidden[:end]
        self.emitted += new[:end]
        kept_here = [k and i < end for i, k in enumerate(kept.tolist())]  # nothing after EOS counts
        cosines = None if cosine is None else cosine.tolist()
        extra_token = extra if end == len(new) else None
        self.rounds.append(Round(drafts.tolist(), says[:g].tolist(), kept_here, cosines, extra_token, recomputed, {}, stopped))
        return g, new[:end]


def _spent(watch: Stopwatch, before: dict[str, float]) -> dict[str, float]:
    """Milliseconds of each stage since `before`."""
    return {stage: ms - before.get(stage, 0.0) for stage, ms in watch.ms.items() if ms > before.get(stage, 0.0)}


def _tell(pace: Pace, drafts: int, tokens: int, spent: dict[str, float], since: float, now: float) -> float:
    """Tell the pace of a round, or of steps of plain decoding, that took from `since` to `now`; returns `now`."""
    elapsed = now - since - spent.get("draft_prefill", 0.0)
    alone = spent["verify"] + spent.get("accept", 0.0)  # without drafts this is what the target does anyway
    drafting = sum(spent.get(stage, 0.0) for stage in DRAFT_STAGES) if drafts else elapsed - alone
    pace.passed(drafts, tokens, drafting, elapsed - drafting)
    return now


def _since(start: float, spans: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    return sorted(((stage, begin - start, end - start) for stage, begin, end in spans), key=lambda span: span[1])


def _start(proposer: Proposer, prompt: Prompt, watch: Stopwatch, pace: Pace | None, reading: Future | None = None) -> None:
    if reading is None:
        proposer.start(prompt, watch)
    else:
        with watch("draft_prefill"):
            reading.result()
    if pace is not None:
        pace.started(watch.ms.get("draft_prefill", 0.0))


def _hand_over(proposer: Proposer, prompt: Prompt, state: State, watch: Stopwatch) -> None:
    """Give a drafter that was started the target's states of its prompt."""
    assert state.prompt is not None  # the target reads its last layer only
    proposer.target_read(prompt, state.prompt[0], watch)


@contextmanager
def _reading(proposer: Proposer, prompt: Prompt, watch: Stopwatch, device: torch.device, overlap: bool) -> Iterator[Future | None]:
    """With `overlap`, the drafter reads its prompt in a thread meanwhile. The thread has ended afterwards, however the block ends: what
    fails in the block is raised once the thread is done, with a note where the drafter failed too."""
    reading = _in_a_thread(device, proposer.start, prompt, watch) if overlap else None
    try:
        yield reading
    except BaseException as error:
        if reading is not None and (also := reading.exception()) is not None and also is not error:
            error.add_note(f"the drafter failed meanwhile, as it read its own prompt: {type(also).__name__}: {also}")
        raise


def _in_a_thread(device: torch.device, call: Callable, *args: Any) -> Future:
    """A call begun beside this one, on a GPU on a stream of its own; torch lets go of Python's lock while it multiplies. No more torch
    threads than there were."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # behind nothing: all that it reads is there

    def run() -> None:
        with torch.cuda.stream(stream):  # none: nothing changes
            call(*args)
            if stream is not None:
                stream.synchronize()

    pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
    future = pool.submit(run)
    pool.shutdown(wait=False)
    return future


def _why(drafts: Sequence[int], room: int, law: Law, heeds_floor: bool) -> str:
    """Why no more was drafted. heeds_floor: the drafter stops where the chance of its draft tokens is below a floor above 0"""
    if drafts and drafts[-1] in law.eos_ids:
        return "EOS"
    if len(drafts) == room:
        return "length"
    return "unsure" if drafts and heeds_floor else "no idea"


def _reread(target: Decoder, state: State, tokens: Tensor, n: int) -> Tensor:
    """Forget the last n positions, read the corrected tokens there, return the states behind them: [n, d]."""
    target.rollback(state, n)
    return target.step(state, tokens[None, -n:])[0]
