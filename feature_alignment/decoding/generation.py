"""What decoding returns: a text, its rounds, and the milliseconds of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

PREFILL_STAGES = ("target_prefill", "draft_prefill")
DRAFT_STAGES = ("draft", "read", "adapter", "head")  # read: an adapter reads the tokens that the target has verified


@dataclass
class Round:
    """One verification.

    Args:
        proposed: [g] draft token ids
        target_tokens: [g] the target's own token ids at the same positions
        accepted: [g] whether each draft token was accepted
        cosine: [g] cosine of predicted and real target states; None if the drafter predicts none or they were not requested
        extra_token: the target's token after the accepted ones (bonus or correction token); None if the text ended before it
        recomputed: the target read the corrected block again (`relaxed` only)
        ms: milliseconds per stage
        stop_reason: why no more was drafted: "length", "EOS", "low confidence", "no candidate", or "off" for a step of plain decoding
        confidence: chance of each draft token to be accepted if all before it are, where the drafter computed it
        score: [g] what a lossy rule compared with its threshold; None for `token`
        num_before_end: draft positions up to the end of the text, if it ended within them; None otherwise
    """

    proposed: list[int]
    target_tokens: list[int]
    accepted: list[bool]
    cosine: list[float] | None
    extra_token: int | None
    recomputed: bool
    ms: dict[str, float]
    stop_reason: str
    confidence: list[float] | None = None
    score: list[float] | None = None
    num_before_end: int | None = None

    @property
    def num_accepted(self) -> int:
        """Number of accepted draft tokens."""
        return sum(self.accepted)

    def to_json(self) -> dict[str, Any]:
        """The round as it is written to sd/<sample id>.json."""
        return {
            "proposed": self.proposed,
            "target_says": self.target_tokens,
            "kept": self.accepted,
            "cosine": self.cosine,
            "extra_token": self.extra_token,
            "recomputed": self.recomputed,
            "ms": self.ms,
            "stopped": self.stop_reason,
            "confidence": self.confidence,
            "score": self.score,
        }


@dataclass
class Generation:
    """A finished text.

    Args:
        token_ids: of the answer, up to and including its end
        passes: forward passes of the target after its prefill, which already yields the first token
        total_ms: prefill and decoding
        ms: milliseconds per stage
        rounds: of speculative decoding
        spans: (stage, begin, end) in milliseconds from the start
    """

    token_ids: list[int]
    passes: int
    total_ms: float
    ms: dict[str, float]
    rounds: list[Round] = field(default_factory=list)
    spans: list[tuple[str, float, float]] = field(default_factory=list)

    @property
    def decode_ms(self) -> float:
        """Milliseconds after both prefills."""
        return self.total_ms - sum(self.ms.get(stage, 0.0) for stage in PREFILL_STAGES)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens after the first per forward pass of the target; nan without a pass."""
        return (len(self.token_ids) - 1) / self.passes if self.passes else float("nan")

    def to_json(self) -> dict[str, Any]:
        """The generation as it is written to sd/<sample id>.json."""
        return {
            "token_ids": self.token_ids,
            "passes": self.passes,
            "tokens_per_pass": self.tokens_per_pass,
            "total_ms": self.total_ms,
            "ms": dict(self.ms),
            "rounds": [r.to_json() for r in self.rounds],
        }


def relative_spans(spans: Sequence[tuple[str, float, float]], start: float) -> list[tuple[str, float, float]]:
    """Spans in milliseconds from `start`, in order."""
    return sorted(((stage, begin - start, end - start) for stage, begin, end in spans), key=lambda span: span[1])
