"""Event files as text: one event per line, separated by spaces, commas, tabs or semicolons; also inside a zip.

Columns are named by a header line or recognized from their content (`event_columns`). The file is read in blocks, so that
memory does not grow with its size.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from feature_alignment.cli.console import UserError, record_repair
from feature_alignment.inputs.event_columns import columns_by_name, order_of
from feature_alignment.inputs.event_units import TimeUnit
from feature_alignment.inputs.event_windows import EVENT_FIELDS, EventBlocks

_BLOCK_BYTES = 1 << 22
_LONGEST_LINE = 400  # bytes
_NUMBER = rb"(?>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|true|false|True|False)"
_ROW = re.compile(rb"\s*+" + _NUMBER + rb"(?:(?>\s*+[,;]\s*+|\s++)" + _NUMBER + rb")+\s*+,?\s*+")
_GEOMETRY = re.compile(rb"%?\s*geometry\s*[:=]?\s*(\d{1,5})\s*[,x]\s*(\d{1,5})")


def is_text(head: bytes) -> bool:
    """Whether the first bytes of a file are lines of numbers, possibly after comments, a header line or a sensor size."""
    if b"\0" in head:
        return False
    lines = head.removeprefix(b"\xef\xbb\xbf").replace(b"\r", b"\n").split(b"\n")
    lines = [line for line in lines if line.strip() and not line.lstrip().startswith((b"#", b"%"))]
    return any(_is_row(line) and len(_split(line)) >= 3 for line in lines[:3])


def _is_row(line: bytes) -> bool:
    return len(line) <= _LONGEST_LINE and bool(_ROW.fullmatch(line))


def read_text(path: Path, *_: Any) -> EventBlocks:
    """Read a text file of events."""
    return _read(path, lambda: open(path, "rb"))


def read_zipped_text(path: Path, members: list[str]) -> EventBlocks:
    """Read the single text file of a zip.

    Args:
        path: Zip file.
        members: Names of the files in it.

    Raises:
        UserError: For a zip of several files, or of another kind.
    """
    texts = [m for m in members if Path(m).suffix.lower() in (".txt", ".csv", ".tsv", ".dat") or len(members) == 1]
    if len(texts) != 1:
        raise UserError(f"{path} holds {members[:20]}; wanted the arrays of an .npz, or one text file of events.")
    with zipfile.ZipFile(path) as archive, archive.open(texts[0]) as stream:
        if not is_text(stream.read(4096)):
            raise UserError(
                f"{path} holds {texts[0]}, which is not a text file of events; wanted the arrays of an .npz, or lines of t x y p."
            )
    return _read(path, lambda: zipfile.ZipFile(path).open(texts[0]))


def _split(line: bytes) -> list[bytes]:
    return re.split(rb"\s*[,;]\s*|\s+", line.strip().rstrip(b","))


def _read(path: Path, open_it: Any) -> EventBlocks:
    with open_it() as stream:
        head = stream.read(1 << 16).removeprefix(b"\xef\xbb\xbf")
    preamble, names, sensor_hw = 0, None, None
    for line in head.replace(b"\r\n", b"\n").split(b"\n"):
        text = line.decode("utf-8", "replace").strip()
        row = _is_row(line)
        if row and len(_split(line)) > 2:
            break
        preamble += 1
        if found := _GEOMETRY.search(line):
            sensor_hw = int(found[2]), int(found[1])
        elif row:  # the rpg format begins with width and height
            width, height = _split(line)
            if not (width.isdigit() and height.isdigit()):
                raise UserError(f"{path}, line {preamble}: {text[:80]!r}; wanted events of x, y, t, p.")
            sensor_hw = int(height), int(width)
        elif words := _names(text):
            names = words
        elif text and not text.startswith(("#", "%")):
            raise UserError(f"{path}, line {preamble}: {text[:80]!r}; wanted one event a line: t x y p, or a line of names first.")
    return EventBlocks(_blocks(path, open_it, preamble, names), sensor_hw, _stated_unit(names))


def _names(text: str) -> list[str] | None:
    """The column names of a header line such as `# timestamp [us], x, y, polarity`, or None for any other line."""
    if len(text) > _LONGEST_LINE:
        return None
    plain = re.sub(r"[\"'#%]", " ", re.sub(r" ?[\[(](\w{1,20})[\])]", r"_\1", text))
    words = [w for w in re.split(r"[,;\s]+", plain) if w]
    if text.startswith(("#", "%")) and ":" in text:  # of "# columns: t x y p" the names come after the colon
        words = words[1 + max((i for i, word in enumerate(words) if word.endswith(":")), default=-1) :]
    return words if columns_by_name(words) else None


def _stated_unit(names: list[str] | None) -> TimeUnit | None:
    named = columns_by_name(names or [])
    return named[1] if named else None


def _lines(stream: IO[bytes], preamble: int) -> Iterator[tuple[bytes, bool]]:
    """Blocks of complete lines after the preamble; the second value is True for a last line without a newline."""
    for _ in range(preamble):
        stream.readline(1 << 20)
    rest = b"" if preamble else stream.read(3).removeprefix(b"\xef\xbb\xbf")
    while piece := stream.read(_BLOCK_BYTES):
        cut = piece.rfind(b"\n") + 1
        if cut == 0 and len(rest) > _BLOCK_BYTES:
            raise ValueError("a line of several megabytes")
        if cut:
            yield rest + piece[:cut], False
            rest = piece[cut:]
        else:
            rest += piece
    if rest.strip():
        yield rest, True


def _blocks(path: Path, open_it: Any, preamble: int, names: list[str] | None) -> Iterator[dict[str, np.ndarray]]:
    order: list[str] | None = None
    dtype: np.dtype | None = None
    separator, last = b"", None
    try:
        with open_it() as stream:
            for text, unfinished in _lines(stream, preamble):
                if not text.strip():
                    continue
                text = text.replace(b"True", b"1").replace(b"False", b"0").replace(b"true", b"1").replace(b"false", b"0")
                if dtype is None:
                    separator = next((s for s in (b",", b";", b"\t") if s in text[:4096]), b"")
                    dtype = _types(path, text, separator, names)
                try:
                    table = _parse(text, dtype, separator)
                except ValueError:
                    if not unfinished:
                        raise
                    record_repair(path, "cut off", f"ends in the middle of a line, which is dropped: {text[:80]!r}.")
                    return
                columns = [table[f] for f in dtype.names or ()]
                if order is None:
                    order = _order(path, columns, names)
                block = {k: columns[order.index(k)] for k in EVENT_FIELDS}
                if unfinished and (order[-1] in "xy" or (last is not None and block["t"][-1] < last)):  # digits may be missing at the end
                    record_repair(path, "cut off", f"ends in the middle of a line, which is dropped: {text[:80]!r}.")
                    return
                last = block["t"][-1]
                yield block
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path} could not be read as text of events: {str(error)[:200]}; wanted one event a line: t x y p.") from None
    except Exception as error:
        if type(error).__module__ not in ("zlib", "lzma", "_lzma"):
            raise
        raise UserError(f"{path} could not be unpacked: {error}") from None


def _types(path: Path, text: bytes, separator: bytes, names: list[str] | None) -> np.dtype:
    """Row type: int64 for columns without fractions in the first lines, because floats cannot hold nanoseconds since 1970."""
    between = rb"\s*" + separator + rb"\s*" if separator else rb"\s+"
    rows = [re.split(between, line.strip().rstrip(b",")) for line in text[:100_000].split(b"\n")[:500]]
    rows = [row for row in rows if row != [b""] and not row[0].startswith((b"#", b"%"))]
    width = len(rows[0])
    if len(names) != width if names else width != 4:
        named = f", its header names {len(names)} ({' '.join(names)[:80]})" if names else ""
        raise UserError(f"{path} holds {width} columns{named}; wanted t, x, y, p in some order, or a first line that names the columns.")
    whole = [all(re.fullmatch(rb"[+-]?\d{1,18}|[+-]?[1-8]\d{18}", row[i]) for row in rows if len(row) == width) for i in range(width)]
    return np.dtype([(f"f{i}", np.int64 if whole[i] else np.float64) for i in range(width)])


def _parse(text: bytes, dtype: np.dtype, separator: bytes) -> np.ndarray:
    lines = io.BytesIO(text)
    return np.loadtxt(lines, dtype=dtype, delimiter=separator.decode() or None, comments="#", ndmin=1, encoding="latin-1")


def _order(path: Path, columns: list[np.ndarray], names: list[str] | None) -> list[str]:
    named = columns_by_name(names or [])
    if named and names:
        meanings = {stored: field for field, stored in named[0].items()}
        return [meanings.get(name, name) for name in names]
    return list(order_of(columns, str(path)))
