"""How settings merge: defaults < `common:` of the YAML < the script's own section < flags.

jsonargparse checks the types of the file and of the flags. `-` and `_` are the same in
flag names; a bare `--resume` is true, `--no_resume` false; lists take several words (`--draft_layers 2 4`).
"""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from argparse import HelpFormatter
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from feature_alignment.cli.advice import use_config
from feature_alignment.cli.console import UserError, set_quiet
from feature_alignment.cli.ranges import validate

SCRIPTS = (
    "extract_hidden_states",
    "hidden_adapter",
    "train_hidden_adapter",
    "measure_feature_acceptance",
    "compare_token_baseline",
    "feature_sd_inference",
    "benchmark_feature_sd",
)
_ALIASES = {"gamma": "num_draft_tokens", "gammas": "num_draft_tokens", "max_samples": "limit"}
T = TypeVar("T", bound="Common")
Steps = Literal["eager", "graphs", "compiled"]
StepsSetting = Literal["auto", "eager", "graphs", "compiled"]
DraftVocabulary = int | Literal["auto"] | None


@dataclass(frozen=True)
class Common:
    """Settings all seven scripts share.

    Args:
        target_id: checkpoint directory of the target, Video-LLaVA
        draft_id: checkpoint directory of the drafter, EventGPT
        manifests: sample list of each split, JSON lines or the EventGPT/DSEC JSON
        questions: questions asked about every clip instead of its own: a JSON list, or one per line
        lexicon: JSON file of words that state facts; with the manifest's `facts` it separates synonyms from errors (docs/formats.md)
        allow_outside: clips of a manifest may lie outside its own folder
        event_window_ms: cut event streams to this many milliseconds, at most 100 (default: whole; 100 ms or more are refused)
        event_start_ms: where the window begins, from a file's first event on; a sample's own `event_start_ms` wins
        event_time_unit: unit of the times in event files that state none (default: recognized, or refused where it cannot be); a sample's
            own `event_time_unit` wins
        frame_sampling: which eight frames: linspace (first to last, as Video-LLaVA was trained) or arange (as its model card shows)
        output_dir: folder of all outputs; default outputs/<name of the config file>
        device: device of the models: cpu, cuda or cuda:<number>
        device_map: spread each model's layers over all GPUs, e.g. auto (default: each model whole on `device`)
        dtype: number format in which models run
        quantize: nf4 holds the text layers in 4 bits (bitsandbytes); vision towers, projectors and heads keep `dtype`
        attn_implementation: flash_attention_2 falls back to sdpa where it is not installed
        random_weights: random weights at the checkpoints' geometry, to try out speed and memory; the text is noise
        seed: seed of all random numbers
        threads: CPU threads of torch; 0 leaves its own choice
        draft_layers: which of the drafter's layers the adapter reads; it runs no deeper than the last of them (default: all)
        limit: at most this many samples, of a split that is extracted, answered or benchmarked
        resume: reuse cached results of the same inputs and continue interrupted runs; --no_resume starts over
        ignore_code: reuse hidden states, answers and adapters although the code that made them has changed since; never timings
        quiet: results and errors only, no logs and no progress bars
    """

    target_id: Path = Path("data/demo/video_llava")
    draft_id: Path = Path("data/demo/eventgpt")
    manifests: dict[str, Path] = field(default_factory=dict)
    questions: Path | None = None
    lexicon: Path | None = None
    allow_outside: bool = False
    event_window_ms: float | None = None
    event_start_ms: float = 0.0
    event_time_unit: Literal["s", "ms", "us", "ns"] | None = None
    frame_sampling: Literal["linspace", "arange"] = "linspace"
    output_dir: Path | None = None
    device: str = "cpu"
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Literal["none", "nf4"] = "none"
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    random_weights: bool = False
    seed: int = 0
    threads: int = 0
    draft_layers: list[int] | None = None
    limit: int | None = None
    resume: bool = True
    ignore_code: bool = False
    quiet: bool = False

    @property
    def out(self) -> Path:
        """Folder of all outputs."""
        assert self.output_dir is not None  # parse_config fills it
        return self.output_dir


@dataclass(frozen=True)
class ClipsConfig(Common):
    """Settings of a script that reads a manifest, or a folder of clips instead.

    Args:
        clips: read the clips of this folder instead of a manifest: files of one name, such as a.npy and a.mp4; --split names the output
        question: asked about every clip of --clips, instead of --questions
    """

    clips: Path | None = None
    question: str | None = None


