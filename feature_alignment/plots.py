"""The pictures of a run. Each says what it shows, of how many, in its own caption. Colours are safe for the colour-blind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from feature_alignment.artifacts import replacing

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#777777"  # Okabe and Ito


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def cosine_histogram(cosine: np.ndarray, match: np.ndarray, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    bins = np.linspace(min(-0.1, cosine.min()), 1, 60)
    axis.hist([cosine[match], cosine[~match]], bins, stacked=True, color=[BLUE, ORANGE], label=["same token", "other token"])
    axis.axvline(0.9, color=GREY, linestyle=":", label="threshold 0.90")
    axis.set(
        xlabel="cos(A(g), v)",
        ylabel="positions",
        title=f"Cosine of aligned and true target states, {len(cosine):,} test positions, same prefix",
    )
    axis.legend()
    _save(figure, path)


def acceptance_by_position(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    x = [r["position"] for r in rows]
    for key, n_key, colour, label in (
        ("token_match", "n", BLUE, "token match"),
        ("token_match_given_earlier", "n_all_earlier_matched", ORANGE, "token match, all earlier ones matched"),
    ):
        y = np.array([np.nan if r[key] is None or r[n_key] < 10 else r[key] for r in rows])  # fewer say nothing
        n = np.maximum([r[n_key] for r in rows], 1)
        half = 1.96 * np.sqrt(np.clip(y * (1 - y), 0, None) / n)
        axis.plot(x, y, color=colour, label=label)
        axis.fill_between(x, y - half, np.minimum(y + half, 1), color=colour, alpha=0.2, linewidth=0)
    axis.plot(x, [r["cosine"] for r in rows], color=GREEN, label="cosine")
    axis.set(
        xlabel="position in the answer",
        ylim=(0, 1.02),
        title=f"By position; n falls from {rows[0]['n']} to {rows[-1]['n']}; bands: normal 95 %",
    )
    axis.legend(loc="lower left")
    axis.grid(alpha=0.3)
    _save(figure, path)


def speedup_bars(rows: list[dict[str, Any]], path: Path) -> None:
    """Measured speed-up of every mode with its interval, end to end and in decoding alone."""
    figure, axis = plt.subplots(figsize=(9, 0.5 * len(rows) + 1.6), layout="constrained")
    y = np.arange(len(rows))
    for key, colour, shift, label in (("speedup", BLUE, 0.2, "end to end"), ("decode_speedup", ORANGE, -0.2, "decoding alone")):
        value = np.array([r[key]["value"] for r in rows])
        ends = np.array([[np.nan if e is None else e for e in r[key]["ci95"]] for r in rows])
        error = np.nan_to_num(np.abs(ends - value[:, None])).T
        axis.barh(y + shift, value, 0.38, xerr=error, color=colour, label=label, ecolor="#333333", capsize=2)
    axis.set_yticks(
        y, [f"{r['draft']} + {r['accept']}, {r['drafts_per_round']} drafts" + ("" if r["accept"] == "token" else " (lossy)") for r in rows]
    )
    axis.invert_yaxis()
    axis.axvline(1.0, color=GREY)
    axis.axvline(1.3, color=GREY, linestyle=":")
    axis.set(xlabel="speed-up over plain greedy decoding (bars: 95 % interval by clip; dotted: the 1.3x target)")
    axis.legend()
    _save(figure, path)


def stage_stack(baseline: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Where the milliseconds of one prompt go, per mode."""
    stages = ["target_prefill", "draft_prefill", "draft", "adapter", "head", "verify", "accept", "rollback", "recompute"]
    colours = ["#999999", "#CCCCCC", "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#F0E442", "#CC79A7", "#D55E00"]
    n = baseline["prompts"]
    bars = [("plain greedy", {"target_prefill": baseline["prefill_ms"] / n, "verify": baseline["decode_ms"] / n})]
    bars += [(f"{r['draft']} + {r['accept']}, {r['drafts_per_round']}", r["ms"]) for r in rows]
    figure, axis = plt.subplots(figsize=(9, 0.4 * len(bars) + 1.6), layout="constrained")
    left = np.zeros(len(bars))
    for stage, colour in zip(stages, colours, strict=True):
        width = np.array([ms.get(stage, 0.0) for _, ms in bars])
        axis.barh([name for name, _ in bars], width, left=left, color=colour, label=stage.replace("_", " "))
        left += width
    axis.invert_yaxis()
    axis.set(xlabel=f"milliseconds per prompt, mean over {n} prompts")
    axis.legend(ncols=1, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)
