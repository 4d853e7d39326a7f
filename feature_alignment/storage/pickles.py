"""Untrusted pickles: checked before they are opened, then opened by readers that accept few names.

A pickle is a program. Restricting the functions it may call is not enough: a tuple nested a million levels deep crashes Python when it
is hashed, and 300 bytes can request gigabytes. EventGPT's `.npy` files and every `.pt` file are checked here.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

MAX_TUPLES = 10_000  # an adapter has about a hundred; hashing Python's tuples, nested, recurses in C without a limit
MAX_OPCODES = 5_000_000
MAX_PT_PICKLE = 1 << 26  # the pickle of a `.pt` holds names and shapes; its numbers are separate records
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"}
_BY_NAME = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}
_TORCH = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"} | {
    f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
}


def check_pickle(data: bytes, names: set[str] | None = None) -> None:
    """Check a pickle without running it.

    Args:
        data: the pickle
        names: names that it may refer to; None allows any

    Raises:
        pickle.UnpicklingError: it is cut off, takes too many steps, or refers to another name
    """
    tuples = 0
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            tuples += opcode.name in _TUPLES
            if count > MAX_OPCODES or tuples > MAX_TUPLES:
                raise pickle.UnpicklingError(f"it takes more than {count if count > MAX_OPCODES else tuples - 1:,} steps to build")
            if names is not None and (opcode.name in _BY_NAME or (opcode.name == "GLOBAL" and argument not in names)):
                raise pickle.UnpicklingError(f"it asks for {argument or opcode.name}")
    except (ValueError, IndexError, AttributeError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise pickle.UnpicklingError(f"it is cut off or damaged: {error}") from None


def check_pt(path: Path) -> None:
    """Check that torch.save wrote a `.pt` file, with tensors, numbers and plain containers only.

    Raises:
        pickle.UnpicklingError: another format, compressed, or with other objects
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [m.filename for m in members]
            programs = [m for m in members if m.filename.endswith(".pkl")]
            if len(programs) != 1 or not programs[0].filename.endswith("data.pkl") or len(set(names)) < len(names):
                raise pickle.UnpicklingError(f"it holds {', '.join(p.filename for p in programs) or 'no data.pkl'}; wanted one data.pkl")
            if any(m.compress_type != zipfile.ZIP_STORED or m.file_size > size for m in members) or programs[0].file_size > MAX_PT_PICKLE:
                raise pickle.UnpicklingError("parts of it are compressed, or larger than the file")
            check_pickle(archive.read(programs[0]), _TORCH)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise pickle.UnpicklingError(f"it is no zip of torch.save, or damaged: {error}") from None


# ---- plain arrays: replacements for the functions that NumPy's pickles call

_DTYPE = re.compile(r"[<>|=]?([biuf]\d{1,2}|\?|O8?|[bhilqBHILQefd])")
_RECORD = re.compile(r"[|<>=]?V\d{1,3}")
_MAX_FIELDS = 16


class _Record:
    """A dtype with fields while it is unpickled. NumPy's own `__setstate__` trusts offsets and types; this one checks them first."""

    def __init__(self) -> None:
        self.dtype: np.dtype | None = None

    def __setstate__(self, state: Any) -> None:
        _, _, subarray, names, fields, size, *_ = state
        if subarray is not None or not isinstance(names, tuple) or not 1 <= len(names) <= _MAX_FIELDS or not 1 <= size <= 999:
            raise pickle.UnpicklingError("it holds a type that is no plain list of fields")
        types = [fields[name][0] for name in names]
        offsets = [fields[name][1] for name in names]
        ends = [0, *(o + t.itemsize for o, t in zip(offsets, types, strict=True) if type(o) is int and _is_number(t))]
        if len(ends) != len(names) + 1 or any(o < end for o, end in zip(sorted(offsets), sorted(ends), strict=False)) or max(ends) > size:
            raise pickle.UnpicklingError("it holds a type whose fields are no numbers, or overlap")
        self.dtype = np.dtype({"names": list(names), "formats": types, "offsets": offsets, "itemsize": size})


def _is_number(dtype: Any) -> bool:
    return isinstance(dtype, np.dtype) and dtype.kind in "biuf"


def _dtype(code: str, *_: Any) -> np.dtype | _Record:
    if isinstance(code, str) and _RECORD.fullmatch(code):
        return _Record()
    if not (isinstance(code, str) and _DTYPE.fullmatch(code)):
        raise pickle.UnpicklingError(f"it asks for numpy.dtype({str(code)[:40]!r})")
    return np.dtype(code, copy=True)  # its byte order is set next; NumPy's own must not change


def _checked(dtype: Any) -> np.dtype:
    dtype = dtype.dtype if isinstance(dtype, _Record) else dtype
    if not isinstance(dtype, np.dtype):
        raise pickle.UnpicklingError("it holds an array of no type")
    return dtype


class _Array(np.ndarray):
    """An array while it is unpickled; `plain_array` makes it an ordinary one."""

    def __setstate__(self, state: Any) -> None:
        version, shape, dtype, fortran, data = state
        super().__setstate__((version, shape, _checked(dtype), fortran, data))


def plain_array(value: Any) -> Any:
    """An unpickled array as an ordinary one; anything else as it is."""
    return value.view(np.ndarray) if type(value) is _Array else value


def _reconstruct(kind: Any, *_: Any) -> np.ndarray:
    return np.ndarray.__new__(_Array, (0,), "b")  # its contents come with the state


def _frombuffer(buffer: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> np.ndarray:
    return np.frombuffer(bytes(buffer), dtype=_checked(dtype)).reshape(shape, order=order)


def _scalar(dtype: Any, data: bytes) -> Any:
    return np.frombuffer(bytes(data), dtype=_checked(dtype), count=1)[0]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How older pickles store bytes. Other encodings could double their input, forty times over."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it asks for the encoding {str(encoding)[:40]!r}")
    return str(text).encode("latin1")


_READERS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): "ndarray",  # named, never called
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}
for _root in ("numpy.core", "numpy._core"):  # newer NumPy pickles name numpy._core, older ones numpy.core
    _READERS |= {(f"{_root}.multiarray", "_reconstruct"): _reconstruct, (f"{_root}.multiarray", "scalar"): _scalar}
    _READERS |= {(f"{_root}.numeric", "_frombuffer"): _frombuffer}


class ArraysOnly(pickle.Unpickler):
    """Builds dicts, lists and NumPy arrays, and calls nothing."""

    def find_class(self, module: str, name: str) -> Any:
        """The replacement for a name in a pickle; UnpicklingError for any other name."""
        if (module, name) not in _READERS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _READERS[module, name]
