"""Draft tokens for all rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from feature_alignment.adapters.folded import EventContext
from feature_alignment.decoding.chained_proposer import ChainedProposer
from feature_alignment.decoding.proposers import Proposer
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.models.state import Prompt

NO_TOKEN = -1  # where a row has fewer draft tokens than others; equals no token of a text


class RowDrafter(Protocol):
    """Drafts for the rows of a batch whose prompts were started."""

    def propose(self, emitted: Sequence[Sequence[int]], states: Tensor, room: Sequence[int], watch: Stopwatch) -> Tensor:
        """Draft tokens of b rows.

        Args:
            emitted: token ids of each text so far
            states: [b, n, d_target], the target's hidden states that emitted them; later ones are undefined
            room: maximum number of draft tokens of each row, at least one of them above 0
            watch: books the time

        Returns:
            [b, g] int64; a row may go on after its room or after a token that ends its text, or hold NO_TOKEN from some position on
        """

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows."""


class SeparateRows(RowDrafter):
    """Every row has its own drafter."""

    def __init__(self, proposers: Sequence[Proposer]) -> None:
        self._proposers = list(proposers)

    def propose(self, emitted: Sequence[Sequence[int]], states: Tensor, room: Sequence[int], watch: Stopwatch) -> Tensor:
        """See `RowDrafter`."""
        drafts = [
            proposer.propose(text, own[: len(text)], most, watch).token_ids if most > 0 else torch.empty(0, dtype=torch.long)
            for proposer, text, own, most in zip(self._proposers, emitted, states, room, strict=True)
        ]
        return torch.nn.utils.rnn.pad_sequence([d.to(states.device) for d in drafts], batch_first=True, padding_value=NO_TOKEN)

    def keep(self, rows: Sequence[int]) -> None:
        """See `RowDrafter`."""
        self._proposers = [self._proposers[row] for row in rows]


class ChainedRows(RowDrafter):
    """One chained adapter drafts for all rows at once, by argmax.

    Args:
        proposers: each has read its row's prompt; they share an adapter
    """

    def __init__(self, proposers: Sequence[ChainedProposer]) -> None:
        self._first = proposers[0]
        self._context = EventContext(*(torch.cat(parts) for parts in zip(*(p.event_context for p in proposers), strict=True)))
        self._memory: Tensor | None = None  # [b, w], of the verified texts
        self._num_read = [0] * len(proposers)  # tokens of each

    def propose(self, emitted: Sequence[Sequence[int]], states: Tensor, room: Sequence[int], watch: Stopwatch) -> Tensor:
        """See `RowDrafter`."""
        with watch("read"):
            new = [text[n:] for text, n in zip(emitted, self._num_read, strict=True)]
            width, device = max(map(len, new)), states.device
            padded = torch.tensor([[*row, *[0] * (width - len(row)), n] for row, n in zip(new, self._num_read, strict=True)], device=device)
            tokens, first = padded.split([width, 1], 1)
            rows, positions = torch.arange(len(new), device=device), first + torch.arange(width, device=device)
            found = states[rows[:, None], positions.clamp(max=states.shape[1] - 1)]
            memories = self._first.chain.read(found, tokens, self._memory)
            self._memory = memories[rows, torch.tensor([len(row) - 1 for row in new], device=device)]
            self._num_read = [len(text) for text in emitted]
        with watch("adapter"):
            return self._first.draft_rows(self._memory, self._context, max(room))

    def keep(self, rows: Sequence[int]) -> None:
        """See `RowDrafter`."""
        index = torch.tensor(rows, device=self._context.keys.device)
        self._memory = None if self._memory is None else self._memory[index]
        self._num_read = [self._num_read[row] for row in rows]
        self._context = EventContext(*(part[index] for part in self._context))


def drafter_of_rows(proposers: Sequence[Proposer]) -> RowDrafter:
    """One chained adapter for all rows where they share it and draft by argmax; else a drafter for each row."""
    chained = _of_one_chain(proposers)
    if chained is not None and all(p.selector.is_plain_argmax for p in chained):
        return ChainedRows(chained)
    return SeparateRows(proposers)


def start_rows(proposers: Sequence[Proposer], prompts: Sequence[Prompt], watch: Stopwatch) -> None:
    """Start each drafter on its row's prompt; drafters that share EventGPT and a chained adapter read all clips at once.

    Args:
        proposers: one per row
        prompts: theirs
        watch: books the time
    """
    chained = _of_one_chain(proposers)
    same = chained is not None and all(p.draft is chained[0].draft for p in chained)
    if chained is not None and same and show_clips_alike([p.ids for p in prompts], chained[0].draft.placeholder):
        chained[0].start_rows(chained[1:], prompts, watch)
        return
    for proposer, prompt in zip(proposers, prompts, strict=True):
        proposer.start(prompt, watch)


def show_clips_alike(ids: Sequence[Tensor], placeholder: int, within: int | None = None) -> bool:
    """Whether all prompts show their clip at the same positions, so that one pass reads all of them up to there.

    Args:
        ids: [s] int64 of each prompt, whose lengths may differ
        placeholder: token id that stands for vision
        within: the clips must end before this position; default the length of the shortest prompt
    """
    places = [(row == placeholder).nonzero()[:, 0] for row in ids]
    end = min(map(len, ids)) if within is None else within
    return all(torch.equal(at, places[0]) for at in places) and (not len(places[0]) or int(places[0][-1]) < end)


def _of_one_chain(proposers: Sequence[Proposer]) -> list[ChainedProposer] | None:
    """The drafters, if all are chained adapters and the same one."""
    chained = [p for p in proposers if isinstance(p, ChainedProposer)]
    return chained if len(chained) == len(proposers) and all(p.chain.is_chain_of(chained[0].chain) for p in chained) else None
