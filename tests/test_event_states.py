"""Event states once per clip: the same states for every row as before, whatever the batches, shards and earlier runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter

import pytest
import torch

from feature_alignment import extract_hidden_states
from feature_alignment.adapters.chained import text_batches
from feature_alignment.cli.config import parse_config
from feature_alignment.cli.console import UserError
from feature_alignment.inputs.row_identity import identify
from feature_alignment.inputs.samples import read_samples
from feature_alignment.models.pair import load_pair
from feature_alignment.models.stored_states import depend_on_the_clip_alone
from feature_alignment.storage.files import load_pt, save_pt, write_hashed_json
from feature_alignment.storage.hidden_states import EVENT_STATES, event_rows, load_hidden_states, rows_in_file
from feature_alignment.storage.state_files import frame_hash, row_hashes, storage_offset
from feature_alignment.storage.verification import verify

FILES = (
    "egpt_hidden_states.pt",
    "vl_hidden_states.pt",
    EVENT_STATES,
    "vl_prompt_states.pt",
    "vl_prompt_inputs.pt",
    "positions.pt",
    "samples.jsonl",
)
QUESTION_FIRST = "{{ messages[0]['content'].split('\n')[1] }} {{ messages[0]['content'].split('\n')[0] }} ASSISTANT:"


def extract(run, out, *more, size=2):
    """Batches of two rows split every clip of three questions, so that a clip's rows come from two batches."""
    flags = ["--config", str(run / "tiny.yaml"), "--split", "train", "--batch_size", str(size), "--output_dir", str(out)]
    extract_hidden_states.main([*flags, *more])
    return out / "hidden_states" / "train"


def same_files(one, other):
    return [name for name in FILES if (one / name).read_bytes() != (other / name).read_bytes()]


@pytest.fixture(scope="module")
def whole(tiny_run, tmp_path_factory):
    return extract(tiny_run, tmp_path_factory.mktemp("event_states"))


