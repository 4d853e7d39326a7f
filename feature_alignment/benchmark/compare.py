"""Two benchmarks beside each other: which rows differ by more than their intervals, and whether they may be compared at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from feature_alignment.benchmark.rows import row_name
from feature_alignment.cli.console import UserError, log, print_json_line, print_table, rate_text
from feature_alignment.storage.files import read_hashed_json

RUN = "python feature_alignment/benchmark_feature_sd.py --config CONFIG"  # `compare` reads no config
MUST = ("max_new_tokens", "split", "limit", "questions")  # of the config: other texts, or other prompts


def compare(paths: list[str]) -> dict[str, Any]:
    """Print the rows that two benchmark.json have in common, B against A; returns what differs.

    raises: UserError where device, dtype, prompts, clips or lengths differ: their speed-ups are of different things. Other machines,
    packages or checkpoints are said, and compared
    """
    if len(paths) != 2:
        raise UserError(f"compare wants two files, got {len(paths)}: benchmark_feature_sd.py compare A.json B.json")
    a, b = (read_hashed_json(Path(path), RUN) for path in paths)
    for path, found in zip(paths, (a, b), strict=True):
        if not {"meta", "rows", "baselines"} <= found.keys():
            raise UserError(f"{path} is not a benchmark.json (wanted meta, baselines and rows). Make one:\n  {RUN}")
        if found.get("planted"):
            raise UserError(f"{path} holds planted acceptance, which is compared by eye. Wanted a benchmark.json:\n  {RUN}")
    same = lambda m: {"device": m["device"], "gpu": m["machine"].get("gpu"), "dtype": m["dtype"]}  # noqa: E731
    kinds = lambda r: same(r["meta"]) | {k: r["meta"]["config"].get(k) for k in MUST}  # noqa: E731
    unlike = [f"{k}: {x!r} and {y!r}" for (k, x), y in zip(kinds(a).items(), kinds(b).values(), strict=True) if x != y]
    if a["meta"]["made_from"].get("clips") != b["meta"]["made_from"].get("clips"):
        unlike.append("the clips")
    if unlike:
        raise UserError(f"{paths[0]} and {paths[1]} measure different things ({'; '.join(unlike)}). Run both with the same settings.")
    for name in ("packages", "machine", "made_from"):
        x, y = a["meta"][name], b["meta"][name]
        for key in sorted(x.keys() | y.keys()):
            if x.get(key) != y.get(key):
                log.warning("compare  %s: %s is %s in A, %s in B", name, key, x.get(key), y.get(key))
    key = lambda r: (r["draft"], r["accept"], r["drafts_per_round"], r.get("threshold"), r.get("exit_layer"))  # noqa: E731
    before, rows, differ = {key(r): r for r in a["rows"]}, [], []
    for r in b["rows"]:
        if key(r) not in before:
            continue
        old, new = before[key(r)]["speedup"], r["speedup"]
        apart = None not in (*old["ci95"], *new["ci95"]) and (new["ci95"][0] > old["ci95"][1] or new["ci95"][1] < old["ci95"][0])
        name = row_name(r)
        differ += [name] * apart
        change = f"{new['value'] / old['value'] - 1:+.1%}"
        tokens = f"{before[key(r)]['tokens_per_pass']:.2f}, {r['tokens_per_pass']:.2f}"
        rows.append((name, rate_text(old, 2), rate_text(new, 2), change, "yes" if apart else "no", tokens))
    header = ("drafts + rule, drafts per round", "speed-up of A", "of B", "change", "intervals apart", "tokens per pass")
    print_table(f"A = {paths[0]}, B = {paths[1]}", header, rows)
    found = {"rows": len(rows), "differ": differ, "only_in_one": len(a["rows"]) + len(b["rows"]) - 2 * len(rows)}
    print_json_line(found)
    return found
