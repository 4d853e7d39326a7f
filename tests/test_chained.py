"""The chained adapter: what it may see, that chaining step by step is the roll-out it was trained on, and that drafting stays lossless."""

from __future__ import annotations

import dataclasses
from itertools import product

import pytest
import torch
from conftest import as_decoder, noisy_copy, prompt_of, tiny_llama
from oracle import by_chain

from feature_alignment.adapters.chained import ChainedAdapter, chained_predictions, load_chained_adapter, text_batches
from feature_alignment.adapters.training import train_chained
from feature_alignment.cli.console import UserError
from feature_alignment.decoding.baseline_drafters import HybridProposer, NGram
from feature_alignment.decoding.chained_proposer import ChainedProposer
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.measurement import metrics
from feature_alignment.measurement.acceptance import ChainScores, chain_report
from feature_alignment.measurement.scoring import chain_scores
from feature_alignment.storage.files import save_pt
from feature_alignment.storage.hidden_states import HiddenStates
from feature_alignment.train_hidden_adapter import TrainConfig

D, EVENTS, VOCAB = 32, 1, 64
PROMPTS = [(1, 5, 9, 13), (1, 40, 3), (1, 7, 7, 7, 20, 33)]


def an_adapter(seed: int = 0, blind: bool = False) -> ChainedAdapter:
    torch.manual_seed(seed)
    return ChainedAdapter(D, D, EVENTS, 16, blind).eval()


def a_text(n: int = 9, seed: int = 1):
    torch.manual_seed(seed)
    return torch.randn(1, n, D), torch.randint(3, VOCAB, (1, n)), torch.randn(VOCAB, D), torch.randn(1, EVENTS, D)


def test_parameters_at_width_4096():
    adapter = ChainedAdapter(4096, 4096, 582, 192)
    by_hand = (4096 * 192 + 192) + 4096 * 192 + (6 * 192 * 192 + 6 * 192) + (192 * 192 + 192) + 2 * (4096 * 192 + 192) + 582 * 192
    by_hand += (2 * 192 * 192 + 192) + (192 * 4096 + 4096)
    assert adapter.num_parameters == by_hand < 5_000_000


@torch.inference_mode()
def test_it_never_sees_what_comes_later():
    adapter, (states, ids, embeddings, events) = an_adapter(), a_text()
    tokens, seen = adapter.tokens(embeddings)[ids], adapter.encode_events(events)
    before = adapter.roll_out(states, tokens, seen, 4)
    changed, other = states.clone(), tokens.clone()
    changed[:, 5:] += 1
    other[:, 5:] += 1
    after = adapter.roll_out(changed, other, seen, 4)
    for k in range(4):
        reads = 5 - k  # step k from position t has read tokens up to t + k
        assert torch.equal(before[k][:, :reads], after[k][:, :reads])
        assert not torch.allclose(before[k][:, reads], after[k][:, reads])


@torch.inference_mode()
def test_a_roll_out_is_chaining_by_hand():
    adapter, (states, ids, embeddings, events) = an_adapter(), a_text()
    tokens, seen = adapter.tokens(embeddings)[ids], adapter.encode_events(events)
    for start in range(4):
        memory = adapter.read(states[:, : start + 1], tokens[:, : start + 1], None)[:, -1:]
        for k, expected in enumerate(adapter.roll_out(states, tokens, seen, 4)):
            by_hand = adapter.predict(memory, seen)
            torch.testing.assert_close(by_hand[:, 0], expected[:, start], atol=1e-5, rtol=1e-5)
            memory = adapter.read(by_hand, tokens[:, start + k + 1, None], memory[:, -1])


@torch.inference_mode()
def test_a_blind_one_sees_nothing():
    states, ids, embeddings, events = a_text()
    for blind in (True, False):
        adapter = an_adapter(blind=blind)
        tokens = adapter.tokens(embeddings)[ids]
        a, b = (adapter.roll_out(states, tokens, adapter.encode_events(e), 2)[1] for e in (events, events + 1))
        assert torch.equal(a, b) is blind


@pytest.mark.parametrize("blind", [False, True])
@torch.inference_mode()
def test_scales_fold_into_the_weights(blind):
    adapter, (states, ids, embeddings, events) = an_adapter(blind=blind), a_text()
    adapter.standardize(states[0] * 3 + 1, embeddings * 0.1 - 2, torch.randn(5, EVENTS, D) * 7 + 4)
    plain = adapter.folded()
    assert plain.scale is None and adapter.scale is not None
    a, b = (m.roll_out(states, m.tokens(embeddings)[ids], m.encode_events(events), 3) for m in (adapter, plain))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def proposer_of(model, adapter):
    target = as_decoder(model)
    return target, ChainedProposer(as_decoder(noisy_copy(model, 0.1)), adapter, target.head_weight, target.embeddings)


