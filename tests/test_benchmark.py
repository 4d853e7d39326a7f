"""The benchmark: formulas against closed forms, time stamps, transformers' own ways, two runs compared."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from conftest import as_decoder, main_of, noisy_copy, prompt_of, tiny_llama

from feature_alignment import speed_model
from feature_alignment.artifacts import content_hash
from feature_alignment.console import UserError
from feature_alignment.decoding.engine import Generation, Round, greedy, speculate
from feature_alignment.decoding.measure import Timed, mismatches
from feature_alignment.decoding.proposers import ModelProposer
from feature_alignment.differences import compare
from feature_alignment.inputs.samples import Sample
from feature_alignment.speed_model import RoundCost

COST = {"v": {"1": 1.0, "6": 1.25, "32": 2.0}, "t_target_ms": 4.0, "c": 0.2, "c_chained": 0.05}


def test_the_corrected_formula_of_equal_rounds_is_its_closed_form():
    """Ten rounds of five drafts, three kept: S = 4 / (5 c + v(6) + r), and a pass without drafts costs one."""
    round_ = Round([7] * 5, [7] * 5, [True] * 3 + [False] * 2, None, 8, False, {}, "length")
    g = Generation([7] * 41, 10, 0.0, {}, [round_] * 10)
    plain = Timed([[Generation([7] * 41, 40, 160.0, {})]])
    assert speed_model.corrected(Timed([[g]]), plain, RoundCost(0.1, 0.05), COST) == pytest.approx(4 / (0.5 + 1.25 + 0.05))
    g = Generation([7] * 43, 12, 0.0, {}, [round_] * 10)
    assert speed_model.corrected(Timed([[g]]), plain, RoundCost(0.1, 0.05), COST) == pytest.approx(42 / (10 * 1.8 + 2))


def test_what_rounds_cost_is_read_off_in_passes():
    round_ = Round([7] * 5, [7] * 5, [True] * 5, None, 8, False, {}, "length")
    stages = {"target_prefill": 50.0, "draft": 4.0, "head": 6.0, "verify": 10.0}  # two rounds of five drafts, 4 ms left of 24
    timed = Timed([[Generation([7] * 13, 2, 74.0, stages, [round_] * 2)]])
    plain = Timed([[Generation([7] * 13, 12, 98.0, {"target_prefill": 50.0})]])  # 4 ms a pass
    assert speed_model.round_costs(timed, plain) == pytest.approx((0.25, 0.5))
    assert speed_model.round_costs(plain, plain) is None


def test_the_bound_is_the_best_length_and_says_when_nothing_can_win():
    best = speed_model.bound(0.9, RoundCost(0.05, 0.0), COST)
    tried = [speed_model.speedup_at(0.9, g, RoundCost(0.05, 0.0), COST) for g in range(1, 32)]
    assert best["speedup"] == max(tried) and tried[best["num_draft_tokens"] - 1] == max(tried)
    assert speed_model.warnings(COST | {"bound": {"aligned": best}}) == []
    hopeless = speed_model.bound(0.5, RoundCost(0.6, 0.0), COST)
    assert hopeless["speedup"] < 1
    found = speed_model.warnings({"v": {"1": 1.0, "8": 4.5}, "bound": {"aligned": hopeless}})
    assert len(found) == 2 and "no length can win" in found[0] and "4.50 passes" in found[1]


@pytest.mark.parametrize("overlap", [False, True])
def test_time_stamps_lie_inside_the_whole_and_do_not_overlap(overlap):
    model = tiny_llama(0)
    target, prompt = as_decoder(model), prompt_of(1, 5, 9)
    proposer = ModelProposer(as_decoder(noisy_copy(model, 0.05)), None, None)
    got = speculate(target, proposer, prompt, prompt, num_draft_tokens=3, max_new_tokens=20, overlap=overlap)
    own = [(begin, end) for stage, begin, end in got.spans if not stage.endswith(", beside")]
    assert len(own) < len(got.spans) if overlap else len(own) == len(got.spans)
    assert all(0 <= begin <= end <= got.total_ms for begin, end in own)
    assert all(a[1] <= b[0] for a, b in pairwise(own))
    assert sum(end - begin for begin, end in own) == pytest.approx(sum(got.ms.values()))
    assert all(0 <= begin <= end <= plain.total_ms for plain in [greedy(target, prompt, 20)] for _, begin, end in plain.spans)


def test_a_mismatch_is_told_with_its_gap():
    target, prompt = as_decoder(tiny_llama(0)), prompt_of(1, 5, 9)
    own = greedy(target, prompt, 12)
    other = [*own.token_ids[:4], (own.token_ids[4] + 1) % 64, *own.token_ids[5:]]
    texts, plain = (Timed([[Generation(t, 1, 1.0, {})]]) for t in (other, own.token_ids))
    sample = Sample(id="a", sequence="s", question="q", events=None, video=None)
    (found,) = mismatches(target, [prompt], [sample], texts, plain)
    state = target.prefill([prompt])
    logits = target.lm_head(target.teacher_force(state, torch.tensor([own.token_ids])))[0, 4].topk(2).values
    assert found["sample"] == "a" and found["position"] == 4
    assert found["top2_gap"] == pytest.approx(float(logits[0] - logits[1]))
    assert mismatches(target, [prompt], [sample], plain, plain) == []


def test_other_ways_say_the_same(finished):
    """transformers' generate, prompt lookup and assistance: the same texts, each with our fastest row over it."""
    report = json.loads((finished / "out" / "benchmark" / "benchmark.json").read_text())
    plain, *others = report["baselines"]
    assert plain["name"] == "plain greedy" and plain["best_over_it"]["value"] == max(
        r["speedup"]["value"] for r in report["rows"] if r["accept"] == "token" and r["draft"] in ("own", "aligned", "chained", "hybrid")
    )
    assert [o["name"] for o in others] == ["generate", "generate, prompt lookup", "generate, assisted by its first 1 layer"]
    for other in others:
        assert other["exact_match"] == 1.0 and other["mismatches"] == [] and other["best_over_it"]["value"] > 0


def test_two_runs_are_compared_or_refused(finished, tmp_path, capsys):
    path = finished / "out" / "benchmark" / "benchmark.json"
    found = main_of("benchmark_feature_sd")(["compare", str(path), str(path)])
    assert found["differ"] == [] and found["only_in_one"] == 0 and "+0.0%" in capsys.readouterr().out

    def changed(change) -> str:
        report = json.loads(path.read_text())
        change(report)
        report["content_hash"] = content_hash({k: v for k, v in report.items() if k != "content_hash"})
        (tmp_path / "other.json").write_text(json.dumps(report))
        return str(tmp_path / "other.json")

    def faster(report):
        report["rows"][0]["speedup"] |= {"value": 99.0, "ci95": [98.0, 100.0]}

    first = json.loads(path.read_text())["rows"][0]
    assert compare([str(path), changed(faster)])["differ"] == [f"{first['draft']} + {first['accept']}, {first['drafts_per_round']}"]
    with pytest.raises(UserError, match="dtype: 'float32' and 'bfloat16'"):
        compare([str(path), changed(lambda report: report["meta"].update(dtype="bfloat16"))])
    with pytest.raises(UserError, match="not a benchmark"):
        compare([str(path), str(finished / "out" / "acceptance" / "acceptance.json")])
    with pytest.raises(UserError, match="wants two files"):
        compare([str(path)])
