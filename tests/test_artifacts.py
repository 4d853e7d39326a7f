"""Files: what is saved is loaded, what was killed goes on, what does not fit is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from feature_alignment.cli.config import Common
from feature_alignment.cli.console import UserError
from feature_alignment.storage import hidden_states, hidden_states_writer, progress_notes
from feature_alignment.storage.earlier_rows import copy_unchanged_rows, find_complete_run, refuse_changes, with_recorded_code
from feature_alignment.storage.files import file_hash, load_pt, read_json, save_pt, write_hashed_json, write_json
from feature_alignment.storage.hidden_states import EVENT_STATES, PROMPT_STATES, HiddenStates, layer_file, load_hidden_states
from feature_alignment.storage.hidden_states_writer import HiddenStatesWriter, begin_run, check_disk_space, plan_hash, row_bytes, rows_done
from feature_alignment.storage.identity import RunIdentity, source_hash
from feature_alignment.storage.shards import merge_shards, parse_shard, shard_name
from feature_alignment.storage.state_files import frame_hash, row_hashes, storage_offset
from feature_alignment.storage.verification import verify

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
    whole = progress.read_bytes()
    for lost in (1, 9):  # a record counts with its newline: without it the next one would be appended to its line
        progress.write_bytes(whole[:-lost])
        assert rows_done(tmp_path / "a") == {0}
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


def test_a_progress_file_is_cut_to_whole_lines_appended_to_and_locked(tmp_path):
    path = tmp_path / "progress-0.txt"
    for before, kept in ((b"one\ntw", b"one\n"), (b"one\n", b"one\n"), (b"on", b""), (None, b"")):
        path.unlink() if before is None else path.write_bytes(before)
        number = len(os.listdir("/proc/self/fd"))
        stream = progress_notes.open_progress(path)
        assert path.read_bytes() == kept
        with pytest.raises(UserError, match=f"another process is writing {tmp_path}"):
            progress_notes.open_progress(path)
        assert len(os.listdir("/proc/self/fd")) == number + 1
        os.write(stream, b"more\n")
        os.close(stream)
        assert path.read_bytes() == kept + b"more\n"


def test_the_last_record_of_a_row_counts_over_all_progress_files(tmp_path):
    line = progress_notes.note_line
    (tmp_path / "progress-1.txt").write_bytes(line({"row": 1, "n": 3}) + line({"row": 2, "n": 4}))
    (tmp_path / "progress-0.txt").write_bytes(line({"row": 1, "n": 1}) + b"damaged\n" + line({"row": 0, "n": 2}) + line({"row": 0, "n": 5}))
    assert list(progress_notes.progress_entries(tmp_path)) == [{"row": 1, "n": 3}, {"row": 0, "n": 5}, {"row": 2, "n": 4}]
    assert [row for row, *_ in progress_notes.notes(tmp_path)] == [1, 0, 0, 1, 2]
    whole = line({"row": 1})
    assert progress_notes.read_note(whole) == {"row": 1}
    for bad in (whole[:-1], whole[1:], whole.replace(b"1}", b"2}"), b"\n", b""):
        assert progress_notes.read_note(bad) is None


def test_what_no_resume_began_takes_no_earlier_rows(tmp_path):
    assert begin_run(tmp_path / "a", made_with(), "plan", resume=True)
    assert not begin_run(tmp_path / "a", made_with(), "plan", resume=False)
    assert not begin_run(tmp_path / "a", made_with(), "plan", resume=True)  # it was killed, and goes on


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_run_that_any_process_still_writes_is_not_begun_again(tmp_path, rank):
    begin_run(tmp_path / "a", made_with(), "plan", resume=True)
    files = [progress_notes.unfinished_folder(tmp_path / "a") / f"progress-{i}.txt" for i in range(3)]
    for path in files:
        path.touch()
    held = progress_notes.open_progress(files[rank])
    for plan, resume in (("plan", False), ("another", True)):
        with pytest.raises(UserError, match="another process is writing"):
            begin_run(tmp_path / "a", made_with(), plan, resume)
    os.close(held)
    assert all(path.is_file() for path in files)
    begin_run(tmp_path / "a", made_with(), "plan", resume=False)


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
        with pytest.raises(UserError, match=r"layers \[2, 4\] separately"):
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


def test_each_models_own_ends_count_for_its_own_texts():
    """States over the drafter's texts: what ended them is the drafter's set; without a set in the meta it is 2."""
    ids, lengths = torch.tensor([[5, 7, 0], [5, 9, 8], [5, 2, 9]]), torch.tensor([2, 3, 2])
    states = lambda meta: HiddenStates(ids, ids, ids, None, lengths, [], meta)  # noqa: E731
    both = {"eos_token_ids": [7], "draft_eos_token_ids": [8, 9]}
    assert states(both).ended.tolist() == [True, False, False] == states(both | {"prefix": "target"}).ended.tolist()
    assert states(both | {"prefix": "drafter"}).ended.tolist() == [False, True, False]
    assert states({}).ended.tolist() == [False, False, True]
    for bad in (7, [True], ["7"], None):
        with pytest.raises(UserError, match="wanted a list of token ids"):
            states({"eos_token_ids": bad}).ended  # noqa: B018


def test_event_states_of_rows_are_those_of_their_clips():
    events, rows = torch.arange(12.0).view(2, 3, 2), torch.tensor([2, 0])
    states = lambda index, events=events: HiddenStates(*[torch.zeros(3, 1)] * 5, [], {}, events, clip_index=index)  # noqa: E731
    clips = torch.tensor([1, 0, 0])
    assert torch.equal(states(clips).events_of(rows), events[[0, 1]])
    assert torch.equal(states(None).events_of(torch.tensor([1, 0])), events[[1, 0]])  # a row each
    others = torch.tensor([1, 1, 0])
    assert torch.equal(states(clips).with_events_of(others).events_of(rows), events[[1, 0]])
    assert torch.equal(states(None).with_events_of(others).events_of(rows), events[[0, 1]])


def test_the_first_sample_with_states_that_are_not_finite_is_named():
    states = HiddenStates(*[torch.zeros(5, 1)] * 5, [{"id": f"s{i}"} for i in range(5)], {})
    good, bad = torch.ones(3, 2, 2), torch.ones(3, 2, 2)
    states.refuse_non_finite([4, 2, 3], good, good[:, 0])
    bad[1:, 1, 1] = torch.tensor([-torch.inf, torch.nan])
    for parts in ((bad,), (good, bad), (bad, good)):
        with pytest.raises(UserError, match=r"^sample s2: its states are not finite"):
            states.refuse_non_finite(torch.tensor([4, 2, 3]), *parts)


def whole_run(tmp_path, **meta):
    writer = open_writer(tmp_path / "train")
    fill(writer, range(5))
    writer.finish(META | meta)
    return tmp_path / "train"


def test_states_are_compared_with_their_hashes_where_that_takes_a_second(tmp_path, monkeypatch, caplog):
    """Both files of 5 rows x 5 positions x 6 or 4 numbers: as many bytes as the limit are compared, one more is not and the log says so."""
    folder = whole_run(tmp_path)
    path = folder / DRAFT
    data = bytearray(path.read_bytes())
    data[storage_offset(path) + 5 * 6 * 4 + 3] ^= 1  # the second row
    path.write_bytes(data)
    monkeypatch.setattr(hidden_states, "MAX_BYTES_CHECKED_ON_LOAD", 5 * 5 * 6 * 4)
    with pytest.raises(UserError, match=r"the states of sample s1 were altered"):
        load_hidden_states(folder)
    monkeypatch.setattr(hidden_states, "MAX_BYTES_CHECKED_ON_LOAD", 5 * 5 * 6 * 4 - 1)
    with caplog.at_level("INFO"):
        assert load_hidden_states(folder).draft.shape == (5, 5, 6)
    assert "are not compared with their hashes now" in caplog.text and caplog.text.count("are not compared") == 1


def rewritten(folder, name, change):
    """A file of the split made anew, and the record told of it: what only a comparison with the other files can find."""
    content = load_pt(folder / name, "")
    save_pt(folder / name, change(content))
    meta = read_json(folder / "meta.json", "")
    states = load_pt(folder / name, "")
    if isinstance(states, torch.Tensor):
        meta["frames"][name] = frame_hash(folder / name, states.nbytes)
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        for row, found in zip(rows, row_hashes(folder / name, len(states), states[0].nbytes), strict=False):
            row["sha256"][name] = found
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_hashed_json(
        folder / "meta.json", {k: v for k, v in meta.items() if k not in ("files", "content_hash")}, ["positions.pt", "samples.jsonl"]
    )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (TARGET, lambda x: x[:, :4].clone(), "do not fit each other"),
        (DRAFT, lambda x: x[:, :4].clone(), "do not fit each other"),
        ("positions.pt", lambda x: {**x, "token_ids": x["token_ids"][:, :4].clone()}, "do not fit each other"),
        (DRAFT, lambda x: x[..., :5].clone(), r"egpt_hidden_states.pt is 5 wide, its meta.json says 6"),
        (TARGET, lambda x: torch.cat([x, x], 2), r"vl_hidden_states.pt is 8 wide, its meta.json says 4"),
        (TARGET, lambda x: x[:4].clone(), r"does not hold the 5 rows"),
        (TARGET, lambda x: x[0].clone(), r"does not hold the 5 rows"),
        (DRAFT, lambda x: {"states": x}, r"does not hold the 5 rows"),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(tmp_path, name, change, message):
    folder = whole_run(tmp_path)
    rewritten(folder, name, lambda x: {k: v.clone() for k, v in x.items()} if isinstance(x, dict) else x.clone())
    assert load_hidden_states(folder).draft.shape == (5, 5, 6)
    rewritten(folder, name, change)
    with pytest.raises(UserError, match=message):
        load_hidden_states(folder)


def test_event_states_are_read_where_they_are_asked_for_and_there(tmp_path):
    with pytest.raises(UserError, match=r"(?s)holds no event states.*--event_states"):
        load_hidden_states(whole_run(tmp_path), events=True)
    begin_run(tmp_path / "a", made_with(), "", resume=True)
    shapes = {DRAFT: (5, 6), TARGET: (5, 4), EVENT_STATES: (3, 2)}
    writer, events = HiddenStatesWriter(tmp_path / "a", 1, shapes, torch.float32), torch.randn(3, 2)
    writer.write(0, {DRAFT: torch.ones(2, 6), TARGET: torch.ones(2, 4), EVENT_STATES: events}, [5, 2], {"id": "x"})
    writer.commit()
    writer.finish(META | {"event_states": True})
    assert torch.equal(load_hidden_states(tmp_path / "a", events=True).events[0], events)
    assert load_hidden_states(tmp_path / "a").events is None


def test_what_is_written_has_the_shape_that_was_announced(tmp_path):
    writer = open_writer(tmp_path / "a")
    good = {DRAFT: torch.ones(2, 6), TARGET: torch.ones(2, 4)}
    for n in (1, 5):
        writer.write(0, {name: states[:1].expand(n, -1) for name, states in good.items()}, list(range(n)), {"id": "x"})
    for states, n in (({**good, TARGET: torch.ones(3, 4)}, 2), ({**good, DRAFT: torch.ones(2, 5)}, 2), (good, 3)):
        with pytest.raises(ValueError, match=f"for {n} tokens of at most 5"):
            writer.write(0, states, list(range(n)), {"id": "x"})
    for n in (0, 6):
        with pytest.raises(ValueError, match=f"for {n} tokens of at most 5"):
            writer.write(0, {name: states[:1].expand(n, -1) for name, states in good.items()}, list(range(n)), {"id": "x"})
    too_large = {**good, DRAFT: torch.full((2, 6), 1e39, dtype=torch.float64)}
    with pytest.raises(UserError, match=r"sample x: egpt_hidden_states.pt would hold non-finite states as float32"):
        writer.write(0, too_large, [1, 2], {"id": "x"})


def test_what_was_repaired_or_cut_is_counted_over_all_rows(tmp_path):
    writer = open_writer(tmp_path / "a", rows=3)
    for row, more in enumerate(({"repaired": ["x", "y"]}, {"repaired": ["x"], "cut": ["z"]}, {})):
        writer.write(row, {DRAFT: torch.ones(2, 6), TARGET: torch.ones(2, 4)}, [5, 2], {"id": f"s{row}", **more})
    writer.commit()
    writer.finish(META)
    meta = read_json(tmp_path / "a" / "meta.json", "")
    assert (meta["repaired"], meta["cut"], meta["positions"]) == ({"x": 2, "y": 1}, {"z": 1}, 6)
    assert meta["row_bytes"] == {DRAFT: 5 * 6 * 4, TARGET: 5 * 4 * 4} and meta["plan"] == plan_hash([{"id": f"s{i}"} for i in range(3)])


@pytest.mark.parametrize("damage", ["state", "note", "frame", "cut"])
def test_a_row_that_is_not_what_was_noted_is_done_again(tmp_path, damage):
    """Also one that a second process noted; the other rows stay."""
    first, second = open_writer(tmp_path / "a"), open_writer(tmp_path / "a", rank=1)
    fill(first, (0, 2))
    fill(second, (3,))
    first.close(), second.close(), first.close()
    part = tmp_path / "a.unfinished"
    if damage == "note":
        lines = (part / "progress-0.txt").read_bytes().splitlines(keepends=True)
        (part / "progress-0.txt").write_bytes(lines[0] + lines[1].replace(b"s2", b"s9"))
        left = {0, 3}
    elif damage == "cut":
        data = (part / DRAFT).read_bytes()
        (part / DRAFT).write_bytes(data[:300])
        left = set()
    else:
        data = bytearray((part / TARGET).read_bytes())
        data[storage_offset(part / TARGET) + 2 * 5 * 4 * 4 if damage == "state" else 60] ^= 1
        (part / TARGET).write_bytes(data)
        left = {0, 3} if damage == "state" else set()
    again = open_writer(tmp_path / "a")
    assert again.done == left == rows_done(tmp_path / "a")
    fill(again, {0, 1, 2, 3, 4} - again.done)
    again.finish(META)
    fill(whole := open_writer(tmp_path / "whole"), range(5))
    whole.finish(META)
    for name in FILES:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


@pytest.mark.parametrize("noted", [[0], [0, 1, 2], [0, 1, 2, 3, 4]])
def test_the_last_row_that_was_noted_is_checked_as_well(tmp_path, noted):
    fill(writer := open_writer(tmp_path / "a"), noted)
    writer.close()
    path = tmp_path / "a.unfinished" / DRAFT
    data = bytearray(path.read_bytes())
    data[storage_offset(path) + noted[-1] * 5 * 6 * 4] ^= 1
    path.write_bytes(data)
    assert open_writer(tmp_path / "a").done == set(noted[:-1]) == rows_done(tmp_path / "a")


def test_notes_reach_the_disk_after_the_states_and_whole(tmp_path, monkeypatch):
    writer, done = open_writer(tmp_path / "a"), []
    sync, write = os.fdatasync, os.write
    monkeypatch.setattr(os, "fdatasync", lambda stream: (done.append("sync"), sync(stream))[1])
    monkeypatch.setattr(os, "write", lambda stream, data: (done.append("note"), write(stream, data))[1])
    fill(writer, (0, 1))
    assert done == ["sync", "sync", "note", "sync"] and writer.done == {0, 1}
    fill(writer, ())
    assert done.count("note") == 1  # nothing new
    monkeypatch.setattr(os, "write", lambda stream, data: len(data) - 1)
    with pytest.raises(OSError, match="the disk took only part"):
        fill(writer, (2,))


def test_a_split_of_one_row_is_a_split(tmp_path):
    finished_run(tmp_path / "a", 1)
    found = load_hidden_states(tmp_path / "a")
    assert found.draft.shape == (1, 5, 6) and found.names == ["s0"] and found.lengths.tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_states_are_stored_in_the_number_format_of_the_run(tmp_path, dtype):
    begin_run(tmp_path / "a", made_with(), "", resume=True)
    writer = HiddenStatesWriter(tmp_path / "a", 2, {DRAFT: (5, 6), TARGET: (5, 4)}, dtype)
    fill(writer, range(2))
    writer.finish(META)
    found = load_hidden_states(tmp_path / "a")
    assert found.draft.dtype == found.target.dtype == dtype
    torch.manual_seed(1)
    assert torch.equal(found.draft[1, :3], torch.randn(3, 6).to(dtype)) and not found.draft[1, 3:].any()


def test_states_are_written_whole_where_a_call_writes_a_part(tmp_path, monkeypatch):
    """And a complete run holds its files and no others, its rows the keys they were written with and their hashes."""
    fill(whole := open_writer(tmp_path / "whole"), range(5))
    whole.finish(META)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda stream, data, at: pwrite(stream, data[:7], at))
    fill(writer := open_writer(tmp_path / "a"), range(5))
    writer.finish(META)
    for name in FILES:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert {p.name for p in (tmp_path / "a").iterdir()} == {*FILES, "meta.json"}
    rows = [json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").read_text().splitlines()]
    assert [{key: value for key, value in row.items() if key != "sha256"} for row in rows] == entries()
    assert all(set(row["sha256"]) == {DRAFT, TARGET} for row in rows)


def test_room_is_what_rows_take_and_a_disk_has(tmp_path, monkeypatch):
    assert row_bytes([(5, 6), (3, 2)], torch.bfloat16) == 2 * (30 + 6)
    monkeypatch.setattr(hidden_states_writer.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    check_disk_space(tmp_path / "new" / "deep", 100)
    with pytest.raises(UserError, match="may need 101 bytes, its disk has 100 free"):
        check_disk_space(tmp_path / "new" / "deep", 101)
    assert not (tmp_path / "new").exists()


def run_of_clips(tmp_path):
    """An outputs directory with one split, of two rows of two clips each named in the manifest's folder."""
    for i in range(2):
        (tmp_path / f"clip{i}.npy").write_text(f"events {i}")
    folder = tmp_path / "out" / "hidden_states" / "train"
    begin_run(folder, made_with(), "", resume=True)
    writer = HiddenStatesWriter(folder, 2, {DRAFT: (5, 6), TARGET: (5, 4)}, torch.float32)
    for i in range(2):
        clip = {f"clip{i}.npy": file_hash(tmp_path / f"clip{i}.npy")}
        writer.write(i, {DRAFT: torch.ones(2, 6) + i, TARGET: torch.ones(2, 4) + i}, [5, 2], {"id": f"s{i}", "clip": clip})
    writer.commit()
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("{}")
    sources = {"inputs": {"manifest": str(manifest)}, "made_from": {"manifest": source_hash(manifest)}}
    writer.finish(META | sources | {"config": {"output_dir": str(tmp_path / "out")}})
    return folder


