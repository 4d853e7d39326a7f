"""What a benchmark row ought to have taken, from the costs of single steps: TASKS.md's formula, the corrected one, and the bound.

    S = tokens / sum over rounds of (g c + v(g + 1) + r)

Costs are in passes of plain decoding. c: one draft token; v(k): one verification of k tokens; r: the rest of a round (accepting, rolling
back, the loop). Prefill is in none of them.

Every cost is a ratio of sums over the benchmark's own runs, so it comes from the same prompts, context lengths and turns as the rows:
the pass from plain decoding, c and r from all rows of one drafter, v(k) from the rows of all drafters. The formula stays a prediction:
runs (prompt i, repeat j) are halved by the parity of i + j, and the rounds of one half are priced by the costs of the other half, so
no run's time enters its own prediction. What a row contributes itself is how many tokens each round drafted, kept and recomputed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from feature_alignment.benchmark.timing import Timed
from feature_alignment.decoding.generation import DRAFT_STAGES, Generation, Round
from feature_alignment.measurement import metrics

LONGEST = 32  # draft tokens per round, up to which the best number is looked for
ENOUGH = 30  # verifications of one length; a length seen less often is scaled from the loop measurement


class RoundCost(NamedTuple):
    """In passes of plain decoding: one draft token, and what a round takes besides drafting and verifying."""

    c: float
    r: float


class Drafter(NamedTuple):
    """What decides the cost of one draft token. adaptive: a confidence and the choice of the length come with each."""

    draft: str
    exit_layer: int | None
    adaptive: bool


def drafter_of(mode: Any) -> Drafter:
    """mode: a row's `rows.Mode`, or any with its names"""
    return Drafter(mode.draft, mode.exit_layer, mode.adaptive)


class Sums:
    """Milliseconds, and the number of units they were spent on, per prompt: ms, number [n] float64."""

    def __init__(self, num_prompts: int) -> None:
        self.ms, self.number = np.zeros(num_prompts), np.zeros(num_prompts)

    def add(self, prompt: int, ms: float, number: float = 1) -> None:
        self.ms[prompt] += ms
        self.number[prompt] += number

    @property
    def mean(self) -> float | None:
        """Milliseconds per unit; None where there is no unit."""
        return float(self.ms.sum() / self.number.sum()) if self.number.sum() else None


class StageCosts:
    """Costs of single steps in milliseconds, as sums over runs.

    Args:
        num_prompts: of the benchmark
        loop_v: number of tokens -> cost of verifying them in a loop of its own, in steps of that loop; gives the shape of v(k) for
            lengths that hardly occurred
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
        self.step.add(prompt, g.decode_ms, g.passes)

    def add_rounds(self, prompt: int, drafter: Drafter, g: Generation) -> None:
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
        """v(num_tokens) of the loop, linear between its points."""
        return float(np.interp(num_tokens, [k for k, _ in self._shape], [v for _, v in self._shape]))

    def _read(self, seen: Mapping[int, Sums], num_tokens: int) -> float | None:
        """Milliseconds of reading so many tokens at once; of lengths that hardly occurred by the loop's shape."""
        if num_tokens in seen and seen[num_tokens].number.sum() >= ENOUGH:
            return seen[num_tokens].mean
        expected = sum(s.number.sum() * self.loop_shape(k) for k, s in seen.items())
        spent = sum(s.ms.sum() for s in seen.values())
        return float(spent / expected * self.loop_shape(num_tokens)) if expected else None

    def verification_ms(self, num_tokens: int) -> float:
        found = self._read(self.verify, num_tokens)
        return (self.step.mean or 0.0) * self.loop_shape(num_tokens) if found is None else found

    def reread_ms(self, num_tokens: int) -> float:
        found = self._read(self.reread, num_tokens)
        return self.verification_ms(num_tokens) if found is None else found

    def round_cost(self, drafter: Drafter) -> RoundCost | None:
        """In passes; None where the drafter proposed nothing."""
        step, c = self.step.mean, self.draft[drafter].mean
        return None if not step or c is None else RoundCost(c / step, (self.rest[drafter].mean or 0.0) / step)

    def price_ms(self, drafter: Drafter, g: Generation) -> float | None:
        """What decoding this text ought to take after the prefill; None where nothing is known of its drafter."""
        rounds, step = drafted_rounds(g), self.step.mean
        if step is None:
            return None
        others = g.passes - len(rounds) - sum(r.recomputed for r in rounds)  # as in plain decoding
        if not rounds:
            return others * step
        if (cost := self.round_cost(drafter)) is None:
            return None
        drafted = sum(len(r.proposed) for r in rounds)
        reading = sum(self.verification_ms(len(r.proposed) + 1) for r in rounds)
        again = sum(self.reread_ms(reread_tokens(r)) for r in rounds if r.recomputed)
        return (drafted * cost.c + len(rounds) * cost.r + others) * step + reading + again


