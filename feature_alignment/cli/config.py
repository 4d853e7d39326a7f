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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from feature_alignment.cli.advice import use_config
from feature_alignment.cli.console import UserError, set_quiet
from feature_alignment.cli.ranges import validate, validate_text
from feature_alignment.cli.text_files import read_text

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
_LONGEST_CONFIG = 100_000
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
        limit: at most this many samples
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
    config_path, words = _take_option(words, "--config")
    show = "--print_config" in words
    words = [w for w in words if w != "--print_config"]
    _refuse_empty(cls, words)
    chosen = next((w.partition("=")[2] for w in words if variant and w.startswith(f"--{variant}=")), None)
    from_file = _file_settings(cls, Path(config_path), section, chosen) if config_path else {}

    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(
        prog=f"python feature_alignment/{section}.py",
        usage="%(prog)s [--config FILE] [flags]",
        description=(cls.__doc__ or "").split("Args:")[0].strip(),
        epilog=f"example: python feature_alignment/{section}.py --config configs/demo.yaml",
        formatter_class=HelpFormatter,
        exit_on_error=False,
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
    try:
        namespace = parser.parse_args(words, namespace=parser.parse_object(from_file))
        values = {f.name: getattr(namespace, f.name) for f in dataclasses.fields(cls)}
    except (ArgumentError, ValueError, TypeError, RecursionError) as error:
        said = "too many brackets" if isinstance(error, RecursionError) else str(error)[:1000]
        raise UserError(f"{said}\nSee: python feature_alignment/{section}.py --help") from None
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
        if _is_list(hints.get(name)) and following and not following[0].strip():
            raise UserError(f"--{name} is empty; expected at least one value, or leave the flag out.")
        if _is_list(hints.get(name)) and following and not following[0].startswith(("[", "null")):
            following = ["[" + ", ".join(following) + "]"]
        if hints.get(name) is bool and not following:
            following = ["true"]
        words.append(f"--{name}" + "".join(f"={v}" for v in following))
    return words


def _refuse_empty(cls: type, words: Sequence[str]) -> None:
    """Raise UserError for `--name ""`: an empty path would mean the working directory."""
    hints = typing.get_type_hints(cls)
    for word in words:
        name, has_value, value = word.removeprefix("--").partition("=")
        if name in hints and has_value and not value.strip():
            raise UserError(f"--{name} {value!r}: wanted a value, got an empty text. To use the default, leave --{name} out.")


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) is list or any(typing.get_origin(a) is list for a in typing.get_args(hint))


def _take_option(words: list[str], name: str) -> tuple[str | None, list[str]]:
    given = [w for w in words if w.startswith(name + "=")]
    if len(given) > 1:
        raise UserError(f"{name} was given {len(given)} times; wanted once.")
    if name in words:
        raise UserError(f"{name} has no value; expected {name} FILE.")
    return (given[0].partition("=")[2] if given else None), [w for w in words if w not in given]


def _file_settings(cls: type, path: Path, section: str, chosen: str | None) -> dict[str, Any]:
    """The settings of a YAML file that apply to one script. Scalars stay strings, so `1e-3` means the same as on the command line."""
    validate_text("config", path)
    if not path.is_file():
        found = ", ".join(sorted(str(p) for p in Path("configs").glob("*.yaml"))) or "none here"
        raise UserError(f"no config file at {path} (configs/*.yaml: {found}).")
    import yaml

    try:
        text = read_text(path)
        _refuse_endless(path, text)
        _refuse_duplicates(path, yaml.compose(text, Loader=yaml.BaseLoader))
        content = yaml.load(text, Loader=yaml.BaseLoader) or {}
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    known = {"common", *SCRIPTS, "train_hidden_adapter.plain", "train_hidden_adapter.chained", "train_hidden_adapter.attending"}
    if not isinstance(content, dict) or not set(content) <= known:
        extra = sorted(set(content) - known) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: unknown section {extra}; wanted `common` and script names: {', '.join(SCRIPTS)}.")
    names = {f.name for f in dataclasses.fields(cls)}
    shared = {f.name for f in dataclasses.fields(Common)}
    merged: dict[str, Any] = {}
    for part, allowed in (("common", shared), (section, names), *([(f"{section}.{chosen}", names)] if chosen else [])):
        settings = content.get(part) or {}
        if not isinstance(settings, dict):
            raise UserError(f"{path}: section `{part}` must hold settings, got {settings!r}.")
        for key, value in settings.items():
            if key not in allowed:
                raise UserError(f"{path}: unknown key `{part}.{key}`; known here: {', '.join(sorted(allowed))}.")
            if value is None or value == "":
                raise UserError(f"{path}: `{part}.{key}` is empty; wanted a value, or `null` for none.")
            merged[key] = value
    return merged


def _refuse_endless(path: Path, text: str) -> None:
    """Raise UserError for YAML that takes very long to read: large, deeply nested, or with aliases, which can multiply its size."""
    import yaml

    depth = 0
    for event in yaml.parse(text[: _LONGEST_CONFIG + 1], Loader=yaml.BaseLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > 10 or len(text) > _LONGEST_CONFIG:
            raise UserError(f"{path}: wanted at most {_LONGEST_CONFIG:,} characters, 10 levels of nesting and no aliases (*name).")


def _refuse_duplicates(path: Path, node: Any, prefix: str = "") -> None:
    """Raise UserError for a key given twice in one mapping: YAML readers silently keep the last value."""
    import yaml

    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(path, item, prefix)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines:
            raise UserError(f"{path}: `{prefix}{name}` is given in line {lines[name]} and again in line {line}. Remove one of them.")
        lines[name] = line
        _refuse_duplicates(path, value, f"{prefix}{name}.")
