"""README and the documents say what is so: every command is executed or parsed, every link leads somewhere, every flag is known, and
every measured number is the one in the result file that a comment names (see `disagreements`)."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import readme
import torch
from conftest import ROOT

from feature_alignment.cli import ranges
from feature_alignment.cli.config import SCRIPTS, Common
from feature_alignment.cli.console import UserError
from feature_alignment.demo import scenes

PATHS = [ROOT / name for name in ("README.md", "TASKS.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PATHS += [*sorted((ROOT / "docs").glob("*.md")), ROOT / "data" / "README.md"]
DOCUMENTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PATHS}
README = DOCUMENTS["README.md"]
OUT = ROOT / "outputs" / "demo"


def commands_in(text: str) -> list[str]:
    """The command lines of the fenced bash blocks, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line.strip() for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines() if line.strip()]


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


LINES = list(dict.fromkeys(line for text in DOCUMENTS.values() for line in commands_in(text)))
RUN_HERE = [line for line in LINES if "feature_alignment/" in line]
SPANS = [re.sub(r"\s+", " ", span) for text in DOCUMENTS.values() for span in code_spans(text)]
INLINE = [
    f"python feature_alignment/{s}" if re.match(r"\w+\.py --", s) else s
    for s in SPANS
    if re.match(r"(python|bash|pip|torchrun) |\w+\.py --", s)
]
SCRIPT_LINES = [
    line for line in dict.fromkeys([*RUN_HERE, *INLINE]) if "feature_alignment/" in line and " compare " not in line and "--" in line
]
PROGRAMS = {"python", "bash", "pip", "torchrun", "ruff", "mypy", "source", "sbatch"}


def measurements_in(lines: list[str]) -> list[str]:
    """Commands of tests/benchmarks; `speed | memory` stands for two of them, a mere path for none."""
    found = [m for line in lines if (m := re.match(r"(python )?(tests/benchmarks/\w+\.py)\b([^#]*)", line)) and (m[1] or m[3].strip())]
    return list(dict.fromkeys(f"{m[2]} {rest.strip()}" for m in found for rest in m[3].split("|")))


# A table, and after it what its numbers come from: <!-- file.json, made <meta.created>; then one line per row -->
TABLE = re.compile(r"^((?:\|.*\|\n)+)(\n*(?:<!-- \S+\.json(?:.|\n)*?-->\n*)*)", re.MULTILINE)
SOURCE = re.compile(r"<!-- (\S+\.json), made (\S+)\n((?:.|\n)*?)-->")
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?: %)?")
SIZES = {"params", "measured", "note"}  # columns that hold numbers of parameters
MEASURED = re.compile(r"\d\.\d+ \[-?\d+\.\d+, -?\d+\.\d+\]")  # a value with its interval


def words_of(line):
    return shlex.split(line, comments=True)


# ------------------------------------------------------------------------------------------------------------------ commands


def test_readme_fits_one_screen_and_names_the_two_commands():
    assert len(README.splitlines()) <= 160
    commands = {" ".join(words_of(line)) for line in commands_in(README)}
    assert {"bash run_all.sh", "bash run_tests.sh"} <= commands
    assert {Path(words_of(line)[1]).stem for line in commands_in(README) if "feature_alignment/" in line} == set(SCRIPTS)


@pytest.mark.parametrize("line", SCRIPT_LINES)
def test_each_script_s_command_is_understood(line, geometry, capsys, monkeypatch):
    monkeypatch.setattr(ranges, "INPUT_FILES", ())  # files that earlier commands make
    words = words_of(line.replace("outputs/geometry_7b", str(geometry)).replace("configs/yours.yaml", "configs/demo.yaml"))
    at = next(i for i, w in enumerate(words) if w.startswith("feature_alignment/"))
    script = words[at].removeprefix("feature_alignment/").removesuffix(".py")
    with pytest.raises(SystemExit) as stop:
        import_module(f"feature_alignment.{script}").main([*words[at + 1 :], "--print_config"])
    assert not stop.value.code
    said = capsys.readouterr().out
    assert "target_id" in said or "--help" in words


@pytest.mark.parametrize("line", measurements_in([*LINES, *SPANS]))
def test_each_longer_measurement_s_command_is_understood(line, monkeypatch):
    path, *words = words_of(line)
    module, parse = import_module(Path(path).stem), argparse.ArgumentParser.parse_args

    class Understood(Exception):
        pass

    def parsed(self, args=None, namespace=None):
        parse(self, words)
        raise Understood

    if not hasattr(module, "argparse"):
        assert callable(module.main) and not words
        return
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    with pytest.raises(Understood):
        module.main()


