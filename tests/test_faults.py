"""Kills, full disks, folders that cannot be written, two runs at once: what has its final name is complete, and a rerun gives what an
uninterrupted run gives. And two uninterrupted runs give the same.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fork, main_of
from test_mutations import numbers, tree

from feature_alignment.cli import console
from feature_alignment.cli.config import SCRIPTS
from feature_alignment.cli.console import UserError
from feature_alignment.storage import files, hidden_states, verification
from feature_alignment.storage.files import atomic_write
from feature_alignment.storage.hidden_states import load_hidden_states
from feature_alignment.storage.identity import RunIdentity
from feature_alignment.storage.processes import exclusive_lock
from feature_alignment.storage.verification import WRONG, verify

QUICK = ["--limit", "2", "--max_new_tokens", "6", "--repeats", "1", "--warmup", "0", "--num_draft_tokens", "2"]
COMMANDS = {
    "extraction": ("extract_hidden_states", ["--split", "train", "--no_resume"], "hidden_states/train"),
    "training": ("train_hidden_adapter", ["--no_resume"], "adapter"),
    "chained training": ("train_hidden_adapter", ["--adapter", "chained", "--bottleneck", "16", "--no_resume"], "chained_adapter"),
    "acceptance": ("measure_feature_acceptance", ["--no_resume"], "acceptance"),
    "comparison": ("compare_token_baseline", [], "token_baseline"),
    "inference": ("feature_sd_inference", [], "sd"),
    "benchmark": ("benchmark_feature_sd", [*QUICK, "--no_resume"], "benchmark"),
}


def some_slow(*quick: str) -> list:
    """All commands; only the `quick` ones in the default run."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]


@pytest.fixture
def run(finished, tmp_path):
    """The finished small run, copied: config and outputs."""
    shutil.copytree(finished / "out", tmp_path / "out")
    return ["--config", str(finished / "tiny.yaml"), "--output_dir", str(tmp_path / "out")]


def started(script: str, argv: list[str], before=lambda: None, stderr: int | None = None) -> int:
    """A process of its own that runs the script as a command would, spared the seconds that imports take; returns its pid."""
    pid = fork()
    if pid == 0:
        code = 1
        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent if stderr is None else stderr, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            before()
            try:
                console.run(lambda: main_of(script)(argv))
                code = 0
            except SystemExit as end:
                code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def said_by(script: str, argv: list[str], before=lambda: None) -> tuple[int, str]:
    """Exit code of a run and what it said on stderr."""
    reads, writes = os.pipe()
    pid = started(script, argv, before, writes)
    os.close(writes)
    with os.fdopen(reads) as stream:
        said = stream.read()
    return ended(pid), said


def nothing_corrupt(out: Path, written: str | None = None) -> None:
    """Whatever has its final name is what was written there; stale is allowed, for a new source may be there before what follows it.

    written: where a kill may have come between a new file and the record beside it; the record then tells, and a rerun mends it
    """
    wrong = [f for f in verify(out)[0] if f.state in ("altered", "missing")]
    own = {Path(written), Path(written.replace("hidden_states", "token_pairs")).with_suffix(".json")} if written else set()
    assert not [f for f in wrong if not own & {Path(f.about), *Path(f.about).parents}]


def kill_again_and_again(name: str, run: list[str], out: Path, kills: int, seed: int) -> None:
    """Kill a command at random moments of the time it takes, then let it finish; compare with what was there before."""
    script, argv, _ = COMMANDS[name]
    began = time.perf_counter()
    assert ended(started(script, [*run, *argv])) == 0
    seconds, wanted = time.perf_counter() - began, numbers(out, "")
    moments = random.Random(seed)
    for kill in range(kills):
        how = (signal.SIGKILL, signal.SIGTERM)[kill % 2]
        pid = started(script, [*run, *argv])
        time.sleep(moments.uniform(0, 1.05) * seconds)
        os.kill(pid, how)
        assert ended(pid) in (-how, 128 + how, 0)
        nothing_corrupt(out, COMMANDS[name][2])
        if how == signal.SIGTERM:  # it cleans up behind itself; what a SIGKILL has left is the next run's
            assert not [p for p in out.rglob("*.lock") if json.loads(p.read_text() or "{}").get("pid") == pid]
            assert not list(out.rglob(f".*.{pid}.tmp*"))
    assert ended(started(script, [*run, *[a for a in argv if a != "--no_resume"]])) == 0
    assert numbers(out, "") == wanted
    nothing_corrupt(out)
    assert not list(out.rglob("*.lock")) and not list((out / COMMANDS[name][2]).glob(".*"))


