"""The steps of a benchmark: costs of single parts, timed runs of all methods, then rows, baselines and the fastest lossless row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.benchmark import fidelity, speed_model, targets, timing
from feature_alignment.benchmark.chain_loop import ChainLoop
from feature_alignment.benchmark.costs import Bound, Cost, DecodingCosts, PartCosts
from feature_alignment.benchmark.profile import ProfileCosts, SpeculationProfile, profile_of
from feature_alignment.benchmark.results import BenchmarkRow, FastestLossless, Fidelity, GenerateBaseline, Mismatch, PlainBaseline, Speedup
from feature_alignment.benchmark.rows import Mode, answering, layers_of, timed_row
from feature_alignment.benchmark.timing import Timed, decode_ms, total_ms
from feature_alignment.cli.console import progress
from feature_alignment.decoding.draft_length import DraftLengthController
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.generation import PREFILL_STAGES, Generation
from feature_alignment.decoding.proposers import Proposer
from feature_alignment.decoding.settings import COSINE_RULES
from feature_alignment.decoding.sources import Sources
from feature_alignment.inputs.samples import Sample
from feature_alignment.measurement.lexicon import Lexicon
from feature_alignment.models.pair import Pair
from feature_alignment.models.state import Prompt


@dataclass(frozen=True)
class Setup:
    """The models, drafters and prompts of one benchmark.

    Args:
        pair: target and EventGPT
        sources: opens drafters by name
        chained: the chained adapter; None if none is trained
        exits: layer of EventGPT -> the drafter that reads this layer alone
        proposers: name -> drafter, for every `Mode.draft`
        modes: one for each row
        samples: one for each prompt
        prompts: (target prompt, drafter prompt) of every sample
        lexicon: which words state which facts, if there is such a file
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
        """The clip of every prompt; intervals resample clips."""
        return [s.sequence for s in self.samples]

    @property
    def target_prompts(self) -> list[Prompt]:
        """The target's prompts."""
        return [prompt for prompt, _ in self.prompts]


@dataclass(frozen=True)
class Measurements:
    """Everything that the rows and baselines of a benchmark are computed from.

    Args:
        setup: models, drafters and prompts
        timed: "plain", name of a `generate` baseline, or mode -> its runs
        costs: sums over the rounds of all runs
        part_cost: costs of single parts
        decoding_cost: costs during decoding
        log_likelihood: (index of a prompt, token ids) -> log-probability under the target
    """

    setup: Setup
    timed: Mapping[str | Mode, Timed]
    costs: speed_model.Costs
    part_cost: PartCosts
    decoding_cost: DecodingCosts
    log_likelihood: fidelity.LogLikelihood

    @classmethod
    def of(cls, setup: Setup, timed: Mapping[str | Mode, Timed], part_cost: PartCosts, chain: ChainLoop) -> Measurements:
        """Combine timed runs with the costs of single parts.

        Args:
            setup: models, drafters and prompts
            timed: result of `take_turns`
            part_cost: result of `part_costs`
            chain: what `take_turns` collected
        """
        costs = speed_model.Costs.of([(m, timed[m]) for m in setup.modes], timed["plain"], part_cost.loop.v)
        decoding_cost = chain.added_to(costs.report(part_cost.loop, setup.clips))
        log_likelihood = fidelity.log_likelihoods(setup.pair.target, setup.target_prompts)
        return cls(setup, timed, costs, part_cost, decoding_cost, log_likelihood)

    @property
    def plain(self) -> Timed:
        """The runs of plain greedy decoding."""
        return self.timed["plain"]

    def fidelity(self, runs: Timed) -> Fidelity:
        """Comparison of a method's texts with those of plain greedy decoding."""
        return fidelity.fidelity(self.setup.pair.target, self.log_likelihood, self.setup.samples, runs, self.plain, self.setup.lexicon)

    def mismatches(self, runs: Timed) -> list[Mismatch]:
        """The first position at which each text differs from plain greedy decoding."""
        return fidelity.mismatches(self.setup.pair.target, self.setup.target_prompts, self.setup.samples, runs, self.plain)

    def speedup(self, baseline: Timed, runs: Timed) -> Speedup:
        """End-to-end speed-up of `runs` over `baseline`."""
        return timing.speedup(baseline, runs, self.setup.clips, total_ms)


