"""Scores of predictors of the target's hidden states on one split, all predictors in one pass over the files.

A predictor reads EventGPT's state at a position and predicts the target's state there. Its scores are the cosine of predicted and real
state, the token that the predicted state emits through the target's LM head, and whether the real state emits the same token.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from feature_alignment.adapters.chained import ChainedAdapter, chained_predictions, text_batches
from feature_alignment.adapters.closed_form import POSITIONS, RIDGE_STRENGTHS, Affine, Moments, PositionMeans, Positions, positions
from feature_alignment.decoding.acceptance import cosine_per_position
from feature_alignment.measurement import metrics
from feature_alignment.measurement.calibration import ScoredPositions
from feature_alignment.measurement.reports import CosineRuleRates, PositionRates, PredictorRates, ReliabilityBin, StepRates
from feature_alignment.storage.hidden_states import HiddenStates


@dataclass(frozen=True)
class Scores:
    """Scores of one predictor on one split; zero at padded positions.

    The shape is [n, s], or [n, s, steps] for the chained adapter, where `[row, t, k]` is draft token k of a round at t, for position t + k.

    Args:
        cosine: float32, of predicted and real state
        says: int64, id of the token that the predicted state emits
        match: bool, whether the real state emits the same token
    """

    cosine: Tensor
    says: Tensor
    match: Tensor


Predictor = Callable[[Positions], Tensor]  # -> [p, d_target]


def reads(adapter: Callable[[Tensor], Tensor]) -> Predictor:
    """The predictor that applies an adapter, [p, d_draft] -> [p, d_target], to EventGPT's states."""
    return lambda some: adapter(some.draft)


@torch.inference_mode()
def score(predictors: Mapping[str, Predictor], states: HiddenStates, head: Tensor) -> dict[str, Scores]:
    """Scores of every predictor at every valid position.

    Args:
        predictors: name -> predictor
        states: one split
        head: [v, d_target] float32, the target's LM head; its device is used throughout

    Returns:
        name -> [n, s] scores
    """
    kinds = (torch.float32, torch.int64, torch.bool)
    scores = {name: Scores(*(torch.zeros(states.mask.shape, dtype=kind) for kind in kinds)) for name in predictors}
    for some in positions(states, str(head.device)):
        emitted = (some.target @ head.T).argmax(-1)
        for name, predict in predictors.items():
            expected = predict(some)
            says = (expected @ head.T).argmax(-1)
            index = some.rows, some.at
            scores[name].cosine[index] = cosine_per_position(expected, some.target).cpu()
            scores[name].says[index] = says.cpu()
            scores[name].match[index] = (says == emitted).cpu()
    return scores


@dataclass(frozen=True)
class Fitted:
    """A predictor and its cost.

    Args:
        predict: the predictor
        parameters: number of parameters
        seconds: of training or fitting
    """

    predict: Predictor
    parameters: int = 0
    seconds: float = 0.0


def null_predictors(train: HiddenStates, validation: HiddenStates, test: HiddenStates, rank: int, head: Tensor) -> dict[str, Fitted]:
    """Fit the null predictors, the controls that the adapter is compared with, in one pass over the training split.

    Args:
        train: split to fit on
        validation: split that chooses the ridge strength
        test: split that is measured; only the shuffled control reads it
        rank: of the reduced-rank regression, the linear counterpart of a bottleneck of that width
        head: [v, d_target] float32, the target's LM head

    Returns:
        name -> predictor: identity (if the widths allow it), target_mean, position_mean, shuffled (if there is another clip), ridge,
        ridge_rank_r
    """
    device, (d_draft, d_target) = str(head.device), (train.draft.shape[-1], train.target.shape[-1])
    began = time.perf_counter()
    means, statistics = PositionMeans(train.mask.shape[1], d_target, device), Moments(d_draft, d_target, device)
    for some in positions(train, device, 4 * POSITIONS):
        means.add(some.target, some.at.to(device))
        statistics.add(some.draft, some.target)
    by_position = means.by_position()
    mean_seconds = time.perf_counter() - began

    def candidates() -> Iterator[tuple[float, float, Affine]]:  # One at a time: a full map at width 4096 takes 67 MB.
        for strength in RIDGE_STRENGTHS:
            fit = statistics.ridge(strength)
            yield float(score({"ridge": reads(fit)}, validation, head)["ridge"].cosine.sum()), strength, fit

    _, best, ridge = max(candidates(), key=lambda candidate: candidate[0])
    seconds = time.perf_counter() - began
    low_rank = statistics.ridge(best, min(rank, d_target))
    nulls = {
        "target_mean": Fitted(lambda some: statistics.mean_y.expand(len(some.at), -1), d_target, mean_seconds),
        "position_mean": Fitted(
            lambda some: by_position[some.at.clamp(max=len(by_position) - 1).to(device)], by_position.numel(), mean_seconds
        ),
        **shuffled_pairs(test, device),
        "ridge": Fitted(reads(ridge), ridge.num_parameters, seconds),
        "ridge_rank_r": Fitted(reads(low_rank), low_rank.num_parameters, seconds),
    }
    if d_draft % d_target == 0:
        nulls = {"identity": Fitted(lambda some: some.draft[:, -d_target:])} | nulls
    return nulls


