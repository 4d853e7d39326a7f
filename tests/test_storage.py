"""Files at their limits: pickles that are just small enough, locks and the folders made for them, hashes that cover every byte."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import pickletools
import shutil
import signal
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from feature_alignment.cli.console import UserError
from feature_alignment.storage import hidden_states, pickles, state_files
from feature_alignment.storage.files import (
    altered_files,
    atomic_write,
    config_hash,
    content_hash,
    file_hash,
    load_pt,
    load_trained,
    read_hashed_json,
    read_json,
    save_pt,
    trained_layers,
    weights_hash,
    write_hashed_json,
    write_json,
    write_text,
)
from feature_alignment.storage.identity import source_hash
from feature_alignment.storage.pickles import ArraysOnly, check_pickle, check_pt
from feature_alignment.storage.processes import (
    _name,
    check_device,
    check_writable,
    children_ignore_interrupts,
    exclusive_lock,
    process_group,
    temporary_name,
)
from feature_alignment.storage.verification import main, verify

# ---- pickles


def test_a_pickle_may_hold_ten_thousand_tuples_and_no_more():
    of = lambda number: pickle.dumps([(i,) for i in range(number)], 2)  # noqa: E731
    check_pickle(of(10_000))
    with pytest.raises(pickle.UnpicklingError, match="more than 10,000 steps"):
        check_pickle(of(10_001))
    with pytest.raises(pickle.UnpicklingError, match="more than 10,000 steps"):
        check_pickle(pickle.dumps([frozenset([i]) for i in range(10_001)], 4))


def test_a_pickle_may_take_so_many_steps_and_no_more(monkeypatch):
    data = pickle.dumps(list(range(50)), 2)
    steps = sum(1 for _ in pickletools.genops(data))
    monkeypatch.setattr(pickles, "MAX_OPCODES", steps - 1)
    check_pickle(data)
    monkeypatch.setattr(pickles, "MAX_OPCODES", steps - 2)
    with pytest.raises(pickle.UnpicklingError, match=f"more than {steps - 1} steps"):
        check_pickle(data)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_is_refused_for_a_name_it_may_not_ask_for(protocol):
    data = pickle.dumps(os.system, protocol)
    check_pickle(data)  # any name
    with pytest.raises(pickle.UnpicklingError, match="it asks for"):
        check_pickle(data, {"builtins print"})
    if protocol < 4:  # later ones build the name from what lies on the stack: none of those is let through
        check_pickle(data, {f"{os.system.__module__} system"})


def torch_file(path, change=None, compression=zipfile.ZIP_STORED, more=()):
    """A `.pt` of one tensor, written again member by member."""
    torch.save({"a": torch.arange(3000)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in [*members.items(), *more]:
            archive.writestr(name, data)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_torch_file_holds_one_program_once_and_unpacked(tmp_path, monkeypatch):
    good = torch_file(tmp_path / "good.pt")
    check_pt(good)
    for more in ([("good/other.pkl", b"N.")], [("good/data/0", b"twice")]):
        with pytest.raises(pickle.UnpicklingError, match=r"wanted one data\.pkl"):
            check_pt(torch_file(tmp_path / "good.pt", more=more))
    with pytest.raises(pickle.UnpicklingError, match="compressed"):
        check_pt(torch_file(tmp_path / "good.pt", compression=zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(torch_file(good)) as archive:
        size = next(m.file_size for m in archive.infolist() if m.filename.endswith("data.pkl"))
    monkeypatch.setattr(pickles, "MAX_PT_PICKLE", size)
    check_pt(good)
    monkeypatch.setattr(pickles, "MAX_PT_PICKLE", size - 1)
    with pytest.raises(pickle.UnpicklingError, match="compressed, or larger"):
        check_pt(good)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_survive_the_reader_that_calls_nothing(protocol, order):
    there = {
        "a": np.asarray(np.arange(12, dtype=">i4").reshape(3, 4), order=order),
        "b": np.array([True, False]),
        "one": np.float64(2.5),
        "words": "\xe4 is one byte",
    }
    back = ArraysOnly(io.BytesIO(pickle.dumps(there, protocol))).load()
    for name in ("a", "b", "one"):
        np.testing.assert_array_equal(back[name], there[name])
        assert back[name].dtype == pickle.loads(pickle.dumps(there[name], protocol)).dtype and type(back["one"]) is np.float64
    assert np.dtype("i4").byteorder == "=" and back["words"] == there["words"]


def test_limits_of_pickles_and_of_what_is_compared_at_once():
    """Figures of the design: an adapter has a hundred tuples, a `.pt`'s pickle holds names alone, a gigabyte is hashed in a second."""
    assert (pickles.MAX_TUPLES, pickles.MAX_OPCODES, pickles.MAX_PT_PICKLE) == (10_000, 5_000_000, 64 << 20)
    assert hidden_states.MAX_BYTES_CHECKED_ON_LOAD == 1 << 30


