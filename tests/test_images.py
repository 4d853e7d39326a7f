"""Still images as frames: their order, their orientation, more than 8 bits, folders, zips and single images."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED, needs
from PIL import Image

from feature_alignment.cli.console import UserError
from feature_alignment.inputs.images import sorted_by_number
from feature_alignment.inputs.video import read_frames, sample_indices

CASES = SHARED / "public_cases"

# ---- order


@pytest.mark.parametrize(
    "names",
    [
        "1 02 003 10 0011",
        "frame_2 frame_2.5 frame_3 frame_10",
        "0.25 0.5 0.75 1.0 1.25 10.0",
        "0.0 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9 0.10 0.11",  # counters: as decimals two names would be equal
        "999 1e3 1001 2e3",
        "1e3 2e3 1e4",
        "frame_1e-3 frame_2e-3 frame_1e-2",
        "frame998 frame999 frame1e3 frame1001",
        "s1e2 s1e10 s2e1",
        "s01e02 s01e10 s02e01",
        "-10 -2 -1 0 1 2 10",
        "+1 +2 +10",
        "frame_-10 frame_-2 frame_0 frame_3",
        "t=-1.5 t=-0.5 t=0.5 t=1.5",
        "frame-1 frame-2 frame-10",
        "frame-0001.5 frame-0002 frame-0010.25",
        "2024-01-05 2024-01-10 2024-02-01",
        "cam_00.00.01.500 cam_00.00.02.000 cam_00.00.10.250",
        "shot.0001 shot.0002 shot.0010",
        "image_(1) image_(2) image_(10)",
        "2-of-10 3-of-10 10-of-10",
        "1636123456789012345 1636123456789012346 1636123456789012400",
        "٢ ٣ ١٠",
    ],
)
def test_numbered_frames_come_in_the_order_of_their_numbers(names):
    wanted = [Path(f"{name}.png") for name in names.split()]
    for seed in range(5):
        shuffled = random.Random(seed).sample(wanted, len(wanted))
        assert sorted_by_number(shuffled, Path("folder")) == wanted


def test_names_without_a_common_pattern_are_sorted_by_text_and_number_and_logged(caplog):
    wanted = [Path(f"{n}.png") for n in ("-3", "1", "2a", "3", "10.30.2", "10.30.15", "frame_2", "frame_2.5", "frame_10", "thumbnail")]
    assert sorted_by_number(wanted[::-1], Path("folder")) == wanted
    assert "names do not share one pattern" in caplog.text


# ---- pixels


def gray(value: int, size: tuple[int, int] = (6, 8)) -> np.ndarray:
    return np.full((*size, 3), value, np.uint8)


def shown(path: Path) -> list[int]:
    """The value of the first pixel of each of 8 frames."""
    return [int(f[0, 0, 0]) for f in read_frames(path)]


def save_deep(path: Path, kind: str, value: int) -> None:
    """An image of more than 8 bits whose every pixel is `value` of 0 to 255."""
    size = (8, 6)
    if kind == "16-bit gray png":
        Image.fromarray(np.full(size[::-1], value * 257, np.uint16)).save(path.with_suffix(".png"))
    elif kind == "16-bit gray tif":
        Image.fromarray(np.full(size[::-1], value * 257, np.uint16)).save(path.with_suffix(".tif"))
    elif kind == "big-endian 16-bit gray tif":
        image = Image.fromarray(np.full(size[::-1], value * 257, ">u2").view(np.uint16))
        Image.frombytes("I;16B", size, image.tobytes()).save(path.with_suffix(".tif"))
    elif kind == "32-bit gray tif":
        Image.fromarray(np.full(size[::-1], round(value / 255 * (2**31 - 1)), np.int32)).save(path.with_suffix(".tif"))
    elif kind == "float tif of 0 to 1":
        Image.fromarray(np.full(size[::-1], value / 255, np.float32)).save(path.with_suffix(".tif"))
    elif kind == "float tif of 0 to 255":
        Image.fromarray(np.full(size[::-1], value, np.float32)).save(path.with_suffix(".tif"))
    elif kind == "16-bit color png":
        write_png(path.with_suffix(".png"), np.full((*size[::-1], 3), value * 257, ">u2"))
    elif kind == "16-bit pgm":
        path.with_suffix(".pgm").write_bytes(b"P5 8 6 65535\n" + np.full(48, value * 257, ">u2").tobytes())
    elif kind == "10-bit pgm":
        path.with_suffix(".pgm").write_bytes(b"P5 8 6 1023\n" + np.full(48, round(value / 255 * 1023), ">u2").tobytes())
    elif kind == "12-bit color ppm":
        path.with_suffix(".ppm").write_bytes(b"P6 8 6 4095\n" + np.full(144, round(value / 255 * 4095), ">u2").tobytes())


def write_png(path: Path, pixels: np.ndarray) -> None:
    """A PNG of 16 bits per color, which Pillow does not write."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    h, w, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    "kind",
    [
        "16-bit gray png",
        "16-bit color png",
        "16-bit gray tif",
        "big-endian 16-bit gray tif",
        "32-bit gray tif",
        "float tif of 0 to 1",
        "float tif of 0 to 255",
        "16-bit pgm",
        "10-bit pgm",
        "12-bit color ppm",
    ],
)
def test_more_than_8_bits_are_scaled_not_clipped(tmp_path, kind):
    values = [0, 10, 30, 100, 128, 200, 254, 255]
    for i, value in enumerate(values):
        save_deep(tmp_path / str(i), kind, value)
    np.testing.assert_allclose(shown(tmp_path), values, atol=1)