def test_a_split_is_compared_row_by_row_and_with_its_clips(tmp_path):
    folder = run_of_clips(tmp_path)
    out = tmp_path / "out"
    found = lambda: {(f.about.removeprefix("hidden_states/train/"), f.state): f.why for f in verify(out)[0]}  # noqa: E731
    assert verify(out) == ([], {"files": 3, "rows": 4, "sources": 1 + 2})
    whole = {name: (folder / name).read_bytes() for name in (DRAFT, TARGET, "samples.jsonl")}

    def altered(name, at):
        data = bytearray(whole[name])
        data[at] ^= 1
        (folder / name).write_bytes(data)
        said = found()
        (folder / name).write_bytes(whole[name])
        return said

    first = storage_offset(folder / TARGET)
    assert altered(TARGET, first + 80)[TARGET, "altered"] == "the states of 1 of 2 samples, e.g. s1"
    assert altered(TARGET, first)[TARGET, "altered"] == "the states of 1 of 2 samples, e.g. s0"
    assert set(altered(TARGET, first - 1)) == {(TARGET, "altered")}  # the frame
    assert altered(DRAFT, 0)[DRAFT, "altered"] == "it cannot be read as the file that was written"
    assert set(altered("samples.jsonl", 3)) == {("samples.jsonl", "altered")}
    (folder / DRAFT).unlink()
    assert found() == {(DRAFT, "missing"): "not there, and meta.json describes it"}
    assert set(altered(TARGET, first)) == {(DRAFT, "missing"), (TARGET, "altered")}
    (folder / DRAFT).write_bytes(whole[DRAFT])
    (tmp_path / "clip1.npy").write_text("others")
    ((about, state),) = found()
    assert (about, state) == ("hidden_states/train", "stale") and "extracted from another" in found()[about, state]
    (tmp_path / "clip1.npy").unlink()
    assert "clip1.npy, which is gone" in found()["hidden_states/train", "stale"]


