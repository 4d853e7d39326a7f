"""A cosine threshold with a guarantee: accepted tokens differ from the target's at most ε of the time, with confidence 1 - δ.

Learn-then-Test (Angelopoulos et al. 2110.01052) with fixed-sequence testing: thresholds are tested from strict to loose in an order that
is fixed beforehand, and testing stops at the first one that cannot be certified, so no correction for multiple tests is needed.
Positions of one clip are not independent, so the unit is the clip. With z = Σ accepted (wrong - ε) over one clip, the null hypothesis
"the risk is at least ε" is E z >= 0. It is tested by betting:

    W = Π (1 - λ z),   0 <= λ <= 0.9 / ((1 - ε) T),   λ chosen before z is seen,   p = 1 / max W        (Ville's inequality)

T bounds the number of positions of a clip, so that no factor can be negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feature_alignment.measurement.records import Record

NUM_THRESHOLDS = 50


@dataclass(frozen=True)
class ScoredPositions:
    """Scored positions of several clips.

    Args:
        score: [p] float, cosine
        wrong: [p] bool, the drafted token is not the target's
        clip: [p] names of clips
        max_weight: upper bound on the summed weights of one clip, known before any clip is seen
        weight: of each position
    """

    score: NDArray[np.floating]
    wrong: NDArray[np.bool_]
    clip: Sequence[str]
    max_weight: float
    weight: float = 1.0

    def excess(self, threshold: float, epsilon: float) -> NDArray[np.float64]:
        """Sum z of each clip, Σ weight · accepted · (wrong - ε), in the order of clip names: [clips] float64."""
        _, index = np.unique(np.asarray(self.clip), return_inverse=True)
        return np.bincount(index, self.weight * (self.score > threshold) * (self.wrong - epsilon))

    def risk(self, threshold: float) -> float:
        """Share of accepted positions that are wrong; nan if none is accepted."""
        accepted = self.score > threshold
        return float(self.wrong[accepted].mean()) if accepted.any() else float("nan")


@dataclass(frozen=True)
class Certificate(Record):
    """Result of `certify`.

    Args:
        epsilon: largest share of accepted draft tokens that may differ from the target's token
        delta: largest probability that the guarantee fails
        threshold: certified cosine threshold; None if none could be certified
        p_value: of the last threshold that was certified, or of the first one tested
        clips: number of clips in the calibration split
        kept: share of calibration positions above the threshold
        risk_on_calibration: share of those that are wrong
        risk_on_test: the same on the test split; None if nothing is accepted there
    """

    epsilon: float
    delta: float
    threshold: float | None
    p_value: float
    clips: int
    kept: float | None
    risk_on_calibration: float | None
    risk_on_test: float | None = None


def p_value(z: NDArray[np.float64], epsilon: float, max_weight: float, known: NDArray[np.float64] | None = None) -> float:
    """p-value of the null hypothesis E z >= 0, from one pass of bets over the clips.

    Args:
        z: [clips] float64, as `ScoredPositions.excess` returns it
        epsilon: as in `Certificate`
        max_weight: bound on the weights of a clip
        known: [k] float64, z of other clips, from which the first bets are sized
    """
    earlier = np.concatenate([np.zeros(0) if known is None else known, z])
    first = len(earlier) - len(z)
    n = np.arange(first, len(earlier))  # how many z are known before each bet
    sums, squares = (np.concatenate([[0.0], np.cumsum(x)])[n] for x in (earlier, earlier**2))
    with np.errstate(invalid="ignore", divide="ignore"):
        best = np.where(squares > 0, -sums / squares, 0.0)  # maximizes the second-order growth of log(1 - λ z)
    stakes = np.clip(best, 0.0, 0.9 / ((1 - epsilon) * max_weight))
    wealth = np.cumsum(np.log1p(-stakes * z))
    return float(np.exp(-max(0.0, wealth.max(initial=0.0))))


def certify(tune: ScoredPositions, calibration: ScoredPositions, epsilon: float, delta: float) -> Certificate:
    """Find the loosest threshold that fixed-sequence testing certifies.

    Args:
        tune: clips that fix the order of the thresholds and the first one to test
        calibration: other clips, on which thresholds are tested
        epsilon: as in `Certificate`
        delta: as in `Certificate`
    """
    grid = np.unique(np.quantile(tune.score, np.linspace(0, 1, NUM_THRESHOLDS, endpoint=False)))[::-1]
    known = [tune.excess(t, epsilon) for t in grid]
    start = int(np.argmin([p_value(z, epsilon, tune.max_weight) for z in known]))
    threshold, p = None, 1.0
    for t, z in list(zip(grid, known, strict=True))[start:]:
        now = p_value(calibration.excess(t, epsilon), epsilon, calibration.max_weight, z)
        p = now if threshold is None else p
        if now > delta:
            break
        threshold, p = float(t), now
    return Certificate(
        epsilon=epsilon,
        delta=delta,
        threshold=threshold,
        p_value=p,
        clips=len(set(calibration.clip)),
        kept=None if threshold is None else float((calibration.score > threshold).mean()),
        risk_on_calibration=None if threshold is None else calibration.risk(threshold),
    )
