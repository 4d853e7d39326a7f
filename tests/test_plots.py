"""The pictures of a run show the numbers they say they show: what is drawn is read back from the figures."""

from __future__ import annotations

import math
import runpy
from dataclasses import replace
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.image import imread

from feature_alignment.measurement import plots
from feature_alignment.measurement.metrics import Rate
from feature_alignment.measurement.reports import PositionRates, ReliabilityBin, ThresholdCounts
from feature_alignment.measurement.scoring import Scores


@pytest.fixture
def drawn(monkeypatch):
    """name of a picture -> its figure, instead of a file."""
    found = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: found.update({path.name: figure}))
    yield found
    plt.close("all")


def lines_of(axis) -> dict[str, tuple[list[float], list[float]]]:
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines if not line.get_label().startswith("_")
    }


def legend_of(axis) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def bars_of(container) -> list[tuple[float, float, float]]:
    """(left, bottom, height) of each bar."""
    return [(p.get_x(), p.get_y(), p.get_height()) for p in container.patches]


def test_pictures_are_drawn_without_a_screen(monkeypatch):
    asked = []
    monkeypatch.setattr(matplotlib, "use", asked.append)
    runpy.run_module("feature_alignment.measurement.plots")
    assert asked == ["Agg"]


def has_grid(axis) -> bool:
    return all(line.get_visible() for line in (*axis.get_xgridlines(), *axis.get_ygridlines()))


def test_a_picture_is_saved_whole_at_150_dots_an_inch_and_closed(tmp_path):
    before = plt.get_fignums()
    figure, axis = plt.subplots(figsize=(3, 2))
    axis.plot([0, 1])
    plots.save(figure, tmp_path / "a.png")
    assert imread(tmp_path / "a.png").shape[:2] == (300, 450) and plt.get_fignums() == before


@pytest.mark.parametrize("lowest", [-0.5, 0.3])
def test_histograms_of_cosines_are_split_by_whether_the_token_is_the_same(drawn, tmp_path, lowest):
    rng = np.random.default_rng(0)
    found = {
        "one": (np.array([lowest, *rng.uniform(0.3, 1, 60)]), np.array([True, *(rng.random(60) < 0.5)])),
        "other": (rng.uniform(0.4, 1, 40), rng.random(40) < 0.9),
    }
    plots.cosine_histograms(found, "test positions, same prefix", tmp_path)
    figure = drawn["cosine_histogram.png"]
    edges = np.linspace(min(-0.1, lowest), 1, 60)
    assert len(figure.axes) == 2 and figure.axes[0].get_position().x0 == pytest.approx(figure.axes[1].get_position().x0)
    for axis, (name, (cosine, match)) in zip(figure.axes, found.items(), strict=True):
        same, others = (bars_of(container) for container in axis.containers)
        assert [h for _, _, h in same] == np.histogram(cosine[match], edges)[0].tolist()
        assert [h for _, _, h in others] == np.histogram(cosine[~match], edges)[0].tolist()
        assert [b for _, b, _ in others] == [h for _, _, h in same] and [x for x, _, _ in same] == pytest.approx(edges[:-1])
        assert axis.get_title() == f"{name}: mean {cosine.mean():.3f}, same token at {match.mean():.1%}"
        assert axis.get_ylabel() == "positions" and lines_of(axis)["threshold 0.90"][0] == [0.9, 0.9]
    assert "61 test positions" in figure.get_suptitle() and legend_of(figure.axes[0]) == ["same token", "other token", "threshold 0.90"]
    assert figure.axes[1].get_legend() is None and "cosine" in figure.axes[1].get_xlabel() and not figure.axes[0].get_xlabel()
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    plots.cosine_histograms({"alone": found["one"]}, "positions", tmp_path)
    assert legend_of(drawn["cosine_histogram.png"].axes[0])[:2] == ["same token", "other token"]


def reliability_rows(shift: float):
    return [
        ReliabilityBin(cosine=0.5, n=10, token_match=0.2 + shift, token_match_above=0.4 + shift, ci95=(0.1, 0.35 + shift)),
        ReliabilityBin(cosine=0.8, n=40, token_match=0.7 + shift, token_match_above=0.8 + shift, ci95=(0.6, 0.75 + shift)),
    ]


def test_reliability_has_both_shares_and_the_interval_of_one(drawn, tmp_path):
    found = {"a": reliability_rows(0), "b": reliability_rows(0.1)}
    plots.reliability(found, "test positions, same prefix", tmp_path)
    (axis,) = drawn["reliability.png"].axes
    lines = lines_of(axis)
    for (name, rows), bars in zip(found.items(), axis.containers, strict=True):
        x, y = [r.cosine for r in rows], [r.token_match for r in rows]
        assert lines[f"{name}: at this cosine and above"] == (x, [r.token_match_above for r in rows])
        data, _, (ends,) = bars
        assert (list(data.get_xdata()), list(data.get_ydata())) == (x, y)
        for r, ((x0, low), (x1, high)) in zip(rows, ends.get_segments(), strict=True):
            assert x0 == x1 == r.cosine and (low, high) == pytest.approx(r.ci95)
    assert {f"{name}: at this cosine, n = 50" for name in found} <= set(legend_of(axis)) and len(legend_of(axis)) == 4
    assert axis.get_ylim() == (0, 1.02) and "cosine" in axis.get_xlabel() and axis.get_ylabel() and "test positions" in axis.get_title()
    assert has_grid(axis)


