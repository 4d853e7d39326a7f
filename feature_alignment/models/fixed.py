"""Decoding steps over caches of a fixed size, which a GPU records once and replays (CUDA graphs).

    places  | 0 1 2 … n-1 | n … n+k-1 | …… size     k tokens are read behind n others; a mask hides what lies behind each of them
              read before   read now    not yet

A small step keeps a GPU waiting for Python; a recorded one is launched whole. It always reads the same memory, so one decoder has one
fixed cache, and a new prompt takes the place of the last one. The number of tokens is rounded up to one of a few, so that few lengths
are recorded: what stands behind the real ones is hidden from them, and overwritten by the next step. Going back costs nothing.
Where there is no CUDA the same steps run without being recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from feature_alignment.console import log

Steps = Literal["eager", "graphs", "compiled"]
LENGTHS = (1, 2, 4, 6, 9, 13, 17, 25)  # tokens a recorded step reads; beyond them multiples of 32
ROOM = 192  # places behind a prompt


class Recorded:
    """A function of tensors that returns a tensor or a tuple of them, recorded once for each combination of shapes.

    The function must not ask the device anything, and tensors it closes over must stay where they are. What cannot be recorded all the
    same is called as ever, and the log says so.
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
                self._known[key] = self._record(tuple(x.clone() for x in inputs))
            except RuntimeError as error:
                log.warning("steps of shape %s cannot be recorded and run eagerly: %s", list(inputs[0].shape), str(error)[:200])
                self._known[key] = None
        known = self._known[key]
        if known is None:
            return self._call(*inputs)
        mine, graph, outputs = known
        for place, x in zip(mine, inputs, strict=True):
            place.copy_(x)
        graph.replay()
        return outputs.clone() if isinstance(outputs, Tensor) else tuple(x.clone() for x in outputs)  # the next replay overwrites them

    def _record(self, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], torch.cuda.CUDAGraph, Any]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries choose their kernels and make their workspaces before anything is recorded
            for _ in range(3):
                self._call(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may be busy with the other model
            outputs = self._call(*inputs)
        return inputs, graph, outputs


def recorded(call: Callable[..., Any], steps: Steps) -> Callable[..., Any]:
    """The function itself where steps are eager, else recorded."""
    return call if steps == "eager" else Recorded(call)


class _FixedLayer(DynamicLayer):
    """Keys and values of one decoder layer, [1, heads, size, d] each; new ones go to `places`."""

    def __init__(self, like: DynamicLayer, size: int) -> None:
        super().__init__()
        self.lazy_initialization(like.keys, like.values)
        self.keys, self.values = (x.new_zeros(1, x.shape[1], size, x.shape[3]) for x in (like.keys, like.values))
        self.places: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.places, key_states)
        self.values.index_copy_(2, self.places, value_states)
        return self.keys, self.values


class FixedCache:
    """The one cache of a decoder whose steps are recorded. It stands in for a state's `cache` and belongs to the latest prompt."""

    def __init__(self, read: Callable[[dict[str, Tensor], DynamicCache], Tensor], steps: Steps) -> None:
        """read: embeds and reads inputs behind a cache, returns the states [1, k, d]"""
        self._read, self._steps = read, steps
        self._cache: DynamicCache | None = None
        self._owner: object = None

    def take(self, cache: DynamicCache, owner: object) -> FixedCache:
        """Go on behind a prompt that has been read into a cache of the usual kind; whoever had this one before has lost it."""
        length = cache.get_seq_length()
        if self._cache is None or length + ROOM > self._size:
            self._lay_out(cache, length + ROOM)
        assert self._cache is not None
        for mine, layer in zip(self._cache.layers, cache.layers, strict=True):
            mine.keys[:, :, :length], mine.values[:, :, :length] = layer.keys, layer.values
        self._owner = owner
        return self

    def step(self, ids: Tensor, length: int, owner: object) -> Tensor:
        """States [1, k, d] behind ids [1, k], which stand at places length … length + k - 1."""
        if owner is not self._owner:
            raise ValueError("this text was read before another prompt took its place: a recorded decoder remembers one prompt")
        k = ids.shape[1]
        padded = next((n for n in LENGTHS if n >= k), -(-k // 32) * 32)
        if length + padded > self._size:
            self._lay_out(self._cache, 2 * (length + padded))
        self._length.fill_(length)
        return self._step(torch.nn.functional.pad(ids, (0, padded - k)))[:, :k]

    def _lay_out(self, cache: DynamicCache, size: int) -> None:
        """New buffers with what `cache` holds, and nothing recorded: a recording knows its buffers by their address."""
        self._size = -(-size // 64) * 64
        fixed = DynamicCache()
        fixed.layers = [_FixedLayer(layer, self._size) for layer in cache.layers]
        for new, old in zip(fixed.layers, cache.layers, strict=True):
            held = old.keys.shape[2]
            new.keys[:, :, :held], new.values[:, :, :held] = old.keys, old.values
        device = fixed.layers[0].keys.device
        self._cache, self._length = fixed, torch.zeros((), dtype=torch.long, device=device)
        self._slots = torch.arange(self._size, device=device)
        fused = self._steps == "compiled"
        self._step = Recorded(torch.compile(self._forward, fullgraph=True, dynamic=False) if fused else self._forward)

    def _forward(self, ids: Tensor) -> Tensor:
        places = self._slots[: ids.shape[1]] + self._length
        assert self._cache is not None  # laid out before any step
        for layer in self._cache.layers:
            layer.places = places
        keys = self._cache.layers[0].keys
        hidden_from = self._slots > places[:, None]
        mask = torch.zeros(hidden_from.shape, dtype=keys.dtype, device=keys.device)
        mask = mask.masked_fill(hidden_from, torch.finfo(keys.dtype).min)[None, None]
        return self._read({"input_ids": ids, "position_ids": places[None], "attention_mask": mask}, self._cache)
