"""Plan a run before it starts: rows, bytes on disk, memory and hours of every script; exit code 2 where it does not fit.

    python -m feature_alignment.cli.plan --config configs/demo.yaml --gpus 2

Geometry, tokenizers and manifests are read, results are not. The hours come from a calibration of about 30 seconds on this machine, after
both models are loaded, or from `--tokens_per_second`, for which config.json and the tokenizer files are enough.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from feature_alignment.benchmark import plan_hours
from feature_alignment.benchmark.plan_sizes import Memory, PlannedSplit, Settings, memory_of, planned_split, run_bytes
from feature_alignment.cli.config import Common, parse_config
from feature_alignment.cli.console import UserError, print_json_line, print_table
from feature_alignment.inputs.samples import read_samples
from feature_alignment.models import eventgpt, loading, preprocessing
from feature_alignment.models.pair import check_pair

SPLITS = ("train", "validation", "test")  # that run_all.sh extracts
OWN_FLAGS = ("gpus", "gpu_gib", "tokens_per_second", "attending")
GIB = 2**30


@dataclass(frozen=True)
class PlanConfig(Common):
    """Print what a run of all scripts needs, and refuse one that does not fit on the disk or in memory.

    Args:
        gpus: processes that share the extraction, one per GPU; on a CPU, processes of `threads` threads each
        gpu_gib: memory of one GPU in GiB (default: the free memory of `device` on this machine)
        tokens_per_second: speed of plain decoding of one prompt by the target, instead of a calibration on this machine
        attending: the run also trains the attending adapter, from the event states and prompt states of the extraction
    """

    gpus: int = 1
    gpu_gib: float | None = None
    tokens_per_second: float | None = None
    attending: bool = False


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Args:
        splits: Splits that are extracted.
        files: File, from the output directory on -> its bytes.
        free_bytes: Free bytes of the disk, with those of the files that will be replaced.
        memory: Script -> memory of one process.
        device_bytes: Memory of one process's device.
        seconds: Script -> seconds; scripts without an estimate are missing.
    """

    splits: Sequence[PlannedSplit]
    files: Mapping[str, int]
    free_bytes: int
    memory: Mapping[str, Memory]
    device_bytes: int
    seconds: Mapping[str, float]

    @property
    def needed_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def to_json(self) -> dict[str, Any]:
        """The plan as the printed JSON."""
        return {
            "rows": {split.name: len(split.samples) for split in self.splits},
            "clips": {split.name: split.clips for split in self.splits},
            "bytes": dict(self.files),
            "total_bytes": self.needed_bytes,
            "free_bytes": self.free_bytes,
            "memory_bytes": {name: memory.total for name, memory in self.memory.items()},
            "device_bytes": self.device_bytes,
            "hours": {name: seconds / 3600 for name, seconds in self.seconds.items()},
        }


def settings_of(argv: Sequence[str]) -> dict[str, Settings]:
    """Script -> its merged settings, as its own `--print_config` gives them.

    Args:
        argv: Command line of the plan; its own flags are left out.

    Raises:
        UserError: If a script refuses them.
    """
    shared: list[str] = []
    skip = False
    for word in argv:
        name = word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else None
        skip = name in OWN_FLAGS or (skip and name is None)
        shared += [] if skip else [word]
    running = {}
    variants = (f"train_hidden_adapter.{adapter}" for adapter in ("hidden", "chained", "attending"))
    for name in ("extract_hidden_states", *variants, "feature_sd_inference", "benchmark_feature_sd"):
        script, _, adapter = name.partition(".")
        more = ["--adapter", adapter] if adapter else []
        command = [sys.executable, "-m", f"feature_alignment.{script}", *shared, *more, "--print_config"]
        running[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = {name: process.communicate() for name, process in running.items()}
    for name, process in running.items():
        if process.returncode:
            raise UserError(said[name][1].strip().removeprefix("error: "))
    return {name: Settings(**yaml.safe_load(printed)) for name, (printed, _) in said.items()}


def plan(cfg: PlanConfig, settings: Mapping[str, Settings], start: float) -> Plan:
    """Compute what a run needs.

    Args:
        cfg: Settings of the plan.
        settings: Script -> its settings.
        start: Seconds that this process took to start.
    """
    pair = check_pair(cfg if cfg.tokens_per_second is None else replace(cfg, random_weights=True))
    draft, target = pair.models.values()
    settings = trained(cfg, settings)
    path = loading.find_checkpoint(cfg.draft_id, "--draft_id")
    tokenizer = preprocessing.load_tokenizer(path, draft.embedding_rows)

    def encode_prompt(question: str) -> torch.Tensor:
        return torch.tensor(eventgpt.encode_prompt(tokenizer, question))

    extract = settings["extract_hidden_states"]
    splits = {}
    for name in (name for name in SPLITS if name in cfg.manifests):
        samples = read_samples(cfg.manifests, name, extract.limit, cfg.questions, cfg.allow_outside)
        splits[name] = planned_split(name, samples, extract.batch_size, encode_prompt)
    if missing := [name for name in SPLITS if name not in splits]:
        raise UserError(f"the config has no manifest for {', '.join(missing)}; expected train, validation and test under `manifests`.")
    every = list(splits.values())
    files = run_bytes(cfg, settings, pair, every)
    found = Plan(every, files, free_bytes(cfg.out, files), memory_of(cfg, settings, pair, every), device_bytes(cfg), {})
    if cfg.tokens_per_second is not None:
        hours = plan_hours.stated_hours(settings, splits, target.prompt_tokens, cfg.tokens_per_second, cfg.gpus)
        return replace(found, seconds=hours)
    if refusal(cfg, found):  # nothing is loaded for a run that does not fit
        return found
    rates = plan_hours.calibrate(cfg, settings, splits, start)
    hours = plan_hours.hours(settings, splits, rates, cfg.gpus)
    return replace(found, seconds=hours, files=run_bytes(cfg, settings, pair, every, (rates.tokens, rates.draft_tokens)))


def trained(cfg: PlanConfig, settings: Mapping[str, Settings]) -> dict[str, Settings]:
    """The settings without those of adapters that the run does not train.

    Raises:
        UserError: If the attending adapter is planned and the extraction does not store the states that it reads.
    """
    extract = settings["extract_hidden_states"]
    if cfg.attending and not (extract.event_states and extract.prompt_states):
        raise UserError(
            "--attending: the attending adapter reads event states and prompt states, and extract_hidden_states has event_states "
            f"{extract.event_states} and prompt_states {extract.prompt_states}. Set both in the config, e.g. prompt_states: 160."
        )
    absent = [*["chained"] * (not extract.event_states), *["attending"] * (not cfg.attending)]
    return {name: one for name, one in settings.items() if name.partition(".")[2] not in absent}


def device_bytes(cfg: PlanConfig) -> int:
    """Memory of one process's device.

    Raises:
        UserError: If it is a GPU that is neither here nor stated.
    """
    if cfg.gpu_gib is not None:
        return round(cfg.gpu_gib * GIB) * (cfg.gpus if cfg.device_map else 1)
    if cfg.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {cfg.device}: this machine has no GPU. State one: --gpu_gib 80 --tokens_per_second 140.")
    return loading.available_memory(cfg.device, cfg.device_map)


def free_bytes(out: Path, files: Mapping[str, int]) -> int:
    """Free bytes of the disk that holds `out`, with those of earlier versions of the files."""
    folder = next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())
    return shutil.disk_usage(folder).free + sum((out / name).stat().st_size for name in files if (out / name).is_file())


