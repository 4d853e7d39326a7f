"""Comparison of texts token by token, and of draft tokens with the target's words: agreement, acceptance and kinds of differences."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feature_alignment.decoding.baseline_drafters import BASELINE_DRAFTERS, SEARCH_THE_QUESTION
from feature_alignment.measurement import metrics
from feature_alignment.measurement.lexicon import Lexicon, Verdict
from feature_alignment.measurement.reports import DifferingDraft, DraftReport, TextAgreement, ThresholdCounts

Row = Mapping[str, Any]  # one entry of token_pairs/<split>.json
NUM_EXAMPLES = 10  # of each drafter


def clips_of(rows: Sequence[Row]) -> list[str]:
    """The clip of each row; a row without one is a clip of its own."""
    return [str(row.get("sequence", row.get("sample_id", i))) for i, row in enumerate(rows)]


def free_running_agreement(rows: Sequence[Row], num_draft_tokens: int) -> TextAgreement:
    """Agreement of the two free-running texts, each pair compared up to the shorter one.

    Args:
        rows: entries of token_pairs/<split>.json
        num_draft_tokens: draft length of `consecutive_accept`
    """
    same, total, prefix = [], [], []
    for row in rows:
        pairs = list(zip(row["egpt_tokens"], row["vl_tokens"], strict=False))
        equal = [a == b for a, b in pairs]
        same.append(sum(equal))
        total.append(len(equal))
        prefix.append(equal.index(False) if False in equal else len(equal))
    clips, ones = clips_of(rows), np.ones(len(rows))
    capped = np.minimum(prefix, num_draft_tokens).astype(float)
    return TextAgreement(
        position_match=metrics.Counts(np.array(same, float), np.array(total, float)).rate(clips),
        mean_prefix=metrics.Counts(np.array(prefix, float), ones).rate(clips),
        consecutive_accept=metrics.Counts(capped, ones * num_draft_tokens).rate(clips),
        first_token_differs=metrics.Counts((np.array(prefix) == 0).astype(float), ones).rate(clips),
    )


def verified(correct: Tensor, rows: Sequence[Row], num_draft_tokens: int, eos_ids: Collection[int], params: int = 0) -> DraftReport:
    """Draft tokens on the target's texts, verified by the token rule.

    Args:
        correct: [n, s] bool, whether the draft token at this position is the target's if everything before it is the target's text
        rows: entries of token_pairs/<split>.json
        num_draft_tokens: draft length
        eos_ids: token ids that end a text
        params: parameters of the drafter
    """
    lengths = torch.tensor([len(r["vl_tokens"]) for r in rows])
    mask = torch.arange(correct.shape[1]) < lengths[:, None]
    ended = torch.tensor([r["vl_tokens"][-1] in eos_ids for r in rows])
    blocks, clips, n = metrics.decoding_blocks(correct, mask, num_draft_tokens, ended), clips_of(rows), len(rows)
    return DraftReport(
        token_match=metrics.counts(correct, mask).rate(clips),
        acceptance_rate=blocks.acceptance_rate(n).rate(clips),
        consecutive_accept=blocks.consecutive_accept(n).rate(clips),
        leading_tokens=metrics.counts(metrics.leading_run(correct, mask)[:, None], torch.ones(n, 1)).rate(clips),
        tokens_per_pass=blocks.tokens_per_pass(lengths),
        params=params,
    )


def correct_drafts(drafts: Sequence[Sequence[int | None]], rows: Sequence[Row]) -> Tensor:
    """Whether each draft token is the target's.

    Args:
        drafts: for each row, the draft token at each position; None where nothing is proposed
        rows: entries of token_pairs/<split>.json

    Returns:
        [n, longest text] bool
    """
    correct = torch.zeros(len(rows), max(len(r["vl_tokens"]) for r in rows), dtype=torch.bool)
    for i, (draft, row) in enumerate(zip(drafts, rows, strict=True)):
        same = [a == b for a, b in zip(draft, row["vl_tokens"], strict=False)]
        correct[i, : len(same)] = torch.tensor(same)
    return correct


def own_draft_report(rows: Sequence[Row], num_draft_tokens: int, eos_ids: Collection[int]) -> DraftReport | None:
    """Rates of EventGPT's own draft tokens on the target's text; None if they were not extracted.

    Args:
        rows: of a split; `egpt_drafts` ends at the last stored position, and no position after it counts
        num_draft_tokens: draft length
        eos_ids: token ids that end a text
    """
    if "egpt_drafts" not in rows[0]:
        return None
    drafts = [r["egpt_drafts"] for r in rows]
    read = [{**r, "vl_tokens": r["vl_tokens"][: len(draft)]} for r, draft in zip(rows, drafts, strict=True)]
    return verified(correct_drafts(drafts, read), read, num_draft_tokens, eos_ids)


def baseline_drafter_reports(
    train: Sequence[Row],
    rows: Sequence[Row],
    num_draft_tokens: int,
    eos_ids: Collection[int],
    encode: Callable[[str], Sequence[int]] | None = None,
) -> dict[str, DraftReport]:
    """Run each baseline drafter on the target's own texts, in their order; for lossless decoding that is exact (docs/method.md).

    Args:
        train: answers that the drafters are fitted on
        rows: answers that they draft
        num_draft_tokens: draft length
        eos_ids: token ids that end a text
        encode: question -> token ids, which `lookup` and `tables` search as they do in decoding; without it, they search the answer only

    Returns:
        drafter -> its report
    """
    reports = {}
    for name, fit in BASELINE_DRAFTERS.items():
        texts = [(_question(r), r["vl_tokens"]) for r in train]
        table = SEARCH_THE_QUESTION[name](texts, cache(encode)) if encode and name in SEARCH_THE_QUESTION else fit(texts)
        drafts = []
        for row in rows:
            tokens = row["vl_tokens"]
            drafts.append([table.next_token(_question(row), tokens[:t]) for t in range(len(tokens))])
            table.finished(_question(row), tokens)
        reports[name] = verified(correct_drafts(drafts, rows), rows, num_draft_tokens, eos_ids)
    return reports


def _question(row: Row) -> str:
    """The question of an answer; files of others may not state it, and all their answers count as of one question."""
    question = row.get("query")
    return "" if question is None else str(question)


def halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Split rows by clip: those of the first half of the clips, in order of appearance, and those of the second half."""
    clips = clips_of(rows)
    order = list(dict.fromkeys(clips))
    first = set(order[: len(order) // 2])
    return [r for r, c in zip(rows, clips, strict=True) if c in first], [r for r, c in zip(rows, clips, strict=True) if c not in first]


@dataclass(frozen=True)
class CosineDrafts:
    """Draft tokens with the cosine of their predicted state, [n, s], or [n, s, steps] for rounds that begin anywhere.

    Args:
        cosine: float
        says: int64, id of the draft token
        valid: bool, whether there is such a position
    """

    cosine: Tensor
    says: Tensor
    valid: Tensor


def accepted_by_cosine(
    sources: Mapping[str, CosineDrafts],
    token_ids: Tensor,
    word: Callable[[int], str],
    sample_ids: Sequence[str],
    lexicon: Lexicon,
) -> tuple[dict[str, list[ThresholdCounts]], list[DifferingDraft]]:
    """Judge the draft tokens that a cosine threshold accepts: the target's own word, a synonym, another fact or another word.

    Args:
        sources: drafter -> its draft tokens
        token_ids: [n, s] int64, the target's text
        word: token id -> word
        sample_ids: id of each row
        lexicon: which words state which facts

    Returns:
        drafter -> counts at each threshold; and for each drafter the differing words of highest cosine
    """
    sweeps, examples = {}, []
    for name, drafts in sources.items():
        index = drafts.valid.nonzero()
        at = index[:, 1] + (index[:, 2] if index.shape[1] == 3 else 0)
        says, own = drafts.says[drafts.valid].tolist(), token_ids[index[:, 0], at].tolist()
        cosine = drafts.cosine[drafts.valid].double()
        known = {pair: lexicon.compare(word(pair[0]), word(pair[1])) for pair in set(zip(says, own, strict=True))}
        verdicts = [known[pair] for pair in zip(says, own, strict=True)]
        sweeps[name] = _threshold_sweep(cosine, verdicts, lexicon)
        differs = torch.tensor([verdict != "same" for verdict, _ in verdicts]).nonzero()[:, 0]
        shown: set[tuple[int, int]] = set()  # Several steps of a chain may draft the same position.
        for i in differs[cosine[differs].argsort(descending=True)].tolist():
            row, position = int(index[i, 0]), int(at[i])
            if (row, position) in shown or len(shown) == NUM_EXAMPLES:
                continue
            shown.add((row, position))
            before = " ".join(word(t) for t in token_ids[row, max(0, position - 6) : position].tolist())
            words = word(says[i]), word(own[i])
            examples.append(DifferingDraft(name, sample_ids[row], before, *words, verdicts[i][0], float(cosine[i])))
    return sweeps, examples


def _threshold_sweep(cosine: Tensor, verdicts: Sequence[tuple[Verdict, str | None]], lexicon: Lexicon) -> list[ThresholdCounts]:
    """Counts of accepted draft tokens by verdict. cosine: [p] float64, with the verdict of each draft token."""
    kinds = ("same", "synonym", "other_fact", "other_word")
    masks = {kind: torch.tensor([verdict == kind for verdict, _ in verdicts]) for kind in kinds}
    masks["other_fact_hidden"] = masks["other_fact"] & torch.tensor([slot in lexicon.hidden_from_events for _, slot in verdicts])
    sweep = []
    for t in torch.arange(0.5, 0.991, 0.02, dtype=torch.float64):
        above = cosine > t
        counts = {name: int((mask & above).sum()) for name, mask in masks.items()}
        sweep.append(ThresholdCounts(threshold=float(t), drafted=len(cosine), kept=int(above.sum()), **counts))
    return sweep
