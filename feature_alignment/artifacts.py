"""What a file holds and what made it.

Tensors are `.pt` files that open with `torch.load(path, mmap=True, weights_only=True)`; beside each file or directory lies a
`meta.json`. Everything is written under a temporary name and renamed, so a final name always means a complete file.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from feature_alignment.config import Common, as_plain
from feature_alignment.console import UserError, finite

SCHEMA = 1
EXTRACT = "python feature_alignment/extract_hidden_states.py --config configs/demo.yaml --split {split}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it on success and removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, content: Any) -> None:
    """JSON with `inf` and `nan` as null, so that every reader accepts it."""
    write_text(path, json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


def read_json(path: Path, make_it: str) -> Any:
    """A JSON file, or a UserError that names the command that makes it."""
    if not path.is_file():
        raise UserError(f"{path} is not there. Make it first:\n  {make_it}")
    try:
        return json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}). Make it again:\n  {make_it}") from None


def load_pt(path: Path, make_it: str) -> Any:
    """A `.pt` file, memory-mapped, plain tensors and containers only; UserError if missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} is not there. Make it first:\n  {make_it}")
    try:
        return torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, OSError, … for damaged files
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(f"{path} could not be read ({reason}). Make it again:\n  {make_it}") from None


def save_pt(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        torch.save(content, temporary)


def file_hash(path: Path) -> str:
    """SHA-256 of a file; of a directory, of its files' names and hashes."""
    digest = hashlib.sha256()
    if path.is_dir():
        for child in sorted(p for p in path.iterdir() if p.is_file() and p.name != "README.md"):
            digest.update(f"{child.name}:{file_hash(child)}\n".encode())
    else:
        with path.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def config_hash(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def provenance(script: str, cfg: Common, made_from: dict[str, Path], **facts: Any) -> dict[str, Any]:
    """The `meta` of everything a script writes. `made_from`: name -> file or checkpoint directory, stored as hashes."""
    return {
        "schema": SCHEMA,
        "made_by": script,
        "argv": sys.argv[1:],
        "config": as_plain(cfg),
        **_identity(cfg, made_from),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **facts,
    }


def _identity(cfg: Common, made_from: dict[str, Path]) -> dict[str, Any]:
    settings = {k: v for k, v in as_plain(cfg).items() if k != "resume"}
    hashes = {name: file_hash(path) for name, path in made_from.items() if path.exists()}
    return {"config_hash": config_hash(settings), "made_from": hashes}


def reusable(path: Path, cfg: Common, made_from: dict[str, Path]) -> dict[str, Any] | None:
    """The JSON at `path` if `--resume` is on and it was made with these settings from these very files, else None."""
    if not (cfg.resume and path.is_file()):
        return None
    content = read_json(path, f"rm {path}")
    meta = content.get("meta", content)
    same = all(meta.get(key) == value for key, value in _identity(cfg, made_from).items())
    return content if same else None


def _git_commit() -> str | None:
    try:
        here = Path(__file__).resolve().parent
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# ------------------------------------------------------------------------------------------------------------- hidden states


@dataclass(frozen=True)
class HiddenStates:
    """One split of paired hidden states, memory-mapped.

    draft:     [n, s, d_draft]   EventGPT's states (its tapped layers side by side), zero where padded
    target:    [n, s, d_target]  Video-LLaVA's, post-norm
    token_ids: [n, s] int64      the tokens both models read; state t *emits* token t
    mask:      [n, s] bool       real positions, EOS included
    lengths:   [n] int64
    rows:      one dict per row: id, sequence, question, both texts
    """

    draft: Tensor
    target: Tensor
    token_ids: Tensor
    mask: Tensor
    lengths: Tensor
    rows: list[dict[str, Any]]
    meta: dict[str, Any]

    def positions(self) -> tuple[Tensor, Tensor]:
        """All real positions of both models, flat: [p, d_draft], [p, d_target], float32."""
        return self.draft[self.mask].float(), self.target[self.mask].float()

    @property
    def ended(self) -> Tensor:
        """[n] bool: texts that end with EOS, not at the length limit."""
        return self.token_ids[torch.arange(len(self.lengths)), self.lengths - 1] == 2

    @property
    def clips(self) -> list[str]:
        """The cluster each row belongs to: intervals resample these."""
        return [row["sequence"] for row in self.rows]


def load_hidden_states(directory: Path) -> HiddenStates:
    """Read what `HiddenStatesWriter` wrote; refuses an incomplete directory or files that do not fit each other."""
    command = EXTRACT.format(split=directory.name)
    meta = read_json(directory / "meta.json", command)
    draft, target = (load_pt(directory / f"{who}_hidden_states.pt", command) for who in ("egpt", "vl"))
    positions = load_pt(directory / "positions.pt", command)
    try:
        rows = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / 'samples.jsonl'}: {error}. Make it again:\n  {command}") from None
    shapes = {"egpt": tuple(draft.shape), "vl": tuple(target.shape), "token_ids": tuple(positions["token_ids"].shape), "rows": len(rows)}
    if draft.ndim != 3 or draft.shape[:2] != target.shape[:2] or draft.shape[:2] != positions["token_ids"].shape or len(rows) != len(draft):
        raise UserError(f"the files in {directory} do not fit each other: {shapes}. Make them again:\n  {command}")
    for who, tensor, width in (("egpt", draft, "hidden_size_draft"), ("vl", target, "hidden_size_target")):
        if tensor.shape[-1] != meta[width]:
            raise UserError(
                f"{directory}/{who}_hidden_states.pt is {tensor.shape[-1]} wide, its meta.json says {meta[width]}: files swapped?"
            )
    return HiddenStates(draft, target, **{k: positions[k] for k in ("token_ids", "mask", "lengths")}, rows=rows, meta=meta)


class HiddenStatesWriter:
    """Hidden-state files preallocated sparse and filled in place, so memory stays flat at any number of rows.

    Rows done are noted in `progress.txt`; `finish` gives the files their final names. A later run with the same settings
    continues (`done`); other settings start over.
    """

    _FILES = {"draft": "egpt_hidden_states.pt", "target": "vl_hidden_states.pt"}

    def __init__(self, directory: Path, settings: dict[str, Any], rows: int, width: int, sizes: dict[str, int], dtype: torch.dtype) -> None:
        self.directory, self._part = directory, directory / "unfinished"
        self._progress = self._part / "progress.txt"
        stamp = config_hash({**settings, "rows": rows, "width": width, "sizes": sizes, "dtype": str(dtype)})
        if not (self._progress.is_file() and self._progress.read_text().startswith(stamp + "\n")):
            self._part.mkdir(parents=True, exist_ok=True)
            self._progress.unlink(missing_ok=True)
            empty = {k: torch.empty(rows, width, d, dtype=dtype) for k, d in sizes.items()}
            with torch.serialization.skip_data():
                for k, tensor in empty.items():
                    torch.save(tensor, self._part / self._FILES[k])
                torch.save(
                    {
                        "token_ids": torch.empty(rows, width, dtype=torch.int64),
                        "mask": torch.empty(rows, width, dtype=torch.bool),
                        "lengths": torch.empty(rows, dtype=torch.int64),
                    },
                    self._part / "positions.pt",
                )
            self._progress.write_text(stamp + "\n")
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            self._tensors = {k: torch.load(self._part / self._FILES[k], mmap=True, weights_only=True) for k in sizes}
            self._positions = torch.load(self._part / "positions.pt", mmap=True, weights_only=True)
        lines = self._progress.read_text().splitlines()[1:]
        self.rows: dict[int, dict[str, Any]] = {}
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the line being written when the run was killed
            self.rows[row.pop("row")] = row

    @property
    def done(self) -> set[int]:
        return set(self.rows)

    def write(self, row: int, draft: Tensor, target: Tensor, token_ids: Sequence[int], about: dict[str, Any]) -> None:
        """Store one row. draft [n, d_draft], target [n, d_target], token_ids n; raises UserError on non-finite states."""
        n = len(token_ids)
        for name, states in (("draft", draft), ("target", target)):
            if not torch.isfinite(states).all():
                raise UserError(f"sample {about['id']}: the {name} model gave non-finite hidden states; check its dtype and inputs.")
            self._tensors[name][row, :n] = states[:n].to(self._tensors[name].dtype)
        self._positions["token_ids"][row, :n] = torch.as_tensor(token_ids)
        self._positions["mask"][row, :n] = True
        self._positions["lengths"][row] = n
        with self._progress.open("a") as stream:
            stream.write(json.dumps({"row": row, **about}) + "\n")
        self.rows[row] = about

    def finish(self, meta: dict[str, Any]) -> None:
        lines = "".join(json.dumps(self.rows[i]) + "\n" for i in range(len(self.rows)))
        for name in (*self._FILES.values(), "positions.pt"):
            os.replace(self._part / name, self.directory / name)
        write_text(self.directory / "samples.jsonl", lines)
        write_json(self.directory / "meta.json", meta)
        self._progress.unlink()
        self._part.rmdir()
