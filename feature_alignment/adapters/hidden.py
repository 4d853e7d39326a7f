"""The hidden-state adapter: EventGPT's hidden states into Video-LLaVA's space.

    A(g) = g + up(gelu(down(g)))         4096 -> 256 -> 4096 with biases: 2,101,504 parameters

`up` starts at zero, so a new adapter is the identity.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feature_alignment.cli.advice import command_for
from feature_alignment.cli.console import UserError
from feature_alignment.storage.files import layers_read, load_trained
from feature_alignment.storage.pretrained import load_pretrained, save_pretrained


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

    def save_pretrained(self, directory: Path | str, meta: dict[str, Any]) -> None:
        """Write this adapter as a directory that can be shared; `python -m feature_alignment.adapters.share` adds a model card.

        Args:
            directory: made if missing
            meta: of its adapter.pt
        """
        save_pretrained(self, "hidden", meta, directory)

    @classmethod
    def from_pretrained(cls, directory: Path | str) -> HiddenAdapter:
        """Load an adapter from a directory that `save_pretrained` wrote; raises UserError if it is altered or of another kind."""
        return load_pretrained(cls, "hidden", directory)[0]

    @property
    def geometry(self) -> dict[str, int]:
        return {"d_draft": self.d_draft, "d_target": self.d_target, "bottleneck": self.bottleneck}


def load_adapter(path: Path, d_draft: int | None = None, draft_layers: Sequence[int] | None = None) -> tuple[HiddenAdapter, dict[str, Any]]:
    """An adapter and its meta. Refuses (UserError) one trained for other states than those it is to be used on."""
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