def test_a_12_bit_tif_is_white_at_4095(tmp_path):
    packed = bytes([0xFF, 0xFF, 0xFF, 0x80, 0x08, 0x00])  # two rows of two pixels: 4095, 4095 and 2048, 2048
    write_tif(tmp_path / "a.tif", packed, bits=12, size=(2, 2))
    assert read_frames(tmp_path / "a.tif")[0, :, 0, 0].tolist() == [255, 128]


def write_tif(path: Path, pixels: bytes, bits: int, size: tuple[int, int], sample_format: int = 1) -> None:
    import struct

    tags = [
        (256, 3, size[0]), (257, 3, size[1]), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, size[1]),
        (279, 4, len(pixels)), (339, 3, sample_format),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    where = 8 + len(pixels)
    path.write_bytes(b"II*\0" + struct.pack("<I", where) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.full((6, 8), 300, np.float32), "floating-point values up to 300; wanted 0 to 1 or 0 to 255"),
        (np.full((6, 8), -0.5, np.float32), "below 0"),
        (np.full((6, 8), np.nan, np.float32), "not finite"),
        (np.full((6, 8), -1, np.int32), "below 0"),
    ],
)
def test_values_without_a_known_range_are_refused(tmp_path, content, message):
    Image.fromarray(content).save(tmp_path / "0.tif")
    with pytest.raises(UserError, match=message):
        read_frames(tmp_path)


def test_a_dark_float_frame_is_scaled_like_the_others(tmp_path):
    for i, value in enumerate([0.5, 100, 200, 250]):
        Image.fromarray(np.full((6, 8), value, np.float32)).save(tmp_path / f"{i}.tif")
    assert shown(tmp_path)[0] == 0 and shown(tmp_path)[-1] == 250


# ---- orientation

UPRIGHT = np.zeros((6, 8, 3), np.uint8)  # red above, blue on the left below
UPRIGHT[:3] = 250, 0, 0
UPRIGHT[3:, :4] = 0, 0, 250
UPRIGHT[3:, 4:] = 0, 250, 0
# How the upright picture lies in the file, per Exif orientation: where the standard says row 0 and column 0 of the file are shown
STORED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a, -1),
}


