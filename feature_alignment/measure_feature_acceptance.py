"""Task 2.1. How well A(g) predicts v, and how many drafts each rule would keep, on the same prefix.

reads   hidden_states/<split> (and the training and validation split, for the nulls), vl_lm_head.pt, adapter/adapter.pt;
        plain_adapter/, chained_adapter/, chained_adapter_blind/adapter.pt where there are such, the latter two with event states
writes  acceptance/acceptance.json, summary.md, per_position.csv, five pictures; scores.pt: every draft and its cosine

    python feature_alignment/measure_feature_acceptance.py --config configs/demo.yaml
    python feature_alignment/measure_feature_acceptance.py --config configs/demo.yaml --calibrate --epsilon 0.02 --delta 0.1
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_alignment.cli.advice import command_for
from feature_alignment.cli.config import Common, parse_config
from feature_alignment.cli.console import UserError, markdown_table, print_json_line, print_table, rate_text, run

if TYPE_CHECKING:
    from torch import Tensor

    from feature_alignment.measurement.calibration import Judged
    from feature_alignment.measurement.scoring import Fitted, Predictor, Scores
    from feature_alignment.storage.hidden_states import HiddenStates

THRESHOLDS = (0.80, 0.85, 0.90, 0.95)
TASK_THRESHOLD = "0.90"
Table = tuple[str, tuple[str, ...], list[tuple]]
CHAINED = {
    "chained": "chained_adapter",
    "chained, without events": "chained_adapter_blind",
    "attending": "attending_adapter",
    "attending, without events": "attending_adapter_blind",
    "attending, without prompt": "attending_adapter_without_prompt",
    "attending, without candidates": "attending_adapter_without_candidates",
}
SEEING = ("chained", "attending")  # shown the events of other clips as well


@dataclass(frozen=True)
class AcceptanceConfig(Common):
    """Measure the adapters on hidden states they have not seen, beside null predictors. Reads hidden_states/ and the adapters there are;
    writes acceptance.json, summary.md, per_position.csv and pictures under acceptance/.

    Args:
        split: what is measured
        train_split: what the null predictors are fitted on
        validation_split: what the ridge strength is chosen on
        num_draft_tokens: drafts per verification
        calibrate: find the threshold above which kept drafts are the target's own tokens, with a guarantee; on calibration_split
        calibration_split: clips of its own, in the order they are listed
        epsilon: largest share of kept drafts that may differ from the target's token
        delta: largest probability that the guarantee fails
    """

    split: str = "test"
    train_split: str = "train"
    validation_split: str = "validation"
    num_draft_tokens: int = 5
    calibrate: bool = False
    calibration_split: str = "calibration"
    epsilon: float = 0.02
    delta: float = 0.1


def predictors_of(cfg: AcceptanceConfig, states: dict[str, HiddenStates], head: Tensor) -> dict[str, Fitted]:
    """The adapters there are, then what they must beat: name -> predictor. `adapter` is the hidden adapter."""
    from feature_alignment.adapters.hidden import load_adapter
    from feature_alignment.measurement.scoring import Fitted, null_predictors, reads

    test, found = states["test"], {}
    for name in ("adapter", "plain"):
        if name in adapter_paths(cfg):
            adapter, meta = load_adapter(adapter_paths(cfg)[name], test.draft.shape[-1], test.meta["draft_layers"])
            found[name] = (adapter.to(head.device), meta["seconds"])
    rank = found["adapter"][0].bottleneck
    fitted = {n: Fitted(reads(a), a.num_parameters, seconds) for n, (a, seconds) in found.items()}
    return fitted | null_predictors(states["train"], states["validation"], test, rank, head)


def predictor_report(scores: Scores, fitted: Fitted, states: HiddenStates, num_draft_tokens: int) -> dict[str, Any]:
    from feature_alignment.measurement.scoring import rates

    return {**rates(scores, states.mask, states, num_draft_tokens), "params": fitted.parameters, "seconds": fitted.seconds}


def acceptance_report(scores: dict[str, Scores], fitted: dict[str, Fitted], states: HiddenStates, num_draft_tokens: int) -> dict[str, Any]:
    """Every number of acceptance.json about predictors that read EventGPT's states, from their scores."""
    from feature_alignment.measurement import metrics, scoring

    ours, mask = scores["adapter"], states.mask
    reports = {name: predictor_report(s, fitted[name], states, num_draft_tokens) for name, s in scores.items()}
    return {
        **reports.pop("adapter"),
        "plain": reports.pop("plain", None),
        "nulls": reports,
        "absent_controls": ["shuffled", "chained, events of another clip"] if len(set(states.clips)) < 2 else [],
        "thresholds": {f"{t:.2f}": scoring.rates_above(t, ours, mask, states, num_draft_tokens) for t in THRESHOLDS},
        "auc_cosine_token_match": metrics.auc(ours.cosine[mask].numpy(), ours.match[mask].numpy()),
        "reliability": scoring.reliability(ours, mask),
        "accepted_lengths": scoring.accepted_lengths(ours.match, states, num_draft_tokens),
        "per_position": scoring.per_position(ours, states),
        "num_draft_tokens": num_draft_tokens,
    }


