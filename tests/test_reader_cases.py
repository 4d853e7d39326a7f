"""Inputs that were misread without a word, or stopped with a traceback."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from feature_alignment.cli.console import UserError
from feature_alignment.inputs.event_evt import State, decode_evt2
from feature_alignment.inputs.event_index import _pass
from feature_alignment.inputs.events import load_events
from feature_alignment.inputs.samples import Sample, read_questions, read_samples
from feature_alignment.inputs.simulate import read_log_intensity
from feature_alignment.inputs.video import read_frames
from feature_alignment.measurement.comparison import baseline_drafter_reports
from feature_alignment.storage.answers import read_token_pairs

RNG = np.random.default_rng(0)
N = 3000
T = np.sort(RNG.integers(0, 49_000, N))
COLUMNS = {"x": RNG.integers(0, 640, N), "y": RNG.integers(0, 480, N), "t": T, "p": RNG.integers(0, 2, N)}


# ---- 32-bit times


@pytest.mark.parametrize("kind", ["u4", "i8", "text", "large"])
def test_times_of_32_bits_that_wrap_around_are_refused(tmp_path, kind):
    t = (T + 2**32 - 20_000) % 2**32
    path = tmp_path / "wrapped.npz"
    if kind == "text":
        path = tmp_path / "wrapped.txt"
        np.savetxt(path, np.stack([t, COLUMNS["x"], COLUMNS["y"], COLUMNS["p"]], 1), fmt="%d")
    elif kind == "large":
        path, more = tmp_path / "wrapped.npy", 150_000
        rows = np.zeros(more, [("x", "u2"), ("y", "u2"), ("t", "u4"), ("p", "u1")])
        rows["t"] = (np.linspace(0, 49_000, more).astype(np.int64) + 2**32 - 20_000) % 2**32
        np.save(path, rows)
    else:
        np.savez(path, **(COLUMNS | {"t": t.astype(kind)}))
    with pytest.raises(UserError, match=r"32-bit times wrap around, from 4,294,9.* back to .*add 2\*\*32"):
        load_events(path, window_ms=50)


def test_times_in_no_order_or_of_more_bits_are_no_wrap(tmp_path):
    order = RNG.permutation(N)
    for name, t in (("shuffled", (T * 60_000)[order]), ("later", np.where(T > 20_000, T, T + 2**34))):
        np.savez(tmp_path / f"{name}.npz", **(COLUMNS | {"t": t}))
        try:
            load_events(tmp_path / f"{name}.npz", window_ms=50)
        except UserError as error:
            assert "wrap" not in str(error)


def words_evt2(highs, low=3):
    return np.array([w for high in highs for w in (8 << 28 | high, 1 << 28 | low << 22 | 5 << 11 | 7)], np.uint32)


def test_the_high_part_of_evt2_wraps_around_every_five_hours():
    top = 2**28
    found = decode_evt2(words_evt2([top - 2, top - 1, 0, 1]), State())
    assert np.diff(found.events["t"]).tolist() == [64, 64, 64] and found.state.epoch == 1
    parts, state = [], State()
    for piece in np.split(words_evt2([top - 2, top - 1, 0, 1]), [3, 5]):
        low, high, _ = _pass(piece, state, "EVT2")
        decoded = decode_evt2(piece, state)
        assert (decoded.events["t"] >= low).all() and (decoded.events["t"] <= high).all()
        assert _pass(piece, state, "EVT2")[2] == decoded.state
        state = decoded.state
        parts.append(decoded.events["t"])
    assert np.concatenate(parts).tolist() == found.events["t"].tolist()


def test_data_that_begin_with_a_percent_sign_are_no_header(tmp_path):
    """Without `% end`, the header ends at the first line that is no text."""
    highs = [0x25 + i for i in range(800)]
    path = tmp_path / "a.raw"
    path.write_bytes(b"% evt 2.0\n% geometry 640x480\n" + words_evt2(highs).tobytes())
    assert len(load_events(path)["t"]) == 800


@pytest.mark.parametrize("header", ["# columns: t, x, y, p", "# Format: t x y p", "% t x y p", "%geometry:640,480\n% t x y p"])
def test_a_commented_header_may_begin_with_a_word(tmp_path, header):
    path = tmp_path / "a.txt"
    rows = "\n".join(f"{t} {x} {y} {p}" for t, x, y, p in zip(T, COLUMNS["x"], COLUMNS["y"], COLUMNS["p"], strict=True))
    path.write_text(f"{header}\n{rows}\n")
    found = load_events(path)
    assert all((found[k] == COLUMNS[k]).all() for k in "txyp")


def test_a_header_of_another_number_of_columns_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("t x y p extra\n" + "1 2 3 1\n" * 9)
    with pytest.raises(UserError, match=r"holds 4 columns, its header names 5 \(t x y p extra\)"):
        load_events(path)


def test_the_offset_of_dsec_may_be_an_array_of_one_number(tmp_path):
    h5py, _ = pytest.importorskip("h5py"), pytest.importorskip("hdf5plugin")
    for shape, value in (((), 7), ((1,), 7)):
        with h5py.File(tmp_path / "a.h5", "w") as file:
            for k, v in COLUMNS.items():
                file[f"events/{k}"] = v
            file["t_offset"] = np.full(shape, value)
        assert load_events(tmp_path / "a.h5")["t"][0] == T[0] + 7


# ---- images


def test_names_like_hashes_are_sorted_and_not_computed(tmp_path):
    for name in ("7e12345678901234567890", "12", "13"):
        Image.new("RGB", (8, 8), (len(name), 0, int(name[:2].strip("e")))).save(tmp_path / f"{name}.png")
    assert len({frame.tobytes() for frame in read_frames(tmp_path, 3)}) == 3


def test_white_may_be_zero_in_a_tiff_of_16_bits(tmp_path):
    pixels = np.full((8, 8), 60 * 257, np.uint16)
    for white_is_zero, value in ((False, 60), (True, 195)):
        Image.fromarray(pixels).save(tmp_path / "a.tif", tiffinfo={262: 0 if white_is_zero else 1})
        assert (read_frames(tmp_path / "a.tif")[0] == value).all()


def test_frames_that_change_in_size_are_refused_by_the_simulator_too(tmp_path):
    path, stream = tmp_path / "two.mjpeg", io.BytesIO()
    for number in range(8):
        Image.new("RGB", (64 if number < 4 else 48, 48), (30 * number,) * 3).save(stream, "JPEG")
    path.write_bytes(stream.getvalue())
    with pytest.raises(UserError, match="its frames differ in size"):
        read_log_intensity(path)


# ---- manifests


def manifest(tmp_path, *rows):
    path = tmp_path / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: path for name in ("train", "validation", "val", "test")}


def eventgpt(name, split, clip, **more):
    turns = [{"from": "human", "value": "<event>\nWhat?"}, {"from": "gpt", "value": "A car."}]
    return {"id": name, "split": split, "event_data": clip, "mp4_data": "a.mp4", "conversations": turns, **more}


def own(name, sequence, **more):
    return {"id": name, "sequence": sequence, "events": "a.npy", "video": "a.mp4", "question": "What?", **more}


def test_a_row_of_eventgpt_may_state_what_a_row_of_this_project_states(tmp_path):
    row = eventgpt("a", "test", "s/1.npy", event_start_ms=20, event_time_unit="ms", facts={"hazard": "bus"}, sequence="night-1")
    (sample,) = read_samples(manifest(tmp_path, row), "test")
    assert (sample.event_start_ms, sample.event_time_unit, sample.facts, sample.sequence) == (20, "ms", {"hazard": "bus"}, "night-1")


@pytest.mark.parametrize(
    ("clip", "sequence"),
    [
        ("seqA/1.npy", "seqA"),
        ("seqA/event_npy/1.npy", "seqA"),
        ("event_npy/seqA/1.npy", "seqA"),
        ("zurich/events/left/1.npy", "zurich"),
        ("data/events/1.npy", "1"),
        ("../event_data/1.npy", "1"),
        ("1.npy", "1"),
    ],
)
def test_a_sequence_is_the_nearest_folder_that_is_named_after_one(tmp_path, clip, sequence):
    (sample,) = read_samples(manifest(tmp_path, eventgpt("a", "test", clip)), "test", allow_outside=True)
    assert sample.sequence == sequence


def test_the_guard_between_splits_sees_through_folders_of_a_kind(tmp_path):
    rows = eventgpt("a", "train", "seqA/event_npy/1.npy"), eventgpt("b", "test", "seqA/event_npy/2.npy")
    with pytest.raises(UserError, match=r"'seqA' is in split 'train' and in 'test'.*each row its \"sequence\""):
        read_samples(manifest(tmp_path, *rows), "test")


def test_rows_of_this_project_count_for_their_own_split_too(tmp_path):
    found = manifest(tmp_path, own("a", "s1", split="train"), own("b", "s2", split="test"), own("c", "s3"))
    assert [s.id for s in read_samples(found, "test")] == ["b", "c"]
    with pytest.raises(UserError, match="'s1' is in split 'train' and in 'test'"):
        read_samples(manifest(tmp_path, own("a", "s1", split="train"), own("b", "s1", split="test")), "test")


@pytest.mark.parametrize("split", ["val", "validation"])
def test_a_split_may_be_asked_for_as_its_rows_spell_it(tmp_path, split):
    assert len(read_samples(manifest(tmp_path, eventgpt("a", "val", "s/1.npy")), split)) == 1


@pytest.mark.parametrize(("name", "said"), [("test.meta", "whole data sets"), ("é" * 150, "at most 200 bytes, got 300")])
def test_ids_that_cannot_be_file_names_are_refused_before_any_work(tmp_path, name, said):
    with pytest.raises(UserError, match=said):
        read_samples(manifest(tmp_path, own(name, "s")), "test")
    assert Sample("ü" * 100, "s", "What?", tmp_path, tmp_path).id


def test_a_number_beyond_all_floats_is_refused(tmp_path):
    path = manifest(tmp_path, own("a", "s"))["test"]
    path.write_text(path.read_text().replace("}", f', "event_start_ms": 1{"0" * 400}}}'))
    with pytest.raises(UserError, match=r"line 1: .*too large"):
        read_samples({"test": path}, "test")


def test_questions_for_clips_whose_ids_look_like_questions(tmp_path):
    questions = tmp_path / "questions.txt"
    questions.write_text("One?\nTwo?\n")
    assert read_questions(questions) == ["One?", "Two?"]
    rows = own("a-q1", "s", events="1.npy"), own("a-q2", "s", events="2.npy")
    assert [s.id for s in read_samples(manifest(tmp_path, *rows), "test", questions=questions)] == [
        *("a-q1-q0", "a-q1-q1"),
        *("a-q2-q0", "a-q2-q1"),
    ]
    same_clip = own("a-q1", "s"), own("a-q2", "s")
    assert [s.id for s in read_samples(manifest(tmp_path, *same_clip), "test", questions=questions)] == ["a-q0", "a-q1"]


# ---- token pairs, the console


def test_token_pairs_need_no_question_but_if_there_is_one_it_is_a_text(tmp_path):
    path = tmp_path / "pairs.json"
    row = {"egpt_tokens": [1, 5, 2], "vl_tokens": [1, 6, 2]}
    path.write_text(json.dumps({"results": [row, row | {"query": None, "sample_id": 7}]}))
    rows = read_token_pairs(path)
    assert baseline_drafter_reports(rows, rows, 3, {2})["ngram"].tokens_per_pass == 2
    for key, value in (("query", ["a"]), ("sample_id", {"a": 1})):
        path.write_text(json.dumps({"results": [row | {key: value}]}))
        with pytest.raises(UserError, match=f"row 0: {key} must be a text, a number or null"):
            read_token_pairs(path)


def test_a_terminal_without_a_letter_of_the_answer_shows_its_number():
    code = "from feature_alignment.cli.console import run\nrun(lambda: print('f\\u00fcr'))"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, check=True)
    assert done.stdout == "f\\xfcr\n"
