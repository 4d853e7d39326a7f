"""Read frames from still images: a folder or zip of images, one image, a multi-page file; upright, 8 bits per color."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from feature_alignment.cli.console import UserError, record_repair

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM")  # regardless of the suffix; some other formats of Pillow start programs
MAX_PIXELS = 1 << 25  # of a frame: 8K
_MAX_MEMBER = 1 << 27  # bytes of one image in a zip
_ORIENTATION, _BITS_PER_SAMPLE, _SAMPLE_FORMAT, _PHOTOMETRIC = 0x0112, 258, 339, 262  # tags of Exif and TIFF
_WHITE_IS_ZERO = 0


class Orientation(NamedTuple):
    """How stored pixels become an upright image: transpose first, then flip."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Turn pixels [h, w, ...] upright; returns [h, w, ...] or, transposed, [w, h, ...]."""
        if self.transpose:
            pixels = pixels.swapaxes(0, 1)
        if self.flip_rows:
            pixels = pixels[::-1]
        if self.flip_columns:
            pixels = pixels[:, ::-1]
        return np.ascontiguousarray(pixels)


UPRIGHT = Orientation()
_EXIF_ORIENTATIONS = {  # Exif's orientation 2 to 8
    2: Orientation(flip_columns=True),
    3: Orientation(flip_rows=True, flip_columns=True),
    4: Orientation(flip_rows=True),
    5: Orientation(transpose=True),
    6: Orientation(transpose=True, flip_columns=True),
    7: Orientation(transpose=True, flip_rows=True, flip_columns=True),
    8: Orientation(transpose=True, flip_rows=True),
}


@dataclass(frozen=True)
class ImageSequence:
    """Frames stored as images. `read(i)` returns frame i as [h, w, 3] uint8, or float32 that `to_8_bits` has to scale."""

    count: int
    read: Callable[[int], np.ndarray]


def open_images(path: Path) -> ImageSequence | None:
    """The images of a folder, zip or image file in the order of the numbers in their names; None for other files.

    Raises:
        UserError: For a folder or a zip without images, or a damaged file.
    """
    if path.is_dir():
        files = sorted_by_number([f for f in path.iterdir() if _is_frame(f) and f.is_file()], path)
        if not files:
            raise UserError(f"no images ({', '.join(IMAGE_SUFFIXES)}) in {path}.")
        return ImageSequence(len(files), lambda i: _read_image(files[i], files[i]))
    if path.suffix.lower() == ".zip":
        return _open_zip(path)
    if path.suffix.lower() in IMAGE_SUFFIXES and not _is_animated_png(path):
        pages = _count_pages(path)
        return ImageSequence(pages, lambda i: _read_image(path, path, page=i))
    return None


def _is_frame(name: Path | PurePosixPath) -> bool:
    """Whether a file is a frame. Hidden files are not: macOS adds `._name` (AppleDouble) files on foreign disks and in zips."""
    return name.suffix.lower() in IMAGE_SUFFIXES and not name.name.startswith(".")


def _open_zip(path: Path) -> ImageSequence:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {PurePosixPath(m.filename): m for m in archive.infolist() if not m.is_dir()}
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"{path} could not be read as a zip: {str(error)[:200]}") from None
    names = [n for n in members if _is_frame(n) and not any(p.startswith(".") or p == "__MACOSX" for p in n.parts[:-1])]
    folders = sorted({str(n.parent) for n in names})
    if len(folders) != 1:
        found = f"images in {len(folders)} folders ({', '.join(folders[:3])}, …)" if folders else "no images"
        raise UserError(f"{path} holds {found}; wanted the frames of one clip, images ({', '.join(IMAGE_SUFFIXES)}) in one folder.")
    names = sorted_by_number(names, path)

    def read(i: int) -> np.ndarray:
        member = members[names[i]]
        where = f"{path}: {member.filename}"
        if member.file_size > _MAX_MEMBER:
            raise UserError(f"{where} takes {member.file_size:,} bytes; at most {_MAX_MEMBER:,} are read.")
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
                content = stream.read(_MAX_MEMBER)
        except Exception as error:  # passwords, unknown compression and wrong checksums raise different errors
            raise UserError(f"{where} could not be read: {str(error)[:200]}") from None
        return _read_image(io.BytesIO(content), where)

    return ImageSequence(len(names), read)


