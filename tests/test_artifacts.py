"""Files: what is saved is loaded, what was killed goes on, what does not fit is refused."""

from __future__ import annotations

import json

import pytest
import torch

from feature_alignment import artifacts
from feature_alignment.config import Common
from feature_alignment.console import UserError

SIZES = {"draft": 6, "target": 4}


def fill(writer, rows):
    for i in rows:
        n = 2 + i % 3
        torch.manual_seed(i)
        writer.write(
            i, torch.randn(n, 6), torch.randn(n, 4), list(range(10, 10 + n)), {"id": f"s{i}", "sequence": f"c{i}", "question": "?"}
        )


def finish(writer):
    writer.finish({"hidden_size_draft": 6, "hidden_size_target": 4})


def open_writer(path, settings=None, rows=5):
    return artifacts.HiddenStatesWriter(path, settings or {"a": 1}, rows, 5, SIZES, torch.float32)


def test_round_trip(tmp_path):
    writer = open_writer(tmp_path / "train")
    fill(writer, range(5))
    assert not (tmp_path / "train" / "egpt_hidden_states.pt").exists()  # a final name means a complete file
    finish(writer)
    states = artifacts.load_hidden_states(tmp_path / "train")
    assert states.draft.shape == (5, 5, 6) and states.target.shape == (5, 5, 4)
    assert states.lengths.tolist() == [2, 3, 4, 2, 3] and states.mask.sum(1).tolist() == [2, 3, 4, 2, 3]
    torch.manual_seed(1)
    assert torch.equal(states.draft[1, :3], torch.randn(3, 6))
    assert not states.draft[~states.mask].any() and states.token_ids[1].tolist() == [10, 11, 12, 0, 0]
    assert states.clips == [f"c{i}" for i in range(5)]
    assert isinstance(torch.load(tmp_path / "train" / "egpt_hidden_states.pt", weights_only=True), torch.Tensor)


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    whole, parts = open_writer(tmp_path / "whole"), open_writer(tmp_path / "parts")
    fill(whole, range(5))
    fill(parts, (0, 3))
    del parts  # killed
    again = open_writer(tmp_path / "parts")
    assert again.done == {0, 3}
    fill(again, {0, 1, 2, 3, 4} - again.done)
    for writer in (whole, again):
        finish(writer)
    for name in ("egpt_hidden_states.pt", "vl_hidden_states.pt", "positions.pt", "samples.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_row_that_was_half_noted_is_done_again(tmp_path):
    fill(open_writer(tmp_path / "a"), (0, 1))
    progress = tmp_path / "a" / "unfinished" / "progress.txt"
    progress.write_text(progress.read_text()[:-9])
    assert open_writer(tmp_path / "a").done == {0}


def test_other_settings_start_over(tmp_path):
    fill(open_writer(tmp_path / "a"), (0, 1))
    assert open_writer(tmp_path / "a", {"a": 2}).done == set()


def test_states_that_are_not_finite_stop_the_run(tmp_path):
    with pytest.raises(UserError, match="sample bad"):
        open_writer(tmp_path / "a").write(0, torch.full((2, 6), float("nan")), torch.zeros(2, 4), [1, 2], {"id": "bad"})


def test_swapped_and_damaged_files_are_refused(tmp_path):
    writer = open_writer(tmp_path / "train")
    fill(writer, range(5))
    finish(writer)
    folder = tmp_path / "train"
    a, b = folder / "egpt_hidden_states.pt", folder / "vl_hidden_states.pt"
    kept_a, kept_b = a.read_bytes(), b.read_bytes()
    a.write_bytes(kept_b), b.write_bytes(kept_a)
    with pytest.raises(UserError, match="swapped"):
        artifacts.load_hidden_states(folder)
    a.write_bytes(kept_a[:200])
    with pytest.raises(UserError, match=r"egpt_hidden_states\.pt could not be read"):
        artifacts.load_hidden_states(folder)
    a.unlink()
    with pytest.raises(UserError, match=r"extract_hidden_states\.py"):
        artifacts.load_hidden_states(folder)


def test_a_pickled_class_is_never_loaded(tmp_path):
    torch.save({"state_dict": {}, "meta": Common()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="could not be read"):
        artifacts.load_pt(tmp_path / "x.pt", "make it")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "r.json"
    artifacts.write_json(path, {"a": float("nan"), "b": [float("inf"), 1.5]})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.5]}
    with pytest.raises(TypeError):
        artifacts.write_json(path, {"a": object()})
    assert json.loads(path.read_text())["b"] == [None, 1.5] and [p.name for p in tmp_path.iterdir()] == ["r.json"]
