"""Timing of methods on the same prompts: the order of turns, the reported ratios, and texts that differ."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import as_decoder, prompt_of, tiny_llama

from feature_alignment.adapters import hidden
from feature_alignment.benchmark import fidelity, timing
from feature_alignment.benchmark.results import AcceptedKinds
from feature_alignment.benchmark.timing import Timed
from feature_alignment.cli.config import Common
from feature_alignment.cli.console import UserError
from feature_alignment.decoding.generation import Generation, Round
from feature_alignment.decoding.sources import Sources
from feature_alignment.demo import captions
from feature_alignment.demo.world import HIDDEN_FROM_EVENTS, WORDS
from feature_alignment.measurement.lexicon import Lexicon
from feature_alignment.measurement.metrics import bootstrap_ratio
from feature_alignment.models.pair import Pair


def taking(*ms: float) -> list[Generation]:
    return [Generation([1], 0, one, {"target_prefill": 1.0}) for one in ms]


def test_every_method_has_every_turn():
    order = []
    methods = {name: lambda i, name=name: order.append((i, name)) or name for name in "abc"}
    timed = timing.run_in_turns(methods, 4, 2, lambda numbers: numbers)
    turns = ["abc", "bca", "bca", "cab", "cab", "abc", "abc", "bca"]
    assert order == [(i // 2, name) for i, turn in enumerate(turns) for name in turn]
    assert {name: t.generations for name, t in timed.items()} == {name: [[name] * 2] * 4 for name in "abc"}


def test_a_speed_up_is_a_ratio_of_sums_over_all_runs():
    plain = Timed([taking(10, 11, 90), taking(20, 20, 20), taking(30, 29, 31)])
    faster = Timed([taking(5, 6, 5), taking(25, 25, 25), taking(10, 10, 70)])
    total = timing.speedup(plain, faster, ["a", "b", "b"], lambda g: g.total_ms)
    a, b = np.array([37.0, 20, 30]), np.array([16 / 3, 25, 30])
    assert total.value == pytest.approx(a.sum() / b.sum()) and (total.count, total.total) == pytest.approx((a.sum(), b.sum()))
    assert total.ci95 == pytest.approx(bootstrap_ratio(a, b, ["a", "b", "b"]))
    assert total.p50 == pytest.approx(1.0) and total.share_slower == pytest.approx(1 / 3)
    assert (total.p05, total.p95) == pytest.approx(tuple(np.percentile(a / b, (5, 95))))
    decoding = timing.speedup(plain, faster, ["a", "b", "b"], lambda g: g.decode_ms)
    assert decoding.value == pytest.approx((a.sum() - 3) / (b.sum() - 3))
    assert plain.texts == [[1]] * 3


def two_words(slot: str) -> tuple[str, str, str]:
    """A value's word in both dialects, and a word of another value of the slot."""
    values = [words for words in WORDS[slot].values() if len(words) > 1 and all(words[:2]) and words[0] != words[1]]
    return values[0][0], values[0][1], values[1][0]


def test_accepted_draft_tokens_are_the_same_a_synonym_or_an_error():
    word, synonym, other = two_words("kind")
    vocabulary = [word, synonym, other, next(iter(WORDS["colour"].values()))[0]]
    target = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids, **_: " ".join(vocabulary[i] for i in ids)))
    said = [(0, 0, True), (1, 0, True), (2, 0, True), (3, 0, True), (0, 3, True), (3, 3, True), (2, 0, False)]  # drafted, said, kept
    drafted, says, kept = (list(part) for part in zip(*said, strict=True))
    text = Generation([3, 0], 1, 1.0, {}, [Round(drafted, says, kept, None, None, False, {}, "length")])
    lexicon = Lexicon.from_json(captions.lexicon())
    facts = lexicon.facts_in(f"{vocabulary[3]} {word}")
    assert word in WORDS["kind"][facts["kind"]] and "colour" in facts and "colour" in HIDDEN_FROM_EVENTS
    samples = [SimpleNamespace(sequence=str(i), facts=known) for i, known in enumerate((facts, {"colour": facts["colour"]}))]
    texts = Timed([[text], [text]])
    assert fidelity.accepted_kinds(lexicon, target, texts) == AcceptedKinds(kept=12, same=4, synonym=2, error=6)
    visible, hidden_facts = fidelity.true_facts(lexicon, target, samples, texts)
    assert (hidden_facts.count, hidden_facts.total) == (2, 2)
    assert (visible.count, visible.total) == (len(facts) - 1, 2 * (len(facts) - 1))


