"""The six targets of TASKS.md, read off a benchmark and the acceptance it was run with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from feature_alignment.adapters.attending import AttendingAdapter
from feature_alignment.adapters.attending_training import MOST_IDS
from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.benchmark.rows import row_name
from feature_alignment.benchmark.timing import Fastest, attending_ms, chained_ms, hidden_ms
from feature_alignment.cli.config import Steps
from feature_alignment.decoding.baseline_drafters import BASELINE_DRAFTERS

GOAL = 1.3
CHOSEN = "chosen on one half of the clips and measured on the other, both ways"
WIDTH, EVENT_TOKENS = 4096, 582  # of EventGPT-7B: 5 temporal and 577 spatial tokens


@dataclass(frozen=True)
class InUse:
    """The adapter behind the fastest lossless row, as the targets read it.

    overhead_ms: of one drafted token, in that row's decoding, in a loop of nothing else, and so at width 4096, stepping as that row
    measured: its part of acceptance.json; where: what that was measured on
    """

    name: str
    parameters: int
    parameters_wide: int
    overhead_ms: tuple[float, float, float]
    measured: dict[str, Any]
    where: str


def read(adapter: InUse, rows: list[dict[str, Any]], fastest: dict[str, Any]) -> list[dict[str, Any]]:
    """The six targets, each met only if its whole interval is on the right side. fastest: `report_fastest` of the lossless rows"""
    at = adapter.measured["thresholds"]["0.90"]
    null = max((r["speedup"]["value"] for r in rows if r["draft"] in BASELINE_DRAFTERS), default=float("nan"))

    def over(name: str, goal: float, rate: dict[str, Any], note: str) -> dict[str, Any]:
        lo = rate["ci95"][0]
        met = lo is not None and lo == lo and lo > goal
        return {"metric": name, "target": f"> {goal}", "measured": rate["value"], "ci95": rate["ci95"], "met": bool(met), "note": note}

    def under(name: str, goal: float, here: float, judged: float, note: str) -> dict[str, Any]:
        return {"metric": name, "target": f"< {goal:,}", "measured": here, "ci95": None, "met": judged < goal, "note": note}

    return [
        under(
            "adapter_params",
            5_000_000,
            adapter.parameters,
            adapter.parameters_wide,
            f"{adapter.name} adapter; {adapter.parameters_wide:,} by the same recipe at width 4096",
        ),
        under(
            "adapter_overhead_ms",
            0.5,
            adapter.overhead_ms[0],
            adapter.overhead_ms[0],
            f"per drafted token while decoding on this device; {adapter.overhead_ms[1]:.3f} in a loop of its own, "
            f"{adapter.overhead_ms[2]:.3f} so at width 4096",
        ),
        over("cosine", 0.9, adapter.measured["cosine"], adapter.where),
        over(
            "consecutive_accept",
            0.30,
            at["consecutive_accept"],
            f"cosine > 0.90; the token rule: {adapter.measured['consecutive_accept_token']['value']:.3f}",
        ),
        over("relaxed_accept", 0.50, at["relaxed_accept"], "cosine > 0.90"),
        over(
            "speedup",
            GOAL,
            fastest["speedup"],
            f"end to end, lossless, {' or '.join(dict.fromkeys(fastest['chosen']))} a round, {CHOSEN}; "
            f"decoding alone {fastest['decode_speedup']['value']:.2f}; best null drafter end to end {null:.2f}",
        ),
    ]


def lossless(mode: Any) -> bool:
    """Whether a row may be the fastest lossless one: EventGPT takes part in it, with the run's own adapters. mode: `rows.Mode`"""
    return mode.draft not in BASELINE_DRAFTERS and mode.accept == "token" and mode.exit_layer is None


def report_fastest(fastest: Fastest, rows: Sequence[dict[str, Any]], speedups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """benchmark.json's `fastest_lossless`. rows: those chosen from; speedups: of `fastest.runs`"""
    return {"row": row_name(rows[fastest.best]), "chosen": [row_name(rows[i]) for i in fastest.chosen], "how": CHOSEN, **speedups}


def adapter_in_use(
    row: dict[str, Any],
    adapter: HiddenAdapter,
    chained: ChainedAdapter | None,
    acceptance: dict[str, Any],
    cost: dict[str, Any],
    device: str,
    dtype: torch.dtype,
    steps: Steps,
    attending: AttendingAdapter | None = None,
) -> InUse:
    """The adapter behind a row, the fastest lossless one, and the same recipe at the width of the 7B models."""
    live = row["adapter_ms_per_draft"] or cost["t_adapter_ms"]  # own drafts need no adapter
    if chained is not None and row["draft"] in ("chained", "hybrid"):
        measured = acceptance["chains"]["chained"]
        where = (
            f"test positions, same prefix, drafts 1 to {measured['num_draft_tokens']} of a chain; "
            f"the hidden adapter: {acceptance['cosine']['value']:.3f}"
        )
        wide = ChainedAdapter(WIDTH, WIDTH, EVENT_TOKENS, chained.geometry["width"]).to(device, dtype)
        ms = live, cost["t_chained_ms"], chained_ms(wide, steps=steps)
        return InUse("chained", chained.num_parameters, wide.num_parameters, ms, measured, where)
    if attending is not None and row["draft"] == "attending":
        measured = acceptance["chains"]["attending"]
        where = f"test positions, same prefix, drafts 1 to {measured['num_draft_tokens']} of a chain"
        large = AttendingAdapter(WIDTH, WIDTH, EVENT_TOKENS, MOST_IDS, width=attending.width).to(device, dtype)
        return InUse(
            "attending",
            attending.num_parameters,
            large.num_parameters,
            (live, attending_ms(attending), attending_ms(large)),
            measured,
            where,
        )
    taps = adapter.d_draft // adapter.d_target
    same = HiddenAdapter(WIDTH * taps, WIDTH, adapter.bottleneck).to(device, dtype)
    ms = live, cost["t_adapter_ms"], hidden_ms(same, 100, steps)
    return InUse("hidden", adapter.num_parameters, same.num_parameters, ms, acceptance, "test positions, same prefix")
