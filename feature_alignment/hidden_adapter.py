"""Task 1.2. The hidden-state adapter, which maps EventGPT's hidden states into Video-LLaVA's space.

    A(g) = g + up(gelu(down(g)))         4096 -> 256 -> 4096 with biases: 2,101,504 parameters

Prints what the adapter costs next to one decoder layer of that width (LLaMA's proportions, random weights) and one step of the
configured Video-LLaVA. The module itself is `adapters/hidden.py`; `HiddenAdapter` and `load_adapter` can be imported from here too.

    python feature_alignment/hidden_adapter.py --hidden_size 4096 --bottleneck 256
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from feature_alignment.cli.config import Common, parse_config
from feature_alignment.cli.console import print_json_line, print_table, run

if TYPE_CHECKING:
    import torch

    from feature_alignment.adapters.hidden import HiddenAdapter, load_adapter

__all__ = ["HiddenAdapter", "load_adapter"]


def __getattr__(name: str) -> Any:
    """Import `HiddenAdapter` and `load_adapter` on first use, so that `--help` needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from feature_alignment.adapters import hidden

    return getattr(hidden, name)


@dataclass(frozen=True)
class AdapterConfig(Common):
    """Print the parameters, FLOPs, bytes and measured time of an adapter, next to those of the models.

    It is compared with one decoder layer of its width and one step of the configured Video-LLaVA. Reads that checkpoint, writes nothing.

    Args:
        hidden_size: width of the target's hidden states
        num_taps: how many of the drafter's layers the adapter reads, concatenated
        bottleneck: width of the adapter's hidden layer
        tokens: numbers of tokens to time
        repeats: timed forward passes per number of tokens
    """

    hidden_size: int = 4096
    num_taps: int = 1
    bottleneck: int = 256
    tokens: list[int] = field(default_factory=lambda: [1, 2, 4, 6, 8, 16])
    repeats: int = 100


@dataclass(frozen=True)
class AdapterCost:
    """Size and time of an adapter, next to the models'.

    Args:
        num_parameters: Of the adapter.
        num_bytes: Memory of its weights.
        ms: Number of tokens -> median milliseconds of the adapter.
        decoder_layer_ms: The same for one decoder layer.
        target_step_ms: Median milliseconds of one step of the target.
        device: Device of the measurement.
    """

    num_parameters: int
    num_bytes: int
    ms: dict[str, float]
    decoder_layer_ms: dict[str, float]
    target_step_ms: float
    device: str

    def to_json(self) -> dict[str, Any]:
        """The values under the keys of the printed JSON."""
        return {
            "parameters": self.num_parameters,
            "bytes": self.num_bytes,
            "ms": self.ms,
            "decoder_layer_ms": self.decoder_layer_ms,
            "target_step_ms": self.target_step_ms,
            "device": self.device,
        }


def decoder_layer_ms(width: int, tokens: Sequence[int], repeats: int, device: str, dtype: torch.dtype) -> list[float]:
    """Median milliseconds of one LLaMA decoder layer without a cache: the cost of a drafter's step per layer.

    Args:
        width: Hidden size.
        tokens: Numbers of tokens to time.
        repeats: Timed forward passes per number of tokens.
        device: Device to run on.
        dtype: Of weights and states.

    Returns:
        Milliseconds per entry of `tokens`.
    """
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    from feature_alignment.adapters.hidden import call_ms

    heads = max(1, width // 128)
    config = LlamaConfig(hidden_size=width, intermediate_size=round(width * 11008 / 4096), num_attention_heads=heads)
    config._attn_implementation = "sdpa"
    with torch.device(device):
        layer, rotary = LlamaDecoderLayer(config, 0).to(dtype).eval(), LlamaRotaryEmbedding(config)
    times = []
    for n in tokens:
        x = torch.randn(1, n, width, device=device, dtype=dtype)
        angles = rotary(x, torch.arange(n, device=device)[None])
        times.append(call_ms(partial(layer, x, position_embeddings=angles), repeats, device, warmup=2))
    return times


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script with these arguments, default those of the command line; returns the printed summary."""
    cfg = parse_config(AdapterConfig, argv, "hidden_adapter")
    import torch

    from feature_alignment.adapters.hidden import HiddenAdapter, forward_ms
    from feature_alignment.storage.processes import check_device

    check_device(cfg.device)
    torch.set_num_threads(cfg.threads or 1)  # for passes this small, several threads only wait for each other
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
    adapter_ms, layer_ms = ({str(n): t for n, t in zip(cfg.tokens, times, strict=True)} for times in (ms, layer))
    cost = AdapterCost(adapter.num_parameters, weight_bytes, adapter_ms, layer_ms, step, cfg.device)
    print_json_line(cost.to_json())
    return cost.to_json()


def target_step_ms(cfg: AdapterConfig) -> float:
    """Median milliseconds of one decoding step of the configured target after a prompt of usual length with blank frames."""
    import torch

    from feature_alignment.adapters.hidden import call_ms
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


if __name__ == "__main__":
    run(main)
