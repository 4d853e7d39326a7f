"""Every number of acceptance.json once more, by plain loops that share no code with it; and the guarantee of calibration, by simulation."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from feature_alignment.adapters import closed_form, hidden
from feature_alignment.adapters import token as token_adapter
from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.cli.console import UserError
from feature_alignment.compare_token_baseline import ComparisonConfig, token_adapter_report
from feature_alignment.decoding.acceptance import accepted_drafts
from feature_alignment.demo import captions
from feature_alignment.measurement import comparison, metrics, scoring
from feature_alignment.measurement.acceptance import ChainScores, acceptance_report, chain_report
from feature_alignment.measurement.calibration import ScoredPositions, certify, p_value
from feature_alignment.measurement.comparison import CosineDrafts
from feature_alignment.measurement.lexicon import Lexicon
from feature_alignment.measurement.scoring import Fitted, Scores
from feature_alignment.storage.files import save_pt
from feature_alignment.storage.hidden_states import HiddenStates
from feature_alignment.storage.identity import SCHEMA

N, S, D, V, G = 9, 11, 6, 12, 3


def random_states(seed: int = 0) -> HiddenStates:
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, S + 1, (N,), generator=rng)
    mask = torch.arange(S) < lengths[:, None]
    states = [torch.randn(N, S, D, generator=rng) * mask[..., None] for _ in "gv"]
    tokens = torch.randint(3, V, (N, S), generator=rng) * mask
    tokens[: N // 2, :][torch.arange(N // 2), lengths[: N // 2] - 1] = 2  # half of the texts end, the others are cut off
    rows = [{"id": str(i), "sequence": f"clip{i // 2}", "question": f"q{i % 2}"} for i in range(N)]
    return HiddenStates(*states, tokens, mask, lengths, rows, {})


def predictors(states, seed=1):
    turn = torch.randn(D, D, generator=torch.Generator().manual_seed(seed))
    return {"adapter": lambda some: some.target + 0.4 * some.draft @ turn, "identity": lambda some: some.draft}


def rounds_by_hand(kept, length, ended, g):
    """(offered, kept) of every round of one text; kept(t, k): is draft k of a round at t kept?"""
    found, t = [], 1
    while t < length:
        offered = min(g, length - t - (not ended))
        n = 0
        while n < offered and kept(t, n):
            n += 1
        found.append((offered, n))
        t += n + 1
    return found


def check_rate(rate, pairs):
    """A rate is Σ count / Σ total over rows; its interval resamples clips of two rows each."""
    count, total = sum(c for c, _ in pairs), sum(t for _, t in pairs)
    assert rate.count == pytest.approx(count, abs=1e-4) and rate.total == pytest.approx(total)
    if total:
        assert rate.value == pytest.approx(count / total, abs=1e-5)
    clips = [[sum(x[j] for x in pairs[i : i + 2]) for j in (0, 1)] for i in range(0, N, 2)]
    picks = np.random.default_rng(0).multinomial(len(clips), [1 / len(clips)] * len(clips), size=2000)
    ratios = [
        sum(w * c for w, (c, _) in zip(p, clips, strict=True)) / below
        for p in picks
        if (below := sum(w * c[1] for w, c in zip(p, clips, strict=True)))
    ]
    if ratios and total:
        assert rate.ci95 == pytest.approx([np.percentile(ratios, 2.5), np.percentile(ratios, 97.5)], abs=1e-4)


def check_token_rule(report, match, states, g):
    rounds = [
        rounds_by_hand(lambda t, k, i=i: match(i, t, k), int(states.lengths[i]), int(states.token_ids[i, states.lengths[i] - 1]) == 2, g)
        for i in range(N)
    ]
    check_rate(report.acceptance_rate, [(sum(n for _, n in r), sum(min(n + 1, o) for o, n in r)) for r in rounds])
    check_rate(report.consecutive_accept_token, [(sum(n for _, n in r), sum(o for o, _ in r)) for r in rounds])
    assert report.tokens_per_pass == pytest.approx(sum(int(x) - 1 for x in states.lengths) / max(1, sum(map(len, rounds))))
    lengths = [0] * (g + 1)
    for o, n in (x for r in rounds for x in r):
        lengths[n] += o > 0
    return lengths


def check_cosine_rules(thresholds, cosine, match, places, states, g):
    """places(i): (t, k) of all drafted places of row i."""
    for name, rates in thresholds.items():
        tau = float(name)
        kept = [[(p, cosine(i, *p) > tau) for p in places(i)] for i in range(N)]
        check_rate(rates.relaxed_accept, [(sum(k for _, k in row), len(row)) for row in kept])
        check_rate(
            rates.token_match_given_accept,
            [(sum(match(i, *p) for p, k in row if k), sum(k for _, k in row)) for i, row in enumerate(kept)],
        )
        rounds = [
            rounds_by_hand(
                lambda t, k, i=i, tau=tau: cosine(i, t, k) > tau,
                int(states.lengths[i]),
                int(states.token_ids[i, states.lengths[i] - 1]) == 2,
                g,
            )
            for i in range(N)
        ]
        check_rate(rates.consecutive_accept, [(sum(n for _, n in r), sum(o for o, _ in r)) for r in rounds])
        check_rate(rates.consecutive_length, [(sum(n for _, n in r), sum(o > 0 for o, _ in r)) for r in rounds])


def check_reliability(rows, pairs):
    pairs = sorted(pairs, key=lambda p: p[0])
    first = 0
    for row in rows:
        part = pairs[first : first + row.n]
        assert row.cosine == pytest.approx(sum(c for c, _ in part) / len(part), abs=1e-5)
        assert row.token_match == pytest.approx(sum(m for _, m in part) / len(part))
        rest = pairs[first:]
        assert row.token_match_above == pytest.approx(sum(m for _, m in rest) / len(rest))
        first += row.n
    assert first == len(pairs)


@pytest.mark.parametrize("seed", range(3))
def test_every_number_by_plain_loops(seed):
    states, head = random_states(seed), torch.randn(V, D, generator=torch.Generator().manual_seed(seed + 50))
    make = predictors(states, seed)
    scores = scoring.score(make, states, head)
    report = acceptance_report(scores, {k: Fitted(f, 7, 1.5) for k, f in make.items()}, states, G)
    for name, own in (("adapter", report), ("identity", report.nulls["identity"])):
        cos, says, same = {}, {}, {}
        for i in range(N):
            for t in range(int(states.lengths[i])):
                some = closed_form.Positions(states.draft[i, t][None], states.target[i, t][None], torch.tensor([i]), torch.tensor([t]))
                expected, v = make[name](some)[0], states.target[i, t]
                cos[i, t] = float(expected @ v / (expected.norm() * v.norm()))
                says[i, t] = max(range(V), key=lambda w: float(head[w] @ expected))
                same[i, t] = says[i, t] == max(range(V), key=lambda w: float(head[w] @ v))
                assert float(scores[name].cosine[i, t]) == pytest.approx(cos[i, t], abs=1e-5) and int(scores[name].says[i, t]) == says[i, t]
        at = lambda i: range(int(states.lengths[i]))  # noqa: E731
        check_rate(own.cosine, [(sum(cos[i, t] for t in at(i)), len(at(i))) for i in range(N)])
        check_rate(own.token_match, [(sum(same[i, t] for t in at(i)), len(at(i))) for i in range(N)])
        lengths = check_token_rule(own, lambda i, t, k, same=same: same[i, t + k], states, G)
        assert own.params == 7 and own.seconds == 1.5
        if name == "identity":
            continue
        assert report.accepted_lengths == lengths
        check_cosine_rules(
            report.thresholds,
            lambda i, t, k, cos=cos: cos[i, t + k],
            lambda i, t, k, same=same: same[i, t + k],
            lambda i, at=at: [(t, 0) for t in at(i)],
            states,
            G,
        )
        check_reliability(report.reliability, [(cos[p], same[p]) for p in cos])
        yes, no = [cos[p] for p in cos if same[p]], [cos[p] for p in cos if not same[p]]
        assert report.auc_cosine_token_match == pytest.approx(sum((a > b) + 0.5 * (a == b) for a in yes for b in no) / (len(yes) * len(no)))
        for row in report.per_position:
            t = row.position
            here = [i for i in range(N) if t < states.lengths[i]]
            alive = [i for i in here if all(same[i, u] for u in range(t))]
            assert (row.n, row.n_token_match, row.n_token_match_given_earlier) == (len(here), len(here), len(alive))
            assert row.cosine == pytest.approx(sum(cos[i, t] for i in here) / len(here), abs=1e-5)
            assert row.token_match == pytest.approx(sum(same[i, t] for i in here) / len(here))
            given = row.token_match_given_earlier
            assert math.isnan(given) if not alive else given == pytest.approx(sum(same[i, t] for i in alive) / len(alive))
            for key, texts in (("token_match", here), ("token_match_given_earlier", alive)):
                hits = np.array([float(same[i, t]) for i in texts])
                bounds = metrics.bootstrap_ratio(hits, np.ones(len(texts)), [states.clips[i] for i in texts])
                assert (getattr(row, f"{key}_lo"), getattr(row, f"{key}_hi")) == pytest.approx(bounds, nan_ok=True)
        assert len(report.per_position) == int(states.lengths.max())


@pytest.mark.parametrize("seed", range(3))
def test_every_number_of_a_chain_by_plain_loops(seed):
    """Drafts depend on where their round began: [i, t, k] is draft k of a round at t."""
    states, rng = random_states(seed), torch.Generator().manual_seed(seed)
    valid = torch.zeros(N, S, G, dtype=torch.bool)
    for i in range(N):
        for t in range(1, int(states.lengths[i])):
            valid[i, t, : int(states.lengths[i]) - t] = True
    cosine, match = torch.rand(N, S, G, generator=rng) * 0.3 + 0.7, torch.rand(N, S, G, generator=rng) < 0.7
    scores = Scores(cosine * valid, torch.zeros(N, S, G, dtype=torch.int64), match & valid)
    report = chain_report(ChainScores(scores, valid, {"parameters": 7, "seconds": 1.5}), states)
    assert (report.params, report.seconds, report.num_draft_tokens, report.calibration) == (7, 1.5, G, None)
    places = lambda i: [(t, k) for t in range(1, int(states.lengths[i])) for k in range(G) if t + k < states.lengths[i]]  # noqa: E731
    cos, same = (lambda i, t, k: float(cosine[i, t, k])), (lambda i, t, k: bool(match[i, t, k]))
    check_rate(report.cosine, [(sum(cos(i, *p) for p in places(i)), len(places(i))) for i in range(N)])
    check_rate(report.token_match, [(sum(same(i, *p) for p in places(i)), len(places(i))) for i in range(N)])
    assert report.accepted_lengths == check_token_rule(report, same, states, G)
    check_cosine_rules(report.thresholds, cos, same, places, states, G)
    check_reliability(report.reliability, [(cos(i, *p), same(i, *p)) for i in range(N) for p in places(i)])
    for k, step in enumerate(report.steps):
        mine = [[p for p in places(i) if p[1] == k] for i in range(N)]
        check_rate(step.token_match, [(sum(same(i, *p) for p in ps), len(ps)) for i, ps in enumerate(mine)])
        check_rate(step.cosine, [(sum(cos(i, *p) for p in ps), len(ps)) for i, ps in enumerate(mine)])


def test_nulls_are_fitted_on_training_texts_alone():
    """A shift of the test states moves no null but the shuffled one, which reads them; what ridge learns is a least-squares map."""
    train, validation, test = random_states(1), random_states(2), random_states(3)
    head = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
    moved = HiddenStates(test.draft, test.target + 5, test.token_ids, test.mask, test.lengths, test.rows, {})
    some = next(closed_form.positions(test, number=10_000))
    kinds = [scoring.null_predictors(train, validation, t, 3, head) for t in (test, moved)]
    for name in ("identity", "target_mean", "position_mean", "ridge", "ridge_rank_r"):
        torch.testing.assert_close(kinds[0][name].predict(some), kinds[1][name].predict(some))
    torch.testing.assert_close(kinds[0]["target_mean"].predict(some)[0], train.target[train.mask].mean(0))
    t = 4
    wanted = train.target[train.lengths > t, t].mean(0)
    torch.testing.assert_close(kinds[0]["position_mean"].predict(some)[some.at == t][0], wanted)
    x, y = train.draft[train.mask].double(), train.target[train.mask].double()
    a = torch.cat([x, torch.ones(len(x), 1)], 1)
    exact = torch.linalg.lstsq(a, y).solution
    means = scoring.Moments(D, D)
    means.add(x.float()[:20], y.float()[:20])
    means.add(x.float()[20:], y.float()[20:])
    torch.testing.assert_close(means.ridge(1e-9)(x.float()).double(), a @ exact, atol=1e-4, rtol=1e-3)
    partner = scoring.other_clip(test)
    assert all(test.clips[i] != test.clips[j] and test.rows[i]["question"] == test.rows[j]["question"] for i, j in enumerate(partner))


def test_positions_later_than_any_in_training_get_the_mean_of_the_last_one():
    """A text of 11 positions against training texts of four: position 3 speaks for all that follow."""
    train, test = random_states(1), random_states(3)
    cut = HiddenStates(
        *(x[:, :4] for x in (train.draft, train.target, train.token_ids, train.mask)), train.lengths.clamp(max=4), train.rows, {}
    )
    means = scoring.null_predictors(cut, random_states(2), test, 3, torch.randn(V, D))["position_mean"]
    some = next(closed_form.positions(test, number=10_000))
    told = means.predict(some)
    assert (some.at > 3).any()
    last = train.target[train.lengths > 3, 3].mean(0)
    torch.testing.assert_close(told[some.at >= 3], last.expand(int((some.at >= 3).sum()), -1))
    torch.testing.assert_close(told[some.at == 2][0], train.target[train.lengths > 2, 2].mean(0))


def clips_of_rows(clips, questions):
    rows = [{"id": str(i), "sequence": c, "question": q} for i, (c, q) in enumerate(zip(clips, questions, strict=True))]
    states, n = random_states(1), len(rows)
    return HiddenStates(*(x[:1].expand(n, *x.shape[1:]) for x in (states.draft, states.target)), None, None, None, rows, {})


def test_another_clip_is_found_however_many_rows_a_clip_has():
    """300 rows of one clip, then one of another: the control never shows a clip itself, whatever the order."""
    clips = ["a"] * 300 + ["b"]
    for order in (clips, clips[::-1], ["a"] * 150 + ["b"] + ["a"] * 150):
        partner = scoring.other_clip(clips_of_rows(order, ["q"] * 301))
        assert all(order[i] != order[j] for i, j in enumerate(partner))
    questions = [f"q{i % 7}" for i in range(300)] + ["q3"]
    partner = scoring.other_clip(clips_of_rows(clips, questions))
    assert partner[:300] == [300] * 300 and clips[partner[300]] == "a" and questions[partner[300]] == "q3"


def test_with_one_clip_the_shuffled_control_is_absent():
    """There is no other clip to show: no control, rather than one whose cosine is 1."""
    train, test = random_states(1), random_states(3)
    alone = HiddenStates(test.draft, test.target, test.token_ids, test.mask, test.lengths, [r | {"sequence": "one"} for r in test.rows], {})
    assert scoring.other_clip(alone) is None
    head = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
    fitted = scoring.null_predictors(train, random_states(2), alone, 3, head)
    assert "shuffled" not in fitted and "shuffled" in scoring.null_predictors(train, random_states(2), test, 3, head)
    report = acceptance_report(
        scoring.score({"adapter": fitted["ridge"].predict} | {k: f.predict for k, f in fitted.items()}, alone, head),
        {"adapter": fitted["ridge"], **fitted},
        alone,
        G,
    )
    assert "shuffled" not in report.nulls and "shuffled" in report.absent_controls


def test_a_cosine_exactly_at_the_threshold_is_not_accepted():
    """> and not >=, in the rates, in calibration, in the decoder's rules and in what a cosine keeps."""
    states = random_states(2)
    states.mask[:] = True
    states = HiddenStates(states.draft, states.target, states.token_ids, states.mask, torch.full((N,), S), states.rows, {})
    at = Scores(torch.full((N, S), 0.5), torch.full((N, S), 4), torch.ones(N, S, dtype=torch.bool))
    found = scoring.rates_above(0.5, at, states.mask, states, G)
    assert found.relaxed_accept.count == 0 and found.consecutive_accept.count == 0
    assert scoring.rates_above(0.49, at, states.mask, states, G).relaxed_accept.value == 1
    some = ScoredPositions(np.full(4, 0.5), np.ones(4, dtype=bool), ["a"] * 4, 4.0)
    assert math.isnan(some.risk(0.5)) and some.risk(0.49) == 1 and some.excess(0.5, 0.1) == pytest.approx([0.0])
    ids, cosine = torch.tensor([4, 4]), torch.tensor([0.5, 0.75])
    assert accepted_drafts("relaxed", ids, ids, cosine, 0.5).tolist() == [False, True]
    assert accepted_drafts("feature", ids, ids, cosine, 0.5).tolist() == [False, False]
    source = CosineDrafts(at.cosine, at.says, states.mask)
    lexicon, names = Lexicon.from_json(captions.lexicon()), [str(i) for i in range(N)]
    sweep = comparison.accepted_by_cosine({"x": source}, states.token_ids, str, names, lexicon)[0]["x"]
    assert sweep[0].threshold == 0.5 and sweep[0].kept == 0


