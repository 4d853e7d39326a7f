"""Verification of a run: every file against its recorded hash, every result against its sources, clips included.

    python -m feature_alignment.storage.verification outputs/demo

altered      a file, or the states of a sample, differs from its hash
missing      the file does not exist
stale        a source of the result has changed since, or is itself stale
unfinished   an interrupted run; the command that started it continues it
left over    a temporary file of a killed run; it may be deleted

Hashes detect accidents, not forgery: a person who changes a file can change its recorded hash as well.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    from feature_alignment.cli.console import run_module

    run_module("feature_alignment.storage.verification")

from feature_alignment.cli.console import UserError, print_json_line, print_table
from feature_alignment.cli.ranges import path_argument
from feature_alignment.cli.text_files import read_text, rows_of
from feature_alignment.storage.files import content_hash, file_hash, load_pt
from feature_alignment.storage.hidden_states import event_rows, rows_in_file
from feature_alignment.storage.identity import is_hub, source_hash
from feature_alignment.storage.state_files import frame_hash, row_hashes

WRONG = ("altered", "missing", "stale")
# JSON files that record hashes of themselves and of the files next to them
_RECORDS = ("hidden_states/*/meta.json", "*/meta.json", "token_pairs/*.json", *(f"{d}/*.json" for d in ("acceptance", "token_baseline")))
_RECORDS += ("sd/*.json", "benchmark/*.json")
_SHOWN = 40


class Finding(NamedTuple):
    """state: one of the words above; about: a file or folder, from the outputs directory on."""

    state: str
    about: str
    why: str


def verify(out: Path) -> tuple[list[Finding], Counter[str]]:
    """All findings in the directory of a run, and the numbers of files, rows of states and sources compared with their hashes."""
    if not out.is_dir():
        raise UserError(f"no outputs at {out}; wanted the directory of a run, e.g. outputs/demo.")
    run = _Run(out)
    records = {path for pattern in _RECORDS for path in out.glob(pattern)}
    for path in sorted(p for p in records if not p.name.startswith(".") and not p.parent.name.endswith(".unfinished")):
        run.check(path)
    run.follow()
    for path in sorted(out.rglob("*")):
        if path.is_dir() and path.name.endswith(".unfinished"):
            run.find("unfinished", path, "type the command that made it again")
        elif path.name.startswith(".") and ".tmp" in path.name:
            run.find("left over", path, "of a run that was killed")
    if not records and not run.findings:
        raise UserError(f"{out} holds no results; wanted the directory of a run, e.g. outputs/demo.")
    return list(run.findings.values()), run.compared


class _Run:
    """The findings about one outputs directory."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.findings: dict[tuple[str, str], Finding] = {}
        self.compared: Counter[str] = Counter(files=0, rows=0, sources=0)
        self.made_from: dict[Path, list[tuple[str, Path]]] = {}  # record -> its sources that lie in this directory

    def find(self, state: str, path: Path, why: str) -> None:
        about = os.path.relpath(path, self.out)
        self.findings.setdefault((state, about), Finding(state, about, why))

    def check(self, path: Path) -> None:
        """Check one record: itself, the files next to it, its sources, and for hidden states every row and clip."""
        self.compared["files"] += 1
        try:
            content = json.loads(read_text(path))
        except (UserError, ValueError, RecursionError):
            content = None
        if not isinstance(content, dict) or content.get("content_hash") != content_hash(content):
            self.find("altered", path, "no JSON, or not what its own hash is of (an older version wrote none)")
            return
        if path.name.endswith(".meta.json") and not content.get("files"):  # of a file of answers
            self.find("unfinished", path, "type the command that made it again")
        for name, wanted in content.get("files", {}).items():
            self.compare(path.parent / name, wanted, f"not the file that {path.name} describes")
        meta = content.get("meta", content)
        for name, wanted in meta.get("made_from", {}).items():
            self.compare_source(path, name, meta, wanted)
        if "frames" in content:
            self.check_states(path.parent, content)

    def compare(self, path: Path, wanted: str, why: str) -> None:
        self.compared["files"] += 1
        if not path.is_file():
            self.find("missing", path, why)
        elif file_hash(path) != wanted:
            self.find("altered", path, why)

    def compare_source(self, record: Path, name: str, meta: dict[str, Any], wanted: str) -> None:
        self.compared["sources"] += 1
        places = meta.get("inputs", {}).get(name)
        paths = [self.here(Path(p), meta) for p in (places if isinstance(places, list) else [places])]
        self.made_from.setdefault(record, []).extend((name, path) for path in paths)
        if gone := [path for path in paths if not (is_hub(path) or path.exists())]:
            self.find("stale", record, f"made from {name}, {gone[0]}, which is gone")
        elif source_hash(paths if isinstance(places, list) else paths[0]) != wanted:
            self.find("stale", record, f"made from another {name} than {', '.join(map(str, paths[:2]))}{' …' * (len(paths) > 2)} is now")

    def here(self, path: Path, meta: dict[str, Any]) -> Path:
        """Current path of a source; sources in the outputs directory move with it."""
        made_in = Path(meta.get("config", {}).get("output_dir") or self.out)
        return self.out / path.relative_to(made_in) if path.is_relative_to(made_in) else path

    def check_states(self, folder: Path, meta: dict[str, Any]) -> None:
        try:
            rows = [json.loads(row) for _, row in rows_of(read_text(folder / "samples.jsonl"))]
        except (OSError, UserError, ValueError):
            return  # it was named already
        clip_index = list(event_rows(rows))
        for name, frame in meta["frames"].items():
            path = folder / name
            if not path.is_file():
                self.find("missing", path, "not there, and meta.json describes it")
                continue
            stored = [rows[row] for row in rows_in_file(name, clip_index)]
            self.compared["rows"] += len(stored)
            try:
                states = load_pt(path, "")
                wrong = [about["id"] for about, h in _against_hashes(path, stored, states[0].nbytes) if about["sha256"][name] != h]
                if wrong:
                    self.find("altered", path, f"the states of {len(wrong)} of {len(stored)} samples, e.g. {', '.join(wrong[:3])}")
                if frame_hash(path, states.nbytes) != frame:
                    self.find("altered", path, "what its shape and type are read from")
            except (UserError, KeyError, ValueError, AttributeError):
                self.find("altered", path, "it cannot be read as the file that was written")
        manifest = meta.get("inputs", {}).get("manifest")
        for clip, wanted in {clip: h for row in rows for clip, h in row.get("clip", {}).items()}.items() if manifest else ():
            path = Path(manifest).parent / clip
            self.compared["sources"] += 1
            if not path.exists():
                self.find("stale", folder, f"extracted from {path}, which is gone")
            elif file_hash(path) != wanted:
                self.find("stale", folder, f"extracted from another {path} than it is now")

    def follow(self) -> None:
        """Mark everything stale that was made, directly or indirectly, from something wrong."""
        wrong = {self.unit(self.out / f.about) for f in self.findings.values() if f.state in WRONG}
        found = True
        while found:
            found = False
            for record, sources in self.made_from.items():
                blame = [name for name, path in sources if self.unit(path) in wrong]
                if blame and self.unit(record) not in wrong:
                    self.find("stale", record, f"made from {blame[0]}, which is not what it was")
                    wrong.add(self.unit(record))
                    found = True

    def unit(self, path: Path) -> tuple[str, ...]:
        """The output of one command: a folder of results, a split of hidden states, or one file of token_pairs or sd."""
        parts = Path(os.path.relpath(path, self.out)).parts
        return parts if parts[0] in ("token_pairs", "sd", "..") else parts[:2] if parts[0] == "hidden_states" else parts[:1]


