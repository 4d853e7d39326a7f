"""Speculative decoding of several prompts at once. Each row advances by its own accepted draft tokens.

A chained adapter drafts for all rows in one call, and one pass of the target verifies all drafts (`models.row_cache`):

    row 1 | prompt   | x d1 d2 d3 |      accepted 3: four positions further
    row 2 | prompt | x ·  ·  ·  |        accepted 0: one position further; the next round overwrites what was rejected
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from feature_alignment.cli.console import UserError
from feature_alignment.decoding.batch_drafts import NO_TOKEN, RowDrafter, drafter_of_rows, show_clips_alike, start_rows
from feature_alignment.decoding.overlap import drafter_reading
from feature_alignment.decoding.proposers import Proposer
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.decoding.token_selection import TokenSelector
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.generation import most_likely
from feature_alignment.models.row_cache import RowBatch, compacted
from feature_alignment.models.state import Prompt, State


@dataclass
class Row:
    """One prompt.

    Args:
        selector: its token selector
        emitted: token ids of its text
        accepted: number of accepted draft tokens in each round
    """

    selector: TokenSelector
    emitted: list[int]
    accepted: list[int]

    @property
    def has_ended(self) -> bool:
        """Whether the last token ends the text."""
        return self.selector.rules.end_of(self.emitted[:-1], self.emitted[-1:]) is not None


@dataclass
class BatchGeneration:
    """Finished texts in the order of the prompts.

    Args:
        token_ids: of each answer
        accepted: number of accepted draft tokens in each round, for each prompt
        passes: forward passes of the target over the batch, after its prefill
        total_ms: prefill and decoding
        ms: milliseconds per stage
    """

    token_ids: list[list[int]]
    accepted: list[list[int]]
    passes: int
    total_ms: float
    ms: dict[str, float]


@torch.inference_mode()
def speculate_batch(
    target: Decoder,
    proposers: Sequence[Proposer],
    prompts: Sequence[Prompt],
    draft_prompts: Sequence[Prompt],
    *,
    num_draft_tokens: int = 5,
    max_new_tokens: int = 64,
    overlap: bool = False,
) -> BatchGeneration:
    """Decode several prompts under the token rule; each text equals greedy decoding of its prompt alone. Finished rows leave.

    Args:
        target: the model whose text is reproduced
        proposers: one drafter per prompt, not shared
        prompts: the target's
        draft_prompts: the drafters', of the same samples
        num_draft_tokens: draft length; 0 is plain decoding of a batch
        max_new_tokens: longest answer, EOS included
        overlap: the drafters read their prompts in a second thread while the target reads its own; the stage "draft_prefill" is then the
            time spent waiting for them

    Raises:
        ValueError: unequal numbers of prompts and drafters
    """
    if not len(proposers) == len(prompts) == len(draft_prompts) > 0:
        raise ValueError(
            f"{len(prompts)} prompts, {len(draft_prompts)} draft prompts and {len(proposers)} proposers; expected as many of each"
        )
    watch = Stopwatch(target.device)
    start = watch.now()
    started = _read_prompts(target, proposers, prompts, draft_prompts, num_draft_tokens, max_new_tokens, overlap, watch)
    everyone = rows = started.rows
    batch, states, drafter = started.batch, started.states, started.drafter
    passes = 0
    while going := [i for i, row in enumerate(rows) if not row.has_ended and len(row.emitted) < max_new_tokens]:
        if batch.should_drop(len(rows) - len(going)):
            with watch("rollback"):
                order = compacted(going)
                rows, states = [rows[i] for i in order], states[torch.tensor(order, device=target.device)]
                batch.keep(order)
                if drafter is not None:
                    drafter.keep(order)
            going = list(range(len(rows)))
        room = [min(num_draft_tokens, max_new_tokens - len(row.emitted) - 1) if i in going else 0 for i, row in enumerate(rows)]
        drafts = torch.empty(len(rows), 0, dtype=torch.long, device=target.device)
        if max(room) > 0:
            assert drafter is not None  # there is no room without draft tokens
            drafts = drafter.propose([row.emitted for row in rows], states, room, watch)
        with watch("verify"):
            hidden, drafted, choices = _verify(target, batch, rows, drafts, room)
            passes += 1
        with watch("accept"):
            places = torch.tensor([[len(row.emitted)] for row in rows], device=target.device)
            places = places + torch.arange(hidden.shape[1], device=target.device)
            states[torch.arange(len(rows), device=target.device)[:, None], places] = hidden  # of rejected draft tokens until overwritten
            for i in going:
                batch.lengths[i] += _accept(rows[i], drafted[i], choices[i])
    if num_draft_tokens:
        for proposer, row in zip(proposers, everyone, strict=True):
            proposer.finish(row.emitted)
    return BatchGeneration([r.emitted for r in everyone], [r.accepted for r in everyone], passes, watch.now() - start, watch.ms)


class Started(NamedTuple):
    """A batch whose prompts were read.

    Args:
        rows: each with its first token
        batch: the target's cache
        states: [b, n, d], the target's hidden states that emitted the tokens of each row; those of the first tokens so far
        drafter: for all rows; None without draft tokens
    """

    rows: list[Row]
    batch: RowBatch
    states: Tensor
    drafter: RowDrafter | None


def _read_prompts(
    target: Decoder,
    proposers: Sequence[Proposer],
    prompts: Sequence[Prompt],
    draft_prompts: Sequence[Prompt],
    num_draft_tokens: int,
    max_new_tokens: int,
    overlap: bool,
    watch: Stopwatch,
) -> Started:
    """Let the target and the drafters read their prompts; arguments as in `speculate_batch`."""
    selectors = [TokenSelector.of(target, prompt) for prompt in prompts]
    for proposer, selector in zip(proposers, selectors, strict=True):
        proposer.selector = selector
    overlap, most = overlap and num_draft_tokens > 0, max_new_tokens + num_draft_tokens
    overlapped = Stopwatch(target.device)  # made in this thread, because it waits for the device
    with drafter_reading(lambda: start_rows(proposers, draft_prompts, overlapped), target.device, overlap) as reading:
        with watch("target_prefill"):
            state, lengths = _prefill(target, prompts)
            first = most_likely([s.rules for s in selectors], target.lm_head(state.last), [[] for _ in prompts])
            batch = RowBatch(target, state, lengths, most)
            states = state.last.new_empty(len(prompts), most + 1, target.hidden_size)
            states[:, 0] = state.last
        if reading is not None:
            with watch("draft_prefill"):
                reading.result()
    rows = [Row(s, [token], []) for s, token in zip(selectors, first, strict=True)]
    if not num_draft_tokens:
        return Started(rows, batch, states, None)
    if reading is None:
        start_rows(proposers, draft_prompts, watch)
    for i, (proposer, prompt) in enumerate(zip(proposers, prompts, strict=True)):
        proposer.read_target_prompt(prompt, state.read_prompt(i, len(prompt.ids)), watch)
    return Started(rows, batch, states, drafter_of_rows(proposers))


def _verify(
    target: Decoder, batch: RowBatch, rows: Sequence[Row], drafts: Tensor, room: Sequence[int]
) -> tuple[Tensor, list[list[int]], list[list[int]]]:
    """Read the last token and the draft tokens of every row in one pass of the target. Reads one small tensor from the device.

    Args:
        target: the model whose text is reproduced
        batch: its cache; what is rejected later is overwritten
        rows: the unfinished rows, b of them
        drafts: [b, g] int64, from a `RowDrafter`
        room: maximum number of draft tokens of each row

    Returns:
        the target's hidden states [b, 1 + g, d], and for each row its draft tokens up to the first that ends its text, and the target's own
        token after the row's last token and after each of these
    """
    last = torch.tensor([[row.emitted[-1]] for row in rows], device=target.device)
    hidden = batch.step(torch.cat([last, drafts.clamp(min=0)], 1))
    logits = target.lm_head(hidden)
    read = torch.cat([drafts, logits.argmax(-1)], 1).tolist()
    drafted, choices = [], []
    for i, (row, found, most) in enumerate(zip(rows, read, room, strict=True)):
        own, said = found[: drafts.shape[1]], found[drafts.shape[1] :]
        stop = (at + (token != NO_TOKEN) for at, token in enumerate(own) if token == NO_TOKEN or token in row.selector.eos_ids)
        n = max(0, min(most, next(stop, len(own))))
        drafted.append(own[:n])
        if row.selector.rules.processors:
            said = row.selector.rules.scores(logits[i, : n + 1], row.emitted, own[:n]).argmax(-1).tolist()
        choices.append(said[: n + 1])
    return hidden, drafted, choices


def _accept(row: Row, drafted: list[int], choices: list[int]) -> int:
    """Append the accepted draft tokens and the target's token after them to the row, up to the end of its text.

    Args:
        row: extended in position
        drafted: its draft tokens
        choices: the target's own token at each position, one more than draft tokens

    Returns:
        the number of cache entries that stay valid: the last token and the accepted draft tokens
    """
    n = next((i for i, (d, c) in enumerate(zip(drafted, choices, strict=False)) if d != c), len(drafted))
    new = [*drafted[:n], choices[n]]
    new = new[: row.selector.rules.end_of(row.emitted, new)]
    row.emitted += new
    row.accepted.append(min(n, len(new)))
    return 1 + n


def _prefill(target: Decoder, prompts: Sequence[Prompt]) -> tuple[State, list[int]]:
    """Read prompts of unequal lengths, padded after their ends, which no real token attends to.

    Returns:
        the state, whose `last` is at the end of each prompt, and the number of positions of each

    Raises:
        UserError: the clips are not at the same positions
    """
    lengths = [len(p.ids) for p in prompts]
    longest, shared = max(lengths), min(lengths) - 1
    if not show_clips_alike([p.ids for p in prompts], target.placeholder, shared):
        raise UserError("a batch of prompts that ask before they show the clip, as this checkpoint's do; wanted --batch_size 1.")
    ids = torch.stack([torch.cat([p.ids, p.ids.new_zeros(longest - len(p.ids))]) for p in prompts]).to(target.device)
    state = target.prefill_encoded(ids[:, :shared], target.encode_vision(torch.stack([p.pixels for p in prompts])))
    begin, tails = state.prompt, target.step(state, ids[:, shared:])
    assert begin is not None and state.inputs is not None  # of a decoder with one tap
    state.prompt = torch.cat([begin, tails], 1)
    state.inputs = torch.cat([state.inputs, target.llama.embed_tokens(ids[:, shared:]).to(target.device)], 1)
    ends = torch.tensor(lengths, device=target.device)
    state.last = tails[torch.arange(len(prompts), device=target.device), ends - 1 - shared]
    return state, lengths
