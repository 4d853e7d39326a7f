"""Provenance of results, and the decision whether a cached result is reused.

`meta` of every result records its identity (`identity.py`), the paths of its sources, and the versions that made it. To compare a whole
run with its recorded hashes:

    python -m feature_alignment.storage.verification outputs/demo
"""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from feature_alignment.cli.config import Common, as_plain
from feature_alignment.cli.console import UserError, repaired_files
from feature_alignment.storage.files import (
    altered_files,
    read_hashed_json,
)
from feature_alignment.storage.identity import RunIdentity, Sources, identity_of, machine

log = logging.getLogger(__name__)


def provenance(script: str, cfg: Common, made_from: Sources, identity: RunIdentity | None = None, **facts: Any) -> dict[str, Any]:
    """The `meta` of a result.

    Args:
        script: name of the script
        cfg: its settings
        made_from: name -> files that it read; their paths are recorded next to the hashes of the identity
        identity: identity of the run, if it has been computed already
        **facts: further entries
    """
    return {
        "made_by": script,
        "argv": sys.argv[1:],
        "config": as_plain(cfg),
        **(identity or identity_of(script, cfg, made_from)).as_dict(),
        "inputs": {name: str(p) if isinstance(p, Path) else [str(q) for q in p] for name, p in made_from.items()},
        "repaired": repaired_files(),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
        "machine": machine(cfg.threads),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **facts,
    }


def cached_result(path: Path, cfg: Common, identity: RunIdentity, ignore_code: bool = False) -> dict[str, Any] | None:
    """The cached JSON at `path` if it is reusable, else None; a log line names what was compared or what differs.

    Args:
        path: a JSON file with `meta`, or a `meta.json`
        cfg: settings; without `--resume` nothing is reused
        identity: identity of the current run
        ignore_code: reuse a result of other code; never for timings

    Raises:
        UserError: `path` is a folder
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, and a file is to be written there; move it away.")
    if not (cfg.resume and path.is_file()):
        return None
    try:
        content = read_hashed_json(path, f"rm {path}")
    except UserError as error:
        log.warning("%s  It is made again.", str(error).splitlines()[0])
        return None
    meta = content.get("meta", content)
    if changes := identity.changes(meta, ignore_code):
        log.warning("%s is made again (then → now): %s. Compared: %s.", path, "; ".join(changes), identity.compared())
        return None
    if changed := altered_files(path, content):
        log.warning("%s: %s was altered or is gone; all of it is made again.", path.parent, ", ".join(changed))
        return None
    log_reuse(path, identity, meta, f"the recorded hashes of {len(content.get('files', {})) + 1} files")
    return content


def log_reuse(path: Path, identity: RunIdentity, meta: dict[str, Any], *more: str) -> None:
    """Log that a result is reused and what was compared.

    Args:
        path: the result
        identity: identity of the current run
        meta: `meta` of the result
        *more: what else was compared
    """
    modules = identity.changed_code(meta)
    log.info("reused  %s: unchanged are %s", path, ", ".join((identity.compared(bool(modules)), *more)))
    if modules:
        log.warning("%s was made by other code (%s changed) and is kept because of --ignore_code.", path, ", ".join(modules))


def _git_commit() -> str | None:
    try:
        here = Path(__file__).resolve().parent
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