def test_accepted_lengths_are_shares_of_rounds_side_by_side(drawn, tmp_path):
    found = {"a": [2, 1, 1], "b": [0, 3, 7]}
    plots.accepted_lengths(found, tmp_path)
    (axis,) = drawn["accepted_lengths.png"].axes
    for i, (counts, bars) in enumerate(zip(found.values(), axis.containers, strict=True)):
        assert [p.get_height() for p in bars] == pytest.approx([c / sum(counts) for c in counts])
        middle = [p.get_x() + p.get_width() / 2 for p in bars]
        assert middle == pytest.approx([k + (-0.2, 0.2)[i] for k in range(3)]) and bars[0].get_width() == pytest.approx(0.38)
    assert legend_of(axis) == ["a: 4 rounds, 0.75 on average", "b: 10 rounds, 1.70 on average"]
    assert "of 2, test texts" in axis.get_title() and axis.get_xlabel() and axis.get_ylabel() == "share of rounds"


def test_positions_that_few_texts_reach_have_no_rate(drawn, tmp_path):
    keys = ("token_match", "token_match_given_earlier")
    rows = [
        {"position": t, "n": 30 - t, "cosine": 0.9 - t / 10}
        | {f"n_{k}": n for k, n in zip(keys, (n, n - 1), strict=True)}
        | {f"{k}{end}": 0.5 + t / 10 + by for k in keys for end, by in (("", 0.0), ("_lo", -0.1), ("_hi", 0.2))}
        for t, n in enumerate((30, 11, 10, 9))
    ]
    plots.acceptance_by_position([PositionRates(**r) for r in rows], tmp_path)
    (axis,) = drawn["acceptance_by_position.png"].axes
    lines = lines_of(axis)
    for label, shown in (("token match", 3), ("token match, all earlier ones matched", 2)):
        x, y = lines[label]
        assert x == [0, 1, 2, 3] and y[:shown] == pytest.approx([0.5, 0.6, 0.7][:shown]) and np.isnan(y[shown:]).all()
    assert lines["cosine"] == ([0, 1, 2, 3], pytest.approx([0.9, 0.8, 0.7, 0.6])) and legend_of(axis) == list(lines)
    for band, shown in zip(axis.collections, (3, 2), strict=True):
        corners = {(x, round(y, 6)) for path in band.get_paths() for x, y in path.vertices if not np.isnan(y)}
        assert corners >= {(t, round(0.5 + t / 10 + by, 6)) for t in range(shown) for by in (-0.1, 0.2)}
        assert max(x for x, _ in corners) == shown - 1 and band.get_linewidth() == [0]
    assert "n falls from 30 to 27" in axis.get_title() and axis.get_ylim() == (0, 1.02) and axis.get_xlabel()
    assert has_grid(axis)


def rate(value, low, high):
    return Rate(value, value * 1234, 1234.0, (low, high))


def rates_of(cosine, token_match, tokens_per_pass):
    return SimpleNamespace(cosine=cosine, token_match=token_match, tokens_per_pass=tokens_per_pass)


@pytest.mark.parametrize("lowest", [-0.3, 0.2])
def test_predictors_have_two_bars_with_intervals_and_their_tokens_per_pass(drawn, tmp_path, lowest):
    found = {
        "first": rates_of(rate(0.9, 0.8, 0.95), rate(0.5, 0.4, 0.7), 2.345),
        "second": rates_of(rate(lowest, lowest, lowest + 0.1), rate(0.3, math.nan, math.nan), 1.0),
    }
    plots.predictors_by_match(found, "test positions, same prefix", 5, tmp_path)
    (axis,) = drawn["predictors.png"].axes
    bars = [c for c in axis.containers if hasattr(c, "patches")]
    for container, key, shift in zip(bars, ("cosine", "token_match"), (0.2, -0.2), strict=True):
        assert [p.get_width() for p in container] == [getattr(r, key).value for r in found.values()]
        assert [p.get_y() + p.get_height() / 2 for p in container] == pytest.approx([shift, 1 + shift])
        assert container[0].get_height() == pytest.approx(0.38)
        ends = container.errorbar.lines[2][0].get_segments()
        for r, ((low, _), (high, _)) in zip(found.values(), ends, strict=True):
            value, (a, b) = getattr(r, key).value, getattr(r, key).ci95
            assert (low, high) == pytest.approx((value, value) if math.isnan(a) else (a, b))
    assert [t.get_text() for t in axis.get_yticklabels()] == list(found) and list(axis.get_yticks()) == [0, 1]
    assert [(t.get_text(), *t.get_position()) for t in axis.texts] == [("2.35", 1.03, 0.0), ("1.00", 1.03, 1.0)]
    assert axis.yaxis_inverted() and legend_of(axis) == ["cosine", "token match"]
    left, right = axis.get_xlim()
    assert right == 1.14 and (left == 0 if lowest > 0 else left < lowest)
    assert "1,234 test positions" in axis.get_xlabel() and "at draft length 5" in axis.get_xlabel()