@pytest.mark.parametrize("gamma", [1, 2, 4, 7])
@pytest.mark.parametrize("seed", range(3))
def test_token_acceptance_is_plain_greedy(gamma, seed):
    target, proposer = proposer_of(tiny_llama(seed), an_adapter(seed))
    for prompt in PROMPTS:
        plain = greedy(target, prompt_of(*prompt), 30)
        got = speculate(target, proposer, prompt_of(*prompt), prompt_of(*prompt), num_draft_tokens=gamma, max_new_tokens=30)
        assert got.token_ids == plain.token_ids


@pytest.mark.parametrize(("sure", "gamma"), [(0.2, 5), (0.5, 3)])
def test_a_hybrid_chains_over_the_tables_tokens(sure, gamma):
    """Each of its drafts is the table's where that is sure, else what a chain begun anew and told all drafts so far would say."""
    model, adapter = tiny_llama(0), an_adapter()
    target, chained = proposer_of(model, adapter)
    table = NGram([("", greedy(target, prompt_of(*p), 30).token_ids) for p in PROMPTS[1:]])
    prompt, spoke = prompt_of(*PROMPTS[0]), [0, 0]
    got = speculate(target, HybridProposer(table, chained, sure), prompt, prompt, num_draft_tokens=gamma, max_new_tokens=30)
    assert got.token_ids == greedy(target, prompt, 30).token_ids
    at = 1
    for r in got.rounds:
        text = got.token_ids[:at]
        states = full_states(model, [*PROMPTS[0], *text])[len(PROMPTS[0]) - 1 : -1].detach()
        for drafted in r.proposed:
            token, share = table.guess("", text)
            spoke[share >= sure] += 1
            if share < sure:
                fresh = proposer_of(model, adapter)[1]
                fresh.start(prompt, Stopwatch())
                token = int(fresh.propose(text, states, 1, Stopwatch()).token_ids)
            assert token == drafted
            text = [*text, drafted]
        at += r.num_accepted + 1
    assert min(spoke) > 0


def full_states(model, tokens):
    return model.model(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize("accept", ["token", "feature", "relaxed"])
@pytest.mark.parametrize("seed", range(3))
@torch.inference_mode()
def test_live_drafts_are_what_a_fresh_start_would_draft(accept, seed):
    """Every round's drafts, recomputed from the emitted text alone: no cache, no memory kept between rounds."""
    model, adapter = tiny_llama(seed), an_adapter(seed)
    target, proposer = proposer_of(model, adapter)
    prompt = PROMPTS[seed]
    rule = {"accept": accept, "threshold": 0.1, "num_draft_tokens": 3, "max_new_tokens": 20}
    got = speculate(target, proposer, prompt_of(*prompt), prompt_of(*prompt), **rule)
    draft = proposer.draft
    seen = adapter.encode_events(draft.vision_states(torch.tensor([prompt]), draft.encode_vision(torch.zeros(1, 1))))
    table, at = adapter.tokens(target.embeddings), 1
    for r in got.rounds:
        text = got.token_ids[:at]
        states = full_states(model, [*prompt, *text])[len(prompt) - 1 : -1]  # states[i] emitted text[i]
        memory = adapter.read(states[None], table[torch.tensor([text])], None)[:, -1:]
        for drafted in r.proposed:
            expected = adapter.predict(memory, seen)
            assert int(target.lm_head(expected[0, 0]).argmax()) == drafted
            memory = adapter.read(expected, table[torch.tensor([[drafted]])], memory[:, -1])
        at += (len(r.accepted) if accept == "relaxed" else r.num_accepted) + (r.extra_token is not None)
    assert len(got.token_ids) - at in (0, 1)  # the last token of a full text has no round of its own


def states_of(target, draft, prompts, limit) -> HiddenStates:
    """What extraction would store for these prompts."""
    texts = [greedy(target, prompt_of(*p), limit).token_ids for p in prompts]
    width = max(map(len, texts))
    ids, v = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, D)
    events = torch.cat([draft.vision_states(torch.tensor([p]), torch.zeros(1, 1)) for p in prompts])
    for i, (p, text) in enumerate(zip(prompts, texts, strict=True)):
        ids[i, : len(text)] = torch.tensor(text)
        v[i, : len(text)] = target.teacher_force(target.prefill([prompt_of(*p)]), torch.tensor([text]))[0]
    lengths = torch.tensor([len(t) for t in texts])
    rows = [{"id": str(i), "sequence": str(i)} for i in range(len(texts))]
    return HiddenStates(v, v, ids, torch.arange(width) < lengths[:, None], lengths, rows, {}, events)


