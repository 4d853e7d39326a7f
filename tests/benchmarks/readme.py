"""Generates the measured parts of README.md, TASKS.md and docs/*.md from the JSON files of a whole run.

    bash run_all.sh
    python tests/benchmarks/readme.py
    python tests/benchmarks/readme.py --language outputs/language     keeps its results in data/results/language

Replaced are the measured tables (found by their first two header cells), the text between `<!-- text NAME … -->` and
`<!-- /text NAME -->`, and the boxes and `Measured:` lines of TASKS.md. Rows about adapters that the run has not trained are left out.
tests/test_readme.py compares every number with its result file, and every document with what this script generates.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.benchmark.results import BenchmarkRow, rule_name
from feature_alignment.cli.console import rate_text
from feature_alignment.decoding.baseline_drafters import BASELINE_DRAFTERS
from feature_alignment.decoding.settings import COSINE_RULES

ROOT = Path(__file__).parents[2]
MEASURED_7B = "data/results/h100_random_7b"
LANGUAGE = "data/results/language"
LANGUAGE_FILES = (
    "benchmark/benchmark.json",
    "acceptance/acceptance.json",
    "token_baseline/comparison.json",
    "ablations/ablations.json",
    "ablations/ablations_2880.json",
)
ENGLISH_FILES = ("benchmark/benchmark.json", "acceptance/acceptance.json", "ablations/ablations.json")
TABLE = r"^{head}.*\n(?:\|.*\|\n)+(?:\n*<!-- \S+\.json(?:.|\n)*?-->\n)*"
TEXT = re.compile(r"<!-- text (\w+)[^\n]*-->\n((?:.|\n)*?)<!-- /text \1 -->")
BOX = re.compile(r"- \[[ x]\] (\*\*\d\.\d (?:.|\n)*?\n      Measured: ).*")
HEADLINE_ROWS = [  # drafter, rule, draft length; the fastest lossless row comes first
    ("chained", "token", "5"),
    ("aligned", "token", "5"),
    ("own", "token", "5"),
    ("ngram", "token", "5"),
    ("chained", "feature", "5"),
    ("chained", "relaxed", "5"),
    ("aligned", "relaxed", "5"),
]


@dataclass(frozen=True)
class Run:
    """The result files of one run: `out` is its output directory, e.g. outputs/demo; `name` comes before their names in documents."""

    out: Path
    name: str = ""

    def read(self, pattern: str) -> dict[str, Any]:
        return json.loads(next(self.out.glob(pattern)).read_text())

    @cached_property
    def benchmark(self) -> dict[str, Any]:
        return self.read("benchmark/benchmark.json")

    @cached_property
    def acceptance(self) -> dict[str, Any]:
        return self.read("acceptance/acceptance.json")

    @cached_property
    def comparison(self) -> dict[str, Any]:
        return self.read("token_baseline/comparison.json")

    @cached_property
    def lossy_rules(self) -> dict[str, Any] | None:
        """None in runs of earlier versions."""
        path = self.out / "benchmark" / "lossy_rules.json"
        return json.loads(path.read_text()) if path.is_file() else None

    @property
    def made(self) -> dict[str, str]:
        """Result file -> when it was made."""
        files = {"benchmark/benchmark.json": self.benchmark, "acceptance/acceptance.json": self.acceptance}
        files["token_baseline/comparison.json"] = self.comparison
        files |= {"benchmark/lossy_rules.json": self.lossy_rules} if self.lossy_rules else {}
        files |= {name: self.read(name) for name in ["ablations/ablations.json"] if (self.out / name).is_file()}
        return {f"{self.name}{name}": content["meta"]["created"] for name, content in files.items()}

    def row(self, draft: str, accept: str, length: str) -> dict[str, Any]:
        wanted = (draft, accept, length)
        return next(r for r in self.benchmark["rows"] if (r["draft"], r["accept"], r["drafts_per_round"]) == wanted)


def row_name(row: dict[str, Any]) -> str:
    """Name of an entry of benchmark.json's `rows`."""
    return BenchmarkRow.from_json(row).name


# ---- tables


