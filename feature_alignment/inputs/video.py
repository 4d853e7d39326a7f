"""Frames in, CLIP-ready pixels out, without torchvision."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from feature_alignment.cli.console import UserError, record_repair
from feature_alignment.inputs.images import UPRIGHT, Turn, exif_turn, open_stills, refuse_large, to_8_bits

NUM_FRAMES = 8
_SMALL = 1 << 18  # bytes of an image that is resized sooner than threads are made
# Containers that hold their frames themselves. FFmpeg also knows playlists, which make it open other files and addresses.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,mpeg,mpegts,mpegvideo,asf,flv,ogg,ivf,h264,hevc,m4v,mxf,nut,dv,"
    "mjpeg,obu,yuv4mpegpipe"
)
_QUARTER_TURNS = {  # counterclockwise degrees
    0: UPRIGHT,
    90: Turn(transpose=True, flip_rows=True),
    180: Turn(flip_rows=True, flip_columns=True),
    270: Turn(transpose=True, flip_columns=True),
}
_OPEN_SAFELY = {"protocol_whitelist": "file", "format_whitelist": _CONTAINERS}


def sample_indices(num_frames: int, wanted: int = NUM_FRAMES, sampling: str = "linspace") -> list[int]:
    """Evenly spaced frame numbers; repeats frames where there are fewer than wanted.

    sampling: `linspace` includes first and last, as Video-LLaVA was trained; `arange` never takes the last, as its model card shows
    """
    if sampling == "arange":
        return np.arange(0, num_frames, num_frames / wanted).astype(int)[:wanted].tolist()
    return np.linspace(0, num_frames - 1, wanted, dtype=int).tolist()


def read_frames(path: str | Path, wanted: int = NUM_FRAMES, sampling: str = "linspace") -> np.ndarray:
    """Evenly spaced frames of a clip as a player shows them: upright, presentable frames only.

    Frames are counted by decoding them all, so time stamps are not needed and every index is exact. Frames that cannot be decoded
    are counted in the log and in `meta`, and the wanted ones are sampled from the others. A clip with fewer frames repeats some.

    Args:
        path: A video file (a container of `_CONTAINERS`, gif included), an image, or a folder or a zip of images.
        wanted: Number of frames.
        sampling: See `sample_indices`.

    Returns:
        [wanted, h, w, 3] uint8 RGB; more than 8 bits are scaled to 8.

    Raises:
        UserError: For a missing or damaged file, or one without frames.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no video at {path}; --video wants a video file, an image, or a folder or a zip of frames.")
    stills = open_stills(path)
    if stills is None:
        return _stack(_read_video(path, wanted, sampling), path)
    _say_if_few(path, stills.count, wanted)
    indices = sample_indices(stills.count, wanted, sampling)
    read = {i: stills.read(i) for i in sorted(set(indices))}
    return _stack(to_8_bits([read[i] for i in indices], path), path)


def open_video(path: Path) -> Any:
    """An FFmpeg container of a file, as a context manager. `file:` keeps a colon in a name from being read as a protocol."""
    import av  # 0.2 s, not needed for --help

    return av.open(f"file:{path}", options=_OPEN_SAFELY)


def _moving_pictures(path: Path, container: Any) -> Any:
    """The video stream that a player shows; a cover picture is none.

    Raises:
        UserError: For a file without one, or frames larger than MAX_PIXELS.
    """
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise UserError(f"{path} has no video stream{', only a cover picture' if container.streams.video else ''}.")
    refuse_large(path, streams[0])
    streams[0].codec_context.thread_count = 1
    return streams[0]


def _read_video(path: Path, wanted: int, sampling: str) -> list[np.ndarray]:
    import av

    try:
        listed, promised = _count_packets(path)
        if not listed:
            raise UserError(f"{path} has no frames.")
        indices = sample_indices(listed, wanted, sampling)
        found, decoded, damaged = _decode(path, set(indices))
        if decoded and decoded != listed:  # some packets gave no frame, or several: sample again over what there is
            indices = sample_indices(decoded, wanted, sampling)
            found, decoded, damaged = _decode(path, set(indices))
    except (av.error.FFmpegError, MemoryError, ValueError, OverflowError) as error:
        raise UserError(f"{path} could not be decoded: {str(error)[:200]}") from None
    _say_what_is_lost(path, decoded, max(listed, promised), damaged)
    _say_if_few(path, decoded, wanted)
    return [found[i] for i in indices]


def _count_packets(path: Path) -> tuple[int, int]:
    """Packets that should each give a presentable frame, without decoding them; and how many the header promises, where it tells."""
    with open_video(path) as container:
        stream = _moving_pictures(path, container)
        hidden, listed, end_s = 0, 0, 0.0
        for packet in _until_it_breaks(container.demux()):
            if packet.pts is not None:
                end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == stream.index and (packet.size or packet.dts is not None):  # the last packet is empty: it ends
                is_shown = not packet.is_discard and packet.size and _is_shown(packet, stream)
                listed, hidden = listed + bool(is_shown), hidden + (not is_shown)
        _refuse_cut(path, container, end_s)
        counted = container.format.name == "avi" or "mov" in container.format.name  # others do not count frames, or estimate
        return listed, stream.frames - hidden if counted else 0


def _is_shown(packet: Any, stream: Any) -> bool:
    """VP8 stores reference frames that are never shown in packets of their own: bit 4 of the first byte is 0."""
    return stream.codec_context.name not in ("vp8", "libvpx") or bool(bytes(packet)[0] & 0x10)