def test_halves_are_those_of_the_sequences_not_of_the_rows():
    """Four rows of one sequence and one of each of three others: each half has two sequences, in the order they come."""
    rows = [{"sequence": s, "n": n} for n, s in enumerate("aaaabcd")]
    first, second = comparison.halves(rows)
    assert [r["n"] for r in first] == [0, 1, 2, 3, 4] and [r["n"] for r in second] == [5, 6]
    assert comparison.halves(rows[:1]) == ([], rows[:1])


def test_a_text_cut_off_gets_its_last_token_without_a_draft():
    """Of token pairs: a text that ends with EOS may have its last token drafted, one cut off at the limit may not."""
    whole, cut = ({"vl_tokens": [9, 9, 9, last], "sequence": "s"} for last in (2, 9))
    correct = torch.ones(1, 4, dtype=torch.bool)
    assert [comparison.verified(correct, [row], 5, [2]).acceptance_rate.total for row in (whole, cut)] == [3, 2]


def test_sums_hold_where_channels_are_far_from_zero():
    """Massive channels: a mean of 5,000 deviations must not drown what varies."""
    torch.manual_seed(0)
    x = torch.randn(5000, 8)
    y = x @ torch.randn(8, 4) + 3
    moved = x + torch.tensor([5000.0] + [0.0] * 7)
    stats = scoring.Moments(8, 4)
    for part in range(0, 5000, 500):
        stats.add(moved[part : part + 500], y[part : part + 500])
    assert float((stats.ridge(1e-9)(moved) - y).abs().max()) < 2e-2


