"""Prophesee's EVT2, EVT2.1 and EVT3 words as events, in pieces: a decoder takes the state before its words and gives the state after.

The state is a handful of integers, so that decoding can start anywhere a state was kept (`event_index`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

_NO_EVENTS = {k: np.zeros(0, np.int64) for k in ("x", "y", "t", "p")}


@dataclass(frozen=True)
class State:
    """What earlier words have set. high: last TIME_HIGH, -1 before the first; the rest is EVT3's: y row (-1: none yet), low part of the
    time, number of times that the high part wrapped, base x and polarity of the next vector."""

    high: int = -1
    low: int = 0
    epoch: int = 0
    row: int = -1
    base: int = 0
    base_p: int = 0


class Decoded(NamedTuple):
    """events: x, y, t, p, each [n] int64, t in microseconds; state: after the words; early: events dropped for want of a time stamp."""

    events: dict[str, np.ndarray]
    state: State
    early: int


def last_index(mask: np.ndarray) -> np.ndarray:
    """For every position the index of the latest True at or before it, -1 where there is none."""
    return np.maximum.accumulate(np.where(mask, np.arange(len(mask)), -1))


def _fill(values: np.ndarray, index: np.ndarray, before: int) -> np.ndarray:
    """values[index], and `before` where no index is there yet."""
    return np.where(index >= 0, values[np.maximum(index, 0)], before) if len(values) else values


def decode_evt2(words: np.ndarray, state: State) -> Decoded:
    """words [n] uint32: kind 0 or 1 = darker or brighter with the time's low 6 bits, kind 8 = its high 28 bits."""
    if not len(words):
        return Decoded(_NO_EVENTS, state, 0)
    words = words.astype(np.int64)
    kind = words >> 28
    high = _fill(words & 0xFFFFFFF, last_index(kind == 8), state.high)
    event = kind <= 1
    keep = event & (high >= 0)
    t = (high << 6 | words >> 22 & 0x3F)[keep]
    events = {"x": (words >> 11 & 0x7FF)[keep], "y": (words & 0x7FF)[keep], "t": t, "p": kind[keep]}
    return Decoded(events, replace(state, high=int(high[-1])), int(event.sum() - keep.sum()))


def decode_evt21(words: np.ndarray, state: State) -> Decoded:
    """words [n] uint64: as EVT2 in the upper 32 bits, with the bits of up to 32 pixels from x on in the lower ones."""
    if not len(words):
        return Decoded(_NO_EVENTS, state, 0)
    upper, mask = (words >> 32).astype(np.int64), (words & 0xFFFFFFFF).astype(np.int64)
    kind = upper >> 28
    high = _fill(upper & 0xFFFFFFF, last_index(kind == 8), state.high)
    vector = np.flatnonzero(kind <= 1)
    which, bit = np.nonzero(mask[vector, None] >> np.arange(32) & 1)
    word = vector[which]
    keep = high[word] >= 0
    early = int(len(word) - keep.sum())
    word, bit = word[keep], bit[keep]
    t = high[word] << 6 | upper[word] >> 22 & 0x3F
    events = {"x": (upper[word] >> 11 & 0x7FF) + bit, "y": upper[word] & 0x7FF, "t": t, "p": kind[word]}
    return Decoded(events, replace(state, high=int(high[-1])), early)


def halves_swapped(words: np.ndarray) -> bool | None:
    """Whether EVT2.1 words [n] uint64 come with their halves swapped, as older cameras write them; None if nobody can tell.

    The kind of a word stands in its upper half; a mask of pixels in its place would be of every kind."""
    known = np.array([0, 1, 8, 0xA, 0xE, 0xF], np.uint64)

    def fits(upper: np.ndarray) -> bool:
        kind = upper >> np.uint64(28)
        times = (upper[kind == 8] & np.uint64(0xFFFFFFF)).astype(np.int64)
        return bool(np.isin(kind, known).all()) and len(times) > 0 and bool((np.diff(times) >= 0).all())

    lower, upper = words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)
    plain, swapped = fits(upper), fits(lower)
    return None if plain == swapped else swapped


def decode_evt3(words: np.ndarray, state: State) -> Decoded:
    """words [n] uint16, each changing one part of the state: y (0), x with polarity (2: one event; 3: base of a vector), 12 or 8 pixels
    from the base on (4, 5), the time's low (6) and high (8) 12 bits. The high part wraps every 16.8 s."""
    if not len(words):
        return Decoded(_NO_EVENTS, state, 0)
    words = words.astype(np.int64)
    kind, value = words >> 12, words & 0xFFF
    row_of, base_of = last_index(kind == 0), last_index(kind == 3)
    row = _fill(value & 0x7FF, row_of, state.row)
    t, end_low, end_high, end_epoch = times_evt3(kind, value, state)
    size = np.select([kind == 4, kind == 5], [12, 8])
    done = np.cumsum(size) - size  # pixels of vectors before this word
    start = np.where(base_of >= 0, (_fill(value, base_of, 0) & 0x7FF) - _fill(done, base_of, 0), state.base) + done
    base_p = np.where(base_of >= 0, _fill(value, base_of, 0) >> 11, state.base_p)
    vectors = np.flatnonzero(size)
    which, bit = np.nonzero((value[vectors, None] >> np.arange(12) & 1 == 1) & (np.arange(12) < size[vectors, None]))
    vector, single = vectors[which], np.flatnonzero(kind == 2)
    word = np.concatenate([single, vector])
    x = np.concatenate([value[single] & 0x7FF, start[vector] + bit])
    p = np.concatenate([value[single] >> 11, base_p[vector]])
    by_word = np.argsort(word, kind="stable")
    word, x, p = word[by_word], x[by_word], p[by_word]
    keep = (row[word] >= 0) & (t[word] >= 0)
    early = int(len(word) - keep.sum())
    word = word[keep]
    after = State(end_high, end_low, end_epoch, int(row[-1]), int(start[-1] + size[-1]), int(base_p[-1]))
    return Decoded({"x": x[keep], "y": row[word], "t": t[word], "p": p[keep]}, after, early)


def times_evt3(kind: np.ndarray, value: np.ndarray, state: State) -> tuple[np.ndarray, int, int, int]:
    """The time [n] at every word, -1 before the first TIME_HIGH, and the low, high part and wraps after the last one."""
    high_at, low_at = np.flatnonzero(kind == 8), last_index(kind == 6)
    highs = np.concatenate([[state.high], value[high_at]])
    steps = np.diff(highs)
    if state.high < 0:
        steps[:1] = 0
    epochs = np.concatenate([[state.epoch], state.epoch + np.cumsum(steps < -2048)])
    rank = np.cumsum(kind == 8)  # which high part counts: 0 is the one before these words
    moved_at = np.concatenate([[-1], np.where(steps != 0, high_at, -1)])  # a new high part restarts the low part
    moved = np.maximum.accumulate(moved_at)[rank]
    low = np.where(low_at > moved, _fill(value, low_at, 0), np.where((moved < 0) & (low_at < 0), state.low, 0))
    t = np.where(highs[rank] >= 0, low + (highs[rank] << 12) + (epochs[rank] << 24), -1)
    return t, int(low[-1]), int(highs[-1]), int(epochs[-1])
