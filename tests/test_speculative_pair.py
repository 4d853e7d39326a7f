"""The Python interface: answer, stream, adapters by directory."""

from __future__ import annotations

import json

import pytest
from conftest import main_of

from feature_alignment import SpeculativePair
from feature_alignment.adapters import share
from feature_alignment.cli.console import UserError


@pytest.fixture(scope="module")
def clip(finished):
    row = json.loads((finished / "scenes" / "test.jsonl").read_text().splitlines()[0])
    folder = finished / "scenes"
    return {"events": folder / row["events"], "video": str(folder / row["video"]), "question": row["question"]}


@pytest.fixture(scope="module")
def pair(finished):
    return SpeculativePair.from_config(finished / "tiny.yaml", draft="chained", num_draft_tokens=3)


def test_an_answer_is_that_of_the_script_and_of_plain_decoding(pair, clip, finished):
    answer, plain = pair.answer(**clip), pair.answer_plain(**clip)
    script = main_of("feature_sd_inference")(["--config", str(finished / "tiny.yaml"), "--draft", "chained", "--num_draft_tokens", "3"])
    assert answer.token_ids == plain.token_ids == script["token_ids"] and answer.text == plain.text == script["text"]
    assert [r.to_json()["proposed"] for r in answer.rounds] == [r["proposed"] for r in script["rounds"]] and plain.rounds == []
    assert answer.stats["passes"] == script["passes"] and answer.stats["total_ms"] > 0


def test_a_stream_yields_the_answer_in_pieces_of_whole_characters(pair, clip, monkeypatch):
    assert "".join(pair.stream(**clip)) == pair.answer(**clip).text
    monkeypatch.setattr(pair, "text_of", lambda ids: "".join(f"<{i}>" for i in ids))
    assert "".join(pieces := list(pair.stream(**clip))) == pair.answer(**clip).text and len(pieces) > 1
    incomplete = "\N{REPLACEMENT CHARACTER}"
    texts = iter(["a", f"ab{incomplete}", f"ab{incomplete}{incomplete}", *["abé!"] * 50])
    monkeypatch.setattr(pair, "text_of", lambda ids: next(texts))
    assert "".join(pair.stream(**clip)) in ("a", "abé!")  # nothing of a character that is not complete


def test_a_shared_adapter_drafts_the_same_tokens(pair, clip, finished, tmp_path):
    config = ["--config", str(finished / "tiny.yaml")]
    target, draft = finished / "pair" / "video_llava", finished / "pair" / "eventgpt"
    for kind, drafter in (("chained", "chained"), ("hidden", "aligned")):
        directory = tmp_path / kind
        share.main([*config, "--adapter", kind, "--to", str(directory), "--license", "apache-2.0"])
        card = (directory / "README.md").read_text()
        assert card.startswith("---\nlicense: apache-2.0\n") and "exact match 1.000" in card and "Not measured" not in card
        settings = {"max_new_tokens": 12, "num_draft_tokens": 3, "threads": 1}
        shared = SpeculativePair.from_pretrained(target, draft, directory, **settings)
        own = SpeculativePair.from_config(finished / "tiny.yaml", draft=drafter, num_draft_tokens=3)
        a, b = shared.answer(**clip), own.answer(**clip)
        assert [r.proposed for r in a.rounds] == [r.proposed for r in b.rounds] and a.token_ids == b.token_ids


def test_a_shared_adapter_of_another_pair_is_refused(finished, tmp_path):
    from feature_alignment.adapters.chained import ChainedAdapter

    target, draft = finished / "pair" / "video_llava", finished / "pair" / "eventgpt"
    ChainedAdapter(d_target=32, d_event=16, num_events=4, width=8).save_pretrained(tmp_path / "a", {"draft_layers": [3]})
    with pytest.raises(UserError, match="states of width 16 to 32"):
        SpeculativePair.from_pretrained(target, draft, tmp_path / "a")
    with pytest.raises(UserError, match="no adapter at"):
        SpeculativePair.from_pretrained(target, draft, tmp_path / "none")


def test_wrong_settings_and_files_are_refused_by_name(pair, clip, finished):
    with pytest.raises(UserError, match="threshhold"):
        SpeculativePair.from_config(finished / "tiny.yaml", threshhold=0.5)
    with pytest.raises(UserError, match=r"nothing at absent\.mp4"):
        pair.answer(**{**clip, "video": "absent.mp4"})


def test_a_trimmed_draft_vocabulary_changes_no_text(clip, finished, pair):
    trimmed = SpeculativePair.from_config(finished / "tiny.yaml", draft="chained", num_draft_tokens=3, draft_vocabulary=3)
    ids = set(trimmed.sources.draft_ids.tolist())
    assert len(ids) == 3 and trimmed.target.eos_ids <= ids
    answer = trimmed.answer(**clip)
    assert answer.token_ids == pair.answer(**clip).token_ids
    assert all(token in ids for r in answer.rounds for token in r.proposed) and any(r.proposed for r in answer.rounds)
    sampled = SpeculativePair.from_config(finished / "tiny.yaml", draft="chained", draft_vocabulary=3, temperature=1.0)
    assert all(token in ids for r in sampled.answer(**clip).rounds for token in r.proposed)
