"""Files at their limits: pickles that are just small enough, locks and the folders made for them, hashes that cover every byte."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import pickletools
import zipfile

import numpy as np
import pytest
import torch

from feature_alignment import pickles, state_files
from feature_alignment.console import UserError
from feature_alignment.pickles import ArraysOnly, check_pt, look_through
from feature_alignment.processes import _name, claimed, processes, temporary_name

# ---- pickles


def test_a_pickle_may_hold_ten_thousand_tuples_and_no_more():
    of = lambda number: pickle.dumps([(i,) for i in range(number)], 2)  # noqa: E731
    look_through(of(10_000))
    with pytest.raises(pickle.UnpicklingError, match="more than 10,000 steps"):
        look_through(of(10_001))
    with pytest.raises(pickle.UnpicklingError, match="more than 10,000 steps"):
        look_through(pickle.dumps([frozenset([i]) for i in range(10_001)], 4))


def test_a_pickle_may_take_so_many_steps_and_no_more(monkeypatch):
    data = pickle.dumps(list(range(50)), 2)
    steps = sum(1 for _ in pickletools.genops(data))
    monkeypatch.setattr(pickles, "MAX_OPCODES", steps - 1)
    look_through(data)
    monkeypatch.setattr(pickles, "MAX_OPCODES", steps - 2)
    with pytest.raises(pickle.UnpicklingError, match=f"more than {steps - 1} steps"):
        look_through(data)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_is_refused_for_a_name_it_may_not_ask_for(protocol):
    data = pickle.dumps(os.system, protocol)
    look_through(data)  # any name
    with pytest.raises(pickle.UnpicklingError, match="it asks for"):
        look_through(data, {"builtins print"})
    if protocol < 4:  # later ones build the name from what lies on the stack: none of those is let through
        look_through(data, {f"{os.system.__module__} system"})


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
    with pytest.raises(pickle.UnpicklingError, match="packed"):
        check_pt(torch_file(tmp_path / "good.pt", compression=zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(torch_file(good)) as archive:
        size = next(m.file_size for m in archive.infolist() if m.filename.endswith("data.pkl"))
    monkeypatch.setattr(pickles, "MAX_PT_PICKLE", size)
    check_pt(good)
    monkeypatch.setattr(pickles, "MAX_PT_PICKLE", size - 1)
    with pytest.raises(pickle.UnpicklingError, match="packed, or larger"):
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


# ---- locks


def test_a_refused_run_leaves_no_empty_folder_and_takes_none_away(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    with pytest.raises(UserError, match="no"), claimed(old / "new" / "deep" / "adapter"):
        raise UserError("no")
    assert old.is_dir() and list(old.iterdir()) == []
    with claimed(old / "new" / "deep" / "adapter"):
        (old / "new" / "deep" / "adapter").mkdir()
    assert [str(p.relative_to(old)) for p in sorted(old.rglob("*"))] == ["new", "new/deep", "new/deep/adapter"]
    with claimed(old / "new" / "deep" / "other"):
        assert (old / "new" / "deep" / "other.lock").is_file()
    assert not (old / "new" / "deep" / "other.lock").exists()


def test_what_a_killed_owner_left_half_written_is_removed(tmp_path):
    path = tmp_path / "adapter.pt"
    for name in (".adapter.123.tmp.pt", ".other.123.tmp.pt", ".adapter.123.tmp.json"):
        (tmp_path / name).touch()
    with claimed(path):
        assert sorted(p.name for p in tmp_path.iterdir()) == [".adapter.123.tmp.json", ".other.123.tmp.pt", "adapter.pt.lock"]
    (tmp_path / "split").mkdir()
    for name in (".meta.5.tmp.json", "meta.json"):
        (tmp_path / "split" / name).touch()
    with claimed(tmp_path / "split"):
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
    rank, number, device, wait = processes("cuda:3")
    assert (rank, number, device, wait()) == (0, 1, "cuda:3", None)


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
    for block in (1, 7, 1 << 22):
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
