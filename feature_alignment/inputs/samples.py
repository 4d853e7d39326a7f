"""The one list of samples that drives every script: a JSON-lines manifest, paths relative to it.

{"id": "…", "sequence": "…", "events": "events/0.npy", "video": "video/0.mp4", "question": "…", "answer": …, "facts": …}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_alignment.console import UserError


@dataclass(frozen=True)
class Sample:
    """One question about one clip. `sequence` is the recording it belongs to: splits and intervals go by it."""

    id: str
    sequence: str
    question: str
    events: Path
    video: Path
    answer: str | None = None
    facts: dict[str, Any] | None = None


def read_samples(manifests: Mapping[str, Path], split: str, limit: int | None = None) -> list[Sample]:
    """The samples of a split in the manifest's order; UserError for anything missing or malformed."""
    if split not in manifests:
        raise UserError(f"no manifest for split {split!r}; the config's `manifests` has: {', '.join(sorted(manifests)) or 'none'}.")
    path = Path(manifests[split])
    if not path.is_file():
        raise UserError(f"no manifest at {path}. For the embedded pair make it with:\n  python -m feature_alignment.demo.scenes")
    samples, seen = [], set()
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            sample = Sample(
                id=str(row["id"]),
                sequence=str(row["sequence"]),
                question=str(row["question"]),
                events=path.parent / row["events"],
                video=path.parent / row["video"],
                answer=row.get("answer"),
                facts=row.get("facts"),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: {error!r}; wanted JSON with id, sequence, question, events, video.") from None
        if sample.id in seen:
            raise UserError(f"{path}, line {number}: id {sample.id!r} occurs twice.")
        seen.add(sample.id)
        samples.append(sample)
    if not samples:
        raise UserError(f"{path} is empty.")
    if limit is not None and limit < 1:
        raise UserError(f"--limit wants a number of samples of at least 1, got {limit}.")
    return samples[:limit]