def test_states_that_are_not_finite_are_named():
    states = random_states(4)
    states.target[3, 0, 2] = float("nan")
    with pytest.raises(UserError, match="sample 3: its states are not finite"):
        scoring.score(predictors(states), states, torch.randn(V, D))


# ------------------------------------------------------------------------------------------------------------------ calibration


def planted(rng, clips: int, positions: int, spread: float) -> ScoredPositions:
    """Texts whose error rates differ from clip to clip: wrong with probability (1 - score) * a clip's own factor of mean 1."""
    factor = rng.gamma(1 / spread, spread, clips)[:, None]
    score = rng.beta(6, 1, (clips, positions))
    wrong = rng.random((clips, positions)) < np.clip((1 - score) * factor * 0.5, 0, 1)
    return ScoredPositions(score.ravel(), wrong.ravel(), np.repeat([f"c{i:04d}" for i in range(clips)], positions).tolist(), positions)


def test_the_guarantee_holds_on_planted_clusters():
    """200 data sets: certified thresholds break the promise in at most δ of them (within noise); the smallest threshold that merely
    looks safe on the same clips breaks it far more often, so this test can fail."""
    epsilon, delta = 0.05, 0.1
    truth = planted(np.random.default_rng(12345), 40_000, 10, 1.0)
    order = np.argsort(-truth.score)
    risk_from = np.cumsum(truth.wrong[order]) / np.arange(1, len(order) + 1)
    true_risk = lambda t: float(np.interp(-t, -truth.score[order], risk_from))  # noqa: E731
    broken, naive_broken, found = 0, 0, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        tune, calibration = planted(rng, 60, 10, 1.0), planted(rng, 400, 10, 1.0)
        threshold = certify(tune, calibration, epsilon, delta).threshold
        if threshold is not None:
            found += 1
            broken += true_risk(threshold) > epsilon
        grid = np.quantile(tune.score, np.linspace(0, 1, 50, endpoint=False))
        naive = [t for t in grid if calibration.risk(t) <= epsilon]
        naive_broken += bool(naive) and true_risk(min(naive)) > epsilon
    assert found > 150, "a promise that is never made proves nothing"
    assert broken <= 200 * delta + 1.645 * math.sqrt(200 * delta * (1 - delta))
    assert naive_broken > 2 * 200 * delta


