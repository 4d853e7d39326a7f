"""Shards: parts of one split that several machines extract, and their merge."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from feature_alignment.cli.console import UserError
from feature_alignment.storage.earlier_rows import Row, refuse_changes
from feature_alignment.storage.files import altered_files, load_pt, read_hashed_json
from feature_alignment.storage.hidden_states import event_rows
from feature_alignment.storage.hidden_states_writer import (
    SAMPLE_KEYS,
    HiddenStatesWriter,
    begin_run,
    check_disk_space,
    plan_hash,
    states_bytes,
)
from feature_alignment.storage.identity import RECORDED_AND_CURRENT, RunIdentity
from feature_alignment.storage.progress_notes import rows_done


def parse_shard(shard: str | None, merge: bool) -> tuple[int, int]:
    """The number of a shard and the number of shards: (2, 3) for `2/3`, (1, 1) without --shard.

    Raises:
        UserError: if `shard` is not i/n with 1 <= i <= n, or is combined with --merge
    """
    i, _, n = (shard or "1/1").partition("/")
    if not (i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)) or (shard and merge):
        raise UserError(f"--shard wants i/n with i from 1 to n, e.g. 1/3, and no --merge; got {shard!r}.")
    return int(i), int(n)


def shard_name(split: str, shard: int, shards: int) -> str:
    """Folder of one of several parts of a split."""
    return f"{split}.shard-{shard}-of-{shards}"


def merge_shards(
    directory: Path, identity: RunIdentity, rows: Sequence[Row], token_pairs: Path, resume: bool, ignore_code: bool = False
) -> None:
    """Merge the shards next to `directory` into the files that one machine would have written. A killed merge can be resumed.

    Args:
        directory: folder of the whole split
        identity: identity of the whole run
        rows: id, sequence, question and facts of every sample, in order
        token_pairs: file for both models' answers
        resume: continue an unfinished merge
        ignore_code: merge shards that other code made

    Raises:
        UserError: if shards are missing, unfinished, damaged, or of other settings or samples
    """
    folders, metas = _complete_shards(directory)
    for i, folder in enumerate(folders):
        of_shard = replace(identity, settings={**identity.settings, "shard": f"{i + 1}/{len(folders)}"})
        if changes := of_shard.changes(metas[folder], ignore_code, RECORDED_AND_CURRENT):
            raise UserError(f"{folder} cannot be merged:\n  " + "\n  ".join(changes))
    if not (head := directory.parent / "vl_lm_head.pt").is_file():
        raise UserError(f"{head} is missing: copy it from any of the machines.")
    entries = _entries_in_order(folders, metas, rows)
    first = load_pt(folders[0] / "vl_hidden_states.pt", "copy it again")
    shapes = {name: tuple(load_pt(folders[0] / name, "copy it again").shape[1:]) for name in metas[folders[0]]["frames"]}
    clip_index = list(event_rows(entries))
    check_disk_space(directory.parent, sum(states_bytes(shapes, first.dtype, clip_index, rows_done(directory)).values()))
    if resume:
        refuse_changes(directory, identity, entries, False, ignore_code)
    begin_run(directory, identity, plan_hash(entries), resume)
    writer = HiddenStatesWriter(directory, len(rows), shapes, first.dtype, clip_index=clip_index)
    row_of = {row["id"]: i for i, row in enumerate(rows)}
    for folder in folders:
        positions = load_pt(folder / "positions.pt", "copy it again")
        for i, (about, event_row) in enumerate(zip(_lines(folder), event_rows(_lines(folder)), strict=True)):
            if row_of[about["id"]] not in writer.done:
                read = positions["token_ids"][i, : int(positions["lengths"][i])].tolist()
                writer.copy(row_of[about["id"]], folder, i, {"read": read, "event_row": event_row, **about})
        writer.commit()
    meta = {**metas[folders[0]], "settings": identity.settings, "rows": len(rows), "merged_shards": len(folders)}
    writer.finish(meta, token_pairs)


def _complete_shards(directory: Path) -> tuple[list[Path], dict[Path, dict[str, Any]]]:
    """The folders of all shards in order, and their metas; UserError where one is missing or altered."""
    found = sorted(directory.parent.glob(f"{directory.name}.shard-*-of-*/meta.json"))
    metas = {path.parent: read_hashed_json(path, "the same command with --shard and --no_resume") for path in found}
    shards = int(found[0].parent.name.rpartition("-")[2]) if found else 1
    folders = [directory.with_name(shard_name(directory.name, i + 1, shards)) for i in range(shards)]
    if missing := [folder.name for folder in folders if folder not in metas]:
        raise UserError(f"{directory.parent} lacks {', '.join(missing)} (complete, not .unfinished). Run or copy every shard first.")
    for folder in folders:
        if changed := altered_files(folder / "meta.json", metas[folder], ("positions.pt", "samples.jsonl")):
            raise UserError(f"{folder}: {', '.join(changed)} was altered after it was written. Copy it again.")
    return folders, metas


def _entries_in_order(folders: Sequence[Path], metas: dict[Path, dict[str, Any]], rows: Sequence[Row]) -> list[Row]:
    """The shards' entries of every sample, in the order of `rows`; UserError if they were extracted from other samples."""
    by_id = {
        about["id"]: {key: about.get(key) for key in SAMPLE_KEYS} | {key: about[key] for key in ("events",) if key in about}
        for folder in folders
        for about in _lines(folder)
    }
    wrong = [row["id"] for row in rows if any(by_id.get(row["id"], {}).get(key) != value for key, value in row.items())]
    if wrong or len(by_id) != len(rows) or sum(meta["rows"] for meta in metas.values()) != len(rows):
        example = f", e.g. {wrong[0]}" if wrong else ""
        raise UserError(
            f"the shards next to {folders[0]} hold {len(by_id)} samples, the manifest {len(rows)}; {len(wrong)} of these differ{example}. "
            "Run every shard again with this manifest: unchanged rows are kept."
        )
    return [by_id[row["id"]] for row in rows]


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    with (folder / "samples.jsonl").open() as stream:
        yield from map(json.loads, stream)
