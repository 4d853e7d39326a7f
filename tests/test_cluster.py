"""The SLURM files: valid bash, valid directives, and a whole run in two shards through a stand-in for sbatch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FOLDER = ROOT / "configs" / "slurm"
FILES = sorted(FOLDER.glob("*.s*"))
JOBS = [path for path in FILES if path.suffix == ".sbatch"]
DIRECTIVE = re.compile(r"#SBATCH --(job-name|array|gpus|cpus-per-task|mem|time|output)=\S+|#SBATCH --(requeue|exclusive)")
# Runs every task of an array at once and in order, with the variables that SLURM sets, and writes what it was asked for
SBATCH = """#!/usr/bin/env bash
set -euo pipefail
array=
echo "$*" >> "$ASKED"
while [[ $1 == --* ]]; do
  case $1 in --array=*) array=${1#--array=} ;; esac
  shift
done
[ -n "$array" ] || array=$(sed -n 's/^#SBATCH --array=//p' "$1")
if [ -z "$array" ]; then bash "$@" >&2; else
  for ((i = ${array%-*}; i <= ${array#*-}; i++)); do
    SLURM_ARRAY_TASK_ID=$i SLURM_ARRAY_TASK_MIN=${array%-*} SLURM_ARRAY_TASK_COUNT=$((${array#*-} - ${array%-*} + 1)) bash "$@" >&2
  done
fi
echo "$(wc -l < "$ASKED");cluster"
"""


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_the_files_are_valid_bash(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=True).stderr == ""
    assert "set -euo pipefail" in path.read_text()


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.name)
def test_directives_come_before_the_first_command_and_are_known(path):
    lines = path.read_text().splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH")]
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert len(directives) >= 5 and all(DIRECTIVE.fullmatch(line) for line in directives)
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]  # sbatch ignores these


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_missing_argument_is_named(path):
    done = subprocess.run(["bash", path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "expected CONFIG" in done.stderr


def test_the_documentation_names_every_file():
    text = (ROOT / "docs" / "cluster.md").read_text()
    assert len(JOBS) == 4 and not [path.name for path in FILES if f"configs/slurm/{path.name}" not in text]


def test_an_array_of_any_first_task_covers_every_shard(tmp_path):
    """`--array=0-2` and `--array=1-3` are the same three shards."""
    (tmp_path / "python").write_text('#!/usr/bin/env bash\necho "${@: -1}"\n')
    (tmp_path / "python").chmod(0o755)
    for first in (0, 1, 5):
        shards = []
        for task in range(first, first + 3):
            variables = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MIN": first, "SLURM_ARRAY_TASK_COUNT": 3}
            environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **{k: str(v) for k, v in variables.items()}}
            command = ["bash", str(FOLDER / "extract.sbatch"), "c.yaml", "train"]
            shards.append(subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout.strip())
        assert shards == ["1/3", "2/3", "3/3"]


def test_one_task_of_an_array_alone_is_refused(tmp_path):
    """`--array=3` would otherwise extract the whole split as shard 1/1."""
    variables = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "1", "PATH": os.environ["PATH"]}
    command = ["bash", str(FOLDER / "extract.sbatch"), "c.yaml", "train"]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "submit the whole array again" in done.stderr


@pytest.mark.parametrize(("task", "adapter"), [(0, "hidden"), (1, "chained"), (2, "attending")])
def test_each_training_task_trains_its_adapter(tmp_path, task, adapter):
    (tmp_path / "python").write_text('#!/usr/bin/env bash\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(task)}
    command = ["bash", str(FOLDER / "train.sbatch"), "c.yaml", "--limit", "9"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["feature_alignment/train_hidden_adapter.py", *f"--config c.yaml --adapter {adapter} --limit 9".split()]


@pytest.mark.slow
def test_a_whole_run_in_two_shards_gives_the_files_of_one_machine(finished, tmp_path):
    config = json.loads((finished / "tiny.yaml").read_text())
    config["common"]["output_dir"] = str(tmp_path / "out")
    config["train_hidden_adapter.chained"] = {"bottleneck": 16}
    (tmp_path / "tiny.yaml").write_text(json.dumps(config))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "ASKED": str(tmp_path / "asked.txt"), "PYTHONPATH": str(ROOT)}
    command = ["bash", "configs/slurm/submit.sh", str(tmp_path / "tiny.yaml"), "2"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    asked = (tmp_path / "asked.txt").read_text().splitlines()
    jobs = [line.split("configs/slurm/")[1].split()[0].removesuffix(".sbatch") for line in asked]
    assert jobs == [*["extract", "merge"] * 3, "train", "benchmark"]
    assert "--dependency=afterok:1 " in asked[1] and "--dependency=afterok:2:4:6 " in asked[6] and "--dependency=afterok:7 " in asked[7]
    for split in ("train", "validation", "test"):
        for name in ("egpt_hidden_states.pt", "vl_hidden_states.pt", "egpt_event_states.pt", "vl_prompt_states.pt", "positions.pt"):
            one, other = (out / "hidden_states" / split / name for out in (finished / "out", tmp_path / "out"))
            assert one.read_bytes() == other.read_bytes(), (split, name)
        assert len(list((tmp_path / "out" / "hidden_states").glob(f"{split}.shard-*"))) == 2
    weights = [json.loads((out / "adapter" / "meta.json").read_text())["weights_hash"] for out in (finished / "out", tmp_path / "out")]
    assert (tmp_path / "out" / "benchmark" / "benchmark.json").is_file() and list((tmp_path / "out" / "sd").glob("*.json"))
    assert len(set(weights)) == 1