def drafted_rounds(g: Generation) -> list[Round]:
    """The rounds in which the drafter was asked, whether or not it proposed anything."""
    return [r for r in g.rounds if r.stop_reason != "off"]


def reread_tokens(r: Round) -> int:
    """How many tokens the target read again in a `relaxed` round: all from the first replaced one on."""
    return len(r.proposed) - (r.accepted.index(False) if False in r.accepted else 0)


class Costs(NamedTuple):
    """Costs of all runs, and of each half of them. `halves[i]` prices the runs of the other half."""

    all: StageCosts
    halves: tuple[StageCosts, StageCosts]

    @classmethod
    def of(cls, rows: Iterable[tuple[Any, Timed]], plain: Timed, loop_v: Mapping[str, float]) -> Costs:
        """Sums over runs that took turns.

        Args:
            rows: mode and runs of every row
            plain: the runs of plain decoding
            loop_v: as in `StageCosts`
        """
        number = len(plain.generations)
        found = cls(StageCosts(number, loop_v), (StageCosts(number, loop_v), StageCosts(number, loop_v)))
        for mode, timed in [(None, plain), *rows]:
            for i, runs in enumerate(timed.generations):
                for repeat, g in enumerate(runs):
                    for costs in (found.all, found.halves[(i + repeat) % 2]):
                        if mode is None:
                            costs.add_plain(i, g)
                        else:
                            costs.add_rounds(i, drafter_of(mode), g)
        return found

    def corrected(self, drafter: Drafter, timed: Timed) -> float | None:
        """S of a row; None without a draft, or where the other half of the runs has none of its drafter."""
        if not any(r.proposed for g in timed.every for r in g.rounds):
            return None
        alone = spent = 0.0
        for i, runs in enumerate(timed.generations):
            for repeat, g in enumerate(runs):
                other = self.halves[(i + repeat + 1) % 2]
                price = other.price_ms(drafter, g)
                if price is None or other.step.mean is None:
                    return None
                spent += price
                alone += (len(g.token_ids) - 1) * other.step.mean
        return alone / spent if spent else None

    def report(self, loop: dict[str, Any], clips: Sequence[str]) -> dict[str, Any]:
        """The part of benchmark.json's `cost` that is measured in the turns. loop: what `measure.costs` found"""
        costs, step = self.all, self.all.step.mean or float("nan")
        rate = lambda s: metrics.Counts(s.ms, s.number).rate(clips)  # noqa: E731
        drafters = [
            {**drafter._asdict(), **(costs.round_cost(drafter) or RoundCost(float("nan"), float("nan")))._asdict()}
            | {"draft_ms": rate(costs.draft[drafter]), "rest_ms": rate(costs.rest[drafter])}
            for drafter in list(costs.rest)
        ]
        c = {name: costs.round_cost(Drafter(name, None, False)) for name in ("aligned", "chained")}
        return {
            "t_target_ms": step,
            "c": c["aligned"].c if c["aligned"] else loop["c"],
            "c_chained": c["chained"].c if c["chained"] else loop["c_chained"],
            "v": {k: costs.verification_ms(int(k)) / step for k in loop["v"]},
            "rounds": {
                "step_ms": rate(costs.step),
                "verify_ms": {str(k): rate(s) for k, s in sorted(costs.verify.items())},
                "recompute_ms": {str(k): rate(s) for k, s in sorted(costs.reread.items())},
                "drafters": drafters,
            },
        }


