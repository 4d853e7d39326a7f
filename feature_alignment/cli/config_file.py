"""The YAML file of settings: `common:` and one section per script, e.g. `train_hidden_adapter`, `train_hidden_adapter.chained`."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Any

from feature_alignment.cli.config import SCRIPTS, Common
from feature_alignment.cli.console import UserError
from feature_alignment.cli.ranges import validate_text
from feature_alignment.cli.text_files import read_text

_LONGEST = 100_000  # characters


def file_settings(cls: type, path: Path, section: str, variant: str | None, chosen: str | None) -> dict[str, Any]:
    """The settings of a YAML file that apply to one script; the keys of all sections are checked.

    Scalars stay strings, so `1e-3` means the same as on the command line.

    Args:
        cls: dataclass of settings; what the file says about others is left out
        path: YAML file
        section: name of the script
        variant: setting whose value names a section that overrides the script's own
        chosen: its value on the command line, which wins over the file's

    Raises:
        UserError: the file cannot be read, or has an unknown or empty section or key
    """
    validate_text("config", path)
    if not path.is_file():
        found = ", ".join(sorted(str(p) for p in Path("configs").glob("*.yaml"))) or "none here"
        raise UserError(f"no config file at {path} (configs/*.yaml: {found}).")
    import yaml

    try:
        text = read_text(path)
        _refuse_endless(path, text)
        _refuse_duplicates(path, yaml.compose(text, Loader=yaml.BaseLoader))
        content = yaml.load(text, Loader=yaml.BaseLoader) or {}
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    names = {f.name for f in dataclasses.fields(cls)}
    known = {"common": Common} | {script: _settings_of(script) for script in SCRIPTS}
    known |= {f"train_hidden_adapter.{kind}": known["train_hidden_adapter"] for kind in ("plain", "chained", "attending")}
    if not isinstance(content, dict) or not set(content) <= set(known):
        extra = sorted(set(content) - set(known)) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: unknown section {extra}; wanted `common` and script names: {', '.join(SCRIPTS)}.")
    for part, settings in content.items():
        allowed = {f.name for f in dataclasses.fields(known[part])} | (names if part.startswith(section) else set())
        if not isinstance(settings or {}, dict):
            raise UserError(f"{path}: section `{part}` must hold settings, got {settings!r}.")
        for key, value in (settings or {}).items():
            if key not in allowed:
                raise UserError(f"{path}: unknown key `{part}.{key}`; known here: {', '.join(sorted(allowed))}.")
            if value is None or value == "":
                raise UserError(f"{path}: `{part}.{key}` is empty; wanted a value, or `null` for none.")
    own = content.get(section) or {}
    chosen = chosen or own.get(variant)
    merged = {**(content.get("common") or {}), **own, **(content.get(f"{section}.{chosen}") or {})}
    return {name: value for name, value in merged.items() if name in names}


def _settings_of(script: str) -> type[Common]:
    """The dataclass of a script's settings."""
    module = import_module(f"feature_alignment.{script}")
    own = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Common) and c.__module__ == module.__name__]
    return own[0]


def _refuse_endless(path: Path, text: str) -> None:
    """Raise UserError for YAML that takes very long to read: large, deeply nested, or with aliases, which can multiply its size."""
    import yaml

    depth = 0
    for event in yaml.parse(text[: _LONGEST + 1], Loader=yaml.BaseLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > 10 or len(text) > _LONGEST:
            raise UserError(f"{path}: wanted at most {_LONGEST:,} characters, 10 levels of nesting and no aliases (*name).")


def _refuse_duplicates(path: Path, node: Any, prefix: str = "") -> None:
    """Raise UserError for a key given twice in one mapping: YAML readers silently keep the last value."""
    import yaml

    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(path, item, prefix)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines:
            raise UserError(f"{path}: `{prefix}{name}` is given in line {lines[name]} and again in line {line}. Remove one of them.")
        lines[name] = line
        _refuse_duplicates(path, value, f"{prefix}{name}.")
