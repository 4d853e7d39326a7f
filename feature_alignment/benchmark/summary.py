"""Several data sets in one table: the fastest lossless row of each benchmark, and the geometric mean of their speed-ups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_alignment.benchmark.compare import RUN, read_benchmark
from feature_alignment.benchmark.results import Speedup
from feature_alignment.cli.console import UserError, log, print_json_line, print_table
from feature_alignment.measurement.records import Record


@dataclass(frozen=True)
class DataSet(Record):
    """One line of the table.

    Args:
        name: of the output directory
        prompts: number of prompts
        row: name of the fastest lossless row
        speedup, decode_speedup: measured on clips that did not choose it
        tokens_per_pass, exact_match: of that row
    """

    name: str
    prompts: int
    row: str
    speedup: Speedup
    decode_speedup: Speedup
    tokens_per_pass: float
    exact_match: float


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
    means = {
        "speedup": _geometric_mean([d.speedup.value for d in data_sets]),
        "decode_speedup": _geometric_mean([d.decode_speedup.value for d in data_sets]),
    }
    header = ("data set", "prompts", "fastest lossless row", "speed-up, end to end", "decoding", "tokens per pass", "exact match")
    rows = [
        (d.name, d.prompts, d.row, d.speedup.text(2), d.decode_speedup.text(2), f"{d.tokens_per_pass:.2f}", f"{d.exact_match:.3f}")
        for d in data_sets
    ]
    mean_row = ("geometric mean", "", "", f"{means['speedup']:.2f}", f"{means['decode_speedup']:.2f}", "", "")
    print_table("benchmarks", header, [*rows, mean_row])
    found = {"data_sets": [d.to_json() for d in data_sets], "geometric_mean": means}
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


def _of_benchmark(file: Path) -> DataSet:
    """The line of one benchmark.json."""
    result = read_benchmark(file)
    best = result.fastest_lossless
    row = next((r for r in result.rows if best and r.name == best.row), None)
    if best is None or row is None:
        raise UserError(f"{file} is not a benchmark.json of this version: it names no fastest lossless row. Make it again:\n  {RUN}")
    name, prompts = file.parent.parent.name, result.plain.prompts
    return DataSet(name, prompts, best.row, best.speedup, best.decode_speedup, row.tokens_per_pass, row.exact_match)


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