def parse_config(cls: type[T], argv: Sequence[str] | None, section: str, variant: str | None = None) -> T:
    """The settings of one script; `--help` and `--print_config` print and exit.

    Args:
        cls: dataclass of the script's settings
        argv: command line without the program name; None is that of this process
        section: name of the script, and of its section in the YAML file
        variant: setting whose value names a section that overrides the script's own, e.g. `train_hidden_adapter.chained`

    Raises:
        UserError: unknown, repeated or invalid settings
    """
    words = _normalise(cls, list(sys.argv[1:] if argv is None else argv))
    _refuse_repeated(words)
    config_path, words = _take_config(words)
    show = "--print_config" in words
    words = [w for w in words if w != "--print_config"]
    _refuse_empty(cls, words)
    chosen = next((w.partition("=")[2] for w in words if variant and w.startswith(f"--{variant}=")), None)
    from jsonargparse import ArgumentError, ArgumentParser

    from feature_alignment.cli.config_file import file_settings

    from_file = file_settings(cls, Path(config_path), section, variant, chosen) if config_path else {}

    parser = ArgumentParser(
        prog=f"python feature_alignment/{section}.py",
        usage="%(prog)s [--config FILE] [flags]",
        description=(cls.__doc__ or "").split("Args:")[0].strip(),
        epilog=f"example: python feature_alignment/{section}.py --config configs/demo.yaml",
        formatter_class=HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with `common:` and one section per script")
    parser.add_argument("--print_config", help="show the merged settings and stop", action="store_true")
    hints, helps = typing.get_type_hints(cls), _field_helps(cls)
    shared = {f.name for f in dataclasses.fields(Common)}
    own, common = parser.add_argument_group("flags of this script"), parser.add_argument_group("flags of all scripts")
    for f in dataclasses.fields(cls):
        default = f.default_factory() if callable(f.default_factory) else f.default
        text = helps[f.name].replace("%", "%%")
        if default not in (None, {}) and "default" not in text:
            text += " (default: " + json.dumps(default, default=str).strip('"') + ")"
        group = common if f.name in shared else own
        flag = group.add_argument(f"--{f.name}", type=hints[f.name], default=default, help=text)
        flag.option_strings = flag.option_strings[:1]  # not the library's `--name+` for lists
    where = f"{config_path}: "
    try:
        namespace = parser.parse_object(from_file)
        where = ""
        namespace = parser.parse_args(words, namespace=namespace)
        values = {f.name: getattr(namespace, f.name) for f in dataclasses.fields(cls)}
    except (ArgumentError, ValueError, TypeError, RecursionError) as error:
        said = "too many brackets" if isinstance(error, RecursionError) else str(error)[:1000]
        raise UserError(f"{where}{said}\nSee: python feature_alignment/{section}.py --help") from None
    if values["output_dir"] is None:
        values["output_dir"] = Path("outputs") / (Path(config_path).stem if config_path else "default")
    cfg = cls(**values)
    use_config(config_path, cfg.out, any(word.startswith("--output_dir=") for word in words))
    validate(cfg)
    set_quiet(cfg.quiet)
    if show:
        import yaml

        print(yaml.safe_dump(as_plain(cfg), sort_keys=False), end="")
        sys.exit(0)
    return cfg


def as_plain(cfg: Any) -> dict[str, Any]:
    """Settings as JSON-plain values."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(cfg), default=str))
    return plain


def _field_helps(cls: type) -> dict[str, str]:
    """Help of every field, from the `Args:` of the class and its bases."""
    helps: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        lines = (base.__doc__ or "").partition("Args:")[2].splitlines()
        name = ""
        for line in lines:
            head, colon, text = line.strip().partition(": ")
            if colon and line.startswith("        ") and not line.startswith("         "):
                name, helps[head] = head, text
            elif name and line.strip():
                helps[name] += " " + line.strip()
    return {f.name: helps[f.name] for f in dataclasses.fields(cls)}


def _normalise(cls: type, argv: list[str]) -> list[str]:
    """Every option as one word `--name=value` with underscores, aliases resolved, lists as JSON."""
    hints = typing.get_type_hints(cls)
    words: list[str] = []
    i = 0
    while i < len(argv):
        word = argv[i]
        i += 1
        if not word.startswith("--"):
            words.append(word)
            continue
        name, has_value, value = word[2:].partition("=")
        name = _ALIASES.get(name.replace("-", "_"), name.replace("-", "_"))
        if name.startswith("no_") and hints.get(name[3:]) is bool:
            name, has_value, value = name[3:], "=", "false"
        following: list[str] = []
        while not has_value and i < len(argv) and not argv[i].startswith("--"):
            following.append(argv[i])
            i += 1
            if not _is_list(hints.get(name)):
                break
        if has_value:
            following = [value]
        if _is_list(hints.get(name)) and following:
            following = [_as_list(name, following, hints[name])]
        if hints.get(name) is bool and not following:
            following = ["true"]
        words.append(f"--{name}" + "".join(f"={v}" for v in following))
    return words


def _as_list(name: str, values: list[str], hint: Any) -> str:
    """The values of a list as one JSON list; one value may already be such a list, or null. Texts keep their brackets and commas."""
    if values == ["null"]:
        return "null"
    of_texts = list[str] in (hint, *typing.get_args(hint))
    if not (values[0] if of_texts else values[0].strip()):
        raise UserError(f"--{name} is empty; expected at least one value, or leave the flag out.")
    if len(values) == 1 and values[0].startswith("["):
        try:
            is_list = isinstance(json.loads(values[0]), list)
        except ValueError:
            is_list = not of_texts  # a list of words without quotes
        if is_list:
            return values[0]
    return json.dumps(values) if of_texts else "[" + ", ".join(values) + "]"


def _refuse_repeated(words: Sequence[str]) -> None:
    """Raise UserError for a flag given twice, under any of its names: only the last value would count."""
    names = Counter(word.partition("=")[0] for word in words if word.startswith("--"))
    if twice := [name for name, times in names.items() if times > 1]:
        raise UserError(f"{twice[0]} was given {names[twice[0]]} times; wanted once.")


def _refuse_empty(cls: type, words: Sequence[str]) -> None:
    """Raise UserError for `--name ""`: an empty path would mean the working directory."""
    hints = typing.get_type_hints(cls)
    for word in words:
        name, has_value, value = word.removeprefix("--").partition("=")
        if name in hints and has_value and not value.strip():
            raise UserError(f"--{name} {value!r}: wanted a value, got an empty text. To use the default, leave --{name} out.")


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) is list or any(typing.get_origin(a) is list for a in typing.get_args(hint))


def _take_config(words: list[str]) -> tuple[str | None, list[str]]:
    """The value of --config, and the other words."""
    if "--config" in words:
        raise UserError("--config has no value; expected --config FILE.")
    given = [w for w in words if w.startswith("--config=")]
    return (given[0].partition("=")[2] if given else None), [w for w in words if w not in given]
