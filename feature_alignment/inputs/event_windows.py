"""Read a time window of a recording without reading the rest of it.

Readers return `RawEvents` (already in microseconds), an `EventTable` (random access: the window is found by bisection), or `EventBlocks`
(sequential access: events outside the window are dropped block by block).
"""

from __future__ import annotations

import bisect
import copy
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np

from feature_alignment.cli.console import UserError, log, record_repair
from feature_alignment.inputs.event_units import TimeSample, TimeUnit, choose_unit, refuse_wrapped, to_us

EVENT_FIELDS = ("x", "y", "t", "p")
MAX_UNPACKED_BYTES = 1 << 30  # of one compressed file, or of one window
_SMALL = 1 << 17  # tables up to this many rows are read completely
_RUN, _RUNS = 512, 64  # length and number of the runs of rows from which a unit is recognized
_MARGIN = 1 << 14  # rows read on each side of a window: packets of a camera arrive slightly out of order
_SCAN = 1 << 20
_MOST_ROWS = 1 << 34
_PATIENCE_US = 1_000_000  # blocks are read this far beyond the end of a window


@dataclass(frozen=True)
class RawEvents:
    """Events of a file.

    Args:
        events: x, y, t, p, each [n]; t in microseconds.
        sensor_hw: Height and width in pixels, if the file states them.
        start_us: Start of the recording, if `events` are only a window of it.
    """

    events: dict[str, np.ndarray]
    sensor_hw: tuple[int, int] | None = None
    start_us: int | None = None


@dataclass(frozen=True)
class EventTable:
    """Events with random access by row.

    Args:
        count: Number of rows.
        times: Slice of rows -> t [n] as stored.
        rows: Slice of rows -> x, y, t, p, each [n], as stored.
        sensor_hw: Height and width in pixels, if the file states them.
        unit: Unit of t, if the file states it.
        offset: Offset that the file adds to t, in its unit.
        row_bytes: Memory of one row.
        close: Closes the file.
    """

    count: int
    times: Callable[[slice], np.ndarray]
    rows: Callable[[slice], dict[str, np.ndarray]]
    sensor_hw: tuple[int, int] | None = None
    unit: TimeUnit | None = None
    offset: int = 0
    row_bytes: int = 16
    close: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class EventBlocks:
    """Events with sequential access.

    Args:
        blocks: Of x, y, t, p, each [n], as stored.
        sensor_hw: Height and width in pixels, if the file states them.
        unit: Unit of t, if the file states it.
        first_us: Time of the file's first event, if the blocks are only a part of it.
    """

    blocks: Iterator[dict[str, np.ndarray]]
    sensor_hw: tuple[int, int] | None = None
    unit: TimeUnit | None = None
    first_us: int | None = None


