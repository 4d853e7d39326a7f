"""Frames: exactly those wanted, from every container."""

from __future__ import annotations

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from conftest import SHARED, needs
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from feature_alignment.cli.console import UserError
from feature_alignment.inputs.clip_pixels import clip_pixels
from feature_alignment.inputs.video import _orientation_of, read_frames, sample_indices

CASES = SHARED / "public_cases"


def numbered(i: int, size: int = 64) -> np.ndarray:
    """A frame that carries its number in eight big black or white blocks."""
    bits = np.array([(i >> b) & 1 for b in range(16)]).reshape(4, 4) * 255
    return np.kron(bits, np.ones((size // 4, size // 4))).astype(np.uint8)[..., None].repeat(3, 2)


def number_of(frame: np.ndarray) -> int:
    step = frame.shape[0] // 4
    bits = frame[step // 2 :: step, step // 2 :: step, 0].reshape(-1) > 127
    return sum(int(bit) << b for b, bit in enumerate(bits))


def public_number(frame: np.ndarray) -> int:
    """The number of a frame of the public cases: eight blocks in a row, black or white, the lowest bit on the left."""
    return sum(int(frame[56, 14 + 14 * bit, 0] > 127) << bit for bit in range(8))


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
def test_the_eight_frames_are_evenly_spaced(tmp_path, codec, suffix):
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


def test_fewer_frames_than_wanted_are_repeated_and_logged(tmp_path, caplog):
    write_video(tmp_path / "v.mp4", "libx264", range(5))
    assert [number_of(f) for f in read_frames(tmp_path / "v.mp4")] == [0, 0, 1, 1, 2, 2, 3, 4]
    assert "has 5 frames where 8 are wanted" in caplog.text


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "gif"])
def test_a_truncated_video_is_refused(tmp_path, suffix):
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
def test_pixels_equal_those_of_the_processor(hw, settings, unusual):
    processor = CLIPImageProcessorPil(**{**settings, **unusual})
    images = np.random.default_rng(0).integers(0, 256, (2, *hw, 3), dtype=np.uint8)
    wanted = np.stack(processor([Image.fromarray(i) for i in images], return_tensors="np")["pixel_values"])
    got = clip_pixels(images, processor)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, wanted)


# ---- as a player shows it


def upright_picture() -> np.ndarray:
    """[48, 64, 3]: red above, blue below on the left, green below on the right."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24], picture[24:, :32], picture[24:, 32:] = (220, 0, 0), (0, 0, 220), (0, 220, 0)
    return picture


def is_upright(frame: np.ndarray) -> bool:
    corners = frame[8, 8], frame[40, 8], frame[40, 56]
    return frame.shape == (48, 64, 3) and [int(c.argmax()) for c in corners] == [0, 2, 1] and all(c.max() > 150 for c in corners)


def write_pictures(path, picture, codec="libx264", pix_fmt="yuv444p", frames=10, **options):
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], pix_fmt
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())


# How the stored picture is made upright, as (a, b, c, d) of QuickTime's matrix, and how the upright one was stored
MATRICES = {
    "rotated by 90": ((0, 1, -1, 0), lambda p: np.rot90(p, 1)),
    "rotated by 180": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "rotated by 270": ((0, -1, 1, 0), lambda p: np.rot90(p, -1)),
    "mirrored": ((-1, 0, 0, 1), np.fliplr),
    "upside down": ((1, 0, 0, -1), np.flipud),
    "transposed": ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
    "transposed and turned": ((0, -1, -1, 0), lambda p: np.rot90(p.swapaxes(0, 1), 2)),
    "scaled": ((0.5, 0, 0, 0.5), lambda p: p),
}


def set_matrix(path, numbers, box=b"tkhd", at=44):
    """Write a, b, c, d into the matrix of an mp4's track header (or movie header), version 0."""
    raw = bytearray(path.read_bytes())
    start = raw.index(box) + at
    a, b, c, d = (round(n * 65536) for n in numbers)
    struct.pack_into(">9i", raw, start, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(raw)


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize("name", MATRICES)
def test_a_video_is_upright_whatever_its_matrix(tmp_path, name, suffix):
    numbers, stored = MATRICES[name]
    write_pictures(tmp_path / f"v.{suffix}", stored(upright_picture()))
    set_matrix(tmp_path / f"v.{suffix}", numbers)
    assert all(is_upright(frame) for frame in read_frames(tmp_path / f"v.{suffix}"))


def test_the_matrix_of_the_whole_movie_counts_too(tmp_path):
    numbers, stored = MATRICES["rotated by 90"]
    write_pictures(tmp_path / "v.mp4", stored(upright_picture()))
    set_matrix(tmp_path / "v.mp4", numbers, b"mvhd", 40)
    assert all(is_upright(frame) for frame in read_frames(tmp_path / "v.mp4"))


def test_an_angle_that_is_not_a_quarter_turn_is_refused(tmp_path):
    write_pictures(tmp_path / "v.mp4", upright_picture())
    set_matrix(tmp_path / "v.mp4", (0.8, 0.6, -0.6, 0.8))
    with pytest.raises(UserError, match=r"turned by -?3\d degrees; wanted a multiple of 90"):
        read_frames(tmp_path / "v.mp4")


def test_a_zero_matrix_is_ignored(tmp_path):
    write_pictures(tmp_path / "v.mp4", upright_picture())
    set_matrix(tmp_path / "v.mp4", (0, 0, 0, 0))
    assert all(is_upright(frame) for frame in read_frames(tmp_path / "v.mp4"))


@pytest.mark.parametrize("name", ["rotated by 90", "rotated by 180", "rotated by 270"])
def test_a_video_with_side_data_unknown_to_pyav_is_upright(tmp_path, name):
    """PyAV then shows no side data at all, the angle only."""
    numbers, stored = MATRICES[name]
    write_pictures(tmp_path / "v.mp4", stored(upright_picture()))
    set_matrix(tmp_path / "v.mp4", numbers)

    class Frame:
        def __init__(self, frame):
            self.rotation = frame.rotation

        @property
        def side_data(self):
            raise ValueError("31 is not a valid Type")

    with av.open(str(tmp_path / "v.mp4")) as container:
        packet = next(container.demux(video=0))
    with av.open(str(tmp_path / "v.mp4")) as container:
        frame = next(container.decode(video=0))
        assert is_upright(_orientation_of(Frame(frame), packet, tmp_path / "v.mp4").apply(frame.to_ndarray(format="rgb24")))


@pytest.mark.parametrize("orientation", [2, 5, 6])
def test_an_animated_png_is_oriented_by_its_exif_data(tmp_path, orientation):
    from test_images import save_turned

    save_turned(tmp_path / "0.png", orientation)
    with Image.open(tmp_path / "0.png") as image:
        exif, other = image.getexif(), image.copy()
        other.putpixel((0, 0), (1, 2, 3))
        image.save(tmp_path / "a.png", save_all=True, append_images=[other, image.copy()], exif=exif)
    assert all(is_upright(frame) for frame in read_frames(tmp_path / "a.png"))


@pytest.mark.parametrize("orientation", [2, 3, 5, 6, 8])
def test_motion_jpeg_is_oriented_by_its_exif_data(tmp_path, orientation):
    from test_images import save_turned

    save_turned(tmp_path / "0.jpg", orientation)
    content = (tmp_path / "0.jpg").read_bytes()
    (tmp_path / "v.mjpeg").write_bytes(content * 10)
    with av.open(str(tmp_path / "v.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = *((64, 48) if orientation < 5 else (48, 64)), "yuvj444p"
        for i in range(10):
            packet = av.Packet(content)
            packet.pts = packet.dts = i
            packet.time_base, packet.stream = Fraction(1, 10), stream
            container.mux(packet)
    for name in ("v.avi", "v.mjpeg"):
        assert all(is_upright(frame) for frame in read_frames(tmp_path / name)), name


def trimmed(source, target, first):
    """A stream copy from packet `first` (a key frame) on, whose edit list starts two frames later."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        packets = [p for p in old.demux(stream) if p.size]
        start = sorted(p.pts for p in packets[first:])[2]
        for packet in packets[first:]:
            packet.pts, packet.dts = packet.pts - start, packet.dts - start
            packet.stream = copy
            new.mux(packet)


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_frames_before_the_start_of_an_edit_list_are_not_shown(tmp_path, suffix, caplog):
    write_video(tmp_path / "v.mp4", "libx264", range(40))
    trimmed(tmp_path / "v.mp4", tmp_path / f"t.{suffix}", 0)
    with av.open(str(tmp_path / f"t.{suffix}")) as container:
        assert sum(p.is_discard for p in container.demux(video=0)) == 2
    assert [number_of(f) for f in read_frames(tmp_path / f"t.{suffix}")] == [2 + i for i in sample_indices(38)]
    assert not caplog.text, "what is not to be shown is not missing"


@pytest.mark.parametrize(("codec", "name"), [("libx264", "v.h264"), ("mpeg4", "v.m4v"), ("mpeg2video", "v.m2v"), ("mjpeg", "v.mjpeg")])
def test_streams_without_time_stamps(tmp_path, codec, name):
    with av.open(str(tmp_path / name), "w", format={"v.m4v": "m4v", "v.m2v": "mpeg2video"}.get(name)) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i in range(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(i), format="rgb24")))
        container.mux(stream.encode())
    assert [number_of(f) for f in read_frames(tmp_path / name)] == sample_indices(40)


def test_frames_without_a_container(tmp_path):
    write_pictures(tmp_path / "v.y4m", upright_picture(), codec="wrapped_avframe")
    assert all(is_upright(frame) for frame in read_frames(tmp_path / "v.y4m"))


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix"),
    [
        ("libx264", "yuv420p10le", "mp4"),
        ("libx265", "yuv420p12le", "mp4"),
        ("ffv1", "gray16le", "mkv"),
        ("ffv1", "gray10le", "mkv"),
        ("ffv1", "yuv444p16le", "mkv"),
        ("png", "rgb48be", "mov"),
        ("png", "gray16be", "avi"),
    ],
)
def test_more_than_8_bits_are_scaled(tmp_path, codec, pix_fmt, suffix):
    values = [0, 30, 40, 100, 128, 200, 254, 255]
    with av.open(str(tmp_path / f"v.{suffix}"), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"x265-params": "log-level=none"} if codec == "libx265" else {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        for i, value in enumerate(values):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64), value * 257, np.uint16), format="gray16le").reformat(format=pix_fmt)
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    np.testing.assert_allclose([f[20, 20].mean() for f in read_frames(tmp_path / f"v.{suffix}")], values, atol=3)


def test_hidden_reference_frames_are_not_counted_as_missing(tmp_path, caplog):
    """VP8 stores hidden frames in separate packets. Here frame 20 is made hidden by bit 4 of its first byte."""
    with av.open(str(tmp_path / "v.ivf"), "w") as container:
        stream = container.add_stream("libvpx", rate=30, options={"b": "1M"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(90):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(i), format="rgb24")))
        container.mux(stream.encode())
    raw, at = bytearray((tmp_path / "v.ivf").read_bytes()), 32
    for _ in range(20):
        at += 12 + struct.unpack_from("<I", raw, at)[0]
    raw[at + 12] &= ~0x10
    (tmp_path / "v.ivf").write_bytes(raw)
    there = [i for i in range(90) if i != 20]
    assert [number_of(f) for f in read_frames(tmp_path / "v.ivf")] == [there[i] for i in sample_indices(89)]
    assert not caplog.text


def damage(path, packets):
    """Overwrite the bytes of some packets of a video, header and all."""
    with av.open(str(path)) as container:
        places = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    raw = bytearray(path.read_bytes())
    for i in packets:
        at, size = places[i]
        raw[at : at + size] = b"\xff" * size
    path.write_bytes(raw)


@pytest.mark.parametrize(("codec", "suffix"), [("mjpeg", "avi"), ("png", "mov")])
def test_frames_are_sampled_from_those_that_can_be_decoded(tmp_path, codec, suffix, caplog):
    with av.open(str(tmp_path / f"v.{suffix}"), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = {"mjpeg": "yuvj420p", "png": "rgb24"}[codec]
        for i in range(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(i), format="rgb24")))
        container.mux(stream.encode())
    lost = [0, 11, 20, 21, 39]
    damage(tmp_path / f"v.{suffix}", lost)
    there = [i for i in range(40) if i not in lost]
    assert [number_of(f) for f in read_frames(tmp_path / f"v.{suffix}")] == [there[i] for i in sample_indices(35)]
    assert "5 of 40 frames could not be decoded" in caplog.text
    damage(tmp_path / f"v.{suffix}", range(2, 30))
    with pytest.raises(UserError, match=r"only \d+ of its 40 frames can be decoded"):
        read_frames(tmp_path / f"v.{suffix}")


def test_a_cut_mp4_whose_index_comes_first(tmp_path, caplog):
    with av.open(str(tmp_path / "v.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(200):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(i), format="rgb24")))
        container.mux(stream.encode())
    whole = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: int(len(whole) * 0.8)])
    frames = [number_of(f) for f in read_frames(tmp_path / "cut.mp4")]
    assert frames == sorted(frames) and frames[0] == 0 and 100 < frames[-1] < 199
    assert "of 200 frames could not be decoded" in caplog.text
    (tmp_path / "cut.mp4").write_bytes(whole[: int(len(whole) * 0.7)])
    with pytest.raises(UserError, match="of its 200 frames can be decoded"):
        read_frames(tmp_path / "cut.mp4")


def test_a_cover_image_is_not_a_video(tmp_path):
    """An audio file with a cover: FFmpeg calls the cover a video stream."""
    Image.fromarray(numbered(1)).save(tmp_path / "cover.png")
    with av.open(str(tmp_path / "v.m4a"), "w", format="mp4") as container:
        picture = container.add_stream("png", rate=1)
        picture.width = picture.height = 64
        picture.pix_fmt = "rgb24"
        picture.disposition = av.stream.Disposition.attached_pic
        container.mux(picture.encode(av.VideoFrame.from_ndarray(numbered(1), format="rgb24")))
        container.mux(picture.encode())
    with pytest.raises(UserError, match="no video stream"):
        read_frames(tmp_path / "v.m4a")


@pytest.mark.parametrize("name", ["a:b.mp4", "2024-01-01T10:30:00.mp4", "http:x.mp4", "100%d.mp4", "a?b#c.mp4"])
def test_any_name_a_file_can_have(tmp_path, name, monkeypatch):
    write_video(tmp_path / name, "libx264", range(10))
    wanted = sample_indices(10)
    assert [number_of(f) for f in read_frames(tmp_path / name)] == wanted
    monkeypatch.chdir(tmp_path)
    assert [number_of(f) for f in read_frames(name)] == wanted
    (tmp_path / "frames:1").mkdir()
    Image.fromarray(numbered(3)).save(tmp_path / "frames:1" / "0:1.png")
    assert [number_of(f) for f in read_frames("frames:1")] == [3] * 8


@needs(CASES)
def test_the_public_cases():
    turned = read_frames(CASES / "v1_rotation90.mp4")
    assert turned.shape == (8, 128, 96, 3)
    stripe = np.array([200, 30, 30])
    near = lambda pixels: np.abs(pixels.astype(int) - stripe).max(-1).mean() < 60  # noqa: E731
    assert near(turned[0, :, -8:]) and not near(turned[0, :8]), "the stripe lies on top in the file, on the right when upright"
    for name, numbers in (
        ("v2_trimmed_editlist.mp4", [18, 21, 24, 27, 30, 33, 36, 39]),
        ("v4_elementary.h264", [0, 5, 11, 16, 22, 27, 33, 39]),
    ):
        assert [public_number(f) for f in read_frames(CASES / name)] == numbers
