"""The tables of comparison.json. Their headers are keys of its `rows`."""

from __future__ import annotations

from feature_alignment.measurement.metrics import Rate
from feature_alignment.measurement.reports import ComparisonReport, DraftReport

Table = tuple[str, tuple[str, ...], list[tuple[str | int, ...]]]
SHOWN_THRESHOLDS = (0.5, 0.8, 0.9, 0.96)


def tables(report: ComparisonReport, num_draft_tokens: int) -> list[Table]:
    """(title, header, rows) of every table, in display order.

    Args:
        report: content of comparison.json
        num_draft_tokens: draft length
    """
    drafters, rules, counts = drafter_table(report, num_draft_tokens), rule_table(report), count_table(report)
    return [agreement_table(report, num_draft_tokens), *(table for table in (drafters, rules, counts) if table[2])]


def agreement_table(report: ComparisonReport, num_draft_tokens: int) -> Table:
    """Agreement of the two free-running texts; the arguments are those of `tables`."""
    level = report.token_level
    return (
        f"the two free-running texts, {level.mean_prefix.total:,.0f} pairs",
        ("what", "value [95 %]"),
        [
            ("same token at the same position", _percent(level.position_match)),
            ("rows that differ at the first token", _percent(level.first_token_differs)),
            (f"consecutive acceptance of {num_draft_tokens}", _percent(level.consecutive_accept)),
            ("mean matching prefix, tokens", level.mean_prefix.text(5)),
        ],
    )


def drafter_table(report: ComparisonReport, num_draft_tokens: int) -> Table:
    """Every drafter under the token rule; the arguments are those of `tables`."""
    trained = report.token_adapter
    drafters: dict[str, DraftReport | None] = {}
    if trained:
        drafters[f"token-level adapter, {trained.overhead_ms:.1f} ms a text"] = trained
    drafters |= {"EventGPT's own": report.own_drafts, "aligned": report.aligned_token_level, "chained": report.chained_token_level}
    drafters |= {f"baseline drafter {name}": r for name, r in report.nulls.items()}
    return (
        f"draft tokens under the token rule, draft length {num_draft_tokens}, given the target's text so far",
        ("drafts", "token match", "acceptance rate", "consecutive", "leading tokens", "tokens per pass", "parameters"),
        [
            (
                name,
                *(rate.text(3) for rate in (r.token_match, r.acceptance_rate, r.consecutive_accept)),
                r.leading_tokens.text(2) if r.leading_tokens else "-",
                f"{r.tokens_per_pass:.2f}",
                f"{r.params:,}",
            )
            for name, r in drafters.items()
            if r
        ],
    )


def rule_table(report: ComparisonReport) -> Table:
    """The cosine rules at each threshold."""
    return (
        "draft tokens under the cosine rules",
        ("drafts, rule", "consecutive", "relaxed", "same token among the kept"),
        [
            (f"{name}, cosine > {t}", *(rate.text(3) for rate in (v.consecutive_accept, v.relaxed_accept, v.token_match_given_accept)))
            for name, thresholds in report.feature_rules.items()
            for t, v in thresholds.items()
        ],
    )


def count_table(report: ComparisonReport) -> Table:
    """What accepted draft tokens say, at some thresholds."""
    return (
        "draft tokens accepted by cosine: the target's word, or another one",
        ("drafts, threshold", "drafted", "kept", "same word", "synonym", "other fact", "of these hidden from events", "other word"),
        [
            (f"{name}, {c.threshold:.2f}", c.drafted, c.kept, c.same, c.synonym, c.other_fact, c.other_fact_hidden, c.other_word)
            for name, sweep in report.kept_by_cosine.items()
            for c in sweep
            if min(abs(c.threshold - t) for t in SHOWN_THRESHOLDS) < 1e-6
        ],
    )


def _percent(rate: Rate) -> str:
    return rate.text(digits=3, scale=100, unit=" %")
