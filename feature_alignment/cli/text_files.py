"""Text that people write: UTF-8 with or without a byte order mark, rows that end at a newline, faults named in words."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from feature_alignment.cli.console import UserError

_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object", type(None): "null"}


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark, with its line ends as they are.

    Raises:
        UserError: For a file in another encoding.
    """
    content = path.read_bytes()
    for mark, name in _OTHER_ENCODINGS.items():
        if content.startswith(mark):
            raise UserError(f"{path} is {name} text; wanted UTF-8. Save it again as UTF-8.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: {error}. Wanted UTF-8.") from None


def rows_of(text: str) -> Iterator[tuple[int, str]]:
    """The rows of a text that are not blank, each with its number from 1.

    Rows end at a newline (or carriage return and newline) only: `str.splitlines` also splits at U+2028, U+0085 and others, which may
    stand inside a row. A byte order mark at the start of a row is left by files that were joined.
    """
    for number, line in enumerate(text.split("\n"), 1):
        row = line.removeprefix("\ufeff").strip(" \t\r")
        if row:
            yield number, row


def as_object(value: Any) -> dict[str, Any]:
    """A JSON object, or a ValueError that says what else was found."""
    if not isinstance(value, dict):
        raise ValueError(f"wanted an object, got {kind_of(value)}")
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    return _KINDS.get(type(value), type(value).__name__)


def reason(error: Exception) -> str:
    """What went wrong while reading JSON, in words: a bare KeyError shows a key and not what is wrong with it."""
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]!r}"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error}"
    return str(error) or type(error).__name__
