"""Lossless is proven, not assumed; accepted counts are checked against an oracle that has no caches."""

from __future__ import annotations

import pytest
import torch
from conftest import EOS, as_decoder, noisy_copy, prompt_of, tiny_llama
from oracle import by_model, oracle

from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.decoding.acceptance import accepted_drafts
from feature_alignment.decoding.baseline_drafters import BASELINE_DRAFTERS, HybridProposer, Lookup, NGram, Previous, TableProposer
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.generation import Generation, Round
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.proposers import ModelProposer
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.decoding.trace import legend, trace_lines
from feature_alignment.measurement import metrics

PROMPTS = [(1, 5, 9, 13), (1, 40, 3), (1, 7, 7, 7, 20, 33)]
DRAFT_PROMPT = (1, 11, 12)
MAX = 30


def small_adapter(seed: int = 3, scale: float = 0.05) -> HiddenAdapter:
    torch.manual_seed(seed)
    adapter = HiddenAdapter(32, 32, 8)
    torch.nn.init.normal_(adapter.up.weight, std=scale)
    return adapter.eval()


def proposer_for(source: str, draft_model, target, adapter):
    if source in ("own", "aligned"):
        return ModelProposer(as_decoder(draft_model), adapter, target.lm_head if source == "aligned" else None)
    texts = [("", greedy(target, prompt_of(*p), MAX).token_ids) for p in PROMPTS[1:]]
    if source == "hybrid":
        return HybridProposer(NGram(texts), ModelProposer(as_decoder(draft_model), adapter, target.lm_head), sure=0.6)
    return TableProposer(BASELINE_DRAFTERS[source](texts))