@pytest.mark.parametrize(("fields", "size", "fits"), [(1, 1, True), (16, 16, True), (17, 17, False), (2, 999, True), (2, 1000, False)])
def test_a_record_has_at_most_sixteen_fields_and_999_bytes(fields, size, fits):
    names = [f"f{i}" for i in range(fields)]
    dtype = np.dtype({"names": names, "formats": ["u1"] * fields, "offsets": list(range(fields)), "itemsize": size})
    there = np.zeros(3, dtype)
    there["f0"] = [5, 6, 7]
    if not fits:
        with pytest.raises(pickle.UnpicklingError, match=r"no plain list of fields|asks for"):
            ArraysOnly(io.BytesIO(pickle.dumps(there, 2))).load()
        return
    back = ArraysOnly(io.BytesIO(pickle.dumps(there, 2))).load()
    assert back["f0"].tolist() == [5, 6, 7] and back.dtype == dtype
    for offsets in ([0, 0], [1, 1]):
        overlapping = np.zeros(3, np.dtype({"names": ["a", "b"], "formats": ["u2", "u2"], "offsets": offsets, "itemsize": 8}))
        with pytest.raises(pickle.UnpicklingError, match="no numbers, or overlap"):
            ArraysOnly(io.BytesIO(pickle.dumps(overlapping, 2))).load()


def fields(*types, names=None, offsets=None, size=8, subarray=None):
    """The state of a pickled dtype with fields a, b, …"""
    names = tuple("abc"[: len(types)]) if names is None else names
    offsets = range(0, 2 * len(types), 2) if offsets is None else offsets
    made = {name: (np.dtype(t), o) for name, t, o in zip("abc", types, offsets, strict=False)}
    return 3, "|", subarray, names, made, size, 1, 0


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (fields("u2", "u2"), None),
        (fields("u2", "u2", offsets=(2, 0)), None),
        (fields("u2", "u2", offsets=(0, 6)), None),
        (fields("u2", "u2", offsets=(0, 7)), "overlap"),
        (fields("u2", "u2", offsets=(1, 0)), "overlap"),
        (fields("u2", "O"), "no numbers"),
        (fields("u2", ("u1", (2,))), "no numbers"),
        (fields("u2", "u2", offsets=(0, 2.0)), "no numbers"),
        (fields("u2", "u2", offsets=(0, True)), "no numbers"),
        (fields("u2", "u2", names=["a", "b"]), "no plain list"),
        (fields("u2", "u2", names=()), "no plain list"),
        (fields("u2", "u2", subarray=("u2", (2,))), "no plain list"),
        (fields("u1", offsets=(0,), size=0), "no plain list"),
    ],
)
def test_fields_of_a_record_are_numbers_that_do_not_overlap(state, said):
    record = pickles._dtype("V8")
    if said is None:
        record.__setstate__(state)
        assert record.dtype.itemsize == 8 and record.dtype.names == ("a", "b")
        assert [record.dtype.fields[name] for name in "ab"] == [state[4][name] for name in "ab"]
    else:
        with pytest.raises(pickle.UnpicklingError, match=said):
            record.__setstate__(state)
        with pytest.raises(pickle.UnpicklingError, match="an array of no type"):
            pickles._checked(record)


