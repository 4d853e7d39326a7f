"""How adapters learn: the loss both share, one loop for both, and what is particular to each.

`cfg` is the TrainConfig of train_hidden_adapter everywhere.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from feature_alignment.artifacts import HiddenStates
from feature_alignment.chained_adapter import ChainedAdapter, Texts, chain_over, text_batches
from feature_alignment.console import UserError
from feature_alignment.hidden_adapter import HiddenAdapter

History = list[dict[str, float]]
Adapter = TypeVar("Adapter", bound=nn.Module)


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


def fit(
    adapter: nn.Module,
    epoch: Callable[[], Iterator[tuple[Tensor, dict[str, Tensor]]]],
    steps_per_epoch: int,
    evaluate: Callable[[], dict[str, float]],
    snapshot: Callable[[], Adapter],
    cfg: Any,
) -> tuple[Adapter, History]:
    """AdamW with warm-up and cosine decay. Returns the snapshot of the epoch with the lowest validation loss, and all epochs'
    scores (epoch 0 is the untrained adapter, so what is kept is never worse than that).

    epoch: yields (loss, parts) of every batch, once through the training rows
    """
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    steps, step = cfg.num_epochs * steps_per_epoch, 0

    def record(number: int, seen: dict[str, float]) -> dict[str, float]:
        scores = evaluate()
        return {"epoch": number, **{f"train_{k}": v for k, v in seen.items()}, **{f"validation_{k}": v for k, v in scores.items()}}

    history = [record(0, {})]
    best, best_loss = snapshot(), history[0]["validation_loss"]
    with tqdm(total=steps, desc="train", unit="step", disable=None) as bar:
        for number in range(1, cfg.num_epochs + 1):
            seen: dict[str, float] = {}
            for loss, parts in epoch():
                for group in optimiser.param_groups:
                    warm = min(1.0, (step + 1) / max(1, steps // 20))
                    group["lr"] = cfg.lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
                if not torch.isfinite(loss):
                    raise UserError(f"the loss became {float(loss)} in epoch {number}, step {step}; try a lower --lr (now {cfg.lr}).")
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
                optimiser.step()
                step += 1
                for name, value in parts.items():
                    seen[name] = seen.get(name, 0.0) + float(value.detach()) / steps_per_epoch
                bar.update()
            history.append(record(number, seen))
            bar.set_postfix({k: f"{history[-1][f'validation_{k}']:.4f}" for k in ("loss", "cosine", "token_match")})
            if history[-1]["validation_loss"] < best_loss:
                best, best_loss = snapshot(), history[-1]["validation_loss"]
    return best.eval(), history


def mean_over_positions(batches: Iterator[tuple[int, dict[str, Tensor]]]) -> dict[str, float]:
    """Scores of (number of positions, parts) batches, each weighted by its positions."""
    total: dict[str, float] = {}
    positions = 0
    for n, parts in batches:
        positions += n
        for name, value in parts.items():
            total[name] = total.get(name, 0.0) + float(value) * n
    return {name: value / positions for name, value in total.items()}


# ------------------------------------------------------------------------------------------------------------ the hidden adapter


@dataclass(frozen=True)
class Scale:
    """The scales of both spaces. Channels of a residual stream differ in size by orders of magnitude, so the bottleneck learns on
    standardised states; `folded` puts the scales into its weights, and what is saved is the plain adapter.
    """

    mean: Tensor  # [d_draft]
    std: Tensor  # [d_draft]
    std_target: Tensor  # [d_target]

    def predict(self, adapter: HiddenAdapter, g: Tensor) -> Tensor:
        change = adapter.change((g - self.mean) / self.std) * self.std_target
        return g[..., -adapter.d_target :] + change if adapter.residual else change

    def folded(self, adapter: HiddenAdapter) -> HiddenAdapter:
        """A new adapter that gives on raw states what `predict` gives."""
        plain = copy.deepcopy(adapter)
        with torch.no_grad():
            plain.down.weight /= self.std
            plain.down.bias -= plain.down.weight @ self.mean
            plain.up.weight *= self.std_target[:, None]
            plain.up.bias *= self.std_target
        return plain


def row_batches(states: HiddenStates, size: int, device: str, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions of `size` rows at a time, shuffled by rows if a generator is given: [p, d_draft], [p, d_target] float32."""
    n = len(states.draft)
    order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
    for rows in order.split(size):
        mask, draft, target = states.mask[rows], states.draft[rows], states.target[rows]
        states.refuse_non_finite(rows, draft, target)
        yield draft[mask].float().to(device), target[mask].float().to(device)


