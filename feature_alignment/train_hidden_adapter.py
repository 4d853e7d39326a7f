"""Task 1.3. Train the adapter so that A(g[t]) predicts v[t], and argmax W A(g[t]) the token that v[t] emits.

reads   hidden_states/<train and validation split>, vl_lm_head.pt
writes  adapter/adapter.pt (the best epoch on validation), adapter/history.jsonl, adapter/training_curves.png

    python feature_alignment/train_hidden_adapter.py --config configs/demo.yaml
    python feature_alignment/train_hidden_adapter.py --config configs/demo.yaml --kl_weight 0      # MSE + cosine alone
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_alignment.config import Common, parse_config
from feature_alignment.console import UserError, print_json_line, print_table, run

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from feature_alignment.artifacts import HiddenStates
    from feature_alignment.hidden_adapter import HiddenAdapter


@dataclass(frozen=True)
class TrainConfig(Common):
    """Train the hidden adapter on paired hidden states.

    Args:
        train_split: hidden states to learn from
        validation_split: hidden states that choose the best epoch; other clips than the training's
        bottleneck: width in the middle of the adapter
        num_epochs: passes over the training rows
        batch_size: rows (texts) per step
        lr: peak learning rate of AdamW, after a warm-up over the first 5 % of the steps, then cosine decay
        weight_decay: of AdamW
        mse_weight: weight of the squared error, relative to the variance of the target's states
        cosine_weight: weight of 1 - cos(A(g), v)
        kl_weight: weight of KL(softmax W v || softmax W A(g)) through the target's frozen head; 0 is the plain recipe
    """

    train_split: str = "train"
    validation_split: str = "validation"
    bottleneck: int = 256
    num_epochs: int = 20
    batch_size: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.01
    mse_weight: float = 1.0
    cosine_weight: float = 1.0
    kl_weight: float = 0.0


def losses(predicted: Tensor, target: Tensor, head: Tensor, variance: float, cfg: TrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The training loss and what goes into the history, means over positions.

    predicted, target: [p, d_target]; head: W [v, d_target]
    """
    import torch
    from torch.nn import functional as F

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