@pytest.mark.parametrize("code", ["M8", "U8", "S8", "V1000", "i", b"i4", ["i4"], "i4,i4", "<i123", "O9", "c16"])
def test_a_pickle_may_ask_for_types_of_numbers_alone(code):
    if code == "i":
        assert pickles._dtype(code) == np.dtype("i4")
        return
    with pytest.raises(pickle.UnpicklingError, match=r"asks for numpy\.dtype"):
        pickles._dtype(code)
    assert [pickles._dtype(c) for c in ("<f8", "?", "O8", ">u2")] == [np.dtype(c) for c in ("<f8", "?", "O", ">u2")]


def test_text_is_encoded_by_one_byte_a_letter_and_no_other_way():
    assert pickles._encode("\xe4") == pickles._encode("\xe4", "latin-1") == pickles._encode("\xe4", "latin1") == b"\xe4"
    for encoding in ("utf-8", "utf-16", "latin"):
        with pytest.raises(pickle.UnpicklingError, match=f"asks for the encoding '{encoding}'"):
            pickles._encode("a", encoding)


def test_a_torch_file_has_a_program_of_the_usual_name(tmp_path):
    path = torch_file(tmp_path / "a.pt")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name, said in (("a/other.pkl", "it holds a/other.pkl; wanted one"), ("a/data.txt", "it holds no data.pkl; wanted one")):
        with zipfile.ZipFile(path, "w") as archive:
            for old, data in members.items():
                archive.writestr(name if old.endswith("data.pkl") else old, data)
        with pytest.raises(pickle.UnpicklingError, match=said):
            check_pt(path)


# ---- locks


