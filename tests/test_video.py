"""Frames: exactly those wanted, from whatever container."""

from __future__ import annotations

import av
import numpy as np
import pytest
from conftest import SHARED, needs
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from feature_alignment.console import UserError
from feature_alignment.inputs.video import clip_pixels, read_frames, sample_indices


def numbered(i: int, size: int = 64) -> np.ndarray:
    """A frame that carries its number in eight big black or white blocks."""
    bits = np.array([(i >> b) & 1 for b in range(16)]).reshape(4, 4) * 255
    return np.kron(bits, np.ones((size // 4, size // 4))).astype(np.uint8)[..., None].repeat(3, 2)


def number_of(frame: np.ndarray) -> int:
    step = frame.shape[0] // 4
    bits = frame[step // 2 :: step, step // 2 :: step, 0].reshape(-1) > 127
    return sum(int(bit) << b for b, bit in enumerate(bits))


def write_video(path, codec, frames, pts=None):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for k, i in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(numbered(i), format="rgb24")
            if pts is not None:
                frame.pts = pts[k]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(("codec", "suffix"), [("libx264", "mp4"), ("mpeg4", "mp4"), ("libx264", "mkv"), ("libvpx-vp9", "webm")])
def test_the_eight_frames_are_the_ones_wanted(tmp_path, codec, suffix):
    write_video(tmp_path / f"v.{suffix}", codec, range(300))
    frames = read_frames(tmp_path / f"v.{suffix}")
    assert [number_of(f) for f in frames] == [0, 42, 85, 128, 170, 213, 256, 299] == sample_indices(300)


def test_a_variable_frame_rate_changes_nothing(tmp_path):
    pts = np.cumsum(np.random.default_rng(0).integers(1, 9, 90)).tolist()
    write_video(tmp_path / "v.mp4", "libx264", range(90), pts)
    assert [number_of(f) for f in read_frames(tmp_path / "v.mp4")] == sample_indices(90)


def write_gif(path, frames):
    images = [Image.fromarray(numbered(i)) for i in range(frames)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=[40 + 10 * (i % 3) for i in range(frames)])


def test_a_gif_of_uneven_delays(tmp_path):
    write_gif(tmp_path / "v.gif", 40)
    assert [number_of(f) for f in read_frames(tmp_path / "v.gif")] == sample_indices(40)


@pytest.mark.parametrize(("codec", "pts"), [("libx264", None), ("mpeg4", None), ("libx264", "uneven")])
def test_every_frame_of_a_long_video_is_exact(tmp_path, codec, pts):
    pts = pts and np.cumsum(np.random.default_rng(0).integers(1, 9, 300)).tolist()
    write_video(tmp_path / "v.mp4", codec, range(300), pts)
    assert [number_of(f) for f in read_frames(tmp_path / "v.mp4", 300)] == list(range(300))


def test_arange_takes_the_model_cards_frames(tmp_path):
    assert sample_indices(300, sampling="arange") == [0, 37, 75, 112, 150, 187, 225, 262]
    for n in range(1, 400):  # the model card's own expression, which can give a ninth number from rounding
        assert sample_indices(n, sampling="arange") == np.arange(0, n, n / 8).astype(int).tolist()[:8]
    write_video(tmp_path / "v.mp4", "libx264", range(90))
    assert [number_of(f) for f in read_frames(tmp_path / "v.mp4", sampling="arange")] == sample_indices(90, sampling="arange")


def test_fewer_frames_than_wanted_are_repeated_and_said(tmp_path, caplog):
    write_video(tmp_path / "v.mp4", "libx264", range(5))
    assert [number_of(f) for f in read_frames(tmp_path / "v.mp4")] == [0, 0, 1, 1, 2, 2, 3, 4]
    assert "has 5 frames where 8 are wanted" in caplog.text


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "gif"])
def test_a_cut_video_is_refused(tmp_path, suffix):
    whole = tmp_path / f"v.{suffix}"
    if suffix == "gif":
        write_gif(whole, 40)
    else:
        write_video(whole, "libvpx-vp9" if suffix == "webm" else "libx264", range(120))
    for part in (0.5, 0.8):
        (tmp_path / f"cut.{suffix}").write_bytes(whole.read_bytes()[: int(whole.stat().st_size * part)])
        with pytest.raises(UserError, match=rf"cut\.{suffix}"):
            read_frames(tmp_path / f"cut.{suffix}")


def test_a_folder_of_images_is_sorted_by_number(tmp_path):
    for i in range(12):
        Image.fromarray(numbered(i)).save(tmp_path / f"{i}.png")
    assert [number_of(f) for f in read_frames(tmp_path)] == sample_indices(12)


@needs(SHARED)
def test_a_real_gif():
    assert read_frames(SHARED / "video" / "dadao_slomo.gif").shape == (8, 480, 640, 3)


def test_bad_videos_are_refused(tmp_path):
    with pytest.raises(UserError, match="no video at"):
        read_frames(tmp_path / "absent.mp4")
    (tmp_path / "junk.mp4").write_bytes(b"junk" * 100)
    with pytest.raises(UserError, match="could not be decoded"):
        read_frames(tmp_path / "junk.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images"):
        read_frames(tmp_path / "empty")
    write_video(tmp_path / "v.mp4", "libx264", range(60))
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "v.mp4").read_bytes()[:-400])
    with pytest.raises(UserError, match=r"cut\.mp4"):
        read_frames(tmp_path / "cut.mp4")


@pytest.mark.parametrize("hw", [(480, 640), (640, 480), (72, 72), (101, 300), (337, 336), (30, 41)])
@pytest.mark.parametrize("settings", [{}, {"size": 336, "crop_size": 336}, {"size": 90, "crop_size": 72}, {"image_mean": [0.9] * 3}])
@pytest.mark.parametrize("unusual", [{}, {"do_center_crop": False, "size": {"height": 50, "width": 60}}, {"size": 40, "crop_size": 60}])
def test_pixels_are_the_processors_own(hw, settings, unusual):
    processor = CLIPImageProcessorPil(**{**settings, **unusual})
    images = np.random.default_rng(0).integers(0, 256, (2, *hw, 3), dtype=np.uint8)
    wanted = np.stack(processor([Image.fromarray(i) for i in images], return_tensors="np")["pixel_values"])
    got = clip_pixels(images, processor)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, wanted)
