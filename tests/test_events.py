"""Event images against the literal loop; files that are damaged, hostile or of another kind."""

from __future__ import annotations

import io
import os
import pickle

import numpy as np
import pytest
from conftest import SHARED, needs

from feature_alignment.cli.console import UserError
from feature_alignment.inputs.events import check_events, event_image, event_images, load_events, slice_by_count


def literal_event_image(x, y, p, height, width):
    """EventGPT's own definition, one event after the other."""
    image = np.full((height, width, 3), 255, np.uint8)
    for i in range(len(x)):
        image[y[i], x[i]] = (0, 0, 255) if p[i] == 0 else (255, 0, 0)
    return image


@pytest.mark.parametrize("seed", range(20))
def test_the_last_event_at_a_pixel_wins(seed):
    rng = np.random.default_rng(seed)
    n, h, w = int(rng.integers(1, 400)), int(rng.integers(1, 12)), int(rng.integers(1, 12))  # few pixels, many collisions
    x, y, p = rng.integers(0, w, n), rng.integers(0, h, n), rng.integers(0, 2, n)
    np.testing.assert_array_equal(event_image(x, y, p, (h, w)), literal_event_image(x, y, p, h, w))
    np.testing.assert_array_equal(event_image(x, y, p), literal_event_image(x, y, p, y.max() + 1, x.max() + 1))


def test_slices_have_equal_counts_and_the_last_takes_the_rest():
    assert [s.stop - s.start for s in slice_by_count(132_268, 5)] == [26_453] * 4 + [26_456]


@needs(SHARED)
def test_a_real_stream_equals_the_literal_loop():
    events = load_events(SHARED / "events" / "interlaken_00_d_000089.npy")
    images = event_images(events, 5)
    part = slice_by_count(len(events["t"]), 5)[4]
    x, y, p = (events[k][part] for k in "xyp")
    np.testing.assert_array_equal(images[4], literal_event_image(x, y, p, y.max() + 1, x.max() + 1))


def write(path, content):
    np.save(path, np.array(content, dtype=object), allow_pickle=True)
    return path


def stream(n=20, **changes):
    made = {"x": np.arange(n), "y": np.arange(n), "t": np.arange(n) * 10, "p": np.arange(n) % 2}
    return {**made, **changes}


def test_a_written_stream_is_read_back(tmp_path):
    events = load_events(write(tmp_path / "e.npy", stream()))
    assert events["x"].tolist() == list(range(20)) and events["p"].dtype == np.uint8


class Payload:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("content", [Payload(), {"x": Payload()}, {"x": [Payload()]}])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="system"):
        load_events(write(tmp_path / "e.npy", content))
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p": np.arange(20) % 3 - 1}, r"polarity holds \[-1, 0, 1\]"),
        ({"p": np.arange(20) % 2 - 1}, r"polarity holds \[-1, 0\]"),
        ({"t": np.arange(20) * 10_000}, "spans 190.0 ms.*--event_window_ms"),
        ({"t": np.arange(20) / 1000}, "look like seconds"),
        ({"x": np.full(20, -3)}, "20 of 20 events lie outside"),
        ({"x": np.full(20, 10**6)}, "coordinates"),
        ({"x": np.arange(19)}, "equally long"),
        ({"t": np.full(20, np.nan)}, "non-finite"),
        ({"x": np.array(["a"] * 20)}, "must be numbers"),
    ],
)
def test_streams_that_would_be_misread_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check_events(stream(**changes), "e.npy")


def test_an_empty_stream_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds 0 events"):
        load_events(write(tmp_path / "e.npy", stream(0)))


@pytest.mark.parametrize("content", [b"", b"\x93NUM", b"not numpy at all", b"\x93NUMPY\x01\x00"])
def test_files_other_than_npy_are_refused(tmp_path, content):
    (tmp_path / "e.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"e\.npy"):
        load_events(tmp_path / "e.npy")


def test_every_truncation_is_refused(tmp_path):
    whole = write(tmp_path / "e.npy", stream()).read_bytes()
    for size in range(0, len(whole) - 1, 37):
        (tmp_path / "cut.npy").write_bytes(whole[:size])
        with pytest.raises(UserError):
            load_events(tmp_path / "cut.npy")


def test_other_contents_are_named(tmp_path):
    np.save(tmp_path / "plain.npy", np.zeros((3, 5)))
    with pytest.raises(UserError, match=r"float64 with shape \(3, 5\)"):
        load_events(tmp_path / "plain.npy")
    with pytest.raises(UserError, match="wanted a dict"):
        load_events(write(tmp_path / "e.npy", {"x": np.arange(9)}))
    with pytest.raises(UserError, match="no event file"):
        load_events(tmp_path / "absent.npy")


def test_old_numpy_module_names_are_understood(tmp_path):
    stream_bytes = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream_bytes, {"descr": "|O", "fortran_order": False, "shape": ()})
    pickled = pickle.dumps(np.array(stream(), dtype=object), protocol=2).replace(b"numpy._core.", b"numpy.core.")
    (tmp_path / "old.npy").write_bytes(stream_bytes.getvalue() + pickled)
    assert len(load_events(tmp_path / "old.npy")["t"]) == 20