def test_a_run_that_was_moved_as_a_whole_finds_its_own_files(tmp_path):
    """Sources inside the outputs directory are looked for where that lies now; all others where they were."""
    made_in, now = tmp_path / "made", tmp_path / "now"
    (made_in / "adapter").mkdir(parents=True)
    (tmp_path / "model").write_text("m")
    write_hashed_json(made_in / "adapter" / "meta.json", {"meta": {}})
    inputs = {"adapter": str(made_in / "adapter" / "meta.json"), "model": str(tmp_path / "model")}
    made_from = {name: source_hash(Path(path)) for name, path in inputs.items()}
    meta = {"inputs": inputs, "made_from": made_from, "config": {"output_dir": str(made_in)}}
    write_hashed_json(made_in / "sd" / "a.json", {"meta": meta})
    made_in.rename(now)
    assert verify(now) == ([], {"files": 2, "rows": 0, "sources": 2})
    (tmp_path / "model").unlink()
    assert [(f.about, f.state) for f in verify(now)[0]] == [("sd/a.json", "stale")]


def test_what_follows_from_something_wrong_is_followed_to_the_end(tmp_path):
    """Text pairs and inferences are units of their own, a split is one, any other folder is one."""
    out = tmp_path / "out"

    def record(name, *sources):
        paths = {f"source {i}": str(out / s) for i, s in enumerate(sources)}
        meta = {"inputs": paths, "made_from": {k: source_hash(Path(p)) for k, p in paths.items()}}
        write_hashed_json(out / name, {"meta": meta})

    for split in ("a", "b"):
        record(f"token_pairs/{split}.json")
        record(f"hidden_states/{split}/meta.json", f"token_pairs/{split}.json")
    record("adapter/meta.json", "hidden_states/a/meta.json")
    record("acceptance/acceptance.json", "adapter/meta.json", "hidden_states/b/meta.json")
    record("sd/one.json", "adapter/meta.json")
    record("sd/two.json", "hidden_states/b/meta.json")
    assert verify(out)[0] == []
    (out / "token_pairs" / "a.json").write_text("{}")
    found = {f.about: f.why for f in verify(out)[0] if f.state == "stale"}
    assert set(found) == {"hidden_states/a/meta.json", "adapter/meta.json", "acceptance/acceptance.json", "sd/one.json"}
    assert found["acceptance/acceptance.json"] == "made from source 0, which is not what it was"


