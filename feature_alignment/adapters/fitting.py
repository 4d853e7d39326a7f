"""The training loop that all adapters share: early stopping, checkpoints, several processes, and batches in a reproducible order."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from feature_alignment.cli.console import UserError, progress
from feature_alignment.storage.files import load_pt, save_pt

log = logging.getLogger(__name__)

History = list[dict[str, float]]
Adapter = TypeVar("Adapter", bound=nn.Module)
SHOWN = ("tokens_per_pass", "loss", "cosine", "token_match")  # validation scores in the log of an epoch


class TrainSettings(Protocol):
    """Hyperparameters of a training; the TrainConfig of train_hidden_adapter has them, and describes each."""

    @property
    def device(self) -> str:
        """Device of this process."""

    @property
    def seed(self) -> int:
        """Of weights and batch order."""

    @property
    def num_epochs(self) -> int:
        """Most passes over the training rows."""

    @property
    def patience(self) -> int:
        """Epochs without more tokens per pass before training stops."""

    @property
    def batch_size(self) -> int:
        """Rows per step."""

    @property
    def lr(self) -> float:
        """Peak learning rate."""

    @property
    def weight_decay(self) -> float:
        """Weight decay of the optimizer."""

    @property
    def optimizer(self) -> str:
        """`adamw` or `muon`."""

    @property
    def mse_weight(self) -> float:
        """Weight of the squared error."""

    @property
    def cosine_weight(self) -> float:
        """Weight of 1 - cosine."""

    @property
    def kl_weight(self) -> float:
        """Weight of the KL divergence through the target's head."""

    @property
    def loss(self) -> str:
        """`ce_cosine`, `ce` or `tv`."""

    @property
    def bottleneck(self) -> int:
        """Width of the adapter's hidden layer."""

    @property
    def linear_units(self) -> int:
        """Units of the hidden adapter that start as a linear map."""

    @property
    def roll_out_steps(self) -> int:
        """Chained steps per position in training."""

    @property
    def blind(self) -> bool:
        """Whether the chained adapter reads no event states."""

    @property
    def tensorboard(self) -> bool:
        """Whether to log to TensorBoard."""


class ProcessShare(NamedTuple):
    """One process's share of a training: each process reads its own rows of a batch, and gradients are summed.

    Args:
        rank: Of the process.
        world: Number of processes.
    """

    rank: int = 0
    world: int = 1

    def rows(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch; all rows if the batch has fewer rows than there are processes."""
        return batch if len(batch) < self.world else batch[self.rank :: self.world]

    def all_reduce(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all processes, in place."""
        if self.world > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)


