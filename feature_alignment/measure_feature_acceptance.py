"""Task 2.1. How well A(g) predicts v, and how many drafts each rule would keep, on the same prefix.

reads   hidden_states/<split> (and the training split, for the nulls), vl_lm_head.pt, adapter/adapter.pt;
        chained_adapter/adapter.pt with its event states and vl_embeddings.pt, where there is one
writes  acceptance/acceptance.json, per_position.csv, cosine_histogram.png, acceptance_by_position.png

    python feature_alignment/measure_feature_acceptance.py --config configs/demo.yaml
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_alignment.config import Common, parse_config
from feature_alignment.console import UserError, print_json_line, print_table, rate_text, run

if TYPE_CHECKING:
    from torch import Tensor

    from feature_alignment.artifacts import HiddenStates
    from feature_alignment.chained_adapter import ChainedAdapter

TASK_THRESHOLD = 0.90
THRESHOLDS = (0.80, 0.85, TASK_THRESHOLD, 0.95)
RIDGE_STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class AcceptanceConfig(Common):
    """Measure the adapter on hidden states it has not seen.

    Args:
        split: what is measured
        train_split: what the null predictors are fitted on
        validation_split: what the ridge strength is chosen on
        num_draft_tokens: drafts per verification
    """

    split: str = "test"
    train_split: str = "train"
    validation_split: str = "validation"
    num_draft_tokens: int = 5


@dataclass(frozen=True)
class Scores:
    """One predictor of the target's states on one split: cosine [n, s] float32, match [n, s] bool (same argmax through W)."""

    cosine: Tensor
    match: Tensor


def score(predict: Callable[[Tensor, int], Tensor], states: HiddenStates, head: Tensor) -> Scores:
    """Run `predict(states of one row [s, d_draft], row)` -> [s, d_target] over a split, row by row in float32."""
    import torch

    from feature_alignment.decoding.acceptance import cosine_per_position

    cosine, match = torch.zeros(states.mask.shape), torch.zeros(states.mask.shape, dtype=torch.bool)
    with torch.inference_mode():
        for row in range(len(states.draft)):
            n = int(states.lengths[row])
            g, v = states.draft[row, :n].float(), states.target[row, :n].float()
            states.refuse_non_finite([row], g[None], v[None])
            predicted = predict(g, row)
            cosine[row, :n] = cosine_per_position(predicted, v)
            match[row, :n] = (predicted @ head.T).argmax(-1) == (v @ head.T).argmax(-1)
    return Scores(cosine, match)


