"""Linear layers whose weights are packed once for oneDNN: on a CPU, verifying several tokens then costs about as much as one step.

torch's own float32 product reads a weight in the layout of its file, whatever the number of tokens. oneDNN reads a copy in blocks
that fit its kernels. Where memory is slow, its product of one token may take longer than torch's; then torch's stays for one token, and
the copy is for several. The operators that make and use this copy are internal to torch (inductor's freezing uses them); the public
`torch.utils.mkldnn.to_mkldnn` keeps the layout of the file and is slower. Where the operators are missing or do not pay, torch's
own product stays.

A product of packed weights may differ from torch's in the last bit, as torch's own products of one and of several tokens may. A model is
packed as a whole and before anything is decoded: plain decoding, verification and all drafters then choose among the same products.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn

TOKENS = (1, 6)  # tokens per forward in the trial: a step of plain decoding, a verification of five draft tokens
TRIAL_BYTES = 256 << 20  # of weights in the trial, beyond what a CPU caches
TRIAL_SECONDS, MIN_ROUNDS = 1.0, 3
WORTHWHILE = 0.8  # of torch's time, above which packing is not worth its memory and a choice that changes from run to run
SMALLEST = 1 << 14  # weights of a layer below which a call costs more than its product
FREE_MEMORY = 0.7  # of what is free, the most that a packed copy may take
LAYOUT_TOKENS = 9  # for which oneDNN chooses the layout


@dataclass(frozen=True)
class LinearChoice:
    """Which product a model's linear layers run, and the trial that decided it.

    Attributes:
        kind: torch = torch's own product; packed = oneDNN's, over packed weights; mixed = torch's for one token, oneDNN's for several
        reason: why it was chosen
        torch_ms, packed_ms: number of tokens -> milliseconds of the linear layers of the trial; empty without a trial
    """

    kind: Literal["torch", "packed", "mixed"]
    reason: str
    torch_ms: dict[str, float]
    packed_ms: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The choice as JSON-plain values."""
        return asdict(self)


class PackedLinear(nn.Module):
    """A linear layer over packed weights. `weight` and `bias` stay the original parameters, so checkpoints and ties are unchanged."""

    def __init__(self, linear: nn.Linear, in_bfloat16: bool = False, is_mixed: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._product = packed_product(linear.weight, linear.bias, in_bfloat16, is_mixed)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [.., in] to [.., out]."""
        return self._product(x)


def packed_product(
    weight: Tensor, bias: Tensor | None = None, in_bfloat16: bool = False, is_mixed: bool = False
) -> Callable[[Tensor], Tensor]:
    """The product x W^T + b over a packed copy of W.

    Args:
        weight: [out, in], on a CPU
        bias: [out]
        in_bfloat16: round x, W and b to bfloat16 for the product
        is_mixed: one token goes through torch's own product

    Returns:
        A function from [..., in] to [..., out], in the weight's dtype.

    Raises:
        RuntimeError, AttributeError, NotImplementedError: if this torch or this CPU cannot pack it.
    """
    product, dtype = torch.ops.mkldnn._linear_pointwise, torch.bfloat16 if in_bfloat16 else weight.dtype
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype).contiguous(), LAYOUT_TOKENS)
    if is_mixed:
        one, own = weight.shape[1], nn.functional.linear
        return lambda x: own(x, weight, bias) if x.numel() == one else product(x, packed, bias, "none", [], "")
    if dtype == weight.dtype:
        return lambda x: product(x, packed, bias, "none", [], "")
    rounded = None if bias is None else bias.detach().to(dtype)
    return lambda x: product(x.to(dtype), packed, rounded, "none", [], "").to(x.dtype)


def unsupported(model: nn.Module) -> str | None:
    """Why this model's linear layers cannot be packed; None if they can."""
    parameters = list(model.parameters())
    if any(p.device.type != "cpu" for p in parameters):
        return "only a CPU reads packed weights"
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.bfloat16}:
        return f"weights of {', '.join(sorted(str(dtype)[6:] for dtype in dtypes))}"
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    if dtypes == {torch.bfloat16} and not multiplies_bfloat16():
        return "this CPU does not multiply bfloat16"
    needed, free = sum(linear.weight.nbytes for _, _, linear in linear_layers(model)), psutil.virtual_memory().available
    if needed > FREE_MEMORY * free:
        return f"a packed copy takes {needed >> 20} MiB and {free >> 20} MiB are free"
    return None


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(module that has it, its name there, the layer) of all linear layers that are large enough to be packed."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.weight.numel() >= SMALLEST:
                yield module, name, child


