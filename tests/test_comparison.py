"""Agreement of texts, and draft tokens on texts, computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from feature_alignment.measurement import comparison
from feature_alignment.measurement.metrics import bootstrap_ratio

ROWS = [
    {"sequence": "a", "query": "q", "egpt_tokens": [5, 6, 7, 2], "vl_tokens": [5, 6, 9, 9, 2]},
    {"sequence": "a", "query": "r", "egpt_tokens": [8, 6], "vl_tokens": [5, 6, 9, 2]},
    {"sequence": "b", "query": "q", "egpt_tokens": [5, 6, 9], "vl_tokens": [5, 6, 9, 2]},
    {"sequence": "c", "query": "q", "egpt_tokens": [7], "vl_tokens": [5, 6, 9]},  # cut off: no end
]


def check(rate, count, total):
    assert (rate.count, rate.total) == (sum(count), sum(total)) and rate.value == pytest.approx(sum(count) / sum(total))
    clips = [r["sequence"] for r in ROWS]
    assert rate.ci95 == pytest.approx(bootstrap_ratio(np.array(count, float), np.array(total, float), clips))


@pytest.mark.parametrize(("gamma", "capped"), [(1, [1, 0, 1, 0]), (2, [2, 0, 2, 0]), (5, [2, 0, 3, 0])])
def test_free_texts_are_compared_up_to_the_shorter_one(gamma, capped):
    found = comparison.free_running_agreement(ROWS, gamma)
    check(found.position_match, [2, 1, 3, 0], [4, 2, 3, 1])
    check(found.mean_prefix, [2, 0, 3, 0], [1] * 4)
    check(found.consecutive_accept, capped, [gamma] * 4)
    check(found.first_token_differs, [0, 1, 0, 1], [1] * 4)
    assert found.params == 0 and found.overhead_ms == 0.0


def test_a_draft_token_is_correct_where_it_is_the_targets_token():
    drafts = [[5, 6, 9, 9, 2], [None, 6], [5, 7, 9, 2, 2, 2], []]
    bits = comparison.correct_drafts(drafts, ROWS).tolist()
    assert bits == [[1, 1, 1, 1, 1], [0, 1, 0, 0, 0], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0]]


def test_rounds_of_known_drafts():
    """Two drafts a round from the second token on; the last token of a text that was cut off has no draft."""
    bits = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 1, 0], [1, 1, 1, 1, 0], [1, 0, 1, 0, 0]]).bool()
    found = comparison.verified(bits, ROWS, 2, [2], params=7)
    assert found.params == 7
    # rounds (offered, kept) of each row: (2, 2) and (1, 0) … by hand
    rounds = [[(2, 2), (1, 0)], [(2, 1), (1, 1)], [(2, 2)], [(1, 0), (0, 0)]]
    check(found.token_match, [3, 3, 4, 2], [5, 4, 4, 3])
    check(found.consecutive_accept, [sum(k for _, k in r) for r in rounds], [sum(o for o, _ in r) for r in rounds])
    check(found.acceptance_rate, [sum(k for _, k in r) for r in rounds], [sum(min(k + 1, o) for o, k in r) for r in rounds])
    check(found.leading_tokens, [0, 2, 4, 1], [1] * 4)
    assert found.tokens_per_pass == pytest.approx((4 + 3 + 3 + 2) / 7)


def test_own_draft_tokens_count_as_far_as_they_were_stored():
    """With --max_positions a row's draft tokens end before its answer; later positions are not wrong, they are not measured."""
    drafts = [row["vl_tokens"][:3] for row in ROWS]
    found = comparison.own_draft_report([{**r, "egpt_drafts": d} for r, d in zip(ROWS, drafts, strict=True)], 2, [2])
    check(found.token_match, [len(d) for d in drafts], [len(d) for d in drafts])
    assert comparison.own_draft_report(ROWS, 2, [2]) is None


def test_drafters_see_each_answer_after_they_drafted_it():
    """`previous` knows the training answer first, then each answer it has seen to the same question; `lookup` reads the question too."""
    train = [{"query": "q", "vl_tokens": [5, 6, 2]}, {"query": "r", "vl_tokens": [5, 6, 9, 2]}]
    found = comparison.baseline_drafter_reports(train, ROWS, 3, [2])
    assert list(found) == ["template", "ngram", "lookup", "previous", "tables"]
    assert found["previous"].token_match.count == (2 + 0) + 4 + 3 + 3 and found["previous"].params == 0
    assert found["template"].token_match.total == 5 + 4 + 4 + 3
    assert found["lookup"].token_match.count == 0  # nothing repeats
    asked = comparison.baseline_drafter_reports(train, ROWS, 3, [2], encode=lambda question: [5, 6, 9, 2])["lookup"].token_match.count
    assert asked == 4 * 2 + 2  # the 6 and the 9 in all four texts, and the end of the two that end as the question does


def test_rows_without_a_sequence_are_clips_of_their_own():
    assert comparison.clips_of([{"sequence": 7}, {"sample_id": "x"}, {}]) == ["7", "x", "2"]