class StoredArray:
    """A flat array in a file of which only the requested rows are read.

    It is not a memory map: the system would keep the pages around every page that is touched, up to a whole file of 2 GB.
    """

    def __init__(self, file: IO[bytes], dtype: np.dtype, offset: int, count: int) -> None:
        """Open an array of `count` values at byte `offset` of a file."""
        self._file = os.dup(file.fileno())  # the caller may close or delete the file
        weakref.finalize(self, os.close, self._file)
        self._record, self._offset, self._field = dtype, offset, ""
        self.shape = (count,)
        self._whole: StoredArray | None = None
        self.dtype = dtype

    def field(self, name: str) -> StoredArray:
        """The values of one field of a structured array."""
        part = copy.copy(self)
        part._whole = self  # keeps the file open
        part._field, part.dtype = name, self._record[name]
        return part

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Read a slice of rows."""
        start, stop, _ = rows.indices(self.shape[0])
        size = self._record.itemsize
        data = os.pread(self._file, max(0, stop - start) * size, self._offset + start * size)
        values = np.frombuffer(data, self._record)
        return values[self._field] if self._field else values


Column = np.ndarray | StoredArray


def table_of(columns: Mapping[str, Column], sensor_hw: tuple[int, int] | None = None, unit: TimeUnit | None = None) -> EventTable:
    """A table of four columns.

    Args:
        columns: x, y, t, p, each [n], in memory or in a file.
        sensor_hw: Height and width in pixels, if known.
        unit: Unit of t, if known.

    Raises:
        ValueError: If the columns differ in length.
    """
    lengths = {k: v.shape for k, v in columns.items()}
    if len(set(lengths.values())) != 1 or any(len(s) != 1 for s in lengths.values()):
        raise ValueError(f"x, y, t, p must be flat and equally long, got shapes {lengths}")
    return EventTable(
        columns["t"].shape[0],
        times=lambda rows: np.asarray(columns["t"][rows]),
        rows=lambda rows: {k: np.array(v[rows]) for k, v in columns.items()},
        sensor_hw=sensor_hw,
        unit=unit,
        row_bytes=sum(v.dtype.itemsize for v in columns.values()),
    )


def refuse_long(span_us: int, name: str, limit_us: int = 100_000) -> None:
    """Refuse a stream that is too long for EventGPT to be read without a window.

    Args:
        span_us: Length of the stream.
        name: For the message.
        limit_us: Shortest refused length.

    Raises:
        UserError: If the stream is that long.
    """
    if span_us >= limit_us:
        raise UserError(
            f"{name} spans {span_us / 1000:.1f} ms; EventGPT was built for windows under {limit_us // 1000} ms. Say which part to take: "
            "--event_window_ms 50 (and --event_start_ms, counted from the file's first event)."
        )


# ---- tables


def read_table(table: EventTable, name: str, start_us: int, window_us: int | None, asked: TimeUnit | None) -> RawEvents:
    """Read a table, or a window of it, in microseconds.

    Args:
        table: Events with random access.
        name: For messages.
        start_us: Start of the window after the first event.
        window_us: Length of the window; None for all events.
        asked: Unit that the user stated.

    Raises:
        UserError: If the unit is ambiguous, or the stream is too long to be read without a window.
    """
    if table.count > _MOST_ROWS:
        raise UserError(f"{name} holds {table.count:,} rows; at most {_MOST_ROWS:,} are read.")
    if not table.count:
        return RawEvents(table.rows(slice(0, 0)), table.sensor_hw)
    if table.count <= _SMALL:
        events = table.rows(slice(0, table.count))
        refuse_wrapped(events["t"], name)
        sample = _sample_of(events["t"], table)
        unit = choose_unit(sample, name, asked, table.unit)
        return RawEvents(_converted(events, unit, name, table.offset), table.sensor_hw)
    sample = _sample_of(None, table)
    refuse_wrapped(sample.values, name)
    unit = choose_unit(sample, name, asked, table.unit)

    def times(rows: slice) -> np.ndarray:
        return to_us(table.times(rows), unit, name)

    sampled = to_us(sample.values, unit, name)
    if (np.diff(sampled) < -1000).any():  # far out of order: all time stamps must be read
        return _scan(table, name, unit, times, start_us, window_us)
    first = int(times(slice(0, min(table.count, _MARGIN))).min())
    if window_us is None:
        refuse_long(int(times(slice(max(0, table.count - _MARGIN), table.count)).max()) - first, name)
        return RawEvents(_converted(_rows(table, 0, table.count), unit, name, table.offset), table.sensor_hw)
    begin, end = first + start_us, first + start_us + window_us
    low, high = (bisect.bisect_left(range(table.count), at, key=lambda i: int(times(slice(i, i + 1))[0])) for at in (begin, end))
    low, high = max(0, low - _MARGIN), min(table.count, high + _MARGIN)
    t = times(slice(low, high))
    edge = min(64, len(t) // 4)
    inside = (t >= begin) & (t < end)
    if (low and inside[:edge].any()) or (high < table.count and inside[-edge:].any()):
        return _scan(table, name, unit, times, start_us, window_us)
    in_window = np.flatnonzero(inside)
    if not len(in_window):
        return RawEvents(_converted(table.rows(slice(0, 0)), unit, name, 0), table.sensor_hw, first)
    low, high = low + int(in_window[0]), low + int(in_window[-1]) + 1
    return _with_start(_converted(_rows(table, low, high), unit, name, table.offset), table, unit, name, first)


def _sample_of(t: np.ndarray | None, table: EventTable) -> TimeSample:
    """Time stamps from which a unit is recognized: all of a small table, 64 runs of 512 of a large one."""
    if t is not None:
        return TimeSample(t, float(t.min()), float(t.max()), len(t)) if t.dtype.kind in "iuf" else TimeSample(t, 0, 0, len(t))
    starts = np.linspace(0, table.count - _RUN, _RUNS).astype(int)
    values = np.concatenate([table.times(slice(int(s), int(s) + _RUN)) for s in starts])
    numbers = values if values.dtype.kind in "iuf" else np.zeros(1)
    return TimeSample(values, float(numbers.min()), float(numbers.max()), table.count, _RUN)


def _rows(table: EventTable, low: int, high: int) -> dict[str, np.ndarray]:
    needed = (high - low) * table.row_bytes
    if needed > MAX_UNPACKED_BYTES:
        raise UserError(f"{high - low:,} events would take {needed:,} bytes; at most {MAX_UNPACKED_BYTES:,} are read.")
    return table.rows(slice(low, high))


def _converted(events: dict[str, np.ndarray], unit: TimeUnit, name: str, offset: int) -> dict[str, np.ndarray]:
    # DSEC stores t as uint32 and an offset beyond 2**32: NumPy 2 refuses their sum, and older versions wrap it around
    shift = int(to_us(np.array([offset]), unit, name)[0])
    return {**events, "t": to_us(events["t"], unit, name) + shift}


def _with_start(events: dict[str, np.ndarray], table: EventTable, unit: TimeUnit, name: str, first: int) -> RawEvents:
    return RawEvents(events, table.sensor_hw, first + int(to_us(np.array([table.offset]), unit, name)[0]))


def _scan(
    table: EventTable, name: str, unit: TimeUnit, times: Callable[[slice], np.ndarray], start_us: int, window_us: int | None
) -> RawEvents:
    """A window of an unsorted table: all time stamps are read in pieces, and the rows of the window are selected."""
    log.info("%s is not sorted by time; all of its %s time stamps are read.", name, f"{table.count:,}")
    pieces = [slice(i, min(i + _SCAN, table.count)) for i in range(0, table.count, _SCAN)]
    ranges = [(int(t.min()), int(t.max())) for t in map(times, pieces)]
    first = min(low for low, _ in ranges)
    if window_us is None:
        refuse_long(max(high for _, high in ranges) - first, name)
        return RawEvents(_converted(_rows(table, 0, table.count), unit, name, table.offset), table.sensor_hw)
    begin, end = first + start_us, first + start_us + window_us
    parts = []
    for piece, (low, high) in zip(pieces, ranges, strict=True):
        if low < end and high >= begin:
            t = times(piece)
            inside = (t >= begin) & (t < end)
            parts.append({k: v[inside] for k, v in table.rows(piece).items()})
    events = joined(parts) or table.rows(slice(0, 0))
    record_repair(name, "sorted by time", "is not sorted by time; sorted by t.")
    return _with_start(_converted(events, unit, name, table.offset), table, unit, name, first)


# ---- blocks


def joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenate streams; an empty dict for no parts."""
    return {k: np.concatenate([part[k] for part in parts]) for k in EVENT_FIELDS} if parts else {}


