"""Simulated events: against a scalar loop, and by what must hold for any scene."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SHARED, needs

from feature_alignment.cli.console import UserError
from feature_alignment.demo import cameras, scenes, world
from feature_alignment.inputs.events import load_events
from feature_alignment.inputs.simulate import read_log_intensity, simulate_events


def scene(seed=0, n=12, h=14, w=18):
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.normal(0, 0.3, (n, h, w)), 0), np.cumsum(rng.integers(500, 3000, n))


def literal(log_intensity, times, contrast):
    """One pixel, one crossing after the other."""
    out = []
    for y in range(log_intensity.shape[1]):
        for x in range(log_intensity.shape[2]):
            level = float(log_intensity[0, y, x])
            for i in range(1, len(times)):
                a, b = float(log_intensity[i - 1, y, x]), float(log_intensity[i, y, x])
                start, sign, k = level, (1 if b > level else -1), 1
                while abs(b - start) / contrast >= k:
                    level = start + sign * k * contrast
                    fraction = min(max((level - a) / ((b - a) or 1), 0.0), 1.0)
                    out.append((round(float(times[i - 1] + fraction * (times[i] - times[i - 1]))), x, y, int(sign > 0)))
                    k += 1
    return sorted(out)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("contrast", [0.15, 0.4])
def test_equals_the_scalar_loop(seed, contrast):
    log_intensity, times = scene(seed)
    e = simulate_events(log_intensity, times, contrast)
    assert sorted(zip(*(e[k].tolist() for k in "txyp"), strict=True)) == literal(log_intensity, times, contrast)
    assert (np.diff(e["t"]) >= 0).all() and len(e["t"]) > 500


def test_a_static_scene_gives_none():
    log_intensity, times = scene()
    assert len(simulate_events(np.repeat(log_intensity[:1], 12, 0), times)["t"]) == 0


def test_half_the_threshold_gives_twice_the_events():
    ramp = np.linspace(0, 4.001, 9)[:, None, None] * np.ones((1, 5, 5))
    counts = [len(simulate_events(ramp, np.arange(9) * 1000, c)["t"]) for c in (0.4, 0.2, 0.1)]
    assert counts == [25 * 10, 25 * 20, 25 * 40]


def test_a_constant_brightness_factor_changes_nothing():
    log_intensity, times = scene()
    one, other = simulate_events(log_intensity, times), simulate_events(log_intensity + 2.0, times)
    assert abs(len(one["t"]) - len(other["t"])) <= 2  # a constant factor is a constant in the logarithm, up to rounding


def test_time_reversal_swaps_the_polarities():
    """Totals swap up to the residual below one threshold per pixel and turning point; on a monotone scene up to one per pixel."""
    ramp = np.cumsum(np.abs(scene()[0]), 0)
    times = np.arange(12) * 1000
    on, off = (simulate_events(r, times) for r in (ramp, ramp[::-1]))
    assert on["p"].all() and not off["p"].any()
    assert abs(len(on["t"]) - len(off["t"])) <= ramp[0].size


def test_the_committed_scenes_are_reproduced(tmp_path):
    """The synthetic camera shares the crossing equation: the stream kept in git holds the same events at every pixel. Their times may
    differ by the last microsecond, and so may the order of events at one time: processors round a logarithm differently."""
    seed = scenes.SPLITS["test"][0]
    made = cameras.events(cameras.render(world.scene(seed)), seed)
    kept = load_events(ROOT / "data" / "demo" / "events" / "test-0000.npy")
    by_pixel = [{k: e[k][np.lexsort((e["t"], e["x"], e["y"]))].astype(np.int64) for k in "xytp"} for e in (made, kept)]
    for key in "xyp":
        np.testing.assert_array_equal(by_pixel[0][key], by_pixel[1][key])
    assert np.abs(by_pixel[0]["t"] - by_pixel[1]["t"]).max() <= 1


def command(*argv):
    return subprocess.run(
        [sys.executable, "-m", "feature_alignment.inputs.simulate", *map(str, argv)], cwd=ROOT, capture_output=True, text=True, check=False
    )


@needs(SHARED)
def test_a_real_slow_motion_clip(tmp_path):
    done = command(SHARED / "video" / "dadao_slomo.gif", tmp_path / "e.npy", "--duration_ms", "160")
    assert done.returncode == 0, done.stderr
    events = load_events(tmp_path / "e.npy", 99)
    assert len(events["t"]) > 1000 and events["x"].max() < 640 and events["y"].max() < 480 and len(set(events["p"])) == 2


def test_invalid_input_is_refused(tmp_path):
    from test_video import write_video

    write_video(tmp_path / "still.mp4", "libx264", [3] * 10)
    done = command(tmp_path / "still.mp4", tmp_path / "e.npy")
    assert done.returncode == 2 and "no pixel changed" in done.stderr and not (tmp_path / "e.npy").exists()
    write_video(tmp_path / "v.mp4", "libx264", range(10))
    done = command(tmp_path / "v.mp4", tmp_path / "e.npz")
    assert done.returncode == 2 and "ends in .npy" in done.stderr
    with pytest.raises(UserError, match="1 frames in the window"):
        read_log_intensity(tmp_path / "v.mp4", 0, 10)
    with pytest.raises(UserError, match="no video at"):
        read_log_intensity(tmp_path / "absent.mp4")
    (tmp_path / "junk.mp4").write_bytes(b"junk" * 99)
    with pytest.raises(UserError, match="could not be decoded"):
        read_log_intensity(tmp_path / "junk.mp4")


def test_the_default_contrast_is_a_fifth_in_natural_logarithm():
    ramp = np.linspace(0, 1.01, 3)[:, None, None] * np.ones((1, 1, 1))
    assert len(simulate_events(ramp, np.arange(3) * 1000)["t"]) == 5


def lossless_video(path, levels, per_second=100):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=per_second)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "gray"
        for level in levels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((16, 16), level, np.uint8), format="gray")))
        container.mux(stream.encode())


def test_a_video_is_read_as_the_logarithm_of_its_brightness(tmp_path):
    """0 to 255 is 0 to 1, and black is a thousandth above nothing; times count from the first frame; the window has both its ends."""
    levels = [0, 51, 128, 255, 254]
    lossless_video(tmp_path / "v.mkv", levels)
    logs, times = read_log_intensity(tmp_path / "v.mkv")
    assert times.tolist() == [0, 10_000, 20_000, 30_000, 40_000]
    np.testing.assert_allclose(logs[:, 0, 0], np.log(np.array(levels) / 255 + 0.001), rtol=1e-5, atol=1e-6)
    assert read_log_intensity(tmp_path / "v.mkv", 10.0, 20.0)[1].tolist() == [10_000, 20_000, 30_000]
    assert read_log_intensity(tmp_path / "v.mkv", 20.0)[1].tolist() == [20_000, 30_000, 40_000]
    with pytest.raises(UserError, match="1 frames in the window"):
        read_log_intensity(tmp_path / "v.mkv", 35.0)


def test_invalid_sequences_are_refused():
    log_intensity, times = scene(n=3)
    for images, when, contrast in (
        (log_intensity, times[:2], 0.2),
        (log_intensity, times[[0, 1, 1]], 0.2),
        (log_intensity, times, 0.0),
        (log_intensity, times, float("nan")),
    ):
        with pytest.raises(ValueError, match="wanted ascending times"):
            simulate_events(images, when, contrast)
    one = simulate_events(log_intensity[:1], times[:1])
    assert {k: (len(v), str(v.dtype)) for k, v in one.items()} == {
        "x": (0, "uint16"),
        "y": (0, "uint16"),
        "t": (0, "int64"),
        "p": (0, "uint8"),
    }


def test_the_command_writes_the_window_it_was_asked_for(tmp_path):
    lossless_video(tmp_path / "v.mkv", [10, 250, 10, 250, 10])
    done = command(tmp_path / "v.mkv", tmp_path / "new" / "er" / "e.npy", "--start_ms", "10", "--duration_ms", "20", "--contrast", "0.5")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    steps = int((np.log(250 / 255 + 0.001) - np.log(10 / 255 + 0.001)) / 0.5)
    assert said["frames"] == 3 and said["span_ms"] == 20.0 and said["events"] == 2 * steps * 16 * 16
    assert len(load_events(tmp_path / "new" / "er" / "e.npy")["t"]) == said["events"]
    assert [p.name for p in (tmp_path / "new" / "er").iterdir()] == ["e.npy"]
    for contrast in ("0", "-1", "nan"):
        done = command(tmp_path / "v.mkv", tmp_path / "f.npy", "--contrast", contrast)
        assert done.returncode == 2 and "--contrast" in done.stderr and not (tmp_path / "f.npy").exists()


def test_simultaneous_events_come_in_pixel_order():
    ramp = np.linspace(0, 0.65, 2)[:, None, None] * np.ones((1, 20, 20))
    e = simulate_events(ramp, np.array([0, 900]))
    assert len(e["t"]) == 3 * 400 and len(set(e["t"].tolist())) == 3
    for begin in (0, 400, 800):
        assert list(zip(e["y"][begin : begin + 400].tolist(), e["x"][begin : begin + 400].tolist(), strict=True)) == sorted(
            (y, x) for y in range(20) for x in range(20)
        )


def test_events_of_a_turned_video_are_upright(tmp_path):
    from test_video import MATRICES, set_matrix, upright_picture, write_pictures

    from feature_alignment.inputs.simulate import read_log_intensity

    numbers, stored = MATRICES["rotated by 90"]
    write_pictures(tmp_path / "v.mp4", stored(upright_picture()))
    set_matrix(tmp_path / "v.mp4", numbers)
    assert read_log_intensity(tmp_path / "v.mp4")[0].shape == (10, 48, 64)
