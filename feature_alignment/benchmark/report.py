"""A benchmark for people: tables on the console, report.md, and report.html with its pictures inside."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from feature_alignment.benchmark import plots, speed_model
from feature_alignment.benchmark.costs import Cost, DrafterCost
from feature_alignment.benchmark.planted_report import chained_rows, fallback_tables, machine_rows
from feature_alignment.benchmark.plots import PICTURES
from feature_alignment.benchmark.profile import SpeculationProfile
from feature_alignment.benchmark.results import BenchmarkReport, BenchmarkRow, Fidelity, PlainBaseline, Target, drafter_name, rule_name
from feature_alignment.benchmark.sweep import LossySweep
from feature_alignment.cli.console import markdown_table, print_table, rate_text
from feature_alignment.decoding.generation import Generation
from feature_alignment.decoding.trace import trace_lines
from feature_alignment.storage.files import write_text

Table = tuple[str, list[str], list[list[str]]]
TITLE = "Feature-level speculative decoding: benchmark"
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:1100px;margin:auto;padding:1em}table{border-collapse:collapse;font-size:.9em}"
    "td,th{border-bottom:1px solid #ccc;padding:.3em .7em;text-align:left;vertical-align:top}.t,pre{overflow-x:auto}"
    "td:last-child{min-width:9em}img{max-width:100%;display:block;margin:1em 0}"
)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def tables(result: BenchmarkReport) -> list[Table]:
    """(title, header, rows) of every table as plain strings, in report order."""
    return [
        target_table(result.targets),
        speed_table(result.rows, result.plain),
        *fallback_tables(result.meta),
        fidelity_table(result.rows, result.plain.fidelity),
        baseline_table(result),
        part_cost_table(result.cost),
        decoding_cost_table(result.cost),
    ]


def target_table(targets: Sequence[Target]) -> Table:
    """The six targets of TASKS.md, each met or not met."""
    rows = [
        [
            t.metric,
            t.target,
            rate_text({"value": t.measured, "ci95": t.ci95 or (None, None)}, 0 if isinstance(t.measured, int) else 3),
            "met" if t.met else "NOT MET",
            t.note,
        ]
        for t in targets
    ]
    return "The six targets", ["metric", "target", "measured [95 % interval]", "", "note"], rows


def speed_table(rows: Sequence[BenchmarkRow], plain: PlainBaseline) -> Table:
    """Measured and modelled speed-up of every row.

    Args:
        rows: of the benchmark
        plain: plain greedy decoding
    """
    cells = [
        [
            r.name,
            r.speedup.text(2, unit="x"),
            r.decode_speedup.text(2, unit="x"),
            _number(r.tokens_per_pass),
            _number(r.acceptance_rate.value, 3),
            _number(r.exact_match, 3),
            _predicted(r.modelled_speedup, r.modelled_error),
            _predicted(r.corrected_speedup, r.corrected_error),
        ]
        for r in rows
    ]
    seconds, prefill = plain.total_ms / 1e3, (plain.prefill_ms or 0.0) / 1e3
    size = f"{plain.prompts} prompts, {plain.tokens:,} tokens, {seconds:.1f} s ({prefill:.1f} s prefill)"
    header = ["drafter + rule, draft length", "speed-up, end to end", "decoding", "tokens per pass", "acceptance rate", "exact match"]
    return f"Speed against plain greedy decoding: {size}", [*header, "TASKS.md's formula", "corrected formula"], cells


def _predicted(speedup: float | None, error: float | None) -> str:
    return "-" if speedup is None or error is None else f"{speedup:.2f} ({error:+.0%})"


def fidelity_table(rows: Sequence[BenchmarkRow], own: Fidelity | None) -> Table:
    """Differences between the texts of the lossy rows and the target's own texts.

    Args:
        rows: of the benchmark
        own: of plain greedy decoding
    """
    cells = [["Video-LLaVA's own text", "1.000", "1.000", _number(own.log_likelihood.value, 3), *_true_facts(own), "-"]] if own else []
    for r in rows:
        if r.accept == "token":
            continue
        f, kinds = r.fidelity, r.fidelity.kept_drafts
        cells.append(
            [
                f"{r.draft} + {rule_name(r.accept, r.threshold)}",
                _number(r.exact_match, 3),
                _number(f.token_agreement.value, 3),
                _number(f.log_likelihood.value, 3),
                *_true_facts(f),
                f"{kinds.same} / {kinds.synonym} / {kinds.error}" if kinds else "-",
            ]
        )
    header = ["drafter + rule", "exact match", "token agreement", "log-likelihood per token", "visible facts true", "hidden facts true"]
    return "Fidelity of the lossy rules", [*header, "accepted: same / synonym / error"], cells


def sweep_table(sweep: LossySweep) -> Table:
    """Every lossy rule at every threshold of the sweep, and the lossless rule."""
    rows = [
        [
            p.name,
            p.tokens_per_pass.text(2),
            _number(p.fidelity.exact_match.value, 3),
            p.fidelity.token_agreement.text(3),
            p.fidelity.log_likelihood.text(3),
            *_true_facts(p.fidelity),
        ]
        for p in (sweep.lossless, *sweep.points)
    ]
    header = ["rule", "tokens per pass", "exact match", "token agreement", "log-likelihood per token", "visible facts true"]
    title = f"Lossy rules at every threshold: {sweep.draft} draft tokens, {sweep.num_draft_tokens} a round, {sweep.prompts} prompts"
    return f"{title}, not timed", [*header, "hidden facts true"], rows


def _true_facts(fidelity: Fidelity) -> list[str]:
    """Share of true facts, visible and hidden; "-" for data without facts."""
    rates = (fidelity.true_facts_visible, fidelity.true_facts_hidden)
    return [_number(rate.value, 3) if rate else "-" for rate in rates]


def baseline_table(result: BenchmarkReport) -> Table:
    """Plain greedy decoding and transformers' `generate`."""
    plain, best = result.plain, result.plain.best_over_it
    rows = [[plain.name, "1.00x", "1.000", best.text(2, unit="x") if best else "-"]]
    rows += [[b.name, b.speedup.text(2, unit="x"), _number(b.exact_match, 3), b.best_over_it.text(2, unit="x")] for b in result.generate]
    header = ["Video-LLaVA alone", "speed-up over our plain greedy", "exact match", "speed-up of our fastest lossless row over it"]
    return "Baselines without a drafter of this project, end to end", header, rows