def shard(tmp_path, number, rows, total=5, shards=2):
    """One of several shards of the rows that `fill` writes."""
    folder = tmp_path / f"train.shard-{number}-of-{shards}"
    begin_run(folder, made_with(), "", resume=True)
    writer = HiddenStatesWriter(folder, len(rows), {DRAFT: (5, 6), TARGET: (5, 4)}, torch.float32)
    for place, i in enumerate(rows):
        torch.manual_seed(i)
        n = 2 + i % 3
        states = {DRAFT: torch.randn(n, 6), TARGET: torch.randn(n, 4)}
        texts = {"egpt_tokens": [4], "egpt_text": "e", "vl_tokens": [5], "vl_text": "v"}
        writer.write(place, states, list(range(10, 10 + n)), entries(total)[i] | texts)
    writer.commit()
    settings = {"a": 1, "shard": f"{number}/{shards}"}
    writer.finish(META | RunIdentity(settings, {}, {}).as_dict() | {"rows": len(rows)})
    return folder


def merge(tmp_path, rows=5, resume=True):
    about = [{k: row[k] for k in ("id", "sequence", "question", "facts")} for row in entries(rows)]
    merge_shards(tmp_path / "train", made_with(a=1), about, tmp_path / "pairs.json", resume)


def test_shards_make_the_whole_in_the_manifests_order(tmp_path):
    shard(tmp_path, 1, [0, 3])
    with pytest.raises(UserError, match=r"lacks train.shard-2-of-2"):
        merge(tmp_path)
    second = shard(tmp_path, 2, [4, 1, 2])
    with pytest.raises(UserError, match=r"vl_lm_head.pt is missing"):
        merge(tmp_path)
    save_pt(tmp_path / "vl_lm_head.pt", torch.ones(2))
    with pytest.raises(UserError, match=r"hold 5 samples, the manifest 4; 0 of these differ\."):
        merge(tmp_path, 4)
    with pytest.raises(UserError, match=r"hold 5 samples, the manifest 6; 1 of these differ, e\.g\. s5"):
        merge(tmp_path, 6)
    merge(tmp_path)
    fill(whole := open_writer(tmp_path / "whole"), range(5))
    whole.finish(META)
    for name in (DRAFT, TARGET, "positions.pt"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "train" / name).read_bytes()
    meta = read_json(tmp_path / "train" / "meta.json", "")
    assert (meta["rows"], meta["merged_shards"], meta["settings"], meta["positions"]) == (5, 2, {"a": 1}, 14)
    results = read_json(tmp_path / "pairs.json", "")["results"]
    assert [r["sample_id"] for r in results] == [f"s{i}" for i in range(5)]
    (second / "samples.jsonl").write_text("")
    with pytest.raises(UserError, match=r"train.shard-2-of-2: samples.jsonl was altered"):
        merge(tmp_path)


