"""Task 1.3. Train an adapter to predict the target's hidden state v[t], and through the LM head W the token that v[t] emits.

    hidden    A(g[t]) = v̂[t]                              from EventGPT's state on the same text: the bottleneck of task 1.2,
                                                          initialized as a low-rank linear map; the loss includes the target's head
    plain     the same adapter by TASKS.md's recipe       initialized as the identity; squared error and cosine only
    chained   f(v[t-1], x[t-1], memory, events) = v̂[t]    from the target's previous state and EventGPT's event states
    attending the same by a transformer layer             that also attends to the target's prompt states and reads the candidates of
                                                          n-gram tables of the training answers

reads   hidden_states/<train and validation split>, vl_lm_head.pt; for `chained` also egpt_event_states.pt, vl_embeddings.pt, for
        `attending` vl_prompt_states.pt as well
writes  adapter/adapter.pt (the best epoch on validation), adapter/history.jsonl, adapter/training_curves.png;
        for the others the same under plain_adapter/, chained_adapter/ and attending_adapter/; with --variant NAME under …_NAME/

An interrupted run resumes after its last epoch. Several GPUs:
    `torchrun --nproc_per_node 2 feature_alignment/train_hidden_adapter.py …`

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
from typing import TYPE_CHECKING, Any, Literal

from feature_alignment.cli.advice import command_for
from feature_alignment.cli.config import Common, parse_config
from feature_alignment.cli.console import UserError, print_json_line, print_table, run

if TYPE_CHECKING:
    from feature_alignment.storage.hidden_states import HiddenStates


@dataclass(frozen=True)
class TrainConfig(Common):
    """Train an adapter on paired hidden states and keep its best epoch.

    Reads hidden_states/ of two splits; writes adapter.pt, history.jsonl and training_curves.png under adapter/, plain_adapter/,
    chained_adapter/ or attending_adapter/. An interrupted run resumes after its last epoch.

    Args:
        adapter: hidden maps EventGPT's state on the same text; plain is the same by TASKS.md's recipe, for comparison; chained predicts
            from the target's previous state; attending does so by attention, and also reads the prompt's states and table candidates
        blind: chained and attending only: train without EventGPT's event states, to measure what they add; written to
            <adapter>_adapter_blind/
        reads_prompt: attending only: attend to the target's states on the prompt
        without: attending only: train without these inputs, to measure what they add; written to a folder of its own
        variant: name that is appended to the folder, so that the main adapter stays; measuring scores it with `--variants NAME`
        train_split: split to train on
        validation_split: split that chooses the best epoch; it must not share clips with the training split
        bottleneck: width of the adapter's hidden layer
        linear_units: hidden only: number of bottleneck units initialized as the best linear map of that rank; 0 = start as the identity
        roll_out_steps: chained and attending only: number of consecutive own drafts it is trained on
        origins: attending only: number of random positions of each text that a training step drafts from
        soft_targets: attending only: share of the target's distribution in the cross-entropy; the rest is its token
        dropout: attending only: dropout rate
        loss: ce_cosine is the loss of each adapter: cross-entropy or KL divergence, and cosine (and squared error, but for attending);
            ce the cross-entropy alone; tv 0.9 total variation and 0.1 cross-entropy, later draft steps weighing less
        num_epochs: passes over the training rows
        patience: stop after this many epochs without more tokens per pass on validation (simulated rounds of 5 draft tokens)
        batch_size: rows (texts) per step
        lr: peak learning rate, after a warm-up over the first 5 % of the steps, then cosine decay
        weight_decay: of the optimizer
        optimizer: adamw for all parameters, or muon for the weights of linear layers and adamw for the rest
        mse_weight: weight of the squared error, relative to the variance of the target's states
        cosine_weight: weight of 1 - cos(A(g), v)
        tensorboard: also log every epoch to tensorboard/ next to the adapter; history.jsonl is always written
        kl_weight: weight of KL(softmax W v || softmax W A(g)) through the target's frozen head; plain has none
    """

    adapter: Literal["hidden", "plain", "chained", "attending"] = "hidden"
    blind: bool = False
    reads_prompt: bool = True
    without: list[Literal["candidates"]] = field(default_factory=list)
    variant: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    bottleneck: int = 256
    linear_units: int = 32
    roll_out_steps: int = 3
    origins: int = 16
    soft_targets: float = 0.5
    dropout: float = 0.15
    loss: Literal["ce_cosine", "ce", "tv"] = "ce_cosine"
    num_epochs: int = 20
    patience: int = 10
    batch_size: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.01
    optimizer: Literal["adamw", "muon"] = "adamw"
    mse_weight: float = 1.0
    cosine_weight: float = 1.0
    kl_weight: float = 0.3
    tensorboard: bool = False


def plot_curves(history: list[dict[str, float]], path: Path) -> None:
    """Plot loss, cosine, token match and tokens per pass per epoch, on training and validation rows.

    Args:
        history: Scores of each epoch.
        path: PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from feature_alignment.storage.files import atomic_write

    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), layout="constrained")
    for axis, name in zip(axes, ("loss", "cosine", "token_match", "tokens_per_pass"), strict=True):
        for part, style in (("train", "--"), ("validation", "-")):
            points = [(h["epoch"], h[f"{part}_{name}"]) for h in history if f"{part}_{name}" in h]
            if points:  # training computes no rounds, and the plain recipe no token match
                axis.plot(*zip(*points, strict=True), style, label=part)
        axis.set(xlabel="epoch", title=name.replace("_", " "))
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[0].set_yscale("log")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script with these arguments, default those of the command line; returns the adapter's meta."""
    cfg = parse_config(TrainConfig, argv, "train_hidden_adapter", variant="adapter")
    from contextlib import nullcontext

    from feature_alignment.storage.processes import exclusive_lock, process_group

    rank, world, device, wait = process_group(cfg.device)
    with exclusive_lock(adapter_folder(cfg)) if rank == 0 else nullcontext():
        meta = train(cfg, rank, world, device, wait)
        wait()  # no process exits before everything is written
    return meta


