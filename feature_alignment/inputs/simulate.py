"""Simulate an event stream from a video, without an event camera.

Contrast-threshold model, as in ESIM and v2e: every pixel stores the log-intensity of its last event. Log-intensity is linear between two
frames; each time it has changed by the threshold C, the pixel fires an event and stores the new level.

                     level + 2C ─ ─ ─ ─ ─ ─ ─ ─ x  event 2
    log-intensity    level +  C ─ ─ ─ x           event 1
                     level ──── before           after
                                t0 ──────────────> t1

    python -m feature_alignment.inputs.simulate video.mp4 events.npy --duration_ms 50

There is no noise and no refractory time, and the video's gamma is kept, so the stream is cleaner than a camera's. Motion of more than about
one pixel per frame leaves gaps between edges; use slow-motion video (100 frames per second or more).
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

if __name__ == "__main__":
    from feature_alignment.cli.console import run_module

    run_module("feature_alignment.inputs.simulate")

import numpy as np

from feature_alignment.cli.console import UserError, print_json_line
from feature_alignment.cli.ranges import number_argument, path_argument
from feature_alignment.inputs.event_files import save_events
from feature_alignment.inputs.video import open_video, stacked, upright_frames
from feature_alignment.storage.processes import check_writable

log = logging.getLogger(__name__)

CONTRAST = 0.2  # in natural log units, the default of v2e and of ESIM's examples
_DARK = 1e-3  # added to intensities in 0 to 1, so that the logarithm of black is finite


def crossings(
    before: np.ndarray, after: np.ndarray, level: np.ndarray, contrast: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The events between two images.

    Args:
        before: [h, w], log-intensity of the first image.
        after: [h, w], log-intensity of the second image.
        level: [h, w], log-intensity of each pixel's last event; updated in place.
        contrast: Threshold in log-intensity.

    Returns:
        x, y [n] pixels; brighter [n] bool; fraction [n] of the time between the images, 0 to 1. In pixel order.
    """
    count = np.floor(np.abs(after - level) / contrast).astype(np.int64)
    y, x = np.nonzero(count)
    n, sign = count[y, x], np.sign(after - level)[y, x]
    pixel = np.repeat(np.arange(len(n)), n)
    k = np.arange(len(pixel)) - np.repeat(np.cumsum(n) - n, n) + 1  # 1..n within each pixel
    crossing = level[y, x][pixel] + k * sign[pixel] * contrast
    slope = (after - before)[y, x][pixel]
    fraction = np.clip((crossing - before[y, x][pixel]) / np.where(slope == 0, 1, slope), 0, 1)
    level[y, x] += n * sign * contrast
    return x[pixel], y[pixel], sign[pixel] > 0, fraction


def simulate_events(log_intensity: np.ndarray, times_us: np.ndarray, contrast: float = CONTRAST) -> dict[str, np.ndarray]:
    """Simulate the events of an image sequence. The first image sets the level of every pixel and fires no event.

    Args:
        log_intensity: [n, h, w].
        times_us: [n], ascending.
        contrast: Threshold in log-intensity.

    Returns:
        x, y uint16; t int64, ascending microseconds; p uint8 in {0, 1}.

    Raises:
        ValueError: If times are not ascending or the threshold is not positive.
    """
    if len(log_intensity) != len(times_us) or (np.diff(times_us) <= 0).any() or not contrast > 0:
        raise ValueError(f"wanted ascending times for {len(log_intensity)} images and a positive contrast, got {times_us}, {contrast}")
    level = log_intensity[0].astype(np.float64)
    xs, ys, ps, ts = [], [], [], []
    for i in range(1, len(log_intensity)):
        x, y, brighter, fraction = crossings(log_intensity[i - 1], log_intensity[i], level, contrast)
        xs.append(x.astype(np.uint16))
        ys.append(y.astype(np.uint16))
        ps.append(brighter.astype(np.uint8))
        ts.append(np.round(times_us[i - 1] + fraction * (times_us[i] - times_us[i - 1])).astype(np.int64))
    if not ts:
        return {"x": np.zeros(0, np.uint16), "y": np.zeros(0, np.uint16), "t": np.zeros(0, np.int64), "p": np.zeros(0, np.uint8)}
    t = np.concatenate(ts)
    order = np.argsort(t, kind="stable")
    return {name: np.concatenate(parts)[order] for name, parts in (("x", xs), ("y", ys), ("t", ts), ("p", ps))}


def read_log_intensity(path: Path, start_ms: float = 0.0, duration_ms: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read a video's frames as log-intensity.

    Args:
        path: Video file.
        start_ms: Start of the window after the first frame.
        duration_ms: Length of the window; None for the rest of the video.

    Returns:
        Log-intensity [n, h, w] float32 and times [n] int64, microseconds after the first frame.

    Raises:
        UserError: For a file that cannot be decoded, or fewer than two frames with different times.
    """
    import av

    if not path.is_file():
        raise UserError(f"no video at {path}.")
    images: list[np.ndarray] = []
    times: list[int] = []
    first_us = None
    try:
        with open_video(path) as container:
            for frame, orientation in upright_frames(path, container, every=True):
                if frame.time is None:
                    raise UserError(f"{path}: frames without a time; write it again with time stamps, e.g. ffmpeg -i {path.name} out.mp4")
                first_us = round(frame.time * 1e6) if first_us is None else first_us
                t_us = round(frame.time * 1e6) - first_us
                if duration_ms is not None and t_us > (start_ms + duration_ms) * 1000:
                    break
                if t_us >= start_ms * 1000 and (not times or t_us > times[-1]):
                    images.append(np.log(orientation.apply(frame.to_ndarray(format="gray")).astype(np.float32) / 255 + _DARK))
                    times.append(t_us)
    except av.error.FFmpegError as error:
        raise UserError(f"{path} could not be decoded: {error}") from None
    if len(images) < 2:
        raise UserError(f"{path}: {len(images)} frames in the window; events need at least two. Lengthen --duration_ms.")
    return stacked(images, path), np.array(times, np.int64)


def main() -> None:
    """Run the command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=path_argument)
    parser.add_argument("events", type=path_argument, help="written as EventGPT's .npy")
    parser.add_argument(
        "--contrast",
        type=number_argument("contrast", float),
        default=CONTRAST,
        help="event threshold in log-intensity (default: %(default)s)",
    )
    parser.add_argument("--start_ms", type=number_argument("start_ms", float), default=0.0)
    parser.add_argument(
        "--duration_ms",
        type=number_argument("duration_ms", float),
        help="default: the whole video; EventGPT reads less than 100 ms at a time",
    )
    args = parser.parse_args()
    if args.events.suffix != ".npy":
        raise UserError(f"{args.events}: wanted a name that ends in .npy.")
    check_writable(args.events)
    log_intensity, times_us = read_log_intensity(args.video, args.start_ms, args.duration_ms)
    events = simulate_events(log_intensity, times_us, args.contrast)
    if not len(events["t"]):
        raise UserError(f"{args.video}: no pixel changed by {args.contrast:g} in log-intensity; nothing is written. Lower --contrast.")
    args.events.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.events.with_suffix(".tmp.npy")
    save_events(temporary, events)
    os.replace(temporary, args.events)
    span_ms = float(times_us[-1] - times_us[0]) / 1000
    log.info("%d frames over %.1f ms -> %d events in %s", len(times_us), span_ms, len(events["t"]), args.events)
    print_json_line({"frames": len(times_us), "span_ms": span_ms, "events": len(events["t"]), "written": str(args.events)})
