"""The pictures of a run. Each says what it shows, of how many, in its own caption. Colours are safe for the colour-blind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from feature_alignment.measurement.scoring import Scores
from feature_alignment.storage.files import atomic_write
from feature_alignment.storage.hidden_states import HiddenStates

BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"  # Okabe and Ito


ACCEPTANCE = ("cosine_histogram", "reliability", "accepted_lengths", "acceptance_by_position", "predictors")


def save(figure: Any, path: Path) -> None:
    """At 150 dpi, whole or not at all."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def acceptance(report: dict[str, Any], scores: dict[str, Scores], states: HiddenStates, out: Path) -> None:
    """The five pictures of acceptance.json, into `out`."""
    named = {"adapter": "hidden adapter", "identity": "no adapter (identity)", "shuffled": "states of another clip (shuffled)"}
    shown = {text: scores[name] for name, text in named.items() if name in scores}
    cosine_histograms({k: (s.cosine[states.mask].numpy(), s.match[states.mask].numpy()) for k, s in shown.items()}, out)
    measured = {"hidden adapter": report} | ({"chained adapter": report["chains"]["chained"]} if "chained" in report["chains"] else {})
    reliability({name: r["reliability"] for name, r in measured.items()}, out)
    accepted_lengths({name: r["accepted_lengths"] for name, r in measured.items()}, out)
    acceptance_by_position(report["per_position"], out)
    predictors = {"hidden adapter": report, "TASKS.md's recipe": report["plain"], **report["nulls"], **report["chains"]}
    predictors_by_match({name: r for name, r in predictors.items() if r}, report["num_draft_tokens"], out)


def cosine_histograms(found: dict[str, tuple[np.ndarray, np.ndarray]], out: Path) -> None:
    """name -> cosine and token match of each position."""
    figure, axes = plt.subplots(len(found), 1, figsize=(8, 2.4 * len(found) + 0.6), layout="constrained", sharex=True, squeeze=False)
    bins = np.linspace(min(-0.1, *(cosine.min() for cosine, _ in found.values())), 1, 60)
    for axis, (name, (cosine, match)) in zip(axes[:, 0], found.items(), strict=True):
        axis.hist([cosine[match], cosine[~match]], bins, stacked=True, color=[BLUE, ORANGE], label=["same token", "other token"])
        axis.axvline(0.9, color=GREY, linestyle=":", label="threshold 0.90")
        axis.set(ylabel="positions", title=f"{name}: mean {cosine.mean():.3f}, same token at {match.mean():.1%}")
    axes[0, 0].legend()
    axes[-1, 0].set(xlabel="cosine with Video-LLaVA's own state")
    n = len(next(iter(found.values()))[0])
    figure.suptitle(f"Does a high cosine mean the same token? {n:,} test positions, same prefix", fontsize=11)
    save(figure, out / "cosine_histogram.png")


