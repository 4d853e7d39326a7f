"""Reuse: everything that can change a result is compared, nothing else is, and every reuse says what was compared."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, main_of
from test_mutations import numbers

from feature_alignment import extract_hidden_states
from feature_alignment.cli import advice
from feature_alignment.cli.config import Common, parse_config
from feature_alignment.cli.console import UserError
from feature_alignment.inputs.row_identity import identify
from feature_alignment.inputs.samples import Sample, read_samples
from feature_alignment.models.batches import ClipBatch, plan_batches
from feature_alignment.storage import artifacts, identity
from feature_alignment.storage.files import altered_files, file_hash, read_json, write_hashed_json
from feature_alignment.storage.hidden_states import load_hidden_states
from feature_alignment.storage.identity import RunIdentity, code_of, hub_revision, identity_of

STATES = ("egpt_hidden_states.pt", "vl_hidden_states.pt", "egpt_event_states.pt", "positions.pt", "samples.jsonl")


@pytest.fixture(autouse=True)
def logs(caplog):
    caplog.set_level(logging.INFO)


@pytest.fixture
def scene(tiny_run, tmp_path):
    """A copy of the tiny run's manifests and clips, and the flags that extract its test split (4 clips, 4 questions each) in fours."""
    shutil.copytree(tiny_run / "scenes", tmp_path / "scenes")
    return Scene(tiny_run, tmp_path)


@dataclasses.dataclass
class Scene:
    run: Path
    root: Path

    @property
    def manifest(self) -> Path:
        return self.root / "scenes" / "test.jsonl"

    def extract(self, *more: str, out: str = "out") -> dict:
        manifests = json.dumps({"test": str(self.manifest)})
        flags = ["--config", str(self.run / "tiny.yaml"), "--split", "test", f"--manifests={manifests}"]
        return extract_hidden_states.main([*flags, "--output_dir", str(self.root / out), *more])

    def lines(self) -> list[str]:
        return self.manifest.read_text().splitlines(keepends=True)

    def bytes_of(self, out: str = "out") -> dict:
        found = {name: (self.root / out / "hidden_states" / "test" / name).read_bytes() for name in STATES}
        return found | {"answers": json.loads((self.root / out / "token_pairs" / "test.json").read_text())["results"]}


@pytest.fixture
def generated(monkeypatch):
    """How many answers were generated, and of how many rows states were computed."""
    counts = {"answers": 0, "states": 0}
    generate, states = ClipBatch.generate, ClipBatch.states

    def counting_generate(self, *args):
        counts["answers"] += len(self._clip_of)
        return generate(self, *args)

    def counting_states(self, *args):
        counts["states"] += len(self._clip_of)
        return states(self, *args)

    monkeypatch.setattr(ClipBatch, "generate", counting_generate)
    monkeypatch.setattr(ClipBatch, "states", counting_states)
    return counts


# ---- what an identity is


@dataclasses.dataclass(frozen=True)
class SomeConfig(Common):
    split: str = "test"


OTHER = {
    "event_window_ms": 40.0,
    "event_start_ms": 5.0,
    "frame_sampling": "arange",
    "quantize": "nf4",
    "dtype": "bfloat16",
    "attn_implementation": "eager",
    "draft_layers": [2],
    "random_weights": True,
    "device": "cuda",
    "split": "train",
    "seed": 1,
}


@pytest.mark.parametrize("name", OTHER)
def test_every_setting_that_can_change_a_result_is_compared_by_name(name):
    recorded = identity_of("measurement.metrics", SomeConfig(), {}).as_dict()
    now = identity_of("measurement.metrics", SomeConfig(**{name: OTHER[name]}), {})
    (line,) = now.changes(recorded)
    assert line.startswith(f"{name}: ") and line.endswith(str(OTHER[name]))


def test_zero_is_another_setting_than_none():
    """A threshold of 0 is not the rule's default; a setting that an earlier version did not have was off."""
    recorded = identity_of("measurement.metrics", SomeConfig(event_window_ms=None), {}).as_dict()
    now = identity_of("measurement.metrics", SomeConfig(event_window_ms=0.0), {})
    assert now.changes(recorded) == ["event_window_ms: None → 0.0"]
    del recorded["settings"]["event_window_ms"]
    assert not now.changes(recorded) and identity_of("measurement.metrics", SomeConfig(event_window_ms=5.0), {}).changes(recorded)


def test_places_and_manners_are_not_compared(tmp_path):
    here, there = tmp_path / "a" / "model", tmp_path / "b" / "model"
    for folder in (here, there):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    now = SomeConfig(target_id=there, output_dir=tmp_path, resume=False, quiet=True, ignore_code=True)
    recorded = identity_of("measurement.metrics", SomeConfig(target_id=here), {"target": here}).as_dict()
    assert not identity_of("measurement.metrics", now, {"target": there}).changes(json.loads(json.dumps(recorded)))
    (there / "config.json").write_text("{ }")
    assert identity_of("measurement.metrics", now, {"target": there}).changes(recorded)[0].startswith("target: ")


