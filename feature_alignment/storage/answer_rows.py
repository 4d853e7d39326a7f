"""The answers of a whole data set: one JSON line a sample, appended while a run goes on, resumed after a kill, merged from shards.

    sd/test.jsonl                   a row for each sample, in the order of the manifest once the run is complete
    sd/test.meta.json               identity of the run; with the hash of the rows once it is complete
    sd/test.shard-1-of-2.jsonl      the rows of one of two shards, with a .meta.json of its own

A killed run leaves whole lines, and at most one torn line, which is dropped. A resumed run answers what is missing: samples without a row,
with an error, or whose question or clip has changed. Samples that are decoded together are answered together again.
"""

from __future__ import annotations

import glob
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from feature_alignment.cli.console import UserError, file_named, finite
from feature_alignment.storage.files import altered_files, read_hashed_json, write_hashed_json, write_text
from feature_alignment.storage.identity import RECORDED_AND_CURRENT, RunIdentity
from feature_alignment.storage.shards import shard_name

log = logging.getLogger(__name__)
AnswerRow = dict[str, Any]  # a line of the file, see docs/formats.md
ANEW = "the same command with --no_resume (its rows are lost)"


class Asked(NamedTuple):
    """A sample of a run.

    Args:
        id: of the sample
        question: its question
        input_hash: hash of its question and of its clip's content; empty where the clips are not read
    """

    id: str
    question: str
    input_hash: str = ""


class AnswersFile:
    """The rows of one run. Reading changes nothing; `begin` is called before the first `append`, `finish` after the last.

    Args:
        path: the `.jsonl` file
        identity: identity of the run
        groups: its samples; those of one group are decoded together
        resume: keep the rows of an earlier run
        limited: whether `--limit` is given
        ignore_code: keep rows that other code made

    Raises:
        UserError: the file was made with other settings or other code, was altered, or most of its rows would be lost
    """

    def __init__(
        self,
        path: Path,
        identity: RunIdentity,
        groups: Sequence[Sequence[Asked]],
        *,
        resume: bool = True,
        limited: bool = False,
        ignore_code: bool = False,
    ) -> None:
        self.path, self.meta_path, self._groups = path, meta_path_of(path), groups
        self.meta = _recorded(path) if resume else {}
        refuse_other_runs(path, self.meta, identity, ignore_code)
        self.identity = replace(identity, code=self.meta["code"]) if self.meta and ignore_code else identity
        found = read_rows(path) if resume else []
        self.rows = self._unchanged(found, limited)
        self.is_complete = bool(self.meta.get("files")) and len(self.rows) == len(found) == sum(map(len, groups))

    @property
    def todo(self) -> list[bool]:
        """Whether each group is to be answered."""
        return [any(asked.id not in self.rows for asked in group) for group in self._groups]

    @property
    def ordered_rows(self) -> list[AnswerRow]:
        """The rows that there are, in the order of the samples."""
        return [self.rows[asked.id] for group in self._groups for asked in group if asked.id in self.rows]

    def begin(self, meta: Mapping[str, Any]) -> None:
        """Record the run as unfinished, and remove rows that are not kept.

        Args:
            meta: provenance of the run
        """
        write_hashed_json(self.meta_path, {**meta, "rows": sum(map(len, self._groups))})
        self.meta = dict(meta)
        self._write(self.ordered_rows)

    def append(self, rows: Sequence[AnswerRow]) -> None:
        """Append the rows of one group in one write, and flush them."""
        with file_named(self.path), self.path.open("ab") as stream:
            stream.write(b"".join(map(_line, rows)))
        self.rows |= {row["id"]: row for row in rows}

    def finish(self, **facts: Any) -> None:
        """Put all rows in order, and record the run as complete.

        Args:
            **facts: further entries of the meta
        """
        rows = self.ordered_rows
        if [row["id"] for row in read_rows(self.path)] != [row["id"] for row in rows]:
            self._write(rows)
        self.meta = {**self.meta, **facts, "rows": len(rows), "failed": sum("error" in row for row in rows)}
        write_hashed_json(self.meta_path, self.meta, [self.path.name])

    def _write(self, rows: Sequence[AnswerRow]) -> None:
        write_text(self.path, "".join(_line(row).decode() for row in rows))

    def _unchanged(self, found: Sequence[AnswerRow], limited: bool) -> dict[str, AnswerRow]:
        """The rows to keep by id: of whole groups whose samples are unchanged and were answered."""
        by_id = {row["id"]: row for row in found if "error" not in row}
        kept = {
            asked.id: by_id[asked.id]
            for group in self._groups
            if all(by_id.get(asked.id, {}).get("input_hash") == asked.input_hash for asked in group)
            for asked in group
        }
        planned = {asked.id: asked.input_hash for group in self._groups for asked in group}
        lost = [name for name, row in by_id.items() if planned.get(name) != row["input_hash"]]
        if lost and (limited or 2 * len(lost) > len(by_id)):
            raise UserError(
                f"{self.path} has {len(by_id)} answers, and this run would drop {len(lost)} of them, e.g. {lost[0]}: they are left out by "
                f"--limit, or their question or clip has changed. Give another --output_dir, or answer anew: {ANEW}."
            )
        return kept


def meta_path_of(path: Path) -> Path:
    """The file that describes a file of answers."""
    return path.with_suffix(".meta.json")