def train_hidden(states: HiddenStates, validation: HiddenStates, head: Tensor, cfg: Any) -> tuple[HiddenAdapter, History]:
    """The bottleneck adapter, state by state."""
    torch.manual_seed(cfg.seed)
    generator = torch.Generator().manual_seed(cfg.seed)
    head = head.float().to(cfg.device)
    sample_g, sample_v = next(row_batches(states, 512, cfg.device, torch.Generator().manual_seed(0)))
    scale = Scale(sample_g.mean(0), sample_g.std(0).clamp(min=1e-4), sample_v.std(0).clamp(min=1e-4))
    variance = float(sample_v.var(0).mean())
    adapter = HiddenAdapter(states.draft.shape[-1], states.target.shape[-1], cfg.bottleneck).to(cfg.device)

    def epoch() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for g, v in row_batches(states, cfg.batch_size, cfg.device, generator):
            yield losses(scale.predict(adapter, g), v, head, variance, cfg)

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        plain = scale.folded(adapter)
        batches = row_batches(validation, 256, cfg.device)
        return mean_over_positions((len(g), losses(plain(g), v, head, variance, cfg)[1]) for g, v in batches)

    steps = math.ceil(len(states.draft) / cfg.batch_size)
    return fit(adapter, epoch, steps, evaluate, lambda: scale.folded(adapter), cfg)


# ----------------------------------------------------------------------------------------------------------- the chained adapter


def train_chained(
    states: HiddenStates, validation: HiddenStates, head: Tensor, embeddings: Tensor, cfg: Any
) -> tuple[ChainedAdapter, History]:
    """The chained adapter, on its own roll-outs: at training it meets what it meets when chained."""
    torch.manual_seed(cfg.seed)
    generator = torch.Generator().manual_seed(cfg.seed)
    head, embeddings = head.float().to(cfg.device), embeddings.float().to(cfg.device)
    if int(states.lengths.max()) < 2 or int(validation.lengths.max()) < 2:
        raise UserError("the chained adapter learns from texts of at least two tokens; these have one.")
    sample = next(text_batches(states, 512, cfg.device, torch.Generator().manual_seed(0)))
    real = sample.states[sample.mask]
    variance = float(real.var(0).mean())
    num_events, d_event = states.events.shape[1:]
    adapter = ChainedAdapter(states.target.shape[-1], d_event, num_events, cfg.bottleneck, cfg.blind).to(cfg.device)
    adapter.standardise(real, embeddings, sample.events)

    def score(texts: Texts) -> tuple[int, Tensor, dict[str, Tensor]]:
        """Positions, loss and parts: means over the roll-out's steps."""
        found = [
            (int(mask.sum()), *losses(expected[mask], wanted[mask], head, variance, cfg))
            for expected, wanted, mask in chain_over(adapter, texts, embeddings, cfg.roll_out_steps)
            if mask.any()
        ]
        parts = {name: torch.stack([p[name] for _, _, p in found]).mean() for name in found[0][2]}
        return found[0][0], torch.stack([loss for _, loss, _ in found]).mean(), parts

    def epoch() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for texts in text_batches(states, cfg.batch_size, cfg.device, generator):
            yield score(texts)[1:]

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        return mean_over_positions((n, parts) for n, _, parts in map(score, text_batches(validation, 64, cfg.device)))

    steps = math.ceil(len(states.target) / cfg.batch_size)
    return fit(adapter, epoch, steps, evaluate, adapter.folded, cfg)
