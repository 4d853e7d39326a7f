"""Predicted decoding speed-up from the costs of single steps: TASKS.md's formula, the corrected formula, and the bound they imply.

    S = tokens / sum over rounds of (g c + v(g + 1) + r)

Costs are in passes of plain decoding. c: one draft token; v(k): one verification of k tokens; r: the rest of a round (acceptance,
rollback, the loop itself). None of them includes prefill.

Every cost is a ratio of sums over the benchmark's own runs, so it comes from the same prompts, context lengths and turns as the rows:
the pass from plain decoding, c and r from all rows of one drafter, v(k) from the rows of all drafters. The result is still a prediction:
runs (prompt i, repeat j) are halved by the parity of i + j, and the rounds of one half are priced with the costs of the other half, so
the time of a run never enters its own prediction. A row contributes only how many tokens each round drafted, accepted and recomputed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from feature_alignment.benchmark.costs import Bound, Cost, DecodingCosts, DrafterCost, LoopCosts, RoundCosts
from feature_alignment.benchmark.results import TimedRow
from feature_alignment.benchmark.rows import Mode
from feature_alignment.benchmark.timing import Timed
from feature_alignment.decoding.generation import DRAFT_STAGES, Generation, Round
from feature_alignment.measurement import metrics

MAX_LENGTH = 32  # the bound searches draft lengths below this
MIN_VERIFICATIONS = 30  # of one length; the cost of a rarer length is scaled by the shape of the loop measurement


class RoundCost(NamedTuple):
    """In passes of plain decoding: c, one draft token; r, the rest of a round besides drafting and verification."""

    c: float
    r: float


class Drafter(NamedTuple):
    """What determines the cost of a draft token; an adaptive draft length adds the confidence and the choice of the length."""

    draft: str
    exit_layer: int | None
    adaptive: bool


def drafter_of(mode: Mode | TimedRow) -> Drafter:
    """The drafter of a mode or row."""
    return Drafter(mode.draft, mode.exit_layer, mode.adaptive)


class Sums:
    """Milliseconds of each prompt, and the number of units they were spent on: `ms` and `number`, [n] float64."""

    def __init__(self, num_prompts: int) -> None:
        self.ms, self.number = np.zeros(num_prompts), np.zeros(num_prompts)

    def add(self, prompt: int, ms: float, number: float = 1) -> None:
        """Add a measurement of one prompt."""
        self.ms[prompt] += ms
        self.number[prompt] += number

    @property
    def mean(self) -> float | None:
        """Milliseconds per unit; None without units."""
        return float(self.ms.sum() / self.number.sum()) if self.number.sum() else None


class StageCosts:
    """Costs of single steps in milliseconds, as sums over runs.

    Args:
        num_prompts: prompts of the benchmark
        loop_v: number of tokens -> cost of verifying them in a loop of nothing else, in steps of that loop; gives the shape of v(k) for
            numbers that hardly occurred
    """

    def __init__(self, num_prompts: int, loop_v: Mapping[str, float]) -> None:
        self._n = num_prompts
        self._shape = sorted((int(k), v) for k, v in loop_v.items())
        self.step = self._sums()
        self.draft: dict[Drafter, Sums] = defaultdict(self._sums)
        self.rest: dict[Drafter, Sums] = defaultdict(self._sums)
        self.verify: dict[int, Sums] = defaultdict(self._sums)
        self.reread: dict[int, Sums] = defaultdict(self._sums)

    def _sums(self) -> Sums:
        return Sums(self._n)

    def add_plain(self, prompt: int, g: Generation) -> None:
        """Add a run of plain decoding."""
        self.step.add(prompt, g.decode_ms, g.passes)

    def add_rounds(self, prompt: int, drafter: Drafter, g: Generation) -> None:
        """Add a run of speculative decoding with this drafter."""
        rounds = drafted_rounds(g)
        if not rounds:
            return
        priced = 0.0
        for r in rounds:
            if drafts := len(r.proposed):
                drafting = sum(r.ms.get(s, 0.0) for s in DRAFT_STAGES)
                self.draft[drafter].add(prompt, drafting, drafts)
                priced += drafting
            self.verify[drafts + 1].add(prompt, r.ms["verify"])
            if r.recomputed:
                self.reread[reread_tokens(r)].add(prompt, r.ms["recompute"])
        priced += sum(g.ms.get(s, 0.0) for s in ("verify", "recompute"))
        self.rest[drafter].add(prompt, g.decode_ms - priced, len(rounds))

    def loop_shape(self, num_tokens: float) -> float:
        """v(num_tokens) of the loop, interpolated linearly."""
        return float(np.interp(num_tokens, [k for k, _ in self._shape], [v for _, v in self._shape]))

    def _read(self, seen: Mapping[int, Sums], num_tokens: int) -> float | None:
        """Milliseconds of one pass over so many tokens; rare numbers are scaled by the shape of the loop."""
        if num_tokens in seen and seen[num_tokens].number.sum() >= MIN_VERIFICATIONS:
            return seen[num_tokens].mean
        expected = sum(s.number.sum() * self.loop_shape(k) for k, s in seen.items())
        spent = sum(s.ms.sum() for s in seen.values())
        return float(spent / expected * self.loop_shape(num_tokens)) if expected else None

    def verification_ms(self, num_tokens: int) -> float:
        """Milliseconds of verifying so many tokens."""
        found = self._read(self.verify, num_tokens)
        return (self.step.mean or 0.0) * self.loop_shape(num_tokens) if found is None else found

    def reread_ms(self, num_tokens: int) -> float:
        """Milliseconds of reading so many tokens of a corrected block again."""
        found = self._read(self.reread, num_tokens)
        return self.verification_ms(num_tokens) if found is None else found

    def round_cost(self, drafter: Drafter) -> RoundCost | None:
        """Costs of a drafter's rounds, in passes; None if it proposed nothing."""
        step, c = self.step.mean, self.draft[drafter].mean
        return None if not step or c is None else RoundCost(c / step, (self.rest[drafter].mean or 0.0) / step)

    def price_ms(self, drafter: Drafter, g: Generation) -> float | None:
        """Predicted milliseconds of decoding this text after prefill; None if the costs of its drafter are unknown."""
        rounds, step = drafted_rounds(g), self.step.mean
        if step is None:
            return None
        others = g.passes - len(rounds) - sum(r.recomputed for r in rounds)  # Steps of plain decoding.
        if not rounds:
            return others * step
        if (cost := self.round_cost(drafter)) is None:
            return None
        drafted = sum(len(r.proposed) for r in rounds)
        reading = sum(self.verification_ms(len(r.proposed) + 1) for r in rounds)
        again = sum(self.reread_ms(reread_tokens(r)) for r in rounds if r.recomputed)
        return (drafted * cost.c + len(rounds) * cost.r + others) * step + reading + again


