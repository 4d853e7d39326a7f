"""Plans a run, then runs its scripts one after another on the same machine, and compares hours and bytes.

    python tests/benchmarks/planned_hours.py --config configs/demo.yaml --gpus 2 --output_dir outputs/planned

The output directory must be new: nothing is reused. Its manifests must exist. All scripts are those of run_all.sh, here one at a time, so
that no script slows another one; extraction runs as `--gpus` processes. Let nothing else run on the machine. Flags after `--` go to the
plan and to every script, e.g. `-- --limit 64`. Writes the table as planned_hours.json into the output directory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feature_alignment.benchmark.plan import SPLITS
from feature_alignment.cli.console import UserError, print_json_line, print_table, run

ROOT = Path(__file__).parents[2]


def steps(gpus: int, attending: bool) -> dict[str, list[str]]:
    """Script, as the plan names it -> the words that start it after `python`, without those that all scripts share."""
    extract = ["feature_alignment/extract_hidden_states.py"]
    if gpus > 1:
        extract = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus), *extract]
    train = ["feature_alignment/train_hidden_adapter.py", "--adapter"]
    return {
        **{f"extract_hidden_states, {split}": [*extract, "--split", split] for split in SPLITS},
        "hidden_adapter": ["feature_alignment/hidden_adapter.py"],
        **{f"train_hidden_adapter, {kind}": [*train, kind] for kind in ("hidden", "chained", *["attending"] * attending)},
        "measure_feature_acceptance": ["feature_alignment/measure_feature_acceptance.py"],
        "compare_token_baseline": ["feature_alignment/compare_token_baseline.py"],
        "feature_sd_inference": ["feature_alignment/feature_sd_inference.py", "--draft", "chained"],
        "benchmark_feature_sd": ["feature_alignment/benchmark_feature_sd.py"],
    }


def run_python(words: Sequence[str]) -> tuple[float, str]:
    """Wall-clock seconds and standard output of one command; its logs go to standard error."""
    print("==", *words, file=sys.stderr, flush=True)
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(words)} ended with exit code {done.returncode}.")
    return time.perf_counter() - began, done.stdout


def bytes_of(out: Path, planned: dict[str, int]) -> tuple[dict[str, int], int]:
    """Bytes on disk of each planned file, and of all files but clips and manifests."""
    found = {name: (out / name).stat().st_size for name in planned}
    files = (path for path in out.rglob("*") if path.is_file() and path.relative_to(out).parts[0] != "scenes")
    return found, sum(path.stat().st_size for path in files)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Plan, run, print the table of both; returns the printed JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--attending", action="store_true", help="train the attending adapter as well")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("more", nargs="*", help="flags of every script, after --")
    args = parser.parse_args(argv)
    if args.output_dir.exists():
        raise UserError(f"{args.output_dir} exists; expected a new directory, because a result that is reused takes no time.")
    shared = ["--config", args.config, "--output_dir", str(args.output_dir), *args.more]
    own = ["--gpus", str(args.gpus), *["--attending"] * args.attending]
    seconds, said = run_python(["-m", "feature_alignment.cli.plan", *shared, *own])
    plan = json.loads(said.splitlines()[-1])
    actual = {name: run_python([*words, *shared])[0] for name, words in steps(args.gpus, args.attending).items()}
    planned = {name: 3600 * hours for name, hours in plan["hours"].items()}
    sizes, everything = bytes_of(args.output_dir, plan["bytes"])
    rows = [(name, planned[name], actual[name], planned[name] / actual[name]) for name in actual]
    total = sum(planned[name] for name in actual), sum(actual.values())
    rows.append(("together", *total, total[0] / total[1]))
    print_table(f"seconds of each script; the plan itself took {seconds:.0f}", ("script", "planned", "actual", "planned / actual"), rows)
    of_files = [(name, plan["bytes"][name], sizes[name], plan["bytes"][name] / sizes[name]) for name in sizes]
    of_files.append(("all files, results included", plan["total_bytes"], everything, plan["total_bytes"] / everything))
    print_table("bytes", ("file", "planned", "on disk", "planned / on disk"), of_files)
    found = {
        "plan_seconds": seconds,
        "seconds": {name: {"planned": planned[name], "actual": actual[name]} for name in actual},
        "bytes": {name: {"planned": plan["bytes"][name], "actual": sizes[name]} for name in sizes},
        "total": {"seconds": total[0] / total[1], "bytes": plan["total_bytes"] / everything},
    }
    (args.output_dir / "planned_hours.json").write_text(json.dumps(found, indent=1) + "\n")
    print_json_line(found["total"])
    return found


if __name__ == "__main__":
    run(main)
