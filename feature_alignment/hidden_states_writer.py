"""Hidden-state files written in place: flat memory at any number of rows, safe to kill, filled by many processes at once.

    train.unfinished/  settings.json  egpt_hidden_states.pt  vl_hidden_states.pt  progress-0.txt  progress-1.txt
    train/             the same .pt files, positions.pt, samples.jsonl, meta.json: one rename, once every row is there

Every `.pt` has its full size from the start and is sparse; a row is written at its place in the file, not through a memory map,
whose touched pages would count as this process's memory. A process notes its rows in its own progress file after their states.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from feature_alignment.artifacts import EVENT_STATES, read_json, write_json, write_token_pairs
from feature_alignment.console import UserError

ANEW = "the same command with --no_resume"


def unfinished(directory: Path) -> Path:
    """Where a run is filled in before it gets its final name."""
    return directory.with_name(directory.name + ".unfinished")


def complete(directory: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The meta of the complete run in `directory`, if these settings made it."""
    if unfinished(directory).is_dir() or not (directory / "meta.json").is_file():
        return None
    meta = read_json(directory / "meta.json", ANEW)
    if _changed(meta.get("settings", {}), settings):
        return None
    _sweep(directory)
    return meta


def refuse_changes(directory: Path, settings: dict[str, Any]) -> None:
    """raises UserError, naming what changed, where a complete or unfinished run in `directory` was made with other settings"""
    for path in (unfinished(directory) / "settings.json", directory / "meta.json"):
        if path.is_file():
            content = read_json(path, ANEW)
            changed = _changed(content if path.name == "settings.json" else content.get("settings", {}), settings)
            if changed:
                raise UserError(
                    f"{path.parent} was made with other settings (then → now):\n{changed}\n"
                    "Give the old values, keep both with another --output_dir, or make it anew with --no_resume (the old rows are lost)."
                )
            return  # an unfinished run is there to replace the complete one


def _changed(old: dict[str, Any], new: dict[str, Any]) -> str:
    keys = [k for k in sorted({*old, *new}) if (old.get(k) or None) != (new.get(k) or None)]  # a setting that came later was off
    return "\n".join(f"  {k}: {old.get(k)} → {new.get(k)}" for k in keys)


def begin(directory: Path, settings: dict[str, Any], resume: bool) -> None:
    """Make the unfinished folder, or keep the one that is there. `resume=False` throws its rows away; a complete run stays until
    the new one takes its place."""
    part = unfinished(directory)
    if not (resume and (part / "settings.json").is_file()):
        for notes in part.glob("progress-*.txt"):  # nobody's rows are thrown away while they are being written
            os.close(_open_progress(notes))
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write_json(part / "settings.json", settings)


def _open_progress(path: Path) -> int:
    """The progress file at `path`, ours alone as long as it is open; a note cut off by a kill is removed."""
    stream = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(stream)
        raise UserError(f"another process is writing {path.parent}; wait for it, or give another --output_dir.") from None
    os.ftruncate(stream, path.read_bytes().rfind(b"\n") + 1)
    return stream


def rows_done(directory: Path) -> set[int]:
    """Rows that an unfinished run has noted."""
    return {row for row, *_ in _notes(unfinished(directory))}


def _notes(part: Path) -> Iterator[tuple[int, Path, int]]:
    """Every noted row with its progress file and the byte its note begins at; a note cut off by a kill does not count."""
    for path in sorted(part.glob("progress-*.txt")):
        at = 0
        with path.open("rb") as stream:
            for line in stream:
                if line.endswith(b"\n"):
                    yield json.loads(line)["row"], path, at
                at += len(line)


def _sweep(directory: Path) -> None:
    """Remove from a complete run what only the unfinished one needed; done after the rename, so that no kill can lose rows."""
    for leftover in (*directory.glob("progress-*.txt"), directory / "settings.json"):
        leftover.unlink(missing_ok=True)


def storage_offset(path: Path) -> int:
    """The byte where the numbers of a bare tensor begin: a `.pt` is a zip whose one data record is not compressed."""
    with zipfile.ZipFile(path) as archive:
        record = next(i for i in archive.infolist() if i.filename.endswith("/data/0"))
    with path.open("rb") as stream:
        stream.seek(record.header_offset + 26)
        name, extra = struct.unpack("<HH", stream.read(4))
    return record.header_offset + 30 + name + extra


