"""Files: written atomically, checked when read, identified by their hash.

Tensors are `.pt` files that open with `torch.load(path, mmap=True, weights_only=True)`. Outputs are published atomically: a file under
its final name is always complete.

Every JSON records hashes: `content_hash` is the hash of its other keys, `files` are hashes of the files next to it. A file that was
altered after it was written is refused when it is read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from feature_alignment.cli.console import UserError, file_named, finite
from feature_alignment.cli.text_files import read_text
from feature_alignment.storage.pickles import check_pt
from feature_alignment.storage.processes import temporary_name

Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path that is synced to disk and renamed to `path` on success, and removed on failure."""
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
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, with infinities and NaN as null so that every reader accepts it."""
    write_text(path, json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


def write_hashed_json(path: Path, content: dict[str, Any], companions: Sequence[str] = ()) -> None:
    """Write a JSON object with the hash of its content and of its companion files.

    Args:
        path: file to write
        content: JSON object
        companions: files described by it, as paths relative to its folder
    """
    files = {name: file_hash(path.parent / name) for name in companions}
    plain = json.loads(json.dumps(finite({**content, "files": files}), allow_nan=False))
    write_json(path, {**plain, "content_hash": content_hash(plain)})


def content_hash(content: dict[str, Any]) -> str:
    """Hash of a JSON object without its key `content_hash`."""
    return config_hash({k: v for k, v in content.items() if k != "content_hash"})


def read_json(path: Path, remake_command: str) -> Any:
    """The content of a JSON file, checked against its recorded hash if it has one.

    Args:
        path: file
        remake_command: command that makes the file, for messages

    Raises:
        UserError: the file is missing, damaged or altered
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist. Make it first:\n  {remake_command}")
    try:
        content = json.loads(read_text(path))
    except (UserError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}). Make it again:\n  {remake_command}") from None
    if isinstance(content, dict) and content.get("content_hash", content_hash(content)) != content_hash(content):
        raise UserError(f"{path} was altered after it was written. Make it again:\n  {remake_command}")
    return content


def read_hashed_json(path: Path, remake_command: str) -> dict[str, Any]:
    """The content of a JSON file like `read_json`; UserError also if the file records no hash."""
    content = read_json(path, remake_command)
    if not isinstance(content, dict) or "content_hash" not in content:
        raise UserError(
            f"{path} records no hash of itself: an older version or another program wrote it. Make it again:\n  {remake_command}"
        )
    return content


def altered_files(path: Path, content: dict[str, Any], names: Iterable[str] | None = None) -> list[str]:
    """The files described by a JSON file that are missing or differ from their recorded hash.

    Args:
        path: the JSON file
        content: its content
        names: files to check, as paths relative to its folder; None checks all
    """
    files = content.get("files", {})
    paths = {name: path.parent / name for name in (files if names is None else names)}
    return [name for name, file in paths.items() if not file.is_file() or file_hash(file) != files.get(name)]


def load_pt(path: Path, remake_command: str) -> Any:
    """The content of a `.pt` file, memory-mapped: plain tensors and containers only.

    Args:
        path: file
        remake_command: command that makes the file, for messages

    Raises:
        UserError: the file is missing or damaged
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist. Make it first:\n  {remake_command}")
    try:
        check_pt(path)
        content = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        _refuse_views(content, path.stat().st_size)
        return content
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, OSError, … for damaged files
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
        raise UserError(f"{path} could not be read ({reason}). Make it again:\n  {remake_command}") from None


def _refuse_views(content: Any, file_bytes: int) -> None:
    """Refuse tensors that are larger than their file: a view can repeat one number a billion times, and copying it fills memory."""
    for part in content.values() if isinstance(content, dict) else [content]:
        if isinstance(part, Tensor):
            if part.numel() * part.element_size() > file_bytes or not part.is_contiguous():
                raise ValueError(f"a tensor of {tuple(part.shape)} shows more than the file holds")
        elif isinstance(part, dict):
            _refuse_views(part, file_bytes)


def save_pt(path: Path, content: Any) -> None:
    """Write a `.pt` file atomically. Equal content gives equal bytes: torch.save to a path would store the temporary name."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def weights_hash(state_dict: Mapping[str, Tensor]) -> str:
    """Hash of the names and numbers of weights: equal for two trainings with the same result."""
    digest = hashlib.sha256()
    for name, tensor in state_dict.items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def file_hash(path: Path) -> str:
    """First 16 digits of the SHA-256 of a file, or of the names and hashes of a directory's files."""
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
    """Hash of a JSON-plain dictionary, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def load_trained(path: Path, kind: str, build: Callable[..., Module], size: str, remake_command: str) -> tuple[Module, dict[str, Any]]:
    """A trained module in eval mode, `build(**meta["geometry"])` with its weights, and its meta.

    Args:
        path: `.pt` file of {"meta", "state_dict"}
        kind: name of the module in messages
        build: makes the module from its geometry
        size: key that the geometry must have, which separates this kind from others
        remake_command: command that trains the module, for messages

    Raises:
        UserError: the file is of another kind, or damaged
    """
    saved = load_pt(path, remake_command)
    meta = saved.get("meta") if isinstance(saved, dict) else None
    geometry = meta.get("geometry") if isinstance(meta, dict) else None
    if not (isinstance(meta, dict) and isinstance(geometry, dict) and size in geometry and isinstance(saved.get("state_dict"), dict)):
        raise UserError(f"{path} is not {kind} (wanted meta with its geometry, and state_dict). Train one:\n  {remake_command}")
    described = path.parent / "meta.json"
    if described.is_file() and altered_files(described, read_json(described, remake_command), [path.name]):
        raise UserError(f"{path} is not the file that {described} describes; one of them was altered. Train it again:\n  {remake_command}")
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
        raise UserError(f"{path} is damaged: {str(error)[:300]}. Train it again:\n  {remake_command}") from None
    return module.eval(), meta


def trained_layers(path: Path, meta: dict[str, Any], remake_command: str) -> list[int]:
    """EventGPT's layers that the adapter at `path` was trained on, ascending; UserError if its meta does not record them."""
    layers = meta.get("draft_layers")
    if not isinstance(layers, list) or not layers or not all(type(k) is int for k in layers):
        raise UserError(
            f"{path} does not record which of EventGPT's layers it reads (draft_layers {layers!r}). Train it again:\n  {remake_command}"
        )
    return layers
