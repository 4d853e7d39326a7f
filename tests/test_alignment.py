"""Same prefix or no comparison: state t emits token t, in extraction as in decoding, and a shift by one cannot pass."""

from __future__ import annotations

import torch
from conftest import EOS, as_decoder, noisy_copy, prompt_of, tiny_llama

from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.proposers import ModelProposer
from feature_alignment.measurement import metrics

PROMPTS = [(1, 5, 9), (1, 40, 3), (1, 7, 20)]


def force_batch(decoder, state, answers):
    width = max(map(len, answers))
    return decoder.teacher_force(state, torch.tensor([[*a, *[0] * (width - len(a))] for a in answers]))


def extracted(decoder, limit=16):
    state = decoder.prefill([prompt_of(*p) for p in PROMPTS])
    answers = decoder.generate(state, limit)
    return answers, force_batch(decoder, state, answers)


def emission_agreement(decoder, answers, hidden) -> float:
    """Share of positions whose state emits its own token: 1 for the states of a greedy text, by definition."""
    pairs = [(int(decoder.lm_head(hidden[i, t]).argmax()), token) for i, answer in enumerate(answers) for t, token in enumerate(answer)]
    return sum(a == b for a, b in pairs) / len(pairs)


def test_each_state_emits_its_own_token():
    decoder = as_decoder(tiny_llama(0))
    answers, hidden = extracted(decoder)
    assert emission_agreement(decoder, answers, hidden) == 1.0


def test_a_planted_shift_by_one_is_seen():
    decoder = as_decoder(tiny_llama(0))
    answers, hidden = extracted(decoder)
    assert emission_agreement(decoder, answers, hidden.roll(1, dims=1)) < 0.8
    assert emission_agreement(decoder, answers, hidden.roll(-1, dims=1)) < 0.8


def test_batched_generation_is_greedy_decoding():
    decoder = as_decoder(tiny_llama(3))
    answers, _ = extracted(decoder)
    assert answers == [greedy(decoder, prompt_of(*p), 16).token_ids for p in PROMPTS]


def test_teacher_forcing_equals_reading_without_a_cache():
    model = tiny_llama(1)
    decoder = as_decoder(model)
    answers, hidden = extracted(decoder)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        full = model.model(input_ids=torch.tensor([[*prompt, *answer]])).last_hidden_state[0]
        torch.testing.assert_close(hidden[i, : len(answer)], full[len(prompt) - 1 : -1], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_offline_trace_is_the_live_trace():
    """The trace identity: bits from one forced pass give every round of live greedy decoding, for every number of drafts."""
    model = tiny_llama(5)
    target, draft = as_decoder(model), as_decoder(noisy_copy(model, 0.03))
    torch.manual_seed(0)
    adapter = HiddenAdapter(32, 32, 8).eval()
    torch.nn.init.normal_(adapter.up.weight, std=0.05)
    answers, _ = extracted(target, 24)
    state = draft.prefill([prompt_of(*p) for p in PROMPTS])
    drafts = target.lm_head(adapter(force_batch(draft, state, answers))).argmax(-1)
    width = max(map(len, answers))
    mask = torch.tensor([[t < len(a) for t in range(width)] for a in answers])
    tokens = torch.tensor([[*a, *[0] * (width - len(a))] for a in answers])
    bits = (drafts == tokens) & mask
    assert 0.1 < float(bits[mask].float().mean()) < 0.99  # agreement is partial, so the comparison means something
    for gamma in (1, 2, 3, 5, 8):
        blocks = metrics.decoding_blocks(bits, mask, gamma, ended=torch.tensor([a[-1] == EOS for a in answers]))
        for row, prompt in enumerate(PROMPTS):
            proposer = ModelProposer(draft, adapter, target.lm_head)
            live = speculate(target, proposer, prompt_of(*prompt), prompt_of(*prompt), num_draft_tokens=gamma, max_new_tokens=24)
            assert [r.num_accepted for r in live.rounds] == blocks.accepted[(blocks.rows == row) & (blocks.offered > 0)].tolist()
