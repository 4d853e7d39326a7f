"""What a file holds and what made it.

Tensors are `.pt` files that open with `torch.load(path, mmap=True, weights_only=True)`; beside each file or directory lies a
`meta.json`. Everything is written under a temporary name and renamed, so a final name always means a complete file.

Every JSON is sealed: `content_hash` is a hash of the rest of it, `files` are hashes of what lies beside it, `made_from` of what it was
made from. Whatever was altered since is refused when it is read, or made anew. To look through a whole run:

    python -m feature_alignment.artifacts verify outputs/demo
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

if __name__ == "__main__":
    from feature_alignment.console import run_module

    run_module("feature_alignment.verification")

import torch
from torch import Tensor, nn

from feature_alignment.config import Common, as_plain
from feature_alignment.console import UserError, file_named, finite, mended_files
from feature_alignment.pickles import check_pt
from feature_alignment.processes import temporary_name
from feature_alignment.state_files import frame_hash, row_hashes

log = logging.getLogger(__name__)

SCHEMA = 3  # of the JSON files: what an older version left is made anew, not reused
Module = TypeVar("Module", bound=nn.Module)
EVENT_STATES = "egpt_event_states.pt"
CHECKED_AT_ONCE = 1 << 30  # bytes of states that are compared with their hashes whenever they are loaded
EOS_IDS_ONCE = [2]  # of every file written before its meta said so
VERIFY = "python -m feature_alignment.artifacts verify outputs/<name>"
EXTRACT = "python feature_alignment/extract_hidden_states.py --config configs/demo.yaml --split {split}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it on success, once its bytes are on the disk, and removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with file_named(path):
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, content: Any) -> None:
    """JSON with `inf` and `nan` as null, so that every reader accepts it."""
    write_text(path, json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


def write_sealed(path: Path, content: dict[str, Any], beside: Sequence[str] = ()) -> None:
    """JSON that tells later whether it, or one of the files `beside` it (paths from its folder), was altered."""
    files = {name: file_hash(path.parent / name) for name in beside}
    plain = json.loads(json.dumps(finite({**content, "files": files}), allow_nan=False))
    write_json(path, {**plain, "content_hash": content_hash(plain)})


def content_hash(content: dict[str, Any]) -> str:
    """Of everything in a JSON object but its own `content_hash`."""
    return config_hash({k: v for k, v in content.items() if k != "content_hash"})


def read_json(path: Path, make_it: str) -> Any:
    """A JSON file, or a UserError that names the command that makes it; one that says its hash must still have it."""
    if not path.is_file():
        raise UserError(f"{path} is not there. Make it first:\n  {make_it}")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}). Make it again:\n  {make_it}") from None
    if isinstance(content, dict) and content.get("content_hash", content_hash(content)) != content_hash(content):
        raise UserError(f"{path} was altered after it was written. Make it again:\n  {make_it}")
    return content


def read_sealed(path: Path, make_it: str) -> dict[str, Any]:
    """A JSON object that one of these scripts wrote and nobody has altered, or a UserError that names the command that makes it."""
    content = read_json(path, make_it)
    if not isinstance(content, dict) or "content_hash" not in content:
        raise UserError(f"{path} does not say its own hash: an older version wrote it, or somebody else. Make it again:\n  {make_it}")
    return content


def altered(path: Path, content: dict[str, Any], names: Iterable[str] | None = None) -> list[str]:
    """Those of the files beside a sealed JSON at `path` (all, or `names`) that are gone or not as they were."""
    files = content.get("files", {})
    there = {name: path.parent / name for name in (files if names is None else names)}
    return [name for name, file in there.items() if not file.is_file() or file_hash(file) != files.get(name)]


def load_pt(path: Path, make_it: str) -> Any:
    """A `.pt` file, memory-mapped, plain tensors and containers only; UserError if missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} is not there. Make it first:\n  {make_it}")
    try:
        check_pt(path)
        content = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        _refuse_views(content, path.stat().st_size)
        return content
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, OSError, … for damaged files
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
        raise UserError(f"{path} could not be read ({reason}). Make it again:\n  {make_it}") from None


