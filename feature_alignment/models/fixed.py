"""Decoding steps over caches of a fixed size, which a GPU records once and replays (CUDA graphs).

    places  | 0 1 2 … n-1 | n … n+k-1 | …… size     k tokens are read behind n others; a mask hides what lies behind each of them
              read before   read now    not yet

A small step keeps a GPU waiting for Python; a recorded one is launched whole. It always reads the same memory, so one decoder has one
fixed cache, and a new prompt takes the place of the last one. The number of tokens is rounded up to one of a few, so that few lengths
are recorded: what stands behind the real ones is hidden from them, and overwritten by the next step. Going back costs nothing.
Where there is no CUDA the same steps run without being recorded.
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

LENGTHS = (1, 2, 4, 6, 9, 13, 17, 25)  # tokens a recorded step reads; beyond them multiples of 32
ROOM = 192  # places behind a prompt
COMPILED_FORMS = 64  # of a layer: one for each length, and again for each model

eager_fallbacks: list[str] = []  # what could not be recorded or compiled in this process, and why


def _note_eager_fallback(what: str, error: Exception) -> None:
    eager_fallbacks.append(f"{what}: {str(error).partition(chr(10))[0][:200]}")
    log.warning("%s", eager_fallbacks[-1])


class CapturedStep:
    """A function of tensors that returns a tensor or a tuple of them, recorded once for each combination of shapes.

    The function must not ask the device anything, and tensors it closes over must stay where they are. What cannot be recorded all the
    same is called as ever, and `eager_fallbacks` says so.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self._known: dict[tuple, tuple[tuple[Tensor, ...], torch.cuda.CUDAGraph, Any] | None] = {}

    @torch.inference_mode()
    def __call__(self, *inputs: Tensor) -> Any:
        if inputs[0].device.type != "cuda":
            return self._call(*inputs)
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in self._known:
            try:
                self._known[key] = self._capture(tuple(x.clone() for x in inputs))
            except RuntimeError as error:
                _note_eager_fallback(f"steps of shape {list(inputs[0].shape)} cannot be recorded and run eagerly", error)
                self._known[key] = None
        known = self._known[key]
        if known is None:
            return self._call(*inputs)
        mine, graph, outputs = known
        for place, x in zip(mine, inputs, strict=True):
            place.copy_(x)
        graph.replay()
        return outputs.clone() if isinstance(outputs, Tensor) else tuple(x.clone() for x in outputs)  # the next replay overwrites them

    def _capture(self, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], torch.cuda.CUDAGraph, Any]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries choose their kernels and make their workspaces before anything is recorded
            for _ in range(3):
                self._call(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": another thread may be busy with the other model
        with gc_paused(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = self._call(*inputs)
        return inputs, graph, outputs


@contextmanager
def gc_paused() -> Iterator[None]:
    """No garbage is collected meanwhile: a forgotten recording that is freed during another one spoils it."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def captured(call: Callable[..., Any], steps: Steps) -> Callable[..., Any]:
    """The function itself where steps are eager, else recorded."""
    return call if steps == "eager" else CapturedStep(call)


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """The function as torch compiles it, or itself where it cannot."""
    fast = torch.compile(call, dynamic=False)

    def run(*inputs: Any) -> Any:
        nonlocal fast
        try:
            with torch._dynamo.config.patch(recompile_limit=COMPILED_FORMS):
                return fast(*inputs)
        except (RuntimeError, OSError) as error:  # no C compiler, say
            if fast is call or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
                raise
            _note_eager_fallback("steps cannot be compiled", error)
            fast = call
        return call(*inputs)

    return run


class FixedCache:
    """The one cache of a decoder whose steps are recorded. It stands in for a state's `cache` and belongs to the latest prompt."""

    def __init__(self, llama: PreTrainedModel, taps: Sequence[int], steps: Steps) -> None:
        """taps: the layers whose outputs make up a state; see `Decoder`"""
        self._llama, self._taps = llama, tuple(taps)
        self._read_layer: fused.Read = compiled(fused.read) if steps == "compiled" else fused.read
        self._layers: list[fused.Layer] = []
        self._size = 0
        self._owner: object = None

    def take(self, cache: DynamicCache, owner: object) -> FixedCache:
        """Go on behind a prompt that has been read into a cache of the usual kind; whoever had this one before has lost it."""
        length = cache.get_seq_length()
        if length >= self._size:
            self._lay_out(length + ROOM)
        for mine, layer in zip(self._layers, cache.layers, strict=True):
            mine.keys[:, :length], mine.values[:, :length] = layer.keys[0], layer.values[0]
        self._owner = owner
        return self

    def step(self, ids: Tensor, length: int, owner: object) -> Tensor:
        """States [1, k, d] behind ids [1, k], which stand at places length … length + k - 1."""
        if owner is not self._owner:
            raise ValueError("this text was read before another prompt took its place: a recorded decoder remembers one prompt")
        k = ids.shape[1]
        padded = next((n for n in LENGTHS if n >= k), -(-k // 32) * 32)
        if length + padded > self._size:
            before = self._layers
            self._lay_out(length + padded + ROOM)
            for old, new in zip(before, self._layers, strict=True):
                new.keys[:, :length], new.values[:, :length] = old.keys[:, :length], old.values[:, :length]
        self._length.fill_(length)
        return self._step(torch.nn.functional.pad(ids, (0, padded - k)))[:, :k]

    def _lay_out(self, size: int) -> None:
        """New empty buffers, and nothing recorded: a recording knows its buffers by their address."""
        self._size = -(-size // 64) * 64
        self._layers = fused.layers_of(self._llama, self._taps[-1], self._size)
        device = self._layers[0].keys.device
        self._length, self._slots = torch.zeros((), dtype=torch.long, device=device), torch.arange(self._size, device=device)
        self._step = CapturedStep(self._forward)

    def _forward(self, ids: Tensor) -> Tensor:
        x = self._llama.embed_tokens(ids[0])
        shared = fused.step_inputs(self._llama, x, self._slots[: len(x)] + self._length, self._slots)
        states = []
        for number, layer in enumerate(self._layers, start=1):
            x = self._read_layer(x, layer, shared, self._llama.config.rms_norm_eps)
            if number in self._taps:
                states.append(x)
        return torch.cat([*states[:-1], self._llama.norm(x)], -1)[None]  # behind an early exit the norm is none
