"""Frames in, CLIP-ready pixels out, without torchvision."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from feature_alignment.console import UserError, mended

NUM_FRAMES = 8
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # whatever the suffix says: Pillow knows others that start programs
MAX_PIXELS = 1 << 25  # of a frame: 8K
_SMALL = 1 << 18  # bytes of an image that is resized sooner than threads are made
# Containers that hold their frames themselves. FFmpeg also knows playlists, which make it open other files and addresses.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,mpeg,mpegts,mpegvideo,asf,flv,ogg,ivf,h264,hevc,m4v,mxf,nut,dv"
_OPEN_SAFELY = {"protocol_whitelist": "file", "format_whitelist": _CONTAINERS}


def sample_indices(num_frames: int, wanted: int = NUM_FRAMES, sampling: str = "linspace") -> list[int]:
    """Evenly spaced frame numbers; repeats frames where there are fewer than wanted.

    sampling: `linspace` includes first and last, as Video-LLaVA was trained; `arange` never takes the last, as its model card shows
    """
    if sampling == "arange":
        return np.arange(0, num_frames, num_frames / wanted).astype(int)[:wanted].tolist()
    return np.linspace(0, num_frames - 1, wanted, dtype=int).tolist()


def read_frames(path: str | Path, wanted: int = NUM_FRAMES, sampling: str = "linspace") -> np.ndarray:
    """Evenly spaced frames of a video file (anything FFmpeg reads, gif included) or a folder of images.

    sampling: see `sample_indices`
    returns:  [wanted, h, w, 3] uint8 RGB; frame-exact, because every frame up to the last one wanted is decoded in order. A clip
              with fewer frames repeats some of them and says so in the log
    raises:   UserError for a missing or damaged file, or one without frames
    """
    path = Path(path)
    if path.is_dir():
        files = sorted((f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES), key=lambda f: (len(f.stem), f.stem))
        if not files:
            raise UserError(f"no images ({', '.join(IMAGE_SUFFIXES)}) in {path}.")
        _say_if_few(path, len(files), wanted)
        return _stack([_read_image(files[i]) for i in sample_indices(len(files), wanted, sampling)], path)
    if not path.is_file():
        raise UserError(f"no video at {path}; --video wants a video file or a folder of frames.")
    import av  # 0.2 s, not needed for --help

    try:
        with av.open(str(path), options=_OPEN_SAFELY) as container:
            if not container.streams.video:
                raise UserError(f"{path} has no video stream.")
            _refuse_large(path, container.streams.video[0])
            times, end_s = [], 0.0
            for packet in container.demux():
                if packet.pts is not None:
                    end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                    if packet.stream.index == container.streams.video[0].index:
                        times.append(packet.pts)
            _refuse_cut(path, container, end_s)
        if not times:
            raise UserError(f"{path} has no frames.")
        _say_if_few(path, len(times), wanted)
        times.sort()
        keep = [times[i] for i in sample_indices(len(times), wanted, sampling)]
        found: dict[int, np.ndarray] = {}
        to_rgb = av.video.reformatter.VideoReformatter()  # one for all frames: it is slower to make than to use
        with av.open(str(path), options=_OPEN_SAFELY) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for frame in container.decode(video=0):
                _refuse_large(path, frame)
                if frame.pts in keep:
                    found[frame.pts] = to_rgb.reformat(frame, format="rgb24").to_ndarray()
                if len(found) == len(set(keep)):
                    break
    except (av.error.FFmpegError, MemoryError, ValueError, OverflowError) as error:
        raise UserError(f"{path} could not be decoded: {str(error)[:200]}") from None
    missing = [t for t in keep if t not in found]
    if missing:
        raise UserError(f"{path} is damaged: {len(set(missing))} of {len(set(keep))} wanted frames could not be decoded.")
    return _stack([found[t] for t in keep], path)


def _read_image(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=_IMAGE_FORMATS) as image:
            _refuse_large(path, image)
            return np.asarray(image.convert("RGB"))
    except UserError:
        raise
    except Exception as error:  # Pillow's formats raise errors of every kind
        raise UserError(f"{path} could not be read as an image ({', '.join(_IMAGE_FORMATS)}): {str(error)[:200]}") from None


def _refuse_large(path: Path, picture: Any) -> None:
    """picture: anything with a width and a height, looked at before its pixels take memory"""
    if (picture.width or 0) * (picture.height or 0) > MAX_PIXELS:
        raise UserError(f"{path}: frames of {picture.width} x {picture.height} pixels; at most {MAX_PIXELS:,} pixels are read.")


def _stack(images: list[np.ndarray], path: Path) -> np.ndarray:
    if len({image.shape for image in images}) > 1:
        raise UserError(f"{path}: its frames differ in size ({sorted({i.shape[:2] for i in images})}); wanted one size.")
    return np.stack(images)


def _refuse_cut(path: Path, container, end_s: float) -> None:
    """mp4 lists its frames up front, so a cut one fails to decode. Matroska and gif just end; only these two marks tell."""
    stated_s = (container.duration or 0) / 1e6
    if "matroska" in container.format.name and stated_s and end_s < 0.95 * stated_s:
        raise UserError(f"{path} is cut off: its header promises {stated_s:.2f} s, its frames end at {end_s:.2f} s.")
    if container.format.name == "gif" and not path.read_bytes().rstrip(b"\0").endswith(b";"):
        raise UserError(f"{path} is cut off: a gif ends with a `;`, this one does not.")


def _say_if_few(path: Path, num_frames: int, wanted: int) -> None:
    if num_frames < wanted:
        mended(path, "frames repeated", f"has {num_frames} frames where {wanted} are wanted; some are repeated.")


def clip_pixels(images: Sequence[np.ndarray], processor) -> np.ndarray:
    """Resize, centre-crop and normalise RGB images as the checkpoint's own preprocessor_config says.

    images:  [h, w, 3] uint8 each
    returns: [n, 3, crop, crop] float32

    For CLIP's usual settings this is the processor's own arithmetic without its detours, bit for bit: a test holds it to that.
    """
    p = processor
    short, crop = p.size.get("shortest_edge"), p.crop_size["height"]
    usual = p.do_resize and p.do_center_crop and p.do_rescale and p.do_normalize and p.crop_size["width"] == crop
    if not (usual and short and short >= crop):
        return np.stack(p([Image.fromarray(i) for i in images], return_tensors="np")["pixel_values"]).astype(np.float32)
    table, pixels = _levels(p), np.empty((len(images), 3, crop, crop), np.float32)

    def size(n: int) -> tuple[int, int]:
        h, w = images[n].shape[:2]
        return (int(short * w / h), short) if h <= w else (short, int(short * h / w))

    def fill(n: int) -> None:
        w, h = size(n)
        small = _resized(Image.fromarray(images[n]), w, h, crop, p.resample)
        for c in range(3):
            np.take(table[c], small[..., c], out=pixels[n, c], mode="clip")  # "clip": unchecked, and uint8 needs no check

    import torch  # whose number of threads is `--threads`; whoever only reads frames does without it

    threads = min(len(images), torch.get_num_threads())
    if images[0].size < _SMALL or threads == 1:
        for n in range(len(images)):
            fill(n)
    else:  # Pillow lets go of Python's lock while it resizes
        for n in range(len(images)):  # known before, so that not every thread asks
            _middle_alone(images[n].shape[1], images[n].shape[0], *size(n), crop, p.resample)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, range(len(images))))
    return pixels


@functools.lru_cache(maxsize=8)
def _levels(processor) -> np.ndarray:
    """[3, 256] float32: what becomes of each of the 256 values of each colour."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    table = processor([Image.fromarray(levels)], do_resize=False, do_center_crop=False, return_tensors="np")["pixel_values"][0]
    return np.asarray(table, np.float32).reshape(3, 256)


