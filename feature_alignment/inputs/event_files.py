"""Event files of every camera maker as raw arrays. The format is told from the first bytes, never from the suffix.

    .npy            EventGPT's pickled dict, or a structured array     read by a restricted unpickler
    .npz            N-ImageNet, both layouts                           NumPy, no pickle
    .h5             DSEC, only the time window that is asked for       h5py + hdf5plugin, extra [events]
    .dat .raw       Prophesee DAT, EVT2, EVT3                          NumPy
    .aedat4         iniVation                                          aedat, extra [events]

Each reader returns what the file says; `events.load_events` brings it into one form and counts what it had to change.
"""

from __future__ import annotations

import bisect
import io
import math
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from feature_alignment.console import UserError, mended
from feature_alignment.pickles import ArraysOnly, look_through

EVENT_FIELDS = ("x", "y", "t", "p")
INSTALL = "pip install -e '.[events]'"
DSEC_HW = N_IMAGENET_HW = (480, 640)
MAX_UNPACKED_BYTES = 1 << 30  # of one packed file, or of one window
MAX_CHUNK_BYTES = 1 << 26  # of HDF5, which unpacks a whole chunk for one number
_FIELD_NAMES = (EVENT_FIELDS, ("x_pos", "y_pos", "timestamp", "polarity"))


@dataclass(frozen=True)
class RawEvents:
    """A file's events as stored: four arrays [n], t in microseconds. sensor_hw where the format states it, else None.

    start_us: where the recording begins, if the arrays are already only a window of it
    """

    events: dict[str, np.ndarray]
    sensor_hw: tuple[int, int] | None = None
    start_us: int | None = None


def read_event_file(path: Path, start_us: int = 0, window_us: int | None = None) -> RawEvents:
    """Read any known event file. Formats with an index read only [start_us, start_us + window_us) after their first event.

    raises: UserError for a missing, unknown, truncated, hostile or inconsistent file, or a library that is not installed
    """
    if not path.is_file():
        raise UserError(f"no event file at {path}; --events wants an EventGPT .npy, .npz, DSEC .h5, Prophesee .dat or .raw, or .aedat4.")
    with open(path, "rb") as file:
        head = file.read(4096)
    for first_bytes, read in READERS.items():
        if head.startswith(first_bytes):
            return read(path, start_us, window_us)
    raise UserError(
        f"{path} is not an event file this project knows (it starts with {head[:12]!r}); known: EventGPT .npy (a dict of x, y, t, p), "
        "N-ImageNet .npz, DSEC events.h5, Prophesee .dat, .raw in EVT2 or EVT3, iniVation .aedat4."
    )


# ---- NumPy files


def _plain_array(stream: IO[bytes], size: int) -> np.ndarray:
    """The array of a `.npy` of `size` bytes, without objects; ValueError for one whose header promises more than is there."""
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    promised, there = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if min(shape, default=0) < 0 or promised > there:
        raise ValueError(f"its header promises {shape} of {dtype}, {promised:,} bytes; {there:,} are there")
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)


def _read_npy(path: Path) -> dict[str, np.ndarray]:
    """EventGPT's pickled dict, without giving the pickle any code to run; or an array with fields x, y, t, p."""
    data = path.read_bytes()
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
        if dtype.names and set(EVENT_FIELDS) <= set(dtype.names) and not dtype.hasobject:
            stream.seek(0)
            content = _plain_array(stream, len(data))
            return {k: content[k] for k in EVENT_FIELDS}
        if dtype != object or shape != ():
            raise UserError(f"{path} holds an array of {dtype} with shape {shape}; wanted EventGPT's pickled dict of x, y, t, p.")
        look_through(data[stream.tell() :])
        content = ArraysOnly(stream).load()
        content = content.item() if isinstance(content, np.ndarray) and content.shape == () else content
        if not isinstance(content, dict) or not all(isinstance(k, str) for k in content) or not set(EVENT_FIELDS) <= set(content):
            found = sorted(str(k)[:40] for k in content)[:20] if isinstance(content, dict) else type(content).__name__
            raise UserError(f"{path} holds {found}; wanted a dict with x, y, t and p.")
        return {k: _flat(content[k], k, len(data)) for k in EVENT_FIELDS}
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything; nothing in it has been run
        raise UserError(
            f"{path} could not be read as a dict of event arrays: {str(error)[:200]}. Only plain NumPy arrays are accepted."
        ) from None