def adapter_folder(cfg: TrainConfig) -> Path:
    """Folder of the adapter, its history and its curves."""
    without = ["blind"] * cfg.blind + [f"without_{part}" for part in cfg.without]
    kept = without if cfg.adapter in ("chained", "attending") else []
    name = "_".join(["adapter" if cfg.adapter == "hidden" else f"{cfg.adapter}_adapter", *kept])
    return cfg.out / (f"{name}_{cfg.variant}" if cfg.variant else name)


def first_rows(states: HiddenStates, limit: int | None) -> HiddenStates:
    """The first `limit` rows of a split, all if None."""
    n = len(states.rows)
    values = {f.name: getattr(states, f.name) for f in dataclasses.fields(states)}
    per_row = {k: v[:limit] for k, v in values.items() if v is not None and k not in ("meta", "events") and len(v) == n}
    return states if limit is None else dataclasses.replace(states, **per_row)


def _check_splits(cfg: TrainConfig, states: dict[str, HiddenStates]) -> None:
    """Raise UserError if training and validation states were extracted differently or share clips."""
    a, b = states["train"].meta, states["validation"].meta
    for key in ("prefix", "draft_layers", "hidden_size_draft", "hidden_size_target"):
        if a[key] != b[key]:
            raise UserError(f"training and validation states differ in {key}: {a[key]} and {b[key]}. Extract both with the same settings.")
    if set(states["train"].clips) & set(states["validation"].clips):
        raise UserError(f"splits {cfg.train_split!r} and {cfg.validation_split!r} share clips; validation must not be trained on.")


