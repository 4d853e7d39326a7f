"""The identity of a run: everything that decides whether a cached result is reused.

    settings    every setting that can change a result; paths are left out, because files are compared by content
    made_from   content hash of every source; of a `hub:` checkpoint its name and the revision in the local cache
    code        hash of every module of this package that the stage imports, by its parsed source: comments, docstrings and line
                breaks do not count. Modules that only print, lock, name or record (`RECORDS_ONLY`) are left out
    machine     only of results that hold timings: processor, cores, threads, GPU, library versions

What happens where one of them differs:

    measurements, benchmark      made again
    adapters                     trained again; the old one stays until the new one is complete
    hidden states and answers    settings or code: refused, because hours of work would be replaced; --no_resume extracts again.
                                 Rows of the manifest: unchanged rows are kept, see `earlier_rows.py`

`--ignore_code` keeps hidden states, answers and adapters of other code. Timings are never reused across code or machines. One log
line says what was compared, or what differs.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

import torch

import feature_alignment
from feature_alignment.cli.config import Common, as_plain
from feature_alignment.storage.files import config_hash, file_hash

SCHEMA = 5  # version of the recorded identity; files of older versions are not reused
RECORDED_AND_CURRENT = "{}: {} recorded, {} now"
PACKAGE = "feature_alignment"
RECORDS_ONLY = {
    *("cli.advice", "cli.config", "cli.config_file", "cli.console", "cli.ranges"),
    *("storage.artifacts", "storage.identity", "storage.processes", "storage.verification"),
}
# Settings that name paths, whose contents are hashed instead, and settings that change how a script runs but not its result
PATH_SETTINGS = {
    *("target_id", "draft_id", "manifests", "questions", "lexicon", "answers", "token_pairs", "exit_adapters"),
    *("output_dir", "allow_outside"),
}
EXECUTION_SETTINGS = {"resume", "quiet", "ignore_code", "tensorboard"}

Sources = Mapping[str, Path | Sequence[Path]]  # name -> a file, a checkpoint directory, `hub:name`, or several files


@dataclass(frozen=True)
class RunIdentity:
    """What a result was, or would be, made from.

    Args:
        settings: name -> JSON-plain value
        made_from: name of a source -> its content hash
        code: module -> hash of its parsed source
        machine: of results that hold timings, else None
        not_compared: sources that are recorded only; the rows read from them are compared one by one in `earlier_rows.py`
    """

    settings: dict[str, Any]
    made_from: dict[str, str]
    code: dict[str, str]
    machine: dict[str, Any] | None = None
    not_compared: frozenset[str] = frozenset()

    def as_dict(self) -> dict[str, Any]:
        """The identity as it is recorded in a result's `meta`."""
        return {"schema": SCHEMA, "settings": self.settings, "made_from": self.made_from, "code": self.code}

    @property
    def hash(self) -> str:
        """One short hash of everything that is compared but the machine."""
        made_from = {name: value for name, value in self.made_from.items() if name not in self.not_compared}
        return config_hash({**self.as_dict(), "made_from": made_from})

    def changes(self, recorded: Mapping[str, Any], ignore_code: bool = False, line: str = "{}: {} → {}") -> list[str]:
        """One line for each setting, source or machine property that differs from what a result recorded, and one for the code.

        Args:
            recorded: the `meta` of the result
            ignore_code: do not compare the code
            line: how a difference is shown: what, its recorded value, its value now
        """
        schema = recorded.get("schema") if isinstance(recorded, Mapping) else None
        if schema != SCHEMA:
            return [line.format("schema of this package's files", schema, SCHEMA)]
        lines = [
            line.format(key, old, new)
            for part in ("settings", "made_from", *(("machine",) if self.machine is not None else ()))
            for key, old, new in _differing(recorded.get(part), getattr(self, part))
            if not (part == "made_from" and key in self.not_compared)
        ]
        if not ignore_code and (modules := self.changed_code(recorded)):
            lines.append(f"code: {', '.join(modules)} changed")
        return lines

    def changed_code(self, recorded: Mapping[str, Any]) -> list[str]:
        """The modules whose source has changed since a result was made."""
        return [module for module, _, _ in _differing(recorded.get("code"), self.code)]

    def compared(self, ignore_code: bool = False) -> str:
        """What `changes` compares, for a log line."""
        parts = [f"{len(self.settings)} settings"]
        if names := [name for name in self.made_from if name not in self.not_compared]:
            parts.append(f"the contents of {', '.join(names)}")
        parts += [] if ignore_code else [f"the code of {len(self.code)} modules"]
        return ", ".join(parts) + (", the machine" if self.machine is not None else "")


