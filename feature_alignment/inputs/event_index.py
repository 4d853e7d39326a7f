"""Index of a long EVT recording for random access: decoder state and time range of every mebibyte, built in one pass and cached.

The cache is in the user's cache directory (`$XDG_CACHE_HOME` or `~/.cache`, under `feature_alignment/event_index`), not next to the
recording. An index is looked up by size and sampled content. It is used at once if device, inode, size and both time stamps of the file
are known, otherwise only if the hash of the whole content matches.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from feature_alignment.cli.console import log
from feature_alignment.inputs.event_evt import State, times_evt2

CHUNK_BYTES = 1 << 20
CACHED_FROM_BYTES = 1 << 24  # smaller files are scanned each time, which takes milliseconds
_VERSION = 2
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class Index:
    """Index of a recording of k chunks.

    Args:
        states: [k, 6] int64, decoder state before each chunk.
        low_us: [k] int64, lowest possible time in each chunk.
        high_us: [k] int64, highest possible time in each chunk.
        digest: Hash of the whole file.
        stamps: [m, 5] int64, stamps of files known to have this content.
    """

    states: np.ndarray
    low_us: np.ndarray
    high_us: np.ndarray
    digest: str
    stamps: np.ndarray

    def state(self, chunk: int) -> State:
        """Decoder state before a chunk."""
        return State(*map(int, self.states[chunk]))


Word = Literal["EVT2", "EVT2.1", "EVT3"]


def open_index(path: Path, body: int, kind: Word, dtype: np.dtype, swapped: bool) -> Index:
    """The index of a recording, from the cache or built now.

    Args:
        path: Recording.
        body: Offset of its first word.
        kind: Encoding of the words.
        dtype: Of one word.
        swapped: Whether the halves of EVT2.1 words are swapped.
    """
    if path.stat().st_size < CACHED_FROM_BYTES:
        return _build(path, body, kind, dtype, swapped)
    stamp = _stamp(path)
    cache_file = _cache_folder() / f"{_sampled(path, body, kind)}.npz"
    index = _load(cache_file)
    if index is not None and len(index.low_us) == -(-(path.stat().st_size - body) // CHUNK_BYTES):
        if (index.stamps == stamp).all(1).any():
            return index
        if _digest(path) == index.digest:
            index = replace(index, stamps=np.concatenate([index.stamps[-15:], stamp[None]]))
            _save(cache_file, index)
            return index
    log.info("%s: building the index of a recording of %.1f GB; it is cached in %s.", path, path.stat().st_size / 1e9, cache_file.parent)
    index = _build(path, body, kind, dtype, swapped)
    if (_stamp(path) == stamp).all():  # the file was not changed in the meantime
        _save(cache_file, replace(index, stamps=stamp[None]))
    return index


def _stamp(path: Path) -> np.ndarray:
    s = path.stat()
    return np.array([s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns]).astype(np.int64)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "feature_alignment" / "event_index"


def _sampled(path: Path, body: int, kind: Word) -> str:
    """A cache key from the size and 64 pieces of 4 KiB: it distinguishes recordings, but does not prove equality."""
    size = path.stat().st_size
    digest = hashlib.blake2b(f"{_VERSION} {kind} {body} {size}".encode(), digest_size=16)
    with open(path, "rb") as file:
        for at in np.linspace(0, max(0, size - _SAMPLE_BYTES), _SAMPLES).astype(int):
            file.seek(int(at))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _load(cache_file: Path) -> Index | None:
    """A cached index; None if it is missing or damaged, so that it is built again."""
    try:
        with open(cache_file, "rb") as file, np.load(file, allow_pickle=False) as stored:
            index = Index(stored["states"], stored["low_us"], stored["high_us"], str(stored["digest"]), stored["stamps"])
    except Exception:  # np.load raises many different errors for a damaged file
        return None
    shapes = index.states.shape == (len(index.low_us), 6) and index.low_us.shape == index.high_us.shape
    return index if shapes and index.stamps.ndim == 2 and index.stamps.shape[1] == 5 else None


def _save(cache_file: Path, index: Index) -> None:
    """Write an index atomically. If the cache is not writable, the index is built again next time."""
    temporary = ""
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=cache_file.parent, suffix=".tmp")
        with open(handle, "wb") as file:
            arrays = {"states": index.states, "low_us": index.low_us, "high_us": index.high_us, "stamps": index.stamps}
            np.savez(file, allow_pickle=False, digest=np.array(index.digest), **arrays)
        os.replace(temporary, cache_file)
    except OSError as error:
        log.info("The event index is not cached: %s: %s.", cache_file.parent, error.strerror or error)
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def chunk_words(path: Path, start: int, stop: int, dtype: np.dtype, swapped: bool) -> np.ndarray:
    """Read the words of bytes [start, stop) in native byte order; an incomplete last word is dropped.

    Args:
        path: Recording.
        start: First byte.
        stop: Byte after the last.
        dtype: Of one word.
        swapped: Whether to swap the halves of 64-bit words.

    Returns:
        [n], unsigned.
    """
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(stop - start)
    words = np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype)
    return words.astype(dtype.newbyteorder("=")) if not swapped else words << np.uint64(32) | words >> np.uint64(32)


def _build(path: Path, body: int, kind: Word, dtype: np.dtype, swapped: bool) -> Index:
    states, lows, highs = [], [], []
    state = State()
    for words in _chunks(path, body, dtype, swapped):
        states.append(astuple(state))
        low, high, state = _pass(words, state, kind)
        lows.append(low)
        highs.append(high)
    digest = _digest(path) if path.stat().st_size >= CACHED_FROM_BYTES else ""
    before = np.array(states, np.int64).reshape(-1, 6)
    return Index(before, np.array(lows, np.int64), np.array(highs, np.int64), digest, np.zeros((0, 5), np.int64))


def _chunks(path: Path, body: int, dtype: np.dtype, swapped: bool) -> Iterator[np.ndarray]:
    size = path.stat().st_size
    for start in range(body, size, CHUNK_BYTES):
        yield chunk_words(path, start, min(start + CHUNK_BYTES, size), dtype, swapped)


def _pass(words: np.ndarray, state: State, kind: Word) -> tuple[int, int, State]:
    """Lowest and highest possible time of a chunk in microseconds and the state after it, without decoding its events."""
    if kind != "EVT3":
        upper = (words >> np.uint64(32)).astype(np.uint32) if kind == "EVT2.1" else words
        set_high = (upper[upper >> 28 == 8] & 0xFFFFFFF).astype(np.int64)
        before = state.high + (state.epoch << 28) if state.high >= 0 else None
        whole, end_high, end_epoch = times_evt2(np.full(len(set_high), 8), set_high, state)
        high = np.concatenate([[before] if before is not None else [], whole]).astype(np.int64)
        if not len(high):
            return 0, -1, state
        return int(high.min()) << 6, int(high.max()) << 6 | 63, replace(state, high=end_high, epoch=end_epoch)
    return _pass_evt3(words, state)


def _pass_evt3(words: np.ndarray, state: State) -> tuple[int, int, State]:
    sort = words >> 12
    high_at, low_at = np.flatnonzero(sort == 8), np.flatnonzero(sort == 6)
    highs = np.concatenate([[state.high], (words[high_at] & 0xFFF).astype(np.int64)])
    changed = np.flatnonzero(np.diff(highs))  # the high part is repeated far more often than it changes
    parts = highs[np.concatenate([[0], changed + 1])]
    steps = np.diff(parts)
    steps[:1] *= state.high >= 0
    starts = (parts << 12) + (np.concatenate([[state.epoch], state.epoch + np.cumsum(steps < -2048)]) << 24)
    moved = high_at[changed[steps != 0]] if len(changed) else changed
    after = replace(state, high=int(parts[-1]), epoch=int(starts[-1] - (parts[-1] << 12)) >> 24)
    if len(low_at) and (not len(moved) or low_at[-1] > moved[-1]):
        after = replace(after, low=int(words[low_at[-1]] & 0xFFF))
    elif len(moved):
        after = replace(after, low=0)
    rows, bases, tail = np.flatnonzero(sort == 0), np.flatnonzero(sort == 3), sort
    if len(rows):
        after = replace(after, row=int(words[rows[-1]] & 0x7FF))
    if len(bases):
        word = int(words[bases[-1]])
        after, tail = replace(after, base=word & 0x7FF, base_p=word >> 11 & 1), sort[bases[-1] :]
    after = replace(after, base=after.base + 12 * int((tail == 4).sum()) + 8 * int((tail == 5).sum()))
    starts = starts[parts >= 0]
    return (int(starts.min()), int(starts.max()) + 0xFFF, after) if len(starts) else (0, -1, after)
