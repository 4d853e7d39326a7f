"""The steps of a benchmark: part costs, timed turns of all methods, then rows, baselines and the fastest lossless row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.benchmark import speed_model, targets, timing
from feature_alignment.benchmark.rows import Mode, answering, layers_of, speeds
from feature_alignment.benchmark.timing import Timed
from feature_alignment.cli.console import progress
from feature_alignment.decoding.draft_length import DraftLengthController
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.generation import PREFILL_STAGES, Generation
from feature_alignment.decoding.proposers import Proposer
from feature_alignment.decoding.sources import Sources
from feature_alignment.inputs.samples import Sample
from feature_alignment.measurement.lexicon import Lexicon
from feature_alignment.models.pair import Pair
from feature_alignment.models.state import Prompt


@dataclass(frozen=True)
class Setup:
    """The models, drafters and prompts of one benchmark.

    Args:
        pair: target and drafter
        sources: the drafters that the run's adapters and token tables make
        chained: the chained adapter; None where none is trained
        exits: layer of EventGPT -> the drafter that reads this layer alone
        proposers: name -> drafter, for every `Mode.draft`
        modes: one for each row
        samples: one for each prompt
        prompts: (target prompt, drafter prompt) of every sample
        lexicon: which words state which facts, where there is a file of them
    """

    pair: Pair
    sources: Sources
    chained: ChainedAdapter | None
    exits: dict[int, Proposer]
    proposers: dict[str, Proposer]
    modes: list[Mode]
    samples: list[Sample]
    prompts: list[tuple[Prompt, Prompt]]
    lexicon: Lexicon | None

    @property
    def clips(self) -> list[str]:
        """The clip of every prompt, the unit that the intervals resample."""
        return [s.sequence for s in self.samples]

    @property
    def target_prompts(self) -> list[Prompt]:
        return [prompt for prompt, _ in self.prompts]


@dataclass(frozen=True)
class Measurements:
    """Everything that the rows and baselines of a benchmark are computed from.

    Args:
        setup: what was measured
        timed: "plain", name of a `generate` baseline or mode -> its runs
        costs: costs of the stages of decoding
        cost: benchmark.json's `cost` without the bounds
        log_likelihood: (index of a prompt, token ids) -> log-probability under the target
    """

    setup: Setup
    timed: Mapping[Any, Timed]
    costs: speed_model.Costs
    cost: dict[str, Any]
    log_likelihood: Callable[[int, tuple[int, ...]], float]

    @classmethod
    def of(cls, setup: Setup, timed: Mapping[Any, Timed], part_cost: dict[str, Any]) -> Measurements:
        """Combine the timed runs with the costs of single parts.

        Args:
            setup: what was measured
            timed: result of `take_turns`
            part_cost: result of `part_costs`
        """
        costs = speed_model.Costs.of([(m, timed[m]) for m in setup.modes], timed["plain"], part_cost["loop"]["v"])
        cost = part_cost | costs.report(part_cost["loop"], setup.clips)
        return cls(setup, timed, costs, cost, timing.log_likelihoods(setup.pair.target, setup.target_prompts))

    @property
    def plain(self) -> Timed:
        """The runs of plain greedy decoding."""
        return self.timed["plain"]

    def fidelity(self, runs: Timed) -> dict[str, Any]:
        """How the texts of a method differ from those of plain greedy decoding."""
        return timing.fidelity(self.setup.pair.target, self.log_likelihood, self.setup.samples, runs, self.plain, self.setup.lexicon)

    def mismatches(self, runs: Timed) -> list[dict[str, Any]]:
        """The first position at which each text differs from plain greedy decoding."""
        return timing.mismatches(self.setup.pair.target, self.setup.target_prompts, self.setup.samples, runs, self.plain)

    def speedup(self, baseline: Timed, runs: Timed) -> dict[str, Any]:
        """End-to-end speed-up of `runs` over `baseline`."""
        return timing.speedup(baseline, runs, self.setup.clips, total_ms)


@dataclass(frozen=True)
class FastestLossless:
    """The fastest lossless row.

    Args:
        mode: the mode that is fastest on all clips
        runs: of each prompt the runs of the mode chosen on the other half of the clips
        report: benchmark.json's `fastest_lossless`
    """

    mode: Mode
    runs: Timed
    report: dict[str, Any]


def total_ms(g: Generation) -> float:
    """Milliseconds end to end: vision, prefill and decoding."""
    return g.total_ms


def decode_ms(g: Generation) -> float:
    """Milliseconds of decoding alone."""
    return g.decode_ms


def part_costs(setup: Setup) -> dict[str, Any]:
    """Costs of single parts on the first prompt, measured outside decoding."""
    target, prompts = setup.pair.target, setup.prompts[0]
    cost = timing.costs(target, setup.pair.draft, setup.sources.adapter, setup.chained, *prompts)
    return cost | timing.machine_costs(target, setup.sources.full_draft, cost, *prompts, layers=setup.exits)


def speculative(setup: Setup, mode: Mode, max_new_tokens: int) -> Callable[[int], Generation]:
    """Speculative decoding of the i-th prompt in one mode; an adaptive draft length keeps its state from prompt to prompt."""
    controller = DraftLengthController(setup.sources.known_acceptance(mode.draft)) if mode.adaptive else None

    def answer(i: int) -> Generation:
        prompt, draft_prompt = setup.prompts[i]
        return speculate(
            setup.pair.target,
            setup.proposers[mode.draft] if mode.exit_layer is None else setup.exits[mode.exit_layer],
            prompt,
            draft_prompt,
            accept=mode.accept,
            threshold=mode.threshold or 0.0,
            num_draft_tokens=mode.num_draft_tokens,
            max_new_tokens=max_new_tokens,
            controller=controller,
            overlap=mode.overlap,
        )

    return answer


def take_turns(
    setup: Setup, ways: Mapping[str, Callable[[Prompt], Generation]], max_new_tokens: int, repeats: int, warmup: int
) -> dict[Any, Timed]:
    """Time every baseline and every mode on every prompt, in turns, after two warm-ups.

    Args:
        setup: models, drafters and prompts
        ways: baseline name -> function that answers a prompt; includes "plain"
        max_new_tokens: longest answer, EOS included
        repeats: timed runs of every method on every prompt
        warmup: number of prompts in each warm-up

    Returns:
        baseline name or mode -> its runs
    """
    methods: dict[Any, Callable[[int], Generation]] = {name: answering(way, setup.prompts) for name, way in ways.items()}
    methods |= {m: speculative(setup, m, max_new_tokens) for m in setup.modes}
    for _ in range(2):  # The second warm-up runs on warm caches.
        timing.run_in_turns(methods, min(warmup, len(setup.samples)), 1, iter)
    # The warm-up has shown this drafter answers to prompts that are timed next, so a new one replaces it.
    setup.proposers["previous"] = setup.sources.open("previous")
    bar = functools.partial(progress, desc="benchmark", unit="prompt")
    return timing.run_in_turns(methods, len(setup.samples), repeats, bar)


def mode_rows(found: Measurements) -> list[dict[str, Any]]:
    """benchmark.json's `rows`, one for each mode."""
    setup, rows = found.setup, []
    for mode in setup.modes:
        runs = found.timed[mode]
        row: dict[str, Any] = speeds(mode, runs, found.plain, setup.clips, found.costs)
        row["draft_layers"] = layers_of(mode, setup.pair.draft.taps)
        row["fidelity"] = found.fidelity(runs)
        row["exact_match"] = row["fidelity"]["exact_match"]["value"]
        if mode.accept == "token":
            row["mismatches"] = found.mismatches(runs)
        rows.append(row)
    return rows


