"""Decoding steps over a key/value cache of fixed size, captured as CUDA graphs on a GPU.

    positions  | 0 … n-1 | n … n+k-1 | … size    one step reads k tokens at positions n … n+k-1; a causal mask hides all later positions
                 cached    new tokens   unused

In small batches a GPU waits for Python between kernels. A CUDA graph launches a whole step at once, but it always reads and writes the
same memory. So a decoder has one cache, which holds the prompts read last: one, or the rows of a batch, each with a length of its own. The
number of tokens is padded to one of a few lengths, so that few graphs are captured; padding is masked and overwritten by the next step. A
rollback only changes the length. On other devices the same steps run without capture.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from feature_alignment.cli.config import Steps
from feature_alignment.cli.console import log
from feature_alignment.models import fused

LENGTHS = (1, 2, 4, 6, 9, 13, 17, 25)  # tokens of a captured step; larger steps are padded to multiples of 32
ROOM = 192  # free positions after a prompt
COMPILED_FORMS = 64  # compiled variants of a layer: one per length and model

eager_fallbacks: list[str] = []  # what could not be captured or compiled in this process, and why


def note_eager_fallback(what: str, reason: object) -> None:
    """Log that something runs eagerly, and record it for the report of this process.

    Args:
        what: What runs eagerly.
        reason: An error or a text; its first line is kept.
    """
    eager_fallbacks.append(f"{what}: {str(reason).partition(chr(10))[0][:200]}")
    log.warning("%s", eager_fallbacks[-1])


class CapturedStep:
    """A function of tensors, captured as one CUDA graph per combination of input shapes and replayed afterwards.

    The function returns a tensor or a tuple of tensors. It must not synchronize with the device, and tensors in its closure must keep their
    addresses. If capture fails, the function runs eagerly, and `eager_fallbacks` records why.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self._graphs: dict[tuple[Any, ...], tuple[tuple[Tensor, ...], torch.cuda.CUDAGraph, Any] | None] = {}

    @torch.inference_mode()
    def __call__(self, *inputs: Tensor) -> Any:
        """The function's result for `inputs`, in memory of its own."""
        if inputs[0].device.type != "cuda":
            return self._call(*inputs)
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in self._graphs:
            try:
                self._graphs[key] = self._capture(tuple(x.clone() for x in inputs))
            except RuntimeError as error:
                note_eager_fallback(f"steps of shape {list(inputs[0].shape)} cannot be captured and run eagerly", error)
                self._graphs[key] = None
        captured_graph = self._graphs[key]
        if captured_graph is None:
            return self._call(*inputs)
        buffers, graph, outputs = captured_graph
        for buffer, x in zip(buffers, inputs, strict=True):
            buffer.copy_(x)
        graph.replay()
        return outputs.clone() if isinstance(outputs, Tensor) else tuple(x.clone() for x in outputs)  # the next replay overwrites them

    def _capture(self, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], torch.cuda.CUDAGraph, Any]:
        warmup = torch.cuda.Stream()
        warmup.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warmup):  # libraries choose kernels and allocate workspaces before the capture
            for _ in range(3):
                self._call(*inputs)
        torch.cuda.current_stream().wait_stream(warmup)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": another thread may be running the other model
        with gc_paused(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = self._call(*inputs)
        return inputs, graph, outputs


@contextmanager
def gc_paused() -> Iterator[None]:
    """Disable garbage collection during capture: freeing an old CUDA graph invalidates the one being captured."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def captured(call: Callable[..., Any], steps: Steps) -> Callable[..., Any]:
    """Wrap a function for a kind of steps.

    Args:
        call: Function of tensors; see `CapturedStep` for what it must not do.
        steps: "eager", "graphs" or "compiled".

    Returns:
        The function itself for eager steps, else a `CapturedStep` of it.
    """
    return call if steps == "eager" else CapturedStep(call)


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled by torch, with an eager fallback where compilation fails."""
    compiled_call = torch.compile(call, dynamic=False)

    def run(*inputs: Any) -> Any:
        nonlocal compiled_call
        try:
            with torch._dynamo.config.patch(recompile_limit=COMPILED_FORMS):
                return compiled_call(*inputs)
        except (RuntimeError, OSError) as error:  # for example, no C compiler
            if compiled_call is call or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
                raise
            note_eager_fallback("steps cannot be compiled", error)
            compiled_call = call
        return call(*inputs)

    return run


class FixedCache:
    """Key/value cache of fixed size for a decoder with captured steps. It holds the prompts read last, one per row.

    transformers' `StaticCache` is not used: on a CPU its steps take longer than these (one mask of the full size per step, no fused
    products), it cannot grow, and a prompt would have to be prefilled over its full size.
    """

    def __init__(self, llama: PreTrainedModel, taps: Sequence[int], steps: Steps) -> None:
        """Prepare a cache without memory; `load_prompts` allocates it.

        Weights are joined here, not at the first prompt: a drafter reads that in a second thread, on a stream of its own, where the freed
        memory of single weights could be used again before they were copied.

        Args:
            llama: Model whose layers are read.
            taps: Layers whose outputs make up a hidden state; see `Decoder`.
            steps: "graphs" or "compiled".
        """
        self._llama, self._taps = llama, tuple(taps)
        fused.join_layers(llama, self._taps[-1])
        self._read_layer: fused.ReadLayer = compiled(fused.read_layer) if steps == "compiled" else fused.read_layer
        self._layers: list[fused.Layer] = []
        self._rows = self._size = 0
        self._owner: object = None

    def load_prompts(self, cache: DynamicCache, owner: object) -> FixedCache:
        """Copy the keys and values of prefilled prompts; the previous owner can no longer step.

        Args:
            cache: Cache of b prompts, as the prefill left it.
            owner: Object that every later `step` must name.

        Returns:
            This cache.
        """
        rows, length = len(cache.layers[0].keys), cache.get_seq_length()
        if rows > self._rows or length >= self._size:
            self._allocate(max(rows, self._rows), max(length + ROOM, self._size))
        for fixed_layer, layer in zip(self._layers, cache.layers, strict=True):
            fixed_layer.keys[:rows, :, :length], fixed_layer.values[:rows, :, :length] = layer.keys, layer.values
        self._owner = owner
        return self

    def step(self, ids: Tensor, lengths: Sequence[int], owner: object) -> Tensor:
        """Read k tokens of each row at positions `lengths` … `lengths` + k - 1; the cache grows if they do not fit.

        Args:
            ids: [b, k] int64, tokens to read.
            lengths: Number of positions of each row that are already cached.
            owner: Object whose prompts were loaded last.

        Returns:
            [b, k, d], hidden states on the tokens.

        Raises:
            ValueError: If other prompts were loaded since.
        """
        if owner is not self._owner:
            raise ValueError("another prompt was loaded into this cache since: a decoder with captured steps holds one prompt at a time")
        k, longest = ids.shape[1], max(lengths)
        padded = next((n for n in LENGTHS if n >= k), -(-k // 32) * 32)
        if longest + padded > self._size:
            before = self._layers
            self._allocate(self._rows, longest + padded + ROOM)
            for old, new in zip(before, self._layers, strict=True):
                new.keys[:, :, :longest], new.values[:, :, :longest] = old.keys[:, :, :longest], old.values[:, :, :longest]
        if len(lengths) == 1:
            self._lengths.fill_(longest)
        else:
            self._lengths[: len(lengths)] = torch.tensor(lengths, device=self._lengths.device)
        hidden: Tensor = self._step(torch.nn.functional.pad(ids, (0, padded - k)))
        return hidden[:, :k]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order: `rows[i] >= i`, so that no row is overwritten before it has moved."""
        for layer in self._layers:
            for buffer in (layer.keys, layer.values):
                for new, old in enumerate(rows):
                    if new != old:
                        buffer[new] = buffer[old]

    def _allocate(self, rows: int, size: int) -> None:
        """Allocate empty buffers and drop all graphs, which know the old buffers by address."""
        self._rows, self._size = rows, -(-size // 64) * 64
        self._layers = fused.fused_layers(self._llama, self._taps[-1], rows, self._size)
        device = self._layers[0].keys.device
        self._lengths, self._positions = torch.zeros(rows, dtype=torch.long, device=device), torch.arange(self._size, device=device)
        self._step = CapturedStep(self._forward)

    def _forward(self, ids: Tensor) -> Tensor:
        b, k = ids.shape
        x = self._llama.embed_tokens(ids).flatten(0, 1)
        inputs = fused.step_inputs(self._llama, x, self._positions[:k] + self._lengths[:b, None], self._positions)
        states = []
        for number, layer in enumerate(self._layers, start=1):
            x = self._read_layer(x, layer.of_rows(b), inputs, self._llama.config.rms_norm_eps)
            if number in self._taps:
                states.append(x)
        states[-1] = self._llama.norm(x)  # after an early exit the norm is the identity
        return torch.cat(states, -1).view(b, k, -1)
