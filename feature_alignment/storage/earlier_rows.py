"""Reuse of an earlier extraction: as a whole if it is the requested run, otherwise row by row.

The last bits of a float depend on the batch in which it is computed. A row is therefore reused only if the same rows form its batch, and
the result equals a new extraction byte for byte. Rows that are appended to a manifest are extracted together with the rows of the last
batch; all batches before it are copied. A row that becomes the first one of its clip is extracted again, because the event states come
from its batch now. Renaming a sample, or moving its files, changes no row.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from feature_alignment.cli.console import UserError
from feature_alignment.storage.artifacts import log_reuse
from feature_alignment.storage.files import altered_files, load_pt, read_hashed_json, read_json
from feature_alignment.storage.hidden_states import EVENT_STATES, event_rows, rows_in_file
from feature_alignment.storage.hidden_states_writer import REMAKE, HiddenStatesWriter, plan_hash, superseded_runs
from feature_alignment.storage.identity import RunIdentity
from feature_alignment.storage.progress_notes import progress_entries, remove_leftovers, unfinished_folder
from feature_alignment.storage.state_files import frame_hash, row_hashes

log = logging.getLogger(__name__)
_TOGETHER = 64  # rows that are copied between two commits
Row = dict[str, Any]  # the keys of a row's entry in samples.jsonl that `inputs/row_identity.py` writes


def find_complete_run(directory: Path, identity: RunIdentity, rows: Sequence[Row], ignore_code: bool = False) -> dict[str, Any] | None:
    """The meta of the complete run in `directory` if it is the requested run and matches all its hashes, else None.

    Args:
        directory: folder of one split
        identity: identity of the requested run
        rows: its rows; in a merge, which needs no clips, without `identity` and `clip`
        ignore_code: accept a run of other code
    """
    if unfinished_folder(directory).is_dir() or not (directory / "meta.json").is_file():
        return None
    meta = read_hashed_json(directory / "meta.json", REMAKE)
    if identity.changes(meta, ignore_code) or not _same_rows(directory, meta, rows):
        return None
    if wrong := altered_files(directory / "meta.json", meta) or _damaged(directory, meta):
        names = ", ".join(wrong)
        log.warning("%s: %s was altered, truncated or deleted. Rows that are intact are kept, others extracted again.", directory, names)
        return None
    remove_leftovers(directory)
    compared = f"{len(rows)} rows (question, clip, batch)", f"the recorded hashes of {len(meta['files'])} files and of all their states"
    log_reuse(directory, identity, meta, *compared)
    return meta


def _same_rows(directory: Path, meta: dict[str, Any], rows: Sequence[Row]) -> bool:
    if all("identity" in row for row in rows):
        return meta.get("plan") == plan_hash(rows)
    stored = [[about.get(key) for key in rows[0]] for about in _entries(directory)]
    return stored == [list(row.values()) for row in rows]


def _entries(directory: Path) -> Iterator[dict[str, Any]]:
    """The entries in samples.jsonl of a complete run; none if the file was altered."""
    meta = read_json(directory / "meta.json", REMAKE)
    if not altered_files(directory / "meta.json", meta, ["samples.jsonl"]):
        with (directory / "samples.jsonl").open() as stream:
            yield from map(json.loads, stream)


def _damaged(directory: Path, meta: dict[str, Any]) -> list[str]:
    """Files of states that are missing or do not match their recorded hashes."""
    entries = list(_entries(directory))
    clip_index, wrong = list(event_rows(entries)), []
    for name, frame in meta["frames"].items():
        path, size = directory / name, meta["row_bytes"][name]
        rows = [entries[row]["sha256"] for row in rows_in_file(name, clip_index)]
        try:
            intact = frame_hash(path, size * len(rows)) == frame
            intact = intact and all(row[name] == h for row, h in zip(rows, row_hashes(path, len(rows), size), strict=True))
        except (UserError, OSError):
            intact = False
        if not intact:
            wrong.append(name)
    return wrong


def refuse_changes(directory: Path, identity: RunIdentity, rows: Sequence[Row], limited: bool, ignore_code: bool = False) -> None:
    """Refuse to replace hours of work if settings, sources or code changed, or if most rows would be lost.

    Args:
        directory: folder of one split, with a complete or unfinished run or none
        identity: identity of the requested run
        rows: its rows
        limited: whether `--limit` is given
        ignore_code: accept a run of other code

    Raises:
        UserError: names what changed, and how to keep or replace the earlier run
    """
    for path in (unfinished_folder(directory) / "settings.json", directory / "meta.json"):
        if not path.is_file():
            continue
        changes = identity.changes(read_json(path, REMAKE), ignore_code)
        if not changes and all("identity" in row for row in rows):
            changes = _lost(path.parent, rows, limited)
        if changes:
            keep = "keep them with --ignore_code, " if all(c.startswith("code: ") for c in changes) else "give the old values, "
            raise UserError(
                f"{path.parent} was made with other settings (then → now):\n  " + "\n  ".join(changes) + "\n"
                f"Compared: {identity.compared()}. To go on, {keep}keep both with another --output_dir, or make it anew with "
                "--no_resume (the old rows are lost)."
            )
        return  # an unfinished run takes precedence over the complete one that it will replace


def with_recorded_code(directory: Path, identity: RunIdentity) -> RunIdentity:
    """The identity with the recorded code of an earlier run in `directory`, whose rows --ignore_code keeps.

    Args:
        directory: folder of one split
        identity: identity of the requested run
    """
    recorded = _recorded(unfinished_folder(directory)) or _recorded(directory)
    return replace(identity, code=recorded["code"]) if recorded and not identity.changes(recorded, ignore_code=True) else identity


def _lost(folder: Path, rows: Sequence[Row], limited: bool) -> list[str]:
    """A message if a new run would drop most rows of an earlier one, or any row because of --limit; else none."""
    named = {about["identity"]["row"]: about["id"] for about, _ in _stored(folder)}
    count = Counter(about["identity"]["row"] for about, _ in _stored(folder))
    lost = count - Counter(row["identity"]["row"] for row in rows)
    if not lost or (not limited and lost.total() <= count.total() - lost.total()):
        return []
    examples = ", ".join(named[row] for row in list(lost)[:3])
    why = "are left out by --limit, or have" if limited else "have"
    return [f"{lost.total()} of {count.total()} rows {why} another question, clip or start, or are gone, e.g. {examples}"]


def copy_unchanged_rows(writer: HiddenStatesWriter, identity: RunIdentity, rows: Sequence[Row], ignore_code: bool = False) -> None:
    """Copy every undamaged row of earlier runs whose batch is also a batch of this run.

    Args:
        writer: writer of the requested run
        identity: its identity; runs of another identity are skipped
        rows: its rows
        ignore_code: accept runs of other code
    """
    row_of = {row["identity"]["batch"]: i for i, row in enumerate(rows)}
    asked = {row["identity"]["row"] for row in rows}
    kept = damaged = regrouped = 0
    for folder in (writer.directory, *superseded_runs(writer.directory)):
        if identity.changes(_recorded(folder), ignore_code):
            continue
        for n, (about, source_row) in enumerate(_stored(folder, texts=True)):
            row = row_of.get(about["identity"]["batch"])
            if row is not None and writer.holds(EVENT_STATES, row) and EVENT_STATES not in about["sha256"]:
                row = None
            if row is None or row in writer.done:
                regrouped += row is None and about["identity"]["row"] in asked
                continue
            try:
                writer.copy(row, folder, source_row, rows[row] | {key: value for key, value in about.items() if key not in rows[row]})
                kept += 1
            except (UserError, OSError):
                damaged += 1
            if n % _TOGETHER == 0:
                writer.commit()
        writer.commit()
    if kept or damaged or regrouped:
        found = f"{kept} rows whose question, clip and batch are unchanged"
        redone = f"{damaged} damaged, {regrouped} now read together with other rows"
        log.info("kept  %s: %s. Extracted again: %s", writer.directory, found, redone)


def _recorded(folder: Path) -> dict[str, Any]:
    """The identity that a complete or unfinished run recorded; empty if there is no run."""
    path = next((p for p in (folder / "meta.json", folder / "settings.json") if p.is_file()), None)
    return read_json(path, REMAKE) if path else {}


def _stored(folder: Path, texts: bool = False) -> Iterator[tuple[dict[str, Any], int]]:
    """Every row of a complete or unfinished run: its entry and its number in the files.

    Args:
        folder: of the run
        texts: whether the entry gets the ids of its text as `read`, and its row of event states as `event_row`
    """
    if (folder / "settings.json").is_file() and not (folder / "meta.json").is_file():
        for about in progress_entries(folder):
            yield {key: value for key, value in about.items() if key != "row"}, about["row"]
    elif (folder / "meta.json").is_file():
        meta = read_json(folder / "meta.json", REMAKE)
        if texts and altered_files(folder / "meta.json", meta, ["positions.pt"]):
            return
        positions = load_pt(folder / "positions.pt", REMAKE) if texts else None
        clip_index = list(event_rows(_entries(folder))) if texts else []
        for row, about in enumerate(_entries(folder)):
            read = {"read": positions["token_ids"][row, : positions["lengths"][row]].tolist()} if positions else {}
            yield {**read, **({"event_row": clip_index[row]} if texts else {}), **about}, row
