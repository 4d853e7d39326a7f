"""Progress notes of an unfinished run: one line for each finished row, with the hashes of its states, in a file of each process."""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from feature_alignment.cli.console import UserError


def unfinished_folder(directory: Path) -> Path:
    """Folder in which a run is written before it gets its final name."""
    return directory.with_name(directory.name + ".unfinished")


def open_progress(path: Path) -> int:
    """Open a progress file and lock it until it is closed; an incomplete last record is removed."""
    stream = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(stream)
        raise UserError(f"another process is writing {path.parent}; wait for it, or give another --output_dir.") from None
    os.ftruncate(stream, path.read_bytes().rfind(b"\n") + 1)
    return stream


def rows_done(directory: Path) -> set[int]:
    """Rows that an unfinished run has recorded as finished."""
    return {row for row, *_ in notes(unfinished_folder(directory))}


def progress_entries(folder: Path) -> Iterator[dict[str, Any]]:
    """The last complete record of every row of an unfinished run: `row`, its token ids `read`, and its entry of samples.jsonl."""
    for path, at in {row: (path, at) for row, path, at in notes(folder)}.values():
        yield entry_at(path, at)


def note_line(about: dict[str, Any]) -> bytes:
    """One line of a progress file: a checksum and the record."""
    text = json.dumps(about).encode()
    return f"{zlib.crc32(text):08x} ".encode() + text + b"\n"


def read_note(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if it is incomplete or altered."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    return json.loads(text) if line.endswith(b"\n") and checksum == f"{zlib.crc32(text):08x}".encode() else None


def notes(part: Path) -> Iterator[tuple[int, Path, int]]:
    """Every row that has a complete record, with its progress file and the byte at which the record begins."""
    for path in sorted(part.glob("progress-*.txt")):
        at = 0
        with path.open("rb") as stream:
            for line in stream:
                if about := read_note(line):
                    yield about["row"], path, at
                at += len(line)


def entry_at(path: Path, at: int) -> dict[str, Any]:
    """The record that begins at byte `at` of a progress file."""
    with path.open("rb") as stream:
        stream.seek(at)
        return read_note(stream.readline()) or {}


def remove_leftovers(directory: Path) -> None:
    """Remove progress files from a complete run; after the rename, so that an interruption cannot lose rows."""
    for leftover in (*directory.glob("progress-*.txt"), directory / "settings.json"):
        leftover.unlink(missing_ok=True)
