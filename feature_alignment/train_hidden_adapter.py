"""Task 1.3. Train an adapter so that it predicts v[t], and its argmax through W the token that v[t] emits.

    hidden    A(g[t]) = v̂[t]                              from EventGPT's state on the same text: the bottleneck of task 1.2,
                                                          begun as a low-rank linear map, taught through the target's head too
    plain     the same adapter by TASKS.md's recipe       begun as the identity, squared error and cosine only
    chained   f(v[t-1], x[t-1], memory, events) = v̂[t]    from the target's own last state and what EventGPT saw of the clip
    attending the same by a transformer layer             over its own past, the events, the target's states of its prompt, and what
                                                          n-gram tables of the training answers propose

reads   hidden_states/<train and validation split>, vl_lm_head.pt; for `chained` also egpt_event_states.pt, vl_embeddings.pt, for
        `attending` vl_prompt_states.pt as well
writes  adapter/adapter.pt (the best epoch on validation), adapter/history.jsonl, adapter/training_curves.png;
        for the others the same under plain_adapter/, chained_adapter/ and attending_adapter/

A killed run goes on at its last whole epoch. Several GPUs: `torchrun --nproc_per_node 2 feature_alignment/train_hidden_adapter.py …`

    python feature_alignment/train_hidden_adapter.py --config configs/demo.yaml
    python feature_alignment/train_hidden_adapter.py --config configs/demo.yaml --adapter chained
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from feature_alignment.cli.advice import command_for
from feature_alignment.cli.config import Common, parse_config
from feature_alignment.cli.console import UserError, print_json_line, print_table, run


@dataclass(frozen=True)
class TrainConfig(Common):
    """Train an adapter on paired hidden states and keep its best epoch. Reads hidden_states/ of two splits; writes adapter.pt,
    history.jsonl and training_curves.png under adapter/, plain_adapter/, chained_adapter/ or attending_adapter/. A killed run goes on at
    its last epoch.

    Args:
        adapter: hidden maps EventGPT's state on the same text; plain is the same by TASKS.md's recipe, for comparison; chained goes on
            from the target's own last state; attending does so by attention, reads the prompt too and is told what n-gram tables propose
        blind: chained and attending only: without EventGPT's event states, to see what they add; kept apart under <adapter>_adapter_blind/
        without: attending only: other parts it does without, to see what they add; kept apart as well
        train_split: hidden states to learn from
        validation_split: hidden states that choose the best epoch; other clips than the training's
        bottleneck: width in the middle of the adapter
        linear_units: hidden only: how many units of the bottleneck begin as the best linear map of that rank; 0 begins as the identity
        roll_out_steps: chained and attending only: how many of its own drafts in a row it is trained on
        origins: attending only: how many places of each text a step drafts from, by chance
        soft_targets: attending only: share of the target's distribution, against its token, in the cross-entropy that is learned from
        dropout: attending only
        num_epochs: passes over the training rows
        patience: stop after so many epochs without a lower validation loss
        batch_size: rows (texts) per step
        lr: peak learning rate of AdamW, after a warm-up over the first 5 % of the steps, then cosine decay
        weight_decay: of AdamW
        mse_weight: weight of the squared error, relative to the variance of the target's states
        cosine_weight: weight of 1 - cos(A(g), v)
        tensorboard: show every epoch in TensorBoard too, from tensorboard/ beside the adapter; history.jsonl is always written
        kl_weight: weight of KL(softmax W v || softmax W A(g)) through the target's frozen head; plain has none
    """

    adapter: Literal["hidden", "plain", "chained", "attending"] = "hidden"
    blind: bool = False
    without: list[Literal["prompt", "candidates"]] = field(default_factory=list)
    train_split: str = "train"
    validation_split: str = "validation"
    bottleneck: int = 256
    linear_units: int = 32
    roll_out_steps: int = 3
    origins: int = 16
    soft_targets: float = 0.5
    dropout: float = 0.15
    num_epochs: int = 20
    patience: int = 10
    batch_size: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.01
    mse_weight: float = 1.0
    cosine_weight: float = 1.0
    kl_weight: float = 0.3
    tensorboard: bool = False


def plot_curves(history: list[dict[str, float]], path: Path) -> None:
    """Loss, cosine and token match per epoch, training and validation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from feature_alignment.storage.artifacts import replacing

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
    cfg = parse_config(TrainConfig, argv, "train_hidden_adapter", variant="adapter")
    from contextlib import nullcontext

    from feature_alignment.storage.processes import claimed, processes

    rank, world, device, wait = processes(cfg.device)
    with claimed(adapter_folder(cfg)) if rank == 0 else nullcontext():
        meta = train(cfg, rank, world, device, wait)
        wait()  # nobody leaves before all is written
    return meta


def adapter_folder(cfg: TrainConfig) -> Path:
    """Where the adapter goes; one that does without some of its parts is kept apart."""
    without = ["blind"] * cfg.blind + [f"without_{part}" for part in cfg.without]
    apart = without if cfg.adapter in ("chained", "attending") else []
    return cfg.out / "_".join(["adapter" if cfg.adapter == "hidden" else f"{cfg.adapter}_adapter", *apart])


