"""What each part of the attending adapter adds, and what more training data brings: variants of equal budget on one pair's hidden states.

    python tests/benchmarks/ablations.py --config configs/language.yaml                        # all variants
    python tests/benchmarks/ablations.py --config configs/language.yaml --variants full tv half --num_epochs 12

Every variant is trained by `train_hidden_adapter` with the settings of the config, into attending_adapter_…ablation_NAME/, and trained ones
are reused, so a killed run continues; `fused` alone (`fused_layers`) is not kept. All take the same number of optimizer steps: on half the
rows twice as many epochs; early stopping is off, and the epoch is chosen by tokens per pass on validation. Scores are simulated rounds on
the test split, next to tables that cost nothing and to the run's own attending adapter, if there is one. Intervals (95 %) resample clips; a
difference to `full` is paired: both on the same resampled clips.

writes  ablations/ablations.json and ablations.md in the output folder; with --limit N ablations_N.json and ablations_N.md
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fused_layers
import numpy as np
import torch
from torch import Tensor

from feature_alignment import train_hidden_adapter
from feature_alignment.adapters import fitting, rounds
from feature_alignment.adapters.attending import AttendingAdapter, load_attending_adapter
from feature_alignment.adapters.attending_texts import answers_of
from feature_alignment.adapters.attending_training import train_attending
from feature_alignment.cli.config import parse_config
from feature_alignment.cli.console import UserError, markdown_table, print_json_line, print_table, run
from feature_alignment.decoding.baseline_drafters import Lookup, NGram, Table
from feature_alignment.decoding.best_table import BestTable
from feature_alignment.measurement import metrics
from feature_alignment.measurement.attending_scoring import attending_scores
from feature_alignment.storage.artifacts import provenance
from feature_alignment.storage.files import load_pt, write_json, write_text
from feature_alignment.storage.hidden_states import HiddenStates, load_hidden_states
from feature_alignment.train_hidden_adapter import TrainConfig

VARIANTS: dict[str, tuple[str, ...]] = {
    "full": (),
    "with_prompt": ("--reads_prompt", "true"),
    "without_prompt": ("--reads_prompt", "false"),
    "without_candidates": ("--without", "candidates"),
    "without_events": ("--blind",),
    "ce": ("--loss", "ce"),
    "tv": ("--loss", "tv"),
    "hard_labels": ("--soft_targets", "0"),
    "one_step": ("--roll_out_steps", "1"),
    "adamw": ("--optimizer", "adamw", "--lr", "2e-3"),  # with the rate it had on the language pair
}
PARTS = {"half": 2, "quarter": 4, "eighth": 8}  # of the training rows
ALL = [*VARIANTS, *PARTS, "fused"]
DRAFT_LENGTHS = (5, 8)


def flags_of(name: str, num_rows: int, num_epochs: int, suffix: str) -> list[str]:
    """Flags of `train_hidden_adapter` for one variant: its own, and the budget of `num_epochs` over all rows.

    Args:
        name: key of VARIANTS or PARTS
        num_rows: training rows
        num_epochs: epochs over all of them
        suffix: of the variant's folder
    """
    part = PARTS.get(name, 1)
    epochs = str(num_epochs * part)
    return [
        *("--adapter", "attending", "--variant", f"ablation_{name}{suffix}", "--num_epochs", epochs, "--patience", epochs),
        *("--limit", str(max(1, num_rows // part))),
        *VARIANTS.get(name, ()),
    ]


def table_bits(train: HiddenStates, test: HiddenStates) -> dict[str, Tensor]:
    """For each zero-cost table of the benchmark whether it proposes the text's own token, [n, s] bool, given the text before it.

    Lookup searches the end of the prompt that was stored, and the answer.
    """
    prompts = {row["question"]: [token for token in row["prompt_ids"] if token >= 0] for row in [*train.rows, *test.rows]}
    texts = [(row["question"], answer.tokens) for row, answer in zip(train.rows, answers_of(train), strict=True)]
    drafters: dict[str, Table] = {
        "n-gram": NGram(texts),
        "prompt lookup": Lookup(encode=prompts.__getitem__),
        "n-gram + lookup": BestTable(texts, prompts.__getitem__),
    }
    bits = {name: torch.zeros_like(test.mask) for name in drafters}
    for i, (row, answer) in enumerate(zip(test.rows, answers_of(test), strict=True)):
        for name, drafter in drafters.items():
            right = [drafter.next_token(row["question"], answer.tokens[:t]) == token for t, token in enumerate(answer.tokens)]
            bits[name][i, : len(right)] = torch.tensor(right)
    return bits


def passes_of(bits: Tensor, test: HiddenStates, num_draft_tokens: int) -> np.ndarray:
    """Passes of the target for each text, [n] float64; `bits` as in `rounds.rounds`."""
    table = rounds.rounds(bits, test.mask, num_draft_tokens, test.ended)
    return np.bincount(table[:, 0], minlength=len(test.rows)).astype(np.float64)


def tokens_per_pass(passes: np.ndarray, test: HiddenStates, base: np.ndarray | None = None) -> dict[str, Any]:
    """Tokens per pass with its interval; with `base`, the passes of another drafter, also the paired difference to it.

    Args:
        passes: [n], passes of each text
        test: the texts
        base: [n]
    """
    tokens = (test.lengths - 1).clamp(min=0).double().numpy()
    rate = metrics.Counts(tokens, passes).rate(test.clips)
    found: dict[str, Any] = {"value": rate.value, "ci95": rate.ci95}
    if base is not None:
        names, clip = np.unique(np.asarray(test.clips), return_inverse=True)
        draws = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=metrics.NUM_RESAMPLES)
        kept, own, other = (draws @ np.bincount(clip, x, len(names)) for x in (tokens, passes, base))
        low, high = np.percentile(kept / np.maximum(own, 1) - kept / np.maximum(other, 1), (2.5, 97.5))
        found |= {"difference": tokens.sum() / passes.sum() - tokens.sum() / base.sum(), "difference_ci95": (float(low), float(high))}
    return found


def train_and_score(
    name: str, argv: Sequence[str], states: dict[str, HiddenStates], cfg: TrainConfig, num_epochs: int, suffix: str
) -> dict[str, Any]:
    """Train one variant, or reuse it, and count its passes on the test texts.

    Args:
        name: of the variant
        argv: flags of every training
        states: "train" and "test" -> split
        cfg: settings
        num_epochs: budget, in epochs over all training rows
        suffix: of the variant's folder
    """
    flags = flags_of(name, len(states["train"].rows), num_epochs, suffix)
    train_hidden_adapter.main([*argv, *flags])
    own = parse_config(TrainConfig, [*argv, *flags], "train_hidden_adapter", variant="adapter")
    return scored(name, train_hidden_adapter.adapter_folder(own), states, cfg)


def train_fused(states: dict[str, HiddenStates], test_split: str, cfg: TrainConfig, num_epochs: int) -> dict[str, Any]:
    """The row of an adapter that reads three layers of the target. It is not kept, but trained each time.

    Args:
        states: "train" and "test" -> split
        test_split: name of the split "test"
        cfg: settings
        num_epochs: as in `train_and_score`
    """
    head, embeddings = map(fused_layers.beside_zeros, head_and_embeddings(cfg))
    target, splits = fused_layers.target_with_layers(cfg, len(head)), {}
    validation = load_hidden_states(cfg.out / "hidden_states" / cfg.validation_split, cfg.draft_layers, events=True, prompt=True)
    for name, split, of_split in (
        ("train", cfg.train_split, states["train"]),
        ("validation", cfg.validation_split, validation),
        ("test", test_split, states["test"]),
    ):
        splits[name] = fused_layers.fused(of_split, split, target, cfg)
    del target
    own, start = dataclasses.replace(cfg, num_epochs=num_epochs, patience=num_epochs, reads_prompt=False), time.time()
    adapter, history = train_attending(splits["train"], splits["validation"], head, embeddings, own)
    best = fitting.best_of(history)
    about = {"parameters": adapter.num_parameters, "seconds": time.time() - start, "best_epoch": best["epoch"], "epochs": num_epochs}
    about |= {"rows": len(splits["train"].rows), "config": {"batch_size": cfg.batch_size}}
    validated = {key.removeprefix("validation_"): value for key, value in best.items() if key.startswith("validation_")}
    return row_of("fused", adapter, about | {"validation": validated}, splits["test"], head, embeddings)


def scored(name: str, folder: Path, states: dict[str, HiddenStates], cfg: TrainConfig) -> dict[str, Any]:
    """A row of the table: a trained adapter's passes on the test texts.

    Args:
        name: of the row
        folder: of the adapter
        states: "test" -> split
        cfg: settings
    """
    adapter, meta = load_attending_adapter(folder / "adapter.pt")
    return row_of(name, adapter, meta, states["test"], *head_and_embeddings(cfg))


def head_and_embeddings(cfg: TrainConfig) -> tuple[Tensor, Tensor]:
    """The target's LM head and input embeddings, [v, d_target] each."""
    command = "python feature_alignment/extract_hidden_states.py"
    head, embeddings = (load_pt(cfg.out / "hidden_states" / f"{x}.pt", command).float() for x in ("vl_lm_head", "vl_embeddings"))
    return head, embeddings