def _refuse_views(content: Any, file_bytes: int) -> None:
    """A tensor may show one number a billion times; whoever copies it then needs the memory."""
    for part in content.values() if isinstance(content, dict) else [content]:
        if isinstance(part, Tensor):
            if part.numel() * part.element_size() > file_bytes or not part.is_contiguous():
                raise ValueError(f"a tensor of {tuple(part.shape)} shows more than the file holds")
        elif isinstance(part, dict):
            _refuse_views(part, file_bytes)


def save_pt(path: Path, content: Any) -> None:
    """The same content gives the same bytes, whoever writes it: torch would put a file's (temporary) name into the file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def weights_hash(state_dict: Mapping[str, Tensor]) -> str:
    """Of names and numbers alone: equal for two trainings that came to the same weights."""
    digest = hashlib.sha256()
    for name, tensor in state_dict.items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


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


Sources = Mapping[str, Path | Sequence[Path]]  # name -> a file, a checkpoint directory, or several files


def provenance(script: str, cfg: Common, made_from: Sources, **facts: Any) -> dict[str, Any]:
    """The `meta` of everything a script writes: settings, hashes of `made_from` and where it lay (`inputs`), what was mended."""
    return {
        "made_by": script,
        "argv": sys.argv[1:],
        "config": as_plain(cfg),
        **_identity(cfg, made_from),
        "inputs": {name: str(p) if isinstance(p, Path) else [str(q) for q in p] for name, p in made_from.items()},
        "mended": mended_files(),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
        "machine": {
            "cpu": platform.machine(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        },
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **facts,
    }


def _identity(cfg: Common, made_from: Sources) -> dict[str, Any]:
    settings = {k: v for k, v in as_plain(cfg).items() if k not in ("resume", "quiet", "tensorboard")}
    hashes = {name: source_hash(source) for name, source in made_from.items() if not isinstance(source, Path) or source.exists()}
    return {"schema": SCHEMA, "config_hash": config_hash(settings), "made_from": hashes}


def identity_of(cfg: Common, made_from: Sources) -> str:
    """One short hash of the settings and the files something is made from."""
    return config_hash(_identity(cfg, made_from))


def source_hash(source: Path | Sequence[Path]) -> str:
    """Of a file, a checkpoint directory, or several files in their order."""
    return file_hash(source) if isinstance(source, Path) else config_hash({str(i): file_hash(path) for i, path in enumerate(source)})


def reusable(path: Path, cfg: Common, made_from: Sources) -> dict[str, Any] | None:
    """The JSON at `path` if `--resume` is on, it was made with these settings from these very files, and neither it nor a file
    beside it was altered since; else None."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, and a file is to be written there; move it away.")
    if not (cfg.resume and path.is_file()):
        return None
    try:
        content = read_sealed(path, f"rm {path}")
    except UserError as error:
        log.warning("%s  It is made anew.", str(error).splitlines()[0])
        return None
    meta = content.get("meta", content)
    if any(meta.get(key) != value for key, value in _identity(cfg, made_from).items()):
        return None
    if changed := altered(path, content):
        log.warning("%s: %s was altered or is gone; all of it is made anew.", path.parent, ", ".join(changed))
        return None
    return content


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

    draft:     [n, s, d_draft]   EventGPT's states (its tapped layers side by side, or the one asked for), zero where padded
    target:    [n, s, d_target]  Video-LLaVA's, post-norm
    token_ids: [n, s] int64      the tokens both models read; state t *emits* token t
    mask:      [n, s] bool       real positions, EOS included
    lengths:   [n] int64
    rows:      one dict per row: id, sequence, question, both texts
    events:    [n, e, d_event]   EventGPT's states over its event tokens, if asked for: of the last tapped layer
    """

    draft: Tensor
    target: Tensor
    token_ids: Tensor
    mask: Tensor
    lengths: Tensor
    rows: list[dict[str, Any]]
    meta: dict[str, Any]
    events: Tensor | None = None

    def refuse_non_finite(self, rows: Tensor | Sequence[int], *states: Tensor) -> None:
        """raises UserError, naming the first sample of `rows` [b] of which one of `states` [b, ...] is not finite"""
        for part in states:
            bad = ~torch.isfinite(part.flatten(1)).all(1)
            if bad.any():
                row = self.rows[int(rows[int(bad.nonzero()[0])])]
                raise UserError(f"sample {row['id']}: its states are not finite. Look for what was altered:\n  {VERIFY}")

    @property
    def ended(self) -> Tensor:
        """[n] bool: texts that end with EOS, not at the length limit."""
        ids = eos_ids_of(self.meta, "draft_eos_token_ids" if self.meta.get("prefix") == "drafter" else "eos_token_ids")
        return torch.isin(self.token_ids[torch.arange(len(self.lengths)), self.lengths - 1], torch.tensor(ids))

    @property
    def names(self) -> list[str]:
        """The samples' ids."""
        return [row["id"] for row in self.rows]

    @property
    def clips(self) -> list[str]:
        """The cluster each row belongs to: intervals resample these."""
        return [row["sequence"] for row in self.rows]


