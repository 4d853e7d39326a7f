"""Units, layouts and sensor sizes: the cases of people who reported them, and two more of each kind."""

from __future__ import annotations

import json
import os
import time
import zipfile

import numpy as np
import pytest
from conftest import SHARED, needs
from test_event_random import evt3, npz_bins

from feature_alignment.cli import console
from feature_alignment.cli.config import Common, parse_config
from feature_alignment.cli.console import UserError, repairs_of
from feature_alignment.inputs import event_index
from feature_alignment.inputs.event_evt import State, decode_evt3
from feature_alignment.inputs.events import event_images, load_events
from feature_alignment.inputs.samples import read_samples

CASES = SHARED / "public_cases"


@pytest.fixture(autouse=True)
def nothing_repaired():
    console._repairs.clear()


def clip(n=1500, span=50_000, seed=0):
    rng = np.random.default_rng(seed)
    return {"x": rng.integers(0, 346, n), "y": rng.integers(0, 260, n), "t": np.sort(rng.integers(0, span, n)), "p": rng.integers(0, 2, n)}


def npz(path, **columns):
    np.savez(path, **columns)
    return path


@needs(CASES)
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("e2_h5_seconds.h5", 1500),
        ("e4_nanoseconds_epoch.npz", 12_000),
        ("e7_1280x720_dsec_layout.h5", 1500),
        ("e9_bool_polarity.h5", 1500),
        ("e10_timestamp_polarity.npy", 1500),
        ("e13_v2e_events_table.h5", 1500),
    ],
)
def test_reported_files_are_read_completely(name, count):
    if name.endswith(".h5"):
        pytest.importorskip("h5py")
        pytest.importorskip("hdf5plugin")
    for window in (None, 50):
        e = load_events(CASES / name, window)
        assert len(e["t"]) == count and 49_900 < e["t"][-1] - e["t"][0] < 50_000 and set(e["p"].tolist()) == {0, 1}


@needs(CASES)
def test_a_minute_of_seconds_is_asked_for_and_then_read():
    with pytest.raises(UserError, match=r"look like seconds(.|\n)*--event_time_unit s \(59\.7 s"):
        load_events(CASES / "e1_seconds_60s.npy", 50)
    with pytest.raises(UserError, match=r"spans 59660\.9 ms"):
        load_events(CASES / "e1_seconds_60s.npy", time_unit="s")


@pytest.mark.parametrize("dtype", ["float64", "int64"])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_a_unit_that_was_asked_for_is_used_and_recorded(tmp_path, unit, dtype):
    e = clip(span=500_000)
    t = e["t"] * {"s": 1e-6, "ms": 1e-3, "us": 1, "ns": 1000}[unit]
    if dtype == "int64" and unit in ("s", "ms"):
        pytest.skip("whole seconds or milliseconds do not hold these times")
    path = npz(tmp_path / "e.npz", **{**e, "t": t.astype(dtype)})
    got = load_events(path, 50, 100, time_unit=unit)
    rows = (e["t"] >= e["t"][0] + 100_000) & (e["t"] < e["t"][0] + 150_000)
    np.testing.assert_array_equal(got["t"], e["t"][rows])
    assert bool(repairs_of(path)) == (unit != "us")


