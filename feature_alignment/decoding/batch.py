"""Speculative decoding of several prompts at once. Each row advances by its own accepted draft tokens.

One pass verifies the draft tokens of all rows. Rejected ones stay in the cache as holes that the mask hides; entries after the last token
of every row are cropped. Each row has its own positions, so a hole costs work and changes nothing:

    row 1 | prompt   | x d1 d2 d3 | x d1 ·  · |      accepted 3, then 1
    row 2 | prompt _ | x ·  ·  ·  | x d1 d2 · |      accepted 0, then 2; _ pads the shorter prompt, · is a hole
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from feature_alignment.decoding.proposers import Proposer
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.decoding.token_selection import TokenSelector
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.state import Prompt, State


@dataclass
class Row:
    """One prompt.

    Args:
        proposer: its drafter
        selector: its token selector
        emitted: token ids of its text
        states: [n, d_target], the target's hidden states that emitted them
        accepted: number of accepted draft tokens in each round
    """

    proposer: Proposer
    selector: TokenSelector
    emitted: list[int]
    states: Tensor
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
) -> BatchGeneration:
    """Decode several prompts under the token rule; each text equals greedy decoding of its prompt alone. Finished rows leave the batch.

    Args:
        target: the model whose text is reproduced
        proposers: one drafter per prompt, not shared
        prompts: the target's
        draft_prompts: the drafters', of the same samples
        num_draft_tokens: draft length; 0 is plain decoding of a batch
        max_new_tokens: longest answer, EOS included

    Raises:
        ValueError: unequal numbers of prompts and drafters
    """
    if not len(proposers) == len(prompts) == len(draft_prompts) > 0:
        raise ValueError(
            f"{len(prompts)} prompts, {len(draft_prompts)} draft prompts and {len(proposers)} proposers; expected as many of each"
        )
    watch = Stopwatch(target.device)
    start = watch.now()
    with watch("target_prefill"):
        state, valid, position = _prefill(target, prompts)
        selectors = [TokenSelector.of(target, prompt) for prompt in prompts]
        first = [int(s.select(logits, []).token) for s, logits in zip(selectors, target.lm_head(state.last)[:, None], strict=True)]
    everyone = [Row(p, s, [token], h[None], []) for p, s, token, h in zip(proposers, selectors, first, state.last, strict=True)]
    if num_draft_tokens:
        for i, (row, prompt, draft_prompt) in enumerate(zip(everyone, prompts, draft_prompts, strict=True)):
            row.proposer.selector = row.selector
            row.proposer.start(draft_prompt, watch)
            row.proposer.read_target_prompt(prompt, state.read_prompt(i, len(prompt.ids)), watch)
    rows, passes = everyone, 0
    while True:
        going = [i for i, row in enumerate(rows) if not row.has_ended and len(row.emitted) < max_new_tokens]
        if not going:
            break
        if len(going) < len(rows):
            with watch("rollback"):
                rows, index = [rows[i] for i in going], torch.tensor(going, device=target.device)
                assert isinstance(state.cache, DynamicCache)  # no step over fixed buffers takes a batch
                state.cache.batch_select_indices(index)
                valid, position = valid[index], position[index]
        drafts = []
        for row in rows:
            room = min(num_draft_tokens, max_new_tokens - len(row.emitted) - 1)
            drafts.append(row.proposer.propose(row.emitted, row.states, room, watch).token_ids.tolist() if room > 0 else [])
        with watch("verify"):
            hidden, choices = _verify(target, state, rows, drafts, valid, position)
            passes += 1
        with watch("accept"):
            kept = [_accept(*of_row) for of_row in zip(rows, drafts, choices, hidden, strict=True)]
        with watch("rollback"):
            kept_here = torch.tensor(kept, device=target.device)[:, None]
            target.rollback(state, hidden.shape[1] - max(kept))
            valid = torch.cat([valid, (torch.arange(max(kept), device=target.device) < kept_here).long()], 1)
            position = position + kept_here
    if num_draft_tokens:
        for row in everyone:
            row.proposer.finish(row.emitted)
    return BatchGeneration([r.emitted for r in everyone], [r.accepted for r in everyone], passes, watch.now() - start, watch.ms)


def _verify(
    target: Decoder, state: State, rows: Sequence[Row], drafts: Sequence[list[int]], valid: Tensor, position: Tensor
) -> tuple[Tensor, list[list[int]]]:
    """Read the last token and the draft tokens of every row in one pass of the target.

    Args:
        target: the model whose text is reproduced
        state: its cache, which gains one entry for each position of the block
        rows: the unfinished rows, b of them
        drafts: draft tokens of each row; shorter drafts are padded, and the mask hides the padding
        valid: [b, s] int64, 1 where a cache entry is valid
        position: [b, 1] int64, position of each row's last token

    Returns:
        the target's hidden states [b, w, d] with w = 1 + the longest draft, and of each row the target's own token after its last token
        and after each draft token
    """
    width = 1 + max(map(len, drafts))
    blocks = [[row.emitted[-1], *d] for row, d in zip(rows, drafts, strict=True)]
    block = torch.tensor([[*b, *[0] * (width - len(b))] for b in blocks], device=target.device)
    in_block = torch.arange(width, device=target.device) < torch.tensor([[len(b)] for b in blocks], device=target.device)
    where = {
        "position_ids": position + torch.arange(width, device=target.device),
        "attention_mask": torch.cat([valid, in_block.long()], 1),
    }
    hidden = target.step(state, block, **where)
    logits = target.lm_head(hidden)
    choices = [
        row.selector.rules.scores(scores[: len(drafted) + 1], row.emitted, drafted).argmax(-1).tolist()
        for row, drafted, scores in zip(rows, drafts, logits, strict=True)
    ]
    return hidden, choices


def _accept(row: Row, drafted: list[int], choices: list[int], hidden: Tensor) -> int:
    """Append the accepted draft tokens and the target's token after them to the row, up to the end of its text.

    Args:
        row: extended in position
        drafted: its draft tokens
        choices: the target's own token at each position, one more than draft tokens
        hidden: [w, d], the target's hidden states that gave `choices`

    Returns:
        the number of cache entries that stay valid: the last token and the accepted draft tokens
    """
    n = next((i for i, (d, c) in enumerate(zip(drafted, choices, strict=False)) if d != c), len(drafted))
    new = [*drafted[:n], choices[n]]
    new = new[: row.selector.rules.end_of(row.emitted, new)]
    row.emitted += new
    row.states = torch.cat([row.states, hidden[: len(new)]])
    row.accepted.append(min(n, len(new)))
    return 1 + n


def _prefill(target: Decoder, prompts: Sequence[Prompt]) -> tuple[State, Tensor, Tensor]:
    """Read prompts of unequal lengths, padded after their ends, which no real token attends to.

    Returns:
        the state, whose `last` is at the end of each prompt; which cache entries are valid [b, s]; each row's next position [b, 1]
    """
    ends = torch.tensor([[len(p.ids)] for p in prompts], device=target.device)
    longest, shared = int(ends.max()), int(ends.min()) - 1
    ids = torch.stack([torch.cat([p.ids, p.ids.new_zeros(longest - len(p.ids))]) for p in prompts]).to(target.device)
    state = target.prefill_encoded(ids[:, :shared], target.encode_vision(torch.stack([p.pixels for p in prompts])))
    begin, tails = state.prompt, target.step(state, ids[:, shared:])
    assert begin is not None and state.inputs is not None  # of a decoder with one tap
    state.prompt = torch.cat([begin, tails], 1)
    state.inputs = torch.cat([state.inputs, target.llama.embed_tokens(ids[:, shared:]).to(target.device)], 1)
    state.last = tails[torch.arange(len(prompts)), ends[:, 0] - 1 - shared]
    return state, (torch.arange(longest, device=target.device) < ends).long(), ends
