"""Read evenly spaced frames of a clip, from a video or from images."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from feature_alignment.cli.console import UserError, record_repair
from feature_alignment.inputs.images import UPRIGHT, Orientation, exif_orientation, open_images, refuse_large, to_8_bits

NUM_FRAMES = 8
# Containers that hold their frames. FFmpeg also reads playlists, which make it open other files and addresses.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,mpeg,mpegts,mpegvideo,asf,flv,ogg,ivf,h264,hevc,m4v,mxf,nut,dv,"
    "mjpeg,obu,yuv4mpegpipe"
)
_QUARTER_TURNS = {  # counterclockwise degrees
    0: UPRIGHT,
    90: Orientation(transpose=True, flip_rows=True),
    180: Orientation(flip_rows=True, flip_columns=True),
    270: Orientation(transpose=True, flip_columns=True),
}
_OPEN_SAFELY = {"protocol_whitelist": "file", "format_whitelist": _CONTAINERS}


def sample_indices(num_frames: int, wanted: int = NUM_FRAMES, sampling: str = "linspace") -> list[int]:
    """Evenly spaced frame numbers; frames are repeated if there are fewer than wanted.

    Args:
        num_frames: Frames of the clip.
        wanted: Frames to sample.
        sampling: "linspace" includes the first and the last frame, as in Video-LLaVA's training; "arange" never takes the last, as in its
            model card.
    """
    if sampling == "arange":
        indices = np.arange(0, num_frames, num_frames / wanted).astype(int)[:wanted]
    else:
        indices = np.linspace(0, num_frames - 1, wanted, dtype=int)
    return [int(i) for i in indices]


def read_frames(path: str | Path, wanted: int = NUM_FRAMES, sampling: str = "linspace") -> np.ndarray:
    """Read evenly spaced frames of a clip, as a player shows them: upright, without hidden frames.

    Frames are counted by decoding them all, so that time stamps are not needed and every index is exact. Frames that cannot be decoded are
    counted in the log and in `meta`; the wanted ones are sampled from the others. A clip with fewer frames repeats some.

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
    stored = open_images(path)
    if stored is None:
        return stacked(_read_video(path, wanted, sampling), path)
    _report_few_frames(path, stored.count, wanted)
    indices = sample_indices(stored.count, wanted, sampling)
    read = {i: stored.read(i) for i in sorted(set(indices))}
    return stacked(to_8_bits([read[i] for i in indices], path), path)


def open_video(path: Path) -> Any:
    """Open a file as an FFmpeg container. `file:` prevents a colon in the name from being read as a protocol."""
    import av  # 0.2 s, not needed for --help

    return av.open(f"file:{path}", options=_OPEN_SAFELY)


def _video_stream(path: Path, container: Any) -> Any:
    """The video stream that a player shows, which is not a cover image.

    Raises:
        UserError: For a file without one, or frames larger than MAX_PIXELS.
    """
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise UserError(f"{path} has no video stream{', only a cover image' if container.streams.video else ''}.")
    refuse_large(path, streams[0])
    streams[0].codec_context.thread_count = 1
    return streams[0]


def _read_video(path: Path, wanted: int, sampling: str) -> list[np.ndarray]:
    import av

    try:
        listed, stated = _count_packets(path)
        if not listed:
            raise UserError(f"{path} has no frames.")
        indices = sample_indices(listed, wanted, sampling)
        found, decoded, damaged = _decode(path, set(indices))
        if decoded and decoded != listed:  # some packets gave no frame or several: sample again from the decoded frames
            indices = sample_indices(decoded, wanted, sampling)
            found, decoded, damaged = _decode(path, set(indices))
    except (av.error.FFmpegError, MemoryError, ValueError, OverflowError) as error:
        raise UserError(f"{path} could not be decoded: {str(error)[:200]}") from None
    _report_lost_frames(path, decoded, max(listed, stated), damaged)
    _report_few_frames(path, decoded, wanted)
    return [found[i] for i in indices]


def _count_packets(path: Path) -> tuple[int, int]:
    """Number of packets that each hold one visible frame, and the number that the header states (0 if it does not)."""
    with open_video(path) as container:
        stream = _video_stream(path, container)
        hidden, listed, end_s = 0, 0, 0.0
        for packet in _readable_packets(container.demux()):
            if packet.pts is not None:
                end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == stream.index and (
                packet.size or packet.dts is not None
            ):  # the last packet is empty and marks the end
                is_shown = not packet.is_discard and packet.size and _is_shown(packet, stream)
                listed, hidden = listed + bool(is_shown), hidden + (not is_shown)
        _refuse_cut(path, container, end_s)
        counted = container.format.name == "avi" or "mov" in container.format.name  # other formats do not count frames, or estimate
        return listed, stream.frames - hidden if counted else 0


def _is_shown(packet: Any, stream: Any) -> bool:
    """Whether a packet holds a visible frame. VP8 stores hidden reference frames in separate packets: bit 4 of the first byte is 0."""
    return stream.codec_context.name not in ("vp8", "libvpx") or bool(bytes(packet)[0] & 0x10)


