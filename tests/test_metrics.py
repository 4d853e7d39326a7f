"""Numbers recomputed with plain loops."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from feature_alignment import metrics
from feature_alignment.closed_form import moments


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


def test_positions_behind_the_end_never_count():
    bits, mask = random_bits(1)
    assert metrics.counts(torch.ones_like(bits), mask).value == 1.0
    assert metrics.counts(bits | ~mask, mask).value == metrics.counts(bits, mask).value


def test_runs():
    bits, mask = torch.tensor([[1, 1, 0, 1, 1, 1]]).bool(), torch.tensor([[1, 1, 1, 1, 1, 0]]).bool()
    assert metrics.run_from(bits, mask).tolist() == [[2, 1, 0, 2, 1, 0]]
    assert metrics.leading_run(bits, mask).tolist() == [2]


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_ordered_pairs(seed):
    rng = random.Random(seed)
    scores, positive = [rng.randrange(6) for _ in range(40)], [rng.random() < 0.4 for _ in range(40)]
    pairs = [
        (a > b) + 0.5 * (a == b) for a, p in zip(scores, positive, strict=True) if p for b, q in zip(scores, positive, strict=True) if not q
    ]
    assert metrics.auc(np.array(scores, float), np.array(positive)) == pytest.approx(sum(pairs) / len(pairs))
    assert np.isnan(metrics.auc(np.array([1.0, 2.0]), np.array([True, True])))


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
