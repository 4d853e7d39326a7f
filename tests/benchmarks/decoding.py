"""Decoding on the embedded pair, from a cold start, in one process and in turns with plain greedy decoding.

    python tests/benchmarks/decoding.py floor      adaptive drafts of every source on several prompt sets: is any slower than plain by 3 %?
    python tests/benchmarks/decoding.py hybrid     the n-gram table, the chained adapter and both together
    python tests/benchmarks/decoding.py batch      several prompts at once, speculative and plain

After `bash run_all.sh`, whose adapters and texts it reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from feature_alignment.benchmark import timing
from feature_alignment.benchmark_feature_sd import BenchmarkConfig
from feature_alignment.cli.config import parse_config
from feature_alignment.cli.console import print_json_line, print_table, run
from feature_alignment.decoding.batch import speculate_batch
from feature_alignment.decoding.draft_length import DraftLengthController
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.generation import Generation
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.sources import Sources
from feature_alignment.inputs.samples import Sample, read_samples
from feature_alignment.measurement.metrics import Counts, Rate
from feature_alignment.models.pair import load_pair

SOURCES = ("own", "aligned", "chained", "hybrid", "ngram", "template", "lookup", "previous", "tables")
AGAIN = "plain again"
MOST = 24
RUNS, NEAR, MORE_RUNS = 32, 1.1, 192  # of a prompt set, at least, and of a source that is near plain decoding there


class Bench:
    """The pair, its drafters and the test prompts."""

    def __init__(self) -> None:
        self.cfg = parse_config(BenchmarkConfig, ["--config", "configs/demo.yaml"], "benchmark_feature_sd")
        self.pair = load_pair(self.cfg)
        self.pair.use_steps(self.cfg.steps)
        self.pair.choose_linear()
        self.sources = Sources(self.pair, self.cfg)
        self.samples = read_samples(self.cfg.manifests, "test")
        self.prompts = {s.id: (self.pair.target.prepare(s), self.pair.draft.prepare(s)) for s in self.samples}

    def plain(self, sample: Sample) -> Generation:
        return greedy(self.pair.target, self.prompts[sample.id][0], self.cfg.max_new_tokens)

    def adaptive(self, source: str, overlap: bool = False) -> Callable[[Sample], Generation]:
        """Answers with a drafter of its own and a new controller, which knows at most what training found."""
        proposer, controller = self.sources.open(source), DraftLengthController(self.sources.known_acceptance(source))

        def answer(sample: Sample) -> Generation:
            prompt, draft_prompt = self.prompts[sample.id]
            return speculate(
                self.pair.target,
                proposer,
                prompt,
                draft_prompt,
                num_draft_tokens=MOST,
                max_new_tokens=self.cfg.max_new_tokens,
                controller=controller,
                overlap=overlap,
            )

        return answer

    def beside_plain(self, ways: Sequence[str], samples: Sequence[Sample], starts: int) -> list[tuple[str, int, float, float]]:
        """(way, cold start, ms of plain decoding, ms of the way) of every run. Each stands between two runs of plain decoding, whose
        mean is taken."""
        runs = []
        for start in range(starts):
            answers = {way: self.plain if way == AGAIN else self.adaptive(way) for way in ways}
            for sample in samples:
                before = self.plain(sample)
                for way, answer in answers.items():
                    found, after = answer(sample), self.plain(sample)
                    assert found.token_ids == before.token_ids, f"{way} is not lossless"
                    runs.append((way, start, (before.total_ms + after.total_ms) / 2, found.total_ms))
                    before = after
        return runs


def spread(samples: Sequence[Sample], number: int) -> list[Sample]:
    return [samples[i * len(samples) // number] for i in range(number)]


def floor(bench: Bench) -> dict[str, Any]:
    """Sums over sums, intervals resample cold starts; "plain again" is how far two runs of the same thing are apart. A source that is
    near plain decoding is run more often."""
    questions = list(dict.fromkeys(s.question for s in bench.samples))
    sets = {f"{n} prompts": spread(bench.samples, n) for n in (4, 8, 16, 32)}
    sets |= {f"question {i + 1}": [s for s in bench.samples if s.question == q][:16] for i, q in enumerate(questions[:2])}
    events = [s.events for s in bench.samples]
    strangers = [dataclasses.replace(s, id=f"{s.id}, other events", events=events[i - 60]) for i, s in enumerate(bench.samples)]
    sets["events of other clips"] = spread(strangers, 16)
    for s in sets["events of other clips"]:
        bench.prompts[s.id] = bench.pair.target.prepare(s), bench.pair.draft.prepare(s)
    for s in bench.samples[:3]:
        bench.plain(s)  # warm-up of the machine, not of any drafter
    rows, worst = [], {"value": 1.0}
    for name, samples in sets.items():
        runs = bench.beside_plain((AGAIN, *SOURCES), samples, max(2, RUNS // len(samples)))
        near = [source for source in SOURCES if speedup(runs, source)["value"] < NEAR]
        if near:
            first = 1 + max(start for _, start, _, _ in runs)
            more = bench.beside_plain(near, samples, max(6, MORE_RUNS // len(samples)) - first)
            runs += [(way, first + start, plain_ms, ms) for way, start, plain_ms, ms in more]
        for way in (AGAIN, *SOURCES):
            rate = speedup(runs, way)
            rows.append((name, way, sum(run[0] == way for run in runs), rate.text(3)))
            if way != AGAIN and rate.value < worst["value"]:
                worst = rate.to_json() | {"prompts": name, "drafts": way}
    print_table("speed-up end to end, adaptive, from cold starts", ("prompt set", "drafts", "runs", "speed-up"), rows)
    return {"worst": worst, "rows": rows}


def speedup(runs: list[tuple[str, int, float, float]], way: str) -> Rate:
    starts, plain_ms, ms = zip(*((start, a, b) for who, start, a, b in runs if who == way), strict=True)
    return Counts(np.array(plain_ms), np.array(ms)).rate([str(start) for start in starts])


def hybrid(bench: Bench) -> dict[str, Any]:
    samples = spread(bench.samples, 64)
    answers = {name: bench.adaptive(name, overlap=name != "ngram") for name in ("ngram", "chained", "hybrid")}
    for answer in answers.values():
        for s in samples[:4]:
            answer(s)
    methods = {name: lambda i, answer=answer: answer(samples[i]) for name, answer in {"plain": bench.plain, **answers}.items()}
    timed = timing.run_in_turns(methods, len(samples), 1, iter)
    assert all(runs.texts == timed["plain"].texts for runs in timed.values()), "not lossless"
    clips, end_to_end, decoding = [s.sequence for s in samples], lambda g: g.total_ms, lambda g: g.decode_ms
    rows = []
    for name in answers:
        passes = sum(g[0].passes for g in timed[name].generations)
        tokens = sum(len(t) - 1 for t in timed[name].texts) / passes
        against = [timing.speedup(timed["plain"], timed[name], clips, what).text(2) for what in (end_to_end, decoding)]
        by_hybrid = [timing.speedup(timed[name], timed["hybrid"], clips, what).text(3) for what in (end_to_end, decoding)]
        rows.append((name, *against, round(tokens, 2), *by_hybrid))
    header = ("drafts", "speed-up, end to end", "decoding", "tokens per pass", "hybrid's over it, end to end", "decoding")
    print_table(f"{len(samples)} prompts, up to {MOST} drafts", header, rows)
    return {"rows": [list(map(str, row)) for row in rows]}


def batch(bench: Bench) -> dict[str, Any]:
    """Speed-ups in batches. Drafting saves no prefill, so plain decoding's share of it bounds them: "at most" is with free decoding.

    All ways take turns on each batch, and each repeat begins with another one, because the first of a turn finds cold caches.
    """
    rows, limit, samples = [], bench.cfg.max_new_tokens, spread(bench.samples, 32)
    plain, *drafting = ways = [(0, False), *((number, overlap) for overlap in (False, True) for number in (3, 5, 8))]
    proposers = [bench.sources.open("chained") for _ in range(8)]
    texts = {s.id: bench.plain(s).token_ids for s in samples}
    for size in (1, 2, 4, 8):
        ms, prefill = dict.fromkeys(ways, 0.0), 0.0
        for repeat, first in product(range(len(ways)), range(0, 32, size)):
            group = samples[first : first + size]
            prompts, draft_prompts = zip(*(bench.prompts[s.id] for s in group), strict=True)
            for number, overlap in ways[repeat:] + ways[:repeat]:
                settings = {"num_draft_tokens": number, "max_new_tokens": limit, "overlap": overlap}
                found = speculate_batch(bench.pair.target, proposers[:size], prompts, draft_prompts, **settings)
                assert found.token_ids == [texts[s.id] for s in group]
                ms[number, overlap] += found.total_ms
                prefill += 0.0 if number else found.ms["target_prefill"]
        rows.append((str(size), ms[plain] / 32 / len(ways), *(ms[plain] / ms[way] for way in drafting), ms[plain] / prefill))
    columns = ("batch", "plain, ms a prompt", *(f"{n} drafts{', overlapped' * overlap}" for n, overlap in drafting), "at most")
    print_table("32 prompts in batches, chained drafts: speed-up end to end", columns, rows)
    return {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["floor", "hybrid", "batch"])
    what = parser.parse_args().what
    print_json_line({"floor": floor, "hybrid": hybrid, "batch": batch}[what](Bench()))


if __name__ == "__main__":
    run(main)