@dataclass(frozen=True)
class FastestMode:
    """The fastest lossless mode.

    Args:
        mode: the mode that is fastest on all clips
        runs: for each prompt, the runs of the mode chosen on the other half of the clips
        report: the part of benchmark.json
    """

    mode: Mode
    runs: Timed
    report: FastestLossless


def part_costs(setup: Setup) -> PartCosts:
    """Costs of single parts on the first prompt, measured outside decoding."""
    pair, sources = setup.pair, setup.sources
    return timing.part_costs(pair.target, pair.draft, sources.full_draft, sources.adapter, setup.chained, setup.prompts[0], setup.exits)


def speculative(setup: Setup, mode: Mode, max_new_tokens: int) -> Callable[[int], Generation]:
    """A function that decodes the i-th prompt in one mode; an adaptive draft length keeps its state from prompt to prompt."""
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
            cosines=mode.accept in COSINE_RULES,
        )

    return answer


def take_turns(
    setup: Setup, ways: Mapping[str, Callable[[Prompt], Generation]], max_new_tokens: int, repeats: int, warmup: int, chain: ChainLoop
) -> dict[str | Mode, Timed]:
    """Time every baseline and every mode on every prompt, in turns, after two warm-ups.

    Args:
        setup: models, drafters and prompts
        ways: name of a baseline -> function that answers a prompt; includes "plain"
        max_new_tokens: longest answer, EOS included
        repeats: timed runs of every method on every prompt
        warmup: number of prompts in each warm-up
        chain: collects the chained drafts of the timed runs

    Returns:
        name of a baseline or mode -> its runs
    """
    methods: dict[str | Mode, Callable[[int], Generation]] = {name: answering(way, setup.prompts) for name, way in ways.items()}
    for mode in setup.modes:
        methods[mode] = speculative(setup, mode, max_new_tokens)
        if mode.draft == "chained" and not mode.adaptive:
            methods[mode] = chain.after(methods[mode], setup.proposers["chained"], mode.num_draft_tokens, max_new_tokens)
    for _ in range(2):  # The second warm-up runs on warm caches.
        timing.run_in_turns(methods, min(warmup, len(setup.samples)), 1, iter)
    chain.rounds.clear()
    # During warm-up this drafter has seen answers to the prompts that are timed next, so a new one replaces it.
    setup.proposers["previous"] = setup.sources.open("previous")
    bar = functools.partial(progress, desc="benchmark", unit="prompt")
    return timing.run_in_turns(methods, len(setup.samples), repeats, bar)


def mode_rows(found: Measurements) -> list[BenchmarkRow]:
    """The rows of benchmark.json, one for each mode."""
    setup, rows = found.setup, []
    for mode in setup.modes:
        runs = found.timed[mode]
        row = timed_row(mode, runs, found.plain, setup.clips)
        compared = found.fidelity(runs)
        rows.append(
            BenchmarkRow(
                **vars(row),
                **vars(speed_model.prediction_of(row, runs, found.costs)),
                draft_layers=layers_of(mode, setup.pair.draft.taps),
                fidelity=compared,
                exact_match=compared.exact_match.value,
                mismatches=found.mismatches(runs) if mode.accept == "token" else None,
            )
        )
    return rows