def test_a_few_kills(run, tmp_path):
    kill_again_and_again("training", run, tmp_path / "out", 4, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_many_kills(run, tmp_path, name):
    kill_again_and_again(name, run, tmp_path / "out", 30, 1)


def test_a_kill_between_an_adapter_and_its_meta_is_seen(run, tmp_path, finished):
    """Another adapter under the old meta would be reused as if it were the old one."""
    folder = tmp_path / "out" / "adapter"
    other = [*run, "--lr", "0.05"]
    pid = fork()
    if pid == 0:
        files.write_hashed_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # the last thing a training writes
        main_of("train_hidden_adapter")(other)
    assert ended(pid) == -signal.SIGKILL
    assert (folder / "adapter.pt").read_bytes() != (finished / "out" / "adapter" / "adapter.pt").read_bytes()
    with pytest.raises(UserError, match=r"adapter\.pt is not the file that .*meta\.json describes"):
        main_of("measure_feature_acceptance")(run)
    main_of("train_hidden_adapter")(run)
    assert numbers(tmp_path / "out", "") == numbers(finished / "out", "")


# ---- no room, no permission


def only(size: int):
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def untouched_but_unfinished(out: Path, before: dict[str, bytes]) -> bool:
    return tree(out) == before and not list(out.rglob("*.lock")) and not list(out.rglob(".*.tmp*"))


@pytest.mark.parametrize("name", some_slow("training", "comparison"))
def test_a_file_that_cannot_grow(run, tmp_path, name):
    """A limit on a file's size ends a write as a full disk does: in the middle."""
    script, argv, _ = COMMANDS[name]
    before = tree(tmp_path / "out")
    code, said = said_by(script, [*run, *argv], only(256))
    assert code == 2 and "Traceback" not in said and said.rpartition("error: ")[2].strip(), said
    assert untouched_but_unfinished(tmp_path / "out", before)
    assert ended(started(script, [*run, *argv])) == 0
    nothing_corrupt(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("size", [1, 2_000, 8_000, 40_000])
def test_a_file_that_can_grow_a_little(run, tmp_path, name, size):
    script, argv, _ = COMMANDS[name]
    code, said = said_by(script, [*run, *argv], only(size))
    assert code in (0, 2) and "Traceback" not in said
    nothing_corrupt(tmp_path / "out")
    assert ended(started(script, [*run, *argv])) == 0
    assert not [f for f in verify(tmp_path / "out")[0] if f.state in ("altered", "missing", "unfinished", "left over")]


def mounted(folder: Path, *options: str) -> None:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()[:80]}")


@pytest.mark.parametrize("name", some_slow("acceptance"))
def test_a_full_disk(run, tmp_path, name):
    script, argv, _ = COMMANDS[name]
    mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=8m", "tmpfs")
    try:
        out = tmp_path / "disk" / "out"
        shutil.copytree(tmp_path / "out", out)
        before, argv = tree(out), [*run[:-1], str(out), *argv]
        ballast = tmp_path / "disk" / "ballast"
        ballast.write_bytes(bytes(max(0, shutil.disk_usage(out).free - 4_000)))
        code, said = said_by(script, argv)
        assert code == 2 and ("No space left" in said or "bytes, its disk has" in said), said
        assert untouched_but_unfinished(out, before)
        ballast.unlink()
        assert ended(started(script, argv)) == 0
        nothing_corrupt(out)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


@pytest.mark.parametrize("name", [n for n in COMMANDS if n != "inference"])  # one file, replaced at once: it needs no lock
def test_a_folder_that_cannot_be_written(run, tmp_path, name):
    script, argv, _ = COMMANDS[name]
    mounted(tmp_path / "out", "--bind", str(tmp_path / "out"))
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(tmp_path / "out")], check=True)
        code, said = said_by(script, [*run, *argv])
        assert code == 2 and "Read-only file system" in said and "--output_dir" in said, said
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "out")], check=True)


