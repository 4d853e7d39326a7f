"""Task 2.2. Token level against feature level, side by side, and what the drafts are worth that only a cosine would keep.

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
from feature_alignment.cli.console import UserError, markdown_table, print_json_line, print_table, rate_text, run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from feature_alignment.measurement.lexicon import Lexicon
    from feature_alignment.storage.hidden_states import HiddenStates
    from feature_alignment.storage.identity import RunIdentity

log = logging.getLogger(__name__)

LAYOUT_7B = (32_000, 64)  # vocabulary of the released models, longest answer: what the token-level adapter weighs there


@dataclass(frozen=True)
class ComparisonConfig(Common):
    """Compare token-level with feature-level acceptance, and name the words that only a cosine would keep. Reads token_pairs/ and
    acceptance/; writes comparison.json, comparison.md and a picture under token_baseline/.

    Args:
        token_pairs: free-running answers of both models; default token_pairs/<split>.json of this run. Of another file the first half
            of the sequences trains the null drafters and the second half is scored
        split: what is compared
        train_split: what the null drafters and the token-level adapter learn from
        validation_split: what chooses the token-level adapter's epoch
        num_draft_tokens: drafts per verification
        train_token_adapter: train the token-level adapter first (minutes on two cores); once trained it is compared every time
        num_epochs: of its training
    """

    token_pairs: Path | None = None
    split: str = "test"
    train_split: str = "train"
    validation_split: str = "validation"
    num_draft_tokens: int = 5
    train_token_adapter: bool = False
    num_epochs: int = 6


def token_adapter_path(cfg: ComparisonConfig) -> Path:
    return cfg.out / "token_baseline" / "token_adapter.pt"


def train_token_adapter(cfg: ComparisonConfig, rows: Sequence[dict]) -> None:
    """Train the earlier attempt's token-level adapter, unless one of the same identity lies there.

    Args:
        cfg: settings
        rows: what is compared; the adapter must take texts of their length
    """
    from feature_alignment.adapters import token as token_adapter
    from feature_alignment.storage.answers import eos_ids, read_token_pairs
    from feature_alignment.storage.files import load_pt, save_pt

    path, identity = token_adapter_path(cfg), token_adapter_identity(cfg)
    if _trained_already(path, cfg, identity):
        return
    train, validation = (read_token_pairs(cfg.out / "token_pairs" / f"{split}.json") for split in (cfg.train_split, cfg.validation_split))
    extract = command_for("extract_hidden_states", split=cfg.train_split)
    vocabulary = len(load_pt(cfg.out / "hidden_states" / "vl_lm_head.pt", extract))
    longest = max(len(r[k]) for r in (*train, *validation, *rows) for k in ("egpt_tokens", "vl_tokens"))
    began = time.time()
    eos_id = min(eos_ids(cfg.out / "token_pairs" / f"{cfg.train_split}.json"), default=0)
    model, accuracies = token_adapter.train_token_adapter(
        train, validation, vocabulary, longest, cfg.num_epochs, cfg.device, cfg.seed, eos_id
    )
    meta = {"geometry": model.geometry, "seconds": time.time() - began, "validation_accuracy": accuracies, **identity.as_dict()}
    save_pt(path, {"meta": meta, "state_dict": {k: v.cpu() for k, v in model.state_dict().items()}})


def token_adapter_report(cfg: ComparisonConfig, rows: Sequence[dict], eos_ids: Sequence[int]) -> dict[str, Any] | None:
    """The earlier attempt's token-level adapter, trained here; None where it has not been, or from other texts."""
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
    texts = replace(token_adapter_identity(cfg), settings=meta.get("settings", {}))  # however long it was trained
    if changes := texts.changes(meta, ignore_code=True):
        log.warning("%s is left out (then → now): %s. Train it again:\n  %s", path, "; ".join(changes), train_it)
        return None
    model.to(cfg.device)
    text = torch.full((1, model.geometry["longest"]), 5, device=cfg.device)
    ms = call_ms(lambda: model(text), 20, cfg.device)
    with torch.device("meta"):
        at_7b = token_adapter.TokenAdapter(*LAYOUT_7B).num_parameters
    width = max(len(r["vl_tokens"]) for r in rows)
    bits = torch.nn.functional.pad(token_adapter.token_matches(model, rows, min(eos_ids, default=0)), (0, max(0, width - text.shape[1])))[
        :, :width
    ]
    report = verified(bits, rows, cfg.num_draft_tokens, eos_ids)
    return {**report, "params": model.num_parameters, "params_7b": at_7b, "overhead_ms": ms, "seconds": meta["seconds"]}