def test_a_source_that_is_gone_or_new_is_a_change(tmp_path):
    (tmp_path / "a").write_text("1")
    with_it, without = (
        identity_of("measurement.metrics", SomeConfig(), made_from) for made_from in ({"a": tmp_path / "a"}, {"a": tmp_path / "b"})
    )
    assert with_it.changes(without.as_dict()) == [f"a: None → {file_hash(tmp_path / 'a')}"]
    assert without.changes(with_it.as_dict()) == [f"a: {file_hash(tmp_path / 'a')} → None"]


def test_another_machine_counts_for_timings_only():
    timed = identity_of("measurement.metrics", SomeConfig(), {}, timed=True)
    recorded = {**timed.as_dict(), "machine": {**timed.machine, "processor": "another"}}
    assert timed.changes(recorded) == [f"processor: another → {timed.machine['processor']}"]
    assert not identity_of("measurement.metrics", SomeConfig(), {}).changes(recorded)
    assert {"processor", "cores", "threads", "torch"} <= timed.machine.keys()


def test_one_hash_stands_for_everything_that_is_compared_but_the_machine():
    one = RunIdentity({"a": 1}, {"target": "t", "rows": "r"}, {"m": "c"}, {"cpu": "x"}, frozenset({"rows"}))
    same = dataclasses.replace(one, made_from={"target": "t", "rows": "other"}, machine=None)
    others = [dataclasses.replace(one, **{part: {"target": "other"}}) for part in ("settings", "made_from", "code")]
    assert one.hash == same.hash and len({one.hash, *(o.hash for o in others)}) == 4
    assert one.changes(same.as_dict() | {"machine": {"cpu": "x"}}) == [] != one.changes(same.as_dict())
    assert one.compared() == "1 settings, the contents of target, the code of 1 modules, the machine"
    assert same.compared(ignore_code=True) == "1 settings, the contents of target"
    assert dataclasses.replace(same, made_from={"rows": "r"}).compared() == "1 settings, the code of 1 modules"


def test_what_a_machine_is(monkeypatch):
    found = identity.machine()
    processors = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    assert not processors or found["processor"] == processors[0]
    assert found["threads"] == torch.get_num_threads() and identity.machine(7)["threads"] == 7
    assert found["torch"] == torch.__version__ and "gpu" not in found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    assert identity.machine() == found | {"gpu": "H200"}


def test_what_made_a_result_is_recorded_with_it(tmp_path, monkeypatch):
    """Places next to hashes; the commit where there is one."""
    ran = []

    def git(command, **options):
        ran.append((command, options["cwd"]))
        return subprocess.CompletedProcess(command, 0, stdout="abc\n")

    monkeypatch.setattr(artifacts.subprocess, "run", git)
    (tmp_path / "a").write_text("1")
    sources = {"a": tmp_path / "a", "more": [tmp_path / "a", tmp_path / "a"]}
    cfg = SomeConfig(threads=3)
    meta = artifacts.provenance("measurement.metrics", cfg, sources, rows=5)
    assert meta.items() >= identity_of("measurement.metrics", cfg, sources).as_dict().items() and meta["made_by"] == "measurement.metrics"
    assert meta["inputs"] == {"a": str(tmp_path / "a"), "more": [str(tmp_path / "a")] * 2} and meta["rows"] == 5
    assert meta["git_commit"] == "abc" and ran == [(["git", "rev-parse", "HEAD"], Path(artifacts.__file__).resolve().parent)]
    assert meta["machine"]["threads"] == 3 and set(meta["packages"]) == {"torch", "transformers", "numpy"} and meta["created"].endswith("Z")
    given = RunIdentity({"x": 1}, {}, {})
    assert artifacts.provenance("measurement.metrics", cfg, sources, given)["settings"] == {"x": 1}
    for error in (OSError, subprocess.SubprocessError):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(artifacts.subprocess, "run", fail)
        assert artifacts.provenance("measurement.metrics", cfg, sources, given)["git_commit"] is None


