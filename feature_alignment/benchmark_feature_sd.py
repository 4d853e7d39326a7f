"""Tasks 3.2 and 3.3. Speculative against plain decoding: measured, modelled, and the six targets.

reads   both checkpoints, adapter/adapter.pt, chained_adapter/adapter.pt, a manifest, token_pairs/<train split>.json,
        acceptance/acceptance.json
writes  benchmark/benchmark.json, report.md, report.html, five pictures; with --planted_acceptance planted.json and planted.md instead

    python feature_alignment/benchmark_feature_sd.py --config configs/demo.yaml
    python feature_alignment/benchmark_feature_sd.py compare A.json B.json
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_alignment.cli.advice import command_for
from feature_alignment.cli.config import Common, Steps, parse_config
from feature_alignment.cli.console import UserError, print_json_line, progress, run

if TYPE_CHECKING:
    from feature_alignment.decoding.engine import Generation
    from feature_alignment.inputs.samples import Sample
    from feature_alignment.models.decoder import Prompt


@dataclass(frozen=True)
class BenchmarkConfig(Common):
    """Measure speed-up and fidelity of every mode on the same prompts, in one process, and read off the six targets. Reads both
    checkpoints, the adapters and acceptance/; writes benchmark.json, report.md, report.html and pictures under benchmark/.

    Args:
        split: manifest the prompts are taken from
        train_split: whose answers the null drafters know
        num_draft_tokens: drafts per verification, one row each
        most_draft_tokens: the most drafts per verification of the adaptive rows
        threshold: cosines above which feature and relaxed keep a draft, one row each
        exit_adapters: hidden adapters that read another single layer of EventGPT each, for a row of aligned drafts each
        planted_acceptance: measure wall clock alone, with drafts kept by chance at these rates instead of by what they say: for a pair
            with --random_weights, whose text is noise; untrained adapters will do. Writes planted.json, judges no target
        max_new_tokens: longest answer, EOS included
        steps: how models step: eager; graphs = over caches of a fixed size, recorded once and replayed (CUDA graphs; on
            other devices only the fixed size); compiled = recorded steps that torch.compile has fused, after a minute of compiling
        assistant_layers: how many of Video-LLaVA's own layers assist transformers' generate, for comparison
        repeats: timed runs of every method on every prompt
        warmup: prompts run before, untimed
    """

    split: str = "test"
    train_split: str = "train"
    num_draft_tokens: list[int] = dataclasses.field(default_factory=lambda: [3, 5, 8])
    most_draft_tokens: int = 24
    threshold: list[float] = dataclasses.field(default_factory=lambda: [0.9])
    exit_adapters: list[Path] = dataclasses.field(default_factory=list)
    planted_acceptance: list[float] = dataclasses.field(default_factory=list)
    max_new_tokens: int = 64
    steps: Steps = "eager"
    assistant_layers: int = 1
    repeats: int = 3
    warmup: int = 3


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["compare"]:
        from feature_alignment.benchmark.compare import compare

        return compare(argv[1:])
    cfg = parse_config(BenchmarkConfig, argv, "benchmark_feature_sd")
    from feature_alignment.storage.processes import check_device, claimed

    check_device(cfg.device)
    with claimed(cfg.out / "benchmark"):
        return benchmark(cfg)


def benchmark(cfg: BenchmarkConfig) -> dict[str, Any]:
    """Measure, or reuse what is there; returns the content of benchmark.json."""
    import numpy as np

    from feature_alignment.benchmark import report, speed_model, targets
    from feature_alignment.benchmark import timing as measure
    from feature_alignment.benchmark import transformers_baselines as generate
    from feature_alignment.benchmark.rows import Mode, answering, layers_of, modes, row_name, speeds
    from feature_alignment.decoding.draft_length import Pace
    from feature_alignment.decoding.engine import PREFILL_STAGES, greedy, speculate
    from feature_alignment.decoding.sources import Sources
    from feature_alignment.inputs.samples import read_samples
    from feature_alignment.measurement.metrics import break_even
    from feature_alignment.models import fixed
    from feature_alignment.models.loading import fetch_checkpoints
    from feature_alignment.models.pair import load_pair
    from feature_alignment.storage import artifacts

    samples = read_samples(cfg.manifests, cfg.split, questions=cfg.questions, allow_outside=cfg.allow_outside)
    number = min(cfg.limit or len(samples), len(samples))
    samples = [samples[i * len(samples) // number] for i in range(number)]  # spread over the clips, which the intervals resample
    fetch_checkpoints(cfg)
    if cfg.planted_acceptance:
        return planted_benchmark(cfg, samples)
    acceptance_path = cfg.out / "acceptance" / "acceptance.json"
    acceptance = artifacts.read_sealed(acceptance_path, command_for("measure_feature_acceptance"))
    out = cfg.out / "benchmark"
    chained_path = cfg.out / "chained_adapter" / "adapter.pt"
    made_from: dict[str, Path | Sequence[Path]] = {
        "target": cfg.target_id,
        "draft": cfg.draft_id,
        "acceptance": acceptance_path,
        "adapter": cfg.out / "adapter" / "adapter.pt",
        "chained_adapter": chained_path,
        "texts": cfg.out / "token_pairs" / f"{cfg.train_split}.json",
        "manifest": cfg.manifests[cfg.split],
        "clips": clips_of(samples),
        **({"questions": cfg.questions} if cfg.questions else {}),
        **({"exit_adapters": cfg.exit_adapters} if cfg.exit_adapters else {}),
    }
    identity = artifacts.identity_of("benchmark_feature_sd", cfg, made_from, timed=True)
    result = artifacts.reusable(out / "benchmark.json", cfg, identity)
    if result is not None:
        _show(result, out, reused=True)
        return result
    has_chain = chained_path.is_file()
    if has_chain and "chained" not in acceptance["chains"]:
        measure_again = command_for("measure_feature_acceptance")
        raise UserError(f"{acceptance_path} does not know {chained_path} yet. Measure again:\n  {measure_again}")
    pair = load_pair(cfg)
    pair.record(cfg.steps)
    sources = Sources(pair, cfg, cfg.train_split)
    exits = dict(sources.open_exit(path) for path in cfg.exit_adapters)
    if len(exits) < len(cfg.exit_adapters):
        raise UserError(f"--exit_adapters: {len(cfg.exit_adapters)} files read layers {sorted(exits)}; wanted one for each layer.")
    adapters = ("chained", "aligned") if has_chain else ("aligned",)
    rows_of = modes(cfg.num_draft_tokens, cfg.most_draft_tokens, cfg.threshold, adapters, sorted(exits))
    proposers = {name: sources.open(name) for name in {mode.draft for mode in rows_of}}
    adapter, chained = sources.adapter, sources.chained_adapter if has_chain else None
    prompts = [(pair.target.prepare(s), pair.draft.prepare(s)) for s in samples]
    clips = [s.sequence for s in samples]

    cost = measure.costs(pair.target, pair.draft, adapter, chained, *prompts[0])
    cost |= measure.machine_costs(pair.target, sources.full_draft, cost, *prompts[0], layers=exits)

    def method(mode: Mode) -> Callable[[int], Generation]:
        pace = Pace(sources.known_acceptance(mode.draft)) if mode.adaptive else None

        def answer(i: int) -> Generation:
            prompt, draft_prompt = prompts[i]
            return speculate(
                pair.target,
                proposers[mode.draft] if mode.exit_layer is None else exits[mode.exit_layer],
                prompt,
                draft_prompt,
                accept=mode.accept,
                threshold=mode.threshold or 0.0,
                num_draft_tokens=mode.num_draft_tokens,
                max_new_tokens=cfg.max_new_tokens,
                pace=pace,
                overlap=mode.overlap,
            )

        return answer

    ways: dict[str, Callable[[Prompt], Generation]] = {"plain": lambda prompt: greedy(pair.target, prompt, cfg.max_new_tokens)}
    ways |= generate.ways(pair.target, cfg.max_new_tokens, cfg.num_draft_tokens[0], cfg.assistant_layers)
    methods: dict[Any, Callable[[int], Generation]] = {name: answering(way, prompts) for name, way in ways.items()}
    methods |= {m: method(m) for m in rows_of}
    bar = functools.partial(progress, desc="benchmark", unit="prompt")
    for _ in range(2):  # the second time all is warm
        measure.run_in_turns(methods, min(cfg.warmup, len(samples)), 1, iter)
    proposers["previous"] = sources.open("previous")  # it has heard answers that are asked for again
    timed = measure.run_in_turns(methods, len(samples), cfg.repeats, bar)
    plain, costs = timed["plain"], speed_model.Costs.of([(m, timed[m]) for m in rows_of], timed["plain"], cost["loop"]["v"])
    cost |= costs.report(cost["loop"], clips)

    rows, log_likelihood = [], measure.log_likelihoods(pair.target, [p for p, _ in prompts])
    for mode in rows_of:
        runs = timed[mode]
        row: dict[str, Any] = speeds(mode, runs, plain, clips, costs)
        row["draft_layers"] = layers_of(mode, pair.draft.taps)
        row["fidelity"] = measure.fidelity(pair.target, log_likelihood, samples, runs, plain)
        row["exact_match"] = row["fidelity"]["exact_match"]["value"]
        if mode.accept == "token":
            row["mismatches"] = measure.mismatches(pair.target, [p for p, _ in prompts], samples, runs, plain)
        rows.append(row)

    cost["bound"] = {}
    for mode, row in zip(rows_of, rows, strict=True):
        round_cost = costs.all.round_cost(speed_model.drafter_of(mode))
        if round_cost and mode.draft in ("aligned", "chained") and mode.accept == "token" and not mode.adaptive and mode.exit_layer is None:
            cost["bound"][mode.draft] = speed_model.bound(row["acceptance_rate"]["value"], round_cost, cost)
    end_to_end, decoding = (lambda g: g.total_ms), (lambda g: g.decode_ms)
    candidates = [m for m in rows_of if targets.lossless(m)]
    fastest = measure.fastest([timed[m] for m in candidates], plain, clips, end_to_end)
    best = candidates[fastest.best]
    speedups = {
        "speedup": measure.speedup(plain, fastest.runs, clips, end_to_end),
        "decode_speedup": measure.speedup(plain, fastest.runs, clips, decoding),
    }
    fastest_row = targets.report_fastest(fastest, [rows[rows_of.index(m)] for m in candidates], speedups)
    baselines = [
        {
            "name": "plain greedy",
            "prompts": len(samples),
            "tokens": sum(len(t) for t in plain.texts),
            "total_ms": float(plain.per_prompt(end_to_end).sum()),
            "prefill_ms": float(plain.per_prompt(lambda g: sum(g.ms.get(s, 0.0) for s in PREFILL_STAGES)).sum()),
            "decode_ms": float(plain.per_prompt(lambda g: g.decode_ms).sum()),
            "best_over_it": speedups["speedup"],
            "fidelity": measure.fidelity(pair.target, log_likelihood, samples, plain, plain),
        }
    ]
    for name in list(ways)[1:]:
        runs = timed[name]
        baselines.append(
            {
                "name": name,
                "total_ms": float(runs.per_prompt(end_to_end).sum()),
                "speedup": measure.speedup(plain, runs, clips, end_to_end),
                "best_over_it": measure.speedup(runs, fastest.runs, clips, end_to_end),
                "exact_match": float(np.mean([a == b for a, b in zip(runs.texts, plain.texts, strict=True)])),
                "mismatches": measure.mismatches(pair.target, [p for p, _ in prompts], samples, runs, plain),
            }
        )
    in_use = targets.adapter_in_use(
        rows[rows_of.index(best)], adapter, chained, acceptance, cost, cfg.device, pair.target.head_weight.dtype, cfg.steps
    )
    result = {
        "meta": artifacts.provenance(
            "benchmark_feature_sd", cfg, made_from, identity, device=cfg.device, dtype=cfg.dtype, unrecorded=fixed.unrecorded
        ),
        "baselines": baselines,
        "rows": rows,
        "cost": cost,
        "break_even": {
            str(g): {"1.0": break_even(g * cost["c"], g), str(targets.GOAL): break_even(g * cost["c"], g, targets.GOAL)}
            for g in cfg.num_draft_tokens
        },
        "fastest_lossless": fastest_row,
        "targets": targets.read(in_use, rows, fastest_row),
    }
    shown = {"plain greedy": plain.generations[0][0], row_name(rows[rows_of.index(best)]): timed[best].generations[0][0]}
    report.write_benchmark_report(result, shown, pair.target.tokenizer.decode, out)
    beside = ("report.md", "report.html", *(f"{name}.png" for name in report.PICTURES))
    artifacts.write_sealed(out / "benchmark.json", result, beside)  # last
    _show(result, out, reused=False)
    return result


def clips_of(samples: Sequence[Sample]) -> list[Path]:
    """The files of all clips, each once."""
    return list(dict.fromkeys(path for s in samples for path in (s.events, s.video)))


def planted_benchmark(cfg: BenchmarkConfig, samples: list[Sample]) -> dict[str, Any]:
    """Wall clock under stated acceptances: planted.json and planted.md, beside whatever else was measured."""
    from feature_alignment.benchmark import planted
    from feature_alignment.storage import artifacts

    out, clips = cfg.out / "benchmark", clips_of(samples)
    files: dict[str, Path | Sequence[Path]] = {"target": cfg.target_id, "draft": cfg.draft_id, "manifest": cfg.manifests[cfg.split]}
    adapters = {name: cfg.out / f"{name}/adapter.pt" for name in ("adapter", "chained_adapter")}  # untrained ones, where they are missing
    made_from = files | {"clips": clips} | {name: path for name, path in adapters.items() if path.is_file()}
    identity = artifacts.identity_of("benchmark_feature_sd", cfg, made_from, timed=True)
    result = artifacts.reusable(out / "planted.json", cfg, identity)
    reused = result is not None
    if result is None:
        sizes = cfg.num_draft_tokens, cfg.planted_acceptance, cfg.max_new_tokens, cfg.repeats, cfg.warmup
        result = planted.run(cfg, cfg.steps, samples, ("chained", "aligned"), *sizes, made_from, identity)
        planted.write(result, out)
    planted.show(result)
    print_json_line({"planted": True, "best": result["best"], "reused": reused, "written": str(out / "planted.json")})
    return result


def _show(result: dict[str, Any], out: Path, reused: bool) -> None:
    from feature_alignment.benchmark.report import print_benchmark

    print_benchmark(result)
    met = sum(t["met"] for t in result["targets"])
    print_json_line({"targets_met": met, "targets": len(result["targets"]), "reused": reused, "written": str(out / "benchmark.json")})


if __name__ == "__main__":
    run(main)
