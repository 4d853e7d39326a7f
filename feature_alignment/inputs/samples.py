r"""Manifests: the samples that all scripts read. Rows of this project or of EventGPT/DSEC; paths are relative to the manifest.

{"id": "…", "sequence": "…", "events": "events/0.npy", "video": "video/0.mp4", "question": "…", "answer": …, "facts": …}

{"id": …, "split": "test", "event_data": "<sequence>/<clip>.npy", "mp4_data": "<sequence>/<clip>.mp4",
 "conversations": [{"from": "human", "value": "<event>\nWhat …"}, {"from": "gpt", "value": "…"}]}

Both kinds may be JSON lines or one JSON list. Turns may also be `{"role": "user", "content": …}`, under `conversations` or `messages`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_alignment.cli.console import UserError
from feature_alignment.cli.text_files import as_object, kind_of, read_text, reason, rows_of
from feature_alignment.inputs.event_units import UNITS, TimeUnit

_LONGEST_QUESTION = 2000  # characters
_SPLITS = {"val": "validation", "valid": "validation", "dev": "validation"}
_ROLES = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer"}
_LONGEST_ID = 200  # bytes; file systems allow 255 for a name with its ending
# folders of all recordings or of one camera, not names of a sequence
_FOLDERS_OF_A_KIND = ("event_npy", "event_data", "events", "event", "npy", "data", "left", "right", "", "..")


@dataclass(frozen=True)
class Sample:
    """One question about one clip.

    Args:
        id: Unique name; files are named after it.
        sequence: Recording that the clip belongs to; splits and confidence intervals are by sequence.
        question: Text of the question.
        events: Event file.
        video: Video file, image, or folder or zip of frames.
        answer: Reference answer.
        facts: What is true about the clip, for the lexicon (docs/formats.md).
        event_start_ms: Where the clip begins in a long event file.
        event_time_unit: Unit of an event file that does not state it.
    """

    id: str
    sequence: str
    question: str
    events: Path
    video: Path
    answer: str | None = None
    facts: dict[str, Any] | None = None
    event_start_ms: float | None = None
    event_time_unit: TimeUnit | None = None

    def __post_init__(self) -> None:
        """Validate all fields; UserError for values that would only fail later, such as an id that cannot be a file name."""
        if not re.fullmatch(r"[^/\\\0]{1,150}", self.id) or self.id.startswith("."):
            raise UserError(f"id {self.id[:60]!r}: files are named after it; wanted 1 to 150 characters, no slash, no dot in front.")
        if self.id.lower().endswith(".meta"):
            raise UserError(f"id {self.id[:60]!r}: files are named after it, and names ending in .meta are those of whole data sets.")
        if not isinstance(self.question, str) or not 1 <= len(self.question.strip()) <= _LONGEST_QUESTION:
            raise UserError(f"question {str(self.question)[:60]!r}: wanted a text of 1 to {_LONGEST_QUESTION} characters.")
        if found := re.search(r"<(event|video|image|ev_start|ev_end|/?s|unk|pad)>", self.question):
            raise UserError(f"question {self.question[:60]!r}: {found[0]} is a special token; remove it from the question.")
        if not isinstance(self.answer, str | None) or not isinstance(self.facts, dict | None):
            raise UserError("wanted a text as answer and an object as facts, or null.")
        for slot, value in (self.facts or {}).items():
            if not isinstance(value, str | int | float):
                raise UserError(f"facts: {slot} is {kind_of(value)}; wanted a text or a number for every fact.")
        if self.event_start_ms is not None and not 0 <= self.event_start_ms < math.inf:
            raise UserError(f"event_start_ms {self.event_start_ms}: wanted 0 or more.")
        if self.event_time_unit not in (None, *UNITS):
            raise UserError(f"event_time_unit {str(self.event_time_unit)[:20]!r}: wanted one of {', '.join(UNITS)}.")
        try:
            "".join((self.sequence, self.question, self.answer or "")).encode()
            num_bytes = len(self.id.encode())
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise UserError(f"{error.object[error.start : error.end]!r} is no character of a text.") from None
        if num_bytes > _LONGEST_ID:
            raise UserError(f"id {self.id[:60]!r}: files are named after it; wanted at most {_LONGEST_ID} bytes, got {num_bytes}.")


def read_samples(
    manifests: Mapping[str, Path], split: str, limit: int | None = None, questions: Path | None = None, allow_outside: bool = False
) -> list[Sample]:
    """Read the samples of a split, in the order of the manifest.

    Args:
        manifests: Split -> manifest.
        split: Which of them.
        limit: Largest number of samples; None for all.
        questions: File of questions that every clip is asked instead of its own.
        allow_outside: Accept clips outside the manifest's folder. By default they are refused, because a manifest from an untrusted source
            could name any file.

    Raises:
        UserError: For anything missing or malformed.
    """
    if not manifests:
        raise UserError("no manifests, which a config names. Type --config FILE: configs/demo.yaml, or one of your own.")
    if split not in manifests:
        raise UserError(f"no manifest for split {split!r}; the config's `manifests` has: {', '.join(sorted(manifests))}.")
    path = Path(manifests[split])
    if not path.is_file():
        raise UserError(
            f"no manifest at {path}, which the config names for split {split!r}. data/README.md describes one; for an embedded pair type\n"
            "  python -m feature_alignment.demo.scenes\n  python -m feature_alignment.demo.language_scenes"
        )
    if limit is not None and limit < 1:
        raise UserError(f"--limit wants a number of samples of at least 1, got {limit}.")
    samples = _from_rows(path, _numbered_rows(path), split)
    if not samples:
        raise UserError(f"{path} has no rows; wanted one JSON object a line with id, sequence, question, events and video.")
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
    """Refuse clips outside the manifest's folder, after resolving `..` and symbolic links."""
    root = path.parent.resolve()
    for clip in {clip: None for s in samples for clip in (s.events, s.video)}:
        try:
            inside = clip.resolve().is_relative_to(root)
        except (OSError, RuntimeError, ValueError):  # circular links, bytes that no path may contain
            inside = False
        if not inside:
            raise UserError(f"{path} names {clip}, which lies outside its folder {root}. If you trust the file, type --allow_outside.")