def drafted_rounds(g: Generation) -> list[Round]:
    """The rounds in which drafting was on, whether or not anything was proposed."""
    return [r for r in g.rounds if r.stop_reason != "off"]


def reread_tokens(r: Round) -> int:
    """Number of tokens that the target read again in a `relaxed` round: all from the first replaced one on."""
    return len(r.proposed) - (r.accepted.index(False) if False in r.accepted else 0)


class Costs(NamedTuple):
    """Costs of all runs, and of each half of them; `halves[i]` prices the runs of the other half."""

    all: StageCosts
    halves: tuple[StageCosts, StageCosts]

    @classmethod
    def of(cls, rows: Iterable[tuple[Mode, Timed]], plain: Timed, loop_v: Mapping[str, float]) -> Costs:
        """Sum the costs of runs that took turns.

        Args:
            rows: mode and runs of every row
            plain: runs of plain decoding
            loop_v: as in `StageCosts`
        """
        number = len(plain.generations)
        found = cls(StageCosts(number, loop_v), (StageCosts(number, loop_v), StageCosts(number, loop_v)))
        drafters: list[tuple[Drafter | None, Timed]] = [(None, plain), *((drafter_of(mode), timed) for mode, timed in rows)]
        for drafter, timed in drafters:
            for i, runs in enumerate(timed.generations):
                for repeat, g in enumerate(runs):
                    for costs in (found.all, found.halves[(i + repeat) % 2]):
                        if drafter is None:
                            costs.add_plain(i, g)
                        else:
                            costs.add_rounds(i, drafter, g)
        return found

    def corrected(self, drafter: Drafter, timed: Timed) -> float | None:
        """S of a row's runs; None without draft tokens, or if the other half of the runs has none of this drafter."""
        if not any(r.proposed for g in timed.every for r in g.rounds):
            return None
        plain_ms = price_ms = 0.0
        for i, runs in enumerate(timed.generations):
            for repeat, g in enumerate(runs):
                other = self.halves[(i + repeat + 1) % 2]
                price = other.price_ms(drafter, g)
                if price is None or other.step.mean is None:
                    return None
                price_ms += price
                plain_ms += (len(g.token_ids) - 1) * other.step.mean
        return plain_ms / price_ms if price_ms else None

    def report(self, loop: LoopCosts, clips: Sequence[str]) -> DecodingCosts:
        """Costs during decoding, for benchmark.json.

        Args:
            loop: costs in loops of nothing else, for drafters without a row
            clips: clip of each prompt
        """
        costs, step = self.all, self.all.step.mean or float("nan")

        def rate(s: Sums) -> metrics.Rate:
            return metrics.Counts(s.ms, s.number).rate(clips)

        drafters = [
            DrafterCost(
                **drafter._asdict(),
                **(costs.round_cost(drafter) or RoundCost(float("nan"), float("nan")))._asdict(),
                draft_ms=rate(costs.draft[drafter]),
                rest_ms=rate(costs.rest[drafter]),
            )
            for drafter in list(costs.rest)
        ]
        aligned, chained = (costs.round_cost(Drafter(name, None, False)) for name in ("aligned", "chained"))
        return DecodingCosts(
            t_target_ms=step,
            c=aligned.c if aligned else loop.c,
            c_chained=chained.c if chained else loop.c_chained,
            v={k: costs.verification_ms(int(k)) / step for k in loop.v},
            rounds=RoundCosts(
                step_ms=rate(costs.step),
                verify_ms={str(k): rate(s) for k, s in sorted(costs.verify.items())},
                recompute_ms={str(k): rate(s) for k, s in sorted(costs.reread.items())},
                drafters=drafters,
            ),
        )


