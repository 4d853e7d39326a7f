"""Plain decoding and speculative decoding of one prompt, over the same target and the same token counter.

One round, with g drafts d1..dg after the last emitted token x:

    target reads     x    d1   d2   …   dg          one forward pass
    it would say     p1   p2   p3   …   p(g+1)      p(i) judges d(i); after n kept drafts, p(n+1) is the extra token

Before each round the target's cache holds the prompt and all emitted tokens but the last.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from feature_alignment.decoding.acceptance import Rule, cosine_per_position, kept_drafts
from feature_alignment.decoding.pace import Pace
from feature_alignment.decoding.proposers import Proposer
from feature_alignment.decoding.sampling import Sampler, pick
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.models.decoder import EOS, Decoder, Prompt, State

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
    with watch("target_prefill"):
        state = target.prefill([prompt])
        token = pick(target.lm_head(state.last), sampler).token
    emitted = [int(token)]
    with watch("verify"):
        while emitted[-1] != EOS and len(emitted) < max_new_tokens:
            token = pick(target.lm_head(target.step(state, token[None])[:, -1]), sampler).token
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

    accept="token" emits exactly what `greedy` emits; with a sampler it has the law of `plain` with one. The other rules are lossy:
    `feature` keeps drafts whose expected state has a cosine above `threshold`, up to the first rejection; `relaxed` keeps any such
    draft, puts the target's own token in the other places, and lets the target read the corrected block again (its time is the stage
    "recompute", the rejection cost). With a pace, `num_draft_tokens` is the most that are drafted.

    overlap: the drafter reads its prompt in a thread of its own while the target reads its own (for a second core); the stage
             "draft_prefill" is then what is waited for it
    """
    if sampler is not None and accept != "token":
        raise ValueError(f"sampling is lossless under the token rule only, got {accept!r}")
    watch = Stopwatch(target.device)
    start = watch.now()
    started, reading, beside = pace is None or not proposer.reads_prompt or pace.drafting, None, Stopwatch(target.device)
    if started and overlap:
        reading = _in_a_thread(target.device, proposer.start, draft_prompt, beside)
    with watch("target_prefill"):
        state = target.prefill([prompt])
        token = pick(target.lm_head(state.last), sampler).token
    if pace is not None:
        pace.prompted(watch.ms["target_prefill"])
    if started:
        _start(proposer, draft_prompt, watch, pace, reading)
    emitted, rounds, passes = [int(token)], [], 0
    states = state.last.new_empty(max_new_tokens, target.hidden_size)  # states[i] emitted emitted[i]
    states[0] = state.last[0]
    since = 0.0 if pace is None else watch.now()  # the pace is told of all time, that of keeping its books included
    while emitted[-1] != EOS and len(emitted) < max_new_tokens:
        before = dict(watch.ms)
        room = min(num_draft_tokens, max_new_tokens - len(emitted) - 1)  # the round also emits a token of the target's own
        floor = None if room <= 0 else 0.0 if pace is None else pace.next_floor()
        room = room if pace is None or floor is None else min(room, pace.most(floor, proposer.knows_chance))
        last = torch.tensor([emitted[-1]], device=target.device)
        if floor is None:  # room for the last token only, or drafts do not pay: as in plain decoding
            first, read = len(emitted), []
            with watch("verify"):
                for _ in range(min(1 if pace is None else pace.rest, max_new_tokens - first)):
                    read.append(target.step(state, last[None])[:, -1])
                    last = pick(target.lm_head(read[-1]), sampler).token
                    emitted.append(int(last))
                    if emitted[-1] == EOS:
                        break
            states[first : len(emitted)] = torch.cat(read)
            passes += len(read)
            ms = watch.ms["verify"] - before.get("verify", 0.0)
            if pace is not None:
                now = watch.now()
                pace.passed(0, len(read), now - since - ms, ms)
                since = now
            if room > 0:
                rounds += [Round([], [], [], None, token, False, {"verify": ms / len(read)}, "off") for token in emitted[first:]]
            continue
        if not started:
            _start(proposer, draft_prompt, watch, pace)
            started = True
        draft = proposer.propose(emitted, states[: len(emitted)], room, watch, floor)
        drafts = draft.token_ids.to(target.device)
        g = len(drafts)
        with watch("verify"):
            hidden = target.step(state, torch.cat([last, drafts])[None])[0]  # [g + 1, d]
            logits = target.lm_head(hidden)
            says = logits.argmax(-1)  # [g + 1]
            passes += 1
        with watch("accept"):
            cosine = None if draft.aligned is None else cosine_per_position(draft.aligned, hidden[:g])
            if not g:
                kept, n, extra = drafts.bool(), 0, int(pick(logits, sampler).token)
            elif sampler is None:
                kept = kept_drafts(accept, drafts, says[:g], cosine, threshold)
                n = int(kept.sum())
                extra = int(says[n if accept != "relaxed" else g])
            else:
                kept, behind = sampler.judge(drafts, draft.probs, sampler.probs(logits))
                n, extra = int(kept.sum()), int(behind)
        tokens, recomputed = drafts[:n], False
        if accept == "relaxed":
            tokens = torch.where(kept, drafts, says[:g])
            recomputed = not bool(kept.all())
            if recomputed:
                with watch("recompute"):
                    n = g - int(kept.int().argmin())
                    reread = _reread(target, state, tokens, n)
                    hidden = torch.cat([hidden[: g + 1 - n], reread])
                    extra = int(target.lm_head(reread[-1]).argmax(-1))
                    passes += 1
        else:
            with watch("rollback"):
                target.rollback(state, g - n)
        new = [*tokens.tolist(), extra]
        ended = new.index(EOS) + 1 if EOS in new else len(new)
        states[len(emitted) : len(emitted) + ended] = hidden[:ended]
        emitted += new[:ended]
        spent = {k: v - before.get(k, 0.0) for k, v in watch.ms.items() if v > before.get(k, 0.0)}
        if pace is not None:
            now = watch.now()
            elapsed = now - since - spent.get("draft_prefill", 0.0)
            alone = spent["verify"] + spent.get("accept", 0.0)  # without drafts this is what the target does anyway
            drafting = sum(spent.get(stage, 0.0) for stage in DRAFT_STAGES) if g else elapsed - alone
            pace.passed(g, ended, drafting, elapsed - drafting)
            since = now
        rounds.append(
            Round(
                proposed=drafts.tolist(),
                target_says=says[:g].tolist(),
                kept=[k and i < ended for i, k in enumerate(kept.tolist())],  # nothing behind EOS counts
                cosine=None if cosine is None else cosine.tolist(),
                extra_token=extra if ended == len(new) else None,
                recomputed=recomputed,
                ms=spent,
                stopped=_why(drafts, room, floor),
            )
        )
    if started:
        proposer.finish(emitted)
    spans = [*watch.spans, *((f"{stage}, beside", begin, end) for stage, begin, end in beside.spans)]
    return Generation(emitted, passes, watch.now() - start, watch.ms, rounds, _since(start, spans))


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


def _why(drafts: Tensor, room: int, floor: float) -> str:
    if len(drafts) == room:
        return "length"
    if not len(drafts):
        return "no idea"
    return "EOS" if int(drafts[-1]) == EOS else "unsure" if floor else "no idea"


def _reread(target: Decoder, state: State, tokens: Tensor, n: int) -> Tensor:
    """Forget the last n positions, read the corrected tokens there, return the states behind them: [n, d]."""
    target.rollback(state, n)
    return target.step(state, tokens[None, -n:])[0]
