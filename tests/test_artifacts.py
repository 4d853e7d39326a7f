"""Files: what is saved is loaded, what was killed goes on, what does not fit is refused."""

from __future__ import annotations

import json

import pytest
import torch

from feature_alignment.cli.config import Common
from feature_alignment.cli.console import UserError
from feature_alignment.storage.earlier_rows import find_complete_run, refuse_changes
from feature_alignment.storage.files import load_pt, write_json
from feature_alignment.storage.hidden_states import layer_file, load_hidden_states
from feature_alignment.storage.hidden_states_writer import HiddenStatesWriter, begin_run, check_disk_space, plan_hash, rows_done
from feature_alignment.storage.identity import RunIdentity

DRAFT, TARGET = "egpt_hidden_states.pt", "vl_hidden_states.pt"
META = {"draft_layers": [3], "hidden_size_draft": 6, "hidden_size_target": 4}
FILES = (DRAFT, TARGET, "positions.pt", "samples.jsonl")


def fill(writer, rows):
    for i in rows:
        n = 2 + i % 3
        torch.manual_seed(i)
        states = {DRAFT: torch.randn(n, 6), TARGET: torch.randn(n, 4)}
        writer.write(i, states, list(range(10, 10 + n)), entries(i + 1)[i])
    writer.commit()


def made_with(**settings):
    return RunIdentity(settings, {}, {})


def entries(rows=5):
    """What identifies the rows that `fill` writes."""
    return [
        {"id": f"s{i}", "sequence": f"c{i}", "question": "?", "facts": None, "clip": {}, "identity": {"row": f"r{i}", "batch": f"b{i}:0"}}
        for i in range(rows)
    ]


def open_writer(path, settings=None, rows=5, resume=True, rank=0):
    identity = made_with(**(settings or {"a": 1}))
    if resume:
        refuse_changes(path, identity, entries(rows), False)
    begin_run(path, identity, plan_hash(entries(rows)), resume)
    return HiddenStatesWriter(path, rows, {DRAFT: (5, 6), TARGET: (5, 4)}, torch.float32, rank)


def test_round_trip(tmp_path):
    writer = open_writer(tmp_path / "train")
    fill(writer, range(5))
    assert not (tmp_path / "train" / "egpt_hidden_states.pt").exists()  # a final name means a complete file
    writer.finish(META)
    states = load_hidden_states(tmp_path / "train")
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
    parts.close()  # killed
    again = open_writer(tmp_path / "parts")
    assert again.done == {0, 3}
    fill(again, {0, 1, 2, 3, 4} - again.done)
    for writer in (whole, again):
        writer.finish(META)
    for name in FILES:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == sorted((*FILES, "meta.json"))


def test_two_writers_fill_one_file(tmp_path):
    alone, first = open_writer(tmp_path / "alone"), open_writer(tmp_path / "both")
    second = open_writer(tmp_path / "both", rank=1)
    fill(alone, range(5))
    fill(second, (1, 4))
    fill(first, (0, 2, 3))
    for writer in (alone, first):
        writer.finish(META)
    for name in FILES:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "both" / name).read_bytes()


def test_a_row_that_was_half_noted_is_done_again(tmp_path):
    writer = open_writer(tmp_path / "a")
    fill(writer, (0, 1))
    writer.close()
    progress = tmp_path / "a.unfinished" / "progress-0.txt"
    progress.write_text(progress.read_text()[:-9])
    again = open_writer(tmp_path / "a")
    assert again.done == {0}
    fill(again, range(1, 5))
    again.finish(META)
    assert [r["id"] for r in load_hidden_states(tmp_path / "a").rows] == [f"s{i}" for i in range(5)]


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_somebody_else_is_writing_is_left_alone(tmp_path, resume):
    fill(open_writer(tmp_path / "a"), (0, 1))
    with pytest.raises(UserError, match="another process is writing"):
        open_writer(tmp_path / "a", resume=resume)
    assert rows_done(tmp_path / "a") == {0, 1}


def test_what_no_resume_began_takes_no_earlier_rows(tmp_path):
    assert begin_run(tmp_path / "a", made_with(), "plan", resume=True)
    assert not begin_run(tmp_path / "a", made_with(), "plan", resume=False)
    assert not begin_run(tmp_path / "a", made_with(), "plan", resume=True)  # it was killed, and goes on


