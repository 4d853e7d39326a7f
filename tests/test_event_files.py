"""Every event format, from bytes the tests write themselves; repairs are counted, and input that would be misread is refused."""

from __future__ import annotations

import base64
import logging
import sys
import zlib

import numpy as np
import pytest
from conftest import SHARED, needs

from feature_alignment.cli import console
from feature_alignment.cli.console import UserError
from feature_alignment.inputs.events import check_events, load_events


def truth(n=60, step_us=700, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.integers(0, 640, n),
        "y": rng.integers(0, 480, n),
        "t": 4_000 + np.cumsum(rng.integers(0, 2 * step_us, n)),
        "p": rng.integers(0, 2, n),
    }


def same(got, wanted):
    for key in "xytp":
        np.testing.assert_array_equal(got[key], wanted[key], err_msg=key)


def log_of(caplog):
    return " ".join(r.getMessage() for r in caplog.records)


@pytest.fixture(autouse=True)
def heard_once():
    console._repairs.clear()


# ---- writers, word by word


def dat(e, header=b"% Data file containing CD events.\n% Version 2\n% Height 480\n% Width 640\n"):
    words = [(int(t), int(x) | int(y) << 14 | int(p) << 28) for x, y, t, p in zip(*(e[k] for k in "xytp"), strict=True)]
    return header + bytes([12, 8]) + np.array(words, "<u4").tobytes()


def evt2(e, header=b"% evt 2.0\n% format EVT2;height=480;width=640\n% end\n"):
    words, high = [], None
    for x, y, t, p in zip(*(map(int, e[k]) for k in "xytp"), strict=True):
        if t >> 6 != high:
            high = t >> 6
            words.append(8 << 28 | high)
        words.append(p << 28 | (t & 63) << 22 | x << 11 | y)
        words.append(0xA << 28 | 1)  # an external trigger, not an event
    return header + np.array(words, "<u4").tobytes()


def evt3(e, header=b"% evt 3.0\n% geometry 640x480\n% end\n"):
    words, high = [], None
    for x, y, t, p in zip(*(map(int, e[k]) for k in "xytp"), strict=True):
        if t >> 12 != high:
            high = t >> 12
            words.append(8 << 12 | high & 0xFFF)
        words += [6 << 12 | t & 0xFFF, y, 2 << 12 | p << 11 | x, 0xE << 12 | 5]
    return header + np.array(words, "<u2").tobytes()


def npz(path, e, layout="event_data", p=None):
    p = e["p"] if p is None else p
    if layout == "event_data":
        table = np.zeros(len(p), [("x", "<u2"), ("y", "<u2"), ("t", "<i8"), ("p", np.asarray(p).dtype)])
        for key, value in {**e, "p": p}.items():
            table[key] = value
        np.savez_compressed(path, event_data=table)
    else:
        np.savez(path, x_pos=e["x"].astype(np.uint16), y_pos=e["y"].astype(np.uint16), timestamp=e["t"], polarity=p)
    return path


# ---- NumPy layouts


@pytest.mark.parametrize("layout", ["event_data", "x_pos"])
@pytest.mark.parametrize("kind", ["bool", "01", "-11"])
def test_n_imagenet_layouts_and_polarities(tmp_path, caplog, layout, kind):
    e = truth()
    p = {"bool": e["p"].astype(bool), "01": e["p"].astype(np.uint8), "-11": (2 * e["p"] - 1).astype(np.int8)}[kind]
    same(load_events(npz(tmp_path / "a.npz", e, layout, p)), e)
    assert (f"{(e['p'] == 0).sum()} of 60 polarities are -1" in log_of(caplog)) == (kind == "-11")


def test_a_structured_npy(tmp_path):
    e = truth()
    table = np.rec.fromarrays([e[k] for k in "xytp"], names="x,y,t,p")
    np.save(tmp_path / "e.npy", np.asarray(table))
    same(load_events(tmp_path / "e.npy"), e)


