"""speculation_profile.json: per-position acceptance, lengths, calibration and the recommended draft length."""

import json
import random
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest

from feature_alignment.benchmark import plots
from feature_alignment.benchmark.profile import ProfileCosts, SpeculationProfile, calibration_of, profile_of, recommended_length
from feature_alignment.benchmark.timing import Timed
from feature_alignment.decoding.generation import Generation, Round
from feature_alignment.storage.files import read_hashed_json

COSTS = ProfileCosts(c=0.05, r=0.1, v={"1": 1.0, "6": 1.5, "11": 2.0})


def round_of(num_proposed: int, num_accepted: int, confidence=None) -> Round:
    kept = [i < num_accepted for i in range(num_proposed)]
    return Round([0] * num_proposed, [0] * num_proposed, kept, None, 1, False, {}, "length", confidence)


def random_runs(seed: int, longest: int = 5) -> Timed:
    chance = random.Random(seed)
    generations = []
    for _ in range(12):
        rounds = [round_of(0, 0)]  # a step of plain decoding
        for _ in range(chance.randint(1, 6)):
            proposed = chance.choice([longest, longest, chance.randint(1, longest)])
            rounds.append(round_of(proposed, chance.randint(0, proposed)))
        generations.append([Generation([1, 2, 3], 2, 1.0, {}, rounds)])
    return Timed(generations)


@pytest.mark.parametrize("seed", range(20))
def test_mean_length_is_one_plus_the_sum_of_marginal_acceptance(seed):
    runs = random_runs(seed)
    profile = profile_of("chained", 5, runs, [str(i) for i in range(12)], COSTS)
    assert profile.mean_acceptance_length == pytest.approx(1 + sum(p.value for p in profile.marginal_acceptance), abs=1e-12)
    drafted = [r for g in runs.every for r in g.rounds if r.proposed]
    assert profile.num_drafts == len(drafted) == sum(profile.accepted_lengths)
    assert profile.num_accepted_tokens == sum(n * count for n, count in enumerate(profile.accepted_lengths))
    for i in range(5):  # plain loops
        reached = [r for r in drafted if len(r.proposed) > i and all(r.accepted[:i])]
        assert profile.conditional_acceptance[i].total == len(reached)
        assert profile.conditional_acceptance[i].count == sum(r.accepted[i] for r in reached)
        assert profile.marginal_acceptance[i].total == len(drafted)
    assert profile.draft_acceptance_rate.total == sum(len(r.proposed) for r in drafted)


def test_the_identity_holds_on_the_profiles_of_a_real_run_and_their_intervals_hold_their_values(finished):
    content = read_hashed_json(finished / "out" / "benchmark" / "speculation_profile.json", "")
    profiles = [SpeculationProfile.from_json(p) for p in content["profiles"]]
    assert {"chained", "aligned", "own", "ngram", "attending"} <= {p.draft for p in profiles}
    rows = read_hashed_json(finished / "out" / "benchmark" / "benchmark.json", "")["rows"]
    for p in profiles:
        assert p.mean_acceptance_length == pytest.approx(1 + sum(r.value for r in p.marginal_acceptance), abs=1e-12)
        low, high = p.mean_acceptance_length_ci95
        assert low <= p.mean_acceptance_length <= high
        row = next(r for r in rows if (r["draft"], r["accept"], r["drafts_per_round"]) == (p.draft, "token", str(p.num_draft_tokens)))
        reached = sum(rate.total for rate in p.conditional_acceptance)
        assert p.num_accepted_tokens / max(1, reached) == pytest.approx(row["acceptance_rate"]["value"] or 0)
        assert p.costs.v["1"] > 0 and len(p.marginal_acceptance) == len(p.conditional_acceptance) == p.num_draft_tokens
    assert any(p.num_accepted_tokens for p in profiles)


def test_a_profile_survives_json():
    profile = profile_of("chained", 5, random_runs(0), [str(i) for i in range(12)], COSTS, random_runs(1))
    again = SpeculationProfile.from_json(json.loads(json.dumps(profile.to_json())))
    assert again == profile and profile.confidence is None
    with_confidence = profile_of(
        "chained", 2, random_runs(0), ["a"] * 12, COSTS, Timed([[Generation([], 1, 1.0, {}, [round_of(2, 1, [0.9, 0.4])])]])
    )
    assert SpeculationProfile.from_json(json.loads(json.dumps(with_confidence.to_json()))).confidence == with_confidence.confidence


def test_the_recommended_length_is_the_best_of_all_lengths():
    conditional = [0.9, 0.8, 0.5, 0.1, 0.1]
    found = recommended_length(conditional, COSTS)
    v = {g: 1.0 + 0.1 * g for g in range(1, 6)}  # of g + 1 tokens: linear from 1.0 at one to 1.5 at six
    speedups, tokens, chance = [], 1.0, 1.0
    for g, acceptance in enumerate(conditional, 1):
        chance *= acceptance
        tokens += chance
        speedups.append(tokens / (g * 0.05 + v[g] + 0.1))
    assert found.num_draft_tokens == speedups.index(max(speedups)) + 1 == 3
    assert found.decode_speedup == pytest.approx(max(speedups))
    assert recommended_length([float("nan")], COSTS) is None
    assert recommended_length(conditional, replace(COSTS, c=None)) is None


def test_calibration_counts_only_draft_tokens_that_verification_reached():
    rounds = [round_of(3, 1, [0.95, 0.35, 0.05]), round_of(2, 2, [0.95, 0.85]), round_of(1, 0), round_of(1, 0, [0.95])]
    found = calibration_of(rounds)  # reached: .95 yes, .35 no | .95 yes, .85 yes | none | .95 no
    assert found.num_draft_tokens == 5
    assert [(b.number, b.acceptance) for b in found.bins] == [(1, 0.0), (1, 1.0), (3, pytest.approx(2 / 3))]
    assert found.ece == pytest.approx((0.35 + 0.15 + 3 * (0.95 - 2 / 3)) / 5)
    assert found.brier == pytest.approx((0.05**2 + 0.35**2 + 0.05**2 + 0.15**2 + 0.95**2) / 5)
    assert found.auroc == pytest.approx((2 * 1.5 + 1) / 6)  # of three accepted and two rejected; ties count half
    assert calibration_of([round_of(1, 1)]) is None
    assert calibration_of([round_of(1, 1, [1.0])]).auroc is None


def test_the_picture_shows_marginal_and_conditional_acceptance_by_position_with_intervals(monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.update({path.name: figure}))
    profiles = [profile_of(name, n, random_runs(n, n), [str(i) for i in range(12)], COSTS) for name, n in (("chained", 5), ("own", 3))]
    plots.acceptance_by_position(profiles, tmp_path / "by_position.png")
    for axis, key in zip(drawn["by_position.png"].axes, ("marginal_acceptance", "conditional_acceptance"), strict=True):
        for profile, bars, shift in zip(profiles, axis.containers, (-0.03, 0.03), strict=True):
            rates = getattr(profile, key)
            line, _, (ends,) = bars
            assert list(line.get_xdata()) == pytest.approx([i + 1 + shift for i in range(len(rates))])
            assert list(line.get_ydata()) == [r.value for r in rates]
            assert [s[:, 1].tolist() for s in ends.get_segments()] == [pytest.approx(list(r.ci95)) for r in rates]
            assert bars.get_label() == f"{profile.draft}: {profile.mean_acceptance_length:.2f} tokens a round"
        assert axis.get_ylim() == (0, 1.02)
    plt.close("all")
