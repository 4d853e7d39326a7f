"""Decode Prophesee's EVT2, EVT2.1 and EVT3 words in pieces: each decoder takes the state before its words and returns the state after.

The state is six integers, so decoding can start wherever a state was stored (`event_index`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

_NO_EVENTS = {k: np.zeros(0, np.int64) for k in ("x", "y", "t", "p")}


@dataclass(frozen=True)
class State:
    """Decoder state; all fields but `high` and `epoch` are used by EVT3 alone.

    Args:
        high: High part of the time, -1 before the first TIME_HIGH.
        low: Low part of the time.
        epoch: Number of times that the high part has wrapped around.
        row: Current y, -1 before the first.
        base: x of the next vector.
        base_p: Polarity of the next vector.
    """

    high: int = -1
    low: int = 0
    epoch: int = 0
    row: int = -1
    base: int = 0
    base_p: int = 0


class Decoded(NamedTuple):
    """Result of a decoder.

    Args:
        events: x, y, t, p, each [n] int64; t in microseconds.
        state: After the words.
        early: Number of events dropped because no time stamp came before them.
    """

    events: dict[str, np.ndarray]
    state: State
    early: int


def last_index(mask: np.ndarray) -> np.ndarray:
    """For each position of mask [n], the index of the last True at or before it, or -1."""
    return np.maximum.accumulate(np.where(mask, np.arange(len(mask)), -1))


def _fill(values: np.ndarray, index: np.ndarray, before: int) -> np.ndarray:
    """values[index], or `before` where the index is -1."""
    return np.where(index >= 0, values[np.maximum(index, 0)], before) if len(values) else values


def decode_evt2(words: np.ndarray, state: State) -> Decoded:
    """Decode words [n] uint32: kind 0 or 1 is a darker or brighter event with the low 6 bits of the time, kind 8 its high 28 bits.

    The high part wraps around every 4.8 hours.
    """
    if not len(words):
        return Decoded(_NO_EVENTS, state, 0)
    words = words.astype(np.int64)
    kind = words >> 28
    high, end_high, end_epoch = times_evt2(kind, words & 0xFFFFFFF, state)
    event = kind <= 1
    keep = event & (high >= 0)
    t = (high << 6 | words >> 22 & 0x3F)[keep]
    events = {"x": (words >> 11 & 0x7FF)[keep], "y": (words & 0x7FF)[keep], "t": t, "p": kind[keep]}
    return Decoded(events, replace(state, high=end_high, epoch=end_epoch), int(event.sum() - keep.sum()))


def decode_evt21(words: np.ndarray, state: State) -> Decoded:
    """Decode words [n] uint64: the upper 32 bits are as in EVT2, the lower ones a mask of up to 32 pixels from x on."""
    if not len(words):
        return Decoded(_NO_EVENTS, state, 0)
    upper, mask = (words >> 32).astype(np.int64), (words & 0xFFFFFFFF).astype(np.int64)
    kind = upper >> 28
    high, end_high, end_epoch = times_evt2(kind, upper & 0xFFFFFFF, state)
    vector = np.flatnonzero(kind <= 1)
    which, bit = np.nonzero(mask[vector, None] >> np.arange(32) & 1)
    word = vector[which]
    keep = high[word] >= 0
    early = int(len(word) - keep.sum())
    word, bit = word[keep], bit[keep]
    t = high[word] << 6 | upper[word] >> 22 & 0x3F
    events = {"x": (upper[word] >> 11 & 0x7FF) + bit, "y": upper[word] & 0x7FF, "t": t, "p": kind[word]}
    return Decoded(events, replace(state, high=end_high, epoch=end_epoch), early)


def times_evt2(kind: np.ndarray, value: np.ndarray, state: State) -> tuple[np.ndarray, int, int]:
    """High parts of the times of EVT2 or EVT2.1 words.

    Args:
        kind: [n] int64, kinds of the words.
        value: [n] int64, their low 28 bits.
        state: Before the words.

    Returns:
        The high part [n] in effect at every word, wraps included, -1 before the first TIME_HIGH; high part and wraps after the last word.
    """
    is_high = kind == 8
    highs = np.concatenate([[state.high], value[is_high]])
    steps = np.diff(highs) * (highs[:-1] >= 0)
    epochs = np.concatenate([[state.epoch], state.epoch + np.cumsum(steps < -(2**27))])
    whole = np.where(highs >= 0, highs + (epochs << 28), -1)
    return whole[np.cumsum(is_high)], int(highs[-1]), int(epochs[-1])


def halves_swapped(words: np.ndarray) -> bool | None:
    """Whether EVT2.1 words [n] uint64 have their halves swapped, as older cameras write them; None if ambiguous.

    The upper half holds the kind of a word; a pixel mask in its place would have arbitrary kinds.
    """
    known = np.array([0, 1, 8, 0xA, 0xE, 0xF], np.uint64)

    def fits(upper: np.ndarray) -> bool:
        kind = upper >> np.uint64(28)
        times = (upper[kind == 8] & np.uint64(0xFFFFFFF)).astype(np.int64)
        return bool(np.isin(kind, known).all()) and len(times) > 0 and bool((np.diff(times) >= 0).all())

    lower, upper = words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)
    plain, swapped = fits(upper), fits(lower)
    return None if plain == swapped else swapped


def decode_evt3(words: np.ndarray, state: State) -> Decoded:
    """Decode words [n] uint16; the kind says which part of the state a word changes.

    Kinds: y (0), x and polarity of one event (2) or of the base of a vector (3), 12 or 8 pixels from the base on (4, 5), the low (6) and
    high (8) 12 bits of the time. The high part wraps around every 16.8 s.
    """
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
    """Times of EVT3 words.

    Args:
        kind: [n] int64, kinds of the words.
        value: [n] int64, their low 12 bits.
        state: Before the words.

    Returns:
        The time [n] at every word in microseconds, -1 before the first TIME_HIGH; low part, high part and wraps after the last word.
    """
    high_at, low_at = np.flatnonzero(kind == 8), last_index(kind == 6)
    highs = np.concatenate([[state.high], value[high_at]])
    steps = np.diff(highs)
    if state.high < 0:
        steps[:1] = 0
    epochs = np.concatenate([[state.epoch], state.epoch + np.cumsum(steps < -2048)])
    rank = np.cumsum(kind == 8)  # index of the high part in effect; 0 is the one before these words
    moved_at = np.concatenate([[-1], np.where(steps != 0, high_at, -1)])  # a new high part restarts the low part
    moved = np.maximum.accumulate(moved_at)[rank]
    low = np.where(low_at > moved, _fill(value, low_at, 0), np.where((moved < 0) & (low_at < 0), state.low, 0))
    t = np.where(highs[rank] >= 0, low + (highs[rank] << 12) + (epochs[rank] << 24), -1)
    return t, int(low[-1]), int(highs[-1]), int(epochs[-1])
