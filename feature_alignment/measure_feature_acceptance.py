"""Task 2.1. How well the adapter predicts Video-LLaVA's hidden states, and how many draft tokens each rule would accept.

reads   hidden_states/<split> (also of the training and validation split, for the null predictors), vl_lm_head.pt, adapter/adapter.pt;
        where they exist plain_adapter/, chained_adapter/ and chained_adapter_blind/adapter.pt (the latter two need event states)
writes  acceptance/acceptance.json, summary.md, per_position.csv, five pictures; scores.pt: every draft token and its cosine

    python feature_alignment/measure_feature_acceptance.py --config configs/demo.yaml
    python feature_alignment/measure_feature_acceptance.py --config configs/demo.yaml --calibrate --epsilon 0.02 --delta 0.1
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_alignment.cli.advice import command_for
from feature_alignment.cli.config import Common, parse_config
from feature_alignment.cli.console import UserError, print_json_line, print_table, run

if TYPE_CHECKING:
    from torch import Tensor

    from feature_alignment.measurement.acceptance import ChainScores
    from feature_alignment.measurement.calibration import Certificate, ScoredPositions
    from feature_alignment.measurement.reports import AcceptanceReport
    from feature_alignment.measurement.scoring import Fitted, Predictor, Scores
    from feature_alignment.storage.hidden_states import HiddenStates
    from feature_alignment.storage.identity import RunIdentity

CHAINED = {
    "chained": "chained_adapter",
    "chained, without events": "chained_adapter_blind",
    "attending": "attending_adapter",
    "attending, without events": "attending_adapter_blind",
    "attending, without candidates": "attending_adapter_without_candidates",
}
SEEING = ("chained", "attending")  # shown the events of other clips as well


@dataclass(frozen=True)
class AcceptanceConfig(Common):
    """Measure the trained adapters and null predictors on unseen hidden states.

    Reads hidden_states/ and every trained adapter; writes acceptance.json, summary.md, per_position.csv and pictures under acceptance/.

    Args:
        split: split to measure
        train_split: split that the null predictors are fitted on
        validation_split: split that chooses the ridge strength
        num_draft_tokens: draft tokens per verification
        variants: chained and attending adapters trained with `--variant NAME` to score as well
        calibrate: certify a cosine threshold above which accepted draft tokens are the target's own, on calibration_split
        calibration_split: split with clips of its own
        epsilon: largest share of accepted draft tokens that may differ from the target's token
        delta: largest probability that the guarantee fails
    """

    split: str = "test"
    train_split: str = "train"
    validation_split: str = "validation"
    num_draft_tokens: int = 5
    variants: list[str] = field(default_factory=list)
    calibrate: bool = False
    calibration_split: str = "calibration"
    epsilon: float = 0.02
    delta: float = 0.1


def predictors_of(cfg: AcceptanceConfig, states: Mapping[str, HiddenStates], head: Tensor) -> dict[str, Fitted]:
    """The trained hidden adapters (`adapter`, `plain`), then the null predictors.

    Args:
        cfg: settings
        states: "test", "train" and "validation" -> split
        head: [v, d_target] float32, the target's LM head
    """
    from feature_alignment.adapters.hidden import load_adapter
    from feature_alignment.measurement.scoring import Fitted, null_predictors, reads

    test, adapters = states["test"], {}
    for name in ("adapter", "plain"):
        if name in adapter_paths(cfg):
            adapter, meta = load_adapter(adapter_paths(cfg)[name], test.draft.shape[-1], test.meta["draft_layers"])
            adapters[name] = (adapter.to(head.device), meta["seconds"])
    rank = adapters["adapter"][0].bottleneck
    fitted = {n: Fitted(reads(a), a.num_parameters, seconds) for n, (a, seconds) in adapters.items()}
    return fitted | null_predictors(states["train"], states["validation"], test, rank, head)


def score_chains(cfg: AcceptanceConfig, split: str, head: Tensor, with_controls: bool) -> dict[str, ChainScores]:
    """Scores of the chained adapters; empty if none is trained.

    Args:
        cfg: settings
        split: split to score
        head: [v, d_target] float32, the target's LM head
        with_controls: also score the adapters trained without some of their inputs, and those with events on events of another clip
    """
    from feature_alignment.adapters.attending import load_attending_adapter
    from feature_alignment.adapters.chained import load_chained_adapter
    from feature_alignment.measurement import scoring
    from feature_alignment.measurement.acceptance import ChainScores
    from feature_alignment.measurement.attending_scoring import attending_scores
    from feature_alignment.storage.files import load_pt
    from feature_alignment.storage.hidden_states import load_hidden_states

    found: dict[str, ChainScores] = {}
    paths = {name: path for name, path in adapter_paths(cfg).items() if name in chain_folders(cfg) and (with_controls or name == "chained")}
    if not paths:
        return found
    reads_prompt = any(name.startswith("attending") for name in paths)
    states = load_hidden_states(cfg.out / "hidden_states" / split, cfg.draft_layers, events=True, prompt=reads_prompt)
    embeddings = load_pt(cfg.out / "hidden_states" / "vl_embeddings.pt", command_for("extract_hidden_states", split=split))
    embeddings = embeddings.float().to(head.device)
    for name, path in paths.items():
        others = scoring.other_clip(states) if with_controls and name in SEEING else None
        shown: dict[str, list[int] | None] = {name: None}
        if others is not None:
            shown[f"{name}, events of another clip"] = others
        for label, events in shown.items():
            if name.startswith("attending"):
                reader, meta = load_attending_adapter(path, states.meta["draft_layers"])
                scores, valid = attending_scores(reader.to(head.device), states, head, embeddings, cfg.num_draft_tokens, events)
            else:
                adapter, meta = load_chained_adapter(path, states.meta["draft_layers"])
                scores, valid = scoring.chain_scores(adapter.to(head.device), states, head, embeddings, cfg.num_draft_tokens, events)
            found[label] = ChainScores(scores, valid, meta)
    return found


def chain_folders(cfg: AcceptanceConfig) -> dict[str, str]:
    """Name -> folder of every chained and attending adapter that may be there; raises UserError for a variant that is not."""
    folders = dict(CHAINED)
    for variant in cfg.variants:
        found = {f"{kind}, {variant}": f"{kind}_adapter_{variant}" for kind in SEEING}
        found = {name: folder for name, folder in found.items() if (cfg.out / folder / "adapter.pt").is_file()}
        if not found:
            command = command_for("train_hidden_adapter", adapter="attending", variant=variant)
            raise UserError(f"--variants {variant}: {cfg.out} holds no adapter of this name. Train it:\n  {command}")
        folders |= found
    return folders


def adapter_paths(cfg: AcceptanceConfig) -> dict[str, Path]:
    """Name -> file of every adapter that is trained, and of the hidden adapter, which is required."""
    folders = {"adapter": "adapter", "plain": "plain_adapter", **chain_folders(cfg)}
    paths = {name: cfg.out / folder / "adapter.pt" for name, folder in folders.items()}
    return {name: path for name, path in paths.items() if name == "adapter" or path.is_file()}


def calibrations(
    cfg: AcceptanceConfig,
    states: Mapping[str, HiddenStates],
    head: Tensor,
    adapter: Predictor,
    measured: Mapping[str, tuple[Scores, Tensor]],
) -> dict[str, Certificate]:
    """Certify a threshold for the hidden adapter and the chained one.

    Args:
        cfg: settings
        states: "validation" and "calibration" -> split
        head: [v, d_target] float32, the target's LM head
        adapter: the hidden adapter
        measured: "adapter" and, if it is trained, "chained" -> scores and valid positions of the measured split

    Returns:
        name -> certificate, with the risk on the measured split
    """
    from feature_alignment.measurement import scoring
    from feature_alignment.measurement.calibration import certify

    judged: dict[str, dict[str, ScoredPositions]] = {name: {} for name in measured}
    for name, split in (("validation", cfg.validation_split), ("calibration", cfg.calibration_split)):
        some = states[name]
        judged["adapter"][name] = scoring.judged(scoring.score({"adapter": adapter}, some, head)["adapter"], some.mask, some)
        if "chained" in judged:
            chain = score_chains(cfg, split, head, False)["chained"]
            judged["chained"][name] = scoring.judged(chain.scores, chain.valid, some)
    certificates = {}
    for name, (scores, valid) in measured.items():
        certificate = certify(judged[name]["validation"], judged[name]["calibration"], cfg.epsilon, cfg.delta)
        accepted = valid & (scores.cosine > (2.0 if certificate.threshold is None else certificate.threshold))
        risk = float((~scores.match[accepted]).double().mean()) if accepted.any() else None
        certificates[name] = dataclasses.replace(certificate, risk_on_test=risk)
    return certificates


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script; returns the content of acceptance.json."""
    cfg = parse_config(AcceptanceConfig, argv, "measure_feature_acceptance")
    from feature_alignment.storage.processes import check_device, exclusive_lock

    check_device(cfg.device)
    with exclusive_lock(cfg.out / "acceptance"):
        return measure(cfg)


