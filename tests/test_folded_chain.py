"""Folding the chained adapter's draft step changes its cost, not what it drafts."""

from __future__ import annotations

import pytest
import torch

from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.folded import FoldedChain

D_TARGET, D_EVENT, VOCAB, WIDTH = 24, 20, 50, 16


def setup(num_events, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    adapter = ChainedAdapter(D_TARGET, D_EVENT, num_events, WIDTH)
    for p in adapter.parameters():
        torch.nn.init.normal_(p, std=0.4)
    adapter.standardize(torch.randn(40, D_TARGET) * 3 + 1, torch.randn(VOCAB, D_TARGET), torch.randn(40, num_events, D_EVENT) - 2)
    adapter = adapter.folded().to(dtype).eval()
    head, embeddings = torch.randn(VOCAB, D_TARGET, dtype=dtype), torch.randn(VOCAB, D_TARGET, dtype=dtype)
    return adapter, head, embeddings


def unfolded_chain(adapter, head, embeddings, events, states, tokens, steps):
    """The way without folding: expected states, tokens and logits of a greedy chain after a verified text."""
    table, seen = adapter.tokens(embeddings), adapter.encode_events(events)
    memory, found = adapter.read(states, table[tokens], None)[:, -1:], []
    for _ in range(steps):
        expected = adapter.predict(memory, seen)[:, 0]
        logits = expected @ head.T
        found.append((expected, logits, logits.argmax(-1)))
        memory = adapter.read(expected[:, None], table[found[-1][2]][:, None], memory[:, -1])
    return [torch.stack(part, 1) for part in zip(*found, strict=True)]


def folded_chain(adapter, head, embeddings, events, states, tokens, steps):
    chain = FoldedChain(adapter, head, embeddings)
    context = chain.context(adapter.encode_events(events))
    memory, zs, logits = chain.read(states, tokens, None)[:, -1], [], []
    for _ in range(steps):
        zs.append(chain.expect(memory, context))
        logits.append(chain.logits(zs[-1]))
        memory = chain.go_on(zs[-1], logits[-1].argmax(-1), memory)
    z = torch.stack(zs, 1)
    return chain.states(z), torch.stack(logits, 1), torch.stack(logits, 1).argmax(-1)


@pytest.mark.parametrize("num_events", [1, 3, 5, 6, 40])  # 5 is the last that folds attention at this width
@pytest.mark.parametrize("rows", [1, 3])
@torch.inference_mode()
def test_a_folded_chain_drafts_what_the_unfolded_one_drafts(num_events, rows):
    parts = setup(num_events, seed=num_events)
    inputs = torch.randn(rows, num_events, D_EVENT).double(), torch.randn(rows, 4, D_TARGET).double(), torch.randint(VOCAB, (rows, 4))
    for a, b in zip(unfolded_chain(*parts, *inputs, 8), folded_chain(*parts, *inputs, 8), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert FoldedChain(*parts).folds_attention == (num_events <= 5)


@torch.inference_mode()
def test_bfloat16_products_are_formed_in_float32():
    adapter, head, embeddings = setup(4, torch.bfloat16)
    chain = FoldedChain(adapter, head, embeddings)
    assert chain.head.dtype == chain.state.dtype == torch.bfloat16
    wanted = (head.float() @ adapter.out.weight.float()).bfloat16()
    assert torch.equal(chain.head, wanted)


@torch.inference_mode()
def test_a_head_over_fewer_ids_gives_their_logits():
    adapter, head, embeddings = setup(4)
    ids, z = torch.tensor([3, 7, 44]), torch.randn(2, WIDTH).double()
    whole, trimmed = FoldedChain(adapter, head, embeddings), FoldedChain(adapter, head[ids], embeddings)
    torch.testing.assert_close(whole.logits(z)[:, ids], trimmed.logits(z))


def test_an_adapter_that_still_standardizes_is_refused():
    adapter, head, embeddings = setup(4)
    adapter.standardize(torch.randn(9, D_TARGET), embeddings, torch.randn(9, 4, D_EVENT))
    with pytest.raises(ValueError, match="folded"):
        FoldedChain(adapter, head, embeddings)


def test_a_head_of_another_width_is_refused():
    adapter, _, embeddings = setup(4)
    with pytest.raises(ValueError, match="width 30"):
        FoldedChain(adapter, torch.randn(VOCAB, 30).double(), embeddings)