def test_bets_are_fair():
    """Under E z = 0 a p-value below δ is as rare as promised; under a clear deficit it is found; an excess is never certified."""
    rng = np.random.default_rng(0)
    epsilon, most = 0.1, 10.0

    def draw(rate):
        return rng.binomial(10, rate, 200) - epsilon * 10

    assert np.mean([p_value(draw(0.1), epsilon, most) <= 0.1 for _ in range(400)]) <= 0.1 + 1.645 * math.sqrt(0.1 * 0.9 / 400)
    assert np.mean([p_value(draw(0.02), epsilon, most) <= 0.1 for _ in range(50)]) > 0.95
    assert all(p_value(draw(0.3), epsilon, most) > 0.5 for _ in range(50))
    assert p_value(np.full(50, 9.0), epsilon, most, known=np.full(50, -1.0)) == 1.0  # sure bets that are lost leave no evidence


def test_nothing_is_certified_where_every_token_is_wrong():
    rng = np.random.default_rng(1)
    bad = planted(rng, 50, 10, 0.5)
    bad = ScoredPositions(bad.score, np.ones_like(bad.wrong), bad.clip, bad.max_weight)
    report = certify(bad, bad, 0.05, 0.1)
    assert report.threshold is None and report.kept is None and report.clips == 50


