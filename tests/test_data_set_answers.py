"""A whole data set is answered: every row is its sample's answer, and kills, shards, batches and broken clips change no other row."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, fork

from feature_alignment import SpeculativePair, extract_hidden_states, feature_sd_inference
from feature_alignment.cli.console import UserError
from feature_alignment.decoding import answer_all, speculative_pair
from feature_alignment.decoding.answer_all import Totals
from feature_alignment.decoding.baseline_drafters import Previous
from feature_alignment.inputs.samples import read_samples
from feature_alignment.storage.answer_rows import read_rows
from feature_alignment.storage.verification import verify

TIMES = ("total_ms", "ms")
DEMO = ROOT / "outputs" / "demo"


def flags(run: Path, out: Path, *more: str) -> list[str]:
    given = {word for word in more if word.startswith("--")}
    preset = [*([] if "--draft" in given else ["--draft", "lookup"]), *([] if given & {"--split", "--clips"} else ["--split", "test"])]
    return ["--config", str(run / "tiny.yaml"), "--output_dir", str(out), *preset, *more]


def answered(run: Path, out: Path, *more: str) -> dict:
    return feature_sd_inference.main(flags(run, out, *more))


def untimed(path: Path) -> list[dict]:
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tiny_run, tmp_path_factory) -> Path:
    """The file of one uninterrupted run: four clips, four questions each."""
    out = tmp_path_factory.mktemp("whole")
    answered(tiny_run, out)
    return out / "sd" / "test.jsonl"


@pytest.fixture
def scene(tiny_run, tmp_path) -> list[str]:
    """Flags that read a copy of the test split, whose clips may be broken."""
    shutil.copytree(tiny_run / "scenes", tmp_path / "scenes")
    return [f"--manifests={json.dumps({'test': str(tmp_path / 'scenes' / 'test.jsonl')})}"]


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """Grows whenever the models are loaded."""
    seen: list[str] = []
    load = speculative_pair.load_pair
    monkeypatch.setattr(speculative_pair, "load_pair", lambda cfg: seen.append("loaded") or load(cfg))
    return seen


# ------------------------------------------------------------------------------------------------------------------- the rows


def test_each_row_is_the_answer_of_its_sample(tiny_run, whole, tmp_path):
    pair = SpeculativePair.from_config(tiny_run / "tiny.yaml", draft="lookup", output_dir=tmp_path)
    samples = read_samples(pair.cfg.manifests, "test")
    rows = read_rows(whole)
    assert [row["id"] for row in rows] == [sample.id for sample in samples] and len(rows) == 16
    for sample, row in zip(samples, rows, strict=True):
        generation = pair.decode(prompts := pair.prepare(sample))
        assert row["token_ids"] == pair.decode_plainly(prompts).token_ids == generation.token_ids
        assert (row["question"], row["text"]) == (sample.question, pair.text_of(row["token_ids"]))
        assert row["accepted"] == [r.num_accepted for r in generation.rounds] and row["passes"] == generation.passes
        assert row["tokens_per_pass"] == (len(row["token_ids"]) - 1) / row["passes"]
        assert row["total_ms"] >= sum(row["ms"].values()) > 0
        assert row["settings"] | {"draft": "lookup", "accept": "token", "num_draft_tokens": 5} == row["settings"]


@pytest.mark.parametrize("size", ["3", "7"])
def test_batches_give_the_answers_of_single_samples(tiny_run, whole, tmp_path, size):
    answered(tiny_run, tmp_path, "--batch_size", size)
    keys = ("id", "token_ids", "accepted", "tokens_per_pass")
    found, wanted = (untimed(path) for path in (tmp_path / "sd" / "test.jsonl", whole))
    assert [[row[key] for key in keys] for row in found] == [[row[key] for key in keys] for row in wanted]


@pytest.mark.parametrize("draft", ["aligned", "own"])
def test_batches_of_a_drafter_that_steps_need_no_cache_of_one_text(finished, tmp_path, draft):
    """Captured steps hold one text at a time, and EventGPT drafts for every row of a batch."""
    for size, steps in (("1", "eager"), ("3", "graphs")):
        out = tmp_path / size
        for folder in ("adapter", "token_pairs"):
            shutil.copytree(finished / "out" / folder, out / folder)
        answered(finished, out, "--draft", draft, "--batch_size", size, "--steps", steps, "--limit", "5")
    keys = ("id", "token_ids", "accepted", "tokens_per_pass")
    one, some = ([[row[key] for key in keys] for row in untimed(tmp_path / size / "sd" / "test.jsonl")] for size in ("1", "3"))
    assert one == some and len(one) == 5


def test_progress_shows_tokens_per_second_and_accepted_length_so_far(tiny_run, tmp_path, monkeypatch):
    shown: list[str] = []
    steps: list[int] = []

    class Bar:
        def __init__(self, **about):
            assert about["total"] == 3 and about["initial"] == 0 and "test" in about["desc"]

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731
        update = lambda _, n: steps.append(n)  # noqa: E731
        set_postfix_str = lambda _, text: shown.append(text)  # noqa: E731

    monkeypatch.setattr(answer_all, "progress", Bar)
    answered(tiny_run, tmp_path, "--limit", "3")
    rows = read_rows(tmp_path / "sd" / "test.jsonl")
    for n, text in enumerate(shown, 1):
        totals = Totals().add(rows[:n])
        assert text.endswith(f"tokens/s, {totals.mean_accepted:.2f} accepted a round") and float(text.split()[0]) > 0
    assert len(shown) == 3 and steps == [1, 1, 1]


def test_totals_are_sums_over_rows():
    rows = [
        {"token_ids": [5] * 7, "passes": 2, "accepted": [3, 1]},
        {"token_ids": [5] * 4, "passes": 1, "accepted": [2]},
        {"id": "x", "error": "unreadable"},
    ]
    totals = Totals().add(rows)
    assert (totals.answered, totals.failed, totals.tokens, totals.tokens_per_pass, totals.mean_accepted) == (2, 1, 11, 3.0, 2.0)
    assert totals.progress_text(2.0) == "5.5 tokens/s, 2.00 accepted a round, 1 failed"


# -------------------------------------------------------------------------------------------------------------- kills, resuming


def killed_after(argv: list[str], path: Path, lines: int, wait: float) -> None:
    """Run the script in a process of its own, and kill it some time after the file has so many lines."""
    pid = fork()
    if pid == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            feature_sd_inference.main(argv)
        finally:
            os._exit(0)
    while not (path.is_file() and path.read_bytes().count(b"\n") >= lines):
        time.sleep(0.002)
    time.sleep(wait)
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_kills_at_random_moments_change_nothing_but_times(tiny_run, tmp_path, batch_size):
    moments, path = random.Random(0), tmp_path / "sd" / "test.jsonl"
    more = ("--draft", "own", "--batch_size", batch_size)
    answered(tiny_run, tmp_path / "uninterrupted", *more)
    for kill in range(3):
        killed_after(flags(tiny_run, tmp_path, *more), path, 3 * kill + 1, moments.uniform(0, 0.02))
    with path.open("ab") as stream:
        stream.write(b'{"id": "test-0002-q0", "quest')  # a torn line
    answered(tiny_run, tmp_path, *more)
    assert untimed(path) == untimed(tmp_path / "uninterrupted" / "sd" / "test.jsonl")
    assert sorted(p.name for p in path.parent.iterdir()) == ["test.jsonl", "test.meta.json"]


def test_a_resumed_run_answers_only_what_is_missing(tiny_run, whole, tmp_path, monkeypatch):
    path = tmp_path / "sd" / "test.jsonl"
    answered(tiny_run, tmp_path, "--limit", "5")
    kept = path.read_bytes()
    asked: list[str] = []
    answer = answer_all.answer
    monkeypatch.setattr(answer_all, "answer", lambda pair, samples, *a: asked.extend(s.id for s in samples) or answer(pair, samples, *a))
    answered(tiny_run, tmp_path)
    assert path.read_bytes().startswith(kept) and untimed(path) == untimed(whole)
    assert asked == [row["id"] for row in read_rows(whole)][5:]


def test_every_line_can_be_read_while_a_run_that_was_killed_within_a_line_goes_on(tiny_run, tmp_path, monkeypatch):
    path = tmp_path / "sd" / "test.jsonl"
    killed_after(flags(tiny_run, tmp_path, "--draft", "own"), path, 2, 0)
    with path.open("ab") as stream:
        stream.write(b'{"id": "test-0002-q0", "quest')
    seen: list[int] = []
    answer = answer_all.answer
    monkeypatch.setattr(answer_all, "answer", lambda *given: seen.append(len(untimed(path))) or answer(*given))
    answered(tiny_run, tmp_path, "--draft", "own")
    assert seen == list(range(seen[0], 16)) and seen[0] >= 2


def test_a_sample_that_failed_is_tried_again(tiny_run, whole, tmp_path, monkeypatch):
    prepare = SpeculativePair.prepare

    def disk_error(pair, sample):
        if sample.id == read_rows(whole)[1]["id"]:
            raise OSError("the disk was gone")
        return prepare(pair, sample)

    monkeypatch.setattr(SpeculativePair, "prepare", disk_error)
    with pytest.raises(UserError, match="the disk was gone"):
        answered(tiny_run, tmp_path, "--limit", "3")
    monkeypatch.undo()
    assert answered(tiny_run, tmp_path, "--limit", "3")["failed"] == 0
    assert untimed(tmp_path / "sd" / "test.jsonl") == untimed(whole)[:3]


def test_a_batch_of_which_a_part_was_written_is_answered_as_a_whole(tiny_run, tmp_path):
    path = tmp_path / "sd" / "test.jsonl"
    answered(tiny_run, tmp_path, "--batch_size", "4")
    wanted, lines = untimed(path), path.read_bytes().splitlines(keepends=True)
    answered(tiny_run, tmp_path, "--batch_size", "4", "--no_resume", "--limit", "4")
    path.write_bytes(b"".join(lines[:4]))
    meta = path.with_suffix(".meta.json")
    described = json.loads(meta.read_text())
    from feature_alignment.storage.files import write_hashed_json

    write_hashed_json(meta, {k: v for k, v in described.items() if k not in ("files", "content_hash")})  # unfinished again
    path.write_bytes(b"".join(lines[:6]))
    answered(tiny_run, tmp_path, "--batch_size", "4")
    assert untimed(path) == wanted
    found = path.read_bytes().splitlines(keepends=True)
    assert found[:4] == lines[:4] and found[4] != lines[4]  # times of another run


def test_a_drafter_that_remembers_answers_knows_the_same_after_a_resume(tiny_run, tmp_path, monkeypatch):
    known: list[tuple[str, list[int]]] = []
    finished = Previous.finished
    monkeypatch.setattr(Previous, "finished", lambda table, q, ids: known.append((q, list(ids))) or finished(table, q, ids))
    extract_hidden_states.main(["--config", str(tiny_run / "tiny.yaml"), "--output_dir", str(tmp_path / "a"), "--event_states", "false"])
    shutil.copytree(tmp_path / "a" / "token_pairs", tmp_path / "b" / "token_pairs")
    answered(tiny_run, tmp_path / "a", "--draft", "previous")
    uninterrupted = known[:]
    for more in (("--limit", "3"), ("--limit", "9"), ()):
        known.clear()
        answered(tiny_run, tmp_path / "b", "--draft", "previous", *more)
    assert known == uninterrupted == [(row["question"], row["token_ids"]) for row in read_rows(tmp_path / "a" / "sd" / "test.jsonl")[:-1]]
    assert untimed(tmp_path / "a" / "sd" / "test.jsonl") == untimed(tmp_path / "b" / "sd" / "test.jsonl")


def test_a_complete_file_is_reused_without_loading_the_models(tiny_run, tmp_path, loads):
    answered(tiny_run, tmp_path, "--limit", "2")
    before = (tmp_path / "sd" / "test.jsonl").read_bytes()
    assert answered(tiny_run, tmp_path, "--limit", "2")["rows"] == 2
    assert loads == ["loaded"] and (tmp_path / "sd" / "test.jsonl").read_bytes() == before
    findings, _ = verify(tmp_path)
    assert not findings
    answered(tiny_run, tmp_path, "--limit", "2", "--no_resume")
    assert loads == ["loaded"] * 2 and (tmp_path / "sd" / "test.jsonl").read_bytes() != before


def test_answers_of_other_settings_or_other_code_are_refused_by_name(tiny_run, tmp_path, monkeypatch):
    answered(tiny_run, tmp_path, "--limit", "2")
    for more, said in (
        (["--num_draft_tokens", "3"], "num_draft_tokens: 5 → 3"),
        (["--draft", "own"], "draft: lookup → own"),
        (["--batch_size", "2"], "batch_size: 1 → 2"),
    ):
        with pytest.raises(UserError, match=f"(?s)made with other settings.*{said}.*--no_resume"):
            answered(tiny_run, tmp_path, "--limit", "2", *more)
    from feature_alignment.storage import identity

    code = identity.code_of("feature_sd_inference")
    monkeypatch.setattr(identity, "code_of", lambda stage: {**code, "decoding.engine": "other"})
    with pytest.raises(UserError, match=r"(?s)code: decoding\.engine changed.*--ignore_code"):
        answered(tiny_run, tmp_path, "--limit", "2")
    assert answered(tiny_run, tmp_path, "--limit", "3", "--ignore_code")["code"] == code
    answered(tiny_run, tmp_path, "--limit", "2", "--no_resume")


def test_answers_are_not_lost_by_a_limit_or_without_their_meta_or_after_a_change(tiny_run, tmp_path):
    path = tmp_path / "sd" / "test.jsonl"
    answered(tiny_run, tmp_path, "--limit", "3")
    with pytest.raises(UserError, match="would drop 1 of them"):
        answered(tiny_run, tmp_path, "--limit", "2")
    rows = path.read_bytes()
    path.write_bytes(rows.replace(b"lookup", b"random"))
    with pytest.raises(UserError, match="altered after it was written"):
        answered(tiny_run, tmp_path, "--limit", "3")
    path.with_suffix(".meta.json").unlink()
    with pytest.raises(UserError, match=r"has no test\.meta\.json"):
        answered(tiny_run, tmp_path, "--limit", "3")


# --------------------------------------------------------------------------------------------------------------- broken samples


def test_an_unreadable_clip_becomes_a_row_with_its_error_and_the_run_ends_with_code_2(tiny_run, whole, tmp_path, scene):
    clip = tmp_path / "scenes" / json.loads((tmp_path / "scenes" / "test.jsonl").read_text().splitlines()[5])["video"]
    intact = clip.read_bytes()
    clip.write_bytes(b"no video")
    path, wanted = tmp_path / "sd" / "test.jsonl", untimed(whole)
    with pytest.raises(UserError, match=r"4 of 16 samples could not be answered.*sd/test\.jsonl"):
        answered(tiny_run, tmp_path, *scene)
    broken = read_rows(path)
    assert [row["id"] for row in broken] == [row["id"] for row in wanted]
    assert [i for i, row in enumerate(broken) if "error" in row] == [4, 5, 6, 7] and str(clip) in broken[5]["error"]
    assert [row for row in untimed(path) if "error" not in row] == wanted[:4] + wanted[8:]
    assert json.loads(path.with_suffix(".meta.json").read_text())["failed"] == 4

    clip.write_bytes(intact)
    kept = path.read_bytes().splitlines()
    assert answered(tiny_run, tmp_path, *scene)["failed"] == 0
    assert untimed(path) == wanted and [kept[i] == line for i, line in enumerate(path.read_bytes().splitlines())].count(True) == 12


def test_a_broken_sample_leaves_the_others_of_its_batch_alone(tiny_run, whole, tmp_path, scene):
    rows = [json.loads(line) for line in (tmp_path / "scenes" / "test.jsonl").read_text().splitlines()]
    (tmp_path / "scenes" / rows[0]["events"]).unlink()
    with pytest.raises(UserError, match="4 of 16"):
        answered(tiny_run, tmp_path, *scene, "--batch_size", "8")
    found = read_rows(tmp_path / "sd" / "test.jsonl")
    assert [row.get("token_ids") for row in found] == [None] * 4 + [row["token_ids"] for row in untimed(whole)[4:]]


def test_fail_fast_stops_at_the_first_broken_sample_and_keeps_the_rows_before_it(tiny_run, tmp_path, scene):
    rows = [json.loads(line) for line in (tmp_path / "scenes" / "test.jsonl").read_text().splitlines()]
    (tmp_path / "scenes" / rows[4]["events"]).write_bytes(b"")
    with pytest.raises(UserError, match=f"sample {rows[4]['id']}: "):
        answered(tiny_run, tmp_path, *scene, "--fail_fast")
    assert [row["id"] for row in read_rows(tmp_path / "sd" / "test.jsonl")] == [row["id"] for row in rows[:4]]


# ----------------------------------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize(("shards", "batch_size"), [(2, "1"), (3, "3")])
def test_shards_merge_to_what_one_run_writes(tiny_run, tmp_path, shards, batch_size, loads):
    answered(tiny_run, tmp_path / "one", "--batch_size", batch_size)
    for i in range(1, shards + 1):
        answered(tiny_run, tmp_path, "--batch_size", batch_size, "--shard", f"{i}/{shards}")
    loads.clear()
    meta = answered(tiny_run, tmp_path, "--batch_size", batch_size, "--merge")
    assert meta["merged_shards"] == shards and not loads
    assert untimed(tmp_path / "sd" / "test.jsonl") == untimed(tmp_path / "one" / "sd" / "test.jsonl")
    answered(tiny_run, tmp_path, "--batch_size", batch_size)
    assert not loads  # the merged file is that of a whole run


def test_shards_with_failed_rows_merge_and_are_repaired(tiny_run, whole, tmp_path, scene):
    path, rows = (
        tmp_path / "sd" / "test.jsonl",
        [json.loads(line) for line in (tmp_path / "scenes" / "test.jsonl").read_text().splitlines()],
    )
    clip = tmp_path / "scenes" / rows[5]["video"]
    intact = clip.read_bytes()
    clip.write_bytes(b"no video")
    for shard in ("1/2", "2/2"):
        with pytest.raises(UserError, match=r"(?s)2 of 8 samples could not be answered.*run the same command again"):
            answered(tiny_run, tmp_path, *scene, "--shard", shard)
    with pytest.raises(UserError, match=r"(?s)4 of 16 samples could not be answered.*run every shard, then --merge, again"):
        answered(tiny_run, tmp_path, *scene, "--merge")
    assert [row["id"] for row in read_rows(path) if "error" in row] == [row["id"] for row in rows[4:8]]
    assert [row for row in untimed(path) if "error" not in row] == untimed(whole)[:4] + untimed(whole)[8:]
    clip.write_bytes(intact)
    for more in (("--shard", "1/2"), ("--shard", "2/2"), ("--merge",)):
        assert answered(tiny_run, tmp_path, *scene, *more)["failed"] == 0
    assert untimed(path) == untimed(whole)


def test_shards_that_are_missing_unfinished_altered_or_of_other_settings_are_not_merged(tiny_run, tmp_path):
    path = tmp_path / "sd" / "test.shard-2-of-2.jsonl"
    with pytest.raises(UserError, match="lacks every shard"):
        answered(tiny_run, tmp_path, "--merge")
    answered(tiny_run, tmp_path, "--shard", "1/2")
    with pytest.raises(UserError, match=r"lacks test\.shard-2-of-2\.jsonl"):
        answered(tiny_run, tmp_path, "--merge")
    killed_after(flags(tiny_run, tmp_path, "--shard", "2/2"), path, 2, 0)
    with pytest.raises(UserError, match="is unfinished"):
        answered(tiny_run, tmp_path, "--merge")
    assert [(f.state, f.about) for f in verify(tmp_path)[0]] == [("unfinished", "sd/test.shard-2-of-2.meta.json")]
    answered(tiny_run, tmp_path, "--shard", "2/2")
    with pytest.raises(UserError, match="num_draft_tokens: 5 recorded, 2 now"):
        answered(tiny_run, tmp_path, "--merge", "--num_draft_tokens", "2")
    with pytest.raises(UserError, match="hold 16 samples, the data set 3"):
        answered(tiny_run, tmp_path, "--merge", "--limit", "3")
    path.write_bytes(path.read_bytes().replace(b"lookup", b"random"))
    with pytest.raises(UserError, match="altered"):
        answered(tiny_run, tmp_path, "--merge")


# ------------------------------------------------------------------------------------------------------------------------ clips


@pytest.fixture
def mine(tiny_run, tmp_path) -> tuple[Path, list[dict]]:
    """A folder with the clips of the test split, and the rows of its manifest."""
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = [json.loads(line) for line in (tiny_run / "scenes" / "test.jsonl").read_text().splitlines()]
    for n, row in enumerate(rows[::4]):
        for key in ("events", "video"):
            shutil.copy(tiny_run / "scenes" / row[key], folder / f"clip{n}{Path(row[key]).suffix}")
    return folder, rows


def test_hidden_states_of_a_clip_folder_are_extracted_without_a_manifest(tiny_run, tmp_path, mine):
    folder, rows = mine
    manifest = tmp_path / "manifest.jsonl"
    clips = [{**row, "id": f"clip{n}", "question": "What?"} for n, row in enumerate(rows[::4])]
    clips = [{**row, **{key: f"mine/clip{n}{Path(row[key]).suffix}" for key in ("events", "video")}} for n, row in enumerate(clips)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in clips))
    base = ["--config", str(tiny_run / "tiny.yaml"), "--split", "mine", "--output_dir"]
    wanted = ["--manifests", json.dumps({"mine": str(manifest)})]
    extract_hidden_states.main([*base, str(tmp_path / "a"), *wanted])
    extract_hidden_states.main([*base, str(tmp_path / "b"), "--clips", str(folder), "--question", "What?"])
    for name in ("vl_hidden_states.pt", "egpt_hidden_states.pt"):
        a, b = (tmp_path / out / "hidden_states" / "mine" / name for out in ("a", "b"))
        assert a.read_bytes() == b.read_bytes()
    assert not verify(tmp_path / "b")[0]
    with pytest.raises(UserError, match="asked about the clips of --clips"):
        extract_hidden_states.main([*base, str(tmp_path / "a"), *wanted, "--question", "What?"])


def test_a_clip_folder_is_answered_without_a_manifest(tiny_run, whole, tmp_path, caplog, mine):
    folder, rows = mine
    caplog.set_level("INFO")
    answered(tiny_run, tmp_path, "--clips", str(folder), "--question", rows[0]["question"])
    assert "clip3: clip3.npy and clip3.mp4" in caplog.text
    wanted = {(row["events"], row["question"]): row["id"] for row in rows}
    compared = 0
    tokens = {row["id"]: row["token_ids"] for row in read_rows(whole)}
    found = read_rows(tmp_path / "sd" / "mine.jsonl")
    assert [row["id"] for row in found] == ["clip0", "clip1", "clip2", "clip3"] and found[0]["token_ids"] == tokens[rows[0]["id"]]
    questions = tmp_path / "questions.txt"
    questions.write_text("".join(f"{q}\n" for q in dict.fromkeys(row["question"] for row in rows)))
    answered(tiny_run, tmp_path, "--clips", str(folder), "--questions", str(questions), "--split", "all")
    for row in read_rows(tmp_path / "sd" / "all.jsonl"):
        clip = rows[4 * int(row["id"][4])]["events"]
        if (clip, row["question"]) in wanted:
            assert row["token_ids"] == tokens[wanted[clip, row["question"]]]
            compared += 1
    assert compared == 16


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--clips", "."], "nothing to ask"),
        (["--clips", ".", "--question", "?", "--questions", "CONFIG"], "wanted one of them"),
        (["--clips", ".", "--question", "?", "--events", "CONFIG"], "a folder of clips or the files of one"),
        (["--clips", ".", "--question", "?", "--sample", "a"], "--clips . and --sample a"),
        (["--clips", "absent", "--question", "?"], "no folder at"),
        (["--split", "test", "--sample", "a", "--shard", "1/2"], "--shard is for a whole data set"),
        (["--split", "test", "--sample", "a", "--batch_size", "2"], "--batch_size is for a whole data set"),
        (["--batch_size", "2", "--adaptive"], "--batch_size 2 and --adaptive: batches"),
        (["--batch_size", "2", "--accept", "feature"], "--batch_size 2 and --accept: batches"),
        (["--batch_size", "2", "--temperature", "1"], "--temperature: batches"),
        (["--batch_size", "2", "--draft", "previous"], "answered in order"),
        (["--shard", "1/2", "--draft", "previous"], "answered in order"),
        (["--shard", "3/2"], "--shard wants i/n"),
        (["--shard", "1/2", "--merge"], "no --merge"),
        (["--shard", "17/17"], "leave none"),
        (["--events", "CONFIG", "--video", "CONFIG", "--question", "?"], "--events .* and --split: wanted files of your own"),
        (["--verbose"], "--verbose prints the rounds of one sample"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_by_name(tiny_run, tmp_path, more, said):
    more = [str(tiny_run / "tiny.yaml") if word == "CONFIG" else word for word in more]
    with pytest.raises(UserError, match=said):
        answered(tiny_run, tmp_path, *more)
    assert not (tmp_path / "sd").exists()


# ---------------------------------------------------------------------------------------------------------------- the demo pair


@pytest.mark.slow
@pytest.mark.skipif(not (DEMO / "chained_adapter" / "adapter.pt").is_file(), reason="run_all.sh has not been run")
def test_64_samples_of_the_demo_survive_two_kills_and_two_shards(tmp_path):
    shutil.copytree(DEMO / "chained_adapter", tmp_path / "chained_adapter")
    base = [sys.executable, "feature_alignment/feature_sd_inference.py", "--config", "configs/demo.yaml", "--split", "test"]
    base += ["--draft", "chained", "--limit", "64", "--output_dir", str(tmp_path)]
    path = tmp_path / "sd" / "test.jsonl"
    for lines in (10, 35):
        process = subprocess.Popen(base, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (path.is_file() and path.read_bytes().count(b"\n") >= lines):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    subprocess.run(base, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    resumed = untimed(path)
    subprocess.run([*base, "--no_resume"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert resumed == untimed(path) and len(resumed) == 64
    for more in (["--shard", "1/2"], ["--shard", "2/2"], ["--merge"]):
        subprocess.run([*base, *more], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert resumed == untimed(path) and json.loads(path.with_suffix(".meta.json").read_text())["merged_shards"] == 2
