"""All seven mains in order on a tiny random pair and real files; then what they refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, main_of

from feature_alignment.cli.console import UserError
from feature_alignment.storage.hidden_states import load_hidden_states


def read(path):
    return json.loads(path.read_text())


def test_hidden_states_fit_their_tokens(finished):
    states = load_hidden_states(finished / "out" / "hidden_states" / "test")
    head = torch.load(finished / "out" / "hidden_states" / "vl_lm_head.pt", weights_only=True)
    assert states.draft.shape[:2] == states.target.shape[:2] == (16, 12) and states.meta["prefix"] == "verifier"
    said = (states.target.float() @ head.float().T).argmax(-1)
    assert torch.equal(said[states.mask], states.token_ids[states.mask])  # v[t] emits token t
    assert [r["vl_tokens"] for r in states.rows] == [states.token_ids[i, : states.lengths[i]].tolist() for i in range(16)]
    assert read(finished / "out" / "token_pairs" / "test.json")["results"][0]["query"] == states.rows[0]["question"]


def test_the_best_epoch_is_what_is_kept(finished):
    history = [json.loads(line) for line in (finished / "out" / "adapter" / "history.jsonl").read_text().splitlines()]
    meta = read(finished / "out" / "adapter" / "meta.json")
    best = min(history, key=lambda h: (-h["validation_tokens_per_pass"], h["validation_loss"]))
    assert meta["best_epoch"] == best["epoch"] and meta["validation"]["cosine"] == best["validation_cosine"]
    assert meta["validation"]["tokens_per_pass"] == best["validation_tokens_per_pass"] >= 1
    assert len(history) == 3 and history[0]["epoch"] == 0


def test_acceptance_json_keeps_its_contract(finished):
    report = read(finished / "out" / "acceptance" / "acceptance.json")
    assert {
        "meta",
        "adapter",
        "cosine",
        "token_match",
        "acceptance_rate",
        "nulls",
        "thresholds",
        "auc_cosine_token_match",
        "per_position",
        "calibration",
        "num_draft_tokens",
    } <= set(report)
    assert set(report["nulls"]) == {"identity", "target_mean", "position_mean", "shuffled", "ridge", "ridge_rank_r"}
    assert set(report["thresholds"]) == {"0.80", "0.85", "0.90", "0.95"}
    for rates in report["thresholds"].values():
        assert set(rates) == {"relaxed_accept", "consecutive_accept", "consecutive_length", "token_match_given_accept"}
    assert set(report["cosine"]) == {"value", "count", "total", "ci95"}


def test_benchmark_json_keeps_its_contract(finished):
    report = read(finished / "out" / "benchmark" / "benchmark.json")
    assert {"meta", "baselines", "rows", "cost", "break_even", "targets"} <= set(report)
    for row in report["rows"]:
        assert {
            "draft",
            "accept",
            "threshold",
            "num_draft_tokens",
            "draft_layers",
            "speedup",
            "decode_speedup",
            "tokens_per_pass",
            "acceptance_rate",
            "exact_match",
            "fidelity",
            "ms",
            "modelled_speedup",
            "corrected_speedup",
        } <= set(row)
        if row["accept"] == "token":
            assert row["exact_match"] == 1.0
            assert row["fidelity"]["token_agreement"]["value"] == 1.0
    assert len(report["targets"]) == 6 and {"t_draft_ms", "t_adapter_ms", "t_target_ms", "c", "v"} <= set(report["cost"])


def test_comparison_json_keeps_its_contract(finished):
    report = read(finished / "out" / "token_baseline" / "comparison.json")
    assert {"token_level", "feature_level", "aligned_token_level", "nulls", "rows"} <= set(report)
    assert {"consecutive_accept", "position_match", "mean_prefix", "params", "overhead_ms"} <= set(report["token_level"])
    assert {"own_drafts", "chained_token_level", "feature_rules", "kept_by_cosine", "examples"} <= set(report)


def test_pictures_and_summaries_are_there(finished):
    pictures = {"acceptance": ("cosine_histogram", "reliability", "accepted_lengths", "acceptance_by_position", "predictors")}
    pictures |= {"token_baseline": ("threshold_sweep",)}
    for folder, names in pictures.items():
        for name in names:
            assert (finished / "out" / folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    summary = (finished / "out" / "acceptance" / "summary.md").read_text()
    nulls = read(finished / "out" / "acceptance" / "acceptance.json")["nulls"]
    assert all(f"\n| {name} |" in summary for name in ("adapter", "plain (TASKS.md)", *nulls)) and len(summary.splitlines()) < 60


def test_own_drafts_are_what_the_drafter_would_have_said(finished):
    """Without a cache, one prefix at a time, the drafter at full depth."""
    from feature_alignment.cli.config import parse_config
    from feature_alignment.extract_hidden_states import ExtractConfig
    from feature_alignment.inputs.samples import read_samples
    from feature_alignment.models.pair import load_pair

    cfg = parse_config(ExtractConfig, ["--config", str(finished / "tiny.yaml")], "extract_hidden_states")
    draft, states = load_pair(cfg).draft, load_hidden_states(finished / "out" / "hidden_states" / "test")
    sample = read_samples(cfg.manifests, "test")[3]
    assert states.rows[3]["id"] == sample.id
    read, said = states.token_ids[3, : states.lengths[3]].tolist(), []
    for t in range(len(read)):
        state = draft.prefill([draft.prepare(sample)])
        hidden = draft.step(state, torch.tensor([read[:t]]))[:, -1] if t else state.last
        said.append(int(draft.lm_head(hidden).argmax()))
    assert said == states.rows[3]["egpt_drafts"]


def test_the_token_level_adapter_is_trained_and_then_compared(finished, tmp_path):
    shutil.copytree(finished / "out", tmp_path / "out")
    config = ["--config", str(finished / "tiny.yaml"), "--output_dir", str(tmp_path / "out")]
    for more in (["--train_token_adapter", "--num_epochs", "1"], []):
        report = main_of("compare_token_baseline")([*config, *more])["token_adapter"]
        assert report["params_7b"] > 45_000_000 and 0 <= report["token_match"]["value"] <= 1


def test_a_certified_threshold_is_asked_of_clips_of_their_own(finished, tmp_path):
    from feature_alignment.demo import scenes

    shutil.copytree(finished / "out", tmp_path / "out")
    manifests = {s: str(finished / "scenes" / f"{s}.jsonl") for s in ("train", "validation", "test")}
    manifests["calibration"] = str(scenes.write_split(tmp_path / "scenes", "calibration", 3))
    config = ["--config", str(finished / "tiny.yaml"), "--output_dir", str(tmp_path / "out"), "--manifests", json.dumps(manifests)]
    main_of("extract_hidden_states")([*config, "--split", "calibration"])
    report = main_of("measure_feature_acceptance")([*config, "--calibrate"])
    for found in (report["calibration"], report["chains"]["chained"]["calibration"]):
        assert found["clips"] == 3 and found["threshold"] is None and found["risk_on_test"] is None  # far too few to promise anything


def test_a_second_run_reuses_everything(finished, capsys):
    config = ["--config", str(finished / "tiny.yaml")]
    for script, args in (("extract_hidden_states", ["--split", "train"]), ("train_hidden_adapter", []), ("benchmark_feature_sd", [])):
        main_of(script)([*config, *args])
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["reused"] is True


@pytest.mark.parametrize(
    "extra",
    [
        *[["--draft", source] for source in ("own", "chained", "attending", "hybrid", "ngram", "template", "lookup", "previous", "tables")],
        *[["--draft", source, "--temperature", "0.8"] for source in ("own", "attending", "hybrid")],
        ["--draft", "own", "--accept", "feature"],
        *[["--draft", source, "--accept", "relaxed", "--threshold", "0.1"] for source in ("chained", "attending")],
        ["--accept", "feature", "--threshold", "0.5"],
        ["--accept", "relaxed"],
        ["--gamma", "1"],
        *[["--draft", source, "--adaptive", "--num_draft_tokens", "9", "--verbose"] for source in ("chained", "attending")],
        *[["--draft", source, "--overlap"] for source in ("aligned", "chained", "attending", "ngram")],
    ],
)
def test_inference_in_every_mode(finished, extra):
    result = main_of("feature_sd_inference")(["--config", str(finished / "tiny.yaml"), *extra])
    assert result["exact_match"] or "--accept" in extra or "--temperature" in extra


@pytest.mark.parametrize("prefix", ["drafter", "own"])
def test_other_prefixes_say_so(finished, tmp_path, prefix):
    config = ["--config", str(finished / "tiny.yaml"), "--output_dir", str(tmp_path), "--split", "test", "--prefix", prefix]
    assert main_of("extract_hidden_states")(config)["prefix"] == prefix
    states = load_hidden_states(tmp_path / "hidden_states" / "test")
    if prefix == "drafter":
        assert states.token_ids[0, : states.lengths[0]].tolist() == states.rows[0]["egpt_tokens"]


def test_early_exit_runs_end_to_end(finished, tmp_path):
    config = ["--config", str(finished / "tiny.yaml"), "--output_dir", str(tmp_path), "--draft_layers", "1", "2"]
    for split in ("train", "validation", "test"):
        meta = main_of("extract_hidden_states")([*config, "--split", split])
    assert (meta["draft_layers"], meta["draft_norm"], meta["hidden_size_draft"]) == ([1, 2], "pre", 64)
    main_of("train_hidden_adapter")(config)
    assert main_of("feature_sd_inference")(config)["exact_match"]
    assert main_of("feature_sd_inference")([*config, "--draft", "own"])["exact_match"]  # at its full depth
    with pytest.raises(UserError, match=r"--draft_layers 3"):
        main_of("feature_sd_inference")([*config, "--draft", "own", "--accept", "feature"])
    with pytest.raises(UserError, match=r"--draft_layers 1 2"):  # the full-depth run's adapter path, another depth's states
        shutil.copytree(tmp_path / "adapter", tmp_path / "other" / "adapter")
        main_of("feature_sd_inference")([*config[:2], "--output_dir", str(tmp_path / "other"), "--draft_layers", "2", "3"])


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        ("extract_hidden_states", ["--split", "holdout"], "no manifest for split 'holdout'"),
        ("extract_hidden_states", ["--target_id", "absent"], "no checkpoint at absent"),
        ("extract_hidden_states", ["--draft_layers", "9"], "from 1 to 3"),
        ("extract_hidden_states", ["--limit", "0"], "at least 1"),
        ("train_hidden_adapter", ["--validation_split", "train"], "share clips"),
        ("train_hidden_adapter", ["--output_dir", "absent"], r"extract_hidden_states\.py"),
        ("train_hidden_adapter", ["--num_epochs", "0"], "at least 1"),
        ("measure_feature_acceptance", ["--split", "train"], "share clips"),
        ("measure_feature_acceptance", ["--output_dir", "absent"], r"extract_hidden_states\.py"),
        ("compare_token_baseline", ["--token_pairs", "absent.json"], r"absent\.json: no such file"),
        ("feature_sd_inference", ["--sample", "nobody"], "no sample 'nobody'"),
        ("feature_sd_inference", ["--question", "Why?"], "belong together"),
        ("feature_sd_inference", ["--num_draft_tokens", "0"], "at least 1"),
        ("feature_sd_inference", ["--temperature", "0.5", "--accept", "relaxed"], "Pass --accept token"),
        ("feature_sd_inference", ["--temperature", "-1"], "wanted 0, or a number from 0.001"),
        ("hidden_adapter", ["--bottleneck", "0"], "at least 1"),
        ("benchmark_feature_sd", ["--repeats", "0"], "at least 1"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(finished, script, argv, message):
    before = sorted(str(p) for p in (finished / "out").rglob("*"))
    with pytest.raises(UserError, match=message):
        main_of(script)(["--config", str(finished / "tiny.yaml"), *argv])
    assert sorted(str(p) for p in (finished / "out").rglob("*")) == before


def test_a_script_can_be_started_both_ways(finished):
    for start in (["feature_alignment/feature_sd_inference.py"], ["-m", "feature_alignment.feature_sd_inference"]):
        command = [sys.executable, *start, "--config", str(finished / "tiny.yaml")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout.splitlines()[-1])["exact_match"] is True
