"""What extraction costs, on the embedded pair.

    python tests/benchmarks/extraction.py speed      rows/s now, rows/s of the earlier way, their ratios
    python tests/benchmarks/extraction.py memory     peak memory at 1,000 and at 20,000 rows
    python tests/benchmarks/extraction.py kills      20 runs killed -9 at random moments and resumed: are the files the same?

The earlier way: both models generate freely, one row and one token at a time, `output_hidden_states=True`, every clip encoded for
every question. It is measured without its saving of files, this extraction with it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from transformers import PreTrainedModel

from feature_alignment import extract_hidden_states
from feature_alignment.cli.config import parse_config
from feature_alignment.cli.console import print_json_line, print_table, run
from feature_alignment.inputs.samples import read_samples
from feature_alignment.models import pair as pair_module
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.eventgpt import load_eventgpt
from feature_alignment.models.pair import Pair, load_pair
from feature_alignment.models.video_llava import load_video_llava

GOALS = {"with generation": 8, "answers known": 25}


def flags(args: argparse.Namespace, out: Path, *more: str) -> list[str]:
    return ["--config", args.config, "--split", args.split, "--output_dir", str(out), *more]


@torch.inference_mode()
def earlier_way(model: PreTrainedModel, decoder: Decoder, sample, max_new_tokens: int) -> torch.Tensor:
    """States [n, d] of a freely generated answer, by transformers' own `generate`."""
    prompt = decoder.prepare(sample)
    embeds = decoder._splice(prompt.ids[None], decoder.encode_vision(prompt.pixels[None]))
    out = model.generate(
        inputs_embeds=embeds,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(decoder.eos_ids),
        pad_token_id=0,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    return torch.cat([step[-1][:, -1] for step in out.hidden_states])


def speed(args: argparse.Namespace, folder: Path) -> None:
    """On the split as it is, and with every clip asked all of the split's questions: the earlier attempt's clips had ten each."""
    own = parse_config(extract_hidden_states.ExtractConfig, flags(args, folder), "extract_hidden_states")
    asked = sorted({s.question for s in read_samples(own.manifests, args.split)})
    (folder / "questions.txt").write_text("\n".join(asked))
    pair = load_pair(own)
    deep = pair.draft_with(None, own)
    models = [(load_video_llava(own.target_id, torch.float32), pair.target), (load_eventgpt(own.draft_id, torch.float32), deep)]
    workloads = {"own": [], "all": ["--questions", str(folder / "questions.txt")]}
    reports = [speed_on(args, folder / name, pair, models, more) for name, more in workloads.items()]
    print_json_line({"workloads": reports})


def speed_on(args: argparse.Namespace, folder: Path, pair: Pair, models: Sequence[tuple], more: list[str]) -> dict[str, Any]:
    """The same work in both ways: both models' texts and states, without event states and forced drafts, which the earlier way lacks."""
    same = [*more, "--event_states", "false", "--own_drafts", "false"]
    cfg = parse_config(extract_hidden_states.ExtractConfig, flags(args, folder, *same), "extract_hidden_states")
    samples = read_samples(cfg.manifests, args.split, args.rows, cfg.questions)
    rows, clips = len(samples), len({s.video for s in samples})

    def clock() -> np.ndarray:
        return np.array([time.perf_counter(), time.process_time()])

    def earlier() -> np.ndarray:
        began, some = clock(), samples[:: max(1, rows // 24)]
        for sample in some:
            for model, decoder in models:
                earlier_way(model, decoder, sample, cfg.max_new_tokens)
        return (clock() - began) / len(some)

    def now(out: Path, *flags_of_it: str) -> np.ndarray:
        """Of the whole command, from the moment the models are loaded."""
        loaded: list[np.ndarray] = []
        pair_module.load_pair = lambda _: loaded.append(clock()) or pair
        extract_hidden_states.main(flags(args, out, "--limit", str(rows), *flags_of_it))
        return (clock() - loaded[0]) / rows

    for model, decoder in models:
        state = decoder.prefill([decoder.prepare(samples[0])])  # warm-up, and proof that both ways speak of the same states
        text = decoder.generate(state, 8)
        torch.testing.assert_close(
            earlier_way(model, decoder, samples[0], 8), decoder.teacher_force(state, torch.tensor(text))[0], atol=1e-4, rtol=1e-3
        )
    seconds: dict[str, list[np.ndarray]] = {name: [] for name in ("earlier", *GOALS, "with event states and own drafts")}
    for i in range(args.repeats):  # in turn, because other work on the machine comes and goes
        seconds["earlier"].append(earlier())
        seconds["with generation"].append(now(folder / f"generated{i}", *same))
        answers = folder / f"generated{i}" / "token_pairs" / f"{args.split}.json"
        seconds["answers known"].append(now(folder / f"known{i}", *same, "--answers", str(answers)))
        extras = ("--event_states", "true", "--own_drafts", "true")
        seconds["with event states and own drafts"].append(now(folder / f"more{i}", *more, *extras))
    best = {name: np.min(found, axis=0) for name, found in seconds.items()}
    ratios = {name: best["earlier"] / found for name, found in best.items()}
    print_table(
        f"{rows} rows of {args.split}, {clips} clips, best of {args.repeats}, {torch.get_num_threads()} thread",
        ("way", "rows/s", "ratio", "rows per processor second", "ratio", "goal"),
        [
            (name, float(1 / wall), float(ratios[name][0]), float(1 / cpu), float(ratios[name][1]), GOALS.get(name))
            for name, (wall, cpu) in best.items()
        ],
    )
    return {"rows": rows, "clips": clips, "seconds_per_row": {name: np.array(found).tolist() for name, found in seconds.items()}}


class FakeClips:
    """Answers and states from nowhere, as large as real ones: what is measured is all that grows with the number of rows."""

    def __init__(self, model, samples, deeper=None) -> None:
        self.model, self.count = model, len(samples)

    def generate(self, max_new_tokens: int) -> list[list[int]]:
        return [random.choices(range(3, 900), k=random.randint(10, max_new_tokens)) for _ in range(self.count)]

    def states(self, answers) -> list[torch.Tensor]:
        return [torch.randn(len(answer), self.model.hidden_size) for answer in answers]

    def says(self, answers) -> list[list[int]]:
        return [list(answer) for answer in answers]

    def vision_states(self) -> list[torch.Tensor]:
        return [torch.randn(self.model.vision_tokens, self.model.width) for _ in range(self.count)]


def memory(args: argparse.Namespace, folder: Path) -> None:
    table = []
    for rows in (1_000, 20_000):
        command = [sys.executable, __file__, "one", "--rows", str(rows), "--config", args.config, "--split", args.split]
        done = subprocess.run([*command, "--folder", str(folder)], capture_output=True, text=True, check=True)
        report = json.loads(done.stdout.splitlines()[-1])
        table.append((rows, report["peak_mb"], report["file_mb"], report["seconds"]))
    print_table("peak memory of an extraction", ("rows", "peak MB", "files MB", "seconds"), table)
    print_json_line({"peak_mb": {row[0]: row[1] for row in table}, "growth_mb": table[1][1] - table[0][1], "goal_mb": 200})


def one_run(args: argparse.Namespace, folder: Path) -> None:
    """A run of its own with fake models and `rows` copies of the samples; prints its peak memory."""
    import feature_alignment.models.batches as module

    cfg = parse_config(extract_hidden_states.ExtractConfig, flags(args, folder), "extract_hidden_states")
    real = [json.loads(line) for line in cfg.manifests[args.split].read_text().splitlines()]
    manifest = folder / f"{args.rows}.jsonl"
    with manifest.open("w") as stream:
        for i in range(args.rows):
            clip = {kind: str((cfg.manifests[args.split].parent / real[i % len(real)][kind]).resolve()) for kind in ("events", "video")}
            stream.write(json.dumps({**real[i % len(real)], **clip, "id": str(i)}) + "\n")
    module.ClipBatch = FakeClips
    out, began = folder / f"rows{args.rows}", time.perf_counter()
    manifests = f"--manifests={json.dumps({args.split: str(manifest)})}"
    extract_hidden_states.main(flags(args, out, manifests, "--allow_outside"))
    files = sum(p.stat().st_blocks * 512 for p in (out / "hidden_states" / args.split).glob("*.pt"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print_json_line({"peak_mb": peak, "file_mb": files / 1e6, "seconds": time.perf_counter() - began})


def kills(args: argparse.Namespace, folder: Path) -> None:
    argv = ["--limit", str(args.rows), "--batch_size", "8"]

    def start(out: Path) -> int:
        pid = os.fork()  # a process of its own, spared the seconds that imports take
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            try:
                extract_hidden_states.main(flags(args, out, *argv))
            finally:
                os._exit(0)
        return pid

    def hashes(out: Path) -> list[str]:
        names = ("egpt_hidden_states.pt", "vl_hidden_states.pt", "positions.pt", "samples.jsonl")
        return [hashlib.sha256((out / "hidden_states" / args.split / name).read_bytes()).hexdigest() for name in names]

    began = time.perf_counter()
    os.waitpid(start(folder / "whole"), 0)
    seconds, wanted, table = time.perf_counter() - began, hashes(folder / "whole"), []
    moments = random.Random(0)
    for kill in range(20):
        out = folder / f"kill{kill}"
        pid, after = start(out), moments.uniform(0.1, 1) * seconds
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        notes = out / "hidden_states" / f"{args.split}.unfinished" / "progress-0.txt"
        complete = (out / "hidden_states" / args.split).is_dir()
        done = args.rows if complete else notes.read_bytes().count(b"\n") if notes.is_file() else 0
        os.waitpid(start(out), 0)
        table.append((f"{kill + 1}", after, done, hashes(out) == wanted))
    print_table(f"{args.rows} rows, {seconds:.1f} s uninterrupted", ("kill", "after s", "rows noted", "identical"), table)
    print_json_line({"kills": len(table), "identical": sum(row[-1] for row in table), "rows_noted": [row[2] for row in table]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory", "kills", "one"])
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--split", default="test")
    parser.add_argument("--rows", type=int, help="default: 256 for speed, 64 for kills")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.rows = args.rows or (64 if args.what == "kills" else 256)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        {"speed": speed, "memory": memory, "kills": kills, "one": one_run}[args.what](args, Path(folder))


if __name__ == "__main__":
    run(main)
