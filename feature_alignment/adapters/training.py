"""Training of the hidden adapter and of the chained adapter: loss, initialization and batches. The loop is in `fitting`."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from feature_alignment.adapters.attending_texts import MOST_IDS
from feature_alignment.adapters.chained import ChainedAdapter, Texts, chained_predictions, text_batches
from feature_alignment.adapters.closed_form import RIDGE_STRENGTHS, Affine, moments, positions
from feature_alignment.adapters.fitting import (
    Batch,
    Checkpoint,
    History,
    ProcessShare,
    TrainSettings,
    fit,
    mean_over_positions,
    shuffled,
)
from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.adapters.rounds import ROUND_DRAFT_TOKENS, tokens_per_pass
from feature_alignment.cli.console import UserError
from feature_alignment.storage.hidden_states import HiddenStates

TV_WEIGHT = 0.9  # of the total variation in the loss `tv`; the rest is cross-entropy
STEP_DECAY = 0.9  # weight of a draft step in the attending adapter's loss and in `tv`, relative to the step before
REACH = 1.0  # input range, in standard deviations, of a unit that starts as a linear function


def losses(predicted: Tensor, target: Tensor, head: Tensor, variance: float, settings: TrainSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """The training loss and its parts for the history, as means over positions.

    Args:
        predicted: [p, d_target], the adapter's states.
        target: [p, d_target], the target's states.
        head: [v, d_target], weight of the target's LM head.
        variance: Mean variance of the target's states; the squared error is divided by it.
        settings: Kind of loss, and the weights of its parts.

    Returns:
        The loss, and a dict of "loss", "mse", "cosine" and, where the head is used, "kl" and "token_match".
    """
    loss, parts, _ = compared(predicted, target, head, variance, settings)
    return loss, parts


def compared(
    predicted: Tensor, target: Tensor, head: Tensor, variance: float, settings: TrainSettings
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """`losses`, and at which positions both states emit the same token, [p] bool; None where the head is not used."""
    mse = F.mse_loss(predicted, target) / variance
    cosine = F.cosine_similarity(predicted, target, dim=-1).mean()
    parts, match = {"mse": mse, "cosine": cosine}, None
    loss = settings.mse_weight * mse + settings.cosine_weight * (1 - cosine)
    through_head = settings.kl_weight or settings.loss != "ce_cosine"
    if through_head or not torch.is_grad_enabled():  # the head is most of the cost: skipped where it is neither learned nor reported
        logits, target_logits = predicted @ head.T, target @ head.T
        match = logits.argmax(-1) == target_logits.argmax(-1)
        log_q, log_p = F.log_softmax(logits, -1), F.log_softmax(target_logits, -1)
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        parts |= {"kl": kl, "token_match": match.float().mean()}
        if settings.loss == "ce_cosine":
            loss = loss + settings.kl_weight * kl
        elif settings.loss == "ce":
            loss = kl
        else:
            loss = TV_WEIGHT * total_variation(log_q, log_p.exp()).mean() + (1 - TV_WEIGHT) * kl
    return loss, {"loss": loss, **parts}, match


def total_variation(log_q: Tensor, p: Tensor) -> Tensor:
    """Total variation distance [..] of q, given as log probabilities [.., v], and p [.., v]: the chance that a drawn token is rejected."""
    return 0.5 * (log_q.exp() - p).abs().sum(-1)


def channel_std(states: Tensor) -> Tensor:
    """Standard deviation [d] of each channel of states [p, d], clamped so that dividing by it is safe."""
    return states.std(0, correction=0).clamp(min=1e-4)


def mean_variance(states: Tensor) -> float:
    """Variance of states [p, d], averaged over channels and clamped above zero. The squared error is reported relative to it."""
    return max(float(states.var(0, correction=0).mean()), 1e-8)


def mixed_precision(device: str, on_cpu: bool = False) -> AbstractContextManager[None]:
    """Autocast to bfloat16 on a GPU, and with `on_cpu` on a CPU that multiplies it natively; a no-op elsewhere.

    With AVX512-BF16, products of training's shapes take a quarter of their time in float32.
    """
    cuda = device.startswith("cuda")
    return torch.autocast("cuda" if cuda else "cpu", torch.bfloat16, enabled=cuda or (on_cpu and _has_native_bfloat16()))


def _has_native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; False where torch cannot tell."""
    tests = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(test() for test in tests if test is not None)


