"""The pictures of a run. Each says what it shows, of how many, in its own caption. Colours are safe for the colour-blind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from feature_alignment.artifacts import replacing  # noqa: E402

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
    axis.set(xlabel="cos(A(g), v)", ylabel="positions", title=f"Cosine of aligned and true target states, {len(cosine):,} test positions, same prefix")
    axis.legend()
    _save(figure, path)


def acceptance_by_position(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    x = [r["position"] for r in rows]
    for key, n_key, colour, label in (
        ("token_match", "n", BLUE, "token match"),
        ("token_match_given_earlier", "n_all_earlier_matched", ORANGE, "token match, all earlier ones matched"),
    ):
        y = np.array([np.nan if r[key] is None else r[key] for r in rows])
        n = np.maximum([r[n_key] for r in rows], 1)
        half = 1.96 * np.sqrt(np.clip(y * (1 - y), 0, None) / n)
        axis.plot(x, y, color=colour, label=label)
        axis.fill_between(x, y - half, np.minimum(y + half, 1), color=colour, alpha=0.2, linewidth=0)
    axis.plot(x, [r["cosine"] for r in rows], color=GREEN, label="cosine")
    axis.set(xlabel="position in the answer", ylim=(0, 1.02), title=f"By position; n falls from {rows[0]['n']} to {rows[-1]['n']}; bands: normal 95 %")
    axis.legend(loc="lower left")
    axis.grid(alpha=0.3)
    _save(figure, path)