def test_the_format_is_recognized_from_the_content_not_the_suffix(tmp_path):
    e = truth()
    npz(tmp_path / "a.npz", e).rename(tmp_path / "a.raw")
    (tmp_path / "b.npy").write_bytes(evt2(e))
    same(load_events(tmp_path / "a.raw"), e)
    same(load_events(tmp_path / "b.npy"), e)


def test_npz_of_other_content_or_with_pickles_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", frames=np.zeros(3))
    with pytest.raises(UserError, match=r"holds \['frames'\]"):
        load_events(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", event_data=np.array([{"x": 1}], dtype=object))
    with pytest.raises(UserError, match="Only plain NumPy arrays"):
        load_events(tmp_path / "b.npz")
    whole = npz(tmp_path / "c.npz", truth()).read_bytes()
    for size in range(4, len(whole) - 1, 97):
        (tmp_path / "cut.npz").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.npz"):
            load_events(tmp_path / "cut.npz")


# ---- Prophesee


@pytest.mark.parametrize("write", [dat, evt2, evt3])
def test_prophesee_files_give_back_what_was_written(tmp_path, write):
    e = truth()
    (tmp_path / "e.raw").write_bytes(write(e))
    same(load_events(tmp_path / "e.raw"), e)


@pytest.mark.parametrize(("write", "word"), [(evt2, "u4"), (evt3, "u2")])
def test_the_header_states_the_byte_order(tmp_path, write, word):
    e = truth()
    swapped = np.frombuffer(write(e, b""), "<" + word).astype(">" + word).tobytes()
    header = f"% evt {'2.0' if write is evt2 else '3.0'}\n% endianness big\n% end\n".encode()
    (tmp_path / "e.raw").write_bytes(header + swapped)
    same(load_events(tmp_path / "e.raw"), e)


@pytest.mark.parametrize("write", [dat, evt2, evt3])
def test_a_file_truncated_inside_a_word_is_logged(tmp_path, caplog, write):
    (tmp_path / "e.raw").write_bytes(write(truth())[:-1])
    assert len(load_events(tmp_path / "e.raw")["t"]) in (59, 60)
    assert "the last" in log_of(caplog) and "bytes are dropped" in log_of(caplog)


@pytest.mark.parametrize("write", [evt2, evt3])
def test_events_before_the_first_time_stamp_are_dropped_and_counted(tmp_path, caplog, write):
    whole = write(truth(), b"% evt 2.0\n% end\n" if write is evt2 else b"% evt 3.0\n% end\n")
    size = 4 if write is evt2 else 2
    without_time = whole[:16] + whole[16 + size :]
    (tmp_path / "e.raw").write_bytes(without_time)
    assert 50 <= len(load_events(tmp_path / "e.raw")["t"]) < 60
    assert "before the first time stamp" in log_of(caplog)


def test_evt3_vectors_and_a_time_that_wraps(tmp_path):
    """Vectors continue one another from their base; the 24-bit time starts again every 16.8 s; unchanged high words move nothing."""
    words = [0x8FFF, 0x6FF0, 0x0000 | 7]  # time 0xFFFFF0, y = 7
    words += [0x3000 | 1 << 11 | 100, 0x4000 | 0b100000000001, 0x5000 | 0b00000110]  # base x = 100, brighter; 12 pixels, then 8
    words += [0x8FFF, 0x2000 | 5]  # the same high part again: time stands; one darker event at x = 5
    words += [0x8000, 0x2000 | 6, 0x6003, 0x2000 | 8]  # wrapped: low part 0, then 3
    (tmp_path / "e.raw").write_bytes(b"% evt 3.0\n% end\n" + np.array(words, "<u2").tobytes())
    got = load_events(tmp_path / "e.raw")
    top = 0xFFFFF0
    assert got["x"].tolist() == [100, 111, 113, 114, 5, 6, 8] and set(got["y"].tolist()) == {7}
    assert got["p"].tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert got["t"].tolist() == [top] * 5 + [1 << 24, (1 << 24) + 3]


def literal_evt3(words):
    """One word after the other, as the format is defined."""
    out, y, base, base_p, high, low, epoch = [], None, 0, 0, None, 0, 0
    for word in map(int, words):
        kind, value = word >> 12, word & 0xFFF
        if kind == 0:
            y = value & 0x7FF
        elif kind == 8:
            if high is not None and value != high:
                epoch, low = epoch + (value - high < -2048), 0
            high = value
        elif kind == 6:
            low = value
        elif kind == 3:
            base, base_p = value & 0x7FF, value >> 11
        elif kind in (2, 4, 5):
            pixels = [(value & 0x7FF, value >> 11)] if kind == 2 else []
            if kind != 2:
                size = 12 if kind == 4 else 8
                pixels = [(base + i, base_p) for i in range(size) if value >> i & 1]
                base += size
            if y is not None and high is not None:
                out += [(x, y, low + (high << 12) + (epoch << 24), p) for x, p in pixels]
    return np.array(out, np.int64).reshape(-1, 4)


@pytest.mark.parametrize("seed", range(25))
def test_evt3_equals_the_word_by_word_definition(seed):
    from feature_alignment.inputs.event_evt import State, decode_evt3

    rng = np.random.default_rng(seed)
    words = rng.choice([0, 2, 3, 4, 5, 6, 8, 14], 300).astype(np.int64) << 12 | rng.integers(0, 4096, 300)
    got = decode_evt3(words.astype("u2"), State()).events
    np.testing.assert_array_equal(np.stack([got[k] for k in "xytp"], 1), literal_evt3(words))
    state, parts = State(), []
    for part in np.split(words.astype("u2"), np.sort(rng.integers(0, 300, 12))):  # the same in pieces, some of them empty
        events, state, _ = decode_evt3(part, state)
        parts.append(np.stack([events[k] for k in "xytp"], 1))
    np.testing.assert_array_equal(np.concatenate(parts), literal_evt3(words))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"% evt 4.0\n% end\n" + bytes(64), r"EVT4\.0; only EVT2, EVT2\.1 and EVT3"),
        (b"% Version 1\n" + bytes([0, 8]) + bytes(64), "is DAT version 1"),
        (b"% hello\n" + bytes(64), "names no format"),
        (b"% Version 2\n" + bytes([40, 8]) + bytes(64), r"\[40, 8\]; wanted change-detection"),
        (b"#!AER-DAT2.0\r\n" + bytes(64), r"is not an event file.*AEDAT 2\.0.*Convert"),
        (b"#!AER-DAT3.1\r\n" + bytes(64), r"AEDAT 3\.1"),
        (b"#ROSBAG V2.0\n" + bytes(64), "a ROS bag"),
        (b"Event Stream\x02\x00" + bytes(64), r"\.es file"),
        (b"% evt 3.0\n% end\n", "holds 0 events"),
    ],
)
def test_other_recordings_are_named(tmp_path, content, message):
    (tmp_path / "e.raw").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_events(tmp_path / "e.raw")