def test_a_killed_merge_goes_on_and_a_damaged_row_is_refused(tmp_path, monkeypatch):
    save_pt(tmp_path / "vl_lm_head.pt", torch.ones(2))
    first, second = shard(tmp_path, 1, [0, 1]), shard(tmp_path, 2, [2, 3, 4])
    data = bytearray((second / DRAFT).read_bytes())
    data[storage_offset(second / DRAFT) + 5 * 6 * 4] ^= 1
    whole = (second / DRAFT).read_bytes()
    (second / DRAFT).write_bytes(data)
    copied, writers, copy = [], [], HiddenStatesWriter.copy
    monkeypatch.setattr(
        HiddenStatesWriter, "copy", lambda self, row, *more: (writers.append(self), copied.append(row), copy(self, row, *more))[2]
    )
    with pytest.raises(UserError, match=r"the states of sample s3 are not those that were written"):
        merge(tmp_path)
    writers[-1].close()
    assert copied == [0, 1, 2, 3] and rows_done(tmp_path / "train") == {0, 1}
    (second / DRAFT).write_bytes(whole)
    merge(tmp_path)
    assert copied[4:] == [2, 3, 4] and first.is_dir()
    shard(tmp_path, 2, [1, 2, 3, 4])
    with pytest.raises(UserError, match=r"hold 5 samples, the manifest 5; 0 of these differ\."):  # one of them twice
        merge(tmp_path)


def test_a_single_shard_makes_the_whole_where_there_is_room(tmp_path, monkeypatch):
    save_pt(tmp_path / "vl_lm_head.pt", torch.ones(2))
    shard(tmp_path, 1, [2, 0, 1], 3, shards=1)
    needed = 3 * 5 * (6 + 4) * 4
    with monkeypatch.context() as patch:
        patch.setattr(hidden_states_writer.shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed - 1))
        with pytest.raises(UserError, match=f"may need {needed} bytes, its disk has {needed - 1} free"):
            merge(tmp_path, 3)
        assert not (tmp_path / "train.unfinished").exists()
        patch.setattr(hidden_states_writer.shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed))
        merge(tmp_path, 3)
    finished_run(tmp_path / "whole", 3)
    for name in (DRAFT, TARGET, "positions.pt"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "train" / name).read_bytes()
    assert read_json(tmp_path / "train" / "meta.json", "")["merged_shards"] == 1