@pytest.mark.parametrize("name", ["extraction", "comparison"])
def test_a_file_where_the_folder_should_be(run, tmp_path, name):
    script, argv, _ = COMMANDS[name]
    (tmp_path / "taken").write_text("mine")
    extra = ["--token_pairs", str(tmp_path / "out" / "token_pairs" / "test.json")] if name == "comparison" else []
    code, said = said_by(script, [*run[:-1], str(tmp_path / "taken"), *argv, *extra])
    assert code == 2 and "nothing can be written to" in said and (tmp_path / "taken").read_text() == "mine", said


# ---- two runs at once


def test_the_second_run_is_told_whose_the_first_is(run, tmp_path):
    with exclusive_lock(tmp_path / "out" / "adapter"):
        lock = json.loads((tmp_path / "out" / "adapter.lock").read_text())
        assert (lock["pid"], lock["host"]) == (os.getpid(), socket.gethostname())
        code, said = said_by("train_hidden_adapter", run)
        assert code == 2 and f"is being written by process {os.getpid()} on {socket.gethostname()}, since 20" in said
        assert "minutes)" in said and "--output_dir" in said
        assert ended(started("train_hidden_adapter", [*run, "--adapter", "chained", "--bottleneck", "16"])) == 0  # another folder
    assert not (tmp_path / "out" / "adapter.lock").exists()
    assert ended(started("train_hidden_adapter", run)) == 0


@pytest.mark.parametrize("name", some_slow("training"))
def test_two_at_once_are_one_after_all(run, tmp_path, name):
    script, argv, _ = COMMANDS[name]
    wanted = numbers(tmp_path / "out", "")
    pids = [started(script, [*run, *argv]) for _ in range(2)]
    codes = sorted(ended(pid) for pid in pids)
    assert codes in ([0, 0], [0, 2])  # the second may have come when the first was done
    nothing_corrupt(tmp_path / "out")
    if name != "benchmark":  # quicker here than what was there
        assert numbers(tmp_path / "out", "") == wanted


