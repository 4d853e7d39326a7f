"""Valid values of every setting, by its name: one table for all scripts, checked before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from feature_alignment.cli.console import UserError


class Range(NamedTuple):
    """Numbers from `low` to `high`; `is_open` excludes both ends. `or_zero` also allows 0."""

    low: float
    high: float
    is_open: bool = False
    or_zero: bool = False

    def has(self, value: float) -> bool:
        """Whether `value` is valid."""
        inside = self.low < value < self.high if self.is_open else self.low <= value <= self.high
        return inside or (self.or_zero and value == 0)

    def __str__(self) -> str:
        zero = "0, or " if self.or_zero else ""
        if self.is_open:
            return f"{zero}a number above {self.low:,} and below {self.high:,}"
        if self.high > 1000:  # a guard against typing errors; the lower end is what matters
            return f"{zero}a number of at least {self.low:,} (and at most {self.high:,})"
        return f"{zero}a number from {self.low:,} to {self.high:,}"


_LARGEST = 2**53  # every JSON reader keeps integers up to here
_COUNT = Range(1, 2**31 - 1)
_WIDTH = Range(1, 2**16)
_WEIGHT = Range(0, 1e6)

RANGES = {
    "assistant_layers": Range(1, 1024),
    "base_steps": _COUNT,
    "batch_size": _COUNT,
    "bottleneck": _WIDTH,
    "clips": _COUNT,
    "cosine_weight": _WEIGHT,
    "contrast": Range(0.001, 100),
    "delta": Range(0, 1, is_open=True),
    "draft_vocabulary": Range(1, 2**22),
    "draft_layers": Range(1, 1024),
    "dropout": Range(0, 0.99),
    "duration_ms": Range(0.001, 1e12),
    "epsilon": Range(0, 1, is_open=True),
    "event_start_ms": Range(0, 1e12),
    "event_window_ms": Range(0.001, 100),  # events are timed in microseconds
    "gpu_gib": Range(0.001, 1e6),
    "gpus": Range(1, 65536),
    "hidden_size": _WIDTH,
    "kl_weight": _WEIGHT,
    "limit": Range(1, _LARGEST),
    "linear_units": Range(0, 2**16),
    "lr": Range(1e-12, 100),
    "max_new_tokens": Range(1, 2**20),
    "max_positions": Range(1, 2**20),
    "min_new_tokens": Range(1, 2**20),
    "min_p": Range(0, 1),
    "most_draft_tokens": Range(1, 1024),
    "mse_weight": _WEIGHT,
    "num_draft_tokens": Range(1, 1024),
    "num_epochs": _COUNT,
    "num_scenes": _COUNT,
    "num_taps": Range(1, 256),
    "origins": Range(1, 4096),
    "patience": _COUNT,
    "planted_acceptance": Range(0, 1),
    "prompt_states": Range(0, 2**20),
    "repeats": Range(1, 10**6),
    "repetition_penalty": Range(0.001, 1000),
    "roll_out_steps": Range(1, 1024),
    "seed": Range(0, _LARGEST),
    "soft_targets": Range(0, 1),
    "start_ms": Range(0, 1e12),
    "temperature": Range(0.001, 1000, or_zero=True),  # outside, logits / temperature overflow or lose all differences in float32
    "threads": Range(0, 1024),
    "threshold": Range(-1, 1),
    "tokens": Range(1, 2**16),
    "tokens_per_second": Range(1e-6, 1e9),
    "top_k": Range(1, 2**22),
    "top_p": Range(0.000001, 1),
    "warmup": Range(0, 10**6),
    "weight_decay": Range(0, 100),
}
SPLITS = ("split", "train_split", "validation_split", "calibration_split")  # each names a folder
VARIANTS = ("variant", "variants")
TEXTS = ("question", "stop")  # may hold newlines and tabs
INPUT_FILES = ("questions", "lexicon", "answers", "token_pairs", "events", "exit_adapters", "planted_acceptance")
_DEVICE = re.compile(r"cpu|cuda(:(0|[1-9]\d{0,3}))?")


def validate(cfg: Any) -> None:
    """Check every setting of a config alone; what depends on several settings follows in `validate_together`.

    Args:
        cfg: any dataclass of settings

    Raises:
        UserError: the setting, its value, and what is valid
    """
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        for v in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
            if isinstance(v, str | Path):
                validate_text(f.name, v)
            elif isinstance(v, int | float) and not isinstance(v, bool):
                validate_number(f.name, v)
        if isinstance(value, list):
            _validate_list(f.name, value, f.default_factory is list)
        if isinstance(value, dict):
            for name in value:
                _validate_split(f.name, name)
    validate_together(cfg)


def validate_number(name: str, value: float) -> None:
    """Check one number against the table; UserError names the valid range."""
    if not math.isfinite(value):
        raise UserError(f"--{name} {value}: wanted a finite number.")
    valid = RANGES.get(name, Range(-_LARGEST, _LARGEST))
    if not valid.has(value):
        raise UserError(f"--{name} {value}: wanted {valid}.")


def validate_text(name: str, value: str | Path) -> None:
    """Check one text or path: not empty, no control characters, encodable, and a path that the file system accepts."""
    text = str(value)
    shown = repr(text[:300])
    if not (text if name == "stop" else text.strip()):
        raise UserError(f"--{name} {shown}: wanted a {'path' if isinstance(value, Path) else 'text'}, got an empty one.")
    if bad := re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]" if name in TEXTS else r"[\x00-\x1f\x7f\ud800-\udfff]", text):
        raise UserError(f"--{name} {shown}: the character {bad[0]!r} is not allowed here.")
    if name == "device" and not _DEVICE.fullmatch(text):
        raise UserError(f"--device {shown}: wanted cpu, cuda or cuda:<number>.")
    if name in SPLITS:
        _validate_split(name, text)
    if name in VARIANTS and (not re.fullmatch(r"\w[\w.-]{0,99}", text) or text.startswith(("blind", "without_"))):
        raise UserError(
            f"--{name} {shown}: a variant names a folder; wanted up to 100 letters, digits and _ . -, not beginning with blind or without_."
        )
    if isinstance(value, Path):
        _validate_path(name, value)


def _validate_split(name: str, split: str) -> None:
    if not re.fullmatch(r"[^/\\\x00-\x1f\x7f\ud800-\udfff]{1,100}", split) or split.startswith(".") or not split.strip():
        raise UserError(f"--{name} {split[:120]!r}: a split names a folder; wanted 1 to 100 characters, no slash, no leading dot.")


def _validate_path(name: str, path: Path) -> None:
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except OSError as error:  # too long, a loop of links, no permission
        raise UserError(f"--{name} {str(path)[:300]}: {error.strerror}. Wanted a path that can be read.") from None
    if name not in INPUT_FILES:
        return
    if mode is None:
        raise UserError(f"--{name} {path}: no such file.{_ADVICE.get(name, '')}")
    if not stat.S_ISREG(mode):
        raise UserError(f"--{name} {path}: wanted a file, found {'a folder' if stat.S_ISDIR(mode) else 'something else'}.")
    if not os.access(path, os.R_OK):
        raise UserError(f"--{name} {path}: no permission to read it.")


_ADVICE = {
    "exit_adapters": " Train one for the layer with train_hidden_adapter.py --draft_layers K.",
    "planted_acceptance": " Wanted numbers from 0 to 1, or the speculation_profile.json of a benchmark.",
}


def _validate_list(name: str, values: list[Any], may_be_empty: bool) -> None:
    if not values and not may_be_empty:
        raise UserError(f"--{name}: wanted at least one value, got an empty list.")
    if len(set(values)) < len(values):
        raise UserError(f"--{name} {' '.join(map(str, values))}: wanted each value once.")
    if name == "draft_layers" and values != sorted(values):
        raise UserError(f"--draft_layers {' '.join(map(str, values))}: wanted ascending layer numbers.")


def validate_together(cfg: Any) -> None:
    """Check the settings whose valid values depend on one another; a script that lacks one of them passes.

    Args:
        cfg: any dataclass of settings

    Raises:
        UserError: the settings and the combination that is valid
    """

    def get(name: str) -> Any:
        return getattr(cfg, name, None)

    if get("event_start_ms") and get("event_window_ms") is None:
        raise UserError(f"--event_start_ms {cfg.event_start_ms:g}: wanted together with --event_window_ms.")
    if get("random_weights") and get("quantize") not in (None, "none"):
        raise UserError("--random_weights and --quantize do not go together: there are no weights to read in 4 bits.")
    if get("device_map") and get("device") == "cpu" and get("device_map") not in ("auto", "sequential"):
        raise UserError(f"--device_map {cfg.device_map}: spreads layers over GPUs; wanted --device cuda.")
    if get("temperature") and get("accept") not in (None, "token"):
        raise UserError(
            f"--temperature {cfg.temperature} --accept {cfg.accept}: sampling is lossless only where tokens are compared. "
            "Pass --accept token, or --temperature 0 (greedy)."
        )
    if get("accept") in ("typical", "kl") and get("threshold") is not None and cfg.threshold <= 0:
        raise UserError(f"--threshold {cfg.threshold:g} --accept {cfg.accept}: wanted a number above 0 (and at most 1).")
    narrowing = [f"--{name}" for name in ("top_p", "top_k", "min_p") if get(name) is not None]
    if narrowing and not get("temperature"):
        raise UserError(f"{', '.join(narrowing)}: changes only what is sampled, and greedy decoding samples nothing. Pass --temperature 1.")
    if get("draft_vocabulary") is not None and get("draft") not in (None, "chained", "hybrid"):
        raise UserError(
            f"--draft_vocabulary {cfg.draft_vocabulary}: limits the chained adapter only. Pass --draft chained, or leave it out."
        )
    if get("draft_vocabulary") == "auto" and get("temperature") and not get("adaptive"):
        raise UserError(
            f"--draft_vocabulary auto --temperature {cfg.temperature:g}: the vocabulary is chosen by timing, and a sampled text would "
            "depend on it. Pass a number, or --adaptive, whose text is that of Video-LLaVA alone."
        )
    if not all(get("stop") or ()):
        raise UserError("--stop: wanted strings of at least one character; an empty one would end every text.")
    if get("mse_weight") is not None:
        weights = [cfg.mse_weight, cfg.cosine_weight, *([] if cfg.adapter == "plain" else [cfg.kl_weight])]
        if not any(weights):
            raise UserError("--mse_weight, --cosine_weight and --kl_weight are all 0: wanted at least one above 0.")
    if get("loss") not in (None, "ce_cosine") and cfg.adapter == "plain":
        raise UserError(f"--loss {cfg.loss} --adapter plain: the plain adapter has the loss of TASKS.md's recipe. Leave --loss out.")
    clip = {f"--{name}": get(name) for name in ("events", "video", "question") if hasattr(cfg, name)}
    if get("clips") is not None:
        if found := [flag for flag in ("--events", "--video") if clip.get(flag)]:
            raise UserError(f"--clips {cfg.clips} and {found[0]}: wanted a folder of clips or the files of one.")
        clip = {}
    elif "--video" not in clip and clip.pop("--question", None):
        raise UserError(f"--question {cfg.question!r}: asked about the clips of --clips DIR; a manifest has questions of its own.")
    missing = [flag for flag, value in clip.items() if value is None]
    if 0 < len(missing) < len(clip):
        raise UserError(f"{', '.join(missing)} missing: --events, --video and --question belong together.")
    if clip and not missing and not cfg.video.exists():
        raise UserError(f"--video {cfg.video}: no such file or folder of frames.")


def path_argument(text: str) -> Path:
    """A path given on the command line, checked; for argparse's `type` in commands without a config file."""
    try:
        validate_text("path", text)
        _validate_path("path", Path(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def number_argument(name: str, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    """A parser for argparse's `type` that accepts numbers in the range that RANGES has for `name`.

    Args:
        name: setting
        kind: int or float
    """

    def number(text: str) -> float:
        try:
            value = kind(text)
            validate_number(name, value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return value

    return number
