"""A benchmark for people: tables on the console, report.md, one self-contained report.html, two pictures."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from feature_alignment import plots
from feature_alignment.artifacts import write_text
from feature_alignment.console import print_table, rate_text

Table = tuple[str, list[str], list[list[str]]]


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}" if isinstance(value, float) else f"{value:,}"


def tables(result: dict[str, Any]) -> list[Table]:
    """Everything a reader needs first, as plain strings."""
    rows, cost, base = result["rows"], result["cost"], result["baselines"][0]
    speed = [
        [
            f"{r['draft']} + {r['accept']}, {r['drafts_per_round']}",
            rate_text(r["speedup"], 2, unit="x"),
            rate_text(r["decode_speedup"], 2, unit="x"),
            _number(r["tokens_per_pass"]),
            _number(r["acceptance_rate"]["value"], 3),
            _number(r["exact_match"], 3),
            _number(r["modelled_speedup"]),
            _number(r["corrected_speedup"]),
        ]
        for r in rows
    ]
    lossy = []
    for r in rows:
        if r["accept"] == "token":
            continue
        f = r["fidelity"]
        kept = f.get("kept_drafts")
        lossy.append(
            [
                f"{r['draft']} + {r['accept']}, cosine > {r['threshold']}",
                _number(r["exact_match"], 3),
                _number(f["token_agreement"]["value"], 3),
                _number(f["log_likelihood"]["value"], 3),
                *[_number(f[k]["value"], 3) if k in f else "-" for k in ("true_facts_visible", "true_facts_hidden")],
                f"{kept['same']} / {kept['synonym']} / {kept['error']}" if kept else "-",
            ]
        )
    goals = [
        [
            t["metric"],
            t["target"],
            rate_text({"value": t["measured"], "ci95": t["ci95"] or (None, None)}, 0 if isinstance(t["measured"], int) else 3),
            "met" if t["met"] else "NOT MET",
            t["note"],
        ]
        for t in result["targets"]
    ]
    costs = [
        ["one draft step of EventGPT", f"{cost['t_draft_ms']:.3f}"],
        ["hidden adapter, one token", f"{cost['t_adapter_ms']:.3f}"],
        ["chained adapter, one token", _number(cost["t_chained_ms"], 3)],
        ["target's head, one token", f"{cost['t_head_ms']:.3f}"],
        ["one step of Video-LLaVA", f"{cost['t_target_ms']:.3f}"],
        ["c = all of an aligned draft / target step", f"{cost['c']:.3f}"],
        ["c of a chained draft (no step of EventGPT)", _number(cost["c_chained"], 3)],
    ]
    costs += [[f"v({k}) = verifying {k} tokens / target step", f"{v:.3f}"] for k, v in cost["v"].items()]
    seconds, prefill = base["total_ms"] / 1e3, base["prefill_ms"] / 1e3
    size = f"{base['prompts']} prompts, {base['tokens']:,} tokens, {seconds:.1f} s ({prefill:.1f} s prefill)"
    title = f"Speed against plain greedy decoding: {size}"
    return [
        ("The six targets", ["metric", "target", "measured [95 % interval]", "", "note"], goals),
        (
            title,
            [
                "drafts + rule, drafts per round",
                "speed-up, end to end",
                "decoding",
                "tokens per pass",
                "acceptance",
                "exact match",
                "modelled",
                "corrected",
            ],
            speed,
        ),
        (
            "What the lossy rules change",
            [
                "rule",
                "exact match",
                "token agreement",
                "log-likelihood",
                "visible facts true",
                "hidden facts true",
                "kept: same / synonym / error",
            ],
            lossy,
        ),
        ("Costs (ms, median) ", ["part", "value"], costs),
    ]


def print_benchmark(result: dict[str, Any]) -> None:
    for title, header, rows in reversed(tables(result)):  # the targets last: they stay on the screen
        print_table(title, header, rows)


def write_benchmark_report(result: dict[str, Any], out: Path) -> None:
    """report.md and report.html with their pictures beside them."""
    plots.speedup_bars(result["rows"], out / "speedup.png")
    plots.stage_stack(result["baselines"][0], result["rows"], out / "stages.png")
    parts = tables(result)
    meta = result["meta"]
    note = (
        f"{meta['device']}, {meta['dtype']}, {meta['machine']['threads']} thread(s), torch {meta['packages']['torch']}, "
        f"commit {meta['git_commit']}, {meta['created']}. Speed-up is the sum of baseline seconds over the sum of method seconds, "
        "end to end; brackets are 95 % intervals over clips."
    )
    lines = ["# Feature-level speculative decoding: benchmark", "", note]
    for title, header, rows in parts:
        lines += [
            "",
            f"## {title.strip()}",
            "",
            "| " + " | ".join(header) + " |",
            "|" + "---|" * len(header),
            *["| " + " | ".join(r) + " |" for r in rows],
        ]
    lines += ["", "![speed-up](speedup.png)", "", "![stages](stages.png)", ""]
    write_text(out / "report.md", "\n".join(lines))

    def cells(tag: str, row: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"

    body = [f"<h1>Feature-level speculative decoding: benchmark</h1><p>{html.escape(note)}</p>"]
    for title, header, rows in parts:
        body.append(
            f"<h2>{html.escape(title)}</h2><div class=t><table>{cells('th', header)}{''.join(cells('td', r) for r in rows)}</table></div>"
        )
    for name in ("speedup", "stages"):
        data = base64.b64encode((out / f"{name}.png").read_bytes()).decode()
        body.append(f'<img alt="{name}" src="data:image/png;base64,{data}">')
    head = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>benchmark</title><style>"
        "body{font:16px/1.5 sans-serif;max-width:1100px;margin:auto;padding:1em}table{border-collapse:collapse}"
        "td,th{border-bottom:1px solid #ccc;padding:.3em .7em;text-align:left}.t{overflow-x:auto}img{max-width:100%;display:block}</style>"
    )
    write_text(out / "report.html", head + "".join(body) + "</html>")
