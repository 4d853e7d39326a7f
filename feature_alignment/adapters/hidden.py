"""The hidden-state adapter maps EventGPT's hidden states into Video-LLaVA's space.

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
from feature_alignment.storage.files import load_trained, trained_layers
from feature_alignment.storage.pretrained import SharedModule


class HiddenAdapter(SharedModule):
    """Bottleneck adapter with a residual path.

    d_draft is a multiple of d_target where several of the drafter's layers are concatenated: the last of them is the residual. If the
    widths do not allow this, there is no residual and `up` starts random.
    """

    kind = "hidden"

    def __init__(self, d_draft: int, d_target: int, bottleneck: int = 256) -> None:
        """Build an adapter that starts as the identity, where it has a residual path.

        Args:
            d_draft: Width of the drafter's states.
            d_target: Width of the target's states.
            bottleneck: Width of the hidden layer.
        """
        super().__init__()
        if min(d_draft, d_target, bottleneck) < 1:
            raise ValueError(f"sizes must be positive, got d_draft={d_draft}, d_target={d_target}, bottleneck={bottleneck}")
        self.d_draft, self.d_target, self.bottleneck = d_draft, d_target, bottleneck
        self.geometry = {"d_draft": d_draft, "d_target": d_target, "bottleneck": bottleneck}
        self.residual = d_draft % d_target == 0
        self.down = nn.Linear(d_draft, bottleneck)
        self.up = nn.Linear(bottleneck, d_target)
        if self.residual:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, g: Tensor) -> Tensor:
        """Predict the target's states [.., d_target] from the drafter's states g [.., d_draft] on the same prefix."""
        return g[..., -self.d_target :] + self.correction(g) if self.residual else self.correction(g)

    def correction(self, g: Tensor) -> Tensor:
        """The bottleneck's output [.., d_target] for states g [.., d_draft], without the residual."""
        added: Tensor = self.up(F.gelu(self.down(g)))
        return added

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())


def load_adapter(path: Path, d_draft: int | None = None, draft_layers: Sequence[int] | None = None) -> tuple[HiddenAdapter, dict[str, Any]]:
    """Load a trained adapter and its meta.

    Args:
        path: adapter.pt of train_hidden_adapter.
        d_draft: Width of the states it will read; None skips the check.
        draft_layers: EventGPT's layers it will read; None skips the check.

    Raises:
        UserError: If the file is missing or damaged, or was trained on other states.
    """
    remake_command = command_for("train_hidden_adapter")
    adapter, meta = load_trained(path, "a hidden adapter", HiddenAdapter, "d_draft", remake_command)
    layers = trained_layers(path, meta, remake_command)
    if d_draft is not None and meta["geometry"]["d_draft"] != d_draft:
        raise UserError(
            f"{path} reads states of width {meta['geometry']['d_draft']}, these have width {d_draft}. Train it on them:\n  {remake_command}"
        )
    if draft_layers is not None and layers != list(draft_layers):
        raise UserError(
            f"{path} was trained on EventGPT's layers {layers}, this run reads {list(draft_layers)}. "
            f"Pass --draft_layers {' '.join(map(str, layers))}, or train again."
        )
    return adapter, meta


@torch.inference_mode()
def call_ms(call: Callable[[], object], repeats: int, device: str = "cpu", warmup: int = 10) -> float:
    """Median milliseconds of a call.

    Args:
        call: Function to time.
        repeats: Timed calls.
        device: Device to synchronize with before and after each call.
        warmup: Untimed calls before them.
    """
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
    """Median milliseconds of one forward pass of an adapter.

    Args:
        adapter: Module to time.
        num_tokens: Number of states per pass.
        width: Width of the states.
        repeats: Timed passes.
        device: Device to run on.
        dtype: Of weights and states.
    """
    adapter, x = adapter.to(device, dtype), torch.randn(1, num_tokens, width, device=device, dtype=dtype)
    return call_ms(lambda: adapter(x), repeats, device)
