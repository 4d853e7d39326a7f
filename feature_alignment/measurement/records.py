"""Results as frozen dataclasses: a field's name in Python is its key in the JSON file."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from feature_alignment.cli.console import UserError
from feature_alignment.storage.files import read_hashed_json

Meta = dict[str, Any]  # provenance of a result file, as `storage.artifacts.provenance` returns it
OMIT_IF_NONE = {"omit_if_none": True}  # metadata of a field that has no key in JSON while it is None


@dataclass(frozen=True)
class Record:
    """Base of a frozen dataclass that is written as one JSON object, its fields in order.

    JSON has no nan or infinity: both are written as null, and null in a field of type `float` is read as nan. A field with the metadata
    `OMIT_IF_NONE` has no key while it is None.
    """

    def to_json(self) -> dict[str, Any]:
        """The record as JSON-plain values."""
        values = {field: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {f.name: _encode(v) for f, v in values.items() if v is not None or "omit_if_none" not in f.metadata}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The record that `to_json` wrote; unknown keys (hashes of the file, keys of other versions) are ignored.

        Raises:
            ValueError: a key without a default is missing, or a value has another layout
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"{cls.__name__} is an object in JSON, got {str(content)[:60]}")
        types_of: dict[str, Any] = _types_of(cls)  # type: ignore[arg-type]
        required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
        if missing := [name for name in required if name not in content]:
            raise ValueError(f"{cls.__name__} without {', '.join(missing)}")
        return cls(**{name: _decode(kind, content[name]) for name, kind in types_of.items() if name in content})


RecordType = TypeVar("RecordType", bound=Record)


def read_record(path: Path, kind: type[RecordType], command: str) -> RecordType:
    """Read a result file whose recorded hash is intact.

    Args:
        path: JSON file of one of the scripts
        kind: class of the result
        command: shell command that makes the file

    Raises:
        UserError: the file is missing, was altered, or is not such a result
    """
    content = read_hashed_json(path, command)
    try:
        return kind.from_json(content)
    except ValueError as error:
        raise UserError(f"{path} is not a result that this version can read ({error}). Make it again:\n  {command}") from None


@cache
def _types_of(cls: Hashable) -> dict[str, Any]:
    assert isinstance(cls, type) and issubclass(cls, Record)
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _encode(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: _encode(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _decode(kind: Any, value: Any) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        others = [a for a in args if a is not types.NoneType]
        return _decode(others[0], value) if value is not None and len(others) == 1 else value
    if isinstance(kind, type) and issubclass(kind, Record):
        return kind.from_json(value)
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise ValueError(f"expected a list, got {str(value)[:60]}")
        return origin(_decode(args[0], v) for v in value)  # tuples here have items of one type
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"expected an object, got {str(value)[:60]}")
        return {key: _decode(args[1], v) for key, v in value.items()}
    return math.nan if kind is float and value is None else value
