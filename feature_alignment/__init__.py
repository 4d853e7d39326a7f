"""EventGPT drafts, Video-LLaVA verifies: speculative decoding over aligned hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feature_alignment.decoding.speculative_pair import SpeculativePair

__all__ = ["SpeculativePair"]


def __getattr__(name: str) -> Any:
    """Import `SpeculativePair` on first use: the scripts' --help must not wait for torch."""
    if name == "SpeculativePair":
        from feature_alignment.decoding.speculative_pair import SpeculativePair

        return SpeculativePair
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
