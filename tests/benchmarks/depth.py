"""How early can EventGPT stop? One hidden adapter per layer of EventGPT, all else the same.

    python feature_alignment/extract_hidden_states.py --config configs/demo.yaml --split train --separate_layers \\
        --draft_layers 1 2 4 7 10 --output_dir outputs/depth --event_states false --own_drafts false        and so for validation and test
    python tests/benchmarks/depth.py

writes outputs/depth/depth.json and depth.png: cosine, token match and acceptance rate against the layer at which EventGPT stops, and
adapter.layer01.pt … for a row each in the benchmark, which measures what they bring:

    python feature_alignment/benchmark_feature_sd.py --config configs/demo.yaml --exit_adapters outputs/depth/adapter.layer*.pt
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from feature_alignment.adapters import training
from feature_alignment.cli.config import parse_config
from feature_alignment.cli.console import print_json_line, print_table, rate_text, run
from feature_alignment.measurement import scoring
from feature_alignment.storage.artifacts import provenance
from feature_alignment.storage.files import load_pt, read_json, save_pt, write_json
from feature_alignment.storage.hidden_states import load_hidden_states
from feature_alignment.train_hidden_adapter import TrainConfig

GOAL = 0.95  # of the acceptance rate at full depth


def measure(out: Path, layer: int, cfg: TrainConfig) -> dict[str, Any]:
    splits = [load_hidden_states(out / "hidden_states" / split, [layer]) for split in ("train", "validation", "test")]
    head = load_pt(out / "hidden_states" / "vl_lm_head.pt", "the extraction above").float()
    adapter, _ = training.train_hidden(splits[0], splits[1], head, cfg)
    meta = provenance("depth", cfg, {}, geometry=adapter.geometry, draft_layers=[layer])
    save_pt(out / f"adapter.layer{layer:02d}.pt", {"meta": meta, "state_dict": adapter.state_dict()})
    test = splits[2]
    scores = scoring.score({"adapter": lambda some: adapter(some.draft)}, test, head)["adapter"]
    return {
        "layer": layer,
        "rows": len(splits[0].mask),
        "norm": test.meta["draft_norm"],
        **scoring.rates(scores, test.mask, test, 5).to_json(),
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    layers = [r["layer"] for r in rows]
    for key, colour in (("cosine", "#009E73"), ("token_match", "#0072B2"), ("acceptance_rate", "#E69F00")):
        lo, hi = zip(*(r[key]["ci95"] for r in rows), strict=True)
        axis.plot(layers, [r[key]["value"] for r in rows], color=colour, marker="o", label=key.replace("_", " "))
        axis.fill_between(layers, lo, hi, color=colour, alpha=0.2, linewidth=0)
    axis.set(
        xlabel="EventGPT's layers that run",
        title=f"How early can EventGPT stop? {rows[0]['cosine']['total']:,.0f} test positions, 95 % by clip",
    )
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/depth"))
    parser.add_argument("--num_epochs", type=int, default=12)
    args = parser.parse_args()
    flags = ["--config", "configs/demo.yaml", "--num_epochs", str(args.num_epochs)]
    cfg = parse_config(TrainConfig, flags, "train_hidden_adapter")
    torch.set_num_threads(1)
    meta = read_json(args.out / "hidden_states" / "test" / "meta.json", "the extraction above")
    rows = [measure(args.out, layer, cfg) for layer in meta["draft_layers"]]
    full = rows[-1]["acceptance_rate"]["value"]
    smallest = next(r["layer"] for r in rows if r["acceptance_rate"]["value"] >= GOAL * full)
    keys = ("cosine", "token_match", "acceptance_rate")
    print_table(
        f"one adapter per layer, {rows[0]['rows']} training texts, {args.num_epochs} epochs, 5 drafts a round",
        ("layer", *keys, "tokens per pass"),
        [(str(r["layer"]), *(rate_text(r[k], 3) for k in keys), round(r["tokens_per_pass"], 2)) for r in rows],
    )
    print(f"  smallest layer with at least {GOAL:.0%} of full depth's acceptance rate: {smallest}")
    write_json(args.out / "depth.json", {"meta": provenance("depth", cfg, {}), "rows": rows, "smallest": smallest})
    plot(rows, args.out / "depth.png")
    print_json_line({"smallest": smallest, "written": str(args.out / "depth.json")})


if __name__ == "__main__":
    run(main)