def _against_hashes(path: Path, rows: Sequence[dict[str, Any]], row_bytes: int) -> Iterator[tuple[dict[str, Any], str]]:
    return zip(rows, row_hashes(path, len(rows), row_bytes), strict=True)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Print all findings about a run; UserError if anything is altered, missing or stale."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m feature_alignment.storage.verification", description=__doc__, formatter_class=kind)
    parser.add_argument("out", type=path_argument, help="the folder of a run, e.g. outputs/demo")
    out = parser.parse_args(argv).out
    findings, compared = verify(out)
    if findings:
        print_table(f"{out}", ("what", "state", "why"), [(f.about, f.state, f.why) for f in findings[:_SHOWN]])
    if len(findings) > _SHOWN:
        print(f"  and {len(findings) - _SHOWN} more")
    counts = Counter(f.state for f in findings)
    summary = {"compared": dict(compared), **{state: counts[state] for state in (*WRONG, "unfinished", "left over")}}
    print_table(f"{out}: compared with their hashes", tuple(compared), [tuple(compared.values())])
    print_json_line({"verified": str(out), **summary})
    if wrong := sum(counts[state] for state in WRONG):
        raise UserError(
            f"{wrong} things in {out} are altered, missing or stale. Make them again in the order of run_all.sh, --no_resume first."
        )
    return {**summary, "findings": findings}