def row_of(
    name: str, adapter: AttendingAdapter, meta: dict[str, Any], test: HiddenStates, head: Tensor, embeddings: Tensor
) -> dict[str, Any]:
    """`scored` for an adapter and its meta."""
    scores, _ = attending_scores(adapter, test, head, embeddings, max(DRAFT_LENGTHS))
    steps = -(-meta["rows"] // meta["config"]["batch_size"]) * meta["epochs"]
    about = {key: meta[key] for key in ("parameters", "seconds", "best_epoch", "epochs", "rows")}
    passes = {g: passes_of(scores.match[..., :g], test, g) for g in DRAFT_LENGTHS}
    first = metrics.counts(scores.match[:, 1:, 0], test.mask[:, 1:]).value
    return {"name": name, **about, "steps": steps, "validation": meta["validation"], "first_draft_right": first, "passes": passes}


def table_of(rows: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells of the printed table."""

    def interval(found: dict[str, Any], value: str, ci: str, sign: str = "") -> str:
        return f"{found[value]:{sign}.2f} [{found[ci][0]:{sign}.2f}, {found[ci][1]:{sign}.2f}]" if value in found else ""

    lengths = [str(g) for g in DRAFT_LENGTHS]
    header = (
        "drafter",
        "rows",
        "steps",
        "first draft right",
        *(f"{g} drafts" for g in lengths),
        *(f"to full, {g} drafts" for g in lengths),
    )
    cells = []
    for row in rows:
        found = [row["tokens_per_pass"][g] for g in lengths]
        about = [f"{row[key]:,}" if key in row else "" for key in ("rows", "steps")]
        values = [interval(f, "value", "ci95") for f in found]
        differences = [interval(f, "difference", "difference_ci95", "+") for f in found]
        cells.append((row["name"], *about, f"{row['first_draft_right']:.3f}", *values, *differences))
    return header, cells


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train, score and write; returns the rows of ablations.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the pair's config file")
    parser.add_argument("--variants", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--split", default="test", help="split that is scored")
    parser.add_argument("--num_epochs", type=int, help="epochs over all training rows; default: the config's")
    parser.add_argument("--limit", type=int, help="training rows that count as all; default: all")
    parser.add_argument("flags", nargs="*", help="flags of every training, after --, e.g. -- --lr 1e-3 --output_dir outputs/other")
    args = parser.parse_args(argv)
    given = ["--config", args.config, *args.flags]
    cfg = parse_config(TrainConfig, [*given, "--adapter", "attending"], "train_hidden_adapter", variant="adapter")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    folder = cfg.out / "hidden_states"
    states = {
        name: load_hidden_states(folder / split, cfg.draft_layers, events=True, prompt=True)
        for name, split in (("train", cfg.train_split), ("test", args.split))
    }
    if set(states["train"].clips) & set(states["test"].clips):
        raise UserError(f"splits {cfg.train_split!r} and {args.split!r} share clips; score a split of unseen clips.")
    states["train"] = train_hidden_adapter.first_rows(states["train"], args.limit)
    suffix = f"_{args.limit}" if args.limit else ""
    test, rows, num_epochs = states["test"], list[dict[str, Any]](), args.num_epochs or cfg.num_epochs
    for name, bits in table_bits(states["train"], test).items():
        first = metrics.counts(bits[:, 1:], test.mask[:, 1:]).value
        rows.append({"name": name, "first_draft_right": first, "passes": {g: passes_of(bits, test, g) for g in DRAFT_LENGTHS}})
    write(cfg, args.split, states, rows, suffix)
    if (main_adapter := train_hidden_adapter.adapter_folder(cfg) / "adapter.pt").is_file():
        rows.append(scored("adapter of the run", main_adapter.parent, states, cfg))
    for name in dict.fromkeys(["full", *args.variants]):
        if name == "fused":
            rows.append(train_fused(states, args.split, cfg, num_epochs))
        else:
            rows.append(train_and_score(name, given, states, cfg, num_epochs, suffix))
        write(cfg, args.split, states, rows, suffix)  # after each: a long run shows what it has
    shown = write(cfg, args.split, states, rows, suffix)
    print_table(f"tokens per pass, {args.split}, {num_epochs} epochs", *table_of(shown))
    print_json_line({"variants": len(rows), "written": str(cfg.out / "ablations" / f"ablations{suffix}.json")})
    return shown


def write(
    cfg: TrainConfig, split: str, states: dict[str, HiddenStates], rows: Sequence[dict[str, Any]], suffix: str
) -> list[dict[str, Any]]:
    """Write ablations.json and ablations.md, `suffix` in their names; returns the rows as they are written."""
    test, out = states["test"], cfg.out / "ablations"
    full = next((row["passes"] for row in rows if row["name"] == "full"), None)
    written = []
    for row in rows:
        base = {g: None if full is None or row["name"] == "full" else full[g] for g in DRAFT_LENGTHS}
        found = {str(g): tokens_per_pass(row["passes"][g], test, base[g]) for g in DRAFT_LENGTHS}
        written.append({**{key: value for key, value in row.items() if key != "passes"}, "tokens_per_pass": found})
    sources = {name: cfg.out / "hidden_states" / s / "meta.json" for name, s in (("train", cfg.train_split), ("test", split))}
    about = {"split": split, "clips": len(set(test.clips)), "texts": len(test.rows), "tokens": int(test.lengths.sum())}
    write_json(out / f"ablations{suffix}.json", {"meta": provenance("ablations", cfg, sources), **about, "rows": written})
    text = f"# Ablations of the attending adapter\n\n{about['texts']} texts, {about['clips']} clips of the {split} split.\n\n"
    write_text(out / f"ablations{suffix}.md", text + markdown_table(*table_of(written)) + "\n")
    return written


if __name__ == "__main__":
    run(main)
