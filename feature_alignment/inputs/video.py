"""Frames in, CLIP-ready pixels out, without torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from feature_alignment.console import UserError

NUM_FRAMES = 8
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def sample_indices(num_frames: int, wanted: int = NUM_FRAMES) -> list[int]:
    """Evenly spaced frame numbers, first and last included (`linspace`); repeats frames where there are fewer than wanted."""
    return np.linspace(0, num_frames - 1, wanted, dtype=int).tolist()


def read_frames(path: str | Path, wanted: int = NUM_FRAMES) -> np.ndarray:
    """Evenly spaced frames of a video file (anything FFmpeg reads, gif included) or a folder of images.

    returns: [wanted, h, w, 3] uint8 RGB; frame-exact, because every frame up to the last one wanted is decoded in order
    raises:  UserError for a missing or damaged file, or one without frames
    """
    path = Path(path)
    if path.is_dir():
        files = sorted((f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES), key=lambda f: (len(f.stem), f.stem))
        if not files:
            raise UserError(f"no images ({', '.join(IMAGE_SUFFIXES)}) in {path}.")
        return np.stack([np.asarray(Image.open(files[i]).convert("RGB")) for i in sample_indices(len(files), wanted)])
    if not path.is_file():
        raise UserError(f"no video at {path}; --video wants a video file or a folder of frames.")
    import av  # 0.2 s, not needed for --help

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} has no video stream.")
            times = sorted(p.pts for p in container.demux(video=0) if p.pts is not None)
        if not times:
            raise UserError(f"{path} has no frames.")
        keep = [times[i] for i in sample_indices(len(times), wanted)]
        found: dict[int, np.ndarray] = {}
        with av.open(str(path)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for frame in container.decode(video=0):
                if frame.pts in keep:
                    found[frame.pts] = frame.to_ndarray(format="rgb24")
                if len(found) == len(set(keep)):
                    break
    except av.error.FFmpegError as error:
        raise UserError(f"{path} could not be decoded: {error}") from None
    missing = [t for t in keep if t not in found]
    if missing:
        raise UserError(f"{path} is damaged: {len(set(missing))} of {len(set(keep))} wanted frames could not be decoded.")
    return np.stack([found[t] for t in keep])


def clip_pixels(images: Sequence[np.ndarray], processor) -> np.ndarray:
    """Resize, centre-crop and normalise RGB images as the checkpoint's own preprocessor_config says.

    images:  [h, w, 3] uint8 each
    returns: [n, 3, crop, crop] float32
    """
    return np.stack(processor([Image.fromarray(i) for i in images], return_tensors="np")["pixel_values"]).astype(np.float32)
