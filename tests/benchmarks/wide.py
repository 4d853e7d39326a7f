"""Width 4096 on synthetic states: does memory stay flat, and is the machine used?

    python tests/benchmarks/wide.py statistics       1,000,000 positions on disk: one pass of the closed forms' sums
    python tests/benchmarks/wide.py measure          11,000 rows of up to 37 positions: acceptance of all predictors

Memory is what the process itself holds (RssAnon): pages of a mapped file are the kernel's, given back when others want them. The
states are made of one random block, repeated with fresh noise in a few channels, because what they hold does not matter here.
"""

from __future__ import annotations

import argparse
import mmap
import tempfile
import threading
import time
from pathlib import Path

import torch

from feature_alignment.adapters import closed_form
from feature_alignment.adapters.closed_form import Moments
from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.cli.console import print_json_line, print_table, run
from feature_alignment.measurement import scoring
from feature_alignment.storage.hidden_states import HiddenStates

WIDTH = 4096


class Memory:
    """The largest RssAnon while it is open, in bytes, sampled twenty times a second."""

    def __enter__(self) -> Memory:
        self.peak, self._open = 0, True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._open:
            line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
            self.peak = max(self.peak, int(line.split()[1]) * 1024)
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()


def write_states(folder: Path, rows: int, longest: int, ragged: bool) -> HiddenStates:
    """Files of paired states as extraction leaves them, bfloat16, memory-mapped."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    lengths = torch.randint(longest // 2, longest + 1, (rows,)) if ragged else torch.full((rows,), longest)
    block = torch.randn(64, longest, WIDTH)
    files = {"egpt_hidden_states.pt": block, "vl_hidden_states.pt": block.roll(1, -1) * 0.7 + torch.randn_like(block) * 0.5}
    for name, values in files.items():
        with torch.serialization.skip_data():
            torch.save(torch.empty(rows, longest, WIDTH, dtype=torch.bfloat16), folder / name)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            tensor = torch.load(folder / name, mmap=True, weights_only=True)
        for first in range(0, rows, 64):
            part = tensor[first : first + 64]
            part.copy_(values[: len(part)])
            part[..., :8] += torch.randn(*part.shape[:2], 8).bfloat16()
    mask = torch.arange(longest) < lengths[:, None]
    loaded = [torch.load(folder / name, mmap=True, weights_only=True) for name in files]
    about = [{"id": str(i), "sequence": str(i // 10), "question": f"q{i % 10}"} for i in range(rows)]
    draft, target = loaded
    return HiddenStates(draft, target, torch.zeros(rows, longest, dtype=torch.int64), mask, lengths, about, {})


def matmul_rate(size: int = 2048) -> float:
    """Measured float32 matrix-multiply rate of this process, FLOP/s: the best of five."""
    a = torch.randn(size, size)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def statistics(folder: Path, positions: int) -> dict[str, float]:
    states = write_states(folder / "train", positions // 50, 50, ragged=False)
    rate = matmul_rate()
    with Memory() as memory:
        total, reading = Moments(WIDTH, WIDTH), 0.0
        began = time.perf_counter()
        stream = closed_form.positions(states, number=4 * closed_form.POSITIONS)
        while True:
            at = time.perf_counter()
            some = next(stream, None)
            reading += time.perf_counter() - at
            if some is None:
                break
            total.add(some.draft, some.target)
        seconds = time.perf_counter() - began
        fitting = time.perf_counter()
        total.ridge(1e-3, rank=256)
        fitting = time.perf_counter() - fitting
    flops = 2 * total.n * WIDTH * (WIDTH + WIDTH)
    return {
        "positions": total.n,
        "seconds": seconds,
        "of these reading": reading,
        "rank-256 ridge, seconds": fitting,
        "share of the matmul rate": flops / seconds / rate,
        "matmul rate, GFLOP/s": rate / 1e9,
        "peak memory, GB": memory.peak / 1e9,
    }


def measure(folder: Path, rows: int, vocabulary: int) -> dict[str, float]:
    test = write_states(folder / "test", rows, 37, ragged=True)
    train, validation = (write_states(folder / split, 200, 37, ragged=True) for split in ("train", "validation"))
    head, adapter = torch.randn(vocabulary, WIDTH), HiddenAdapter(WIDTH, WIDTH, 256)
    with Memory() as memory:
        began = time.perf_counter()
        nulls = scoring.null_predictors(train, validation, test, 256, head)
        fitted = time.perf_counter() - began
        predictors = {"adapter": lambda some: adapter(some.draft)} | {name: f.predict for name, f in nulls.items()}
        scores = scoring.score(predictors, test, head)
        for s in scores.values():
            scoring.rates(s, test.mask, test, 5)
        scoring.per_position(scores["adapter"], test)
        seconds = time.perf_counter() - began
    return {
        "rows": rows,
        "positions": int(test.mask.sum()),
        "predictors": len(predictors),
        "vocabulary": vocabulary,
        "seconds": seconds,
        "of these fitting": fitted,
        "peak memory, GB": memory.peak / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["statistics", "measure"])
    parser.add_argument("--positions", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=11_000)
    parser.add_argument("--vocabulary", type=int, default=1024, help="rows of the head; the released models have 32,000")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the states are written; default: the system's temporary folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = statistics(Path(folder), args.positions) if args.what == "statistics" else measure(Path(folder), args.rows, args.vocabulary)
    print_table(f"{args.what} at width {WIDTH}, {args.threads} threads", ("what", "value"), list(found.items()))
    print_json_line(found)


if __name__ == "__main__":
    run(main)