@pytest.fixture(scope="module")
def learnt():
    """A target, a drafter, their states on three texts, and an adapter that has learnt these."""
    model = tiny_llama(0)
    target, draft = as_decoder(model), as_decoder(noisy_copy(model, 0.1))
    states = states_of(target, draft, PROMPTS, 24)
    cfg = TrainConfig(bottleneck=16, num_epochs=300, patience=300, lr=1e-2)
    adapter, history = train_chained(states, states, target.head_weight.detach(), target.embeddings, cfg)
    assert history[-1]["validation_token_match"] > history[0]["validation_token_match"] + 0.3
    return target, draft, states, adapter


@pytest.mark.parametrize("gamma", [1, 3, 5])
def test_the_trace_identity(learnt, gamma):
    """Rounds read off one teacher-forced pass are the live rounds, exactly."""
    target, draft, states, adapter = learnt
    proposer = ChainedProposer(draft, adapter, target.head_weight, target.embeddings)
    scores, valid = chain_scores(adapter, states, target.head_weight.detach(), target.embeddings, gamma)
    assert scores.match.dtype == valid.dtype == torch.bool and scores.says.dtype == torch.int64
    blocks = metrics.decoding_blocks(scores.match, states.mask, gamma, states.ended)
    assert blocks.accepted.sum() > 5  # the identity is not about zeros
    for i, prompt in enumerate(PROMPTS):
        live = speculate(target, proposer, prompt_of(*prompt), prompt_of(*prompt), num_draft_tokens=gamma, max_new_tokens=24)
        assert [r.num_accepted for r in live.rounds] == blocks.accepted[(blocks.rows == i) & (blocks.offered > 0)].tolist()
    report = chain_report(ChainScores(scores, valid, {"parameters": 1, "seconds": 0.0}), states)
    assert len(report.steps) == gamma and report.cosine.total == float(valid.sum())
    right, wrong = (scores.cosine[valid & kept][:, None] for kept in (scores.match, ~scores.match))
    above = (right > wrong.T).double().mean() + 0.5 * (right == wrong.T).double().mean()
    assert report.auc_cosine_token_match == pytest.approx(float(above), abs=1e-9)


def test_a_shift_by_one_is_seen(learnt):
    """The adapter must be told the token its state emitted, not the one before: with shifted tokens a learnt text is lost."""
    target, _, states, adapter = learnt
    (texts,) = text_batches(states, [torch.arange(len(states.target))], "cpu")
    shifted = type(texts)(texts.states, texts.token_ids.roll(1, 1), texts.mask, texts.events)
    with torch.inference_mode():
        right, wrong = (next(chained_predictions(adapter, t, target.embeddings, 1)) for t in (texts, shifted))
    cosine = [float(torch.cosine_similarity(e, w, dim=-1)[m].mean()) for e, w, m in (right, wrong)]
    assert cosine[0] > cosine[1] + 0.1


def test_what_does_not_fit_is_refused(tiny_run, tmp_path):
    for content in ({"state_dict": {}}, {"meta": {"geometry": {"d_draft": 3}}, "state_dict": {}}):
        save_pt(tmp_path / "a.pt", content)
        with pytest.raises(UserError, match=r"(?s)not a chained adapter.*--adapter chained"):
            load_chained_adapter(tmp_path / "a.pt")
    adapter = an_adapter()
    meta = {"geometry": adapter.geometry, "draft_layers": [1, 2]}
    save_pt(tmp_path / "b.pt", {"meta": meta, "state_dict": adapter.state_dict()})
    assert load_chained_adapter(tmp_path / "b.pt", [2])[0].geometry == adapter.geometry  # only the last layer's states are read
    with pytest.raises(UserError, match=r"layer 2, this run ends at 3"):
        load_chained_adapter(tmp_path / "b.pt", [3])
    with pytest.raises(ValueError, match="multiple of 4"):
        ChainedAdapter(8, 8, 2, 6)


