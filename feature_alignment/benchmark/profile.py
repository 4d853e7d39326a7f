"""speculation_profile.json: acceptance by draft position, in the terms of serving engines.

    mean_acceptance_length = 1 + accepted draft tokens / rounds = 1 + sum over positions of the marginal acceptance
    marginal acceptance of position i: rounds whose draft token i was accepted / all rounds
    conditional acceptance of position i: ... / rounds that proposed it and accepted all draft tokens before it

A round is a verification with at least one draft token. Rates come with 95 % intervals that resample clips.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from feature_alignment.benchmark.speed_model import verification_cost
from feature_alignment.benchmark.timing import Timed
from feature_alignment.decoding.generation import Generation, Round
from feature_alignment.measurement.metrics import Counts, Rate, auc, corrected_speedup
from feature_alignment.measurement.records import OMIT_IF_NONE, Record

NUM_BINS = 10


@dataclass(frozen=True)
class ConfidenceBin(Record):
    """One tenth of the range of confidences: number of draft tokens, their mean confidence and acceptance."""

    number: int
    confidence: float
    acceptance: float


@dataclass(frozen=True)
class ConfidenceCalibration(Record):
    """How well a drafter's confidence predicts acceptance, over the draft tokens that verification reached.

    Args:
        num_draft_tokens: draft tokens with a confidence
        bins: one for each tenth of confidence with draft tokens in it
        ece: expected calibration error, the mean of |acceptance - mean confidence| weighted by the number (Naeini et al. 2015)
        brier: mean squared difference of confidence and outcome (Brier 1950)
        auroc: chance that an accepted draft token had the higher confidence of two; None if all or none were accepted
    """

    num_draft_tokens: int
    bins: list[ConfidenceBin]
    ece: float
    brier: float
    auroc: float | None


@dataclass(frozen=True)
class ProfileCosts(Record):
    """Costs in passes of plain decoding: c, one draft token; r, the rest of a round; v, number of tokens -> verifying them."""

    c: float | None
    r: float
    v: dict[str, float]


@dataclass(frozen=True)
class RecommendedLength(Record):
    """The fastest fixed draft length by the corrected formula, with its predicted tokens per round and decoding speed-up."""

    num_draft_tokens: int
    mean_acceptance_length: float
    decode_speedup: float


@dataclass(frozen=True)
class SpeculationProfile(Record):
    """One way to draft.

    Args:
        draft, num_draft_tokens: the row it was measured on; lossless, with a fixed draft length
        num_drafts: rounds
        num_proposed_tokens, num_accepted_tokens: over all rounds
        mean_acceptance_length: tokens per round, the extra token included
        draft_acceptance_rate: accepted / proposed draft tokens
        marginal_acceptance, conditional_acceptance: a rate for each draft position
        accepted_lengths: number of rounds with 0, 1, 2, ... accepted draft tokens
        costs: in passes of plain decoding
        recommended: the fastest fixed draft length at these acceptances and costs
        confidence: calibration, where an adaptive row of the same drafter recorded confidences
        mean_acceptance_length_ci95: interval of `mean_acceptance_length`; files of earlier versions have none
    """

    draft: str
    num_draft_tokens: int
    num_drafts: int
    num_proposed_tokens: int
    num_accepted_tokens: int
    mean_acceptance_length: float
    draft_acceptance_rate: Rate
    marginal_acceptance: list[Rate]
    conditional_acceptance: list[Rate]
    accepted_lengths: list[int]
    costs: ProfileCosts
    recommended: RecommendedLength | None
    confidence: ConfidenceCalibration | None
    mean_acceptance_length_ci95: tuple[float, float] | None = field(default=None, metadata=OMIT_IF_NONE)


def profile_of(
    draft: str,
    num_draft_tokens: int,
    runs: Timed,
    clips: Sequence[str],
    costs: ProfileCosts,
    adaptive: Timed | None = None,
) -> SpeculationProfile:
    """The profile of one row of a fixed draft length.

    Args:
        draft: name of the drafter
        num_draft_tokens: draft length of the row
        runs: its runs
        clips: clip of every prompt
        costs: in passes of plain decoding
        adaptive: runs of an adaptive row of the same drafter, for its confidences
    """
    rounds = [_drafted(generations) for generations in runs.generations]
    every = [r for some in rounds for r in some]

    def accepted_at(i: int) -> Callable[[Round], float]:
        return lambda r: float(r.num_accepted > i)

    def reached_at(i: int) -> Callable[[Round], float]:
        return lambda r: float(r.num_accepted >= i and len(r.proposed) > i)

    positions = range(num_draft_tokens)
    marginal = [_rate(rounds, clips, accepted_at(i), lambda r: 1) for i in positions]
    conditional = [_rate(rounds, clips, accepted_at(i), reached_at(i)) for i in positions]
    lengths = Counter(r.num_accepted for r in every)
    accepted = sum(r.num_accepted for r in every)
    length = _rate(rounds, clips, lambda r: 1 + r.num_accepted, lambda r: 1)
    return SpeculationProfile(
        draft=draft,
        num_draft_tokens=num_draft_tokens,
        num_drafts=len(every),
        num_proposed_tokens=sum(len(r.proposed) for r in every),
        num_accepted_tokens=accepted,
        mean_acceptance_length=1 + accepted / max(1, len(every)),
        draft_acceptance_rate=_rate(rounds, clips, lambda r: r.num_accepted, lambda r: len(r.proposed)),
        marginal_acceptance=marginal,
        conditional_acceptance=conditional,
        accepted_lengths=[lengths[n] for n in range(num_draft_tokens + 1)],
        costs=costs,
        recommended=recommended_length([c.value for c in conditional], costs),
        confidence=None if adaptive is None else calibration_of([r for some in adaptive.generations for r in _drafted(some)]),
        mean_acceptance_length_ci95=length.ci95,
    )


def _drafted(generations: Sequence[Generation]) -> list[Round]:
    return [r for g in generations for r in g.rounds if r.proposed]


def _rate(rounds: Sequence[Sequence[Round]], clips: Sequence[str], hits: Callable[[Round], float], total: Callable[[Round], float]) -> Rate:
    """Ratio of two sums over the rounds of each prompt."""
    sums = [np.array([float(sum(map(f, some))) for some in rounds]) for f in (hits, total)]
    return Counts(*sums).rate(clips)


def recommended_length(conditional: Sequence[float], costs: ProfileCosts) -> RecommendedLength | None:
    """The fastest fixed draft length by S(g) = E(g) / (g c + v(g + 1) + r), E(g) = 1 + sum over i <= g of the product of the first i.

    Args:
        conditional: acceptance of each position if all before it were accepted; lengths beyond the measured ones are not considered
        costs: as in `profile_of`

    Returns:
        the best length; None if nothing was drafted or c is unknown
    """
    best: RecommendedLength | None = None
    chance = tokens = 1.0
    for g, acceptance in enumerate(conditional, 1):
        if not np.isfinite(acceptance) or costs.c is None:
            break
        chance *= acceptance
        tokens += chance
        speedup = corrected_speedup(tokens, g, costs.c, verification_cost(costs.v, g + 1) + costs.r)
        if best is None or speedup > best.decode_speedup:
            best = RecommendedLength(g, tokens, speedup)
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
        ConfidenceBin(int((which == b).sum()), float(confidence[which == b].mean()), float(accepted[which == b].mean()))
        for b in np.unique(which)
    ]
    area = auc(confidence, accepted)
    return ConfidenceCalibration(
        num_draft_tokens=len(pairs),
        bins=bins,
        ece=sum(b.number * abs(b.acceptance - b.confidence) for b in bins) / len(pairs),
        brier=float(((confidence - accepted) ** 2).mean()),
        auroc=area if np.isfinite(area) else None,
    )