class Batch(NamedTuple):
    """Loss and scores of a batch.

    Args:
        loss: Scalar, mean over positions.
        parts: Name -> scalar score for the history, mean over positions.
        n: Number of positions; in a loss whose later draft steps weigh less, the sum of weights.
        rows: Rows of the split in this batch.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    n: float
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """The file from which an interrupted training resumes.

    Args:
        path: Of the file.
        identity: Hash of the settings, source files and code that it belongs to.
        resume: Whether to read an existing file.
    """

    path: Path
    identity: str
    resume: bool = True

    def load(self) -> dict[str, Any] | None:
        """The saved state, or None if there is none of this identity."""
        if not (self.resume and self.path.is_file()):
            return None
        saved: dict[str, Any] = load_pt(self.path, f"rm {self.path}")
        if saved.get("identity") == self.identity:
            return saved
        log.warning("%s belongs to other settings, sources or code; training starts from the beginning.", self.path)
        return None

    def save(self, **state: Any) -> None:
        """Write the state of a training atomically."""
        save_pt(self.path, {"identity": self.identity, **state})


def fit(
    adapter: nn.Module,
    epoch: Callable[[int], Iterator[Batch]],
    steps_per_epoch: int,
    evaluate: Callable[[], dict[str, float]],
    snapshot: Callable[[], Adapter],
    settings: TrainSettings,
    names: Sequence[str],
    checkpoint: Checkpoint | None = None,
    share: ProcessShare | None = None,
) -> tuple[Adapter, History]:
    """Train with warm-up and cosine decay, until `num_epochs` or until `patience` epochs bring no improvement on validation.

    Epoch 0 is the untrained adapter, so the result is never worse than it. What counts is stated by `best_of`. A training that is
    interrupted and resumed ends with the same bits.

    Args:
        adapter: Trained in place.
        epoch: Epoch number -> its batches, once through the training rows in an order of its own.
        steps_per_epoch: Number of these batches.
        evaluate: Scores of the adapter on the validation rows: `loss`, and `tokens_per_pass` of simulated rounds.
        snapshot: The adapter in the form in which it is saved.
        settings: Hyperparameters.
        names: Sample ids of the training rows, for error messages.
        checkpoint: To resume from and to write; None for neither.
        share: This process's part of the training.

    Returns:
        The snapshot of the best epoch, and the scores of all epochs.

    Raises:
        UserError: If the loss becomes infinite or NaN.
    """
    share = share or ProcessShare()
    log_epoch = epoch_logger(settings.tensorboard, checkpoint if share.rank == 0 else None)
    optimizers = optimizers_of(adapter, settings)
    steps = settings.num_epochs * steps_per_epoch

    def record(number: int, seen: dict[str, float]) -> dict[str, float]:
        scores = evaluate()
        return {"epoch": number, **{f"train_{k}": v for k, v in seen.items()}, **{f"validation_{k}": v for k, v in scores.items()}}

    saved = checkpoint.load() if checkpoint else None
    if saved:
        adapter.load_state_dict(saved["adapter"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        history, best = saved["history"], saved["best"]
    else:
        history, best = [record(0, {})], copy.deepcopy(adapter.state_dict())
    best_epoch = best_of(history)["epoch"]
    with progress(total=steps, first=share.rank == 0, initial=(len(history) - 1) * steps_per_epoch, desc="train", unit="step") as bar:
        for number in range(len(history), settings.num_epochs + 1):
            if number - 1 - best_epoch >= settings.patience:
                break
            seen: dict[str, float] = {}
            for i, batch in enumerate(epoch(number)):
                step = (number - 1) * steps_per_epoch + i
                warm = min(1.0, (step + 1) / max(1, steps // 20))
                for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                    group["lr"] = settings.lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
                if not torch.isfinite(batch.loss):
                    examples = ", ".join(str(names[row]) for row in batch.rows[:3])
                    raise UserError(
                        f"the loss became {float(batch.loss.detach())} in epoch {number}, step {step}, on {len(batch.rows)} samples "
                        f"({examples}, …); try a lower --lr (now {settings.lr})."
                    )
                all_positions = torch.tensor(float(batch.n), device=batch.loss.device)
                share.all_reduce(all_positions)
                adapter.zero_grad()
                (batch.loss * (batch.n / all_positions)).backward()
                share.all_reduce(*(p.grad for p in adapter.parameters() if p.grad is not None))
                nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                for name, value in batch.parts.items():
                    seen[name] = seen.get(name, 0.0) + float(value.detach()) / steps_per_epoch
                bar.update()
            history.append(record(number, seen))
            log_epoch(history[-1])
            if best_of(history) is history[-1]:
                best, best_epoch = copy.deepcopy(adapter.state_dict()), number
            _show(history[-1], best_epoch, settings.num_epochs, bar, share.rank == 0)
            if checkpoint and share.rank == 0:
                states = [optimizer.state_dict() for optimizer in optimizers]
                checkpoint.save(adapter=adapter.state_dict(), optimizers=states, best=best, history=history)
    adapter.load_state_dict(best)
    return snapshot().eval(), history


def optimizers_of(adapter: nn.Module, settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """The optimizers of an adapter's parameters: AdamW for all, or Muon for the weights of linear layers and AdamW for the rest.

    Muon (Jordan et al. 2024) gives each step of a weight matrix singular values near 1; scaled to the size of AdamW's steps
    (Liu et al. 2502.16982) it takes AdamW's learning rate and weight decay.
    """
    linear = [m.weight for m in adapter.modules() if isinstance(m, nn.Linear)] if settings.optimizer == "muon" else []
    of_muon = {id(p) for p in linear}
    rest = [p for p in adapter.parameters() if id(p) not in of_muon]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)]
    if linear:
        optimizers.append(torch.optim.Muon(linear, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _show(scores: dict[str, float], best_epoch: float, num_epochs: int, bar: Any, first: bool) -> None:
    """Show the validation scores of an epoch in the progress bar, or as a log line where there is no bar."""
    shown = {k: f"{scores[f'validation_{k}']:.4f}" for k in SHOWN if f"validation_{k}" in scores}
    bar.set_postfix(shown)
    if bar.disable and first:
        text = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())
        log.info("epoch %d of %d on validation: %s; best so far: epoch %d", scores["epoch"], num_epochs, text, best_epoch)


def best_of(history: History) -> dict[str, float]:
    """The scores of the best epoch: most tokens per pass on validation, then the lowest loss; the earliest of equal ones."""
    return min(history, key=lambda h: (-h.get("validation_tokens_per_pass", 0.0), h["validation_loss"]))


def epoch_logger(enabled: bool, checkpoint: Checkpoint | None) -> Callable[[dict[str, float]], None]:
    """A function that logs the scores of an epoch to TensorBoard.

    Args:
        enabled: Whether to log; a no-op otherwise.
        checkpoint: The log is written to tensorboard/ next to it; None logs nothing.

    Raises:
        UserError: If the tensorboard package is missing.
    """
    if not enabled or checkpoint is None:
        return lambda scores: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the tensorboard package. Type:\n  pip install tensorboard") from None
    writer = SummaryWriter(str(checkpoint.path.parent / "tensorboard"))

    def log_scores(scores: dict[str, float]) -> None:
        for name, value in scores.items():
            writer.add_scalar(name.replace("_", "/", 1), value, int(scores["epoch"]))
        writer.flush()

    return log_scores


def mean_over_positions(batches: Iterable[tuple[float, dict[str, Tensor]]], share: ProcessShare | None = None) -> dict[str, float]:
    """Average scores over batches of (number of positions, scores), each weighted by its positions, of all processes."""
    total: dict[str, float] = {}
    number, device = 0.0, torch.device("cpu")
    for n, parts in batches:
        number += n
        for name, value in parts.items():
            total[name], device = total.get(name, 0.0) + float(value) * n, value.device
    sums = torch.tensor([number, *total.values()], dtype=torch.float64, device=device)  # where the processes exchange tensors
    (share or ProcessShare()).all_reduce(sums)
    return dict(zip(total, (sums[1:] / sums[0]).tolist(), strict=True))


def shuffled(n: int, size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Batches of shuffled rows, in an order that depends on the seed and the epoch alone.

    Args:
        n: Number of rows.
        size: Rows per batch; the last batch may be smaller.
        seed: Of the run.
        epoch: Number of the epoch.

    Returns:
        Tensors [size] int64.
    """
    generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
    batches: tuple[Tensor, ...] = torch.randperm(n, generator=generator).split(size)
    return batches
