"""Attention under a mask of one's own: sdpa's result, whatever the number of tokens and of shared keys."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from feature_alignment.models.tree_attention import FEW_TOKENS, tree_attention


@pytest.mark.parametrize("n", [1, 6, FEW_TOKENS, FEW_TOKENS + 1, 80])
@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_scaled_dot_product_attention(n, kv_heads, dtype):
    torch.manual_seed(n)
    room = torch.randn(2, kv_heads, 130, 2, 16).to(dtype)  # keys and values are the front of buffers with room
    query, key, value = torch.randn(2, n, 6, 16).to(dtype).transpose(1, 2), room[:, :, :100, 0], room[:, :, :100, 1]
    hidden = torch.rand(2, 1, n, 100) < 0.5
    hidden[..., 0] = False
    mask = torch.zeros(2, 1, n, 100, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    groups = 6 // kv_heads
    wanted = F.scaled_dot_product_attention(
        query.float(), *(x.float().repeat_interleave(groups, 1) for x in (key, value)), attn_mask=mask.float(), scale=0.3
    )
    found, weights = tree_attention(None, query, key, value, mask, scaling=0.3)
    assert weights is None and found.shape == (2, n, 6, 16) and found.is_contiguous()
    limits = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    torch.testing.assert_close(found.float(), wanted.transpose(1, 2), **limits)


@pytest.mark.parametrize("n", [3, FEW_TOKENS + 1])
def test_scores_are_divided_by_the_root_of_the_width_unless_said_otherwise(n):
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, n, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    found, _ = tree_attention(None, query, key, value, torch.zeros(1, 1, n, 40))
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, key, value).transpose(1, 2), atol=1e-5, rtol=1e-5)
