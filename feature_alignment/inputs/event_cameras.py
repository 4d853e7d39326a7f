"""Read the recordings of cameras: Prophesee DAT, EVT2, EVT2.1 and EVT3, and iniVation AEDAT4. Times are microseconds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from feature_alignment.cli.console import UserError, record_repair
from feature_alignment.inputs.event_evt import decode_evt2, decode_evt3, decode_evt21, halves_swapped
from feature_alignment.inputs.event_h5 import INSTALL
from feature_alignment.inputs.event_index import CHUNK_BYTES, Index, Word, chunk_words, open_index
from feature_alignment.inputs.event_units import refuse_wrapped
from feature_alignment.inputs.event_windows import EventBlocks, EventTable, StoredArray, refuse_long

_LONGEST_HEADER = 1 << 20
_PIECE_BYTES = 1 << 17  # decoded at once; a word of EVT2.1 can hold 32 events
_DECODERS = {"EVT2": decode_evt2, "EVT2.1": decode_evt21, "EVT3": decode_evt3}
_WORDS: dict[str, tuple[Word, str]] = {
    "2": ("EVT2", "u4"),
    "2.0": ("EVT2", "u4"),
    "2.1": ("EVT2.1", "u8"),
    "21": ("EVT2.1", "u8"),
    "3": ("EVT3", "u2"),
    "3.0": ("EVT3", "u2"),
}


def read_prophesee(path: Path, start_us: int, window_us: int | None) -> EventTable | EventBlocks:
    """Read a DAT or EVT recording; its text header names the format.

    Args:
        path: `.dat` or `.raw` file.
        start_us: Start of the window after the first event.
        window_us: Length of the window; None for all events.

    Raises:
        UserError: For another format or version, or a recording that is too long to be read without a window.
    """
    header, body = _header(path)
    encoding = re.search(r"^% (?:evt |format EVT)([\d.]+)", header, re.MULTILINE)
    if encoding is None:
        if not re.search(r"^% (data file|version|height|width|date)", header, re.MULTILINE | re.IGNORECASE):
            raise UserError(
                f"{path}: its header names no format ({header[:80]!r}); wanted Prophesee .dat, or .raw of EVT2, EVT2.1 or EVT3."
            )
        return _dat(path, header, body)
    number = encoding[1].rstrip(".")
    if number not in _WORDS:
        raise UserError(f"{path} is EVT{number}; only EVT2, EVT2.1 and EVT3 can be read. Convert it with Metavision's file_to_dat.")
    kind, word = _WORDS[number]
    stated = re.search(r"endianness[ =](\w+)", header)
    dtype = np.dtype((">" if stated and stated[1] == "big" else "<") + word)
    rest = (path.stat().st_size - body) % dtype.itemsize
    if rest:
        record_repair(path, "cut off", f"ends in the middle of a word; the last {rest} bytes are dropped.")
    swapped = kind == "EVT2.1" and _swapped(path, body, dtype, stated[1] if stated else None)
    index = open_index(path, body, kind, dtype, swapped)
    first_us = _first_us(path, body, kind, dtype, swapped, index)
    pieces = np.arange(len(index.low_us))
    if window_us is not None and first_us is not None:
        begin, end = first_us + start_us, first_us + start_us + window_us
        pieces = np.flatnonzero((index.low_us < end) & (index.high_us >= begin))
    elif first_us is not None and path.stat().st_size > CHUNK_BYTES:  # refused before hours of events are decoded
        refuse_long(int(index.high_us.max()) - first_us, str(path))
    return EventBlocks(_decoded(path, body, kind, dtype, swapped, index, pieces), _sensor(header), "us", first_us)


_HEADER_LINE = re.compile(rb"%(?:[ \t][\t -~\x80-\xff]{0,1000})?\r?")  # printable: the first words of the data may begin with "%" too


def _header(path: Path) -> tuple[str, int]:
    """Header lines, which start with "%", and the offset after them. "% end" ends the header, or else the first line that is no text."""
    with open(path, "rb") as file:
        raw = file.read(_LONGEST_HEADER)
    at = 0
    lines: list[str] = []
    while raw[at : at + 1] == b"%" and not (lines and lines[-1] == "% end"):
        end = raw.find(b"\n", at)
        if end < 0 or not _HEADER_LINE.fullmatch(raw[at:end]):
            break
        lines.append(raw[at:end].decode("latin-1").strip())
        at = end + 1
    return "\n".join(lines), at


def _sensor(header: str) -> tuple[int, int] | None:
    geometry = re.search(r"^% geometry (\d{1,5})x(\d{1,5})\b", header, re.MULTILINE)
    width, height = (re.search(rf"\b{side}[ =](\d{{1,5}})\b", header, re.IGNORECASE) for side in ("width", "height"))
    if geometry:
        return int(geometry[2]), int(geometry[1])
    return (int(height[1]), int(width[1])) if width and height else None


# ---- DAT


def _dat(path: Path, header: str, body: int) -> EventTable:
    """DAT: type and size byte, then pairs of 32 bits: t; x in bits 0-13, y in 14-27, p in 28-31. Windows are found by bisection."""
    version = re.search(r"^% version (\d+)", header, re.MULTILINE | re.IGNORECASE)
    if version and version[1] == "1":
        raise UserError(
            f"{path} is DAT version 1, whose coordinates are packed differently; only version 2 can be read. "
            "Write it again as version 2 with Prophesee's toolbox, or as .npz: np.savez('events.npz', x=x, y=y, t=t, p=p)."
        )
    with open(path, "rb") as file:
        file.seek(body)
        kind = file.read(2)
    if len(kind) < 2 or kind[0] not in (0, 12) or kind[1] != 8:
        raise UserError(f"{path}: event type and size {list(kind)}; wanted change-detection events of 8 bytes ([12, 8] or [0, 8]).")
    count, rest = divmod(path.stat().st_size - body - 2, 8)
    if rest:
        record_repair(path, "cut off", f"ends in the middle of a word; the last {rest} bytes are dropped.")
    pair = np.dtype([("t", "<u4"), ("word", "<u4")])
    with open(path, "rb") as file:
        pairs = StoredArray(file, pair, body + 2, count)
    sampled = np.array([pairs[slice(int(i), int(i) + 1)]["t"][0] for i in np.linspace(0, count - 1, 256)] if count else [], np.int64)
    refuse_wrapped(sampled, str(path))

    def rows(part: slice) -> dict[str, np.ndarray]:
        read = pairs[part]
        word = read["word"].astype(np.int64)
        return {"x": word & 0x3FFF, "y": word >> 14 & 0x3FFF, "t": read["t"], "p": word >> 28}

    return EventTable(count, lambda part: pairs[part]["t"], rows, _sensor(header), "us", row_bytes=32)


# ---- EVT


def _swapped(path: Path, body: int, dtype: np.dtype, stated: str | None) -> bool:
    """Whether the halves of EVT2.1 words are swapped, from the header or from the words."""
    if stated in ("legacy", "little", "big"):
        return stated == "legacy"
    words = chunk_words(path, body, body + CHUNK_BYTES, dtype, False)
    swapped = halves_swapped(words) if len(words) else False
    if swapped is None:
        raise UserError(f"{path} is EVT2.1, and neither its header nor its words say in which order the halves of a word come.")
    return swapped


def _decoded(
    path: Path, body: int, kind: Word, dtype: np.dtype, swapped: bool, index: Index, chunks: np.ndarray
) -> Iterator[dict[str, np.ndarray]]:
    """The events of some chunks of a recording, in pieces."""
    size, early = path.stat().st_size, 0
    for chunk in map(int, chunks):
        state = index.state(chunk)
        stop = min(body + (chunk + 1) * CHUNK_BYTES, size)
        for start in range(body + chunk * CHUNK_BYTES, stop, _PIECE_BYTES):
            words = chunk_words(path, start, min(start + _PIECE_BYTES, stop), dtype, swapped)
            events, state, dropped = _DECODERS[kind](words, state)
            early += dropped
            yield events
    if early:
        record_repair(path, "events without a time stamp dropped", f"{early} events before the first time stamp are dropped.")


def _first_us(path: Path, body: int, kind: Word, dtype: np.dtype, swapped: bool, index: Index) -> int | None:
    for events in _decoded(path, body, kind, dtype, swapped, index, np.arange(len(index.low_us))):
        if len(events["t"]):
            return int(events["t"].min())
    return None


# ---- iniVation


def read_aedat4(path: Path, *_: Any) -> EventBlocks:
    """Read the first event stream of an AEDAT4 file; UserError if it is damaged or `aedat` is not installed."""
    try:
        import aedat
    except ImportError:
        raise UserError(f"{path} is .aedat4, and aedat is not installed. Type:\n  {INSTALL}") from None
    sensor_hw = None
    try:
        decoder = aedat.Decoder(str(path))
        for stream in decoder.id_to_stream().values():
            if stream["type"] == "events" and sensor_hw is None:
                sensor_hw = (int(stream["height"]), int(stream["width"]))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises several unrelated types; its panics are not Exceptions
        raise UserError(f"{path} could not be read as .aedat4: {str(error)[:200]}") from None
    return EventBlocks(_packets(path, decoder), sensor_hw, "us")


def _packets(path: Path, decoder: Any) -> Iterator[dict[str, np.ndarray]]:
    count, stream = 0, None
    try:
        for packet in decoder:
            if "events" not in packet or (stream is not None and packet.get("stream_id") != stream):
                continue
            stream, table = packet.get("stream_id"), packet["events"]
            count += len(table)
            yield {"x": table["x"], "y": table["y"], "t": table["t"], "p": table["on" if "on" in (table.dtype.names or ()) else "p"]}
    except (KeyboardInterrupt, SystemExit, GeneratorExit, UserError):
        raise
    except BaseException as error:
        if not count:
            raise UserError(f"{path} could not be read as .aedat4: {str(error)[:200]}") from None
        record_repair(path, "cut off", f"cut off after {count} events ({error}); they are used.")
    if not count:
        raise UserError(f"{path} holds no event stream.")
