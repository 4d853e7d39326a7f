"""Wall clock at a stated acceptance: what speculative decoding would gain at a geometry whose trained weights are not available.

Each draft token is accepted at random with a given probability, whatever it says. Everything else runs as in decoding: both prefills,
drafting, verification and rollback. The texts are noise; the milliseconds are real. None of these numbers is a measured acceptance, a
measured cosine or a target that is met, and every output says that its acceptance was planted.

A speculation_profile.json replays the marginal acceptance of each draft position that was measured elsewhere. Draft tokens that were not
proposed there, because a text ended, count as rejected, so at the profile's own draft length the mean acceptance length is reproduced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from feature_alignment.benchmark import speed_model, timing
from feature_alignment.benchmark.chain_loop import ChainLoop
from feature_alignment.benchmark.costs import Cost
from feature_alignment.benchmark.profile import SpeculationProfile
from feature_alignment.benchmark.results import PlainBaseline, PlantedBest, PlantedReport, PlantedRow
from feature_alignment.benchmark.rows import Mode, answering, timed_row
from feature_alignment.benchmark.timing import Timed, decode_ms, total_ms
from feature_alignment.cli.advice import command_for
from feature_alignment.cli.config import Common, StepsSetting
from feature_alignment.cli.console import UserError, log, progress
from feature_alignment.decoding.acceptance import AcceptanceFunction
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.generation import Generation
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.sources import Sources
from feature_alignment.inputs.samples import Sample
from feature_alignment.measurement.metrics import Counts, Rate
from feature_alignment.measurement.records import Meta
from feature_alignment.models import fixed
from feature_alignment.models.pair import load_pair
from feature_alignment.storage.files import read_hashed_json

DRAFTERS = ("chained", "attending", "aligned")
Acceptance = float | tuple[float, ...]  # of each draft token if all before it are accepted; a tuple: marginal, by draft position
Planted = tuple[Mode, Acceptance]


@dataclass(frozen=True)
class PlantedSettings:
    """What is measured.

    Args:
        steps: how models step
        gammas: draft lengths
        rates: planted acceptances; of a profile, drafter -> marginal acceptance by draft position
        max_new_tokens: length of every answer
        repeats: timed runs of every method on every prompt
        warmup: number of prompts in each warm-up
    """

    steps: StepsSetting
    gammas: Sequence[int]
    rates: Sequence[float | Mapping[str, tuple[float, ...]]]
    max_new_tokens: int
    repeats: int
    warmup: int

    def planted(self) -> list[Planted]:
        """Every drafter at every draft length and planted acceptance; of a profile only the draft lengths that it has rates for.

        Raises:
            UserError: no draft length is left
        """
        found: list[Planted] = []
        for draft in DRAFTERS:
            for g in self.gammas:
                for rate in self.rates:
                    if not isinstance(rate, Mapping):
                        found.append((Mode(draft, "token", g), rate))
                    elif g <= len(rate.get(draft, ())):
                        found.append((Mode(draft, "token", g), rate[draft]))
                    else:
                        log.info("planted  %s at draft length %d is left out: the profile has no such rates", draft, g)
        if not found:
            longest = max(len(r) for rate in self.rates if isinstance(rate, Mapping) for r in rate.values())
            raise UserError(
                f"--num_draft_tokens {' '.join(map(str, self.gammas))}: the profile has rates for {longest} draft tokens. "
                f"Pass --num_draft_tokens {longest}."
            )
        return found


def read_profile(path: Path) -> dict[str, tuple[float, ...]]:
    """Drafter -> marginal acceptance by draft position, from a speculation_profile.json.

    Raises:
        UserError: the file is missing, altered or of another kind, or has no profile of a drafter that planted runs can use
    """
    command = command_for("benchmark_feature_sd")
    content = read_hashed_json(path, command)
    try:
        profiles = [SpeculationProfile.from_json(profile) for profile in content["profiles"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a speculation_profile.json ({error}). A benchmark writes one:\n  {command}") from None
    found = {p.draft: tuple(rate.value for rate in p.marginal_acceptance) for p in profiles if p.draft in DRAFTERS and p.num_drafts}
    if not found:
        names = ", ".join(p.draft for p in profiles) or "no drafter"
        raise UserError(f"{path} has profiles of {names}; planted runs draft as {', '.join(DRAFTERS)}.")
    return found


def random_acceptance(rate: Acceptance, seed: int, device: torch.device) -> AcceptanceFunction:
    """An acceptance rule that accepts draft tokens at random, whatever they say."""
    generator = torch.Generator(device).manual_seed(seed)
    conditional = rate if isinstance(rate, float | int) else torch.tensor(conditional_acceptance(rate), device=device)

    def rule(draft_ids: Tensor, target_ids: Tensor, cosine: Tensor | None, threshold: float) -> Tensor:
        chance = conditional[: len(draft_ids)] if isinstance(conditional, Tensor) else conditional
        return torch.rand(len(draft_ids), generator=generator, device=device) < chance

    return rule


def conditional_acceptance(marginal: Sequence[float]) -> list[float]:
    """Acceptance of each position if all before it were accepted, which makes these marginal acceptances."""
    return [value / before if before else 0.0 for before, value in zip((1.0, *marginal), marginal, strict=False)]


def implied_length(rate: Acceptance, num_draft_tokens: int) -> float:
    """Tokens per round that a planted acceptance implies: 1 + the sum of the marginal acceptances."""
    positions = range(1, num_draft_tokens + 1)
    return 1 + sum(rate**i if isinstance(rate, float | int) else rate[i - 1] for i in positions)


def mean_acceptance_length(runs: Timed, num_draft_tokens: int, clips: Sequence[str]) -> Rate:
    """Tokens per round of the rounds with room for all draft tokens; the last round of a text may have less.

    Args:
        runs: of one mode
        num_draft_tokens: its draft length
        clips: clip of each prompt
    """
    rounds = [[r for g in generations for r in g.rounds if len(r.proposed) == num_draft_tokens] for generations in runs.generations]
    tokens = [float(sum(1 + r.num_accepted for r in some)) for some in rounds]
    return Counts(np.array(tokens), np.array([float(len(some)) for some in rounds])).rate(clips)


@torch.inference_mode()
def measure(cfg: Common, settings: PlantedSettings, samples: Sequence[Sample], meta: Meta) -> PlantedReport:
    """Time every drafter at every draft length and planted acceptance, in turns with plain greedy decoding.

    Args:
        cfg: checkpoints and folders; adapters that are not trained are initialized randomly
        settings: what is measured
        samples: one for each prompt
        meta: provenance
    """
    planted = settings.planted()
    pair = load_pair(cfg)
    target = pair.target
    pair.use_steps(settings.steps)
    target.head_weight[sorted(target.eos_ids)] = 0  # No text ends early: all are `max_new_tokens` long.
    pair.choose_linear()  # After the head was changed: packed weights are a copy.
    sources = Sources(pair, cfg, untrained=True)
    prompts = [(target.prepare(s), pair.draft.prepare(s)) for s in samples]
    proposers = {name: sources.open(name) for name in DRAFTERS}
    parts = timing.part_costs(target, pair.draft, sources.full_draft, sources.adapter, sources.chained_adapter, prompts[0])
    on_gpu = target.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()  # Without the memory of the bandwidth measurement.

    def speculative(mode: Mode, rate: Acceptance) -> Callable[[int], Generation]:
        def answer(i: int) -> Generation:
            rule = random_acceptance(rate, cfg.seed + i, target.device)  # The same draws in all repeats and methods of a prompt.
            return speculate(
                target,
                proposers[mode.draft],
                *prompts[i],
                accept=rule,
                num_draft_tokens=mode.num_draft_tokens,
                max_new_tokens=settings.max_new_tokens,
            )

        return answer

    chain = ChainLoop()
    methods: dict[str | Planted, Callable[[int], Generation]] = {
        (mode, rate): chain.after(speculative(mode, rate), proposers[mode.draft], mode.num_draft_tokens, settings.max_new_tokens)
        for mode, rate in planted
    }
    methods["plain"] = answering(lambda prompt: greedy(target, prompt, settings.max_new_tokens), prompts)
    for _ in range(2):
        timing.run_in_turns(methods, min(settings.warmup, len(samples)), 1, iter)
    chain.rounds.clear()
    timed = timing.run_in_turns(methods, len(samples), settings.repeats, lambda x: progress(x, desc="planted", unit="prompt"))
    clips, plain = [s.sequence for s in samples], timed["plain"]
    costs = speed_model.Costs.of([(mode, timed[mode, rate]) for mode, rate in planted], plain, parts.loop.v)
    baseline = PlainBaseline(
        name="plain greedy",
        prompts=len(samples),
        tokens=sum(map(len, plain.texts)),
        total_ms=float(plain.per_prompt(total_ms).sum()),
        decode_ms=float(plain.per_prompt(decode_ms).sum()),
    )
    facts = {
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "eager_fallbacks": fixed.eager_fallbacks,
        "linear": {"target": target.linear.to_json(), "draft": pair.draft.linear.to_json()},
    }
    return PlantedReport(
        meta={**meta, **facts},
        planted=True,
        baselines=[baseline],
        rows=[planted_row(key, timed[key], plain, clips, costs, pair.draft.taps) for key in planted],
        cost=Cost.of(parts, chain.added_to(costs.report(parts.loop, clips))),
        best=best_lengths(planted, timed, clips),
    )


def planted_row(key: Planted, runs: Timed, plain: Timed, clips: Sequence[str], costs: speed_model.Costs, taps: Sequence[int]) -> PlantedRow:
    """One row of planted.json.

    Args:
        key: mode and planted acceptance
        runs: its runs
        plain: runs of plain greedy decoding
        clips: clip of each prompt
        costs: sums over the rounds of all runs
        taps: layers of EventGPT that the adapters read
    """
    mode, rate = key
    row = timed_row(mode, runs, plain, clips)
    predicted = speed_model.prediction_of(row, runs, costs)
    return PlantedRow(
        **vars(replace(row, accept="planted")),
        corrected_speedup=predicted.corrected_speedup,
        corrected_error=predicted.corrected_error,
        planted_acceptance=_as_json(rate),
        draft_layers=list(taps),
        planted_length=implied_length(rate, mode.num_draft_tokens),
        mean_acceptance_length=mean_acceptance_length(runs, mode.num_draft_tokens, clips),
    )


def best_lengths(planted: Sequence[Planted], timed: Mapping[str | Planted, Timed], clips: Sequence[str]) -> list[PlantedBest]:
    """For each drafter and acceptance the draft length that is fastest end to end, measured on clips that did not choose it.

    Args:
        planted: modes and planted acceptances
        timed: their runs, and those of "plain"
        clips: clip of each prompt
    """
    groups: dict[tuple[str, Acceptance], list[Planted]] = {}
    for mode, rate in planted:
        groups.setdefault((mode.draft, rate), []).append((mode, rate))
    found, plain = [], timed["plain"]
    for (draft, rate), keys in groups.items():
        best = timing.fastest([timed[key] for key in keys], plain, clips, total_ms)
        found.append(
            PlantedBest(
                draft=draft,
                planted_acceptance=_as_json(rate),
                num_draft_tokens=keys[best.best][0].num_draft_tokens,
                chosen=[keys[i][0].num_draft_tokens for i in best.chosen],
                speedup=timing.speedup(plain, best.runs, clips, total_ms),
                decode_speedup=timing.speedup(plain, best.runs, clips, decode_ms),
            )
        )
    return found


def _as_json(rate: Acceptance) -> float | list[float]:
    return list(rate) if isinstance(rate, tuple) else rate
