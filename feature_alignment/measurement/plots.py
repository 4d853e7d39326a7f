"""Pictures of acceptance.json and comparison.json. The caption of each says what it shows and the number of positions or texts.

The colors can be told apart by color-blind readers (Okabe and Ito).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from numpy.typing import NDArray

from feature_alignment.measurement.reports import (
    AcceptanceReport,
    ChainReport,
    PositionRates,
    PredictorReport,
    ReliabilityBin,
    ThresholdCounts,
)
from feature_alignment.measurement.scoring import Scores
from feature_alignment.storage.files import atomic_write
from feature_alignment.storage.hidden_states import HiddenStates

BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"

Predictor = AcceptanceReport | PredictorReport | ChainReport
ACCEPTANCE = ("cosine_histogram", "reliability", "accepted_lengths", "acceptance_by_position", "predictors")


def save(figure: Figure, path: Path) -> None:
    """Write a figure at 150 dpi, atomically, and close it."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def acceptance(report: AcceptanceReport, scores: Mapping[str, Scores], states: HiddenStates, out: Path) -> None:
    """Draw the five pictures of acceptance.json.

    Args:
        report: content of acceptance.json
        scores: predictor -> its [n, s] scores
        states: the split that is measured
        out: directory
    """
    titles = {"adapter": "hidden adapter", "identity": "no adapter (identity)", "shuffled": "states of another clip (shuffled)"}
    shown = {title: scores[name] for name, title in titles.items() if name in scores}
    of_positions = {k: (s.cosine[states.mask].numpy(), s.match[states.mask].numpy()) for k, s in shown.items()}
    cosine_histograms(of_positions, report.positions, out)
    adapters: dict[str, AcceptanceReport | ChainReport] = {"hidden adapter": report}
    if report.chained:
        adapters["chained adapter"] = report.chained
    reliability({name: r.reliability for name, r in adapters.items()}, report.positions, out)
    accepted_lengths({name: r.accepted_lengths for name, r in adapters.items()}, out)
    acceptance_by_position(report.per_position, out)
    predictors: dict[str, Predictor] = {"hidden adapter": report}
    if report.plain:
        predictors["TASKS.md's recipe"] = report.plain
    predictors_by_match({**predictors, **report.nulls, **report.chains}, report.positions, report.num_draft_tokens, out)


def cosine_histograms(found: Mapping[str, tuple[NDArray[np.float32], NDArray[np.bool_]]], positions: str, out: Path) -> None:
    """Draw a histogram of cosines for each predictor, split by token match.

    Args:
        found: predictor -> cosine [p] float32 and token match [p] bool
        positions: what was measured, for the title
        out: directory
    """
    figure, axes = plt.subplots(len(found), 1, figsize=(8, 2.4 * len(found) + 0.6), layout="constrained", sharex=True, squeeze=False)
    bins = np.linspace(min(-0.1, *(cosine.min() for cosine, _ in found.values())), 1, 60)
    for axis, (name, (cosine, match)) in zip(axes[:, 0], found.items(), strict=True):
        axis.hist([cosine[match], cosine[~match]], bins, stacked=True, color=[BLUE, ORANGE], label=["same token", "other token"])
        axis.axvline(0.9, color=GREY, linestyle=":", label="threshold 0.90")
        axis.set(ylabel="positions", title=f"{name}: mean {cosine.mean():.3f}, same token at {match.mean():.1%}")
    axes[0, 0].legend()
    axes[-1, 0].set(xlabel="cosine with Video-LLaVA's hidden state")
    n = len(next(iter(found.values()))[0])
    figure.suptitle(f"Does a high cosine mean the same token? {n:,} {positions}", fontsize=11)
    save(figure, out / "cosine_histogram.png")


def reliability(found: Mapping[str, Sequence[ReliabilityBin]], positions: str, out: Path) -> None:
    """Draw token match by cosine.

    Args:
        found: adapter -> bins
        positions: what was measured, for the title
        out: directory
    """
    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for (name, rows), color in zip(found.items(), (BLUE, GREEN), strict=False):
        n = np.array([r.n for r in rows])
        x, y = np.array([r.cosine for r in rows]), np.array([r.token_match for r in rows])
        error = np.abs(np.array([r.ci95 or (r.token_match,) * 2 for r in rows]) - y[:, None]).T
        axis.errorbar(
            x, y, np.nan_to_num(error), color=color, marker="o", markersize=3, linewidth=1, label=f"{name}: at this cosine, n = {n.sum():,}"
        )
        axis.plot(x, [r.token_match_above for r in rows], "--", color=color, label=f"{name}: at this cosine and above")
    axis.set(
        xlabel="cosine with Video-LLaVA's hidden state",
        ylabel="share with Video-LLaVA's token",
        ylim=(0, 1.02),
        title=f"Token match by cosine: {positions}, 20 bins of equal count",
    )
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    save(figure, out / "reliability.png")