def _resized(image: Image.Image, w: int, h: int, crop: int, resample: int) -> np.ndarray:
    """The middle [crop, crop, 3] of an image resized to w x h; no more than it is made where that gives the same."""
    if _middle_alone(*image.size, w, h, crop, resample):
        return _middle(image, w, h, crop, resample)
    top, left = (h - crop) // 2, (w - crop) // 2
    return np.asarray(image.resize((w, h), resample))[top : top + crop, left : left + crop]


def _middle(image: Image.Image, w: int, h: int, crop: int, resample: int) -> np.ndarray:
    left, top = (w - crop) // 2 * image.width / w, (h - crop) // 2 * image.height / h
    return np.asarray(image.resize((crop, crop), resample, (left, top, image.width - left, image.height - top)))


@functools.lru_cache(maxsize=64)
def _middle_alone(width: int, height: int, w: int, h: int, crop: int, resample: int) -> bool:
    """Does Pillow make the middle of a resized image alone, to the bit? Asked of it, with noise, where the edges fall between pixels:
    it chooses whether rows or columns come first, and rounds in between."""
    if (w - crop) % 2 or (h - crop) % 2 or (w - crop) * width % (2 * w) or (h - crop) * height % (2 * h):
        return False
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8))
    top, left = (h - crop) // 2, (w - crop) // 2
    whole = np.asarray(noise.resize((w, h), resample))[top : top + crop, left : left + crop]
    return np.array_equal(whole, _middle(noise, w, h, crop, resample))