def _is_animated_png(path: Path) -> bool:
    """Whether a PNG is animated (`acTL` before the first pixels), which FFmpeg reads."""
    with path.open("rb") as stream:
        head = stream.read(1 << 16)
    return head.startswith(b"\x89PNG") and b"acTL" in head.split(b"IDAT")[0]


def _count_pages(path: Path) -> int:
    try:
        with Image.open(path, formats=_FORMATS) as image:
            refuse_large(path, image)
            return int(getattr(image, "n_frames", 1)) if image.format in ("TIFF", "WEBP") else 1
    except UserError:
        raise
    except Exception as error:  # Pillow raises many different errors
        raise _unreadable(path, error) from None


def _read_image(file: Any, name: Any, page: int = 0) -> np.ndarray:
    """One page of an image file that Pillow can open, upright; `name` is for messages."""
    try:
        with Image.open(file, formats=_FORMATS) as image:
            refuse_large(name, image)
            if page:
                image.seek(page)
                refuse_large(name, image)
            image.load()  # this already turns a TIFF upright and removes its orientation
            return exif_orientation(image).apply(_pixels(image, name))
    except UserError:
        raise
    except Exception as error:  # Pillow raises many different errors
        raise _unreadable(name, error) from None


def _unreadable(name: Any, error: Exception) -> UserError:
    return UserError(f"{name} could not be read as an image ({', '.join(_FORMATS)}): {str(error)[:200]}")


def exif_orientation(image: Image.Image) -> Orientation:
    """The orientation stated by an image's Exif or XMP data."""
    try:
        return _EXIF_ORIENTATIONS.get(image.getexif().get(_ORIENTATION, 1), UPRIGHT)
    except Exception:  # unreadable Exif data count as none
        return UPRIGHT


