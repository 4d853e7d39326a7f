"""What identifies each row of an extraction, so that unchanged rows are recognized and kept.

row     hash of what a row depends on: its question, the content of its clip's files, where it begins in a long event file
batch   hash of the rows that are read together, in their order, and this row's place among them
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feature_alignment.inputs.samples import Sample
from feature_alignment.storage.files import config_hash, file_hash


def identify(samples: Sequence[Sample], parts: Sequence[Sequence[int]], manifest: Path, event_start_ms: float) -> list[dict[str, Any]]:
    """What samples.jsonl says of every row's sample, in the order in which the files hold the rows.

    Args:
        samples: of the whole manifest
        parts: rows of `samples` that are read together, of all batches of this run
        manifest: clips are named from its folder
        event_start_ms: where clips begin that do not say so themselves
    """
    folder = manifest.resolve().parent
    hash_of = functools.cache(lambda path: file_hash(path) if path.exists() else None)
    entries = []
    for part in parts:
        batch = [samples[i] for i in part]
        hashes = []
        for sample in batch:
            start = event_start_ms if sample.event_start_ms is None else sample.event_start_ms
            clip = [hash_of(sample.events), hash_of(sample.video)]
            hashes.append(
                config_hash({"question": sample.question, "clip": clip, "start_ms": float(start), "unit": sample.event_time_unit})
            )
        together = config_hash({"rows": hashes})
        for place, (sample, row) in enumerate(zip(batch, hashes, strict=True)):
            files = {os.path.relpath(path.resolve(), folder): hash_of(path) for path in (sample.events, sample.video)}
            about = {"id": sample.id, "sequence": sample.sequence, "question": sample.question, "facts": sample.facts, "clip": files}
            entries.append({**about, "identity": {"row": row, "batch": f"{together}:{place}"}})
    return entries
