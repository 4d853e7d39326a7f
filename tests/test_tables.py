"""The printed tables of acceptance and comparison, cell by cell."""

from __future__ import annotations

import math

import pytest
import torch

from feature_alignment.measurement import acceptance, comparison_tables
from feature_alignment.measurement.acceptance import ChainScores, acceptance_report, chain_report
from feature_alignment.measurement.calibration import Certificate
from feature_alignment.measurement.metrics import Rate
from feature_alignment.measurement.reports import ComparisonReport, CosineRuleRates, DraftReport, TextAgreement, ThresholdCounts
from feature_alignment.measurement.scoring import Fitted, Scores
from feature_alignment.storage.hidden_states import HiddenStates

ROWS = [{"id": str(i), "sequence": s, "question": "q"} for i, s in enumerate("aab")]


def rate(value: float, total: float = 8.0) -> Rate:
    """With an interval of its own: 0.1 below to 0.2 above."""
    return Rate(value, value * total, total, (value - 0.1, value + 0.2))


def drafts(first: float, **more) -> DraftReport:
    rates = {name: rate(first + i / 100) for i, name in enumerate(("token_match", "acceptance_rate", "consecutive_accept"))}
    return DraftReport(**rates, **more)


def rules(first: float) -> CosineRuleRates:
    return CosineRuleRates(*(rate(first + i / 100) for i in range(4)))


def test_tables_of_a_comparison():
    assert Rate(0.5, 1.0, 2.0, (math.nan, math.nan)).text() == "0.5000"
    level = TextAgreement(rate(0.25), rate(2.5, 1234.0), rate(0.5), rate(0.75))
    counts = [ThresholdCounts(t / 100, 90, 80, 70, 60, 50, 40, 30) for t in range(50, 100, 2)]
    report = ComparisonReport({}, level)
    agreement = (
        "the two free-running texts, 1,234 pairs",
        ("what", "value [95 %]"),
        [
            ("same token at the same position", "25.000 % [15.000, 45.000]"),
            ("rows that differ at the first token", "75.000 % [65.000, 95.000]"),
            ("consecutive acceptance of 5", "50.000 % [40.000, 70.000]"),
            ("mean matching prefix, tokens", "2.50000 [2.40000, 2.70000]"),
        ],
    )
    assert comparison_tables.tables(report, 5) == [agreement], "a table without rows is left out"
    report = ComparisonReport(
        {},
        level,
        token_adapter=drafts(0.1, tokens_per_pass=1.0, params=1, overhead_ms=2.25),
        own_drafts=drafts(0.2, tokens_per_pass=2.0, params=0),
        aligned_token_level=drafts(0.3, tokens_per_pass=3.0, params=2000, leading_tokens=rate(1.5)),
        nulls={"ngram": drafts(0.5, tokens_per_pass=5.126, params=5)},
        feature_rules={"hidden": {"0.90": rules(0.1), "0.96": rules(0.5)}},
        kept_by_cosine={"hidden": counts},
    )
    first, drafted, by_cosine, said = comparison_tables.tables(report, 5)
    cells = lambda *values: tuple(f"{v:.3f} [{v - 0.1:.3f}, {v + 0.2:.3f}]" for v in values)  # noqa: E731
    assert first == agreement
    assert drafted[0] == "draft tokens under the token rule, draft length 5, given the target's text so far"
    assert drafted[1] == ("drafts", "token match", "acceptance rate", "consecutive", "leading tokens", "tokens per pass", "parameters")
    assert drafted[2] == [
        ("token-level adapter, 2.2 ms a text", *cells(0.1, 0.11, 0.12), "-", "1.00", "1"),
        ("EventGPT's own", *cells(0.2, 0.21, 0.22), "-", "2.00", "0"),
        ("aligned", *cells(0.3, 0.31, 0.32), "1.50 [1.40, 1.70]", "3.00", "2,000"),
        ("baseline drafter ngram", *cells(0.5, 0.51, 0.52), "-", "5.13", "5"),
    ]
    assert by_cosine[1:] == (
        ("drafts, rule", "consecutive", "relaxed", "same token among the kept"),
        [("hidden, cosine > 0.90", *cells(0.11, 0.1, 0.13)), ("hidden, cosine > 0.96", *cells(0.51, 0.5, 0.53))],
    )
    assert said[1][1:] == ("drafted", "kept", "same word", "synonym", "other fact", "of these hidden from events", "other word")
    assert said[2] == [(f"hidden, {t}", 90, 80, 70, 60, 50, 30, 40) for t in ("0.50", "0.80", "0.90", "0.96")]


@pytest.fixture
def states() -> HiddenStates:
    mask = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    zeros = torch.zeros(3, 3, 2)
    return HiddenStates(zeros, zeros, torch.full((3, 3), 5), mask, mask.sum(1), ROWS, {"draft_layers": [3, 7]})


def some_scores(seed: int, mask: torch.Tensor) -> Scores:
    rng = torch.Generator().manual_seed(seed)
    return Scores(torch.rand(mask.shape, generator=rng) * mask, torch.zeros_like(mask, dtype=torch.int64), mask)