def test_a_lock_of_the_dead_is_taken_over(tmp_path, caplog):
    pid = fork()
    if pid == 0:
        with exclusive_lock(tmp_path / "adapter"):
            os.kill(os.getpid(), signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL and (tmp_path / "adapter.lock").is_file()
    (tmp_path / "adapter").mkdir()
    for leftover in (tmp_path / ".adapter.77.tmp", tmp_path / "adapter" / ".adapter.77.tmp.pt"):
        leftover.touch()
    with exclusive_lock(tmp_path / "adapter"):
        assert f"process {pid} on {socket.gethostname()}" in caplog.text and "which died; going on" in caplog.text
        assert json.loads((tmp_path / "adapter.lock").read_text())["pid"] == os.getpid()
    assert [p.name for p in tmp_path.rglob("*")] == ["adapter"]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": "x"}', '{"since": 1e400}'])
def test_a_lock_that_says_nothing(tmp_path, content):
    (tmp_path / "a.lock").write_text(content)
    if content.startswith('{"'):  # whose it is cannot be told, and it may be another machine's
        with pytest.raises(UserError, match=r"locked by another process\.(.|\n)*rm "), exclusive_lock(tmp_path / "a"):
            pass
    else:
        with exclusive_lock(tmp_path / "a"):
            pass


def test_a_lock_of_another_machine_is_left_alone(tmp_path):
    content = json.dumps({"pid": 7, "host": "elsewhere", "since": time.time() - 600})
    (tmp_path / "adapter.lock").write_text(content)
    with (
        pytest.raises(UserError, match=r"locked by process 7 on elsewhere, since .* \(10\.0 minutes\)(.|\n)*rm "),
        exclusive_lock(tmp_path / "adapter"),
    ):
        pass
    assert (tmp_path / "adapter.lock").read_text() == content


# ---- the same again


def test_the_same_training_gives_the_same_weights(run, finished, tmp_path):
    for argv in ([], ["--adapter", "chained", "--bottleneck", "16"]):
        main_of("train_hidden_adapter")([*run, *argv, "--no_resume"])
    main_of("measure_feature_acceptance")(run)
    assert numbers(tmp_path / "out", "") == numbers(finished / "out", "")
    main_of("train_hidden_adapter")([*run, "--seed", "1"])
    assert numbers(tmp_path / "out", "")["adapter/meta.json"] != numbers(finished / "out", "")["adapter/meta.json"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(finished, tmp_path):
    """Extraction, both trainings and acceptance, from nothing, in another folder."""
    run = ["--config", str(finished / "tiny.yaml"), "--output_dir", str(tmp_path)]
    for split in ("train", "validation", "test"):
        main_of("extract_hidden_states")([*run, "--split", split])
    for adapter in ("hidden", "plain"):
        main_of("train_hidden_adapter")([*run, "--adapter", adapter])
    for blind in ("false", "true"):
        main_of("train_hidden_adapter")([*run, "--adapter", "chained", "--bottleneck", "16", "--blind", blind])
    main_of("measure_feature_acceptance")(run)
    got, wanted = numbers(tmp_path, ""), numbers(finished / "out", "")
    assert len(got) > 20 and got == {name: wanted[name] for name in got}


def test_two_threads_give_nearly_the_same(finished, tmp_path):
    """Sums are taken in another order: states differ by less than 1e-4 of their size, and meta says how many threads there were."""
    run = ["--config", str(finished / "tiny.yaml"), "--output_dir", str(tmp_path), "--split", "test", "--threads", "2"]
    try:
        assert main_of("extract_hidden_states")(run)["machine"]["threads"] == 2
    finally:
        torch.set_num_threads(1)
    got, wanted = (load_hidden_states(out / "hidden_states" / "test") for out in (tmp_path, finished / "out"))
    assert wanted.meta["machine"]["threads"] == 1 and torch.equal(got.token_ids, wanted.token_ids)
    for a, b in ((got.draft, wanted.draft), (got.target, wanted.target)):
        assert float((a - b).abs().max()) <= 1e-4 * float(b.abs().max())


# ---- numbers that are none


@pytest.mark.parametrize("name", ["training", "chained training", "acceptance"])
def test_states_that_are_not_finite_name_their_sample(run, tmp_path, monkeypatch, name):
    """As if the files were too large to be compared with their hashes when they are loaded."""
    monkeypatch.setattr(hidden_states, "MAX_BYTES_CHECKED_ON_LOAD", 0)
    split = "test" if name == "acceptance" else "train"
    folder = tmp_path / "out" / "hidden_states" / split
    states = load_hidden_states(folder)
    from feature_alignment.storage.state_files import storage_offset

    path, row = folder / "vl_hidden_states.pt", 5
    at = storage_offset(path) + row * states.target[0].nbytes
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(torch.tensor([float("nan")]).numpy().tobytes())
    script, argv, _ = COMMANDS[name]
    before = tree(tmp_path / "out")
    with pytest.raises(UserError, match=f"sample {states.rows[row]['id']}: its states are not finite"):
        main_of(script)([*run, *argv])
    assert untouched_but_unfinished(tmp_path / "out", before)


def test_what_is_mended_or_cut_is_counted(finished, tmp_path, capsys):
    shutil.copytree(finished / "scenes", tmp_path / "scenes")
    from feature_alignment.inputs.event_files import save_events
    from feature_alignment.inputs.events import load_events

    path = tmp_path / "scenes" / "events" / "test-0000.npy"
    stream = load_events(path)
    save_events(path, {**stream, "p": stream["p"].astype(int) * 2 - 1, "t": stream["t"][::-1]})
    console._repairs.clear()
    run = ["--config", str(finished / "tiny.yaml"), "--output_dir", str(tmp_path / "out"), "--split", "test", "--max_positions", "3"]
    meta = main_of("extract_hidden_states")([*run, f'--manifests={{"test": "{tmp_path}/scenes/test.jsonl"}}'])
    rows = [json.loads(line) for line in (tmp_path / "out" / "hidden_states" / "test" / "samples.jsonl").read_text().splitlines()]
    limit = sum(r["vl_tokens"][-1] != 2 for r in rows)
    assert meta["repaired"] == {"sorted by time": 4, "polarity -1 read as 0": 4} and rows[0]["repaired"]
    assert meta["cut"]["Video-LLaVA's answer reached max_new_tokens"] == limit > 0
    assert meta["cut"]["states beyond max_positions not kept"] == sum(len(r["vl_tokens"]) > 3 for r in rows)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["repaired"] == meta["repaired"] and printed["cut"] == meta["cut"]


# ---- the command that looks through a run


def test_verify_as_a_command(run, tmp_path, capsys):
    verification.main([str(tmp_path / "out")])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["altered"] == summary["missing"] == summary["stale"] == 0
    assert summary["compared"]["rows"] > 50 and summary["compared"]["sources"] > 20
    with pytest.raises(UserError, match="no outputs at"):
        verification.main([str(tmp_path / "absent")])
    with pytest.raises(UserError, match="holds no results"):
        verification.main([str(tmp_path / "out" / "sd")])
    (tmp_path / "out" / "acceptance" / "per_position.csv").unlink()
    command = [sys.executable, "-m", "feature_alignment.storage.verification", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "acceptance/per_position.csv" in done.stdout and done.stderr.startswith("error: ")
    assert json.loads(done.stdout.splitlines()[-1])["missing"] == 1


def test_verify_follows_every_source(finished, tmp_path):
    """A clip, a checkpoint and a manifest that change under a run make it stale, by name."""
    for part in ("pair", "scenes"):
        shutil.copytree(finished / part, tmp_path / part)
    config = json.loads((finished / "tiny.yaml").read_text().replace(str(finished), str(tmp_path)))
    (tmp_path / "tiny.yaml").write_text(json.dumps(config))
    run = ["--config", str(tmp_path / "tiny.yaml"), "--split", "test"]
    main_of("extract_hidden_states")(run)
    main_of("feature_sd_inference")([*run, "--draft", "own", "--sample", "test-0000-q0"])
    out = tmp_path / "out"
    assert not [f for f in verify(out)[0] if f.state in WRONG]
    (tmp_path / "moved").mkdir()
    out.rename(tmp_path / "moved" / "elsewhere")
    out = tmp_path / "moved" / "elsewhere"
    assert not [f for f in verify(out)[0] if f.state in WRONG]
    for file, about in (
        ("scenes/video/test-0000.mp4", ["hidden_states/test", "sd/test-0000-q0.json"]),
        ("scenes/test.jsonl", ["hidden_states/test/meta.json"]),
        ("pair/eventgpt/config.json", ["hidden_states/test/meta.json", "sd/test-0000-q0.json"]),
    ):
        kept = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(kept + b"\n")
        found = {f.about: f.why for f in verify(out)[0] if f.state == "stale"}
        assert set(about) <= set(found) and all(Path(file).parent.name in found[a] for a in about)
        (tmp_path / file).write_bytes(kept)


# ---- an output that cannot be written is found before decoding; full disks are named; Ctrl-C


def not_reached(*_, **__):
    raise AssertionError("models were loaded")


@pytest.mark.parametrize("taken", ["out", "out/sd", "out/sd/mine--e.json/", "/proc/nowhere"])
def test_inference_refuses_an_unwritable_output_before_loading(run, tmp_path, monkeypatch, taken):
    from feature_alignment.inputs import samples
    from feature_alignment.models import pair

    monkeypatch.setattr(pair, "load_pair", not_reached)
    sample = samples.Sample("mine--e", "s", "What?", tmp_path / "e.npy", tmp_path / "v.mp4")
    monkeypatch.setattr(samples, "read_samples", lambda *_, **__: [sample])
    out = Path(taken) if taken.startswith("/") else tmp_path / "new" / "out"
    if taken.endswith("/"):
        (tmp_path / "new" / taken).mkdir(parents=True)
    elif not taken.startswith("/"):
        (tmp_path / "new" / taken).parent.mkdir(parents=True)
        (tmp_path / "new" / taken).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"nothing can be written to|is a folder"):
        main_of("feature_sd_inference")([*run[:-1], str(out)])
    assert tree(tmp_path) == before


def test_extraction_refuses_a_file_in_place_of_token_pairs_before_loading(run, tmp_path, monkeypatch):
    from feature_alignment.models import pair

    monkeypatch.setattr(pair, "load_pair", not_reached)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "token_pairs").write_text("mine")
    with pytest.raises(UserError, match="nothing can be written to"):
        main_of("extract_hidden_states")([*run[:-1], str(tmp_path / "new"), "--split", "test"])
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["token_pairs"]


def test_the_room_check_counts_the_files_of_the_head(run, tmp_path, monkeypatch):
    """No rows are missing in the room that is left for them, but the head and the embeddings would not fit."""
    from feature_alignment.storage import hidden_states_writer

    asked = []
    monkeypatch.setattr(hidden_states_writer, "check_disk_space", lambda _, needed: asked.append(needed))
    argv = [*run[:-1], str(tmp_path / "new"), "--split", "test", "--limit", "1"]
    main_of("extract_hidden_states")(argv)
    folder = tmp_path / "new" / "hidden_states"
    head, embeddings = (torch.load(folder / f"vl_{name}.pt", weights_only=True, mmap=True) for name in ("lm_head", "embeddings"))
    rows = [torch.load(p, weights_only=True, mmap=True) for p in (folder / "test").glob("*.pt") if p.name != "positions.pt"]
    assert asked == [head.nbytes + embeddings.nbytes + sum(states.nbytes for states in rows)]


def test_too_little_room_names_the_disk(tmp_path, monkeypatch):
    from feature_alignment.storage.hidden_states_writer import check_disk_space

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    check_disk_space(tmp_path / "a" / "b", 10)
    with pytest.raises(UserError, match=r"b may need 11 bytes, its disk has 10 free \(mounted at /"):
        check_disk_space(tmp_path / "a" / "b", 11)


def test_a_write_to_a_full_disk_names_file_and_disk(tmp_path, capsys):
    """/dev/full takes no byte, as a full disk does."""

    def main():
        with atomic_write(tmp_path / "report.json") as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_text("x")

    with pytest.raises(SystemExit) as end:
        console.run(main)
    said = capsys.readouterr().err
    assert end.value.code == 2 and f"{tmp_path / 'report.json'}: No space left on device" in said
    assert "mounted at /" in said and "bytes free" in said and not list(tmp_path.iterdir())


def test_a_states_file_that_cannot_grow_is_named(tmp_path):
    from feature_alignment.storage.hidden_states_writer import HiddenStatesWriter, begin_run

    begin_run(tmp_path / "train", RunIdentity({}, {}, {}), "plan", True)
    writer = HiddenStatesWriter(tmp_path / "train", 2, {"vl_hidden_states.pt": (3, 4)}, torch.float32)
    usual, name = writer._files["vl_hidden_states.pt"], "vl_hidden_states.pt"
    writer._files[name] = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match=r"No space left.*train\.unfinished/vl_hidden_states\.pt"):
        writer.write(0, {name: torch.zeros(2, 4)}, [5, 6], {"id": "a"})
    os.close(writer._files[name])
    writer._files[name] = usual
    writer.close()


