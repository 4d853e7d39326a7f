"""A trained adapter as a directory that can be shared: `config.json`, `adapter.safetensors` and a model card, `README.md`.

config.json records its own hash and the hash of the weights, so that a file that was altered or swapped is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from feature_alignment.cli.console import UserError
from feature_alignment.storage.files import Module, altered_files, atomic_write, read_hashed_json, write_hashed_json, write_text

CONFIG, WEIGHTS, CARD = "config.json", "adapter.safetensors", "README.md"


class SharedModule(torch.nn.Module):
    """An adapter that can be written as a directory; `geometry` are the arguments that build it, `kind` names its class in config.json."""

    kind: ClassVar[str]
    geometry: Any

    def save_pretrained(self, directory: Path | str, meta: dict[str, Any] | None = None) -> None:
        """Write this adapter as a directory that can be shared; `python -m feature_alignment.adapters.share` adds a model card.

        Args:
            directory: made if missing
            meta: of its adapter.pt; without its `draft_layers`, loading a `SpeculativePair` with this adapter needs that setting
        """
        save_pretrained(self, self.kind, meta or {}, directory)

    @classmethod
    def from_pretrained(cls, directory: Path | str) -> Self:
        """Load an adapter from a directory that `save_pretrained` wrote; raises UserError if it is altered or of another kind."""
        return load_pretrained(cls, cls.kind, directory)[0]


def save_pretrained(module: torch.nn.Module, kind: str, meta: dict[str, Any], directory: Path | str, card: str = "") -> None:
    """Write an adapter as a directory. config.json is written last: a directory without it is incomplete.

    Args:
        module: the adapter; `module.geometry` are the arguments that build it
        kind: its class in config.json, for example "chained"
        meta: `meta` of its adapter.pt; what made it
        directory: made if missing
        card: text of README.md; none is written if empty

    Raises:
        UserError: `directory` is a file, or holds files of something else
        ValueError: the adapter is in training, and its weights do not include the scales of its inputs
    """
    if getattr(module, "scale", None) is not None:
        raise ValueError("the adapter still standardizes its inputs; save adapter.folded()")
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file. Choose an empty or a new directory.")
    foreign = [p.name for p in directory.iterdir() if p.name not in (CONFIG, WEIGHTS, CARD)] if directory.is_dir() else []
    if foreign:
        raise UserError(f"{directory} holds {foreign[0]} and is not an adapter directory. Choose an empty or a new one.")
    (directory / CONFIG).unlink(missing_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    with atomic_write(directory / WEIGHTS) as temporary:
        temporary.write_bytes(save(state, metadata={"format": "pt"}))
    if card:
        write_text(directory / CARD, card)
    write_hashed_json(directory / CONFIG, {"adapter_type": kind, "geometry": module.geometry, "meta": meta}, (WEIGHTS,))


def adapter_type(directory: Path | str) -> str:
    """The kind of adapter that a directory holds; UserError if it holds none."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise UserError(f"no adapter at {directory}: expected a directory with {CONFIG} and {WEIGHTS}.")
    return str(read_hashed_json(path, f"copy {directory} again from where it was published").get("adapter_type"))


def load_pretrained(build: Callable[..., Module], kind: str, directory: Path | str) -> tuple[Module, dict[str, Any]]:
    """An adapter from a directory that `save_pretrained` wrote, and its meta.

    Args:
        build: makes the adapter from its geometry
        kind: expected `adapter_type`
        directory: local directory

    Raises:
        UserError: files missing, altered, of another kind, or with weights that do not fit
    """
    directory = Path(directory)
    fetch = f"copy {directory} again from where it was published"
    if not (directory / CONFIG).is_file():
        raise UserError(f"no adapter at {directory}: expected a directory with {CONFIG} and {WEIGHTS}.")
    config = read_hashed_json(directory / CONFIG, fetch)
    if config.get("adapter_type") != kind or not isinstance(config.get("geometry"), dict) or not isinstance(config.get("meta"), dict):
        raise UserError(f"{directory / CONFIG} describes an adapter of type {config.get('adapter_type')!r}, expected {kind!r}.")
    if altered_files(directory / CONFIG, config, [WEIGHTS]):
        raise UserError(f"{directory / WEIGHTS} is not the file that {CONFIG} describes; one of them was altered. To repair it, {fetch}.")
    try:
        state = load_file(directory / WEIGHTS)
        with torch.device("meta"):  # shapes first: the sizes that a file states may be anything
            shapes = {name: tensor.shape for name, tensor in build(**config["geometry"]).state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in state.items()}:
            raise ValueError("its weights do not fit its geometry")
        if not all(torch.isfinite(tensor).all() for tensor in state.values()):
            raise ValueError("it holds weights that are not finite")
        module = build(**config["geometry"])
        module.load_state_dict(state)
    except (SafetensorError, RuntimeError, ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{directory} is damaged: {str(error)[:300]}. To repair it, {fetch}.") from None
    return module.eval(), config["meta"]