def test_a_result_is_reused_only_whole_and_unchanged(tmp_path, caplog):
    path, now = tmp_path / "a.json", RunIdentity({"a": 1}, {}, {"m": "c"})
    (tmp_path / "beside.txt").write_text("b")
    write_hashed_json(path, {"meta": now.as_dict(), "n": 1}, ["beside.txt"])
    reused = artifacts.cached_result(path, SomeConfig(), now)
    assert reused["n"] == 1 and "the recorded hashes of 2 files" in caplog.text
    assert artifacts.cached_result(path, SomeConfig(resume=False), now) is None
    assert artifacts.cached_result(tmp_path / "b.json", SomeConfig(), now) is None
    other = dataclasses.replace(now, code={"m": "d"})
    assert artifacts.cached_result(path, SomeConfig(), other) is None and "code: m changed" in caplog.text
    assert artifacts.cached_result(path, SomeConfig(), other, ignore_code=True)["n"] == 1 and "kept because of --ignore_code" in caplog.text
    (tmp_path / "beside.txt").write_text("c")
    assert artifacts.cached_result(path, SomeConfig(), now) is None and "beside.txt was altered or is gone" in caplog.text
    path.write_text("{")
    assert artifacts.cached_result(path, SomeConfig(), now) is None and "It is made again." in caplog.text
    with pytest.raises(UserError, match="is a folder"):
        artifacts.cached_result(tmp_path, SomeConfig(), now)
    write_hashed_json(tmp_path / "meta.json", now.as_dict())  # a record that is its own meta
    assert artifacts.cached_result(tmp_path / "meta.json", SomeConfig(), now)["settings"] == {"a": 1}


@pytest.mark.parametrize("recorded", [{}, {"schema": 3}, [], None, {"schema": 4, "settings": 7, "made_from": [], "code": "x"}])
def test_what_an_older_version_or_nobody_recorded_is_not_reused(recorded):
    assert RunIdentity({"a": 1}, {}, {"m": "1"}).changes(recorded)


def cached(cache: Path, name: str, revision: str) -> None:
    """A checkpoint as huggingface_hub lays it out."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "snapshots" / revision).mkdir(parents=True)
    (folder / "snapshots" / revision / "config.json").write_text("{}")
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(revision)


def test_a_hub_checkpoint_is_its_name_and_its_revision(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants, file_download

    for module in (constants, file_download):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # nothing is downloaded
    a, b = Path("hub:some/a"), Path("hub:some/b")
    absent = [hub_revision(path) for path in (a, b)]
    assert absent[0] != absent[1]
    for name in ("some/a", "some/b"):
        cached(tmp_path, name, "1" * 40)
    assert [hub_revision(path) for path in (a, b)] == [f"some/a@{'1' * 40}", f"some/b@{'1' * 40}"]
    of = lambda path: identity_of("measurement.metrics", SomeConfig(target_id=path), {"target": path})  # noqa: E731
    recorded = of(a).as_dict()
    assert of(b).changes(recorded) and not of(a).changes(recorded)
    cached(tmp_path, "some/a", "2" * 40)
    assert of(a).changes(recorded) == [f"target: some/a@{'1' * 40} → some/a@{'2' * 40}"]


# ---- the code of a stage


def test_the_code_of_a_stage_is_what_it_imports_and_no_more():
    stages = {s: set(code_of(s)) for s in ("extract_hidden_states", "train_hidden_adapter", "measure_feature_acceptance")}
    benchmark = set(code_of("benchmark_feature_sd"))
    assert {"models.decoder", "models.batches", "storage.hidden_states_writer", "inputs.events"} <= stages["extract_hidden_states"]
    assert {"adapters.training", "adapters.closed_form", "storage.hidden_states"} <= stages["train_hidden_adapter"]
    assert {"decoding.engine", "benchmark.timing", "benchmark.speed_model", "benchmark_feature_sd"} <= benchmark
    for own in (
        "decoding.engine",
        *(f"benchmark.{m}" for m in ("timing", "speed_model", "rows", "targets", "report")),
        "benchmark_feature_sd",
    ):
        assert not any(own in modules for modules in stages.values())
    assert not benchmark & {"cli.console", "cli.config", "storage.identity", "storage.verification"}


def a_package(tmp_path, monkeypatch, **modules: str) -> None:
    for name, text in {"__init__": "", **modules}.items():
        path = tmp_path.joinpath(*name.split("__sub__")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(identity.feature_alignment, "__path__", [str(tmp_path)])
    code_of.cache_clear()


@pytest.fixture(autouse=True)
def real_code():
    code_of.cache_clear()
    yield
    code_of.cache_clear()


MAIN = """from typing import TYPE_CHECKING
import feature_alignment.plain
if TYPE_CHECKING:
    from feature_alignment import hints
else:
    from feature_alignment import typed
if DEBUG:
    from feature_alignment import optional
def f():
    from feature_alignment import lazy
    from .sub import deep
