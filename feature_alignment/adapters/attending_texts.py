"""Texts that the attending adapter learns from: answers with their prompts and the table candidates after each token."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from feature_alignment.adapters import tables
from feature_alignment.storage.hidden_states import HiddenStates

MOST_IDS = 8192  # largest draft vocabulary


@dataclass(frozen=True)
class Proposals:
    """Table candidates after each token of each row's text: tokens [n, s, SOURCES] int64 (`tables.NO_TOKEN` for none) and buckets."""

    tokens: Tensor
    buckets: Tensor


@dataclass(frozen=True)
class PromptedTexts:
    """A batch of texts, cut to the longest.

    Args:
        states: [b, s, d_target], target states
        token_ids: [b, s]
        mask: [b, s]
        events: [b, e, d_event]
        prompt: [b, p, d_target], target states on the last prompt positions except the very last
        prompt_inputs: [b, p, d_target], the target's input embedding after each of these positions
        before: [b] int64, the last token id of the prompt
        prompt_mask: [b, p] bool, False for padding
        proposed: [b, s, SOURCES] int64, candidates for the next token
        buckets: [b, s, SOURCES] int64
    """

    states: Tensor
    token_ids: Tensor
    mask: Tensor
    events: Tensor
    prompt: Tensor
    prompt_inputs: Tensor
    before: Tensor
    prompt_mask: Tensor
    proposed: Tensor
    buckets: Tensor


def answers_of(states: HiddenStates) -> list[tables.Answer]:
    """The texts of a split."""
    return [
        tables.Answer(row["sequence"], tables.question_number(row["question"]), states.token_ids[i, : int(states.lengths[i])].tolist())
        for i, row in enumerate(states.rows)
    ]


def drafted_ids(answers: Iterable[tables.Answer]) -> Tensor:
    """The draft vocabulary [ids] int64, ascending: the most frequent ids of the answers, at most `MOST_IDS`."""
    counts = Counter(token for answer in answers for token in answer.tokens)
    return torch.tensor(sorted(token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_IDS]))


def proposals(states: HiddenStates, counts: tables.Counts | tables.NGramTable, leave_out: bool) -> Proposals:
    """Table candidates along the text of each row.

    Args:
        states: rows with their questions and prompt ids
        counts: the table
        leave_out: subtract the counts of each row's own clip; for rows that were counted
    """
    answers, clips = answers_of(states), defaultdict(list)
    for answer in answers:
        clips[answer.clip].append(answer)
    tokens = torch.full((*states.token_ids.shape, tables.SOURCES), tables.NO_TOKEN)
    buckets = torch.zeros_like(tokens)
    known: dict[str, Any] = {}
    for i, answer in enumerate(answers):
        if answer.clip not in known:
            known = {answer.clip: counts}
            if leave_out:
                assert isinstance(counts, tables.Counts)  # a saved table does not know what each clip added
                known = {answer.clip: tables.LeaveOneOut(counts, clips[answer.clip])}
        found = tables.candidates_along(known[answer.clip], answer.question, states.rows[i]["prompt_ids"], answer.tokens)
        tokens[i, : len(found)], buckets[i, : len(found)] = torch.tensor(found).unbind(-1)
    return Proposals(tokens, buckets)


def prompted_texts(
    states: HiddenStates, found: Proposals, batches: Iterable[Tensor], device: str, reads_prompt: bool = True
) -> Iterator[PromptedTexts]:
    """The texts of each batch of rows; with no prompt positions (p = 0) unless `reads_prompt`."""
    assert states.prompt is not None and states.prompt_inputs is not None  # asked for when they were loaded
    p = states.prompt.shape[1] if reads_prompt else 0
    for rows in batches:
        s = int(states.lengths[rows].max())
        parts = [states.target[rows, :s].float(), states.token_ids[rows, :s], states.mask[rows, :s], states.events_of(rows).float()]
        parts += [states.prompt[rows, :p].float(), states.prompt_inputs[rows, :p].float()]
        states.refuse_non_finite(rows, parts[0], *parts[3:])
        ids = [states.rows[row]["prompt_ids"] for row in rows.tolist()]
        lengths = torch.tensor([min(p, len(of_row) - 1) for of_row in ids])
        parts += [torch.tensor([of_row[-1] for of_row in ids]), torch.arange(p) >= p - lengths[:, None]]
        parts += [found.tokens[rows, :s], found.buckets[rows, :s]]
        yield PromptedTexts(*(part.to(device) for part in parts))
