"""Settings: defaults < common < section < flags; everything unknown is refused with its name."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT

from feature_alignment.config import SCRIPTS, Common, parse_config
from feature_alignment.console import CONSOLE, UserError, print_table


@dataclass(frozen=True)
class Settings(Common):
    """Do it.

    Args:
        lr: step size
        num_draft_tokens: drafts
    """

    lr: float = 1e-3
    num_draft_tokens: list[int] = field(default_factory=lambda: [5])


def parse(*argv):
    return parse_config(Settings, argv, "train_hidden_adapter")


def test_order_of_precedence(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("common: {seed: 1, threads: 2, draft_layers: [2, 4]}\ntrain_hidden_adapter: {lr: 3e-4}\n")
    assert parse().lr == 1e-3
    cfg = parse("--config", str(path), "--threads", "7")
    assert (cfg.seed, cfg.threads, cfg.lr, cfg.draft_layers) == (1, 7, 3e-4, [2, 4])
    assert cfg.output_dir == Path("outputs/mine")


def test_both_spellings_lists_and_aliases():
    cfg = parse("--draft-layers", "1", "3", "--gamma", "4", "--max_samples=9", "--no-resume")
    assert (cfg.draft_layers, cfg.num_draft_tokens, cfg.limit, cfg.resume) == ([1, 3], [4], 9, False)
    assert parse("--resume").resume is True and parse("--draft_layers", "null").draft_layers is None


@pytest.mark.parametrize(
    "argv", [["--lrr", "1"], ["--lr", "fast"], ["--threads", "2.5"], ["--dtype", "float8"], ["--resume", "maybe"], ["stray"], ["--config"]]
)
def test_unknown_and_mistyped_flags_are_refused(argv):
    with pytest.raises(UserError):
        parse(*argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("common: {lrr: 1}", "common.lrr"),
        ("train_hidden_adapter: {lrr: 1}", "train_hidden_adapter.lrr"),
        ("training: {lr: 1}", "training"),
        ("train_hidden_adapter: {lr: fast}", "lr"),
        ("a: [", "not valid YAML"),
        ("common: 5", "must hold settings"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        parse("--config", str(path))
    with pytest.raises(UserError, match="no config file"):
        parse("--config", str(tmp_path / "absent.yaml"))


def config_class(script):
    module = import_module(f"feature_alignment.{script}")
    (cls,) = [
        c
        for c in vars(module).values()
        if dataclasses.is_dataclass(c) and isinstance(c, type) and issubclass(c, Common) and c is not Common
    ]
    return cls


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_file_fits_every_script(script, path):
    cfg = parse_config(config_class(script), ["--config", str(path)], script)
    assert set(cfg.manifests) >= {"train", "validation", "test"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag_without_importing_torch(script, capsys):
    code = f"import sys; sys.argv = ['x', '--help']; import runpy; runpy.run_path('feature_alignment/{script}.py', run_name='__main__')"
    probe = f"import sys, atexit; atexit.register(lambda: print('TORCH' if 'torch' in sys.modules else 'LIGHT')); {code}"
    env = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "LIGHT" in done.stdout and not done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    usage, paragraph, _options, own, common, example = done.stdout.split("\n\n")
    assert usage.startswith("usage: ") and len(paragraph.split()) > 15
    cls = config_class(script)
    shared = {f.name for f in dataclasses.fields(Common)}
    names = {part: re.findall(r"^  --(\w+)", part, re.MULTILINE) for part in (own, common)}
    assert own.startswith("flags of this script:") and names[own] == [f.name for f in dataclasses.fields(cls) if f.name not in shared]
    assert common.startswith("flags of all scripts:") and names[common] == [f.name for f in dataclasses.fields(Common)]
    words = shlex.split(example.split("LIGHT")[0].removeprefix("example: "))
    assert words[:2] == ["python", f"feature_alignment/{script}.py"]
    with pytest.raises(SystemExit):
        parse_config(cls, [*words[2:], "--print_config"], script)
    assert "target_id" in capsys.readouterr().out


def test_results_go_to_stdout_and_logs_to_stderr(tiny_run, tmp_path):
    argv = ["--config", str(tiny_run / "tiny.yaml"), "--split", "test", "--limit", "2", "--output_dir", str(tmp_path)]
    command = [sys.executable, "feature_alignment/extract_hidden_states.py", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    results, logs = done.stdout.splitlines(), done.stderr.splitlines()
    assert json.loads(results[-1])["rows"] == 2 and results[1].startswith("hidden states of test")
    assert any("2 of 2 rows to do" in line for line in logs) and not set(logs) & set(results), logs


@pytest.mark.parametrize("width", [3, 30, 150])
def test_tables_are_readable_at_100_columns(capsys, width):
    header, rows = (
        ("what", *(f"column {i}" for i in range(12))),
        [(f"row {k}", *(f"{k}.{i}" * 3 for i in range(11)), "w " * width) for k in range(3)],
    )
    print_table("title", header, rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= CONSOLE
    said = " ".join(lines).split()
    for word in (w for row in (header, *rows) for cell in row[1:] for w in cell.split()):
        assert word in said
    assert said.count("w") == 3 * width


@pytest.mark.parametrize("argv", [["--lrr", "1"], ["--config", "absent.yaml"], ["--limit", "x"]])
def test_a_users_mistake_is_one_message_and_exit_code_2(argv):
    done = subprocess.run(
        [sys.executable, "feature_alignment/train_hidden_adapter.py", *argv], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr and not done.stdout