def test_a_threshold_sweep_stacks_what_is_kept_of_what_was_drafted(drawn, tmp_path):
    kinds = ("same", "synonym", "other_fact", "other_word")
    rows = [
        ThresholdCounts(threshold=t, drafted=20, kept=sum(n), **dict(zip(kinds, n, strict=True)), other_fact_hidden=0)
        for t, n in ((0.5, (8, 4, 2, 6)), (0.7, (5, 3, 1, 1)), (0.9, (2, 1, 0, 0)))
    ]
    plots.threshold_sweep({"adapter": rows, "chained": [replace(r, drafted=40) for r in rows]}, tmp_path)
    figure = drawn["threshold_sweep.png"]
    assert len(figure.axes) == 2 and figure.axes[0].get_position().y0 == pytest.approx(figure.axes[1].get_position().y0)
    for axis, name, total in zip(figure.axes, ("adapter", "chained"), (20, 40), strict=True):
        below = np.zeros(3)
        for part, kind in zip(axis.collections, kinds, strict=True):
            above = below + [getattr(r, kind) / total for r in rows]
            corners = {(x, round(y, 6)) for x, y in part.get_paths()[0].vertices}
            assert corners == {(r.threshold, round(y, 6)) for edge in (below, above) for r, y in zip(rows, edge, strict=True)}
            below = above
        assert axis.get_title() == f"{name}, {total} draft tokens" and axis.get_xlabel() == "cosine above"
        assert axis.get_ylim() == (0, 1) and axis.get_xlim() == (0.5, 0.9)
    first, last = figure.axes
    assert first.get_ylabel() and not last.get_ylabel() and first.get_legend() is None and figure.get_suptitle()
    assert legend_of(last) == ["the target's token", "same fact, other word", "another fact", "another word"]
    plots.threshold_sweep({"alone": rows}, tmp_path)
    assert drawn["threshold_sweep.png"].axes[0].get_legend() is not None


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("plain", [None, {"name": "plain"}])
def test_every_picture_of_acceptance_gets_its_own_numbers(monkeypatch, tmp_path, chained, plain):
    """Only real positions are counted, controls that are absent are left out, and the chained adapter is shown where there is one."""
    asked = {}
    for name in ("cosine_histograms", "reliability", "accepted_lengths", "acceptance_by_position", "predictors_by_match"):
        monkeypatch.setattr(plots, name, lambda *given, name=name: asked.update({name: given}))
    mask = torch.tensor([[True, True], [True, False]])
    scores = {
        name: Scores(torch.tensor([[0.1, 0.2], [0.3, 0.4]]) + i, torch.zeros(2, 2), torch.tensor([[True, False], [True, True]]))
        for i, name in enumerate(("adapter", "shuffled", "ridge"))
    }
    chain = SimpleNamespace(reliability="r2", accepted_lengths="l2")
    chains = {"chained": chain, "chained, blind": {"b": 1}} if chained else {}
    report = SimpleNamespace(reliability="r", accepted_lengths="l", per_position="p", plain=plain, num_draft_tokens=5, positions="here")
    report.nulls, report.chains, report.chained = {"ridge": {"n": 1}}, chains, chains.get("chained")
    plots.acceptance(report, scores, SimpleNamespace(mask=mask), tmp_path)
    found, where, out = asked["cosine_histograms"]
    assert where == "here"
    assert list(found) == ["hidden adapter", "states of another clip (shuffled)"] and out == tmp_path
    for i, (cosine, match) in enumerate(found.values()):
        assert cosine == pytest.approx(np.array([0.1, 0.2, 0.3]) + i) and match.tolist() == [True, False, True]
    more = {"chained adapter": "2"} if chained else {}
    assert asked["reliability"] == ({"hidden adapter": "r"} | {k: f"r{v}" for k, v in more.items()}, "here", tmp_path)
    assert asked["accepted_lengths"] == ({"hidden adapter": "l"} | {k: f"l{v}" for k, v in more.items()}, tmp_path)
    assert asked["acceptance_by_position"] == ("p", tmp_path)
    predictors = {"hidden adapter": report} | ({"TASKS.md's recipe": plain} if plain else {}) | report.nulls | chains
    assert asked["predictors_by_match"] == (predictors, "here", 5, tmp_path) and list(asked["predictors_by_match"][0]) == list(predictors)