@pytest.mark.parametrize("line", list(dict.fromkeys([*LINES, *INLINE])))
def test_each_command_names_a_program_and_files_that_exist(line):
    for words in (words_of(part) for part in re.sub("#.*", "", line).split("&&")):
        assert words[0] in PROGRAMS
        if words[0] in ("bash", "python") and words[1] != "-m":
            assert (ROOT / words[1]).is_file(), words[1]
        if words[:2] == ["python", "-m"]:
            assert '__name__ == "__main__"' in Path(find_spec(words[2]).origin).read_text()
        if words[0] == "pip" and (extra := re.fullmatch(r"\.\[(\w+)\]", words[-1])):
            assert extra[1] in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for config in (w for w in words if re.fullmatch(r"configs/\w+\.yaml", w) and w != "configs/yours.yaml"):
            assert (ROOT / config).is_file(), config


def test_each_flag_is_known():
    for name in (*SCRIPTS, "models.pair", "adapters.share", "benchmark.plan"):
        import_module(f"feature_alignment.{name}")
    kinds, known = [Common], {"help", "print_config", "config", "no_resume", "splits"}
    known |= {"modules", "sample", "language", "duration_ms"}  # of tests.mutate, tests/benchmarks/readme.py and inputs.simulate
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        known |= {f.name for f in dataclasses.fields(kind)}
    launchers = {"nproc_per_node", "array", "dependency"}  # of torchrun and sbatch
    unknown = {
        (name, flag)
        for name, text in DOCUMENTS.items()
        for code in [*code_spans(text), *commands_in(text)]
        for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9_]*)", code)
        if flag not in known | launchers
    }
    assert not unknown


def said_by_the_package() -> list[str]:
    """Every string of the package; of an f-string its constant parts, one space for each value in it."""
    said = []
    for path in (ROOT / "feature_alignment").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                said.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    return said


def test_each_quoted_symptom_is_a_message_of_the_package():
    said = said_by_the_package()
    cells = [line.split("|")[1] for line in DOCUMENTS["docs/troubleshooting.md"].splitlines() if line.startswith("| `")]
    symptoms = [part.strip() for cell in cells for span in re.findall(r"`([^`]+)`", cell) for part in span.split("…") if part.strip()]
    missing = [s for s in symptoms if not any(s in text for text in said)]
    assert len(symptoms) > 40 and not missing


def test_each_link_leads_to_a_file():
    for path in PATHS:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
            assert target.startswith("https://") or (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.parametrize("line", [line for line in SCRIPT_LINES if "hidden_adapter.py --hidden" in line])
def test_the_hidden_adapter_has_the_parameters_that_readme_states(line):
    assert import_module("feature_alignment.hidden_adapter").main(words_of(line)[2:])["parameters"] == 2_101_504


def adapted(words: list[str], root: Path) -> list[str]:
    """A command of a document as it is typed for the tiny pair: its config, its samples, its folder, one process."""
    words = [str(root / "tiny.yaml") if w == "configs/demo.yaml" else w for w in words]
    folders = {"demo": root.parent / "as_it_was"} | {name: root / name for name in ("layers", "depth", "shared")}
    for name, here in folders.items():
        words = [w.replace(f"outputs/{name}", str(here)) for w in words]
    if "--draft_layers" in words:  # the tiny drafter has three layers
        at = end = words.index("--draft_layers") + 1
        while end < len(words) and words[end].isdigit():
            end += 1
        words[at:end] = ["1", "2", "3"]
    if "--sample" in words:
        words[words.index("--sample") + 1] = json.loads((root / "scenes" / "test.jsonl").read_text().splitlines()[0])["id"]
    if "--clips" in words:
        row = json.loads((root / "scenes" / "test.jsonl").read_text().splitlines()[0])
        (root / "clips").mkdir(exist_ok=True)
        for key in ("events", "video"):
            shutil.copy(root / "scenes" / row[key], root / "clips" / f"a{Path(row[key]).suffix}")
        words[words.index("--clips") + 1] = str(root / "clips")
    if "--train_token_adapter" in words:
        words += ["--num_epochs", "1"]
    return words


def test_every_command_runs(finished, geometry, tmp_path):
    """All fenced commands, in their order, on the tiny pair; those for machines or hours that are not here only to their message.

    What modules do comes last, but for the sharing of an adapter, which a script then uses.
    """
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    shutil.copytree(finished / "out", tmp_path / "as_it_was")
    config = json.loads((root / "tiny.yaml").read_text().replace(str(finished / "out"), str(root / "out")))
    config["common"]["manifests"]["calibration"] = str(scenes.write_split(root / "scenes", "calibration", 3))
    (root / "tiny.yaml").write_text(json.dumps(config))
    lines = RUN_HERE + [line for line in LINES if line.startswith("python -m feature_alignment.")]
    for line in sorted(lines, key=lambda line: "adapters.share" not in line):
        words = words_of(line)
        if "--shard" in words or "--merge" in words or words[0] == "torchrun" or "feature_alignment.demo." in line:
            continue  # tests/test_extraction.py runs several shards and processes, tests/conftest.py the demo's scenes and pair
        if "configs/language.yaml" in line:
            continue  # tests/test_attending.py and tests/test_ablations.py train and measure variants
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
    """The numbers of a document's marked tables that are not in the JSON files under `out`, and how many numbers were compared.

    After a table comes one comment for each file its rows come from, with the file's own `meta.created`:

        <!-- acceptance/acceptance.json, made 2026-01-31T12:00:00Z
        * = chains/* : cosine | steps/token_match | tokens_per_pass
        ridge regression = nulls/ridge : cosine | token_match | tokens_per_pass
        -->

    Left of `=` the row's first cell, or `*` for rows not named; then a path, where `*` stands for that cell and `[name]` picks the
    item of a list whose values spell the name; then the keys of each further column, `-` for none. A number agrees if one under its
    keys rounds to it. If the file is of another run than the document quotes, only the numbers of parameters are compared: all others
    depend on the machine.
    """
    wrong, compared = [], 0
    for table, comments in TABLE.findall(readme):
        rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()[2:]]
        sources = [
            (ROOT / name if name.startswith("data/") else out / name, made, dict(_rule(line) for line in lines.splitlines()))
            for name, made, lines in SOURCE.findall(comments)
        ]
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
    """The value at a path. A list that is not picked from stands for all its items. `.` is the file itself."""
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