def read_rows(path: Path) -> list[AnswerRow]:
    """The rows of a file of answers, without lines that a kill or a full disk cut off; none if there is no file."""
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("id"), str) and isinstance(row.get("input_hash"), str):
            rows.append(row)
        else:
            log.warning("answers  %s, line %d: incomplete; its sample is answered again", path, number)
    return rows


def refuse_other_runs(path: Path, meta: Mapping[str, Any], identity: RunIdentity, ignore_code: bool = False) -> None:
    """Refuse to mix answers of other settings, sources or code into a file.

    Args:
        path: the `.jsonl` file
        meta: what was recorded about it; empty if there is none
        identity: identity of the requested run
        ignore_code: accept answers of other code

    Raises:
        UserError: names what changed, and how to keep or replace the earlier answers
    """
    if meta and (changes := identity.changes(meta, ignore_code)):
        keep = "keep its rows with --ignore_code" if all(c.startswith("code: ") for c in changes) else "give the old values"
        raise UserError(
            f"{path} was made with other settings (then → now):\n  " + "\n  ".join(changes) + "\n"
            f"To go on, {keep}, give another --output_dir, or answer anew: {ANEW}."
        )


def merge_answers(
    path: Path, identity: RunIdentity, asked: Sequence[Asked], meta: Mapping[str, Any], *, resume: bool = True, ignore_code: bool = False
) -> AnswersFile:
    """Merge the shards next to `path` into the file that one run would have written.

    Args:
        path: the `.jsonl` file of the whole data set
        identity: identity of the whole run
        asked: its samples in order; their clips need not be there
        meta: provenance of the merge
        resume: do not replace answers of other settings or code
        ignore_code: merge shards that other code made

    Raises:
        UserError: shards are missing, unfinished, altered, or of other settings or samples
    """
    if resume:
        refuse_other_runs(path, _recorded(path), identity, ignore_code)
    parts = _shards_of(path)
    by_id: dict[str, AnswerRow] = {}
    for i, part in enumerate(parts, 1):
        recorded = read_hashed_json(meta_path_of(part), "the same command with --shard and --no_resume")
        of_shard = replace(identity, settings={**identity.settings, "shard": f"{i}/{len(parts)}"})
        if changes := of_shard.changes(recorded, ignore_code, RECORDED_AND_CURRENT):
            raise UserError(f"{part} cannot be merged:\n  " + "\n  ".join(changes))
        if not recorded.get("files"):
            raise UserError(f"{part} is unfinished. Run the same command with --shard {i}/{len(parts)} until it ends, then --merge.")
        if altered_files(meta_path_of(part), recorded):
            raise UserError(f"{part} was altered after it was written. Copy it again.")
        by_id |= {row["id"]: row for row in read_rows(part)}
    wrong = [a.id for a in asked if by_id.get(a.id, {}).get("question") != a.question]
    if wrong or len(by_id) != len(asked):
        raise UserError(
            f"the shards of {path} hold {len(by_id)} samples, the data set {len(asked)}; {len(wrong)} of these differ"
            + (f", e.g. {wrong[0]}" if wrong else "")
            + ". Run every shard again with this data set: unchanged rows are kept."
        )
    whole = [[Asked(a.id, a.question, by_id[a.id]["input_hash"])] for a in asked]
    merged = AnswersFile(path, identity, whole, resume=False)
    merged.rows = {a.id: by_id[a.id] for a in asked}
    merged.begin(meta)
    merged.finish(merged_shards=len(parts))
    return merged


def _shards_of(path: Path) -> list[Path]:
    """The files of all shards next to `path`, in order; UserError unless there is exactly one complete set."""
    found = {p.name for p in path.parent.glob(f"{glob.escape(path.stem)}.shard-*-of-*.jsonl")}
    counts = sorted({int(n) for name in found if (n := Path(name).stem.rpartition("-")[2]).isdigit()})
    sets = [[f"{shard_name(path.stem, i, n)}.jsonl" for i in range(1, n + 1)] for n in counts]
    complete = [names for names in sets if found >= {*names}]
    if len(complete) > 1:
        raise UserError(
            f"{path.parent} holds the shards of several runs, {' and '.join(map(str, counts))} parts. Remove those of all but one."
        )
    if not complete:
        missing = ", ".join(name for names in sets[:1] for name in names if name not in found) or "every shard"
        raise UserError(f"{path.parent} lacks {missing}. Run or copy every shard first, e.g. --shard 1/2 and --shard 2/2.")
    return [path.with_name(name) for name in complete[0]]


def _recorded(path: Path) -> dict[str, Any]:
    """The meta of a file of answers, empty if there is neither; UserError if one of them is missing or altered."""
    described = meta_path_of(path)
    if not described.is_file():
        if path.is_file() and path.stat().st_size:
            raise UserError(f"{path} has no {described.name}, which says what it was made from. To answer anew: {ANEW}.")
        return {}
    meta = read_hashed_json(described, ANEW)
    if meta.get("files") and altered_files(described, meta):
        raise UserError(f"{path} was altered after it was written. To answer anew: {ANEW}.")
    return meta


def _line(row: AnswerRow) -> bytes:
    return json.dumps(finite(row), allow_nan=False).encode() + b"\n"
