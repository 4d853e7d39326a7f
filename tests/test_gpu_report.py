"""The script that makes the planted table on a GPU, run at a geometry of seconds on the CPU."""

from __future__ import annotations

import subprocess

import pytest
import torch
from conftest import ROOT

from feature_alignment.benchmark.results import PlantedReport
from feature_alignment.storage.files import read_hashed_json

SCRIPT = ["bash", str(ROOT / "tests" / "benchmarks" / "gpu_report.sh")]


def run(*words, **options):
    return subprocess.run([*SCRIPT, *map(str, words)], capture_output=True, text=True, check=False, **options)


def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path):
    asked = {(tmp_path / "a", "large"): "geometry 'large': expected 7b or small", (tmp_path, "small"): "exists; expected a new directory"}
    if not torch.cuda.is_available():
        asked[tmp_path / "a", "7b"] = "torch sees no GPU here"
    for words, said in asked.items():
        done = run(*words)
        assert done.returncode == 2 and said in done.stderr and not (tmp_path / "a").exists()


@pytest.mark.slow
def test_the_script_makes_the_whole_table_at_a_small_geometry(tmp_path):
    out = tmp_path / "report"
    done = run(out, "small")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in out.iterdir()) == ["planted.json", "planted.md", "run.txt"]
    result = PlantedReport.from_json(read_hashed_json(out / "planted.json", ""))
    rows = {(r.draft, r.num_draft_tokens, r.planted_acceptance) for r in result.rows}
    assert rows == {(d, g, a) for d in ("chained", "attending", "aligned") for g in (3, 4, 5, 6, 8, 10, 12) for a in (0.6, 0.7, 0.8)}
    assert result.meta["config"]["steps"] == "graphs" and result.meta["eager_fallbacks"] == []
    assert result.cost.c_chained_live > 0 and result.cost.c_chained_alone > 0 and "live / alone" in (out / "planted.md").read_text()
    about, command = (out / "run.txt").read_text().splitlines()
    assert result.meta["created"] in about and f"torch {torch.__version__.partition('+')[0]}" in about
    assert f"commit {result.meta['git_commit']}" in about and "--planted_acceptance 0.6 0.7 0.8" in command
    assert about in done.stdout
