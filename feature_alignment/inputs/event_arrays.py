"""Event files of NumPy: dicts, structured arrays, tables of four columns, named arrays in `.npz`, EventGPT-Plus' `event_bins`.

Large plain arrays stay in the file, so that reading a window reads only the window. Pickles go through a restricted unpickler.
"""

from __future__ import annotations

import io
import math
import tempfile
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from feature_alignment.cli.console import UserError
from feature_alignment.inputs.event_columns import columns_by_name, order_of
from feature_alignment.inputs.event_text import read_zipped_text
from feature_alignment.inputs.event_windows import (
    EVENT_FIELDS,
    MAX_UNPACKED_BYTES,
    Column,
    EventBlocks,
    EventTable,
    StoredArray,
    joined,
    table_of,
)
from feature_alignment.storage.pickles import ArraysOnly, check_pickle, plain_array

_MAX_PICKLE_BYTES = 1 << 30
_MAX_IN_MEMORY = 1 << 24  # larger compressed arrays are unpacked into a temporary file
_TABLES = ("event_data", "events", "event_bins", "data", "arr_0")
_WANTED = (
    "wanted `event_data` or `events` with fields x, y, t, p, arrays x, y, t, p (or x_pos, y_pos, timestamp, polarity), or `event_bins`"
)


def read_npy(path: Path, *_: Any) -> EventTable:
    """Read a `.npy`: EventGPT's pickled dict, without running code from the pickle; a structured array; or a table [n, 4]."""
    try:
        with open(path, "rb") as file:
            array: Any = _array(file, path.stat().st_size)
            if array is None:
                array = _unpickled(file, path.stat().st_size)
        return _table(array, str(path), path.stat().st_size)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise any error; no code from it has run
        raise UserError(
            f"{path} could not be read as a dict of event arrays: {str(error)[:200]}. Only plain NumPy arrays are accepted."
        ) from None


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def _array(stream: IO[bytes], size: int, offset: int = 0) -> np.ndarray | StoredArray | list[StoredArray] | None:
    """The array of a `.npy` of `size` bytes at `offset` of a file, or None if it holds objects.

    A large array stays in the file; a table [n, 4] is then returned as its four columns.

    Raises:
        ValueError: If the header describes more bytes than the file has.
    """
    shape, fortran, dtype = _header(stream)
    if dtype.hasobject:
        return None
    start = stream.tell()
    num_bytes, available = math.prod(shape) * dtype.itemsize, size - (start - offset)
    if min(shape, default=0) < 0 or num_bytes > available:
        raise ValueError(f"its header describes {shape} of {dtype}, {num_bytes:,} bytes; the file has {available:,}")
    if num_bytes > _MAX_IN_MEMORY and not isinstance(stream, io.BytesIO):
        if len(shape) == 1:
            return StoredArray(stream, dtype, start, shape[0])
        if len(shape) == 2 and shape[1] == 4 and not fortran:
            records = StoredArray(stream, np.dtype([(f"f{i}", dtype) for i in range(4)]), start, shape[0])
            return [records.field(f"f{i}") for i in range(4)]
        if len(shape) == 2 and (shape[1] == 4 if fortran else shape[0] == 4):
            count = num_bytes // 4 // dtype.itemsize
            return [StoredArray(stream, dtype, start + i * count * dtype.itemsize, count) for i in range(4)]
    order: Any = "F" if fortran else "C"
    return np.frombuffer(stream.read(num_bytes), dtype).reshape(shape, order=order)


def _unpickled(stream: IO[bytes], size: int) -> Any:
    """The objects of a `.npy`, after its header."""
    if size > _MAX_PICKLE_BYTES:
        raise ValueError(f"a pickle of {size:,} bytes; at most {_MAX_PICKLE_BYTES:,} are read. Write plain arrays: np.savez")
    data = stream.read()
    check_pickle(data)
    return plain_array(ArraysOnly(io.BytesIO(data)).load())


def _table(content: Any, name: str, file_bytes: int) -> EventTable:
    """Events of an array or a dict."""
    if isinstance(content, np.ndarray) and content.dtype == object:
        if content.shape == ():
            content = content.item()
        elif content.ndim <= 2 and content.size:
            return _bins(content, name, file_bytes)
    if isinstance(content, dict):
        if not all(isinstance(k, str) for k in content):
            raise UserError(f"{name} holds a dict with keys that are not strings; wanted a dict with x, y, t and p.")
        named = columns_by_name(content)
        inner = plain_array(next(iter(content.values()))) if len(content) == 1 else None
        if named is None and isinstance(inner, np.ndarray) and (inner.dtype.names or inner.ndim == 2) and inner.nbytes <= file_bytes:
            return _table(inner, name, file_bytes)
        if named is None:
            raise UserError(f"{name} holds {sorted(str(k)[:40] for k in content)[:20]}; wanted a dict with x, y, t and p.")
        return table_of({k: _flat(content[named[0][k]], k, file_bytes) for k in EVENT_FIELDS}, unit=named[1])
    if isinstance(content, np.ndarray) and content.ndim == 2 and 4 in content.shape and max(content.shape) > 4:
        rows = content if content.shape[1] == 4 else content.T
        content = [rows[:, i] for i in range(4)] if content.dtype.kind in "iuf" else content
    if isinstance(content, list):
        return _unnamed(content, name)
    if not isinstance(content, np.ndarray | StoredArray):
        raise UserError(f"{name} holds {type(content).__name__}; wanted a dict with x, y, t and p.")
    if content.dtype.names:
        fields = list(content.dtype.names)
        named = columns_by_name(fields)
        if named is None or len(content.shape) != 1:
            raise UserError(f"{name} holds fields {fields[:20]}, shape {content.shape}; wanted a flat array of x, y, t and p.")
        pick = content.field if isinstance(content, StoredArray) else content.__getitem__
        return table_of({k: pick(named[0][k]) for k in EVENT_FIELDS}, unit=named[1])
    raise UserError(
        f"{name} holds an array of {content.dtype} with shape {content.shape}; wanted EventGPT's pickled dict of x, y, t, p, "
        "an array with these fields, or a table of four columns."
    )


