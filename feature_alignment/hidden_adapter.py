"""Task 1.2. The hidden-state adapter: EventGPT's hidden states into Video-LLaVA's space.

    A(g) = g + up(gelu(down(g)))         4096 -> 256 -> 4096 with biases: 2,101,504 parameters

`up` starts at zero, so a new adapter is the identity. Run alone, this prints what the adapter costs:

    python feature_alignment/hidden_adapter.py --hidden_size 4096 --bottleneck 256
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feature_alignment.config import Common, parse_config
from feature_alignment.console import UserError, print_json_line, print_table, run

TRAIN = "python feature_alignment/train_hidden_adapter.py --config configs/demo.yaml"


@dataclass(frozen=True)
class AdapterConfig(Common):
    """Print the parameters, FLOPs, bytes and measured time of an adapter.

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
    tokens: list[int] = field(default_factory=lambda: [1, 6])
    repeats: int = 200


if __name__ == "__main__":  # answer --help before torch is imported
    import sys

    if {"-h", "--help", "--print_config"} & set(sys.argv):
        run(lambda: parse_config(AdapterConfig, None, "hidden_adapter"))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402


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
    from feature_alignment.artifacts import load_trained

    adapter, meta = load_trained(path, "a hidden adapter", HiddenAdapter, "d_draft", TRAIN)
    if d_draft is not None and meta["geometry"]["d_draft"] != d_draft:
        raise UserError(
            f"{path} reads states of width {meta['geometry']['d_draft']}, these are {d_draft} wide. Train it on them:\n  {TRAIN}"
        )
    if draft_layers is not None and list(meta["draft_layers"]) != list(draft_layers):
        raise UserError(
            f"{path} was trained on EventGPT's layers {meta['draft_layers']}, this run reads {list(draft_layers)}. "
            f"Pass --draft_layers {' '.join(map(str, meta['draft_layers']))}, or train again."
        )
    return adapter, meta


@torch.inference_mode()
def forward_ms(
    adapter: nn.Module, num_tokens: int, width: int, repeats: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> float:
    """Median milliseconds of one forward pass over `num_tokens` states, after warm-up."""
    adapter = adapter.to(device, dtype)
    x = torch.randn(1, num_tokens, width, device=device, dtype=dtype)
    times = []
    for i in range(repeats + 10):
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        adapter(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        if i >= 10:
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    cfg = parse_config(AdapterConfig, argv, "hidden_adapter")
    if not cfg.tokens or min(*cfg.tokens, cfg.repeats, cfg.num_taps) < 1:
        raise UserError("--tokens, --repeats and --num_taps want numbers of at least 1.")
    from feature_alignment.processes import check_device

    check_device(cfg.device)
    torch.set_num_threads(cfg.threads or 1)  # spinning threads on a busy machine cost far more than they give here
    try:
        adapter = HiddenAdapter(cfg.hidden_size * cfg.num_taps, cfg.hidden_size, cfg.bottleneck)
    except ValueError as error:
        raise UserError(str(error)) from None
    width = adapter.d_draft
    dtype = getattr(torch, cfg.dtype)
    rows = []
    for n in cfg.tokens:
        flops = 2 * n * adapter.bottleneck * (adapter.d_draft + adapter.d_target)
        rows.append((n, forward_ms(adapter, n, width, cfg.repeats, cfg.device, dtype), flops))
    weight_bytes = adapter.num_parameters * dtype.itemsize
    print_table(
        f"adapter {width} -> {cfg.bottleneck} -> {cfg.hidden_size}: "
        f"{adapter.num_parameters:,} parameters, {weight_bytes:,} bytes in {cfg.dtype}",
        ("tokens", "ms (median)", "MFLOP"),
        [(n, round(ms, 4), round(flops / 1e6, 2)) for n, ms, flops in rows],
    )
    summary = {"parameters": adapter.num_parameters, "bytes": weight_bytes, "ms": {str(n): ms for n, ms, _ in rows}, "device": cfg.device}
    print_json_line(summary)
    return summary


if __name__ == "__main__":
    run(main)
