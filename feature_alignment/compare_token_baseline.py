"""Task 2.2. Token-level against feature-level acceptance, and what the draft tokens say that only a cosine rule would accept.

reads   token_pairs/<split>.json (ours or the earlier attempt's layout); without --token_pairs also the training texts,
        hidden_states/<split>/samples.jsonl, acceptance/acceptance.json and scores.pt, the target's tokenizer
writes  token_baseline/comparison.json, comparison.md, threshold_sweep.png; token_adapter.pt with --train_token_adapter

    python feature_alignment/compare_token_baseline.py --config configs/demo.yaml
    python feature_alignment/compare_token_baseline.py --config configs/demo.yaml --train_token_adapter
    python feature_alignment/compare_token_baseline.py --token_pairs some/pairs.json
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_alignment.cli.advice import command_for
from feature_alignment.cli.config import Common, parse_config
from feature_alignment.cli.console import UserError, markdown_table, print_json_line, print_table, run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from feature_alignment.measurement.comparison import Row
    from feature_alignment.measurement.lexicon import Lexicon
    from feature_alignment.measurement.reports import (
        AcceptanceReport,
        ChainReport,
        ComparisonReport,
        DifferingDraft,
        DraftReport,
        ThresholdCounts,
    )
    from feature_alignment.storage.hidden_states import HiddenStates
    from feature_alignment.storage.identity import RunIdentity

log = logging.getLogger(__name__)

LAYOUT_7B = (32_000, 64)  # vocabulary of the released models and longest answer, for the adapter's parameters at their size


@dataclass(frozen=True)
class ComparisonConfig(Common):
    """Compare token-level with feature-level acceptance, and judge the draft tokens that only a cosine rule would accept.

    Reads token_pairs/ and acceptance/; writes comparison.json, comparison.md and a picture under token_baseline/.

    Args:
        token_pairs: free-running answers of both models; default token_pairs/<split>.json of this run. If given, the baseline drafters
            are fitted on the first half of its sequences and scored on the second half
        split: split to compare
        train_split: split that the baseline drafters and the token-level adapter are fitted on
        validation_split: split that chooses the token-level adapter's epoch
        num_draft_tokens: draft tokens per verification
        train_token_adapter: train the token-level adapter first (minutes on two cores); once trained, it is always compared
        num_epochs: epochs of its training
    """

    token_pairs: Path | None = None
    split: str = "test"
    train_split: str = "train"
    validation_split: str = "validation"
    num_draft_tokens: int = 5
    train_token_adapter: bool = False
    num_epochs: int = 6


def token_adapter_path(cfg: ComparisonConfig) -> Path:
    """File of the token-level adapter."""
    return cfg.out / "token_baseline" / "token_adapter.pt"


def train_token_adapter(cfg: ComparisonConfig, rows: Sequence[Row]) -> None:
    """Train the earlier attempt's token-level adapter, unless a cached one has the same identity.

    Args:
        cfg: settings
        rows: answers that are compared; the adapter must accept texts of their length
    """
    from feature_alignment.adapters import token as token_adapter
    from feature_alignment.storage.answers import eos_ids, read_token_pairs
    from feature_alignment.storage.files import load_pt, save_pt

    path, identity = token_adapter_path(cfg), token_adapter_identity(cfg)
    if _is_trained(path, cfg, identity):
        return
    train, validation = (read_token_pairs(cfg.out / "token_pairs" / f"{split}.json") for split in (cfg.train_split, cfg.validation_split))
    extract = command_for("extract_hidden_states", split=cfg.train_split)
    for split, of_split in ((cfg.train_split, train), (cfg.validation_split, validation)):
        _refuse_silent_drafter(of_split, cfg.out / "token_pairs" / f"{split}.json", split)
    vocabulary = len(load_pt(cfg.out / "hidden_states" / "vl_lm_head.pt", extract))
    longest = max(len(r[k]) for r in (*train, *validation, *rows) for k in ("egpt_tokens", "vl_tokens"))
    began = time.time()
    eos_id = min(eos_ids(cfg.out / "token_pairs" / f"{cfg.train_split}.json"), default=0)
    model, accuracies = token_adapter.train_token_adapter(
        train, validation, vocabulary, longest, cfg.num_epochs, cfg.device, cfg.seed, eos_id
    )
    meta = {"geometry": model.geometry, "seconds": time.time() - began, "validation_accuracy": accuracies, **identity.as_dict()}
    save_pt(path, {"meta": meta, "state_dict": {k: v.cpu() for k, v in model.state_dict().items()}})


def token_adapter_report(cfg: ComparisonConfig, rows: Sequence[Row], eos_ids: Sequence[int]) -> DraftReport | None:
    """Report of the token-level adapter; None if none is trained on these texts.

    Args:
        cfg: settings
        rows: answers that are compared
        eos_ids: token ids that end a text
    """
    import torch

    from feature_alignment.adapters import token as token_adapter
    from feature_alignment.adapters.hidden import call_ms
    from feature_alignment.measurement.comparison import verified
    from feature_alignment.storage.files import load_trained

    path = token_adapter_path(cfg)
    if not path.is_file():
        return None
    train_it = command_for("compare_token_baseline", "--train_token_adapter")
    model, meta = load_trained(path, "a token-level adapter", token_adapter.TokenAdapter, "vocabulary", train_it)
    texts = replace(token_adapter_identity(cfg), settings=meta.get("settings", {}))  # Any length of training will do.
    if changes := texts.changes(meta, ignore_code=True):
        log.warning(
            "%s is left out because it was trained on other texts (then → now): %s. Train it again:\n  %s",
            path,
            "; ".join(changes),
            train_it,
        )
        return None
    model.to(cfg.device)
    text = torch.full((1, model.geometry["longest"]), 5, device=cfg.device)
    ms = call_ms(lambda: model(text), 20, cfg.device)
    with torch.device("meta"):
        at_7b = token_adapter.TokenAdapter(*LAYOUT_7B).num_parameters
    width = max(len(r["vl_tokens"]) for r in rows)
    matches = token_adapter.token_matches(model, [dict(r) for r in rows], min(eos_ids, default=0))
    correct = torch.nn.functional.pad(matches, (0, max(0, width - text.shape[1])))[:, :width]
    report = verified(correct, rows, cfg.num_draft_tokens, eos_ids, model.num_parameters)
    return replace(report, params_7b=at_7b, overhead_ms=ms, seconds=meta["seconds"])


def token_adapter_identity(cfg: ComparisonConfig) -> RunIdentity:
    """Identity of the token-level adapter: both models' texts of two splits, and the settings of its training."""
    from feature_alignment.storage import identity
    from feature_alignment.storage.identity import identity_of

    texts = {split: cfg.out / "token_pairs" / f"{split}.json" for split in (cfg.train_split, cfg.validation_split)}
    whole = identity_of("adapters.token", cfg, texts)
    return identity.RunIdentity({k: whole.settings[k] for k in ("num_epochs", "seed", "device")}, whole.made_from, whole.code)