def test_fidelity_of_a_text():
    """Exact match, agreement over the longer text, and log-likelihood per token, each by hand."""
    model = as_decoder(tiny_llama(0))
    prompts = [prompt_of(1, 5, 9), prompt_of(1, 7)]
    likelihood = fidelity.log_likelihoods(model, prompts)
    texts = [[5, 6, 7], [8, 9]]
    own = [[5, 6, 7], [8, 3, 4, 5]]
    by_hand = []
    for prompt, text in zip(prompts, texts, strict=True):
        ids = [*prompt.ids.tolist(), *text]
        logits = model.lm_head(model.llama(input_ids=torch.tensor([ids])).last_hidden_state[0]).log_softmax(-1)
        by_hand.append(sum(float(logits[len(ids) - len(text) - 1 + i, token]) for i, token in enumerate(text)))
    assert [likelihood(i, tuple(text)) for i, text in enumerate(texts)] == pytest.approx(by_hand, rel=1e-4)
    samples = [SimpleNamespace(sequence=str(i), facts=None) for i in range(2)]
    timed, plain = (Timed([[Generation(text, 1, 1.0, {})] for text in some]) for some in (texts, own))
    found = fidelity.fidelity(model, likelihood, samples, timed, plain)
    assert (found.exact_match.count, found.exact_match.total) == (1, 2)
    assert (found.token_agreement.count, found.token_agreement.total) == (3 + 1, 3 + 4)
    assert found.log_likelihood.value == pytest.approx(sum(by_hand) / 5, rel=1e-4) and set(found.to_json()) == {
        "exact_match",
        "token_agreement",
        "log_likelihood",
    }


def test_steps_are_timed_without_rollback(monkeypatch):
    """Five turns of warming up, then the median; the cache is as before; the head belongs to a step where it is asked for."""
    model, prompt = as_decoder(tiny_llama(0)), prompt_of(1, 5, 9)
    asked, read, real = [], [], model.step
    monkeypatch.setattr(model, "step", lambda state, ids: (read.append((state.length, ids.shape[1])), real(state, ids))[1])
    monkeypatch.setattr(model, "lm_head", lambda hidden: (asked.append(1), hidden)[1])
    found = timing.step_ms(model, prompt, (1, 4), repeats=3)
    assert list(found) == [1, 4] and min(found.values()) > 0 and not asked
    assert read == [(3, 1), (3, 4)] * 8
    timing.step_ms(model, prompt, (2,), repeats=1, with_head=True)
    assert len(asked) == 6


def test_a_call_is_timed_after_it_has_warmed_up(monkeypatch):
    """Median milliseconds of the timed calls: 7, 1 and 3 s, after two that do not count."""
    clock, calls = [0.0], []
    took = iter([100.0, 100.0, 7.0, 1.0, 3.0])

    def call():
        calls.append(1)
        clock[0] += next(took)

    monkeypatch.setattr(hidden.time, "perf_counter", lambda: clock[0])
    assert hidden.call_ms(call, 3, warmup=2) == 3000.0 and len(calls) == 5


def test_an_untrained_adapter_fits_the_pair(tmp_path):
    """Two layers side by side into a target of another width; the others read what EventGPT's last layer sees."""
    target, draft = as_decoder(tiny_llama(0, layers=3)), as_decoder(tiny_llama(1, layers=3, hidden_size=16), taps=[1, 3])
    made = Sources(Pair(target, draft), Common(output_dir=tmp_path), untrained=True)
    assert made.adapter.geometry == {"d_draft": 32, "d_target": 32, "bottleneck": 256}
    for geometry in (made.chained_adapter.geometry, made.attending_adapter.geometry):
        assert (geometry["d_target"], geometry["d_event"], geometry["num_events"]) == (32, 16, 1)
    assert made.attending_adapter.ids.tolist() == list(range(64)) and not made.attending_adapter.training
    with pytest.raises(UserError, match="train_hidden_adapter"):
        Sources(Pair(target, draft), Common(output_dir=tmp_path)).adapter  # noqa: B018