def chain_report(scores: Scores, there: Tensor, states: HiddenStates) -> dict[str, Any]:
    """Step by step and pooled over all steps; blocks as decoding forms them. The number of drafts a round is the number of steps."""
    from feature_alignment.measurement import metrics, scoring

    steps = there.shape[-1]
    return {
        "num_draft_tokens": steps,
        **scoring.rates(scores, there, states, steps),
        "thresholds": {f"{t:.2f}": scoring.rates_above(t, scores, there, states, steps) for t in THRESHOLDS},
        "auc_cosine_token_match": metrics.auc(scores.cosine[there].numpy(), scores.match[there].numpy()),
        "reliability": scoring.reliability(scores, there),
        "accepted_lengths": scoring.accepted_lengths(scores.match, states, steps),
        "steps": scoring.chain_steps(scores, there, states.clips),
    }


def score_chains(cfg: AcceptanceConfig, split: str, head: Tensor, all_of_them: bool) -> dict[str, tuple[Scores, Tensor, dict[str, Any]]]:
    """The chained adapter, if there is one: name -> scores, their places, its meta. all_of_them: also the attending one, those that do
    without some of their parts, and the seeing ones with the events of other clips."""
    from feature_alignment.adapters.attending import load_attending_adapter
    from feature_alignment.adapters.chained import load_chained_adapter
    from feature_alignment.measurement import scoring
    from feature_alignment.measurement.attending_scoring import attending_scores
    from feature_alignment.storage.files import load_pt
    from feature_alignment.storage.hidden_states import load_hidden_states

    found: dict[str, tuple[Scores, Tensor, dict[str, Any]]] = {}
    paths = {name: path for name, path in adapter_paths(cfg).items() if name in CHAINED and (all_of_them or name == "chained")}
    if not paths:
        return found
    reads_prompt = any(name.startswith("attending") for name in paths)
    states = load_hidden_states(cfg.out / "hidden_states" / split, cfg.draft_layers, events=True, prompt=reads_prompt)
    embeddings = load_pt(cfg.out / "hidden_states" / "vl_embeddings.pt", command_for("extract_hidden_states", split=split))
    embeddings = embeddings.float().to(head.device)
    for name, path in paths.items():
        load, score = (
            (load_attending_adapter, attending_scores) if name.startswith("attending") else (load_chained_adapter, scoring.chain_scores)
        )
        adapter, meta = load(path, states.meta["draft_layers"])
        others = scoring.other_clip(states) if all_of_them and name in SEEING else None
        shown = {name: None} | ({} if others is None else {f"{name}, events of another clip": others})
        for label, events in shown.items():
            scores = score(adapter.to(head.device), states, head, embeddings, cfg.num_draft_tokens, events)
            found[label] = (*scores, meta)
    return found


def adapter_paths(cfg: AcceptanceConfig) -> dict[str, Path]:
    """The adapters that have been trained: name -> file. Without the hidden adapter nothing is measured."""
    folders = {"adapter": "adapter", "plain": "plain_adapter", **CHAINED}
    paths = {name: cfg.out / folder / "adapter.pt" for name, folder in folders.items()}
    return {name: path for name, path in paths.items() if name == "adapter" or path.is_file()}