def table(header: str, rows: list[list[str]], *sources: str) -> str:
    lines = [header, "|" + "---|" * (header.count("|") - 1), *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join([*lines, *(f"\n<!-- {source}\n-->" for source in sources)]) + "\n"


def targets(run: Run) -> str:
    rows = []
    for t in run.benchmark["targets"]:
        rate = {"value": t["measured"], "ci95": t["ci95"] or (None, None)}
        measured = rate_text(rate, 3) if t["measured"] < 100 else f"{t['measured']:,}"
        rows.append([t["metric"], t["target"], f"{measured} ({t['note']})", "yes" if t["met"] else "no"])
    mark = (
        f"{run.name}benchmark/benchmark.json, made {run.benchmark['meta']['created']}\n* = targets[*] : target | measured, ci95, note | -"
    )
    return table("| target | goal | measured [95 % interval] | met |", rows, mark)


def speedups(run: Run, shown: Iterable[dict[str, Any]]) -> str:
    rows = [
        [
            row_name(r),
            *(rate_text(r[k], 2) for k in ("speedup", "decode_speedup")),
            f"{r['tokens_per_pass']:.2f}",
            f"{r['exact_match']:.3f}",
        ]
        for r in shown
    ]
    mark = f"{run.name}benchmark/benchmark.json, made {run.benchmark['meta']['created']}\n"
    mark += "* = rows[*] : speedup | decode_speedup | tokens_per_pass | exact_match"
    return table("| drafter + rule, draft length | speed-up, end to end | decoding | tokens per pass | exact match |", rows, mark)


def headline_rows(run: Run) -> str:
    return speedups(run, [_fastest_row(run), *(run.row(*row) for row in HEADLINE_ROWS)])


def others(run: Run) -> str:
    baselines = run.benchmark["baselines"]
    rows = [[b["name"], "1" if i == 0 else rate_text(b["speedup"], 2), rate_text(b["best_over_it"], 2)] for i, b in enumerate(baselines)]
    mark = f"{run.name}benchmark/benchmark.json, made {run.benchmark['meta']['created']}"
    mark += "".join(
        f"\n{b['name']} = baselines[{b['name']}] : {'-' if i == 0 else 'speedup'} | best_over_it" for i, b in enumerate(baselines)
    )
    return table("| Video-LLaVA alone, or by transformers | against our plain greedy | our fastest lossless row over it |", rows, mark)


def predictors(run: Run) -> str:
    acceptance, comparison = run.acceptance, run.comparison
    chains = {"chained": "chained", "chained, events of another clip": "chained, events of another clip"}
    chains["chained, without events (`--blind`)"] = "chained, without events"
    rows, marks = [], []
    for name, key in chains.items():
        if c := acceptance["chains"].get(key):
            steps = ", ".join(f"{s['token_match']['value']:.3f}" for s in c["steps"])
            parameters, seconds = f"{c['params']:,}", f"{c['seconds']:.1f}"
            match = f"{steps} at draft tokens 1 to {len(c['steps'])}"
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
    rows.append(["n-gram table (sees no image)", "", rate_text(ngram["token_match"], 3), f"{ngram['tokens_per_pass']:.2f}", "", ""])
    return table(
        "| predictor of Video-LLaVA's next state | cosine | token match | tokens per pass at draft length 5 | parameters "
        "| seconds to train |",
        rows,
        "\n".join([f"acceptance/acceptance.json, made {acceptance['meta']['created']}", *marks]),
        f"token_baseline/comparison.json, made {comparison['meta']['created']}\n"
        "n-gram table (sees no image) = nulls/ngram : - | token_match | tokens_per_pass | - | -",
    )


def judged(run: Run) -> str:
    keys = ("kept", "same", "synonym", "other_fact", "other_word")
    at = {name: next(r for r in sweep if abs(r["threshold"] - 0.9) < 1e-6) for name, sweep in run.comparison["kept_by_cosine"].items()}
    mark = f"token_baseline/comparison.json, made {run.comparison['meta']['created']}"
    mark += "".join(f"\n{name} = kept_by_cosine/{name}[{r['threshold']}] : {' | '.join(keys)}" for name, r in at.items())
    header = "| accepted at a cosine above 0.90 | draft tokens accepted | the same word | a synonym | another fact | another word |"
    return table(header, [[name, *(f"{r[k]:,}" for k in keys)] for name, r in at.items()], mark)


def certified(run: Run) -> list[str]:
    """The table of certified thresholds; none from a run without --calibrate, so that the document keeps the last one's."""
    found = {"hidden": ("calibration", run.acceptance["calibration"])}
    found["chained"] = ("chains/chained/calibration", run.acceptance["chains"].get("chained", {}).get("calibration"))
    found = {name: (path, c) for name, (path, c) in found.items() if c and c["threshold"] is not None}
    mark = f"acceptance/acceptance.json, made {run.acceptance['meta']['created']}"
    mark += "".join(f"\n{name} = {path} : threshold | kept | risk_on_test" for name, (path, _) in found.items())
    rows = [[name, f"{c['threshold']:.3f}", f"{c['kept']:.3f}", f"{100 * c['risk_on_test']:.1f} %"] for name, (_, c) in found.items()]
    header = "| adapter | threshold | accepted, of these clips' draft tokens | accepted draft tokens that differ on the test clips |"
    return [table(header, rows, mark)] if rows else []


def gpu_tables() -> list[str]:
    """Tables of the GPU run whose result files are part of the repository."""
    names = {"this code, one prompt": "step/planted.json", "run of the next table, attention in chunks": "planted.json"}
    runs = {name: (f"{MEASURED_7B}/{file}", json.loads((ROOT / MEASURED_7B / file).read_text())) for name, file in names.items()}
    steps, exits, step_marks, exit_marks = [], [], [], []
    layers = ("2", "4", "8", "16", "32")
    for name, (file, content) in runs.items():
        cost = content["cost"]
        step_ms, share = f"{cost['t_target_ms']:.2f} ms", f"{100 * cost['bandwidth']['share']:.1f} %"
        verify, adapters = [f"{cost['v'][k]:.3f}" for k in ("6", "32")], [f"{cost[k]:.3f} ms" for k in ("t_adapter_ms", "t_chained_ms")]
        steps.append([name, step_ms, share, *verify, *adapters])
        made = f"{file}, made {content['meta']['created']}\n{name} = cost"
        step_marks.append(f"{made} : t_target_ms | bandwidth/share | v/6 | v/32 | t_adapter_ms | t_chained_ms")
        c = [cost["exit_layers"][k]["c"] for k in layers]
        eager = [i + 1 < len(c) and c[i] > c[i + 1] for i in range(len(c))]  # costs more than twice the layers: its capture failed
        exits.append([name, *("-" if slow else f"{value:.3f}" for value, slow in zip(c, eager, strict=True))])
        exit_marks.append(f"{made} : {' | '.join('-' if s else f'exit_layers/{k}/c' for k, s in zip(layers, eager, strict=True))}")
    planted = json.loads((ROOT / MEASURED_7B / "planted.json").read_text())
    best = [
        [
            f"{b['draft']}, {b['planted_acceptance']}",
            str(b["num_draft_tokens"]),
            rate_text(b["speedup"], 2),
            f"{b['decode_speedup']['value']:.2f}",
        ]
        for b in planted["best"]
    ]
    mark = f"{MEASURED_7B}/planted.json, made {planted['meta']['created']}\n* = best[*] : num_draft_tokens | speedup | decode_speedup"
    header = (
        "| compiled steps | one step of Video-LLaVA, LM head included | share of a plain copy's bandwidth (goal: 70 %) | v(6) (goal: 1.15) "
    )
    header += "| v(32) | hidden adapter, a token (goal: 0.1 ms) | chained adapter, a token |"
    return [
        table(header, steps, *step_marks),
        table(f"| c at EventGPT's layer | {' | '.join(layers)} |", exits, *exit_marks),
        table("| PLANTED acceptance: only the wall clock is real | best draft length | end to end | decoding |", best, mark),
    ]


def language_tables() -> list[str]:
    """The tables of docs/language.md, from the results kept in git."""
    run = Run(ROOT / LANGUAGE, f"{LANGUAGE}/")
    shown = [r for r in run.benchmark["rows"] if r["accept"] == "token"]
    counted = drafters(run, "ablations.json", "11,520"), drafters(run, "ablations_2880.json", "2,880", paired=True)
    return [targets(run), *counted, speedups(run, shown), *costs(run)]


def drafters(run: Run, file: str, answers: str, paired: bool = False) -> str:
    """Tokens per pass of tables and of variants of the attending adapter, on the texts of the test split.

    Args:
        run: the run
        file: of ablations/
        answers: number of training answers, for the header
        paired: with the difference to `full` at 5 draft tokens
    """
    ablations, rows, marks = run.read(f"ablations/{file}"), [], []
    scores = "first_draft_right | tokens_per_pass/5 | tokens_per_pass/8"
    to_full = " | tokens_per_pass/5/difference, tokens_per_pass/5/difference_ci95"
    for r in ablations["rows"]:
        five, eight = (r["tokens_per_pass"][length] for length in ("5", "8"))
        trained = [f"{r[key]:,}" if key in r else "" for key in ("rows", "steps")]
        row = [r["name"], *trained, f"{r['first_draft_right']:.3f}", rate_text(five, 2), rate_text(eight, 2)]
        if paired:
            row.append(rate_text({"value": five["difference"], "ci95": five["difference_ci95"]}, 2) if "difference" in five else "")
        rows.append(row)
        mark = f"{'rows | steps' if 'rows' in r else '- | -'} | {scores}"
        mark += "" if not paired else to_full if row[-1] else " | -"
        marks.append(f"{r['name']} = rows[{r['name']}] : {mark}")
    header = f"| with {answers} training answers | rows | steps | first draft right | 5 drafts | 8 drafts |"
    made = f"{run.name}ablations/{file}, made {ablations['meta']['created']}"
    return table(header + " 5 drafts, less `full` |" * paired, rows, "\n".join([made, *marks]))


def costs(run: Run) -> list[str]:
    """What verifications and, at a fixed length, draft tokens cost, in passes of plain decoding."""
    cost, made = run.benchmark["cost"], f"{run.name}benchmark/benchmark.json, made {run.benchmark['meta']['created']}"
    pass_of = ["plain decoding", f"{cost['t_target_ms']:.2f}", *(f"{cost['v'][n]:.2f}" for n in ("6", "9"))]
    fixed = [d for d in cost["rounds"]["drafters"] if not d["adaptive"]]
    rows = [[d["draft"], f"{d['c']:.4f}", f"{d['r']:.3f}"] for d in fixed]
    marks = "".join(f"\n{d['draft']} = cost/rounds/drafters[{d['draft']} False] : c | r" for d in fixed)  # False: not adaptive
    return [
        table("| one pass of | ms | v(6) | v(9) |", [pass_of], f"{made}\nplain decoding = cost : t_target_ms | v/6 | v/9"),
        table("| drafter, fixed length | c: a draft token | r: the rest of a round |", rows, f"{made}{marks}"),
    ]


# ---- sentences


def headline(run: Run) -> str:
    fastest, best, best_baseline = run.benchmark["fastest_lossless"], _fastest_row(run), _best_baseline(run)
    most = max(r["tokens_per_pass"] for r in run.benchmark["rows"] if r["draft"] in BASELINE_DRAFTERS)
    met = [t["metric"] for t in run.benchmark["targets"] if t["met"]]
    missed = [t["metric"] for t in run.benchmark["targets"] if not t["met"]]
    return _lines(
        f"**On the embedded pair {len(met)} of {len(met) + len(missed)} targets are met"
        + (f"; not met: {', '.join(missed)}" if missed else "")
        + f".** The fastest lossless mode (`{row_name(best)}`) is **{rate_text(fastest['speedup'], 2, unit='x')}** end to end, "
        f"{rate_text(fastest['decode_speedup'], 2, unit='x')} in decoding (measured on clips that did not choose it), with "
        f"{best['tokens_per_pass']:.2f} tokens per pass of Video-LLaVA "
        f"and an exact match of {best['exact_match']:.3f}. Of the baseline drafters, which see no image, the fastest "
        f"(`{row_name(best_baseline)}`) is {rate_text(best_baseline['speedup'], 2, unit='x')} end to end, and none has more than "
        f"{most:.2f} tokens per pass."
    )


def failures(run: Run) -> str:
    hidden, baseline = run.row("aligned", "token", "5"), _best_baseline(run)
    cosine = rate_text(run.acceptance["cosine"], 3)
    chained, ngram = run.row("chained", "token", "5"), run.row("ngram", "token", "5")
    token, feature = (run.row("chained", rule, "5")["tokens_per_pass"] for rule in ("token", "feature"))
    changed = {d: 1 - run.row(d, "relaxed", "5")["exact_match"] for d in ("aligned", "chained")}
    generate = ", ".join(f"`{b['name']}` {rate_text(b['speedup'], 2, unit='x')}" for b in run.benchmark["baselines"][1:])
    items = [
        f"**The hidden adapter, the task's own idea**, has a cosine of {cosine} and is {rate_text(hidden['speedup'], 2, unit='x')} end to "
        f"end, {_against(hidden, baseline)} the best baseline drafter ({rate_text(baseline['speedup'], 2, unit='x')}).",
        f"**The chained adapter at a fixed draft length of 5** is {rate_text(chained['speedup'], 2, unit='x')}, "
        f"{_against(chained, ngram)} the n-gram table ({rate_text(ngram['speedup'], 2, unit='x')}), which sees no image.",
        f"**Cosine acceptance.** With chained draft tokens `feature` gives {feature:.2f} tokens per pass where `token` gives {token:.2f}. "
        f"`relaxed` changes {100 * changed['aligned']:.1f} % of the answers with aligned and {100 * changed['chained']:.1f} % with chained "
        "draft tokens.",
        f"**transformers' own decoding**, against our plain greedy decoding: {generate}.",
    ]
    return "\n".join(_lines(f"- {item}", indent="  ") for item in items)


def formulas(run: Run) -> str:
    fixed = [r for r in run.benchmark["rows"] if not r["adaptive"]]
    corrected, modelled = (max(abs(r[f"{kind}_error"]) for r in fixed if r[f"{kind}_speedup"]) for kind in ("corrected", "modelled"))
    return _lines(
        f"The corrected formula, S = tokens / Σ (g·c + v(g + 1) + r), is within {100 * corrected:.1f} % of the measured decoding speed-up "
        f"in every row of a fixed draft length. TASKS.md's formula is off by up to {100 * modelled:.1f} % because "
        "it assumes that verification is free."
    )


def synonyms(run: Run) -> str:
    own = next(r for r in run.comparison["kept_by_cosine"]["own"] if abs(r["threshold"] - 0.9) < 1e-6)
    share = (own["other_fact"] + own["other_word"]) / own["kept"]
    return _lines(
        f"Of EventGPT's own words that the same cosines accept, {100 * share:.1f} % are another word or another fact. A cosine between "
        "hidden states tells whether Video-LLaVA's next state was predicted, not whether the word is as good."
    )


def lossy(run: Run) -> str:
    sweep, floor = run.lossy_rules, 0.99
    assert sweep is not None
    best: dict[str, dict[str, Any]] = {}
    for point in sweep["points"]:
        found = best.get(point["accept"])
        is_faithful = point["fidelity"]["token_agreement"]["value"] >= floor
        if is_faithful and (found is None or point["tokens_per_pass"]["value"] > found["tokens_per_pass"]["value"]):
            best[point["accept"]] = point
    exact = sweep["lossless"]["tokens_per_pass"]
    reached = [f"`{rule_name(rule, p['threshold'])}` {rate_text(p['tokens_per_pass'], 2)}" for rule, p in best.items()]
    above = [f"`{rule}`" for rule, p in best.items() if p["tokens_per_pass"]["ci95"][0] > exact["ci95"][1]]
    cosine = max((best[rule]["tokens_per_pass"]["value"] for rule in COSINE_RULES if rule in best), default=0.0)
    verdict = (
        f"Beyond noise, the lossless rule is beaten by {', '.join(above)}" if above else "No lossy rule beats the lossless one beyond noise"
    )
    others = max((p["tokens_per_pass"]["value"] for rule, p in best.items() if rule not in COSINE_RULES), default=0.0)
    return _lines(
        f"**{verdict}.** Of the thresholds with a token agreement of at least {floor}, these have the most tokens per pass: "
        f"{', '.join(reached)}; the lossless `token` "
        f"has {rate_text(exact, 2)} ({sweep['draft']} draft tokens, {sweep['num_draft_tokens']} a round, {sweep['prompts']} prompts, "
        f"untimed). The best cosine rule is {'above' if cosine > others else 'not above'} the best rule that compares no hidden states."
    )


def real_english(run: Run) -> str:
    best, ours = _table_and_adapter(run)
    chained, five = run.acceptance["chains"]["chained"]["tokens_per_pass"], [r["tokens_per_pass"]["5"]["value"] for r in (best, ours)]
    attending, tables = (_fastest_of(run, draft)["decode_speedup"] for draft in ("attending", "tables"))
    return _lines(
        f"- **Real English is harder.** On SmolLM2-135M's own answers the best free table has {five[0]:.2f} tokens per pass at 5 draft "
        f"tokens, `chained` {chained:.2f}, `attending` {five[1]:.2f}: {100 * (five[1] / five[0] - 1):+.0f} % (goal: +37 %). Decoding: "
        f"{attending['value']:.2f}x, with tables alone {tables['value']:.2f}x ([docs/language.md](docs/language.md)).",
        indent="  ",
    )


def findings(run: Run) -> str:
    """What the tables of docs/language.md show."""
    best, ours = _table_and_adapter(run)
    gain = {g: ours["tokens_per_pass"][g]["value"] / best["tokens_per_pass"][g]["value"] - 1 for g in ("5", "8")}
    apart = all(ours["tokens_per_pass"][g]["ci95"][0] > best["tokens_per_pass"][g]["ci95"][1] for g in gain)
    five, eight = ("met" if gain[length] >= goal else "missed" for length, goal in {"5": 0.37, "8": 0.45}.items())
    wrong = [100 * (1 - row["first_draft_right"]) for row in (best, ours)]
    chains = {name: chain["tokens_per_pass"] for name, chain in run.acceptance["chains"].items()}
    of_table = best["tokens_per_pass"]["5"]["value"]
    beats = "beats" if chains["chained"] > of_table else "does not beat"
    fastest, tables = _fastest_of(run, "attending"), _fastest_of(run, "tables")
    ratio = fastest["decode_speedup"]["value"] / tables["decode_speedup"]["value"]
    exact = all(r["exact_match"] == 1 for r in run.benchmark["rows"] if r["accept"] == "token")
    items = [
        f"**The adapter {'beats every free table**, intervals apart' if apart else 'is within noise of the best free table**'}: "
        f"{100 * gain['5']:+.0f} % tokens per pass at 5 draft tokens (goal: +37 %, {five}) and {100 * gain['8']:+.0f} % at 8 (goal: "
        f"+45 %, {eight}). Of the first draft tokens "
        f"{wrong[0]:.1f} % are wrong with the best table and {wrong[1]:.1f} % with the adapter; the better the tables, the "
        "closer both are to the limit of one token more than was drafted.",
        f"**The chained adapter {beats} them**: {chains['chained']:.2f} tokens per pass at 5 draft tokens, the best table {of_table:.2f}.",
        f"**What the events add**: with the events of another clip the adapter goes from {chains['attending']:.2f} to "
        f"{chains['attending, events of another clip']:.2f}.",
        f"**What the prompt adds**: an adapter that also reads the target's states on it has {chains['attending, prompt']:.2f}.",
        f"**Speed**: `{row_name(fastest)}` is {rate_text(fastest['decode_speedup'], 2, unit='x')} in decoding (goal: 2.8) and "
        f"{rate_text(fastest['speedup'], 2, unit='x')} end to end; the best row of the tables, `{row_name(tables)}`, "
        f"{rate_text(tables['decode_speedup'], 2, unit='x')} and {rate_text(tables['speedup'], 2, unit='x')}. Their ratio in decoding is "
        f"{ratio:.2f} (goal: 1.25). {'All lossless texts equal plain decoding.' if exact else 'Not every lossless text equals it.'}",
    ]
    return "\n".join(_lines(f"- {item}", indent="  ") for item in items)


def _table_and_adapter(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows of ablations.json: the best zero-cost table at 5 draft tokens, and the run's own adapter."""
    rows = run.read("ablations/ablations.json")["rows"]
    free = [r for r in rows if "steps" not in r]
    return max(free, key=lambda r: r["tokens_per_pass"]["5"]["value"]), next(r for r in rows if r["name"] == "adapter of the run")


def _fastest_of(run: Run, draft: str) -> dict[str, Any]:
    """The lossless row of a drafter that decodes fastest."""
    lossless = (r for r in run.benchmark["rows"] if (r["draft"], r["accept"]) == (draft, "token"))
    return max(lossless, key=lambda r: r["decode_speedup"]["value"])


def _fastest_row(run: Run) -> dict[str, Any]:
    return next(r for r in run.benchmark["rows"] if row_name(r) == run.benchmark["fastest_lossless"]["row"])


def _best_baseline(run: Run) -> dict[str, Any]:
    return max((r for r in run.benchmark["rows"] if r["draft"] in BASELINE_DRAFTERS), key=lambda r: r["speedup"]["value"])


def _against(row: dict[str, Any], other: dict[str, Any]) -> str:
    """How a row's end-to-end speed-up compares with another's: their intervals must be apart to say more than noise."""
    (lo, hi), (other_lo, other_hi) = row["speedup"]["ci95"], other["speedup"]["ci95"]
    return "slower than" if hi < other_lo else "faster than" if lo > other_hi else "within noise of"


def _lines(text: str, indent: str = "") -> str:
    """The text in lines of at most 140 characters; intervals, code and percentages are not broken."""
    joined = re.sub(r"\[[^\]]*\]|`[^`]*`|\d %", lambda m: m[0].replace(" ", "\0"), text)
    return textwrap.fill(joined, 140, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False).replace("\0", " ")


# ---- TASKS.md


def of_tasks(run: Run) -> list[tuple[bool, str]]:
    """For each task of TASKS.md, in order: is it done in this run, and what was measured."""
    benchmark, acceptance, comparison = run.benchmark, run.acceptance, run.comparison
    splits = {split: run.read(f"hidden_states/{split}/meta.json") for split in ("train", "validation", "test")}
    train, answer = splits["train"], run.read("sd/test-*.json")
    adapters = {name: run.read(f"{folder}/meta.json") for name, folder in (("hidden", "adapter"), ("chained", "chained_adapter"))}
    on_validation = [
        f"{name} cosine {m['validation']['cosine']:.3f}, token match {m['validation']['token_match']:.3f}, {m['seconds']:.0f} s"
        for name, m in adapters.items()
    ]
    at = {"hidden": acceptance["thresholds"]["0.90"], "chained": acceptance["chains"]["chained"]["thresholds"]["0.90"]}
    rules = [
        f"{name} {rates['consecutive_accept']['value']:.3f} consecutive, {rates['relaxed_accept']['value']:.3f} relaxed"
        for name, rates in at.items()
    ]
    level, own = comparison["token_level"], comparison["own_drafts"]
    best, alone = benchmark["fastest_lossless"], run.row("aligned", "token", "5")
    errors = [abs(r["corrected_error"]) for r in benchmark["rows"] if r["corrected_speedup"] and not r["adaptive"]]
    met = sum(t["met"] for t in benchmark["targets"])
    parameters = HiddenAdapter(4096, 4096, 256).num_parameters
    return [
        (all(m["rows"] for m in splits.values()), f"{train['rows']:,} rows, {train['positions']:,} positions."),
        (parameters < 5_000_000, f"{parameters:,} parameters."),
        (len(adapters) == 2, f"on validation {'; '.join(on_validation)}."),
        (all(rates["consecutive_accept"]["total"] for rates in at.values()), f"at cosine > 0.90 {'; '.join(rules)}."),
        (
            level["position_match"]["total"] > 0,
            f"same token at the same position {100 * level['position_match']['value']:.2f} %; EventGPT's own draft tokens on the same "
            f"prefix correct at {own['token_match']['value']:.3f}, aligned at {acceptance['token_match']['value']:.3f}.",
        ),
        (
            bool(answer["exact_match"]),
            f"the same text as plain decoding: {'yes' if answer['exact_match'] else 'no'}, "
            f"{answer['tokens_per_pass']:.2f} tokens per pass.",
        ),
        (
            bool(benchmark["baselines"]),
            f"{rate_text(best['speedup'], 2, unit='x')} end to end, {rate_text(best['decode_speedup'], 2, unit='x')} in decoding.",
        ),
        (
            len(benchmark["targets"]) == 6,
            f"corrected formula within {100 * max(errors):.0f} % in every row of a fixed length; {met} of 6 targets met.",
        ),
        (
            all(rate["ci95"][0] > goal for rate, goal in ((acceptance["cosine"], 0.9), (alone["speedup"], 1.3))),
            f"cosine {rate_text(acceptance['cosine'], 3)}, speed-up {rate_text(alone['speedup'], 2, unit='x')} end to end "
            f"(`{row_name(alone)}`).",
        ),
    ]


# ---- documents

TEXTS = {
    "headline": (headline, ["benchmark/benchmark.json"]),
    "failures": (failures, ["benchmark/benchmark.json", "acceptance/acceptance.json"]),
    "formulas": (formulas, ["benchmark/benchmark.json"]),
    "synonyms": (synonyms, ["token_baseline/comparison.json"]),
    "lossy": (lossy, ["benchmark/lossy_rules.json"]),
    "english": (real_english, [f"{LANGUAGE}/{file}" for file in ENGLISH_FILES]),
    "findings": (findings, [f"{LANGUAGE}/{file}" for file in ENGLISH_FILES]),
}


def tables_of(name: str, run: Run) -> list[str]:
    """The generated tables of a document."""
    if name == "docs/results.md":
        return [targets(run), speedups(run, run.benchmark["rows"]), others(run), predictors(run), judged(run), *certified(run)]
    return {
        "README.md": lambda: [targets(run), headline_rows(run)],
        "TASKS.md": lambda: [targets(run)],
        "docs/gpu.md": gpu_tables,
        "docs/language.md": language_tables,
    }[name]()


def rendered(name: str, text: str, run: Run) -> str:
    """A document with its measured parts from a run."""
    for new in tables_of(name, run):
        head = re.escape(" | ".join(new.split(" | ")[:2]))
        text, count = re.subn(TABLE.format(head=head), lambda _, new=new: new, text, flags=re.MULTILINE)
        if count != 1:
            raise SystemExit(f"{name} has {count} tables that begin with {head}; wanted one.")

    def sentences(match: re.Match[str]) -> str:
        make, files = TEXTS[match[1]]
        source = Run(ROOT / LANGUAGE, f"{LANGUAGE}/") if files[0].startswith(LANGUAGE) else run
        if not set(files) <= set(source.made):
            return match[0]
        made = "; ".join(f"{file} made {source.made[file]}" for file in files)
        return f"<!-- text {match[1]}, from {made} -->\n{make(source)}\n<!-- /text {match[1]} -->"

    text = TEXT.sub(sentences, text)
    if name == "TASKS.md":
        measured = iter(of_tasks(run))

        def box(match: re.Match[str]) -> str:
            done, found = next(measured)
            return f"- [{'x' if done else ' '}] {match[1]}{found}"

        text = BOX.sub(box, text)
    return text


DOCUMENTS = ("README.md", "TASKS.md", "docs/results.md", "docs/gpu.md", "docs/language.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "outputs" / "demo")
    parser.add_argument("--language", type=Path, help="output directory of a run of the language pair, whose results are kept in git")
    args = parser.parse_args()
    if args.language:
        for name in LANGUAGE_FILES:
            (ROOT / LANGUAGE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(args.language / name, ROOT / LANGUAGE / name)
    run = Run(args.out)
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(rendered(name, path.read_text(), run))


if __name__ == "__main__":
    main()