def shuffled_pairs(test: HiddenStates, device: str) -> dict[str, Fitted]:
    """The control that predicts the target's state at the same position of another clip, or its last one where that text is shorter.

    Empty if the split has one clip only.
    """
    partners = other_clip(test)
    if partners is None:
        return {}
    partner = torch.tensor(partners)

    def predict(some: Positions) -> Tensor:
        rows = partner[some.rows]
        return test.target[rows, torch.minimum(some.at, test.lengths[rows] - 1)].float().to(device)

    return {"shuffled": Fitted(predict)}


def other_clip(states: HiddenStates) -> list[int] | None:
    """For each row the next row of another clip, with the same question if there is one; None if all rows are of one clip."""
    clips, by_question = states.clips, defaultdict(list)
    if len(set(clips)) < 2:
        return None
    for i, row in enumerate(states.rows):
        by_question[row["question"]].append(i)
    partner = _next_of_another_clip(list(range(len(clips))), clips)
    for rows in by_question.values():
        partner |= _next_of_another_clip(rows, clips)
    return [partner[i] for i in range(len(clips))]


def _next_of_another_clip(rows: Sequence[int], clips: Sequence[str]) -> dict[int, int]:
    """Row -> the next row of another clip, in cyclic order; empty if all rows are of one clip."""
    partners: dict[int, int] = {}
    following: int | None = None
    for here, after in reversed(list(pairwise([*rows, *rows, rows[0]]))):
        following = after if clips[after] != clips[here] else following
        if following is not None:
            partners[here] = following
    return partners


@torch.inference_mode()
def chain_scores(
    adapter: ChainedAdapter, states: HiddenStates, head: Tensor, embeddings: Tensor, steps: int, events: Sequence[int] | None = None
) -> tuple[Scores, Tensor]:
    """Scores of the chained adapter for rounds that begin anywhere, with the target's own tokens as the earlier draft tokens of the round.

    Args:
        adapter: on the device of `head`
        states: one split with event states
        head: [v, d_target] float32, the target's LM head
        embeddings: [v, d_target] float32, the target's token embeddings
        steps: draft length
        events: for each row, the row whose events the adapter sees instead

    Returns:
        scores [n, s, steps], and [n, s, steps] bool: whether the text has this position
    """
    if events is not None:
        states = states.with_events_of(torch.tensor(events))
    shape, device = (*states.mask.shape, steps), str(head.device)
    cosine, says, valid = torch.zeros(shape), torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    match, first = torch.zeros(shape, dtype=torch.bool), 0
    for texts in text_batches(states, torch.arange(len(states.mask)).split(64), device):
        rows = slice(first, first + len(texts.states))
        first = rows.stop
        emitted = (texts.states @ head.T).argmax(-1)
        for k, (expected, wanted, mask) in enumerate(chained_predictions(adapter, texts, embeddings, steps)):
            starts = slice(1, 1 + mask.shape[1])  # Position 0 comes from the target's prefill.
            emitted_here = (expected @ head.T).argmax(-1)
            cosine[rows, starts, k] = (cosine_per_position(expected, wanted) * mask).cpu()
            says[rows, starts, k] = (emitted_here * mask).cpu()
            match[rows, starts, k] = ((emitted_here == emitted[:, 1 + k :]) & mask).cpu()
            valid[rows, starts, k] = mask.cpu()
    return Scores(cosine, says, match), valid


# ---- rates from scores


def judged(scores: Scores, valid: Tensor, states: HiddenStates) -> ScoredPositions:
    """Scores in the form that calibration reads. A position that every step of a chain scores has weight 1 in all.

    Args:
        scores: of one predictor
        valid: bool, [n, s] or [n, s, steps] as the scores
        states: the split they were measured on
    """
    steps = valid.shape[-1] if valid.ndim == 3 else 1
    row = valid.nonzero()[:, 0].numpy()
    clips = np.array(states.clips)
    max_weight = states.mask.shape[1] * max(Counter(states.clips).values())
    return ScoredPositions(scores.cosine[valid].numpy(), ~scores.match[valid].numpy(), clips[row].tolist(), max_weight, 1 / steps)