# ------------------------------------------------------------------------------------------------------------ the hidden adapter


@dataclass(frozen=True)
class Scale:
    """Channel scales of both state spaces.

    Channels of a residual stream differ in size by orders of magnitude, so the bottleneck is trained on standardized states. `folded` moves
    the scales into its weights, and the adapter is saved in that form.

    Args:
        mean: [d_draft], mean of the drafter's states.
        std: [d_draft], their standard deviation.
        std_target: [d_target], standard deviation of the target's states.
    """

    mean: Tensor
    std: Tensor
    std_target: Tensor

    def standardized(self, g: Tensor) -> Tensor:
        """The drafter's states g [.., d_draft] with mean 0 and standard deviation 1."""
        return (g - self.mean) / self.std

    def wanted_correction(self, adapter: HiddenAdapter, g: Tensor, v: Tensor) -> Tensor:
        """The standardized bottleneck output that maps g exactly to v.

        Args:
            adapter: Decides whether there is a residual path.
            g: [.., d_draft], the drafter's states.
            v: [.., d_target], the target's states.

        Returns:
            [.., d_target].
        """
        return (v - g[..., -adapter.d_target :] if adapter.residual else v) / self.std_target

    def predict(self, adapter: HiddenAdapter, g: Tensor) -> Tensor:
        """The target's states [.., d_target] from g [.., d_draft], by an adapter that reads standardized states."""
        correction = adapter.correction(self.standardized(g)) * self.std_target
        return g[..., -adapter.d_target :] + correction if adapter.residual else correction

    def folded(self, adapter: HiddenAdapter) -> HiddenAdapter:
        """A copy of the adapter whose output on raw states equals `predict`."""
        plain = copy.deepcopy(adapter)
        with torch.no_grad():
            plain.down.weight /= self.std
            plain.down.bias.sub_(plain.down.weight @ self.mean)
            plain.up.weight *= self.std_target[:, None]
            plain.up.bias.mul_(self.std_target)
        return plain


@torch.no_grad()
def start_from_linear(adapter: HiddenAdapter, fit: Affine, covariance: Tensor) -> None:
    """Initialize bottleneck units in place so that they approximate a low-rank linear map; the other units get output weight zero.

    Around its inflection point √2, GELU is linear with slope 1.129 up to third order. Each unit is centered there and computes one
    coordinate of the map, scaled to a standard deviation of REACH.

    Args:
        adapter: Reads standardized states.
        fit: Standardized state -> standardized correction, of some rank.
        covariance: [d_draft, d_draft], of standardized states.
    """
    left, right = fit.factors
    r = min(len(right), adapter.bottleneck)
    left, right = left[:, -r:], right[-r:]  # the last factors explain most variance
    std = ((covariance.float() @ left) * left).sum(0).clamp(min=1e-12).sqrt()  # rounding may make a zero variance negative
    middle = math.sqrt(2.0)
    slope = 0.5 * (1 + math.erf(1.0)) + middle * math.exp(-1.0) / math.sqrt(2 * math.pi)
    adapter.down.weight[:r] = (left / std).T * REACH
    adapter.down.bias[:r] = middle - adapter.down.weight[:r] @ fit.mean_x
    adapter.up.weight.zero_()
    adapter.up.weight[:, :r] = (right * std[:, None]).T / (REACH * slope)
    adapter.up.bias.copy_(fit.mean_y - adapter.up.weight[:, :r].sum(1) * F.gelu(torch.tensor(middle)))


