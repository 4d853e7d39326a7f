"""The Python interface: answer, stream, adapters by directory."""

from __future__ import annotations

import json
import random

import pytest
import torch
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


def test_a_stream_yields_the_answer_in_pieces(pair, clip, monkeypatch):
    assert "".join(pieces := list(pair.stream(**clip))) == pair.answer(**clip).text and all(pieces)
    monkeypatch.setattr(pair, "text_of", lambda ids: "".join(f"<{i}>" for i in ids))
    assert "".join(pieces := list(pair.stream(**clip))) == pair.answer(**clip).text and len(pieces) > 1


class Scripted:
    """A speculation that emits given tokens, some in each round."""

    def __init__(self, tokens, sizes):
        self.token_ids, self.sizes, self.emitted = tokens, sizes, tokens[:1]

    is_finished = property(lambda self: len(self.emitted) == len(self.token_ids))
    prefill = lambda self, *_: None  # noqa: E731
    finish = lambda self: self  # noqa: E731

    def advance(self):
        self.emitted = self.token_ids[: len(self.emitted) + next(self.sizes)]


def test_pieces_are_whole_characters_whatever_the_bytes_and_rounds(pair, clip, monkeypatch):
    """Valid and invalid UTF-8 in byte tokens between words: the pieces are the text, and none shows a character that is incomplete."""
    tokenizer, chance, valid = pair.target.tokenizer, random.Random(0), 0
    words = tokenizer.encode("the car is red", add_special_tokens=False)

    def begun(prompts):
        pair._speculating = Scripted(tokens, iter(lambda: chance.randint(1, 3), 0))
        return pair._speculating

    monkeypatch.setattr(pair, "_speculation", begun)
    for _ in range(300):
        tokens = []
        for _ in range(chance.randint(1, 6)):
            text = "".join(chance.choices("éü😀漢", k=chance.randint(1, 2))).encode()
            spoiled = text[: chance.randint(1, len(text))] if chance.random() < 0.3 else text
            tokens += [chance.choice(words)] + [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in spoiled]
        pieces, wanted = list(pair.stream(**clip)), pair.text_of(tokens)
        assert "".join(pieces) == wanted and all(pieces)
        if "\N{REPLACEMENT CHARACTER}" not in wanted:
            valid += 1
            assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
        assert all(not piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in pieces[:-1])
    assert 30 < valid < 270


def test_a_stream_is_not_continued_after_another_answer_was_begun(pair, clip, monkeypatch):
    monkeypatch.setattr(pair, "text_of", lambda ids: "".join(f"<{i}>" for i in ids))  # the tiny pair says bytes of no character
    stream = pair.stream(**clip)
    next(stream)
    answer = pair.answer(**clip)
    with pytest.raises(ValueError, match="another answer of this pair was begun"):
        next(stream)
    assert pair.answer(**clip).token_ids == answer.token_ids


SHARED = {"max_new_tokens": 12, "num_draft_tokens": 3, "threads": 1}


@pytest.mark.parametrize(("kind", "drafter"), [("chained", "chained"), ("hidden", "aligned"), ("attending", "attending")])
def test_a_shared_adapter_drafts_the_same_tokens(clip, finished, tmp_path, kind, drafter):
    target, draft = finished / "pair" / "video_llava", finished / "pair" / "eventgpt"
    share.main(["--config", str(finished / "tiny.yaml"), "--adapter", kind, "--to", str(tmp_path), "--license", "apache-2.0"])
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n") and "exact match 1.000" in card and "Not measured" not in card
    assert f"- {drafter} + token, 3: " in card and (kind == "attending") == ("AttendingAdapter.from_pretrained" in card)
    shared = SpeculativePair.from_pretrained(target, draft, tmp_path, **SHARED)
    own = SpeculativePair.from_config(finished / "tiny.yaml", draft=drafter, num_draft_tokens=3)
    a, b = shared.answer(**clip), own.answer(**clip)
    assert [r.proposed for r in a.rounds] == [r.proposed for r in b.rounds] and a.token_ids == b.token_ids
    assert shared.sources.known_acceptance(drafter) == own.sources.known_acceptance(drafter) is not None


