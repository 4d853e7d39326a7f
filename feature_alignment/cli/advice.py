"""Commands that an error message tells the user to type: they name the config and the output folder in use."""

from __future__ import annotations

import shlex
from pathlib import Path

_in_use = ["--config", "CONFIG"]
_output = "outputs/NAME"


def use_config(config: str | None, output_dir: Path, is_own_output: bool) -> None:
    """Record what this process was started with; the commands below repeat it.

    Args:
        config: the YAML file, None where only flags were given
        output_dir: where this run writes
        is_own_output: whether the folder was given as a flag, so that a command has to give it again
    """
    global _output
    _output = str(output_dir)
    _in_use[:] = [*(["--config", config] if config else []), *(["--output_dir", _output] if is_own_output else [])]


def command_for(script: str, *flags: str, **settings: object) -> str:
    """The shell command that runs a script with the config in use.

    Args:
        script: name of one of the seven scripts
        *flags: words added at the end, e.g. `--no_resume`
        **settings: flags with a value, e.g. `split="train"`
    """
    values = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return shlex.join(["python", f"feature_alignment/{script}.py", *_in_use, *values, *flags])


def verify_command() -> str:
    """The shell command that compares the run in use with its recorded hashes."""
    return shlex.join(["python", "-m", "feature_alignment.storage.verification", _output])
