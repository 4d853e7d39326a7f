"""A batch whose rows advance by different amounts reads what each row alone would read."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import as_decoder, noisy_copy, prompt_of, tiny_llama

from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.folded import FoldedChain
from feature_alignment.decoding.batch import speculate_batch
from feature_alignment.decoding.batch_drafts import ChainedRows, SeparateRows, drafter_of_rows, start_rows
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.proposers import ChainedProposer
from feature_alignment.decoding.sampling import Sampler
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.decoding.token_selection import TokenSelector
from feature_alignment.models.generation import GenerationRules
from feature_alignment.models.row_cache import RowBatch, compacted

READS = ("tolist", "item", "cpu", "numpy", "__int__", "__float__", "__bool__", "__index__", "__iter__", "__contains__")
PROMPTS = [prompt_of(1, 5, 9, 13), prompt_of(1, 40, 7, 7), prompt_of(1, 6, 8, 20)]


@torch.inference_mode()
def test_rows_of_different_lengths_read_what_each_reads_alone():
    target = as_decoder(tiny_llama(0).double())
    batch = RowBatch(target, target.prefill(PROMPTS), [4, 4, 4], 20)
    texts, kept = torch.arange(3, 33).view(3, 10), (3, 1, 2)
    batch.step(texts[:, :3])
    batch.lengths = [4 + n for n in kept]  # the rest is rejected
    batch.keep(compacted([0, 2]))
    following = torch.tensor([[50, 51], [52, 53]])
    found = batch.step(following)
    for row, i in enumerate((0, 2)):
        alone = target.prefill([PROMPTS[i]])
        wanted = target.step(alone, torch.cat([texts[i, : kept[i]], following[row]])[None])[0, -2:]
        torch.testing.assert_close(found[row], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("remaining, order", [([0, 1, 3], [0, 1, 3]), ([1, 2, 3], [3, 1, 2]), ([3], [3]), ([0, 4, 5], [0, 5, 4]), ([], [])])
def test_remaining_rows_move_forward_only(remaining, order):
    assert compacted(remaining) == order and sorted(order) == remaining and all(old >= new for new, old in enumerate(order))


def chained(number, **settings):
    """A target and as many drafters that share an adapter."""
    torch.manual_seed(3)
    model = tiny_llama(3).double()
    target, draft = as_decoder(model), as_decoder(noisy_copy(model, 0.1))
    adapter = ChainedAdapter(32, 32, 1, 16).double().eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter *= 4
    return target, [ChainedProposer(draft, adapter, target.head_weight, target.embeddings, **settings) for _ in range(number)]


@pytest.mark.parametrize("ids", [None, torch.arange(2, 64, 3)])
@torch.inference_mode()
def test_one_adapter_call_drafts_what_each_rows_own_drafter_drafts(ids):
    _, proposers = chained(3, draft_ids=ids)
    texts, states, watch = [[4, 5, 6], [7, 8, 9], [10, 11, 12]], torch.randn(3, 13, 32).double(), Stopwatch()
    for proposer, prompt in zip(proposers, PROMPTS, strict=True):
        proposer.start(prompt, watch)
    rows, separate = drafter_of_rows(proposers), SeparateRows(proposers)
    assert isinstance(rows, ChainedRows)
    for more, room, kept in (  # rows advance by different amounts, then one leaves the batch
        ([1, 1, 1], [3, 5, 4], [0, 1, 2]),
        ([4, 2, 1], [3, 5, 4], [0, 1, 2]),
        ([1, 4, 2], [3, 0, 4], [2, 1]),
        ([1, 3], [4, 3], [0, 1]),
    ):
        texts = [[*text, *range(20, 20 + n)] for text, n in zip(texts, more, strict=True)]
        known = states[:, : max(map(len, texts))]
        found, wanted = (drafter.propose(texts, known, room, watch) for drafter in (rows, separate))
        for i, n in enumerate(room):
            assert found[i, :n].tolist() == wanted[i, :n].tolist()
        for drafter in (rows, separate):
            drafter.keep(kept)
        texts, states = [texts[i] for i in kept], states[kept]
    assert not isinstance(drafter_of_rows([*chained(1)[1], *proposers]), ChainedRows)  # another adapter


@pytest.mark.parametrize("number", [1, 3])
@torch.inference_mode()
def test_on_a_cpu_rows_are_drafted_until_all_of_their_texts_have_ended(number):
    _, proposers = chained(number)
    texts, states, watch = [[4], [7], [10]][:number], torch.randn(number, 1, 32).double(), Stopwatch()
    for proposer, prompt in zip(proposers, PROMPTS, strict=False):
        proposer.start(prompt, watch)
    whole = ChainedRows(proposers).propose(texts, states, [8] * number, watch).tolist()
    ends = {row[2 + i] for i, row in enumerate(whole)}
    width = max(next(i + 1 for i, token in enumerate(row) if token in ends) for row in whole)
    for proposer in proposers:
        proposer.selector = TokenSelector(GenerationRules(ends))
    found = drafter_of_rows(proposers).propose(texts, states, [8] * number, watch)
    assert found.tolist() == [row[:width] for row in whole] and width < 8 == len(whole[0])


@torch.inference_mode()
def test_drafters_of_several_models_read_their_clips_one_by_one():
    """They may share an adapter all the same; rows whose rules depend on their text have drafters of their own."""
    _, (one, *_) = chained(1)
    adapter, watch = one.chain.adapter, Stopwatch()
    drafts = [as_decoder(tiny_llama(seed).double()) for seed in (4, 5)]
    head = torch.randn(64, 32).double()
    proposers, alone = ([ChainedProposer(draft, adapter, head, head) for draft in drafts] for _ in "ab")
    start_rows(proposers, PROMPTS[:2], watch)
    for proposer, own, prompt in zip(proposers, alone, PROMPTS, strict=False):
        own.start(prompt, watch)
        assert all(map(torch.equal, proposer.event_context, own.event_context))
    assert not torch.equal(proposers[0].event_context.keys, proposers[1].event_context.keys)
    assert isinstance(drafter_of_rows(proposers), ChainedRows)
    proposers[1].selector = TokenSelector(sampler=Sampler(1.0))
    assert isinstance(drafter_of_rows(proposers), SeparateRows)


def test_a_round_of_a_batch_reads_the_device_once(monkeypatch):
    target, proposers = chained(3)
    wanted = [greedy(target, p, 16).token_ids for p in PROMPTS]
    draft, reads = FoldedChain.draft, []
    monkeypatch.setattr(FoldedChain, "draft", lambda self, *args, ends, **more: draft(self, *args, **more))  # as on a GPU
    for name in READS:
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *args, original=original: (reads.append(self.ndim), original(self, *args))[1])
    step = RowBatch.step
    begin = []
    monkeypatch.setattr(RowBatch, "step", lambda self, ids: (begin.append(len(reads)), step(self, ids))[1])
    got = speculate_batch(target, proposers, PROMPTS, PROMPTS, num_draft_tokens=3, max_new_tokens=16)
    assert got.token_ids == wanted and got.passes == len(begin) > 3
    assert len(reads) - begin[0] == got.passes and {after - before for before, after in pairwise(begin)} == {1}