def test_steps_of_a_chain_count_once_in_all():
    states = random_states(5)
    valid = torch.ones(N, S, G, dtype=torch.bool) & states.mask[..., None]
    scores = Scores(torch.ones(N, S, G), torch.zeros(N, S, G, dtype=torch.int64), torch.zeros(N, S, G, dtype=torch.bool))
    found = scoring.judged(scores, valid, states)
    excess = found.excess(0.5, 0.1)
    assert excess == pytest.approx([0.9 * int(states.lengths[i : i + 2].sum()) for i in range(0, N, 2)])
    assert found.max_weight == 2 * S and excess.max() <= found.max_weight


def test_cosine_is_what_torch_says():
    a, b = torch.randn(5, D), torch.randn(5, D)
    torch.testing.assert_close(scoring.cosine_per_position(a, b), F.normalize(a, dim=-1).mul(F.normalize(b, dim=-1)).sum(-1))


def test_bins_of_reliability_hold_equal_counts_and_say_their_means():
    cosine = torch.linspace(-0.9, 0.99, 100)[torch.randperm(100, generator=torch.Generator().manual_seed(0))].view(4, 25)
    match = cosine > 0.3
    valid = torch.ones(4, 25, dtype=torch.bool)
    clips = ["a", "a", "b", "c"]
    bins = scoring.reliability(Scores(cosine, cosine.long(), match), valid, clips)
    assert [b.n for b in bins] == [5] * 20
    ordered = cosine.flatten().sort().values
    for i, b in enumerate(bins):
        own, up = ordered[5 * i : 5 * i + 5], ordered[5 * i :]
        assert b.cosine == pytest.approx(float(own.mean())) and b.token_match == pytest.approx(float((own > 0.3).float().mean()))
        assert b.token_match_above == pytest.approx(float((up > 0.3).float().mean()))
        here = valid & (cosine >= own[0]) & (cosine <= own[-1])
        assert b.ci95 == pytest.approx(metrics.counts(match, here).rate(clips).ci95, nan_ok=True)  # over clips, not over tokens
    few = scoring.reliability(Scores(cosine, cosine.long(), match), valid & (cosine > 0.9), clips)
    assert [b.n for b in few] == [1] * int((cosine > 0.9).sum())


