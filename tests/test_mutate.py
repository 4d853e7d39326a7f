"""The mutation tool: a weak test lets mutants through, a strong one does not; and a sample of the package's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from tests import mutants, mutate

PRICES = """
def total(price, count, discount=2):
    if count > 9:
        return price * count - discount
    return price * count
"""
WEAK = "def test_total():\n    assert total(0, 5) == 0 and total(1, 20) > 0\n"
STRONG = "def test_total():\n    assert (total(3, 9), total(3, 10), total(3, 10, 1)) == (27, 28, 29)\n"


def mutation_run(*flags: str) -> tuple[int, dict, str]:
    done = subprocess.run([sys.executable, "-m", "tests.mutate", *flags], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-2000:]
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout


def project(folder: Path, test: str) -> Path:
    (folder / "shop").mkdir(parents=True)
    (folder / "tests").mkdir()
    (folder / "shop" / "prices.py").write_text(PRICES)
    (folder / "tests" / "test_prices.py").write_text(f"from shop.prices import total\n{test}")
    return folder


def test_a_weak_test_lets_mutants_through_and_a_strong_one_none(tmp_path):
    found = {}
    for name, test in (("weak", WEAK), ("strong", STRONG)):
        root = project(tmp_path / name, test)
        found[name] = mutation_run("--root", str(root), "--package", "shop", "--allowed", "0", "--seed", "1")
        assert (root / "shop" / "prices.py").read_text() == PRICES
    code, report, listed = found["weak"]
    assert code == 1 and report["mutants"] == 4 and report["survived"] >= 2
    assert "shop/prices.py:5\n  - return price * count\n  + return (price / count)\n" in listed
    code, report, _ = found["strong"]
    assert code == 0 and report["survived"] == 0


def test_the_same_seed_draws_the_same_mutants():
    draw = lambda seed: mutants.sample(ROOT, "feature_alignment", ["decoding", "measurement"], 30, seed)  # noqa: E731
    assert draw(1) == draw(1) != draw(2)
    assert len({(m.file, m.line) for m in draw(1)}) == 30


def test_every_mutant_differs_from_its_source_and_compiles():
    source = (
        b"def f(a, b=1, *, c=False):\n    '''Says 1.'''\n    x = a[1:b] if not c else min(a, b)\n    x[0] = f(b, a, c=True)\n    return x\n"
    )
    made = [m for m in mutants.mutants("f.py", source) if mutants.is_mutant(m, source)]
    texts = {m.apply(source) for m in made}
    assert len(texts) == len(made) > 12 and source not in texts
    for text in texts:
        compile(text, "f.py", "exec")
        assert b"Says 1." in text
    for after in (b"b=2", b"c=True):", b"max(a, b)", b"a[:b]", b"a[1:]", b"if (c) else", b"    pass\n", b"f(a, b, c=True)", b"f(b, a)"):
        assert any(after in text for text in texts), after


@pytest.mark.parametrize("name", ["decoding", "decoding/sampling.py", "decoding.sampling", "feature_alignment/decoding/sampling.py"])
def test_modules_are_named_by_folder_module_or_path(name):
    assert ROOT / "feature_alignment" / "decoding" / "sampling.py" in mutants.files_of(ROOT, "feature_alignment", [name])
    with pytest.raises(SystemExit, match="No module 'nothing'"):
        mutants.files_of(ROOT, "feature_alignment", ["nothing"])


def test_a_hanging_mutant_is_stopped_with_its_children(tmp_path):
    made = mutate.Project(project(tmp_path / "shop", WEAK), "shop", tmp_path)

    def job() -> int:
        child = subprocess.Popen(["sleep", "60"])
        (tmp_path / "pid").write_text(str(child.pid))
        return child.wait()

    start = time.monotonic()
    assert made.child(job, 1.0) is None and time.monotonic() - start < 10
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int((tmp_path / "pid").read_text()), 0)
            time.sleep(0.05)
    assert made.child(lambda: 3, 10) == 3


@pytest.mark.slow
def test_few_mutants_of_the_package_survive():
    """Four groups of modules, a small sample, equivalent ones among them; `python -m tests.mutate` draws more."""
    code, report, listed = mutation_run("--modules", "decoding", "measurement", "models", "storage", "--sample", "12", "--allowed", "4")
    assert code == 0 and report["mutants"] == 12, listed