def bounds(found: Measurements, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The best speed-up that the measured costs allow, for aligned and chained drafters with a fixed draft length.

    Args:
        found: measured costs
        rows: result of `mode_rows`
    """
    best = {}
    for mode, row in zip(found.setup.modes, rows, strict=True):
        round_cost = found.costs.all.round_cost(speed_model.drafter_of(mode))
        is_fixed = mode.draft in ("aligned", "chained") and mode.accept == "token" and not mode.adaptive and mode.exit_layer is None
        if round_cost and is_fixed:
            best[mode.draft] = speed_model.bound(row["acceptance_rate"]["value"], round_cost, found.cost)
    return best


def fastest_lossless(found: Measurements, rows: Sequence[dict[str, Any]]) -> FastestLossless:
    """Choose the fastest lossless row end to end; its speed-up is measured on clips that did not choose it.

    Args:
        found: timed runs
        rows: result of `mode_rows`
    """
    modes, clips = found.setup.modes, found.setup.clips
    candidates = [m for m in modes if targets.lossless(m)]
    fastest = timing.fastest([found.timed[m] for m in candidates], found.plain, clips, total_ms)
    speedups = {
        "speedup": found.speedup(found.plain, fastest.runs),
        "decode_speedup": timing.speedup(found.plain, fastest.runs, clips, decode_ms),
    }
    report = targets.report_fastest(fastest, [rows[modes.index(m)] for m in candidates], speedups)
    return FastestLossless(candidates[fastest.best], fastest.runs, report)


def plain_report(found: Measurements, fastest: FastestLossless) -> dict[str, Any]:
    """Plain greedy decoding, the first of benchmark.json's `baselines`."""
    plain = found.plain
    return {
        "name": "plain greedy",
        "prompts": len(found.setup.samples),
        "tokens": sum(len(t) for t in plain.texts),
        "total_ms": float(plain.per_prompt(total_ms).sum()),
        "prefill_ms": float(plain.per_prompt(lambda g: sum(g.ms.get(s, 0.0) for s in PREFILL_STAGES)).sum()),
        "decode_ms": float(plain.per_prompt(decode_ms).sum()),
        "best_over_it": fastest.report["speedup"],
        "fidelity": found.fidelity(plain),
    }


def generate_report(found: Measurements, fastest: FastestLossless, name: str) -> dict[str, Any]:
    """One of transformers' `generate` baselines.

    Args:
        found: timed runs
        fastest: result of `fastest_lossless`
        name: key of the baseline in `found.timed`
    """
    runs, plain = found.timed[name], found.plain
    return {
        "name": name,
        "total_ms": float(runs.per_prompt(total_ms).sum()),
        "speedup": found.speedup(plain, runs),
        "best_over_it": found.speedup(runs, fastest.runs),
        "exact_match": float(np.mean([a == b for a, b in zip(runs.texts, plain.texts, strict=True)])),
        "mismatches": found.mismatches(runs),
    }
