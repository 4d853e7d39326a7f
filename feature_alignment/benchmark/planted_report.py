"""planted.json for people: tables on the console and planted.md."""

from __future__ import annotations

from pathlib import Path

from feature_alignment.benchmark import planted
from feature_alignment.benchmark.costs import Cost
from feature_alignment.benchmark.results import PlantedReport
from feature_alignment.cli.console import markdown_table, print_table
from feature_alignment.measurement.records import Meta
from feature_alignment.storage.files import write_hashed_json, write_text

Table = tuple[str, list[str], list[list[str]]]


def _text_of(rate: float | list[float]) -> str:
    return "profile" if isinstance(rate, list) else f"{rate:g}"


def tables(result: PlantedReport) -> list[Table]:
    """(title, header, rows) of every table."""
    cost, base = result.cost, result.baselines[0]
    size = f"{base.prompts} prompts, {base.tokens:,} tokens"
    header = ["drafter, draft length", "PLANTED acceptance", "PLANTED tokens a round", "tokens a round, full drafts", "accepted / reached"]
    header += ["tokens per pass", "end to end", "decoding", "corrected"]
    rows = [
        [
            f"{r.draft}, {r.num_draft_tokens}",
            _text_of(r.planted_acceptance),
            "-" if r.planted_length is None else f"{r.planted_length:.2f}",
            "-" if r.mean_acceptance_length is None else r.mean_acceptance_length.text(2),
            f"{r.acceptance_rate.value:.3f}",
            f"{r.tokens_per_pass:.2f}",
            r.speedup.text(2, unit="x"),
            r.decode_speedup.text(2, unit="x"),
            "-" if r.corrected_speedup is None else f"{r.corrected_speedup:.2f} ({r.corrected_error:+.0%})",
        ]
        for r in result.rows
    ]
    best = [
        [r.draft, _text_of(r.planted_acceptance), str(r.num_draft_tokens), r.speedup.text(2), r.decode_speedup.text(2)] for r in result.best
    ]
    costs = [
        ["one step of Video-LLaVA, LM head included, ms", f"{cost.t_target_ms:.3f}"],
        ["hidden adapter, one token, ms", f"{cost.t_adapter_ms:.3f}"],
        ["chained adapter, one token, ms", "-" if cost.t_chained_ms is None else f"{cost.t_chained_ms:.3f}"],
        ["target's LM head, one token, ms", f"{cost.t_head_ms:.3f}"],
        *chained_rows(cost),
        *machine_rows(cost),
        *[[f"v({k}), passes", f"{v:.3f}"] for k, v in cost.v.items()],
    ]
    return [
        (f"PLANTED acceptance, draft tokens accepted at random: only the wall clock is real. {size}", header, rows),
        (
            "The best draft length at each planted acceptance, chosen on one half of the clips and timed on the other, both ways",
            ["drafter", "PLANTED acceptance", "draft length", "end to end", "decoding"],
            best,
        ),
        ("Costs (medians)", ["part", ""], costs),
        *fallback_tables(result.meta),
    ]


def machine_rows(cost: Cost) -> list[list[str]]:
    """Rows of a cost table: memory bandwidth, and EventGPT up to each layer."""
    b = cost.bandwidth
    return [
        [
            "memory read by that step, and the bandwidth of a plain copy",
            f"{b.step_bytes / 1e9:.3g} GB at {b.step_gb_per_s:.4g} GB/s, {b.share:.0%} of {b.copy_gb_per_s:.4g} GB/s",
        ],
        *[[f"EventGPT up to layer {k}: one step, ms; c, steps", f"{e.t_draft_ms:.3f}; {e.c:.3f}"] for k, e in cost.exit_layers.items()],
    ]


def chained_rows(cost: Cost) -> list[list[str]]:
    """Rows of a cost table: a chained draft token during decoding and in a loop of nothing else, and what their difference consists of."""
    live, alone, reading, once = cost.c_chained_live, cost.c_chained_alone, cost.c_chained_reading, cost.c_chained_once
    if live is None or alone is None:
        return []
    rows = [
        ["c of a chained draft token, live: in the rows with a fixed draft length", f"{live:.4f}"],
        ["c of a chained draft token, alone: the same drafts in a loop of nothing else, in turns with those rows", f"{alone:.4f}"],
    ]
    parts = f"{live / alone:.2f} times; the difference is {live - alone:.4f}"
    if once is not None:
        parts += (
            f": {once:.4f} is spent once a round (reading its accepted tokens, and the adapter's weights, which the target's pass evicts "
            f"from the caches), {live - alone - once:.4f} with each draft token"
        )
    if reading is not None:
        parts += f". That loop reads as many tokens in {reading:.4f}; with it, live is {live / (alone + reading):.2f} times alone"
    return [*rows, ["live / alone", parts]]


def fallback_tables(meta: Meta) -> list[Table]:
    """What ran eagerly although captured or compiled steps were asked for: one table, or none."""
    found = [list(fallback.partition(": ")[::2]) for fallback in meta.get("eager_fallbacks", [])]
    title = f"EAGER FALLBACK: not everything ran with --steps {meta['config']['steps']}, so times are longer than they could be"
    return [(title, ["what", "why"], found)] if found else []


def write(result: PlantedReport, out: Path) -> None:
    """Write planted.md and planted.json to the directory `out`."""
    meta = result.meta
    lines = [f"# Planted acceptance: {meta['device']}, {meta['dtype']}, {meta['created']}", "", (planted.__doc__ or "").strip()]
    for title, header, rows in tables(result):
        lines += ["", f"## {title}", "", markdown_table(header, rows)]
    write_text(out / "planted.md", "\n".join(lines) + "\n")
    write_hashed_json(out / "planted.json", result.to_json(), ("planted.md",))


def show(result: PlantedReport) -> None:
    """Print the tables, the most important one last."""
    for title, header, rows in reversed(tables(result)):
        print_table(title, header, rows)