def test_the_proposer_reads_only_what_is_new():
    proposer = proposer_of(tiny_llama(0), an_adapter())[1]
    watch = Stopwatch()
    proposer.start(prompt_of(*PROMPTS[0]), watch)
    states = torch.randn(6, D)
    proposer.propose([4, 5], states[:2], 3, watch)
    kept = proposer._memory.clone()
    proposer.propose([4, 5, 6, 7], states[:4], 2, watch)
    fresh = proposer_of(tiny_llama(0), an_adapter())[1]
    fresh.start(prompt_of(*PROMPTS[0]), watch)
    fresh.propose([4, 5, 6, 7], states[:4], 2, watch)
    torch.testing.assert_close(proposer._memory, fresh._memory)
    assert not torch.allclose(kept, proposer._memory)


@torch.inference_mode()
def test_a_round_of_fixed_length_forgets_its_draft_tokens():
    """As on a GPU: the text goes on with some of a round's tokens, as a hybrid's does, and with others than were drafted."""
    used, anew = (proposer_of(tiny_llama(0), an_adapter())[1] for _ in "ab")
    states, watch = torch.randn(2, D), Stopwatch()
    for proposer in (used, anew):
        proposer._drafts_blocks = True
        proposer.start(prompt_of(*PROMPTS[0]), watch)
    first = used.propose([4, 5, 6], states, 2, watch).token_ids.tolist()
    for text in ([4, 5, first[0], 9], [4, 5, 6, 9], [4, 5, 6, *first]):
        got, wanted = (p.propose(text, states, 3, watch) for p in (used, anew))
        assert got.token_ids.tolist() == wanted.token_ids.tolist()
        torch.testing.assert_close(got.predicted(), wanted.predicted())
        anew.start(prompt_of(*PROMPTS[0]), watch)


def test_texts_of_one_token_have_nothing_to_learn_or_to_score(learnt):
    target, _, states, _ = learnt
    head, embeddings = target.head_weight.detach(), target.embeddings
    short = torch.arange(len(states.lengths)) % 2 == 0
    lengths = states.lengths.masked_fill(short, 1)
    mask = torch.arange(states.mask.shape[1]) < lengths[:, None]
    some = dataclasses.replace(states, mask=mask, lengths=lengths)
    _, valid = chain_scores(an_adapter(), some, head, embeddings, 3)
    assert not valid[short].any() and valid[~short].any()
    one = dataclasses.replace(
        some, **{k: getattr(some, k)[:1] for k in ("draft", "target", "token_ids", "mask", "lengths")}, rows=some.rows[:1]
    )
    assert not chain_scores(an_adapter(), one, head, embeddings, 3)[1].any()
    cfg = TrainConfig(adapter="chained", bottleneck=8, num_epochs=1, batch_size=1, roll_out_steps=2)
    assert train_chained(some, some, head, embeddings, cfg)[1]


@torch.inference_mode()
@pytest.mark.parametrize("ids", [None, torch.tensor([2, 7, 40])])
def test_a_floor_ends_a_draft_of_a_greedy_text_as_it_ends_any_other(ids):
    """Token by token, as for texts under generation rules: the same tokens, confidences and states; and again from where it stopped."""
    model, lengths = tiny_llama(0), set()
    target, draft = as_decoder(model), as_decoder(noisy_copy(model, 0.1))
    for seed, floor in product(range(4), (0.0, 1e-9, 0.002, 0.05, 0.3, 0.9)):
        until, one = (ChainedProposer(draft, an_adapter(seed), target.head_weight, target.embeddings, ids) for _ in "ab")
        states, text = torch.randn(3, D, generator=torch.Generator().manual_seed(seed)), [4, 5, 6]
        for proposer in (until, one):
            proposer.start(prompt_of(*PROMPTS[0]), Stopwatch())
        for n in (2, 3, 3):  # the last time the text goes on with draft tokens
            got = until.propose(text[:n], states[:n], 6, Stopwatch(), floor)
            one._catch_up(text[:n], states[:n])
            wanted = one._propose_one_by_one(text[:n], 6, Stopwatch(), floor)
            assert got.token_ids.tolist() == wanted.token_ids.tolist()
            assert list(got.confidence or [1.0] * len(got.token_ids)) == pytest.approx(list(wanted.confidence))
            torch.testing.assert_close(got.predicted(), wanted.predicted())
            assert until._ahead == one._ahead
            torch.testing.assert_close(until._tip, one._tip)
            lengths.add(len(got.token_ids))
            if n == 3:
                text = [*text[:3], *got.token_ids.tolist()]
        a, b = (p.propose(text, states, 2, Stopwatch(), floor).token_ids.tolist() for p in (until, one))
        assert a == b and until._ahead == [*text[3:], *a[:-1]]  # tokens without a state of the target that have been read
    assert {1, 6} < lengths


