"""Every command of README is one that works: its flags are known, its script is there, and the cheap ones run."""

from __future__ import annotations

import re
import shlex
from importlib import import_module

import pytest
from conftest import ROOT

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
LINES = [line.strip() for block in BLOCKS for line in re.sub(r"\\\n\s*", "", block).splitlines() if line.strip()]
SCRIPTS = [line for line in LINES if "feature_alignment/" in line]


def words_of(line):
    return shlex.split(line, comments=True)


def test_the_two_commands_are_there():
    commands = {" ".join(words_of(line)) for line in LINES}
    assert {"bash run_all.sh", "bash run_tests.sh"} <= commands
    assert (ROOT / "run_all.sh").is_file() and (ROOT / "run_tests.sh").is_file()
    assert len(SCRIPTS) >= 6


@pytest.mark.parametrize("line", SCRIPTS)
def test_each_command_is_understood(line, capsys):
    words = words_of(line)
    at = next(i for i, w in enumerate(words) if w.startswith("feature_alignment/"))
    script = words[at].removeprefix("feature_alignment/").removesuffix(".py")
    with pytest.raises(SystemExit) as stop:
        import_module(f"feature_alignment.{script}").main([*words[at + 1 :], "--print_config"])
    assert not stop.value.code
    assert "target_id" in capsys.readouterr().out


@pytest.mark.parametrize("line", [line for line in SCRIPTS if "hidden_adapter.py --hidden" in line])
def test_the_cost_of_the_adapter_is_as_said(line):
    assert import_module("feature_alignment.hidden_adapter").main(words_of(line)[2:])["parameters"] == 2_101_504
