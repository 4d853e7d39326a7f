"""Adaptive draft length, with costs made up: what the controller decides, never how fast this machine is."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from conftest import as_decoder, noisy_copy, prompt_of, tiny_llama

from feature_alignment.decoding.draft_length import FIRST_FLOOR, GOOD, SHARE, DraftLengthController
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.generation import DRAFT_STAGES
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.proposers import ModelProposer


def decode(
    controller,
    chance,
    draft_ms,
    passes=600,
    prompts=None,
    most=16,
    verify_ms=1.4,
    pass_ms=1.0,
    prefill_ms=0.0,
    length=30,
    slow=lambda i: 1.0,
    has_confidence=True,
    more_ms=0.02,
):
    """Made-up decoding: every draft is right by `chance`, which the drafter knows, or does not. The target reads a prompt in 12 passes'
    time. Goes on for so many passes, or to the end of so many prompts.
    Returns tokens, milliseconds without the target's prompts, rounds with drafts."""
    r, tokens, ms, rounds, left, begun, started, i = random.Random(0), 0, 0.0, 0, 0, 0, False, 0
    while i < passes if prompts is None else left > 0 or begun < prompts:
        if left <= 0:
            left, begun, started = length, begun + 1, controller.needs_prefill or not prefill_ms
            controller.record_prefill(12 * pass_ms)
            if started:
                controller.record_draft_prefill(prefill_ms)
                ms += prefill_ms
        floor, g, kept, p = controller.next_confidence_floor(), 0, 0, 1.0
        if floor is not None:
            if not started:
                controller.record_draft_prefill(prefill_ms)
                ms, started = ms + prefill_ms, True
            while g < min(most, controller.max_draft_tokens(floor, has_confidence)) and (p >= floor or not has_confidence):
                g, p = g + 1, p * chance
            while kept < g and r.random() < chance:
                kept += 1
        emitted = kept + 1 if g else min(controller.plain_steps, max(left, 1))
        drafting, other = g * draft_ms * slow(i), (verify_ms + more_ms * g if g else pass_ms * emitted) * slow(i)
        controller.record_round(g, emitted, drafting, other)
        tokens, ms, rounds, left, i = tokens + emitted, ms + drafting + other, rounds + (g > 0), left - emitted, i + 1
    return tokens, ms, rounds


def test_cheap_drafts_known_to_be_good_are_always_wanted():
    tokens, ms, rounds = decode(DraftLengthController(0.95), chance=0.95, draft_ms=0.06, prefill_ms=2.0)
    assert rounds >= 599 and tokens / ms > 3  # one pass without drafts, to know what they are compared with


@pytest.mark.parametrize("prefill_ms", [0.0, 2.0, 12.0])
def test_cheap_good_drafts_are_soon_found(prefill_ms):
    """Of a drafter of which nothing is known: once a share of the target's time has paid for its prompt and a round."""
    controller, passes = DraftLengthController(), 0
    while not decode(controller, 0.95, 0.06, passes=1, prefill_ms=prefill_ms, length=1)[2]:
        passes += 13  # each of these prompts is read in twelve passes and answered in one
    assert passes <= 13 + (1 + (12 if prefill_ms else 0)) / SHARE
    assert decode(controller, 0.95, 0.06, prefill_ms=prefill_ms)[2] > 550


@pytest.mark.parametrize("acceptance", [None, 0.9])
@pytest.mark.parametrize(("chance", "draft_ms", "prefill_ms"), [(0.9, 1.0, 4.0), (0.05, 0.01, 0.0), (0.3, 0.2, 1.0), (0.6, 0.8, 2.0)])
def test_what_does_not_pay_is_given_up_at_little_loss(chance, draft_ms, prefill_ms, acceptance):
    tokens, ms, rounds = decode(DraftLengthController(acceptance), chance, draft_ms, passes=3000, prefill_ms=prefill_ms)
    assert ms < 1.03 * tokens and rounds < 0.06 * tokens


@pytest.mark.parametrize("chance", [0.7, 0.85, 0.95])
@pytest.mark.parametrize("draft_ms", [0.02, 0.06, 0.2])
def test_it_is_about_as_good_as_the_best_fixed_length(chance, draft_ms):
    fixed = max((1 - chance ** (g + 1)) / (1 - chance) / (g * draft_ms + 1.4 + 0.02 * g) for g in range(1, 17))
    tokens, ms, _ = decode(DraftLengthController(), chance, draft_ms, passes=4000)
    assert tokens / ms > 0.95 * max(fixed, 1)


