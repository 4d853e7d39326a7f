"""Key/value cache of a batch whose rows advance by different amounts.

Each token is written at its own row's position. Entries after a row's last token are masked, and the next step overwrites them, so a
rollback costs nothing:

    row 1 | prompt   | x d1 d2 d3 | x d1
    row 2 | prompt | x | x d1 d2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from feature_alignment.models.decoder import Decoder
from feature_alignment.models.fixed import FixedCache
from feature_alignment.models.state import State


class _RowLayer(DynamicLayer):
    """Keys and values of one layer in preallocated buffers [b, heads, size, d_head]."""

    @torch.inference_mode()
    def __init__(self, layer: DynamicLayer, size: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        rows, heads, length, d = layer.keys.shape
        self._buffers = [old.new_zeros(rows, heads, size, d) for old in (layer.keys, layer.values)]  # zeros: a masked nan would spread
        for new, old in zip(self._buffers, (layer.keys, layer.values), strict=True):
            new[:, :, :length] = old
        self.keys, self.values = self._buffers
        self.positions: Tensor  # [b, k], of the tokens that are read next
        self.end = length  # after the last of them

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values [b, heads, k, d_head] at `positions`; returns all entries before `end`."""
        rows = torch.arange(len(key_states), device=key_states.device)[:, None]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[rows, :, self.positions] = states.transpose(1, 2)
        self.keys, self.values = (buffer[:, :, : self.end] for buffer in self._buffers)
        return self.keys, self.values

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; rows that stay where they are are not copied."""
        for buffer in self._buffers:
            for new, old in enumerate(rows):
                if new != old:
                    buffer[new] = buffer[old]
        self._buffers = [buffer[: len(rows)] for buffer in self._buffers]


class _RowCache:
    """A copy of the cache of b prefilled prompts, with `size` positions for each; the counterpart of `FixedCache` for eager steps."""

    def __init__(self, target: Decoder, state: State, size: int) -> None:
        cache = DynamicCache()
        assert isinstance(state.cache, DynamicCache)
        cache.layers = self._layers = [_RowLayer(layer, size) for layer in state.cache.layers]
        self._target, self._state = target, State(cache, state.last, 0)

    def step(self, token_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Read k tokens [b, k] of each row after its cached positions; returns hidden states [b, k, d]."""
        k, device = token_ids.shape[1], token_ids.device
        end = max(lengths) + k
        positions = torch.tensor(lengths, device=device)[:, None] + torch.arange(k, device=device)
        for layer in self._layers:
            layer.positions, layer.end = positions, end
        allowed = (torch.arange(end, device=device) <= positions[:, :, None])[:, None]  # boolean: the fused kernel is the faster one here
        return self._target.step(self._state, token_ids, position_ids=positions, attention_mask=allowed)

    def keep(self, rows: Sequence[int]) -> None:
        """See `RowBatch.keep`."""
        for layer in self._layers:
            layer.keep_rows(rows)


class RowBatch:
    """Prefilled prompts of one model that are read on row by row, by captured steps if the model has them.

    Args:
        target: the model
        state: of the prefilled prompts, padded after their ends; its cache is copied
        lengths: number of positions of each prompt
        room: positions after the longest prompt
    """

    def __init__(self, target: Decoder, state: State, lengths: Sequence[int], room: int) -> None:
        self.lengths = list(lengths)
        self._cache: FixedCache | _RowCache
        self._step: Callable[[Tensor, Sequence[int]], Tensor]
        if target.fixed_cache is None:
            self._cache = cache = _RowCache(target, state, max(lengths) + room)
            self._step = cache.step
        else:
            self._cache = fixed = target.fixed_cache
            self._step = partial(fixed.step, owner=state)
            if isinstance(state.cache, DynamicCache):  # a single prompt was loaded by its prefill
                fixed.load_prompts(state.cache, state)

    def should_drop(self, finished: int) -> bool:
        """Whether to drop so many finished rows now. A step is captured once per number of rows, so there half of them leave at a time."""
        return finished > 0 and (isinstance(self._cache, _RowCache) or 2 * finished >= len(self.lengths))

    def step(self, token_ids: Tensor) -> Tensor:
        """Read k tokens of each row after its `lengths` positions; `lengths` do not change.

        Args:
            token_ids: [b, k] int64

        Returns:
            [b, k, d], hidden states on these tokens.
        """
        return self._step(token_ids, self.lengths)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order: `rows[i] >= i`, so that no row is overwritten before it has moved."""
        self._cache.keep(rows)
        self.lengths = [self.lengths[row] for row in rows]


def compacted(remaining: Sequence[int]) -> list[int]:
    """An order of the remaining rows for `RowBatch.keep`: the last ones fill the gaps, all others stay where they are."""
    count = len(remaining)
    movers = [row for row in remaining if row >= count]
    stay = set(remaining)
    return [row if row in stay else movers.pop() for row in range(count)]
