"""Scores of the attending adapter, as `scoring.chain_scores` gives them for the chained one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from feature_alignment.adapters import tables
from feature_alignment.adapters.attending import AttendingAdapter
from feature_alignment.adapters.attending_texts import prompted_texts, proposals
from feature_alignment.adapters.attending_training import Reader, all_origins
from feature_alignment.decoding.acceptance import cosine_per_position
from feature_alignment.measurement.scoring import Scores
from feature_alignment.storage.hidden_states import HiddenStates


@torch.inference_mode()
def attending_scores(
    adapter: AttendingAdapter, states: HiddenStates, head: Tensor, embeddings: Tensor, steps: int, events: Sequence[int] | None = None
) -> tuple[Scores, Tensor]:
    """Scores of the attending adapter for rounds that begin anywhere.

    Args:
        adapter: trained
        states: rows to score, with event states and prompt states
        head: [v, d_target]
        embeddings: [v, d_target]
        steps: draft length
        events: for each row the row whose event states replace its own; None for its own

    Returns:
        scores [n, s, steps], where [row, t, k] is draft token k of a round at t, all earlier ones of the round being the target's own
        tokens; and which of these positions exist, [n, s, steps] bool
    """
    found = proposals(states, tables.NGramTable(adapter.table), leave_out=False)
    if events is not None:
        states = states.with_events_of(torch.tensor(events))
    shape, reader = (*states.mask.shape, steps), Reader(adapter, head, embeddings)
    cosine, says, there = torch.zeros(shape), torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    match, first = torch.zeros(shape, dtype=torch.bool), 0
    for texts in prompted_texts(states, found, torch.arange(len(states.mask)).split(32), str(head.device), adapter.reads_prompt):
        rows, s = slice(first, first + len(texts.states)), texts.states.shape[1]
        first = rows.stop
        emitted = (texts.states @ head.T).argmax(-1)
        for k, step in enumerate(reader.roll_out(texts, all_origins(texts), steps)):
            row = torch.arange(len(texts.states), device=head.device)[:, None]
            said, real = adapter.ids[step.logits.argmax(-1)], step.real[:, : s - 1]
            wanted = cosine_per_position(step.expected.flatten(0, 1), texts.states[row, step.position].flatten(0, 1)).view_as(said)
            starts = slice(1, s)  # position 0 comes from the target's prefill
            cosine[rows, starts, k] = (wanted[:, : s - 1] * real).cpu()
            says[rows, starts, k] = (said[:, : s - 1] * real).cpu()
            match[rows, starts, k] = ((said == emitted.gather(1, step.position))[:, : s - 1] & real).cpu()
            there[rows, starts, k] = real.cpu()
    return Scores(cosine, says, match), there
