"""speculation_profile.json: how drafting went, position by position, in the words that serving engines use.

    mean_acceptance_length = 1 + accepted draft tokens / rounds = 1 + sum over positions of the marginal acceptance
    marginal acceptance of position i: rounds whose draft token i was accepted / all rounds
    conditional acceptance of position i: ... / rounds that proposed it and accepted all draft tokens before it

A round is a verification with at least one draft token. Rates come with 95 % intervals that resample clips.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from feature_alignment.benchmark.timing import Timed
from feature_alignment.decoding.generation import Round
from feature_alignment.measurement.metrics import Counts, auc

NUM_BINS = 10


@dataclass(frozen=True)
class ConfidenceCalibration:
    """How well a drafter's confidence predicts acceptance, over the draft tokens that verification reached.

    Args:
        num_draft_tokens: draft tokens with a confidence
        bins: for each tenth of confidence with draft tokens in it: number, mean confidence, acceptance
        ece: expected calibration error, the mean of |acceptance - mean confidence| weighted by the number (Naeini et al. 2015)
        brier: mean squared difference of confidence and outcome (Brier 1950)
        auroc: chance that an accepted draft token had the higher confidence of two; None if all or none were accepted
    """

    num_draft_tokens: int
    bins: list[dict[str, float]]
    ece: float
    brier: float
    auroc: float | None


@dataclass(frozen=True)
class SpeculationProfile:
    """One way to draft.

    Args:
        draft, num_draft_tokens: the row it was measured on; lossless, with a fixed draft length
        num_drafts: rounds
        num_proposed_tokens, num_accepted_tokens: over all rounds
        mean_acceptance_length: tokens per round, the target's own one included
        draft_acceptance_rate: accepted / proposed draft tokens
        marginal_acceptance, conditional_acceptance: a rate for each draft position
        accepted_lengths: number of rounds with 0, 1, 2, ... accepted draft tokens
        costs: one draft token (c), the rest of a round (r) and verifying k tokens (v), in passes of plain decoding
        recommended: the fixed draft length that the corrected formula finds fastest at these acceptances and costs
        confidence: calibration, where an adaptive row of the same drafter recorded confidences
    """

    draft: str
    num_draft_tokens: int
    num_drafts: int
    num_proposed_tokens: int
    num_accepted_tokens: int
    mean_acceptance_length: float
    draft_acceptance_rate: dict[str, Any]
    marginal_acceptance: list[dict[str, Any]]
    conditional_acceptance: list[dict[str, Any]]
    accepted_lengths: list[int]
    costs: dict[str, Any]
    recommended: dict[str, float] | None
    confidence: ConfidenceCalibration | None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> SpeculationProfile:
        confidence = content["confidence"]
        return cls(**{**content, "confidence": None if confidence is None else ConfidenceCalibration(**confidence)})


def profile_of(
    draft: str,
    num_draft_tokens: int,
    runs: Timed,
    clips: Sequence[str],
    costs: dict[str, Any],
    adaptive: Timed | None = None,
) -> SpeculationProfile:
    """The profile of one row of a fixed draft length.

    Args:
        draft: name of the drafter
        num_draft_tokens: draft length of the row
        runs: its runs
        clips: clip of every prompt
        costs: `c`, `r` and `v` (number of tokens -> cost), in passes of plain decoding
        adaptive: runs of an adaptive row of the same drafter, for its confidences
    """
    rounds = [_drafted(generations) for generations in runs.generations]
    every = [r for some in rounds for r in some]
    rate = lambda hits, total: _rate(rounds, clips, hits, total)  # noqa: E731
    marginal = [rate(lambda r, i=i: r.num_accepted > i, lambda r: 1) for i in range(num_draft_tokens)]
    conditional = [
        rate(lambda r, i=i: r.num_accepted > i, lambda r, i=i: r.num_accepted >= i and len(r.proposed) > i) for i in range(num_draft_tokens)
    ]
    lengths = Counter(r.num_accepted for r in every)
    accepted = sum(r.num_accepted for r in every)
    return SpeculationProfile(
        draft=draft,
        num_draft_tokens=num_draft_tokens,
        num_drafts=len(every),
        num_proposed_tokens=sum(len(r.proposed) for r in every),
        num_accepted_tokens=accepted,
        mean_acceptance_length=1 + accepted / max(1, len(every)),
        draft_acceptance_rate=rate(lambda r: r.num_accepted, lambda r: len(r.proposed)),
        marginal_acceptance=marginal,
        conditional_acceptance=conditional,
        accepted_lengths=[lengths[n] for n in range(num_draft_tokens + 1)],
        costs=costs,
        recommended=recommended_length([c["value"] for c in conditional], costs),
        confidence=None if adaptive is None else calibration_of([r for some in adaptive.generations for r in _drafted(some)]),
    )


def _drafted(generations: Sequence[Any]) -> list[Round]:
    return [r for g in generations for r in g.rounds if r.proposed]


def _rate(
    rounds: Sequence[Sequence[Round]], clips: Sequence[str], hits: Callable[[Round], float], total: Callable[[Round], float]
) -> dict[str, Any]:
    """Sums over the rounds of each prompt, as a rate with its interval."""
    sums = [np.array([float(sum(map(f, some))) for some in rounds]) for f in (hits, total)]
    return Counts(*sums).rate(clips)


def recommended_length(conditional: Sequence[float], costs: dict[str, Any]) -> dict[str, float] | None:
    """The fastest fixed draft length by S(g) = E(g) / (g c + v(g + 1) + r), E(g) = 1 + sum over i <= g of the product of the first i.

    Args:
        conditional: acceptance of each position if all before it were accepted; lengths beyond the measured ones are not considered
        costs: as in `profile_of`

    Returns:
        `num_draft_tokens`, `mean_acceptance_length` and `decode_speedup`; None if nothing was drafted or c is unknown
    """
    points = sorted((int(k), v) for k, v in costs["v"].items())
    best: dict[str, float] | None = None
    chance = tokens = 1.0
    for g, acceptance in enumerate(conditional, 1):
        if not np.isfinite(acceptance) or costs["c"] is None:
            break
        chance *= acceptance
        tokens += chance
        v = float(np.interp(g + 1, [k for k, _ in points], [v for _, v in points]))
        speedup = tokens / (g * costs["c"] + v + costs["r"])
        if best is None or speedup > best["decode_speedup"]:
            best = {"num_draft_tokens": g, "mean_acceptance_length": tokens, "decode_speedup": speedup}
    return best


def calibration_of(rounds: Sequence[Round]) -> ConfidenceCalibration | None:
    """Calibration over the draft tokens that verification reached; None if no round recorded confidences."""
    pairs = [
        (confidence, accepted)
        for r in rounds
        if r.confidence is not None
        for confidence, accepted in zip(r.confidence[: r.num_accepted + 1], r.accepted[: r.num_accepted + 1], strict=False)
    ]
    if not pairs:
        return None
    confidence, accepted = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    which = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    bins = [
        {
            "number": int((which == b).sum()),
            "confidence": float(confidence[which == b].mean()),
            "acceptance": float(accepted[which == b].mean()),
        }
        for b in np.unique(which)
    ]
    area = auc(confidence, accepted)
    return ConfidenceCalibration(
        num_draft_tokens=len(pairs),
        bins=bins,
        ece=sum(b["number"] * abs(b["acceptance"] - b["confidence"]) for b in bins) / len(pairs),
        brier=float(((confidence - accepted) ** 2).mean()),
        auroc=area if np.isfinite(area) else None,
    )