@pytest.mark.parametrize(("number", "rows"), [(1, 1), (S, 1), (2 * S, 2), (3 * S - 1, 2), (10**6, N)])
def test_positions_come_in_order_and_a_few_rows_at_a_time(number, rows):
    states = random_states()
    parts = list(closed_form.positions(states, number=number))
    assert [len(p.rows.unique()) for p in parts[:-1]] == [rows] * (len(parts) - 1) and len(parts) == math.ceil(N / rows)
    assert list(zip(torch.cat([p.rows for p in parts]).tolist(), torch.cat([p.at for p in parts]).tolist(), strict=True)) == [
        (i, t) for i in range(N) for t in range(int(states.lengths[i]))
    ]
    assert torch.equal(torch.cat([p.draft for p in parts]), states.draft[states.mask])
    assert torch.equal(torch.cat([p.target for p in parts]), states.target[states.mask])


def test_every_position_of_a_clip_has_weight_one_by_default():
    """excess: Σ weight · kept · (wrong - ε) of each clip. A score at the threshold is not kept."""
    score, wrong = np.array([0.9, 0.5, 0.7, 0.8, 0.5]), np.array([True, True, False, False, False])
    some = ScoredPositions(score, wrong, ["b", "a", "b", "a", "c"], 3)
    assert some.excess(0.5, 0.1) == pytest.approx([-0.1, 0.9 - 0.1, 0.0])  # clips in the order of their names
    assert ScoredPositions(score, wrong, some.clip, 3, 0.25).excess(0.5, 0.1) == pytest.approx([-0.025, 0.2, 0.0])
    assert some.risk(0.5) == pytest.approx(1 / 3) and some.risk(0.85) == 1.0 and math.isnan(some.risk(0.9))


def p_by_hand(z, epsilon, most, known=()):
    seen, wealth, best = list(known), 0.0, 0.0
    for value in z:
        squares = sum(x * x for x in seen)
        stake = min(max(-sum(seen) / squares, 0.0), 0.9 / ((1 - epsilon) * most)) if squares else 0.0
        wealth += math.log(1 - stake * value)
        best = max(best, wealth)
        seen.append(value)
    return math.exp(-best)


@pytest.mark.parametrize("seed", range(4))
def test_bets_and_the_walk_over_thresholds_by_plain_loops(seed):
    rng = np.random.default_rng(seed)
    tune, calibration = planted(rng, 30, 10, 1.0), planted(rng, 400 if seed else 5, 10, 1.0)  # five clips certify nothing
    epsilon, delta = 0.08, 0.1
    z, known = rng.normal(-0.2, 1, 40), rng.normal(-0.2, 1, 9)
    assert p_value(z, epsilon, 10.0) == pytest.approx(p_by_hand(z, epsilon, 10.0))
    assert p_value(z, epsilon, 10.0, known) == pytest.approx(p_by_hand(z, epsilon, 10.0, known))
    grid = sorted({np.quantile(tune.score, i / 50) for i in range(50)}, reverse=True)
    evidence = [p_by_hand(tune.excess(t, epsilon), epsilon, tune.max_weight) for t in grid]
    threshold, p = None, None
    for t in grid[evidence.index(min(evidence)) :]:
        now = p_by_hand(calibration.excess(t, epsilon), epsilon, calibration.max_weight, tune.excess(t, epsilon))
        if now > delta:
            p = now if threshold is None else p
            break
        threshold, p = t, now
    report = certify(tune, calibration, epsilon, delta)
    assert (threshold is None) == (seed == 0) and report.p_value == pytest.approx(p)
    assert report.threshold == (None if threshold is None else pytest.approx(threshold))
    if threshold is not None:
        kept = calibration.score > threshold
        assert report.kept == pytest.approx(kept.mean()) and report.risk_on_calibration == pytest.approx(calibration.wrong[kept].mean())
    assert (report.epsilon, report.delta, report.clips) == (epsilon, delta, len(set(calibration.clip)))


def test_the_token_adapter_is_timed_on_the_device_that_is_asked_for(tmp_path, monkeypatch):
    """Its weights and its input lie on --device, and the clock waits for that device."""
    model = token_adapter.TokenAdapter(12, 4)
    save_pt(
        tmp_path / "token_baseline" / "token_adapter.pt",
        {"meta": {"schema": SCHEMA, "geometry": model.geometry, "seconds": 1.0}, "state_dict": model.state_dict()},
    )
    asked = []
    monkeypatch.setattr(hidden, "call_ms", lambda call, repeats, device="cpu": asked.append((call().device.type, device)) or 3.0)
    monkeypatch.setattr(token_adapter, "token_matches", lambda model, rows, eos_id: torch.ones(1, 4, dtype=torch.bool))
    cfg = ComparisonConfig(target_id="t", draft_id="d", output_dir=tmp_path, device="meta")
    report = token_adapter_report(cfg, [{"vl_tokens": [4, 5, 6, 2], "egpt_tokens": [4], "sequence": "s"}], [2])
    assert asked == [("meta", "meta")] and report.overhead_ms == 3.0