"""


def test_imports_are_followed_wherever_they_stand_but_not_for_hints(tmp_path, monkeypatch):
    others = {"plain": "import os", "hints": "", "lazy": "from feature_alignment.far import x", "unused": "", "typed": "", "optional": ""}
    others["far"] = "from feature_alignment import stage\nx = 1"  # a circle
    a_package(
        tmp_path, monkeypatch, stage=MAIN, sub__sub____init__="from . import beside", sub__sub__beside="", sub__sub__deep="y = 2", **others
    )
    wanted = {"stage", "plain", "lazy", "far", "sub", "sub.deep", "sub.beside", "typed", "optional"}
    assert list(code_of("stage")) == sorted(wanted) and all(re.fullmatch("[0-9a-f]{12}", h) for h in code_of("stage").values())
    assert code_of("absent") == {}


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ('"""Another docstring."""\n\n\ndef f(x):  # a comment\n    """Says more."""\n    return x + 1\n', True),
        ("def f(x):\n    return (\n        x + 1\n    )\n", True),
        ("def f(x):\n    return x + 2\n", False),
        ("def f(y):\n    return y + 1\n", False),
        ("def f(x):\n    return x + True\n", False),
        ("def f(x):\n    return x - 1\n", False),
        ("def f(x):\n    'a'\n    'b'\n    return x + 1\n", False),
        ("def f(x):\n    return x + 1\n\n\ng = f(1)\n", False),
    ],
)
def test_only_what_runs_counts(tmp_path, monkeypatch, text, same):
    a_package(tmp_path, monkeypatch, stage='"""Docstring."""\n\n\ndef f(x):\n    return x + 1\n')
    before = code_of("stage")
    a_package(tmp_path, monkeypatch, stage=text)
    assert (code_of("stage") == before) == same


# ---- extraction: answers


def test_other_events_are_other_answers_though_the_states_are_gone(scene, generated):
    scene.extract()
    shutil.rmtree(scene.root / "out" / "hidden_states")
    generated["answers"] = 0
    scene.extract("--event_window_ms", "30")
    assert generated["answers"] == 2 * 16
    scene.extract("--event_window_ms", "30", out="anew")
    assert scene.bytes_of() == scene.bytes_of("anew")
    for flags in (["--frame_sampling", "arange"], ["--dtype", "bfloat16"], ["--batch_size", "3"]):
        shutil.rmtree(scene.root / "out" / "hidden_states")
        generated["answers"] = 0
        scene.extract("--event_window_ms", "30", *flags)
        assert generated["answers"] == 2 * 16


def test_the_same_run_reads_its_answers_again(scene, generated, caplog):
    scene.extract()
    wanted = scene.bytes_of()
    shutil.rmtree(scene.root / "out" / "hidden_states")
    generated["answers"] = 0
    scene.extract()
    assert generated["answers"] == 0 and scene.bytes_of() == wanted
    assert "16 of 16 answers; unchanged are" in caplog.text


def ask(scene: Scene, *questions: str) -> list[str]:
    path = scene.root / "questions.txt"
    path.write_text("\n".join(questions))
    return ["--questions", str(path)]


def test_another_question_under_the_same_id_is_never_given_the_old_answer(scene, generated):
    meta = scene.extract(*ask(scene, "What is the ego vehicle doing?"))
    assert meta["rows"] == 4
    answers = scene.root / "answers.json"
    shutil.copy(scene.root / "out" / "token_pairs" / "test.json", answers)
    shutil.rmtree(scene.root / "out" / "hidden_states")
    other = ask(scene, "Where does this take place?")
    with pytest.raises(UserError, match=r"same question about the same clip for 0 of 4 samples.*Leave --answers out"):
        scene.extract(*other, "--answers", str(answers), out="refused")
    plain = json.loads(answers.read_text())
    answers.write_text(json.dumps({"results": plain["results"]}))  # somebody else's file, without meta
    with pytest.raises(UserError, match="same question"):
        scene.extract(*other, "--answers", str(answers), out="refused")
    generated["answers"] = 0
    scene.extract(*other)
    assert generated["answers"] == 2 * 4
    scene.extract(*other, out="anew")
    assert scene.bytes_of() == scene.bytes_of("anew")


def test_answers_of_other_settings_are_refused_by_name(scene):
    scene.extract()
    answers = ["--answers", str(scene.root / "out" / "token_pairs" / "test.json")]
    window = (["--event_window_ms", "30"], "event_window_ms: None recorded, 30.0 now")
    for flag, name in (window, (["--dtype", "bfloat16"], "dtype: float32")):
        with pytest.raises(UserError, match=name):
            scene.extract(*answers, *flag, out="refused")
    scene.extract(*answers, "--prefix", "drafter", "--store_dtype", "bfloat16", "--draft_layers", "1", out="other states")  # no other text


def test_random_weights_of_another_seed_are_another_run(scene):
    scene.extract("--random_weights")
    assert scene.extract("--random_weights")["rows"] == 16
    with pytest.raises(UserError, match="seed: 0 → 1"):
        scene.extract("--random_weights", "--seed", "1")
    scene.extract(out="trained")
    assert scene.extract("--seed", "1", out="trained")  # trained weights have no seed


def test_the_answers_of_other_random_weights_are_not_read(scene, generated):
    scene.extract("--random_weights")
    shutil.rmtree(scene.root / "out" / "hidden_states")
    generated["answers"] = 0
    scene.extract("--random_weights", "--seed", "1")
    assert generated["answers"] == 2 * 16


# ---- extraction: rows


def appended(scene: Scene, clips: int) -> None:
    """The manifest goes on with the first questions of clips that are there already under new names."""
    rows = [json.loads(line) for line in scene.lines()]
    new = [{**row, "id": f"new-{row['id']}", "question": f"Once more: {row['question']}"} for row in rows[: 4 * clips]]
    with scene.manifest.open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in new)


@pytest.mark.parametrize(("size", "clips", "computed"), [(4, 1, 4), (4, 2, 8), (8, 1, 4), (7, 1, 4), (12, 1, 8), (32, 1, 20)])
def test_appended_rows_cost_no_more_than_themselves_and_the_last_batch(scene, generated, size, clips, computed):
    scene.extract("--batch_size", str(size))
    appended(scene, clips)
    generated.update(states=0, answers=0)
    meta = scene.extract("--batch_size", str(size))
    assert meta["rows"] == 16 + 4 * clips
    assert generated["states"] == 3 * computed  # both models' states, and EventGPT's own drafts
    assert scene.extract("--batch_size", str(size), out="anew") and scene.bytes_of() == scene.bytes_of("anew")


def test_a_changed_row_and_a_removed_clip_cost_their_batches_alone(scene, generated, caplog):
    scene.extract()
    lines = scene.lines()
    scene.manifest.write_text("".join([lines[0].replace('"question": "', '"question": "So: '), *lines[1:8], *lines[12:]]))
    generated["states"] = 0
    assert scene.extract()["rows"] == 12
    assert generated["states"] == 3 * 4 and "8 rows whose question, clip and batch are unchanged" in caplog.text
    scene.extract(out="anew")
    assert scene.bytes_of() == scene.bytes_of("anew")


def test_a_clip_whose_file_changed_is_extracted_again(scene, generated):
    scene.extract()
    other = scene.root / "scenes" / "video" / "test-0001.mp4"
    shutil.copy(scene.root / "scenes" / "video" / "test-0002.mp4", other)
    generated["states"] = 0
    scene.extract()
    assert generated["states"] == 3 * 4
    scene.extract(out="anew")
    assert scene.bytes_of() == scene.bytes_of("anew")


def test_other_names_and_other_places_cost_nothing(scene, generated):
    scene.extract()
    shutil.move(scene.root / "scenes" / "events", scene.root / "scenes" / "streams")
    scene.manifest.write_text("".join(scene.lines()).replace('"events/', '"streams/').replace('"id": "test-', '"id": "renamed-'))
    generated.update(states=0, answers=0)
    scene.extract()
    assert generated == {"states": 0, "answers": 0}
    scene.extract(out="anew")
    assert scene.bytes_of() == scene.bytes_of("anew")


def test_most_rows_are_not_thrown_away_unasked(scene):
    scene.extract()
    kept, lines = scene.bytes_of(), scene.lines()
    with pytest.raises(UserError, match=r"8 of 16 rows are left out by --limit.*\n.*--no_resume"):
        scene.extract("--limit", "8")
    scene.manifest.write_text("".join(lines[:4]))
    with pytest.raises(UserError, match=r"12 of 16 rows have another question, clip or start, or are gone, e\.g\. test-"):
        scene.extract()
    scene.manifest.write_text("".join(lines))
    assert scene.bytes_of() == kept
    assert scene.extract("--limit", "8", "--no_resume")["rows"] == 8
    assert scene.extract()["rows"] == 16 and scene.bytes_of() == kept  # more rows are no loss


def test_shards_keep_their_rows_too(scene, generated):
    for shard in ("1/2", "2/2"):
        scene.extract("--shard", shard)
    scene.extract("--merge")
    appended(scene, 1)
    generated["states"] = 0
    with pytest.raises(UserError, match=r"the shards next to .* hold 16 samples, the manifest 20"):
        scene.extract("--merge")
    for shard in ("1/2", "2/2"):
        scene.extract("--shard", shard)
    assert generated["states"] == 3 * 4
    assert scene.extract("--merge")["rows"] == 20
    scene.extract(out="anew")
    assert scene.bytes_of() == scene.bytes_of("anew")


def test_a_stopped_run_keeps_its_rows_when_the_manifest_grows(scene, generated, monkeypatch):
    from feature_alignment.storage.hidden_states_writer import HiddenStatesWriter

    commits = []
    commit = HiddenStatesWriter.commit

    def stop_at_the_third(self):
        commit(self)
        commits.append(1)
        if len(commits) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HiddenStatesWriter, "commit", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            scene.extract()
    done = len(commits) * 4
    appended(scene, 1)
    generated["states"] = 0
    scene.extract()
    assert generated["states"] == 3 * (20 - done)
    scene.extract(out="anew")
    assert scene.bytes_of() == scene.bytes_of("anew")
    assert sorted(p.name for p in (scene.root / "out" / "hidden_states").iterdir()) == ["test", "vl_embeddings.pt", "vl_lm_head.pt"]


def a_sample(**about) -> Sample:
    return Sample(**{"id": "a", "sequence": "s", "question": "What?", "events": Path("e.npy"), "video": Path("v.mp4"), **about})


def test_the_same_files_with_another_event_start_are_two_clips(tmp_path):
    early, late = a_sample(id="a"), a_sample(id="b", event_start_ms=50.0)
    assert plan_batches([early, early, late, late], 3) == [range(0, 2), range(2, 4)]
    rows = identify([early, late, a_sample(id="c", event_start_ms=0.0)], [range(3)], tmp_path / "m.jsonl", 0.0)
    a, b, c = (row["identity"]["row"] for row in rows)
    assert a != b and a == c
    assert identify([early], [range(1)], tmp_path / "m.jsonl", 50.0)[0]["identity"]["row"] == b
    assert identify([late], [range(1)], tmp_path / "m.jsonl", 20.0)[0]["identity"]["row"] == b


def test_a_batch_is_all_of_its_rows_in_their_order(tmp_path):
    first, second, third = (a_sample(id=name, question=f"{name}?") for name in "abc")
    of = lambda *rows: [r["identity"]["batch"] for r in identify(rows, [range(len(rows))], tmp_path / "m.jsonl", 0.0)]  # noqa: E731
    assert of(first, second) == of(dataclasses.replace(first, id="renamed"), second)
    found = [*of(first), *of(first, second), *of(second, first), *of(first, third), *of(first, second, third)]
    assert len(set(found)) == len(found)


def test_a_batch_of_two_event_starts_reads_both(tiny_run):
    from feature_alignment.models.pair import load_pair

    argv = ["--config", str(tiny_run / "tiny.yaml"), "--split", "test", "--event_window_ms", "30"]
    cfg = parse_config(extract_hidden_states.ExtractConfig, argv, "extract_hidden_states")
    pair, sample = load_pair(cfg), read_samples(cfg.manifests, "test")[0]
    late = dataclasses.replace(sample, id="late", event_start_ms=40.0)
    together = ClipBatch(pair.draft, [sample, late])
    assert len(together._shared) == 2
    alone = [ClipBatch(pair.draft, [s]).vision_states()[0] for s in (sample, late)]
    for seen, wanted in zip(together.vision_states(), alone, strict=True):
        torch.testing.assert_close(seen, wanted, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)


# ---- extraction: damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path: Path) -> None:
    """One bit of the second row: at the end of the first quarter of the file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink, lambda p: p.write_bytes(b"")], ids=["truncated", "flipped", "deleted", "empty"])
