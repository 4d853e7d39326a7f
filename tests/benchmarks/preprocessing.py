"""How much faster event streams become pixels than with one Python step per event, as released. A script, not a test.

    python tests/benchmarks/preprocessing.py window.npy

window.npy: an EventGPT event file. Prints the median of fifteen runs of each stage, in turn, and checks that both give the same. Ours
resizes in as many threads as torch has, one a core; `OMP_NUM_THREADS=1` before the command shows one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from feature_alignment.cli.console import print_json_line, print_table, run
from feature_alignment.inputs.clip_pixels import clip_pixels
from feature_alignment.inputs.events import event_images, load_events, slice_by_count


def loop_images(events: dict[str, np.ndarray]) -> list[np.ndarray]:
    """One event after the other, each writing its colour: what the vectorised form must equal."""
    images = []
    for part in slice_by_count(len(events["t"]), 5):
        x, y, p = (events[k][part] for k in "xyp")
        image = np.full((y.max() + 1, x.max() + 1, 3), 255, np.uint8)
        for x_i, y_i, p_i in zip(x, y, p, strict=True):
            image[y_i, x_i] = np.array([0, 0, 255]) if p_i == 0 else np.array([255, 0, 0])
        images.append(image)
    return images


def median_ms(works: dict[str, Callable[[], object]], runs: int = 15) -> dict[str, float]:
    """Of each piece of work, all in turn."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(runs):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) * 1000 for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("events", type=Path)
    events = load_events(parser.parse_args().events, 99)
    side = {"height": 336, "width": 336}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=side)  # as the released tower's
    images = event_images(events, 5)
    assert all(np.array_equal(a, b) for a, b in zip(images, loop_images(events), strict=True))
    ms = median_ms(
        {
            "loop": lambda: loop_images(events),
            "images": lambda: event_images(events, 5),
            "processor": lambda: processor([Image.fromarray(i) for i in images], return_tensors="np"),
            "pixels": lambda: clip_pixels(images, processor),
        }
    )
    before, ours = ms["loop"] + ms["processor"], ms["images"] + ms["pixels"]
    rows = [
        ("five images", ms["loop"], ms["images"], ms["loop"] / ms["images"]),
        ("pixels", ms["processor"], ms["pixels"], ms["processor"] / ms["pixels"]),
        ("both", before, ours, before / ours),
    ]
    print_table(f"{len(events['t'])} events", ("stage", "loop and processor, ms", "ours, ms", "ratio"), rows)
    print_json_line({"events": len(events["t"]), **{name: {"before_ms": a, "ours_ms": b, "ratio": r} for name, a, b, r in rows}})


if __name__ == "__main__":
    run(main)
