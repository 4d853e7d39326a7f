"""Hidden-state files written in place: constant memory for any number of rows, resumable, filled by several processes.

    train.unfinished/  settings.json  egpt_hidden_states.pt  vl_hidden_states.pt  progress-0.txt  progress-1.txt
    train/             the same .pt files, positions.pt, samples.jsonl, meta.json: one rename, once every row is there

egpt_event_states.pt holds one row per clip: the states of a clip are written with the first row that asks about it.

Every `.pt` file is sparse and has its full size from the start. A row is written at its offset in the file, not through a memory map,
whose touched pages would count as this process's memory. Each process records its finished rows, with the hashes of their states, in
its own progress file. A resumed run repeats rows whose states do not match their hash or whose record is damaged.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from feature_alignment.cli.console import UserError, file_named
from feature_alignment.storage.answers import write_token_pairs
from feature_alignment.storage.files import read_json, save_pt, write_hashed_json, write_json
from feature_alignment.storage.hidden_states import EVENT_STATES, FIXED_LENGTH_FILES, rows_in_file
from feature_alignment.storage.identity import RunIdentity
from feature_alignment.storage.progress_notes import (
    entry_at,
    note_line,
    notes,
    open_progress,
    read_note,
    remove_leftovers,
    rows_done,
    unfinished_folder,
)
from feature_alignment.storage.state_files import frame_hash, row_hash, row_hashes, storage_offset

log = logging.getLogger(__name__)
REMAKE = "the same command with --no_resume"
SAMPLE_KEYS = ("identity", "id", "sequence", "question", "facts", "clip")  # keys of a row's entry that describe its sample


def begin_run(directory: Path, identity: RunIdentity, plan: str, resume: bool) -> bool:
    """Create the unfinished folder, or keep an existing one that has the same rows.

    An unfinished folder with other rows is renamed, so that rows shared with this run can be copied. A complete run stays until the new
    one replaces it.

    Args:
        directory: final folder of the run
        identity: identity of the run
        plan: `plan_hash` of its rows
        resume: keep unfinished rows; otherwise they are deleted

    Returns:
        Whether rows of earlier runs may be copied; False if --no_resume started this run.
    """
    part = unfinished_folder(directory)
    recorded = part / "settings.json"
    if resume and recorded.is_file() and (found := read_json(recorded, REMAKE)).get("plan") == plan:
        return not found.get("anew")
    for path in part.glob("progress-*.txt"):  # raises UserError while another process is writing there
        os.close(open_progress(path))
    if resume and recorded.is_file():
        os.rename(part, directory.with_name(f"{directory.name}.earlier-{len(superseded_runs(directory)) + 1}.unfinished"))
    for folder in () if resume else superseded_runs(directory):
        shutil.rmtree(folder)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write_json(recorded, {**identity.as_dict(), "plan": plan, "anew": not resume})
    return resume


def superseded_runs(directory: Path) -> list[Path]:
    """Unfinished runs with other rows, from which shared rows are copied."""
    return sorted(directory.parent.glob(f"{directory.name}.earlier-*.unfinished"))


def plan_hash(rows: Iterable[Mapping[str, Any]]) -> str:
    """Hash of all rows in order: their sources, ids and questions.

    Args:
        rows: entries of samples.jsonl, or of `row_identity.identify`
    """
    digest = hashlib.sha256()
    for about in rows:
        digest.update(json.dumps([about.get(key) for key in SAMPLE_KEYS], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def check_disk_space(directory: Path, needed_bytes: int) -> None:
    """Raise UserError if the disk that holds `directory` has less room than `needed_bytes`."""
    folder = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.is_dir())
    disk, free = next(p for p in (folder, *folder.parents) if p.is_mount()), shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise UserError(
            f"{directory} may need {needed_bytes:,} bytes, its disk has {free:,} free (mounted at {disk}). Make room, "
            "give an --output_dir on another disk, or store less: --store_dtype bfloat16, --max_positions, --limit."
        )


def row_bytes(shapes: Iterable[tuple[int, int]], dtype: torch.dtype) -> int:
    """Largest number of bytes of one row; a short text takes less, because the files are sparse.

    Args:
        shapes: (positions, size) of a row in each file
        dtype: number format of the files
    """
    return sum(positions * size for positions, size in shapes) * dtype.itemsize


def states_bytes(
    shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype, clip_index: Sequence[int], done: Collection[int] = ()
) -> dict[str, int]:
    """File name -> bytes of the states that it will hold, or that are still to be written.

    Args:
        shapes: file name -> (positions, size) of a row in it
        dtype: number format of the files
        clip_index: for each row, its row of egpt_event_states.pt
        done: rows that are not counted
    """
    counts = {name: sum(row not in done for row in rows_in_file(name, clip_index)) for name in shapes}
    return {name: count * row_bytes([shapes[name]], dtype) for name, count in counts.items()}


class HiddenStatesWriter:
    """The unfinished folder of one run, opened by one of the processes that fill it, after `begin_run`.

    Args:
        directory: final folder of the run
        rows: number of rows
        shapes: file name -> (positions, size); each file holds [rows, positions, size], zero after the end of a text
        dtype: number format of the files
        rank: number of this process. Rank 0 must be created first, and it alone calls `finish`
        clip_index: for each row, its row of egpt_event_states.pt; None for one of its own
    """

    def __init__(
        self,
        directory: Path,
        rows: int,
        shapes: Mapping[str, tuple[int, int]],
        dtype: torch.dtype,
        rank: int = 0,
        clip_index: Sequence[int] | None = None,
    ) -> None:
        self.directory, self.part = directory, unfinished_folder(directory)
        self._rows, self._shapes, self._dtype = rows, dict(shapes), dtype
        self._clip_index = range(rows) if clip_index is None else clip_index
        self._rows_in = {name: rows_in_file(name, self._clip_index) for name in shapes}
        self._longest = shapes["vl_hidden_states.pt"][0]
        for name, rows_bytes in states_bytes(shapes, dtype, self._clip_index).items() if rank == 0 else ():
            self._lay_out(name, rows_bytes)
        self._files = {name: os.open(self.part / name, os.O_RDWR) for name in shapes}
        self._offsets = {name: storage_offset(self.part / name) for name in shapes}
        self._progress = open_progress(self.part / f"progress-{rank}.txt")
        self.done = self._intact() if rank == 0 else rows_done(directory)
        self._waiting: list[dict[str, Any]] = []

    def _lay_out(self, name: str, rows_bytes: int) -> None:
        """Create a sparse file of full size, unless one with an equal frame exists."""
        fresh = self.part / "fresh" / name  # torch writes the file's name into the file: it must be the final one
        fresh.parent.mkdir(exist_ok=True)
        try:
            with torch.serialization.skip_data():
                torch.save(torch.empty(len(self._rows_in[name]), *self._shapes[name], dtype=self._dtype), fresh)
        except RuntimeError as error:  # what torch makes of a disk that is full, or does not take files this large
            raise UserError(f"{self.part} could not be laid out with {rows_bytes:,} bytes for {name}: {str(error)[:120]}") from None
        try:
            if (self.part / name).is_file() and frame_hash(self.part / name, rows_bytes) == frame_hash(fresh, rows_bytes):
                return
        except UserError:
            log.warning("%s was damaged; its rows are extracted again.", self.part / name)
        os.replace(fresh, self.part / name)

    def _intact(self) -> set[int]:
        """Recorded rows whose states match their hashes; other rows are extracted again."""
        noted = {row: entry_at(path, at)["sha256"] for row, path, at in notes(self.part)}
        wrong: set[int] = set()
        for name, rows in self._rows_in.items():
            last = max((at for at, row in enumerate(rows) if row in noted), default=-1)
            found = row_hashes(self.part / name, last + 1, row_bytes([self._shapes[name]], self._dtype))
            wrong |= {row for row, h in zip(rows, found, strict=False) if row in noted and noted[row].get(name) != h}
        if wrong:
            log.warning("%s: %d of %d recorded rows were altered since; they are extracted again.", self.part, len(wrong), len(noted))
            self._forget(wrong)
        return set(noted) - wrong

    def _forget(self, rows: set[int]) -> None:
        """Delete the records of `rows` from every progress file."""
        for path in self.part.glob("progress-*.txt"):
            kept = [line for line in path.read_bytes().splitlines(keepends=True) if (a := read_note(line)) and a["row"] not in rows]
            with path.open("r+b") as stream:  # in place: the open file is the lock
                stream.truncate(0)
                stream.write(b"".join(kept))

    def holds(self, name: str, row: int) -> bool:
        """Whether the file `name` holds states of this row: event states are held for the first row of each clip."""
        return name in self._shapes and self._rows_in[name][self._place(name, row)] == row

    def _place(self, name: str, row: int) -> int:
        """Where the states of a row are in a file, as a number of rows."""
        return self._clip_index[row] if name == EVENT_STATES else row

    def write(self, row: int, states: Mapping[str, Tensor], token_ids: Sequence[int], about: dict[str, Any]) -> None:
        """Store one row; it is recorded by the next `commit`.

        Args:
            row: number of the row in the files
            states: file name -> [n, size] float of any dtype; event and prompt states have all their positions. Event states of a
                clip that an earlier row holds are not stored
            token_ids: n token ids that the states emit
            about: entry of samples.jsonl

        Raises:
            UserError: states that are not finite
        """
        n, hashes = len(token_ids), {}
        for name, tensor in states.items():
            if not self.holds(name, row):
                continue
            stored = tensor.to(self._dtype)  # values above the largest float16 become infinite
            if not torch.isfinite(stored).all():
                raise UserError(
                    f"sample {about['id']}: {name} would hold non-finite states as {str(self._dtype)[6:]}; "
                    "check the model's dtype and inputs, or --store_dtype."
                )
            positions, size = self._shapes[name]
            if tensor.shape != (positions if name in FIXED_LENGTH_FILES else n, size) or not 1 <= n <= self._longest:
                raise ValueError(f"{name}, row {row}: states {tuple(tensor.shape)} for {n} tokens of at most {self._longest}")
            data = stored.contiguous().view(torch.uint8).numpy().data.cast("B")
            hashes[name] = row_hash(data, row_bytes([self._shapes[name]], self._dtype))
            self._put(name, row, data)
        self._waiting.append({"row": row, "read": list(token_ids), "event_row": self._clip_index[row], **about, "sha256": hashes})

    def copy(self, row: int, source: Path, source_row: int, about: dict[str, Any]) -> None:
        """Store a row of another run, whose files have the same names, shapes and dtype.

        Args:
            row: number of the row in this run's files
            source: folder of the other run
            source_row: number of the row there
            about: its entry of samples.jsonl, with its token ids as `read` and its row of event states there as `event_row`

        Raises:
            UserError: its states do not match their recorded hash
        """
        hashes = {name: h for name, h in about["sha256"].items() if self.holds(name, row)}
        for name, (positions, size) in self._shapes.items():
            if not self.holds(name, row):
                continue
            length = row_bytes([(positions, size)], self._dtype)
            n = positions if name in FIXED_LENGTH_FILES else len(about["read"])
            place = about.get("event_row", source_row) if name == EVENT_STATES else source_row
            with (source / name).open("rb") as stream:
                data = os.pread(stream.fileno(), n * size * self._dtype.itemsize, storage_offset(source / name) + place * length)
            if row_hash(data, length) != hashes.get(name):
                raise UserError(f"{source / name}: the states of sample {about['id']} are not those that were written. Copy it again.")
            self._put(name, row, memoryview(data))
        self._waiting.append({"row": row, **about, "event_row": self._clip_index[row], "sha256": hashes})

    def _put(self, name: str, row: int, data: memoryview) -> None:
        at = self._offsets[name] + self._place(name, row) * row_bytes([self._shapes[name]], self._dtype)
        data = data.cast("B")
        with file_named(self.part / name):
            while data:  # one call writes at most 2 GiB, and less where a signal comes
                sent = os.pwrite(self._files[name], data, at)
                data, at = data[sent:], at + sent

    def commit(self) -> None:
        """Record the rows written since the last commit. Their states are synced to disk first: a power failure loses no recorded row."""
        for name, stream in self._files.items():
            with file_named(self.part / name):
                os.fdatasync(stream)
        lines = b"".join(map(note_line, self._waiting))
        with file_named(self.part):
            if lines and os.write(self._progress, lines) != len(lines):
                raise OSError(errno.ENOSPC, "the disk took only part of the progress notes")
            os.fdatasync(self._progress)
        self.done |= {about["row"] for about in self._waiting}
        self._waiting.clear()

    def rows(self) -> Iterator[dict[str, Any]]:
        """The entry of every row in order, with its token ids as `read` and its row of event states as `event_row`."""
        where = {row: (path, at) for row, path, at in notes(self.part)}
        for row in range(self._rows):
            about = entry_at(*where[row])
            del about["row"]
            yield about

    def finish(self, meta: dict[str, Any], token_pairs: Path | None = None) -> None:
        """Write the remaining files of the run, and its answers to `token_pairs`, and rename the folder to its final name."""
        count, width = self._rows, self._longest
        counts: dict[str, Counter[str]] = {"repaired": Counter(), "cut": Counter()}
        token_ids, lengths = torch.zeros(count, width, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
        with file_named(self.part / "samples.jsonl"), (self.part / "samples.jsonl").open("w") as stream:
            for row, about in enumerate(self.rows()):
                read = about.pop("read")
                about.pop("event_row", None)
                for kind, counter in counts.items():
                    counter.update(about.get(kind, ()))
                token_ids[row, : len(read)], lengths[row] = torch.tensor(read), len(read)
                stream.write(json.dumps(about) + "\n")
        positions = {"token_ids": token_ids, "mask": torch.arange(width) < lengths[:, None], "lengths": lengths}
        if EVENT_STATES in self._shapes:
            positions["clip_index"], meta = torch.tensor(self._clip_index), {**meta, "clips": len(self._rows_in[EVENT_STATES])}
        save_pt(self.part / "positions.pt", positions)
        sizes = {name: row_bytes([shape], self._dtype) for name, shape in self._shapes.items()}
        meta = {**meta, "plan": plan_hash(self.rows()), "positions": int(lengths.sum()), **counts, "row_bytes": sizes}
        companions = ["positions.pt", "samples.jsonl", *[f"../{p.name}" for p in sorted(self.directory.parent.glob("vl_*.pt"))]]
        if token_pairs:
            write_token_pairs(token_pairs, meta, self.rows())
            companions.append(os.path.relpath(token_pairs, self.directory))
        frames = {name: frame_hash(self.part / name, len(self._rows_in[name]) * size) for name, size in sizes.items()}
        write_hashed_json(self.part / "meta.json", {**meta, "frames": frames}, companions)
        shutil.rmtree(self.part / "fresh", ignore_errors=True)
        if self.directory.is_dir():  # of other rows, damaged, or of other settings and --no_resume was given
            shutil.rmtree(self.directory)
        os.rename(self.part, self.directory)
        for folder in superseded_runs(self.directory):
            shutil.rmtree(folder)
        remove_leftovers(self.directory)
        self.close()

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        open_files = [*self._files.values(), self._progress] if self._files else []
        for stream in open_files:
            os.close(stream)
        self._files = {}