def rates(scores: Scores, valid: Tensor, states: HiddenStates, num_draft_tokens: int) -> PredictorRates:
    """Rates of one predictor.

    Args:
        scores: [n, s], or [n, s, steps] of rounds that begin anywhere
        valid: bool, same shape
        states: the split they were measured on
        num_draft_tokens: draft length
    """
    clips, n = states.clips, len(states.mask)
    blocks = metrics.decoding_blocks(scores.match, states.mask, num_draft_tokens, states.ended)
    return PredictorRates(
        cosine=metrics.counts(scores.cosine, valid).rate(clips),
        token_match=metrics.counts(scores.match, valid).rate(clips),
        acceptance_rate=blocks.acceptance_rate(n).rate(clips),
        consecutive_accept_token=blocks.consecutive_accept(n).rate(clips),
        tokens_per_pass=blocks.tokens_per_pass(states.lengths),
    )


def rates_above(threshold: float, scores: Scores, valid: Tensor, states: HiddenStates, num_draft_tokens: int) -> CosineRuleRates:
    """Acceptance of the cosine rules at a threshold; the other arguments are those of `rates`."""
    clips, n, above = states.clips, len(states.mask), scores.cosine > threshold
    rounds = metrics.decoding_blocks(above, states.mask, num_draft_tokens, states.ended)
    return CosineRuleRates(
        relaxed_accept=metrics.counts(above, valid).rate(clips),
        consecutive_accept=rounds.consecutive_accept(n).rate(clips),
        consecutive_length=rounds.consecutive_length(n).rate(clips),
        token_match_given_accept=metrics.counts(scores.match, valid & above).rate(clips),
    )


def accepted_lengths(match: Tensor, states: HiddenStates, num_draft_tokens: int) -> list[int]:
    """Number of rounds with 0, 1, … num_draft_tokens accepted draft tokens under the token rule.

    Args:
        match: bool, [n, s] or [n, s, steps]
        states: the split it was measured on
        num_draft_tokens: draft length
    """
    blocks = metrics.decoding_blocks(match, states.mask, num_draft_tokens, states.ended)
    lengths: list[int] = np.bincount(blocks.accepted[blocks.offered > 0], minlength=num_draft_tokens + 1).tolist()
    return lengths


def reliability(scores: Scores, valid: Tensor, clips: Sequence[str], bins: int = 20) -> list[ReliabilityBin]:
    """Token match in ranges of the cosine that hold the same number of positions.

    Args:
        scores: of one predictor
        valid: bool, same shape
        clips: clip of each row
        bins: number of ranges; fewer if there are fewer positions
    """
    cosine, match, row = scores.cosine[valid], scores.match[valid].double(), valid.nonzero()[:, 0]
    order = cosine.argsort()
    cosine, match, row = cosine[order], match[order], row[order]
    above = match.flip(0).cumsum(0).flip(0) / torch.arange(len(match), 0, -1)
    found = []
    for a, b in pairwise(torch.linspace(0, len(order), bins + 1).long().unique().tolist()):
        hits, total = (torch.bincount(row[a:b], x, len(clips)).numpy() for x in (match[a:b], torch.ones(b - a, dtype=torch.float64)))
        rate = metrics.Counts(hits, total).rate(clips)
        found.append(ReliabilityBin(float(cosine[a:b].mean()), b - a, rate.value, float(above[a]), rate.ci95))
    return found


def per_position(scores: Scores, states: HiddenStates) -> list[PositionRates]:
    """Rates at each position of the answer, for a predictor with [n, s] scores."""
    mask, clips, earlier_match, rows = states.mask, np.array(states.clips), states.mask.clone(), []
    for t in range(mask.shape[1]):
        here = mask[:, t]
        if not here.any():
            break
        given = earlier_match[:, t] & here
        of_all, of_given = (
            metrics.counts(scores.match[some, t][:, None], torch.ones(int(some.sum()), 1)).rate(clips[some.numpy()])
            for some in (here, given)
        )
        rows.append(
            PositionRates(
                position=t,
                n=int(here.sum()),
                cosine=float(scores.cosine[here, t].mean()),
                n_token_match=int(here.sum()),
                token_match=of_all.value,
                token_match_lo=of_all.ci95[0],
                token_match_hi=of_all.ci95[1],
                n_token_match_given_earlier=int(given.sum()),
                token_match_given_earlier=of_given.value,
                token_match_given_earlier_lo=of_given.ci95[0],
                token_match_given_earlier_hi=of_given.ci95[1],
            )
        )
        earlier_match[:, t + 1 :] &= (scores.match[:, t] | ~here)[:, None]
    return rows


def chain_steps(scores: Scores, valid: Tensor, clips: Sequence[str]) -> list[StepRates]:
    """Rates of each draft position of a chain.

    Args:
        scores: [n, s, steps]
        valid: [n, s, steps] bool
        clips: clip of each row
    """
    return [
        StepRates(
            step=k + 1,
            cosine=metrics.counts(scores.cosine[..., k], valid[..., k]).rate(clips),
            token_match=metrics.counts(scores.match[..., k], valid[..., k]).rate(clips),
        )
        for k in range(valid.shape[-1])
    ]