def part_cost_table(cost: Cost) -> Table:
    """Milliseconds of each part of a round, measured outside decoding."""
    rows = [
        ["one draft step of EventGPT", f"{cost.t_draft_ms:.3f}"],
        ["hidden adapter, one token", f"{cost.t_adapter_ms:.3f}"],
        ["chained adapter, one token", _number(cost.t_chained_ms, 3)],
        ["target's LM head, one token", f"{cost.t_head_ms:.3f}"],
    ]
    rows += [["one step of Video-LLaVA, LM head included", f"{cost.loop.t_target_ms:.3f}"]] if cost.loop else []
    return "Costs in milliseconds (medians), each in a loop of nothing else", ["part", "ms"], rows


def decoding_cost_table(cost: Cost) -> Table:
    """Costs measured during decoding, in passes of plain decoding, and the best speed-up that they allow."""
    rows: list[list[str]] = []
    if cost.rounds and cost.loop:
        rows += [
            ["one pass of plain decoding, in ms", cost.rounds.step_ms.text(3)],
            ["c of an aligned draft token, in a loop of nothing else", f"{cost.loop.c:.3f}"],
            *(chained_rows(cost) or [["c of a chained draft token, in a loop of nothing else", _number(cost.loop.c_chained, 3)]]),
            *([f"{_any_rule(d)}: c, r", f"{_number(d.c, 3)}, {_number(d.r, 3)}"] for d in cost.rounds.drafters),
        ]
    for draft, b in (cost.bound or {}).items():
        label = f"bound of {draft} draft tokens at an acceptance rate of {b.acceptance_rate:.3f}"
        rows += [[label, f"{b.speedup:.2f}x at draft length {b.num_draft_tokens}"]]
    rows += machine_rows(cost)
    rows += [[f"v({k}), verifying {k} tokens", f"{v:.3f}"] for k, v in cost.v.items()]
    return "Costs during decoding, in passes of plain decoding, and the bound that they imply", ["part", "passes"], rows


def _any_rule(drafter: DrafterCost) -> str:
    return f"{drafter_name(drafter.draft, drafter.exit_layer)} + any rule, {'adaptive' if drafter.adaptive else 'fixed length'}"


