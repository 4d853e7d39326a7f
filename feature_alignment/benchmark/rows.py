"""The rows of a benchmark: which ways to draft and to accept are measured, and what is said of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from feature_alignment.benchmark import speed_model, timing
from feature_alignment.benchmark.timing import Timed
from feature_alignment.decoding.acceptance import Rule
from feature_alignment.decoding.baseline_drafters import BASELINE_DRAFTERS
from feature_alignment.decoding.generation import Generation
from feature_alignment.measurement.metrics import Counts


@dataclass(frozen=True)
class Mode:
    """One row of the benchmark: who drafts, how much, what is kept. threshold: of the cosine rules; exit_layer: of EventGPT, where an
    adapter of its own reads that layer alone."""

    draft: str
    accept: Rule
    num_draft_tokens: int
    adaptive: bool = False
    overlap: bool = False
    threshold: float | None = None
    exit_layer: int | None = None

    @property
    def drafts_per_round(self) -> str:
        """As a reader is told it."""
        return f"{'up to ' * self.adaptive}{self.num_draft_tokens}{', overlapped' * self.overlap}"


def modes(gammas: Sequence[int], most: int, thresholds: Sequence[float], adapters: Sequence[str], layers: Sequence[int] = ()) -> list[Mode]:
    """Adapted drafts (the first of `adapters` at every length) under all rules; the others losslessly, for comparison: the n-gram
    table at the longer lengths too, because a draft costs it nothing. At most `most` drafts where the length adapts.

    layers: of EventGPT with adapters of their own, aligned drafts from each
    """
    middle = gammas[len(gammas) // 2]
    adaptive = [Mode(draft, "token", most, adaptive=True) for draft in (adapters[0], "hybrid", "own")]
    rules: tuple[Rule, ...] = ("feature", "relaxed")
    return [
        *[Mode(adapters[0], "token", g) for g in gammas],
        *[Mode("ngram", "token", g) for g in gammas[len(gammas) // 2 :]],
        *adaptive,
        dataclasses.replace(adaptive[0], overlap=True),
        *[Mode(draft, "token", middle) for draft in (*adapters[1:], "own", "template", "lookup", "previous")],
        *[Mode("aligned", "token", middle, exit_layer=k) for k in layers],
        *[Mode(draft, rule, middle, threshold=t) for draft in adapters for rule in rules for t in thresholds],
    ]


def attending_modes(gammas: Sequence[int], most: int) -> list[Mode]:
    """The attending adapter at every number of draft tokens, and at most `most` of them where the length adapts."""
    return [*[Mode("attending", "token", g) for g in gammas], Mode("attending", "token", most, adaptive=True)]


def row_name(r: dict[str, Any]) -> str:
    layer = "" if r.get("exit_layer") is None else f" at layer {r['exit_layer']}"
    rule = r["accept"] if r["threshold"] is None else f"{r['accept']} > {r['threshold']:g}"
    return f"{r['draft']}{layer} + {rule}, {r['drafts_per_round']}"


def speeds(mode: Any, runs: Timed, plain: Timed, clips: Sequence[str], costs: speed_model.Costs) -> dict[str, Any]:
    """What a row says of time, measured and modelled; every figure is a ratio of sums over all repeats.

    mode: a dataclass with the names of `Mode`
    """
    every = runs.every
    emitted = sum(len(g.token_ids) - 1 for g in every)
    row: dict[str, Any] = {
        **dataclasses.asdict(mode),
        "drafts_per_round": mode.drafts_per_round,
        "speedup": timing.speedup(plain, runs, clips, lambda g: g.total_ms),
        "decode_speedup": timing.speedup(plain, runs, clips, lambda g: g.decode_ms),
        "tokens_per_pass": emitted / max(1, sum(g.passes for g in every)),
        "acceptance_rate": acceptance_of(runs, clips, mode.accept),
        "ms": stages_of(runs),
    }
    drafted, spent = sum(len(r.proposed) for g in every for r in g.rounds), sum(g.ms.get("adapter", 0.0) for g in every)
    row["adapter_ms_per_draft"] = spent / drafted if spent else None
    return row | speed_model.of_row(row, runs, costs)


def layers_of(mode: Mode, taps: Sequence[int]) -> list[int] | str | None:
    """EventGPT's layers behind a row's drafts; taps: those that the run's own adapters read"""
    if mode.draft in BASELINE_DRAFTERS:
        return None
    return "all" if mode.draft == "own" else list(taps) if mode.exit_layer is None else [mode.exit_layer]


def acceptance_of(timed: Timed, clips: Sequence[str], accept: Rule) -> dict[str, Any]:
    """Kept / reached drafts over all rounds; under `relaxed` every draft is reached."""
    kept, reached = [], []
    for runs in timed.generations:
        rounds = [r for g in runs for r in g.rounds]
        kept.append(float(sum(r.num_accepted for r in rounds)))
        reached.append(float(sum(len(r.proposed) if accept == "relaxed" else min(r.num_accepted + 1, len(r.proposed)) for r in rounds)))
    return Counts(np.array(kept), np.array(reached)).rate(clips)


def stages_of(timed: Timed) -> dict[str, float]:
    """Mean milliseconds of a prompt in each stage, over all runs."""
    every = timed.every
    return {stage: sum(g.ms.get(stage, 0.0) for g in every) / len(every) for stage in sorted({s for g in every for s in g.ms})}


def answering(way: Callable[..., Generation], prompts: Sequence[tuple[Any, ...]]) -> Callable[[int], Generation]:
    """The i-th prompt answered by the target in some way."""
    return lambda i: way(prompts[i][0])
