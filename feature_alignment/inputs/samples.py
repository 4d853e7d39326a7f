"""The one list of samples that drives every script: JSON lines, or the EventGPT/DSEC JSON; paths relative to the file.

{"id": "…", "sequence": "…", "events": "events/0.npy", "video": "video/0.mp4", "question": "…", "answer": …, "facts": …}

[{"id": …, "split": "test", "event_data": "<sequence>/<clip>.npy", "mp4_data": "<sequence>/<clip>.mp4",
  "conversations": [{"from": "human", "value": "<event>\nWhat …"}, {"from": "gpt", "value": "…"}]}, …]
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import Counter
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
    event_start_ms: float | None = None  # where this clip begins in a long event file


def read_samples(manifests: Mapping[str, Path], split: str, limit: int | None = None, questions: Path | None = None) -> list[Sample]:
    """The samples of a split in the file's order; UserError for anything missing or malformed.

    questions: a file of questions that every clip is asked instead of its own
    """
    if split not in manifests:
        raise UserError(f"no manifest for split {split!r}; the config's `manifests` has: {', '.join(sorted(manifests)) or 'none'}.")
    path = Path(manifests[split])
    if not path.is_file():
        raise UserError(f"no manifest at {path}. For the embedded pair make it with:\n  python -m feature_alignment.demo.scenes")
    if limit is not None and limit < 1:
        raise UserError(f"--limit wants a number of samples of at least 1, got {limit}.")
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: {error}") from None
    samples = _from_json(path, text, split) if text.lstrip().startswith("[") else _from_lines(path, text)
    if not samples:
        raise UserError(f"{path} is empty.")
    if questions is not None:
        samples = _ask(samples, read_questions(questions))
    twice = [i for i, n in Counter(s.id for s in samples).items() if n > 1]
    if twice:
        raise UserError(f"{path}: id {twice[0]!r} occurs twice; wanted a different one for every sample.")
    return samples[:limit]


def _from_lines(path: Path, text: str) -> list[Sample]:
    samples = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            start_ms = row.get("event_start_ms")
            samples.append(
                Sample(
                    id=str(row["id"]),
                    sequence=str(row["sequence"]),
                    question=str(row["question"]),
                    events=path.parent / row["events"],
                    video=path.parent / row["video"],
                    answer=row.get("answer"),
                    facts=row.get("facts"),
                    event_start_ms=None if start_ms is None else float(start_ms),
                )
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: {error!r}; wanted JSON with id, sequence, question, events, video.") from None
    return samples


def _from_json(path: Path, text: str, split: str) -> list[Sample]:
    """One sample for each question and answer of the rows of `split` (`val` counts as validation; rows without one as any)."""
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    samples, split_of = [], {}
    for number, row in enumerate(rows, 1):
        try:
            its_split = {"val": "validation"}.get(row.get("split"), row.get("split") or split)
            sequence = Path(row["event_data"]).parent.name
            if split_of.setdefault(sequence, its_split) != its_split:
                raise UserError(
                    f"{path}, row {number}: sequence {sequence!r} is in split {split_of[sequence]!r} and in {its_split!r}. Its clips "
                    "overlap, so a test on it would be no test; give every sequence one split."
                )
            if its_split != split:
                continue
            turns = row["conversations"]
            pairs = [(a["value"], b["value"]) for a, b in itertools.pairwise(turns) if (a["from"], b["from"]) == ("human", "gpt")]
            if not pairs:
                raise ValueError("no human turn followed by a gpt turn")
            for k, (question, answer) in enumerate(pairs):
                samples.append(
                    Sample(
                        id=str(row["id"]) if len(pairs) == 1 else f"{row['id']}-q{k}",
                        sequence=sequence,
                        question=re.sub(r"<(event|image|video)>", "", question).strip(),
                        events=_beside(path, row["event_data"], "event_npy"),
                        video=_beside(path, row.get("mp4_data") or row["video_data"], "mp4" if row.get("mp4_data") else "video"),
                        answer=answer,
                    )
                )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, row {number}: {error!r}; wanted id, event_data, mp4_data or video_data, conversations.") from None
    if rows and not samples:
        found = ", ".join(f"{s} ({n} sequences)" for s, n in sorted(Counter(split_of.values()).items()))
        raise UserError(f"{path} has no rows of split {split!r}; it has {found}.")
    return samples


def _beside(path: Path, name: str, folder: str) -> Path:
    """A data file named with or without the folder all of its kind lie in."""
    plain = path.parent / name
    return plain if plain.exists() or Path(name).parts[0] == folder else path.parent / folder / name


def read_questions(path: Path) -> list[str]:
    """Questions of a file: a JSON list of strings or of {"question": …}, or one per line."""
    if not path.is_file():
        raise UserError(f"no questions at {path}; --questions wants a JSON list or one question per line.")
    text = path.read_text()
    if text.lstrip().startswith("["):
        try:
            questions = [row if isinstance(row, str) else row["question"] for row in json.loads(text)]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path}: {error!r}; wanted a JSON list of strings or of {{"question": …}}.') from None
    else:
        questions = [line.strip() for line in text.splitlines() if line.strip()]
    if not questions or not all(isinstance(q, str) and q.strip() for q in questions):
        raise UserError(f"{path} holds no question, or an empty one.")
    return list(dict.fromkeys(questions))


def _ask(samples: list[Sample], questions: list[str]) -> list[Sample]:
    """Every clip once with every question. What was known about the clip stays; an answer stays with its own question."""
    clips: dict[tuple, Sample] = {}
    answers = {}
    for s in samples:
        clip = (s.events, s.video, s.event_start_ms)
        clips.setdefault(clip, s)
        answers[clip, s.question] = s.answer
    asked = []
    for clip, s in clips.items():
        name = re.sub(r"-q\d+$", "", s.id)
        asked += [
            dataclasses.replace(s, id=f"{name}-q{k}", question=question, answer=answers.get((clip, question)))
            for k, question in enumerate(questions)
        ]
    return asked
