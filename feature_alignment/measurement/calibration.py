"""A cosine threshold with a guarantee: kept tokens differ from the target's own at most ε of the time, with confidence 1 - δ.

Learn-then-Test (Angelopoulos et al. 2110.01052) over thresholds in an order fixed beforehand, from strict to loose: the first that
cannot be certified ends the walk, so no correction for many tests is needed. Positions of one clip are not independent, so the unit
is the clip. With z = Σ kept (wrong - ε) of one clip, "the risk is above ε" means E z >= 0. Against it one bets:

    W = Π (1 - λ z),   0 <= λ <= 0.9 / ((1 - ε) T),   λ chosen before z is seen,   p = 1 / max W        (Ville's inequality)

T bounds the positions of a clip, so that no factor can be negative whatever happens in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

THRESHOLDS = 50


@dataclass(frozen=True)
class Judged:
    """Positions of some clips: score [p], wrong [p] bool (the token is not the target's), clip [p] names, weight of each position.

    most: bound on the summed weights of one clip, known before any clip is seen
    """

    score: np.ndarray
    wrong: np.ndarray
    clip: Sequence[str]
    most: float
    weight: float = 1.0

    def excess(self, threshold: float, epsilon: float) -> np.ndarray:
        """z per clip, in the order of their names: [clips]"""
        _, index = np.unique(np.asarray(self.clip), return_inverse=True)
        return np.bincount(index, self.weight * (self.score > threshold) * (self.wrong - epsilon))

    def risk(self, threshold: float) -> float:
        """Share of wrong ones among the kept; nan where nothing is kept."""
        kept = self.score > threshold
        return float(self.wrong[kept].mean()) if kept.any() else float("nan")


def p_value(z: np.ndarray, epsilon: float, most: float, known: np.ndarray | None = None) -> float:
    """Evidence against E z >= 0, by betting through the clips once.

    known: z of other clips, from which the first bets are sized
    """
    earlier = np.concatenate([np.zeros(0) if known is None else known, z])
    first = len(earlier) - len(z)
    n = np.arange(first, len(earlier))  # how many are known before each bet
    sums, squares = (np.concatenate([[0.0], np.cumsum(x)])[n] for x in (earlier, earlier**2))
    with np.errstate(invalid="ignore", divide="ignore"):
        best = np.where(squares > 0, -sums / squares, 0.0)  # maximises the second-order growth of log(1 - λ z)
    stakes = np.clip(best, 0.0, 0.9 / ((1 - epsilon) * most))
    wealth = np.cumsum(np.log1p(-stakes * z))
    return float(np.exp(-max(0.0, wealth.max(initial=0.0))))


def certify(tune: Judged, calibration: Judged, epsilon: float, delta: float) -> dict[str, Any]:
    """The loosest threshold reached whose risk is certified; `threshold` is None where there is none.

    tune: other clips, which fix the order of the thresholds and where the walk begins
    """
    grid = np.unique(np.quantile(tune.score, np.linspace(0, 1, THRESHOLDS, endpoint=False)))[::-1]
    known = [tune.excess(t, epsilon) for t in grid]
    start = int(np.argmin([p_value(z, epsilon, tune.most) for z in known]))
    threshold, p = None, 1.0
    for t, z in list(zip(grid, known, strict=True))[start:]:
        now = p_value(calibration.excess(t, epsilon), epsilon, calibration.most, z)
        p = now if threshold is None else p
        if now > delta:
            break
        threshold, p = float(t), now
    return {
        "epsilon": epsilon,
        "delta": delta,
        "threshold": threshold,
        "p_value": p,
        "clips": len(set(calibration.clip)),
        "kept": None if threshold is None else float((calibration.score > threshold).mean()),
        "risk_on_calibration": None if threshold is None else calibration.risk(threshold),
    }