def test_a_refused_run_leaves_no_empty_folder_and_takes_none_away(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    with pytest.raises(UserError, match="no"), exclusive_lock(old / "new" / "deep" / "adapter"):
        raise UserError("no")
    assert old.is_dir() and list(old.iterdir()) == []
    with exclusive_lock(old / "new" / "deep" / "adapter"):
        (old / "new" / "deep" / "adapter").mkdir()
    assert [str(p.relative_to(old)) for p in sorted(old.rglob("*"))] == ["new", "new/deep", "new/deep/adapter"]
    with exclusive_lock(old / "new" / "deep" / "other"):
        assert (old / "new" / "deep" / "other.lock").is_file()
    assert not (old / "new" / "deep" / "other.lock").exists()


def test_a_lock_whose_folders_were_removed_meanwhile_is_let_go_of(tmp_path):
    with exclusive_lock(tmp_path / "new" / "deep" / "adapter"):
        shutil.rmtree(tmp_path / "new")
    assert not any(tmp_path.iterdir())


def test_a_lock_is_let_go_of_with_its_file(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with exclusive_lock(tmp_path / "adapter"):
            assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(UserError, match="no") as own, exclusive_lock(tmp_path / "adapter"):
        raise UserError("no")
    (tmp_path / "adapter.lock").write_text(json.dumps({"pid": 1, "host": "another", "since": 1.0}))
    with pytest.raises(UserError, match="is locked by process 1 on another") as foreign, exclusive_lock(tmp_path / "adapter"):
        pass
    assert len(os.listdir("/proc/self/fd")) == before and own.tb and foreign.tb  # though their tracebacks still hold the locks


def test_what_a_killed_owner_left_half_written_is_removed(tmp_path):
    path = tmp_path / "adapter.pt"
    for name in (".adapter.123.tmp.pt", ".other.123.tmp.pt", ".adapter.123.tmp.json"):
        (tmp_path / name).touch()
    with exclusive_lock(path):
        assert sorted(p.name for p in tmp_path.iterdir()) == [".adapter.123.tmp.json", ".other.123.tmp.pt", "adapter.pt.lock"]
    (tmp_path / "split").mkdir()
    for name in (".meta.5.tmp.json", "meta.json"):
        (tmp_path / "split" / name).touch()
    with exclusive_lock(tmp_path / "split"):
        assert [p.name for p in (tmp_path / "split").iterdir()] == ["meta.json"]


def test_a_temporary_file_is_hidden_and_has_its_process_in_its_name(tmp_path):
    assert temporary_name(tmp_path / "adapter.pt").name == f".adapter.{os.getpid()}.tmp.pt"


@pytest.mark.parametrize("since", [0, -5, "noon", None, 1e11, float("nan")])
def test_an_owner_with_a_senseless_time_is_another_process(since):
    assert _name({"pid": 7, "host": "h", "since": since}) == "another process"
    assert _name(None) == _name({}) == "another process"
    assert _name({"pid": 7, "host": "h", "since": 1.0}).startswith("process 7 on h, since 19")


def test_a_process_alone_is_the_first_of_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    rank, number, device, wait = process_group("cpu")
    assert (rank, number, device, wait()) == (0, 1, "cpu", None)


def test_a_process_of_several_learns_its_place_from_accelerate(monkeypatch):
    import accelerate

    asked = []

    def state(**given):
        asked.append(given)
        return SimpleNamespace(process_index=1, num_processes=3, device="cuda:1", wait_for_everyone=lambda: "all are here")

    monkeypatch.setattr(accelerate, "PartialState", state)
    monkeypatch.setattr("feature_alignment.storage.processes.check_device", lambda device: None)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for device, own in (("cpu", "cpu"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0")):
        rank, number, found, wait = process_group(device)
        assert (rank, number, found, wait()) == (1, 3, own, "all are here")
    assert [a["cpu"] for a in asked] == [True, False, False] and all(a["timeout"].days == 7 for a in asked)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert process_group("cuda")[:3] == (0, 1, "cuda") and len(asked) == 3


def test_a_device_is_the_processor_or_a_gpu_of_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cpu")
    for device in ("cuda", "cuda:0"):
        with pytest.raises(UserError, match=r"sees no GPU"):
            check_device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("cuda", "cuda:0", "cuda:1"):
        check_device(device)
    for device in ("cuda:2", "cuda:10"):
        with pytest.raises(UserError, match=r"this machine has 2 GPU\(s\), cuda:0 to cuda:1"):
            check_device(device)


def test_children_ignore_an_interrupt_that_the_parent_hears():
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell is started with interrupts ignored
    try:
        with pytest.raises(ArithmeticError), children_ignore_interrupts():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            raise ArithmeticError
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, outside)


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path):
    check_writable(tmp_path / "new" / "deep" / "a.json")
    (tmp_path / "a.json").write_text("old")
    check_writable(tmp_path / "a.json")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "old")]
    with pytest.raises(UserError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(UserError, match=r"nothing can be written to .*a.json"):
        check_writable(tmp_path / "a.json" / "b")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nothing can be written"):
        check_writable(tmp_path / "link" / "b")


def test_a_lock_of_the_dead_is_written_anew_from_its_first_byte(tmp_path):
    (tmp_path / "adapter.lock").write_text(json.dumps({"pid": 1, "host": os.uname().nodename, "since": 1.0, "more": "x" * 500}))
    with exclusive_lock(tmp_path / "adapter"):
        owner = json.loads((tmp_path / "adapter.lock").read_text())
        assert owner["pid"] == os.getpid() and abs(owner["since"] - time.time()) < 60 and set(owner) == {"pid", "host", "since"}
        with (
            pytest.raises(UserError, match=rf"is being written by process {os.getpid()} on .*\(0\.0 minutes\)"),
            exclusive_lock(tmp_path / "adapter"),
        ):
            pass
    assert "(2.0 minutes)" in _name(owner | {"since": time.time() - 120})


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_disk_too_full_for_a_name_leaves_no_lock(tmp_path, monkeypatch, is_gone):
    def full(path, *_):
        if is_gone:  # another process has removed the file meanwhile
            path.unlink()
        raise OSError(errno.ENOSPC, "No space left on device")

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(UserError, match=r"nothing can be written to .*No space left") as found, exclusive_lock(tmp_path / "adapter"):
            pass
    assert not any(tmp_path.iterdir()) and len(os.listdir("/proc/self/fd")) == before and found.tb
    with exclusive_lock(tmp_path / "adapter"):  # the lock was let go of
        assert (tmp_path / "adapter.lock").is_file()


# ---- files of hidden states


def test_every_byte_of_a_state_file_is_under_a_hash(tmp_path, monkeypatch):
    path, tensor = tmp_path / "states.pt", torch.randn(3, 4, 5)
    torch.save(tensor, path)
    data, row_bytes = path.read_bytes(), 4 * 5 * 4
    begin = state_files.storage_offset(path)
    assert data[begin : begin + 3 * row_bytes] == tensor.numpy().tobytes()
    rows = [tensor[i].numpy().tobytes() for i in range(3)]
    assert list(state_files.row_hashes(path, 3, row_bytes)) == [hashlib.sha256(row).hexdigest()[:16] for row in rows]
    assert state_files.row_hash(rows[0][:33], row_bytes) == hashlib.sha256(rows[0][:33] + bytes(row_bytes - 33)).hexdigest()[:16]
    frame = hashlib.sha256(data[:begin] + data[begin + 3 * row_bytes :]).hexdigest()[:16]
    assert state_files.frame_hash(path, 3 * row_bytes) == frame
    for block in (1, 7):
        monkeypatch.setattr(state_files, "_BLOCK", block)
        assert state_files.frame_hash(path, 3 * row_bytes) == frame
    path.write_bytes(data[: begin + 2 * row_bytes + 9])  # a file cut off in its last row is damaged, not shorter
    with pytest.raises(UserError, match="--no_resume"):
        state_files.storage_offset(path)


def test_a_row_cut_off_counts_as_zeros(tmp_path, monkeypatch):
    (tmp_path / "rows").write_bytes(b"abcdefgh")
    monkeypatch.setattr(state_files, "storage_offset", lambda path: 2)
    found = list(state_files.row_hashes(tmp_path / "rows", 3, 4))
    assert found == [hashlib.sha256(row).hexdigest()[:16] for row in (b"cdef", b"gh\0\0", bytes(4))]


# ---- files and their hashes


def short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def test_a_hash_is_of_a_files_bytes_or_of_a_folders_names_and_files(tmp_path):
    big = os.urandom((1 << 22) + 5)
    (tmp_path / "b.bin").write_bytes(big)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "README.md").write_text("for people")
    (tmp_path / "deeper").mkdir()
    assert file_hash(tmp_path / "b.bin") == short(big)
    assert file_hash(tmp_path) == short(f"a.txt:{short(b'a')}\nb.bin:{short(big)}\n".encode())
    several = [tmp_path / "b.bin", tmp_path / "a.txt"]
    assert source_hash(several) != source_hash(several[::-1]) and source_hash(tmp_path) == file_hash(tmp_path)