def measure(cfg: AcceptanceConfig) -> dict[str, Any]:
    """Measure, or reuse the cached result; returns the content of acceptance.json."""
    import torch

    from feature_alignment.measurement.acceptance import tables
    from feature_alignment.measurement.reports import AcceptanceReport
    from feature_alignment.storage.artifacts import cached_result
    from feature_alignment.storage.hidden_states import load_hidden_states
    from feature_alignment.storage.identity import identity_of

    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    folder, path = cfg.out / "hidden_states", cfg.out / "acceptance" / "acceptance.json"
    splits = {"test": cfg.split, "train": cfg.train_split, "validation": cfg.validation_split}
    splits |= {"calibration": cfg.calibration_split} if cfg.calibrate else {}
    states = {name: load_hidden_states(folder / split, cfg.draft_layers) for name, split in splits.items()}
    for a, b in itertools.combinations(splits, 2):
        if set(states[a].clips) & set(states[b].clips):
            raise UserError(
                f"splits {splits[a]!r} and {splits[b]!r} share clips; a split that is measured or certified on must hold unseen clips."
            )
    made_from = adapter_paths(cfg) | {name: folder / split / "meta.json" for name, split in splits.items()}
    identity = identity_of("measure_feature_acceptance", cfg, made_from, timed=True, without=("limit",))
    cached = cached_result(path, cfg, identity)
    report = AcceptanceReport.from_json(cached) if cached else measure_now(cfg, states, made_from, identity)
    for title, header, rows in tables(report):
        print_table(title, header, rows)
    numbers = {"cosine": report.cosine.value, "token_match": report.token_match.value, "acceptance_rate": report.acceptance_rate.value}
    print_json_line({**numbers, "auc": report.auc_cosine_token_match, "reused": cached is not None, "written": str(path)})
    return report.to_json()


