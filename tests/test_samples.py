"""One sample list for every script, from JSON lines or the EventGPT/DSEC JSON."""

from __future__ import annotations

import json

import pytest
from conftest import SHARED, needs

from feature_alignment.cli.console import UserError
from feature_alignment.inputs.samples import read_questions, read_samples

CASES = SHARED / "public_cases"


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


def test_samples_keep_the_order_of_the_lines(tmp_path):
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
        ([dsec_row("1", split=1), dsec_row("2", split="test")], "row 1: split: wanted a text, got a number"),
        ([dsec_row("1", conversations=[])], "row 1.*no human turn"),
        ([{"id": 1}], "row 1.*event_data"),
        ([5], "row 1"),
        ([], "has no rows"),
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
        ([], "has no rows"),
        ([row(0, event_start_ms="soon")], "line 1"),
    ],
)
def test_malformed_lines_are_refused_by_number(tmp_path, rows, message):
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
    ("text", "message"),
    [("", "holds no question"), ("[1]", "row 1: a number; wanted a text"), ('[""]', "empty"), ("[", "wanted a JSON list")],
)
def test_bad_question_files_are_refused_by_name(tmp_path, text, message):
    (tmp_path / "q").write_text(text)
    with pytest.raises(UserError, match=message):
        read_questions(tmp_path / "q")
    with pytest.raises(UserError, match="no questions at"):
        read_questions(tmp_path / "absent")


# ---- files as other programs write them

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("mark", [b"", BOM])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_rows_end_at_newlines_only_and_blank_ones_are_skipped(tmp_path, mark, end):
    inside = "A car.\u2028A bus.\u2029\x85\x0b\x0c\x1c\x1d\x1eA tram."
    rows = [json.dumps(row(i, answer=inside), ensure_ascii=False).encode() for i in range(2)]
    (tmp_path / "test.jsonl").write_bytes(mark + end + end.join([rows[0], b"", b"  \t", rows[1]]) + end + end)
    samples = read_samples({"test": tmp_path / "test.jsonl"}, "test")
    assert [s.id for s in samples] == ["c0-q0", "c1-q0"]
    assert [s.answer for s in samples] == [inside] * 2


def test_a_byte_order_mark_inside_a_file_is_ignored(tmp_path):
    one = BOM + json.dumps(row(0)).encode() + b"\n"
    (tmp_path / "test.jsonl").write_bytes(one + BOM + json.dumps(row(1)).encode())
    assert len(read_samples({"test": tmp_path / "test.jsonl"}, "test")) == 2


@pytest.mark.parametrize("mark", [b"", BOM])
def test_a_json_list_may_carry_a_byte_order_mark_and_any_line_ends(tmp_path, mark):
    (tmp_path / "test.json").write_bytes(mark + b"\r\n" + json.dumps([dsec_row("1")], indent=1).replace("\n", "\r\n").encode())
    assert len(read_samples({"test": tmp_path / "test.json"}, "test")) == 1
    (tmp_path / "q.json").write_bytes(mark + json.dumps(["What?", {"question": "Où?"}], ensure_ascii=False).encode())
    assert read_questions(tmp_path / "q.json") == ["What?", "Où?"]


def test_questions_one_a_line(tmp_path):
    (tmp_path / "q.txt").write_bytes(BOM + "What?\r\n\r\n Wo?\u2028Where? \r\n".encode())
    assert read_questions(tmp_path / "q.txt") == ["What?", "Wo?\u2028Where?"]
    (tmp_path / "q.jsonl").write_bytes(BOM + b'{"question": "What?"}\n\n{"question": "Where?"}\r\n')
    assert read_questions(tmp_path / "q.jsonl") == ["What?", "Where?"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("What?".encode("utf-16"), "is UTF-16 text; wanted UTF-8"),
        ("What?".encode("utf-32"), "is UTF-32 text; wanted UTF-8"),
        ("Où?".encode("latin-1"), "is not text.*Wanted UTF-8"),
        (b"What?\rWhere?\r", "carriage return alone"),
        (b'{"question": "What?"}\n{"q": 1}', "row 2: an object without a question"),
        (b'{"question": "What?"}\n{', "row 2: not valid JSON"),
        (b'["What?", 5]', "row 2: a number; wanted a text"),
        (b'["What?", {"q": 1}]', "row 2: an object without a question"),
    ],
)
def test_question_files_that_cannot_be_used_are_named(tmp_path, content, message):
    (tmp_path / "q").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_questions(tmp_path / "q")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"id": 1}, "line 1: it has no 'sequence'; wanted"),
        ({"id": "a", "sequence": "s", "events": "e", "video": "v"}, "line 1: it has no 'question'"),
        (row(video=None), "line 1: video: wanted a text, got null"),
        (row(events=["a"]), "line 1: events: wanted a text, got a list"),
        (row(id=True), "line 1: id: wanted a text or a number, got true or false"),
        (row(facts={"number": [2]}), "line 1: facts: number is a list; wanted a text or a number for every fact"),
        (row(event_start_ms=[1]), "line 1: event_start_ms: wanted a number, got a list"),
        (["a"], "line 2: wanted an object, got a list"),
        ({**dsec_row("1"), "conversations": None}, "line 1"),
        ({k: v for k, v in dsec_row("1").items() if k != "conversations"}, "line 1: it has no 'conversations'"),
        (dsec_row("1", mp4_data=None, video_data=None), "line 1: video_data: wanted a text, got null"),
        (dsec_row("1", conversations=[{"role": "user"}, 5]), "line 1: it has no 'content'"),
        (dsec_row("1", conversations=["a"]), "line 1: wanted an object, got a text"),
        (dsec_row("1", conversations=[{"from": "human", "value": 5}]), "line 1: value of a turn: wanted a text, got a number"),
    ],
)
def test_messages_state_what_is_wrong_with_a_row(tmp_path, wrong, message):
    rows = [row(0), wrong] if isinstance(wrong, list) else [wrong]
    with pytest.raises(UserError, match=message) as error:
        read_samples(lines(tmp_path, *rows), "test")
    assert "Error" not in str(error.value) and "object has no attribute" not in str(error.value)


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_turns_with_roles(tmp_path, key):
    said = turns(
        ("system", "Be brief."),
        ("user", [{"type": "video"}, {"type": "text", "text": "What is it?"}]),
        ("assistant", "A car."),
        ("user", "<event>\nWhere?"),
        ("assistant", [{"type": "text", "text": "Left."}]),
    )
    eventgpt = {**{k: v for k, v in dsec_row("1").items() if k != "conversations"}, key: said}
    own = {"id": "a", "sequence": "s", "events": "a.npy", "video": "a.mp4", key: said}
    samples = read_samples(lines(tmp_path, eventgpt, own), "test")
    assert [(s.question, s.answer) for s in samples] == [("What is it?", "A car."), ("Where?", "Left.")] * 2
    assert [s.id for s in samples] == ["zurich_00_a_1-q0", "zurich_00_a_1-q1", "a-q0", "a-q1"]


