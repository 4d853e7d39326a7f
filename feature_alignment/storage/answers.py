"""Token pairs, both models' free-running answers: `{meta, results: [{sample_id, query, egpt_tokens, egpt_text, vl_tokens, vl_text}]}`."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from feature_alignment.cli.advice import command_for
from feature_alignment.cli.console import UserError, finite
from feature_alignment.storage.files import atomic_write, read_json
from feature_alignment.storage.hidden_states import eos_ids_of
from feature_alignment.storage.identity import RECORDED_AND_CURRENT, RunIdentity

log = logging.getLogger(__name__)


def write_token_pairs(path: Path, meta: dict[str, Any], rows: Iterable[dict[str, Any]]) -> None:
    """Write {meta, results: [{sample_id, sequence, query, tokens and text of both models}]}, row by row in constant memory.

    Args:
        path: file to write
        meta: `meta` of the extraction
        rows: entries of samples.jsonl
    """
    keys = ("egpt_tokens", "egpt_text", "vl_tokens", "vl_text")
    plain = json.loads(json.dumps(finite(meta), allow_nan=False))
    begin = json.dumps({"meta": plain}, sort_keys=True)[:-1]
    digest = hashlib.sha256(begin.encode() + b', "results": [')  # equals `content_hash` of the whole file
    with atomic_write(path) as temporary, temporary.open("w") as stream:
        stream.write(begin + ',\n"results": [')
        for i, r in enumerate(rows):
            result = {"sample_id": r["id"], "sequence": r["sequence"], "query": r["question"], **{k: r[k] for k in keys}}
            result |= {"identity": r["identity"]} if "identity" in r else {}
            line = json.dumps(result, sort_keys=True)
            digest.update(b", " * bool(i) + line.encode())
            stream.write(",\n" * bool(i) + line)
        digest.update(b"]}")
        stream.write(f'],\n"content_hash": "{digest.hexdigest()[:16]}"}}\n')


def read_token_pairs(path: Path) -> list[dict[str, Any]]:
    """Rows with `egpt_tokens` and `vl_tokens`, from `{"results": [...]}`; of our own files also `sample_id` and `query`."""
    rows: list[dict[str, Any]] = _read(path, command_for("extract_hidden_states", split=path.stem))["results"]
    return rows


def eos_ids(path: Path) -> list[int]:
    """The token ids that end the target's texts in a token pairs file."""
    meta = _read(path, command_for("extract_hidden_states", split=path.stem)).get("meta")
    return eos_ids_of(meta if isinstance(meta, dict) else None)


def _read(path: Path, remake_command: str) -> dict[str, Any]:
    content: dict[str, Any] = read_json(path, remake_command)
    rows = content.get("results") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f'{path} holds no rows; expected {{"results": [{{"egpt_tokens": […], "vl_tokens": […], …}}]}}.')
    for i, row in enumerate(rows):
        for key in ("egpt_tokens", "vl_tokens"):
            tokens = row.get(key) if isinstance(row, dict) else None
            if not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < 2**31 for t in tokens):
                raise UserError(f"{path}, row {i}: {key} must be a list of token ids.")
        if "content_hash" in content and not (isinstance(row.get("query"), str) and isinstance(row.get("sample_id"), str)):
            raise UserError(f"{path}, row {i}: wanted sample_id and query.")
        for key in ("query", "sample_id"):
            if not isinstance(row.get(key), str | int | None):
                raise UserError(f"{path}, row {i}: {key} must be a text, a number or null.")
    return content


Answers = dict[str, "tuple[array[int], array[int]]"]  # sample id -> Video-LLaVA's tokens, EventGPT's tokens
# Settings of an extraction that do not change the models' answers
SETTINGS_WITHOUT_EFFECT_ON_TEXTS = {
    "split",
    "prefix",
    "max_positions",
    "store_dtype",
    "separate_layers",
    "event_states",
    "prompt_states",
    "own_drafts",
    "draft_layers",
    "shard",
}
SOURCES_COMPARED_BY_ROW = frozenset({"manifest", "questions", "answers"})  # sources that are compared by each row's question and clip


def known_answers(
    asked: Path | None, earlier: Path | None, identity: RunIdentity, rows: Sequence[dict[str, Any]], ignore_code: bool = False
) -> Answers:
    """Known answers, which need not be generated: from the file that the user named, else from an earlier run.

    Args:
        asked: setting `--answers`
        earlier: token pairs of an earlier run; None with --no_resume
        identity: identity of the extraction
        rows: id, question and identity of its samples
        ignore_code: accept answers of other code
    """
    if asked:
        return load_answers(asked, identity, rows, ignore_code)
    return earlier_answers(earlier, identity, rows) if earlier and earlier.is_file() else {}