def eos_ids_of(meta: dict[str, Any] | None, key: str = "eos_token_ids") -> list[int]:
    """The token ids that end the target's texts (or the drafter's, by its key), as the meta of an extraction or its token pairs says."""
    ids = (meta or {}).get(key, EOS_IDS_ONCE)
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise UserError(f"{key} in a meta.json: wanted a list of token ids, got {str(ids)[:80]}. Look for what was altered:\n  {VERIFY}")
    return ids


def load_trained(path: Path, kind: str, build: Callable[..., Module], size: str, make_it: str) -> tuple[Module, dict[str, Any]]:
    """A trained module and its meta: `build(**meta["geometry"])`, filled and ready to use.

    kind: its name in messages; size: a key its geometry must have, so that no other kind is taken for it
    raises: UserError for a file of another kind, or a damaged one
    """
    saved = load_pt(path, make_it)
    meta = saved.get("meta") if isinstance(saved, dict) else None
    geometry = meta.get("geometry") if isinstance(meta, dict) else None
    if not (isinstance(meta, dict) and isinstance(geometry, dict) and size in geometry and isinstance(saved.get("state_dict"), dict)):
        raise UserError(f"{path} is not {kind} (wanted meta with its geometry, and state_dict). Train one:\n  {make_it}")
    beside = path.parent / "meta.json"
    if beside.is_file() and altered(beside, read_json(beside, make_it), [path.name]):
        raise UserError(f"{path} is not the file that {beside} describes; one of them was altered. Train it again:\n  {make_it}")
    try:
        with torch.device("meta"):  # shapes first: the sizes a file states may be anything
            shapes = {name: tensor.shape for name, tensor in build(**geometry).state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in saved["state_dict"].items()}:
            raise ValueError("its weights do not fit its geometry")
        if not all(torch.isfinite(tensor).all() for tensor in saved["state_dict"].values()):
            raise ValueError("it holds weights that are not finite")
        module = build(**geometry)
        module.load_state_dict(saved["state_dict"])
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {str(error)[:300]}. Train it again:\n  {make_it}") from None
    return module.eval(), meta


def layers_read(path: Path, meta: dict[str, Any], make_it: str) -> list[int]:
    """EventGPT's layers that the adapter at `path` was trained on, last the deepest; UserError if its meta does not say."""
    layers = meta.get("draft_layers")
    if not isinstance(layers, list) or not layers or not all(type(k) is int for k in layers):
        raise UserError(f"{path} does not say which of EventGPT's layers it reads (draft_layers {layers!r}). Train it again:\n  {make_it}")
    return layers


def layer_file(layer: int) -> str:
    """Where one of several separately stored draft layers lies."""
    return f"egpt_hidden_states.layer{layer:02d}.pt"