def _is_trained(path: Path, cfg: ComparisonConfig, identity: RunIdentity) -> bool:
    """Whether there is a cached token-level adapter of this identity that may be reused."""
    from feature_alignment.storage.artifacts import log_reuse
    from feature_alignment.storage.files import load_pt

    if not (cfg.resume and path.is_file()):
        return False
    try:
        meta = load_pt(path, "")["meta"]
    except (UserError, KeyError, TypeError):
        return False
    if changes := identity.changes(meta, cfg.ignore_code):
        log.warning("%s is trained again (then → now): %s", path, "; ".join(changes))
        return False
    log_reuse(path, identity, meta)
    return True


def judge_accepted(
    cfg: ComparisonConfig, states: HiddenStates, tokenizer: PreTrainedTokenizerBase, lexicon: Lexicon
) -> tuple[dict[str, list[ThresholdCounts]], list[DifferingDraft]]:
    """`comparison.accepted_by_cosine` of aligned, chained and EventGPT's own draft tokens; the hidden adapter's cosine accepts the latter.

    Args:
        cfg: settings
        states: the split that is compared
        tokenizer: of the target
        lexicon: which words state which facts
    """
    from feature_alignment.measurement.comparison import CosineDrafts, accepted_by_cosine
    from feature_alignment.storage.files import load_pt

    scores = load_pt(cfg.out / "acceptance" / "scores.pt", command_for("measure_feature_acceptance"))
    names = {"aligned": "adapter", "chained": "chained"}
    sources = {name: CosineDrafts(s["cosine"], s["says"], s["there"]) for name, key in names.items() if (s := scores.get(key))}
    if "egpt_drafts" in states.rows[0]:
        own = states.token_ids.clone()
        for i, row in enumerate(states.rows):
            own[i, : len(row["egpt_drafts"])] = own.new_tensor(row["egpt_drafts"])
        sources["own"] = replace(sources["aligned"], says=own)

    def word(token: int) -> str:
        return str(tokenizer.decode([token])).strip()

    return accepted_by_cosine(sources, states.token_ids, word, [r["id"] for r in states.rows], lexicon)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script; returns the content of comparison.json."""
    cfg = parse_config(ComparisonConfig, argv, "compare_token_baseline")
    from feature_alignment.storage.processes import check_device, exclusive_lock

    check_device(cfg.device)
    with exclusive_lock(cfg.out / "token_baseline"):
        return compare(cfg)


def compare(cfg: ComparisonConfig) -> dict[str, Any]:
    """Compare, or reuse the cached result; returns the content of comparison.json."""
    import torch

    from feature_alignment.measurement.comparison_tables import tables
    from feature_alignment.measurement.reports import ComparisonReport
    from feature_alignment.storage.answers import read_token_pairs
    from feature_alignment.storage.artifacts import cached_result, provenance
    from feature_alignment.storage.files import write_hashed_json, write_text
    from feature_alignment.storage.identity import identity_of

    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    made_from, path = sources_of(cfg), cfg.out / "token_baseline" / "comparison.json"
    rows = read_token_pairs(made_from["token_pairs"])
    _refuse_silent_drafter(rows, made_from["token_pairs"], cfg.split)
    if cfg.train_token_adapter and not cfg.token_pairs:
        train_token_adapter(cfg, rows)
    identity = identity_of("compare_token_baseline", cfg, made_from, timed=True, without=("limit", "train_token_adapter"))
    cached = cached_result(path, cfg, identity)
    if cached:
        report = ComparisonReport.from_json(cached)
    else:
        report = comparison_report(cfg, rows, path.parent)
        printed = tables(report, cfg.num_draft_tokens)
        lines = [{"table": title, **dict(zip(header, row, strict=True))} for title, header, rows_of in printed for row in rows_of]
        meta = provenance("compare_token_baseline", cfg, made_from, identity)
        report = replace(report, meta=meta, rows=lines)
        markdown = [f"**{title}**\n\n{markdown_table(header, cells)}\n" for title, header, cells in printed]
        write_text(path.parent / "comparison.md", "\n".join(markdown))
        files = ("comparison.md", *(("threshold_sweep.png",) if report.kept_by_cosine else ()))
        write_hashed_json(path, report.to_json(), files)
    for title, header, cells in tables(report, cfg.num_draft_tokens):
        print_table(title, header, cells)
    if report.examples:
        columns = ("source", "before", "drafted", "said", "verdict", "cosine")
        examples = [[getattr(e, column) for column in columns] for e in report.examples]
        print_table("accepted by cosine although the word differs, highest cosine first", columns, examples)
    level = report.token_level
    numbers = {k: getattr(level, k).value for k in ("position_match", "mean_prefix", "first_token_differs")}
    print_json_line({**numbers, "reused": cached is not None, "written": str(path)})
    return report.to_json()


def _refuse_silent_drafter(rows: Sequence[Row], path: Path, split: str) -> None:
    """Raise UserError for token pairs that were extracted without EventGPT's answers."""
    if not any(row["egpt_tokens"] for row in rows):
        again = command_for("extract_hidden_states", split=split, draft_answers="true")
        raise UserError(f"{path} has no answers of EventGPT, which this comparison needs. Extract them:\n  {again}")


