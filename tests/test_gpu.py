"""Tests that need a GPU: captured and compiled steps, and two models that prefill in parallel. Skipped without one."""

from __future__ import annotations

import pytest
import torch
from conftest import as_decoder, noisy_copy, prompt_of, tiny_llama

from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.decoding.batch import speculate_batch
from feature_alignment.decoding.chained_proposer import ChainedProposer
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.proposers import ModelProposer
from feature_alignment.models import fixed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
STEPS = ("graphs", "compiled")


def on_gpu(steps, taps=None, noise=0.0):
    decoder = as_decoder(noisy_copy(tiny_llama(0, layers=3), noise).cuda(), taps)
    decoder.use_steps(steps)
    return decoder


@pytest.fixture(autouse=True)
def all_captured(monkeypatch):
    found: list[str] = []
    monkeypatch.setattr(fixed, "eager_fallbacks", found)
    yield
    assert found == []


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("taps", [None, [1, 3]])
def test_states_are_those_of_eager_steps(steps, taps):
    eager, other = on_gpu("eager", taps), on_gpu(steps, taps)
    for prompt in (prompt_of(1, 5, 9, 3), prompt_of(1, *[7] * 90)):
        a, b = eager.prefill([prompt]), other.prefill([prompt])
        for length in (*fixed.LENGTHS, 3, 1):
            ids = torch.randint(3, 60, (1, length), device="cuda")
            found, wanted = other.step(b, ids), eager.step(a, ids)
            torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)
            eager.rollback(a, length // 2)
            other.rollback(b, length // 2)


@pytest.mark.parametrize("steps", STEPS)
@torch.inference_mode()
def test_texts_are_those_of_plain_decoding(steps):
    target, draft = on_gpu(steps), on_gpu(steps, noise=0.02)
    adapter, chained = HiddenAdapter(32, 32, 8).cuda(), ChainedAdapter(32, 32, 1, width=8).cuda()
    for proposer in (
        ModelProposer(draft, None, None),
        ModelProposer(draft, adapter, target.lm_head),
        ChainedProposer(draft, chained, target.head_weight, target.embeddings),
    ):
        for last in (3, 4):
            prompt = prompt_of(1, 5, 9, last)
            own = greedy(target, prompt, 24).token_ids
            for beside in (False, True):
                found = speculate(target, proposer, prompt, prompt, num_draft_tokens=4, max_new_tokens=24, overlap=beside)
                assert found.token_ids == own
                assert found.total_ms >= found.decode_ms > 0


@pytest.mark.parametrize("steps", STEPS)
@torch.inference_mode()
def test_texts_of_a_batch_are_those_of_plain_decoding(steps):
    target, draft = on_gpu(steps), on_gpu(steps, noise=0.02)
    chained = ChainedAdapter(32, 32, 1, width=8).cuda()
    prompts = [prompt_of(1, 5, 9, last) for last in range(3, 9)]
    own = [greedy(target, prompt, 24).token_ids for prompt in prompts]
    target.eos_ids = frozenset({own[0][5], own[1][11]})
    own = [greedy(target, prompt, 24).token_ids for prompt in prompts]
    proposers = [ChainedProposer(draft, chained, target.head_weight, target.embeddings) for _ in prompts]
    for overlap in (False, True, True):
        found = speculate_batch(target, proposers, prompts, prompts, num_draft_tokens=4, max_new_tokens=24, overlap=overlap)
        assert found.token_ids == own


@torch.inference_mode()
def test_the_drafter_prefills_while_the_target_prefills():
    """On a stream of its own: its reading begins before the target's has ended."""
    target, draft = on_gpu("eager"), on_gpu("eager")
    prompt = prompt_of(1, *[5] * 200)
    proposer = ModelProposer(draft, None, None)
    for _ in range(3):
        found = speculate(target, proposer, prompt, prompt, num_draft_tokens=4, max_new_tokens=8, overlap=True)
    spans = {stage: (begin, end) for stage, begin, end in found.spans if "prefill" in stage}
    assert spans["draft_prefill, overlapped"][0] < spans["target_prefill"][1]


def test_a_garbage_decoder_does_not_invalidate_a_capture():
    for _ in range(3):
        target = on_gpu("graphs")
        greedy(target, prompt_of(1, 5, 9), 8)
        del target
        greedy(on_gpu("graphs"), prompt_of(1, 5, 9), 8)  # `all_captured` looks whether it could be
