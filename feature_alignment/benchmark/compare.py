"""Comparison of two benchmarks: which rows differ by more than their intervals, and whether they are comparable at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feature_alignment.benchmark.results import BenchmarkReport, TimedRow
from feature_alignment.cli.console import UserError, log, print_json_line, print_table
from feature_alignment.measurement.records import Meta
from feature_alignment.storage.files import read_hashed_json

RUN = "python feature_alignment/benchmark_feature_sd.py --config CONFIG"  # `compare` reads no config.
TEXT_SETTINGS = ("max_new_tokens", "split", "limit", "questions")  # settings that determine prompts and texts


def compare(paths: Sequence[str]) -> dict[str, Any]:
    """Print the rows that two benchmarks have in common. Different machines, packages or checkpoints are logged, and compared.

    Args:
        paths: two benchmark.json files, A and B

    Returns:
        `rows`, number of common rows; `differ`, names of those whose intervals are apart; `only_in_one`, number of other rows

    Raises:
        UserError: a file is not a benchmark.json, or device, dtype, prompts, clips or lengths differ
    """
    if len(paths) != 2:
        raise UserError(f"compare wants two files, got {len(paths)}: benchmark_feature_sd.py compare A.json B.json")
    a, b = (read_benchmark(Path(path)) for path in paths)
    refuse_different(paths, a.meta, b.meta)
    for name in ("packages", "machine", "made_from"):
        x, y = a.meta[name], b.meta[name]
        for key in sorted(x.keys() | y.keys()):
            if x.get(key) != y.get(key):
                log.warning("compare  %s: %s is %s in A, %s in B", name, key, x.get(key), y.get(key))
    before, rows, differ = {_key(r): r for r in a.rows}, [], []
    for new in b.rows:
        old = before.get(_key(new))
        if old is None:
            continue
        is_apart = new.speedup.ci95[0] > old.speedup.ci95[1] or new.speedup.ci95[1] < old.speedup.ci95[0]  # False without intervals.
        differ += [new.name] * is_apart
        change = f"{new.speedup.value / old.speedup.value - 1:+.1%}"
        tokens = f"{old.tokens_per_pass:.2f}, {new.tokens_per_pass:.2f}"
        rows.append((new.name, old.speedup.text(2), new.speedup.text(2), change, "yes" if is_apart else "no", tokens))
    header = ("drafter + rule, draft length", "speed-up of A", "of B", "change", "intervals apart", "tokens per pass")
    print_table(f"A = {paths[0]}, B = {paths[1]}", header, rows)
    found = {"rows": len(rows), "differ": differ, "only_in_one": len(a.rows) + len(b.rows) - 2 * len(rows)}
    print_json_line(found)
    return found


def read_benchmark(path: Path) -> BenchmarkReport:
    """Read a benchmark.json whose acceptance was measured.

    Raises:
        UserError: the file is another one, or was altered
    """
    content = read_hashed_json(path, RUN)
    if content.get("planted"):
        raise UserError(f"{path} holds planted acceptance. Expected a benchmark.json with measured acceptance:\n  {RUN}")
    try:
        return BenchmarkReport.from_json(content)
    except ValueError as error:
        raise UserError(f"{path} is not a benchmark.json ({error}). Make one:\n  {RUN}") from None


def refuse_different(paths: Sequence[str], a: Meta, b: Meta) -> None:
    """Raise UserError if two benchmarks, by their provenance, measure different things."""

    def settings(meta: Meta) -> dict[str, Any]:
        own = {"device": meta["device"], "gpu": meta["machine"].get("gpu"), "dtype": meta["dtype"]}
        return own | {k: meta["config"].get(k) for k in TEXT_SETTINGS}

    of_a, of_b = settings(a), settings(b)
    different = [f"{k}: {of_a[k]!r} and {of_b[k]!r}" for k in of_a if of_a[k] != of_b[k]]
    if a["made_from"].get("clips") != b["made_from"].get("clips"):
        different.append("the clips")
    if different:
        raise UserError(f"{paths[0]} and {paths[1]} measure different things ({'; '.join(different)}). Run both with the same settings.")


def _key(row: TimedRow) -> tuple[object, ...]:
    return row.draft, row.accept, row.drafts_per_round, row.threshold, row.exit_layer