def test_a_sealed_file_tells_what_was_altered(tmp_path):
    path, beside = tmp_path / "meta.json", tmp_path / "states.pt"
    beside.write_text("states")
    write_hashed_json(path, {"value": float("nan"), "n": 1}, ["states.pt"])
    content = read_hashed_json(path, "make it")
    assert content == {"value": None, "n": 1, "files": {"states.pt": short(b"states")}, "content_hash": content["content_hash"]}
    assert content["content_hash"] == content_hash(content) == content_hash({**content, "content_hash": "other"})
    assert altered_files(path, content) == altered_files(path, content, []) == []
    assert altered_files(path, content, ["states.pt", "nobody.pt"]) == ["nobody.pt"]
    beside.write_text("others")
    assert altered_files(path, content) == ["states.pt"]
    beside.unlink()
    assert altered_files(path, content) == ["states.pt"]
    write_json(path, {**content, "n": 2})
    with pytest.raises(UserError, match=r"(?s)altered after it was written.*make it"):
        read_hashed_json(path, "make it")
    for unsealed in ({"n": 1}, [1], ["content_hash"], 5):
        write_json(path, unsealed)
        assert read_json(path, "make it") == unsealed
        with pytest.raises(UserError, match=r"(?s)records no hash of itself.*make it"):
            read_hashed_json(path, "make it")
    path.write_text("{")
    for read in (read_json, read_hashed_json):
        with pytest.raises(UserError, match="not valid JSON"):
            read(path, "make it")
        with pytest.raises(UserError, match=r"does not exist\. Make it first:\n  make it"):
            read(tmp_path / "absent.json", "make it")


