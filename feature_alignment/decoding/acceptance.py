"""Acceptance rules: which draft tokens of a round are accepted. Pure functions of one round's tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

AcceptanceFunction = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]  # a custom rule: what it would accept, [g] bool
Rule = Literal["token", "feature", "relaxed"] | AcceptanceFunction


def accepted_drafts(rule: Rule, draft_ids: Tensor, target_ids: Tensor, cosine: Tensor | None, threshold: float) -> Tensor:
    """Apply an acceptance rule to one round.

    Args:
        rule: name of a rule, or a function with the other four arguments
        draft_ids: [g] int64, the draft tokens
        target_ids: [g] int64, the target's own tokens at the same positions
        cosine: [g] float, cosine of predicted and real target states; only `token` and functions work without
        threshold: `feature` and `relaxed` accept above this cosine

    Returns:
        [g] bool. All rules except `relaxed` stop at the first rejection.

    Raises:
        ValueError: the rule needs cosines and there are none
    """
    if callable(rule):
        return rule(draft_ids, target_ids, cosine, threshold).cumprod(0).bool()
    if rule == "token":
        return (draft_ids == target_ids).cumprod(0).bool()
    if cosine is None:
        raise ValueError(f"the rule {rule!r} compares hidden states, and this drafter predicts none")
    above = cosine > threshold
    return above.cumprod(0).bool() if rule == "feature" else above


def cosine_per_position(aligned: Tensor, target: Tensor) -> Tensor:
    """Cosine over the last axis in float32.

    Args:
        aligned: [.., d], predicted target states
        target: [.., d], real target states

    Returns:
        [..] float32
    """
    return F.cosine_similarity(aligned.float(), target.float(), dim=-1)