def load_answers(path: Path, identity: RunIdentity, rows: Sequence[dict[str, Any]], ignore_code: bool = False) -> Answers:
    """Both models' own answers from the token pairs file that the user named.

    Args:
        path: the file; without a recorded identity only ids, questions and lengths are compared
        identity: identity of the extraction
        rows: id, question and identity of its samples
        ignore_code: accept answers of other code

    Raises:
        UserError: the answers are of another run, or a sample has no matching answer
    """
    leave_out = "Leave --answers out to generate them."
    content = _read(path, "leave --answers out, and they are generated")
    recorded = content.get("meta")
    if recorded and (changes := _for_texts(identity).changes(_texts_of(recorded), ignore_code, RECORDED_AND_CURRENT)):
        keep = " With --ignore_code they are read all the same." if all(c.startswith("code: ") for c in changes) else ""
        raise UserError(f"{path} holds answers of another run:\n  " + "\n  ".join(changes) + f"\n{leave_out}{keep}")
    found = _fitting(path, content["results"], rows, identity.settings, "row" if recorded else None)
    if len(found) < len(rows):
        without = next(row["id"] for row in rows if row["id"] not in found)
        raise UserError(
            f"{path} has answers of 1 to {identity.settings['max_new_tokens']} tokens to the same question about the same clip for "
            f"{len(found)} of {len(rows)} samples, none for {without!r}. {leave_out}"
        )
    log.info("reused  %s: %s, and every sample's question%s", path, *_compared(identity, bool(recorded)))
    return found


def earlier_answers(path: Path, identity: RunIdentity, rows: Sequence[dict[str, Any]]) -> Answers:
    """The answers of an earlier run for rows that it read in the same batches; others are generated.

    Args:
        path: token pairs of this split
        identity: identity of the extraction
        rows: id, question and identity of its samples
    """
    try:
        content = _read(path, "")
    except UserError as error:
        log.warning("%s  All answers are generated.", str(error).splitlines()[0])
        return {}
    if changes := _for_texts(identity).changes(_texts_of(content.get("meta"))):
        log.warning("%s is of another run, its answers are generated again (then → now): %s", path, "; ".join(changes))
        return {}
    found = _fitting(path, content["results"], rows, identity.settings, "batch")
    compared, more = _compared(identity, True)
    log.info("reused  %s: %d of %d answers; unchanged are %s, and their question%s, batch", path, len(found), len(rows), compared, more)
    return found


def refuse_foreign_ids(answers: Answers, vocab_size: int) -> None:
    """Raise UserError if an answer contains a token id outside the shared vocabulary of `vocab_size` tokens."""
    for sample_id, texts in answers.items():
        if max(max(tokens, default=0) for tokens in texts) >= vocab_size:
            raise UserError(f"the answers of sample {sample_id} hold ids beyond the {vocab_size} of this pair: texts of another one.")


def _compared(identity: RunIdentity, is_ours: bool) -> tuple[str, str]:
    return (_for_texts(identity).compared(), ", clip and start") if is_ours else ("a file without meta", "")


def _for_texts(identity: RunIdentity) -> RunIdentity:
    """The part of an extraction's identity that decides both models' answers."""
    settings = {key: value for key, value in identity.settings.items() if key not in SETTINGS_WITHOUT_EFFECT_ON_TEXTS}
    return replace(identity, settings=settings, not_compared=SOURCES_COMPARED_BY_ROW)


def _texts_of(recorded: Any) -> dict[str, Any]:
    """The part of a recorded identity that `_for_texts` keeps."""
    recorded = recorded if isinstance(recorded, dict) else {}
    settings = recorded.get("settings")
    kept = {k: v for k, v in settings.items() if k not in SETTINGS_WITHOUT_EFFECT_ON_TEXTS} if isinstance(settings, dict) else None
    return {**recorded, "settings": kept}


def _fitting(
    path: Path, results: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], settings: Mapping[str, Any], kind: str | None
) -> Answers:
    """Answers to the questions of `rows`.

    Args:
        path: the file, for messages
        results: its rows
        rows: id, question and identity of the samples
        settings: of the extraction: the most tokens an answer may have, and whether EventGPT's answers are needed
        kind: which of a row's two hashes must be equal; None compares ids and, where the file has them, questions
    """
    by_id, longest, least_draft = {row["id"]: row for row in rows}, settings["max_new_tokens"], int(settings.get("draft_answers", True))
    found: Answers = {}
    for result in results:
        row = by_id.get(str(result.get("sample_id")))
        if row is None:
            continue
        if kind is None:
            fits = result.get("query") in (None, row["question"])
        else:
            identity = result.get("identity")
            fits = isinstance(identity, dict) and identity.get(kind) == row["identity"][kind]
        texts = (array("i", result["vl_tokens"]), array("i", result["egpt_tokens"]))
        if fits and all(least <= len(text) <= longest for least, text in zip((1, least_draft), texts, strict=True)):
            found[row["id"]] = texts
    return found