def token_adapter_identity(cfg: ComparisonConfig) -> RunIdentity:
    """What the token-level adapter is trained from: both models' texts of two splits, and the settings of its training."""
    from feature_alignment.storage import identity
    from feature_alignment.storage.identity import identity_of

    texts = {split: cfg.out / "token_pairs" / f"{split}.json" for split in (cfg.train_split, cfg.validation_split)}
    whole = identity_of("adapters.token", cfg, texts)
    return identity.RunIdentity({k: whole.settings[k] for k in ("num_epochs", "seed", "device")}, whole.made_from, whole.code)


def _trained_already(path: Path, cfg: ComparisonConfig, identity: RunIdentity) -> bool:
    """Whether `--resume` finds a token-level adapter of this identity."""
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


def judge_kept(
    cfg: ComparisonConfig, states: HiddenStates, tokenizer: PreTrainedTokenizerBase, lexicon: Lexicon
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """`comparison.accepted_drafts` of aligned, chained and EventGPT's own drafts; own words are kept by the hidden adapter's cosine."""
    from feature_alignment.measurement.comparison import accepted_drafts
    from feature_alignment.storage.files import load_pt

    scores = load_pt(cfg.out / "acceptance" / "scores.pt", command_for("measure_feature_acceptance"))
    sources = {"aligned": scores["adapter"]} | ({"chained": scores["chained"]} if "chained" in scores else {})
    if "egpt_drafts" in states.rows[0]:
        own = states.token_ids.clone()
        for i, row in enumerate(states.rows):
            own[i, : len(row["egpt_drafts"])] = own.new_tensor(row["egpt_drafts"])
        sources["own"] = {**scores["adapter"], "says": own}
    word = lambda token: tokenizer.decode([token]).strip()  # noqa: E731
    return accepted_drafts(sources, states.token_ids, word, [r["id"] for r in states.rows], lexicon)


def tables(report: dict[str, Any], num_draft_tokens: int) -> list[tuple[str, tuple[str, ...], list[tuple]]]:
    """(title, header, rows) of everything that is shown."""
    percent = lambda rate: rate_text(rate, digits=3, scale=100, unit=" %")  # noqa: E731
    level = report["token_level"]
    found: list[tuple[str, tuple[str, ...], list[tuple]]] = [
        (
            f"the two free-running texts, {level['mean_prefix']['total']:,.0f} pairs",
            ("what", "value [95 %]"),
            [
                ("same token at the same position", percent(level["position_match"])),
                ("rows that differ at the first token", percent(level["first_token_differs"])),
                (f"consecutive acceptance of {num_draft_tokens}", percent(level["consecutive_accept"])),
                ("mean matching prefix, tokens", rate_text(level["mean_prefix"], 5)),
            ],
        )
    ]
    header: tuple[str, ...]
    keys: tuple[str, ...]
    trained = report["token_adapter"]
    sources = {f"token-level adapter, {trained['overhead_ms']:.1f} ms a text": trained} if trained else {}
    sources |= {"EventGPT's own drafts": report["own_drafts"]}
    sources |= {"aligned drafts": report["aligned_token_level"], "chained drafts": report["chained_token_level"]}
    sources |= {f"null drafter {name}": r for name, r in report["nulls"].items()}
    lines = [
        (
            name,
            *(rate_text(r[k], 3) for k in ("token_match", "acceptance_rate", "consecutive_accept")),
            rate_text(r["leading_tokens"], 2) if "leading_tokens" in r else "-",
            f"{r['tokens_per_pass']:.2f}",
            f"{r['params']:,}",
        )
        for name, r in sources.items()
        if r
    ]
    if lines:
        header = ("drafts", "token match", "acceptance rate", "consecutive", "leading tokens", "tokens per pass", "parameters")
        found.append((f"drafts under the token rule, {num_draft_tokens} a round, given the target's text so far", header, lines))
    if report["feature_level"]:
        rules = [(f"{name}, cosine > {t}", v) for name, by in report["feature_rules"].items() for t, v in by.items()]
        keys = ("consecutive_accept", "relaxed_accept", "token_match_given_accept")
        header = ("drafts, rule", "consecutive", "relaxed", "same token among the kept")
        found.append(("drafts under the cosine rules", header, [(name, *(rate_text(v[k], 3) for k in keys)) for name, v in rules]))
    if report["kept_by_cosine"]:
        header = ("drafts, threshold", "drafted", "kept", "same word", "synonym", "other fact", "of these hidden from events", "other word")
        keys = ("drafted", "kept", "same", "synonym", "other_fact", "other_fact_hidden", "other_word")
        lines = [
            (f"{name}, {row['threshold']:.2f}", *(row[k] for k in keys))
            for name, sweep in report["kept_by_cosine"].items()
            for row in sweep
            if min(abs(row["threshold"] - t) for t in (0.5, 0.8, 0.9, 0.96)) < 1e-6
        ]
        found.append(("what a cosine keeps: the target's word, or which other?", header, lines))
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    cfg = parse_config(ComparisonConfig, argv, "compare_token_baseline")
    from feature_alignment.storage.processes import check_device, exclusive_lock

    check_device(cfg.device)
    with exclusive_lock(cfg.out / "token_baseline"):
        return compare(cfg)


def compare(cfg: ComparisonConfig) -> dict[str, Any]:
    """Compare, or reuse what is there; returns the content of comparison.json."""
    import torch

    from feature_alignment.storage.answers import read_token_pairs
    from feature_alignment.storage.artifacts import cached_result, provenance
    from feature_alignment.storage.files import write_hashed_json, write_text
    from feature_alignment.storage.identity import identity_of

    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    made_from, out = sources_of(cfg), cfg.out / "token_baseline"
    rows = read_token_pairs(made_from["token_pairs"])
    if cfg.train_token_adapter and not cfg.token_pairs:
        train_token_adapter(cfg, rows)
    identity = identity_of("compare_token_baseline", cfg, made_from, timed=True, without=("train_token_adapter",))
    report = cached_result(out / "comparison.json", cfg, identity)
    reused = report is not None
    if report is None:
        report = comparison_report(cfg, rows, out)
        shown = tables(report, cfg.num_draft_tokens)
        report["rows"] = [{"table": title, **dict(zip(header, row, strict=True))} for title, header, lines in shown for row in lines]
        report = {"meta": provenance("compare_token_baseline", cfg, made_from, identity), **report}
        markdown = [f"**{title}**\n\n{markdown_table(header, lines)}\n" for title, header, lines in shown]
        write_text(out / "comparison.md", "\n".join(markdown))
        beside = ("comparison.md", *(("threshold_sweep.png",) if report["kept_by_cosine"] else ()))
        write_hashed_json(out / "comparison.json", report, beside)
    for title, header, lines in tables(report, cfg.num_draft_tokens):
        print_table(title, header, lines)
    if report["examples"]:
        columns = ("source", "before", "drafted", "said", "verdict", "cosine")
        print_table("kept though the word is another, highest cosine first", columns, [[e[c] for c in columns] for e in report["examples"]])
    level = report["token_level"]
    numbers = {k: level[k]["value"] for k in ("position_match", "mean_prefix", "first_token_differs")}
    print_json_line({**numbers, "reused": reused, "written": str(out / "comparison.json")})
    return report


def sources_of(cfg: ComparisonConfig) -> dict[str, Path]:
    """Name -> every file that the comparison reads."""
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


def comparison_report(cfg: ComparisonConfig, rows: Sequence[dict], out: Path) -> dict[str, Any]:
    """Every number of comparison.json, compared now.

    Args:
        cfg: settings
        rows: both models' free-running answers
        out: where the picture goes
    """
    from feature_alignment.measurement import comparison, plots
    from feature_alignment.measurement.lexicon import Lexicon
    from feature_alignment.models.loading import find_checkpoint
    from feature_alignment.models.preprocessing import load_tokenizer
    from feature_alignment.storage.answers import eos_ids, read_token_pairs
    from feature_alignment.storage.files import read_hashed_json
    from feature_alignment.storage.hidden_states import load_hidden_states

    report: dict[str, Any] = {"token_level": comparison.free_running_agreement(rows, cfg.num_draft_tokens)}
    report |= dict.fromkeys(("feature_level", "aligned_token_level", "chained_token_level", "token_adapter", "own_drafts"))
    report |= {"feature_rules": {}, "kept_by_cosine": {}, "examples": [], "nulls": {}}
    g, ends = cfg.num_draft_tokens, eos_ids(cfg.token_pairs or cfg.out / "token_pairs" / f"{cfg.split}.json")
    if cfg.token_pairs:
        first, second = comparison.halves(rows)
        if first:
            report["nulls"] = comparison.null_drafter_reports(first, second, g, ends)
        return report
    acceptance = read_hashed_json(cfg.out / "acceptance" / "acceptance.json", command_for("measure_feature_acceptance"))
    states = load_hidden_states(cfg.out / "hidden_states" / cfg.split, cfg.draft_layers)
    levels = {"aligned": acceptance | {"params": acceptance["adapter"]["params"]}}
    levels |= {"chained": acceptance["chains"]["chained"]} if "chained" in acceptance["chains"] else {}
    for name, level in levels.items():
        report[f"{name}_token_level"] = {k: level[k] for k in ("token_match", "acceptance_rate", "tokens_per_pass", "params")}
        report[f"{name}_token_level"]["consecutive_accept"] = level["consecutive_accept_token"]
        report["feature_rules"][name] = level["thresholds"]
    at = acceptance["thresholds"]["0.90"]
    report["feature_level"] = {"consecutive": at["consecutive_accept"], "relaxed": at["relaxed_accept"], "threshold": 0.9}
    report["feature_level"]["params"] = acceptance["adapter"]["params"]
    report["token_adapter"] = token_adapter_report(cfg, rows, ends)
    if "egpt_drafts" in states.rows[0]:
        drafts = comparison.right([r["egpt_drafts"] for r in states.rows], states.rows)
        report["own_drafts"] = {**comparison.verified(drafts, states.rows, g, ends), "params": 0}
    tokenizer = load_tokenizer(find_checkpoint(cfg.target_id, "--target_id"))
    encode = lambda question: tokenizer.encode(question, add_special_tokens=False)  # noqa: E731
    train_pairs = read_token_pairs(cfg.out / "token_pairs" / f"{cfg.train_split}.json")
    report["nulls"] = comparison.null_drafter_reports(train_pairs, rows, g, ends, encode)
    if cfg.lexicon:
        report["kept_by_cosine"], report["examples"] = judge_kept(cfg, states, tokenizer, Lexicon.load(cfg.lexicon))
        plots.threshold_sweep(report["kept_by_cosine"], out)
    return report


if __name__ == "__main__":
    run(main)
