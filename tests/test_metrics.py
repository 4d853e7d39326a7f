"""Numbers recomputed with plain loops."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from feature_alignment.adapters.closed_form import PositionMeans, moments
from feature_alignment.adapters.rounds import run_from
from feature_alignment.measurement import metrics


def random_bits(seed, n=7, s=15):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, s + 1, n)
    mask = torch.tensor([[t < length for t in range(s)] for length in lengths])
    return torch.tensor(rng.random((n, s)) < 0.7) & mask, mask


def walk(bits, gamma):
    """One text decoded by hand: (offered, accepted) per round."""
    t, rounds = 1, []
    while t < len(bits):
        offered = bits[t : t + gamma]
        kept = 0
        while kept < len(offered) and offered[kept]:
            kept += 1
        rounds.append((len(offered), kept))
        t += kept + 1
    return rounds


@pytest.mark.parametrize("gamma", [1, 2, 5, 20])
@pytest.mark.parametrize("seed", range(5))
def test_blocks_are_the_rounds_of_decoding(gamma, seed):
    bits, mask = random_bits(seed)
    blocks = metrics.decoding_blocks(bits, mask, gamma)
    by_hand = [(row, *r) for row in range(len(bits)) for r in walk(bits[row][mask[row]].tolist(), gamma)]
    assert list(zip(blocks.rows, blocks.offered, blocks.accepted, strict=True)) == by_hand
    kept, offered = sum(r[2] for r in by_hand), sum(r[1] for r in by_hand)
    reached = sum(min(r[2] + 1, r[1]) for r in by_hand)
    n = len(bits)
    if by_hand:
        assert blocks.acceptance_rate(n).value == pytest.approx(kept / reached)
        assert blocks.consecutive_accept(n).value == pytest.approx(kept / offered)
        assert blocks.consecutive_length(n).value == pytest.approx(kept / len(by_hand))
        assert blocks.tokens_per_pass(mask.sum(1)) == pytest.approx((int(mask.sum()) - n) / len(by_hand))


def test_all_accepted_and_none_accepted():
    mask = torch.ones(3, 13, dtype=torch.bool)
    assert metrics.decoding_blocks(mask, mask, 5).tokens_per_pass(mask.sum(1)) == 6.0
    none = metrics.decoding_blocks(~mask, mask, 5)
    assert none.tokens_per_pass(mask.sum(1)) == 1.0 and none.acceptance_rate(3).value == 0.0


def test_positions_after_the_end_never_count():
    bits, mask = random_bits(1)
    assert metrics.counts(torch.ones_like(bits), mask).value == 1.0
    assert metrics.counts(bits | ~mask, mask).value == metrics.counts(bits, mask).value


def test_runs():
    bits, mask = torch.tensor([[1, 1, 0, 1, 1, 1]]).bool(), torch.tensor([[1, 1, 1, 1, 1, 0]]).bool()
    assert run_from(bits, mask).tolist() == [[2, 1, 0, 2, 1, 0]]
    assert metrics.leading_run(bits, mask).tolist() == [2]


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_ordered_pairs(seed):
    rng = random.Random(seed)
    scores, positive = [rng.randrange(6) for _ in range(40)], [rng.random() < 0.4 for _ in range(40)]
    pairs = [
        (a > b) + 0.5 * (a == b) for a, p in zip(scores, positive, strict=True) if p for b, q in zip(scores, positive, strict=True) if not q
    ]
    assert metrics.auc(np.array(scores, float), np.array(positive)) == pytest.approx(sum(pairs) / len(pairs))
    with np.errstate(all="raise"):
        for one_class in ([True, True], [False, False]):
            assert np.isnan(metrics.auc(np.array([1.0, 2.0]), np.array(one_class)))


def test_intervals_resample_clips_not_tokens():
    rng = np.random.default_rng(0)
    clips = [f"c{i // 50}" for i in range(1000)]  # 20 clips of 50 equal rows each: 20 observations, not 1,000
    count = np.repeat(rng.integers(0, 2, 20), 50).astype(float)
    lo, hi = metrics.bootstrap_ratio(count, np.ones(1000), clips)
    assert hi - lo > 0.3
    lo, hi = metrics.bootstrap_ratio(count, np.ones(1000), [f"r{i}" for i in range(1000)])
    assert hi - lo < 0.08
    assert all(np.isnan(metrics.bootstrap_ratio(count, np.ones(1000), ["one"] * 1000)))


def test_formulas_of_the_task():
    assert metrics.tokens_per_pass_iid(0.5, 1) == 1.5 and metrics.tokens_per_pass_iid(1.0, 5) == 6.0
    assert metrics.tokens_per_pass_iid(0.8, 5) == pytest.approx(sum(0.8**k for k in range(6)))
    assert metrics.break_even(0.2, 5) == pytest.approx(0.24)  # the worked example of TASKS.md
    assert metrics.break_even(0.2, 5, goal=1.5) == pytest.approx(0.36)
    assert metrics.corrected_speedup(4.0, 5, c=0.2, v=1.0) == pytest.approx(metrics.modelled_speedup(4.0, overhead=1.0))


def test_ridge_recovers_a_linear_map_and_rank_limits_it():
    torch.manual_seed(0)
    x = torch.randn(800, 12)
    low = torch.randn(12, 3) @ torch.randn(3, 9)
    y = x @ low + 2.0
    stats = moments(((x[i : i + 100], y[i : i + 100]) for i in range(0, 800, 100)), 12, 9)
    torch.testing.assert_close(stats.ridge(1e-9)(x), y, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(stats.ridge(1e-9, rank=3)(x), y, atol=1e-3, rtol=1e-3)
    error = [float((stats.ridge(1e-9, rank=r)(x) - y).pow(2).mean()) for r in (1, 2, 3)]
    assert error[0] > error[1] > error[2]
    whole = moments([(x, y)], 12, 9)
    torch.testing.assert_close(whole.ridge(0.1).factors, stats.ridge(0.1).factors)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sums_are_on_the_requested_device(device):
    x, y, at = torch.zeros(5, 4, device=device), torch.zeros(5, 3, device=device), torch.zeros(5, dtype=torch.long, device=device)
    means = PositionMeans(2, 3, device)
    means.add(y, at)
    assert means.by_position().device.type == device
    total = moments([(x, y)], 4, 3, device)
    assert {t.device.type for t in (total.x, total.y, total.xx, total.xy)} == {device}


def test_sums_of_many_small_batches_do_not_drift():
    """Products are float32, sums are not: a hundred thousand positions far from zero, a few at a time, give the moments of all at once."""
    torch.manual_seed(0)
    x = torch.randn(100_000, 3) * torch.tensor([1e-2, 1.0, 30.0]) + 5
    total = moments(zip(x.split(20), x.split(20), strict=True), 3, 3)
    exact = x.double()
    assert torch.allclose(total.covariance(), exact.T.cov(correction=0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(total.mean_y.double(), exact.mean(0), rtol=1e-6, atol=1e-6)


def test_ridge_solves_its_equations():
    """(C_xx + λ mean variance I) B = C_xy, with covariances by hand; both means map onto each other."""
    torch.manual_seed(0)
    x, y = torch.randn(500, 6).double() @ torch.randn(6, 6).double() + 3, torch.randn(500, 4).double() - 1
    fit = moments([(x.float(), y.float())], 6, 4).ridge(0.3)
    about = x - x.mean(0)
    c_xx, c_xy = about.T @ about / 500, about.T @ (y - y.mean(0)) / 500
    by_hand = torch.linalg.inv(c_xx + 0.3 * c_xx.diagonal().mean() * torch.eye(6)) @ c_xy
    torch.testing.assert_close(fit.factors[0].double(), by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fit(x.float().mean(0)).double(), y.mean(0), rtol=1e-4, atol=1e-5)
    low = moments([(x.float(), y.float())], 6, 4).ridge(0.3, 2)
    assert [f.shape for f in low.factors] == [(6, 2), (2, 4)] and low.num_parameters == 6 * 2 + 2 * 4 + 4 and fit.num_parameters == 28
    torch.testing.assert_close(low.factors[1] @ low.factors[1].T, torch.eye(2), rtol=1e-4, atol=1e-5)


def test_position_means_are_means():
    means = PositionMeans(4, 2)
    means.add(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 0]))
    means.add(torch.tensor([[8.0, 0.0]]), torch.tensor([2]))
    assert means.by_position().tolist() == [[2.0, 3.0], [4.0, 2.0], [8.0, 0.0], [4.0, 2.0]]


def test_a_rate_without_a_total_is_nan():
    nothing = metrics.Counts(np.zeros(2), np.zeros(2))
    assert np.isnan(nothing.value) and np.isnan(nothing.rate(["a", "b"]).ci95).all()
    some = metrics.Counts(np.array([1.0, 0.0]), np.array([2.0, 0.0])).rate(["a", "b"])  # a draw of the empty clip alone is no ratio
    assert some.ci95 == (0.5, 0.5)


def test_intervals_are_the_same_every_time():
    count, total = np.arange(12.0), np.full(12, 11.0)
    clips = [f"c{i}" for i in range(12)]
    weights = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), size=2000)
    order = np.argsort(clips)
    by_hand = np.percentile((weights @ count[order]) / (weights @ total[order]), (2.5, 97.5))
    assert metrics.bootstrap_ratio(count, total, clips) == pytest.approx(by_hand)


def test_a_row_that_counts_nothing_costs_nothing():
    lengths = torch.tensor([0, 1, 4])
    blocks = metrics.decoding_blocks(torch.zeros(3, 4, dtype=torch.bool), torch.arange(4) < lengths[:, None], 2)
    assert blocks.tokens_per_pass(lengths) == 1.0 and blocks.rows.tolist() == [2, 2, 2]
    empty = metrics.decoding_blocks(torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.bool), 2)
    assert empty.tokens_per_pass(torch.tensor([0])) == 0.0
