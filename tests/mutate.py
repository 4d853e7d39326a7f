"""Mutation testing: break one line of the package at a time and see whether a fast test fails.

    python -m tests.mutate --modules decoding measurement models storage --sample 60 --seed 0

1. The fast tests run once on a copy of the project and record which lines each of them executes. The record is kept in
   `.pytest_cache/mutate.json` and made again only for test files that changed, or for all of them after a change of the package.
2. For each mutant of the sample a process is forked that has imported every library but not the package. It runs the tests that
   execute the mutated line, the cheapest first, until one fails. Tests that take too long together, or one that hangs, kill the mutant.
3. A kill counts only if the same tests, up to the one that failed, pass without the mutant; otherwise the sample is not valid.
4. Survivors are listed with their line before and after. Exit code 1: more than `--allowed` of them.

The same seed draws the same mutants from the same source. Only a POSIX system can fork.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.mutants import Mutant, sample

ROOT = Path(__file__).resolve().parents[1]
FAULT = 70  # exit code of a process that could not run the tests
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "outputs", "__pycache__", ".*_cache", "*.egg-info")


# ---- which test runs which line


class Recorder:
    """A pytest plugin: seconds, and executed lines of the package, per test and per fixture."""

    def __init__(self, root: Path, package: str) -> None:
        self.prefix, self.skip = f"{root / package}{os.sep}", len(str(root)) + 1
        self.lines: set[tuple[str, int]] = set()
        self.left: dict[Any, int] = {}
        self.fixtures: dict[str, dict] = {}
        self.tests: dict[str, dict] = {}
        self.failed: set[str] = set()

    def enter(self, frame, event, _):
        code = frame.f_code
        if not code.co_filename.startswith(self.prefix) or not self.left.get(code, 1):
            return None
        self.left.setdefault(code, len({line for *_, line in code.co_lines() if line is not None}))
        file = code.co_filename[self.skip :]

        def local(frame, event, _):
            if (at := (file, frame.f_lineno)) not in self.lines:
                self.lines.add(at)
                self.left[code] -= 1
            return local

        return local(frame, event, _)

    @contextlib.contextmanager
    def part(self) -> Iterator[dict]:
        """Lines and seconds of what runs in the block; the part around it has them too."""
        (outer, self.lines), (left, self.left), start = (self.lines, set()), (self.left, {}), time.perf_counter()
        found: dict[str, Any] = {}
        try:
            yield found
        finally:
            found["seconds"] = time.perf_counter() - start
            found["lines"] = {}
            for file, line in sorted(self.lines):
                found["lines"].setdefault(file, []).append(line)
            self.lines, self.left = outer | self.lines, left

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        with self.part() as found:
            result = yield
        self.fixtures[f"{fixturedef.baseid}:{fixturedef.argname}"] = found
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        known = set(self.fixtures)
        with self.part() as found:
            result = yield
        names = [f"{d[-1].baseid}:{d[-1].argname}" for d in item._fixtureinfo.name2fixturedefs.values()]
        found["seconds"] -= sum(self.fixtures[n]["seconds"] for n in set(self.fixtures) - known)
        self.tests[item.nodeid] = found | {"fixtures": [n for n in names if n in self.fixtures]}
        return result

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)


class Chosen:
    """A pytest plugin: only these tests, in this order of files and of tests in a file; `begun` gets the name of each as it begins."""

    def __init__(self, tests: Sequence[str], begun: Path) -> None:
        self.place = {test: i for i, test in enumerate(tests)}
        self.begun = begun

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda i: self.place[i.nodeid])

    def pytest_runtest_logstart(self, nodeid):
        with self.begun.open("a") as stream:
            stream.write(f"{nodeid}\n")


class Unclear(Exception):
    """A test failed with a mutant, and fails without it."""


class Project:
    """A copy of the project in which mutants are tested."""

    def __init__(self, root: Path, package: str, folder: Path) -> None:
        self.root, self.package, self.tree = root, package, folder / "project"
        shutil.copytree(root, self.tree, ignore=NOT_COPIED)
        if (shared := root.parent / "shared").is_dir():  # fixtures that some tests look for next to the project
            (folder / "shared").symlink_to(shared)
        self.log = folder / "log.txt"
        self.passed: set[str] = set()  # tests that failed with a mutant and passed without

    def child(self, job: Callable[[], int], seconds: float) -> int | None:
        """The exit code of `job` in a forked process of the copy; None if it was killed after `seconds`."""
        if (pid := os.fork()) == 0:
            code = FAULT
            try:
                os.setsid()
                os.chdir(self.tree)
                with open(self.log, "wb") as log, open(os.devnull) as nothing:
                    for number, stream in enumerate((nothing, log, log)):
                        os.dup2(stream.fileno(), number)
                sys.path[:] = [str(self.tree), *(p for p in sys.path if p and Path(p).resolve() != self.root)]
                os.environ["PYTHONPATH"] = str(self.tree)
                for name in [n for n in sys.modules if n.partition(".")[0] in (self.package, "tests")]:
                    del sys.modules[name]
                code = job()
            finally:
                os._exit(code)
        deadline = time.monotonic() + seconds
        try:
            while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.01)
            return os.waitstatus_to_exitcode(ended[1])
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            if ended[0] == 0:
                os.waitpid(pid, 0)

    def pytest(self, files: Sequence[str], plugin: object, *flags: str) -> int:
        return int(pytest.main([*files, "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *flags], plugins=[plugin]))

    def record(self, files: Sequence[str]) -> dict:
        """Runs the tests of `files`; {"tests", "fixtures", "modules"}."""
        out = self.log.with_name("record.json")

        def job() -> int:
            recorder = Recorder(self.tree, self.package)
            sys.settrace(recorder.enter)
            threading.settrace(recorder.enter)
            self.pytest(files, recorder)
            sys.settrace(None)
            ours = (self.package, "tests", "conftest", "__main__", "pytest", "_pytest", *(Path(f).stem for f in files))
            modules = [name for name in sys.modules if name.partition(".")[0] not in ours]
            tests = {name: test for name, test in recorder.tests.items() if name not in recorder.failed}
            out.write_text(
                json.dumps({"tests": tests, "failed": sorted(recorder.failed), "fixtures": recorder.fixtures, "modules": modules})
            )
            return 0

        if self.child(job, 3600) != 0:
            raise SystemExit(f"The tests could not be recorded:\n{self.log.read_text(errors='replace')[-2000:]}")
        return json.loads(out.read_text())

    def test(self, mutant: Mutant, tests: list[str], seconds: float) -> bool:
        """Whether all of `tests` pass with `mutant`; raises Unclear where they do not pass without it either."""
        path = self.tree / mutant.file
        source = path.read_bytes()
        try:
            path.write_bytes(mutant.apply(source))
            self._forget(path)
            survived, begun = self._passes(tests, seconds)
        finally:
            path.write_bytes(source)
            self._forget(path)
        if not survived and begun and begun[-1] not in self.passed:
            if not self._passes(begun, seconds)[0]:
                raise Unclear(f"{begun[-1]} fails without a mutant as well")
            self.passed.add(begun[-1])
        return survived

    def _passes(self, tests: list[str], seconds: float) -> tuple[bool, list[str]]:
        """Whether these tests pass in the copy as it is, and those that began: the last of them is the one that failed."""
        begun = self.log.with_name("begun.txt")
        begun.write_text("")
        files = list(dict.fromkeys(name.partition("::")[0] for name in tests))
        code = self.child(lambda: self.pytest(files, Chosen(tests, begun), "-x"), seconds)
        if code in (FAULT, pytest.ExitCode.NO_TESTS_COLLECTED):
            raise SystemExit(f"The tests could not be run (exit code {code}):\n{self.log.read_text(errors='replace')[-2000:]}")
        return code == 0, begun.read_text().splitlines()

    def _forget(self, path: Path) -> None:
        for stale in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            stale.unlink()


@dataclass
class Record:
    """What the fast tests execute, kept per test file."""

    tests: dict[str, dict] = field(default_factory=dict)
    fixtures: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def load(cls, project: Project, files: Sequence[str], cache: Path) -> Record:
        """From `cache` where neither the package nor the test file nor its helpers have changed, else from a run."""
        helpers = [
            p for p in sorted((project.root / "tests").rglob("*.py")) if not p.name.startswith("test_") and not p.name.startswith("muta")
        ]
        common = [*sorted((project.root / project.package).rglob("*.py")), *helpers]
        key = lambda file: hashlib.sha256(b"\0".join(p.read_bytes() for p in [*common, project.root / file])).hexdigest()  # noqa: E731
        keys = {file: key(file) for file in files}
        try:
            kept = {k: v for k, v in json.loads(cache.read_text()).items() if k in keys.values()}
        except (OSError, ValueError):
            kept = {}
        if missing := [file for file in files if keys[file] not in kept]:
            print(f"running the tests of {len(missing)} files to see which lines they execute", file=sys.stderr)
            new = project.record(missing)
            for file in missing:
                tests = {name: test for name, test in new["tests"].items() if name.partition("::")[0] == file}
                kept[keys[file]] = {"tests": tests, "fixtures": new["fixtures"], "modules": new["modules"]}
            if new["failed"]:
                print(f"left out, because they fail without a mutant: {', '.join(new['failed'])}", file=sys.stderr)
            cache.parent.mkdir(exist_ok=True)
            cache.write_text(json.dumps(kept))
        record = cls()
        for part in kept.values():
            record.tests |= part["tests"]
            record.fixtures = part["fixtures"] | record.fixtures
            for name in part["modules"]:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        return record

    def reaching(self, mutant: Mutant, all_lines: bool = False) -> list[str]:
        """The tests that execute the mutant's lines, cheap ones first; where none does, those that execute its module at all."""
        runs = lambda part: not (rows := part["lines"].get(mutant.file, ())) or (not all_lines and mutant.lines.isdisjoint(rows))  # noqa: E731
        missed = {name for name, part in self.fixtures.items() if runs(part)}
        found = [n for n, t in self.tests.items() if not runs(t) or not missed.issuperset(t["fixtures"])]
        if not found and not all_lines:
            return self.reaching(mutant, True)
        cost = {name: self.seconds([name]) for name in found}
        first = lambda name: min(c for n, c in cost.items() if n.partition("::")[0] == name.partition("::")[0])  # noqa: E731
        return sorted(found, key=lambda name: (cost[name] > 1, first(name), name.partition("::")[0], cost[name], name))

    def seconds(self, tests: Sequence[str]) -> float:
        fixtures = {fixture for name in tests for fixture in self.tests[name]["fixtures"]}
        return sum(self.tests[n]["seconds"] for n in tests) + sum(self.fixtures[f]["seconds"] for f in fixtures)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__.partition("\n")[0])
    parser.add_argument("--modules", nargs="*", default=[], help="folders, modules, paths or groups of the package; default: all")
    parser.add_argument("--sample", type=int, default=60, help="mutants, at most one of a line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--allowed", type=int, default=3, help="survivors before the exit code is 1")
    parser.add_argument("--seconds", type=float, default=120, help="of tests for one mutant; more that reach it are not run")
    parser.add_argument("--tests", nargs="*", help="test files, relative to the project; default: all")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--package", default="feature_alignment", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    root = args.root.resolve()
    chosen = sample(root, args.package, args.modules, args.sample, args.seed)
    files = args.tests or sorted(str(p.relative_to(root)) for p in (root / "tests").glob("test_*.py") if p.name != "test_mutate.py")
    survivors, unclear, began = [], [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        project = Project(root, args.package, Path(folder))
        record = Record.load(project, files, root / ".pytest_cache" / "mutate.json")
        for number, mutant in enumerate(chosen, 1):
            tests = record.reaching(mutant)
            reaching = len(tests)
            while record.seconds(tests) > args.seconds:
                tests.pop()
            start, survived, what = time.monotonic(), True, "no test reaches it"
            try:
                if tests:
                    survived = project.test(mutant, tests, 20 + 3 * record.seconds(tests))
                    what = "survived" if survived else "killed"
            except Unclear as error:
                unclear.append({"file": mutant.file, "line": mutant.line, "why": str(error)})
                what, survived = f"unclear: {error}", False
            took = time.monotonic() - start
            where = f"{number}/{len(chosen)} {mutant.file}:{mutant.line}"
            print(f"{where} {what} ({len(tests)} of {reaching} tests, {took:.1f} s)", file=sys.stderr)
            if survived:
                survivors.append({"file": mutant.file, "line": mutant.line, "tests": len(tests), "reaching": reaching})
                print(mutant.describe((project.tree / mutant.file).read_bytes()), flush=True)
    killed = len(chosen) - len(survivors) - len(unclear)
    counts = {"mutants": len(chosen), "killed": killed, "survived": len(survivors), "unclear": unclear}
    print(json.dumps({**counts, "seed": args.seed, "seconds": round(time.monotonic() - began, 1), "survivors": survivors}))
    return int(len(survivors) > args.allowed or bool(unclear))


if __name__ == "__main__":
    sys.exit(main())