def check_room(directory: Path, needed_bytes: int) -> None:
    """raises UserError if the disk that holds `directory` has less room than that"""
    free = shutil.disk_usage(next(p for p in (directory.absolute(), *directory.absolute().parents) if p.is_dir())).free
    if needed_bytes > free:
        raise UserError(
            f"{directory} may need {needed_bytes:,} bytes, its disk has {free:,} free. Make room, give an --output_dir on another disk, "
            "or store less: --store_dtype bfloat16, --max_positions, --limit."
        )


def row_bytes(shapes: Iterable[tuple[int, int]], dtype: torch.dtype) -> int:
    """What one row may take in files of these shapes per row; a short text takes less, because what is not written is not stored."""
    return sum(positions * size for positions, size in shapes) * dtype.itemsize


class HiddenStatesWriter:
    """The unfinished folder of one run, opened by one of the processes that fill it. Make it after `begin`.

    shapes: file name -> (positions, size); each file holds [rows, positions, size], zero where no text is
    rank:  this process's number. Rank 0 must be made first and be the only one to `finish`
    """

    def __init__(self, directory: Path, rows: int, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype, rank: int = 0) -> None:
        self.directory, self.part = directory, unfinished(directory)
        self._rows, self._shapes, self._dtype = rows, dict(shapes), dtype
        self._longest = shapes["vl_hidden_states.pt"][0]
        for name, shape in shapes.items():
            if rank == 0 and not (self.part / name).is_file():
                fresh = self.part / "fresh" / name  # torch writes the file's name into the file: it must be the final one
                fresh.parent.mkdir(exist_ok=True)
                with torch.serialization.skip_data():
                    torch.save(torch.empty(rows, *shape, dtype=dtype), fresh)
                os.replace(fresh, self.part / name)
        self._files = {name: os.open(self.part / name, os.O_RDWR) for name in shapes}
        self._offsets = {name: storage_offset(self.part / name) for name in shapes}
        self._progress = _open_progress(self.part / f"progress-{rank}.txt")
        self.done = rows_done(directory)
        self._waiting: list[str] = []

    def write(self, row: int, states: Mapping[str, Tensor], token_ids: Sequence[int], about: dict[str, Any]) -> None:
        """Store one row; it counts from the next `commit` on.

        states: file name -> [n, size], any dtype; of event states all positions. token_ids: n
        raises: UserError for states that are not finite
        """
        n = len(token_ids)
        for name, tensor in states.items():
            if not torch.isfinite(tensor).all():
                raise UserError(f"sample {about['id']}: {name} would hold non-finite states; check the model's dtype and inputs.")
            positions, size = self._shapes[name]
            if tensor.shape != (positions if name == EVENT_STATES else n, size) or not 1 <= n <= self._longest:
                raise ValueError(f"{name}, row {row}: states {tuple(tensor.shape)} for {n} tokens of at most {self._longest}")
            self._put(name, row, tensor.to(self._dtype).contiguous().view(torch.uint8).numpy().data)
        self._waiting.append(json.dumps({"row": row, "read": list(token_ids), **about}) + "\n")

    def copy(self, row: int, source: Path, source_row: int, about: dict[str, Any]) -> None:
        """Store a row of another complete run, whose files have the same names, shapes and dtype; `about` has its text as `read`."""
        for name, (positions, size) in self._shapes.items():
            at = storage_offset(source / name) + source_row * row_bytes([(positions, size)], self._dtype)
            n = positions if name == EVENT_STATES else len(about["read"])
            with (source / name).open("rb") as stream:
                self._put(name, row, memoryview(os.pread(stream.fileno(), n * size * self._dtype.itemsize, at)))
        self._waiting.append(json.dumps({"row": row, **about}) + "\n")

    def _put(self, name: str, row: int, data: memoryview) -> None:
        at = self._offsets[name] + row * row_bytes([self._shapes[name]], self._dtype)
        data = data.cast("B")
        while data:  # one call writes at most 2 GiB, and less where a signal comes
            sent = os.pwrite(self._files[name], data, at)
            data, at = data[sent:], at + sent

    def commit(self) -> None:
        """Note the rows written since the last commit. States reach the disk first: a noted row is there even if the power fails."""
        for stream in self._files.values():
            os.fdatasync(stream)
        lines = "".join(self._waiting).encode()
        if lines and os.write(self._progress, lines) != len(lines):
            raise OSError(f"{self.part}: the disk took only part of the progress notes")
        os.fdatasync(self._progress)
        self.done |= {json.loads(line)["row"] for line in self._waiting}
        self._waiting.clear()

    def rows(self) -> Iterator[dict[str, Any]]:
        """What was said about every row, in their order, one at a time; `read` is the text the states stand on."""
        where = {row: (path, at) for row, path, at in _notes(self.part)}
        streams = {path: path.open("rb") for path, _ in set(where.values())}
        for row in range(self._rows):
            path, at = where[row]
            streams[path].seek(at)
            about = json.loads(streams[path].readline())
            del about["row"]
            yield about
        for stream in streams.values():
            stream.close()

    def finish(self, meta: dict[str, Any], token_pairs: Path | None = None) -> None:
        """Write what goes beside the states (and the answers to `token_pairs`) and give everything its final name at once."""
        count, width = self._rows, self._longest
        if token_pairs:
            write_token_pairs(token_pairs, meta, self.rows())
        token_ids, lengths = torch.zeros(count, width, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
        with (self.part / "samples.jsonl").open("w") as stream:
            for row, about in enumerate(self.rows()):
                read = about.pop("read")
                token_ids[row, : len(read)], lengths[row] = torch.tensor(read), len(read)
                stream.write(json.dumps(about) + "\n")
        positions = {"token_ids": token_ids, "mask": torch.arange(width) < lengths[:, None], "lengths": lengths}
        torch.save(positions, self.part / "positions.pt")
        write_json(self.part / "meta.json", {**meta, "positions": int(lengths.sum())})
        shutil.rmtree(self.part / "fresh", ignore_errors=True)
        if self.directory.is_dir():  # made with other settings, and --no_resume was given
            shutil.rmtree(self.directory)
        os.rename(self.part, self.directory)
        _sweep(self.directory)
        self.close()

    def close(self) -> None:
        for stream in (*self._files.values(), self._progress):
            os.close(stream)


def shard_name(split: str, shard: int, shards: int) -> str:
    return f"{split}.shard-{shard}-of-{shards}"


def merge_shards(directory: Path, settings: dict[str, Any], places: Mapping[str, int], token_pairs: Path, resume: bool) -> None:
    """Put the shards that lie beside `directory` together, as if one machine had done all. A killed merge goes on.

    settings: of the whole run; places: sample id -> row
    raises:   UserError if shards are missing, unfinished, or of other settings
    """
    found = sorted(directory.parent.glob(f"{directory.name}.shard-*-of-*/meta.json"))
    metas = {path.parent: read_json(path, "the same command with --shard and --no_resume") for path in found}
    shards = int(found[0].parent.name.rpartition("-")[2]) if found else 1
    wanted = [directory.with_name(shard_name(directory.name, i + 1, shards)) for i in range(shards)]
    if missing := [folder.name for folder in wanted if folder not in metas]:
        raise UserError(f"{directory.parent} lacks {', '.join(missing)} (complete, not .unfinished). Run or copy every shard first.")
    head = directory.parent / "vl_lm_head.pt"
    for i, folder in enumerate(wanted):
        theirs, ours = metas[folder]["settings"], {**settings, "shard": f"{i + 1}/{shards}"}
        changed = [f"{k}: {theirs.get(k)} there, {ours[k]} now" for k in ours if theirs.get(k) != ours[k]]
        if changed or not head.is_file():
            what = "\n  ".join(changed) or f"{head} is not there: copy it from any of the machines"
            raise UserError(f"{folder} cannot be merged:\n  {what}")
    first = torch.load(wanted[0] / "vl_hidden_states.pt", mmap=True, weights_only=True)
    names = sorted(p.name for p in wanted[0].glob("*_states*.pt"))
    shapes = {name: tuple(torch.load(wanted[0] / name, mmap=True, weights_only=True).shape[1:]) for name in names}
    check_room(directory.parent, (len(places) - len(rows_done(directory))) * row_bytes(shapes.values(), first.dtype))
    if resume:
        refuse_changes(directory, settings)
    begin(directory, settings, resume)
    writer = HiddenStatesWriter(directory, len(places), shapes, first.dtype)
    for folder in wanted:
        positions = torch.load(folder / "positions.pt", weights_only=True)
        with (folder / "samples.jsonl").open() as stream:
            for i, line in enumerate(stream):
                about, n = json.loads(line), int(positions["lengths"][i])
                if places[about["id"]] not in writer.done:
                    writer.copy(places[about["id"]], folder, i, {"read": positions["token_ids"][i, :n].tolist(), **about})
        writer.commit()
    writer.finish({**metas[wanted[0]], "settings": settings, "rows": len(places), "merged_shards": shards}, token_pairs)
