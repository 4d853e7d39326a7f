"""Preprocess images for CLIP by a checkpoint's preprocessor_config, without torchvision."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

_SMALL = 1 << 18  # bytes of an image that is resized faster than threads start


def clip_pixels(images: Sequence[np.ndarray], processor: Any) -> np.ndarray:
    """Resize, center-crop and normalize RGB images by the checkpoint's preprocessor_config.

    For CLIP's usual settings the result equals the processor's bit for bit, which a test checks, in less time.

    Args:
        images: n images [h, w, 3] uint8.
        processor: transformers' CLIP image processor.

    Returns:
        [n, 3, crop, crop] float32.
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
            np.take(table[c], small[..., c], out=pixels[n, c], mode="clip")  # "clip" skips the bounds check, which uint8 does not need

    import torch  # for the number of threads (`--threads`); imported here because reading frames does not need it

    threads = min(len(images), torch.get_num_threads())
    if images[0].size < _SMALL or threads == 1:
        for n in range(len(images)):
            fill(n)
    else:  # Pillow releases the GIL while it resizes
        for n in range(len(images)):  # fill the cache before the threads start
            _can_resize_center(images[n].shape[1], images[n].shape[0], *size(n), crop, p.resample)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, range(len(images))))
    return pixels


@functools.lru_cache(maxsize=8)
def _levels(processor: Any) -> np.ndarray:
    """[3, 256] float32: normalized value of each 8-bit value of each color."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    table = processor([Image.fromarray(levels)], do_resize=False, do_center_crop=False, return_tensors="np")["pixel_values"][0]
    return np.asarray(table, np.float32).reshape(3, 256)


def _resized(image: Image.Image, w: int, h: int, crop: int, resample: int) -> np.ndarray:
    """The center [crop, crop, 3] of an image resized to w x h; only the center is computed where that is exact."""
    if _can_resize_center(*image.size, w, h, crop, resample):
        return _resized_center(image, w, h, crop, resample)
    top, left = (h - crop) // 2, (w - crop) // 2
    return np.asarray(image.resize((w, h), resample))[top : top + crop, left : left + crop]


def _resized_center(image: Image.Image, w: int, h: int, crop: int, resample: int) -> np.ndarray:
    left, top = (w - crop) // 2 * image.width / w, (h - crop) // 2 * image.height / h
    return np.asarray(image.resize((crop, crop), resample, (left, top, image.width - left, image.height - top)))


@functools.lru_cache(maxsize=64)
def _can_resize_center(width: int, height: int, w: int, h: int, crop: int, resample: int) -> bool:
    """Whether Pillow resizes the center alone to the same bits as the whole image, tested on noise.

    The edges must fall between pixels. Pillow chooses whether rows or columns are resized first, and rounds in between.
    """
    if (w - crop) % 2 or (h - crop) % 2 or (w - crop) * width % (2 * w) or (h - crop) * height % (2 * h):
        return False
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8))
    top, left = (h - crop) // 2, (w - crop) // 2
    whole = np.asarray(noise.resize((w, h), resample))[top : top + crop, left : left + crop]
    return np.array_equal(whole, _resized_center(noise, w, h, crop, resample))