def save_turned(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {".jpg": {"quality": 95, "subsampling": 0}, ".webp": {"lossless": True}}.get(path.suffix, {})
    Image.fromarray(np.ascontiguousarray(STORED[orientation](UPRIGHT))).resize(
        [64, 48] if orientation < 5 else [48, 64], Image.Resampling.NEAREST
    ).save(path, exif=exif, **options)


def is_upright(frame: np.ndarray) -> bool:
    corners = frame[8, 8], frame[40, 8], frame[40, 56]
    return frame.shape == (48, 64, 3) and [int(c.argmax()) for c in corners] == [0, 2, 1] and all(c.max() > 200 for c in corners)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_images_are_oriented_by_their_exif_data(tmp_path, suffix, orientation):
    save_turned(tmp_path / f"0{suffix}", orientation)
    (tmp_path / "folder").mkdir()
    save_turned(tmp_path / "folder" / f"0{suffix}", orientation)
    save_turned(tmp_path / "folder" / f"1{suffix}", 1)
    with zipfile.ZipFile(tmp_path / "clip.zip", "w") as archive:
        archive.write(tmp_path / f"0{suffix}", f"clip/0{suffix}")
    for source in (tmp_path / f"0{suffix}", tmp_path / "folder", tmp_path / "clip.zip"):
        assert all(is_upright(frame) for frame in read_frames(source)), source


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_unreadable_exif_data_are_ignored(tmp_path):
    Image.fromarray(UPRIGHT).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    np.testing.assert_array_equal(read_frames(tmp_path / "a.png")[0], UPRIGHT)


# ---- sources


@pytest.mark.parametrize("suffix", [".png", ".tif", ".ppm", ".webp", ".bmp", ".PNG", ".tiff"])
def test_a_single_image_is_a_clip_of_one_frame(tmp_path, suffix, caplog):
    Image.fromarray(gray(77)).save(tmp_path / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    assert shown(tmp_path / f"a{suffix}") == [77] * 8
    assert "has 1 frames where 8 are wanted" in caplog.text


@pytest.mark.parametrize("suffix", [".tif", ".webp"])
def test_the_pages_of_an_image_are_frames(tmp_path, suffix):
    pages = [Image.fromarray(gray(10 * i)) for i in range(20)]
    pages[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=pages[1:], **({"lossless": True} if suffix == ".webp" else {}))
    assert shown(tmp_path / f"a{suffix}") == [10 * i for i in sample_indices(20)]


def test_an_animated_png_is_a_clip(tmp_path):
    pages = [Image.fromarray(gray(10 * i)) for i in range(20)]
    pages[0].save(tmp_path / "a.png", save_all=True, append_images=pages[1:])
    assert shown(tmp_path / "a.png") == [10 * i for i in sample_indices(20)]


def test_hidden_files_are_not_frames(tmp_path):
    for i in range(12):
        Image.fromarray(gray(10 * i)).save(tmp_path / f"{i}.png")
        (tmp_path / f"._{i}.png").write_bytes(b"\0\5\26\7" + bytes(80))
    (tmp_path / ".thumbnail.jpg").write_bytes(b"")
    (tmp_path / "13.png").mkdir()
    wanted = [10 * i for i in sample_indices(12)]
    assert shown(tmp_path) == wanted
    with zipfile.ZipFile(tmp_path / "clip.zip", "w") as archive:
        for file in tmp_path.glob("[0-9]*.png"):
            if file.is_file():
                archive.write(file, f"clip/{file.name}")
                archive.writestr(f"__MACOSX/clip/._{file.name}", b"\0\5\26\7" + bytes(80))
                archive.write(file, f"__MACOSX/clip/{file.name}")
        for file in tmp_path.glob(".*"):
            archive.write(file, f"clip/{file.name}")
    assert shown(tmp_path / "clip.zip") == wanted


def test_zips_without_a_clip_are_refused(tmp_path):
    def refused(names, message):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for name in names:
                archive.writestr(name, b"x" * 1000)
        with pytest.raises(UserError, match=message):
            read_frames(tmp_path / "a.zip")

    refused(["events.txt"], "holds no images")
    refused(["a/0.png", "b/0.png"], "images in 2 folders")
    refused(["a/0.png"], r"a\.zip: a/0\.png could not be read as an image")
    (tmp_path / "a.zip").write_bytes(b"PK\3\4junk")
    with pytest.raises(UserError, match="could not be read as a zip"):
        read_frames(tmp_path / "a.zip")


@needs(CASES)
def test_the_public_cases(tmp_path):
    for name in ("v6_gray16", "v7_appledouble"):
        with zipfile.ZipFile(CASES / f"{name}.zip") as archive:
            archive.extractall(tmp_path / name)
    for source in (CASES / "v6_gray16.zip", tmp_path / "v6_gray16"):
        found = set(np.unique(read_frames(source)).tolist())
        assert found == {0, 30, 40, 254}
    np.testing.assert_array_equal(read_frames(CASES / "v7_appledouble.zip"), read_frames(tmp_path / "v7_appledouble"))
    single = read_frames(CASES / "v10_single.png")
    assert single.shape[0] == 8 and (single == single[0]).all()