# ---- DSEC


def dsec(path, codec=True, count=40_000):
    h5py = pytest.importorskip("h5py")
    hdf5plugin = pytest.importorskip("hdf5plugin")
    rng = np.random.default_rng(0)
    t = np.sort(rng.integers(500, 2_000_000, count)).astype(np.uint32)  # two seconds
    e = {"x": rng.integers(0, 640, count), "y": rng.integers(0, 480, count), "t": t, "p": rng.integers(0, 2, count)}
    dtypes = {"x": np.uint16, "y": np.uint16, "t": np.uint32, "p": np.uint8}
    with h5py.File(path, "w") as file:
        options = dict(hdf5plugin.Blosc(cname="zstd")) if codec else {}
        for key, value in e.items():
            file.create_dataset(f"events/{key}", data=value.astype(dtypes[key]), chunks=(4096,), **options)
        file["ms_to_idx"] = np.searchsorted(t, np.arange(0, 2001) * 1000).astype(np.uint64)
        file["t_offset"] = np.int64(51_648_500_652)  # beyond uint32: NumPy 2 refuses the plain sum
    return e


@pytest.mark.parametrize(("start", "window"), [(0, 50), (0, 0.3), (333.5, 100), (1950, 50), (1999, 100)])
@pytest.mark.parametrize("index", [True, False])
def test_dsec_windows_are_exact(tmp_path, start, window, index):
    e = dsec(tmp_path / "events.h5")
    if not index:
        import h5py

        with h5py.File(tmp_path / "events.h5", "a") as file:
            del file["ms_to_idx"]
    got = load_events(tmp_path / "events.h5", window, start)
    begin = int(e["t"][0]) + round(start * 1000)
    rows = (e["t"] >= begin) & (e["t"] < begin + round(window * 1000))
    same(got, {k: v[rows].astype(np.int64) + (51_648_500_652 if k == "t" else 0) for k, v in e.items()})


