"""Training: the scales fold away exactly, a known map is learnt, the best epoch is never worse than the start."""

from __future__ import annotations

import pytest
import torch

from feature_alignment.artifacts import HiddenStates
from feature_alignment.hidden_adapter import HiddenAdapter
from feature_alignment.train_hidden_adapter import TrainConfig
from feature_alignment.training import Scale, train_hidden


def states(n, seed, change, d=8, s=6):
    torch.manual_seed(seed)
    g = torch.randn(n, s, d) * torch.logspace(-2, 2, d) + 3.0
    mask = torch.arange(s)[None] < torch.randint(2, s + 1, (n, 1))
    rows = [{"sequence": f"{seed}-{i}"} for i in range(n)]
    return HiddenStates(g, change(g), torch.zeros(n, s, dtype=torch.long), mask, mask.sum(1), rows, {})


def test_scales_fold_into_the_plain_adapter():
    torch.manual_seed(0)
    adapter = HiddenAdapter(8, 8, 5)
    torch.nn.init.normal_(adapter.up.weight)
    scale = Scale(torch.randn(8), torch.rand(8) + 0.1, torch.rand(8) + 0.1)
    g = torch.randn(20, 8)
    torch.testing.assert_close(scale.folded(adapter)(g), scale.predict(adapter, g), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_a_known_map_is_learnt(kl):
    torch.manual_seed(1)
    turn = torch.randn(8, 2) @ torch.randn(2, 8)
    change = lambda g: g + torch.tanh((g - 3) / torch.logspace(-2, 2, 8)) @ turn  # noqa: E731
    adapter, history = train_hidden(
        states(300, 1, change),
        states(60, 2, change),
        torch.randn(12, 8) / 100,
        TrainConfig(bottleneck=16, num_epochs=12, lr=1e-2, kl_weight=kl),
    )
    first, best = history[0], min(history, key=lambda h: h["validation_loss"])
    assert best["validation_mse"] < 0.1 * first["validation_mse"]
    assert best["validation_loss"] <= first["validation_loss"]
    assert adapter.num_parameters == 8 * 16 + 16 + 16 * 8 + 8


def test_a_new_adapter_is_the_identity():
    g = torch.randn(3, 4, 24)
    assert torch.equal(HiddenAdapter(24, 24, 6)(g), g)
    assert torch.equal(HiddenAdapter(24, 8, 6)(g), g[..., -8:])  # of three layers side by side, the last
    assert not HiddenAdapter(24, 9, 6).residual
    assert HiddenAdapter(4096, 4096, 256).num_parameters == 2_101_504
