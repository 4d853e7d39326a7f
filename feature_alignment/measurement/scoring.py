"""How well predictors of the target's next state do on one split, all of them in one pass over the files.

A predictor reads EventGPT's state at a position and gives the target state it expects there; a score is its cosine with the true
state, the token it emits through the target's head, and whether that is the token the true state emits.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feature_alignment.adapters.chained import ChainedAdapter, chained_predictions, text_batches
from feature_alignment.adapters.closed_form import POSITIONS, RIDGE_STRENGTHS, Affine, Moments, PositionMeans, Positions, positions
from feature_alignment.decoding.acceptance import cosine_per_position
from feature_alignment.measurement import metrics
from feature_alignment.measurement.calibration import Judged
from feature_alignment.storage.hidden_states import HiddenStates


@dataclass(frozen=True)
class Scores:
    """One predictor on one split, zero where padded: cosine [n, s] float32, says [n, s] int64, match [n, s] bool."""

    cosine: Tensor
    says: Tensor
    match: Tensor


Predictor = Callable[[Positions], Tensor]  # -> [p, d_target]


def reads(adapter: Callable[[Tensor], Tensor]) -> Predictor:
    """What an adapter [p, d_draft] -> [p, d_target] predicts from EventGPT's states."""
    return lambda some: adapter(some.draft)


@torch.inference_mode()
def score(predictors: Mapping[str, Predictor], states: HiddenStates, head: Tensor) -> dict[str, Scores]:
    """Every predictor on every real position. head: W [v, d_target] float32, on the device where all of it happens."""
    empty = lambda dtype: torch.zeros(states.mask.shape, dtype=dtype)  # noqa: E731
    scores = {name: Scores(empty(torch.float32), empty(torch.int64), empty(torch.bool)) for name in predictors}
    for some in positions(states, str(head.device)):
        emitted = (some.target @ head.T).argmax(-1)
        for name, predict in predictors.items():
            expected = predict(some)
            says = (expected @ head.T).argmax(-1)
            place = some.rows, some.at
            scores[name].cosine[place] = cosine_per_position(expected, some.target).cpu()
            scores[name].says[place] = says.cpu()
            scores[name].match[place] = (says == emitted).cpu()
    return scores


@dataclass(frozen=True)
class Fitted:
    """A predictor with what it takes: parameters, and seconds until it was ready."""

    predict: Predictor
    parameters: int = 0
    seconds: float = 0.0


def null_predictors(train: HiddenStates, validation: HiddenStates, test: HiddenStates, rank: int, head: Tensor) -> dict[str, Fitted]:
    """What the adapter must beat, fitted in one pass over the training split; the ridge strength is chosen on validation.

    rank: of the reduced-rank regression: what a bottleneck of that width can do linearly
    """
    device, (d_draft, d_target) = str(head.device), (train.draft.shape[-1], train.target.shape[-1])
    began = time.perf_counter()
    means, statistics = PositionMeans(train.mask.shape[1], d_target, device), Moments(d_draft, d_target, device)
    for some in positions(train, device, 4 * POSITIONS):
        means.add(some.target, some.at.to(device))
        statistics.add(some.draft, some.target)
    by_position = means.by_position()
    mean_seconds = time.perf_counter() - began

    def tried() -> Iterator[tuple[float, float, Affine]]:  # one at a time: a full map at width 4096 takes 67 MB
        for strength in RIDGE_STRENGTHS:
            fit = statistics.ridge(strength)
            yield float(score({"ridge": reads(fit)}, validation, head)["ridge"].cosine.sum()), strength, fit

    _, best, ridge = max(tried(), key=lambda found: found[0])
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
    """The control that reads the target's state at the same position of another clip; empty where the split has one clip only."""
    partners = other_clip(test)
    if partners is None:
        return {}
    partner = torch.tensor(partners)
    return {"shuffled": Fitted(lambda some: test.target[partner[some.rows], some.at].float().to(device))}


def other_clip(states: HiddenStates) -> list[int] | None:
    """For each row the next row of another clip, about the same question where there is one; None where all rows are of one clip."""
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
    """Row -> the first one after it, in a ring, that is of another clip; nothing where all are of one."""
    found: dict[int, int] = {}
    following: int | None = None
    for here, after in reversed(list(pairwise([*rows, *rows, rows[0]]))):
        following = after if clips[after] != clips[here] else following
        if following is not None:
            found[here] = following
    return found