def _decode(path: Path, wanted: set[int]) -> tuple[dict[int, np.ndarray], int, int]:
    """The wanted frames by their number among those that can be decoded; how many those are, and how many of them are damaged."""
    from av.video.reformatter import VideoReformatter

    found: dict[int, np.ndarray] = {}
    decoded = damaged = 0
    to_rgb = VideoReformatter()  # one for all frames: it is slower to make than to use
    with open_video(path) as container:
        for frame, turn in upright_frames(path, container):
            if decoded in wanted:
                found[decoded] = turn.apply(to_rgb.reformat(frame, format="rgb24").to_ndarray())
            decoded, damaged = decoded + 1, damaged + bool(frame.is_corrupt)
    return found, decoded, damaged


def upright_frames(path: Path, container: Any, every: bool = False) -> Iterator[tuple[Any, Turn]]:
    """The presentable frames of a video in their order, and how each is turned upright.

    The decoder itself leaves out the frames before the start of an edit list.

    Args:
        path: The file, for messages.
        container: Its container, just opened.
        every: Raise FFmpeg's error for a frame that cannot be decoded, instead of leaving it out.

    Raises:
        UserError: For a file without a video stream, frames larger than MAX_PIXELS, or an angle that is no quarter turn.
    """
    import av

    packets = container.demux(_moving_pictures(path, container))
    turn_of_all = _turn_of_image(path) if container.format.name == "apng" else None  # FFmpeg gives it with the first frame only
    for packet in packets if every else _until_it_breaks(packets):
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            if every:
                raise
            continue  # counted by its missing frame
        for frame in frames:
            refuse_large(path, frame)
            yield frame, turn_of_all or _turn_of(frame, packet, path)


def _until_it_breaks(packets: Iterator[Any]) -> Iterator[Any]:
    """Packets up to the first that cannot be read, unless that is the first of all: a file that was cut off has those before."""
    import av

    any_read = False
    try:
        for packet in packets:
            yield packet
            any_read = True
    except av.error.FFmpegError:
        if not any_read:
            raise


def _turn_of(frame: Any, packet: Any, path: Path) -> Turn:
    """What the display matrix of a video's frame asks for, wherever its container or codec states it.

    Raises:
        UserError: For an angle that is no quarter turn.
    """
    from av.sidedata.sidedata import Type

    try:
        matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    except ValueError:  # PyAV 18 does not know FFmpeg's newer kinds of side data, Exif among them
        content = bytes(packet) if packet.size else b""
        if content.startswith(b"\xff\xd8"):  # a Motion JPEG frame
            return _turn_of_image(io.BytesIO(content))
        if frame.rotation % 360 in _QUARTER_TURNS:
            return _QUARTER_TURNS[frame.rotation % 360]
        raise _no_quarter_turn(path, frame.rotation) from None
    if matrix is None:
        return UPRIGHT
    # A pixel (column, row) is shown at (a column + c row, b column + d row)
    (a, b, _), (c, d, _), _ = np.frombuffer(matrix, np.int32).reshape(3, 3) / 65536.0
    size = max(abs(a), abs(b), abs(c), abs(d))
    if max(abs(b), abs(c)) <= 0.02 * size:  # zeros alone ask for nothing
        return Turn(flip_rows=bool(d < 0), flip_columns=bool(a < 0))
    if max(abs(a), abs(d)) < 0.02 * size:
        return Turn(transpose=True, flip_rows=bool(b < 0), flip_columns=bool(c < 0))
    raise _no_quarter_turn(path, frame.rotation)


def _no_quarter_turn(path: Path, degrees: int) -> UserError:
    return UserError(
        f"{path} is to be shown turned by {degrees} degrees; wanted a multiple of 90. Write it upright:\n"
        f"  ffmpeg -i {path.name} upright.mp4"
    )


def _turn_of_image(file: Any) -> Turn:
    try:
        with Image.open(file, formats=("JPEG", "PNG")) as image:
            return exif_turn(image)
    except (OSError, ValueError, SyntaxError):
        return UPRIGHT


def _stack(images: list[np.ndarray], path: Path) -> np.ndarray:
    if len({image.shape for image in images}) > 1:
        raise UserError(f"{path}: its frames differ in size ({sorted({i.shape[:2] for i in images})}); wanted one size.")
    return np.stack(images)


def _refuse_cut(path: Path, container: Any, end_s: float) -> None:
    """mp4 counts its frames up front. Matroska and gif just end; only these two marks tell."""
    stated_s = (container.duration or 0) / 1e6
    if "matroska" in container.format.name and stated_s and end_s < 0.95 * stated_s:
        raise UserError(f"{path} is cut off: its header promises {stated_s:.2f} s, its frames end at {end_s:.2f} s.")
    if container.format.name == "gif" and not path.read_bytes().rstrip(b"\0").endswith(b";"):
        raise UserError(f"{path} is cut off: a gif ends with a `;`, this one does not.")


def _say_what_is_lost(path: Path, decoded: int, listed: int, damaged: int) -> None:
    if not decoded:
        raise UserError(f"{path} could not be decoded: none of its {listed} frames. Download or write it again.")
    if decoded * 2 < listed:
        raise UserError(f"{path} is damaged: only {decoded} of its {listed} frames can be decoded. Download or write it again.")
    if decoded < listed:
        record_repair(
            path,
            "frames not decoded",
            f"{listed - decoded} of {listed} frames could not be decoded; the wanted ones are sampled from the other {decoded}.",
        )
    if damaged:
        record_repair(
            path, "damaged frames", f"{damaged} of {decoded} decoded frames are damaged; they are used as the decoder repairs them."
        )


def _say_if_few(path: Path, num_frames: int, wanted: int) -> None:
    if num_frames < wanted:
        record_repair(path, "frames repeated", f"has {num_frames} frames where {wanted} are wanted; some are repeated.")


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
