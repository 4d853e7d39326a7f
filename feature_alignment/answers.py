"""What both models answered on their own: `{meta, results: [{sample_id, query, egpt_tokens, egpt_text, vl_tokens, vl_text}]}`."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from feature_alignment.artifacts import EXTRACT, eos_ids_of, read_json, replacing
from feature_alignment.console import UserError, finite


def write_token_pairs(path: Path, meta: dict[str, Any], rows: Iterable[dict[str, Any]]) -> None:
    """{meta, results: [{sample_id, sequence, query, and of both models the tokens and the text of its own answer}]}, row by row."""
    keys = ("egpt_tokens", "egpt_text", "vl_tokens", "vl_text")
    plain = json.loads(json.dumps(finite(meta), allow_nan=False))
    begin = json.dumps({"meta": plain}, sort_keys=True)[:-1]
    digest = hashlib.sha256(begin.encode() + b', "results": [')  # what `content_hash` takes of the whole, piece by piece
    with replacing(path) as temporary, temporary.open("w") as stream:
        stream.write(begin + ',\n"results": [')
        for i, r in enumerate(rows):
            result = {"sample_id": r["id"], "sequence": r["sequence"], "query": r["question"], **{k: r[k] for k in keys}}
            line = json.dumps(result, sort_keys=True)
            digest.update(b", " * bool(i) + line.encode())
            stream.write(",\n" * bool(i) + line)
        digest.update(b"]}")
        stream.write(f'],\n"content_hash": "{digest.hexdigest()[:16]}"}}\n')


def read_token_pairs(path: Path) -> list[dict[str, Any]]:
    """Rows with `egpt_tokens` and `vl_tokens`, from `{"results": [...]}`; of our own files also `sample_id` and `query`."""
    return _read(path, EXTRACT.format(split="test"))["results"]


def eos_ids(path: Path) -> list[int]:
    """The token ids that end the target's texts in a token pairs file."""
    meta = _read(path, EXTRACT.format(split="test")).get("meta")
    return eos_ids_of(meta if isinstance(meta, dict) else None)


def _read(path: Path, make_it: str) -> dict[str, Any]:
    content = read_json(path, make_it)
    rows = content.get("results") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f'{path} holds no rows; wanted {{"results": [{{"egpt_tokens": […], "vl_tokens": […], …}}]}}.')
    for i, row in enumerate(rows):
        for key in ("egpt_tokens", "vl_tokens"):
            tokens = row.get(key) if isinstance(row, dict) else None
            if not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < 2**31 for t in tokens):
                raise UserError(f"{path}, row {i}: {key} must be a list of token ids.")
        if "content_hash" in content and not (isinstance(row.get("query"), str) and isinstance(row.get("sample_id"), str)):
            raise UserError(f"{path}, row {i}: wanted sample_id and query.")
    return content


Answers = dict[str, tuple[array, array]]  # sample id -> Video-LLaVA's tokens, EventGPT's tokens


def load_answers(path: Path, settings: dict[str, Any], sample_ids: Sequence[str]) -> Answers:
    """Both models' own answers from a token pairs file.

    settings: of the run that wants them; a file that says it was made by other models, clips or limits is refused
    raises:   UserError if they do not fit, or a sample has none
    """
    content = _read(path, "leave --answers out, and they are generated")
    made = (content.get("meta") or {}).get("settings") or {}
    wrong = [k for k in ("target", "draft", "manifest", "dtype", "max_new_tokens") if k in made and made[k] != settings[k]]
    if wrong:
        lines = "".join(f"\n  {k}: {made[k]} there, {settings[k]} now" for k in wrong)
        raise UserError(f"{path} holds answers of another run:{lines}\nLeave --answers out to generate them.")
    try:
        found = {str(r["sample_id"]): (array("i", r["vl_tokens"]), array("i", r["egpt_tokens"])) for r in content["results"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: {error!r}; wanted results with sample_id, vl_tokens, egpt_tokens.") from None
    answers = {i: found[i] for i in sample_ids if i in found and all(1 <= len(a) <= settings["max_new_tokens"] for a in found[i])}
    if len(answers) < len(sample_ids):
        without = next(i for i in sample_ids if i not in answers)
        raise UserError(
            f"{path} has answers of 1 to {settings['max_new_tokens']} tokens for {len(answers)} of {len(sample_ids)} samples, "
            f"none for {without!r}. Leave --answers out to generate them."
        )
    return answers
