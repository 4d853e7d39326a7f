"""One sample list for every script, from JSON lines or the EventGPT/DSEC JSON."""

from __future__ import annotations

import json

import pytest
from conftest import SHARED, needs

from feature_alignment.console import UserError
from feature_alignment.inputs.samples import read_questions, read_samples


def lines(tmp_path, *rows):
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return {"test": path}


def row(i=0, **changes):
    return {"id": f"c{i}-q0", "sequence": "s", "question": "What?", "events": f"{i}.npy", "video": f"{i}.mp4", **changes}


def dsec_row(clip, sequence="zurich_00_a", split="test", **changes):
    turns = [{"from": "human", "value": "<event>\nWhat is this scene about?"}, {"from": "gpt", "value": "A street."}]
    made = {"id": f"{sequence}_{clip}", "split": split, "event_data": f"{sequence}/{clip}.npy", "video_data": f"{sequence}/{clip}"}
    return {**made, "mp4_data": f"{sequence}/{clip}.mp4", "event_image": None, "conversations": turns, **changes}


def dsec(tmp_path, *rows):
    path = tmp_path / "my_dsec.json"
    path.write_text(json.dumps(rows))
    return dict.fromkeys(("train", "validation", "test"), path)


def test_lines_give_samples_in_their_order(tmp_path):
    samples = read_samples(lines(tmp_path, row(1), row(0, answer="A car.", event_start_ms=250)), "test")
    assert [s.id for s in samples] == ["c1-q0", "c0-q0"]
    assert samples[1].answer == "A car." and samples[1].event_start_ms == 250.0 and samples[0].events == tmp_path / "1.npy"


def test_the_dsec_layout(tmp_path):
    for folder, name in (("event_npy", "000001.npy"), ("mp4", "000001.mp4")):
        (tmp_path / folder / "zurich_00_a").mkdir(parents=True)
        (tmp_path / folder / "zurich_00_a" / name).touch()
    two = [*dsec_row("x")["conversations"], {"from": "human", "value": "How many cars?"}, {"from": "gpt", "value": "Two."}]
    manifests = dsec(
        tmp_path,
        dsec_row("000001"),
        dsec_row("000002", mp4_data=None),
        dsec_row("000001", "thun_00_a", "val", conversations=two),
        dsec_row("000001", "interlaken_00_c", "train"),
    )
    test = read_samples(manifests, "test")
    assert [s.sequence for s in test] == ["zurich_00_a"] * 2
    assert test[0].question == "What is this scene about?" and test[0].answer == "A street."
    assert test[0].events == tmp_path / "event_npy/zurich_00_a/000001.npy" and test[0].events.exists() and test[0].video.exists()
    assert test[1].video == tmp_path / "video/zurich_00_a/000002"  # frames where there is no mp4
    assert [(s.id, s.question) for s in read_samples(manifests, "validation")] == [
        ("thun_00_a_000001-q0", "What is this scene about?"),
        ("thun_00_a_000001-q1", "How many cars?"),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([dsec_row("1", split="train"), dsec_row("2", split="test")], "is in split 'train' and in 'test'"),
        ([dsec_row("1", split="train")], r"no rows of split 'test'; it has train \(1 sequences\)"),
        ([dsec_row("1"), dsec_row("1")], "occurs twice"),
        ([dsec_row("1", conversations=[])], "row 1.*no human turn"),
        ([{"id": 1}], "row 1.*event_data"),
        ([5], "row 1"),
        ([], "is empty"),
    ],
)
def test_a_dsec_file_that_would_mislead_is_refused(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_samples(dsec(tmp_path, *rows), "test")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(0), row(0)], "'c0-q0' occurs twice"),
        ([row(0), "{"], "line 2"),
        (['{"id": 1}'], "line 1.*sequence"),
        (["7"], "line 1"),
        ([], "is empty"),
        ([row(0, event_start_ms="soon")], "line 1"),
    ],
)
def test_malformed_lines_are_named(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_samples(lines(tmp_path, *rows), "test")


def test_every_clip_is_asked_every_question(tmp_path):
    (tmp_path / "q.txt").write_text("What?\n\nWhere?\nWhat?\n")
    manifests = lines(tmp_path, row(0, answer="A car.", facts={"n": 1}), row(0, id="c0-q7", question="Why?"), row(1))
    samples = read_samples(manifests, "test", questions=tmp_path / "q.txt")
    assert [(s.id, s.question, s.answer) for s in samples] == [
        ("c0-q0", "What?", "A car."),
        ("c0-q1", "Where?", None),
        ("c1-q0", "What?", None),
        ("c1-q1", "Where?", None),
    ]
    assert samples[1].facts == {"n": 1}
    assert len(read_samples(manifests, "test", 3, tmp_path / "q.txt")) == 3


@needs(SHARED)
def test_the_ten_questions_of_the_data_set():
    questions = read_questions(SHARED / "questions_top10.json")
    assert len(questions) == 10 and questions[0] == "What are the key elements in this scene?"


@pytest.mark.parametrize(
    ("text", "message"), [("", "holds no question"), ("[1]", "TypeError"), ('[""]', "empty"), ("[", "wanted a JSON list")]
)
def test_bad_question_files_are_named(tmp_path, text, message):
    (tmp_path / "q").write_text(text)
    with pytest.raises(UserError, match=message):
        read_questions(tmp_path / "q")
    with pytest.raises(UserError, match="no questions at"):
        read_questions(tmp_path / "absent")
