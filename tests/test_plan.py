"""The plan: bytes as extraction writes them, times that grow with the rows, and refusals of what does not fit."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT

from feature_alignment.benchmark import plan, plan_hours
from feature_alignment.benchmark.plan_hours import Rates
from feature_alignment.benchmark.plan_sizes import Settings, adapter_bytes, planned_split
from feature_alignment.benchmark.sweep import THRESHOLDS
from feature_alignment.cli.console import UserError
from feature_alignment.inputs.samples import read_samples
from feature_alignment.models.eventgpt import EVENT_TOKEN_INDEX
from feature_alignment.models.pair import check_pair

STATED = ["--tokens_per_second", "100"]
RATES = Rates(
    start=4,
    load=2,
    row=0.5,
    tokens=8,
    draft_tokens=8,
    hidden_start=0.1,
    hidden=0.01,
    chained=0.02,
    fit=0.1,
    score=0.2,
    prefill=0.3,
    step=0.05,
)


@functools.cache
def settings_once(run):
    return plan.settings_of(["--config", str(run / "tiny.yaml")])


def planned(run, *flags):
    """The plan with these flags of its own."""
    settings = settings_once(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "settings_of", lambda argv: settings)
        return plan.main(["--config", str(run / "tiny.yaml"), *flags])


@pytest.fixture(scope="module")
def calibrated(finished):
    """A plan from a real calibration, with the attending adapter."""
    return planned(finished, "--attending")


def test_the_bytes_are_those_that_the_run_wrote(finished, calibrated):
    found = {name: (finished / "out" / name).stat().st_size for name in calibrated["bytes"]}
    states = {name: size for name, size in found.items() if name.endswith("_states.pt") or "vl_" in name}
    assert len(states) == 17
    for name, size in states.items():
        assert calibrated["bytes"][name] == pytest.approx(size, abs=500), name
    assert calibrated["clips"] == {"train": 6, "validation": 3, "test": 4}
    assert set(found) == set(calibrated["bytes"])


def test_texts_are_estimated_within_a_third(finished, calibrated):
    for name, size in calibrated["bytes"].items():
        if name.endswith(("samples.jsonl", "positions.pt")):
            assert size == pytest.approx((finished / "out" / name).stat().st_size, rel=1 / 3, abs=600), name


def test_every_script_of_a_run_has_its_hours(calibrated):
    scripts = {name.partition(",")[0] for name in calibrated["hours"]}
    assert len(calibrated["hours"]) == 11 and all(seconds > 0 for seconds in calibrated["hours"].values())
    assert scripts == {
        "extract_hidden_states",
        "hidden_adapter",
        "train_hidden_adapter",
        "measure_feature_acceptance",
        "compare_token_baseline",
        "feature_sd_inference",
        "benchmark_feature_sd",
    }


def test_hours_grow_with_rows_epochs_and_prompts(finished):
    """The formula by hand: 18, 9 and 16 rows; 2 epochs; 4 prompts once and a warm-up of one, by 22 methods."""
    settings = settings_once(finished)
    cfg = plan.parse_config(plan.PlanConfig, ["--config", str(finished / "tiny.yaml"), *STATED], "cli/plan")
    splits = {split.name: split for split in plan.plan(cfg, settings, 0.0).splits}
    rows = {name: len(split.samples) for name, split in splits.items()}
    one, two = (plan_hours.hours(settings, splits, RATES, processes) for processes in (1, 2))
    assert one["extract_hidden_states, train"] == 6 + 18 * 0.5 and two["extract_hidden_states, train"] == 6 + 18 * 0.25
    assert one["train_hidden_adapter, hidden"] == pytest.approx(4 + 18 * 0.1 + 2 * (18 + 0.3 * rows["validation"]) * 0.01)
    assert one["train_hidden_adapter, chained"] == pytest.approx(4 + 2 * (18 + 0.3 * rows["validation"]) * 0.02)
    rows = plan_hours.modes([2, 3], 24, [0.9], ("chained", "aligned"))
    lossy = sum(mode.accept != "token" for mode in rows)
    runs = (len(rows) + 4) * 6  # four prompts once, and one prompt in two warm-ups
    runs += sum(map(len, THRESHOLDS.values())) * 4 / 2  # the sweep of the lossy rules decodes about every second threshold
    wanted = 6 + 2 + runs * (0.3 + 8 * 0.05) + (1 + lossy) * 4 * 0.3 + 600 * 0.05 + 3
    assert len(rows) > 10 and lossy >= 4 and one["benchmark_feature_sd"] == pytest.approx(wanted)
    assert "train_hidden_adapter, chained" not in plan_hours.hours(settings, splits, dataclasses.replace(RATES, chained=None), 1)
    bench = SimpleNamespace(**{**vars(settings["benchmark_feature_sd"]), "drafters": ["tables"]})
    few = plan_hours.hours({**settings, "benchmark_feature_sd": bench}, splits, RATES, 1)["benchmark_feature_sd"]
    left_out = sum(mode.draft not in ("chained", "tables") for mode in rows)
    lossy = sum(mode.accept != "token" and mode.draft != "chained" for mode in rows)
    assert one["benchmark_feature_sd"] - few == pytest.approx(left_out * 6 * (0.3 + 8 * 0.05) + lossy * 4 * 0.3) and left_out > 5


def test_the_attending_adapter_is_planned_where_it_is_asked_for(finished):
    """Its rate includes its validation; the benchmark has three more methods: two draft lengths and the adaptive one."""
    settings = settings_once(finished)
    argv = ["--config", str(finished / "tiny.yaml"), *STATED]
    without, cfg = (plan.parse_config(plan.PlanConfig, [*argv, *more], "cli/plan") for more in ([], ["--attending"]))
    splits = {split.name: split for split in plan.plan(cfg, settings, 0.0).splits}
    rates = dataclasses.replace(RATES, attending_start=0.3, attending=0.04)
    more = plan_hours.hours(plan.trained(cfg, settings), splits, rates, 1)
    less = plan_hours.hours(plan.trained(without, settings), splits, RATES, 1)
    assert more["train_hidden_adapter, attending"] == pytest.approx(4 + 18 * (0.3 + 2 * 0.04))
    assert set(more) - set(less) == {"train_hidden_adapter, attending"}
    assert more["benchmark_feature_sd"] - less["benchmark_feature_sd"] == pytest.approx(3 * 6 * (0.3 + 8 * 0.05))
    memory = plan.plan(cfg, settings, 0.0).memory
    assert memory["train_hidden_adapter, attending"].batch > 0 and set(memory) - set(plan.plan(without, settings, 0.0).memory) == {
        "train_hidden_adapter, attending"
    }
    settings = {**settings, "extract_hidden_states": Settings(**{**vars(settings["extract_hidden_states"]), "prompt_states": 0})}
    with pytest.raises(UserError, match="event_states True and prompt_states 0"):
        plan.plan(cfg, settings, 0.0)
    plan.plan(without, settings, 0.0)


def test_bytes_of_adapters_are_those_of_their_weights(finished):
    settings, wanted, trained = {**settings_once(finished)}, {}, {}
    for kind, folder in (("hidden", "adapter"), ("chained", "chained_adapter"), ("attending", "attending_adapter")):
        trained[kind] = torch.load(finished / "out" / folder / "adapter.pt", weights_only=True)
        name, geometry = f"train_hidden_adapter.{kind}", trained[kind]["meta"]["geometry"]
        settings[name] = Settings(**{**vars(settings[name]), "bottleneck": geometry.get("width") or geometry["bottleneck"]})
        wanted[f"{folder}/adapter.pt"] = sum(tensor.nbytes for tensor in trained[kind]["state_dict"].values())
    pair = check_pair(plan.parse_config(plan.PlanConfig, ["--config", str(finished / "tiny.yaml")], "cli/plan"))
    vocabulary = min(model.embedding_rows for model in pair.models.values())
    geometry = trained["attending"]["meta"]["geometry"]
    wanted["attending_adapter/adapter.pt"] += 8 * (vocabulary - geometry["num_ids"])  # every id may be in the training texts
    assert adapter_bytes(settings, pair, 1, geometry["num_entries"]) == wanted


def test_stated_tokens_per_second_need_no_model(finished, monkeypatch):
    monkeypatch.setattr(plan_hours, "load_pair", None)
    slow, fast, shared = (planned(finished, "--tokens_per_second", *words) for words in (["100"], ["200"], ["100", "--gpus", "2"]))
    assert set(slow["hours"]) == {*(f"extract_hidden_states, {s}" for s in plan.SPLITS), "feature_sd_inference", "benchmark_feature_sd"}
    train = "extract_hidden_states, train"
    assert slow["hours"][train] == pytest.approx(2 * fast["hours"][train]) == pytest.approx(2 * shared["hours"][train])


def test_a_plan_with_a_stated_speed_reads_no_weights(geometry, finished, tmp_path):
    """Of both checkpoints only what describes them is there, as before a download."""
    assert not list(geometry.rglob("*.safetensors"))
    manifests = json.loads((finished / "tiny.yaml").read_text())["common"]["manifests"]
    settings = yaml.safe_load((geometry / "random_7b.yaml").read_text())
    del settings["common"]["random_weights"]
    settings["common"] |= {"manifests": manifests, "device": "cuda", "dtype": "bfloat16", "output_dir": str(tmp_path / "out")}
    (tmp_path / "a.yaml").write_text(json.dumps(settings))
    found = plan.main(["--config", str(tmp_path / "a.yaml"), "--gpu_gib", "80", "--tokens_per_second", "33"])
    assert found["memory_bytes"]["feature_sd_inference, benchmark_feature_sd"] > 20 * 2**30


def test_the_plan_s_own_numbers_have_ranges(finished):
    for words in (["--gpus", "0"], ["--tokens_per_second", "0"], ["--gpu_gib=-1"]):
        with pytest.raises(UserError, match="wanted"):
            planned(finished, *words)


def test_a_run_that_does_not_fit_is_refused(finished, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"extract_hidden_states needs about .* GiB \(weights .*cpu has 0\.00 GiB"):
        planned(finished, *STATED, "--gpu_gib", "0.001")
    assert "memory of one process" in capsys.readouterr().out  # what does not fit is shown
    room = dataclasses.make_dataclass("Room", ["free"])(100)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: room)
    with pytest.raises(UserError, match=r"needs [\d,]+ bytes, its disk has 100 free.*largest file is \S+ with [\d,]+\..*--output_dir"):
        planned(finished, *STATED, "--output_dir", "/tmp/nowhere_yet")


def test_memory_is_checked_before_models_are_loaded(finished, monkeypatch):
    monkeypatch.setattr(plan_hours, "load_pair", None)
    with pytest.raises(UserError, match="GiB"):
        planned(finished, "--gpu_gib", "0.001")


def test_a_gpu_elsewhere_is_stated(finished):
    with pytest.raises(UserError, match=r"this machine has no GPU. State one: --gpu_gib 80 --tokens_per_second"):
        planned(finished, *STATED, "--device", "cuda")
    assert planned(finished, *STATED, "--device", "cuda", "--gpu_gib", "1")["device_bytes"] == 2**30


def test_settings_are_those_of_the_scripts(finished):
    flags = ["--config", str(finished / "tiny.yaml"), "--gpus", "2", "--limit=5", "--gpu-gib=3", "--draft_layers", "1", "2"]
    found = plan.settings_of(flags)
    assert found["extract_hidden_states"].max_new_tokens == 12 and found["benchmark_feature_sd"].limit == 5
    assert found["train_hidden_adapter.chained"].adapter == "chained" and found["train_hidden_adapter.hidden"].draft_layers == [1, 2]
    with pytest.raises(UserError, match="seed"):
        plan.settings_of(["--seed", "x"])


def test_event_states_of_every_row_are_planned_where_the_question_comes_first(finished):
    samples = read_samples({"train": finished / "scenes" / "train.jsonl"}, "train")
    first, last = (lambda q: torch.tensor([EVENT_TOKEN_INDEX, len(q)])), (lambda q: torch.tensor([len(q), EVENT_TOKEN_INDEX]))
    assert [planned_split("train", samples, 4, encode).clips for encode in (first, last)] == [6, 18]


@pytest.mark.slow
def test_the_command_prints_one_json_line_and_exits_with_2_where_it_does_not_fit(finished):
    command = [sys.executable, "-m", "feature_alignment.cli.plan", "--config", str(finished / "tiny.yaml"), *STATED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == {"train": 18, "validation": 9, "test": 16}
    done = subprocess.run([*command, "--gpu_gib", "0.001"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_planned_and_actual_seconds_and_bytes_of_every_script_are_compared(finished, tmp_path, capsys):
    import planned_hours

    flags = ["--config", str(finished / "tiny.yaml"), "--output_dir", str(tmp_path / "out"), "--attending"]
    found = planned_hours.main([*flags, "--", "--limit", "9"])
    assert set(found["seconds"]) == set(planned_hours.steps(1, True)) and len(found["seconds"]) == 11
    assert all(one["planned"] > 0 and one["actual"] > 0 for one in found["seconds"].values())
    states = {name: one for name, one in found["bytes"].items() if name.endswith("_states.pt")}
    assert len(states) == 12 and all(one["planned"] == pytest.approx(one["actual"], abs=500) for one in states.values())
    assert json.loads((tmp_path / "out" / "planned_hours.json").read_text()) == found
    assert "benchmark_feature_sd" in capsys.readouterr().out
    with pytest.raises(UserError, match="expected a new directory"):
        planned_hours.main(flags)