@pytest.mark.parametrize("name", STATES[:4])
def test_a_damaged_file_is_made_anew_by_the_command_that_measuring_names(scene, caplog, name, harm):
    scene.extract()
    wanted = scene.bytes_of()
    folder = scene.root / "out" / "hidden_states" / "test"
    harm(folder / name)
    with pytest.raises(UserError) as refused:
        load_hidden_states(folder, events=True)
    assert f"extract_hidden_states.py --config {scene.run / 'tiny.yaml'} --output_dir {scene.root / 'out'} --split test" in str(
        refused.value
    )
    scene.extract()
    assert name in caplog.text and scene.bytes_of() == wanted
    load_hidden_states(folder, events=True)


def test_one_damaged_row_costs_its_batch_alone(scene, generated):
    scene.extract()
    wanted = scene.bytes_of()
    flip(scene.root / "out" / "hidden_states" / "test" / STATES[2])
    generated.update(states=0, answers=0)
    scene.extract()
    assert generated == {"states": 3 * 4, "answers": 0} and scene.bytes_of() == wanted


def test_a_deleted_file_is_altered(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    write_hashed_json(tmp_path / "r.json", {"x": 1}, ("a.txt", "b.txt"))
    content = read_json(tmp_path / "r.json", "")
    assert altered_files(tmp_path / "r.json", content) == []
    (tmp_path / "b.txt").unlink()
    assert altered_files(tmp_path / "r.json", content) == ["b.txt"] == altered_files(tmp_path / "r.json", content, ["b.txt"])
    (tmp_path / "a.txt").write_text("A.txt")
    assert altered_files(tmp_path / "r.json", content) == ["a.txt", "b.txt"]


# ---- other code


def pretend_changed(monkeypatch, *modules: str) -> None:
    """As if `modules` had been edited since."""
    real = identity.code_of.__wrapped__
    edited = lambda stage: {m: "edited" if m in modules else h for m, h in real(stage).items()}  # noqa: E731
    edited.cache_clear = lambda: None
    monkeypatch.setattr(identity, "code_of", edited)


def test_states_of_other_code_are_neither_thrown_away_nor_reused_unasked(scene, generated, monkeypatch, caplog):
    scene.extract()
    kept = scene.bytes_of()
    pretend_changed(monkeypatch, "models.decoder")
    with pytest.raises(UserError, match=r"code: models\.decoder changed\n.*--ignore_code.*--output_dir.*--no_resume"):
        scene.extract()
    assert scene.bytes_of() == kept
    generated["states"] = 0
    scene.extract("--ignore_code")
    assert generated["states"] == 0 and "made by other code (models.decoder changed) and is kept because of --ignore_code" in caplog.text
    appended(scene, 1)
    scene.extract("--ignore_code")
    assert generated["states"] == 3 * 4
    with pytest.raises(UserError, match=r"code: models\.decoder changed"):  # some rows are still the old code's
        scene.extract()
    scene.extract("--no_resume")
    assert scene.extract()["rows"] == 20


def test_answers_of_other_code_are_generated_again_or_refused(scene, generated, monkeypatch, caplog):
    scene.extract()
    shutil.rmtree(scene.root / "out" / "hidden_states")
    answers = scene.root / "answers.json"
    shutil.copy(scene.root / "out" / "token_pairs" / "test.json", answers)
    pretend_changed(monkeypatch, "models.batches")
    with pytest.raises(UserError, match=r"code: models\.batches changed\n.*With --ignore_code"):
        scene.extract("--answers", str(answers), out="other")
    generated["answers"] = 0
    scene.extract("--answers", str(answers), "--ignore_code", out="other")
    assert generated["answers"] == 0
    scene.extract()
    assert generated["answers"] == 2 * 16 and "code: models.batches changed" in caplog.text


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished / "out", tmp_path / "out")
    return ["--config", str(finished / "tiny.yaml"), "--output_dir", str(tmp_path / "out")]


