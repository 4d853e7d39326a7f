"""What a file of hidden states is in bytes: one tensor [rows, positions, size], stored row after row, with a frame around it.

    | frame: zip header, pickle of shape and dtype | row 0 | row 1 | … | frame: zip directory |

Every row has a hash, kept with its text, and the frame has one, kept in `meta.json`: together they cover every byte, whoever wrote
the rows, in however many processes, and a row copied from another machine is known to have arrived whole.
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
    """Of a row's bytes in the file: `data`, then zeros where no text is."""
    digest = hashlib.sha256(data)
    digest.update(bytes(row_bytes - len(data)))
    return digest.hexdigest()[:16]


def storage_offset(path: Path) -> int:
    """The byte where the numbers of a bare tensor begin: a `.pt` is a zip whose one data record is not compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            record = next(i for i in archive.infolist() if i.filename.endswith("/data/0"))
        with path.open("rb") as stream:
            stream.seek(record.header_offset + 26)
            name, extra = struct.unpack("<HH", stream.read(4))
    except (zipfile.BadZipFile, StopIteration, struct.error, ValueError, NotImplementedError) as error:
        raise UserError(f"{path} is damaged ({error or 'it holds no tensor'}). Make it again with --no_resume.") from None
    return record.header_offset + 30 + name + extra


def frame_hash(path: Path, rows_bytes: int) -> str:
    """Of all bytes of a file but the `rows_bytes` of its rows."""
    begin = storage_offset(path)
    with path.open("rb") as stream:
        digest = hashlib.sha256(stream.read(begin))
        stream.seek(begin + rows_bytes)
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()[:16]


def row_hashes(path: Path, rows: int, row_bytes: int) -> Iterator[str]:
    """The hash of every row as it lies in the file, in order; the file is read once."""
    with path.open("rb") as stream:
        stream.seek(storage_offset(path))
        for _ in range(rows):
            yield row_hash(stream.read(row_bytes)[:row_bytes], row_bytes)