@pytest.mark.parametrize("is_complete", [False, True])
def test_other_settings_are_refused_by_name(tmp_path, is_complete):
    writer = open_writer(tmp_path / "a", {"a": 1, "b": None})
    fill(writer, range(5))
    if is_complete:
        writer.finish(META | made_with(a=1, b=None).as_dict())
    else:
        writer.close()
    with pytest.raises(UserError, match=r"(?s)a: 1 → 2.*--output_dir.*--no_resume"):
        open_writer(tmp_path / "a", {"a": 2})
    assert (tmp_path / "a").is_dir() == is_complete
    again = open_writer(tmp_path / "a", {"a": 2}, resume=False)
    assert again.done == set() and (tmp_path / "a").is_dir() == is_complete  # the old one stays until the new one is there
    fill(again, range(5))
    again.finish(META | made_with(a=2).as_dict())
    assert find_complete_run(tmp_path / "a", made_with(a=2), entries())["settings"] == {"a": 2}
    assert not find_complete_run(tmp_path / "a", made_with(a=1), entries())


def test_a_run_killed_between_its_last_two_steps_is_complete(tmp_path):
    writer = open_writer(tmp_path / "a")
    fill(writer, range(5))
    writer.finish(META | made_with(a=1).as_dict())
    (tmp_path / "a" / "progress-0.txt").write_text("")
    assert find_complete_run(tmp_path / "a", made_with(a=1), entries()) and not (tmp_path / "a" / "progress-0.txt").exists()


def test_states_that_are_not_finite_stop_the_run(tmp_path):
    with pytest.raises(UserError, match="sample bad"):
        open_writer(tmp_path / "a").write(0, {DRAFT: torch.full((2, 6), float("nan"))}, [1, 2], {"id": "bad"})


def test_a_full_disk_is_seen_before_the_work(tmp_path):
    with pytest.raises(UserError, match=r"may need 1,000,000,000,000,000,000 bytes.*free"):
        check_disk_space(tmp_path, 10**18)


def test_one_of_several_layers_is_read(tmp_path):
    begin_run(tmp_path / "a", made_with(), "", resume=True)
    names = {layer_file(k): (5, 6) for k in (2, 4)}
    writer = HiddenStatesWriter(tmp_path / "a", 1, names | {TARGET: (5, 4)}, torch.float32)
    states = {layer_file(k): torch.full((2, 6), float(k)) for k in (2, 4)}
    writer.write(0, states | {TARGET: torch.ones(2, 4)}, [5, 2], {"id": "x"})
    writer.commit()
    norms = {2: "pre", 4: "post"}
    writer.finish(META | {"draft_layers": [2, 4], "separate_layers": True, "draft_norms": norms, "hidden_size_draft": 12})
    read = load_hidden_states(tmp_path / "a", [4])
    assert (read.draft[0, :2] == 4).all() and read.meta["draft_layers"] == [4] and read.meta["draft_norm"] == "post"
    for layers in (None, [3], [2, 4]):
        with pytest.raises(UserError, match=r"layers \[2, 4\] apart"):
            load_hidden_states(tmp_path / "a", layers)


@pytest.mark.parametrize("layers", [[2], [1], [2, 1], [1, 2, 3], []])
def test_layers_stored_side_by_side_are_read_together_or_not_at_all(tmp_path, layers):
    writer = open_writer(tmp_path / "a")
    fill(writer, range(5))
    writer.finish(META | {"draft_layers": [1, 2]})
    for wanted in (None, [1, 2]):
        assert load_hidden_states(tmp_path / "a", wanted).meta["draft_layers"] == [1, 2]
    with pytest.raises(UserError, match=r"holds EventGPT's layers \[1, 2\] as one state, not .*--separate_layers"):
        load_hidden_states(tmp_path / "a", layers)


def test_swapped_and_damaged_files_are_refused(tmp_path):
    writer = open_writer(tmp_path / "train")
    fill(writer, range(5))
    writer.finish(META)
    folder = tmp_path / "train"
    a, b = folder / "egpt_hidden_states.pt", folder / "vl_hidden_states.pt"
    kept_a, kept_b = a.read_bytes(), b.read_bytes()
    a.write_bytes(kept_b), b.write_bytes(kept_a)
    with pytest.raises(UserError, match="swapped"):
        load_hidden_states(folder)
    a.write_bytes(kept_a[:200])
    with pytest.raises(UserError, match=r"egpt_hidden_states\.pt could not be read"):
        load_hidden_states(folder)
    a.unlink()
    with pytest.raises(UserError, match=r"extract_hidden_states\.py"):
        load_hidden_states(folder)


def test_a_pickled_class_is_never_loaded(tmp_path):
    torch.save({"state_dict": {}, "meta": Common()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="could not be read"):
        load_pt(tmp_path / "x.pt", "make it")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "r.json"
    write_json(path, {"a": float("nan"), "b": [float("inf"), 1.5]})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.5]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["b"] == [None, 1.5] and [p.name for p in tmp_path.iterdir()] == ["r.json"]
