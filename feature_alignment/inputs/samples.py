"""The one list of samples that drives every script: JSON lines, or the EventGPT/DSEC JSON; paths relative to the file.

{"id": "…", "sequence": "…", "events": "events/0.npy", "video": "video/0.mp4", "question": "…", "answer": …, "facts": …}

[{"id": …, "split": "test", "event_data": "<sequence>/<clip>.npy", "mp4_data": "<sequence>/<clip>.mp4",
  "conversations": [{"from": "human", "value": "<event>\nWhat …"}, {"from": "gpt", "value": "…"}]}, …]
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_alignment.console import UserError
from feature_alignment.inputs.event_units import UNITS, TimeUnit

_LONGEST_QUESTION = 2000  # characters


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
    event_time_unit: TimeUnit | None = None  # of an event file that does not state it

    def __post_init__(self) -> None:
        """raises UserError for what would go wrong far from here: a name no file can have, a question that stands for the clip"""
        if not re.fullmatch(r"[^/\\\0]{1,150}", self.id) or self.id.startswith("."):
            raise UserError(f"id {self.id[:60]!r}: files are named after it; wanted 1 to 150 characters, no slash, no dot in front.")
        if not isinstance(self.question, str) or not 1 <= len(self.question.strip()) <= _LONGEST_QUESTION:
            raise UserError(f"question {str(self.question)[:60]!r}: wanted a text of 1 to {_LONGEST_QUESTION} characters.")
        if found := re.search(r"<(event|video|image|ev_start|ev_end|/?s|unk|pad)>", self.question):
            raise UserError(f"question {self.question[:60]!r}: {found[0]} stands for something else in a prompt.")
        if not isinstance(self.answer, str | None) or not isinstance(self.facts, dict | None):
            raise UserError("wanted a text as answer and an object as facts, or null.")
        if self.event_start_ms is not None and not 0 <= self.event_start_ms < math.inf:
            raise UserError(f"event_start_ms {self.event_start_ms}: wanted 0 or more.")
        if self.event_time_unit not in (None, *UNITS):
            raise UserError(f"event_time_unit {str(self.event_time_unit)[:20]!r}: wanted one of {', '.join(UNITS)}.")
        try:
            "".join((self.id, self.sequence, self.question, self.answer or "")).encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise UserError(f"{error.object[error.start : error.end]!r} is no character of a text.") from None


def read_samples(
    manifests: Mapping[str, Path], split: str, limit: int | None = None, questions: Path | None = None, allow_outside: bool = False
) -> list[Sample]:
    """The samples of a split in the file's order; UserError for anything missing or malformed.

    questions:     a file of questions that every clip is asked instead of its own
    allow_outside: clips may lie outside the manifest's folder, its data root; a manifest of somebody else could name any file
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
    if not allow_outside:
        _stay_inside(path, samples)
    if questions is not None:
        try:
            samples = _ask(samples, read_questions(questions))
        except UserError as error:
            raise UserError(f"{questions}: {error}") from None
    twice = [i for i, n in Counter(s.id for s in samples).items() if n > 1]
    if twice:
        raise UserError(f"{path}: id {twice[0]!r} occurs twice; wanted a different one for every sample.")
    return samples[:limit]


def _stay_inside(path: Path, samples: list[Sample]) -> None:
    """raises UserError for a clip that does not lie under the manifest's folder, once `..` and symbolic links are followed"""
    root = path.parent.resolve()
    for clip in {clip: None for s in samples for clip in (s.events, s.video)}:
        try:
            inside = clip.resolve().is_relative_to(root)
        except (OSError, RuntimeError, ValueError):  # links in a circle, a byte no path has
            inside = False
        if not inside:
            raise UserError(f"{path} names {clip}, which lies outside its folder {root}. If you trust the file, type --allow_outside.")


def _from_lines(path: Path, text: str) -> list[Sample]:
    samples = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            start_ms = row.get("event_start_ms")
            samples.append(
                Sample(
                    id=_name(row, "id"),
                    sequence=_name(row, "sequence"),
                    question=row["question"],
                    events=path.parent / row["events"],
                    video=path.parent / row["video"],
                    answer=row.get("answer"),
                    facts=row.get("facts"),
                    event_start_ms=None if start_ms is None else float(start_ms),
                    event_time_unit=row.get("event_time_unit"),
                )
            )
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: {error!r}; wanted JSON with id, sequence, question, events, video.") from None
    return samples


def _from_json(path: Path, text: str, split: str) -> list[Sample]:
    """One sample for each question and answer of the rows of `split` (`val` counts as validation; rows without one as any)."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    samples: list[Sample] = []
    split_of: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        try:
            its_split = {"val": "validation"}.get(row.get("split"), row.get("split") or split)
            sequence = Path(row["event_data"]).parent.name
            if split_of.setdefault(sequence, its_split) != its_split:
                raise UserError(
                    f"sequence {sequence!r} is in split {split_of[sequence]!r} and in {its_split!r}. Its clips "
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
                        id=_name(row, "id") if len(pairs) == 1 else f"{_name(row, 'id')}-q{k}",
                        sequence=sequence,
                        question=re.sub(r"<(event|image|video)>", "", question).strip(),
                        events=_beside(path, row["event_data"], "event_npy"),
                        video=_beside(path, row.get("mp4_data") or row["video_data"], "mp4" if row.get("mp4_data") else "video"),
                        answer=answer,
                        event_time_unit=row.get("event_time_unit"),
                    )
                )
        except UserError as error:
            raise UserError(f"{path}, row {number}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, row {number}: {error!r}; wanted id, event_data, mp4_data or video_data, conversations.") from None
    if rows and not samples:
        found = ", ".join(f"{s} ({n} sequences)" for s, n in sorted(Counter(split_of.values()).items()))
        raise UserError(f"{path} has no rows of split {split!r}; it has {found}.")
    return samples


def _name(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str | int):
        raise ValueError(f"{key}: wanted a text or a number, got {type(row[key]).__name__}")
    return str(row[key])


def _beside(path: Path, name: str, folder: str) -> Path:
    """A data file named with or without the folder all of its kind lie in."""
    plain = path.parent / name
    return plain if plain.exists() or Path(name).parts[:1] == (folder,) else path.parent / folder / name


def read_questions(path: Path) -> list[str]:
    """Questions of a file: a JSON list of strings or of {"question": …}, or one per line."""
    if not path.is_file():
        raise UserError(f"no questions at {path}; --questions wants a JSON list or one question per line.")
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: {error}") from None
    if text.lstrip().startswith("["):
        try:
            questions = [row if isinstance(row, str) else row["question"] for row in json.loads(text)]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
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
        clip = (s.events, s.video, s.event_start_ms, s.event_time_unit)
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