def _decode(path: Path, wanted: set[int]) -> tuple[dict[int, np.ndarray], int, int]:
    """The wanted frames by index among the decodable ones, the number of decodable frames, and how many of those are damaged."""
    from av.video.reformatter import VideoReformatter

    found: dict[int, np.ndarray] = {}
    decoded = damaged = 0
    to_rgb = VideoReformatter()  # reused, because creating it is slower than using it
    with open_video(path) as container:
        for frame, orientation in upright_frames(path, container):
            if decoded in wanted:
                found[decoded] = orientation.apply(to_rgb.reformat(frame, format="rgb24").to_ndarray())
            decoded, damaged = decoded + 1, damaged + bool(frame.is_corrupt)
    return found, decoded, damaged


def upright_frames(path: Path, container: Any, every: bool = False) -> Iterator[tuple[Any, Orientation]]:
    """The visible frames of a video in order, each with its orientation.

    The decoder omits the frames before the start of an edit list.

    Args:
        path: For messages.
        container: Opened by `open_video`.
        every: Raise FFmpeg's error for a frame that cannot be decoded, instead of omitting it.

    Raises:
        UserError: For a file without a video stream, frames larger than MAX_PIXELS, or an angle that is not a multiple of 90 degrees.
    """
    import av

    packets = container.demux(_video_stream(path, container))
    common_orientation = (
        _orientation_of_image(path) if container.format.name == "apng" else None
    )  # FFmpeg returns it with the first frame only
    for packet in packets if every else _readable_packets(packets):
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            if every:
                raise
            continue  # counted later by its missing frame
        for frame in frames:
            refuse_large(path, frame)
            yield frame, common_orientation or _orientation_of(frame, packet, path)


def _readable_packets(packets: Iterator[Any]) -> Iterator[Any]:
    """Packets before the first unreadable one, as in a truncated file; the error is raised if the very first is unreadable."""
    import av

    any_read = False
    try:
        for packet in packets:
            yield packet
            any_read = True
    except av.error.FFmpegError:
        if not any_read:
            raise


def _orientation_of(frame: Any, packet: Any, path: Path) -> Orientation:
    """The orientation stated by the display matrix of a frame, from the container or the codec.

    Raises:
        UserError: For an angle that is not a multiple of 90 degrees.
    """
    from av.sidedata.sidedata import Type

    try:
        matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    except ValueError:  # PyAV 18 does not support FFmpeg's newer kinds of side data, such as Exif
        content = bytes(packet) if packet.size else b""
        if content.startswith(b"\xff\xd8"):  # a Motion JPEG frame
            return _orientation_of_image(io.BytesIO(content))
        if frame.rotation % 360 in _QUARTER_TURNS:
            return _QUARTER_TURNS[frame.rotation % 360]
        raise _unsupported_angle(path, frame.rotation) from None
    if matrix is None:
        return UPRIGHT
    # A pixel (column, row) is shown at (a column + c row, b column + d row)
    (a, b, _), (c, d, _), _ = np.frombuffer(matrix, np.int32).reshape(3, 3) / 65536.0
    size = max(abs(a), abs(b), abs(c), abs(d))
    if max(abs(b), abs(c)) <= 0.02 * size:  # a zero matrix states nothing
        return Orientation(flip_rows=bool(d < 0), flip_columns=bool(a < 0))
    if max(abs(a), abs(d)) < 0.02 * size:
        return Orientation(transpose=True, flip_rows=bool(b < 0), flip_columns=bool(c < 0))
    raise _unsupported_angle(path, frame.rotation)


def _unsupported_angle(path: Path, degrees: int) -> UserError:
    return UserError(
        f"{path} is stored turned by {degrees} degrees; wanted a multiple of 90. Write it upright:\n  ffmpeg -i {path.name} upright.mp4"
    )


def _orientation_of_image(file: Any) -> Orientation:
    try:
        with Image.open(file, formats=("JPEG", "PNG")) as image:
            return exif_orientation(image)
    except (OSError, ValueError, SyntaxError):
        return UPRIGHT


def stacked(images: list[np.ndarray], path: Path) -> np.ndarray:
    """The frames of a clip as one array; UserError if they differ in size."""
    if len({image.shape for image in images}) > 1:
        raise UserError(f"{path}: its frames differ in size ({sorted({i.shape[:2] for i in images})}); wanted one size.")
    return np.stack(images)


def _refuse_cut(path: Path, container: Any, end_s: float) -> None:
    """Refuse a truncated Matroska or gif file; mp4 states its number of frames."""
    stated_s = (container.duration or 0) / 1e6
    if "matroska" in container.format.name and stated_s and end_s < 0.95 * stated_s:
        raise UserError(f"{path} is cut off: its header states {stated_s:.2f} s, its frames end at {end_s:.2f} s.")
    if container.format.name == "gif" and not path.read_bytes().rstrip(b"\0").endswith(b";"):
        raise UserError(f"{path} is cut off: a gif ends with a `;`, this one does not.")


def _report_lost_frames(path: Path, decoded: int, listed: int, damaged: int) -> None:
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


def _report_few_frames(path: Path, num_frames: int, wanted: int) -> None:
    if num_frames < wanted:
        record_repair(path, "frames repeated", f"has {num_frames} frames where {wanted} are wanted; some are repeated.")
