"""This checkout against another one, in turns on the same prompts: is any drafter faster or slower than it was?

    git worktree add ../before COMMIT
    python tests/benchmarks/two_checkouts.py ../before

After `bash run_all.sh`. Each checkout answers in a process of its own, on one thread, with the adapters of this checkout's run and packed
products. Both answer a prompt before the next one, in changing order, and their texts must be equal. The other checkout must have
`SpeculativePair`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
ROWS: dict[str, dict[str, Any]] = {
    "plain": {"draft": "lookup"},
    "hybrid, up to 24": {"draft": "hybrid", "num_draft_tokens": 24, "adaptive": True},
    "chained, up to 24": {"draft": "chained", "num_draft_tokens": 24, "adaptive": True},
    "chained, up to 24, overlapped": {"draft": "chained", "num_draft_tokens": 24, "adaptive": True, "overlap": True},
    "own, up to 24": {"draft": "own", "num_draft_tokens": 24, "adaptive": True},
    **{
        f"{draft}, {n}": {"draft": draft, "num_draft_tokens": n}
        for draft, n in (("chained", 5), ("chained", 8), ("ngram", 8), ("template", 8), ("lookup", 8), ("previous", 8), ("aligned", 8))
    },
}


def answers(config: str, row: str, ids: list[str]) -> None:
    """The process of one checkout and row: for each index in its input, a line with times and token ids of that prompt's answer."""
    import torch

    from feature_alignment import SpeculativePair
    from feature_alignment.cli.config import parse_config
    from feature_alignment.decoding.settings import DecodingConfig
    from feature_alignment.inputs.samples import read_samples

    torch.set_num_threads(1)
    words = [f"--{name}={str(value).lower()}" for name, value in ROWS[row].items()]
    pair = SpeculativePair(parse_config(DecodingConfig, ["--config", config, *words], "feature_sd_inference"), trial=False)
    samples = {s.id: s for s in read_samples(pair.cfg.manifests, "test")}
    prompts = [pair.prepare(samples[name]) for name in ids]
    decode = pair.decode_plainly if row == "plain" else pair.decode
    print("ready", flush=True)
    for line in sys.stdin:
        pair.forget_clips()
        found = decode(prompts[int(line)])
        print(json.dumps({"total": found.total_ms, "decode": found.decode_ms, "token_ids": list(found.token_ids)}), flush=True)


class Checkout:
    """A checkout's process for one row."""

    def __init__(self, folder: Path, config: str, row: str, ids: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, str(folder), "--config", config, "--row", row, "--ids", *ids]
        self.process = subprocess.Popen(command, cwd=HERE, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read_until(lambda line: line == "ready\n")

    def answer(self, i: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{i}\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self._read_until(lambda line: line.startswith("{")))
        return found

    def _read_until(self, is_wanted: Callable[[str], bool]) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if is_wanted(line):
                return str(line)
        raise SystemExit(f"a process ended with {self.process.wait()}; its error is above")


def compared(other: Path, config: str, row: str, ids: list[str], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each answer by stage and checkout, in the order of prompts and repeats."""
    pair = {"before": Checkout(other, config, row, ids), "now": Checkout(HERE, config, row, ids)}
    ms = defaultdict(list)
    for repeat in range(repeats + 1):  # the first is not counted
        for i in range(len(ids)):
            order = ("before", "now") if (i + repeat) % 2 else ("now", "before")
            found = {who: pair[who].answer(i) for who in order}
            assert found["before"]["token_ids"] == found["now"]["token_ids"], f"{row}: another text for {ids[i]}"
            for who in order if repeat else ():
                for stage in ("total", "decode"):
                    ms[f"{who} {stage}"].append(found[who][stage])
    for checkout in pair.values():
        checkout.process.kill()
    return ms


def main() -> None:
    import numpy as np

    from feature_alignment.benchmark_feature_sd import BenchmarkConfig
    from feature_alignment.cli.config import parse_config
    from feature_alignment.cli.console import print_json_line, print_table
    from feature_alignment.inputs.samples import read_samples
    from feature_alignment.measurement.metrics import Counts

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    parser.add_argument("--ids", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        return answers(args.config, args.row, args.ids)
    samples = read_samples(parse_config(BenchmarkConfig, ["--config", args.config], "benchmark_feature_sd").manifests, "test")
    samples = [samples[i * len(samples) // args.prompts] for i in range(args.prompts)]
    clips = [s.sequence for s in samples] * args.repeats
    rows = []
    for row in ROWS:
        ms = compared(args.other.resolve(), args.config, row, [s.id for s in samples], args.repeats)
        ratios = [Counts(np.array(ms[f"before {stage}"]), np.array(ms[f"now {stage}"])).rate(clips) for stage in ("total", "decode")]
        rows.append((row, *(ratio.text(3) for ratio in ratios)))
        print(*rows[-1], sep="   ", file=sys.stderr)
    print_table(f"time of the other checkout over this one's, {args.prompts} prompts", ("row", "end to end", "decoding"), rows)
    print_json_line({"rows": rows})


if __name__ == "__main__":
    main()