def sources_of(cfg: ComparisonConfig) -> dict[str, Path]:
    """Name -> file, for every file that the comparison reads."""
    if cfg.token_pairs:
        return {"token_pairs": cfg.token_pairs}
    files = {
        "token_pairs": cfg.out / "token_pairs" / f"{cfg.split}.json",
        "states": cfg.out / "hidden_states" / cfg.split / "meta.json",
        "acceptance": cfg.out / "acceptance" / "acceptance.json",
        "train_token_pairs": cfg.out / "token_pairs" / f"{cfg.train_split}.json",
        "target": cfg.target_id,
        "token_adapter": token_adapter_path(cfg),
        **({"lexicon": cfg.lexicon} if cfg.lexicon else {}),
    }
    return {name: path for name, path in files.items() if name != "token_adapter" or path.is_file()}


def comparison_report(cfg: ComparisonConfig, rows: Sequence[Row], out: Path) -> ComparisonReport:
    """Compute comparison.json without its provenance and printed tables.

    Args:
        cfg: settings
        rows: both models' free-running answers
        out: directory of the picture
    """
    from feature_alignment.measurement import comparison, plots
    from feature_alignment.measurement.current_acceptance import current_acceptance
    from feature_alignment.measurement.lexicon import Lexicon
    from feature_alignment.measurement.reports import ComparisonReport, FeatureLevel
    from feature_alignment.models.loading import find_checkpoint
    from feature_alignment.models.preprocessing import load_tokenizer
    from feature_alignment.storage.answers import eos_ids, read_token_pairs
    from feature_alignment.storage.hidden_states import load_hidden_states

    g, ends = cfg.num_draft_tokens, eos_ids(cfg.token_pairs or cfg.out / "token_pairs" / f"{cfg.split}.json")
    report = ComparisonReport(meta={}, token_level=comparison.free_running_agreement(rows, g))
    if cfg.token_pairs:
        first, second = comparison.halves(rows)
        return replace(report, nulls=comparison.baseline_drafter_reports(first, second, g, ends)) if first else report
    acceptance = current_acceptance(cfg.out, cfg.split, ("adapter", "chained"), g)
    chained = acceptance.chained
    at = acceptance.thresholds["0.90"]
    states = load_hidden_states(cfg.out / "hidden_states" / cfg.split, cfg.draft_layers)
    tokenizer = load_tokenizer(find_checkpoint(cfg.target_id, "--target_id"))
    train_pairs = read_token_pairs(cfg.out / "token_pairs" / f"{cfg.train_split}.json")
    report = replace(
        report,
        feature_level=FeatureLevel(at.consecutive_accept, at.relaxed_accept, 0.9, acceptance.adapter.params),
        aligned_token_level=token_level_of(acceptance),
        chained_token_level=token_level_of(chained) if chained else None,
        token_adapter=token_adapter_report(cfg, rows, ends),
        own_drafts=comparison.own_draft_report(states.rows, g, ends) if states.meta["prefix"] == "verifier" else None,
        feature_rules={"aligned": acceptance.thresholds} | ({"chained": chained.thresholds} if chained else {}),
        nulls=comparison.baseline_drafter_reports(
            train_pairs, rows, g, ends, lambda question: tokenizer.encode(question, add_special_tokens=False)
        ),
    )
    if not cfg.lexicon:
        return report
    sweeps, examples = judge_accepted(cfg, states, tokenizer, Lexicon.load(cfg.lexicon))
    plots.threshold_sweep(sweeps, out)
    return replace(report, kept_by_cosine=sweeps, examples=examples)


def token_level_of(report: AcceptanceReport | ChainReport) -> DraftReport:
    """The rates of an adapter under the token rule."""
    from feature_alignment.measurement.reports import DraftReport

    return DraftReport(
        token_match=report.token_match,
        acceptance_rate=report.acceptance_rate,
        consecutive_accept=report.consecutive_accept_token,
        tokens_per_pass=report.tokens_per_pass,
        params=report.params,
    )


if __name__ == "__main__":
    run(main)