def calibrations(
    cfg: AcceptanceConfig, states: dict[str, HiddenStates], head: Tensor, adapter: Predictor, measured: dict[str, tuple[Scores, Tensor]]
) -> dict[str, dict[str, Any]]:
    """A certified threshold for the hidden and the chained adapter, and the risk it has on the clips that are measured."""
    from feature_alignment.measurement import scoring
    from feature_alignment.measurement.calibration import certify

    judged: dict[str, dict[str, Judged]] = {name: {} for name in measured}
    for name, split in (("validation", cfg.validation_split), ("calibration", cfg.calibration_split)):
        some = states[name]
        judged["adapter"][split] = scoring.judged(scoring.score({"adapter": adapter}, some, head)["adapter"], some.mask, some)
        if "chained" in judged:
            judged["chained"][split] = scoring.judged(*score_chains(cfg, split, head, False)["chained"][:2], some)
    reports = {}
    for name, (scores, there) in measured.items():
        tune, calibration = judged[name][cfg.validation_split], judged[name][cfg.calibration_split]
        report = certify(tune, calibration, cfg.epsilon, cfg.delta)
        kept = there & (scores.cosine > (2.0 if report["threshold"] is None else report["threshold"]))
        report["risk_on_test"] = float((~scores.match[kept]).double().mean()) if kept.any() else None
        reports[name] = report
    return reports


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    cfg = parse_config(AcceptanceConfig, argv, "measure_feature_acceptance")
    from feature_alignment.storage.processes import check_device, exclusive_lock

    check_device(cfg.device)
    with exclusive_lock(cfg.out / "acceptance"):
        return measure(cfg)


def measure(cfg: AcceptanceConfig) -> dict[str, Any]:
    """Measure, or reuse what is there; returns the content of acceptance.json."""
    import torch

    from feature_alignment.measurement import plots, scoring
    from feature_alignment.storage.artifacts import cached_result, provenance
    from feature_alignment.storage.files import load_pt, save_pt, write_hashed_json, write_text
    from feature_alignment.storage.hidden_states import load_hidden_states
    from feature_alignment.storage.identity import identity_of

    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    folder = cfg.out / "hidden_states"
    splits = {"test": cfg.split, "train": cfg.train_split, "validation": cfg.validation_split}
    splits |= {"calibration": cfg.calibration_split} if cfg.calibrate else {}
    states = {name: load_hidden_states(folder / split, cfg.draft_layers) for name, split in splits.items()}
    test = states["test"]
    for a, b in itertools.combinations(splits, 2):
        if set(states[a].clips) & set(states[b].clips):
            raise UserError(
                f"splits {splits[a]!r} and {splits[b]!r} share clips; what is measured or promised on one must not have been seen."
            )
    out = cfg.out / "acceptance"
    made_from = adapter_paths(cfg) | {name: folder / split / "meta.json" for name, split in splits.items()}
    identity = identity_of("measure_feature_acceptance", cfg, made_from, timed=True)
    report = cached_result(out / "acceptance.json", cfg, identity)
    reused = report is not None
    if report is None:
        head = load_pt(folder / "vl_lm_head.pt", command_for("extract_hidden_states", split=cfg.split)).float().to(cfg.device)
        fitted = predictors_of(cfg, states, head)
        scores = scoring.score({name: f.predict for name, f in fitted.items()}, test, head)
        chains = score_chains(cfg, cfg.split, head, True)
        measured = {"adapter": (scores["adapter"], test.mask)} | ({"chained": chains["chained"][:2]} if "chained" in chains else {})
        promised = calibrations(cfg, states, head, fitted["adapter"].predict, measured) if cfg.calibrate else {}
        report = {
            "meta": provenance("measure_feature_acceptance", cfg, made_from, identity, prefix=test.meta["prefix"], split=cfg.split),
            "adapter": {"params": fitted["adapter"].parameters, "layer": test.meta["draft_layers"]},
            **acceptance_report(scores, fitted, test, cfg.num_draft_tokens),
            "calibration": promised.get("adapter"),
            "chains": {
                name: {"params": trained["parameters"], "seconds": trained["seconds"], **chain_report(s, there, test)}
                for name, (s, there, trained) in chains.items()
            },
        }
        if "chained" in report["chains"]:
            report["chains"]["chained"]["calibration"] = promised.get("chained")
        save_pt(out / "scores.pt", {name: {"cosine": s.cosine, "says": s.says, "there": t} for name, (s, t) in measured.items()})
        columns = list(report["per_position"][0])
        lines = [",".join("" if row[c] != row[c] else str(row[c]) for c in columns) for row in report["per_position"]]
        write_text(out / "per_position.csv", "\n".join([",".join(columns), *lines]) + "\n")
        plots.acceptance(report, scores, test, out)
        write_text(out / "summary.md", summary(report))
        beside = ("scores.pt", "per_position.csv", "summary.md", *(f"{name}.png" for name in plots.ACCEPTANCE))
        write_hashed_json(out / "acceptance.json", report, beside)  # last: its presence means the rest is there

    for title, header, rows in tables(report):
        print_table(title, header, rows)
    numbers = {k: report[k]["value"] for k in ("cosine", "token_match", "acceptance_rate")}
    print_json_line({**numbers, "auc": report["auc_cosine_token_match"], "reused": reused, "written": str(out / "acceptance.json")})
    return report


