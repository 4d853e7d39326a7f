"""Tasks 3.2 and 3.3. Speed of speculative against plain decoding, measured and modelled, and the six targets.

reads   both checkpoints, adapter/adapter.pt, chained_adapter/adapter.pt, a manifest, token_pairs/<train split>.json,
        acceptance/acceptance.json
writes  benchmark/benchmark.json, speculation_profile.json, lossy_rules.json, report.md, report.html, pictures; with
        --planted_acceptance planted.json and planted.md instead

    python feature_alignment/benchmark_feature_sd.py --config configs/demo.yaml
    python feature_alignment/benchmark_feature_sd.py compare A.json B.json
    python feature_alignment/benchmark_feature_sd.py summary outputs/*/
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_alignment.cli.advice import command_for
from feature_alignment.cli.config import Common, DraftVocabulary, StepsSetting, parse_config
from feature_alignment.cli.console import UserError, print_json_line, run
from feature_alignment.decoding.settings import DrafterName

if TYPE_CHECKING:
    from feature_alignment.benchmark.results import BenchmarkReport
    from feature_alignment.benchmark.run import Measurements, Setup
    from feature_alignment.decoding.generation import Generation
    from feature_alignment.inputs.samples import Sample
    from feature_alignment.measurement.records import Meta
    from feature_alignment.measurement.reports import AcceptanceReport
    from feature_alignment.models.state import Prompt


@dataclass(frozen=True)
class BenchmarkConfig(Common):
    """Measure speed-up and fidelity of every mode on the same prompts in one process, and compare them with the six targets.

    Reads both checkpoints, the adapters and acceptance/; writes benchmark.json, report.md, report.html and pictures under benchmark/.

    Args:
        split: manifest that the prompts are taken from
        train_split: split whose answers the baseline drafters are fitted on
        num_draft_tokens: draft tokens per verification, one row each
        drafters: measure these drafters only, and the chained adapter (the aligned drafts if it is not trained); default: all
        most_draft_tokens: largest number of draft tokens per verification in the adaptive rows
        threshold: cosines above which the feature and relaxed rules accept a draft token, one row each
        exit_adapters: hidden adapters that read one other layer of EventGPT each, for one row of aligned drafts each
        planted_acceptance: measure wall clock only: draft tokens are accepted at random with these probabilities, whatever they say; a
            speculation_profile.json replays its acceptance by draft position. For a pair with --random_weights, whose text is noise;
            adapters need not be trained. Writes planted.json and judges no target
        max_new_tokens: longest answer, EOS included
        steps: how models step: auto = compiled on a GPU, eager on a CPU; eager; graphs = CUDA graphs over caches of a fixed size (on
            other devices the fixed cache alone); compiled = also fused by torch.compile, after a minute of compilation
        draft_vocabulary: chained drafts only this many token ids, those most frequent in training answers, which makes the head
            cheaper and changes no text that is not sampled; auto = as many as pay, by measured cost and coverage (default: all)
        assistant_layers: number of Video-LLaVA's own layers that assist transformers' generate, for comparison
        repeats: timed runs of every method on every prompt
        warmup: number of prompts that are run first, untimed
    """

    split: str = "test"
    train_split: str = "train"
    num_draft_tokens: list[int] = dataclasses.field(default_factory=lambda: [3, 5, 8])
    drafters: list[DrafterName] = dataclasses.field(default_factory=list)
    most_draft_tokens: int = 24
    threshold: list[float] = dataclasses.field(default_factory=lambda: [0.9])
    exit_adapters: list[Path] = dataclasses.field(default_factory=list)
    planted_acceptance: list[float | Path] = dataclasses.field(default_factory=list)
    max_new_tokens: int = 64
    steps: StepsSetting = "auto"
    draft_vocabulary: DraftVocabulary = None
    assistant_layers: int = 1
    repeats: int = 3
    warmup: int = 3


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script, or its commands `compare` and `summary`; returns the content of benchmark.json or planted.json."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["compare"]:
        from feature_alignment.benchmark.compare import compare

        return compare(argv[1:])
    if argv[:1] == ["summary"]:
        from feature_alignment.benchmark.summary import summarize

        return summarize(argv[1:])
    cfg = parse_config(BenchmarkConfig, argv, "benchmark_feature_sd")
    from feature_alignment.storage.processes import check_device, exclusive_lock

    check_device(cfg.device)
    with exclusive_lock(cfg.out / "benchmark"):
        return benchmark(cfg)


def benchmark(cfg: BenchmarkConfig) -> dict[str, Any]:
    """Measure, or reuse a cached result; returns the content of benchmark.json."""
    from feature_alignment.benchmark import report, transformers_baselines
    from feature_alignment.benchmark.chain_loop import ChainLoop
    from feature_alignment.benchmark.plots import PICTURES
    from feature_alignment.benchmark.results import BenchmarkReport
    from feature_alignment.benchmark.run import Measurements, part_costs, profiles, take_turns
    from feature_alignment.benchmark.sweep import sweep
    from feature_alignment.benchmark.targets import TARGET_DRAFT_TOKENS
    from feature_alignment.decoding.plain import greedy
    from feature_alignment.measurement.current_acceptance import ADAPTERS, current_acceptance
    from feature_alignment.models import fixed
    from feature_alignment.models.loading import fetch_checkpoints
    from feature_alignment.storage.artifacts import cached_result, provenance
    from feature_alignment.storage.files import write_hashed_json
    from feature_alignment.storage.identity import identity_of

    samples = spread_samples(cfg)
    fetch_checkpoints(cfg)
    if cfg.planted_acceptance:
        return planted_benchmark(cfg, samples)
    made_from = inputs_of(cfg, samples)
    acceptance = current_acceptance(cfg.out, cfg.split, tuple(ADAPTERS), TARGET_DRAFT_TOKENS)
    out = cfg.out / "benchmark"
    identity = identity_of("benchmark_feature_sd", cfg, made_from, timed=True)
    cached = cached_result(out / "benchmark.json", cfg, identity)
    if cached is not None:
        _show(BenchmarkReport.from_json(cached), out, reused=True)
        return cached

    setup = open_setup(cfg, samples)
    target, part_cost = setup.pair.target, part_costs(setup)
    ways: dict[str, Callable[[Prompt], Generation]] = {"plain": lambda prompt: greedy(target, prompt, cfg.max_new_tokens)}
    ways |= transformers_baselines.ways(target, cfg.max_new_tokens, cfg.num_draft_tokens[0], cfg.assistant_layers)
    chain = ChainLoop()
    timed = take_turns(setup, ways, cfg.max_new_tokens, cfg.repeats, cfg.warmup, chain)
    about: dict[str, Any] = {"device": cfg.device, "dtype": cfg.dtype, "eager_fallbacks": fixed.eager_fallbacks}
    about["linear"] = {role: decoder.linear.to_json() for role, decoder in (("target", target), ("draft", setup.pair.draft))}
    if setup.chained is not None and (draft_ids := setup.sources.draft_ids) is not None:
        about["draft_vocabulary"] = len(draft_ids)
    meta = provenance("benchmark_feature_sd", cfg, made_from, identity, **about)
    measurements = Measurements.of(setup, timed, part_cost, chain)
    result, shown = results_of(cfg, measurements, acceptance, list(ways)[1:], meta)
    found, lossy = profiles(measurements, result.cost), sweep(measurements, cfg.max_new_tokens)
    report.write_benchmark_report(result, found, lossy, shown, target.tokenizer.decode, out)
    write_hashed_json(out / "speculation_profile.json", {"meta": meta, "profiles": [p.to_json() for p in found]})
    write_hashed_json(out / "lossy_rules.json", {"meta": meta, **lossy.to_json()})
    files = ("report.md", "report.html", "speculation_profile.json", "lossy_rules.json", *(f"{name}.png" for name in PICTURES))
    write_hashed_json(out / "benchmark.json", result.to_json(), files)  # Last: its presence means that the report is complete.
    _show(result, out, reused=False)
    return result.to_json()


def spread_samples(cfg: BenchmarkConfig) -> list[Sample]:
    """The samples of the split, or `limit` of them spread over its clips, because the intervals resample clips."""
    from feature_alignment.inputs.samples import read_samples

    samples = read_samples(cfg.manifests, cfg.split, questions=cfg.questions, allow_outside=cfg.allow_outside)
    number = min(cfg.limit or len(samples), len(samples))
    return [samples[i * len(samples) // number] for i in range(number)]


def acceptance_path(cfg: BenchmarkConfig) -> Path:
    """File of the measured acceptance."""
    return cfg.out / "acceptance" / "acceptance.json"


def chained_path(cfg: BenchmarkConfig) -> Path:
    """File of the chained adapter."""
    return cfg.out / "chained_adapter" / "adapter.pt"


def attending_path(cfg: BenchmarkConfig) -> Path:
    """File of the attending adapter."""
    return cfg.out / "attending_adapter" / "adapter.pt"


def inputs_of(cfg: BenchmarkConfig, samples: Sequence[Sample]) -> dict[str, Path | Sequence[Path]]:
    """Every file that benchmark.json depends on, for its recorded hashes."""
    return {
        "target": cfg.target_id,
        "draft": cfg.draft_id,
        "acceptance": acceptance_path(cfg),
        "adapter": cfg.out / "adapter" / "adapter.pt",
        "chained_adapter": chained_path(cfg),
        **({"attending_adapter": attending_path(cfg)} if attending_path(cfg).is_file() else {}),
        "texts": cfg.out / "token_pairs" / f"{cfg.train_split}.json",
        "manifest": cfg.manifests[cfg.split],
        "clips": clips_of(samples),
        **({"questions": cfg.questions} if cfg.questions else {}),
        **({"lexicon": cfg.lexicon} if cfg.lexicon else {}),
        **({"exit_adapters": cfg.exit_adapters} if cfg.exit_adapters else {}),
    }


def open_setup(cfg: BenchmarkConfig, samples: list[Sample]) -> Setup:
    """Load both models and the adapters, open every drafter and prepare the prompts.

    Args:
        cfg: settings
        samples: samples to measure

    Raises:
        UserError: a drafter's adapter is not trained, or two exit adapters read the same layer
    """
    from feature_alignment.benchmark.rows import attending_modes, modes, of_drafters
    from feature_alignment.benchmark.run import Setup
    from feature_alignment.decoding.sources import Sources
    from feature_alignment.measurement.lexicon import Lexicon
    from feature_alignment.models.pair import load_pair

    lexicon = Lexicon.load(cfg.lexicon) if cfg.lexicon else None
    has_chain = chained_path(cfg).is_file()
    for name, path in (("chained", chained_path(cfg)), ("attending", attending_path(cfg))):
        if name in cfg.drafters and not path.is_file():
            raise UserError(f"--drafters {name}: nothing at {path}. Type:\n  {command_for('train_hidden_adapter', adapter=name)}")
    pair = load_pair(cfg)
    pair.use_steps(cfg.steps)
    pair.choose_linear()
    sources = Sources(pair, cfg, cfg.train_split, draft_vocabulary=cfg.draft_vocabulary)
    exits = dict(sources.load_exit_drafter(path) for path in cfg.exit_adapters)
    if len(exits) < len(cfg.exit_adapters):
        raise UserError(f"--exit_adapters: {len(cfg.exit_adapters)} files read layers {sorted(exits)}; expected one file for each layer.")
    adapters = ("chained", "aligned") if has_chain else ("aligned",)
    rows = modes(cfg.num_draft_tokens, cfg.most_draft_tokens, cfg.threshold, adapters, sorted(exits))
    if sources.draft_ids is not None:  # the chained adapter then has no distribution over all ids
        rows = [mode for mode in rows if mode.accept != "kl"]
    if attending_path(cfg).is_file():
        rows += attending_modes(cfg.num_draft_tokens, cfg.most_draft_tokens)
    rows = of_drafters(rows, cfg.drafters)
    proposers = {name: sources.open(name) for name in {mode.draft for mode in rows}}
    prompts = [(pair.target.prepare(s), pair.draft.prepare(s)) for s in samples]
    return Setup(pair, sources, sources.chained_adapter if has_chain else None, exits, proposers, rows, samples, prompts, lexicon)


def results_of(
    cfg: BenchmarkConfig, measurements: Measurements, acceptance: AcceptanceReport, names: Sequence[str], meta: Meta
) -> tuple[BenchmarkReport, dict[str, Generation]]:
    """Compute the rows, baselines and targets.

    Args:
        cfg: settings
        measurements: timed runs and costs
        acceptance: content of acceptance.json
        names: the `generate` baselines
        meta: provenance

    Returns:
        content of benchmark.json; row name -> a generation of the first prompt, for the report
    """
    from feature_alignment.benchmark import targets
    from feature_alignment.benchmark.results import BenchmarkReport
    from feature_alignment.benchmark.run import cost_of, fastest_lossless, generate_baseline, mode_rows, plain_baseline
    from feature_alignment.measurement.metrics import break_even

    setup = measurements.setup
    rows = mode_rows(measurements)
    fastest = fastest_lossless(measurements, rows)
    best_row = rows[setup.modes.index(fastest.mode)]
    cost = cost_of(measurements, rows)
    attending = setup.sources.attending_adapter if best_row.draft == "attending" else None
    adapters = setup.sources.adapter, setup.chained, acceptance, measurements.part_cost, setup.pair.draft.steps, attending
    in_use = targets.adapter_in_use(best_row, rows, *adapters)
    result = BenchmarkReport(
        meta=meta,
        plain=plain_baseline(measurements, fastest),
        generate=[generate_baseline(measurements, fastest, name) for name in names],
        rows=rows,
        cost=cost,
        break_even={str(g): {str(goal): break_even(g * cost.c, g, goal) for goal in (1.0, targets.GOAL)} for g in cfg.num_draft_tokens},
        fastest_lossless=fastest.report,
        targets=targets.targets_of(in_use, rows, fastest.report),
    )
    generations = {"plain greedy": measurements.plain, best_row.name: measurements.timed[fastest.mode]}
    return result, {name: timed.generations[0][0] for name, timed in generations.items()}


def clips_of(samples: Sequence[Sample]) -> list[Path]:
    """The files of all clips, each once."""
    return list(dict.fromkeys(path for s in samples for path in (s.events, s.video)))


def planted_benchmark(cfg: BenchmarkConfig, samples: list[Sample]) -> dict[str, Any]:
    """Measure wall clock at planted acceptances; returns the content of planted.json. Other results are left as they are."""
    from feature_alignment.benchmark import planted, planted_report
    from feature_alignment.benchmark.results import PlantedReport
    from feature_alignment.storage.artifacts import cached_result, provenance
    from feature_alignment.storage.identity import identity_of

    out, clips = cfg.out / "benchmark", clips_of(samples)
    files: dict[str, Path | Sequence[Path]] = {"target": cfg.target_id, "draft": cfg.draft_id, "manifest": cfg.manifests[cfg.split]}
    adapters = {name: cfg.out / f"{name}/adapter.pt" for name in ("adapter", "chained_adapter", "attending_adapter")}
    made_from = files | {"clips": clips} | {name: path for name, path in adapters.items() if path.is_file()}
    profiles = [rate for rate in cfg.planted_acceptance if isinstance(rate, Path)]
    made_from |= {"profiles": profiles} if profiles else {}
    rates = [planted.read_profile(rate) if isinstance(rate, Path) else rate for rate in cfg.planted_acceptance]
    # Profiles are compared by content.
    numbers: list[float | Path] = [rate for rate in cfg.planted_acceptance if not isinstance(rate, Path)]
    identity = identity_of("benchmark_feature_sd", dataclasses.replace(cfg, planted_acceptance=numbers), made_from, timed=True)
    cached = cached_result(out / "planted.json", cfg, identity)
    if cached is not None:
        result = PlantedReport.from_json(cached)
    else:
        facts = {"device": cfg.device, "dtype": cfg.dtype, "planted": True}
        settings = planted.PlantedSettings(cfg.steps, cfg.num_draft_tokens, rates, cfg.max_new_tokens, cfg.repeats, cfg.warmup)
        meta = provenance("benchmark_feature_sd", cfg, made_from, identity, **facts)
        result = planted.measure(cfg, settings, samples, meta)
        planted_report.write(result, out)
    planted_report.show(result)
    content = result.to_json()
    print_json_line({"planted": True, "best": content["best"], "reused": cached is not None, "written": str(out / "planted.json")})
    return content


def _show(result: BenchmarkReport, out: Path, reused: bool) -> None:
    from feature_alignment.benchmark.report import print_benchmark

    print_benchmark(result)
    met = sum(t.met for t in result.targets)
    print_json_line({"targets_met": met, "targets": len(result.targets), "reused": reused, "written": str(out / "benchmark.json")})


if __name__ == "__main__":
    run(main)
