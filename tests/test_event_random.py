"""Random event files by an independent writer (struct, NumPy, h5py): the stream read equals the one written, or is refused.

formats x layouts x spellings x column orders x units x number types x origins x polarities x truncations
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections import Counter

import numpy as np
import pytest

from feature_alignment.cli import console
from feature_alignment.cli.console import UserError
from feature_alignment.inputs.events import load_events

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
SPELLED = {
    "x": ["x", "xs", "x_pos", "X"],
    "y": ["y", "ys", "y_pos", "Y"],
    "t": ["t", "ts", "timestamp", "time", "timestamps"],
    "p": ["p", "ps", "pol", "polarity", "on"],
}


def recording(rng):
    """x, y, t in whole nanoseconds, p in {0, 1}; the nanoseconds are whole microseconds half of the time, as a camera's."""
    n = int(rng.integers(60, 4000))
    span_ns = int(10 ** rng.uniform(7.3, 10.5))  # 20 ms to 30 s
    grid = int(rng.choice([1, 1000]))
    t = np.sort(rng.integers(0, span_ns // grid, n)) * grid
    return {"x": rng.integers(0, 1280, n), "y": rng.integers(0, 720, n), "t": t, "p": rng.integers(0, 2, n)}


def stamps(rng, t_ns):
    """The times as a file may hold them, with their unit and whether the unit is unambiguous."""
    unit = str(rng.choice(list(PER_SECOND)))
    kind = str(rng.choice(["int", "float64", "float32"], p=[0.5, 0.4, 0.1]))
    origin_ns = int(rng.choice([0, 0, 1_700_000_000_123_456_000, 51_648_500_652_000]))
    if kind == "int":
        per = 10**9 // PER_SECOND[unit]
        return (t_ns + origin_ns) // per, unit
    exact = np.float64(t_ns) / 1e9 * PER_SECOND[unit] + np.float64(origin_ns) / 1e9 * PER_SECOND[unit]
    return exact.astype(kind), unit


def polarity(rng, p):
    return [p.astype(bool), p.astype(np.uint8), (2 * p - 1).astype(np.int8), p.astype(np.float64)][int(rng.integers(4))]


def names_of(rng):
    return {k: str(rng.choice(v)) for k, v in SPELLED.items()}


def structured(e, names, order):
    types = {"x": "<u2", "y": "<i4", "t": e["t"].dtype, "p": e["p"].dtype}
    table = np.zeros(len(e["t"]), [(names[k], types[k]) for k in order])
    for k in order:
        table[names[k]] = e[k]
    return table


def flat_table(e, order):
    columns = [np.asarray(e[k]) for k in order]
    return np.stack(columns, 1).astype(
        np.result_type(*[c.dtype for c in columns if c.dtype != bool], np.int64 if e["t"].dtype.kind == "i" else float)
    )


# ---- writers: (rng, path, e) -> None; e as the file shall hold it


def npy_dict(rng, path, e):
    names = names_of(rng)
    np.save(path, np.array({names[k]: v for k, v in e.items()}, dtype=object), allow_pickle=True)


def npy_structured(rng, path, e):
    np.save(path, structured(e, names_of(rng), rng.permutation(list("xytp"))))


def npy_table(rng, path, e):
    table = flat_table(e, str(rng.choice(["txyp", "xytp", "xypt"])))
    np.save(path, np.asfortranarray(table) if rng.random() < 0.3 else table)


def npz_arrays(rng, path, e):
    names = names_of(rng)
    with open(path, "wb") as file:
        (np.savez if rng.random() < 0.5 else np.savez_compressed)(file, **{names[k]: e[k] for k in rng.permutation(list("xytp"))})


def npz_event_data(rng, path, e):
    with open(path, "wb") as file:
        np.savez_compressed(file, event_data=structured(e, dict(zip("xytp", "xytp", strict=True)), "xytp"))


def npz_bins(rng, path, e):
    table = structured(e, dict(zip("xytp", "xytp", strict=True)), "ptxy")
    parts = np.array_split(table, int(rng.integers(2, 6)))
    bins = np.empty(len(parts), dtype=object)
    bins[:] = parts
    with open(path, "wb") as file:
        np.savez(file, event_bins=bins)


def h5_group(rng, path, e):
    h5py = pytest.importorskip("h5py")
    names = names_of(rng)
    place = str(rng.choice(["events", "prophesee/left", "/"]))
    with h5py.File(path, "w", userblock_size=int(rng.choice([0, 512, 1024]))) as file:
        for k, v in e.items():
            file.create_dataset(f"{place}/{names[k]}", data=v, **({"compression": "gzip", "chunks": (512,)} if len(v) > 512 else {}))
        if rng.random() < 0.5:
            file[f"{place}/width"], file[f"{place}/height"] = 1280, 720


def h5_table(rng, path, e):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        if rng.random() < 0.5:
            file[str(rng.choice(["events", "davis/left/events"]))] = flat_table(e, str(rng.choice(["txyp", "xytp", "xypt"])))
        else:
            file["events"] = structured(e, names_of(rng), rng.permutation(list("xytp")))


def text(rng, path, e, named=False):
    order = list(rng.permutation(list("xytp"))) if named else list(str(rng.choice(["txyp", "xytp", "xypt"])))
    separator = str(rng.choice([" ", ",", "\t", ";"]))
    cells = {k: [repr(v) for v in e[k].tolist()] for k in "xytp"}
    lines = [separator.join(row) for row in zip(*(cells[k] for k in order), strict=True)]
    names = names_of(rng)
    head = [separator.join(names[k] for k in order)] if named else [[], ["1280 720"], ["# events of a camera"]][int(rng.integers(3))]
    end = str(rng.choice(["\n", "\r\n"]))
    path.write_bytes((end.join([*head, *lines]) + end).encode("utf-8-sig" if rng.random() < 0.2 else "utf-8"))


def csv(rng, path, e):
    text(rng, path, e, named=True)


def zipped_text(rng, path, e):
    text(rng, path, e, named=bool(rng.random() < 0.5))
    content = path.read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("events.txt", content)


TABLES = [npy_dict, npy_structured, npy_table, npz_arrays, npz_event_data, npz_bins, h5_group, h5_table, text, csv, zipped_text]


def dat(path, e):
    pairs = b"".join(struct.pack("<II", t, x | y << 14 | p << 28) for x, y, t, p in zip(*(e[k].tolist() for k in "xytp"), strict=True))
    path.write_bytes(b"% Version 2\n% Width 1280\n% Height 720\n" + bytes([12, 8]) + pairs)


def evt2(path, e):
    out, high = io.BytesIO(), -1
    for x, y, t, p in zip(*(e[k].tolist() for k in "xytp"), strict=True):
        if t >> 6 != high:
            high = t >> 6
            out.write(struct.pack("<I", 8 << 28 | high))
        out.write(struct.pack("<I", p << 28 | (t & 63) << 22 | x << 11 | y))
    path.write_bytes(b"% evt 2.0\n% end\n" + out.getvalue())


def evt21(path, e, swapped=False):
    out, high = io.BytesIO(), -1
    for x, y, t, p in zip(*(e[k].tolist() for k in "xytp"), strict=True):
        words = [8 << 60 | (t >> 6) << 32] if t >> 6 != high else []
        high = t >> 6
        words.append(p << 60 | (t & 63) << 54 | (x & ~31) << 43 | y << 32 | 1 << (x & 31))
        for word in words:
            out.write(struct.pack("<II", word >> 32, word & 0xFFFFFFFF) if swapped else struct.pack("<Q", word))
    path.write_bytes(b"% evt 2.1\n% end\n" + out.getvalue())


def evt3(path, e):
    out, high = io.BytesIO(), -1
    for x, y, t, p in zip(*(e[k].tolist() for k in "xytp"), strict=True):
        while high != t >> 12:  # a camera writes every high part; without them nobody can count the wraps
            high = t >> 12 if high < 0 else high + 1
            out.write(struct.pack("<H", 8 << 12 | high & 0xFFF))
        out.write(struct.pack("<HHH", 6 << 12 | t & 0xFFF, y, 2 << 12 | p << 11 | x))
    path.write_bytes(b"% evt 3.0\n% geometry 1280x720\n% end\n" + out.getvalue())


CAMERAS = [dat, evt2, evt21, lambda path, e: evt21(path, e, swapped=True), evt3]


def rows(e):
    return np.stack([np.asarray(e[k], np.int64) for k in "xyp"], 1)


def wrong(got, e, t_us, start_us, window_us, slack_us, truncated):
    """Difference from the written stream, or None. slack_us: largest error of a time through the number type of the file."""
    begin = t_us[0] + start_us
    t = got["t"] - got["t"][0] + 0
    surely = (t_us >= begin + slack_us) & (t_us < begin + window_us - slack_us)
    perhaps = (t_us >= begin - slack_us) & (t_us < begin + window_us + slack_us)
    wanted, allowed = Counter(map(tuple, rows(e)[surely])), Counter(map(tuple, rows(e)[perhaps]))
    found = Counter(map(tuple, rows(got)))
    if found - allowed:
        return f"{sum((found - allowed).values())} of {len(t)} events do not belong to the window"
    if not truncated and wanted - found:
        return f"{sum((wanted - found).values())} of {sum(wanted.values())} events of the window are missing"
    candidates = t_us[perhaps] - t_us[perhaps][0]
    if len(t) == len(candidates) and np.abs(t - candidates).max() > 2 * slack_us:
        return f"times are off by up to {np.abs(t - candidates).max()} us"
    return None


def one_file(seed, folder):
    """(description, difference or None, whether it was refused) of one random file."""
    rng = np.random.default_rng(seed)
    e = recording(rng)
    path, asked, slack = folder / f"{seed}.bin", None, 2
    if rng.random() < 0.3:
        e["t"] = e["t"] // 1000
        write = CAMERAS[int(rng.integers(len(CAMERAS)))]
        what, t_us = f"camera {CAMERAS.index(write)}", e["t"]
        write(path, e)
    else:
        t_us = e["t"] // 1000
        stored, unit = stamps(rng, e["t"])
        held = {**e, "t": stored, "p": polarity(rng, e["p"])}
        write = TABLES[int(rng.integers(len(TABLES)))]
        write(rng, path, held)
        path = path if path.exists() else path.with_suffix(".bin.npy")
        whole_ms = stored.dtype.kind == "i" and unit == "ms"
        # whole milliseconds of seconds look exactly like microseconds of milliseconds: only who made them can tell
        asked = unit if rng.random() < 0.5 or (whole_ms and np.ptp(stored) >= 3000) else None
        slack += 10**6 // PER_SECOND[unit] if stored.dtype.kind == "i" and unit != "ns" else 0
        if stored.dtype.kind == "f":
            slack += int(4 * np.spacing(np.abs(stored).max()) * 1e6 / PER_SECOND[unit])
        what = f"{write.__name__} {unit} {stored.dtype} from {stored.min():g}, asked {asked}"
    truncated = rng.random() < 0.2
    if truncated:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * rng.uniform(0.1, 0.99))])
        what += ", truncated"
    start, window = (0, 50) if rng.random() < 0.5 else (float(rng.uniform(0, 20)), 100)
    try:
        got = load_events(path, window, start, time_unit=asked)
    except UserError as error:
        return what, None, str(error)
    return what, wrong(got, e, t_us, round(start * 1000), window * 1000, slack, truncated), None


def test_no_wrong_stream_of_200_random_files_is_accepted(tmp_path):
    console._repairs.clear()
    results = [one_file(seed, tmp_path) for seed in range(200)]
    faults = [f"{seed}: {what}: {fault}" for seed, (what, fault, _) in enumerate(results) if fault]
    assert not faults, "\n".join(faults)
    read = sum(refusal is None for _, _, refusal in results)
    assert 70 <= read <= 190, read


def test_whole_files_are_read_where_their_unit_is_stated(tmp_path):
    """Every complete and dense file is read, not refused, if its unit is given."""
    for number, write in enumerate([*TABLES, *CAMERAS]):
        rng = np.random.default_rng(number)
        e = recording(rng)
        e["t"] = np.sort(rng.integers(0, 49_000, len(e["t"])))
        path = tmp_path / f"{number}.bin"
        write(rng, path, e) if write in TABLES else write(path, e)
        got = load_events(path if path.exists() else path.with_suffix(".bin.npy"), 50, time_unit="us")
        np.testing.assert_array_equal(rows(got), rows(e), err_msg=str(number))
        np.testing.assert_array_equal(got["t"], e["t"])