LAST = "benchmark.json", "acceptance.json", "comparison.json", "adapter/meta.json"


def test_everything_is_reused_and_says_what_was_compared(run, tmp_path, caplog, capsys):
    before = numbers(tmp_path / "out", "")
    for split in ("train", "validation", "test"):
        main_of("extract_hidden_states")([*run, "--split", split])
    for script in ("train_hidden_adapter", "measure_feature_acceptance", "compare_token_baseline", "benchmark_feature_sd"):
        main_of(script)(run)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"')]
    assert [line["reused"] for line in said] == [True] * 7
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("reused ")]
    assert len(lines) == 7 and all("unchanged are" in line and "settings" in line and "the code of" in line for line in lines)
    assert sum("the machine" in line for line in lines) == 3 and numbers(tmp_path / "out", "") == before


@pytest.mark.slow
def test_touching_the_benchmark_measures_the_benchmark_again_and_nothing_else(run, tmp_path, monkeypatch, caplog, capsys):
    pretend_changed(monkeypatch, "benchmark.timing", "benchmark.rows")
    for script in ("train_hidden_adapter", "measure_feature_acceptance", "compare_token_baseline", "benchmark_feature_sd"):
        main_of(script)(run)
    main_of("extract_hidden_states")([*run, "--split", "test"])
    said = [json.loads(line)["reused"] for line in capsys.readouterr().out.splitlines() if line.startswith('{"')]
    assert said == [True, True, True, False, True]
    (why,) = [r.getMessage() for r in caplog.records if "is made again" in r.getMessage()]
    assert "benchmark.json is made again" in why and "code: benchmark.rows, benchmark.timing changed" in why and "Compared: " in why