def test_dsec_refuses_without_a_window_its_codec_or_its_layout(tmp_path, monkeypatch):
    dsec(tmp_path / "events.h5")
    with pytest.raises(UserError, match=r"spans 1999\.\d ms.*--event_window_ms"):
        load_events(tmp_path / "events.h5")
    with pytest.raises(UserError, match="holds 0 events"):
        load_events(tmp_path / "events.h5", 50, 60_000)
    import h5py

    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["CD/events"] = np.zeros(3)
    with pytest.raises(UserError, match=r"holds \['CD'\]"):
        load_events(tmp_path / "other.h5")
    whole = (tmp_path / "events.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.h5 could not be read"):
        load_events(tmp_path / "cut.h5", 50)
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    with pytest.raises(UserError, match=r"hdf5plugin is not installed(.|\n)*pip install"):
        load_events(tmp_path / "events.h5", 50)


# ---- iniVation: 20 events of 640 x 480, uncompressed, written once with dv-processing

AEDAT4 = (
    "eNqNlE1oE0EUgF+bUDTUViRK0SLbsSiIzS4aikKymLYRIzQBDVqhiEt22g42O8vsbKDi2bNnD548e/bs2bNnz548eBbfzL6FNV0xDyY737y/fW/25dpap/t4"
    "Y6czbDa8c7X1CsAKAPQGD7tgpQZ1qMIinMFdJou4PlSz/c95gFY4cSZcJUJGbXa74TG/5qC0IhlyJwrGvM1kqnvRgWROHOijNnOJXTKdNvdOGXpFU2seaK2c"
    "V/ykzUZyHCuemPzM0ScxBki0EtEh8/uDfrflGtN/ekslDkUUHO/KMD3mfcw/HWRXRnIbz1XwTAnN1YwBB6mOU10WkE94pJP/hDEuOzwZKRHrksq200TLsRMG"
    "OrAaR9p0jRmi9kJMLw4EV9NBu0+HT0oDFO5GlN2j54qp6yzJnYjXfC9PKSLN/M2mV5auxO/5X37NuzP5yVSNTjVf80SX1uiaIgvfY4HzfcsNJ34+BvByDmAf"
    "13ncm84BLOCUVPEXwIxHHdf9rWUoyiPiCswDusKQeAGygXpBfBZPjP6I2MyfEUW8jNNo9G+IL9ipBHhLfBGWrP4d8Yp9S4D3xFfQw+g/El+1bwvwiXgNLln9"
    "Z+J1+68A8IX4Bly2+q/EN2HVPr8Rb2BEo/9O7IFjnz+I7wCz+l/Em5jByG/ie3Dd6vch6++DYWdrur9z1GPAWm9h/VWkVYyzVLgfv5Lt63SW30ee5w9trAH/"
)