def test_a_full_disk_behind_standard_output_is_one_message():
    command = [sys.executable, "feature_alignment/train_hidden_adapter.py", "--print_config"]
    code = "from feature_alignment.cli.console import run; run(lambda: print('x'))"
    for argv in ([sys.executable, "-c", code], command):
        with open("/dev/full", "w") as full:
            done = subprocess.run(argv, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 2 and "standard output: No space left" in done.stderr and "Traceback" not in done.stderr, done


def heed_interrupts() -> None:
    """A shell's background job, which a test run may be, is started with interrupts ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


MODULES = ("models.pair", "storage.verification", "demo.scenes", "demo.build_pair", "inputs.simulate")


@pytest.mark.parametrize("script", [*SCRIPTS, *MODULES])
def test_ctrl_c_while_libraries_are_imported_ends_without_a_traceback(script, tmp_path):
    """The interrupt comes with the first import of numpy or torch, whoever imports them."""
    name = f"feature_alignment.{script}"
    way = f"runpy.run_module({name!r}, run_name='__main__')"
    if script in SCRIPTS:
        way = f"runpy.run_path('feature_alignment/{script}.py', run_name='__main__')"
    probe = (
        "import builtins, os, runpy, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'numpy'):\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        f"sys.argv = ['x', *sys.argv[1:]]\n{way}\n"
    )
    device = ["--device", "cuda"] if script in SCRIPTS else []  # a device other than cpu asks torch at once
    command = [sys.executable, "-c", probe, *device]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=heed_interrupts, timeout=120)
    assert done.returncode == 130 and not done.stderr, done


def test_an_interrupt_that_a_library_turns_into_its_own_error_still_ends_with_130():
    code = (
        "import os, signal\nfrom feature_alignment.cli.console import run\ndef main():\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n        raise ImportError('initialisation failed') from None\nrun(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=heed_interrupts)
    assert done.returncode == 130 and not done.stderr


# ---- commands without a config file


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        *(("demo.scenes", ["--clips", n]) for n in ("0", "-1", "x", "nan", "1e3", "9" * 30)),
        *(("demo.scenes", ["--out", p]) for p in ("", "a\0b", "x" * 300, "FILE", "/proc/nowhere")),
        *(("demo.build_pair", [flag, n]) for flag in ("--num_scenes", "--base_steps") for n in ("0", "-5", "nan")),
        *(("demo.build_pair", [flag, p]) for flag in ("--out", "--work") for p in ("", "a\0b", "FILE", "/proc/nowhere")),
        *(("inputs.simulate", ["v.mp4", "e.npy", "--contrast", n]) for n in ("0", "-1", "nan", "inf", "1e-40")),
        *(("inputs.simulate", ["v.mp4", "e.npy", "--duration_ms", n]) for n in ("0", "-1", "nan", "inf")),
        *(("inputs.simulate", ["v.mp4", p]) for p in ("", "a\0.npy", "FILE/e.npy", "/proc/nowhere/e.npy")),
        *(("storage.verification", [p]) for p in ("", "a\0b", "x" * 300, "absent", "FILE")),
    ],
)
def test_commands_refuse_hostile_arguments_and_write_nothing(module, argv, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", *[a.replace("FILE", "file/below" if a == "FILE" else "file") for a in argv]])
    with pytest.raises((SystemExit, UserError, OSError)) as end:
        main_of(module)()
    assert not isinstance(end.value, SystemExit) or end.value.code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_head_that_a_device_map_put_elsewhere_stays_there():
    """Its hooks bring its input to where it was put; moved away, transformers' own generate would mix devices."""
    from conftest import tiny_llama

    from feature_alignment.models.decoder import Decoder

    model = tiny_llama(0)
    before = model.lm_head.weight
    decoder = Decoder(model.model, model.lm_head, None, None, None, None, None, device="meta", full_model=model)
    assert model.lm_head.weight is before and before.device.type == "cpu"
    assert decoder.device.type == "meta" and decoder.head_weight.device.type == "meta"
