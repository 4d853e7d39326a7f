"""Task 2.2. Token level against feature level, side by side.

reads   token_pairs/<split>.json (ours or the earlier attempt's layout) and, where there, acceptance/acceptance.json
writes  token_baseline/comparison.json, comparison.md

    python feature_alignment/compare_token_baseline.py --config configs/demo.yaml
    python feature_alignment/compare_token_baseline.py --token_pairs some/pairs.json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_alignment.config import Common, parse_config
from feature_alignment.console import UserError, print_json_line, print_table, rate_text, run


@dataclass(frozen=True)
class ComparisonConfig(Common):
    """Compare token-level with feature-level acceptance.

    Args:
        token_pairs: free-running answers of both models; default token_pairs/<split>.json of this run
        split: what is compared
        train_split: what the null drafters are fitted on
        num_draft_tokens: drafts per verification
    """

    token_pairs: Path | None = None
    split: str = "test"
    train_split: str = "train"
    num_draft_tokens: int = 5


def free_running_agreement(rows: Sequence[dict[str, Any]], num_draft_tokens: int) -> dict[str, Any]:
    """How far the two free-running texts agree, each pair compared up to the shorter one.

    position_match: same token at the same place; mean_prefix: leading tokens in common; consecutive_accept: those among the
    first num_draft_tokens, as a share of them; first_token_differs: share of rows
    """
    import numpy as np

    from feature_alignment import metrics

    same, total, prefix = [], [], []
    for row in rows:
        pairs = list(zip(row["egpt_tokens"], row["vl_tokens"], strict=False))
        equal = [a == b for a, b in pairs]
        same.append(sum(equal))
        total.append(len(equal))
        prefix.append(equal.index(False) if False in equal else len(equal))
    clips = [str(row.get("sequence", row.get("sample_id", i))) for i, row in enumerate(rows)]
    ones = np.ones(len(rows))
    capped = np.minimum(prefix, num_draft_tokens).astype(float)
    return {
        "position_match": metrics.Counts(np.array(same, float), np.array(total, float)).rate(clips),
        "mean_prefix": metrics.Counts(np.array(prefix, float), ones).rate(clips),
        "consecutive_accept": metrics.Counts(capped, ones * num_draft_tokens).rate(clips),
        "first_token_differs": metrics.Counts((np.array(prefix) == 0).astype(float), ones).rate(clips),
        "params": 0,
        "overhead_ms": 0.0,
    }


def null_drafter_reports(train: Sequence[dict], test: Sequence[dict], num_draft_tokens: int) -> dict[str, Any]:
    """Each null drafter on the target's own texts (the trace identity makes that exact for lossless decoding)."""
    import torch

    from feature_alignment import metrics
    from feature_alignment.decoding.null_drafters import NULL_DRAFTERS

    reports = {}
    width = max(len(r["vl_tokens"]) for r in test)
    clips = [str(r.get("sequence", r["sample_id"])) for r in test]
    for name, fit in NULL_DRAFTERS.items():
        table = fit([(r["query"], r["vl_tokens"]) for r in train])
        bits, mask = torch.zeros(len(test), width, dtype=torch.bool), torch.zeros(len(test), width, dtype=torch.bool)
        for i, row in enumerate(test):
            tokens = row["vl_tokens"]
            mask[i, : len(tokens)] = True
            bits[i, : len(tokens)] = torch.tensor([table.next_token(row["query"], tokens[:t]) == tokens[t] for t in range(len(tokens))])
        blocks = metrics.decoding_blocks(bits, mask, num_draft_tokens)
        reports[name] = {
            "token_match": metrics.counts(bits, mask).rate(clips),
            "acceptance_rate": blocks.acceptance_rate(len(test)).rate(clips),
            "consecutive_accept": blocks.consecutive_accept(len(test)).rate(clips),
            "tokens_per_pass": blocks.tokens_per_pass(mask.sum(1)),
        }
    return reports


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    cfg = parse_config(ComparisonConfig, argv, "compare_token_baseline")
    if cfg.num_draft_tokens < 1:
        raise UserError(f"--num_draft_tokens wants at least 1, got {cfg.num_draft_tokens}.")
    from feature_alignment.processes import claimed

    with claimed(cfg.out / "token_baseline"):
        return compare(cfg)