@torch.inference_mode()
def test_ids_outside_the_draft_vocabulary_have_probability_zero():
    """At any temperature, and with a distribution left even if rules forbid every id that may be drafted."""
    model, ids = tiny_llama(0), torch.tensor([2, 7, 40])
    target, draft = as_decoder(model), as_decoder(noisy_copy(model, 0.1))
    whole, trimmed = (ChainedProposer(draft, an_adapter(), target.head_weight, target.embeddings, some) for some in (None, ids))
    z = torch.randn(1, 16)
    logits = trimmed._logits(z)
    torch.testing.assert_close(logits[:, ids], whole._logits(z)[:, ids])
    for temperature in (0.001, 1, 1000):
        probs = (logits / temperature).softmax(-1)
        assert probs[0, ids].sum().item() == pytest.approx(1) and (probs[0] > 0).sum() <= 3
    logits[:, ids] = -torch.inf
    assert logits.softmax(-1).sum().item() == pytest.approx(1)


def test_batches_of_texts_are_cut_to_their_own_longest(learnt):
    _, _, states, _ = learnt
    lengths = torch.tensor([5, 2, 9])
    mask = torch.arange(states.mask.shape[1]) < lengths[:, None]
    short = dataclasses.replace(states, mask=mask, lengths=lengths)
    batches = [torch.tensor([0, 1]), torch.tensor([2])]
    for rows, width, texts in zip(batches, (5, 9), text_batches(short, batches, "cpu"), strict=True):
        assert texts.states.shape == (len(rows), width, D) and texts.events.shape == (len(rows), EVENTS, D)
        assert torch.equal(texts.states, states.target[rows, :width]) and torch.equal(texts.events, states.events_of(rows))
        assert torch.equal(texts.token_ids, states.token_ids[rows, :width]) and torch.equal(texts.mask, mask[rows, :width])


def test_what_is_learnt_does_not_depend_on_the_scale_of_what_is_read(learnt):
    """Inputs are standardised, so another unit of the states, the embeddings or the event states changes nothing but the unit."""
    target, _, states, _ = learnt
    cfg, found = TrainConfig(bottleneck=16, num_epochs=3, lr=1e-2), []
    for scale in (1.0, 64.0):
        scaled = dataclasses.replace(states, target=states.target * scale, events=states.events * scale)
        found.append(train_chained(scaled, scaled, target.head_weight.detach() / scale, target.embeddings * scale, cfg)[1])
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


@torch.inference_mode()
def test_tokens_without_a_state_are_read_as_drafts():
    """What a table has put after the verified text: kept, longer, shorter, another, and forgotten when more is verified. Tokens and
    expected states against the definition without any memory."""
    model, adapter = tiny_llama(0), an_adapter()
    target, draft, prompt = as_decoder(model), as_decoder(noisy_copy(model, 0.1)), PROMPTS[0]
    proposer, watch = ChainedProposer(draft, adapter, target.head_weight, target.embeddings), Stopwatch()
    definition = by_chain(draft, prompt_of(*prompt), adapter, target, prompt)
    text = greedy(target, prompt_of(*prompt), 12).token_ids
    states = full_states(model, [*prompt, *text])[len(prompt) - 1 : -1]
    proposer.start(prompt_of(*prompt), watch)
    calls = [(1, []), (1, [9]), (1, [9, 8, 7]), (1, [9, 8]), (1, [4]), (3, []), (3, [5, 6]), (4, []), (4, text[4:6]), (6, []), (7, [3])]
    for n, ahead in calls:
        got = proposer.propose([*text[:n], *ahead], states[:n], 3, watch)
        drafts = list(ahead)
        for token, expected in zip(got.token_ids.tolist(), got.predicted(), strict=True):
            wanted, state = definition(text[:n], drafts)
            assert token == wanted
            torch.testing.assert_close(expected, state, atol=1e-4, rtol=1e-4)
            drafts.append(token)
        assert len(drafts) == len(ahead) + 3
