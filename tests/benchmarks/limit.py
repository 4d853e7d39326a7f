"""How much of Video-LLaVA's state is in EventGPT's state at the same place? A network without a budget, beside the adapter.

    the extraction of tests/benchmarks/depth.py, all layers
    python tests/benchmarks/limit.py

A wide network of three layers reads EventGPT's state at one position, of the layers the adapter reads or of all of them, and learns with
the adapter's loss until validation stops it. What it cannot predict, no adapter of one position can: it is not in the state, or needs
more training texts than there are. prints a table, writes outputs/depth/limit.json
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from feature_alignment.adapters import closed_form, fitting, training
from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.cli.config import parse_config
from feature_alignment.cli.console import print_json_line, print_table, rate_text, run
from feature_alignment.measurement import scoring
from feature_alignment.storage.artifacts import provenance
from feature_alignment.storage.files import load_pt, read_json, write_json
from feature_alignment.storage.hidden_states import HiddenStates, load_hidden_states
from feature_alignment.train_hidden_adapter import TrainConfig


class Wide(nn.Module):
    """[.., d_draft] -> [.., d_target], standardised inside."""

    def __init__(self, g: Tensor, v: Tensor, width: int, dropout: float) -> None:
        super().__init__()
        for name, x in (("g", g), ("v", v)):
            self.register_buffer(f"{name}_mean", x.mean(0))
            self.register_buffer(f"{name}_std", x.std(0).clamp(min=1e-4))
        layer = lambda a: (nn.Linear(a, width), nn.GELU(), nn.Dropout(dropout))  # noqa: E731
        self.layers = nn.Sequential(*layer(g.shape[1]), *layer(width), nn.Linear(width, v.shape[1]))

    def forward(self, g: Tensor) -> Tensor:
        return self.layers((g - self.g_mean) / self.g_std) * self.v_std + self.v_mean


def learn(train: HiddenStates, validation: HiddenStates, head: Tensor, cfg: TrainConfig, width: int) -> tuple[nn.Module, int]:
    """The network of the best epoch, and how many epochs were run."""
    torch.manual_seed(0)
    sample = next(closed_form.positions(train, number=20_000))
    variance = float(sample.target.var(0).mean())
    net = Wide(sample.draft, sample.target, width, 0.1)

    def batches(states: HiddenStates, order: tuple[Tensor, ...]) -> Iterator[fitting.Batch]:
        for rows in order:
            mask = states.mask[rows]
            g, v = states.draft[rows][mask].float(), states.target[rows][mask].float()
            yield fitting.Batch(*training.losses(net(g), v, head, variance, cfg), len(g), tuple(rows.tolist()))

    def epoch(number: int) -> Iterator[fitting.Batch]:
        net.train()
        return batches(train, fitting.shuffled(len(train.mask), cfg.batch_size, cfg.seed, number))

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        net.eval()
        return fitting.mean_over_positions((b.n, b.parts) for b in batches(validation, torch.arange(len(validation.mask)).split(256)))

    steps = math.ceil(len(train.mask) / cfg.batch_size)
    found, history = fitting.fit(net, epoch, steps, evaluate, lambda: net, cfg, train.names)
    return found, int(history[-1]["epoch"])


def side_by_side(folder: Path, layers: Sequence[int]) -> HiddenStates:
    """States of several layers that were kept apart."""
    found = [load_hidden_states(folder, [layer]) for layer in layers]
    return dataclasses.replace(found[0], draft=torch.cat([states.draft for states in found], dim=-1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/depth"))
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--num_epochs", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cfg = parse_config(TrainConfig, ["--config", "configs/demo.yaml"], "train_hidden_adapter")
    wide_cfg = dataclasses.replace(cfg, lr=1e-3, num_epochs=args.num_epochs, patience=4)
    meta = read_json(args.out / "hidden_states" / "test" / "meta.json", "the extraction above")
    rows: list[dict[str, Any]] = []
    for layers in (cfg.draft_layers, meta["draft_layers"]):
        train, validation, test = (side_by_side(args.out / "hidden_states" / split, layers) for split in ("train", "validation", "test"))
        head = load_pt(args.out / "hidden_states" / "vl_lm_head.pt", "the extraction above").float()
        for name in ("adapter", "wide network"):
            began = time.perf_counter()
            if name == "adapter":
                net: nn.Module
                net, history = training.train_hidden(train, validation, head, cfg)
                epochs = int(history[-1]["epoch"])
            else:
                net, epochs = learn(train, validation, head, wide_cfg, args.width)
            seconds = time.perf_counter() - began
            scores = scoring.score({"net": scoring.reads(net)}, test, head)["net"]
            found = scoring.rates(scores, test.mask, test, 5).to_json()
            parameters = sum(p.numel() for p in net.parameters())
            about = {"predictor": name, "layers": list(layers), "parameters": parameters, "epochs": epochs, "seconds": seconds}
            if isinstance(net, HiddenAdapter):
                about["parameters_4096"] = HiddenAdapter(4096 * len(layers), 4096, net.bottleneck).num_parameters
            rows.append({**about, **found})
    keys = ("cosine", "token_match", "acceptance_rate")
    print_table(
        "what EventGPT's state at one position tells of Video-LLaVA's, test clips",
        ("predictor, layers", *keys, "parameters", "epochs", "seconds"),
        [
            (
                f"{r['predictor']}, {r['layers'][0]} to {r['layers'][-1]}",
                *(rate_text(r[k], 3) for k in keys),
                f"{r['parameters']:,}",
                r["epochs"],
                round(r["seconds"], 1),
            )
            for r in rows
        ],
    )
    write_json(args.out / "limit.json", {"meta": provenance("limit", cfg, {}), "rows": rows})
    print_json_line({"written": str(args.out / "limit.json")})


if __name__ == "__main__":
    run(main)
