"""The six targets of TASKS.md, read off a benchmark and the acceptance that belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from feature_alignment.adapters.attending import AttendingAdapter
from feature_alignment.adapters.attending_texts import MOST_IDS
from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.benchmark.costs import PartCosts
from feature_alignment.benchmark.results import BenchmarkRow, FastestLossless, Speedup, Target
from feature_alignment.benchmark.rows import Mode
from feature_alignment.benchmark.timing import Fastest, attending_ms, chained_ms, hidden_ms
from feature_alignment.cli.config import Steps
from feature_alignment.decoding.baseline_drafters import BASELINE_DRAFTERS
from feature_alignment.measurement.metrics import Rate
from feature_alignment.measurement.reports import AcceptanceReport, ChainReport

GOAL = 1.3
TARGET_DRAFT_TOKENS = 5  # draft length of the target `consecutive_accept`
CHOSEN = "chosen on one half of the clips and measured on the other, both ways"
WIDTH, EVENT_TOKENS = 4096, 582  # of EventGPT-7B: 5 temporal and 577 spatial tokens


@dataclass(frozen=True)
class AdapterInUse:
    """The adapter of the fastest lossless row, and the same recipe at the width of the 7B models.

    Args:
        name: "hidden", "chained" or "attending"
        parameters: number of parameters
        parameters_wide: the same at width 4096
        overhead_ms: milliseconds per draft token while decoding with it
        overhead_ci95: their interval, or None
        overhead_loop_ms: the same in a loop of nothing else
        overhead_wide_ms: milliseconds in such a loop at width 4096, without the target's head
        head: whether the first two include the target's head
        measured: its part of acceptance.json
        where: the positions that were measured
        hidden: the hidden adapter's part of acceptance.json, where another adapter is in use
    """

    name: str
    parameters: int
    parameters_wide: int
    overhead_ms: float
    overhead_ci95: tuple[float, float] | None
    overhead_loop_ms: float
    overhead_wide_ms: float
    head: Literal["folded head included", "without the head"]
    measured: AcceptanceReport | ChainReport
    where: str
    hidden: AcceptanceReport | None = None


def targets_of(adapter: AdapterInUse, rows: Sequence[BenchmarkRow], fastest: FastestLossless) -> list[Target]:
    """The six targets; each is met only if its whole interval is on the right side.

    Args:
        adapter: adapter of the fastest lossless row
        rows: all rows
        fastest: the fastest lossless row
    """
    at = adapter.measured.thresholds["0.90"]
    hidden = None if adapter.hidden is None else adapter.hidden.thresholds["0.90"]
    baseline = max((r.speedup.value for r in rows if r.draft in BASELINE_DRAFTERS), default=float("nan"))
    of_the_run = [r for r in rows if r.accept == "token" and r.draft not in BASELINE_DRAFTERS and r.exit_layer is None]
    alone = [r.speedup.value for r in of_the_run if not r.overlap]
    overlaps = any(r.overlap for r in rows if r.name in fastest.chosen)
    on_one_thread = f"; overlapped rows use a second thread, without it {max(alone):.2f}" if overlaps and alone else ""

    def above(name: str, goal: float, rate: Rate, note: str) -> Target:
        return Target(name, f"> {goal}", rate.value, rate.ci95, rate.ci95[0] > goal, note)  # False if there is no interval (nan).

    return [
        Target(
            "adapter_params",
            "< 5,000,000",
            adapter.parameters,
            None,
            adapter.parameters_wide < 5_000_000,
            f"{adapter.name} adapter; {adapter.parameters_wide:,} by the same recipe at width 4096",
        ),
        Target(
            "adapter_overhead_ms",
            "< 0.5",
            adapter.overhead_ms,
            adapter.overhead_ci95,
            (adapter.overhead_ci95 or (adapter.overhead_ms,))[-1] < 0.5,
            f"per draft token while decoding on this device, {adapter.head}; {adapter.overhead_loop_ms:.3f} in a loop of nothing else; "
            f"{adapter.overhead_wide_ms:.3f} in such a loop at width 4096 without the head",
        ),
        above("cosine", 0.9, adapter.measured.cosine, adapter.where),
        above(
            "consecutive_accept",
            0.30,
            at.consecutive_accept,
            f"cosine > 0.90; the token rule: {adapter.measured.consecutive_accept_token.value:.3f}"
            + (f"; the hidden adapter: {hidden.consecutive_accept.value:.3f}" if hidden else ""),
        ),
        above(
            "relaxed_accept",
            0.50,
            at.relaxed_accept,
            "cosine > 0.90" + (f"; the hidden adapter: {hidden.relaxed_accept.value:.3f}" if hidden else ""),
        ),
        above(
            "speedup",
            GOAL,
            fastest.speedup,
            f"end to end, lossless, {' or '.join(dict.fromkeys(fastest.chosen))} a round, {CHOSEN}; "
            f"decoding alone {fastest.decode_speedup.value:.2f}; best baseline drafter end to end {baseline:.2f}{on_one_thread}",
        ),
    ]


def is_candidate(mode: Mode) -> bool:
    """Whether a mode may be the fastest lossless one: EventGPT drafts, with the run's own adapters, under the token rule."""
    return mode.uses_run_adapters and mode.accept == "token"


