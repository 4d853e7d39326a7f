"""The size of the draft vocabulary: counted on some answers, judged on others, and chosen only where it pays."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import as_decoder, tiny_llama
from test_sources import opened, save_adapter
from torch.nn import functional as F

from feature_alignment import SpeculativePair
from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.folded import FoldedChain
from feature_alignment.cli.config import parse_config
from feature_alignment.decoding import draft_vocabulary
from feature_alignment.decoding.draft_vocabulary import Candidate, best_size, coverages, sizes
from feature_alignment.decoding.settings import DecodingConfig
from feature_alignment.inputs.samples import read_samples
from feature_alignment.storage.files import write_json


def write_answers(out, *answers):
    rows = [{"sample_id": str(i), "query": "q", "egpt_tokens": [7], "vl_tokens": tokens} for i, tokens in enumerate(answers)]
    write_json(out / "token_pairs" / "train.json", {"results": rows})


def test_coverage_is_that_of_answers_that_were_not_counted():
    counted, held_out = [[5, 5, 7], [5, 9, 2]], [[5, 8, 2], [9, 9, 2]]
    assert coverages([*counted, *held_out], [2, 3, 64], ends=[2]) == [3 / 6, pytest.approx(3 / 6), pytest.approx(5 / 6)]
    assert coverages([[5], [5]], [64], ends=[2]) == [1.0] and coverages([[5], []], [64], ends=[2]) == [0.0]
    assert sizes(1500) == [256, 512, 1024, 1500] and sizes(1024) == [256, 512, 1024] and sizes(64) == [64]


def test_a_trimmed_head_is_chosen_where_it_saves_more_than_its_coverage_loses():
    """One pass takes 10 ms. Half the cost of a draft is worth one lost token in a thousand, and not one in five."""
    whole = Candidate(32_000, 1.0, 2.0)
    dear, cheap = Candidate(1024, 0.8, 1.0), Candidate(4096, 0.999, 1.0)
    size, gain = best_size([dear, cheap, whole], 0.8, 10.0)
    assert size == 4096 and 1.1 < gain < 2
    assert best_size([dear, whole], 0.8, 10.0) == (32_000, 1.0)
    assert best_size([cheap._replace(draft_ms=1.99), whole], 0.8, 10.0) == (32_000, 1.0), "a gain within noise is none"
    assert best_size([cheap, whole], 0.8, 10_000.0) == (32_000, 1.0), "drafting costs nothing next to a pass"
    assert best_size([whole], 0.8, 10.0) == (32_000, 1.0)


def test_the_expected_speed_is_its_closed_form():
    """Every draft token accepted, at a tenth of a pass each: 33 tokens for 1 + 3.2 passes at the longest draft."""
    assert draft_vocabulary._expected_speed(1.0, 0.1) == pytest.approx(33 / 4.2)
    assert draft_vocabulary._expected_speed(0.5, 0.4) == pytest.approx(1.5 / 1.4), "the second draft token would cost more than it brings"


@pytest.mark.parametrize(("cost_of_all", "ids"), [(1.0, None), (9.0, [2, 5, 7, 9])])
def test_auto_trims_the_head_only_where_it_pays(tmp_path, monkeypatch, caplog, cost_of_all, ids):
    monkeypatch.setattr(draft_vocabulary, "sizes", lambda vocab_size: [4, vocab_size])
    monkeypatch.setattr(draft_vocabulary, "draft_ms", lambda adapter, target, numbers, steps: [1.0, cost_of_all])
    monkeypatch.setattr(draft_vocabulary, "step_ms", lambda target, question: 10.0 if question == "q" else None)
    asked, choose = [], draft_vocabulary.best_size
    monkeypatch.setattr(draft_vocabulary, "best_size", lambda *given: asked.append(given) or choose(*given))
    caplog.set_level("INFO")
    write_answers(tmp_path, [5, 9, 5, 7, 9, 5, 4, 7], [5, 9, 7, 8])
    sources = opened(tmp_path, draft_vocabulary="auto")
    sources._pair.target.eos_ids = {2, 64}  # one of them is not shared by both models
    save_adapter(sources.chained_path, ChainedAdapter(32, 32, 1, 16), [3], validation={"token_match": 0.9})
    found = sources.draft_ids
    assert (found if found is None else found.tolist()) == ids
    assert ("auto: 4 of 64 ids, 75.00 %" if ids else "auto: all 64 ids") in caplog.text
    sources.use_adapter(sources.chained_adapter, {})  # of unknown acceptance
    assert sources._paying_vocabulary() == (4 if ids else 64)
    assert asked == [([Candidate(4, 0.75, 1.0), Candidate(64, 0.75, cost_of_all)], acceptance, 10.0) for acceptance in (0.9, 0.8)]


@torch.inference_mode()
def test_a_timed_draft_token_is_one_of_one_prompt_with_a_head_of_so_many_ids(monkeypatch):
    """However often it is drafted, it is the same token."""
    torch.manual_seed(0)
    target, adapter = as_decoder(tiny_llama(0)), ChainedAdapter(32, 32, 3, 16).eval()
    captured, heads, contexts, expect = [], [], [], FoldedChain.expect
    linear = lambda x, head, bias: heads.append((len(x), len(head), len(bias))) or F.linear(x, head, bias)  # noqa: E731
    monkeypatch.setattr(draft_vocabulary, "F", SimpleNamespace(linear=linear))
    monkeypatch.setattr(draft_vocabulary, "captured", lambda function, steps: captured.append(steps) or function)
    monkeypatch.setattr(draft_vocabulary, "call_ms", lambda call, *_: [int(call()), int(call())])
    monkeypatch.setattr(FoldedChain, "expect", lambda self, memory, seen: contexts.append(len(seen.keys)) or expect(self, memory, seen))
    found = draft_vocabulary.draft_ms(adapter, target, [4, 64], "graphs")
    assert captured == ["graphs"] * 2 and contexts == [1] * 4 and heads == [(1, 4, 4)] * 2 + [(1, 64, 64)] * 2
    chain, z = FoldedChain(adapter, target.head_weight, target.embeddings), torch.ones(1, 16)
    context = chain.context(adapter.encode_events(torch.ones(1, 3, 32)))
    logits = chain.logits(chain.expect(chain.go_on(z, torch.zeros(1, dtype=torch.long), z), context))[0]
    assert found == [[int(logits[:n].argmax())] * 2 for n in (4, 64)]


def test_a_timed_pass_reads_one_token_after_the_question(monkeypatch):
    """However often it is read."""
    target, read = as_decoder(tiny_llama(0)), []
    step = target.step
    target.encode_prompt = lambda question: torch.tensor([1, *map(ord, question)])
    target.step = lambda state, token: read.append((state.length, state.cache.get_seq_length(), token.shape)) or step(state, token)
    monkeypatch.setattr(draft_vocabulary, "call_ms", lambda call, *_: [call() for _ in range(3)])
    draft_vocabulary.step_ms(target, "\x05\x09")
    assert read == [(3, 3, (1, 1))] * 3


def test_auto_measures_this_pair_and_changes_no_text(tiny_run, monkeypatch, caplog, tmp_path):
    caplog.set_level("INFO")
    write_answers(tmp_path, [5, 9, 300, 7, 9, 5, 4, 7], [5, 300])
    answers = []
    for size in (None, "auto"):
        words = ["--config", str(tiny_run / "tiny.yaml"), "--draft", "chained", "--output_dir", str(tmp_path)]
        words += [] if size is None else ["--draft_vocabulary", size]
        cfg = parse_config(DecodingConfig, words, "feature_sd_inference")
        torch.manual_seed(0)
        adapter = ChainedAdapter(d_target=32, d_event=32, num_events=42, width=8).eval()
        monkeypatch.setattr(draft_vocabulary, "MARGIN", 0.0)  # the best trimmed size, whether or not it pays
        pair = SpeculativePair(cfg, (adapter, {}))
        sample = read_samples(cfg.manifests, "test")[0]
        answers.append(pair.answer(events=sample.events, video=sample.video, question=sample.question).token_ids)
    assert answers[0] == answers[1] and "draft vocabulary  auto: " in caplog.text
    assert len(pair.sources.draft_ids) <= 512
