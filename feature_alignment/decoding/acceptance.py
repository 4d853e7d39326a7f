"""Which drafts of a round are kept. Pure functions on one round's tensors; they never learn who drafted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Keep = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]  # a rule of one's own: what it would keep, [g] bool
Rule = Literal["token", "feature", "relaxed"] | Keep


def kept_drafts(rule: Rule, draft_ids: Tensor, target_ids: Tensor, cosine: Tensor | None, threshold: float) -> Tensor:
    """The drafts a rule keeps.

    draft_ids:  [g] int64  proposed tokens
    target_ids: [g] int64  what the target would have said in the same places
    cosine:     [g]        cos(A(g_t), v_t) of each draft; only `token` can do without
    returns:    [g] bool   all but `relaxed` stop at the first rejection
    """
    if callable(rule):
        return rule(draft_ids, target_ids, cosine, threshold).cumprod(0).bool()
    if rule == "token":
        return (draft_ids == target_ids).cumprod(0).bool()
    if cosine is None:
        raise ValueError(f"the rule {rule!r} compares hidden states, but this proposer gives none")
    above = cosine > threshold
    return above.cumprod(0).bool() if rule == "feature" else above


def cosine_per_position(aligned: Tensor, target: Tensor) -> Tensor:
    """cos(A(g), v) over the last axis, float32: [.., d] x [.., d] -> [..]."""
    return F.cosine_similarity(aligned.float(), target.float(), dim=-1)
