"""What one draft token of the attending adapter costs on a finished run, and whether folding changes which tokens are drafted; one thread.

    python tests/benchmarks/attending_step.py                                   # the language pair's run
    python tests/benchmarks/attending_step.py --variant ablation_full           # another adapter of that run
    python tests/benchmarks/attending_step.py --cpu_time                        # on a busy machine: processor time of this process

The reference is the roll-out of training (`Reader`), in which nothing is folded or cached.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from feature_alignment.adapters.attending import AttendingAdapter, load_attending_adapter
from feature_alignment.adapters.attending_drafts import FoldedAttending
from feature_alignment.adapters.attending_texts import answers_of, prompted_texts, proposals
from feature_alignment.adapters.attending_training import Reader, all_origins
from feature_alignment.benchmark.timing import attending_ms
from feature_alignment.benchmark_feature_sd import BenchmarkConfig
from feature_alignment.cli.config import parse_config
from feature_alignment.cli.console import print_json_line, print_table, run
from feature_alignment.decoding.attending_proposer import AttendingProposer
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.proposers import Draft
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.inputs.samples import read_samples
from feature_alignment.models.pair import load_pair
from feature_alignment.storage.files import load_pt
from feature_alignment.storage.hidden_states import load_hidden_states

BLOCK, STEPS, TIES, AGAIN = 5, 5, 1e-4, 20
STAGES = ("read", "adapter", "head")


class Recorded(AttendingProposer):
    """The proposer; `again` drafts the last round once more, which reads nothing new."""

    def propose(self, *args: Any, **options: Any) -> Draft:
        self._last = args
        return super().propose(*args, **options)

    def again(self, watch: Stopwatch) -> int:
        emitted, states, _, _, *rest = self._last
        return len(super().propose(emitted, states, BLOCK, watch, *rest).token_ids)


@torch.inference_mode()
def differences(adapter: AttendingAdapter, outputs: Path, rows: int) -> dict[str, Any]:
    """Draft tokens of both ways from every position of a run's test texts, with the text known.

    Args:
        adapter: trained
        outputs: output directory of its run
        rows: number of texts
    """
    folder = outputs / "hidden_states"
    head, embeddings = (load_pt(folder / f"{name}.pt", "run_all.sh").float() for name in ("vl_lm_head", "vl_embeddings"))
    states = load_hidden_states(folder / "test", events=True, prompt=True)
    reader, folded = Reader(adapter, head, embeddings), FoldedAttending(adapter, head, embeddings)
    found, texts_of = proposals(states, folded.table, leave_out=False), answers_of(states)
    every = torch.arange(0, len(states.rows), max(1, len(states.rows) // rows))
    compared, gaps = 0, []
    for row, texts in zip(every.tolist(), prompted_texts(states, found, every.split(1), "cpu"), strict=True):
        ids, p = list(texts_of[row].tokens), int(texts.prompt_mask.sum())
        wanted = [step.logits[0] for step in reader.roll_out(texts, all_origins(texts), STEPS)]
        proposed = torch.stack([texts.proposed[0], texts.buckets[0]], -1).tolist()
        folded.start(texts.events)
        folded.read_prompt(*(x[0, x.shape[1] - p :] for x in (texts.prompt, texts.prompt_inputs)))
        for origin in range(len(ids) - 1):
            before = int(texts.before) if origin == 0 else ids[origin - 1]
            output = folded.read(origin, texts.states[0, origin : origin + 1], [before, ids[origin]], proposed[origin : origin + 1])
            for k in range(min(STEPS, len(ids) - 1 - origin)):
                at = origin + k
                if k:
                    output = folded.go_on(at, output, ids[at - 1 : at + 1], proposed[at])
                compared += 1
                if (reference := wanted[k][origin]).argmax() != folded.logits(output, proposed[at]).argmax():
                    best = reference.topk(2).values
                    gaps.append(float(best[0] - best[1]))
    return {"compared": compared, "different": len(gaps), "logit_gaps": gaps, "only_ties": all(gap < TIES for gap in gaps)}


def live(adapter: AttendingAdapter, cfg: BenchmarkConfig, prompts: int) -> dict[str, float]:
    """Milliseconds of a draft token by stage: while decoding, and in a loop of nothing else after each text.

    Args:
        adapter: trained
        cfg: of the run
        prompts: number of prompts; the first one is a warm-up
    """
    pair = load_pair(cfg)
    pair.choose_linear()
    proposer = Recorded(pair.draft, adapter, pair.target)
    samples = read_samples(cfg.manifests, "test")
    ms: dict[str, float] = defaultdict(float)
    drafted = redrafted = 0
    for i, sample in enumerate(samples[:: max(1, len(samples) // prompts)][:prompts]):
        prompt, draft_prompt = pair.target.prepare(sample), pair.draft.prepare(sample)
        got = speculate(
            pair.target, proposer, prompt, draft_prompt, num_draft_tokens=BLOCK, max_new_tokens=cfg.max_new_tokens, cosines=False
        )
        proposer.again(Stopwatch())
        watch = Stopwatch()
        number = sum(proposer.again(watch) for _ in range(AGAIN))
        if i:
            drafted, redrafted = drafted + sum(len(r.proposed) for r in got.rounds), redrafted + number
            for stage in STAGES:
                ms[f"live, {stage}"] += got.ms[stage]
                ms[f"alone, {stage}"] += watch.ms[stage]
            ms["prompt"] += got.ms["draft_prefill"] / (prompts - 1)
    found = {name: x if name == "prompt" else x / (drafted if name.startswith("live") else redrafted) for name, x in ms.items()}
    totals = {way: sum(found[f"{way}, {stage}"] for stage in STAGES) for way in ("live", "alone")}
    return {**found, **totals, "overhead": found["live, read"] + found["live, adapter"], "ratio": totals["live"] / totals["alone"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/language.yaml"))
    parser.add_argument("--outputs", type=Path, default=Path("outputs/language"))
    parser.add_argument("--variant", default="", help="of the adapter; without one the adapter of the run")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--rows", type=int, default=40, help="texts that are compared")
    parser.add_argument("--cpu_time", action="store_true", help="measure processor time instead of elapsed time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    clock: Callable[[], float] = time.thread_time if args.cpu_time else time.perf_counter
    Stopwatch.now = lambda self: clock() * 1e3  # type: ignore[method-assign]
    words = ["--config", str(args.config), "--output_dir", str(args.outputs), "--threads", "1", "--ignore_code", "true"]
    folder = f"attending_adapter_{args.variant}" if args.variant else "attending_adapter"
    adapter = load_attending_adapter(args.outputs / folder / "adapter.pt")[0].eval()
    found: dict[str, Any] = {"tokens": differences(adapter, args.outputs, args.rows), "in a loop": attending_ms(adapter)}
    found |= live(adapter, parse_config(BenchmarkConfig, words, "benchmark_feature_sd"), args.prompts)
    cells = [(name, f"{x:.3f}") for name, x in found.items() if isinstance(x, float)]
    print_table(f"a draft token of {folder}, ms", ("", ""), cells)
    print_json_line(found)


if __name__ == "__main__":
    run(main)