@pytest.mark.parametrize("size", [2, 7])
def test_every_row_has_the_event_states_that_its_clip_has_alone(tiny_run, whole, tmp_path, size):
    folder = whole if size == 2 else extract(tiny_run, tmp_path, size=size)
    states, cfg = load_hidden_states(folder, events=True), read_config(tiny_run)
    draft, samples = load_pair(cfg).draft, read_samples(cfg.manifests, "train")
    assert len(states.events) == 6 == states.meta["clips"] and states.clip_index.tolist() == [row // 3 for row in range(18)]
    for row in (0, 1, 2, 3, 17):
        prompt = draft.prepare(samples[row])
        alone = draft.vision_states(prompt.ids[None], draft.encode_vision(prompt.pixels[None]))
        torch.testing.assert_close(states.events_of(torch.tensor([row])), alone, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(states.events[0], states.events[1])
    (texts,) = text_batches(states, [torch.tensor([5, 0, 3])], "cpu")
    assert torch.equal(texts.events, states.events[[1, 0, 1]])


def read_config(run):
    return parse_config(extract_hidden_states.ExtractConfig, ["--config", str(run / "tiny.yaml")], "extract_hidden_states")


def test_the_file_is_as_many_times_smaller_as_a_clip_has_questions(whole):
    meta, stored = json.loads((whole / "meta.json").read_text()), load_pt(whole / EVENT_STATES, "")
    assert stored.nbytes == 6 * meta["row_bytes"][EVENT_STATES] and (whole / EVENT_STATES).stat().st_size < stored.nbytes + 4096
    assert verify(whole.parents[1])[0] == []


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_that_split_a_clip_merge_to_the_whole(tiny_run, whole, tmp_path, shards):
    for shard in range(shards, 0, -1):
        extract(tiny_run, tmp_path, "--shard", f"{shard}/{shards}")
    clips = [json.loads(p.read_text())["clips"] for p in (tmp_path / "hidden_states").glob("*shard*/meta.json")]
    assert sum(clips) > 6  # some clips are in two shards, and once in the merged file
    assert same_files(extract(tiny_run, tmp_path, "--merge"), whole) == []


def with_manifest(run, tmp_path, change):
    """The run's config with another train manifest; returns its folder."""
    rows = [json.loads(line) for line in (run / "scenes" / "train.jsonl").read_text().splitlines()]
    config = json.loads((run / "tiny.yaml").read_text())
    path = run / "scenes" / f"{tmp_path.name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    config["common"]["manifests"]["train"] = str(path)
    (tmp_path / "tiny.yaml").write_text(json.dumps(config))
    return tmp_path


CHANGES = {
    "rows are appended": (lambda rows: rows[:11], lambda rows: rows),
    "the first question of a clip is removed": (lambda rows: rows, lambda rows: [*rows[:3], *rows[5:]]),
    "a clip is asked about earlier": (lambda rows: rows[:12], lambda rows: [{**rows[9], "id": "new", "question": "Where?"}, *rows[:12]]),
    "clips change places": (lambda rows: rows, lambda rows: [*rows[9:], *rows[:9]]),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_manifest_gives_the_bytes_of_a_new_extraction(tiny_run, tmp_path, kind, caplog):
    before, after = CHANGES[kind]
    for name in ("kept", "new"):
        (tmp_path / name).mkdir()
    extract(with_manifest(tiny_run, tmp_path / "kept", before), tmp_path / "kept")
    with caplog.at_level("INFO"):
        kept = extract(with_manifest(tiny_run, tmp_path / "kept", after), tmp_path / "kept")
    assert "0 damaged" in caplog.text  # a row whose event states another row held is not copied, and so not found wrong
    new = extract(with_manifest(tiny_run, tmp_path / "new", after), tmp_path / "new")
    assert same_files(kept, new) == [] and verify(tmp_path / "kept")[0] == []


def test_altered_event_states_are_found_and_extracted_again(tiny_run, whole, tmp_path):
    folder = tmp_path / "hidden_states" / "train"
    shutil.copytree(whole.parents[1], tmp_path, dirs_exist_ok=True)
    stored = load_pt(folder / EVENT_STATES, "")
    data, at = bytearray((folder / EVENT_STATES).read_bytes()), storage_offset(folder / EVENT_STATES) + 2 * stored[0].nbytes + 5
    data[at] ^= 1
    del stored
    (folder / EVENT_STATES).write_bytes(data)
    first = json.loads((folder / "samples.jsonl").read_text().splitlines()[6])["id"]
    with pytest.raises(UserError, match=f"the states of sample {first} were altered"):
        load_hidden_states(folder, events=True)
    (found,) = [f for f in verify(tmp_path)[0] if f.state == "altered"]
    assert found.about.endswith(EVENT_STATES) and f"1 of 6 samples, e.g. {first}" in found.why
    assert same_files(extract(tiny_run, tmp_path), whole) == []


def old_version(folder):
    """The split as versions before wrote it: event states of every row, and no index."""
    states = load_hidden_states(folder, events=True)
    every, rows = states.events_of(torch.arange(18)).clone(), [dict(row) for row in states.rows]
    positions = {key: value.clone() for key, value in load_pt(folder / "positions.pt", "").items() if key != "clip_index"}
    save_pt(folder / EVENT_STATES, every), save_pt(folder / "positions.pt", positions)
    for row, found in zip(rows, row_hashes(folder / EVENT_STATES, 18, every[0].nbytes), strict=True):
        row["sha256"] = {**row["sha256"], EVENT_STATES: found}
        del row["events"]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    meta = json.loads((folder / "meta.json").read_text())
    meta["frames"][EVENT_STATES] = frame_hash(folder / EVENT_STATES, every.nbytes)
    names = [name for name in meta["files"]]
    write_hashed_json(folder / "meta.json", {k: v for k, v in meta.items() if k not in ("files", "content_hash", "clips")}, names)
    return states, every


def test_files_of_earlier_versions_load_and_are_reused(tiny_run, whole, tmp_path):
    shutil.copytree(whole.parents[1], tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "hidden_states" / "train"
    _, every = old_version(folder)
    states = load_hidden_states(folder, events=True)
    assert states.events.shape[0] == 18 and torch.equal(states.events_of(torch.arange(18)), every)
    assert verify(tmp_path)[0] == []
    before = (folder / EVENT_STATES).read_bytes()
    extract(tiny_run, tmp_path)  # its settings, sources and rows are the requested ones
    assert (folder / EVENT_STATES).read_bytes() == before


def test_rows_of_an_earlier_version_are_copied_into_the_new_layout(tiny_run, tmp_path):
    for name in ("kept", "new"):
        (tmp_path / name).mkdir()
    old_version(extract(with_manifest(tiny_run, tmp_path / "kept", lambda rows: rows), tmp_path / "kept"))
    more = lambda rows: [*rows, {**rows[0], "id": "new", "question": "Where?"}]  # noqa: E731
    kept = extract(with_manifest(tiny_run, tmp_path / "kept", more), tmp_path / "kept")
    new = extract(with_manifest(tiny_run, tmp_path / "new", more), tmp_path / "new")
    assert same_files(kept, new) == []


def test_an_index_of_other_clips_is_refused(whole, tmp_path):
    folder = tmp_path / "hidden_states" / "train"
    shutil.copytree(whole.parents[1], tmp_path, dirs_exist_ok=True)
    positions = {key: value.clone() for key, value in load_pt(folder / "positions.pt", "").items()}
    positions["clip_index"][4] = 0
    save_pt(folder / "positions.pt", positions)
    meta = json.loads((folder / "meta.json").read_text())
    write_hashed_json(folder / "meta.json", {k: v for k, v in meta.items() if k not in ("files", "content_hash")}, list(meta["files"]))
    with pytest.raises(UserError, match=r"clip_index of positions\.pt is not that of samples\.jsonl"):
        load_hidden_states(folder)


def test_where_the_question_comes_first_every_row_has_states_of_its_own(tiny_run, tmp_path):
    config = json.loads((tiny_run / "tiny.yaml").read_text())
    shutil.copytree(tiny_run / "pair" / "eventgpt", tmp_path / "eventgpt")
    (tmp_path / "eventgpt" / "chat_template.jinja").write_text(QUESTION_FIRST)
    config["common"]["draft_id"] = str(tmp_path / "eventgpt")
    (tmp_path / "tiny.yaml").write_text(json.dumps(config))
    states = load_hidden_states(extract(tmp_path, tmp_path / "out", "--limit", "6", size=1), events=True)
    assert states.clip_index.tolist() == list(range(6)) and len(states.events) == 6
    assert not torch.allclose(states.events[0], states.events[1])  # the same clip, after another question
    draft = load_pair(read_config(tmp_path)).draft
    one, two = map(draft.encode_prompt, ("What is there?", "Where?"))
    assert not depend_on_the_clip_alone([one, two], draft.placeholder) and depend_on_the_clip_alone([one, one], draft.placeholder)
    released = load_pair(read_config(tiny_run)).draft
    assert depend_on_the_clip_alone(map(released.encode_prompt, ("What is there?", "Where?")), released.placeholder)


def test_a_clip_is_one_event_file_with_one_start_and_unit(tiny_run):
    manifest = tiny_run / "scenes" / "train.jsonl"
    a = read_samples({"train": manifest}, "train")
    same = [a[0], a[1], dataclasses.replace(a[0], video=a[3].video), dataclasses.replace(a[0], event_start_ms=0.0)]
    other = [dataclasses.replace(a[0], event_start_ms=1.0), dataclasses.replace(a[0], event_time_unit="us"), a[3]]
    found = identify([*same, *other], [range(7)], manifest, 0.0)
    assert list(event_rows(found)) == [0, 0, 0, 0, 1, 2, 3]
    assert list(rows_in_file(EVENT_STATES, [0, 0, 0, 0, 1, 2, 3])) == [0, 4, 5, 6]
    assert Counter(len(row["events"]) for row in found) == {16: 7}


def test_the_size_is_logged_and_the_room_is_checked_for_clips_not_rows(tiny_run, tmp_path, monkeypatch, caplog):
    from feature_alignment.storage import hidden_states_writer

    needed = []
    monkeypatch.setattr(hidden_states_writer, "check_disk_space", lambda _, size: needed.append(size))
    with caplog.at_level("INFO"):
        folder = extract(tiny_run, tmp_path)
    sizes = {name: load_pt(folder / name, "").nbytes for name in FILES[:5]}
    heads = sum(load_pt(folder.parent / name, "").nbytes for name in ("vl_lm_head.pt", "vl_embeddings.pt"))
    assert needed == [sum(sizes.values()) + heads]
    assert f"18 rows about 6 clips, at most {sum(sizes.values()) / 1e6:,.1f} MB" in caplog.text
    assert f"{EVENT_STATES} {sizes[EVENT_STATES] / 1e6:,.1f} MB" in caplog.text