def _unnamed(columns: list[Column], name: str) -> EventTable:
    """Four unnamed columns; their order is recognized from 64 runs of rows."""
    count = columns[0].shape[0]
    starts = np.unique(np.linspace(0, max(0, count - 64), 64).astype(int))
    picked = [np.concatenate([c[int(i) : int(i) + 64] for i in starts]) if count > 4096 else c[0:count] for c in columns]
    order = order_of(picked, name)
    return table_of({k: columns[order.index(k)] for k in EVENT_FIELDS})


def _bins(content: np.ndarray, name: str, file_bytes: int) -> EventTable:
    """EventGPT-Plus' `event_bins`: consecutive structured arrays, or, if all are equally long, one object per event."""
    parts = [np.atleast_1d(np.asarray(plain_array(part))) for part in content.ravel()]
    if any(part.dtype.names is None or part.ndim != 1 for part in parts) or sum(p.nbytes for p in parts) > file_bytes:
        raise UserError(f"{name} holds objects other than arrays with fields x, y, t, p.")
    tables = [_table(part, name, file_bytes) for part in parts]
    return table_of(joined([table.rows(slice(0, table.count)) for table in tables]), unit=tables[0].unit)


def _flat(column: Any, name: str, file_bytes: int) -> np.ndarray:
    """A column of the pickled dict; ValueError unless it is a plain array that fits into the file."""
    if isinstance(column, list) and all(type(v) in (int, float, bool) for v in column):
        column = np.array(column)
    column = plain_array(column)
    if type(column) is not np.ndarray:
        raise ValueError(f"{name} is a {type(column).__name__}, wanted an array of numbers")
    if column.nbytes > file_bytes:
        raise ValueError(f"{name} shows {column.nbytes:,} bytes, more than the file's {file_bytes:,}")
    return column.reshape(-1) if column.ndim == 2 and 1 in column.shape else column


def read_zip(path: Path, *_: Any) -> EventTable | EventBlocks:
    """Read an `.npz` of any layout, or a text file in a zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [i for i in archive.infolist() if not i.is_dir() and not Path(i.filename).name.startswith("._")]
            if not any(i.filename.endswith(".npy") for i in members):
                return read_zipped_text(path, [i.filename for i in members])
            by_name = {i.filename.removesuffix(".npy"): i for i in members}
            named = columns_by_name(by_name)
            single = next((k for k in _TABLES if k in by_name), None)
            if single == "arr_0" and len(by_name) > 1:
                single = None
            wanted = [single] if single and (single == "event_data" or named is None) else list(named[0].values()) if named else []
            if not wanted:
                raise UserError(f"{path} holds {sorted(by_name)[:20]}; {_WANTED}.")
            unpacked = sum(by_name[k].file_size for k in wanted)
            packed = any(by_name[k].compress_type != zipfile.ZIP_STORED for k in wanted)
            if packed and unpacked > MAX_UNPACKED_BYTES:
                raise ValueError(f"unpacked it takes {unpacked:,} bytes; at most {MAX_UNPACKED_BYTES:,} are read")
            content = {name: _member(path, archive, by_name[name], single == "event_bins") for name in wanted}
        if single and wanted == [single]:
            return _table(content[single], str(path), path.stat().st_size + unpacked)
        assert named is not None
        return table_of({k: content[named[0][k]] for k in EVENT_FIELDS}, unit=named[1])
    except UserError:
        raise
    except Exception as error:  # from zipfile, zlib, lzma or NumPy; no code of the file has run
        raise UserError(f"{path} could not be read as .npz: {str(error)[:200]}. Only plain NumPy arrays are accepted.") from None


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, may_hold_objects: bool) -> Any:
    """An array of an `.npz`. A large uncompressed one stays in the file; others are unpacked into memory or a temporary file."""
    if info.compress_type == zipfile.ZIP_STORED and info.file_size > _MAX_IN_MEMORY and not info.flag_bits & 1:
        with open(path, "rb") as file:
            file.seek(info.header_offset + 26)
            name_bytes, extra_bytes = (int.from_bytes(file.read(2), "little") for _ in range(2))
            offset = info.header_offset + 30 + name_bytes + extra_bytes
            file.seek(offset)
            if info.file_size > path.stat().st_size - offset:
                raise ValueError("it is cut off")
            array = _array(file, info.file_size, offset)
        if array is not None:
            return array
    with archive.open(info) as packed:
        if info.file_size > _MAX_IN_MEMORY:
            with tempfile.TemporaryFile(prefix="events-") as plain:
                while piece := packed.read(1 << 22):
                    plain.write(piece)
                plain.flush()
                plain.seek(0)
                array = _array(plain, info.file_size)
        else:
            stream = io.BytesIO(packed.read())
            array = _array(stream, info.file_size)
            if array is None and may_hold_objects:
                return _unpickled(stream, info.file_size)
    if array is None:
        raise ValueError("it holds Python objects")
    return array
