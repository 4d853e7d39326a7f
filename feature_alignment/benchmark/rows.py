"""The modes of a benchmark, one row each, and what is computed from their timed runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from feature_alignment.benchmark import timing
from feature_alignment.benchmark.results import TimedRow
from feature_alignment.benchmark.timing import Timed
from feature_alignment.decoding.baseline_drafters import BASELINE_DRAFTERS
from feature_alignment.decoding.generation import Generation
from feature_alignment.decoding.settings import COSINE_RULES, DEFAULT_THRESHOLDS, RuleName
from feature_alignment.measurement.metrics import Counts, Rate
from feature_alignment.models.state import Prompt


@dataclass(frozen=True)
class Mode:
    """One way to draft and to accept.

    Args:
        draft: name of the drafter
        accept: name of the acceptance rule
        num_draft_tokens: draft length; the largest one if `adaptive`
        adaptive: whether the draft length is adaptive
        overlap: whether EventGPT reads its prompt while the target reads its own
        threshold: of a lossy rule
        exit_layer: layer of EventGPT that an adapter of its own reads
    """

    draft: str
    accept: RuleName
    num_draft_tokens: int
    adaptive: bool = False
    overlap: bool = False
    threshold: float | None = None
    exit_layer: int | None = None

    @property
    def drafts_per_round(self) -> str:
        """The draft length in words."""
        return f"{'up to ' * self.adaptive}{self.num_draft_tokens}{', overlapped' * self.overlap}"

    @property
    def uses_run_adapters(self) -> bool:
        """Whether EventGPT drafts, with the run's own adapters."""
        return self.draft not in BASELINE_DRAFTERS and self.exit_layer is None


def modes(
    gammas: Sequence[int], max_draft_tokens: int, thresholds: Sequence[float], adapters: Sequence[str], layers: Sequence[int] = ()
) -> list[Mode]:
    """The modes of a benchmark.

    Draft tokens of the first adapter are measured at every draft length, those of the n-gram table and of the best table at the longer
    ones, and all others at the middle one. Draft tokens of adapters are also measured under the cosine rules, those of the first also
    under the other lossy rules at their default thresholds.

    Args:
        gammas: fixed draft lengths
        max_draft_tokens: largest draft length of the adaptive modes
        thresholds: cosines of the feature and relaxed rules
        adapters: drafters that use an adapter, the best one first
        layers: layers of EventGPT with an adapter of their own
    """
    middle = gammas[len(gammas) // 2]
    adaptive = [Mode(draft, "token", max_draft_tokens, adaptive=True) for draft in (adapters[0], "hybrid", "own")]
    other_rules: tuple[RuleName, ...] = ("typical", "kl")
    return [
        *[Mode(adapters[0], "token", g) for g in gammas],
        *[Mode(draft, "token", g) for draft in ("ngram", "tables") for g in gammas[len(gammas) // 2 :]],
        *adaptive,
        dataclasses.replace(adaptive[0], overlap=True),
        *[Mode(draft, "token", middle) for draft in (*adapters[1:], "own", "template", "lookup", "previous")],
        *[Mode("aligned", "token", middle, exit_layer=k) for k in layers],
        *[Mode(draft, rule, middle, threshold=t) for draft in adapters for rule in COSINE_RULES for t in thresholds],
        *[Mode(adapters[0], rule, middle, threshold=DEFAULT_THRESHOLDS[rule]) for rule in other_rules],
    ]


def attending_modes(gammas: Sequence[int], most: int) -> list[Mode]:
    """The attending adapter at every number of draft tokens, and at most `most` of them where the length adapts."""
    return [*[Mode("attending", "token", g) for g in gammas], Mode("attending", "token", most, adaptive=True)]


def of_drafters(rows: Sequence[Mode], drafters: Sequence[str]) -> list[Mode]:
    """The modes of some drafters and those of the first mode's drafter, which costs and pictures are about; all without `drafters`."""
    wanted = {rows[0].draft, *drafters}
    return [mode for mode in rows if not drafters or mode.draft in wanted or mode.exit_layer is not None]


def timed_row(mode: Mode, runs: Timed, plain: Timed, clips: Sequence[str]) -> TimedRow:
    """The measured part of a row. Every number is a ratio of sums over all prompts and repeats.

    Args:
        mode: the row's mode
        runs: its runs
        plain: runs of plain greedy decoding
        clips: clip of each prompt
    """
    every = runs.every
    num_emitted = sum(len(g.token_ids) - 1 for g in every)
    num_drafted = runs.per_prompt(lambda g: sum(len(r.proposed) for r in g.rounds))
    adapter_ms = runs.per_prompt(lambda g: g.ms.get("read", 0.0) + g.ms.get("adapter", 0.0))
    overhead = Counts(adapter_ms, num_drafted).rate(clips) if adapter_ms.sum() and num_drafted.sum() else None
    return TimedRow(
        **dataclasses.asdict(mode),
        drafts_per_round=mode.drafts_per_round,
        speedup=timing.speedup(plain, runs, clips, timing.total_ms),
        decode_speedup=timing.speedup(plain, runs, clips, timing.decode_ms),
        tokens_per_pass=num_emitted / max(1, sum(g.passes for g in every)),
        acceptance_rate=acceptance_of(runs, clips, mode.accept),
        ms=stages_of(runs),
        adapter_ms_per_draft=None if overhead is None else overhead.value,
        adapter_ms_ci95=None if overhead is None else overhead.ci95,
    )


def layers_of(mode: Mode, taps: Sequence[int]) -> list[int] | str | None:
    """Layers of EventGPT that a drafter reads: "all" for its own head, None for baseline drafters.

    Args:
        mode: the row's mode
        taps: layers that the run's own adapters read
    """
    if mode.draft in BASELINE_DRAFTERS:
        return None
    return "all" if mode.draft == "own" else list(taps) if mode.exit_layer is None else [mode.exit_layer]


def acceptance_of(timed: Timed, clips: Sequence[str], accept: RuleName) -> Rate:
    """Accepted / reached draft tokens over all rounds; `relaxed` reaches every draft token up to the end of the text.

    Args:
        timed: runs of the method
        clips: clip of each prompt
        accept: name of the acceptance rule
    """
    num_accepted, num_reached = [], []
    for runs in timed.generations:
        rounds = [r for g in runs for r in g.rounds]
        num_accepted.append(float(sum(r.num_accepted for r in rounds)))
        counted = [len(r.proposed) if r.num_before_end is None else r.num_before_end for r in rounds]
        reached = counted if accept == "relaxed" else [min(r.num_accepted + 1, n) for r, n in zip(rounds, counted, strict=True)]
        num_reached.append(float(sum(reached)))
    return Counts(np.array(num_accepted), np.array(num_reached)).rate(clips)


def stages_of(timed: Timed) -> dict[str, float]:
    """Stage -> mean milliseconds per prompt."""
    every = timed.every
    return {stage: sum(g.ms.get(stage, 0.0) for g in every) / len(every) for stage in sorted({s for g in every for s in g.ms})}


def answering(decode: Callable[[Prompt], Generation], prompts: Sequence[tuple[Prompt, Prompt]]) -> Callable[[int], Generation]:
    """A function that answers the i-th prompt of the target with `decode`."""
    return lambda i: decode(prompts[i][0])
