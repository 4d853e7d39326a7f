"""What an extraction stores of a batch: for each row what its question alone gives, in every setting."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from conftest import as_decoder, noisy_copy, tiny_llama
from torch.nn import functional as F

from feature_alignment.models.batches import plan_batches
from feature_alignment.models.pair import Pair
from feature_alignment.models.stored_states import StateGeometry, draft_files, shapes_of, states_of

PROMPTS = {"a": [5, 1, 9, 4], "b": [5, 1, 9, 8, 8, 3], "c": [5, 1, 7]}  # question -> ids; 1 stands for vision
SAMPLES = [
    SimpleNamespace(question=question, video=clip, events=clip, event_start_ms=None, event_time_unit=None)
    for clip, question in (("x", "a"), ("x", "b"), ("y", "c"))
]
KNOWN = [([5, 6, 7, 8], [9, 4]), ([7], [3, 3, 3]), ([6, 2], [6, 2])]
P = 4


def answering(decoder):
    decoder._encode_prompt = lambda question: torch.tensor(PROMPTS[question])
    decoder.read_pixels = lambda sample: torch.zeros(1)
    return decoder


@pytest.fixture(scope="module")
def models():
    """Target, the drafter at its full depth and with two tapped layers; their answers differ in length."""
    target = answering(as_decoder(tiny_llama(0, layers=3)))
    drafter = noisy_copy(tiny_llama(0, layers=3), 0.3)
    target.eos_ids = frozenset({alone(target, SAMPLES[0], 9)[2]})
    target.restrict_vocabulary(60)
    return target, answering(as_decoder(drafter)), answering(as_decoder(drafter, [1, 2]))


def prefilled(model, sample):
    return model.prefill([model.prepare(sample)])


def alone(model, sample, most):
    return model.generate(prefilled(model, sample), most)[0]


def forced(model, sample, text):
    return model.teacher_force(prefilled(model, sample), torch.tensor([text]))[0]


def settings(**changed):
    usual = {"prefix": "verifier", "max_new_tokens": 7, "max_positions": None, "separate_layers": False}
    return SimpleNamespace(**usual | {"prompt_states": P, "draft_answers": True, "own_drafts": True} | changed)


def in_front(states):
    """The last P rows, with zeros in front."""
    return F.pad(states[-P:], (0, 0, max(0, P - len(states)), 0))


@pytest.mark.parametrize(("prefix", "most"), product(("verifier", "drafter", "own"), (None, 2)))
@pytest.mark.parametrize("known", [KNOWN, [KNOWN[0], None, KNOWN[2]]])
@torch.inference_mode()
def test_every_row_has_what_its_question_alone_gives(models, prefix, most, known):
    target, full, draft = models
    rows = list(states_of(Pair(target, draft), full, SAMPLES, known, settings(prefix=prefix, max_positions=most), True))
    close = lambda a, b: torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)  # noqa: E731
    for sample, pair_of_answers, row in zip(SAMPLES, KNOWN, rows, strict=True):
        vl, egpt = pair_of_answers if known is KNOWN else (alone(target, sample, 7), alone(full, sample, 7))
        assert (row.vl_tokens, row.egpt_tokens) == (vl, egpt)
        target_reads, draft_reads = {"verifier": (vl, vl), "drafter": (egpt, egpt), "own": (vl, egpt)}[prefix]
        target_reads, draft_reads = target_reads[:most], draft_reads[:most]
        n = min(len(target_reads), len(draft_reads))
        assert row.token_ids == target_reads[:n] and row.read == target_reads
        assert set(row.files) == {*(f"{name}.pt" for name in ("egpt_hidden_states", "vl_hidden_states", "egpt_event_states")), *PROMPT}
        close(row.files["egpt_hidden_states.pt"], forced(draft, sample, draft_reads)[:n])
        close(row.files["vl_hidden_states.pt"], forced(target, sample, target_reads)[:n])
        state, ids = prefilled(target, sample), PROMPTS[sample.question]
        close(row.files["vl_prompt_states.pt"], in_front(state.prompt[0, :-1]))
        close(row.files["vl_prompt_inputs.pt"], in_front(state.inputs[0]))
        close(row.files["egpt_event_states.pt"], draft.vision_states(torch.tensor([ids]), torch.zeros(1, 1))[0])
        drafts = full.lm_head(forced(full, sample, draft_reads)).argmax(-1).tolist()
        assert row.about == {"prompt_ids": [-1 if i == 1 else i for i in ids[-P - 1 :]], "egpt_drafts": drafts[:n]}


PROMPT = ("vl_prompt_states.pt", "vl_prompt_inputs.pt")


@torch.inference_mode()
def test_what_is_not_asked_for_is_not_stored(models):
    target, full, draft = models
    cfg = settings(prompt_states=0, draft_answers=False, own_drafts=False, separate_layers=True)
    layers = {"egpt_hidden_states.layer01.pt", "egpt_hidden_states.layer02.pt"}
    for sample, row in zip(SAMPLES, states_of(Pair(target, draft), full, SAMPLES, [None] * 3, cfg, False), strict=True):
        assert set(row.files) == {*layers, "vl_hidden_states.pt"} and row.about == {} and row.egpt_tokens == []
        parts = [row.files[name] for name in sorted(layers)]
        torch.testing.assert_close(torch.cat(parts, -1), forced(draft, sample, row.token_ids), atol=2e-5, rtol=1e-4)
    whole = list(states_of(Pair(target, full), full, SAMPLES, KNOWN, settings(), False))  # the pair's drafter is the full one
    torch.testing.assert_close(whole[0].files["egpt_hidden_states.pt"], forced(full, SAMPLES[0], KNOWN[0][0]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("separate", "events", "prompt"), product((False, True), (False, True), (0, 3)))
def test_shapes_are_those_of_the_stored_states(models, separate, events, prompt):
    target, full, draft = models
    cfg = settings(separate_layers=separate, prompt_states=prompt)
    (row,) = states_of(Pair(target, draft), full, SAMPLES[:1], KNOWN[:1], cfg, events)
    geometry = StateGeometry.of(Pair(target, draft))
    assert geometry == ((1, 2), 32, 1, 32)
    assert shapes_of(geometry, 4, separate, events, prompt) == {name: tuple(states.shape) for name, states in row.files.items()}


def test_layers_have_files_of_their_own_in_their_order():
    hidden = torch.arange(12.0).view(2, 6)
    assert list(draft_files([2, 5, 11], hidden, False)) == ["egpt_hidden_states.pt"]
    found = draft_files([2, 5, 11], hidden, True)
    assert {name: part.tolist() for name, part in found.items()} == {
        f"egpt_hidden_states.layer{k}.pt": hidden[:, 2 * i : 2 * i + 2].tolist() for i, k in enumerate(("02", "05", "11"))
    }


@pytest.mark.parametrize(
    ("clips", "size", "plan"),
    [
        ("xxyy", 4, [(0, 4)]),
        ("xxyy", 3, [(0, 2), (2, 4)]),
        ("xxxxy", 2, [(0, 2), (2, 4), (4, 5)]),
        ("xyyyz", 3, [(0, 1), (1, 4), (4, 5)]),
        ("xyz", 2, [(0, 2), (2, 3)]),
        ("", 3, []),
    ],
)
def test_a_batch_ends_at_the_last_clip_that_fits(clips, size, plan):
    samples = [SimpleNamespace(video=c, events=c, event_start_ms=None, event_time_unit=None) for c in clips]
    assert plan_batches(samples, size) == [range(*part) for part in plan]