def test_the_profile_of_a_drafter_is_on_the_card_with_its_interval(finished, tmp_path):
    share.main(["--config", str(finished / "tiny.yaml"), "--to", str(tmp_path)])
    profiles = json.loads((finished / "out" / "benchmark" / "speculation_profile.json").read_text())["profiles"]
    (profile,) = [p for p in profiles if p["draft"] == "chained"]
    low, high = profile["mean_acceptance_length_ci95"]
    line = f"{profile['mean_acceptance_length']:.2f} [{low:.2f}, {high:.2f}] tokens per round"
    assert f"- at draft length {profile['num_draft_tokens']}: {line}" in (tmp_path / "README.md").read_text()


def test_a_hub_checkpoint_is_named_with_its_revision(finished, tmp_path, monkeypatch):
    found = {"org/target": "abc123", "org/draft": "def456"}
    monkeypatch.setattr(share, "hub_revision", lambda path: f"{str(path)[4:]}@{found[str(path)[4:]]}")
    flags = [
        "--config",
        str(finished / "tiny.yaml"),
        "--to",
        str(tmp_path / "a"),
        "--target_id",
        "hub:org/target",
        "--draft_id",
        "hub:org/draft",
    ]
    share.main(flags)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "target org/target (revision abc123), draft org/draft (revision def456)" in card
    assert 'base_model: ["org/target", "org/draft"]' in card
    monkeypatch.setattr(share, "hub_revision", lambda path: f"{str(path)[4:]} (not in the cache)")
    with pytest.raises(UserError, match="hub:org/target is not in the local cache"):
        share.main(flags)


def test_a_shared_adapter_of_another_pair_is_refused(finished, tmp_path):
    from feature_alignment.adapters.attending import AttendingAdapter
    from feature_alignment.adapters.chained import ChainedAdapter

    target, draft = finished / "pair" / "video_llava", finished / "pair" / "eventgpt"
    meta = {"draft_layers": [3]}
    ChainedAdapter(d_target=32, d_event=16, num_events=4, width=8).save_pretrained(tmp_path / "a", meta)
    with pytest.raises(UserError, match="states of width 16 to 32"):
        SpeculativePair.from_pretrained(target, draft, tmp_path / "a")
    ChainedAdapter(d_target=32, d_event=32, num_events=4, width=8).save_pretrained(tmp_path / "c", meta)
    with pytest.raises(UserError, match=r"reads 4 event tokens of a clip; this pair has \d\d"):
        SpeculativePair.from_pretrained(target, draft, tmp_path / "c")
    with pytest.raises(UserError, match="no adapter at"):
        SpeculativePair.from_pretrained(target, draft, tmp_path / "none")
    num_events = json.loads((finished / "out" / "chained_adapter" / "meta.json").read_text())["geometry"]["num_events"]
    adapter = AttendingAdapter(32, 32, num_events, num_ids=2, num_entries=1, width=8)
    adapter.ids.copy_(torch.tensor([5, 10**6]))
    adapter.save_pretrained(tmp_path / "b", meta)
    with pytest.raises(UserError, match="token ids up to 1000000; this pair has ids below"):
        SpeculativePair.from_pretrained(target, draft, tmp_path / "b")


def test_an_adapter_without_its_layers_needs_them_as_a_setting(finished, tmp_path):
    from feature_alignment.adapters.chained import ChainedAdapter
    from feature_alignment.storage.pretrained import save_pretrained

    target, draft = finished / "pair" / "video_llava", finished / "pair" / "eventgpt"
    adapter = ChainedAdapter.from_pretrained(shared_chained(finished, tmp_path / "a"))
    adapter.save_pretrained(tmp_path / "b")
    with pytest.raises(UserError, match=r"records EventGPT's layers None, got draft_layers=None"):
        SpeculativePair.from_pretrained(target, draft, tmp_path / "b")
    layers = json.loads((finished / "out" / "chained_adapter" / "meta.json").read_text())["draft_layers"]
    SpeculativePair.from_pretrained(target, draft, tmp_path / "b", draft_layers=layers)
    with pytest.raises(UserError, match=r"got draft_layers=\[1\]; expected these layers"):
        SpeculativePair.from_pretrained(target, draft, tmp_path / "a", draft_layers=[1])
    save_pretrained(adapter, "quantum", {}, tmp_path / "c")
    with pytest.raises(UserError, match="type 'quantum', expected hidden, chained, attending"):
        SpeculativePair.from_pretrained(target, draft, tmp_path / "c")


def shared_chained(finished, directory):
    share.main(["--config", str(finished / "tiny.yaml"), "--to", str(directory)])
    return directory


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
