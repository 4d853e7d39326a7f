"""The size of the draft vocabulary: counted on some answers, judged on others, and chosen only where it pays."""

from __future__ import annotations

import pytest
import torch
from test_sources import opened, save_adapter

from feature_alignment import SpeculativePair
from feature_alignment.adapters.chained import ChainedAdapter
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
    monkeypatch.setattr(draft_vocabulary, "step_ms", lambda target, question: 10.0)
    caplog.set_level("INFO")
    write_answers(tmp_path, [5, 9, 5, 7, 9, 5, 4, 7], [5, 9, 7])
    sources = opened(tmp_path, draft_vocabulary="auto")
    save_adapter(sources.chained_path, ChainedAdapter(32, 32, 1, 16), [3], validation={"token_match": 0.9})
    found = sources.draft_ids
    assert (found if found is None else found.tolist()) == ids
    assert ("auto: 4 of 64 ids, 100.00 %" if ids else "auto: all 64 ids") in caplog.text and "texts" in sources.files("chained")


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
