"""Task 1.2. The hidden-state adapter: EventGPT's hidden states into Video-LLaVA's space.

    A(g) = g + up(gelu(down(g)))         4096 -> 256 -> 4096 with biases: 2,101,504 parameters

`up` starts at zero, so a new adapter is the identity. Run alone, this prints what the adapter costs beside one decoder layer of that
width (LLaMA's proportions, random weights) and one step of the configured Video-LLaVA:

    python feature_alignment/hidden_adapter.py --hidden_size 4096 --bottleneck 256
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from feature_alignment.cli.advice import command_for
from feature_alignment.cli.config import Common, parse_config
from feature_alignment.cli.console import UserError, print_json_line, print_table, run


@dataclass(frozen=True)
class AdapterConfig(Common):
    """Print the parameters, FLOPs, bytes and measured time of an adapter, beside one decoder layer of its width and one step of the
    configured Video-LLaVA. Reads that checkpoint, writes nothing.

    Args:
        hidden_size: width of the target's hidden states
        num_taps: how many of the drafter's layers the adapter reads side by side
        bottleneck: width in the middle
        tokens: numbers of tokens to time
        repeats: timed forward passes per number of tokens
    """

    hidden_size: int = 4096
    num_taps: int = 1
    bottleneck: int = 256
    tokens: list[int] = field(default_factory=lambda: [1, 2, 4, 6, 8, 16])
    repeats: int = 100


def _run_imported() -> None:
    """Run the importable copy of this module: torch is then imported inside `run`, where Ctrl-C ends without a traceback."""
    parse_config(AdapterConfig, None, "hidden_adapter")  # answers --help, and refuses mistakes, before torch is imported
    from feature_alignment import hidden_adapter

    hidden_adapter.main()


if __name__ == "__main__":
    run(_run_imported)
    sys.exit()

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HiddenAdapter(nn.Module):
    """Bottleneck adapter with a residual path.

    d_draft may be a multiple of d_target where several of the drafter's layers are read side by side: the last of them is the
    residual. Where no layer has the target's width there is no residual and `up` starts random.
    """

    def __init__(self, d_draft: int, d_target: int, bottleneck: int = 256) -> None:
        super().__init__()
        if min(d_draft, d_target, bottleneck) < 1:
            raise ValueError(f"sizes must be positive, got d_draft={d_draft}, d_target={d_target}, bottleneck={bottleneck}")
        self.d_draft, self.d_target, self.bottleneck = d_draft, d_target, bottleneck
        self.residual = d_draft % d_target == 0
        self.down = nn.Linear(d_draft, bottleneck)
        self.up = nn.Linear(bottleneck, d_target)
        if self.residual:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, g: Tensor) -> Tensor:
        """g [.., d_draft] -> [.., d_target], the target state expected at the same prefix."""
        return g[..., -self.d_target :] + self.change(g) if self.residual else self.change(g)

    def change(self, g: Tensor) -> Tensor:
        """What the bottleneck adds: [.., d_draft] -> [.., d_target]."""
        return self.up(F.gelu(self.down(g)))

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def geometry(self) -> dict[str, int]:
        return {"d_draft": self.d_draft, "d_target": self.d_target, "bottleneck": self.bottleneck}


def load_adapter(path: Path, d_draft: int | None = None, draft_layers: Sequence[int] | None = None) -> tuple[HiddenAdapter, dict[str, Any]]:
    """An adapter and its meta. Refuses (UserError) one trained for other states than those it is to be used on."""
    from feature_alignment.storage.artifacts import layers_read, load_trained

    make_it = command_for("train_hidden_adapter")
    adapter, meta = load_trained(path, "a hidden adapter", HiddenAdapter, "d_draft", make_it)
    layers = layers_read(path, meta, make_it)
    if d_draft is not None and meta["geometry"]["d_draft"] != d_draft:
        raise UserError(
            f"{path} reads states of width {meta['geometry']['d_draft']}, these are {d_draft} wide. Train it on them:\n  {make_it}"
        )
    if draft_layers is not None and layers != list(draft_layers):
        raise UserError(
            f"{path} was trained on EventGPT's layers {layers}, this run reads {list(draft_layers)}. "
            f"Pass --draft_layers {' '.join(map(str, layers))}, or train again."
        )
    return adapter, meta


@torch.inference_mode()
def call_ms(call: Callable[[], object], repeats: int, device: str = "cpu", warmup: int = 10) -> float:
    """Median milliseconds of a call, after `warmup` untimed ones."""
    times = []
    for i in range(repeats + warmup):
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        if i >= warmup:
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def forward_ms(
    adapter: nn.Module, num_tokens: int, width: int, repeats: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> float:
    """Median milliseconds of one forward pass over `num_tokens` states."""
    adapter, x = adapter.to(device, dtype), torch.randn(1, num_tokens, width, device=device, dtype=dtype)
    return call_ms(lambda: adapter(x), repeats, device)


def decoder_layer_ms(width: int, tokens: Sequence[int], repeats: int, device: str, dtype: torch.dtype) -> list[float]:
    """Median milliseconds of one LLaMA decoder layer, per number of tokens, without a cache: what stepping a drafter costs per layer."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    heads = max(1, width // 128)
    config = LlamaConfig(hidden_size=width, intermediate_size=round(width * 11008 / 4096), num_attention_heads=heads)
    config._attn_implementation = "sdpa"
    with torch.device(device):
        layer, rotary = LlamaDecoderLayer(config, 0).to(dtype).eval(), LlamaRotaryEmbedding(config)
    found = []
    for n in tokens:
        x = torch.randn(1, n, width, device=device, dtype=dtype)
        places = rotary(x, torch.arange(n, device=device)[None])
        found.append(call_ms(partial(layer, x, position_embeddings=places), repeats, device, warmup=2))
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    cfg = parse_config(AdapterConfig, argv, "hidden_adapter")
    from feature_alignment.storage.processes import check_device

    check_device(cfg.device)
    torch.set_num_threads(cfg.threads or 1)  # spinning threads on a busy machine cost far more than they give here
    adapter = HiddenAdapter(cfg.hidden_size * cfg.num_taps, cfg.hidden_size, cfg.bottleneck)
    dtype, width = getattr(torch, cfg.dtype), adapter.d_draft
    ms = [forward_ms(adapter, n, width, cfg.repeats, cfg.device, dtype) for n in cfg.tokens]
    layer = decoder_layer_ms(cfg.hidden_size, cfg.tokens, max(3, cfg.repeats // 20), cfg.device, dtype)
    step = target_step_ms(cfg)
    weight_bytes = adapter.num_parameters * dtype.itemsize
    flops = [2 * n * adapter.bottleneck * (adapter.d_draft + adapter.d_target) for n in cfg.tokens]
    print_table(
        f"adapter {width} -> {cfg.bottleneck} -> {cfg.hidden_size}: "
        f"{adapter.num_parameters:,} parameters, {weight_bytes:,} bytes in {cfg.dtype}",
        ("tokens", "ms (median)", "MFLOP", "one decoder layer, ms", "adapter / layer"),
        [
            (n, round(t, 4), round(f / 1e6, 2), round(at, 3), round(t / at, 4))
            for n, t, f, at in zip(cfg.tokens, ms, flops, layer, strict=True)
        ],
    )
    print(f"  one step of {cfg.target_id}: {step:.3f} ms; the adapter above takes {ms[0] / step:.3f} of it for {cfg.tokens[0]} token(s)")
    by_tokens = lambda values: {str(n): v for n, v in zip(cfg.tokens, values, strict=True)}  # noqa: E731
    summary = {"parameters": adapter.num_parameters, "bytes": weight_bytes, "ms": by_tokens(ms), "decoder_layer_ms": by_tokens(layer)}
    print_json_line({**summary, "target_step_ms": step, "device": cfg.device})
    return summary


def target_step_ms(cfg: AdapterConfig) -> float:
    """Median milliseconds of one decoding step of the configured target behind a prompt of its usual length, frames blank."""
    from feature_alignment.models.pair import load_target

    target = load_target(cfg)
    ids = target.encode_prompt("What is happening?")[None].to(target.device)
    state = target.prefill_encoded(
        ids, torch.zeros(1, target.vision_tokens, target.width, device=target.device, dtype=target.head_weight.dtype)
    )
    token = torch.full((1, 1), 5, device=target.device)

    def step() -> None:
        target.step(state, token)
        target.rollback(state, 1)

    return call_ms(step, max(5, cfg.repeats // 5), cfg.device)