def null_predictors(train: HiddenStates, validation: HiddenStates, test: HiddenStates, rank: int, head: Tensor) -> dict[str, Callable]:
    """What the adapter must beat: name -> predictor. Fitted on the training split, ridge strength chosen on validation."""
    import torch

    from feature_alignment.closed_form import moments

    d_draft, d_target, width = train.draft.shape[-1], train.target.shape[-1], train.target.shape[1]
    total, number = torch.zeros(width, d_target, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for row in range(len(train.draft)):
        n = int(train.lengths[row])
        total[:n] += train.target[row, :n].double()
        number[:n] += 1
    overall = (total.sum(0) / number.sum()).float()
    by_position = torch.where(number[:, None] > 0, total / number.clamp(min=1)[:, None], overall.double()).float()

    def pairs():
        for rows in torch.arange(len(train.draft)).split(256):
            mask = train.mask[rows]
            yield train.draft[rows][mask].float(), train.target[rows][mask].float()

    statistics = moments(pairs(), d_draft, d_target)

    def validation_cosine(strength: float, r: int | None) -> float:
        fitted = statistics.ridge(strength, r)
        result = score(lambda g, _: fitted(g), validation, head)
        return float(result.cosine.sum() / validation.mask.sum())

    best = max(RIDGE_STRENGTHS, key=lambda s: validation_cosine(s, None))
    ridge, ridge_rank_r = statistics.ridge(best), statistics.ridge(best, rank)
    partner = _other_clip(test)
    nulls: dict[str, Callable] = {
        "target_mean": lambda g, _: overall.expand(len(g), -1),
        "position_mean": lambda g, _: by_position[torch.arange(len(g)).clamp(max=width - 1)],
        "shuffled": lambda g, row: test.target[partner[row], : len(g)].float(),
        "ridge": lambda g, _: ridge(g),
        "ridge_rank_r": lambda g, _: ridge_rank_r(g),
    }
    if d_draft % d_target == 0:
        nulls = {"identity": lambda g, _: g[:, -d_target:], **nulls}
    return nulls


def _other_clip(states: HiddenStates) -> list[int]:
    """For each row another row of another clip, preferably about the same question."""
    clips, questions = states.clips, [r["question"] for r in states.rows]
    n = len(clips)
    partner = []
    for i in range(n):
        others = [(i + k) % n for k in range(1, n) if clips[(i + k) % n] != clips[i]]
        same = [j for j in others if questions[j] == questions[i]]
        partner.append((same or others or [i])[0])
    return partner


def rates(scores: Scores, there: Tensor, states: HiddenStates, num_draft_tokens: int) -> dict[str, Any]:
    """What any predictor is told by: [n, s] scores, or [n, s, steps] of rounds that begin anywhere; `there` marks real places."""
    from feature_alignment import metrics

    clips, n = states.clips, len(states.mask)
    blocks = metrics.decoding_blocks(scores.match, states.mask, num_draft_tokens, states.ended)
    return {
        "cosine": metrics.counts(scores.cosine, there).rate(clips),
        "token_match": metrics.counts(scores.match, there).rate(clips),
        "acceptance_rate": blocks.acceptance_rate(n).rate(clips),
        "consecutive_accept_token": blocks.consecutive_accept(n).rate(clips),
        "tokens_per_pass": blocks.tokens_per_pass(states.lengths),
    }


def rates_above(threshold: float, scores: Scores, there: Tensor, states: HiddenStates, num_draft_tokens: int) -> dict[str, Any]:
    """What the cosine rules keep at a threshold."""
    from feature_alignment import metrics

    clips, n, above = states.clips, len(states.mask), scores.cosine > threshold
    rounds = metrics.decoding_blocks(above, states.mask, num_draft_tokens, states.ended)
    return {
        "relaxed_accept": metrics.counts(above, there).rate(clips),
        "consecutive_accept": rounds.consecutive_accept(n).rate(clips),
        "consecutive_length": rounds.consecutive_length(n).rate(clips),
        "token_match_given_accept": metrics.counts(scores.match, there & above).rate(clips),
    }


def acceptance_report(scores: Scores, nulls: dict[str, Scores], states: HiddenStates, num_draft_tokens: int) -> dict[str, Any]:
    """Every number of acceptance.json but its meta, from scores alone."""
    from feature_alignment import metrics

    mask = states.mask
    return {
        **rates(scores, mask, states, num_draft_tokens),
        "nulls": {
            name: {k: v for k, v in rates(s, mask, states, num_draft_tokens).items() if k in ("cosine", "token_match", "tokens_per_pass")}
            for name, s in nulls.items()
        },
        "thresholds": {f"{t:.2f}": rates_above(t, scores, mask, states, num_draft_tokens) for t in THRESHOLDS},
        "auc_cosine_token_match": metrics.auc(scores.cosine[mask].numpy(), scores.match[mask].numpy()),
        "per_position": per_position(scores, mask),
        "calibration": None,
        "num_draft_tokens": num_draft_tokens,
    }


def chain_scores(
    adapter: ChainedAdapter, states: HiddenStates, head: Tensor, embeddings: Tensor, steps: int, events: Sequence[int] | None = None
) -> tuple[Scores, Tensor]:
    """Scores of the chained adapter for rounds that begin anywhere: `[row, t, k]` is draft k of a round at t, for position t + k, all
    earlier drafts of the round being the target's own tokens. Second, where there is such a position: [n, s, steps] bool.

    events: row -> the row whose events it is shown instead of its own
    """
    import torch

    from feature_alignment.chained_adapter import chain_over, text_batches
    from feature_alignment.decoding.acceptance import cosine_per_position

    if events is not None:
        states = dataclasses.replace(states, events=states.events[torch.tensor(events)])
    shape = (*states.mask.shape, steps)
    cosine, match, there = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    first = 0
    with torch.inference_mode():
        for texts in text_batches(states, 64, "cpu"):
            rows = slice(first, first + len(texts.states))
            first = rows.stop
            for k, (expected, wanted, mask) in enumerate(chain_over(adapter, texts, embeddings, steps)):
                starts = slice(1, 1 + mask.shape[1])  # position 0 comes from the target's prefill
                cosine[rows, starts, k] = cosine_per_position(expected, wanted) * mask
                match[rows, starts, k] = ((expected @ head.T).argmax(-1) == (wanted @ head.T).argmax(-1)) & mask
                there[rows, starts, k] = mask
    return Scores(cosine, match), there


def chain_report(scores: Scores, there: Tensor, states: HiddenStates) -> dict[str, Any]:
    """Step by step and pooled over all steps; blocks as decoding forms them. The number of drafts a round is the number of steps."""
    from feature_alignment import metrics

    clips, steps = states.clips, there.shape[-1]
    return {
        "num_draft_tokens": steps,
        **rates(scores, there, states, steps),
        "thresholds": {f"{TASK_THRESHOLD:.2f}": rates_above(TASK_THRESHOLD, scores, there, states, steps)},
        "steps": [
            {
                "step": k + 1,
                "cosine": metrics.counts(scores.cosine[..., k], there[..., k]).rate(clips),
                "token_match": metrics.counts(scores.match[..., k], there[..., k]).rate(clips),
            }
            for k in range(steps)
        ],
    }


def measure_chains(cfg: AcceptanceConfig, head: Tensor) -> dict[str, dict[str, Any]]:
    """Every chained adapter there is, and the seeing one with the events of other clips: name -> report."""
    from feature_alignment import artifacts
    from feature_alignment.chained_adapter import load_chained_adapter

    paths, reports = chained_paths(cfg), {}
    if not paths:
        return reports
    folder = cfg.out / "hidden_states"
    test = artifacts.load_hidden_states(folder / cfg.split, events=True)
    embeddings = artifacts.load_pt(folder / "vl_embeddings.pt", artifacts.EXTRACT.format(split=cfg.split)).float()
    for name, path in paths.items():
        adapter, _ = load_chained_adapter(path, test.meta["draft_layers"])
        shown = {name: None} | ({"chained, events of another clip": _other_clip(test)} if name == "chained" else {})
        for label, events in shown.items():
            scores, there = chain_scores(adapter, test, head, embeddings, cfg.num_draft_tokens, events)
            reports[label] = {"params": adapter.num_parameters, **chain_report(scores, there, test)}
    return reports


def chained_paths(cfg: AcceptanceConfig) -> dict[str, Path]:
    """The chained adapters that have been trained: name -> file."""
    names = {"chained": "chained_adapter", "chained, without events": "chained_adapter_blind"}
    paths = {name: cfg.out / folder / "adapter.pt" for name, folder in names.items()}
    return {name: path for name, path in paths.items() if path.is_file()}


def per_position(scores: Scores, mask: Tensor) -> list[dict[str, Any]]:
    """Per position of the text: how many texts reach it, its cosine, its token match, and the match given all earlier ones matched."""
    alive = mask.clone()
    rows = []
    for t in range(mask.shape[1]):
        n = int(mask[:, t].sum())
        if not n:
            break
        here = mask[:, t]
        alive_here = alive[:, t] & here
        rows.append(
            {
                "position": t,
                "n": n,
                "cosine": float(scores.cosine[here, t].mean()),
                "token_match": float(scores.match[here, t].float().mean()),
                "n_all_earlier_matched": int(alive_here.sum()),
                "token_match_given_earlier": float(scores.match[alive_here, t].float().mean()) if alive_here.any() else None,
            }
        )
        alive[:, t + 1 :] &= (scores.match[:, t] | ~here)[:, None]
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    cfg = parse_config(AcceptanceConfig, argv, "measure_feature_acceptance")
    from feature_alignment.processes import claimed

    with claimed(cfg.out / "acceptance"):
        return measure(cfg)


def measure(cfg: AcceptanceConfig) -> dict[str, Any]:
    """Measure, or reuse what is there; returns the content of acceptance.json."""
    if cfg.num_draft_tokens < 1:
        raise UserError(f"--num_draft_tokens wants at least 1, got {cfg.num_draft_tokens}.")
    import torch

    from feature_alignment import artifacts, plots
    from feature_alignment.hidden_adapter import load_adapter

    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    folder = cfg.out / "hidden_states"
    test, train, validation = (artifacts.load_hidden_states(folder / s) for s in (cfg.split, cfg.train_split, cfg.validation_split))
    if set(test.clips) & (set(train.clips) | set(validation.clips)):
        raise UserError(f"split {cfg.split!r} shares clips with training or validation; what is measured must not have been seen.")
    head = artifacts.load_pt(folder / "vl_lm_head.pt", artifacts.EXTRACT.format(split=cfg.split)).float()
    path = cfg.out / "adapter" / "adapter.pt"
    adapter, adapter_meta = load_adapter(path, test.draft.shape[-1], test.meta["draft_layers"])

    out = cfg.out / "acceptance"
    made_from = chained_paths(cfg) | {
        "adapter": path,
        "states": folder / cfg.split / "meta.json",
        "train": folder / cfg.train_split / "meta.json",
        "validation": folder / cfg.validation_split / "meta.json",
    }
    report = artifacts.reusable(out / "acceptance.json", cfg, made_from)
    if report is None:
        scores = score(lambda g, _: adapter(g), test, head)
        nulls = null_predictors(train, validation, test, adapter.bottleneck, head)
        report = {
            "meta": artifacts.provenance("measure_feature_acceptance", cfg, made_from, prefix=test.meta["prefix"], split=cfg.split),
            "adapter": {"params": adapter.num_parameters, "layer": adapter_meta["draft_layers"]},
            **acceptance_report(scores, {k: score(f, test, head) for k, f in nulls.items()}, test, cfg.num_draft_tokens),
            "chains": measure_chains(cfg, head),
        }
        columns = list(report["per_position"][0])
        lines = [",".join("" if row[c] is None else str(row[c]) for c in columns) for row in report["per_position"]]
        artifacts.write_text(out / "per_position.csv", "\n".join([",".join(columns), *lines]) + "\n")
        plots.cosine_histogram(scores.cosine[test.mask].numpy(), scores.match[test.mask].numpy(), out / "cosine_histogram.png")
        plots.acceptance_by_position(report["per_position"], out / "acceptance_by_position.png")
        beside = ("per_position.csv", "cosine_histogram.png", "acceptance_by_position.png")
        artifacts.write_sealed(out / "acceptance.json", report, beside)  # last: its presence means the pictures are there

    rows = [("adapter", rate_text(report["cosine"]), rate_text(report["token_match"]), report["tokens_per_pass"])]
    rows += [(k, rate_text(v["cosine"]), rate_text(v["token_match"]), v["tokens_per_pass"]) for k, v in report["nulls"].items()]
    print_table(
        f"{cfg.split}, prefix: {test.meta['prefix']}, {int(test.mask.sum()):,} positions, {len(set(test.clips))} clips",
        ("predictor", "cosine", "token match", f"tokens per pass at {cfg.num_draft_tokens} drafts"),
        rows,
    )
    if report["chains"]:
        print_table(
            f"chained from the target's last state: {cfg.num_draft_tokens} drafts, token match at each",
            ("adapter", "cosine", *[str(k + 1) for k in range(cfg.num_draft_tokens)], "tokens per pass"),
            [
                (name, rate_text(c["cosine"]), *[f"{s['token_match']['value']:.3f}" for s in c["steps"]], c["tokens_per_pass"])
                for name, c in report["chains"].items()
            ],
        )
    keys = ("relaxed_accept", "consecutive_accept", "token_match_given_accept")
    print_table("cosine rules", ("threshold", *keys), [(t, *[rate_text(v[k]) for k in keys]) for t, v in report["thresholds"].items()])
    summary = {k: report[k]["value"] for k in ("cosine", "token_match", "acceptance_rate")}
    print_json_line({**summary, "auc": report["auc_cosine_token_match"], "written": str(out / "acceptance.json")})
    return report


if __name__ == "__main__":
    run(main)
