"""A chained draft token during decoding, next to the same chain in a loop of nothing else.

After every run of a chained row the drafter repeats the run's rounds in such a loop: it reads as many tokens as were accepted, then
drafts as many as were drafted. So both times come from the same prompts, turns and machine. `alone` is drafting, `reading` the rest. The
difference of a round, as a line over the draft length, has two parts:

    live - alone = once + length * more     once: reading, and the adapter's weights, which the pass of the target before the round has
                                            evicted from the processor's caches
                                            more: per draft token, for example where the device waits for the host

`tests/benchmarks/chained_draft.py gap` measures what the caches contribute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from feature_alignment.benchmark.costs import DecodingCosts
from feature_alignment.decoding.chained_proposer import ChainedProposer
from feature_alignment.decoding.generation import DRAFT_STAGES, Generation, Round
from feature_alignment.decoding.proposers import Proposer
from feature_alignment.decoding.stopwatch import Stopwatch


class DraftedRound(NamedTuple):
    """One round of a chained row.

    Args:
        length: number of tokens that were drafted
        counted: number of them that the round records: none after one that ends the text
        live_ms: milliseconds of reading and drafting during decoding
        alone_ms: milliseconds of drafting as many tokens in a loop of nothing else
        reading_ms: milliseconds of reading as many tokens in that loop
    """

    length: int
    counted: int
    live_ms: float
    alone_ms: float
    reading_ms: float


class ChainedCosts(NamedTuple):
    """`c_chained_live`, `c_chained_alone`, `c_chained_reading` and `c_chained_once` of `DecodingCosts`."""

    live: float | None = None
    alone: float | None = None
    reading: float | None = None
    once: float | None = None


class ChainLoop:
    """Collects the rounds of all chained rows with a fixed draft length."""

    def __init__(self) -> None:
        self.rounds: list[DraftedRound] = []

    def after(
        self, answer: Callable[[int], Generation], proposer: Proposer, num_draft_tokens: int, max_new_tokens: int
    ) -> Callable[[int], Generation]:
        """A function that answers like `answer` and then drafts the answer's rounds again, outside the answer's time.

        Args:
            answer: decodes the i-th prompt with `proposer` at a fixed draft length
            proposer: the drafter; any but a chained one leaves `answer` as it is
            num_draft_tokens: the draft length
            max_new_tokens: longest answer, near which rounds draft less
        """
        if not isinstance(proposer, ChainedProposer):
            return answer

        def answer_and_redraft(i: int) -> Generation:
            generation = answer(i)
            rounds = [r for r in generation.rounds if r.proposed]
            drafts_on = proposer.device.type != "cpu"  # after a token that ends the text; a CPU stops there
            reads = tokens_read(generation.rounds)
            room = [min(num_draft_tokens, max_new_tokens - emitted - 1) for emitted in accumulate(reads)]
            lengths = [most if drafts_on and r.stop_reason == "EOS" else len(r.proposed) for r, most in zip(rounds, room, strict=True)]
            repeated = repeat_alone(proposer, reads, lengths)
            for r, length, (reading_ms, alone_ms) in zip(rounds, lengths, repeated, strict=True):
                self.rounds.append(DraftedRound(length, len(r.proposed), drafting_ms(r), alone_ms, reading_ms))
            return generation

        return answer_and_redraft

    def costs(self, step_ms: float) -> ChainedCosts:
        """Costs of one chained draft token.

        Args:
            step_ms: milliseconds of one pass of plain decoding
        """
        drafts = sum(r.counted for r in self.rounds)
        if not drafts:
            return ChainedCosts()
        of_rounds = zip(*((r.live_ms, r.alone_ms, r.reading_ms) for r in self.rounds), strict=True)
        live, alone, reading = (sum(ms) / drafts / step_ms for ms in of_rounds)
        lengths, gaps = np.array([r.length for r in self.rounds]), np.array([r.live_ms - r.alone_ms for r in self.rounds])
        if len(set(lengths)) == 1:
            return ChainedCosts(live, alone, reading)
        once = float(np.polyfit(lengths, gaps, 1)[1])
        return ChainedCosts(live, alone, reading, once * len(self.rounds) / drafts / step_ms)

    def added_to(self, cost: DecodingCosts) -> DecodingCosts:
        """These costs next to the others that were measured during decoding."""
        live, alone, reading, once = self.costs(cost.t_target_ms)
        return replace(cost, c_chained_live=live, c_chained_alone=alone, c_chained_reading=reading, c_chained_once=once)


def drafting_ms(r: Round) -> float:
    """Milliseconds of drafting in a round."""
    return sum(r.ms.get(stage, 0.0) for stage in DRAFT_STAGES)


def tokens_read(rounds: Sequence[Round]) -> list[int]:
    """Number of verified tokens that the drafter reads before each round in which it drafts."""
    read, waiting = [], 1  # the first token
    for r in rounds:
        if r.proposed:
            read.append(waiting)
            waiting = 0
        waiting += 1 + (len(r.proposed) if r.recomputed else r.num_accepted)
    return read


def repeat_alone(proposer: ChainedProposer, reads: Sequence[int], lengths: Sequence[int], warm: bool = True) -> list[tuple[float, float]]:
    """Milliseconds of reading and of drafting in each round of a loop of nothing else.

    Args:
        proposer: after a finished text
        reads: number of tokens to read in each round; 0 for none
        lengths: number of draft tokens of each round
        warm: repeat the first round before, untimed
    """
    watch = Stopwatch(proposer.device)
    rounds = list(zip(reads, lengths, strict=True))
    for number, length in [*rounds[:warm], *rounds]:
        with watch("read"):
            if number:
                proposer.reread(number)
        with watch("adapter"):
            proposer.redraft(length)
    ms = [end - begin for _, begin, end in watch.spans]
    return list(zip(ms[::2], ms[1::2], strict=True))[len(rounds[:warm]) :]
