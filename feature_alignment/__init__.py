"""EventGPT drafts, Video-LLaVA verifies: speculative decoding over aligned hidden states."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feature_alignment.adapters.attending import AttendingAdapter
    from feature_alignment.adapters.chained import ChainedAdapter
    from feature_alignment.adapters.hidden import HiddenAdapter
    from feature_alignment.cli.console import UserError
    from feature_alignment.decoding.engine import speculate
    from feature_alignment.decoding.speculative_pair import SpeculativePair, sample_of
    from feature_alignment.storage.hidden_states import load_hidden_states

_MODULES = {
    "AttendingAdapter": "adapters.attending",
    "ChainedAdapter": "adapters.chained",
    "HiddenAdapter": "adapters.hidden",
    "SpeculativePair": "decoding.speculative_pair",
    "UserError": "cli.console",
    "load_hidden_states": "storage.hidden_states",
    "sample_of": "decoding.speculative_pair",
    "speculate": "decoding.engine",
}
__all__ = [
    "AttendingAdapter",
    "ChainedAdapter",
    "HiddenAdapter",
    "SpeculativePair",
    "UserError",
    "load_hidden_states",
    "sample_of",
    "speculate",
]


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` on first use: the scripts' --help must not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
