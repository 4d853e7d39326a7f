"""Rows beyond the demo's: planted acceptance, several thresholds, other exits of EventGPT."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import main_of

from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.benchmark import planted
from feature_alignment.benchmark.planted import random_acceptance
from feature_alignment.benchmark.results import BenchmarkReport, PlantedReport
from feature_alignment.cli.console import UserError
from feature_alignment.measurement.metrics import tokens_per_pass_iid
from feature_alignment.models import fixed
from feature_alignment.storage.files import read_hashed_json, save_pt, write_hashed_json


def test_draft_tokens_are_accepted_at_the_planted_rate_whatever_they_say():
    rule = random_acceptance(0.7, 0, torch.device("cpu"))
    kept = torch.cat([rule(torch.zeros(5), torch.ones(5), None, 0.0) for _ in range(4000)])
    assert kept.float().mean().item() == pytest.approx(0.7, abs=4 * (0.7 * 0.3 / 20_000) ** 0.5)


MARGINAL = {"chained": [0.9, 0.72, 0.36], "attending": [0.8, 0.6], "aligned": [0.5, 0.5]}


def profile_file(path, marginal=MARGINAL, **more):
    """A speculation_profile.json with these marginal acceptances."""
    rate = lambda value: {"value": value, "count": value * 100, "total": 100.0, "ci95": [value, value]}  # noqa: E731
    profiles = [
        {
            "draft": draft,
            "num_draft_tokens": len(rates),
            "num_drafts": 100,
            "num_proposed_tokens": 100 * len(rates),
            "num_accepted_tokens": round(100 * sum(rates)),
            "mean_acceptance_length": 1 + sum(rates),
            "draft_acceptance_rate": rate(sum(rates) / max(1, len(rates))),
            "marginal_acceptance": [rate(r) for r in rates],
            "conditional_acceptance": [rate(r) for r in rates],
            "accepted_lengths": [100] + [0] * len(rates),
            "costs": {"c": 0.1, "r": 0.0, "v": {"1": 1.0}},
            "recommended": None,
            "confidence": None,
        }
        for draft, rates in marginal.items()
    ]
    write_hashed_json(path, {"meta": {}, "profiles": profiles, **more})
    return path


def test_marginal_acceptances_are_planted_by_position():
    marginal = (0.9, 0.72, 0.36, 0.0, 0.0)
    assert planted.conditional_acceptance(marginal) == pytest.approx([0.9, 0.8, 0.5, 0.0, 0.0])
    assert planted.implied_length(marginal, 3) == pytest.approx(2.98) and planted.implied_length(0.5, 3) == pytest.approx(1.875)
    rule = random_acceptance(marginal, 0, torch.device("cpu"))
    kept = torch.stack([rule(torch.zeros(5), torch.ones(5), None, 0.0).cumprod(0) for _ in range(4000)]).float().mean(0)
    for share, wanted in zip(kept.tolist(), marginal, strict=True):
        assert share == pytest.approx(wanted, abs=4 * (wanted * (1 - wanted) / 4000) ** 0.5)
    assert len(rule(torch.zeros(2), torch.ones(2), None, 0.0)) == 2  # the end of a text


def test_a_run_with_a_measured_profile_reproduces_its_mean_acceptance_length(tiny_run, tmp_path):
    """Within four standard deviations of the binomial law, at every draft length that the profile has rates for."""
    path = profile_file(tmp_path / "speculation_profile.json")
    config = ["--config", str(tiny_run / "tiny.yaml"), "--output_dir", str(tmp_path), "--max_new_tokens", "60", "--repeats", "1"]
    argv = [*config, "--planted_acceptance", "0.5", str(path), "--num_draft_tokens", "2", "3", "--warmup", "0"]
    result = PlantedReport.from_json(main_of("benchmark_feature_sd")(argv))
    found = {(r.draft, r.num_draft_tokens, str(r.planted_acceptance)): r for r in result.rows}
    replayed = {(draft, g, str(rates)) for draft, rates in MARGINAL.items() for g in range(2, len(rates) + 1)}
    assert set(found) == replayed | {(draft, g, "0.5") for draft in MARGINAL for g in (2, 3)}
    for (draft, g, rate), row in found.items():
        marginal = [0.5**i for i in (1, 2, 3)] if rate == "0.5" else MARGINAL[draft]
        marginal = marginal[:g]
        assert row.planted_length == pytest.approx(1 + sum(marginal))
        variance = sum((2 * i + 1) * m for i, m in enumerate(marginal)) - sum(marginal) ** 2  # E[n²] = Σ (2 i - 1) P(n >= i)
        length = row.mean_acceptance_length
        assert length.total > 4 * 59 / (g + 1) - 10
        assert length.value == pytest.approx(row.planted_length, abs=4 * (variance / length.total) ** 0.5)
    (row,) = (r for key, r in found.items() if key[:2] == ("aligned", 2) and r.planted_acceptance != 0.5)
    assert row.mean_acceptance_length.value == pytest.approx(2, abs=0.5) and row.accept == "planted"
    assert "| chained, 3 | profile | 2.98 |" in (tmp_path / "benchmark" / "planted.md").read_text()


def test_a_profile_is_compared_by_its_content(tiny_run, tmp_path, capsys):
    path = profile_file(tmp_path / "one.json")
    config = ["--config", str(tiny_run / "tiny.yaml"), "--output_dir", str(tmp_path), "--limit", "2", "--num_draft_tokens", "2"]
    main_of("benchmark_feature_sd")([*config, "--planted_acceptance", str(path)])
    shutil.copy(path, tmp_path / "two.json")
    profile_file(tmp_path / "three.json", {"chained": [0.9, 0.7]})
    for name, reused in (("two", True), ("three", False)):
        capsys.readouterr()
        main_of("benchmark_feature_sd")([*config, "--planted_acceptance", str(tmp_path / f"{name}.json")])
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["reused"] is reused


def test_a_profile_that_cannot_be_planted_is_refused(tiny_run, tmp_path):
    argv = ["--config", str(tiny_run / "tiny.yaml"), "--output_dir", str(tmp_path / "out"), "--planted_acceptance"]
    paths = {name: profile_file(tmp_path / f"{name}.json", rates) for name, rates in (("good", MARGINAL), ("table", {"ngram": [0.5]}))}
    (tmp_path / "altered.json").write_text(paths["good"].read_text().replace("0.72", "0.73"))
    write_hashed_json(tmp_path / "other.json", {"rows": []})
    for name, more, message in (
        ("table", [], "has profiles of ngram; planted runs draft as chained, attending, aligned"),
        ("altered", [], "altered"),
        ("other", [], "is not a speculation_profile.json"),
        ("absent", [], "no such file. Wanted numbers from 0 to 1, or the speculation_profile.json"),
        ("good", ["--num_draft_tokens", "8"], "the profile has rates for 3 draft tokens. Pass --num_draft_tokens 3"),
    ):
        with pytest.raises(UserError, match=message):
            main_of("benchmark_feature_sd")([*argv, str(tmp_path / f"{name}.json"), *more])
    assert not (tmp_path / "out" / "benchmark" / "planted.json").exists()


def test_planted_rows_say_so_and_need_no_trained_adapter(tiny_run, finished, tmp_path, capsys):
    config = ["--config", str(tiny_run / "tiny.yaml"), "--output_dir", str(tmp_path), "--steps", "graphs"]
    argv = [*config, "--planted_acceptance", "0", "0.5", "1", "--num_draft_tokens", "3", "--limit", "3", "--repeats", "2"]
    main_of("benchmark_feature_sd")(argv)
    assert sorted(p.name for p in (tmp_path / "benchmark").iterdir() if p.suffix in (".md", ".json", ".html")) == [
        "planted.json",
        "planted.md",
    ]
    result = read_hashed_json(tmp_path / "benchmark" / "planted.json", "")
    assert result["planted"] and result["meta"]["planted"] and "targets" not in result
    assert "PLANTED" in (tmp_path / "benchmark" / "planted.md").read_text()
    assert result["baselines"][0]["tokens"] == 3 * 12, "no text ends early"
    for row in result["rows"]:
        assert row["accept"] == "planted" and row["speedup"]["value"] > 0 and row["corrected_speedup"] > 0
    assert result["meta"]["eager_fallbacks"] == [] and result["cost"]["c_chained_live"] > 0 and result["cost"]["c_chained_alone"] > 0
    found = {(r["draft"], r["planted_acceptance"]): (r["acceptance_rate"]["value"], r["tokens_per_pass"]) for r in result["rows"]}
    assert found["chained", 0.5] == found["aligned", 0.5] == found["attending", 0.5], "a prompt's drafts have one fate, whoever made them"
    for draft in ("chained", "attending", "aligned"):
        assert found[draft, 0] == (0, 1)
        assert found[draft, 1] == (1, pytest.approx(11 / 3))  # one token of the prefill, then 4, 4 and the last 3
        assert 0.2 < found[draft, 0.5][0] < 0.8
    assert {(b["draft"], b["planted_acceptance"]) for b in result["best"]} == set(found)
    for reused in (True, False):  # until an adapter is trained that it would read
        capsys.readouterr()
        main_of("benchmark_feature_sd")(argv)
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["reused"] is reused
        (tmp_path / "attending_adapter").mkdir(exist_ok=True)
        shutil.copy(finished / "out" / "attending_adapter" / "adapter.pt", tmp_path / "attending_adapter")


def test_steps_that_cannot_be_compiled_are_a_warning_and_a_row_of_the_report(tiny_run, tmp_path, monkeypatch, caplog):
    def compiler(call, **_):
        def fail(*inputs):
            raise RuntimeError("no C compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(fixed, "eager_fallbacks", [])
    argv = ["--config", str(tiny_run / "tiny.yaml"), "--output_dir", str(tmp_path), "--steps", "compiled", "--planted_acceptance", "0.5"]
    main_of("benchmark_feature_sd")([*argv, "--num_draft_tokens", "2", "--limit", "2", "--max_new_tokens", "6", "--warmup", "0"])
    report = (tmp_path / "benchmark" / "planted.md").read_text()
    assert "EAGER FALLBACK: not everything ran with --steps compiled" in report
    assert "| steps cannot be compiled | no C compiler here |" in report
    assert "steps cannot be compiled: no C compiler here" in caplog.text


def test_costs_name_every_exit_and_the_bandwidth(finished):
    cost = read_hashed_json(finished / "out" / "benchmark" / "benchmark.json", "")["cost"]
    assert list(cost["exit_layers"]) == ["1", "2", "3"] and all(e["c"] > 0 for e in cost["exit_layers"].values())
    per_layer = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32  # attention, MLP, two norms
    head = torch.load(finished / "out" / "hidden_states" / "vl_lm_head.pt", weights_only=True)
    held = cost["bandwidth"]["step_bytes"] / 4 - 3 * per_layer - 32 - head.numel()
    assert held > 0 and held % (2 * 3 * 32) == 0, "what is left are keys and values of three layers at each place of the prompt"
    step_s = cost["loop"]["t_target_ms"] / 1e3
    assert cost["bandwidth"]["step_gb_per_s"] == pytest.approx(cost["bandwidth"]["step_bytes"] / step_s / 1e9)
    assert cost["bandwidth"]["share"] == pytest.approx(cost["bandwidth"]["step_gb_per_s"] / cost["bandwidth"]["copy_gb_per_s"])


def test_several_thresholds_and_exits_are_rows_of_their_own(finished, tmp_path):
    for folder in ("hidden_states", "adapter", "token_pairs", "acceptance"):
        shutil.copytree(finished / "out" / folder, tmp_path / "out" / folder)
    argv = ["--config", str(finished / "tiny.yaml"), "--output_dir", str(tmp_path / "out"), "--threshold", "-1", "0.5", "0.95"]
    geometry, exits = {"d_draft": 32, "d_target": 32, "bottleneck": 8}, []
    for layers in ([1], [2], [1, 2]):
        exits.append(tmp_path / f"{len(exits)}.pt")
        save_pt(exits[-1], {"meta": {"geometry": geometry, "draft_layers": layers}, "state_dict": HiddenAdapter(**geometry).state_dict()})
    with pytest.raises(UserError, match=r"layers \[1, 2\]; --exit_adapters expects adapters of a single layer"):
        main_of("benchmark_feature_sd")([*argv, "--exit_adapters", *map(str, exits)])
    report = main_of("benchmark_feature_sd")([*argv, "--exit_adapters", *map(str, exits[:2])])
    names = {row.name: r for row, r in zip(BenchmarkReport.from_json(report).rows, report["rows"], strict=True)}
    assert len(names) == len(report["rows"])
    assert {"aligned + feature > 0.5, 3", "aligned + relaxed > 0.95, 3", "aligned at layer 1 + token, 3"} <= set(names)
    for k in (1, 2):
        row = names[f"aligned at layer {k} + token, 3"]
        assert row["draft_layers"] == [k] and row["exact_match"] == 1.0
        (spent,) = (d for d in report["cost"]["rounds"]["drafters"] if d["exit_layer"] == k)
        expected = tokens_per_pass_iid(row["acceptance_rate"]["value"], 3) / (1 + 3 * spent["c"])
        assert row["modelled_speedup"] == pytest.approx(expected)
    for rule in ("feature", "relaxed"):
        kept = [names[f"aligned + {rule} > {t}, 3"]["acceptance_rate"]["value"] for t in ("-1", "0.5", "0.95")]
        assert 1 == kept[0] >= kept[1] >= kept[2] and kept[2] < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--planted_acceptance", "-0.1"], "from 0 to 1"),
        (["--planted_acceptance", "0.5", "1.5"], "from 0 to 1"),
        (["--threshold", "5"], "from -1 to 1"),
        (["--threshold=[]"], "at least one value"),
        (["--max_new_tokens", "0"], "at least 1"),
        (["--num_draft_tokens", "3", "0"], "at least 1"),
        (["--num_draft_tokens=[]"], "at least one value"),
        (["--warmup", "-1"], "at least 0"),
        (["--num_draft_tokens", "3", "3"], "wanted each value once"),
        (["--threshold", "0.9", "0.9"], "wanted each value once"),
        (["--exit_adapters", "absent.pt"], "absent.pt: no such file"),
    ],
)
def test_invalid_settings_are_refused_before_anything_runs(tiny_run, tmp_path, words, message):
    argv = ["--config", str(tiny_run / "tiny.yaml"), "--output_dir", str(tmp_path), *words]
    with pytest.raises(UserError, match=message):
        main_of("benchmark_feature_sd")(argv)
    assert not any(tmp_path.rglob("*.json"))
