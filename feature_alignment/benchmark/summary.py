"""Several data sets in one table: the fastest lossless row of each benchmark, and the geometric mean of their speed-ups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feature_alignment.benchmark.rows import row_name
from feature_alignment.cli.console import UserError, log, print_json_line, print_table, rate_text
from feature_alignment.storage.files import read_hashed_json

RUN = "python feature_alignment/benchmark_feature_sd.py --config CONFIG"  # `summary` reads no config


def summarize(paths: Sequence[str]) -> dict[str, Any]:
    """Print one line for each benchmark and the geometric mean over all of them.

    Args:
        paths: output directories (outputs/demo) or benchmark.json files

    Returns:
        `data_sets`, one object for each benchmark, and `geometric_mean` of the end-to-end and decoding speed-ups

    Raises:
        UserError: no benchmark among the paths, a file that is not a benchmark.json, or the same file twice
    """
    if not paths:
        raise UserError("summary wants directories or files: benchmark_feature_sd.py summary outputs/*/")
    data_sets = [_of_benchmark(file) for file in _benchmark_files(paths)]
    means = {name: math.exp(sum(math.log(d[name]["value"]) for d in data_sets) / len(data_sets)) for name in ("speedup", "decode_speedup")}
    header = ("data set", "prompts", "fastest lossless row", "speed-up, end to end", "decoding", "tokens per pass", "exact match")
    rows = [
        (
            d["name"],
            d["prompts"],
            d["row"],
            rate_text(d["speedup"], 2),
            rate_text(d["decode_speedup"], 2),
            f"{d['tokens_per_pass']:.2f}",
            f"{d['exact_match']:.3f}",
        )
        for d in data_sets
    ]
    mean_row = ("geometric mean", "", "", f"{means['speedup']:.2f}", f"{means['decode_speedup']:.2f}", "", "")
    print_table("benchmarks", header, [*rows, mean_row])
    found = {"data_sets": data_sets, "geometric_mean": means}
    print_json_line(found)
    return found


def _benchmark_files(paths: Sequence[str]) -> list[Path]:
    """The benchmark.json of each path; directories without one are left out with a warning."""
    files: dict[Path, str] = {}
    for given in paths:
        path = Path(given)
        file = path if path.is_file() else path / "benchmark" / "benchmark.json"
        if not file.is_file():
            if not path.exists():
                raise UserError(f"nothing at {path}. Expected an output directory or a benchmark.json. Make one:\n  {RUN}")
            log.warning("summary  no benchmark in %s; left out", path)
        elif file.resolve() in files:
            raise UserError(f"{given} and {files[file.resolve()]} are the same benchmark.")
        else:
            files[file.resolve()] = given
    if not files:
        raise UserError(f"no benchmark in {', '.join(paths)}. Make one:\n  {RUN}")
    return list(files)


def _of_benchmark(file: Path) -> dict[str, Any]:
    """One line of the table.

    Args:
        file: a benchmark.json
    """
    result = read_hashed_json(file, RUN)
    if not {"meta", "rows", "baselines", "fastest_lossless"} <= result.keys() or result.get("planted"):
        raise UserError(f"{file} is not a benchmark.json with measured acceptance. Make one:\n  {RUN}")
    best = result["fastest_lossless"]
    row = next(r for r in result["rows"] if row_name(r) == best["row"])
    return {
        "name": file.parent.parent.name,
        "prompts": result["baselines"][0]["prompts"],
        "row": best["row"],
        "speedup": best["speedup"],
        "decode_speedup": best["decode_speedup"],
        "tokens_per_pass": row["tokens_per_pass"],
        "exact_match": row["exact_match"],
    }