def accepted_lengths(found: Mapping[str, Sequence[int]], out: Path) -> None:
    """Draw the share of rounds with each number of accepted draft tokens.

    Args:
        found: adapter -> number of rounds with 0, 1, 2, ... accepted draft tokens
        out: directory
    """
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, ((name, counts), color) in enumerate(zip(found.items(), (BLUE, GREEN), strict=False)):
        share, x = np.array(counts) / sum(counts), np.arange(len(counts))
        axis.bar(x + 0.4 * i - 0.2, share, 0.38, color=color, label=f"{name}: {sum(counts):,} rounds, {x @ share:.2f} on average")
    axis.set(
        xlabel="accepted draft tokens in one round, token rule",
        ylabel="share of rounds",
        title=f"Accepted draft tokens per round of {len(counts) - 1}, test texts, extra token not counted",
    )
    axis.legend()
    save(figure, out / "accepted_lengths.png")


def acceptance_by_position(rows: Sequence[PositionRates], out: Path) -> None:
    """Draw token match and cosine by position of the answer."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    x = [r.position for r in rows]
    for key, color, label in (
        ("token_match", BLUE, "token match"),
        ("token_match_given_earlier", ORANGE, "token match, all earlier ones matched"),
    ):
        shown = [getattr(r, f"n_{key}") >= 10 for r in rows]  # Rates of fewer texts are too noisy to draw.
        y, lo, hi = (np.where(shown, [getattr(r, f"{key}{end}") for r in rows], np.nan) for end in ("", "_lo", "_hi"))
        axis.plot(x, y, color=color, label=label)
        axis.fill_between(x, lo, hi, color=color, alpha=0.2, linewidth=0)
    axis.plot(x, [r.cosine for r in rows], color=GREEN, label="cosine")
    axis.set(
        xlabel="position in the answer",
        ylim=(0, 1.02),
        title=f"Hidden adapter by position; n falls from {rows[0].n} to {rows[-1].n}; bands: 95 % intervals by clip",
    )
    axis.legend(loc="lower left")
    axis.grid(alpha=0.3)
    save(figure, out / "acceptance_by_position.png")


def predictors_by_match(found: Mapping[str, Predictor], positions: str, num_draft_tokens: int, out: Path) -> None:
    """Draw cosine, token match and tokens per pass of every predictor.

    Args:
        found: predictor -> its report
        positions: what was measured
        num_draft_tokens: draft length of the tokens per pass
        out: directory
    """
    figure, axis = plt.subplots(figsize=(8, 0.42 * len(found) + 1.6), layout="constrained")
    y = np.arange(len(found))
    for key, color, shift in (("cosine", GREEN, 0.2), ("token_match", BLUE, -0.2)):
        rates = [getattr(r, key) for r in found.values()]
        value = np.array([rate.value for rate in rates])
        error = np.abs(np.array([rate.ci95 for rate in rates], float) - value[:, None]).T
        axis.barh(y + shift, value, 0.38, xerr=np.nan_to_num(error), color=color, label=key.replace("_", " "), ecolor="#333333", capsize=2)
    for at, r in zip(y, found.values(), strict=True):
        axis.text(1.03, float(at), f"{r.tokens_per_pass:.2f}", va="center")
    axis.set_yticks(y, list(found))
    axis.invert_yaxis()
    n = next(iter(found.values())).cosine.total
    axis.set(
        xlim=(min(0, axis.get_xlim()[0]), 1.14),
        xlabel=f"{n:,.0f} {positions}\nbars: 95 % intervals by clip; right: tokens per pass at draft length {num_draft_tokens}",
    )
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    save(figure, out / "predictors.png")


def threshold_sweep(found: Mapping[str, Sequence[ThresholdCounts]], out: Path) -> None:
    """Draw the share of draft tokens that a cosine threshold accepts, by what they say; one panel per drafter.

    Args:
        found: drafter -> counts at each threshold
        out: directory
    """
    figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 4), layout="constrained", sharey=True, squeeze=False)
    for axis, (name, rows) in zip(axes[0], found.items(), strict=True):
        total = rows[0].drafted
        parts = [np.array([getattr(r, k) for r in rows]) / total for k in ("same", "synonym", "other_fact", "other_word")]
        axis.stackplot(
            [r.threshold for r in rows],
            parts,
            colors=[BLUE, GREEN, VERMILION, ORANGE],
            labels=["the target's token", "same fact, other word", "another fact", "another word"],
        )
        axis.set(
            xlabel="cosine above",
            title=f"{name}, {total:,} draft tokens",
            ylim=(0, 1),
            xlim=(rows[0].threshold, rows[-1].threshold),
        )
    axes[0, 0].set_ylabel("accepted share of draft tokens")
    axes[0, -1].legend(loc="upper right", fontsize=8)
    figure.suptitle("Draft tokens accepted by a cosine threshold, target's own text as prefix, judged by the lexicon", fontsize=11)
    save(figure, out / "threshold_sweep.png")