@pytest.mark.parametrize("source", ["own", "aligned", "hybrid", *BASELINE_DRAFTERS])
@pytest.mark.parametrize("noise", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("gamma", [1, 2, 4, 7])
def test_token_acceptance_is_plain_greedy(source, noise, gamma):
    model = tiny_llama(0)
    target = as_decoder(model)
    proposer = proposer_for(source, noisy_copy(model, noise), target, small_adapter())
    for prompt in PROMPTS:
        plain = greedy(target, prompt_of(*prompt), MAX)
        # the drafter is given the same prompt, so that a noiseless copy agrees with the target
        got = speculate(target, proposer, prompt_of(*prompt), prompt_of(*prompt), num_draft_tokens=gamma, max_new_tokens=MAX)
        assert got.token_ids == plain.token_ids
        assert 1 + sum(r.num_accepted for r in got.rounds) + (got.passes - sum(r.extra_token is None for r in got.rounds)) == len(
            got.token_ids
        )


@pytest.mark.parametrize("accept", ["token", "feature", "relaxed"])
@pytest.mark.parametrize("source", ["own", "aligned"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("seed", range(4))
def test_caches_change_nothing(accept, source, noise, seed):
    model, adapter = tiny_llama(seed), small_adapter(seed)
    other, target = noisy_copy(model, noise, seed), as_decoder(model)
    gamma, threshold = 1 + seed, 0.8 + 0.03 * seed
    proposer = ModelProposer(as_decoder(other), adapter, target.lm_head if source == "aligned" else None)
    for prompt in PROMPTS:
        got = speculate(
            target,
            proposer,
            prompt_of(*prompt),
            prompt_of(*DRAFT_PROMPT),
            accept=accept,
            threshold=threshold,
            num_draft_tokens=gamma,
            max_new_tokens=20,
        )
        definition = by_model(other, (2,), DRAFT_PROMPT, adapter, target.lm_head if source == "aligned" else None)
        tokens, _, accepted = oracle(target, prompt, definition, accept, threshold, gamma, 20)
        assert got.token_ids == tokens
        assert [r.num_accepted for r in got.rounds] == accepted


def test_a_drafter_equal_to_the_target_is_always_accepted():
    model = tiny_llama(0)
    target = as_decoder(model)
    proposer = ModelProposer(as_decoder(model), None, None)
    got = speculate(target, proposer, prompt_of(*PROMPTS[0]), prompt_of(*PROMPTS[0]), num_draft_tokens=4, max_new_tokens=21)
    assert all(all(r.accepted) for r in got.rounds)
    assert got.tokens_per_pass == 5.0


@pytest.mark.parametrize("limit", [1, 2, 3, 6, 11])
def test_max_new_tokens_is_exact(limit):
    model = tiny_llama(1)
    target = as_decoder(model)
    plain = greedy(target, prompt_of(*PROMPTS[0]), limit)
    for accept in ("token", "feature", "relaxed"):
        proposer = ModelProposer(as_decoder(model), small_adapter(), target.lm_head)
        got = speculate(
            target, proposer, prompt_of(*PROMPTS[0]), prompt_of(*PROMPTS[0]), accept=accept, num_draft_tokens=4, max_new_tokens=limit
        )
        assert len(got.token_ids) == len(plain.token_ids)


@pytest.mark.parametrize("gamma", [2, 5, 9])
def test_eos_inside_a_block_ends_the_text(gamma):
    model = tiny_llama(2)
    with torch.no_grad():  # make EOS what the model says after a few tokens
        plain = greedy(as_decoder(model), prompt_of(*PROMPTS[0]), 12).token_ids
        model.lm_head.weight[EOS] = model.lm_head.weight[plain[5]] * 1.01
    target = as_decoder(model)
    plain = greedy(target, prompt_of(*PROMPTS[0]), MAX)
    assert plain.token_ids[-1] == EOS and len(plain.token_ids) < MAX and plain.token_ids.count(EOS) == 1
    proposer = ModelProposer(as_decoder(model), None, None)
    got = speculate(target, proposer, prompt_of(*PROMPTS[0]), prompt_of(*PROMPTS[0]), num_draft_tokens=gamma, max_new_tokens=MAX)
    assert got.token_ids == plain.token_ids


def test_rules_keep_what_they_say():
    drafts, wanted = torch.tensor([4, 5, 6, 7]), torch.tensor([4, 9, 6, 7])
    cosine = torch.tensor([0.95, 0.2, 0.9, 0.91])
    assert accepted_drafts("token", drafts, wanted, None, 0.9).tolist() == [True, False, False, False]
    assert accepted_drafts("feature", drafts, wanted, cosine, 0.9).tolist() == [True, False, False, False]
    assert accepted_drafts("relaxed", drafts, wanted, cosine, 0.9).tolist() == [True, False, False, True]  # 0.9 is not above 0.9
    with pytest.raises(ValueError, match="predicts none"):
        accepted_drafts("feature", drafts, wanted, None, 0.9)


@pytest.mark.parametrize("taps", [[1], [2], [1, 3], [1, 2, 3], [3]])
def test_taps_are_the_layers_they_say(taps):
    model = tiny_llama(4, layers=3)
    decoder = as_decoder(model, taps)
    ids = [1, 8, 9, 10, 11, 12]
    everything = model.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    state = decoder.prefill([prompt_of(*ids[:3])])
    hidden = torch.cat([state.last[:, None], decoder.step(state, torch.tensor([ids[3:]]))], dim=1)[0]
    want = torch.cat([everything[k][0, 2:] for k in taps], dim=-1)  # hidden_states[3] of 3 layers has passed the final norm
    torch.testing.assert_close(hidden, want, atol=1e-5, rtol=1e-4)
    assert len(state.cache.layers) == max(taps)
    assert decoder.norm == ("post" if taps == [3] else "pre")


def test_a_hybrid_believes_a_sure_table_and_else_the_model():
    """A table that knows the text mends a model that does not; one that knows nothing leaves a model that does as it is."""
    model = tiny_llama(0)
    target, prompt = as_decoder(model), prompt_of(*PROMPTS[0])
    plain = greedy(target, prompt, 20)
    sure, empty = NGram([("", plain.token_ids)] * 30), NGram([("", [9])])
    rounds = {}
    for name, table, drafter in (
        ("repaired", sure, noisy_copy(model, 5.0)),
        ("left alone", empty, model),
        ("lost", empty, noisy_copy(model, 5.0)),
    ):
        proposer = HybridProposer(table, ModelProposer(as_decoder(drafter), None, None))
        got = speculate(target, proposer, prompt, prompt, num_draft_tokens=4, max_new_tokens=20)
        assert got.token_ids == plain.token_ids
        rounds[name] = got.passes
    assert rounds["repaired"] == rounds["left alone"] == 4 < rounds["lost"]


def test_a_hybrid_goes_on_where_the_model_stops():
    model = tiny_llama(0)
    target, prompt = as_decoder(model), prompt_of(*PROMPTS[0])
    plain = greedy(target, prompt, 20)
    proposer = HybridProposer(NGram([("", plain.token_ids)] * 30), ModelProposer(as_decoder(model), None, None))
    proposer.start(prompt, watch := Stopwatch())
    draft = proposer.propose(plain.token_ids[:1], torch.zeros(1, 1), 10, watch, confidence_floor=1.0)  # the model is never that sure
    assert draft.token_ids.tolist() == plain.token_ids[1:11]


def test_lookup_goes_on_behind_the_longest_latest_match():
    table = Lookup(encode=lambda question: [7, 8] if question else [])
    assert table.next_token("", [5, 6, 9, 5, 6]) == 9
    assert table.next_token("", [1, 6, 3, 5, 6, 4, 6]) == 4  # of equally long ones the latest
    assert table.next_token("", [5, 6, 3, 1, 6, 4, 5, 6]) == 3  # a longer one wins
    assert table.next_token("asked", [3, 7]) == 8 and table.next_token("", [3, 7]) is None


def test_previous_says_what_the_answer_before_it_said():
    table = Previous([("q", [4, 5, 6, 2])])
    assert table.next_token("q", [4, 5]) == 6 and table.next_token("other", [4, 5]) is None
    table.finished("q", [9, 8, 4, 7, 2])
    assert table.next_token("q", [4]) == 7  # found at another place
    assert table.next_token("q", [1]) == 8 and table.next_token("q", [1] * 5) is None  # not found: same place


def test_an_answer_is_no_help_to_itself():
    target, proposer = as_decoder(tiny_llama(0)), TableProposer(Previous([]))
    run = lambda prompt: speculate(target, proposer, prompt, prompt, num_draft_tokens=4, max_new_tokens=20)  # noqa: E731
    prompt, same_again = prompt_of(*PROMPTS[0]), prompt_of(*PROMPTS[0])
    for _ in range(2):
        assert all(r.proposed == [] for r in run(prompt).rounds)
    assert sum(r.num_accepted for r in run(same_again).rounds) > 10  # another prompt that happens to have this answer


def test_a_rule_of_ones_own_gets_draft_tokens_first_and_the_targets_second():
    def even_drafts_of_odd_tokens(draft_ids, target_ids, score, threshold):
        return (draft_ids % 2 == 0) & (target_ids % 2 == 1)

    drafts, own = torch.tensor([2, 4, 3, 6]), torch.tensor([1, 3, 5, 7])
    assert accepted_drafts(even_drafts_of_odd_tokens, drafts, own, None, 0.0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("source", list(BASELINE_DRAFTERS))
@pytest.mark.parametrize("gamma", [1, 3, 6])
def test_tables_offline_are_tables_in_the_loop(source, gamma):
    """`next_token` and `finished` over finished texts give the rounds of live decoding."""
    model = tiny_llama(0)
    with torch.no_grad():  # texts that repeat themselves and end
        model.lm_head.weight[EOS] = model.lm_head.weight[greedy(as_decoder(model), prompt_of(*PROMPTS[0]), 12).token_ids[9]] * 1.01
    target = as_decoder(model)
    train = [("", greedy(target, prompt_of(1, 5, 9, i), MAX).token_ids) for i in range(3, 9)]
    prompts = [prompt_of(*p) for p in [*PROMPTS, (1, 5, 9, 5), (1, 5, 9, 13, 2)]]
    proposer, offline, kept = TableProposer(BASELINE_DRAFTERS[source](train)), BASELINE_DRAFTERS[source](train), 0
    for prompt in prompts:
        live = speculate(target, proposer, prompt, prompt, num_draft_tokens=gamma, max_new_tokens=MAX)
        text = live.token_ids
        bits = torch.tensor([[offline.next_token("", text[:t]) == text[t] for t in range(len(text))]])
        offline.finished("", text)
        blocks = metrics.decoding_blocks(bits, torch.ones_like(bits), gamma, torch.tensor([text[-1] == EOS]))
        assert [r.num_accepted for r in live.rounds] == blocks.accepted[blocks.offered > 0].tolist()
        kept += int(blocks.accepted.sum())
    assert kept > 0


@pytest.mark.parametrize("color", [False, True])
def test_a_trace_shows_every_token_for_what_it_was(color):
    model = tiny_llama(0)
    target, prompt = as_decoder(model), prompt_of(*PROMPTS[0])
    got = speculate(target, ModelProposer(as_decoder(noisy_copy(model, 0.02)), None, None), prompt, prompt, max_new_tokens=30)
    text = "\n".join(trace_lines(got, lambda ids: f"<{ids[0]}>", color))
    kinds = (
        {"accepted": "\033[32m", "rejected": "\033[31;9m", "own": "\033[1;34m"} if color else {"accepted": "", "rejected": "(", "own": "["}
    )
    own = [got.token_ids[0], *[r.extra_token for r in got.rounds if r.extra_token is not None]]
    assert text.count(kinds["own"] + "<") == len(own)
    assert text.count(kinds["rejected"] + "<") == sum(len(r.proposed) - r.num_accepted for r in got.rounds) > 0
    assert text.count("<") == len(own) + sum(len(r.proposed) for r in got.rounds)
    assert ("\033" in text) is color and text.count("accepted ") == len(got.rounds) and "verify" in text


@pytest.mark.parametrize("source", ["aligned", "hybrid", "ngram"])
def test_reading_the_prompts_side_by_side_changes_nothing(source):
    model, threads = tiny_llama(0), torch.get_num_threads()
    target, rounds = as_decoder(model), []
    for overlap in (False, True):
        proposer = proposer_for(source, noisy_copy(model, 0.02), target, small_adapter())
        got = [speculate(target, proposer, prompt_of(*p), prompt_of(*p), overlap=overlap, max_new_tokens=MAX) for p in PROMPTS]
        rounds.append([(g.token_ids, [(r.proposed, r.accepted) for r in g.rounds]) for g in got])
    assert rounds[0] == rounds[1] and torch.get_num_threads() == threads


def test_a_drafter_that_fails_beside_is_heard():
    target, prompt = as_decoder(tiny_llama(0)), prompt_of(*PROMPTS[0])
    proposer = ModelProposer(None, None, None)
    with pytest.raises(AttributeError, match="prefill"):
        speculate(target, proposer, prompt, prompt, overlap=True)


def test_a_trace_line_by_line():
    ms = {"draft": 1.5, "verify": 2.25}
    rounds = [
        Round([5, 6], [5, 7], [True, False], None, 7, False, ms, "length"),
        Round([8, 9], [8, 4], [True, False], [0.9, 0.1], 4, True, ms, "low confidence"),
        Round([], [], [], None, 3, False, {"verify": 2.0}, "off"),
        Round([2], [2], [True], None, None, False, {}, "EOS"),
    ]
    got = Generation([4, 5, 7, 8, 4, 3, 2], 4, 9.0, {"target_prefill": 2.0, "verify": 6.5}, rounds)
    assert trace_lines(got, lambda ids: f"w{ids[0]}", False) == [
        "  0  [w4]",
        "     prefill of both prompts; 2.00 ms",
        "  1  w5 (w6) [w7]",
        "     accepted 1 of 2; draft length reached; 3.75 ms = draft 1.50 + verify 2.25",
        "  2  w8 (w9) [w4]",
        "     accepted 1 of 2; one more draft token was not worth its cost; recomputed; 3.75 ms = draft 1.50 + verify 2.25",
        "  3  [w3]",
        "     plain decoding: drafting does not pay here; 2.00 ms",
        "  4  w2",
        "     accepted 1 of 1; the draft ended the text; 0.00 ms",
    ]
    assert legend(False) == "accepted, (rejected), [target's own]" and "\033[1;34mtarget's own\033[0m" in legend(True)