def test_eventgpt_rows_as_json_lines_are_the_same_samples(tmp_path):
    rows = [dsec_row("1"), dsec_row("2", "thun_00_a", "val"), dsec_row("3")]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for split in ("test", "validation"):
        assert read_samples({split: tmp_path / "lines.jsonl"}, split) == read_samples(dsec(tmp_path, *rows), split)
    own = [row(0), row(1, answer="A car.")]
    (tmp_path / "list.json").write_text(json.dumps(own))
    assert read_samples({"test": tmp_path / "list.json"}, "test") == read_samples(lines(tmp_path, *own), "test")


@pytest.mark.parametrize("folder", ["", "./", "event_npy/", "events/"])
def test_a_clip_without_a_folder_is_its_own_sequence(tmp_path, folder):
    samples = read_samples(dsec(tmp_path, *(dsec_row("x", event_data=f"{folder}{i}.npy", id=i) for i in range(3))), "test")
    assert [s.sequence for s in samples] == ["0", "1", "2"]
    nested = read_samples(dsec(tmp_path, *(dsec_row("x", event_data=f"{folder}thun_00_a/{i}.npy", id=i) for i in range(3))), "test")
    assert {s.sequence for s in nested} == {"thun_00_a"}


def test_a_config_may_carry_a_byte_order_mark(tmp_path):
    from feature_alignment.cli.config import Common, parse_config

    (tmp_path / "a.yaml").write_bytes(BOM + b"common:\r\n  seed: 7\r\n")
    assert parse_config(Common, ["--config", str(tmp_path / "a.yaml")], "models/pair").seed == 7
    (tmp_path / "b.yaml").write_bytes("common:\n  seed: 7\n".encode("utf-16"))
    with pytest.raises(UserError, match="is UTF-16 text; wanted UTF-8"):
        parse_config(Common, ["--config", str(tmp_path / "b.yaml")], "models/pair")


def test_token_pairs_of_others_may_carry_a_byte_order_mark(tmp_path):
    from feature_alignment.storage.answers import read_token_pairs

    (tmp_path / "pairs.json").write_bytes(BOM + b'{"results": [{"egpt_tokens": [1], "vl_tokens": [2]}]}')
    assert read_token_pairs(tmp_path / "pairs.json") == [{"egpt_tokens": [1], "vl_tokens": [2]}]


@needs(CASES)
def test_the_public_cases():
    read = lambda name: read_samples({"test": CASES / name}, "test")  # noqa: E731
    assert [s.id for s in read("m1_blank_lines.jsonl")] == ["a-0", "a-1"]
    assert [s.id for s in read("m2_bom.jsonl")] == ["a-0"]
    assert [s.answer for s in read("m3_u2028.jsonl")] == ["A car.\u2028A bus."]
    assert read_questions(CASES / "m2_bom_questions.txt") == ["What?", "Where?"]


def test_without_a_config_the_message_names_one(tmp_path):
    with pytest.raises(UserError, match=r"no manifests, which a config names\. Type --config FILE: configs/demo\.yaml"):
        read_samples({}, "test")
    with pytest.raises(UserError, match=r"(?s)absent\.jsonl, which the config names for split 'test'.*data/README.*language_scenes"):
        read_samples({"test": tmp_path / "absent.jsonl"}, "test")
