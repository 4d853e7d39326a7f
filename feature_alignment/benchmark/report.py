"""A benchmark for people: tables on the console, report.md, one self-contained report.html with its pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

from feature_alignment.benchmark import plots as benchmark_plots
from feature_alignment.benchmark import speed_model
from feature_alignment.benchmark.planted import machine_rows
from feature_alignment.benchmark.plots import PICTURES
from feature_alignment.benchmark.rows import row_name
from feature_alignment.cli.console import markdown_table, print_table, rate_text
from feature_alignment.decoding.generation import Generation
from feature_alignment.decoding.trace import trace_lines
from feature_alignment.storage.files import write_text

Table = tuple[str, list[str], list[list[str]]]


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}" if isinstance(value, float) else f"{value:,}"


def tables(result: dict[str, Any]) -> list[Table]:
    """(title, header, rows) of every table as plain strings, in report order."""
    return [
        target_table(result["targets"]),
        speed_table(result["rows"], result["baselines"][0]),
        fidelity_table(result["rows"], result["baselines"][0]),
        baseline_table(result["baselines"]),
        part_cost_table(result["cost"]),
        decoding_cost_table(result["cost"]),
    ]


def target_table(targets: list[dict[str, Any]]) -> Table:
    """The six targets of TASKS.md, each met or not met."""
    rows = [
        [
            t["metric"],
            t["target"],
            rate_text({"value": t["measured"], "ci95": t["ci95"] or (None, None)}, 0 if isinstance(t["measured"], int) else 3),
            "met" if t["met"] else "NOT MET",
            t["note"],
        ]
        for t in targets
    ]
    return "The six targets", ["metric", "target", "measured [95 % interval]", "", "note"], rows


def speed_table(rows: list[dict[str, Any]], plain: dict[str, Any]) -> Table:
    """Measured and modelled speed-up of every row.

    Args:
        rows: benchmark.json's `rows`
        plain: the baseline of plain greedy decoding
    """
    cells = [
        [
            row_name(r),
            rate_text(r["speedup"], 2, unit="x"),
            rate_text(r["decode_speedup"], 2, unit="x"),
            _number(r["tokens_per_pass"]),
            _number(r["acceptance_rate"]["value"], 3),
            _number(r["exact_match"], 3),
            *["-" if r[f"{f}_speedup"] is None else f"{r[f'{f}_speedup']:.2f} ({r[f'{f}_error']:+.0%})" for f in ("modelled", "corrected")],
        ]
        for r in rows
    ]
    seconds, prefill = plain["total_ms"] / 1e3, plain["prefill_ms"] / 1e3
    size = f"{plain['prompts']} prompts, {plain['tokens']:,} tokens, {seconds:.1f} s ({prefill:.1f} s prefill)"
    header = ["drafts + rule, drafts per round", "speed-up, end to end", "decoding", "tokens per pass", "acceptance", "exact match"]
    return f"Speed against plain greedy decoding: {size}", [*header, "modelled", "corrected"], cells


def fidelity_table(rows: list[dict[str, Any]], plain: dict[str, Any]) -> Table:
    """How the text of the feature and relaxed rows differs from the target's own text.

    Args:
        rows: benchmark.json's `rows`
        plain: the baseline of plain greedy decoding
    """
    own = plain["fidelity"]
    cells = [["Video-LLaVA's own text", "1.000", "1.000", _number(own["log_likelihood"]["value"], 3), *_true_facts(own), "-"]]
    for r in rows:
        if r["accept"] == "token":
            continue
        f = r["fidelity"]
        kept = f.get("kept_drafts")
        cells.append(
            [
                f"{r['draft']} + {r['accept']}, cosine > {r['threshold']}",
                _number(r["exact_match"], 3),
                _number(f["token_agreement"]["value"], 3),
                _number(f["log_likelihood"]["value"], 3),
                *_true_facts(f),
                f"{kept['same']} / {kept['synonym']} / {kept['error']}" if kept else "-",
            ]
        )
    header = ["rule", "exact match", "token agreement", "log-likelihood", "visible facts true", "hidden facts true"]
    return "What the lossy rules change", [*header, "kept: same / synonym / error"], cells


def _true_facts(fidelity: dict[str, Any]) -> list[str]:
    """Share of true facts, visible and hidden; "-" without the demo's ground truth."""
    return [_number(fidelity[k]["value"], 3) if k in fidelity else "-" for k in ("true_facts_visible", "true_facts_hidden")]


def baseline_table(baselines: list[dict[str, Any]]) -> Table:
    """Plain greedy decoding (the first baseline) and transformers' `generate`."""
    plain = baselines[0]
    rows = [
        [
            b["name"],
            "1.00x" if b is plain else rate_text(b["speedup"], 2, unit="x"),
            "1.000" if b is plain else _number(b["exact_match"], 3),
            rate_text(b["best_over_it"], 2, unit="x"),
        ]
        for b in baselines
    ]
    header = ["way", "against our plain greedy", "exact match", "our fastest lossless row over it"]
    return "Other ways to decode, end to end", header, rows