def load_hidden_states(directory: Path, layers: Sequence[int] | None = None, events: bool = False) -> HiddenStates:
    """One split of a complete extraction; refuses an incomplete directory or files that do not fit each other.

    layers: EventGPT's layers that are wanted (default: what is there). Where they were stored apart (`--separate_layers`) it must be
            one of them, and `meta` then speaks of this layer alone
    events: read EventGPT's event states as well
    """
    command = EXTRACT.format(split=directory.name)
    meta = read_sealed(directory / "meta.json", command)
    small = [n for n in meta["files"] if n.endswith((".pt", ".jsonl"))]
    if changed := altered(directory / "meta.json", meta, small):
        raise UserError(
            f"{directory}: {', '.join(changed)} was altered after this split was extracted. Make it again:\n  {command} --no_resume"
        )
    name, there = "egpt_hidden_states.pt", meta["draft_layers"]
    if meta.get("separate_layers"):
        if layers is None or len(layers) != 1 or layers[0] not in there:
            raise UserError(
                f"{directory} holds EventGPT's layers {there} apart; wanted one of them, got {layers}: --draft_layers {there[-1]}"
            )
        name = layer_file(layers[0])
        norm, width = meta["draft_norms"][str(layers[0])], meta["hidden_size_draft"] // len(there)
        meta = {**meta, "draft_layers": list(layers), "draft_norm": norm, "hidden_size_draft": width}
    elif layers is not None and list(layers) != list(there):
        raise UserError(
            f"{directory} holds EventGPT's layers {there} as one state, not {list(layers)}. Extract those, or all with --separate_layers."
        )
    positions = load_pt(directory / "positions.pt", command)
    rows = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    draft, target = (_load_states(directory / file, rows, meta, command) for file in (name, "vl_hidden_states.pt"))
    if draft.shape[:2] != target.shape[:2] or draft.shape[:2] != positions["token_ids"].shape:
        shapes = {"egpt": draft.shape, "vl": target.shape, "token_ids": positions["token_ids"].shape}
        raise UserError(f"the files in {directory} do not fit each other: {shapes}. Make them again:\n  {command}")
    for file, tensor, width in ((name, draft, "hidden_size_draft"), ("vl_hidden_states.pt", target, "hidden_size_target")):
        if tensor.shape[-1] != meta[width]:
            raise UserError(f"{directory}/{file} is {tensor.shape[-1]} wide, its meta.json says {meta[width]}: files swapped?")
    seen = None
    if events:
        if not meta.get("event_states"):
            raise UserError(
                f"{directory} holds no event states, which the chained adapter reads. Extract them:\n  {command} --event_states"
            )
        seen = _load_states(directory / EVENT_STATES, rows, meta, command)
    return HiddenStates(draft, target, **{k: positions[k] for k in ("token_ids", "mask", "lengths")}, rows=rows, meta=meta, events=seen)


def _load_states(path: Path, rows: Sequence[dict[str, Any]], meta: dict[str, Any], command: str) -> Tensor:
    """One file of states, memory-mapped. Its frame is compared with its hash, its rows with theirs where that takes a second."""
    states = load_pt(path, command)
    if not isinstance(states, Tensor) or states.ndim != 3 or not 0 < len(states) == len(rows):
        raise UserError(f"{path} does not hold the {len(rows)} rows of samples.jsonl. Make it again:\n  {command} --no_resume")
    if frame_hash(path, states.nbytes) != meta["frames"].get(path.name):
        raise UserError(
            f"{path} is not the file that its meta.json describes: files swapped, or altered? Make it again:\n  {command} --no_resume"
        )
    if states.nbytes <= CHECKED_AT_ONCE:
        for about, found in zip(rows, row_hashes(path, len(rows), states[0].nbytes), strict=True):
            if about["sha256"][path.name] != found:
                raise UserError(f"{path}: the states of sample {about['id']} were altered. Make them again:\n  {command} --no_resume")
    else:
        log.info("%s: %.3g GB are not compared with their hashes now; that takes\n  %s", path, states.nbytes / 1e9, VERIFY)
    return states