def test_a_file_gets_its_name_when_its_bytes_are_on_the_disk(tmp_path, monkeypatch):
    path, done = tmp_path / "new" / "deep" / "a.txt", []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append("sync"), sync(number))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b))[1])
    write_text(path, "one")
    assert done == ["sync", "replace"] and path.read_text() == "one" and list(path.parent.iterdir()) == [path]
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("two")
        raise RuntimeError
    assert path.read_text() == "one" and list(path.parent.iterdir()) == [path]


def test_equal_weights_have_equal_hashes():
    one = {"a": torch.ones(2, 3), "b": torch.tensor(2.0, dtype=torch.bfloat16)}
    assert weights_hash(one) == weights_hash({k: v.clone() for k, v in one.items()})
    others = (
        {**one, "a": torch.ones(2, 3) * 2},
        {"c": one["a"], "b": one["b"]},
        {"a": one["a"]},
        {**one, "b": torch.tensor(3.0).bfloat16()},
    )
    assert len({weights_hash(o) for o in (one, *others)}) == 5
    transposed = torch.arange(6.0).view(2, 3).T
    assert weights_hash({"a": transposed}) == weights_hash({"a": transposed.contiguous()})


def test_a_tensor_that_shows_more_than_its_file_holds_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    for good in (torch.ones(3, 4), {"a": {"b": torch.ones(2)}, "n": 1}):
        save_pt(path, good)
        assert str(load_pt(path, "make it")) == str(good)
    for bad in (torch.ones(1).expand(1000), {"a": {"b": torch.ones(1).expand(1000)}}, torch.ones(3, 4).T):
        save_pt(path, bad)
        with pytest.raises(UserError, match=r"(?s)shows more than the file holds.*make it"):
            load_pt(path, "make it")


@pytest.mark.parametrize(("error", "said"), [("\n" + "x" * 200 + "\nmore", "x" * 160), ("", "RuntimeError")])
def test_an_error_of_torch_is_quoted_by_its_first_line(tmp_path, monkeypatch, error, said):
    def broken(*_, **__):
        raise RuntimeError(error)

    save_pt(tmp_path / "a.pt", torch.ones(2))
    monkeypatch.setattr(torch, "load", broken)
    with pytest.raises(UserError, match=rf"could not be read \({said}\)\. Make it again:\n  make it"):
        load_pt(tmp_path / "a.pt", "make it")