def part_cost_table(cost: dict[str, Any]) -> Table:
    """Milliseconds of each part of a round, measured outside decoding."""
    rows = [
        ["one draft step of EventGPT", f"{cost['t_draft_ms']:.3f}"],
        ["hidden adapter, one token", f"{cost['t_adapter_ms']:.3f}"],
        ["chained adapter, one token", _number(cost["t_chained_ms"], 3)],
        ["target's head, one token", f"{cost['t_head_ms']:.3f}"],
        ["one step of Video-LLaVA, head included", f"{cost['loop']['t_target_ms']:.3f}"],
    ]
    return "Costs, in milliseconds (medians), each in a loop of its own", ["part", "ms"], rows


def decoding_cost_table(cost: dict[str, Any]) -> Table:
    """Costs measured during decoding, in passes of plain decoding, and the best speed-up that they allow."""
    rows = [
        ["one pass of plain decoding, in ms", rate_text(cost["rounds"]["step_ms"], 3)],
        ["c of an aligned draft, in a loop of its own", f"{cost['loop']['c']:.3f}"],
        ["c of a chained one, in a loop of its own", _number(cost["loop"]["c_chained"], 3)],
    ]
    for d in cost["rounds"]["drafters"]:
        name = row_name({**d, "accept": "any rule", "threshold": None, "drafts_per_round": "adaptive" if d["adaptive"] else "fixed length"})
        rows += [[f"{name}: c, r", f"{_number(d['c'], 3)}, {_number(d['r'], 3)}"]]
    for draft, b in cost["bound"].items():
        label = f"best of {draft} drafts at acceptance {b['acceptance_rate']:.3f}"
        rows += [[label, f"{b['speedup']:.2f}x, {b['num_draft_tokens']} a round"]]
    rows += machine_rows(cost)
    rows += [[f"v({k}), verifying {k} tokens", f"{v:.3f}"] for k, v in cost["v"].items()]
    return "Costs while decoding, in passes of plain decoding, and the bound they imply", ["part", "steps"], rows


def print_benchmark(result: dict[str, Any]) -> None:
    for title, header, rows in reversed(tables(result)):  # the targets last: they stay on the screen
        print_table(title, header, rows)
    for warning in speed_model.warnings(result["cost"]):
        print(f"  {warning}")


def write_benchmark_report(result: dict[str, Any], shown: dict[str, Generation], decode: Callable[[list[int]], str], out: Path) -> None:
    """report.md and report.html with their pictures.

    shown: name -> a generation, all of one prompt; the last is told round by round
    """
    benchmark_plots.all_of_them(result, shown, out)
    parts, meta = tables(result), result["meta"]
    note = (
        f"{meta['device']}, {meta['dtype']}, {meta['machine']['threads']} thread(s), linear layers: {meta['linear']['target']['kind']}, "
        f"torch {meta['packages']['torch']}, transformers {meta['packages']['transformers']}, commit {meta['git_commit']}, "
        f"{meta['created']}. Speed-up is the sum of baseline seconds over the sum of method seconds, end to end: vision, prefill and "
        "decoding of everything that ran; brackets are 95 % intervals that resample clips. A target is met only if its whole interval is "
        f"on the right side. The fastest lossless row is {result['fastest_lossless']['how']}, so its interval is not that of a maximum."
    )
    name, example = list(shown.items())[-1]
    trace = trace_lines(example, decode, color=False)
    made_from = [[key, str(value), str(meta["inputs"].get(key, ""))[:120]] for key, value in meta["made_from"].items()]
    provenance = ("What this was made from", ["input", "hash", "where it lay"], made_from)
    lines = ["# Feature-level speculative decoding: benchmark", "", note]
    for title, header, rows in (*parts, provenance):
        lines += ["", f"## {title}", "", markdown_table(header, rows)]
    lines += ["", f"## One prompt, {name}: kept, (rejected), [the target's own]", "", "```", *trace, "```"]
    lines += ["", *(f"![{picture}]({picture}.png)" for picture in PICTURES), ""]
    write_text(out / "report.md", "\n".join(lines))

    def cells(tag: str, row: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"

    def table(title: str, header: list[str], rows: list[list[str]]) -> str:
        inside = cells("th", header) + "".join(cells("td", r) for r in rows)
        return f"<h2>{html.escape(title)}</h2><div class=t><table>{inside}</table></div>"

    def picture(name: str) -> str:
        data = base64.b64encode((out / f"{name}.png").read_bytes()).decode()
        return f'<img alt="{name}" src="data:image/png;base64,{data}">'

    body = [f"<h1>Feature-level speculative decoding: benchmark</h1><p>{html.escape(note)}</p>", *(table(*part) for part in parts[:2])]
    body += [picture(name) for name in PICTURES] + [table(*part) for part in parts[2:]]
    told = html.escape("\n".join(trace))
    body += [f"<h2>One prompt, {html.escape(name)}: kept, (rejected), [the target's own]</h2><pre>{told}</pre>", table(*provenance)]
    head = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>benchmark</title><style>"
        "body{font:16px/1.5 sans-serif;max-width:1100px;margin:auto;padding:1em}table{border-collapse:collapse;font-size:.9em}"
        "td,th{border-bottom:1px solid #ccc;padding:.3em .7em;text-align:left;vertical-align:top}.t,pre{overflow-x:auto}"
        "td:last-child{min-width:9em}img{max-width:100%;display:block;margin:1em 0}</style>"
    )
    write_text(out / "report.html", head + "".join(body) + "</html>")
