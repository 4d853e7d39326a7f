"""A folder of clips as a data set (--clips)."""

import logging
from pathlib import Path

import pytest

from feature_alignment.cli.console import UserError
from feature_alignment.inputs.clip_folder import read_clip_folder


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return folder


@pytest.mark.parametrize("events", ["npy", "npz", "h5", "raw", "dat", "aedat4", "NPY"])
@pytest.mark.parametrize("video", [".mp4", ".MOV", ".gif", ".png", "/"])
def test_events_and_video_of_one_name_are_one_clip(tmp_path, events, video):
    make(tmp_path, f"a.{events}", f"a{video}", f"b.1.{events}", f"b.1{video}")
    a, b = read_clip_folder(tmp_path, ["What happens?"])
    assert (a.id, a.sequence, a.question) == ("a", "a", "What happens?")
    assert (a.events.name, a.video.name) == (f"a.{events}", f"a{video}".rstrip("/"))
    assert b.id == "b.1"


def test_every_clip_is_asked_every_question_in_order(tmp_path):
    make(tmp_path, "b.npy", "b.mp4", "a.npy", "a.mp4")
    samples = read_clip_folder(tmp_path, ["one?", "two?"])
    assert [(s.id, s.question) for s in samples] == [("a-q0", "one?"), ("a-q1", "two?"), ("b-q0", "one?"), ("b-q1", "two?")]
    assert [s.sequence for s in samples] == ["a", "a", "b", "b"]


def test_files_without_a_partner_are_named_and_left_out(tmp_path, caplog):
    make(tmp_path, "a.npy", "a.mp4", "lost.npy", "silent.mp4", "notes.md", ".hidden.npy", "._a.npy")
    with caplog.at_level(logging.WARNING):
        assert [s.id for s in read_clip_folder(tmp_path, ["?"])] == ["a"]
    assert "lost.npy, silent.mp4" in caplog.text and "notes" not in caplog.text and "hidden" not in caplog.text


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "0 event files and 0 videos"),
        (("a.npy", "b.mp4"), "1 event files and 1 videos, and no two of the same name"),
        (("a.npy", "a.npz", "a.mp4"), "a.npy and a.npz have the same name"),
        (("a.npy", "a.mp4", "a/"), "have the same name"),
    ],
)
def test_a_folder_without_unique_pairs_is_refused(tmp_path, names, said):
    make(tmp_path, *names)
    with pytest.raises(UserError, match=said):
        read_clip_folder(tmp_path, ["?"])


def test_no_folder_and_no_question_are_refused(tmp_path):
    with pytest.raises(UserError, match="no folder at"):
        read_clip_folder(tmp_path / "none", ["?"])
    with pytest.raises(UserError, match="--question"):
        read_clip_folder(tmp_path, [])