def test_aedat4(tmp_path, monkeypatch, caplog):
    pytest.importorskip("aedat")
    content = zlib.decompress(base64.b64decode(AEDAT4))
    (tmp_path / "e.aedat4").write_bytes(content)
    i = np.arange(20)
    same(load_events(tmp_path / "e.aedat4"), {"x": 3 * i, "y": 2 * i, "t": 1_000_000 + 10 * i, "p": i % 2})
    (tmp_path / "cut.aedat4").write_bytes(content[:200])
    with pytest.raises(UserError, match=r"cut\.aedat4"):
        load_events(tmp_path / "cut.aedat4")
    monkeypatch.setitem(sys.modules, "aedat", None)
    with pytest.raises(UserError, match=r"aedat is not installed(.|\n)*pip install"):
        load_events(tmp_path / "e.aedat4")


# ---- one form for all of them


def test_unsorted_events_are_sorted_stably_and_counted(caplog):
    e = truth()
    e["t"] = e["t"] // 2000 * 2000  # many equal times
    order = np.random.default_rng(1).permutation(60)
    shuffled = {k: v[order] for k, v in e.items()}
    stable = np.argsort(shuffled["t"], kind="stable")
    same(check_events(shuffled, "shuffled"), {k: v[stable] for k, v in shuffled.items()})
    assert f"went backward {(np.diff(shuffled['t']) < 0).sum()} times" in log_of(caplog)


def test_events_outside_the_sensor_are_dropped_and_counted(tmp_path, caplog):
    e = truth()
    e["x"][[3, 9]] = 640  # the header says 640 x 480
    (tmp_path / "e.dat").write_bytes(dat(e))
    same(load_events(tmp_path / "e.dat"), {k: np.delete(v, [3, 9]) for k, v in e.items()})
    assert "2 of 60 events outside 640 x 480" in log_of(caplog)
    e["x"][:40] = 5000
    (tmp_path / "f.dat").write_bytes(dat(e))
    with pytest.raises(UserError, match="40 of 60 events lie outside a sensor of 640 x 480"):
        load_events(tmp_path / "f.dat")


def test_the_same_repair_is_logged_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = npz(tmp_path / "a.npz", truth(), p=2 * truth()["p"] - 1)
    for _ in range(3):
        load_events(path)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("write", [dat, evt2, evt3])
def test_long_streams_are_cut_to_a_stated_window(tmp_path, write):
    e = truth(600)  # about 420 ms
    (tmp_path / "e.raw").write_bytes(write(e))
    with pytest.raises(UserError, match="--event_window_ms 50"):
        load_events(tmp_path / "e.raw")
    rows = (e["t"] >= e["t"][0] + 120_000) & (e["t"] < e["t"][0] + 170_000)
    same(load_events(tmp_path / "e.raw", 50, 120), {k: v[rows] for k, v in e.items()})


@pytest.mark.parametrize(
    ("window", "start", "message"), [(101, 0, "at most 100"), (0, 0, "more than 0"), (50, -1, "0 or more"), (None, 5, "together")]
)
def test_invalid_windows_are_refused(tmp_path, window, start, message):
    with pytest.raises(UserError, match=message):
        load_events(npz(tmp_path / "a.npz", truth()), window, start)


@needs(SHARED)
@pytest.mark.parametrize(("name", "count"), [("000089", 120_836), ("000099", 135_853)])
@pytest.mark.parametrize("write", [dat, evt2, evt3])
def test_real_events_survive_every_format(tmp_path, name, count, write):
    e = load_events(SHARED / "events" / f"interlaken_00_d_{name}.npy")
    assert len(e["t"]) == count
    e["t"] = e["t"] - e["t"][0]  # .dat holds 32 bits of time
    (tmp_path / "e.raw").write_bytes(write(e))
    same(load_events(tmp_path / "e.raw"), e)