def row_batches(states: HiddenStates, size: int, device: str, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions of `size` rows at a time, shuffled by rows if a generator is given: [p, d_draft], [p, d_target] float32."""
    import torch

    n = len(states.draft)
    order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
    for rows in order.split(size):
        mask = states.mask[rows]
        yield states.draft[rows][mask].float().to(device), states.target[rows][mask].float().to(device)


def evaluate(adapter: HiddenAdapter, states: HiddenStates, head: Tensor, variance: float, cfg: TrainConfig) -> dict[str, float]:
    """Means over all positions of a split."""
    import torch

    total: dict[str, float] = {}
    positions = 0
    with torch.inference_mode():
        for g, v in row_batches(states, 256, cfg.device):
            for name, value in losses(adapter(g), v, head, variance, cfg)[1].items():
                total[name] = total.get(name, 0.0) + float(value) * len(g)
            positions += len(g)
    return {name: value / positions for name, value in total.items()}


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
        import copy

        import torch

        plain = copy.deepcopy(adapter)
        with torch.no_grad():
            plain.down.weight /= self.std
            plain.down.bias -= plain.down.weight @ self.mean
            plain.up.weight *= self.std_target[:, None]
            plain.up.bias *= self.std_target
        return plain


def train(
    train_states: HiddenStates, validation: HiddenStates, head: Tensor, cfg: TrainConfig
) -> tuple[HiddenAdapter, list[dict[str, float]]]:
    """The adapter of the epoch with the lowest validation loss, and the history of all epochs (epoch 0 is the untrained one)."""
    import math

    import torch
    from tqdm import tqdm

    from feature_alignment.hidden_adapter import HiddenAdapter

    torch.manual_seed(cfg.seed)
    generator = torch.Generator().manual_seed(cfg.seed)
    head = head.float().to(cfg.device)
    sample_g, sample_v = next(row_batches(train_states, 512, cfg.device, torch.Generator().manual_seed(0)))
    scale = Scale(sample_g.mean(0), sample_g.std(0).clamp(min=1e-4), sample_v.std(0).clamp(min=1e-4))
    variance = float(sample_v.var(0).mean())
    adapter = HiddenAdapter(train_states.draft.shape[-1], train_states.target.shape[-1], cfg.bottleneck).to(cfg.device)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    steps_per_epoch = math.ceil(len(train_states.draft) / cfg.batch_size)
    steps, step = cfg.num_epochs * steps_per_epoch, 0

    def record(epoch: int, seen: dict[str, float]) -> dict[str, float]:
        scores = evaluate(scale.folded(adapter), validation, head, variance, cfg)
        return {"epoch": epoch, **{f"train_{k}": v for k, v in seen.items()}, **{f"validation_{k}": v for k, v in scores.items()}}

    history = [record(0, {})]
    best, best_loss = scale.folded(adapter), history[0]["validation_loss"]
    with tqdm(total=steps, desc="train", unit="step", disable=None) as bar:
        for epoch in range(1, cfg.num_epochs + 1):
            seen: dict[str, float] = {}
            for g, v in row_batches(train_states, cfg.batch_size, cfg.device, generator):
                for group in optimiser.param_groups:
                    warm = min(1.0, (step + 1) / max(1, steps // 20))
                    group["lr"] = cfg.lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
                loss, parts = losses(scale.predict(adapter, g), v, head, variance, cfg)
                if not torch.isfinite(loss):
                    raise UserError(f"the loss became {float(loss)} in epoch {epoch}, step {step}; try a lower --lr (now {cfg.lr}).")
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
                optimiser.step()
                step += 1
                for name, value in parts.items():
                    seen[name] = seen.get(name, 0.0) + float(value.detach()) / steps_per_epoch
                bar.update()
            history.append(record(epoch, seen))
            bar.set_postfix({k: f"{history[-1][f'validation_{k}']:.4f}" for k in ("loss", "cosine", "token_match")})
            if history[-1]["validation_loss"] < best_loss:
                best, best_loss = scale.folded(adapter), history[-1]["validation_loss"]
    return best.eval(), history


def plot_curves(history: list[dict[str, float]], path: Path) -> None:
    """Loss, cosine and token match per epoch, training and validation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from feature_alignment.artifacts import replacing

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, name in zip(axes, ("loss", "cosine", "token_match"), strict=True):
        for part, style in (("train", "--"), ("validation", "-")):
            points = [(h["epoch"], h[f"{part}_{name}"]) for h in history if f"{part}_{name}" in h]
            if points:  # the plain recipe does not look at tokens while training
                axis.plot(*zip(*points, strict=True), style, label=part)
        axis.set(xlabel="epoch", title=name.replace("_", " "))
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[0].set_yscale("log")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    cfg = parse_config(TrainConfig, argv, "train_hidden_adapter")
    if min(cfg.num_epochs, cfg.batch_size, cfg.bottleneck) < 1:
        raise UserError("--num_epochs, --batch_size and --bottleneck want at least 1.")
    import torch

    from feature_alignment import artifacts

    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    folders = {
        name: cfg.out / "hidden_states" / split for name, split in (("train", cfg.train_split), ("validation", cfg.validation_split))
    }
    states = {name: artifacts.load_hidden_states(folder) for name, folder in folders.items()}
    a, b = states["train"].meta, states["validation"].meta
    for key in ("prefix", "draft_layers", "hidden_size_draft", "hidden_size_target"):
        if a[key] != b[key]:
            raise UserError(f"training and validation states differ in {key}: {a[key]} and {b[key]}. Extract both with the same settings.")
    if set(states["train"].clips) & set(states["validation"].clips):
        raise UserError(f"splits {cfg.train_split!r} and {cfg.validation_split!r} share clips; validation must not be trained on.")
    head_path = cfg.out / "hidden_states" / "vl_lm_head.pt"
    head = artifacts.load_pt(head_path, artifacts.EXTRACT.format(split=cfg.train_split))

    out = cfg.out / "adapter"
    made_from = {k: f / "meta.json" for k, f in folders.items()} | {"vl_lm_head": head_path}
    meta = artifacts.reusable(out / "meta.json", cfg, made_from) if (out / "adapter.pt").is_file() else None
    if meta is not None:
        _show(meta, out, reused=True)
        return meta
    start = time.time()
    adapter, history = train(states["train"], states["validation"], head, cfg)
    best = min(history, key=lambda h: h["validation_loss"])
    on_validation = lambda h: {k.removeprefix("validation_"): v for k, v in h.items() if k.startswith("validation_")}  # noqa: E731
    meta = artifacts.provenance(
        "train_hidden_adapter",
        cfg,
        made_from,
        geometry=adapter.geometry,
        parameters=adapter.num_parameters,
        draft_layers=a["draft_layers"],
        prefix=a["prefix"],
        best_epoch=best["epoch"],
        validation=on_validation(best),
        untrained=on_validation(history[0]),
        seconds=time.time() - start,
    )
    artifacts.write_text(out / "history.jsonl", "".join(json.dumps(h) + "\n" for h in history))
    plot_curves(history, out / "training_curves.png")
    artifacts.save_pt(out / "adapter.pt", {"meta": meta, "state_dict": {k: v.cpu() for k, v in adapter.state_dict().items()}})
    artifacts.write_json(out / "meta.json", meta)
    _show(meta, out, reused=False)
    return meta


def _show(meta: dict[str, Any], out: Path, reused: bool) -> None:
    columns = ("loss", "mse", "cosine", "kl", "token_match")
    rows = [
        ["untrained", *[meta["untrained"][c] for c in columns]],
        [f"epoch {meta['best_epoch']}", *[meta["validation"][c] for c in columns]],
    ]
    print_table(f"adapter of {meta['parameters']:,} parameters, on validation", ("", *columns), rows)
    scores = {k: round(v, 5) for k, v in meta["validation"].items()}
    print_json_line({"parameters": meta["parameters"], **scores, "reused": reused, "written": str(out / "adapter.pt")})


if __name__ == "__main__":
    run(main)
