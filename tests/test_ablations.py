"""The ablations script: equal budgets, tables that measuring scores alike, paired intervals, and a run that continues."""

from __future__ import annotations

import json
import shutil

import ablations
import numpy as np
import pytest
import torch

from feature_alignment.storage.hidden_states import HiddenStates, load_hidden_states


@pytest.fixture(scope="module")
def ablated(finished, tmp_path_factory):
    """Output folder and rows after four variants."""
    out = tmp_path_factory.mktemp("ablations") / "out"
    shutil.copytree(finished / "out", out)
    argv = ["--config", str(finished / "tiny.yaml"), "--num_epochs", "2", "--variants", "tv", "half", "fused", "--"]
    argv += ["--output_dir", str(out), "--bottleneck", "16"]
    return out, argv, {row["name"]: row for row in ablations.main(argv)}


def test_every_variant_takes_the_same_number_of_steps_and_its_own_rows(ablated):
    out, _, rows = ablated
    assert [rows[name]["rows"] for name in ("full", "tv", "half")] == [18, 18, 9]
    assert [rows[name]["epochs"] for name in ("full", "tv", "half")] == [2, 2, 4]
    assert [rows["fused"][key] for key in ("rows", "epochs", "steps")] == [rows["full"][key] for key in ("rows", "epochs", "steps")]
    assert rows["fused"]["parameters"] > rows["full"]["parameters"]  # wider input and output maps
    metas = {name: json.loads((out / f"attending_adapter_ablation_{name}" / "meta.json").read_text()) for name in ("full", "tv", "half")}
    assert {m["config"]["loss"] for name, m in metas.items() if name != "tv"} == {"ce_cosine"} and metas["tv"]["config"]["loss"] == "tv"


def test_tables_score_as_in_the_token_baseline(ablated):
    """comparison.json has the same n-gram table at 5 drafts."""
    out, _, rows = ablated
    ngram = json.loads((out / "token_baseline" / "comparison.json").read_text())["nulls"]["ngram"]
    assert rows["n-gram"]["tokens_per_pass"]["5"]["value"] == pytest.approx(ngram["tokens_per_pass"])


def test_a_full_variant_scores_as_measuring_does(ablated, finished):
    """The settings of the main adapter, trained again: its tokens per pass on validation are those of its own history."""
    out, _, rows = ablated
    history = [json.loads(line) for line in (out / "attending_adapter_ablation_full" / "history.jsonl").read_text().splitlines()]
    assert rows["full"]["validation"]["tokens_per_pass"] == history[rows["full"]["best_epoch"]]["validation_tokens_per_pass"]
    states = load_hidden_states(out / "hidden_states" / "test")
    tokens = float((states.lengths - 1).sum())
    for row in rows.values():
        for g in ("5", "8"):
            value, (low, high) = row["tokens_per_pass"][g]["value"], row["tokens_per_pass"][g]["ci95"]
            passes = tokens / value
            assert passes == pytest.approx(round(passes)) and 1 <= low <= value <= high <= int(g) + 1


def test_the_adapter_of_the_run_scores_as_in_acceptance_json(ablated):
    out, _, rows = ablated
    measured = json.loads((out / "acceptance" / "acceptance.json").read_text())["chains"]["attending"]
    assert measured["num_draft_tokens"] == 5
    assert rows["adapter of the run"]["tokens_per_pass"]["5"]["value"] == pytest.approx(measured["tokens_per_pass"])


def test_a_second_run_trains_nothing_and_finds_the_same(ablated, monkeypatch):
    out, argv, rows = ablated
    monkeypatch.setattr(ablations.train_hidden_adapter, "train", refuse_to_train(ablations.train_hidden_adapter.train))
    before = (out / "ablations" / "ablations.md").read_text()
    again = ablations.main(argv)
    kept = [row for row in again if row["name"] != "fused"]  # which is trained each time, to the same weights
    assert kept == [row for row in rows.values() if row["name"] != "fused"]
    assert (out / "ablations" / "ablations.md").read_text() == before
    assert "| half | 9 |" in before and "| n-gram + lookup |" in before


def test_fewer_training_rows_are_a_run_of_their_own(ablated):
    """Its own files: the run with all rows keeps its adapters and its result."""
    out, argv, _ = ablated
    before = (out / "ablations" / "ablations.json").read_bytes()
    flags = ["--limit", "9", "--variants", "full"]
    rows = {row["name"]: row for row in ablations.main([*argv[:4], *flags, *argv[argv.index("--") :]])}
    assert rows["full"]["rows"] == 9 and rows["full"]["epochs"] == 2 and "tv" not in rows
    assert json.loads((out / "ablations" / "ablations_9.json").read_text())["rows"] == json.loads(json.dumps(list(rows.values())))
    assert (out / "ablations" / "ablations.json").read_bytes() == before
    assert json.loads((out / "attending_adapter_ablation_full" / "meta.json").read_text())["rows"] == 18


def refuse_to_train(real):
    def train(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("feature_alignment.adapters.attending_training.train_attending", lambda *_: pytest.fail("trained again"))
            return real(*args)

    return train


def test_differences_are_paired():
    """A drafter that needs one pass less on every text: the interval of the difference is far narrower than those of the values."""
    rng = np.random.default_rng(1)
    n = 60
    lengths = torch.tensor(rng.integers(20, 60, n))
    passes = lengths.double().numpy() - 1 - rng.integers(0, 15, n)
    rows = [{"sequence": str(i // 2)} for i in range(n)]
    mask = torch.arange(60) < lengths[:, None]
    states = HiddenStates(mask, mask, mask.long(), mask, lengths, rows, {})
    found = ablations.tokens_per_pass(passes - 1, states, passes)
    tokens = float((lengths - 1).sum())
    assert found["difference"] == pytest.approx(tokens / (passes - 1).sum() - tokens / passes.sum()) and found["difference"] > 0
    (low, high), (a, b) = found["difference_ci95"], found["ci95"]
    assert 0 < low < found["difference"] < high and high - low < (b - a) / 5
