"""The attending adapter: what it may see, that drafting over a cache is the roll-out it was trained on, that tables do not leak, and that
drafting stays lossless."""

from __future__ import annotations

import copy
import dataclasses
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import as_decoder, noisy_copy, prompt_of, tiny_llama
from oracle import states_behind

from feature_alignment import measure_feature_acceptance, train_hidden_adapter
from feature_alignment.adapters import attending_training, tables
from feature_alignment.adapters.attending import AttendingAdapter, load_attending_adapter
from feature_alignment.adapters.attending_drafts import FoldedAttending
from feature_alignment.adapters.attending_texts import PromptedTexts, answers_of, prompted_texts, proposals
from feature_alignment.adapters.attending_training import Reader, losses, random_origins, train_attending
from feature_alignment.adapters.fitting import Checkpoint, ProcessShare, best_of
from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.adapters.rounds import tokens_per_pass
from feature_alignment.benchmark import targets
from feature_alignment.cli.config import parse_config
from feature_alignment.cli.console import UserError
from feature_alignment.decoding.attending_proposer import AttendingProposer
from feature_alignment.decoding.baseline_drafters import HybridProposer, NGram
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.extract_hidden_states import ExtractConfig
from feature_alignment.inputs.samples import read_samples
from feature_alignment.measurement import metrics
from feature_alignment.measurement.attending_scoring import attending_scores
from feature_alignment.models.pair import load_pair
from feature_alignment.models.state import ReadPrompt
from feature_alignment.storage.files import read_json, save_pt
from feature_alignment.storage.hidden_states import HiddenStates, load_hidden_states
from feature_alignment.train_hidden_adapter import TrainConfig

D, EVENTS, VOCAB, PROMPT = 32, 1, 64, 5
PROMPTS = [(1, 5, 9, 13), (1, 40, 3), (1, 7, 7, 7, 20, 33)]
PARTS = ("events", "prompt", "candidates")


def some_answers(seed: int = 0, clips: int = 5, ids: int = 6) -> list[tables.Answer]:
    """Texts of few ids: most contexts occur several times, in several clips."""
    r = random.Random(seed)
    return [
        tables.Answer(f"clip {c}", r.choice((5, 7)), r.choices(range(3, 3 + ids), k=r.randint(1, 12))) for c in range(clips) for _ in "ab"
    ]


def an_adapter(seed: int = 0, without=(), ids=range(VOCAB), scale: float = 3.0) -> AttendingAdapter:
    torch.manual_seed(seed)
    entries = tables.Counts(some_answers(seed, ids=VOCAB - 4)).entries()
    adapter = AttendingAdapter(D, D, EVENTS, len(ids), len(entries), PROMPT, 16, without).eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter *= scale  # as it begins, it would say the same whatever it reads
    adapter.ids.copy_(torch.tensor(list(ids)))
    adapter.table.copy_(entries)
    return adapter


def a_text(n: int = 9, prompt: int = PROMPT, seed: int = 1) -> tuple[PromptedTexts, torch.Tensor, torch.Tensor]:
    """A text that has been read, the target's head and its embeddings."""
    torch.manual_seed(seed)
    ids = torch.randint(3, VOCAB, (1, n))
    prompt_ids = torch.full((1, PROMPT + 1), -1)
    prompt_ids[:, PROMPT - prompt :] = torch.randint(3, VOCAB, (1, prompt + 1))
    table = tables.NGramTable(tables.Counts(some_answers(ids=VOCAB - 4)).entries())
    found = torch.tensor([tables.candidates_along(table, 5, prompt_ids[0].tolist(), ids[0].tolist())])
    there = torch.arange(PROMPT)[None] >= PROMPT - prompt
    real = torch.ones(1, n, dtype=torch.bool)
    states = torch.randn(1, n, D), ids, real, torch.randn(1, EVENTS, D), torch.randn(1, PROMPT, D), torch.randn(1, PROMPT, D)
    return PromptedTexts(*states, prompt_ids[:, -1], there, *found.unbind(-1)), torch.randn(VOCAB, D), torch.randn(VOCAB, D)


def test_parameters_at_width_4096():
    adapter, w, d = AttendingAdapter(4096, 4096, 582, 8192), 256, 4096
    maps = (d * w + w) * 2 + (w * d + d) + w * w + (w * w + w) + 3 * w * w + tables.BUCKETS * w
    events = (d * 64 + 64) + 582 * 64 + 64 * 2 * w
    layer = 3 * w * w + w * w + (w * 4 * w + 4 * w) + (4 * w * w + w) + 3 * w + (3 * w + 3)
    assert adapter.num_parameters == maps + events + layer < 5_000_000


# -------------------------------------------------------------------------------------------------------------------------- tables


def by_definition(answers, question: int, context: list[int], left_out: str | None):
    """The most frequent next token after the longest context that occurs, its count and the context's, and the context's length."""
    for size in range(min(tables.CONTEXT, len(context)), -1, -1):
        wanted = context[len(context) - size :]
        following = [
            text[t]
            for clip, asked, text in answers
            if clip != left_out and question in (0, asked)
            for t in range(size, len(text))
            if list(text[t - size : t]) == wanted
        ]
        if following:
            token = min(set(following), key=lambda x: (-following.count(x), x))
            return token, following.count(token), len(following), size
    return None


