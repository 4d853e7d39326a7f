"""Event streams in, CLIP-ready event images out, exactly as EventGPT's released inference code makes them.

A stream is a dict of four equally long arrays: x, y (pixels), t (microseconds, ascending), p (1 brighter, 0 darker).
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np

from feature_alignment.console import UserError

EVENT_FIELDS = ("x", "y", "t", "p")
MAX_WINDOW_US = 100_000  # EventGPT was built for windows of at most this length
_BACKGROUND, _DARKER, _BRIGHTER = (255, 255, 255), (0, 0, 255), (255, 0, 0)

# What a pickled dict of plain arrays needs, and nothing else. Newer NumPy pickles name numpy._core, older ones numpy.core.
_SAFE_GLOBALS = {
    (module, name)
    for root in ("numpy.core", "numpy._core")
    for module, name in ((f"{root}.multiarray", "_reconstruct"), (f"{root}.multiarray", "scalar"), (f"{root}.numeric", "_frombuffer"))
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _SAFE_GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def load_events(path: str | Path) -> dict[str, np.ndarray]:
    """Read EventGPT's `.npy` (a pickled dict x, y, t, p) without giving the pickle any code to run.

    returns: x, y int64 >= 0, t int64 microseconds ascending, p uint8 in {0, 1}
    raises:  UserError for a missing, truncated, hostile, empty or inconsistent file
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no event file at {path}; --events wants an EventGPT .npy (a dict of x, y, t, p).")
    raw = path.read_bytes()
    if not raw.startswith(b"\x93NUMPY"):
        raise UserError(f"{path} is not a .npy file (it starts with {raw[:6]!r}).")
    stream = io.BytesIO(raw)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
        if dtype != object or shape != ():
            raise UserError(f"{path} holds an array of {dtype} with shape {shape}; wanted EventGPT's pickled dict of x, y, t, p.")
        content = _ArraysOnly(stream).load()
        content = content.item() if isinstance(content, np.ndarray) and content.shape == () else content
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything; nothing in it has been run
        raise UserError(f"{path} could not be read as a dict of event arrays: {error}. Only plain NumPy arrays are accepted.") from None
    if not isinstance(content, dict) or not set(EVENT_FIELDS) <= set(content):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} holds {found}; wanted a dict with x, y, t and p.")
    return check_events({k: np.asarray(content[k]) for k in EVENT_FIELDS}, str(path))


def check_events(events: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Normalise types and refuse streams that would be misread; `name` is for the message."""
    lengths = {k: v.shape for k, v in events.items()}
    if len(set(lengths.values())) != 1 or any(len(s) != 1 for s in lengths.values()):
        raise UserError(f"{name}: x, y, t, p must be flat and equally long, got shapes {lengths}.")
    if any(v.dtype.kind not in "iufb" for v in events.values()):
        raise UserError(f"{name}: x, y, t, p must be numbers, got { {k: str(v.dtype) for k, v in events.items()} }.")
    n = len(events["t"])
    if n < 5:
        raise UserError(f"{name} holds {n} events; EventGPT needs at least 5, one for each of its five slices.")
    if any(v.dtype.kind == "f" and not np.isfinite(v).all() for v in events.values()):
        raise UserError(f"{name}: non-finite values among the events.")
    x, y, t = (events[k].astype(np.int64) for k in ("x", "y", "t"))
    if min(x.min(), y.min()) < 0 or max(x.max(), y.max()) >= 8192:
        raise UserError(f"{name}: coordinates from ({x.min()}, {y.min()}) to ({x.max()}, {y.max()}); wanted pixels of a sensor, 0 to 8191.")
    if (np.diff(t) < 0).any():
        raise UserError(f"{name}: time stamps are not ascending; sort the events by t first.")
    if t[-1] - t[0] >= MAX_WINDOW_US:
        raise UserError(
            f"{name} spans {(t[-1] - t[0]) / 1000:.1f} ms; EventGPT was built for windows under {MAX_WINDOW_US // 1000} ms. "
            "Cut the stream first."
        )
    p = events["p"]
    if not np.isin(p, (0, 1)).all():
        raise UserError(f"{name}: polarity holds {np.unique(p)[:5].tolist()}; wanted 0 (darker) and 1 (brighter).")
    return {"x": x, "y": y, "t": t, "p": p.astype(np.uint8)}


def slice_by_count(num_events: int, num_slices: int) -> list[slice]:
    """Equal counts; the last slice takes the remainder."""
    k = num_events // num_slices
    return [slice(i * k, num_events if i == num_slices - 1 else (i + 1) * k) for i in range(num_slices)]


def event_image(x: np.ndarray, y: np.ndarray, p: np.ndarray, canvas_hw: tuple[int, int] | None = None) -> np.ndarray:
    """Draw events on white: the last event at a pixel wins, darker blue, brighter red.

    x, y, p:   [n] in stream order; canvas_hw: None = the events' own extent, as released
    returns:   [h, w, 3] uint8
    NumPy promises no order for repeated indices in an assignment; the maximum of (index, polarity) needs none.
    """
    h, w = canvas_hw or (int(y.max()) + 1, int(x.max()) + 1)
    if len(x) and (y.max() >= h or x.max() >= w):
        raise UserError(f"events reach pixel ({x.max()}, {y.max()}), outside the model's canvas of {w} x {h}.")
    last = np.full(h * w, -1, np.int64)
    np.maximum.at(last, y.astype(np.int64) * w + x, (np.arange(len(x), dtype=np.int64) << 1) + p)
    palette = np.array([_DARKER, _BRIGHTER, _BACKGROUND], np.uint8)
    return palette[np.where(last < 0, 2, last & 1)].reshape(h, w, 3)


def event_images(events: dict[str, np.ndarray], num_slices: int, canvas_hw: tuple[int, int] | None = None) -> list[np.ndarray]:
    """A stream as `num_slices` images [h, w, 3] uint8 of equal event counts."""
    return [event_image(events["x"][s], events["y"][s], events["p"][s], canvas_hw) for s in slice_by_count(len(events["t"]), num_slices)]
