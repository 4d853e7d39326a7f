"""The content of benchmark.json and planted.json. Costs without a unit are in passes of plain decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

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
        threshold: cosine of the feature and relaxed rules
        exit_layer: layer of EventGPT that an adapter of its own reads
        drafts_per_round: the draft length in words
        speedup: end to end
        decode_speedup: decoding alone
        tokens_per_pass: tokens after the first per pass of the target
        acceptance_rate: accepted / reached draft tokens
        ms: stage -> mean milliseconds per prompt
        adapter_ms_per_draft: milliseconds in the adapter per draft token; None without an adapter
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

    @property
    def name(self) -> str:
        """Drafter, rule and draft length, e.g. "chained + token, 5"."""
        rule = self.accept if self.threshold is None else f"{self.accept} > {self.threshold:g}"
        return f"{drafter_name(self.draft, self.exit_layer)} + {rule}, {self.drafts_per_round}"


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
        planted_acceptance: probability with which each draft token is accepted
    """

    corrected_speedup: float | None
    corrected_error: float | None
    planted_acceptance: float
    draft_layers: list[int]


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


# ---- costs


@dataclass(frozen=True)
class ExitCost(Record):
    """EventGPT up to one layer: milliseconds of one step, and the cost of one draft token."""

    t_draft_ms: float
    c: float


@dataclass(frozen=True)
class Bandwidth(Record):
    """Memory bandwidth of one step of the target, next to that of a plain copy.

    Args:
        step_bytes: bytes that a step reads
        step_gb_per_s: read per second, in GB
        copy_gb_per_s: the same for a copy
        share: step_gb_per_s / copy_gb_per_s
    """

    step_bytes: int
    step_gb_per_s: float
    copy_gb_per_s: float
    share: float


@dataclass(frozen=True)
class LoopCosts(Record):
    """Costs measured in a loop of nothing else, in steps of the target in such a loop.

    Args:
        t_target_ms: milliseconds of one step of the target, LM head included
        c: one aligned draft token: (draft step + adapter + LM head) / target step
        c_chained: one chained draft token: (chained adapter + LM head) / target step
        v: number of tokens -> cost of verifying them
    """

    t_target_ms: float
    c: float
    c_chained: float | None
    v: dict[str, float]


@dataclass(frozen=True)
class PartCosts(Record):
    """Milliseconds of each part of a round, measured in loops of nothing else.

    Args:
        t_draft_ms: one step of EventGPT
        t_adapter_ms: hidden adapter, one token
        t_chained_ms: chained adapter, one token; None if there is none
        t_head_ms: the target's LM head, one token
        loop: the same in steps of the target
        exit_layers: layer -> cost of EventGPT up to that layer
        bandwidth: of one step of the target
    """

    t_draft_ms: float
    t_adapter_ms: float
    t_chained_ms: float | None
    t_head_ms: float
    loop: LoopCosts
    exit_layers: dict[str, ExitCost]
    bandwidth: Bandwidth


@dataclass(frozen=True)
class DrafterCost(Record):
    """Costs of one drafter during decoding.

    Args:
        draft, exit_layer, adaptive: as in `TimedRow`
        c: one draft token
        r: the rest of a round
        draft_ms: milliseconds per draft token
        rest_ms: milliseconds of the rest of a round
    """

    draft: str
    exit_layer: int | None
    adaptive: bool
    c: float
    r: float
    draft_ms: Rate
    rest_ms: Rate


@dataclass(frozen=True)
class RoundCosts(Record):
    """Milliseconds measured during decoding.

    Args:
        step_ms: one pass of plain decoding
        verify_ms: number of tokens -> one verification
        recompute_ms: number of tokens -> reading a corrected block again
        drafters: costs of each drafter
    """

    step_ms: Rate
    verify_ms: dict[str, Rate]
    recompute_ms: dict[str, Rate]
    drafters: list[DrafterCost]


@dataclass(frozen=True)
class DecodingCosts(Record):
    """Costs during decoding.

    Args:
        t_target_ms: milliseconds of one pass of plain decoding
        c: one aligned draft token
        c_chained: one chained draft token
        v: number of tokens -> one verification
        rounds: the measurements that these costs are computed from
    """

    t_target_ms: float
    c: float
    c_chained: float | None
    v: dict[str, float]
    rounds: RoundCosts


@dataclass(frozen=True)
class Bound(Record):
    """The best fixed draft length by the corrected formula, and its speed-up, at the measured acceptance and costs."""

    acceptance_rate: float
    c: float
    r: float
    num_draft_tokens: int
    speedup: float


@dataclass(frozen=True, kw_only=True)
class Cost(Record):
    """All costs of a benchmark: the fields of `PartCosts` and `DecodingCosts`.

    Args:
        t_draft_ms, t_adapter_ms, t_chained_ms, t_head_ms, loop, exit_layers, bandwidth: as in `PartCosts`
        t_target_ms, c, c_chained, v, rounds: as in `DecodingCosts`
        bound: drafter -> the best speed-up that the costs allow
    """

    t_draft_ms: float
    t_adapter_ms: float
    t_chained_ms: float | None
    t_head_ms: float
    loop: LoopCosts | None = field(default=None, metadata=OMIT_IF_NONE)  # not in results of earlier versions
    exit_layers: dict[str, ExitCost]
    bandwidth: Bandwidth
    t_target_ms: float
    c: float
    c_chained: float | None
    v: dict[str, float]
    rounds: RoundCosts | None = field(default=None, metadata=OMIT_IF_NONE)  # not in results of earlier versions
    bound: dict[str, Bound] | None = field(default=None, metadata=OMIT_IF_NONE)

    @classmethod
    def of(cls, parts: PartCosts, decoding: DecodingCosts, bound: dict[str, Bound] | None = None) -> Self:
        """Combine costs of single parts with those measured during decoding."""
        return cls(**vars(parts), **vars(decoding), bound=bound)


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
    planted_acceptance: float
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