def train(cfg: TrainConfig, rank: int, world: int, device: str, wait: Callable[[], None]) -> dict[str, Any]:
    """Train, or reuse what is there, as process `rank` of `world`; returns the adapter's meta."""
    import torch

    from feature_alignment.adapters import attending_training, fitting, training
    from feature_alignment.storage import artifacts

    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    attending, folder = cfg.adapter == "attending", cfg.out / "hidden_states"
    chains = attending or cfg.adapter == "chained"
    if cfg.adapter == "plain":
        cfg = dataclasses.replace(cfg, kl_weight=0.0, linear_units=0)
    splits = {"train": folder / cfg.train_split, "validation": folder / cfg.validation_split}
    states = {name: artifacts.load_hidden_states(split, cfg.draft_layers, chains, attending) for name, split in splits.items()}
    a, b = states["train"].meta, states["validation"].meta
    for key in ("prefix", "draft_layers", "hidden_size_draft", "hidden_size_target"):
        if a[key] != b[key]:
            raise UserError(f"training and validation states differ in {key}: {a[key]} and {b[key]}. Extract both with the same settings.")
    if set(states["train"].clips) & set(states["validation"].clips):
        raise UserError(f"splits {cfg.train_split!r} and {cfg.validation_split!r} share clips; validation must not be trained on.")
    weights = {name: folder / f"{name}.pt" for name in (("vl_lm_head", "vl_embeddings") if chains else ("vl_lm_head",))}

    out = adapter_folder(cfg)
    made_from = {k: split / "meta.json" for k, split in splits.items()} | weights
    identity = artifacts.identity_of("train_hidden_adapter", cfg, made_from)
    meta = artifacts.reusable(out / "meta.json", cfg, identity, cfg.ignore_code) if (out / "adapter.pt").is_file() else None
    if meta is not None:
        return _show(meta, out, reused=True) if rank == 0 else meta
    wait()  # everyone has looked before anything changes
    start = time.time()
    matrices = [artifacts.load_pt(path, command_for("extract_hidden_states", split=cfg.train_split)) for path in weights.values()]
    ways = {"chained": training.train_chained, "attending": attending_training.train_attending}
    learn: Callable[..., tuple[Any, fitting.History]] = ways.get(cfg.adapter, training.train_hidden)
    unfinished = fitting.Checkpoint(out / "unfinished.pt", identity.hash, cfg.resume)
    here = dataclasses.replace(cfg, device=device)
    adapter, history = learn(states["train"], states["validation"], *matrices, here, unfinished, fitting.Part(rank, world))
    best = min(history, key=lambda h: h["validation_loss"])
    on_validation = lambda h: {k.removeprefix("validation_"): v for k, v in h.items() if k.startswith("validation_")}  # noqa: E731
    meta = artifacts.provenance(
        "train_hidden_adapter",
        cfg,
        made_from,
        identity,
        geometry=adapter.geometry,
        parameters=adapter.num_parameters,
        weights_hash=artifacts.weights_hash(adapter.state_dict()),
        draft_layers=a["draft_layers"],
        prefix=a["prefix"],
        best_epoch=best["epoch"],
        epochs=history[-1]["epoch"],
        validation=on_validation(best),
        untrained=on_validation(history[0]),
        seconds=time.time() - start,
    )
    if rank == 0:
        artifacts.write_text(out / "history.jsonl", "".join(json.dumps(h) + "\n" for h in history))
        plot_curves(history, out / "training_curves.png")
        artifacts.save_pt(out / "adapter.pt", {"meta": meta, "state_dict": {k: v.cpu() for k, v in adapter.state_dict().items()}})
        artifacts.write_sealed(out / "meta.json", meta, ("adapter.pt", "history.jsonl", "training_curves.png"))
        unfinished.path.unlink(missing_ok=True)
        _show(meta, out, reused=False)
    return meta


def _show(meta: dict[str, Any], out: Path, reused: bool) -> dict[str, Any]:
    columns = ("loss", "mse", "cosine", "kl", "token_match")
    start = "linear map" if meta["config"]["adapter"] == "hidden" and meta["config"]["linear_units"] else "untrained"
    rows = [
        [start, *[meta["untrained"][c] for c in columns]],
        [f"epoch {meta['best_epoch']} of {meta['epochs']}", *[meta["validation"][c] for c in columns]],
    ]
    if meta["best_epoch"] == 0:
        rows[1][0] = "training did not help: the start is kept"
    print_table(f"{meta['config']['adapter']} adapter of {meta['parameters']:,} parameters, on validation", ("", *columns), rows)
    scores = {k: round(v, 5) for k, v in meta["validation"].items()}
    print_json_line({"parameters": meta["parameters"], **scores, "reused": reused, "written": str(out / "adapter.pt")})
    return meta


if __name__ == "__main__":
    run(main)