def test_scores_of_positions_weigh_one_each_and_bets_raise_no_warning():
    """A predictor that is no chain has one score a position; clips without a kept wrong token are no reason to divide by zero."""
    states = random_states(5)
    scores = Scores(torch.ones(N, S), torch.zeros(N, S, dtype=torch.int64), torch.zeros(N, S, dtype=torch.bool))
    found = scoring.judged(scores, states.mask, states)
    assert found.weight == 1.0 and found.max_weight == 2 * S and list(found.clip) == [states.clips[i] for i in states.mask.nonzero()[:, 0]]
    with np.errstate(divide="raise", invalid="raise"):
        assert p_value(np.zeros(5), 0.1, 3.0) == 1.0 and p_value(np.array([0.0, -0.5, 0.0]), 0.1, 3.0) == pytest.approx(1.0)


def test_what_controls_cost_and_when_there_is_no_identity(monkeypatch):
    """Parameters counted by hand; seconds until the means, and until the ridge map, were ready; the last layer as it is, where it fits."""
    ticks = iter([10.0, 13.0, 18.0] * 2)
    monkeypatch.setattr(scoring.time, "perf_counter", lambda: next(ticks))
    train, validation, test = random_states(1), random_states(2), random_states(3)
    head = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
    found = scoring.null_predictors(train, validation, test, 2, head)
    wanted = {"identity": (0, 0.0), "target_mean": (D, 3.0), "position_mean": (S * D, 3.0), "shuffled": (0, 0.0)}
    wanted |= {"ridge": (D * D + D, 8.0), "ridge_rank_r": (2 * D + 2 * D + D, 8.0)}
    assert {name: (f.parameters, f.seconds) for name, f in found.items()} == wanted and next(iter(found)) == "identity"
    some = next(closed_form.positions(test, number=10_000))
    shown = scoring.shuffled_pairs(test, "cpu")["shuffled"].predict(some)
    partner = scoring.other_clip(test)
    at = [(partner[i], min(t, int(test.lengths[partner[i]]) - 1)) for i, t in zip(some.rows.tolist(), some.at.tolist(), strict=True)]
    assert any(t < here for (_, t), here in zip(at, some.at.tolist(), strict=True))  # no padding of a shorter text
    assert torch.equal(shown, torch.stack([test.target[i, t] for i, t in at]))
    ticks = iter([0.0, 1.0, 2.0] * 3)
    wide = [
        HiddenStates(torch.cat([x.draft, -x.draft], 2), x.target, x.token_ids, x.mask, x.lengths, x.rows, {})
        for x in (train, validation, test)
    ]
    double = scoring.null_predictors(*wide, 99, head)
    some = next(closed_form.positions(wide[2], number=10_000))
    assert torch.equal(double["identity"].predict(some), some.draft[:, D:]) and double["ridge_rank_r"].parameters == 2 * D * D + D * D + D
    odd = [HiddenStates(x.draft[..., :-1], x.target, x.token_ids, x.mask, x.lengths, x.rows, {}) for x in (train, validation, test)]
    assert "identity" not in scoring.null_predictors(*odd, 3, head)


def test_the_ridge_strength_is_the_one_that_is_best_on_validation():
    """Hardly any training text, many channels: the least regularized map is the worst, and the best of all six is taken."""
    rng = torch.Generator().manual_seed(0)
    turn, parts = torch.randn(D, D, generator=rng), []
    for rows in (2, N, N):
        some = random_states(rows)
        target = some.draft @ turn + 3 * torch.randn(N, S, D, generator=rng)
        keep = slice(0, rows)
        parts.append(
            HiddenStates(some.draft[keep], target[keep], some.token_ids[keep], some.mask[keep], some.lengths[keep], some.rows[keep], {})
        )
    train, validation, test = parts
    stats = closed_form.moments([(train.draft[train.mask], train.target[train.mask])], D, D)
    x, y = validation.draft[validation.mask], validation.target[validation.mask]
    cosine = {s: float(F.cosine_similarity(stats.ridge(s)(x), y, dim=-1).sum()) for s in closed_form.RIDGE_STRENGTHS}
    best = max(cosine, key=cosine.__getitem__)
    assert best != closed_form.RIDGE_STRENGTHS[0] and len({round(c, 4) for c in cosine.values()}) > 1
    found = scoring.null_predictors(train, validation, test, 2, torch.randn(V, D, generator=rng))
    some = next(closed_form.positions(test, number=10_000))
    torch.testing.assert_close(found["ridge"].predict(some), stats.ridge(best)(some.draft), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["ridge_rank_r"].predict(some), stats.ridge(best, 2)(some.draft), atol=1e-4, rtol=1e-4)