@pytest.mark.parametrize(
    "script",
    ["compare_token_baseline", *(pytest.param(s, marks=pytest.mark.slow) for s in ("measure_feature_acceptance", "benchmark_feature_sd"))],
)
def test_timings_of_another_machine_are_measured_again(run, tmp_path, monkeypatch, caplog, capsys, script):
    monkeypatch.setattr(identity, "_processor", lambda: "another processor")
    main_of(script)(run)
    assert not json.loads(capsys.readouterr().out.splitlines()[-1])["reused"] and "→ another processor" in caplog.text
    main_of(script)([*run, "--ignore_code"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["reused"]
    pretend_changed(monkeypatch, script)
    main_of(script)([*run, "--ignore_code"])  # never for timings
    assert not json.loads(capsys.readouterr().out.splitlines()[-1])["reused"]


def test_an_adapter_of_other_code_is_trained_again_or_kept(run, tmp_path, monkeypatch, caplog, capsys):
    pretend_changed(monkeypatch, "adapters.training")
    main_of("train_hidden_adapter")([*run, "--ignore_code"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["reused"] and "kept because of --ignore_code" in caplog.text
    main_of("train_hidden_adapter")(run)
    assert not json.loads(capsys.readouterr().out.splitlines()[-1])["reused"] and "code: adapters.training changed" in caplog.text
    main_of("train_hidden_adapter")(run)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["reused"]


def test_a_token_adapter_of_other_texts_is_left_out(run, tmp_path, caplog):
    report = main_of("compare_token_baseline")([*run, "--train_token_adapter", "--num_epochs", "1"])
    assert report["token_adapter"]
    assert main_of("compare_token_baseline")([*run, "--num_epochs", "1"])["token_adapter"]
    path = tmp_path / "out" / "token_pairs" / "validation.json"
    path.write_text(path.read_text() + "\n")
    assert main_of("compare_token_baseline")([*run, "--num_epochs", "1", "--seed", "0", "--no_resume"])["token_adapter"] is None
    assert "token_adapter.pt is left out" in caplog.text and "--train_token_adapter" in caplog.text


# ---- advice


def test_advice_names_the_config_and_the_folder_in_use(finished, tmp_path):
    config = tmp_path / "my own.yaml"
    shutil.copy(finished / "tiny.yaml", config)
    run = ["--config", str(config), "--output_dir", str(tmp_path / "there")]
    for script, wanted in (
        ("train_hidden_adapter", "extract_hidden_states.py"),
        ("measure_feature_acceptance", "extract_hidden_states.py"),
        ("compare_token_baseline", "extract_hidden_states.py"),
        ("benchmark_feature_sd", "measure_feature_acceptance.py"),
        ("feature_sd_inference", "train_hidden_adapter.py"),
    ):
        with pytest.raises(UserError) as refused:
            main_of(script)(run)
        assert f"{wanted} --config '{config}' --output_dir {tmp_path / 'there'}" in str(refused.value), script


def test_no_message_of_the_package_names_a_config_that_is_not_in_use():
    """Docstrings show an example; whatever is printed asks `advice`."""
    import ast

    for path in sorted((ROOT / "feature_alignment").rglob("*.py")):
        tree = ast.parse(path.read_text())
        docs = {
            id(n.body[0].value)
            for n in ast.walk(tree)
            if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(n)
        }
        found = [
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and id(n) not in docs and "--config configs/demo.yaml" in str(n.value)
        ]
        assert not found or path.name == "config.py", path  # of --help: an example, before any config is in use


def test_commands_can_be_typed():
    advice.use_config("my config.yaml", Path("out"), True)
    command = advice.command_for("extract_hidden_states", "--no_resume", split="test")
    assert (
        command == "python feature_alignment/extract_hidden_states.py --config 'my config.yaml' --output_dir out --split test --no_resume"
    )
    advice.use_config(None, Path("outputs/default"), False)
    assert advice.command_for("train_hidden_adapter") == "python feature_alignment/train_hidden_adapter.py"
    assert advice.verify_command() == "python -m feature_alignment.storage.verification outputs/default"


def test_the_comparison_takes_a_target_from_the_hub(run, finished, monkeypatch):
    import huggingface_hub

    asked = []
    target = finished / "pair" / "video_llava"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: asked.append(name) or str(target))
    report = main_of("compare_token_baseline")([*run, "--target_id", "hub:someone/video_llava"])
    assert asked == ["someone/video_llava"] and report["nulls"]
    assert report["meta"]["made_from"]["target"].startswith("someone/video_llava")


@pytest.mark.slow
def test_a_touched_line_of_the_benchmark_in_a_copy_of_the_package(run, tmp_path):
    """The real thing: another process, whose package differs in one line."""
    package = tmp_path / "copy" / "feature_alignment"
    shutil.copytree(ROOT / "feature_alignment", package)
    with (package / "benchmark" / "timing.py").open("a") as stream:
        stream.write("\nTOUCHED = 1\n")
    reused = {}
    for script in ("measure_feature_acceptance", "benchmark_feature_sd"):
        words = [sys.executable, "-m", f"feature_alignment.{script}", *run]
        done = subprocess.run(
            words, cwd=package.parent, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(package.parent)}
        )
        reused[script] = json.loads(done.stdout.splitlines()[-1])["reused"]
    assert reused == {"measure_feature_acceptance": True, "benchmark_feature_sd": False}
