"""Imports only point down; nothing unsafe is loaded; functions fit on a screen; the top of the package is the task list."""

from __future__ import annotations

import ast
import re

import pytest
from conftest import ROOT

from feature_alignment.cli.config import SCRIPTS

PACKAGE = ROOT / "feature_alignment"
# A wing may import from itself and from those before it. The scripts, and the demo, are imported by nobody.
WINGS = ("cli", "storage", "inputs", "adapters", "models", "decoding", "measurement", "benchmark", "demo", "scripts")
LONGEST_FILE, LONGEST_BODY = 350, 60
# Bodies that stay longer, and why
EXCEPTIONS: dict[str, str] = {}
FILES = sorted(PACKAGE.rglob("*.py"))


def wing_of(parts: tuple[str, ...] | list[str]) -> str:
    return parts[0] if (PACKAGE / parts[0]).is_dir() else "scripts"


def imports():
    """(file, its wing, wing that it imports from) of every import within the package."""
    for path in FILES:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "feature_alignment":
                below = node.module.split(".")[1:]
                names = [below] if below else [[alias.name] for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name.split(".")[1:] for alias in node.names if alias.name.startswith("feature_alignment.")]
            yield from (("/".join(parts), wing_of(parts), wing_of(name)) for name in names)


def test_the_top_of_the_package_is_the_task_list():
    assert {p.stem for p in PACKAGE.glob("*.py")} == {*SCRIPTS, "__init__"}
    assert {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"} == {*WINGS} - {"scripts"}


def test_imports_point_down():
    found = list(imports())
    wrong = [f"{file} imports {target}" for file, wing, target in found if WINGS.index(target) > WINGS.index(wing)]
    wrong += [f"{file} imports a script" for file, _, target in found if target == "scripts"]
    assert not wrong
    assert len(found) > 200


def test_nobody_but_the_demo_imports_the_demo():
    assert not [file for file, wing, target in imports() if target == "demo" and wing != "demo"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_and_each_function_in_it_fit_on_few_screens(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    long = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            lines = (node.end_lineno or 0) - body[0].lineno + 1
            if lines > LONGEST_BODY:
                long[f"{path.relative_to(PACKAGE)}:{node.name}"] = lines
    assert not set(long) - set(EXCEPTIONS), long


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_unsafe_is_loaded(path):
    text = path.read_text()
    assert not re.search(r"np\.load\([^)]*allow_pickle=True|trust_remote_code|except:\s", text)
    for call in re.findall(r"torch\.load\([^)]*\)", text):
        assert "weights_only=True" in call
