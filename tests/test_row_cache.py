"""A batch whose rows advance by different amounts reads what each row alone would read."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import as_decoder, noisy_copy, prompt_of, tiny_llama

from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.folded import FoldedChain
from feature_alignment.cli.console import UserError
from feature_alignment.decoding.batch import speculate_batch
from feature_alignment.decoding.batch_drafts import ChainedRows, SeparateRows, drafter_of_rows, show_clips_alike, start_rows
from feature_alignment.decoding.chained_proposer import ChainedProposer
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.proposers import Draft, Proposer
from feature_alignment.decoding.sampling import Sampler
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.decoding.token_selection import TokenSelector
from feature_alignment.models import fixed
from feature_alignment.models.generation import GenerationRules
from feature_alignment.models.row_cache import RowBatch, compacted

READS = ("tolist", "item", "cpu", "numpy", "__int__", "__float__", "__bool__", "__index__", "__iter__", "__contains__")
CLOSE = {"eager": {"rtol": 1e-9, "atol": 1e-9}, "graphs": {"rtol": 1e-5, "atol": 1e-5}}  # captured steps compute scores in float32
PROMPTS = [prompt_of(1, 5, 9, 13), prompt_of(1, 40, 7, 7), prompt_of(1, 6, 8, 20)]


@pytest.mark.parametrize("steps", ["eager", "graphs"])
@pytest.mark.parametrize(("taps", "kv_heads"), [(None, 2), (None, 1), ([1, 2], 2)])
@torch.inference_mode()
def test_rows_of_different_lengths_read_what_each_reads_alone(steps, taps, kv_heads):
    target = as_decoder(tiny_llama(0, kv_heads=kv_heads).double(), taps)
    alone_target = as_decoder(tiny_llama(0, kv_heads=kv_heads).double(), taps)
    target.use_steps(steps)
    batch = RowBatch(target, target.prefill(PROMPTS), [4, 4, 4], 20)
    texts, kept = torch.arange(3, 33).view(3, 10), (3, 1, 2)
    batch.step(texts[:, :3])
    batch.lengths = [4 + n for n in kept]  # the rest is rejected
    batch.keep(compacted([0, 2]))
    following = torch.tensor([[50, 51], [52, 53]])
    found = batch.step(following)
    for row, i in enumerate((0, 2)):
        alone = alone_target.prefill([PROMPTS[i]])
        wanted = alone_target.step(alone, torch.cat([texts[i, : kept[i]], following[row]])[None])[0, -2:]
        torch.testing.assert_close(found[row], wanted, **CLOSE[steps])


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


def test_prompts_that_ask_before_they_show_the_clip_are_no_batch():
    """Unless all show it at the same positions before the shortest ends; drafters then read their clips one by one."""
    at = -200
    a, b, c = (torch.tensor(ids) for ids in ([1, at, 5, 6], [1, at, 7], [1, 5, 6, at]))
    assert show_clips_alike([a, b], at) and show_clips_alike([a, b], at, 2) and show_clips_alike([a, b, c], -1)
    assert not show_clips_alike([a, c], at) and not show_clips_alike([a, b], at, 1) and not show_clips_alike([c, c], at, 3)
    target, proposers = chained(2)
    target.placeholder = 5
    prompts = [prompt_of(1, 5, 9), prompt_of(1, 9, 9, 5)]
    with pytest.raises(UserError, match="wanted --batch_size 1"):
        speculate_batch(target, proposers, prompts, prompts)
    draft = proposers[0].draft
    draft.placeholder, read = 5, []
    for proposer in proposers:
        proposer.start = lambda prompt, watch: read.append(prompt)
    start_rows(proposers, prompts, Stopwatch())
    assert read == prompts


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


@pytest.mark.parametrize("room", [192, 2])
@torch.inference_mode()
def test_captured_rows_make_room_as_they_go_on(monkeypatch, room):
    """The cache grows within a text; a single prompt and another batch use it after that."""
    monkeypatch.setattr(fixed, "ROOM", room)
    target, alone = as_decoder(tiny_llama(0).double()), as_decoder(tiny_llama(0).double())
    target.use_steps("graphs")
    for prompts in (PROMPTS[:2], PROMPTS[:1], PROMPTS):
        text = torch.arange(3, 93).view(1, 90) % 60 + 1
        batch = RowBatch(target, target.prefill(prompts), [4] * len(prompts), 100)
        for first in range(0, 90, 30):
            found = batch.step(text[:, first : first + 30].expand(len(prompts), -1))
            batch.lengths = [n + 30 for n in batch.lengths]
        for row, prompt in enumerate(prompts):
            wanted = alone.step(alone.prefill([prompt]), text)[0, -30:]
            torch.testing.assert_close(found[row], wanted, **CLOSE["graphs"])
        single = target.step(target.prefill([PROMPTS[2]]), text[:, :5])
        torch.testing.assert_close(single, alone.step(alone.prefill([PROMPTS[2]]), text[:, :5]), **CLOSE["graphs"])


@torch.inference_mode()
def test_captured_rows_never_synchronize_with_the_device():
    target, alone = as_decoder(tiny_llama(0).double()), as_decoder(tiny_llama(0).double())
    target.use_steps("graphs")
    batch = RowBatch(target, target.prefill(PROMPTS), [4, 4, 4], 20)
    cache, ids = target.fixed_cache, torch.tensor([[5, 6], [7, 8], [9, 10]])
    cache._step = torch.compile(cache._forward, fullgraph=True, dynamic=False, backend="eager")  # a read would break the graph
    for row, found in enumerate(batch.step(ids)):
        torch.testing.assert_close(found, alone.step(alone.prefill([PROMPTS[row]]), ids[row : row + 1])[0], **CLOSE["graphs"])


def test_finished_rows_leave_at_once_or_in_halves_where_steps_are_captured():
    for steps, wanted in (("eager", [False, True, True, True]), ("graphs", [False, False, True, True])):
        target = as_decoder(tiny_llama(0))
        target.use_steps(steps)
        batch = RowBatch(target, target.prefill([*PROMPTS, PROMPTS[0]]), [4, 4, 4, 4], 20)
        assert [batch.should_drop(finished) for finished in range(4)] == wanted


@torch.inference_mode()
def test_captured_graphs_are_dropped_only_for_more_rows_or_a_longer_text():
    target = as_decoder(tiny_llama(0))
    target.use_steps("graphs")
    graphs = []
    long = [prompt_of(1, *[5] * 400)]
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[:2], long, PROMPTS, [*PROMPTS, PROMPTS[0]], long, PROMPTS[:2]):
        state = target.prefill(prompts)
        RowBatch(target, state, [state.length] * len(prompts), 20)
        graphs.append(target.fixed_cache._step)
    new = [i == 0 or graph is not graphs[i - 1] for i, graph in enumerate(graphs)]
    assert new == [True, False, False, True, False, True, False, False]


class WellKnown(Proposer):
    """Drafts a text that it knows, until its end; if it is slow, every other token is wrong."""

    def __init__(self, text: list[int], slow: bool) -> None:
        self.text, self.slow = text, slow

    def start(self, prompt, watch):
        pass

    def propose(self, emitted, states, num_tokens, watch, confidence_floor=0.0):
        assert len(emitted) < len(self.text)
        drafts = self.text[len(emitted) :][:num_tokens]
        return Draft(torch.tensor([1 if self.slow and i % 2 else token for i, token in enumerate(drafts)], dtype=torch.long))


@pytest.mark.parametrize("most", [3, 20])
def test_texts_of_captured_batches_are_those_of_plain_decoding(most, monkeypatch):
    """Rows that have ended stay for a while, and change nothing; the drafts are made as on a GPU."""
    target, proposers = chained(6)
    prompts = [*PROMPTS, prompt_of(1, 11, 12, 13), prompt_of(1, 14, 15, 16), prompt_of(1, 17, 18, 19)]
    whole = [greedy(target, p, 20).token_ids for p in prompts]
    target.eos_ids = frozenset({whole[0][3], whole[1][7], whole[2][15]})
    wanted = [greedy(target, p, most).token_ids for p in prompts]
    assert len({len(text) for text in wanted}) > 1 or most == 3
    target.use_steps("graphs")
    sizes, step = [], RowBatch.step
    monkeypatch.setattr(RowBatch, "step", lambda self, ids: (sizes.append(len(ids)), step(self, ids))[1])
    for proposer in proposers:
        proposer._drafts_blocks = True
    proposers[0].start(prompts[0], Stopwatch())
    with torch.inference_mode():
        context, memory = proposers[0].event_context, torch.zeros(1, 16).double()
        assert proposers[0].draft_rows(memory, context, 5).tolist() == proposers[0].chain.draft(memory, context, 5).tokens.tolist()
    for drafters in (proposers, [WellKnown(text, slow=i != 3) for i, text in enumerate(wanted)]):
        got = speculate_batch(target, drafters, prompts, prompts, num_draft_tokens=3, max_new_tokens=most)
        assert got.token_ids == wanted
    assert set(sizes) <= {6, 3, 2, 1}