def _flat(column: Any, name: str, file_bytes: int) -> np.ndarray:
    """A column of the pickled dict; ValueError for one that is no plain array, or a view of less than it shows."""
    if isinstance(column, list) and all(type(v) in (int, float, bool) for v in column):
        column = np.array(column)
    if type(column) is not np.ndarray:
        raise ValueError(f"{name} is a {type(column).__name__}, wanted an array of numbers")
    if column.nbytes > file_bytes:
        raise ValueError(f"{name} shows {column.nbytes:,} bytes, more than the file's {file_bytes:,}")
    return column


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """N-ImageNet: one structured array `event_data`, or four arrays x_pos, y_pos, timestamp, polarity."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {i.filename.removesuffix(".npy"): i for i in archive.infolist()}
            wanted = ["event_data"] if "event_data" in members else [k for k in members if any(k in names for names in _FIELD_NAMES)]
            unpacked = sum(members[k].file_size for k in wanted)
            if unpacked > MAX_UNPACKED_BYTES:
                raise ValueError(f"unpacked it takes {unpacked:,} bytes; at most {MAX_UNPACKED_BYTES:,} are read")
            content = {}
            for name in wanted:
                with archive.open(members[name]) as stream:
                    content[name] = _plain_array(stream, members[name].file_size)
    except Exception as error:  # of zipfile, zlib, lzma, NumPy; nothing has been run
        raise UserError(f"{path} could not be read as .npz: {str(error)[:200]}. Only plain NumPy arrays are accepted.") from None
    if "event_data" in content:
        table = content["event_data"]
        content = {k: table[k] for k in table.dtype.names or ()}
    for names in _FIELD_NAMES:
        if set(names) <= set(content):
            return dict(zip(EVENT_FIELDS, (content[k] for k in names), strict=True))
    raise UserError(
        f"{path} holds {sorted(content or members)[:20]}; wanted `event_data` with fields x, y, t, p, or x_pos, y_pos, timestamp, polarity."
    )


# ---- DSEC


def _read_dsec(path: Path, start_us: int, window_us: int | None) -> RawEvents:
    """A time window of DSEC's events.h5: events/{x, y, t, p}, optional t_offset. t comes back absolute."""
    try:
        import h5py
        import hdf5plugin  # noqa: F401  registers the blosc codec DSEC is compressed with
    except ImportError as error:
        raise UserError(f"{path} is HDF5, and {error.name} is not installed. Type:\n  {INSTALL}") from None
    try:
        with h5py.File(path, "r") as file:
            group = _own(file, "events", h5py.Group) if "events" in file else {}
            if not set(EVENT_FIELDS) <= set(group):
                raise UserError(f"{path} holds {sorted(file)[:20]}; wanted DSEC's layout: events/x, events/y, events/t, events/p.")
            columns = {k: _column(_own(group, k, h5py.Dataset)) for k in EVENT_FIELDS}
            lengths = {k: c.shape for k, c in columns.items()}
            if len(set(lengths.values())) != 1 or len(columns["t"].shape) != 1:
                raise UserError(f"{path}: x, y, t, p must be flat and equally long, got shapes {lengths}.")
            count = len(columns["t"])
            offset = int(_own(file, "t_offset", h5py.Dataset)[()]) if "t_offset" in file else 0
            first = int(columns["t"][0]) if count else 0
            rows = slice(0, count)
            if count and window_us is not None:
                rows = _rows_between(columns["t"], first + start_us, first + start_us + window_us)
            elif count:
                refuse_long(int(columns["t"][-1]) - first, str(path))  # before reading an hour of driving
            needed = sum((rows.stop - rows.start) * c.dtype.itemsize for c in columns.values())
            if needed > MAX_UNPACKED_BYTES:
                raise ValueError(f"{rows.stop - rows.start:,} events would take {needed:,} bytes; at most {MAX_UNPACKED_BYTES:,} are read")
            events = {k: c[rows] for k, c in columns.items()}
    except UserError:
        raise
    except Exception as error:  # the library raises errors of every kind
        raise UserError(f"{path} could not be read: {str(error)[:300]}\nIf it names a filter or a plugin, type:\n  {INSTALL}") from None
    # DSEC stores t as uint32 and an offset beyond 2**32: NumPy 2 refuses their sum, older ones wrapped it
    events["t"] = events["t"].astype(np.int64) + offset
    return RawEvents(events, DSEC_HW, first + offset)


def _own(group: Any, name: str, kind: type) -> Any:
    """A part of an HDF5 file that lies in this very file; ValueError for a link into another one."""
    if type(group.get(name, getlink=True)).__name__ != "HardLink" or not isinstance(group[name], kind):
        raise ValueError(f"{name} is no {kind.__name__.lower()} of this file")
    return group[name]


def _column(dataset: Any) -> Any:
    """A dataset of numbers in the file itself, whose pieces can be unpacked one at a time."""
    if dataset.dtype.kind not in "iuf" or dataset.external or dataset.is_virtual:
        raise ValueError(f"{dataset.name} is stored in another file, or holds {dataset.dtype}; wanted numbers")
    if dataset.chunks and math.prod(dataset.chunks) * dataset.dtype.itemsize > MAX_CHUNK_BYTES:
        raise ValueError(
            f"{dataset.name} comes in pieces of {dataset.chunks} numbers; at most {MAX_CHUNK_BYTES:,} bytes are unpacked at once"
        )
    return dataset