@torch.inference_mode()
def chain_scores(
    adapter: ChainedAdapter, states: HiddenStates, head: Tensor, embeddings: Tensor, steps: int, events: Sequence[int] | None = None
) -> tuple[Scores, Tensor]:
    """Scores of the chained adapter for rounds that begin anywhere: `[row, t, k]` is draft k of a round at t, for position t + k, all
    earlier drafts of the round being the target's own tokens. Second, where there is such a position: [n, s, steps] bool.

    events: row -> the row whose events it is shown instead of its own
    """
    if events is not None and states.events is not None:
        states = dataclasses.replace(states, events=states.events[torch.tensor(events)])
    shape, device = (*states.mask.shape, steps), str(head.device)
    cosine, says, there = torch.zeros(shape), torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    match, first = torch.zeros(shape, dtype=torch.bool), 0
    for texts in text_batches(states, torch.arange(len(states.mask)).split(64), device):
        rows = slice(first, first + len(texts.states))
        first = rows.stop
        emitted = (texts.states @ head.T).argmax(-1)
        for k, (expected, wanted, mask) in enumerate(chained_predictions(adapter, texts, embeddings, steps)):
            starts = slice(1, 1 + mask.shape[1])  # position 0 comes from the target's prefill
            said = (expected @ head.T).argmax(-1)
            cosine[rows, starts, k] = (cosine_per_position(expected, wanted) * mask).cpu()
            says[rows, starts, k] = (said * mask).cpu()
            match[rows, starts, k] = ((said == emitted[:, 1 + k :]) & mask).cpu()
            there[rows, starts, k] = mask.cpu()
    return Scores(cosine, says, match), there


# -------------------------------------------------------------------------------------------------------- what scores amount to


def judged(scores: Scores, there: Tensor, states: HiddenStates) -> Judged:
    """Scores as calibration reads them. A position scored at every step of a chain counts once in all, so that a clip has a bound."""
    steps = there.shape[-1] if there.ndim == 3 else 1
    row = there.nonzero()[:, 0].numpy()
    clips = np.array(states.clips)
    most = states.mask.shape[1] * max(Counter(states.clips).values())
    return Judged(scores.cosine[there].numpy(), ~scores.match[there].numpy(), clips[row].tolist(), most, 1 / steps)


def rates(scores: Scores, there: Tensor, states: HiddenStates, num_draft_tokens: int) -> dict[str, Any]:
    """What any predictor is told by: [n, s] scores, or [n, s, steps] of rounds that begin anywhere; `there` marks real places."""
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
    clips, n, above = states.clips, len(states.mask), scores.cosine > threshold
    rounds = metrics.decoding_blocks(above, states.mask, num_draft_tokens, states.ended)
    return {
        "relaxed_accept": metrics.counts(above, there).rate(clips),
        "consecutive_accept": rounds.consecutive_accept(n).rate(clips),
        "consecutive_length": rounds.consecutive_length(n).rate(clips),
        "token_match_given_accept": metrics.counts(scores.match, there & above).rate(clips),
    }


def accepted_lengths(match: Tensor, states: HiddenStates, num_draft_tokens: int) -> list[int]:
    """How many rounds keep 0, 1, … num_draft_tokens drafts under the token rule."""
    blocks = metrics.decoding_blocks(match, states.mask, num_draft_tokens, states.ended)
    return np.bincount(blocks.accepted[blocks.offered > 0], minlength=num_draft_tokens + 1).tolist()


def reliability(scores: Scores, there: Tensor, bins: int = 20) -> list[dict[str, float]]:
    """Over cosines in bins of equal count, n of each: how often the token is the same, and how often it is from this cosine on up."""
    cosine, match = scores.cosine[there], scores.match[there].double()
    order = cosine.argsort()
    cosine, match = cosine[order], match[order]
    above = match.flip(0).cumsum(0).flip(0) / torch.arange(len(match), 0, -1)
    edges = torch.linspace(0, len(order), bins + 1).long().unique()
    return [
        {
            "cosine": float(cosine[a:b].mean()),
            "n": int(b - a),
            "token_match": float(match[a:b].mean()),
            "token_match_above": float(above[a]),
        }
        for a, b in pairwise(edges.tolist())
    ]


def per_position(scores: Scores, states: HiddenStates) -> list[dict[str, Any]]:
    """Per position of the text: how many texts reach it, its cosine, its token match, and the match given all earlier ones matched,
    both with their intervals by clip."""
    mask, clips, alive, rows = states.mask, np.array(states.clips), states.mask.clone(), []
    for t in range(mask.shape[1]):
        here = mask[:, t]
        if not here.any():
            break
        row = {"position": t, "n": int(here.sum()), "cosine": float(scores.cosine[here, t].mean())}
        for name, some in (("token_match", here), ("token_match_given_earlier", alive[:, t] & here)):
            found = metrics.counts(scores.match[some, t][:, None], torch.ones(int(some.sum()), 1)).rate(clips[some.numpy()])
            row |= {f"n_{name}": int(some.sum()), name: found["value"], f"{name}_lo": found["ci95"][0], f"{name}_hi": found["ci95"][1]}
        rows.append(row)
        alive[:, t + 1 :] &= (scores.match[:, t] | ~here)[:, None]
    return rows


def chain_steps(scores: Scores, there: Tensor, clips: Sequence[str]) -> list[dict[str, Any]]:
    """Cosine and token match of each draft of a chain."""
    return [
        {
            "step": k + 1,
            "cosine": metrics.counts(scores.cosine[..., k], there[..., k]).rate(clips),
            "token_match": metrics.counts(scores.match[..., k], there[..., k]).rate(clips),
        }
        for k in range(there.shape[-1])
    ]