def _differing(old: Any, new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    old = old if isinstance(old, Mapping) else {}
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        is_in_both = key in old and key in new  # otherwise an earlier version did not have this setting, which was off
        if before != now and (is_in_both or before or now):
            yield key, before, now


def identity_of(stage: str, cfg: Common, made_from: Sources, *, timed: bool = False, without: Sequence[str] = ()) -> RunIdentity:
    """The identity of the current run of a script.

    Args:
        stage: name of the script
        cfg: its settings
        made_from: its sources; missing files are left out
        timed: the result holds timings, so the machine is part of the identity
        without: settings that cannot change this stage's result
    """
    left_out = {*PATH_SETTINGS, *EXECUTION_SETTINGS, *without}
    settings = {k: v for k, v in as_plain(cfg).items() if k not in left_out}
    hashes = {name: source_hash(source) for name, source in made_from.items() if _exists(source)}
    return RunIdentity(settings, hashes, code_of(stage), machine(cfg.threads) if timed else None)


# ------------------------------------------------------------------------------------------------------------------- sources


def source_hash(source: Path | Sequence[Path]) -> str:
    """Hash of a file, a checkpoint directory, or several files in order; `hub_revision` of a `hub:` checkpoint."""
    if not isinstance(source, Path):
        return config_hash({str(i): file_hash(path) for i, path in enumerate(source)})
    return hub_revision(source) if is_hub(source) else file_hash(source)


def is_hub(path: Path) -> bool:
    """Whether a checkpoint is named `hub:organisation/name`."""
    return str(path).startswith("hub:")


def hub_revision(path: Path) -> str:
    """`organisation/name@revision` of a `hub:` checkpoint, from the local Hugging Face cache; no network is used."""
    from huggingface_hub import try_to_load_from_cache

    name = str(path).removeprefix("hub:")
    cached = try_to_load_from_cache(name, "config.json")
    return f"{name}@{Path(cached).parent.name}" if isinstance(cached, str) else f"{name} (not in the cache)"


def _exists(source: Path | Sequence[Path]) -> bool:
    return not isinstance(source, Path) or is_hub(source) or source.exists()


# ---------------------------------------------------------------------------------------------------------------------- code


@functools.cache
def code_of(stage: str) -> dict[str, str]:
    """Module -> hash of its parsed source, for a script and all modules of this package that it imports, at once or inside functions.

    Args:
        stage: module below the package, e.g. `benchmark_feature_sd`; one that does not exist has no code
    """
    found: dict[str, str] = {}
    seen: set[str] = set()
    waiting = [stage]
    while waiting:
        module = waiting.pop()
        path = _file_of(module)
        if module in seen or path is None:
            continue
        seen.add(module)
        tree = ast.parse(path.read_bytes())
        if module not in RECORDS_ONLY:
            found[module] = hashlib.sha256(repr(_plain(tree)).encode()).hexdigest()[:12]
        waiting += _imported(tree, module, is_package=path.name == "__init__.py")
    return dict(sorted(found.items()))


def _file_of(module: str) -> Path | None:
    path = Path(feature_alignment.__path__[0], *module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def _imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Modules below the package that a module imports when it runs, and the packages they lie in."""
    parent = f"{PACKAGE}.{module}" if is_package else f"{PACKAGE}.{module}".rpartition(".")[0]
    for node in _running(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), parent) if node.level else node.module or ""
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] == PACKAGE:
                yield from (".".join(parts[1 : end + 1]) for end in range(1, len(parts)))


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below, without what only a type checker reads."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        for other in node.orelse:
            yield from _running(other)
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _running(child)


def _plain(node: Any) -> Any:
    """A syntax tree as tuples, without docstrings, line numbers and fields that are empty (Python versions differ in those)."""
    if isinstance(node, list):
        return tuple(_plain(child) for child in node)
    if not isinstance(node, ast.AST):
        return node
    fields = {name: value for name, value in ast.iter_fields(node) if value is not None and value != []}
    if isinstance(node, ast.Constant):
        fields = {"value": node.value}
    elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node, clean=False):
        fields["body"] = node.body[1:]
    return type(node).__name__, *((name, _plain(value)) for name, value in fields.items())


# ------------------------------------------------------------------------------------------------------------------- machine


def machine(threads: int = 0) -> dict[str, Any]:
    """The properties of the machine that timings depend on: processor, cores, threads, GPU, library versions.

    Args:
        threads: setting `--threads`; 0 is torch's default
    """
    return {
        "cpu": platform.machine(),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers")},
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
