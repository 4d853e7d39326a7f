"""A folder of clips as a data set without a manifest: `a.npy` and `a.mp4` are one clip, named `a`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from feature_alignment.cli.config import Common
from feature_alignment.cli.console import UserError, log
from feature_alignment.inputs.samples import Sample, read_questions, read_samples

EVENT_SUFFIXES = (".npy", ".npz", ".h5", ".hdf5", ".raw", ".dat", ".aedat4", ".txt", ".csv")
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".flv", ".mpg", ".mpeg", ".ts", ".mxf", ".ogv", ".3gp", ".gif", ".zip")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
_SHOWN = 10


def read_data_set(cfg: Common, split: str, clips: Path | None, question: str | None) -> list[Sample]:
    """The samples of a manifest, or of a folder of clips.

    Args:
        cfg: settings; `questions`, `limit` and `manifests` apply
        split: name of the manifest, not used with `clips`
        clips: folder of clips
        question: asked about every clip of `clips`, instead of `cfg.questions`

    Raises:
        UserError: both or neither of the questions, and as `read_clip_folder` and `read_samples`
    """
    if clips is None:
        return read_samples(cfg.manifests, split, cfg.limit, cfg.questions, cfg.allow_outside)
    if question is not None and cfg.questions is not None:
        raise UserError(f"--question and --questions {cfg.questions}: wanted one of them with --clips.")
    asked = [question] if question is not None else read_questions(cfg.questions) if cfg.questions is not None else []
    return read_clip_folder(clips, asked)[: cfg.limit]


def read_clip_folder(folder: Path, questions: Sequence[str]) -> list[Sample]:
    """Every clip of a folder with every question, sorted by name.

    Args:
        folder: holds event files and, with the same name up to the suffix, videos, images or folders of frames
        questions: asked about every clip

    Returns:
        samples with the ids `name` (one question) or `name-q0`, `name-q1`, ...; each clip is a sequence of its own

    Raises:
        UserError: no folder, no pair, no question, or a name with two event files or two videos
    """
    if not questions:
        raise UserError(f"--clips {folder}: nothing to ask. Add --question TEXT or --questions FILE.")
    if not folder.is_dir():
        raise UserError(f"--clips: no folder at {folder}.")
    events, videos = _files_by_name(folder)
    names = sorted(events.keys() & videos.keys())
    unpaired = sorted(path.name for files in (events, videos) for name, path in files.items() if name not in names)
    if not names:
        raise UserError(
            f"{folder} holds {len(events)} event files and {len(videos)} videos, and no two of the same name. "
            "Expected pairs such as a.npy and a.mp4, or a.npy and a folder a/ of frames."
        )
    for name in names[:_SHOWN]:
        log.info("clips  %s: %s and %s", name, events[name].name, videos[name].name)
    if len(names) > _SHOWN:
        log.info("clips  ... and %d more pairs", len(names) - _SHOWN)
    if unpaired:
        log.warning("clips  %d files without a partner are left out: %s", len(unpaired), ", ".join(unpaired[:_SHOWN]))
    return [
        Sample(name if len(questions) == 1 else f"{name}-q{k}", name, question, events[name], videos[name])
        for name in names
        for k, question in enumerate(questions)
    ]


def _files_by_name(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Event files and videos of a folder by their name without suffix; hidden files and other suffixes are ignored."""
    events: dict[str, Path] = {}
    videos: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            name, files = path.name, videos
        elif path.suffix.lower() in EVENT_SUFFIXES:
            name, files = path.stem, events
        elif path.suffix.lower() in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES):
            name, files = path.stem, videos
        else:
            continue
        if name in files:
            raise UserError(f"{folder}: {files[name].name} and {path.name} have the same name. Keep one of them in the folder.")
        files[name] = path
    return events, videos