def test_every_measured_table_names_its_result_file():
    tables = [(name, table, comments) for name, text in DOCUMENTS.items() for table, comments in TABLE.findall(text)]
    assert not [(name, table) for name, table, comments in tables if MEASURED.search(table) and not SOURCE.search(comments)]


def test_all_documents_quote_one_run():
    quoted: dict[str, set[str]] = {}
    for text in DOCUMENTS.values():
        for name, made, rules in SOURCE.findall(text):
            if not name.startswith("data/") and "calibration" not in rules:  # certified thresholds come from a run of their own
                quoted.setdefault(name, set()).add(made)
        for name, made in re.findall(r"(\S+\.json) made (\S+?)(?:;| -->)", text):
            if not name.startswith("data/"):
                quoted.setdefault(name, set()).add(made)
    assert len(quoted) == 4 and all(len(made) == 1 for made in quoted.values()), quoted


def test_numbers_of_the_gpu_run_are_those_of_its_files():
    wrong, compared = disagreements(DOCUMENTS["docs/gpu.md"], OUT)
    assert not wrong and compared > 30
    assert readme.rendered("docs/gpu.md", DOCUMENTS["docs/gpu.md"], readme.Run(OUT)) == DOCUMENTS["docs/gpu.md"]


@pytest.mark.skipif(not OUT.is_dir(), reason="no outputs of a whole run are here")
@pytest.mark.parametrize("name", readme.DOCUMENTS)
def test_numbers_are_those_of_the_run_they_came_from(name):
    wrong, compared = disagreements(DOCUMENTS[name], OUT)
    assert not wrong and compared


@pytest.mark.skipif(not OUT.is_dir(), reason="no outputs of a whole run are here")
@pytest.mark.parametrize("name", readme.DOCUMENTS)
def test_sentences_and_boxes_are_those_of_the_run_they_came_from(name):
    run = readme.Run(OUT)
    quoted = dict(re.findall(r"<!-- ((?:benchmark|acceptance|token_baseline)/\S+\.json), made (\S+)\n", DOCUMENTS["docs/results.md"]))
    if any(run.made[file] != made for file, made in quoted.items() if file != "acceptance/acceptance.json"):
        pytest.skip("the documents quote another run")
    assert readme.rendered(name, DOCUMENTS[name], run) == DOCUMENTS[name]


@pytest.mark.skipif(not OUT.is_dir(), reason="no outputs of a whole run are here")
def test_an_altered_sentence_or_box_is_generated_anew():
    run = readme.Run(OUT)
    tasks = readme.rendered("TASKS.md", DOCUMENTS["TASKS.md"], run)
    measured = next(line for line in tasks.splitlines() if "Measured: 2,101,504" in line)
    altered = tasks.replace(measured, measured.replace("2,101,504", "2,000,000")).replace("- [x] **1.2", "- [ ] **1.2")
    assert altered != tasks and readme.rendered("TASKS.md", altered, run) == tasks
    text = readme.rendered("README.md", README, run)
    sentence = readme.headline(run)
    assert sentence in text and readme.rendered("README.md", text.replace(sentence, sentence.upper()), run) == text
