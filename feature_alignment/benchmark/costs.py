"""The costs in benchmark.json and planted.json. Costs without a unit are in passes of plain decoding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from feature_alignment.measurement.metrics import Rate
from feature_alignment.measurement.records import OMIT_IF_NONE, Record


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
        c_chained: one chained draft token: (folded draft step, folded LM head included) / target step
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
        c_chained_live: one chained draft token at a fixed draft length; None without such rows
        c_chained_alone: the same draft tokens in a loop of nothing else, which takes turns with those rows
        c_chained_reading: what that loop takes in addition to read as many tokens as were accepted, per draft token
        c_chained_once: the part of live - alone that a round spends once, however many tokens it drafts; None at one draft length
    """

    t_target_ms: float
    c: float
    c_chained: float | None
    v: dict[str, float]
    rounds: RoundCosts
    c_chained_live: float | None = field(default=None, metadata=OMIT_IF_NONE)
    c_chained_alone: float | None = field(default=None, metadata=OMIT_IF_NONE)
    c_chained_reading: float | None = field(default=None, metadata=OMIT_IF_NONE)
    c_chained_once: float | None = field(default=None, metadata=OMIT_IF_NONE)


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
        t_target_ms, c, c_chained, c_chained_live, c_chained_alone, c_chained_reading, c_chained_once, v, rounds: as in `DecodingCosts`
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
    c_chained_live: float | None = field(default=None, metadata=OMIT_IF_NONE)  # nor this, nor the next three
    c_chained_alone: float | None = field(default=None, metadata=OMIT_IF_NONE)
    c_chained_reading: float | None = field(default=None, metadata=OMIT_IF_NONE)
    c_chained_once: float | None = field(default=None, metadata=OMIT_IF_NONE)
    v: dict[str, float]
    rounds: RoundCosts | None = field(default=None, metadata=OMIT_IF_NONE)  # not in results of earlier versions
    bound: dict[str, Bound] | None = field(default=None, metadata=OMIT_IF_NONE)

    @classmethod
    def of(cls, parts: PartCosts, decoding: DecodingCosts, bound: dict[str, Bound] | None = None) -> Self:
        """Combine costs of single parts with those measured during decoding."""
        return cls(**vars(parts), **vars(decoding), bound=bound)