def report_fastest(fastest: Fastest, rows: Sequence[BenchmarkRow], speedup: Speedup, decode_speedup: Speedup) -> FastestLossless:
    """The fastest lossless row, for benchmark.json.

    Args:
        fastest: choice among `rows`
        rows: candidates
        speedup: of `fastest.runs`, end to end
        decode_speedup: the same, decoding alone
    """
    return FastestLossless(rows[fastest.best].name, [rows[i].name for i in fastest.chosen], CHOSEN, speedup, decode_speedup)


def overhead_row(row: BenchmarkRow, rows: Sequence[BenchmarkRow]) -> BenchmarkRow:
    """The row that tells what an adapter's draft token costs: of `hybrid`, where a table supplies some, the adapter's own row.

    Args:
        row: the fastest lossless row
        rows: all rows
    """
    if row.draft != "hybrid":
        return row
    own = [r for r in rows if r.draft in ("chained", "aligned") and r.accept == "token" and r.exit_layer is None and not r.overlap]
    return min(
        own, key=lambda r: (r.draft != "chained", r.adaptive != row.adaptive, r.num_draft_tokens != row.num_draft_tokens), default=row
    )


def adapter_in_use(
    row: BenchmarkRow,
    rows: Sequence[BenchmarkRow],
    adapter: HiddenAdapter,
    chained: ChainedAdapter | None,
    acceptance: AcceptanceReport,
    cost: PartCosts,
    steps: Steps,
    attending: AttendingAdapter | None = None,
) -> AdapterInUse:
    """The adapter of a row.

    Args:
        row: the fastest lossless row
        rows: all rows
        adapter: hidden adapter
        chained: chained adapter, if there is one
        acceptance: content of acceptance.json
        cost: costs of single parts
        steps: how models step
        attending: attending adapter, if the row uses it
    """
    like = adapter.down.weight
    used = overhead_row(row, rows)
    overhead_ms = used.adapter_ms_per_draft or cost.t_adapter_ms  # EventGPT's own draft tokens need no adapter.
    measured, positions = acceptance.chained, acceptance.positions
    if chained is not None and cost.loop.c_chained is not None and measured and row.draft in ("chained", "hybrid"):
        wide = ChainedAdapter(WIDTH, WIDTH, EVENT_TOKENS, chained.geometry["width"]).to(like.device, like.dtype)
        return AdapterInUse(
            "chained",
            chained.num_parameters,
            wide.num_parameters,
            overhead_ms,
            used.adapter_ms_ci95,
            cost.loop.c_chained * cost.loop.t_target_ms,
            chained_ms(wide, steps),
            "folded head included",
            measured,
            f"{positions}, draft tokens 1 to {measured.num_draft_tokens} of a chain; the hidden adapter: {acceptance.cosine.value:.3f}",
            acceptance,
        )
    if attending is not None and row.draft == "attending":
        found = acceptance.chains["attending"]
        large = AttendingAdapter(WIDTH, WIDTH, EVENT_TOKENS, MOST_IDS, width=attending.width).to(like.device, like.dtype)
        return AdapterInUse(
            "attending",
            attending.num_parameters,
            large.num_parameters,
            overhead_ms,
            used.adapter_ms_ci95,
            attending_ms(attending),
            attending_ms(large),
            "without the head",
            found,
            f"{positions}, draft tokens 1 to {found.num_draft_tokens} of a chain; the hidden adapter: {acceptance.cosine.value:.3f}",
            acceptance,
        )
    taps = adapter.d_draft // adapter.d_target
    same = HiddenAdapter(WIDTH * taps, WIDTH, adapter.bottleneck).to(like.device, like.dtype)
    return AdapterInUse(
        "hidden",
        adapter.num_parameters,
        same.num_parameters,
        overhead_ms,
        used.adapter_ms_ci95,
        cost.t_adapter_ms,
        hidden_ms(same, steps, 100),
        "without the head",
        acceptance,
        positions,
    )