def test_tables_of_acceptance(states):
    names = ("adapter", "plain", "identity")
    certificate, other = (Certificate(0.1, 0.05, t, 0.01, 12, 0.5, 0.02, 0.03) for t in (0.75, None))
    valid = states.mask[..., None].expand(3, 3, 2).clone()
    chains = {
        name: chain_report(ChainScores(some_scores(9, valid), valid, {"parameters": 1500, "seconds": 2.04}), states, calibration)
        for name, calibration in (("chained", other), ("chained, blind", None))
    }
    report = acceptance_report(
        {name: some_scores(i, states.mask) for i, name in enumerate(names)},
        {name: Fitted(lambda some: some.draft, 1000 + i, i + 0.25) for i, name in enumerate(names)},
        states,
        2,
        chains,
        {"adapter": certificate},
        {"split": "test", "prefix": "target"},
    )
    assert report.meta == {"split": "test", "prefix": "target"} and (report.adapter.params, report.adapter.layer) == (1000, [3, 7])
    assert report.plain.params == 1001 and list(report.nulls) == ["identity"] and report.calibration is certificate
    assert report.chains == chains and report.chained is chains["chained"] and report.chained.calibration is other
    predictors, chain, by_cosine, certified = acceptance.tables(report)
    assert predictors[0] == "test, prefix: target, 8 positions, draft length 2"
    assert predictors[1] == ("predictor", "cosine", "token match", "acceptance rate", "tokens per pass", "parameters", "seconds")
    found = {"adapter": report, "plain (TASKS.md)": report.plain, "identity": report.nulls["identity"]}
    assert predictors[2] == [
        (name, r.cosine.text(3), "1.000 [1.000, 1.000]", "1.000 [1.000, 1.000]", f"{r.tokens_per_pass:.2f}", f"1,00{i}", f"{i}.2")
        for i, (name, r) in enumerate(found.items())
    ]
    assert chain[0] == "chained adapter, from the target's last state: token match at each of 2 draft positions"
    assert chain[1] == ("adapter", "cosine", "1", "2", "acceptance rate", "tokens per pass", "parameters", "seconds")
    ones, per_pass = "1.000 [1.000, 1.000]", f"{report.chained.tokens_per_pass:.2f}"
    assert chain[2] == [(name, r.cosine.text(3), "1.000", "1.000", ones, per_pass, "1,500", "2.0") for name, r in chains.items()]
    assert by_cosine[:2] == (
        "acceptance by cosine",
        ("adapter, threshold", "relaxed_accept", "consecutive_accept", "token_match_given_accept"),
    )
    assert by_cosine[2] == [
        (f"{name}, {t}", v.relaxed_accept.text(3), v.consecutive_accept.text(3), v.token_match_given_accept.text(3))
        for name, r in (("adapter", report), ("chained", report.chained))
        for t, v in r.thresholds.items()
    ]
    assert certified == (
        "certified: at most 10% of accepted draft tokens differ, confidence 95%, 12 clips",
        ("adapter", "threshold", "accepted", "risk on these clips", "risk on test"),
        [("adapter", 0.75, 0.5, 0.02, 0.03), ("chained", "none", 0.5, 0.02, 0.03)],
    )
    page = acceptance.summary(report)
    assert page.startswith("# Acceptance\n\n**test, prefix: target, 8 positions, draft length 2**\n\n| predictor |") and page.endswith(
        "|\n"
    )
    assert [page.count(f"\n\n**{title}**\n\n|") for title, *_ in (predictors, chain, by_cosine, certified)] == [1] * 4


def test_tables_of_one_clip_name_the_controls_that_are_absent(states):
    """Without chained adapters and certificates their tables are left out."""
    alone = HiddenStates(*list(vars(states).values())[:5], [row | {"sequence": "a"} for row in ROWS], {})
    report = acceptance_report(
        {"adapter": some_scores(0, states.mask)}, {"adapter": Fitted(lambda some: some.draft)}, alone, 2, meta={"split": "s", "prefix": "p"}
    )
    assert (report.plain, report.nulls, report.calibration, report.chains, report.chained) == (None, {}, None, {}, None)
    (title, _, rows), (name, *_) = acceptance.tables(report)
    absent = "; only one clip, so these controls are absent: shuffled, chained, events of another clip"
    assert title == f"s, prefix: p, 8 positions, draft length 2{absent}" and len(rows) == 1 and name == "acceptance by cosine"
    header, *lines = acceptance.position_csv(report).split("\n")
    keys = [*report.per_position[0].to_json()]
    assert header == ",".join(keys) and len(lines) == 4 and lines[-1] == ""
    for t, (line, row) in enumerate(zip(lines[:-1], report.per_position, strict=True)):
        cells = dict(zip(keys, line.split(","), strict=True))
        assert cells["position"] == str(t) and cells["n"] == str(row.n) == ("3", "3", "2")[t]
        assert float(cells["cosine"]) == row.cosine and cells["token_match_lo"] == "" and math.isnan(row.token_match_lo)
