"""acceptance.json: its content from scores, and the tables that are printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from feature_alignment.cli.console import markdown_table
from feature_alignment.measurement import metrics, scoring
from feature_alignment.measurement.calibration import Certificate
from feature_alignment.measurement.records import Meta
from feature_alignment.measurement.reports import AcceptanceReport, AdapterSummary, ChainReport, CosineRuleRates, PredictorReport
from feature_alignment.measurement.scoring import Fitted, Scores
from feature_alignment.storage.hidden_states import HiddenStates

THRESHOLDS = (0.80, 0.85, 0.90, 0.95)
Table = tuple[str, tuple[str, ...], list[tuple[object, ...]]]


class ChainScores(NamedTuple):
    """Scores of a chained adapter: [n, s, steps], whether the text has each position, [n, s, steps] bool, and the adapter's meta."""

    scores: Scores
    valid: Tensor
    meta: Meta


def predictor_report(scores: Scores, fitted: Fitted, states: HiddenStates, num_draft_tokens: int) -> PredictorReport:
    """Rates and cost of one predictor with [n, s] scores on the split `states`."""
    found = scoring.rates(scores, states.mask, states, num_draft_tokens)
    return PredictorReport(**vars(found), params=fitted.parameters, seconds=fitted.seconds)


def acceptance_report(
    scores: Mapping[str, Scores],
    fitted: Mapping[str, Fitted],
    states: HiddenStates,
    num_draft_tokens: int,
    chains: Mapping[str, ChainReport] | None = None,
    certificates: Mapping[str, Certificate] | None = None,
    meta: Meta | None = None,
) -> AcceptanceReport:
    """The content of acceptance.json.

    Args:
        scores: predictor -> its [n, s] scores; "adapter" is the hidden adapter
        fitted: predictor -> its cost
        states: the split that is measured
        num_draft_tokens: draft length
        chains: chained adapter -> its report
        certificates: "adapter" -> certified threshold
        meta: provenance
    """
    own, mask = scores["adapter"], states.mask
    reports = {name: predictor_report(s, fitted[name], states, num_draft_tokens) for name, s in scores.items()}
    hidden = reports.pop("adapter")
    return AcceptanceReport(
        meta=meta or {},
        adapter=AdapterSummary(hidden.params, states.meta.get("draft_layers", [])),
        **vars(hidden),
        plain=reports.pop("plain", None),
        nulls=reports,
        absent_controls=["shuffled", "chained, events of another clip"] if len(set(states.clips)) < 2 else [],
        thresholds={f"{t:.2f}": scoring.rates_above(t, own, mask, states, num_draft_tokens) for t in THRESHOLDS},
        auc_cosine_token_match=metrics.auc(own.cosine[mask].numpy(), own.match[mask].numpy()),
        reliability=scoring.reliability(own, mask, states.clips),
        accepted_lengths=scoring.accepted_lengths(own.match, states, num_draft_tokens),
        per_position=scoring.per_position(own, states),
        num_draft_tokens=num_draft_tokens,
        calibration=(certificates or {}).get("adapter"),
        chains=dict(chains or {}),
    )


def chain_report(found: ChainScores, states: HiddenStates, calibration: Certificate | None = None) -> ChainReport:
    """Rates of a chained adapter, pooled over its steps and for each step; its draft length is the number of steps.

    Args:
        found: scores of the adapter
        states: the split that is measured
        calibration: certified threshold
    """
    scores, valid, meta = found
    steps = valid.shape[-1]
    return ChainReport(
        params=meta["parameters"],
        seconds=meta["seconds"],
        num_draft_tokens=steps,
        **vars(scoring.rates(scores, valid, states, steps)),
        thresholds={f"{t:.2f}": scoring.rates_above(t, scores, valid, states, steps) for t in THRESHOLDS},
        auc_cosine_token_match=metrics.auc(scores.cosine[valid].numpy(), scores.match[valid].numpy()),
        reliability=scoring.reliability(scores, valid, states.clips),
        accepted_lengths=scoring.accepted_lengths(scores.match, states, steps),
        steps=scoring.chain_steps(scores, valid, states.clips),
        calibration=calibration,
    )