def reliability(found: dict[str, list[dict[str, float]]], out: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for (name, rows), colour in zip(found.items(), (BLUE, GREEN), strict=False):
        n = np.array([r["n"] for r in rows])
        x, y = np.array([r["cosine"] for r in rows]), np.array([r["token_match"] for r in rows])
        half = 1.96 * np.sqrt(y * (1 - y) / n)
        axis.errorbar(x, y, half, color=colour, marker="o", markersize=3, linewidth=1, label=f"{name}: at this cosine, n = {n.sum():,}")
        axis.plot(x, [r["token_match_above"] for r in rows], "--", color=colour, label=f"{name}: at this cosine and above")
    axis.set(
        xlabel="cosine with Video-LLaVA's own state",
        ylabel="share with Video-LLaVA's token",
        ylim=(0, 1.02),
        title="How far can a cosine be trusted? Test positions, same prefix, in 20 bins of equal count",
    )
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    save(figure, out / "reliability.png")


def accepted_lengths(found: dict[str, list[int]], out: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, ((name, counts), colour) in enumerate(zip(found.items(), (BLUE, GREEN), strict=False)):
        share, x = np.array(counts) / sum(counts), np.arange(len(counts))
        axis.bar(x + 0.4 * i - 0.2, share, 0.38, color=colour, label=f"{name}: {sum(counts):,} rounds, {x @ share:.2f} on average")
    axis.set(
        xlabel="drafts kept in one round, token rule",
        ylabel="share of rounds",
        title=f"Accepted drafts per round of {len(counts) - 1}, test texts, without Video-LLaVA's own token",
    )
    axis.legend()
    save(figure, out / "accepted_lengths.png")


def acceptance_by_position(rows: list[dict[str, Any]], out: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    x = [r["position"] for r in rows]
    for key, colour, label in (
        ("token_match", BLUE, "token match"),
        ("token_match_given_earlier", ORANGE, "token match, all earlier ones matched"),
    ):
        shown = [r[f"n_{key}"] >= 10 for r in rows]  # fewer say nothing
        y, lo, hi = (np.where(shown, [r[f"{key}{end}"] for r in rows], np.nan) for end in ("", "_lo", "_hi"))
        axis.plot(x, y, color=colour, label=label)
        axis.fill_between(x, lo, hi, color=colour, alpha=0.2, linewidth=0)
    axis.plot(x, [r["cosine"] for r in rows], color=GREEN, label="cosine")
    axis.set(
        xlabel="position in the answer",
        ylim=(0, 1.02),
        title=f"Hidden adapter by position; n falls from {rows[0]['n']} to {rows[-1]['n']}; bands: 95 % by clip",
    )
    axis.legend(loc="lower left")
    axis.grid(alpha=0.3)
    save(figure, out / "acceptance_by_position.png")


def predictors_by_match(found: dict[str, dict[str, Any]], num_draft_tokens: int, out: Path) -> None:
    """Cosine and token match of every predictor, and what they are worth in tokens per pass."""
    figure, axis = plt.subplots(figsize=(8, 0.42 * len(found) + 1.6), layout="constrained")
    y = np.arange(len(found))
    for key, colour, shift in (("cosine", GREEN, 0.2), ("token_match", BLUE, -0.2)):
        value = np.array([r[key]["value"] for r in found.values()])
        error = np.abs(np.array([r[key]["ci95"] for r in found.values()], float) - value[:, None]).T
        axis.barh(y + shift, value, 0.38, xerr=np.nan_to_num(error), color=colour, label=key.replace("_", " "), ecolor="#333333", capsize=2)
    for at, r in zip(y, found.values(), strict=True):
        axis.text(1.03, float(at), f"{r['tokens_per_pass']:.2f}", va="center")
    axis.set_yticks(y, list(found))
    axis.invert_yaxis()
    n = next(iter(found.values()))["cosine"]["total"]
    axis.set(
        xlim=(min(0, axis.get_xlim()[0]), 1.14),
        xlabel=f"{n:,.0f} test positions, bars: 95 % by clip; right: tokens per pass at {num_draft_tokens} drafts",
    )
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    save(figure, out / "predictors.png")


def threshold_sweep(found: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Of all drafted positions, what a cosine threshold keeps: the target's token, the same fact in another word, another fact or
    word. One panel per draft source; rows as compare_token_baseline makes them."""
    figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 4), layout="constrained", sharey=True, squeeze=False)
    for axis, (name, rows) in zip(axes[0], found.items(), strict=True):
        total = rows[0]["drafted"]
        parts = [np.array([r[k] for r in rows]) / total for k in ("same", "synonym", "other_fact", "other_word")]
        axis.stackplot(
            [r["threshold"] for r in rows],
            parts,
            colors=[BLUE, GREEN, VERMILION, ORANGE],
            labels=["the target's token", "same fact, other word", "another fact", "another word"],
        )
        axis.set(
            xlabel="cosine above",
            title=f"{name} drafts, {total:,} positions",
            ylim=(0, 1),
            xlim=(rows[0]["threshold"], rows[-1]["threshold"]),
        )
    axes[0, 0].set_ylabel("share of drafted positions that is kept")
    axes[0, -1].legend(loc="upper right", fontsize=8)
    figure.suptitle(
        "What a cosine threshold keeps, test positions, given the target's own text; judged by the world's dictionary", fontsize=11
    )
    save(figure, out / "threshold_sweep.png")