def test_a_merge_replaces_a_whole_of_other_settings_only_if_asked(tmp_path):
    """A whole that loses fewer than half of its rows is replaced in any case."""
    save_pt(tmp_path / "vl_lm_head.pt", torch.ones(2))
    shard(tmp_path, 1, [0, 1, 2, 3], 4, shards=1)
    finished_run(tmp_path / "train", 5)
    merge(tmp_path, 4)
    assert read_json(tmp_path / "train" / "meta.json", "")["rows"] == 4
    fill(writer := open_writer(tmp_path / "train", {"a": 3}, resume=False), range(5))
    writer.finish(META | made_with(a=3).as_dict())
    with pytest.raises(UserError, match=r"(?s)a: 3 → 1.*--no_resume"):
        merge(tmp_path, 4)
    assert read_json(tmp_path / "train" / "meta.json", "")["settings"] == {"a": 3}
    merge(tmp_path, 4, resume=False)
    assert read_json(tmp_path / "train" / "meta.json", "")["settings"] == {"a": 1}


@pytest.mark.parametrize(("text", "found"), [("1/1", (1, 1)), ("2/3", (2, 3)), ("3/3", (3, 3)), (None, (1, 1)), ("", (1, 1))])
def test_a_shard_is_one_of_several(text, found):
    assert parse_shard(text, False) == found and shard_name("train", 2, 3) == "train.shard-2-of-3"
    for wrong in ("0/3", "4/3", "1", "a/3", "1/b", "1/3/4", "-1/3", "1/0"):
        with pytest.raises(UserError, match=r"--shard wants i/n with i from 1 to n"):
            parse_shard(wrong, False)
    assert parse_shard(None, True) == (1, 1)
    with pytest.raises(UserError, match="and no --merge"):
        parse_shard("1/3", True)


def finished_run(path, rows=5):
    writer = open_writer(path, rows=rows)
    fill(writer, range(rows))
    writer.finish(META | made_with(a=1).as_dict())


def renamed(rows, first=0):
    """Entries whose question, clip and batch are those of `rows`, under other names."""
    return [row | {"id": f"new{i}", "sequence": "other"} for i, row in enumerate(rows, first)]


def test_half_of_the_rows_may_be_lost_unasked_and_no_more(tmp_path):
    finished_run(tmp_path / "a", 4)
    refuse = lambda rows, limited=False: refuse_changes(tmp_path / "a", made_with(a=1), rows, limited)  # noqa: E731
    old, new = entries(4), [row | {"identity": {"row": f"x{i}", "batch": f"x{i}"}} for i, row in enumerate(entries(4))]
    refuse(old)
    refuse(renamed(old))
    refuse([*old[:2], *new[2:]])
    refuse([*old, *new])
    with pytest.raises(UserError, match=r"3 of 4 rows have another question, clip or start, or are gone, e\.g\. s1, s2, s3"):
        refuse([*old[:1], *new[1:]])
    with pytest.raises(UserError, match=r"(?s)4 of 4 rows have .*e\.g\. s0, s1, s2\n.*--no_resume"):
        refuse(new)
    refuse(old, limited=True)
    with pytest.raises(UserError, match=r"1 of 4 rows are left out by --limit, or have"):
        refuse(old[:3], limited=True)
    with pytest.raises(UserError, match=r"(?s)a: 1 → 2.*give the old values"):
        refuse_changes(tmp_path / "a", made_with(a=2), old, False)
    code = RunIdentity({"a": 1}, {}, {"m": "c"})
    with pytest.raises(UserError, match=r"(?s)code: m changed.*keep them with --ignore_code"):
        refuse_changes(tmp_path / "a", code, old, False)
    with pytest.raises(UserError, match=r"(?s)a: 1 → 2.*code: m changed.*give the old values"):
        refuse_changes(tmp_path / "a", RunIdentity({"a": 2}, {}, {"m": "c"}), old, False)
    refuse_changes(tmp_path / "a", code, old, False, ignore_code=True)
    refuse_changes(tmp_path / "nothing", code, old, False)
    begin_run(tmp_path / "a", made_with(a=3), plan_hash(old), resume=False)  # an unfinished run is there to replace the complete one
    with pytest.raises(UserError, match="a: 3 → 1"):
        refuse(old)
    refuse_changes(tmp_path / "a", made_with(a=3), old, False)


