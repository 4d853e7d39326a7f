"""Write scenes of the language world as the files a user would have, with a manifest and the lexicon of their facts.

    python -m feature_alignment.demo.language_scenes          all splits of the run under outputs/language/scenes

Scenes are pure functions of their seeds; a split that is already there is left alone. `--clips` makes every split smaller or larger.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

if __name__ == "__main__":
    from feature_alignment.cli.console import run_module

    run_module("feature_alignment.demo.language_scenes")

from feature_alignment.cli.ranges import number_argument, path_argument
from feature_alignment.demo import cameras, language_world
from feature_alignment.demo.scenes import Job, write_clips, write_recordings
from feature_alignment.storage.processes import check_writable

log = logging.getLogger(__name__)

# split -> (first seed, clips, questions asked about each); the pair's own training scenes lie below 5,000,000
SPLITS = {
    "train": (5_000_000, 960, 12),
    "validation": (5_400_000, 30, 3),
    "calibration": (5_600_000, 60, 2),
    "test": (5_800_000, 75, 4),
}
TURN = 6  # questions per clip before the next clip's: the first 5,760 training rows ask six questions about each of the 960 clips


def questions_of(clip: int, count: int) -> list[int]:
    """`count` different questions for the n-th clip of a split, so that all are asked equally often."""
    return [(clip + 5 * i) % len(language_world.QUESTIONS) for i in range(count)]


def clip_rows(job: Job) -> list[str]:
    """Write one clip of (folder, split, clip, seed, count); returns its rows of the manifest."""
    folder, split, clip, seed, count = job
    scene, name = language_world.scene(seed), f"{split}-{clip:05d}"
    intensity = language_world.render(scene)
    files = write_recordings(folder, name, cameras.events(intensity, seed), language_world.frames(intensity, seed))
    facts = language_world.facts(scene)
    return [
        json.dumps({"id": f"{name}-q{q}", "sequence": name, **files, "question": language_world.QUESTIONS[q], "facts": facts})
        for q in questions_of(clip, count)
    ]


def write_split(out: Path, split: str, clips: int | None = None) -> Path:
    """Write one split, its manifest last; returns the manifest."""
    first, all_clips, count = SPLITS[split]
    return write_clips(out, split, first, clips or all_clips, count, clip_rows, TURN)


def main() -> None:
    """Render the splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=path_argument, default=Path("outputs/language/scenes"))
    parser.add_argument("--splits", nargs="+", choices=sorted(SPLITS), default=["train", "validation", "calibration", "test"])
    parser.add_argument("--clips", type=number_argument("clips"), help="clips of each split, instead of its own number")
    args = parser.parse_args()
    for split in dict.fromkeys(args.splits):
        check_writable(args.out / f"{split}.jsonl")
    for split in dict.fromkeys(args.splits):
        write_split(args.out, split, args.clips)
    (args.out / "lexicon.json").write_text(json.dumps(language_world.lexicon(), indent=1) + "\n")