@pytest.mark.parametrize("seed", range(4))
def test_an_n_gram_proposes_what_followed_most_often_without_the_clip_that_is_left_out(seed):
    answers = some_answers(seed)
    counts = tables.Counts(answers)
    saved = tables.NGramTable(counts.entries())
    differ = 0
    for left_out in (None, "clip 0", "clip 3"):
        table = saved if left_out is None else tables.LeaveOneOut(counts, [a for a in answers if a.clip == left_out])
        for _, question, text in answers:
            for t in range(len(text)):
                found = tables.candidates(table, question, (), text[:t])
                for (token, _), who in zip(found, (question, 0), strict=False):
                    wanted = by_definition(answers, who, list(text[:t]), left_out)
                    assert token == (tables.NO_TOKEN if wanted is None else wanted[0])
                differ += found[:2] != tables.candidates(saved, question, (), text[:t])[:2]
    assert differ > 10  # leaving a clip out changes something


def test_what_a_clip_alone_has_said_is_not_proposed_for_it():
    """A training text's own words must not reach it through the tables, nor those of its clip's other answers."""
    secret = [50, 51, 52, 53, 54]
    answers = [tables.Answer("a", 5, [3, *secret]), tables.Answer("a", 5, [4, *secret]), tables.Answer("b", 5, [3, 4, 6, 7])]
    table = tables.LeaveOneOut(tables.Counts(answers), answers[:2])
    along = tables.candidates_along(table, 5, [1], [3, *secret])
    assert not {token for found in along for token, _ in found} & set(secret)
    assert 51 in {
        token
        for found in tables.candidates_along(tables.NGramTable(tables.Counts(answers).entries()), 5, [1], [3, *secret])
        for token, _ in found
    }


@pytest.mark.parametrize("seed", range(20))
def test_lookup_goes_on_behind_the_longest_latest_match(seed):
    r = random.Random(seed)
    text = [r.choice([-1, 3, 4, 5]) for _ in range(r.randint(0, 30))]
    best = (0, 0, tables.NO_TOKEN)
    for end in range(len(text) - 1):
        size = 0
        while size < min(tables.LONGEST_MATCH, end + 1) and text[end - size] == text[len(text) - 1 - size] >= 0:
            size += 1
        if size and text[end + 1] >= 0 and (size, end) > best[:2]:
            best = (size, end, text[end + 1])
    assert tables.prompt_lookup(text) == (best[2], best[0])


def test_every_bucket_has_its_own_number():
    answers, seen = [a for seed in range(30) for a in some_answers(seed, ids=3)], set()
    table = tables.NGramTable(tables.Counts(answers).entries())
    for _, question, text in answers:
        for found in tables.candidates_along(table, question, [1, 3, 4], text):
            buckets = [bucket for _, bucket in found]
            assert 0 <= buckets[0] < tables._NGRAM <= buckets[1] < 2 * tables._NGRAM <= buckets[2] < tables.BUCKETS
            seen |= set(buckets)
    assert len(seen) > 20


# ------------------------------------------------------------------------------------------------------------------ what it may see


def rolled_out(adapter, text, head, embeddings, steps: int = 4):
    reader = Reader(adapter, head, embeddings)
    every = torch.arange(text.states.shape[1])[None]
    return [step.expected[0] for step in reader.roll_out(text, every, steps)]


def changed(text: PromptedTexts, **new) -> PromptedTexts:
    return PromptedTexts(**{**vars(text), **new})


@torch.inference_mode()
def test_it_never_sees_what_comes_later():
    adapter, (text, head, embeddings) = an_adapter(), a_text()
    before = rolled_out(adapter, text, head, embeddings)
    states, ids, proposed = text.states.clone(), text.token_ids.clone(), text.proposed.clone()
    states[:, 5:] += 1
    ids[:, 5:] = 3 + (ids[:, 5:] + 1) % (VOCAB - 3)
    proposed[:, 5:] = 4
    after = rolled_out(adapter, changed(text, states=states, token_ids=ids, proposed=proposed), head, embeddings)
    for k in range(4):
        reads = 5 - k  # step k from place t has read tokens up to t + k
        torch.testing.assert_close(before[k][:reads], after[k][:reads], atol=1e-6, rtol=1e-6)
        for t in range(reads, 9 - k):
            assert not torch.allclose(before[k][t], after[k][t], atol=1e-4)