@pytest.mark.parametrize("prompts", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize(("chance", "draft_ms", "prefill_ms"), [(0.05, 0.02, 0.0), (0.3, 0.8, 4.0), (0.5, 0.8, 12.0), (0.0, 1.0, 12.0)])
def test_a_drafter_of_which_nothing_is_known_loses_little_from_the_first_prompt_on(chance, draft_ms, prefill_ms, prompts):
    """Prompts of 30 tokens: never 3 % slower than the target alone, its drafter's prompts included."""
    tokens, ms, _ = decode(DraftLengthController(), chance, draft_ms, prompts=prompts, prefill_ms=prefill_ms)
    assert tokens >= 30 * prompts and ms + 12 * prompts < 1.03 * (tokens + 12 * prompts)


@pytest.mark.parametrize("prompts", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize("chance", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("more_ms", [0.02, 0.1])
def test_a_table_that_knows_nothing_loses_little(chance, more_ms, prompts):
    """Its drafts cost nothing to make, each a tenth of a pass to verify, and it would make as many as it is asked for."""
    table = {"has_confidence": False, "most": 24, "verify_ms": 1.1, "more_ms": more_ms}
    tokens, ms, _ = decode(DraftLengthController(), chance, 0.02, prompts=prompts, **table)
    assert ms + 12 * prompts < 1.03 * (tokens + 12 * prompts)


@pytest.mark.parametrize("chance", [0.6, 0.8, 0.95])
@pytest.mark.parametrize("more_ms", [0.02, 0.1])
def test_a_table_is_asked_for_about_as_many_drafts_as_pay(chance, more_ms):
    table = {"has_confidence": False, "most": 24, "verify_ms": 1.1, "more_ms": more_ms}
    best = max((1 - chance ** (g + 1)) / (1 - chance) / (g * (0.02 + more_ms) + 1.1) for g in range(1, 25))
    tokens, ms, _ = decode(DraftLengthController(), chance, 0.02, passes=4000, **table)
    assert tokens / ms > 0.93 * best


@pytest.mark.parametrize(("chance", "verify_ms"), [(0.7, 3.2), (0.75, 3.5), (0.65, 2.8)])
def test_good_drafts_that_are_dear_to_verify_are_given_up(chance, verify_ms):
    """More than two tokens a verification, which takes longer than as many passes."""
    tokens, ms, _ = decode(DraftLengthController(0.9), chance, 0.05, passes=3000, verify_ms=verify_ms)
    assert ms < 1.03 * tokens


def test_a_machine_that_becomes_faster_is_no_merit_of_a_drafter_without_ideas():
    """It is asked before each token, and has an idea at every tenth, a wrong one. The machine is slow at first, when it is first tried."""
    controller, r, lost, tokens, rounds = DraftLengthController(), random.Random(0), 0.0, 0, 0
    for i in range(6000):
        pass_ms = 1.4 if i < 200 else 1.0
        asked, idea = controller.next_confidence_floor() is not None, r.random() < 0.1
        drafts, emitted = (2, 1) if asked and idea else (0, 1 if asked else controller.plain_steps)
        other = (1.3 if drafts else emitted) * pass_ms
        controller.record_round(drafts, emitted, 0.02 * asked * pass_ms, other)
        lost, tokens = lost + other - emitted * pass_ms + 0.02 * asked * pass_ms, tokens + emitted
        rounds += drafts > 0
    assert rounds and lost < 0.02 * tokens


def test_drafts_that_seem_good_on_and_off_lose_little():
    """Good for 200 tokens, then useless for as many, and again: what is put aside was earned."""
    controller, tokens, ms = DraftLengthController(), 0, 0.0
    for i in range(200):
        found = decode(controller, (0.9, 0.02)[i % 2], 0.1, passes=40)
        tokens, ms = tokens + found[0], ms + found[1]
    assert ms < 0.9 * tokens


def test_a_slow_moment_is_not_held_against_drafting():
    r = random.Random(1)
    _, _, rounds = decode(DraftLengthController(), 0.85, 0.2, slow=lambda i: 30.0 if r.random() < 0.03 else 1.0 + (i // 100) % 2)
    assert rounds > 450


def test_what_pays_again_is_found_again():
    controller = DraftLengthController()
    tokens, _, rounds = decode(controller, 0.05, 0.2)
    assert rounds < 0.05 * tokens
    _, _, rounds = decode(controller, 0.95, 0.06, passes=2000)
    assert controller.needs_prefill and rounds > 1000


@pytest.mark.parametrize("noise", [0.0, 0.05, 1.0])
@torch.inference_mode()
def test_text_and_trace_with_a_pace(noise):
    """The text is greedy's, whatever the clock says, through giving up and trying again; a trace says why each round stopped."""
    model = tiny_llama(0)
    target, controller = as_decoder(model), DraftLengthController(0.9)
    proposer, reasons = ModelProposer(as_decoder(noisy_copy(model, noise)), None, None), set()
    for i in range(3, 15):
        prompt = prompt_of(1, 5, 9, i)
        got = speculate(target, proposer, prompt, prompt, num_draft_tokens=4, max_new_tokens=30, controller=controller)
        assert got.token_ids == greedy(target, prompt, 30).token_ids
        reasons |= {r.stop_reason for r in got.rounds}
        for r in got.rounds:
            assert (r.stop_reason == "off") == (r.proposed == []) and (r.stop_reason != "length" or len(r.proposed) <= 4)
        if i == 8:  # four drafts that took an hour, none of them kept, until that is enough
            for _ in range(9):
                controller.record_round(0, 1, 0.0, 1.0)
                controller.record_round(4, 1, 3.6e6, 1.0)
            assert not controller.needs_prefill
    assert "off" in reasons and len(reasons) > 1


class Listener(DraftLengthController):
    """Drafts every second time, and keeps what it is told: number of draft tokens, of emitted tokens, ms of drafting and of the rest."""

    def __init__(self):
        super().__init__(0.9)
        self.reports, self.floors = [], itertools.cycle([0.0, None])

    def next_confidence_floor(self):
        return next(self.floors)

    def record_round(self, *report):
        self.reports.append(report)


@torch.inference_mode()
def test_the_controller_is_told_what_drafting_took():
    """With draft tokens: the stages of drafting. Without: all but what the target takes, such as asking for draft tokens in vain."""
    model, controller, drafted = tiny_llama(0), Listener(), []
    target, proposer = as_decoder(model), ModelProposer(as_decoder(model), None, None)
    for i in range(3, 9):
        prompt = prompt_of(1, 5, 9, i)
        got = speculate(target, proposer, prompt, prompt, num_draft_tokens=4, max_new_tokens=30, controller=controller)
        drafted += [r for r in got.rounds if r.proposed]
    reports = [(draft_ms, other) for g, _, draft_ms, other in controller.reports if g]
    plain = [(draft_ms, other) for g, _, draft_ms, other in controller.reports if not g]
    assert len(reports) == len(drafted) > 3 and plain
    for r, (draft_ms, other) in zip(drafted, reports, strict=True):
        assert draft_ms == pytest.approx(sum(r.ms.get(stage, 0.0) for stage in DRAFT_STAGES), rel=1e-6)
        assert other >= r.ms["verify"]
    assert all(draft_ms > 0 and other > 0 for draft_ms, other in plain)


def test_a_drafter_of_which_nothing_is_known_waits_until_its_prompt_and_a_poor_round_are_paid_for(monkeypatch):
    """A pass takes 1 ms and the prompt 4: it is tried when the share of all passes and prompts comes to 4 + 1/2 passes."""
    monkeypatch.setattr("feature_alignment.decoding.draft_length.SHARE", 1 / 64)  # sums of it are exact
    controller = DraftLengthController()
    controller.record_round(0, 1, 0.0, 1.0)
    controller.record_prefill(4.0)
    left = int((4.5 - 4 / 64) * 64)
    assert not controller.needs_prefill and controller.next_confidence_floor() is None and SHARE == 1 / 80
    for i in range(left):
        assert not controller.needs_prefill and controller.plain_steps == left - i
        controller.record_round(0, 1, 0.0, 1.0)
    assert controller.needs_prefill and controller.next_confidence_floor() == FIRST_FLOOR and controller.plain_steps == 1


def test_a_good_drafter_begins_at_once_and_reads_its_first_prompt_on_trust():
    for acceptance in (GOOD, 1.0):
        controller = DraftLengthController(acceptance)
        controller.record_round(0, 1, 0.0, 1.0)
        controller.record_prefill(4.0)
        assert controller.needs_prefill and controller.next_confidence_floor() == FIRST_FLOOR
        controller.record_draft_prefill(3.0)
        assert controller.needs_prefill and controller.max_draft_tokens(0.5) > 10**6
    assert not DraftLengthController(GOOD - 0.01).needs_prefill and DraftLengthController().max_draft_tokens(0.5) == 1


@pytest.mark.parametrize(("floor", "most"), [(0.9, 1), (0.5, 1), (0.25, 2), (0.13, 2), (0.12, 3), (0.1, 3), (0.0, 29)])
def test_a_table_is_first_asked_for_what_even_chances_are_worth(floor, most):
    assert DraftLengthController().max_draft_tokens(floor, has_confidence=False) == most


def test_the_floor_is_what_a_draft_costs_in_tokens():
    """Two rounds of 4 drafts at 0.05 ms, 1.3 ms to verify, and plain passes of 1 ms: 5 tokens in 1.5 ms, and each draft costs 0.05."""
    controller = DraftLengthController(1.0)
    controller.record_prefill(4.0)
    controller.record_draft_prefill(2.0)
    for _ in range(3):
        controller.record_round(0, 1, 0.0, 1.0)
    for _ in range(2):
        controller.record_round(4, 5, 4 * 0.05, 1.3)
    assert controller.next_confidence_floor() == pytest.approx(5 / 1.5 * 0.05)
    controller.record_round(2, 1, 2 * 0.05, 1.2)  # two drafts fewer were verified 0.1 ms sooner: one more takes 0.05
    tokens, ms = ((0.9 * 5 + 5) * 0.9 + 1), ((0.9 * 1.5 + 1.5) * 0.9 + 1.3)
    assert controller.next_confidence_floor() == pytest.approx(tokens / ms * (0.05 + 0.05))