def test_a_trained_module_is_its_weights_in_eval_mode_and_its_meta(tmp_path):
    build = lambda width: torch.nn.Linear(width, 2)  # noqa: E731
    path, module = tmp_path / "adapter.pt", torch.nn.Linear(3, 2)
    good = {"meta": {"geometry": {"width": 3}, "n": 1}, "state_dict": module.state_dict()}
    load = lambda: load_trained(path, "an adapter", build, "width", "train it")  # noqa: E731
    save_pt(path, good)
    found, meta = load()
    assert torch.equal(found.weight, module.weight) and not found.training and meta == good["meta"]
    write_hashed_json(tmp_path / "meta.json", {"n": 1}, ["adapter.pt"])
    assert load()[1] == meta
    no_adapter = r"(?s)is not an adapter \(wanted meta with its geometry, and state_dict\).*train it"
    for geometry in (None, [3], {"height": 3}):
        save_pt(path, good | {"meta": {"geometry": geometry}})
        with pytest.raises(UserError, match=no_adapter):
            load()
    for other in ([1], {"meta": [1], "state_dict": {}}, good | {"state_dict": [1]}, {"meta": good["meta"]}):
        save_pt(path, other)
        with pytest.raises(UserError, match=no_adapter):
            load()
    save_pt(path, good | {"more": 1})
    with pytest.raises(UserError, match=r"(?s)is not the file that .*meta\.json describes.*train it"):
        load()
    (tmp_path / "meta.json").unlink()
    bad, more = {"weight": torch.ones(2, 4), "bias": torch.ones(2)}, {"weight": torch.ones(2, 3), "bias": torch.tensor([0, torch.inf])}
    for state, said in ((bad, "do not fit its geometry"), ({"weight": torch.ones(2, 3)}, "do not fit"), (more, "not finite")):
        save_pt(path, good | {"state_dict": state})
        with pytest.raises(UserError, match=f"(?s)is damaged: .*{said}.*train it"):
            load()


def test_hashes_are_of_the_content_whatever_its_order():
    assert config_hash({"b": 1, "a": [2]}) == config_hash({"a": [2], "b": 1}) == short(b'{"a": [2], "b": 1}')
    assert weights_hash({"ab": torch.tensor([1, 2], dtype=torch.uint8)}) == short(b"ab\x01\x02")


def test_a_torch_file_is_mapped_not_read(tmp_path):
    save_pt(tmp_path / "a.pt", torch.ones(1000))
    tensor = load_pt(tmp_path / "a.pt", "make it")
    with open("/proc/self/maps") as maps:
        assert str(tmp_path / "a.pt") in maps.read() and tensor.sum() == 1000


@pytest.mark.parametrize("layers", [None, [], (1, 2), ["1"], [1, True], [1, 2.0], 3])
def test_an_adapter_says_which_layers_it_reads(tmp_path, layers):
    assert trained_layers(tmp_path, {"draft_layers": [1, 3]}, "train it") == [1, 3]
    with pytest.raises(UserError, match=r"(?s)does not record which of EventGPT's layers it reads.*train it"):
        trained_layers(tmp_path, {} if layers is None else {"draft_layers": layers}, "train it")


# ---- a whole run looked through


def a_run(out, clip):
    """Training states made from a clip, an adapter made from these, a benchmark made from the adapter, and a comparison beside them."""
    clip.write_text("events")
    for folder, source in (("adapter", ("states", out.parent / "states.pt")), ("benchmark", ("adapter", out / "adapter" / "meta.json"))):
        (out / folder).mkdir(parents=True)
        (out.parent / "states.pt").touch()
        (out / folder / "beside.txt").write_text(folder)
        name = "meta.json" if folder == "adapter" else "benchmark.json"
        meta = {"made_from": {source[0]: source_hash(source[1])}, "inputs": {source[0]: str(source[1])}}
        write_hashed_json(out / folder / name, {"meta": meta}, ["beside.txt"])
    (out / "token_baseline").mkdir()
    meta = {"made_from": {"clips": source_hash([clip])}, "inputs": {"clips": [str(clip)]}}
    write_hashed_json(out / "token_baseline" / "comparison.json", {"meta": meta})


def found_in(out):
    return {(f.about, f.state): f.why for f in verify(out)[0]}


