"""Settings: defaults < common < section < flags; everything unknown is refused with its name."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT, main_of

from feature_alignment.cli.config import SCRIPTS, Common, parse_config
from feature_alignment.cli.console import TABLE_WIDTH, UserError, print_table
from feature_alignment.cli.ranges import INPUT_FILES, RANGES, SPLITS


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


def test_a_text_in_a_list_keeps_its_commas_brackets_and_newlines():
    cls = config_class("feature_sd_inference")

    def stop(*words):
        return parse_config(cls, ["--stop", *words], "feature_sd_inference").stop

    assert stop("a, b") == ["a, b"] and stop("[END]") == ["[END]"] and stop("\n", "Human:") == ["\n", "Human:"]
    assert stop('["x", "[y"]') == ["x", "[y"]
    with pytest.raises(UserError, match="stop"):
        stop("")


def test_the_section_of_an_adapter_applies_wherever_the_adapter_is_chosen(tmp_path):
    cls = config_class("train_hidden_adapter")
    path = tmp_path / "a.yaml"
    path.write_text("train_hidden_adapter: {adapter: chained, lr: 1}\ntrain_hidden_adapter.chained: {lr: 2}\n")
    for argv, lr in (([], 2), (["--adapter", "hidden"], 1), (["--lr", "3"], 3)):
        cfg = parse_config(cls, ["--config", str(path), *argv], "train_hidden_adapter", variant="adapter")
        assert cfg.lr == lr


@pytest.mark.parametrize(
    "argv",
    [["--lr", "1", "--lr", "1"], ["--gamma", "3", "--num-draft-tokens", "5"], ["--resume", "--no_resume"], ["--config=a", "--config=a"]],
)
def test_a_flag_given_twice_is_refused_under_all_its_names(argv):
    with pytest.raises(UserError, match="was given 2 times"):
        parse(*argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--conf", "a.yaml"],
        ["--print"],
        ["--thread", "1"],
        ["--lrr", "1"],
        ["--lr", "fast"],
        ["--threads", "2.5"],
        ["--dtype", "float8"],
        ["--resume", "maybe"],
        ["stray"],
        ["--config"],
    ],
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
        ("benchmark_feature_sd: {max_new_token: 64}", "benchmark_feature_sd.max_new_token"),  # although another script reads the file
        ("common: {dtype: bf16}", "bad.yaml: .*dtype"),
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
        if dataclasses.is_dataclass(c) and isinstance(c, type) and issubclass(c, Common) and c.__module__ == module.__name__
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
    assert max(map(len, lines)) <= TABLE_WIDTH
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


# ---- every setting of every script, with hostile values


def settings(kind):
    """(script, setting) of all scripts whose type mentions one of `kind`."""
    for script in SCRIPTS:
        for f in dataclasses.fields(config_class(script)):
            if re.search(rf"\b({kind})\b", str(f.type)):
                yield script, f.name


def refused(script, *argv):
    with pytest.raises(UserError) as error:
        parse_config(config_class(script), argv, script)
    return str(error.value)


def test_every_number_has_a_range():
    assert {name for _, name in settings("int|float")} <= RANGES.keys()


@pytest.mark.parametrize(("script", "name"), settings("int|float"))
def test_a_number_outside_its_range_is_refused_with_its_name(script, name):
    valid = RANGES[name]
    values = ["nan", "inf", "-1e300", "1e300", repr(valid.high * 1.5 + 2), repr(valid.low - 1 - abs(valid.low))]
    values += [repr(end) for end in (valid.low, valid.high) if valid.is_open]
    for value in values:
        whole = value.removesuffix(".0")
        assert name in refused(script, f"--{name}={whole}"), value


@pytest.mark.parametrize(("script", "name"), settings("Path|str"))
def test_an_empty_text_or_one_with_a_control_character_is_refused(script, name):
    for value in ("", *([] if name == "stop" else [" "]), "a\0b", "a\x1b[31m", "a\ud800"):  # a text may end at a space
        assert name in refused(script, f"--{name}={value}")


@pytest.mark.parametrize(("script", "name"), [(s, n) for s, n in settings("Path") if n != "manifests"])
def test_a_path_that_the_file_system_refuses_is_one_message(script, name, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for value in (tmp_path / "loop", "x" * 300, tmp_path / ("x/" * 5000)):
        message = refused(script, f"--{name}={value}")
        assert name in message and len(message) < 600


@pytest.mark.parametrize(("script", "name"), [(s, n) for s, n in settings("Path") if n in INPUT_FILES])
def test_an_input_file_must_be_a_file(script, name, tmp_path):
    assert "no such file" in refused(script, f"--{name}={tmp_path / 'absent'}")
    assert "found a folder" in refused(script, f"--{name}={tmp_path}")
    assert "found something else" in refused(script, f"--{name}=/dev/zero")


@pytest.mark.parametrize(("script", "name"), [(s, n) for s, n in settings("str") if n in SPLITS])
def test_a_split_cannot_leave_its_folder(script, name):
    for value in ("../x", "a/b", "/tmp", ".hidden", ".."):
        assert "names a folder" in refused(script, f"--{name}={value}")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("device", ["cuda:-1", "cuda:", "cuda:x", "cuda:01", "meta", "mps", "cpu:0", "CPU", "0", "xla", "x" * 5000])
def test_an_unknown_device_is_refused_by_every_script(script, device):
    message = refused(script, "--device", device)
    assert "wanted cpu, cuda or cuda:<number>" in message and len(message) < 500


@pytest.mark.parametrize("script", [*SCRIPTS, "models.pair"])
@pytest.mark.parametrize("device", ["cuda", "cuda:9"])
def test_a_missing_gpu_is_refused_before_anything_is_loaded(script, device, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: device != "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 if device != "cuda" else 0)
    monkeypatch.chdir(tmp_path)
    argv = ["--device", device, *(["--target_id", str(ROOT / "data/demo/video_llava")] if script == "models.pair" else [])]
    argv += ["--draft_id", str(ROOT / "data/demo/eventgpt")] if script == "models.pair" else []
    with pytest.raises(UserError, match="sees no GPU" if device == "cuda" else "cuda:0 to cuda:1"):
        main_of(script)(argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        ("feature_sd_inference", ["--threshold", "2"], "--threshold 2"),
        ("feature_sd_inference", ["--temperature", "1e-40"], "--temperature 1e-40: wanted 0, or a number from 0.001"),
        ("feature_sd_inference", ["--temperature", "0.5", "--accept", "feature"], "--accept token"),
        ("feature_sd_inference", ["--draft_vocabulary", "0", "--draft", "chained"], "--draft_vocabulary 0: wanted"),
        ("feature_sd_inference", ["--draft_vocabulary", "9", "--draft", "ngram"], "limits the chained adapter only"),
        ("feature_sd_inference", ["--draft_vocabulary", "auto", "--draft", "own"], "limits the chained adapter only"),
        ("feature_sd_inference", ["--draft_vocabulary", "many", "--draft", "chained"], "many"),
        (
            "feature_sd_inference",
            ["--draft_vocabulary", "auto", "--draft", "chained", "--temperature", "0.7"],
            "chosen by timing, and a sampled text would depend on it",
        ),
        ("feature_sd_inference", ["--events", "EXISTS"], "--video, --question missing"),
        ("feature_sd_inference", ["--events", "EXISTS", "--video", "absent", "--question", "What?"], "no such file or folder"),
        ("train_hidden_adapter", ["--mse_weight", "0", "--cosine_weight", "0", "--kl_weight", "0"], "at least one above 0"),
        ("train_hidden_adapter", ["--adapter", "plain", "--mse_weight", "0", "--cosine_weight", "0"], "at least one above 0"),
        ("train_hidden_adapter", ["--adapter", "plain", "--loss", "tv"], "the plain adapter has the loss of TASKS.md's recipe"),
        ("train_hidden_adapter", ["--variant", "../elsewhere"], "a variant names a folder"),
        ("train_hidden_adapter", ["--variant", "without_prompt"], "not beginning with blind or without_"),
        ("measure_feature_acceptance", ["--variants", "half", "a/b"], "a variant names a folder"),
        ("extract_hidden_states", ["--draft_layers", "2", "1"], "ascending"),
        ("extract_hidden_states", ["--draft_layers", "1", "1"], "each value once"),
        ("extract_hidden_states", ["--draft_layers", "[]"], "at least one value"),
        ("extract_hidden_states", ["--event_start_ms", "5"], "together with --event_window_ms"),
        ("extract_hidden_states", ["--random_weights", "--quantize", "nf4"], "do not go together"),
        ("extract_hidden_states", ["--device_map", "balanced"], "wanted --device cuda"),
        ("extract_hidden_states", ["--device_map", "cuda:0"], "device_map"),
        ("hidden_adapter", ["--tokens", "1", "1"], "each value once"),
        ("benchmark_feature_sd", ["--threshold", "0.9", "0.90"], "each value once"),
        ("benchmark_feature_sd", ["--manifests", "[" * 5000], "manifests"),
    ],
)
def test_senseless_settings_are_refused(script, argv, message, tmp_path):
    (tmp_path / "file").write_text("")
    assert message in refused(script, *[str(tmp_path / "file") if a == "EXISTS" else a for a in argv])


def test_ranges_include_what_is_sensible():
    cfg = parse_config(
        config_class("feature_sd_inference"), ["--temperature", "0", "--threshold=-1", "--limit", "1"], "feature_sd_inference"
    )
    assert (cfg.temperature, cfg.threshold, cfg.limit) == (0, -1, 1)
    cfg = parse_config(config_class("benchmark_feature_sd"), ["--warmup", "0", "--planted_acceptance", "0", "1"], "benchmark_feature_sd")
    assert (cfg.warmup, cfg.planted_acceptance, cfg.exit_adapters) == (0, [0, 1], [])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_starts_within_a_second(script):
    command = [sys.executable, f"feature_alignment/{script}.py", "--help"]
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 1
