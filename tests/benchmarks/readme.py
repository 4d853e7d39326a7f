"""Writes the measured tables of README.md and TASKS.md anew, from the JSON files of a whole run.

    bash run_all.sh
    python tests/benchmarks/readme.py               prints what the text around the tables should say, too

Rows about adapters that the run has not trained are left out. tests/test_readme.py then holds every number against its file.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from feature_alignment.console import rate_text
from feature_alignment.rows import row_name

ROOT = Path(__file__).parents[2]
TABLE = r"^{head}.*\n(?:\|.*\|\n)+(?:\n*<!-- \S+\.json(?:.|\n)*?-->\n)*"


def table(header: str, rows: list[list[str]], *sources: str) -> str:
    lines = [header, "|" + "---|" * (header.count("|") - 1), *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join([*lines, *(f"\n<!-- {source}\n-->" for source in sources)]) + "\n"


def targets(benchmark: dict[str, Any], marked: bool) -> str:
    rows = []
    for t in benchmark["targets"]:
        measured = (
            rate_text({"value": t["measured"], "ci95": t["ci95"] or (None, None)}, 3) if t["measured"] < 100 else f"{t['measured']:,}"
        )
        rows.append([t["metric"], t["target"], f"{measured} ({t['note']})", "yes" if t["met"] else "no"])
    mark = f"benchmark/benchmark.json, made {benchmark['meta']['created']}\n* = targets[*] : target | measured, ci95, note | -"
    return table("| target | goal | measured [95 % interval] | met |", rows, *([mark] if marked else []))


def speedups(benchmark: dict[str, Any]) -> str:
    rows = [
        [
            row_name(r),
            *(rate_text(r[k], 2) for k in ("speedup", "decode_speedup")),
            f"{r['tokens_per_pass']:.2f}",
            f"{r['exact_match']:.3f}",
        ]
        for r in benchmark["rows"]
    ]
    mark = f"benchmark/benchmark.json, made {benchmark['meta']['created']}\n"
    mark += "* = rows[*] : speedup | decode_speedup | tokens_per_pass | exact_match"
    return table("| drafts + rule, drafts per round | speed-up, end to end | decoding | tokens per pass | exact match |", rows, mark)


def others(benchmark: dict[str, Any]) -> str:
    rows = [
        [b["name"], "1" if i == 0 else rate_text(b["speedup"], 2), rate_text(b["best_over_it"], 2)]
        for i, b in enumerate(benchmark["baselines"])
    ]
    mark = f"benchmark/benchmark.json, made {benchmark['meta']['created']}"
    mark += "".join(
        f"\n{b['name']} = baselines[{b['name']}] : {'-' if i == 0 else 'speedup'} | best_over_it"
        for i, b in enumerate(benchmark["baselines"])
    )
    return table("| Video-LLaVA alone, or by transformers | against our plain greedy | our fastest lossless row over it |", rows, mark)


def predictors(acceptance: dict[str, Any], comparison: dict[str, Any]) -> str:
    chains = {"chained": "chained", "chained, events of another clip": "chained, events of another clip"}
    chains["chained, without events (`--blind`)"] = "chained, without events"
    rows, marks = [], []
    for name, key in chains.items():
        if c := acceptance["chains"].get(key):
            steps = ", ".join(f"{s['token_match']['value']:.3f}" for s in c["steps"])
            parameters, seconds = f"{c['params']:,}", f"{c['seconds']:.1f}"
            match = f"{steps} at drafts 1 to {len(c['steps'])}"
            rows.append([name, rate_text(c["cosine"], 3), match, f"{c['tokens_per_pass']:.2f}", parameters, seconds])
            marks.append(f"{name} = chains/{key} : cosine | steps/token_match | tokens_per_pass | params | seconds")
    single = {
        "hidden adapter": (".", acceptance),
        "the same by TASKS.md's recipe": ("plain", acceptance["plain"]),
        "ridge regression, same states": ("nulls/ridge", acceptance["nulls"]["ridge"]),
        "ridge of the adapter's rank": ("nulls/ridge_rank_r", acceptance["nulls"]["ridge_rank_r"]),
        "no adapter": ("nulls/identity", acceptance["nulls"].get("identity")),
        "mean per position": ("nulls/position_mean", acceptance["nulls"]["position_mean"]),
        "mean": ("nulls/target_mean", acceptance["nulls"]["target_mean"]),
    }
    for name, (path, r) in single.items():
        if r:
            match = rate_text(r["token_match"], 3)
            rows.append([name, rate_text(r["cosine"], 3), match, f"{r['tokens_per_pass']:.2f}", f"{r['params']:,}", f"{r['seconds']:.1f}"])
            marks.append(f"{name} = {path} : cosine | token_match | tokens_per_pass | params | seconds")
    ngram = comparison["nulls"]["ngram"]
    rows.append(["n-gram table (looks at nothing)", "", rate_text(ngram["token_match"], 3), f"{ngram['tokens_per_pass']:.2f}", "", ""])
    return table(
        "| predictor of Video-LLaVA's next state | cosine | token match | tokens per pass at 5 drafts | parameters | seconds to train |",
        rows,
        "\n".join([f"acceptance/acceptance.json, made {acceptance['meta']['created']}", *marks]),
        f"token_baseline/comparison.json, made {comparison['meta']['created']}\n"
        "n-gram table (looks at nothing) = nulls/ngram : - | token_match | tokens_per_pass | - | -",
    )


def kept(comparison: dict[str, Any]) -> str:
    keys = ("kept", "same", "synonym", "other_fact", "other_word")
    at = {name: next(r for r in sweep if abs(r["threshold"] - 0.9) < 1e-6) for name, sweep in comparison["kept_by_cosine"].items()}
    mark = f"token_baseline/comparison.json, made {comparison['meta']['created']}"
    mark += "".join(f"\n{name} = kept_by_cosine/{name}[{r['threshold']}] : {' | '.join(keys)}" for name, r in at.items())
    header = "| kept at a cosine above 0.90 | drafts kept | the same word | a synonym | another fact | another word |"
    return table(header, [[name, *(f"{r[k]:,}" for k in keys)] for name, r in at.items()], mark)


def certified(acceptance: dict[str, Any]) -> list[str]:
    found = {"hidden": ("calibration", acceptance["calibration"])}
    found["chained"] = ("chains/chained/calibration", acceptance["chains"].get("chained", {}).get("calibration"))
    found = {name: (path, c) for name, (path, c) in found.items() if c and c["threshold"] is not None}
    mark = f"acceptance/acceptance.json, made {acceptance['meta']['created']}"
    mark += "".join(f"\n{name} = {path} : threshold | kept | risk_on_test" for name, (path, _) in found.items())
    rows = [[name, f"{c['threshold']:.3f}", f"{c['kept']:.3f}", f"{100 * c['risk_on_test']:.1f} %"] for name, (_, c) in found.items()]
    header = "| adapter | threshold | kept of these clips' drafts | kept drafts that differ on the test clips |"
    return [table(header, rows, mark)] if rows else []  # a run without --calibrate leaves the last one's


def of_tasks(out: Path, benchmark: dict[str, Any], acceptance: dict[str, Any], comparison: dict[str, Any]) -> list[str]:
    """What was measured of each box of TASKS.md, in their order."""
    read = lambda name: json.loads(next(out.glob(name)).read_text())  # noqa: E731
    train, answer = read("hidden_states/train/meta.json"), read("sd/test-*.json")
    on_validation = [
        f"{name} cosine {m['validation']['cosine']:.3f}, token match {m['validation']['token_match']:.3f}, {m['seconds']:.0f} s"
        for name, m in (("hidden", read("adapter/meta.json")), ("chained", read("chained_adapter/meta.json")))
    ]
    rules = [
        f"{name} {at['consecutive_accept']['value']:.3f} consecutive, {at['relaxed_accept']['value']:.3f} relaxed"
        for name, at in (("hidden", acceptance["thresholds"]["0.90"]), ("chained", acceptance["chains"]["chained"]["thresholds"]["0.90"]))
    ]
    level, own = comparison["token_level"], comparison["own_drafts"]
    best = benchmark["fastest_lossless"]
    errors = [abs(r["corrected_error"]) for r in benchmark["rows"] if r["corrected_speedup"] and not r["adaptive"]]
    met = sum(t["met"] for t in benchmark["targets"])
    return [
        f"{train['rows']:,} rows, {train['positions']:,} positions.",
        "2,101,504 parameters.",
        f"on validation {'; '.join(on_validation)}.",
        f"at cosine > 0.90 {'; '.join(rules)}.",
        f"same token at the same place {level['position_match']['value']:.2%}; EventGPT's own drafts on the same prefix right at "
        f"{own['token_match']['value']:.3f}, aligned at {acceptance['token_match']['value']:.3f}.",
        f"the same text as plain decoding: {'yes' if answer['exact_match'] else 'no'}, {answer['tokens_per_pass']:.2f} tokens per pass.",
        f"{rate_text(best['speedup'], 2, unit='x')} end to end, {rate_text(best['decode_speedup'], 2, unit='x')} in decoding.",
        f"corrected formula within {max(errors):.0%} in every row of a fixed length; {met} of {len(benchmark['targets'])} targets met.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "outputs" / "demo")
    out = parser.parse_args().out
    files = ("benchmark/benchmark.json", "acceptance/acceptance.json", "token_baseline/comparison.json")
    benchmark, acceptance, comparison = (json.loads((out / name).read_text()) for name in files)
    made = {
        "README.md": [
            targets(benchmark, True),
            speedups(benchmark),
            others(benchmark),
            predictors(acceptance, comparison),
            kept(comparison),
        ],
        "TASKS.md": [targets(benchmark, False)],
    }
    made["README.md"] += certified(acceptance)
    for name, tables in made.items():
        path = ROOT / name
        text = path.read_text()
        if name == "TASKS.md":
            measured = iter(of_tasks(out, benchmark, acceptance, comparison))
            text = re.sub(r"^      Measured: .*$", lambda _: f"      Measured: {next(measured)}", text, flags=re.MULTILINE)  # noqa: B023
        for new in tables:
            head = re.escape(" | ".join(new.split(" | ")[:2]))
            text, count = re.subn(TABLE.format(head=head), lambda _, new=new: new, text, flags=re.MULTILINE)
            if count != 1:
                raise SystemExit(f"{name} has {count} tables that begin with {head}; wanted one.")
        path.write_text(text)
    errors = [r["corrected_error"] for r in benchmark["rows"] if r["corrected_speedup"]]
    print(f"corrected formula: {min(errors):+.1%} to {max(errors):+.1%}")
    print("modelled:", [f"{r['modelled_error']:+.1%}" for r in benchmark["rows"] if r["modelled_speedup"]])
    print("bound:", json.dumps(benchmark["cost"]["bound"]))


if __name__ == "__main__":
    main()