def compare(cfg: ComparisonConfig) -> dict[str, Any]:
    """Compare; returns the content of comparison.json."""
    from feature_alignment import artifacts
    from feature_alignment.answers import read_token_pairs

    path = cfg.token_pairs or cfg.out / "token_pairs" / f"{cfg.split}.json"
    rows = read_token_pairs(path)
    token_level = free_running_agreement(rows, cfg.num_draft_tokens)

    def percent(rate: dict[str, Any]) -> str:
        return rate_text(rate, digits=3, scale=100, unit=" %")

    table = [
        ("free-running texts: same token at the same position", percent(token_level["position_match"])),
        ("free-running texts: rows that differ at the first token", percent(token_level["first_token_differs"])),
        (f"free-running texts: consecutive acceptance of {cfg.num_draft_tokens}", percent(token_level["consecutive_accept"])),
    ]
    report: dict[str, Any] = {"token_level": token_level, "feature_level": None, "aligned_token_level": None, "nulls": {}}
    made_from = {"token_pairs": path}
    acceptance_path = cfg.out / "acceptance" / "acceptance.json"
    train_path = cfg.out / "token_pairs" / f"{cfg.train_split}.json"
    if cfg.token_pairs is None:
        acceptance = artifacts.read_sealed(
            acceptance_path, "python feature_alignment/measure_feature_acceptance.py --config configs/demo.yaml"
        )
        made_from |= {"acceptance": acceptance_path, "train_token_pairs": train_path}
        at = acceptance["thresholds"]["0.90"]
        report["feature_level"] = {
            "consecutive": at["consecutive_accept"],
            "relaxed": at["relaxed_accept"],
            "threshold": 0.9,
            "params": acceptance["adapter"]["params"],
        }
        report["aligned_token_level"] = {k: acceptance[k] for k in ("token_match", "acceptance_rate", "tokens_per_pass")}
        report["aligned_token_level"]["consecutive_accept"] = acceptance["consecutive_accept_token"]
        report["nulls"] = null_drafter_reports(read_token_pairs(train_path), rows, cfg.num_draft_tokens)
        table += [
            ("aligned drafts, token rule: consecutive acceptance", percent(acceptance["consecutive_accept_token"])),
            ("aligned drafts, cosine > 0.90: consecutive acceptance", percent(at["consecutive_accept"])),
            ("aligned states, cosine > 0.90: relaxed acceptance", percent(at["relaxed_accept"])),
            ("of those kept, target says the same token", percent(at["token_match_given_accept"])),
        ]
        for name, chain in acceptance["chains"].items():
            table.append((f"{name}: token rule, consecutive acceptance", percent(chain["consecutive_accept_token"])))
        table += [
            (f"null drafter {k}, token rule: consecutive acceptance", percent(v["consecutive_accept"])) for k, v in report["nulls"].items()
        ]
    report["rows"] = [{"what": what, "value": value} for what, value in table]
    report = {"meta": artifacts.provenance("compare_token_baseline", cfg, made_from), **report}
    out = cfg.out / "token_baseline"
    markdown = ["| what | value, 95 % interval by clip |", "|---|---|", *[f"| {what} | {value} |" for what, value in table]]
    artifacts.write_text(out / "comparison.md", "\n".join(markdown) + "\n")
    artifacts.write_sealed(out / "comparison.json", report, ("comparison.md",))
    print_table(f"{len(rows):,} pairs of {path}", ("what", "value [95 %]"), table)
    print(f"  mean matching prefix of the free-running texts: {token_level['mean_prefix']['value']:.5f} tokens")
    print_json_line(
        {
            "position_match": token_level["position_match"]["value"],
            "mean_prefix": token_level["mean_prefix"]["value"],
            "first_token_differs": token_level["first_token_differs"]["value"],
            "written": str(out / "comparison.json"),
        }
    )
    return report


if __name__ == "__main__":
    run(main)
