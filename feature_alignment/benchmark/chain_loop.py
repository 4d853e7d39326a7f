"""A chained draft token during decoding, next to the same chain in a loop of nothing else.

After every run of a chained row the drafter repeats the run's draft lengths in such a loop, so both times come from the same prompts,
turns and machine. Their difference per round, as a line over the draft length, has two parts:

    live - alone = once + length * more     once: a round reads its accepted tokens into the adapter's memory before it drafts, and the
                                            pass of the target before it has evicted the adapter's weights from the processor's caches
                                            more: per draft token, for example where the device waits for the host

`tests/benchmarks/chained_draft.py gap` measures what the caches contribute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
        live_ms: milliseconds of drafting during decoding
        alone_ms: milliseconds of drafting as many tokens in a loop of nothing else
    """

    length: int
    counted: int
    live_ms: float
    alone_ms: float


class ChainedCosts(NamedTuple):
    """`c_chained_live`, `c_chained_alone` and `c_chained_once` of `DecodingCosts`."""

    live: float | None = None
    alone: float | None = None
    once: float | None = None


class ChainLoop:
    """Collects the rounds of all chained rows with a fixed draft length."""

    def __init__(self) -> None:
        self.rounds: list[DraftedRound] = []

    def after(self, answer: Callable[[int], Generation], proposer: Proposer, num_draft_tokens: int) -> Callable[[int], Generation]:
        """A function that answers like `answer` and then drafts the answer's rounds again, outside the answer's time.

        Args:
            answer: decodes the i-th prompt with `proposer` at a fixed draft length
            proposer: the drafter; any but a chained one leaves `answer` as it is
            num_draft_tokens: the draft length
        """
        if not isinstance(proposer, ChainedProposer):
            return answer

        def answer_and_redraft(i: int) -> Generation:
            generation = answer(i)
            rounds = [r for r in generation.rounds if r.proposed]
            drafts_on = proposer.device.type != "cpu"  # after a token that ends the text; a CPU stops there
            lengths = [num_draft_tokens if drafts_on and r.stop_reason == "EOS" else len(r.proposed) for r in rounds]
            for r, length, ms in zip(rounds, lengths, alone_ms(proposer, lengths), strict=True):
                self.rounds.append(DraftedRound(length, len(r.proposed), drafting_ms(r), ms))
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
        live, alone = (sum(ms) / drafts / step_ms for ms in ([r.live_ms for r in self.rounds], [r.alone_ms for r in self.rounds]))
        lengths, gaps = np.array([r.length for r in self.rounds]), np.array([r.live_ms - r.alone_ms for r in self.rounds])
        if len(set(lengths)) == 1:
            return ChainedCosts(live, alone)
        once = float(np.polyfit(lengths, gaps, 1)[1])
        return ChainedCosts(live, alone, once * len(self.rounds) / drafts / step_ms)

    def added_to(self, cost: DecodingCosts) -> DecodingCosts:
        """These costs next to the others that were measured during decoding."""
        found = self.costs(cost.t_target_ms)
        return replace(cost, c_chained_live=found.live, c_chained_alone=found.alone, c_chained_once=found.once)


def drafting_ms(r: Round) -> float:
    """Milliseconds of drafting in a round."""
    return sum(r.ms.get(stage, 0.0) for stage in DRAFT_STAGES)


def alone_ms(proposer: ChainedProposer, lengths: list[int], warm: bool = True) -> list[float]:
    """Milliseconds of each block of draft tokens in a loop of nothing else.

    Args:
        proposer: after a finished text
        lengths: number of draft tokens of each block
        warm: draft one more block first, which is not timed
    """
    watch = Stopwatch(proposer.device)
    for length in lengths[:warm]:
        proposer.redraft(length)
    for length in lengths:
        with watch("adapter"):
            proposer.redraft(length)
    return [end - begin for _, begin, end in watch.spans]