def test_rows_of_a_batch_that_is_unchanged_are_copied_under_their_new_names(tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "a"
    finished_run(path)
    kept = renamed([entries()[i] for i in (3, 0)])
    regrouped = entries()[1] | {"identity": {"row": "r1", "batch": "another"}}
    rows = [kept[0], regrouped, kept[1], *[row | {"identity": {"row": "n", "batch": "n"}} for row in entries()[4:]]]
    begin_run(path, made_with(a=1), plan_hash(rows), resume=True)
    writer = HiddenStatesWriter(path, 4, {DRAFT: (5, 6), TARGET: (5, 4)}, torch.float32)
    copy_unchanged_rows(writer, made_with(a=2), rows)
    assert writer.done == set() and "kept" not in caplog.text  # an earlier run of other settings has none to keep
    copy_unchanged_rows(writer, made_with(a=1), rows)
    assert writer.done == {0, 2}
    assert "2 rows whose question, clip and batch are unchanged. Extracted again: 0 damaged, 1 now read together" in caplog.text
    notes = {note["row"]: note for note in progress_notes.progress_entries(writer.part)}
    assert [(notes[r]["id"], notes[r]["sequence"], notes[r]["read"]) for r in (0, 2)] == [
        ("new0", "other", [10, 11]),
        ("new1", "other", [10, 11]),
    ]
    torch.manual_seed(3)
    assert torch.equal(load_pt(writer.part / DRAFT, "")[0, :2], torch.randn(2, 6))
    caplog.clear()
    copy_unchanged_rows(writer, made_with(a=1), rows)
    assert "0 rows whose" in caplog.text and writer.done == {0, 2}  # again: they are there


@pytest.mark.parametrize(("harm", "said"), [("none", "5 rows whose"), ("all", "0 rows whose"), ("gone", "")])
def test_the_log_counts_copied_and_damaged_rows(tmp_path, caplog, harm, said):
    """Nothing is logged about a folder without an earlier run."""
    caplog.set_level("INFO")
    path = tmp_path / "a"
    if harm != "gone":
        finished_run(path)
    if harm == "all":
        data, at = bytearray((path / TARGET).read_bytes()), storage_offset(path / TARGET)
        for row in range(5):
            data[at + row * 5 * 4 * 4] ^= 1
        (path / TARGET).write_bytes(data)
    begin_run(path, made_with(a=1), plan_hash(entries()), resume=True)
    writer = HiddenStatesWriter(path, 5, {DRAFT: (5, 6), TARGET: (5, 4)}, torch.float32)
    copy_unchanged_rows(writer, made_with(a=1), entries())
    assert len(writer.done) == (5 if harm == "none" else 0)
    assert said in caplog.text if said else "kept" not in caplog.text


def test_a_run_killed_while_it_copies_keeps_the_rows_copied_so_far(tmp_path, monkeypatch):
    path, copy = tmp_path / "a", HiddenStatesWriter.copy
    finished_run(path)
    write_json(path / "settings.json", {"plan": "of a run killed between its last two steps"})
    begin_run(path, made_with(a=1), plan_hash(entries()), resume=True)
    writer = HiddenStatesWriter(path, 5, {DRAFT: (5, 6), TARGET: (5, 4)}, torch.float32)
    monkeypatch.setattr("feature_alignment.storage.earlier_rows._TOGETHER", 2)

    def killed(self, row, *more):
        if row == 3:
            raise KeyboardInterrupt
        copy(self, row, *more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HiddenStatesWriter, "copy", killed)
        copy_unchanged_rows(writer, made_with(a=1), entries())
    assert rows_done(path) == {0, 1, 2}
    copy_unchanged_rows(writer, made_with(a=1), entries())
    assert rows_done(path) == {0, 1, 2, 3, 4}


CLIP_OF = "xxy"  # of the rows s0, s1, s2
SHAPES = {EVENT_STATES: (3, 2), PROMPT_STATES: (2, 4), DRAFT: (5, 6), TARGET: (5, 4)}


def states_of_row(i):
    """Event states depend on the clip alone."""
    made = lambda seed, *shape: torch.randn(shape, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    return {
        EVENT_STATES: made(ord(CLIP_OF[i]), 3, 2),
        PROMPT_STATES: made(10 + i, 2, 4),
        DRAFT: made(20 + i, 2 + i, 6),
        TARGET: made(30 + i, 2 + i, 4),
    }


def writer_of_clips(path, order):
    """A writer for the rows s0, s1, s2 in this order, and their entries."""
    rows = [entries()[i] | {"events": CLIP_OF[i]} for i in order]
    clips = list(dict.fromkeys(CLIP_OF[i] for i in order))
    begin_run(path, made_with(a=1), plan_hash(rows), resume=True)
    return HiddenStatesWriter(path, len(order), SHAPES, torch.float32, clip_index=[clips.index(CLIP_OF[i]) for i in order]), rows


@pytest.mark.parametrize(
    ("order", "copied"), [((0, 1, 2), {0, 1, 2}), ((2, 0, 1), {0, 1, 2}), ((2, 1), {0}), ((1, 0, 2), {1, 2}), ((1, 2), {1})]
)
def test_event_states_are_copied_with_the_row_that_holds_them(tmp_path, order, copied):
    """A row that is the first of its clip now, and was not before, is extracted again."""
    path = tmp_path / "a"
    writer, rows = writer_of_clips(path, (0, 1, 2))
    for i, row in enumerate(rows):
        writer.write(i, states_of_row(i), list(range(4, 6 + i)), row)
    writer.commit()
    writer.finish(META | made_with(a=1).as_dict())
    writer, rows = writer_of_clips(path, order)
    copy_unchanged_rows(writer, made_with(a=1), rows)
    assert writer.done == copied
    held = {name: load_pt(writer.part / name, "") for name in SHAPES}
    assert len(held[EVENT_STATES]) == len({CLIP_OF[i] for i in order})
    notes = {note["row"]: note for note in progress_notes.progress_entries(writer.part)}
    for place in copied:
        i = order[place]
        for name, states in states_of_row(i).items():
            at = place if name != EVENT_STATES else writer._clip_index[place]
            if name != EVENT_STATES or writer.holds(name, place):
                assert torch.equal(held[name][at, : len(states)], states), (name, place)
            assert (name in notes[place]["sha256"]) is writer.holds(name, place)
        assert notes[place]["event_row"] == writer._clip_index[place] and notes[place]["read"] == list(range(4, 6 + i))


def test_rows_are_copied_from_the_complete_run_and_from_every_unfinished_one(tmp_path):
    path = tmp_path / "a"
    finished_run(path, 2)
    for row, rows in ((2, 3), (3, 4)):
        writer = open_writer(path, rows=rows)
        fill(writer, [row])
        writer.close()
    writer = open_writer(path, rows=5)
    copy_unchanged_rows(writer, made_with(a=1), entries())
    assert writer.done == {0, 1, 2, 3}


def test_a_complete_run_of_other_settings_does_not_hide_unfinished_ones(tmp_path):
    path = tmp_path / "a"
    finished_run(path, 2)
    for rows in (3, 4):
        begin_run(path, made_with(a=2), plan_hash(entries(rows)), resume=True)
        writer = HiddenStatesWriter(path, rows, {DRAFT: (5, 6), TARGET: (5, 4)}, torch.float32)
        fill(writer, [rows - 1])
        writer.close()
    begin_run(path, made_with(a=2), plan_hash(entries()), resume=True)
    writer = HiddenStatesWriter(path, 5, {DRAFT: (5, 6), TARGET: (5, 4)}, torch.float32)
    copy_unchanged_rows(writer, made_with(a=2), entries())
    assert writer.done == {2, 3}


def test_a_damaged_row_is_not_copied(tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "a"
    finished_run(path)
    data = bytearray((path / TARGET).read_bytes())
    data[storage_offset(path / TARGET) + 2 * 5 * 4 * 4] ^= 1
    (path / TARGET).write_bytes(data)
    assert find_complete_run(path, made_with(a=1), entries()) is None and f"{TARGET} was altered, truncated or deleted" in caplog.text
    begin_run(path, made_with(a=1), plan_hash(entries()), resume=True)
    writer = HiddenStatesWriter(path, 5, {DRAFT: (5, 6), TARGET: (5, 4)}, torch.float32)
    copy_unchanged_rows(writer, made_with(a=1), entries())
    assert writer.done == {0, 1, 3, 4} and "4 rows whose" in caplog.text and "1 damaged" in caplog.text


@pytest.mark.parametrize("name", ["positions.pt", "samples.jsonl"])
def test_rows_whose_texts_or_entries_were_altered_are_not_copied(tmp_path, name):
    """Rows with their entries still count when most of them would be lost."""
    path = tmp_path / "a"
    finished_run(path)
    (path / name).write_bytes((path / name).read_bytes() + b"\n")
    others = [row | {"identity": {"row": f"x{i}", "batch": f"x{i}"}} for i, row in enumerate(entries())]
    if name == "positions.pt":
        with pytest.raises(UserError, match="5 of 5 rows have another question"):
            refuse_changes(path, made_with(a=1), others, False)
    else:
        refuse_changes(path, made_with(a=1), others, False)
    begin_run(path, made_with(a=1), plan_hash(entries()), resume=True)
    writer = HiddenStatesWriter(path, 5, {DRAFT: (5, 6), TARGET: (5, 4)}, torch.float32)
    copy_unchanged_rows(writer, made_with(a=1), entries())
    assert writer.done == set()


def test_rows_kept_with_ignore_code_stay_that_codes(tmp_path):
    path, old = tmp_path / "a", RunIdentity({"a": 1}, {}, {"m": "old"})
    now = RunIdentity({"a": 1}, {}, {"m": "new"})
    assert with_recorded_code(path, now) == now
    writer = open_writer(path)
    fill(writer, range(5))
    writer.finish(META | old.as_dict())
    assert with_recorded_code(path, now).code == {"m": "old"} and with_recorded_code(path, RunIdentity({"a": 2}, {}, {})).code == {}
    begin_run(path, RunIdentity({"a": 1}, {}, {"m": "half"}), "plan", resume=True)
    assert with_recorded_code(path, now).code == {"m": "half"}  # an unfinished run is the later one


def test_a_complete_run_is_one_of_these_rows_without_an_unfinished_one_beside_it(tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "a"
    assert find_complete_run(path, made_with(a=1), entries()) is None
    finished_run(path)
    assert find_complete_run(path, made_with(a=1), entries())["positions"] == 14
    assert "5 rows (question, clip, batch), the recorded hashes of 2 files and of all their states" in caplog.text
    without = [{k: v for k, v in row.items() if k not in ("identity", "clip")} for row in entries()]  # as a merge knows them
    assert find_complete_run(path, made_with(a=1), without)
    for rows in (entries()[:4], entries()[::-1], renamed(entries()), without[:4], [row | {"question": "!"} for row in without]):
        assert find_complete_run(path, made_with(a=1), rows) is None
    begin_run(path, made_with(a=1), "plan", resume=True)
    assert find_complete_run(path, made_with(a=1), entries()) is None


def test_an_unfinished_run_of_other_rows_is_set_aside_and_swept_at_last(tmp_path):
    path = tmp_path / "a"
    for rows in (5, 4, 3):
        writer = open_writer(path, rows=rows)
        fill(writer, [0])
        writer.close()
    assert [p.name for p in hidden_states_writer.superseded_runs(path)] == ["a.earlier-1.unfinished", "a.earlier-2.unfinished"]
    assert rows_done(path) == {0}
    writer = open_writer(path, rows=3)
    fill(writer, [1, 2])
    writer.finish(META | made_with(a=1).as_dict())
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and writer._files == {}
    for rows in (5, 4, 3):
        open_writer(path, rows=rows).close()
    assert len(hidden_states_writer.superseded_runs(path)) == 2
    open_writer(path, rows=3, resume=False).close()
    assert hidden_states_writer.superseded_runs(path) == [] and rows_done(path) == set()