def cost_of(found: Measurements, rows: Sequence[BenchmarkRow]) -> Cost:
    """All costs, with the best speed-up that they allow for aligned and chained drafters at a fixed draft length.

    Args:
        found: measured costs
        rows: result of `mode_rows`
    """
    bound: dict[str, Bound] = {}
    for mode, row in zip(found.setup.modes, rows, strict=True):
        round_cost = found.costs.all.round_cost(speed_model.drafter_of(mode))
        is_fixed = mode.draft in ("aligned", "chained") and mode.accept == "token" and not mode.adaptive and mode.exit_layer is None
        if round_cost and is_fixed:
            bound[mode.draft] = speed_model.bound(row.acceptance_rate.value, round_cost, found.decoding_cost.v)
    return Cost.of(found.part_cost, found.decoding_cost, bound)


def profiles(found: Measurements, cost: Cost) -> list[SpeculationProfile]:
    """The profile of every drafter with a lossless row of a fixed draft length, measured on its longest one.

    Args:
        found: timed runs
        cost: benchmark.json's `cost`
    """
    fixed = [m for m in found.setup.modes if m.accept == "token" and not m.adaptive and m.exit_layer is None]
    longest = {m.draft: m for m in sorted(fixed, key=lambda m: m.num_draft_tokens)}
    adaptive = {m.draft: m for m in found.setup.modes if m.adaptive and not m.overlap}
    profiles = []
    for draft, mode in longest.items():
        spent = found.costs.all.round_cost(speed_model.drafter_of(mode))
        costs = ProfileCosts(spent.c if spent else None, spent.r if spent else 0.0, dict(cost.v))
        runs = found.timed[adaptive[draft]] if draft in adaptive else None
        profiles.append(profile_of(draft, mode.num_draft_tokens, found.timed[mode], found.setup.clips, costs, runs))
    return profiles


def fastest_lossless(found: Measurements, rows: Sequence[BenchmarkRow]) -> FastestMode:
    """Choose the fastest lossless row end to end; its speed-up is measured on clips that did not choose it.

    Args:
        found: timed runs
        rows: result of `mode_rows`
    """
    modes, clips = found.setup.modes, found.setup.clips
    candidates = [m for m in modes if targets.is_candidate(m)]
    fastest = timing.fastest([found.timed[m] for m in candidates], found.plain, clips, total_ms)
    decode_speedup = timing.speedup(found.plain, fastest.runs, clips, decode_ms)
    candidate_rows = [rows[modes.index(m)] for m in candidates]
    report = targets.report_fastest(fastest, candidate_rows, found.speedup(found.plain, fastest.runs), decode_speedup)
    return FastestMode(candidates[fastest.best], fastest.runs, report)


def plain_baseline(found: Measurements, fastest: FastestMode) -> PlainBaseline:
    """Plain greedy decoding, the first of benchmark.json's baselines."""
    plain = found.plain
    return PlainBaseline(
        name="plain greedy",
        prompts=len(found.setup.samples),
        tokens=sum(len(t) for t in plain.texts),
        total_ms=float(plain.per_prompt(total_ms).sum()),
        prefill_ms=float(plain.per_prompt(lambda g: sum(g.ms.get(s, 0.0) for s in PREFILL_STAGES)).sum()),
        decode_ms=float(plain.per_prompt(decode_ms).sum()),
        best_over_it=fastest.report.speedup,
        fidelity=found.fidelity(plain),
    )


def generate_baseline(found: Measurements, fastest: FastestMode, name: str) -> GenerateBaseline:
    """One way of transformers' `generate`.

    Args:
        found: timed runs
        fastest: result of `fastest_lossless`
        name: key of the baseline in `found.timed`
    """
    runs, plain = found.timed[name], found.plain
    return GenerateBaseline(
        name=name,
        total_ms=float(runs.per_prompt(total_ms).sum()),
        speedup=found.speedup(plain, runs),
        best_over_it=found.speedup(runs, fastest.runs),
        exact_match=float(np.mean([a == b for a, b in zip(runs.texts, plain.texts, strict=True)])),
        mismatches=found.mismatches(runs),
    )
