"""Every command of README is one that works: its flags are known, its script is there, and the cheap ones run. Every number of a
measured table is the one in the JSON it came from; a comment behind the table says which (see `disagreements`)."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from feature_alignment.console import UserError
from feature_alignment.demo import scenes

README = (ROOT / "README.md").read_text()
OUT = ROOT / "outputs" / "demo"
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
LINES = [line.strip() for block in BLOCKS for line in re.sub(r"\\\n\s*", "", block).splitlines() if line.strip()]
SCRIPTS = [line for line in LINES if "feature_alignment/" in line]
CONFIGURED = [line for line in SCRIPTS if " compare " not in line]

# A table, and behind it what its numbers come from: <!-- file.json, made <meta.created>; then one line per row -->
TABLE = re.compile(r"^((?:\|.*\|\n)+)(\n*(?:<!-- \S+\.json(?:.|\n)*?-->\n*)*)", re.MULTILINE)
SOURCE = re.compile(r"<!-- (\S+\.json), made (\S+)\n((?:.|\n)*?)-->")
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?: %)?")
SIZES = {"params", "measured", "note"}  # where numbers of parameters stand
MEASURED = re.compile(r"\d\.\d+ \[-?\d+\.\d+, -?\d+\.\d+\]")  # a value with its interval


def words_of(line):
    return shlex.split(line, comments=True)


# ------------------------------------------------------------------------------------------------------------------ commands


def test_the_two_commands_are_there():
    commands = {" ".join(words_of(line)) for line in LINES}
    assert {"bash run_all.sh", "bash run_tests.sh"} <= commands
    assert (ROOT / "run_all.sh").is_file() and (ROOT / "run_tests.sh").is_file()
    assert len(SCRIPTS) >= 6


@pytest.mark.parametrize("line", CONFIGURED)
def test_each_command_is_understood(line, geometry, capsys):
    words = words_of(line.replace("outputs/geometry_7b", str(geometry)))
    at = next(i for i, w in enumerate(words) if w.startswith("feature_alignment/"))
    script = words[at].removeprefix("feature_alignment/").removesuffix(".py")
    with pytest.raises(SystemExit) as stop:
        import_module(f"feature_alignment.{script}").main([*words[at + 1 :], "--print_config"])
    assert not stop.value.code
    assert "target_id" in capsys.readouterr().out


@pytest.mark.parametrize("line", [line for line in SCRIPTS if "hidden_adapter.py --hidden" in line])
def test_the_cost_of_the_adapter_is_as_said(line):
    assert import_module("feature_alignment.hidden_adapter").main(words_of(line)[2:])["parameters"] == 2_101_504


def adapted(words: list[str], root: Path) -> list[str]:
    """A command of README as it is typed for the tiny pair: its config, its samples, its folder, one process."""
    words = [str(root / "tiny.yaml") if w == "configs/demo.yaml" else w for w in words]
    words = [w.replace("outputs/demo", str(root.parent / "as_it_was")).replace("outputs/layers", str(root / "layers")) for w in words]
    if "--draft_layers" in words:  # the tiny drafter has three layers
        at = words.index("--draft_layers") + 1
        words[at : at + 3] = ["1", "2", "3"]
    if "--sample" in words:
        words[words.index("--sample") + 1] = json.loads((root / "scenes" / "test.jsonl").read_text().splitlines()[0])["id"]
    if "--train_token_adapter" in words:
        words += ["--num_epochs", "1"]
    return words


def test_every_command_runs(finished, geometry, tmp_path):
    """All of them, in their order, on the tiny pair; those for several machines, GPUs or hours of the demo pair only to their message."""
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    shutil.copytree(finished / "out", tmp_path / "as_it_was")
    config = json.loads((root / "tiny.yaml").read_text().replace(str(finished / "out"), str(root / "out")))
    config["common"]["manifests"]["calibration"] = str(scenes.write_split(root / "scenes", "calibration", 3))
    (root / "tiny.yaml").write_text(json.dumps(config))
    for line in SCRIPTS + [line for line in LINES if line.startswith("python -m feature_alignment.")]:
        words = words_of(line)
        if "--shard" in words or "--merge" in words or words[0] == "torchrun" or "feature_alignment.demo." in line:
            continue  # tests/test_extraction.py runs several shards and processes, tests/conftest.py the demo's scenes and pair
        at = next(i for i, w in enumerate(words) if "feature_alignment" in w)
        rest = [w.replace("outputs/geometry_7b", str(geometry)) for w in adapted(words[at + 1 :], root)]
        if words[1] == "-m":
            done = subprocess.run([sys.executable, "-m", words[2], *rest], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == (2 if "7b" in line else 0) and "Traceback" not in done.stderr, done.stderr
            continue
        if "A.json" in rest:
            rest = [rest[0], *[str(root / "out" / "benchmark" / "benchmark.json")] * 2]
        script = import_module(words[at].removesuffix(".py").replace("/", "."))
        if "geometry_7b" in line and not torch.cuda.is_available():
            with pytest.raises(UserError, match="sees no GPU"):
                script.main(rest)
        else:
            script.main(rest)


# ------------------------------------------------------------------------------------------------------------------- numbers


def disagreements(readme: str, out: Path) -> tuple[list[str], int]:
    """The numbers of a README's marked tables that are not in the JSON files under `out`, and how many numbers were compared.

    Behind a table stands one comment for each file its rows come from, with the file's own `meta.created`:

        <!-- acceptance/acceptance.json, made 2026-01-31T12:00:00Z
        * = chains/* : cosine | steps/token_match | tokens_per_pass
        ridge regression = nulls/ridge : cosine | token_match | tokens_per_pass
        -->

    Left of `=` the row's first cell, or `*` for rows not named; then a path, where `*` stands for that cell and `[name]` picks the
    item of a list whose values spell the name; then the keys of each further column, `-` for none. A number agrees if one under its
    keys rounds to it. Of another run than the one README tells of, only the numbers of parameters are compared: all others depend on
    the machine.
    """
    wrong, compared = [], 0
    for table, comments in TABLE.findall(readme):
        rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()[2:]]
        sources = [(out / name, made, dict(_rule(line) for line in lines.splitlines())) for name, made, lines in SOURCE.findall(comments)]
        for first, *cells in rows if sources else []:
            path, made, rules = next(s for s in sources if first in s[2] or ("*" in s[2] and not any(first in t[2] for t in sources)))
            content = json.loads(path.read_text())
            where, columns = rules.get(first, rules.get("*"))
            same_run = made == content["meta"]["created"]
            try:
                part = _at(content, where.replace("*", first))
                if part is None:  # not trained in that run
                    raise KeyError(where)
            except (KeyError, StopIteration):
                wrong += [f"{path.name}, {first}: nothing at {where}"] if same_run else []
                continue
            for cell, keys in zip(cells, columns, strict=True):
                known = [n for key in keys for n in _numbers(_at(part, key))]
                of_any_run = SIZES & set(keys)
                for text in NUMBER.findall(cell):
                    measured = "." in text or "," in text  # others are words: "drafts 1 to 5"
                    if not measured or not (same_run or ("," in text and of_any_run)):
                        continue
                    compared += 1
                    wrong += [] if any(_rounds_to(n, text) for n in known) else [f"{path.name}, {first}: {text} is not among {known[:6]}"]
    return wrong, compared


def _rule(line: str) -> tuple[str, tuple[str, list[list[str]]]]:
    row, rest = line.split(" = ")
    path, columns = rest.split(" : ")
    return row.strip(), (path.strip(), [[k.strip() for k in c.split(",") if k.strip() != "-"] for c in columns.split("|")])


def _at(content, path: str):
    """What lies at a path. A list that is not picked from stands for all its items. `.` is the file itself."""
    for step in re.findall(r"\[[^\]]*\]|[^/\[]+", path) if path != "." else []:
        if step.startswith("["):
            spelt = re.findall(r"[\w.]+", step)
            words = lambda item: re.findall(r"[\w.]+", " ".join(str(v) for v in item.values() if not isinstance(v, dict | list)))  # noqa: E731
            content = next(item for item in content if set(spelt) <= set(words(item)))
        else:
            content = [item[step] for item in content] if isinstance(content, list) else content[step]
    return content


def _numbers(content) -> list[float]:
    """All numbers in a value, those in its texts included; of a rate not its percentiles."""
    if isinstance(content, dict) and "ci95" in content and "value" in content:
        content = [content.get(k) for k in ("value", "ci95", "count", "total")]
    if isinstance(content, dict | list):
        return [n for item in (content.values() if isinstance(content, dict) else content) for n in _numbers(item)]
    if isinstance(content, str):
        return [float(text.replace(",", "").removesuffix(" %")) for text in NUMBER.findall(content)]
    return [] if content is None or isinstance(content, bool) else [float(content)]


def _rounds_to(number: float, text: str) -> bool:
    digits = len(text.removesuffix(" %").partition(".")[2])
    return f"{number * (100 if text.endswith('%') else 1):,.{digits}f}" in (text.removesuffix(" %"), f"-{text}")


def test_numbers_that_differ_from_their_file_are_found(tmp_path):
    rows = [
        {"draft": "own", "accept": "token", "g": g, "speedup": {"value": g / 7, "ci95": [0.4, 0.5]}, "params": 1000 * g} for g in (3, 5)
    ]
    (tmp_path / "b.json").write_text(json.dumps({"meta": {"created": "now"}, "rows": rows, "note": "1,234 in all, 12.5 %", "part": 0.125}))
    right = "| a | speed | params |\n|---|---|---|\n| own + token, 3 | 0.43 [0.40, 0.50] in 3 drafts | 3,000 |\n| all | 12.5 % | 1,234 |\n"
    mark = "\n<!-- b.json, made {}\n* = rows[*] : speedup | params\nall = . : part | note\n-->\n"
    assert disagreements(right + mark.format("now"), tmp_path) == ([], 6)
    assert disagreements(right + mark.format("then"), tmp_path) == ([], 2)
    assert disagreements(right, tmp_path) == ([], 0)
    for old, new in (("0.43", "0.44"), ("0.40", "0.41"), ("3,000", "5,000"), ("12.5 %", "12.6 %"), ("1,234", "1,235")):
        (found,) = disagreements((right + mark.format("now")).replace(old, new, 1), tmp_path)[0]
        assert new in found
    (found,) = disagreements((right + mark.format("now")).replace("own + token, 3", "own + token, 4"), tmp_path)[0]
    assert "nothing at" in found


@pytest.mark.skipif("<!-- " not in README, reason="README marks no table")
def test_every_measured_table_says_where_it_comes_from():
    unmarked = [table for table, comments in TABLE.findall(README) if MEASURED.search(table) and not SOURCE.search(comments)]
    assert not unmarked


@pytest.mark.skipif(not OUT.is_dir(), reason="no outputs of a whole run are here")
def test_numbers_are_those_of_the_run_they_came_from():
    wrong, compared = disagreements(README, OUT)
    assert not wrong
    if not compared:
        pytest.skip("README marks no table")
