"""Hashes that identify each row of an extraction, so that unchanged rows are reused.

row     hash of the row's inputs: question, content of the clip's files, start in a long event file
batch   hash of the rows of its batch, in order, and the index of this row among them

`events` of an entry is the hash of what its event states depend on: content and unit of the event file, start of the window. The length
of the window is a setting of the run.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feature_alignment.cli.console import UserError
from feature_alignment.inputs.samples import Sample
from feature_alignment.storage.files import config_hash, file_hash


def identify(samples: Sequence[Sample], parts: Sequence[Sequence[int]], manifest: Path, event_start_ms: float) -> list[dict[str, Any]]:
    """The entries of samples.jsonl, in the order of the stored rows.

    Args:
        samples: Of the whole manifest.
        parts: Batches of this run, as indices into `samples`.
        manifest: Clips are named relative to its folder.
        event_start_ms: Start of clips that do not state their own.
    """
    folder = manifest.resolve().parent
    hash_of = functools.cache(_hash_of_readable)
    entries = []
    for part in parts:
        batch = [samples[i] for i in part]
        hashes, windows = [], []
        for sample in batch:
            start = event_start_ms if sample.event_start_ms is None else sample.event_start_ms
            clip = [hash_of(sample.events), hash_of(sample.video)]
            window = {"start_ms": float(start), "unit": sample.event_time_unit}
            hashes.append(config_hash({"question": sample.question, "clip": clip, **window}))
            windows.append(config_hash({"events": clip[0], **window}))
        batch_hash = config_hash({"rows": hashes})
        for index, (sample, row, events) in enumerate(zip(batch, hashes, windows, strict=True)):
            files = {os.path.relpath(path.resolve(), folder): hash_of(path) for path in (sample.events, sample.video)}
            about = {"id": sample.id, "sequence": sample.sequence, "question": sample.question, "facts": sample.facts, "clip": files}
            entries.append({**about, "identity": {"row": row, "batch": f"{batch_hash}:{index}"}, "events": events})
    return entries


def refuse_missing_clips(samples: Sequence[Sample]) -> None:
    """Raise UserError if a sample's event file or video does not exist, before hours of work on the others."""
    missing = [(s.id, path) for s in samples for path in (s.events, s.video) if not path.exists()]
    if missing:
        (name, path), others = missing[0], len(missing) - 1
        more = f", nor {others} other files" if others else ""
        raise UserError(f"sample {name}: nothing at {path}{more}. Put the clips there, or correct the manifest.")


def _hash_of_readable(path: Path) -> str | None:
    try:
        return file_hash(path)
    except OSError:  # reading the sample reports it
        return None