def _numbered_rows(path: Path) -> list[tuple[str, Any]]:
    """The rows of a manifest, JSON lines or one JSON list, each with its name for error messages."""
    text = read_text(path)
    if text.lstrip("\ufeff \t\r\n").startswith("["):
        try:
            return [(f"row {number}", row) for number, row in enumerate(json.loads(text), 1)]
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON: {error}") from None
    rows = []
    for number, line in rows_of(text):
        try:
            rows.append((f"line {number}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: {reason(error)}; wanted one JSON object a line.") from None
    return rows


def _from_rows(path: Path, rows: Sequence[tuple[str, Any]], split: str) -> list[Sample]:
    """The samples of a split; rows without a split belong to every split."""
    samples: list[Sample] = []
    split_of: dict[str, str] = {}
    split = _SPLITS.get(split, split)
    for name, row in rows:
        wanted = "id, sequence, question, events, video; or id, event_data, mp4_data or video_data, conversations"
        try:
            of_eventgpt = "event_data" in as_object(row)
            if of_eventgpt:
                wanted = "id, event_data, mp4_data or video_data, conversations"
            sequence = _sequence_of(_text(row, "event_data")) if of_eventgpt and row.get("sequence") is None else _name(row, "sequence")
            row_split = split if row.get("split") is None else _text(row, "split")
            row_split = _SPLITS.get(row_split, row_split)
            if split_of.setdefault(sequence, row_split) != row_split:
                raise UserError(
                    f"sequence {sequence!r} is in split {split_of[sequence]!r} and in {row_split!r}. Its clips "
                    "overlap, so a test on it would not be independent; give every sequence one split, or, if these are "
                    'different recordings, each row its "sequence".'
                )
            if row_split == split:
                clip = {"sequence": sequence, **_options(row)}
                samples += _eventgpt_samples(path, row, clip) if of_eventgpt else _own_samples(path, row, clip)
        except UserError as error:
            raise UserError(f"{path}, {name}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"{path}, {name}: {reason(error)}; wanted {wanted}.") from None
    if rows and not samples:
        found = ", ".join(f"{s} ({n} sequences)" for s, n in sorted(Counter(split_of.values()).items()))
        raise UserError(f"{path} has no rows of split {split!r}; it has {found}.")
    return samples


def _options(row: dict[str, Any]) -> dict[str, Any]:
    """What a row of either kind may state of its clip."""
    start_ms = row.get("event_start_ms")
    if not isinstance(start_ms, int | float | str | None) or isinstance(start_ms, bool):
        raise ValueError(f"event_start_ms: wanted a number, got {kind_of(start_ms)}")
    return {
        "facts": row.get("facts"),
        "event_start_ms": None if start_ms is None else float(start_ms),
        "event_time_unit": row.get("event_time_unit"),
    }


def _own_samples(path: Path, row: dict[str, Any], clip: dict[str, Any]) -> list[Sample]:
    """Samples of a row of this project, which has one question or conversation turns."""
    clip = clip | {"events": path.parent / _text(row, "events"), "video": path.parent / _text(row, "video")}
    if "question" not in row and ("conversations" in row or "messages" in row):
        return _samples_of_turns(row, clip)
    return [Sample(id=_name(row, "id"), question=row["question"], answer=row.get("answer"), **clip)]


def _eventgpt_samples(path: Path, row: dict[str, Any], clip: dict[str, Any]) -> list[Sample]:
    video = "mp4_data" if row.get("mp4_data") else "video_data"
    events = _data_file(path, _text(row, "event_data"), "event_npy")
    return _samples_of_turns(row, clip | {"events": events, "video": _data_file(path, _text(row, video), video.removesuffix("_data"))})


def _samples_of_turns(row: dict[str, Any], clip: dict[str, Any]) -> list[Sample]:
    """One sample per question that is followed by an answer."""
    turns = [_turn(turn) for turn in row["messages" if row.get("messages") else "conversations"]]
    pairs = [(a, b) for (asks, a), (answers, b) in itertools.pairwise(turns) if (asks, answers) == ("question", "answer")]
    if not pairs:
        raise ValueError("no human turn followed by a gpt turn (or user and assistant)")
    name = _name(row, "id")
    names = [name] if len(pairs) == 1 else [f"{name}-q{k}" for k in range(len(pairs))]
    return [
        Sample(id=i, question=re.sub(r"<(event|image|video)>", "", question).strip(), answer=answer, **clip)
        for i, (question, answer) in zip(names, pairs, strict=True)
    ]


def _turn(turn: Any) -> tuple[str | None, str]:
    """Role and text of a turn: `{"from", "value"}` or `{"role", "content"}`, whose content may be a list of parts."""
    role, text = ("role", "content") if "role" in as_object(turn) else ("from", "value")
    content = turn[text]
    if isinstance(content, list):  # images and recordings are separate parts; the row names their files
        content = " ".join(as_object(part)["text"] for part in content if as_object(part).get("type") == "text")
    if not isinstance(content, str):
        raise ValueError(f"{text} of a turn: wanted a text, got {kind_of(content)}")
    return _ROLES.get(turn[role]), content


def _sequence_of(event_data: str) -> str:
    """The recording of a clip: the nearest folder that is named after one, or the clip's own name."""
    clip = Path(event_data)
    return next((folder.name for folder in clip.parents if folder.name not in _FOLDERS_OF_A_KIND), clip.stem)


def _text(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str) or not row[key]:
        raise ValueError(f"{key}: wanted a text, got {kind_of(row[key]) if row[key] != '' else 'an empty one'}")
    return str(row[key])


def _name(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str | int) or isinstance(row[key], bool):
        raise ValueError(f"{key}: wanted a text or a number, got {kind_of(row[key])}")
    return str(row[key])


def _data_file(path: Path, name: str, folder: str) -> Path:
    """A data file, named with or without the folder of its kind."""
    plain = path.parent / name
    return plain if plain.exists() or Path(name).parts[:1] == (folder,) else path.parent / folder / name


def read_questions(path: Path) -> list[str]:
    """Read a file of questions: a JSON list of texts or of {"question": …}, JSON lines of the latter, or one question per line.

    Raises:
        UserError: If the file is missing or malformed, or a question is empty.
    """
    if not path.is_file():
        raise UserError(f"no questions at {path}; --questions wants a JSON list or one question per line.")
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f'{path}: {reason(error)}; wanted a JSON list of texts or of {{"question": …}}.') from None
        questions = [_question(path, number, row) for number, row in enumerate(rows, 1)]
    elif text.lstrip().startswith("{"):
        questions = [_question(path, number, _parsed(path, number, row)) for number, row in rows_of(text)]
    else:
        if "\r" in text.replace("\r\n", "\n"):
            raise UserError(f"{path}: lines that end with a carriage return alone; wanted newlines. Save it with Unix line ends.")
        questions = [row.strip() for _, row in rows_of(text)]
    if not questions or not all(isinstance(q, str) and q.strip() for q in questions):
        raise UserError(f"{path} holds no question, or an empty one.")
    return list(dict.fromkeys(questions))


def _parsed(path: Path, number: int, row: str) -> Any:
    try:
        return json.loads(row)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}, row {number}: {reason(error)}; wanted {{"question": …}} a line.') from None


def _question(path: Path, number: int, row: Any) -> str:
    question = row.get("question") if isinstance(row, dict) else row
    if not isinstance(question, str):
        found = "an object without a question" if isinstance(row, dict) and question is None else kind_of(question)
        raise UserError(f'{path}, row {number}: {found}; wanted a text or {{"question": …}}.')
    return question


def _ask(samples: list[Sample], questions: list[str]) -> list[Sample]:
    """Every clip with every question. Facts of the clip are kept; an answer is kept with its own question."""
    clips: dict[tuple[object, ...], Sample] = {}
    answers: dict[tuple[object, ...], str | None] = {}
    for s in samples:
        clip = (s.events, s.video, s.event_start_ms, s.event_time_unit)
        clips.setdefault(clip, s)
        answers[clip, s.question] = s.answer
    names = {key: re.sub(r"-q\d+$", "", s.id) for key, s in clips.items()}
    if len(set(names.values())) < len(names):  # of different clips named a-q1 and a-q2
        names = {key: s.id for key, s in clips.items()}
    return [
        dataclasses.replace(s, id=f"{names[key]}-q{k}", question=question, answer=answers.get((key, question)))
        for key, s in clips.items()
        for k, question in enumerate(questions)
    ]