@pytest.mark.parametrize(
    ("t", "unit"),
    [
        (lambda e: e["t"] / 1e6, "s"),  # whole microseconds, as seconds
        (lambda e: 1.7e9 + e["t"] / 1e6, "s"),  # since 1970
        (lambda e: 1_700_000_000_000 + e["t"] // 1000, "ms"),
        (lambda e: 1_700_000_000_000_000 + e["t"], "us"),
        (lambda e: 1_700_000_000_000_000_123 + e["t"] * 1000, "ns"),
        (lambda e: e["t"] * 1000, "ns"),  # whole microseconds, as nanoseconds
        (lambda e: e["t"].astype(float), "us"),
    ],
)
def test_unambiguous_units_are_recognized(tmp_path, t, unit):
    e = clip()
    got = load_events(npz(tmp_path / "e.npz", **{**e, "t": t(e)}), 50)
    slack = 1000 if unit == "ms" else 1
    assert len(got["t"]) == 1500 and np.abs((got["t"] - got["t"][0]) - (e["t"] - e["t"][0])).max() <= slack


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (lambda e: e["t"] * 1000 + np.arange(1500) % 7, r"--event_time_unit us \(50 s.*--event_time_unit ns \(0\.05 s"),
        (lambda e: e["t"] // 1000, r"--event_time_unit ms \(0\.049 s"),
        (lambda e: e["t"] * 1e-3 * 7 / 9, r"--event_time_unit s .*--event_time_unit ms"),
        (lambda e: e["t"] // 10**6, "all 1,500 events have the time 0"),
        (lambda e: (1.7e9 + e["t"] / 1e6).astype(np.float32), "all 1,500 events have the time"),
    ],
)
def test_ambiguous_units_are_refused(tmp_path, t, message):
    e = clip()
    with pytest.raises(UserError, match=message):
        load_events(npz(tmp_path / "e.npz", **{**e, "t": t(e)}), 50)


def test_a_unit_in_the_name_of_a_column_is_used_and_contradicting_it_refused(tmp_path):
    e = clip()
    t = e.pop("t") * 1000 + 3
    path = npz(tmp_path / "e.npz", **e, timestamp_ns=t)
    assert load_events(path)["t"][-1] == t[-1] // 1000
    with pytest.raises(UserError, match="states its times in nanoseconds"):
        load_events(path, time_unit="us")
    (tmp_path / "e.raw").write_bytes(b"% evt 3.0\n% end\n" + bytes(20))
    (tmp_path / "e.csv").write_text("x,y,timestamp [us],polarity\n" + "".join(f"{i},1,{10_000 * i},1\n" for i in range(9)))
    assert len(load_events(tmp_path / "e.csv")["t"]) == 9


@pytest.mark.parametrize("stated", ["datasets", "attributes", "geometry", "nothing"])
def test_no_event_of_a_large_camera_is_dropped(tmp_path, stated):
    h5py = pytest.importorskip("h5py")
    pytest.importorskip("hdf5plugin")
    e = clip()
    e["x"][:50] = 1279
    with h5py.File(tmp_path / "e.h5", "w") as file:
        for k, v in e.items():
            file[f"events/{k}"] = v
        if stated == "datasets":
            file["events/width"], file["events/height"] = 1280, 720
        elif stated == "attributes":
            file["events"].attrs["width"], file["events"].attrs["height"] = 1280, 720
        elif stated == "geometry":
            file.attrs["geometry"] = "1280x720"
    assert len(load_events(tmp_path / "e.h5")["t"]) == 1500 and not repairs_of(tmp_path / "e.h5")
    np.savez(tmp_path / "e.npz", x_pos=e["x"], y_pos=e["y"], timestamp=e["t"], polarity=e["p"])
    assert len(load_events(tmp_path / "e.npz")["t"]) == 1500


def test_dropping_more_than_one_percent_has_its_own_warning(tmp_path):
    h5py = pytest.importorskip("h5py")
    pytest.importorskip("hdf5plugin")
    for outside, kind in ((10, "events outside the sensor dropped"), (20, "more than 1 % of the events outside the sensor dropped")):
        e = clip()
        e["x"][:outside] = 400
        path = tmp_path / f"{outside}.h5"
        with h5py.File(path, "w") as file:
            for k, v in {**e, "width": 346, "height": 260}.items():
                file[f"events/{k}"] = v
        assert len(load_events(path)["t"]) == 1500 - outside and repairs_of(path) == [kind]


def test_event_bins_go_through_the_restricted_unpickler(tmp_path):
    e = clip()
    npz_bins(np.random.default_rng(1), tmp_path / "e.npz", e)
    got = load_events(tmp_path / "e.npz")
    for k in "xytp":
        np.testing.assert_array_equal(got[k], e[k])

    class Payload:
        def __reduce__(self):
            return os.system, ("touch hacked",)

    bins = np.empty(2, dtype=object)
    bins[:] = [np.zeros(9, [("x", "u2")]), Payload()]
    np.savez(tmp_path / "bad.npz", event_bins=bins)
    with pytest.raises(UserError, match="system"):
        load_events(tmp_path / "bad.npz")
    objects = np.empty(9, [("x", "O"), ("y", "u2"), ("t", "i8"), ("p", "u1")])
    bins[:] = [objects, objects]
    np.savez(tmp_path / "worse.npz", event_bins=bins)
    with pytest.raises(UserError, match="no numbers, or overlap"):
        load_events(tmp_path / "worse.npz")


def test_metavision_files_are_read_or_named(tmp_path):
    h5py = pytest.importorskip("h5py")
    pytest.importorskip("hdf5plugin")
    e = clip()
    table = np.zeros(1500, [("x", "<u2"), ("y", "<u2"), ("p", "<i2"), ("t", "<i8")])
    for k in "xytp":
        table[k] = e[k]
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file["CD/events"] = table
    assert len(load_events(tmp_path / "plain.h5")["t"]) == 1500
    with h5py.File(tmp_path / "ecf.h5", "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((512,))
        properties.set_filter(0x8ECF, h5py.h5z.FLAG_OPTIONAL)
        space = h5py.h5s.create_simple((1500,))
        h5py.h5d.create(file.create_group("CD").id, b"events", h5py.h5t.py_create(table.dtype), space, properties)
    with pytest.raises(UserError, match=r"compressed with ECF(.|\n)*metavision_file_to_dat"):
        load_events(tmp_path / "ecf.h5")


def test_a_zip_that_holds_no_events_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "e.zip", "w") as archive:
        archive.writestr("a.png", b"\x89PNG")
        archive.writestr("b.png", b"\x89PNG")
    with pytest.raises(UserError, match=r"holds \['a.png', 'b.png'\]"):
        load_events(tmp_path / "e.zip")


@pytest.mark.parametrize("columns", [lambda e: [e["p"], e["t"], e["x"], e["y"]], lambda e: [e["x"], e["y"], e["x"], e["y"]]])
def test_a_table_with_ambiguous_columns_is_refused(tmp_path, columns):
    np.save(tmp_path / "e.npy", np.stack(columns(clip()), 1))
    with pytest.raises(UserError, match="columns without names"):
        load_events(tmp_path / "e.npy")


@pytest.mark.parametrize("seed", range(20))
def test_the_index_has_the_states_of_the_decoder(seed):
    rng = np.random.default_rng(seed)
    words = (rng.choice([0, 2, 3, 4, 5, 6, 8, 14], 400) << 12 | rng.choice([0, 5, 4095, 2000, 100], 400)).astype(np.uint16)
    decoded = found = State()
    for part in np.split(words, np.sort(rng.integers(0, 400, 9))):
        events, decoded, _ = decode_evt3(part, decoded)
        low, high, found = event_index._pass(part, found, "EVT3")
        assert found == decoded
        assert not len(events["t"]) or low <= events["t"].min() <= events["t"].max() <= high


def test_the_index_is_built_once_and_again_when_the_content_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(event_index, "CACHED_FROM_BYTES", 1)
    built = []
    build = event_index._build
    monkeypatch.setattr(event_index, "_build", lambda *a: built.append(1) or build(*a))
    e = clip(5000, 3_000_000)
    evt3(tmp_path / "e.raw", e)

    def window(path):
        got = load_events(path, 50, 1000)
        rows = (e["t"] >= e["t"][0] + 1_000_000) & (e["t"] < e["t"][0] + 1_050_000)
        np.testing.assert_array_equal(got["t"], e["t"][rows])
        return len(built)

    assert window(tmp_path / "e.raw") == 1 and window(tmp_path / "e.raw") == 1
    (tmp_path / "copy.raw").write_bytes((tmp_path / "e.raw").read_bytes())
    assert window(tmp_path / "copy.raw") == 1  # the same content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "copy.raw", "e.raw"]
    time.sleep(0.02)
    e["t"] = e["t"] + 3000
    evt3(tmp_path / "e.raw", e)
    assert window(tmp_path / "e.raw") == 2
    for kept in (tmp_path / "cache").rglob("*.npz"):
        kept.write_bytes(kept.read_bytes()[:100])
    assert window(tmp_path / "e.raw") == 3
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    assert window(tmp_path / "e.raw") == 4


@pytest.mark.parametrize("shuffled", [False, True])
def test_windows_of_large_tables_equal_those_of_the_whole(tmp_path, shuffled):
    rng = np.random.default_rng(3)
    e = clip(300_000, 2_000_000)
    jittered = np.argsort(e["t"] + rng.integers(0, 900, 300_000), kind="stable")  # packets slightly out of order, as cameras deliver them
    order = rng.permutation(300_000) if shuffled else jittered
    path = npz(tmp_path / "e.npz", **{k: v[order] for k, v in e.items()})
    for start in (0, 700, 1960):
        got = load_events(path, 50, start)
        rows = (e["t"] >= e["t"][0] + start * 1000) & (e["t"] < e["t"][0] + start * 1000 + 50_000)
        np.testing.assert_array_equal(got["t"], e["t"][rows])
        assert sorted(got["x"].tolist()) == sorted(e["x"][rows].tolist())
    assert len(event_images(got, 5)) == 5


def test_a_manifest_row_can_state_the_unit(tmp_path):
    row = {"id": "0", "sequence": "s", "events": "e.npz", "video": "v.mp4", "question": "What?"}
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps({**row, "event_time_unit": "ns"}) + "\n" + json.dumps({**row, "id": "1"}) + "\n")
    assert [s.event_time_unit for s in read_samples({"test": manifest}, "test")] == ["ns", None]
    for unit in ("hours", 5, ["ns"]):
        manifest.write_text(json.dumps({**row, "event_time_unit": unit}) + "\n")
        with pytest.raises(UserError, match=r"line 1: event_time_unit .*wanted one of s, ms, us, ns"):
            read_samples({"test": manifest}, "test")


def test_the_flag_is_one_of_four_units():
    assert parse_config(Common, ["--event_time_unit", "ns"], "extract_hidden_states").event_time_unit == "ns"
    with pytest.raises(UserError, match="event_time_unit"):
        parse_config(Common, ["--event_time_unit", "hours"], "extract_hidden_states")


def test_a_table_that_fits_two_orders_is_refused(tmp_path):
    i = np.arange(300)
    np.save(tmp_path / "e.npy", np.stack([i, i, i, i % 2], 1))  # t x y p or x y t p
    with pytest.raises(UserError, match="more than one of the orders"):
        load_events(tmp_path / "e.npy")


def test_a_truncated_number_at_the_end_of_a_text_is_not_used(tmp_path):
    rows = "".join(f"{10_000 * i},1,5,{300 + i}\n" for i in range(9))
    (tmp_path / "e.csv").write_text("t,p,y,x\n" + rows[:-2])  # 30 of 308
    assert load_events(tmp_path / "e.csv")["x"].tolist() == [300 + i for i in range(8)]
    assert repairs_of(tmp_path / "e.csv") == ["cut off"]