def pack(model: nn.Module, in_bfloat16: bool = False, is_mixed: bool = False) -> None:
    """Replace the linear layers of a model, in place; arguments as in `packed_product`."""
    for module, name, linear in linear_layers(model):
        setattr(module, name, PackedLinear(linear, in_bfloat16, is_mixed))


def best_cpu_linear(model: nn.Module, head: nn.Linear | None = None) -> LinearChoice:
    """Pack a model's linear layers if that is clearly faster on this machine, by a trial of about a second.

    Args:
        model: the text decoder; its layers are replaced in place if packing wins
        head: the LM head, which takes part in the trial; its caller packs it (`packed_product`)

    Returns:
        The choice. With kind "torch" nothing has changed.
    """
    why = unsupported(model)
    layers = [linear for _, _, linear in linear_layers(model)] if why is None else []
    if why is None and not layers:
        why = "no linear layer is large enough"
    if why is not None:
        return LinearChoice("torch", why, {}, {})
    tried, size = [], 0
    for linear in [*([head] if head is not None else []), *layers]:
        if size < TRIAL_BYTES:
            tried.append(linear)
            size += linear.weight.nbytes
    try:
        packed = [PackedLinear(linear) for linear in tried]
        torch_ms, packed_ms = _milliseconds(tried, packed)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return LinearChoice("torch", f"packing failed: {str(error).splitlines()[0][:200]}", {}, {})
    one, several = map(str, TOKENS)
    is_faster = packed_ms[several] <= WORTHWHILE * torch_ms[several] or sum(packed_ms.values()) <= WORTHWHILE * sum(torch_ms.values())
    is_mixed = torch_ms[one] < packed_ms[one]
    if not is_faster:
        return LinearChoice("torch", "packed weights are not clearly faster here", torch_ms, packed_ms)
    pack(model, is_mixed=is_mixed)
    if is_mixed:
        return LinearChoice("mixed", "packed weights are faster here for several tokens, torch's own product for one", torch_ms, packed_ms)
    return LinearChoice("packed", "packed weights are faster here", torch_ms, packed_ms)


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight


@torch.inference_mode()
def _milliseconds(*ways: Sequence[nn.Module]) -> list[dict[str, float]]:
    """For each of several lists of layers: number of tokens -> the best time of all its layers, one after the other.

    The lists take turns, so that a busy moment of the machine meets all of them.
    """
    best: list[dict[str, float]] = [{str(tokens): float("inf") for tokens in TOKENS} for _ in ways]
    started, rounds = time.perf_counter(), 0
    while rounds < MIN_ROUNDS or time.perf_counter() - started < TRIAL_SECONDS:
        for tokens in TOKENS:
            for found, layers in zip(best, ways, strict=True):
                sizes = [_weight(layer).shape[1] for layer in layers]
                inputs = {n: torch.ones(1, tokens, n, dtype=_weight(layers[0]).dtype) for n in set(sizes)}
                begin = time.perf_counter()
                for layer, n in zip(layers, sizes, strict=True):
                    layer(inputs[n])
                found[str(tokens)] = min(found[str(tokens)], 1e3 * (time.perf_counter() - begin))
        rounds += 1
    return [{tokens: round(ms, 3) for tokens, ms in found.items()} for found in best]