def refusal(cfg: PlanConfig, found: Plan) -> str | None:
    """Why a run does not fit in memory or on the disk, and what to change; None if it fits."""
    together = cfg.gpus if cfg.device == "cpu" else 1  # processes on a CPU share its memory
    available = found.device_bytes
    for name, needed in found.memory.items():
        total = needed.total * (together if name == "extract_hidden_states" else 1)
        if total > available:
            return (
                f"{name} needs about {total / GIB:.2f} GiB (weights {needed.weights / GIB:.2f}, caches {needed.caches / GIB:.2f}, batch "
                f"{needed.batch / GIB:.2f} per process), {cfg.device} has {available / GIB:.2f} GiB. Give a smaller batch_size "
                "in the config, --dtype bfloat16, --quantize nf4, or --device_map auto."
            )
    if found.needed_bytes > found.free_bytes:
        largest = max(found.files, key=lambda name: found.files[name])
        return (
            f"{cfg.out} needs {found.needed_bytes:,} bytes, its disk has {found.free_bytes:,} free. The largest file is {largest} with "
            f"{found.files[largest]:,}. Give an --output_dir on another disk, --limit, or a smaller store_dtype or max_positions."
        )
    return None


def show(cfg: PlanConfig, found: Plan) -> None:
    """Print the tables of a plan."""
    rows = [(split.name, len(split.samples), split.clips, len(split.batches)) for split in found.splits]
    print_table("rows", ("split", "rows", "rows of event states", "batches"), rows)
    sizes = [(name, f"{size:,}") for name, size in found.files.items()]
    print_table(f"files under {cfg.out}, at most", ("file", "bytes"), [*sizes, ("together", f"{found.needed_bytes:,}")])
    parts = [(n, *(f"{x / GIB:.2f}" for x in (m.weights, m.caches, m.batch, m.total))) for n, m in found.memory.items()]
    print_table(f"memory of one process on {cfg.device}, GiB", ("script", "weights", "caches", "batch", "together"), parts)
    how = "a calibration on this machine"
    if cfg.tokens_per_second is not None:
        how = f"{cfg.tokens_per_second:g} tokens/s; start-up, loading, training and measuring are not included"
    if not found.seconds:
        return
    times = [(name, f"{s / 3600:.3f}", f"{s:,.0f}") for name, s in found.seconds.items()]
    total = sum(found.seconds.values())
    print_table(f"time, from {how}", ("script", "hours", "seconds"), [*times, ("together", f"{total / 3600:.3f}", f"{total:,.0f}")])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Print the plan of a run; returns the printed JSON."""
    start = time.time() - psutil.Process().create_time()
    cfg = parse_config(PlanConfig, argv, "cli/plan")
    settings = settings_of(sys.argv[1:] if argv is None else argv)
    found = plan(cfg, settings, start)
    show(cfg, found)
    if why := refusal(cfg, found):
        raise UserError(why)
    print_json_line(found.to_json())
    return found.to_json()
