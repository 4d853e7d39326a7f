"""Seconds and peak memory for one 50 ms window in the middle of a long recording, for two checkouts in turn.

    git worktree add /tmp/before main
    python tests/benchmarks/event_windows.py --before /tmp/before --megabytes 2000 --formats npy dat evt3

Each reading is a process of its own that imports no torch and may take 8 GiB. Checkouts take turns, so that both see the same
machine; the ratio of each pair is what counts. The EVT index is first built ("index"), then used.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600  # of recording
READ = """
import json, resource, sys, time
from feature_alignment.inputs.events import load_events
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
begin = time.perf_counter()
events = load_events(sys.argv[1], 50, 300_000)
seconds = time.perf_counter() - begin
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss has the parent's
print(json.dumps([seconds, peak / 1024, len(events["t"]), int(events["x"].sum())]))
"""


def blocks(count: int, block: int = 1 << 20):
    """x, y, t, p of `count` events over ten minutes, in blocks: evenly spread, so that every writer needs no memory of its own."""
    for begin in range(0, count, block):
        i = np.arange(begin, min(begin + block, count), dtype=np.int64)
        yield (i * 7919) % 1280, (i * 104729) % 720, i * (SECONDS * 1_000_000) // count, i & 1


def write_npy(path: Path, megabytes: int) -> None:
    kind = np.dtype([("x", "<u2"), ("y", "<u2"), ("t", "<i8"), ("p", "u1")])
    count = megabytes * 1_000_000 // kind.itemsize
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (count,)})
        for x, y, t, p in blocks(count):
            table = np.zeros(len(x), kind)
            table["x"], table["y"], table["t"], table["p"] = x, y, t, p
            file.write(table.tobytes())


def write_dat(path: Path, megabytes: int) -> None:
    with open(path, "wb") as file:
        file.write(b"% Version 2\n% Width 1280\n% Height 720\n" + bytes([12, 8]))
        for x, y, t, p in blocks(megabytes * 1_000_000 // 8):
            file.write((t | (x | y << 14 | p << 28) << 32).astype("<u8").tobytes())


def write_evt3(path: Path, megabytes: int) -> None:
    """Five words an event, as where nothing repeats: time high and low, y, x, and an external trigger that is skipped."""
    with open(path, "wb") as file:
        file.write(b"% evt 3.0\n% geometry 1280x720\n% end\n")
        for x, y, t, p in blocks(megabytes * 1_000_000 // 10):
            words = np.stack([8 << 12 | t >> 12 & 0xFFF, 6 << 12 | t & 0xFFF, y, 2 << 12 | p << 11 | x, np.full(len(x), 0xE << 12)], 1)
            file.write(words.astype("<u2").tobytes())


def write_h5(path: Path, megabytes: int) -> None:
    import h5py

    count = megabytes * 1_000_000 // 9
    with h5py.File(path, "w") as file:
        kinds = {"x": "<u2", "y": "<u2", "t": "<u4", "p": "u1"}
        columns = {k: file.create_dataset(f"events/{k}", (count,), v, chunks=(1 << 16,)) for k, v in kinds.items()}
        file["t_offset"] = np.int64(0)
        at = 0
        for x, y, t, p in blocks(count):
            for k, v in zip("xytp", (x, y, t, p), strict=True):
                columns[k][at : at + len(v)] = v
            at += len(x)


WRITERS: dict[str, Callable[[Path, int], None]] = {"npy": write_npy, "dat": write_dat, "evt3": write_evt3, "h5": write_h5}


def read(checkout: Path, path: Path, cache: str) -> list:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "XDG_CACHE_HOME": cache}
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)], env=environment, cwd=checkout, capture_output=True, text=True, check=False
    )
    return (
        json.loads(done.stdout) if done.returncode == 0 else [(done.stderr.strip().splitlines() or ["killed"])[-1][:100], None, None, None]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--formats", nargs="+", default=list(WRITERS), choices=list(WRITERS))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.formats:
            path = Path(folder) / f"events.{name}"
            WRITERS[name](path, options.megabytes)
            readings: dict[str, list[list]] = {"index": [read(ROOT, path, folder)], "before": [], "after": []}
            for _ in range(options.repeats):
                readings["before"].append(read(options.before, path, folder))
                readings["after"].append(read(ROOT, path, folder))
            for which, measured in readings.items():
                print(json.dumps({"format": name, "megabytes": options.megabytes, "which": which, "seconds_mib_events_check": measured}))
            path.unlink()


if __name__ == "__main__":
    main()