def position_csv(report: AcceptanceReport) -> str:
    """per_position.csv: one line for each position of the answer, empty cells for nan."""
    rows = [row.to_json() for row in report.per_position]
    lines = [",".join("" if value is None else str(value) for value in row.values()) for row in rows]
    return "\n".join([",".join(rows[0]), *lines]) + "\n"


def tables(report: AcceptanceReport) -> list[Table]:
    """(title, header, rows) of every table, in display order."""
    rules = {"adapter": report.thresholds} | ({"chained": report.chained.thresholds} if report.chained else {})
    chains = [chain_table(report)] if report.chains else []
    certificates = {"adapter": report.calibration, "chained": report.chained.calibration if report.chained else None}
    certified = {name: certificate for name, certificate in certificates.items() if certificate}
    return [predictor_table(report), *chains, threshold_table(rules), *([calibration_table(certified)] if certified else [])]


def predictor_table(report: AcceptanceReport) -> Table:
    """Cosine, token match and acceptance rate of the adapters and the null predictors."""
    predictors: dict[str, AcceptanceReport | PredictorReport] = {"adapter": report}
    if report.plain:
        predictors["plain (TASKS.md)"] = report.plain
    predictors |= report.nulls
    size = f"{report.cosine.total:,.0f} positions, draft length {report.num_draft_tokens}"
    note = f"; only one clip, so these controls are absent: {', '.join(report.absent_controls)}" if report.absent_controls else ""
    return (
        f"{report.meta['split']}, prefix: {report.meta['prefix']}, {size}{note}",
        ("predictor", "cosine", "token match", "acceptance rate", "tokens per pass", "parameters", "seconds"),
        [(name, *(rate.text(3) for rate in (r.cosine, r.token_match, r.acceptance_rate)), *_cost(r)) for name, r in predictors.items()],
    )


def chain_table(report: AcceptanceReport) -> Table:
    """Token match of the chained adapters at each draft position."""
    g = report.num_draft_tokens
    return (
        f"chained adapter, from the target's last state: token match at each of {g} draft positions",
        ("adapter", "cosine", *(str(k + 1) for k in range(g)), "acceptance rate", "tokens per pass", "parameters", "seconds"),
        [
            (name, c.cosine.text(3), *(f"{s.token_match.value:.3f}" for s in c.steps), c.acceptance_rate.text(3), *_cost(c))
            for name, c in report.chains.items()
        ],
    )


def _cost(r: AcceptanceReport | PredictorReport | ChainReport) -> tuple[str, str, str]:
    """Cells of one predictor: tokens per pass, parameters, training seconds."""
    return f"{r.tokens_per_pass:.2f}", f"{r.params:,}", f"{r.seconds:.1f}"


def threshold_table(rules: Mapping[str, Mapping[str, CosineRuleRates]]) -> Table:
    """Acceptance of the cosine rules.

    Args:
        rules: adapter -> threshold -> rates
    """
    return (
        "acceptance by cosine",
        ("adapter, threshold", "relaxed_accept", "consecutive_accept", "token_match_given_accept"),
        [
            (f"{name}, {t}", *(rate.text(3) for rate in (v.relaxed_accept, v.consecutive_accept, v.token_match_given_accept)))
            for name, thresholds in rules.items()
            for t, v in thresholds.items()
        ],
    )


def calibration_table(certified: Mapping[str, Certificate]) -> Table:
    """Certified thresholds and their risk.

    Args:
        certified: adapter -> certificate, at least one
    """
    first = next(iter(certified.values()))
    return (
        f"certified: at most {first.epsilon:.0%} of accepted draft tokens differ, confidence {1 - first.delta:.0%}, {first.clips} clips",
        ("adapter", "threshold", "accepted", "risk on these clips", "risk on test"),
        [
            (name, "none" if c.threshold is None else c.threshold, c.kept, c.risk_on_calibration, c.risk_on_test)
            for name, c in certified.items()
        ],
    )


def summary(report: AcceptanceReport) -> str:
    """The tables as Markdown, for summary.md."""
    parts = [f"**{title}**\n\n{markdown_table(header, rows)}" for title, header, rows in tables(report)]
    return "# Acceptance\n\n" + "\n\n".join(parts) + "\n"