def tables(report: dict[str, Any]) -> list[Table]:
    """(title, header, rows) of every table, in display order."""
    rules = {"adapter": report} | ({"chained": report["chains"]["chained"]} if "chained" in report["chains"] else {})
    chains = [chain_table(report)] if report["chains"] else []
    calibrated = {name: r["calibration"] for name, r in rules.items() if r.get("calibration")}
    calibration = [calibration_table(calibrated)] if calibrated else []
    return [predictor_table(report), *chains, threshold_table(rules), *calibration]


def predictor_table(report: dict[str, Any]) -> Table:
    """Cosine, token match and acceptance rate of the adapters and the null predictors."""
    meta, absent = report["meta"], report["absent_controls"]
    predictors = {"adapter": report} | ({"plain (TASKS.md)": report["plain"]} if report["plain"] else {}) | report["nulls"]
    size = f"{report['cosine']['total']:,.0f} positions, {report['num_draft_tokens']} drafts a round"
    note = f"; all of one clip, so these controls are absent: {', '.join(absent)}" if absent else ""
    return (
        f"{meta['split']}, prefix: {meta['prefix']}, {size}{note}",
        ("predictor", "cosine", "token match", "acceptance rate", "tokens per pass", "parameters", "seconds"),
        [(name, *(rate_text(r[k], 3) for k in ("cosine", "token_match", "acceptance_rate")), *_cost(r)) for name, r in predictors.items()],
    )


def chain_table(report: dict[str, Any]) -> Table:
    """Token match of the chained adapters at each draft position."""
    g = report["num_draft_tokens"]
    return (
        f"chained from the target's last state: token match at each of {g} drafts",
        ("adapter", "cosine", *(str(k + 1) for k in range(g)), "acceptance rate", "tokens per pass", "parameters", "seconds"),
        [
            (
                name,
                rate_text(c["cosine"], 3),
                *(f"{s['token_match']['value']:.3f}" for s in c["steps"]),
                rate_text(c["acceptance_rate"], 3),
                *_cost(c),
            )
            for name, c in report["chains"].items()
        ],
    )


def _cost(r: dict[str, Any]) -> tuple[str, str, str]:
    """Cells of one adapter: tokens per pass, parameters, training seconds."""
    return f"{r['tokens_per_pass']:.2f}", f"{r['params']:,}", f"{r['seconds']:.1f}"


def threshold_table(rules: dict[str, dict[str, Any]]) -> Table:
    """Acceptance of the cosine rules at each threshold.

    Args:
        rules: adapter name -> report with the key "thresholds"
    """
    keys = ("relaxed_accept", "consecutive_accept", "token_match_given_accept")
    return (
        "what the cosine rules keep",
        ("drafts, threshold", *keys),
        [(f"{name}, {t}", *(rate_text(v[k], 3) for k in keys)) for name, r in rules.items() for t, v in r["thresholds"].items()],
    )


def calibration_table(calibrated: dict[str, dict[str, Any]]) -> Table:
    """Certified thresholds and their risk.

    Args:
        calibrated: adapter name -> calibration report, at least one
    """
    first = next(iter(calibrated.values()))
    return (
        f"kept drafts differ at most {first['epsilon']:.0%} of the time, confidence {1 - first['delta']:.0%}, from {first['clips']} clips",
        ("drafts", "threshold", "kept", "risk there", "risk on test"),
        [
            (name, "none" if c["threshold"] is None else c["threshold"], c["kept"], c["risk_on_calibration"], c["risk_on_test"])
            for name, c in calibrated.items()
        ],
    )


def summary(report: dict[str, Any]) -> str:
    """The tables as Markdown, one screen."""
    parts = [f"**{title}**\n\n{markdown_table(header, rows)}" for title, header, rows in tables(report)]
    return "# Acceptance\n\n" + "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    run(main)
