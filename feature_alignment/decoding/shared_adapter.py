"""An adapter that is shared as a directory, as the drafter of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from feature_alignment.adapters.attending import AttendingAdapter
from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.cli.console import UserError
from feature_alignment.decoding.settings import DecodingConfig
from feature_alignment.decoding.sources import DRAFTER_OF, SharedAdapter
from feature_alignment.storage.pretrained import adapter_type, load_pretrained

ADAPTERS: dict[str, type[SharedAdapter]] = {adapter.kind: adapter for adapter in (HiddenAdapter, ChainedAdapter, AttendingAdapter)}


def drafter_of(directory: Path | str) -> str:
    """The drafter, as in `--draft`, that reads the adapter of a directory; UserError if there is none."""
    kind = adapter_type(directory)
    if kind not in ADAPTERS:
        raise UserError(f"{directory} holds an adapter of type {kind!r}, expected {', '.join(ADAPTERS)}.")
    return DRAFTER_OF[kind]


def check_shared_adapter(cfg: DecodingConfig) -> None:
    """Raise UserError if the drafter of a run does not read its shared adapter."""
    if cfg.shared_adapter is not None and cfg.draft != (reader := drafter_of(cfg.shared_adapter)):
        raise UserError(f"--shared_adapter {cfg.shared_adapter} with --draft {cfg.draft}: this adapter needs --draft {reader}.")


def load_shared_adapter(cfg: DecodingConfig) -> tuple[SharedAdapter, dict[str, Any]]:
    """The shared adapter of a run and its meta.

    Args:
        cfg: settings, with `shared_adapter`

    Raises:
        UserError: the directory is altered, holds an adapter of another drafter, or one that reads other layers of EventGPT
    """
    assert cfg.shared_adapter is not None
    check_shared_adapter(cfg)
    kind = adapter_type(cfg.shared_adapter)
    module, meta = load_pretrained(ADAPTERS[kind], kind, cfg.shared_adapter)
    assert isinstance(module, HiddenAdapter | ChainedAdapter | AttendingAdapter)
    recorded = meta.get("draft_layers")
    layers = cfg.draft_layers or recorded
    if not layers or list(layers) != list(recorded or layers):
        raise UserError(
            f"{cfg.shared_adapter} records EventGPT's layers {recorded}, got draft_layers={cfg.draft_layers}; expected these layers."
        )
    return module, meta
