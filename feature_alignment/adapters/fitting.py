"""The training loop that all adapters share: early stopping, checkpoints, several processes, and batches in a reproducible order.

`cfg` is the TrainConfig of train_hidden_adapter.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from feature_alignment.cli.console import UserError, progress
from feature_alignment.storage.files import load_pt, save_pt

log = logging.getLogger(__name__)

History = list[dict[str, float]]
Adapter = TypeVar("Adapter", bound=nn.Module)


class Part(NamedTuple):
    """Rank of a training process and number of processes. Each process reads its own rows of a batch; gradients are summed."""

    rank: int = 0
    of: int = 1

    def rows(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch; all rows if the batch has fewer rows than there are processes."""
        return batch if len(batch) < self.of else batch[self.rank :: self.of]

    def add(self, *tensors: Tensor) -> None:
        """Replace every tensor by its sum over all processes, in place."""
        if self.of > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)


class Batch(NamedTuple):
    """The loss of a batch and its scores for the history, as means over the `n` positions of `rows`."""

    loss: Tensor
    parts: dict[str, Tensor]
    n: int
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """The file from which an interrupted training resumes. identity: hash of the settings, source files and code that it belongs to"""

    path: Path
    identity: str
    resume: bool = True

    def load(self) -> dict[str, Any] | None:
        if not (self.resume and self.path.is_file()):
            return None
        saved = load_pt(self.path, f"rm {self.path}")
        if saved.get("identity") == self.identity:
            return saved
        log.warning("%s is of other settings, sources or code; training starts over.", self.path)
        return None

    def save(self, **state: Any) -> None:
        save_pt(self.path, {"identity": self.identity, **state})


def fit(
    adapter: nn.Module,
    epoch: Callable[[int], Iterator[Batch]],
    steps_per_epoch: int,
    evaluate: Callable[[], dict[str, float]],
    snapshot: Callable[[], Adapter],
    cfg: Any,
    names: Sequence[str],
    checkpoint: Checkpoint | None = None,
    part: Part | None = None,
) -> tuple[Adapter, History]:
    """AdamW with warm-up and cosine decay, until cfg.num_epochs or until cfg.patience epochs have brought no lower validation loss.

    Returns the snapshot of the epoch with the lowest validation loss, and all epochs' scores. Epoch 0 is the adapter as it was given,
    so what is kept is never worse than that. Stopped at any moment and started again, it ends with the same bits.

    epoch: its number -> every batch, once through the training rows in that epoch's own order
    names: sample ids of the training rows
    """
    part = part or Part()
    show = curves(cfg, checkpoint if part.rank == 0 else None)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    steps = cfg.num_epochs * steps_per_epoch

    def record(number: int, seen: dict[str, float]) -> dict[str, float]:
        scores = evaluate()
        return {"epoch": number, **{f"train_{k}": v for k, v in seen.items()}, **{f"validation_{k}": v for k, v in scores.items()}}

    saved = checkpoint.load() if checkpoint else None
    if saved:
        adapter.load_state_dict(saved["adapter"])
        optimiser.load_state_dict(saved["optimiser"])
        history, best = saved["history"], saved["best"]
    else:
        history, best = [record(0, {})], copy.deepcopy(adapter.state_dict())
    best_epoch = min(history, key=lambda h: h["validation_loss"])["epoch"]
    with progress(total=steps, first=part.rank == 0, initial=(len(history) - 1) * steps_per_epoch, desc="train", unit="step") as bar:
        for number in range(len(history), cfg.num_epochs + 1):
            if number - 1 - best_epoch >= cfg.patience:
                break
            seen: dict[str, float] = {}
            for i, batch in enumerate(epoch(number)):
                step = (number - 1) * steps_per_epoch + i
                for group in optimiser.param_groups:
                    warm = min(1.0, (step + 1) / max(1, steps // 20))
                    group["lr"] = cfg.lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
                if not torch.isfinite(batch.loss):
                    among = ", ".join(str(names[row]) for row in batch.rows[:3])
                    raise UserError(
                        f"the loss became {float(batch.loss.detach())} in epoch {number}, step {step}, on {len(batch.rows)} samples "
                        f"({among}, …); try a lower --lr (now {cfg.lr})."
                    )
                everyone = torch.tensor(float(batch.n), device=batch.loss.device)
                part.add(everyone)
                optimiser.zero_grad()
                (batch.loss * (batch.n / everyone)).backward()
                part.add(*(p.grad for p in adapter.parameters() if p.grad is not None))
                nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
                optimiser.step()
                for name, value in batch.parts.items():
                    seen[name] = seen.get(name, 0.0) + float(value.detach()) / steps_per_epoch
                bar.update()
            history.append(record(number, seen))
            show(history[-1])
            bar.set_postfix({k: f"{history[-1][f'validation_{k}']:.4f}" for k in ("loss", "cosine", "token_match")})
            if history[-1]["validation_loss"] < history[best_epoch]["validation_loss"]:
                best, best_epoch = copy.deepcopy(adapter.state_dict()), number
            if checkpoint and part.rank == 0:
                checkpoint.save(adapter=adapter.state_dict(), optimiser=optimiser.state_dict(), best=best, history=history)
    adapter.load_state_dict(best)
    return snapshot().eval(), history


def curves(cfg: Any, checkpoint: Checkpoint | None) -> Callable[[dict[str, float]], None]:
    """A function that logs the scores of an epoch to TensorBoard, in tensorboard/ next to the adapter; a no-op without cfg.tensorboard."""
    if not cfg.tensorboard or checkpoint is None:
        return lambda scores: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the tensorboard package. Type:\n  pip install tensorboard") from None
    writer = SummaryWriter(str(checkpoint.path.parent / "tensorboard"))

    def show(scores: dict[str, float]) -> None:
        for name, value in scores.items():
            writer.add_scalar(name.replace("_", "/", 1), value, int(scores["epoch"]))
        writer.flush()

    return show


def mean_over_positions(batches: Iterator[tuple[int, dict[str, Tensor]]]) -> dict[str, float]:
    """Scores of (number of positions, parts) batches, each weighted by its positions."""
    total: dict[str, float] = {}
    number = 0
    for n, parts in batches:
        number += n
        for name, value in parts.items():
            total[name] = total.get(name, 0.0) + float(value) * n
    return {name: value / number for name, value in total.items()}


def shuffled(n: int, size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Rows in batches, in an order that depends on nothing but the seed and the epoch."""
    generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
    return torch.randperm(n, generator=generator).split(size)