def read_blocks(source: EventBlocks, name: str, start_us: int, window_us: int | None, asked: TimeUnit | None) -> RawEvents:
    """Read a window of sequential events; reading stops one second after the end of the window.

    The unit is recognized from the first block, which has at least a few thousand events.

    Args:
        source: Events with sequential access.
        name: For messages.
        start_us: Start of the window after the first event.
        window_us: Length of the window; None for all events.
        asked: Unit that the user stated.

    Raises:
        UserError: If the events are unsorted, too long or too many.
    """
    parts: list[dict[str, np.ndarray]] = []
    unit: TimeUnit | None = None
    first, latest, num_bytes = source.first_us, None, 0
    inside: slice | np.ndarray
    for block in source.blocks:
        if not len(block["t"]):
            continue
        refuse_wrapped(block["t"], name)
        unit = unit or choose_unit(_block_sample(block["t"]), name, asked, source.unit)
        t = to_us(block["t"], unit, name)
        first = int(t.min()) if first is None else first
        if int(t.min()) < first and source.first_us is None:
            _refuse_unsorted(name, first - int(t.min()))
        latest = int(t.max()) if latest is None else max(latest, int(t.max()))
        if window_us is None:
            refuse_long(latest - first, name)
            inside = slice(None)
        else:
            begin, end = first + start_us, first + start_us + window_us
            if int(t.min()) >= end + _PATIENCE_US:
                break
            inside = (t >= begin) & (t < end)
        parts.append({k: v[inside] for k, v in {**block, "t": t}.items()})
        num_bytes += sum(v.nbytes for v in parts[-1].values())
        if num_bytes > MAX_UNPACKED_BYTES:
            raise UserError(f"{name}: the events of this window take more than {num_bytes:,} bytes. Pass a smaller --event_window_ms.")
    empty = {k: np.zeros(0, np.int64) for k in EVENT_FIELDS}
    return RawEvents(joined(parts) or empty, source.sensor_hw, first if window_us is not None else None)


def _block_sample(t: np.ndarray) -> TimeSample:
    if t.dtype.kind not in "iuf":
        return TimeSample(t, 0, 0, len(t))
    return TimeSample(t, float(t.min()), float(t.max()), len(t))


def _refuse_unsorted(name: str, back_us: int) -> None:
    raise UserError(
        f"{name} is not sorted by time: an event {back_us:,} us before those of the first block. Sort it by time and write it again, "
        "for example as .npz: np.savez('events.npz', x=x, y=y, t=t, p=p)."
    )
