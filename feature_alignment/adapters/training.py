"""Training of the hidden adapter and of the chained adapter: their loss, initialization and batches. `fitting` has the loop.

`cfg` is the TrainConfig of train_hidden_adapter everywhere; its device is this process's own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from feature_alignment.adapters.chained import ChainedAdapter, Texts, chain_over, text_batches
from feature_alignment.adapters.closed_form import RIDGE_STRENGTHS, Affine, moments, positions
from feature_alignment.adapters.fitting import Batch, Checkpoint, History, Part, fit, mean_over_positions, shuffled
from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.cli.console import UserError
from feature_alignment.storage.hidden_states import HiddenStates

REACH = 1.0  # how far a unit that begins as a straight line uses GELU, in standard deviations


def losses(predicted: Tensor, target: Tensor, head: Tensor, variance: float, cfg: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The training loss and what goes into the history, means over positions.

    predicted, target: [p, d_target]; head: W [v, d_target]
    """
    mse = F.mse_loss(predicted, target) / variance
    cosine = F.cosine_similarity(predicted, target, dim=-1).mean()
    parts = {"mse": mse, "cosine": cosine}
    loss = cfg.mse_weight * mse + cfg.cosine_weight * (1 - cosine)
    if cfg.kl_weight or not torch.is_grad_enabled():  # the head is most of the cost: only where it is learnt from or reported
        said, wanted = predicted @ head.T, target @ head.T
        kl = F.kl_div(F.log_softmax(said, -1), F.log_softmax(wanted, -1), log_target=True, reduction="batchmean")
        parts |= {"kl": kl, "token_match": (said.argmax(-1) == wanted.argmax(-1)).float().mean()}
        loss = loss + cfg.kl_weight * kl
    return loss, {"loss": loss, **parts}


def spread_of(states: Tensor) -> Tensor:
    """Standard deviation of each channel, [d] float32, never so small that dividing by it is a risk; states: [p, d]."""
    return states.std(0, correction=0).clamp(min=1e-4)


def mean_variance(states: Tensor) -> float:
    """Mean variance over channels, never zero; states: [p, d]. The squared error is reported as a share of it."""
    return max(float(states.var(0, correction=0).mean()), 1e-8)


def mixed_precision(cfg: Any) -> AbstractContextManager:
    """bfloat16 products on a GPU; on a CPU they are rarely faster."""
    return torch.autocast("cuda", torch.bfloat16, enabled=str(cfg.device).startswith("cuda"))


# ------------------------------------------------------------------------------------------------------------ the hidden adapter


@dataclass(frozen=True)
class Scale:
    """The scales of both spaces. Channels of a residual stream differ in size by orders of magnitude, so the bottleneck learns on
    standardised states; `folded` puts the scales into its weights, and what is saved is the plain adapter.
    """

    mean: Tensor  # [d_draft]
    std: Tensor  # [d_draft]
    std_target: Tensor  # [d_target]

    def standard(self, g: Tensor) -> Tensor:
        return (g - self.mean) / self.std

    def missing(self, adapter: HiddenAdapter, g: Tensor, v: Tensor) -> Tensor:
        """What the bottleneck ought to add to reach v, standardised."""
        return (v - g[..., -adapter.d_target :] if adapter.residual else v) / self.std_target

    def predict(self, adapter: HiddenAdapter, g: Tensor) -> Tensor:
        change = adapter.change(self.standard(g)) * self.std_target
        return g[..., -adapter.d_target :] + change if adapter.residual else change

    def folded(self, adapter: HiddenAdapter) -> HiddenAdapter:
        """A new adapter that gives on raw states what `predict` gives."""
        plain = copy.deepcopy(adapter)
        with torch.no_grad():
            plain.down.weight /= self.std
            plain.down.bias.sub_(plain.down.weight @ self.mean)
            plain.up.weight *= self.std_target[:, None]
            plain.up.bias.mul_(self.std_target)
        return plain


@torch.no_grad()
def start_from_linear(adapter: HiddenAdapter, fit: Affine, covariance: Tensor) -> None:
    """Make units of the bottleneck compute a low-rank linear map, as far as GELU lets them; the others stay as they are, muted.

    Around its inflection point √2 GELU is a straight line of slope 1.129 up to third order, so each unit sits there and is given
    one coordinate of the map, scaled to a standard deviation of REACH.

    fit: standardised state -> what to add, standardised, of some rank
    covariance: [d_draft, d_draft] of standardised states
    """
    left, right = fit.factors
    r = min(len(right), adapter.bottleneck)
    left, right = left[:, -r:], right[-r:]  # the last are the strongest
    spread = ((covariance.float() @ left) * left).sum(0).clamp(min=1e-12).sqrt()  # rounding may leave a variance of zero below zero
    middle = math.sqrt(2.0)
    slope = 0.5 * (1 + math.erf(1.0)) + middle * math.exp(-1.0) / math.sqrt(2 * math.pi)
    adapter.down.weight[:r] = (left / spread).T * REACH
    adapter.down.bias[:r] = middle - adapter.down.weight[:r] @ fit.mean_x
    adapter.up.weight.zero_()
    adapter.up.weight[:, :r] = (right * spread[:, None]).T / (REACH * slope)
    adapter.up.bias.copy_(fit.mean_y - adapter.up.weight[:, :r].sum(1) * F.gelu(torch.tensor(middle)))