def test_what_was_made_from_something_altered_is_stale_and_nothing_else(tmp_path):
    out, clip = tmp_path / "out", tmp_path / "clip.npy"
    a_run(out, clip)
    assert verify(out) == ([], {"files": 5, "rows": 0, "sources": 3})
    (out / "adapter" / "beside.txt").write_text("other")
    found = found_in(out)
    assert set(found) == {("adapter/beside.txt", "altered"), ("benchmark/benchmark.json", "stale")}
    assert found["benchmark/benchmark.json", "stale"] == "made from adapter, which is not what it was"
    (out / "adapter" / "beside.txt").unlink()
    assert set(found_in(out)) == {("adapter/beside.txt", "missing"), ("benchmark/benchmark.json", "stale")}
    (out / "adapter" / "beside.txt").write_text("adapter")
    (tmp_path / "states.pt").write_text("others")
    assert set(found_in(out)) == {("adapter/meta.json", "stale"), ("benchmark/benchmark.json", "stale")}
    (tmp_path / "states.pt").unlink()
    assert "which is gone" in found_in(out)["adapter/meta.json", "stale"]
    (tmp_path / "states.pt").touch()
    clip.write_text("another")
    (found,) = verify(out)[0]
    assert (found.about, found.state) == ("token_baseline/comparison.json", "stale") and found.why.startswith(
        "made from another clips than "
    )
    clip.write_text("events")
    (out / "benchmark" / "benchmark.json").write_text("{}")
    assert set(found_in(out)) == {("benchmark/benchmark.json", "altered")}


def test_what_was_left_by_a_killed_run_is_named_and_is_no_fault(tmp_path, capsys):
    out = tmp_path / "out"
    a_run(out, tmp_path / "clip.npy")
    (out / "hidden_states" / "train.unfinished").mkdir(parents=True)
    (out / "hidden_states" / "train.unfinished" / "meta.json").write_text("half")
    (out / "adapter" / ".adapter.7.tmp.pt").touch()
    found = main([str(out)])
    assert (found["unfinished"], found["left over"], found["altered"], found["missing"], found["stale"]) == (1, 1, 0, 0, 0)
    assert found["compared"] == {"files": 5, "rows": 0, "sources": 3}
    (out / "adapter" / "meta.json").write_text("{}")
    with pytest.raises(UserError, match=r"2 things in .* are altered, missing or stale"):
        main([str(out)])
    for nothing in (tmp_path / "absent", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="wanted the directory of a run"):
            verify(nothing)


def test_findings_without_any_result_are_listed_and_temporary_records_are_not_read(tmp_path):
    out = tmp_path / "out"
    (out / "hidden_states" / "train.unfinished").mkdir(parents=True)
    assert [(f.about, f.state) for f in verify(out)[0]] == [("hidden_states/train.unfinished", "unfinished")]
    (out / "sd").mkdir()
    (out / "sd" / ".one.7.tmp.json").write_text("{")
    assert [(f.about, f.state) for f in verify(out)[0]][1:] == [("sd/.one.7.tmp.json", "left over")]
    assert verify(out)[1]["files"] == 0
    for name in ("whole", "half"):
        (out / "sd" / f"{name}.jsonl").write_text("{}")
        write_hashed_json(out / "sd" / f"{name}.meta.json", {}, ["whole.jsonl"] if name == "whole" else [])
    assert ("sd/half.meta.json", "unfinished") in found_in(out) and len(found_in(out)) == 3


def test_a_checkpoint_of_the_hub_is_compared_by_its_revision(tmp_path, monkeypatch):
    out, source = tmp_path / "out", Path("hub:a/b")
    meta = {"inputs": {"target": str(source)}, "made_from": {"target": source_hash(source)}}
    write_hashed_json(out / "benchmark" / "benchmark.json", {"meta": meta})
    assert verify(out) == ([], {"files": 1, "rows": 0, "sources": 1})
    monkeypatch.setattr("feature_alignment.storage.identity.hub_revision", lambda path: "a/b@later")
    assert found_in(out)["benchmark/benchmark.json", "stale"].startswith("made from another target than hub:a/b is now")


@pytest.mark.parametrize(("findings", "more"), [(40, ""), (41, "and 1 more"), (50, "and 10 more")])
def test_only_forty_findings_are_shown(tmp_path, capsys, findings, more):
    (tmp_path / "sd").mkdir(parents=True)
    for i in range(findings):
        (tmp_path / "sd" / f"{i:02d}.json").write_text("{}")
    with pytest.raises(UserError, match=f"{findings} things"):
        main([str(tmp_path)])
    said = capsys.readouterr().out
    assert said.count("sd/") == 40 and ("more" in said) == bool(more) and more in said
