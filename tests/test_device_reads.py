"""How often decoding reads a value from the device. On a GPU each read waits for everything queued before it."""

from __future__ import annotations

import pytest
import torch
from conftest import as_decoder, noisy_copy, prompt_of, tiny_llama

from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.decoding.chained_proposer import ChainedProposer
from feature_alignment.decoding.draft_length import DraftLengthController
from feature_alignment.decoding.engine import Speculation
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.decoding.token_selection import TokenSelector
from feature_alignment.models.generation import GenerationRules

PROMPT = prompt_of(1, 5, 9, 13)
READS = ("tolist", "item", "cpu", "numpy", "__int__", "__float__", "__bool__", "__index__", "__iter__", "__contains__")


class Always(DraftLengthController):
    """Drafts in every round, down to this chance."""

    def __init__(self, floor: float) -> None:
        super().__init__(0.9)
        self.floor = floor

    def next_confidence_floor(self):
        return self.floor

    def max_draft_tokens(self, confidence_floor, has_confidence=True):
        return 24


@pytest.fixture
def reads(monkeypatch):
    """The reads so far, by name of the method."""
    found: list[str] = []

    def counted(name):
        original = getattr(torch.Tensor, name)

        def read(self, *args, **kwargs):
            found.append(name)
            return original(self, *args, **kwargs)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    return found


def rounds_of(reads, controller=None):
    """Reads of each round of a speculative text, and the text."""
    torch.manual_seed(0)
    model = tiny_llama(0)
    target, draft = as_decoder(model), as_decoder(noisy_copy(model, 0.1))
    proposer = ChainedProposer(draft, ChainedAdapter(32, 32, 1, 16).eval(), target.head_weight, target.embeddings)
    proposer._drafts_blocks = True  # as on a GPU
    speculation = Speculation(target, proposer, PROMPT, 40, "token", 0.9, 6, None, controller, cosines=False)
    speculation.prefill(PROMPT)
    found = []
    while not speculation.is_finished:
        before, rounds = len(reads), len(speculation.rounds)
        speculation.advance()
        if len(speculation.rounds) > rounds:  # not the last token, for which there is no room to draft
            found.append(reads[before:])
    assert len(found) > 5
    return found, speculation.finish().token_ids, greedy(target, PROMPT, 40).token_ids


def test_a_round_of_a_fixed_length_reads_the_device_once(reads):
    found, text, wanted = rounds_of(reads)
    assert text == wanted and {len(r) for r in found} == {1}, found


@pytest.mark.parametrize("floor", [1e-9, 0.2])
def test_a_round_of_an_adaptive_length_reads_the_device_twice(reads, floor):
    found, text, wanted = rounds_of(reads, Always(floor))
    assert text == wanted and {len(r) for r in found} == {2}, found


@pytest.mark.parametrize("floor", [0.0, 1e-9, 0.05, 0.3])
@torch.inference_mode()
def test_a_block_cut_at_the_floor_is_what_drafting_token_by_token_gives(floor):
    torch.manual_seed(1)
    model = tiny_llama(1)
    target, draft = as_decoder(model), as_decoder(noisy_copy(model, 0.1))
    adapter = ChainedAdapter(32, 32, 1, 16).eval()
    states, found = torch.randn(4, 32), []
    for blocks in (False, True):
        proposer = ChainedProposer(draft, adapter, target.head_weight, target.embeddings)
        proposer._drafts_blocks, proposer._last_length = blocks, 16
        proposer.start(PROMPT, watch := Stopwatch())
        first = proposer.propose([4, 5, 6, 7], states, 9, watch, floor)
        ahead = [4, 5, 6, 7, *first.token_ids[:2].tolist(), 11]
        second = proposer.propose(ahead, states, 5, watch, floor)  # a table has replaced the third draft token
        found.append((first, second))
    for one, block in zip(*found, strict=True):
        assert one.token_ids.tolist() == block.token_ids.tolist()
        torch.testing.assert_close(one.predicted(), block.predicted())
        assert one.logits().shape == (len(one.token_ids), 64)
        torch.testing.assert_close(one.logits(), block.logits())
        if floor:
            assert one.confidence == pytest.approx(block.confidence, rel=1e-5)


def a_proposer(ids=None, blocks=False):
    """That has begun a text."""
    torch.manual_seed(1)
    target = as_decoder(tiny_llama(1))
    proposer = ChainedProposer(target, ChainedAdapter(32, 32, 1, 16).eval(), target.head_weight, target.embeddings, ids)
    proposer._drafts_blocks = blocks
    proposer.start(PROMPT, Stopwatch())
    return proposer, torch.randn(4, 32)


@torch.inference_mode()
def test_a_block_has_one_of_few_lengths_at_least_twice_the_last_draft():
    """At first 16. Where every token is certain all are drafted; where none is, the first alone."""
    proposer, states = a_proposer(blocks=True)
    draft_block, lengths, watch = proposer._confident_block, [], Stopwatch()

    def block(tip, zeros):
        lengths.append(len(zeros))
        *rest, confidence = draft_block(tip, zeros)
        return *rest, torch.full_like(confidence, certainty)

    proposer._confident_block = block
    calls = [(1.0, 99, 16), (1.0, 99, 32), (1.0, 5, 5), (1.0, 99, 16), (0.0, 99, 32), (0.0, 99, 4), (0.0, 3, 3), (1.0, 99, 4), (1.0, 99, 8)]
    for certainty, asked, length in calls:
        draft = proposer.propose([4, 5, 6, 7], states, asked, watch, 0.5)
        assert lengths.pop() == length and len(draft.token_ids) == len(draft.confidence) == (length if certainty else 1)


@pytest.mark.parametrize(("blocks", "floor"), [(False, 0.0), (False, 1e-30), (True, 1e-30)])
@pytest.mark.parametrize("ids", [None, torch.arange(2, 64, 3)])
@torch.inference_mode()
def test_nothing_is_drafted_after_the_end_of_a_text(blocks, floor, ids):
    """And a drafter of some ids has no distribution over all of them."""
    proposer, states = a_proposer(ids, blocks)
    asked = [4, 5, 6, 7], states, 9, Stopwatch(), floor
    whole = proposer.propose(*asked).token_ids.tolist()
    assert len(whole) == 9 and (ids is None or {*whole} <= {*ids.tolist()})
    end = whole[3]
    proposer.selector = TokenSelector(GenerationRules({end, 1}))
    draft = proposer.propose(*asked)
    assert draft.token_ids.tolist() == whole[: whole.index(end) + 1]
    assert (draft.logits is None) == (ids is not None)


def test_later_prompts_fill_the_buffers_that_a_captured_draft_reads():
    torch.manual_seed(0)
    draft = as_decoder(tiny_llama(0))
    proposer = ChainedProposer(draft, ChainedAdapter(32, 32, 1, 16).eval(), draft.head_weight, draft.embeddings)
    proposer.start(PROMPT, Stopwatch(torch.device("cpu")))
    buffers, first = proposer.event_context, [buffer.clone() for buffer in proposer.event_context]
    proposer.start(prompt_of(2, 6, 3, 1), Stopwatch(torch.device("cpu")))
    assert all(now is then for now, then in zip(proposer.event_context, buffers, strict=True))
    fresh = ChainedProposer(draft, proposer._adapter, draft.head_weight, draft.embeddings)
    fresh.start(prompt_of(2, 6, 3, 1), Stopwatch(torch.device("cpu")))
    assert all(torch.equal(now, new) for now, new in zip(buffers, fresh.event_context, strict=True))
    assert not torch.equal(buffers[0], first[0]) and not torch.equal(buffers[2], first[2])
