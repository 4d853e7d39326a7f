"""Adaptive draft length, with costs made up: what the pace decides, never how fast this machine is."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import as_decoder, noisy_copy, prompt_of, tiny_llama

from feature_alignment.decoding.engine import greedy, speculate
from feature_alignment.decoding.pace import Pace
from feature_alignment.decoding.proposers import ModelProposer


def decode(pace, chance, draft_ms, passes=600, most=16, verify_ms=1.4, pass_ms=1.0, prefill_ms=0.0, length=30, slow=lambda i: 1.0):
    """Made-up decoding: every draft is right by `chance`, which the drafter knows. Returns tokens, milliseconds, rounds with drafts."""
    r, tokens, ms, rounds, left, started = random.Random(0), 0, 0.0, 0, 0, False
    for i in range(passes):
        if left <= 0:
            left, started = length, pace.drafting
            if started:
                pace.started(prefill_ms)
                ms += prefill_ms
        floor, g, kept, p = pace.next_floor(), 0, 0, 1.0
        if floor is not None:
            if not started:
                pace.started(prefill_ms)
                ms, started = ms + prefill_ms, True
            while g < most and p >= floor:
                g, p = g + 1, p * chance
            while kept < g and r.random() < chance:
                kept += 1
        emitted = kept + 1 if g else min(pace.rest, max(left, 1))
        drafting, other = g * draft_ms * slow(i), (verify_ms + 0.02 * g if g else pass_ms * emitted) * slow(i)
        pace.passed(g, emitted, drafting, other)
        tokens, ms, rounds, left = tokens + emitted, ms + drafting + other, rounds + (g > 0), left - emitted
    return tokens, ms, rounds


def test_cheap_good_drafts_are_always_wanted():
    tokens, ms, rounds = decode(Pace(), chance=0.95, draft_ms=0.06)
    assert rounds == 600 and tokens / ms > 3


@pytest.mark.parametrize(("chance", "draft_ms", "prefill_ms"), [(0.9, 1.0, 4.0), (0.05, 0.01, 0.0), (0.3, 0.2, 1.0), (0.6, 0.8, 2.0)])
def test_what_does_not_pay_is_given_up_at_little_loss(chance, draft_ms, prefill_ms):
    tokens, ms, rounds = decode(Pace(), chance, draft_ms, passes=3000, prefill_ms=prefill_ms)
    assert ms < 1.03 * tokens and rounds < 0.05 * tokens


@pytest.mark.parametrize("chance", [0.7, 0.85, 0.95])
@pytest.mark.parametrize("draft_ms", [0.02, 0.06, 0.2])
def test_it_is_about_as_good_as_the_best_fixed_length(chance, draft_ms):
    fixed = max((1 - chance ** (g + 1)) / (1 - chance) / (g * draft_ms + 1.4 + 0.02 * g) for g in range(1, 17))
    tokens, ms, _ = decode(Pace(), chance, draft_ms, passes=4000)
    assert tokens / ms > 0.95 * max(fixed, 1)


def test_a_useless_drafter_loses_little_on_few_prompts():
    """Eight prompts of 30 tokens, a prefill of 12 passes each for the target: what is lost, the drafter's first prompt included."""
    for chance, draft_ms, prefill_ms in ((0.05, 0.02, 0.0), (0.3, 0.8, 4.0), (0.5, 0.8, 4.0)):
        tokens, ms, _ = decode(Pace(), chance, draft_ms, passes=120, prefill_ms=prefill_ms)
        prompts = -(-tokens // 30)
        assert ms + 12 * prompts < (1.03 + prefill_ms / 100) * (tokens + 12 * prompts)


def test_a_slow_moment_is_not_held_against_drafting():
    r = random.Random(1)
    _, _, rounds = decode(Pace(), 0.85, 0.2, slow=lambda i: 30.0 if r.random() < 0.03 else 1.0 + (i // 100) % 2)
    assert rounds > 450


def test_what_pays_again_is_found_again():
    pace = Pace()
    tokens, _, rounds = decode(pace, 0.05, 0.2)
    assert rounds < 0.03 * tokens
    _, _, rounds = decode(pace, 0.95, 0.06, passes=2000)
    assert pace.drafting and rounds > 1000


@pytest.mark.parametrize("noise", [0.0, 0.05, 1.0])
@torch.inference_mode()
def test_text_and_trace_with_a_pace(noise):
    """The text is greedy's, whatever the clock says, through giving up and trying again; a trace says why each round stopped."""
    model = tiny_llama(0)
    target, pace = as_decoder(model), Pace()
    proposer, reasons = ModelProposer(as_decoder(noisy_copy(model, noise)), None, None), set()
    for i in range(3, 15):
        prompt = prompt_of(1, 5, 9, i)
        got = speculate(target, proposer, prompt, prompt, num_draft_tokens=4, max_new_tokens=30, pace=pace)
        assert got.token_ids == greedy(target, prompt, 30).token_ids
        reasons |= {r.stopped for r in got.rounds}
        for r in got.rounds:
            assert (r.stopped == "off") == (r.proposed == []) and (r.stopped != "length" or len(r.proposed) <= 4)
        if i == 8:
            pace._credit, pace._wait, pace._resting = 0.0, 40.0, True  # given up
    assert "off" in reasons and len(reasons) > 1