def _rows_between(t: Any, begin_us: int, end_us: int) -> slice:
    """Rows with begin_us <= t < end_us, by bisection: about sixty numbers of an hour's recording are read. DSEC's own index
    (`ms_to_idx`) is not asked, so it cannot mislead."""
    return slice(bisect.bisect_left(t, begin_us), bisect.bisect_left(t, end_us))


def refuse_long(span_us: int, name: str, limit_us: int = 100_000) -> None:
    """UserError if a stream is longer than EventGPT was built for and nobody has said which part of it to take."""
    if span_us >= limit_us:
        raise UserError(
            f"{name} spans {span_us / 1000:.1f} ms; EventGPT was built for windows under {limit_us // 1000} ms. Say which part to take: "
            "--event_window_ms 50 (and --event_start_ms, counted from the file's first event)."
        )


# ---- iniVation


def _read_aedat4(path: Path) -> RawEvents:
    try:
        import aedat
    except ImportError:
        raise UserError(f"{path} is .aedat4, and aedat is not installed. Type:\n  {INSTALL}") from None
    parts, sensor_hw = [], None
    try:
        decoder = aedat.Decoder(str(path))
        for stream in decoder.id_to_stream().values():
            if stream["type"] == "events":
                sensor_hw = (int(stream["height"]), int(stream["width"]))
        for packet in decoder:
            if "events" in packet:
                parts.append(packet["events"])
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises several unrelated types; its panics are not even Exceptions
        if not parts:
            raise UserError(f"{path} could not be read as .aedat4: {str(error)[:200]}") from None
        mended(path, "cut off", f"cut off after {sum(map(len, parts))} events ({error}); they are used.")
    if not parts:
        raise UserError(f"{path} holds no event stream.")
    table = np.concatenate(parts)
    polarity = "on" if "on" in (table.dtype.names or ()) else "p"
    return RawEvents({"x": table["x"], "y": table["y"], "t": table["t"], "p": table[polarity]}, sensor_hw)


# ---- Prophesee


def _read_prophesee(path: Path) -> RawEvents:
    """DAT, EVT2 or EVT3, as the text header says."""
    raw = path.read_bytes()
    at = 0
    lines: list[str] = []
    while raw[at : at + 1] == b"%" and not (lines and lines[-1] == "% end"):  # binary data may begin with the byte of "%"
        end = raw.find(b"\n", at)
        if end < 0:
            break
        lines.append(raw[at:end].decode("latin-1").strip())
        at = end + 1
    header = "\n".join(lines)
    encoding = re.search(r"^% (?:evt |format EVT)([\d.]+)", header, re.MULTILINE)
    if encoding is None:
        if not re.search(r"^% (data file|version|height|width|date)", header, re.MULTILINE | re.IGNORECASE):
            raise UserError(f"{path}: its header names no format ({header[:80]!r}); wanted Prophesee .dat, or .raw of EVT2 or EVT3.")
        return RawEvents(_decode_dat(path, raw[at:]), _sensor(header))
    version = encoding[1].rstrip(".").removesuffix(".0")
    if version not in ("2", "3"):
        raise UserError(f"{path} is EVT{version}; only EVT2 and EVT3 can be read. Convert it with Metavision's file_to_dat.")
    decode = _decode_evt2 if version == "2" else _decode_evt3
    order = ">" if re.search(r"^% endianness big", header, re.MULTILINE) else "<"
    return RawEvents(decode(path, raw[at:], order), _sensor(header))


def _sensor(header: str) -> tuple[int, int] | None:
    geometry = re.search(r"^% geometry (\d{1,5})x(\d{1,5})\b", header, re.MULTILINE)
    width, height = (re.search(rf"\b{side}[ =](\d{{1,5}})\b", header, re.IGNORECASE) for side in ("width", "height"))
    if geometry:
        return int(geometry[2]), int(geometry[1])
    return (int(height[1]), int(width[1])) if width and height else None