def training_head(head: Tensor, states: HiddenStates) -> tuple[Tensor, Tensor]:
    """The rows of the LM head that a loss reads, [n, d_target], and their token ids [n].

    Of a vocabulary above `MOST_IDS` these are the ids in the training texts: an epoch over 49,152 ids takes thirty times as long as one
    over the 1,602 that the language pair's texts hold. Validation scores are then over these ids as well, and slightly too high.

    Args:
        head: [v, d_target], weight of the target's LM head.
        states: The training texts.
    """
    if len(head) <= MOST_IDS:
        return head, torch.arange(len(head))
    found, count = states.token_ids[states.mask].unique(return_counts=True)
    ids = found[count.argsort(descending=True, stable=True)[:MOST_IDS]].sort().values
    return head[ids.to(head.device)], ids


def train_hidden(
    states: HiddenStates,
    validation: HiddenStates,
    head: Tensor,
    settings: TrainSettings,
    checkpoint: Checkpoint | None = None,
    share: ProcessShare | None = None,
) -> tuple[HiddenAdapter, History]:
    """Train the bottleneck adapter on single states.

    `settings.linear_units` of its units start as the best linear map of that rank; with 0 the adapter starts as the identity.

    Args:
        states: To train on.
        validation: To choose the best epoch by.
        head: [v, d_target], weight of the target's LM head.
        settings: Hyperparameters.
        checkpoint: To resume from and to write; None for neither.
        share: This process's part of the training.

    Returns:
        The best epoch's adapter and the scores of all epochs.
    """
    share = share or ProcessShare()
    torch.manual_seed(settings.seed)
    head, ids = training_head(head, states)
    head = head.float().to(settings.device)

    def row_batches(some: HiddenStates, batches: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in batches:
            mask, draft, target = some.mask[rows], some.draft[rows], some.target[rows]
            some.refuse_non_finite(rows, draft, target)
            yield draft[mask].float().to(settings.device), target[mask].float().to(settings.device)

    sample_g, sample_v = next(row_batches(states, shuffled(len(states.draft), 512, 0, 0)))
    scale = Scale(sample_g.mean(0), channel_std(sample_g), channel_std(sample_v))
    variance = mean_variance(sample_v)
    adapter = HiddenAdapter(states.draft.shape[-1], states.target.shape[-1], settings.bottleneck).to(settings.device)

    def score(g: Tensor, v: Tensor) -> Batch:
        with mixed_precision(settings.device):
            return Batch(*losses(scale.predict(adapter, g), v, head, variance, settings), len(g))

    def epoch(number: int) -> Iterator[Batch]:
        batches = tuple(map(share.rows, shuffled(len(states.draft), settings.batch_size, settings.seed, number)))
        for rows, (g, v) in zip(batches, row_batches(states, batches), strict=True):
            yield score(g, v)._replace(rows=tuple(rows.tolist()))

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        plain, batches = scale.folded(adapter), torch.arange(len(validation.draft)).split(256)
        found = [compared(plain(g), v, head, variance, settings) for g, v in row_batches(validation, batches)]
        matches = [match.cpu() for _, _, match in found if match is not None]
        bits = torch.zeros_like(validation.mask).masked_scatter(validation.mask, torch.cat(matches)) & torch.isin(validation.token_ids, ids)
        scores = mean_over_positions((len(match), parts) for (_, parts, _), match in zip(found, matches, strict=True))
        return {**scores, "tokens_per_pass": tokens_per_pass(bits, validation.mask, validation.ended)}

    if rank := min(settings.linear_units, settings.bottleneck, adapter.d_target):
        pairs = (
            (scale.standardized(p.draft), scale.wanted_correction(adapter, p.draft, p.target))
            for p in positions(states, settings.device, 4096)
        )
        statistics, starts = moments(pairs, adapter.d_draft, adapter.d_target, settings.device), {}
        for strength in RIDGE_STRENGTHS:
            start_from_linear(adapter, statistics.ridge(strength, rank), statistics.covariance())
            starts[evaluate()["loss"]] = copy.deepcopy(adapter.state_dict())
        adapter.load_state_dict(starts[min(starts)])
    steps = math.ceil(len(states.draft) / settings.batch_size)
    return fit(adapter, epoch, steps, evaluate, lambda: scale.folded(adapter), settings, states.names, checkpoint, share)


# ----------------------------------------------------------------------------------------------------------- the chained adapter


def train_chained(
    states: HiddenStates,
    validation: HiddenStates,
    head: Tensor,
    embeddings: Tensor,
    settings: TrainSettings,
    checkpoint: Checkpoint | None = None,
    share: ProcessShare | None = None,
) -> tuple[ChainedAdapter, History]:
    """Train the chained adapter on its own roll-outs, so that training inputs look like those of chained drafting.

    Args:
        states: To train on, with event states.
        validation: To choose the best epoch by.
        head: [v, d_target], weight of the target's LM head.
        embeddings: [v, d_target], the target's input embeddings.
        settings: Hyperparameters.
        checkpoint: To resume from and to write; None for neither.
        share: This process's part of the training.

    Returns:
        The best epoch's adapter and the scores of all epochs.
    """
    share = share or ProcessShare()
    torch.manual_seed(settings.seed)
    head, ids = (x.to(settings.device) for x in training_head(head, states))
    head, embeddings = head.float(), embeddings.float().to(settings.device)
    if int(states.lengths.max()) < 2 or int(validation.lengths.max()) < 2:
        raise UserError("the chained adapter learns from texts of at least two tokens; these have one.")
    sample = next(text_batches(states, shuffled(len(states.target), 512, 0, 0), settings.device))
    real = sample.states[sample.mask]
    variance = mean_variance(real)
    num_events, d_event = sample.events.shape[1:]
    adapter = ChainedAdapter(states.target.shape[-1], d_event, num_events, settings.bottleneck, settings.blind).to(settings.device)
    adapter.standardize(real, embeddings, sample.events)

    decay = STEP_DECAY if settings.loss == "tv" else 1.0

    def score(texts: Texts, num_drafts: int = 0) -> tuple[Batch, Tensor]:
        """Loss and parts as means over the positions of all roll-out steps, and correct draft tokens [b, s, num_drafts] of rounds."""
        found, bits = [], torch.zeros(*texts.mask.shape, num_drafts, dtype=torch.bool, device=texts.mask.device)
        steps = max(settings.roll_out_steps, num_drafts)
        with mixed_precision(settings.device):
            for k, (expected, wanted, mask) in enumerate(chained_predictions(adapter, texts, embeddings, steps)):
                here = slice(1, 1 + mask.shape[1])  # a round at t follows position t - 1
                if k < settings.roll_out_steps and mask.any():
                    found.append((decay**k * int(mask.sum()), losses(expected[mask], wanted[mask], head, variance, settings)[1]))
                if k < num_drafts:
                    reached = mask & bits[:, here, :k].all(-1)
                    bits[:, here, k][reached] = ids[(expected[reached] @ head.T).argmax(-1)] == texts.token_ids[:, 1 + k :][reached]
        n = sum(number for number, _ in found)
        parts = {name: torch.stack([number / n * some[name] for number, some in found]).sum() for name in found[0][1]}
        return Batch(parts["loss"], parts, n), bits

    learned, held_out = ((some.lengths > 1).nonzero()[:, 0] for some in (states, validation))  # the others have nothing to predict

    def epoch(number: int) -> Iterator[Batch]:
        batches = tuple(share.rows(learned[some]) for some in shuffled(len(learned), settings.batch_size, settings.seed, number))
        for rows, texts in zip(batches, text_batches(states, batches, settings.device), strict=True):
            yield score(texts)[0]._replace(rows=tuple(rows.tolist()))

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        found, bits = [], torch.zeros(*validation.mask.shape, ROUND_DRAFT_TOKENS, dtype=torch.bool)
        batches = held_out.split(64)
        for rows, texts in zip(batches, text_batches(validation, batches, settings.device), strict=True):
            batch, correct = score(texts, ROUND_DRAFT_TOKENS)
            found.append((batch.n, batch.parts))
            bits[rows, : correct.shape[1]] = correct.cpu()
        return {**mean_over_positions(found), "tokens_per_pass": tokens_per_pass(bits, validation.mask, validation.ended)}

    steps = math.ceil(len(learned) / settings.batch_size)
    return fit(adapter, epoch, steps, evaluate, adapter.folded, settings, states.names, checkpoint, share)