def train_hidden(
    states: HiddenStates,
    validation: HiddenStates,
    head: Tensor,
    cfg: Any,
    checkpoint: Checkpoint | None = None,
    part: Part | None = None,
) -> tuple[HiddenAdapter, History]:
    """The bottleneck adapter, state by state. cfg.linear_units of it begin as the best linear map of that rank, the others are free
    to find what is not linear; without any it begins as the identity."""
    part = part or Part()
    torch.manual_seed(cfg.seed)
    head = head.float().to(cfg.device)

    def row_batches(some: HiddenStates, batches: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in batches:
            mask, draft, target = some.mask[rows], some.draft[rows], some.target[rows]
            some.refuse_non_finite(rows, draft, target)
            yield draft[mask].float().to(cfg.device), target[mask].float().to(cfg.device)

    sample_g, sample_v = next(row_batches(states, shuffled(len(states.draft), 512, 0, 0)))
    scale = Scale(sample_g.mean(0), spread_of(sample_g), spread_of(sample_v))
    variance = mean_variance(sample_v)
    adapter = HiddenAdapter(states.draft.shape[-1], states.target.shape[-1], cfg.bottleneck).to(cfg.device)

    def score(g: Tensor, v: Tensor) -> Batch:
        with mixed_precision(cfg):
            return Batch(*losses(scale.predict(adapter, g), v, head, variance, cfg), len(g))

    def epoch(number: int) -> Iterator[Batch]:
        batches = tuple(map(part.rows, shuffled(len(states.draft), cfg.batch_size, cfg.seed, number)))
        for rows, (g, v) in zip(batches, row_batches(states, batches), strict=True):
            yield score(g, v)._replace(rows=tuple(rows.tolist()))

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        plain, batches = scale.folded(adapter), torch.arange(len(validation.draft)).split(256)
        return mean_over_positions((len(g), losses(plain(g), v, head, variance, cfg)[1]) for g, v in row_batches(validation, batches))

    if rank := min(cfg.linear_units, cfg.bottleneck, adapter.d_target):
        pairs = ((scale.standard(p.draft), scale.missing(adapter, p.draft, p.target)) for p in positions(states, cfg.device, 4096))
        statistics, starts = moments(pairs, adapter.d_draft, adapter.d_target, cfg.device), {}
        for strength in RIDGE_STRENGTHS:
            start_from_linear(adapter, statistics.ridge(strength, rank), statistics.covariance())
            starts[evaluate()["loss"]] = copy.deepcopy(adapter.state_dict())
        adapter.load_state_dict(starts[min(starts)])
    steps = math.ceil(len(states.draft) / cfg.batch_size)
    return fit(adapter, epoch, steps, evaluate, lambda: scale.folded(adapter), cfg, states.names, checkpoint, part)


# ----------------------------------------------------------------------------------------------------------- the chained adapter


def train_chained(
    states: HiddenStates,
    validation: HiddenStates,
    head: Tensor,
    embeddings: Tensor,
    cfg: Any,
    checkpoint: Checkpoint | None = None,
    part: Part | None = None,
) -> tuple[ChainedAdapter, History]:
    """The chained adapter, on its own roll-outs: at training it meets what it meets when chained."""
    part = part or Part()
    torch.manual_seed(cfg.seed)
    head, embeddings = head.float().to(cfg.device), embeddings.float().to(cfg.device)
    if int(states.lengths.max()) < 2 or int(validation.lengths.max()) < 2:
        raise UserError("the chained adapter learns from texts of at least two tokens; these have one.")
    sample = next(text_batches(states, shuffled(len(states.target), 512, 0, 0), cfg.device))
    real = sample.states[sample.mask]
    variance = mean_variance(real)
    num_events, d_event = sample.events.shape[1:]
    adapter = ChainedAdapter(states.target.shape[-1], d_event, num_events, cfg.bottleneck, cfg.blind).to(cfg.device)
    adapter.standardise(real, embeddings, sample.events)

    def score(texts: Texts) -> Batch:
        """Means over the positions of all steps of the roll-out."""
        with mixed_precision(cfg):
            found = [
                (int(mask.sum()), losses(expected[mask], wanted[mask], head, variance, cfg)[1])
                for expected, wanted, mask in chain_over(adapter, texts, embeddings, cfg.roll_out_steps)
                if mask.any()
            ]
        n = sum(number for number, _ in found)
        parts = {name: torch.stack([number / n * some[name] for number, some in found]).sum() for name in found[0][1]}
        return Batch(parts["loss"], parts, n)

    def epoch(number: int) -> Iterator[Batch]:
        batches = tuple(map(part.rows, shuffled(len(states.target), cfg.batch_size, cfg.seed, number)))
        for rows, texts in zip(batches, text_batches(states, batches, cfg.device), strict=True):
            yield score(texts)._replace(rows=tuple(rows.tolist()))

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        batches = torch.arange(len(validation.target)).split(64)
        return mean_over_positions((b.n, b.parts) for b in map(score, text_batches(validation, batches, cfg.device)))

    steps = math.ceil(len(states.target) / cfg.batch_size)
    return fit(adapter, epoch, steps, evaluate, adapter.folded, cfg, states.names, checkpoint, part)
