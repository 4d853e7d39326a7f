"""Write scenes of the synthetic world as input files: events as EventGPT `.npy`, video as `.mp4`, and a manifest.

    python -m feature_alignment.demo.scenes                   training and validation scenes under outputs/demo/scenes
    python -m feature_alignment.demo.scenes --splits test --out data/demo     the test scenes kept in git

Scenes are pure functions of their seeds; a split that is already complete is not written again.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    from feature_alignment.cli.console import run_module

    run_module("feature_alignment.demo.scenes")

import numpy as np

from feature_alignment.cli.ranges import number_argument, path_argument
from feature_alignment.demo import cameras, captions, world
from feature_alignment.inputs.event_files import save_events
from feature_alignment.storage.processes import check_writable, children_ignore_interrupts

log = logging.getLogger(__name__)

# split -> (first seed, number of clips, questions per clip)
SPLITS = {
    "train": (2_000_000, 1200, 2),
    "validation": (2_400_000, 120, 3),
    "calibration": (2_600_000, 600, 1),
    "test": (2_800_000, 64, 4),
    "held_out": (3_000_000, 200, 3),
}
Job = tuple[Path, str, int, int, int]  # folder, split, index of the clip, seed, questions per clip
_FPS = 160  # 16 frames in 100 ms


def write_clip(folder: Path, name: str, seed: int) -> dict[str, str]:
    """Render a scene and write its recordings.

    Args:
        folder: Gets events/ and video/.
        name: Of the files.
        seed: Of the scene.

    Returns:
        "events" and "video" -> path relative to `folder`.
    """
    intensity = cameras.render(world.scene(seed))
    return write_recordings(folder, name, cameras.events(intensity, seed), cameras.frames(intensity, seed))


def write_recordings(folder: Path, name: str, events: dict[str, np.ndarray], frames: np.ndarray) -> dict[str, str]:
    """Write the two recordings of a clip.

    Args:
        folder: Gets events/ and video/.
        name: Of the files.
        events: x, y, t, p, each [n].
        frames: [16, h, w, 3] uint8.

    Returns:
        "events" and "video" -> path relative to `folder`.
    """
    import av

    paths = {"events": f"events/{name}.npy", "video": f"video/{name}.mp4"}
    save_events(folder / paths["events"], events)
    with av.open(str(folder / paths["video"]), "w") as container:
        stream = container.add_stream("libx264", rate=_FPS, options={"crf": "8", "preset": "medium", "threads": "1"})
        stream.width = stream.height = cameras.SIZE
        stream.pix_fmt = "yuv444p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return paths


def questions_of(clip: int, count: int) -> list[int]:
    """Questions of a clip, chosen so that all ten are asked equally often.

    Args:
        clip: Index of the clip in its split.
        count: Number of questions, all different.
    """
    return [(clip + 3 * i) % len(captions.QUESTIONS) for i in range(count)]


def _clip_rows(job: Job) -> list[str]:
    folder, split, clip, seed, count = job
    name = f"{split}-{clip:04d}"
    files = write_clip(folder, name, seed)
    facts = world.facts(world.scene(seed))
    return [
        json.dumps({"id": f"{name}-q{q}", "sequence": name, **files, "question": captions.QUESTIONS[q], "facts": facts})
        for q in questions_of(clip, count)
    ]


def write_split(out: Path, split: str, clips: int | None = None) -> Path:
    """Write a split and return its manifest, which is written last: a split with a manifest is complete.

    Args:
        out: Folder of the manifest.
        split: Key of `SPLITS`.
        clips: Number of clips; default all.
    """
    first, all_clips, count = SPLITS[split]
    return write_clips(out, split, first, clips or all_clips, count, _clip_rows)


def write_clips(
    out: Path, split: str, first: int, clips: int, count: int, clip_rows: Callable[[Job], list[str]], turn: int | None = None
) -> Path:
    """Write the clips of a split and then its manifest, in two processes.

    Args:
        out: Folder of the manifest, of events/ and of video/.
        split: Name of the split.
        first: Seed of the first clip.
        clips: Number of clips.
        count: Questions per clip.
        clip_rows: Writes one clip and returns its rows of the manifest.
        turn: Questions per clip before the next clip's; the others follow after the last clip. Default all.

    Returns:
        The manifest.
    """
    manifest = out / f"{split}.jsonl"
    if manifest.exists() and len(manifest.read_text().splitlines()) == clips * count:
        log.info("scenes   %s: all %d clips exist", split, clips)
        return manifest
    for sub in ("events", "video"):
        (out / sub).mkdir(parents=True, exist_ok=True)
    jobs = [(out, split, i, first + i, count) for i in range(clips)]
    with children_ignore_interrupts():
        workers = multiprocessing.get_context("spawn").Pool(2)
    with workers as pool:
        found = list(pool.imap(clip_rows, jobs, chunksize=16))
    rows = [line for start in range(0, count, turn or count) for lines in found for line in lines[start : start + (turn or count)]]
    temporary = manifest.with_suffix(".tmp")
    temporary.write_text("\n".join(rows) + "\n")
    shutil.move(temporary, manifest)
    log.info("scenes   %s: %d clips, %d questions -> %s", split, clips, len(rows), manifest)
    return manifest


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=path_argument, default=Path("outputs/demo/scenes"))
    parser.add_argument("--splits", nargs="+", choices=sorted(SPLITS), default=["train", "validation"])
    parser.add_argument("--clips", type=number_argument("clips"), help="clips per split (default: all)")
    args = parser.parse_args()
    for split in dict.fromkeys(args.splits):
        check_writable(args.out / f"{split}.jsonl")
    for split in dict.fromkeys(args.splits):
        write_split(args.out, split, args.clips)