def verification_cost(v: Mapping[str, float], num_tokens: float) -> float:
    """Cost of verifying `num_tokens`, interpolated linearly between the measured numbers of `v`."""
    points = sorted((int(k), cost) for k, cost in v.items())
    return float(np.interp(num_tokens, [k for k, _ in points], [cost for _, cost in points]))


def speedup_at(acceptance_rate: float, num_draft_tokens: int, round_cost: RoundCost, v: Mapping[str, float]) -> float:
    """S at a fixed draft length, if draft tokens are accepted independently.

    Args:
        acceptance_rate: of each draft token
        num_draft_tokens: draft length
        round_cost: c and r of the drafter
        v: number of tokens -> cost of verifying them
    """
    tokens = metrics.tokens_per_pass_iid(acceptance_rate, num_draft_tokens)
    return metrics.corrected_speedup(tokens, num_draft_tokens, round_cost.c, verification_cost(v, num_draft_tokens + 1) + round_cost.r)


def bound(acceptance_rate: float, round_cost: RoundCost, v: Mapping[str, float]) -> Bound:
    """The best fixed draft length by the corrected formula; the arguments are those of `speedup_at`."""
    best = max(range(1, MAX_LENGTH), key=lambda g: speedup_at(acceptance_rate, g, round_cost, v))
    return Bound(acceptance_rate, *round_cost, best, speedup_at(acceptance_rate, best, round_cost, v))


def warnings(cost: Cost) -> list[str]:
    """Drafters that no fixed draft length makes faster than plain decoding, by the corrected formula, with the reason."""
    found = []
    for draft, b in (cost.bound or {}).items():
        if b.speedup > 1:
            continue
        reason = f"a draft token costs {b.c:.3f} passes and is accepted at a rate of {b.acceptance_rate:.3f}"
        if b.acceptance_rate > b.c:
            others = verification_cost(cost.v, b.num_draft_tokens + 1) + b.r
            reason += f"; the rest of a round with {b.num_draft_tokens} of them takes {others:.2f} passes"
        found.append(f"{draft}: {reason}: no draft length can be faster than plain decoding ({b.speedup:.2f}x at best)")
    return found


def modelled(row: TimedRow, timed: Timed, c: float, step_ms: float) -> float:
    """TASKS.md's formula at a fixed draft length: E / (1 + overhead); for `relaxed`, γ a / (1 + overhead + rejection cost).

    Args:
        row: the measured row
        timed: its runs
        c: one draft token, in passes of plain decoding
        step_ms: milliseconds of one pass of plain decoding
    """
    g = row.num_draft_tokens
    if row.accept != "relaxed":
        return metrics.modelled_speedup(metrics.tokens_per_pass_iid(row.acceptance_rate.value, g), g * c)
    rounds = [r for run in timed.every for r in run.rounds]
    n, num_accepted = max(1, len(rounds)), sum(r.num_accepted for r in rounds)
    recompute_ms = sum(run.ms.get("recompute", 0.0) for run in timed.every)
    return metrics.modelled_speedup(num_accepted / n, g * c, recompute_ms / n / step_ms)


@dataclass(frozen=True)
class Prediction:
    """Predicted decoding speed-ups of a row, and their relative errors; None where a formula does not apply.

    TASKS.md's formula applies to adapters at a fixed draft length.
    """

    modelled_speedup: float | None
    corrected_speedup: float | None
    modelled_error: float | None
    corrected_error: float | None


def prediction_of(row: TimedRow, timed: Timed, costs: Costs) -> Prediction:
    """Predict the decoding speed-up of a row by both formulas.

    Args:
        row: the measured row
        timed: its runs
        costs: of all runs
    """
    by_task, drafter, measured = None, drafter_of(row), row.decode_speedup.value
    round_cost = costs.all.round_cost(drafter)
    if round_cost and row.draft in ("aligned", "chained") and not row.adaptive:
        by_task = modelled(row, timed, round_cost.c, costs.all.step.mean or float("nan"))
    corrected = costs.corrected(drafter, timed)
    errors = (None if value is None else value / measured - 1 for value in (by_task, corrected))
    return Prediction(by_task, corrected, *errors)
