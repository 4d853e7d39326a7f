"""Event streams and event images, exactly as EventGPT's released inference code makes them.

A stream is a dict of four equally long arrays: x, y (pixels), t (microseconds, ascending), p (1 brighter, 0 darker).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from feature_alignment.cli.console import UserError, record_repair
from feature_alignment.inputs.event_columns import MAX_COORDINATE
from feature_alignment.inputs.event_files import read_event_file
from feature_alignment.inputs.event_units import TimeUnit
from feature_alignment.inputs.event_windows import refuse_long

MAX_WINDOW_US = 100_000  # EventGPT was built for windows shorter than this
_FARTHEST = 2**61  # differences of numbers below it fit 64 bits
_WHITE = 255


def load_events(
    path: str | Path, window_ms: float | None = None, start_ms: float = 0.0, time_unit: TimeUnit | None = None
) -> dict[str, np.ndarray]:
    """Read an event file of any known format (see `event_files`), cut it to a window and normalize it.

    Args:
        path: Event file.
        window_ms: Keep events of [start_ms, start_ms + window_ms) after the first event; None keeps all and refuses 100 ms or more.
        start_ms: Start of the window.
        time_unit: Unit of the file's times; None for the stated or recognized unit.

    Returns:
        x, y [n] int64 >= 0, pixels; t [n] int64, ascending microseconds; p [n] uint8 in {0, 1}.

    Raises:
        UserError: For a file that cannot be read or would be misread.
    """
    if window_ms is not None and not 0 < window_ms <= MAX_WINDOW_US / 1000:
        raise UserError(f"--event_window_ms {window_ms:g}: wanted more than 0 and at most {MAX_WINDOW_US // 1000}.")
    if not 0 <= start_ms < math.inf or (start_ms and window_ms is None):
        raise UserError(f"--event_start_ms {start_ms:g}: wanted 0 or more, together with --event_window_ms.")
    path = Path(path)
    start_us, window_us = round(start_ms * 1000), None if window_ms is None else round(window_ms * 1000)
    raw = read_event_file(path, start_us, window_us, time_unit)
    return check_events(raw.events, str(path), raw.sensor_hw, start_us, window_us, raw.start_us)


def check_events(
    events: dict[str, np.ndarray],
    name: str,
    sensor_hw: tuple[int, int] | None = None,
    start_us: int = 0,
    window_us: int | None = None,
    origin_us: int | None = None,
) -> dict[str, np.ndarray]:
    """Normalize a stream. Repairs are counted and logged; input that would be misread is refused.

    Repairs: polarity {-1, 1} or bool becomes {0, 1}; unsorted events are sorted by t, equal times in file order; events outside the sensor
    are dropped, unless they are more than half.

    Args:
        events: x, y, t, p, each [n]; t in microseconds.
        name: For messages.
        sensor_hw: Height and width of the sensor in pixels, if known.
        start_us: Start of the window after `origin_us`.
        window_us: Length of the window; None keeps all.
        origin_us: Start of the recording; default its first event.

    Returns:
        As `load_events`.

    Raises:
        UserError: For a stream that would be misread.
    """
    lengths = {k: v.shape for k, v in events.items()}
    if len(set(lengths.values())) != 1 or any(len(s) != 1 for s in lengths.values()):
        raise UserError(f"{name}: x, y, t, p must be flat and equally long, got shapes {lengths}.")
    if any(v.dtype.kind not in "iufb" for v in events.values()):
        raise UserError(f"{name}: x, y, t, p must be numbers, got { {k: str(v.dtype) for k, v in events.items()} }.")
    if any(v.dtype.kind == "f" and not np.isfinite(v).all() for v in events.values()):
        raise UserError(f"{name}: non-finite values among the events.")
    _refuse_few(len(events["t"]), name)
    t = events["t"]
    if t.dtype.kind == "f" and float(np.ptp(t)) < 10 and (t != np.floor(t)).any():
        raise UserError(f"{name}: time stamps from {t.min():g} to {t.max():g} look like seconds; wanted microseconds.")
    for k in ("x", "y", "t"):
        low, high = events[k].min().item(), events[k].max().item()
        if not -_FARTHEST < low <= high < _FARTHEST:
            raise UserError(f"{name}: {k} goes from {low:g} to {high:g}; wanted {'microseconds' if k == 't' else 'pixels'}.")
        if k != "t" and events[k].dtype.kind == "f" and (events[k] != np.floor(events[k])).any():
            raise UserError(f"{name}: {k} holds fractions of pixels; wanted whole ones.")
    x, y, t = (events[k].astype(np.int64) for k in ("x", "y", "t"))
    p = _polarity(events["p"], name)

    backward = int((np.diff(t) < 0).sum())
    if backward:
        record_repair(name, "sorted by time", f"time went backward {backward} times; sorted by t.")
        order = np.argsort(t, kind="stable")
        x, y, t, p = x[order], y[order], t[order], p[order]
    if window_us is None:
        refuse_long(int(t[-1] - t[0]), name, MAX_WINDOW_US)
    else:
        begin = (int(t[0]) if origin_us is None else origin_us) + start_us
        rows = slice(*np.searchsorted(t, (begin, begin + window_us)))
        x, y, t, p = x[rows], y[rows], t[rows], p[rows]
        _refuse_few(len(t), f"{name}, {window_us / 1000:g} ms from {start_us / 1000:g} ms on,")

    h, w = (min(side, MAX_COORDINATE) for side in sensor_hw or (MAX_COORDINATE, MAX_COORDINATE))
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    outside = int(len(x) - inside.sum())
    if outside * 2 > len(x):
        extent = f"coordinates from ({x.min()}, {y.min()}) to ({x.max()}, {y.max()})"
        raise UserError(f"{name}: {extent}; {outside} of {len(x)} events lie outside a sensor of {w} x {h} pixels.")
    if outside:
        share = "more than 1 % of the events" if outside * 100 > len(x) else "events"
        message = f"{outside} of {len(x)} events outside {w} x {h} pixels are dropped."
        record_repair(name, f"{share} outside the sensor dropped", message)
        x, y, t, p = x[inside], y[inside], t[inside], p[inside]
        _refuse_few(len(t), name)
    return {"x": x, "y": y, "t": t, "p": p}


def _polarity(p: np.ndarray, name: str) -> np.ndarray:
    """Polarities {0, 1}, bool or {-1, 1} as uint8 {0, 1}. A stream with -1 and 0 is refused: the meaning of 0 is ambiguous."""
    values = set(np.unique(p)[:9].tolist())
    if values <= {0, 1}:
        return p.astype(np.uint8)
    if values <= {-1, 1}:
        record_repair(name, "polarity -1 read as 0", f"{int((p == -1).sum())} of {len(p)} polarities are -1; read as 0 (darker).")
        brighter: np.ndarray = p == 1
        return brighter.astype(np.uint8)
    raise UserError(f"{name}: polarity holds {sorted(values)}; wanted 0 (darker) and 1 (brighter), or -1 and 1.")


def _refuse_few(count: int, name: str) -> None:
    if count < 5:
        raise UserError(f"{name} holds {count} events; EventGPT needs at least 5, one for each of its five slices.")


def slice_by_count(num_events: int, num_slices: int) -> list[slice]:
    """Split events into slices of equal counts; the last slice takes the remainder."""
    k = num_events // num_slices
    return [slice(i * k, num_events if i == num_slices - 1 else (i + 1) * k) for i in range(num_slices)]


def event_image(x: np.ndarray, y: np.ndarray, p: np.ndarray, canvas_hw: tuple[int, int] | None = None) -> np.ndarray:
    """Draw events on white: darker is blue, brighter red; the last event at a pixel wins.

    NumPy guarantees no order for repeated indices in an assignment, so the last event is found by the maximum of (index, polarity). Then
    all events at a pixel write the same color.

    Args:
        x: [n] columns, in stream order.
        y: [n] rows.
        p: [n] polarities in {0, 1}.
        canvas_hw: Height and width of the image; None for the extent of the events, as released.

    Returns:
        [h, w, 3] uint8.

    Raises:
        UserError: For events outside the canvas.
    """
    h, w = canvas_hw or (int(y.max()) + 1, int(x.max()) + 1)
    if len(x) and (y.max() >= h or x.max() >= w):
        raise UserError(f"events reach pixel ({x.max()}, {y.max()}), outside the model's canvas of {w} x {h}.")
    pixel = y.astype(np.int64) * w + x
    last = np.zeros(h * w, np.int32)
    np.maximum.at(last, pixel, (np.arange(len(x), dtype=np.int32) << 1) + p)
    image = np.full(h * w * 3, _WHITE, np.uint8)
    red = 3 * pixel
    image[red + 1] = 0  # no green in either color
    image[red + 2 * (last[pixel] & 1)] = 0  # no red where darker, no blue where brighter
    return image.reshape(h, w, 3)


def event_images(events: dict[str, np.ndarray], num_slices: int, canvas_hw: tuple[int, int] | None = None) -> list[np.ndarray]:
    """Draw a stream as `num_slices` images [h, w, 3] uint8 of equal event counts; see `event_image`."""
    return [event_image(events["x"][s], events["y"][s], events["p"][s], canvas_hw) for s in slice_by_count(len(events["t"]), num_slices)]