def train(cfg: TrainConfig, rank: int, world: int, device: str, wait: Callable[[], None]) -> dict[str, Any]:
    """Train an adapter, or reuse a trained one of the same identity.

    Args:
        cfg: Settings.
        rank: Of this process.
        world: Number of processes.
        device: Device of this process.
        wait: Blocks until all processes have called it.

    Returns:
        The adapter's meta.

    Raises:
        UserError: If the two splits share clips or were extracted with different settings.
    """
    import torch

    from feature_alignment.adapters import attending_training, fitting, training
    from feature_alignment.storage.artifacts import cached_result, provenance
    from feature_alignment.storage.files import load_pt, save_pt, weights_hash, write_hashed_json, write_text
    from feature_alignment.storage.hidden_states import load_hidden_states
    from feature_alignment.storage.identity import identity_of

    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    attending, folder = cfg.adapter == "attending", cfg.out / "hidden_states"
    chains = attending or cfg.adapter == "chained"
    if cfg.adapter == "plain":
        cfg = dataclasses.replace(cfg, kl_weight=0.0, linear_units=0)
    splits = {"train": folder / cfg.train_split, "validation": folder / cfg.validation_split}
    states = {name: load_hidden_states(split, cfg.draft_layers, events=chains, prompt=attending) for name, split in splits.items()}
    _check_splits(cfg, states)
    states["train"] = first_rows(states["train"], cfg.limit)
    weights = {name: folder / f"{name}.pt" for name in (("vl_lm_head", "vl_embeddings") if chains else ("vl_lm_head",))}

    out = adapter_folder(cfg)
    made_from = {k: split / "meta.json" for k, split in splits.items()} | weights
    identity = identity_of("train_hidden_adapter", cfg, made_from, without=("variant",))
    meta = cached_result(out / "meta.json", cfg, identity, cfg.ignore_code) if (out / "adapter.pt").is_file() else None
    if meta is not None:
        return _show(meta, out, reused=True) if rank == 0 else meta
    wait()  # all processes have checked before anything is overwritten
    start = time.time()
    matrices = [load_pt(path, command_for("extract_hidden_states", split=cfg.train_split)) for path in weights.values()]
    ways = {"chained": training.train_chained, "attending": attending_training.train_attending}
    learn: Callable[..., tuple[Any, fitting.History]] = ways.get(cfg.adapter, training.train_hidden)
    unfinished = fitting.Checkpoint(out / "unfinished.pt", identity.hash, cfg.resume)
    own_cfg = dataclasses.replace(cfg, device=device)
    adapter, history = learn(states["train"], states["validation"], *matrices, own_cfg, unfinished, fitting.ProcessShare(rank, world))
    best = fitting.best_of(history)
    meta = provenance(
        "train_hidden_adapter",
        cfg,
        made_from,
        identity,
        geometry=adapter.geometry,
        parameters=adapter.num_parameters,
        rows=len(states["train"].rows),
        weights_hash=weights_hash(adapter.state_dict()),
        draft_layers=states["train"].meta["draft_layers"],
        prefix=states["train"].meta["prefix"],
        best_epoch=best["epoch"],
        epochs=history[-1]["epoch"],
        validation=validation_scores(best),
        untrained=validation_scores(history[0]),
        seconds=time.time() - start,
    )
    if rank == 0:
        write_text(out / "history.jsonl", "".join(json.dumps(h) + "\n" for h in history))
        plot_curves(history, out / "training_curves.png")
        save_pt(out / "adapter.pt", {"meta": meta, "state_dict": {k: v.cpu() for k, v in adapter.state_dict().items()}})
        write_hashed_json(out / "meta.json", meta, ("adapter.pt", "history.jsonl", "training_curves.png"))
        unfinished.path.unlink(missing_ok=True)
        _show(meta, out, reused=False)
    return meta


def validation_scores(epoch: dict[str, float]) -> dict[str, float]:
    """The validation scores of one epoch of the history, without their prefix."""
    return {k.removeprefix("validation_"): v for k, v in epoch.items() if k.startswith("validation_")}


def _show(meta: dict[str, Any], out: Path, reused: bool) -> dict[str, Any]:
    columns = ("loss", "mse", "cosine", "kl", "token_match", "tokens_per_pass")
    start = "linear map" if meta["config"]["adapter"] == "hidden" and meta["config"]["linear_units"] else "untrained"
    rows = [
        [start, *[meta["untrained"][c] for c in columns]],
        [f"epoch {meta['best_epoch']} of {meta['epochs']}", *[meta["validation"][c] for c in columns]],
    ]
    if meta["best_epoch"] == 0:
        rows[1][0] = "no epoch improved on the untrained adapter"
    print_table(f"{meta['config']['adapter']} adapter of {meta['parameters']:,} parameters, on validation", ("", *columns), rows)
    scores = {k: round(v, 5) for k, v in meta["validation"].items()}
    print_json_line({"parameters": meta["parameters"], **scores, "reused": reused, "written": str(out / "adapter.pt")})
    return meta


if __name__ == "__main__":
    run(main)