def _words(path: Path, body: bytes, dtype: str) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    if len(body) % size:
        mended(path, "cut off", f"ends in the middle of a word; the last {len(body) % size} bytes are dropped.")
    return np.frombuffer(body[: len(body) // size * size], dtype)


def _decode_dat(path: Path, body: bytes) -> dict[str, np.ndarray]:
    """Type and size byte, then pairs of 32 bits: t; x in bits 0-13, y in 14-27, p in 28-31."""
    if len(body) < 2 or body[0] not in (0, 12) or body[1] != 8:
        raise UserError(f"{path}: event type and size {list(body[:2])}; wanted change-detection events of 8 bytes ([12, 8] or [0, 8]).")
    pairs = _words(path, body[2:], "<u8")
    t, word = pairs & 0xFFFFFFFF, pairs >> 32
    return {"x": word & 0x3FFF, "y": word >> 14 & 0x3FFF, "t": t, "p": word >> 28}


def _last_index(mask: np.ndarray) -> np.ndarray:
    """For every position the index of the latest True at or before it, -1 where there is none."""
    return np.maximum.accumulate(np.where(mask, np.arange(len(mask)), -1))


def _fill(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.where(index >= 0, values[np.maximum(index, 0)], 0) if len(values) else values


def _warn_early(path: Path, dropped: int) -> None:
    if dropped:
        mended(path, "events without a time stamp dropped", f"{dropped} events before the first time stamp are dropped.")


def _decode_evt2(path: Path, body: bytes, order: str = "<") -> dict[str, np.ndarray]:
    """Words of 32 bits: kind 0 or 1 = darker or brighter with the time's low 6 bits, kind 8 = its high 28 bits."""
    words = _words(path, body, order + "u4").astype(np.int64)
    kind = words >> 28
    high = _last_index(kind == 8)
    event = kind <= 1
    keep = event & (high >= 0)
    _warn_early(path, int(event.sum() - keep.sum()))
    t = (_fill(words & 0xFFFFFFF, high) << 6 | words >> 22 & 0x3F)[keep]
    return {"x": (words >> 11 & 0x7FF)[keep], "y": (words & 0x7FF)[keep], "t": t, "p": kind[keep]}


def _decode_evt3(path: Path, body: bytes, order: str = "<") -> dict[str, np.ndarray]:
    """Words of 16 bits, each changing one part of a state: y (0), x with polarity (2: one event; 3: base of a vector), 12 or 8
    pixels from the base on (4, 5), the time's low (6) and high (8) 12 bits. The high part wraps every 16.8 s."""
    words = _words(path, body, order + "u2").astype(np.int64)
    kind, value = words >> 12, words & 0xFFF
    row, high, low = _last_index(kind == 0), _last_index(kind == 8), _last_index(kind == 6)
    highs = value[kind == 8]
    steps = np.diff(highs, prepend=highs[:1])
    epoch = np.cumsum(steps < -2048)
    rank = np.maximum(np.cumsum(kind == 8) - 1, 0)  # which TIME_HIGH word counts here
    # A new high part restarts the low part, which the next TIME_LOW word then sets
    moved = _last_index((kind == 8) & (steps[rank] != 0)) if len(highs) else high
    t = _fill(value, low) * (low > moved) + (_fill(value, high) << 12)
    t = t + (epoch[rank] << 24) if len(highs) else t
    size = np.select([kind == 4, kind == 5], [12, 8])
    base = _last_index(kind == 3)
    done = np.cumsum(size) - size  # pixels of vectors before this word
    start = (_fill(value, base) & 0x7FF) + done - _fill(done, base)
    vector, bit = np.nonzero((value[:, None] >> np.arange(12) & 1 == 1) & (np.arange(12) < size[:, None]))
    single = np.flatnonzero(kind == 2)
    word = np.concatenate([single, vector])
    x = np.concatenate([value[single] & 0x7FF, start[vector] + bit])
    p = np.concatenate([value[single] >> 11, _fill(value, base)[vector] >> 11])
    by_word = np.argsort(word, kind="stable")
    word, x, p = word[by_word], x[by_word], p[by_word]
    keep = (row[word] >= 0) & (high[word] >= 0)
    _warn_early(path, int(len(word) - keep.sum()))
    word = word[keep]
    return {"x": x[keep], "y": _fill(value, row)[word] & 0x7FF, "t": t[word], "p": p[keep]}


READERS: dict[bytes, Callable[[Path, int, int | None], RawEvents]] = {  # by a file's first bytes: path, start_us, window_us -> events
    b"\x93NUMPY": lambda path, *_: RawEvents(_read_npy(path)),
    b"PK": lambda path, *_: RawEvents(_read_npz(path), N_IMAGENET_HW),
    b"\x89HDF\r\n\x1a\n": _read_dsec,
    b"#!AER-DAT4": lambda path, *_: _read_aedat4(path),
    b"%": lambda path, *_: _read_prophesee(path),
}


def save_events(path: Path, stream: dict[str, np.ndarray]) -> None:
    """Write a stream as EventGPT's own `.npy`: a dict in an object array, which NumPy can only pickle. Writing runs nothing; files
    are read back through the restricted unpickler above, never through NumPy's."""
    np.save(path, np.array(stream, dtype=object), allow_pickle=True)
