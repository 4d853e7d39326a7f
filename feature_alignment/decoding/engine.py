"""Plain greedy decoding and speculative decoding of one prompt, over the same target and the same token counter.

One round, with g drafts d1..dg after the last emitted token x:

    target reads     x    d1   d2   …   dg          one forward pass
    it would say     p1   p2   p3   …   p(g+1)      p(i) judges d(i); after n kept drafts, p(n+1) is the extra token

Before each round the target's cache holds the prompt and all emitted tokens but the last.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from feature_alignment.decoding.acceptance import Rule, cosine_per_position, kept_drafts
from feature_alignment.decoding.proposers import Proposer
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.models.pair import EOS, Decoder, Prompt, State

PREFILL_STAGES = ("target_prefill", "draft_prefill")


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
def greedy(target: Decoder, prompt: Prompt, max_new_tokens: int) -> Generation:
    """The baseline: the target alone, one token per pass, up to and including the first EOS."""
    watch = Stopwatch(target.device)
    start = watch.now()
    with watch("target_prefill"):
        state, token = _first_token(target, prompt)
    emitted = [int(token)]
    with watch("verify"):
        while emitted[-1] != EOS and len(emitted) < max_new_tokens:
            token = target.lm_head(target.step(state, token[None])[:, -1]).argmax(-1)
            emitted.append(int(token))
    return Generation(emitted, len(emitted) - 1, watch.now() - start, watch.ms)


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
) -> Generation:
    """Draft, verify, accept, roll back, until EOS or exactly `max_new_tokens`.

    accept="token" emits exactly what `greedy` emits. The other rules are lossy: `feature` keeps drafts whose expected state has
    a cosine above `threshold`, up to the first rejection; `relaxed` keeps any such draft, puts the target's own token in the other
    places, and lets the target read the corrected block again (its time is the stage "recompute", the rejection cost).
    """
    watch = Stopwatch(target.device)
    start = watch.now()
    with watch("target_prefill"):
        state, token = _first_token(target, prompt)
    proposer.start(draft_prompt, watch)
    emitted, rounds, passes = [int(token)], [], 0
    states = state.last.new_empty(max_new_tokens, target.hidden_size)  # states[i] emitted emitted[i]
    states[0] = state.last[0]
    while emitted[-1] != EOS and len(emitted) < max_new_tokens:
        before = dict(watch.ms)
        g = min(num_draft_tokens, max_new_tokens - len(emitted) - 1)  # the round also emits a token of the target's own
        draft = proposer.propose(emitted, states[: len(emitted)], g, watch) if g > 0 else None
        last = torch.tensor([emitted[-1]], device=target.device)
        with watch("verify"):
            block = last if draft is None else torch.cat([last, draft.token_ids])
            hidden = target.step(state, block[None])[0]  # [g + 1, d]
            says = target.lm_head(hidden).argmax(-1)  # [g + 1]
            passes += 1
        if draft is None:  # room for one token more, which is the last
            emitted.append(int(says[0]))
            continue
        with watch("accept"):
            cosine = None if draft.aligned is None else cosine_per_position(draft.aligned, hidden[:g])
            kept = kept_drafts(accept, draft.token_ids, says[:g], cosine, threshold)
        if accept == "relaxed":
            tokens = torch.where(kept, draft.token_ids, says[:g])
            recomputed = not bool(kept.all())
            extra = int(says[g])
            if recomputed:
                with watch("recompute"):
                    n = g - int(kept.int().argmin())
                    reread = _reread(target, state, tokens, n)
                    hidden = torch.cat([hidden[: g + 1 - n], reread])
                    extra = int(target.lm_head(reread[-1]).argmax(-1))
                    passes += 1
        else:
            recomputed, n = False, int(kept.sum())
            tokens, extra = draft.token_ids[:n], int(says[n])
            with watch("rollback"):
                target.rollback(state, g - n)
        new = [*tokens.tolist(), extra]
        ended = new.index(EOS) + 1 if EOS in new else len(new)
        states[len(emitted) : len(emitted) + ended] = hidden[:ended]
        emitted += new[:ended]
        kept_list = [k and i < ended for i, k in enumerate(kept.tolist())]  # nothing behind EOS counts
        rounds.append(
            Round(
                proposed=draft.token_ids.tolist(),
                target_says=says[:g].tolist(),
                kept=kept_list,
                cosine=None if cosine is None else cosine.tolist(),
                extra_token=extra if ended == len(new) else None,
                recomputed=recomputed,
                ms={k: v - before.get(k, 0.0) for k, v in watch.ms.items() if v > before.get(k, 0.0)},
            )
        )
    return Generation(emitted, passes, watch.now() - start, watch.ms, rounds)


def _first_token(target: Decoder, prompt: Prompt) -> tuple[State, Tensor]:
    state = target.prefill([prompt])
    return state, target.lm_head(state.last).argmax(-1)


def _reread(target: Decoder, state: State, tokens: Tensor, n: int) -> Tensor:
    """Forget the last n positions, read the corrected tokens there, return the states behind them: [n, d]."""
    target.rollback(state, n)
    return target.step(state, tokens[None, -n:])[0]