def _pixels(image: Image.Image, name: Any) -> np.ndarray:
    """Pixels [h, w, 3] uint8; float32 for floating-point images, whose range depends on the whole clip."""
    if image.mode == "F":
        values = np.asarray(image, np.float32)
        if not np.isfinite(values).all() or values.min() < 0:
            raise UserError(f"{name} holds values below 0 or values that are not finite; wanted 0 to 1 or 0 to 255.")
        return np.repeat(values[..., None], 3, axis=2)
    if image.mode == "I" or image.mode.startswith("I;"):
        values, largest = np.asarray(image), _largest_value(image)
        if largest >= 1 << 31:
            values = values.view(np.uint32)
        if values.min() < 0:
            raise UserError(f"{name} holds values below 0; wanted 0 to {largest:,}.")
        if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts images of up to 8 bits only
            values = (largest - values.astype(np.int64)).astype(values.dtype)
        return np.repeat(np.rint(values * (255.0 / largest)).astype(np.uint8)[..., None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def _largest_value(image: Image.Image) -> int:
    """The value of white in an image of more than 8 bits. Pillow widens 9 to 15 bits of PPM to 16, but not those of TIFF."""
    tags = getattr(image, "tag_v2", {})
    bits = int(tags.get(_BITS_PER_SAMPLE, (16,))[0])
    signed = bool(tags.get(_SAMPLE_FORMAT, (1,))[0] == 2)
    return (1 << (bits - signed)) - 1


def to_8_bits(images: Sequence[np.ndarray], path: Path) -> list[np.ndarray]:
    """Convert the floating-point images of a clip: 0 to 1, or 0 to 255 if any value of the clip exceeds 1.

    Args:
        images: [h, w, 3] uint8 or float32 each.
        path: For messages.

    Returns:
        [h, w, 3] uint8 each.

    Raises:
        UserError: For values above 255.
    """
    floats = [i for i in images if i.dtype == np.float32]
    if not floats:
        return list(images)
    largest = max(float(i.max()) for i in floats)
    if largest > 255:
        raise UserError(f"{path}: floating-point values up to {largest:g}; wanted 0 to 1 or 0 to 255. Save its images with 8 or 16 bits.")
    scale = 255.0 if largest <= 1 else 1.0
    record_repair(path, "floating-point images scaled", f"holds floating-point values up to {largest:g}, read as 0 to {255 / scale:g}.")
    return [np.rint(i * scale).astype(np.uint8) if i.dtype == np.float32 else i for i in images]


def refuse_large(name: Any, picture: Any) -> None:
    """Refuse frames of too many pixels before memory is allocated for them.

    Args:
        name: For messages.
        picture: Object with `width` and `height`.

    Raises:
        UserError: If it has more than MAX_PIXELS.
    """
    if (picture.width or 0) * (picture.height or 0) > MAX_PIXELS:
        raise UserError(f"{name}: frames of {picture.width} x {picture.height} pixels; at most {MAX_PIXELS:,} pixels are read.")


# ---- the order of numbered files

_RUN = r"\d+(?:\.\d+)*"
_SIGN = r"(?:(?<![^\W_])(?<![.)\]])[-+])?"  # a hyphen after a letter or a digit separates: frame-1, 2024-01-05
_EXPONENT = r"(?:[eE][-+]?\d{1,4}(?![^\W_]))?"  # a longer one is part of a hash
_GRAMMARS = (  # patterns of a number, tried in this order
    re.compile(rf"{_SIGN}(?<![^\W\d_]){_RUN}{_EXPONENT}|{_SIGN}{_RUN}"),  # -1, 2.5, 1e3; in s1e2 the e is a letter
    re.compile(r"\d+"),
    re.compile(rf"{_SIGN}{_RUN}{_EXPONENT}"),  # frame1e3, next to frame999
)


def sorted_by_number(files: Sequence[Any], where: Path) -> list[Any]:
    """Sort paths by the numbers in their names: whole, padded or not, negative, decimal, with an exponent.

    The first pattern is used under which all names have the same text around their numbers and no two names the same numbers. If there is
    none, names are sorted by text and numbers, and the repair is recorded.

    Args:
        files: Paths with a `stem`.
        where: Folder or zip, for messages.
    """
    stems = {f: f.stem for f in files}
    for grammar in _GRAMMARS:
        keys = {f: _numbers(stem, grammar) for f, stem in stems.items()}
        same_text = len({text for text, _ in keys.values()}) == 1
        if same_text and len({numbers for _, numbers in keys.values()}) == len(set(stems.values())):
            return sorted(files, key=lambda f: (keys[f][1], f.name))
    if files:
        record_repair(where, "names without one pattern", "its images' names do not share one pattern; sorted by their text and numbers.")
    return sorted(files, key=lambda f: (_text_and_numbers(stems[f]), f.name))


def _numbers(stem: str, grammar: re.Pattern[str]) -> tuple[str, tuple[Decimal, ...]]:
    """The text around the numbers of a name, and the numbers."""
    return grammar.sub("#", stem), tuple(n for found in grammar.finditer(stem) for n in _values(found[0]))


def _values(run: str) -> list[Decimal]:
    """The numbers of a match; one with several dots (10.30.15) is several numbers."""
    return [Decimal(part) for part in (re.findall(r"\d+", run) if run.count(".") > 1 else [run])]


def _text_and_numbers(stem: str) -> list[str | Decimal]:
    """Sort key of alternating text and numbers, so that text is compared with text and numbers with numbers."""
    parts: list[str | Decimal] = []
    end = 0
    for found in _GRAMMARS[0].finditer(stem):
        for text, number in zip_longest([stem[end : found.start()]], _values(found[0]), fillvalue=""):
            parts += [text, number]
        end = found.end()
    return [*parts, stem[end:]]