def verification_cost(cost: dict[str, Any], num_tokens: float) -> float:
    """v(num_tokens), linear between the measured points."""
    points = sorted((int(k), v) for k, v in cost["v"].items())
    return float(np.interp(num_tokens, [k for k, _ in points], [v for _, v in points]))


def speedup_at(acceptance_rate: float, num_draft_tokens: int, spent: RoundCost, cost: dict[str, Any]) -> float:
    """S of rounds of a fixed length whose draft tokens are kept independently."""
    tokens = metrics.tokens_per_pass_iid(acceptance_rate, num_draft_tokens)
    return metrics.corrected_speedup(tokens, num_draft_tokens, spent.c, verification_cost(cost, num_draft_tokens + 1) + spent.r)


def bound(acceptance_rate: float, spent: RoundCost, cost: dict[str, Any]) -> dict[str, float]:
    """The best fixed number of draft tokens by the corrected formula, and what it brings."""
    best = max(range(1, LONGEST), key=lambda g: speedup_at(acceptance_rate, g, spent, cost))
    found = speedup_at(acceptance_rate, best, spent, cost)
    return {"acceptance_rate": acceptance_rate, **spent._asdict(), "num_draft_tokens": best, "speedup": found}


def warnings(cost: dict[str, Any]) -> list[str]:
    """Reasons why no setting can win, if there are any."""
    found = [
        f"{draft} drafts: acceptance {b['acceptance_rate']:.3f} is not above their cost of {b['c']:.3f} passes: no length can win"
        for draft, b in cost["bound"].items()
        if b["acceptance_rate"] <= b["c"]
    ]
    eight = verification_cost(cost, 8)
    return found + ([f"verifying 8 tokens costs {eight:.2f} passes: long drafts cannot win"] if eight > 1.5 else [])


def modelled(row: dict[str, Any], timed: Timed, c: float, step_ms: float) -> float:
    """TASKS.md's formula, for rounds of a fixed length: E / (1 + overhead), relaxed: γ a / (1 + overhead + rejection cost).

    Args:
        row: the row, with its acceptance rate
        timed: its runs
        c: one draft token, in passes of plain decoding
        step_ms: one pass of plain decoding
    """
    g = row["num_draft_tokens"]
    if row["accept"] != "relaxed":
        return metrics.modelled_speedup(metrics.tokens_per_pass_iid(row["acceptance_rate"]["value"], g), g * c)
    rounds = [r for run in timed.every for r in run.rounds]
    n, kept = max(1, len(rounds)), sum(r.num_accepted for r in rounds)
    recompute = sum(run.ms.get("recompute", 0.0) for run in timed.every)
    return metrics.modelled_speedup(kept / n, g * c, recompute / n / step_ms)


def of_row(row: dict[str, Any], timed: Timed, costs: Costs) -> dict[str, Any]:
    """Both formulas beside the measured speed-up of decoding alone. TASKS.md's is for adapted drafts of a fixed number only."""
    measured, found = row["decode_speedup"]["value"], dict[str, float | None](modelled_speedup=None, corrected_speedup=None)
    drafter = Drafter(row["draft"], row["exit_layer"], row["adaptive"])
    spent = costs.all.round_cost(drafter)
    if spent and row["draft"] in ("aligned", "chained") and not row["adaptive"]:
        found["modelled_speedup"] = modelled(row, timed, spent.c, costs.all.step.mean or float("nan"))
    found["corrected_speedup"] = costs.corrected(drafter, timed)
    errors = {f"{name.split('_')[0]}_error": None if value is None else value / measured - 1 for name, value in found.items()}
    return {**found, **errors}
