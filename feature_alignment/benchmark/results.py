"""The content of benchmark.json and planted.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from feature_alignment.benchmark.costs import Cost
from feature_alignment.measurement.metrics import Rate
from feature_alignment.measurement.records import OMIT_IF_NONE, Meta, Record

# ---- rows


@dataclass(frozen=True)
class Speedup(Rate):
    """A ratio of summed milliseconds, baseline over method.

    Args:
        p50, p05, p95: percentiles of the ratio over prompts
        share_slower: share of prompts on which the method is slower
    """

    p50: float
    p05: float
    p95: float
    share_slower: float


@dataclass(frozen=True)
class Mismatch(Record):
    """A text that differs from plain greedy decoding.

    Args:
        sample: id of the sample
        position: first position at which the texts differ
        top2_gap: difference of the target's two largest logits there; rounding in low precision can only swap a small gap
    """

    sample: str
    position: int
    top2_gap: float


@dataclass(frozen=True)
class AcceptedKinds(Record):
    """Number of accepted draft tokens, by what they say.

    Args:
        kept: accepted draft tokens
        same: the target's own token
        synonym: another word for the same fact
        error: any other word
    """

    kept: int
    same: int
    synonym: int
    error: int


@dataclass(frozen=True)
class Fidelity(Record):
    """Comparison of a method's texts with those of plain greedy decoding.

    Args:
        exact_match: share of identical texts
        token_agreement: same token at the same position, over the longer text
        log_likelihood: of the text under the target, per token
        true_facts_visible, true_facts_hidden: share of stated facts that are true, of slots that events show and hide
        kept_drafts: accepted draft tokens, by what they say
    """

    exact_match: Rate
    token_agreement: Rate
    log_likelihood: Rate
    true_facts_visible: Rate | None = field(default=None, metadata=OMIT_IF_NONE)
    true_facts_hidden: Rate | None = field(default=None, metadata=OMIT_IF_NONE)
    kept_drafts: AcceptedKinds | None = field(default=None, metadata=OMIT_IF_NONE)


@dataclass(frozen=True)
class TimedRow(Record):
    """One way to draft and to accept, with its measured speed.

    Args:
        draft: name of the drafter
        accept: name of the acceptance rule
        num_draft_tokens: draft length; the largest one if `adaptive`
        adaptive: whether the draft length is adaptive
        overlap: whether the next round is drafted during verification
        threshold: of a lossy rule
        exit_layer: layer of EventGPT that an adapter of its own reads
        drafts_per_round: the draft length in words
        speedup: end to end
        decode_speedup: decoding alone
        tokens_per_pass: tokens after the first per pass of the target
        acceptance_rate: accepted / reached draft tokens
        ms: stage -> mean milliseconds per prompt
        adapter_ms_per_draft: milliseconds in the adapter per draft token; None without an adapter
        adapter_ms_ci95: its interval
    """

    draft: str
    accept: str
    num_draft_tokens: int
    adaptive: bool
    overlap: bool
    threshold: float | None
    exit_layer: int | None
    drafts_per_round: str
    speedup: Speedup
    decode_speedup: Speedup
    tokens_per_pass: float
    acceptance_rate: Rate
    ms: dict[str, float]
    adapter_ms_per_draft: float | None
    adapter_ms_ci95: tuple[float, float] | None = field(default=None, metadata=OMIT_IF_NONE, kw_only=True)  # not in earlier results

    @property
    def name(self) -> str:
        """Drafter, rule and draft length, e.g. "chained + token, 5"."""
        rule = rule_name(self.accept, self.threshold)
        return f"{drafter_name(self.draft, self.exit_layer)} + {rule}, {self.drafts_per_round}"


def rule_name(accept: str, threshold: float | None) -> str:
    """Name of an acceptance rule with its threshold, e.g. "feature > 0.9"."""
    return accept if threshold is None else f"{accept} {'<' if accept == 'kl' else '>'} {threshold:g}"


def drafter_name(draft: str, exit_layer: int | None) -> str:
    """Name of a drafter, with the layer of EventGPT if an adapter reads that layer alone."""
    return draft if exit_layer is None else f"{draft} at layer {exit_layer}"


@dataclass(frozen=True)
class BenchmarkRow(TimedRow):
    """One row of benchmark.json.

    Args:
        modelled_speedup: decoding speed-up by TASKS.md's formula
        corrected_speedup: decoding speed-up by the corrected formula
        modelled_error, corrected_error: prediction / measurement - 1
        draft_layers: layers of EventGPT that the drafter reads; "all" for its own head, None for baseline drafters
        fidelity: comparison of the texts with plain greedy decoding
        exact_match: share of identical texts
        mismatches: texts that differ, in lossless rows
    """

    modelled_speedup: float | None
    corrected_speedup: float | None
    modelled_error: float | None
    corrected_error: float | None
    draft_layers: list[int] | str | None
    fidelity: Fidelity
    exact_match: float
    mismatches: list[Mismatch] | None = field(default=None, metadata=OMIT_IF_NONE)


@dataclass(frozen=True)
class PlantedRow(TimedRow):
    """One row of planted.json; see `BenchmarkRow`.

    Args:
        planted_acceptance: probability with which each draft token is accepted; a list: the marginal acceptance of each draft position
        planted_length: tokens per round that these probabilities imply
        mean_acceptance_length: tokens per round, of the rounds with room for the whole draft length
    """

    corrected_speedup: float | None
    corrected_error: float | None
    planted_acceptance: float | list[float]
    draft_layers: list[int]
    planted_length: float | None = field(default=None, metadata=OMIT_IF_NONE)
    mean_acceptance_length: Rate | None = field(default=None, metadata=OMIT_IF_NONE)


@dataclass(frozen=True, kw_only=True)
class PlainBaseline(Record):
    """Plain greedy decoding, summed over prompts; the repeats of a prompt are averaged.

    Args:
        name: of the baseline
        prompts, tokens: how many were decoded
        total_ms, prefill_ms, decode_ms: milliseconds
        best_over_it: speed-up of the fastest lossless row over it
        fidelity: of its own texts
    """

    name: str
    prompts: int
    tokens: int
    total_ms: float
    prefill_ms: float | None = field(default=None, metadata=OMIT_IF_NONE)
    decode_ms: float
    best_over_it: Speedup | None = field(default=None, metadata=OMIT_IF_NONE)
    fidelity: Fidelity | None = field(default=None, metadata=OMIT_IF_NONE)


@dataclass(frozen=True)
class GenerateBaseline(Record):
    """One way of transformers' `generate`.

    Args:
        name: of the baseline
        total_ms: milliseconds, as in `PlainBaseline`
        speedup: over our plain greedy decoding
        best_over_it: speed-up of the fastest lossless row over it
        exact_match: share of texts that equal plain greedy decoding
        mismatches: texts that differ
    """

    name: str
    total_ms: float
    speedup: Speedup
    best_over_it: Speedup
    exact_match: float
    mismatches: list[Mismatch]


# ---- results


@dataclass(frozen=True)
class FastestLossless(Record):
    """The fastest lossless row, end to end.

    Args:
        row: name of the row that is fastest on all clips
        chosen: names of the rows chosen on each half of the clips
        how: how its speed-up was measured
        speedup: of the rows chosen on one half of the clips, measured on the other half
        decode_speedup: the same, decoding alone
    """

    row: str
    chosen: list[str]
    how: str
    speedup: Speedup
    decode_speedup: Speedup


@dataclass(frozen=True)
class Target(Record):
    """One of the six targets of TASKS.md.

    Args:
        metric: name
        target: the goal, e.g. "> 0.9"
        measured: value
        ci95: its 95 % interval; None for a value without one
        met: whether the whole interval is on the right side
        note: what was measured
    """

    metric: str
    target: str
    measured: int | float
    ci95: tuple[float, float] | None
    met: bool
    note: str


@dataclass(frozen=True, kw_only=True)
class BenchmarkReport(Record):
    """Content of benchmark.json; `plain` and `generate` are written as one list, `baselines`.

    Args:
        meta: provenance
        plain: plain greedy decoding
        generate: transformers' `generate`
        rows: one for each way to draft and to accept
        cost: costs of single steps
        break_even: draft length -> wanted speed-up -> acceptance from which relaxed decoding reaches it, by TASKS.md's formula
        fastest_lossless: the fastest lossless row; results of earlier versions have none
        targets: the six targets
    """

    meta: Meta
    plain: PlainBaseline
    generate: list[GenerateBaseline]
    rows: list[BenchmarkRow]
    cost: Cost
    break_even: dict[str, dict[str, float]]
    fastest_lossless: FastestLossless | None = field(default=None, metadata=OMIT_IF_NONE)
    targets: list[Target]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-plain values."""
        content = super().to_json()
        meta, plain, generate = (content.pop(key) for key in ("meta", "plain", "generate"))
        return {"meta": meta, "baselines": [plain, *generate], **content}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The report that `to_json` wrote; see `Record.from_json`."""
        baselines = content.get("baselines")
        if content.get("planted") or not isinstance(baselines, list) or not baselines:
            raise ValueError("BenchmarkReport has measured acceptance and baselines")
        return super().from_json({**content, "plain": baselines[0], "generate": baselines[1:]})


@dataclass(frozen=True)
class PlantedBest(Record):
    """The fastest draft length of a drafter at a planted acceptance.

    Args:
        draft, planted_acceptance: as in `PlantedRow`
        num_draft_tokens: the draft length that is fastest on all clips
        chosen: draft lengths chosen on each half of the clips; results of earlier versions have none
        speedup, decode_speedup: of the lengths chosen on one half of the clips, measured on the other half
    """

    draft: str
    planted_acceptance: float | list[float]
    num_draft_tokens: int
    chosen: list[int] | None = field(default=None, metadata=OMIT_IF_NONE, kw_only=True)
    speedup: Speedup
    decode_speedup: Speedup


@dataclass(frozen=True)
class PlantedReport(Record):
    """Content of planted.json.

    Args:
        meta: provenance
        planted: True
        baselines: plain greedy decoding
        rows: one for each drafter, draft length and planted acceptance
        cost: costs of single steps
        best: the fastest draft length of each drafter at each planted acceptance
    """

    meta: Meta
    planted: bool
    baselines: list[PlainBaseline]
    rows: list[PlantedRow]
    cost: Cost
    best: list[PlantedBest]