def measure_now(
    cfg: AcceptanceConfig, states: Mapping[str, HiddenStates], made_from: Mapping[str, Path], identity: RunIdentity
) -> AcceptanceReport:
    """Measure every predictor and write acceptance/.

    Args:
        cfg: settings
        states: "test", "train", "validation" and perhaps "calibration" -> split
        made_from: name -> file that is read
        identity: of this run
    """
    from feature_alignment.measurement import plots, scoring
    from feature_alignment.measurement.acceptance import acceptance_report, chain_report, position_csv, summary
    from feature_alignment.storage.artifacts import provenance
    from feature_alignment.storage.files import load_pt, save_pt, write_hashed_json, write_text

    out, test = cfg.out / "acceptance", states["test"]
    extract = command_for("extract_hidden_states", split=cfg.split)
    head = load_pt(cfg.out / "hidden_states" / "vl_lm_head.pt", extract).float().to(cfg.device)
    fitted = predictors_of(cfg, states, head)
    scores = scoring.score({name: f.predict for name, f in fitted.items()}, test, head)
    chains = score_chains(cfg, cfg.split, head, True)
    measured = {"adapter": (scores["adapter"], test.mask)}
    if "chained" in chains:
        measured["chained"] = chains["chained"].scores, chains["chained"].valid
    certificates = calibrations(cfg, states, head, fitted["adapter"].predict, measured) if cfg.calibrate else {}
    chain_reports = {n: chain_report(c, test, certificates.get("chained") if n == "chained" else None) for n, c in chains.items()}
    facts = {"prefix": test.meta["prefix"], "split": cfg.split}
    meta = provenance("measure_feature_acceptance", cfg, made_from, identity, **facts)
    report = acceptance_report(scores, fitted, test, cfg.num_draft_tokens, chain_reports, certificates, meta)
    save_pt(out / "scores.pt", {name: {"cosine": s.cosine, "says": s.says, "there": v} for name, (s, v) in measured.items()})
    write_text(out / "per_position.csv", position_csv(report))
    plots.acceptance(report, scores, test, out)
    write_text(out / "summary.md", summary(report))
    files = ("scores.pt", "per_position.csv", "summary.md", *(f"{name}.png" for name in plots.ACCEPTANCE))
    write_hashed_json(out / "acceptance.json", report.to_json(), files)  # Last: its presence means that the others are complete.
    return report


if __name__ == "__main__":
    run(main)