def print_benchmark(result: BenchmarkReport) -> None:
    """Print the tables, the targets last so that they stay on the screen, and warnings."""
    for title, header, rows in reversed(tables(result)):
        print_table(title, header, rows)
    for warning in speed_model.warnings(result.cost):
        print(f"  {warning}")


def write_benchmark_report(
    result: BenchmarkReport,
    profiles: Sequence[SpeculationProfile],
    sweep: LossySweep,
    shown: Mapping[str, Generation],
    decode: Callable[[list[int]], str],
    out: Path,
) -> None:
    """Write report.md, report.html and the pictures.

    Args:
        result: content of benchmark.json
        profiles: content of speculation_profile.json
        sweep: content of lossy_rules.json
        shown: name -> a generation, all of one prompt; the trace of the last one is shown
        decode: token ids -> text
        out: directory
    """
    plots.all_pictures(result, profiles, sweep, shown, out)
    name, example = list(shown.items())[-1]
    trace = f"One prompt, {name}: accepted, (rejected), [the target's own]", trace_lines(example, decode, color=False)
    note, provenance, parts = note_of(result), provenance_table(result), [*tables(result), sweep_table(sweep)]
    write_text(out / "report.md", markdown_report(note, [*parts, provenance], trace))
    write_text(out / "report.html", html_report(note, parts, provenance, trace, out))


def note_of(result: BenchmarkReport) -> str:
    """The paragraph that opens the report: machine, versions, and how numbers are to be read."""
    meta, fastest = result.meta, result.fastest_lossless
    return (
        f"{meta['device']}, {meta['dtype']}, {meta['machine']['threads']} thread(s), linear layers: {meta['linear']['target']['kind']}, "
        f"torch {meta['packages']['torch']}, transformers {meta['packages']['transformers']}, commit {meta['git_commit']}, "
        f"{meta['created']}. Speed-up is the sum of baseline seconds over the sum of method seconds, end to end: vision, prefill and "
        "decoding of everything that ran. Brackets are 95 % intervals that resample clips. A target is met only if its whole interval is "
        "on the right side."
        + (" Rows that say `overlapped` read EventGPT's prompt in a second thread." if any(r.overlap for r in result.rows) else "")
        + (f" The fastest lossless row is {fastest.how}, so that its interval has no selection bias." if fastest else "")
    )


def provenance_table(result: BenchmarkReport) -> Table:
    """Inputs of the benchmark with their recorded hashes."""
    meta = result.meta
    inputs = [[key, str(value), str(meta["inputs"].get(key, ""))[:120]] for key, value in meta["made_from"].items()]
    return "Provenance", ["input", "hash", "path"], inputs


def markdown_report(note: str, parts: Sequence[Table], trace: tuple[str, Sequence[str]]) -> str:
    """The text of report.md.

    Args:
        note: opening paragraph
        parts: all tables
        trace: title and lines of the trace
    """
    lines = [f"# {TITLE}", "", note]
    for title, header, rows in parts:
        lines += ["", f"## {title}", "", markdown_table(header, rows)]
    lines += ["", f"## {trace[0]}", "", "```", *trace[1], "```"]
    return "\n".join([*lines, "", *(f"![{picture}]({picture}.png)" for picture in PICTURES), ""])


def html_report(note: str, parts: Sequence[Table], provenance: Table, trace: tuple[str, Sequence[str]], out: Path) -> str:
    """The text of report.html, which needs no other file.

    Args:
        note: opening paragraph
        parts: tables; the pictures follow the second one
        provenance: last table
        trace: title and lines of the trace
        out: directory of the pictures
    """

    def cells(tag: str, row: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"

    def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        inside = cells("th", header) + "".join(cells("td", r) for r in rows)
        return f"<h2>{html.escape(title)}</h2><div class=t><table>{inside}</table></div>"

    def picture(name: str) -> str:
        data = base64.b64encode((out / f"{name}.png").read_bytes()).decode()
        return f'<img alt="{name}" src="data:image/png;base64,{data}">'

    title, lines = trace
    body = [f"<h1>{TITLE}</h1><p>{html.escape(note)}</p>", *(table(*part) for part in parts[:2]), *map(picture, PICTURES)]
    body += [table(*part) for part in parts[2:]]
    body += [f"<h2>{html.escape(title)}</h2><pre>{html.escape(chr(10).join(lines))}</pre>", table(*provenance)]
    meta = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>benchmark</title>"
    return f"{meta}<style>{STYLE}</style>{''.join(body)}</html>"