@torch.inference_mode()
def test_a_draft_knows_no_true_state_behind_its_origin():
    adapter, (text, head, embeddings) = an_adapter(), a_text()
    states = text.states.clone()
    states[:, 5:] += 1  # the text stays
    before, after = (rolled_out(adapter, t, head, embeddings) for t in (text, changed(text, states=states)))
    for k in range(4):
        torch.testing.assert_close(before[k][:5], after[k][:5], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("part", PARTS)
@torch.inference_mode()
def test_without_a_part_it_does_not_depend_on_it(part):
    text, head, embeddings = a_text()
    other = {
        "events": changed(text, events=text.events + 1),
        "prompt": changed(text, prompt=text.prompt + 1, prompt_inputs=text.prompt_inputs + 1),
        "candidates": changed(text, proposed=text.proposed.flip(1), buckets=text.buckets.flip(1)),
    }[part]
    for without in ((), (part,)):
        adapter = an_adapter(without=without)
        same = torch.equal(*(rolled_out(adapter, t, head, embeddings)[2] for t in (text, other)))
        assert same is bool(without)


@torch.inference_mode()
def test_scales_fold_into_the_weights():
    adapter, (text, head, embeddings) = an_adapter(scale=1.0), a_text()
    adapter.initialize(torch.randn(50, D) * 3 + 1, embeddings * 0.1 - 2, embeddings[3:9], torch.randn(5, EVENTS, D) * 7 + 4)
    plain = adapter.folded()
    assert plain.scale is None and adapter.scale is not None
    for x, y in zip(rolled_out(adapter, text, head, embeddings), rolled_out(plain, text, head, embeddings), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_it_begins_along_principal_directions():
    """Of states that lie in as few directions as it is wide it begins by reading all there is."""
    torch.manual_seed(0)
    states = torch.randn(200, 16) @ torch.randn(16, D)
    adapter = AttendingAdapter(D, D, EVENTS, VOCAB, 0, PROMPT, 16)
    adapter.initialize(states, torch.randn(VOCAB, D), torch.randn(9, D), torch.randn(5, EVENTS, D))
    x = (states - states.mean(0)) / states.std(0, correction=0)
    read = adapter.read_states(states)
    again = read @ torch.linalg.lstsq(read, x).solution
    torch.testing.assert_close(again, x, atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------- the cache against recomputation


@pytest.mark.parametrize("without", [(), *[(part,) for part in PARTS]])
@pytest.mark.parametrize("prompt", [0, 3, PROMPT])
@torch.inference_mode()
def test_drafting_over_the_cache_is_the_roll_out(prompt, without):
    """Draft logits of every step from every place, from a cache that was rolled back many times, are those of training."""
    adapter, (text, head, embeddings) = an_adapter(without=without).double(), a_text(prompt=prompt)
    text = PromptedTexts(*(x.double() if x.is_floating_point() else x for x in vars(text).values()))
    head, embeddings, ids = head.double(), embeddings.double(), text.token_ids[0].tolist()
    every = torch.arange(9)[None]
    wanted = list(Reader(adapter, head, embeddings).roll_out(text, every, 4))
    folded = FoldedAttending(adapter, head, embeddings)
    folded.start(text.events)
    folded.read_prompt(text.prompt[0, PROMPT - prompt :], text.prompt_inputs[0, PROMPT - prompt :])
    proposed = torch.stack([text.proposed[0], text.buckets[0]], -1).tolist()
    for begin, end in ((0, 1), (1, 2), (2, 5), (5, 6)):  # how many are verified at once
        before = int(text.before) if begin == 0 else ids[begin - 1]
        output = folded.read(begin, text.states[0, begin:end], [before, *ids[begin:end]], proposed[begin:end])
        for k in range(4):
            place = end - 1 + k
            torch.testing.assert_close(folded.logits(output, proposed[place])[0], wanted[k].logits[0, end - 1])
            torch.testing.assert_close(folded.states([output])[0], wanted[k].expected[0, end - 1])
            if k < 3 and place + 1 < 9:
                output = folded.go_on(place + 1, output, ids[place : place + 2], proposed[place + 1])
            else:
                break


@torch.inference_mode()
def test_drafting_in_bfloat16_stays_close_to_float32():
    """On a CPU as well, bfloat16 takes the operators of a GPU: gelu and the norms are not split there."""
    adapter, (text, head, embeddings) = an_adapter(scale=1.0), a_text()
    ids, proposed = text.token_ids[0].tolist(), torch.stack([text.proposed[0], text.buckets[0]], -1).tolist()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        folded = FoldedAttending(copy.deepcopy(adapter).to(dtype), head.to(dtype), embeddings.to(dtype))
        folded.start(text.events.to(dtype))
        folded.read_prompt(text.prompt[0].to(dtype), text.prompt_inputs[0].to(dtype))
        outputs = [folded.read(0, text.states[0, :3].to(dtype), [int(text.before), *ids[:3]], proposed[:3])]
        outputs += [folded.go_on(3, outputs[0], ids[2:4], proposed[3])]
        logits = [folded.logits(output, proposed[2 + k]) for k, output in enumerate(outputs)]
        found.append(torch.cat([folded.states(outputs).flatten(), *(x[0] for x in logits)]).float())
    assert torch.cosine_similarity(*found, dim=0) > 0.999 and not torch.equal(*found)


def target_and_proposer(model, adapter):
    target = as_decoder(model)
    return target, AttendingProposer(as_decoder(noisy_copy(model, 0.1)), adapter, target)


@pytest.mark.parametrize("accept", ["token", "feature", "relaxed"])
@pytest.mark.parametrize("seed", range(3))
@torch.inference_mode()
def test_live_drafts_are_what_a_fresh_start_would_draft(accept, seed):
    """Every round's drafts, again by a proposer that is told the emitted text at once: nothing is kept between rounds."""
    model, adapter = tiny_llama(seed).double(), an_adapter(seed, ids=range(0, VOCAB, 1 + seed)).double()
    target, proposer = target_and_proposer(model, adapter)
    prompt = PROMPTS[seed]
    rule = {"accept": accept, "threshold": 0.1, "num_draft_tokens": 3, "max_new_tokens": 20}
    got = speculate(target, proposer, prompt_of(*prompt), prompt_of(*prompt), **rule)
    if accept == "token":
        assert got.token_ids == greedy(target, prompt_of(*prompt), 20).token_ids
    at = 1
    for r in got.rounds:
        text = got.token_ids[:at]
        states = states_behind(target.llama, [*prompt, *text])
        fresh = target_and_proposer(model, adapter)[1]
        fresh.start(prompt_of(*prompt), Stopwatch())
        fresh.read_target_prompt(prompt_of(*prompt), ReadPrompt(states[: len(prompt)], target.embeddings_of(prompt)), Stopwatch())
        again = fresh.propose(text, states[len(prompt) - 1 : -1], len(r.proposed), Stopwatch())
        assert again.token_ids.tolist() == r.proposed
        at += (len(r.accepted) if accept == "relaxed" else r.num_accepted) + (r.extra_token is not None)


@pytest.mark.parametrize("seed", range(6))
@torch.inference_mode()
def test_a_proposer_may_be_asked_anything_behind_the_verified_text(seed):
    """Asked to go on behind other drafts than its own, as a table over its shoulder does, it forgets what was not kept."""
    r, model, adapter = random.Random(seed), tiny_llama(seed).double(), an_adapter(seed).double()
    target, proposer = target_and_proposer(model, adapter)
    prompt, text, watch = PROMPTS[seed % 3], r.choices(range(3, VOCAB), k=14), Stopwatch()
    states = states_behind(target.llama, [*prompt, *text])

    def begun(new):
        new.start(prompt_of(*prompt), watch)
        new.read_target_prompt(prompt_of(*prompt), ReadPrompt(states[: len(prompt)], target.embeddings_of(prompt)), watch)
        return new

    begun(proposer)
    verified = 1
    for _ in range(12):
        verified = min(10, verified + r.choice((0, 0, 1, 3)))
        behind = [*text[verified : verified + r.randint(0, 3)], *r.choices(range(3, VOCAB), k=r.randint(0, 2))]
        asked = [*text[:verified], *behind], states[len(prompt) - 1 : len(prompt) - 1 + verified], r.randint(1, 4), watch
        got, again = proposer.propose(*asked), begun(target_and_proposer(model, adapter)[1]).propose(*asked)
        assert got.token_ids.tolist() == again.token_ids.tolist()
        torch.testing.assert_close(got.predicted(), again.predicted())


@pytest.mark.parametrize(("floor", "length"), [(0.7, 1), (0.5, 2), (0.3, 3), (0.01, 6), (0.0, 6)])
def test_it_drafts_while_the_chance_of_all_draft_tokens_is_at_the_floor(floor, length, monkeypatch):
    """Draft tokens of confidence .6 each, at most six."""
    target, proposer = target_and_proposer(tiny_llama(0), an_adapter())
    select = proposer._select
    monkeypatch.setattr(proposer, "_select", lambda *args: select(*args)._replace(confidence=0.6))
    prompt = prompt_of(*PROMPTS[0])
    states = states_behind(target.llama, [*PROMPTS[0], 5])
    proposer.start(prompt, Stopwatch())
    proposer.read_target_prompt(prompt, ReadPrompt(states[: len(PROMPTS[0])], target.embeddings_of(PROMPTS[0])), Stopwatch())
    assert len(proposer.propose([5], states[len(PROMPTS[0]) - 1 : -1], 6, Stopwatch(), floor).token_ids) == length


@pytest.mark.parametrize(("sure", "gamma"), [(0.2, 5), (0.5, 3)])
def test_with_a_table_over_its_shoulder_the_text_is_plain_greedy(sure, gamma):
    target, attending = target_and_proposer(tiny_llama(0), an_adapter())
    table = NGram([("", greedy(target, prompt_of(*p), 30).token_ids) for p in PROMPTS[1:]])
    for prompt in PROMPTS:
        hybrid = HybridProposer(table, attending, sure)
        got = speculate(target, hybrid, prompt_of(*prompt), prompt_of(*prompt), num_draft_tokens=gamma, max_new_tokens=30)
        assert got.token_ids == greedy(target, prompt_of(*prompt), 30).token_ids


@pytest.mark.parametrize("part", PARTS)
def test_a_drafter_without_a_part_loses_nothing(part, monkeypatch):
    target, proposer = target_and_proposer(tiny_llama(0), an_adapter(without=(part,)))
    if part == "events":
        monkeypatch.delattr(type(proposer._draft), "vision_states")  # EventGPT does not run
    for prompt in PROMPTS:
        got = speculate(target, proposer, prompt_of(*prompt), prompt_of(*prompt), max_new_tokens=30)
        assert got.token_ids == greedy(target, prompt_of(*prompt), 30).token_ids


@pytest.mark.parametrize("length", [1, 2, PROMPT, PROMPT + 1, PROMPT + 4])
def test_a_drafter_reads_eventgpts_vision_and_the_end_of_the_targets_prompt(length):
    """Every position of the prompt but the last with the input after it, up to `num_prompt` of them; one id more, for candidates."""
    target, proposer = target_and_proposer(tiny_llama(0), an_adapter())
    ids, n, asked = [1, *range(10, 9 + length)], min(length - 1, PROMPT), []
    states, inputs = torch.randn(2, length, D)
    proposer._folded.start = proposer._folded.read_prompt = lambda *given: asked.extend(given)
    proposer.start(prompt := dataclasses.replace(prompt_of(*ids), question="Where?"), watch := Stopwatch())
    proposer.read_target_prompt(prompt, ReadPrompt(states, inputs), watch)
    events = proposer._draft.vision_states(prompt.ids[None], proposer._draft.encode_vision(prompt.pixels[None]))
    wanted = events, states[length - 1 - n : length - 1], inputs[length - n :]
    assert len(asked) == 3 and all(map(torch.equal, asked, wanted)) and list(watch.ms) == ["draft_prefill"]
    assert proposer._prompt == target.text_ids(ids)[-PROMPT - 1 :] and proposer._question == tables.question_number("Where?")


def test_only_known_ids_are_drafted():
    known = range(3, 12)
    target, proposer = target_and_proposer(tiny_llama(0), an_adapter(ids=known))
    got = speculate(target, proposer, prompt_of(*PROMPTS[0]), prompt_of(*PROMPTS[0]), max_new_tokens=30)
    drafted = {token for r in got.rounds for token in r.proposed}
    assert drafted and drafted <= set(known)


# ----------------------------------------------------------------------------------------------------------------------- training


def states_of(target, draft, prompts, limit) -> HiddenStates:
    """What extraction would store for these prompts."""
    texts = [greedy(target, prompt_of(*p), limit).token_ids for p in prompts]
    width = max(map(len, texts))
    ids, v = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, D)
    p, inputs = torch.zeros(2, len(texts), PROMPT, D)
    events = torch.cat([draft.vision_states(torch.tensor([prompt]), torch.zeros(1, 1)) for prompt in prompts])
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        state = target.prefill([prompt_of(*prompt)])
        before = state.prompt[0, :-1][-PROMPT:]
        ids[i, : len(text)], p[i, PROMPT - len(before) :] = torch.tensor(text), before
        inputs[i, PROMPT - len(before) :] = target.embeddings_of(prompt[-len(before) :])
        v[i, : len(text)] = target.teacher_force(state, torch.tensor([text]))[0]
    lengths = torch.tensor([len(t) for t in texts])
    known = [target.text_ids(prompt)[-PROMPT - 1 :] for prompt in prompts]
    rows = [{"id": str(i), "sequence": str(i), "question": "", "prompt_ids": ids} for i, ids in enumerate(known)]
    return HiddenStates(v, v, ids, torch.arange(width) < lengths[:, None], lengths, rows, {}, events, p, inputs)


@pytest.fixture(scope="module")
def learnt():
    """A target, a drafter, their states on three texts, and an adapter that has learned these."""
    model = tiny_llama(0)
    target, draft = as_decoder(model), as_decoder(noisy_copy(model, 0.1))
    states = states_of(target, draft, PROMPTS, 24)
    cfg = TrainConfig(adapter="attending", bottleneck=16, num_epochs=200, patience=200, lr=1e-2, dropout=0.0)
    adapter, history = train_attending(states, states, target.head_weight.detach(), target.embeddings, cfg)
    assert history[-1]["validation_token_match"] > history[0]["validation_token_match"] + 0.3
    return target, draft, states, adapter


@pytest.mark.parametrize("kind", ["ce_cosine", "ce", "tv"])
@pytest.mark.parametrize("soft", [0.0, 0.3])
def test_the_loss_by_hand(learnt, kind, soft):
    """From the roll-out's logits, draft token by draft token."""
    target, _, states, adapter = learnt
    cfg = TrainConfig(adapter="attending", loss=kind, soft_targets=soft, cosine_weight=0.7, roll_out_steps=2)
    found = proposals(states, tables.NGramTable(adapter.table), leave_out=False)
    (texts,) = prompted_texts(states, found, [torch.arange(3)], "cpu")
    origins = torch.tensor([[0, 3], [5, 1], [2, 22]])  # the last one's second draft token is behind the text
    reader = Reader(adapter, target.head_weight.detach(), target.embeddings)
    wanted, weights = 0.0, 0.0
    with torch.inference_mode():
        for k, step in enumerate(reader.roll_out(texts, origins, 2)):
            for row, column in step.real.nonzero().tolist():
                position = int(step.position[row, column])
                q = step.logits[row, column].double().softmax(0)
                p = (texts.states[row, position] @ reader.head.T).double().softmax(0)
                label = int(reader.column_of[texts.token_ids[row, position]])
                ce = -(1 - soft) * (float(q[label].log()) if label >= 0 else 0.0) + soft * float((p * (p / q).log()).sum())
                cosine = float(torch.cosine_similarity(step.expected[row, column], texts.states[row, position], 0))
                tv = float(1 - torch.minimum(p, q).sum())
                wanted += 0.9**k * {"ce": ce, "tv": 0.9 * tv + 0.1 * ce, "ce_cosine": ce + 0.7 * (1 - cosine)}[kind]
                weights += 0.9**k
        loss, parts, n, correct = losses(reader, texts, origins, 1.0, cfg)
    assert float(loss) == float(parts["loss"]) == pytest.approx(wanted / weights, rel=1e-4)
    assert correct.shape == (3, 2, 2) and 11 == n >= int(correct.sum()) > 0


def test_tokens_per_pass_are_those_that_measuring_finds(learnt):
    """Validation scores of the best epoch of a short training against the measurement of the adapter that was kept."""
    target, _, states, _ = learnt
    given = target.head_weight.detach(), target.embeddings
    cfg = TrainConfig(adapter="attending", bottleneck=16, num_epochs=25, lr=1e-2, roll_out_steps=2, dropout=0.0)
    adapter, history = train_attending(states, states, *given, cfg)
    blocks = metrics.decoding_blocks(attending_scores(adapter, states, *given, 5)[0].match, states.mask, 5, states.ended)
    assert 0.2 < blocks.acceptance_rate(3).value < 0.8
    assert best_of(history)["validation_tokens_per_pass"] == pytest.approx(blocks.tokens_per_pass(states.lengths))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_training_ends_with_the_same_bits(learnt, tmp_path, monkeypatch, optimizer):
    """Dropout and random origins included."""
    target, _, states, _ = learnt
    given = states, states, target.head_weight.detach(), target.embeddings
    cfg = TrainConfig(adapter="attending", bottleneck=16, num_epochs=5, batch_size=2, dropout=0.3, lr=1e-2, optimizer=optimizer)
    whole, history = train_attending(*given, cfg)
    checkpoint, real, count = Checkpoint(tmp_path / "unfinished.pt", "these settings"), attending_training.losses, 0

    def killed(*args):
        nonlocal count
        count += torch.is_grad_enabled()
        if count > 5:  # in the third epoch of two steps
            raise InterruptedError
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(attending_training, "losses", killed)
        train_attending(*given, cfg, checkpoint)
    torch.manual_seed(99)
    resumed, again = train_attending(*given, cfg, checkpoint)
    assert len(history) == 6 and again == history
    assert all(torch.equal(x, y) for x, y in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))


def test_a_variant_is_trained_and_measured_next_to_the_main_adapter(finished, tmp_path):
    """On fewer rows, with the table of these rows."""
    shutil.copytree(finished / "out", tmp_path / "out")
    run = ["--config", str(finished / "tiny.yaml"), "--output_dir", str(tmp_path / "out")]
    main = (tmp_path / "out" / "attending_adapter" / "adapter.pt").read_bytes()
    flags = ["--adapter", "attending", "--bottleneck", "16", "--variant", "half", "--limit", "9", "--loss", "tv"]
    meta = train_hidden_adapter.main([*run, *flags])
    assert meta["rows"] == 9 and meta["config"]["loss"] == "tv" and meta["validation"]["tokens_per_pass"] >= 1
    assert (tmp_path / "out" / "attending_adapter" / "adapter.pt").read_bytes() == main
    adapter = load_attending_adapter(tmp_path / "out" / "attending_adapter_half" / "adapter.pt")[0]
    states = load_hidden_states(tmp_path / "out" / "hidden_states" / "train", events=True, prompt=True)
    first = train_hidden_adapter.first_rows(states, 9)
    assert torch.equal(adapter.table, tables.Counts(answers_of(states)[:9]).entries())
    assert len(first.rows) == len(first.clip_index) == len(first.target) == len(first.mask) == 9 and first.rows == states.rows[:9]
    report = measure_feature_acceptance.main([*run, "--variants", "half"])
    assert {"attending", "attending, half"} <= set(report["chains"])
    with pytest.raises(UserError, match=r"(?s)--variants other: .* holds no adapter.*--adapter attending --variant other"):
        measure_feature_acceptance.main([*run, "--variants", "half", "other"])


@pytest.mark.parametrize("gamma", [1, 3, 5])
def test_a_learned_one_drafts_well_and_loses_nothing(learnt, gamma):
    target, draft, _, adapter = learnt
    kept = 0
    for prompt in PROMPTS:
        live = speculate(
            target, AttendingProposer(draft, adapter, target), *[prompt_of(*prompt)] * 2, num_draft_tokens=gamma, max_new_tokens=24
        )
        assert live.token_ids == greedy(target, prompt_of(*prompt), 24).token_ids
        kept += sum(r.num_accepted for r in live.rounds)
    assert kept > 15


@pytest.mark.parametrize("gamma", [1, 3, 5])
def test_the_trace_identity(learnt, gamma):
    """Rounds computed from one teacher-forced roll-out are the live rounds, exactly."""
    target, draft, states, adapter = learnt
    scores, there = attending_scores(adapter, states, target.head_weight.detach(), target.embeddings, gamma)
    assert there[:, 1:, 0].equal(states.mask[:, 1:]) and not there[:, 0].any() and scores.match.dtype == torch.bool
    blocks = metrics.decoding_blocks(scores.match, states.mask, gamma, states.ended)
    assert blocks.accepted.sum() > 5  # the identity is not about zeros
    for row, prompt in enumerate(PROMPTS):
        proposer = AttendingProposer(draft, adapter, target)
        live = speculate(target, proposer, *[prompt_of(*prompt)] * 2, num_draft_tokens=gamma, max_new_tokens=24)
        assert [r.num_accepted for r in live.rounds] == blocks.accepted[(blocks.rows == row) & (blocks.offered > 0)].tolist()


def test_scores_say_what_is_drafted_live(learnt):
    """The first round's draft tokens up to the first rejected one: after it, scores read the target's text and drafting its own."""
    target, draft, states, adapter = learnt
    scores = attending_scores(adapter, states, target.head_weight.detach(), target.embeddings, 3)[0]
    for row, prompt in enumerate(PROMPTS):
        proposer = AttendingProposer(draft, adapter, target)
        first = speculate(target, proposer, *[prompt_of(*prompt)] * 2, num_draft_tokens=3, max_new_tokens=24).rounds[0]
        drafts = first.proposed[: first.num_accepted + 1]
        assert drafts == scores.says[row, 1, : len(drafts)].tolist()


def test_rows_of_several_batches_are_all_scored(learnt):
    target, _, states, adapter = learnt
    rows, given = [0, 1, 2] * 12, (target.head_weight.detach(), target.embeddings, 2)
    tensors = {name: value[rows] for name, value in vars(states).items() if isinstance(value, torch.Tensor)}
    many = dataclasses.replace(states, **tensors, rows=[states.rows[i] for i in rows])
    (one, there), (found, valid) = (attending_scores(adapter, some, *given) for some in (states, many))
    torch.testing.assert_close(found.cosine, one.cosine[rows], atol=1e-3, rtol=0)
    assert torch.equal(found.says, one.says[rows]) and torch.equal(found.match, one.match[rows]) and torch.equal(valid, there[rows])


def test_event_states_of_another_row_change_the_scores(learnt):
    target, _, states, adapter = learnt
    states = dataclasses.replace(states, events=states.events + torch.tensor([0.0, 1.0, 2.0])[:, None, None])
    given = adapter, states, target.head_weight.detach(), target.embeddings, 2
    own, same, other = (attending_scores(*given, events)[0].cosine for events in (None, [0, 1, 2], [1, 2, 0]))
    assert torch.equal(own, same) and not torch.allclose(own, other)


def test_the_targets_report_the_attending_adapter_of_the_fastest_row(monkeypatch):
    monkeypatch.setattr(targets, "WIDTH", 16)
    adapter, row = an_adapter(), SimpleNamespace(adapter_ms_per_draft=0.1, adapter_ms_ci95=None, draft="attending")
    acceptance = SimpleNamespace(
        chains={"attending": SimpleNamespace(num_draft_tokens=5)}, chained=None, positions="here", cosine=SimpleNamespace(value=0.5)
    )
    cost = SimpleNamespace(t_adapter_ms=0.2, loop=SimpleNamespace(c_chained=None))
    found = targets.adapter_in_use(row, [], HiddenAdapter(8, 8, 4), None, acceptance, cost, "eager", adapter)
    wide = AttendingAdapter(16, 16, targets.EVENT_TOKENS, targets.MOST_IDS, width=16)
    assert (found.name, found.parameters, found.parameters_wide) == ("attending", adapter.num_parameters, wide.num_parameters)
    assert found.measured is acceptance.chains["attending"] and found.overhead_ms == 0.1
    assert found.where.startswith("here, draft tokens 1 to 5") and found.head == "without the head"
    assert min(found.overhead_loop_ms, found.overhead_wide_ms) > 0


def test_training_leaves_the_clip_out_and_validation_does_not(learnt):
    _, _, states, _ = learnt
    counts = tables.Counts(answers_of(states))
    inside, outside = (proposals(states, counts if out else tables.NGramTable(counts.entries()), leave_out=out) for out in (False, True))
    right = [(p.tokens[:, :-1, :2] == states.token_ids[:, 1:, None]).any(-1)[states.mask[:, 1:]].float().mean() for p in (inside, outside)]
    assert right[0] > 0.9 > right[1] + 0.3


def test_places_are_chosen_with_a_token_behind_them():
    lengths = torch.tensor([2, 9, 30])
    places = random_origins(lengths, 500, torch.Generator().manual_seed(0))
    assert (places >= 0).all() and (places < lengths[:, None] - 1).all() and [len(set(row.tolist())) for row in places] == [1, 8, 29]


def test_processes_share_the_rows_of_a_validation(learnt):
    """Together they score what one process scores, each on rows of its own."""
    target, _, states, _ = learnt
    given = states, states, target.head_weight.detach(), target.embeddings, TrainConfig(adapter="attending", bottleneck=16, num_epochs=0)
    exchanged: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    class Recorded(ProcessShare):
        def all_reduce(self, *tensors):
            exchanged[self.rank] += [x.clone() for x in tensors]

    alone = train_attending(*given)[1][0]
    for rank in (0, 1):
        train_attending(*given, share=Recorded(rank, 2))
    (bits, sums), (other_bits, other_sums) = exchanged[0], exchanged[1]
    assert bits.sum() > 0 < other_bits.sum(), "both have something to share"
    assert bits[1].sum() == 0 == other_bits[[0, 2]].sum() and (bits + other_bits).max() <= 1
    passes = tokens_per_pass(bits + other_bits > 0, states.mask, states.ended)
    assert passes == alone["validation_tokens_per_pass"] and 0 < sums[0] < (sums + other_sums)[0]
    assert float((sums + other_sums)[1] / (sums + other_sums)[0]) == pytest.approx(alone["validation_loss"], rel=1e-5)


def test_the_same_seed_learns_the_same(learnt):
    target, _, states, _ = learnt
    cfg = TrainConfig(adapter="attending", bottleneck=16, num_epochs=2)
    one, two = (train_attending(states, states, target.head_weight.detach(), target.embeddings, cfg) for _ in range(2))
    assert one[1] == two[1] and all(torch.equal(a, b) for a, b in zip(one[0].parameters(), two[0].parameters(), strict=True))


@pytest.mark.parametrize(
    ("flags", "part"), [({"reads_prompt": False}, "prompt"), ({"blind": True}, "events"), ({"without": ["candidates"]}, "candidates")]
)
def test_an_input_that_is_left_out_is_not_read(learnt, flags, part):
    target, _, states, _ = learnt
    cfg = TrainConfig(adapter="attending", bottleneck=16, num_epochs=1, **flags)
    adapter = train_attending(states, states, target.head_weight.detach(), target.embeddings, cfg)[0]
    assert adapter.without == {part} and adapter.geometry["without"] == [part]
    folder = train_hidden_adapter.adapter_folder(dataclasses.replace(cfg, output_dir=Path("run")))
    assert (folder.name == "attending_adapter") is (part == "prompt")  # the config decides about the prompt, so it is the main adapter


def test_what_does_not_fit_is_refused(tmp_path):
    for content in ({"state_dict": {}}, {"meta": {"geometry": {"d_draft": 3}}, "state_dict": {}}):
        save_pt(tmp_path / "a.pt", content)
        with pytest.raises(UserError, match=r"(?s)not an attending adapter.*--adapter attending"):
            load_attending_adapter(tmp_path / "a.pt")
    adapter = an_adapter()
    save_pt(tmp_path / "b.pt", {"meta": {"geometry": adapter.geometry, "draft_layers": [1, 2]}, "state_dict": adapter.state_dict()})
    again = load_attending_adapter(tmp_path / "b.pt", [2])[0]
    assert again.geometry == adapter.geometry and torch.equal(again.table, adapter.table) and torch.equal(again.ids, adapter.ids)
    with pytest.raises(UserError, match=r"layer 2, this run ends at 3"):
        load_attending_adapter(tmp_path / "b.pt", [3])
    with pytest.raises(ValueError, match="multiple of 8"):
        AttendingAdapter(8, 8, 2, 6, width=12)


def test_a_proposal_of_nothing_adds_nothing():
    text, head, embeddings = a_text()
    nothing = changed(text, proposed=torch.full_like(text.proposed, tables.NO_TOKEN))
    adapter = an_adapter()
    with torch.inference_mode():
        (step,) = Reader(adapter, head, embeddings).roll_out(nothing, torch.arange(9)[None], 1)
    torch.testing.assert_close(step.logits, step.expected @ head[adapter.ids].T, atol=1e-4, rtol=1e-5)


def test_stored_prompt_states_are_those_that_decoding_meets(finished):
    """One prefill of the whole prompt gives what extraction stored of it, in batches and with the clip read once for all its questions."""
    cfg = parse_config(ExtractConfig, ["--config", str(finished / "tiny.yaml")], "extract_hidden_states")
    target, samples = load_pair(cfg).target, read_samples(cfg.manifests, "train")
    states = load_hidden_states(finished / "out" / "hidden_states" / "train", prompt=True)
    assert states.prompt.shape[1] == 6 and len({len(row["prompt_ids"]) for row in states.rows}) == 1
    for row, sample in enumerate(samples[:7]):
        prompt = target.prepare(sample)
        read, inputs = target.prefill([prompt]).read_prompt()
        assert states.rows[row]["id"] == sample.id and states.rows[row]["prompt_ids"] == target.text_ids(prompt.ids[-7:].tolist())
        torch.testing.assert_close(states.prompt[row], read[-7:-1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(states.prompt_inputs[row], inputs[-6:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(states.target[row, 0], read[-1], atol=1e-4, rtol=1e-4)


def test_without_prompt_states_it_is_told_how_to_extract_them(finished):
    folder = finished / "out" / "hidden_states" / "train"
    meta = {**read_json(folder / "meta.json", ""), "prompt_states": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("feature_alignment.storage.hidden_states.read_hashed_json", lambda *_: meta)
        with pytest.raises(UserError, match=r"(?s)no prompt states.*--prompt_states 160"):
            load_hidden_states(folder, prompt=True)


def test_what_is_missing_of_a_prompt_is_hidden(learnt):
    """A prompt shorter than what is read: its first places hold zeros, and whatever stood there would change nothing."""
    target, _, states, adapter = learnt
    found = proposals(states, tables.NGramTable(adapter.table), leave_out=False)
    (texts,) = prompted_texts(states, found, [torch.arange(3)], "cpu")
    assert texts.prompt_mask.sum(1).tolist() == [3, 2, 5]
    there = texts.prompt_mask[..., None]
    other = changed(texts, prompt=texts.prompt.masked_fill(~there, 7.0), prompt_inputs=texts.prompt_inputs.masked_fill(~there, 7.0))
    reader, every = Reader(adapter, target.head_weight, target.embeddings), torch.zeros(3, 1, dtype=torch.long)
    with torch.inference_mode():
        (one,), (two,) = (list(reader.roll_out(t, every, 1)) for t in (texts, other))
    assert torch.equal(one.logits, two.logits)


def test_an_adapter_that_reads_no_prompt_is_not_given_one(learnt):
    """Texts without their prompts' states draft alike, training does not look at them, and lookup still searches the prompt's ids."""
    target, _, states, _ = learnt
    head, embeddings = target.head_weight.detach(), target.embeddings
    cfg = TrainConfig(adapter="attending", reads_prompt=False, bottleneck=16, num_epochs=20, patience=20, lr=1e-2)
    adapter, _ = train_attending(states, states, head, embeddings, cfg)
    assert adapter.num_prompt == states.prompt.shape[1] and not adapter.reads_prompt
    broken = dataclasses.replace(states, prompt=states.prompt + torch.inf)  # refused where it is read
    again, _ = train_attending(broken, broken, head, embeddings, cfg)
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.parameters(), strict=True))

    found, every = proposals(states, tables.NGramTable(adapter.table), leave_out=False), [torch.arange(3)]
    (full,), (bare,) = (list(prompted_texts(states, found, every, "cpu", reads_prompt)) for reads_prompt in (True, False))
    assert [(x.prompt.shape[1], x.prompt_mask.shape[1]) for x in (full, bare)] == [(adapter.num_prompt,) * 2, (0, 0)]
    reader, origins = Reader(adapter, head, embeddings), torch.tensor([[0, 4, 9]] * 3)
    with torch.inference_mode():
        for one, two in zip(reader.roll_out(full, origins, 3), reader.roll_out(bare, origins, 3), strict=True):
            assert torch.equal(one.logits, two.logits) and torch.equal(one.position, two.position)