def a_lexicon():
    """Ids 3 to 8 are two words each of three facts (the last slot is hidden from events); the other ids state nothing."""
    facts = {"a": {"x": ["wd", "we"], "y": ["wf"]}, "b": {"z": ["wg", "wh"], "w": ["wi"]}}
    return Lexicon.from_json({"facts": facts, "hidden_from_events": ["b"]}), lambda token: "w" + chr(ord("a") + token)


@pytest.mark.parametrize("steps", [None, 3])
def test_draft_tokens_accepted_by_cosine_by_plain_loops(steps):
    """Counts at every threshold, and the ten kept words of highest cosine that are not the target's, each place of a text once."""
    lexicon, word = a_lexicon()
    rng, width = torch.Generator().manual_seed(10 + (steps or 0)), (N, S) if steps is None else (N, S, steps)
    ids = torch.randint(3, 10, (N, S), generator=rng)
    says, cosine = torch.randint(3, 9, width, generator=rng), torch.rand(width, generator=rng) * 0.6 + 0.4
    valid = torch.rand(width, generator=rng) < 0.7
    for k in range(steps or 0):
        valid[:, S - k :, k] = False  # no draft beyond the text
    names = [f"s{i}" for i in range(N)]
    sweeps, examples = comparison.accepted_by_cosine({"one": CosineDrafts(cosine, says, valid)}, ids, word, names, lexicon)
    drafts = []
    for place in valid.nonzero().tolist():
        row, at = place[0], place[1] + (place[2] if steps else 0)
        drafts.append((float(cosine[tuple(place)].double()), row, at, word(int(says[tuple(place)])), word(int(ids[row, at]))))
    kind = {(d, t): lexicon.compare(d, t) for *_, d, t in drafts}
    assert len(sweeps["one"]) == 25
    for i, found in enumerate(sweeps["one"]):
        assert found.threshold == pytest.approx(0.5 + 0.02 * i)
        kept = [kind[d, t] for c, _, _, d, t in drafts if c > found.threshold]
        counts = {k: sum(name == k for name, _ in kept) for k in ("same", "synonym", "other_fact", "other_word")}
        hidden_ones = sum(k == ("other_fact", "b") for k in kept)
        assert found.to_json() == {
            "threshold": found.threshold,
            "drafted": len(drafts),
            "kept": len(kept),
            **counts,
            "other_fact_hidden": hidden_ones,
        }
    wanted, shown = [], set()
    for c, row, at, drafted, said in sorted(drafts, key=lambda d: -d[0]):
        if drafted != said and (row, at) not in shown and len(shown) < 10:
            shown.add((row, at))
            before = " ".join(word(int(t)) for t in ids[row, max(0, at - 6) : at])
            about = {"source": "one", "sample": names[row], "before": before, "drafted": drafted, "said": said}
            wanted.append({**about, "verdict": kind[drafted, said][0], "cosine": pytest.approx(c)})
    assert [e.to_json() for e in examples] == wanted and len(wanted) == 10 and {e.verdict for e in examples} > {"other_word"}


def test_a_chain_may_be_shown_the_events_of_another_row():
    """Scores with other rows' events are those of states that have them; beyond a text there is no draft."""
    torch.manual_seed(0)
    states, adapter = random_states(3), ChainedAdapter(D, 4, 2, 8).eval()
    events = torch.randn(N, 2, 4)
    head, embeddings = torch.randn(V, D), torch.randn(V, D)
    own = dataclasses.replace(states, events=events)
    turned = [*range(1, N), 0]
    shown, there = scoring.chain_scores(adapter, own, head, embeddings, G, turned)
    wanted, _ = scoring.chain_scores(adapter, dataclasses.replace(states, events=events[turned]), head, embeddings, G)
    usual, _ = scoring.chain_scores(adapter, own, head, embeddings, G)
    assert torch.equal(shown.cosine, wanted.cosine) and torch.equal(shown.says, wanted.says) and not torch.equal(shown.cosine, usual.cosine)
    by_hand = torch.tensor([[[t >= 1 and t + k < int(n) for k in range(G)] for t in range(S)] for n in states.lengths])
    assert torch.equal(there, by_hand) and not shown.cosine[~there].any() and not shown.says[~there].any()


def test_a_chain_scores_every_row_of_several_batches():
    torch.manual_seed(0)
    states, adapter = dataclasses.replace(random_states(3), events=torch.randn(N, 2, 4)), ChainedAdapter(D, 4, 2, 8).eval()
    rows, given = [i % N for i in range(70)], (torch.randn(V, D), torch.randn(V, D), G)
    tensors = {name: value[rows] for name, value in vars(states).items() if isinstance(value, torch.Tensor)}
    many = dataclasses.replace(states, **tensors, rows=[states.rows[i] for i in rows])
    (one, there), (found, valid) = (scoring.chain_scores(adapter, some, *given) for some in (states, many))
    torch.testing.assert_close(found.cosine, one.cosine[rows], atol=1e-3, rtol=0)
    assert torch.equal(found.says, one.says[rows]) and torch.equal(found.match, one.match[rows]) and torch.equal(valid, there[rows])
