"""Byte layout of a file of hidden states: one tensor [rows, positions, size], stored row by row inside a frame.

    | frame: zip header, pickle of shape and dtype | row 0 | row 1 | … | frame: zip directory |

The hash of each row is recorded in samples.jsonl and the hash of the frame in meta.json. Together they cover every byte, also where
several processes or machines wrote the rows.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

from feature_alignment.cli.console import UserError

_BLOCK = 1 << 22


def row_hash(data: bytes | memoryview, row_bytes: int) -> str:
    """Hash of a row's bytes in the file: `data`, then zeros up to `row_bytes`."""
    digest = hashlib.sha256(data)
    digest.update(bytes(row_bytes - len(data)))
    return digest.hexdigest()[:16]


def storage_offset(path: Path) -> int:
    """The byte at which the numbers of a bare tensor begin: a `.pt` file is a zip with one uncompressed data record."""
    try:
        with zipfile.ZipFile(path) as archive:
            record = next(i for i in archive.infolist() if i.filename.endswith("/data/0"))
        with path.open("rb") as stream:
            stream.seek(record.header_offset + 26)
            name, extra = struct.unpack("<HH", stream.read(4))
            offset: int = record.header_offset + 30 + name + extra
    except (zipfile.BadZipFile, StopIteration, struct.error, ValueError, NotImplementedError) as error:
        raise UserError(f"{path} is damaged ({error or 'it holds no tensor'}). Make it again with --no_resume.") from None
    return offset


def frame_hash(path: Path, rows_bytes: int) -> str:
    """Hash of all bytes of a file except the `rows_bytes` bytes of its rows."""
    begin = storage_offset(path)
    with path.open("rb") as stream:
        digest = hashlib.sha256(stream.read(begin))
        stream.seek(begin + rows_bytes)
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()[:16]


def row_hashes(path: Path, rows: int, row_bytes: int) -> Iterator[str]:
    """The hash of every row of a file, in order; the file is read once.

    Args:
        path: file of hidden states
        rows: number of rows
        row_bytes: bytes per row
    """
    with path.open("rb") as stream:
        stream.seek(storage_offset(path))
        for _ in range(rows):
            yield row_hash(stream.read(row_bytes)[:row_bytes], row_bytes)
