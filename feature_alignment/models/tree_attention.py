"""Attention of a few tokens over many keys on a CPU, under a mask of one's own: keys that query heads share are not copied.

transformers repeats shared keys and values for every head and layer whenever there is a mask, as there is in each verification.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedConfig

NAME = "feature_alignment_tree"
FEW_TOKENS = 32  # of bfloat16, up to which plain products are faster than the fused kernel


def tree_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float | None = None, **unused: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention in the signature of transformers' attention functions.

    Args:
        module: the attention layer; not used
        query: [b, heads, n, d]
        key: [b, kv_heads, s, d]
        value: [b, kv_heads, s, d]
        attention_mask: [b, 1, n, s], additive
        scaling: of the scores; 1/sqrt(d) by default
        **unused: other arguments of transformers

    Returns:
        [b, n, heads, d], and no attention weights.
    """
    b, heads, n, d = query.shape
    kv_heads, groups = key.shape[1], heads // key.shape[1]
    scaling = d**-0.5 if scaling is None else scaling
    if query.dtype in (torch.float32, torch.float64):
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=groups > 1)
    elif n <= FEW_TOKENS:
        rows = query.reshape(b, kv_heads, groups * n, d)
        scores = (key @ rows.transpose(2, 3)).transpose(2, 3)  # In this order a bfloat16 product copies no keys.
        weights = (scores.reshape(b, kv_heads, groups, n, -1).float() * scaling + attention_mask[:, :, None]).softmax(-1)
        mixed = weights.to(value.dtype).view(b, kv_heads, groups * n, -1) @ value
    else:
        stacked, mask = query.reshape(b, kv_heads, groups * n, d), attention_mask.repeat(1, 1, groups, 1)
        mixed = F.scaled_dot_product_attention(stacked, key, value, attn_mask=mask, scale=scaling)
    return mixed.view(b, heads, n, d).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, tree_attention)


def causal_mask(new: int, past: int, like: Tensor) -> Tensor:
    """Additive mask [1, 1, new, past + new] of new tokens after a text: each attends to the text and to the new ones up to its own."""
    mask = torch.full((new, past + new), -torch.inf, dtype=like.dtype, device=like.device)
    return mask.triu(past + 1)[None, None]


@contextmanager
def attention(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Run a model's layers with another attention function for a while."""
    usual, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = usual
