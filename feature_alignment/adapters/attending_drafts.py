"""Drafting with the attending adapter, one text at a time: folded products and a key-value cache with free rollback.

    once per adapter    L = W W_out [ids, w], draft logits straight from the output; scales of the norms inside the weights after them
    once per token id   what it adds to an input as the token, as the one before it, and as each source's candidate [TABLES, w]
    once per prompt     keys and values of EventGPT's event states and of the target's prompt states
    every draft token   one layer over [1, w], then L

    cache entries       | events | prompt | verified tokens | draft tokens ...     rollback: the next token overwrites rejected ones

On a CPU a pass of the target evicts operators and weights from every cache, and an operator that is cold takes ten times as long. So a
draft token runs few operators over few weights: lookups replace four products, a norm is a number that scales the next product, and gelu
is split as in `folded`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from feature_alignment.adapters import tables
from feature_alignment.adapters.attending import EPS, HEADS, AttendingAdapter, rotations

ROOM = 64  # entries by which the cache grows
TABLES = 2 + tables.SOURCES  # ways in which a token id is part of an input

Proposed = Sequence[tuple[int, int]]  # (token id, bucket) of each source


class FoldedAttending:
    """The adapter with its products folded, and the cache of the current text.

    Args:
        adapter: trained, with its scales folded, on the device of drafting
        head: [v, d_target], W
        embeddings: [v, d_target], the target's
    """

    @torch.inference_mode()
    def __init__(self, adapter: AttendingAdapter, head: Tensor, embeddings: Tensor) -> None:
        if adapter.scale is not None:
            raise ValueError("the adapter still standardizes its inputs; pass adapter.folded()")
        self.adapter, self._embeddings, a = adapter, embeddings, adapter
        self._dtype, width = a.out.weight.dtype, a.width
        self._wide = wide = torch.promote_types(self._dtype, torch.float32)
        self._is_split = head.device.type == "cpu" and wide == self._dtype  # reads numbers for free, and gelu as in `folded`
        self._reads_candidates = "candidates" not in a.without
        f = 0.5**0.5 if self._is_split else 1.0
        of_attention, of_mlp, of_output = (n.weight.to(wide) for n in (a.attention_norm, a.mlp_norm, a.output_norm))
        rows, out = head[a.ids].to(wide), a.out
        parts = [(rows @ out.weight.to(wide), rows @ out.bias.to(wide))]
        if self._reads_candidates:  # a column for candidates that are not drafted, and the gates
            parts += [(rows.new_zeros(1, width), rows.new_zeros(1)), (a.gate.weight.to(wide), a.gate.bias.to(wide))]
        weights, biases = zip(*parts, strict=True)
        self._head, self._head_bias = self._kept(torch.cat(weights) * of_output), self._kept(torch.cat(biases))
        scale = torch.ones(3 * width, 1, device=head.device, dtype=wide)
        scale[:width] = (width // HEADS) ** -0.5  # of the scores
        self._attention = self._kept(a.attention.weight.to(wide) * of_attention * scale)
        self._up, self._up_bias = self._kept(a.up.weight.to(wide) * of_mlp * f), self._kept(a.up.bias.to(wide) * f)
        self._down, self._own = self._kept(a.down.weight.to(wide) * f), self._kept(a.own.weight.to(wide) * of_output)
        self._mix, self._down_bias = self._kept(a.mix.weight), a.down.bias.detach()
        self._state = self._kept(a.state.weight)
        self._state_bias = a.state.bias - a.own.bias  # the token's part of an input holds that of `own`
        self.ids, self.vocab_size = a.ids, len(head)
        self.columns = {token: column for column, token in enumerate(a.ids.tolist())}
        self.table = tables.NGramTable(a.table)
        self._first_of: dict[int, int] = {}  # token id -> the first of its TABLES rows in `_parts`, which begins with the buckets
        self._parts, self._num_parts = a.bucket.weight.detach(), tables.BUCKETS
        self._add_tokens([tables.NO_TOKEN, *a.ids.tolist()])
        self._no_bias = self._head.new_zeros(1)
        self._num_events = self._begin = 0
        self._cache = self._head.new_empty(0, 2, HEADS, width // HEADS)  # keys and values
        self._reserve(ROOM)

    def start(self, events: Tensor) -> None:
        """Start a new text with EventGPT's event states [1, e, d_event]."""
        keys, values = self.adapter.read_events(events)
        self._num_events = self._begin = keys.shape[2]
        self._put(0, torch.stack([keys[0], values[0]]).permute(2, 0, 1, 3))
        self._of_events = self._keys[:, :, : self._begin].contiguous()

    def read_prompt(self, states: Tensor, inputs: Tensor) -> None:
        """Cache the end of the target's prompt.

        Args:
            states: [p, d_target], on the last prompt positions except the very last
            inputs: [p, d_target], the target's input embedding after each of these positions
        """
        self._begin = self._num_events
        if not self.adapter.reads_prompt or not len(states):
            return
        a, p = self.adapter, len(states)
        places = torch.arange(a.num_prompt - p, a.num_prompt, device=states.device)
        keys, values = a.keys(a.prompt_inputs(states[None], inputs[None]), places)
        self._put(self._begin, torch.stack([keys[0], values[0]]).permute(2, 0, 1, 3))
        self._begin += p

    def read(self, position: int, states: Tensor, text: Sequence[int], proposed: Sequence[Proposed]) -> Tensor:
        """Cache n verified tokens; returns the output [1, w] at the last one.

        Args:
            position: position of the first in the answer
            states: [n, d_target], the target states that emitted them
            text: the token before them (-1 for none) and the n tokens
            proposed: n lists of candidates for the next token
        """
        of_states = torch.addmm(self._state_bias, states, self._state)
        return self._layer(position, of_states.add_(self._rest(text, proposed)))

    def go_on(self, position: int, output: Tensor, text: Sequence[int], proposed: Proposed) -> Tensor:
        """Cache one more draft token; returns the output [1, w] after it.

        Args:
            position: its position in the answer
            output: [1, w], the output that drafted it
            text: the token before it and the draft token
            proposed: candidates for the next token
        """
        return self._layer(position, torch.addmm(self._rest(text, [proposed]), output, self._own))

    def logits(self, output: Tensor, proposed: Proposed) -> Tensor:
        """Draft logits [1, ids] of an output [1, w] whose input included the candidates `proposed`."""
        found, n = torch.addmm(self._head_bias, output, self._head), len(self.ids)
        if self._reads_candidates:
            columns = torch.tensor([self.columns.get(token, n) for token, _ in proposed], device=found.device)
            found[0, : n + 1].index_add_(0, columns, found[0, n + 1 :])
        return found[:, :n]

    def over_all_ids(self, logits: Tensor) -> Tensor:
        """Draft logits [1, ids] as logits over all shared token ids [1, v]; the others get probability 0."""
        return logits.new_full((1, self.vocab_size), torch.finfo(logits.dtype).min / 4).index_copy(1, self.ids, logits)

    def states(self, outputs: Sequence[Tensor]) -> Tensor:
        """The predicted target states [g, d_target] of g outputs."""
        return self.adapter.expect(torch.cat(list(outputs)) * self.adapter.output_norm.weight)

    def candidates(self, question: int, prompt: Sequence[int], answer: Sequence[int]) -> list[tuple[int, int]]:
        """Candidates for the next token; see `tables.candidates`."""
        return tables.candidates(self.table, question, prompt, answer)

    # ---- inputs

    def _kept(self, weight: Tensor) -> Tensor:
        """A weight [out, in] as [in, out], the layout in which a product of one row reads it faster; a bias as it is."""
        return weight.detach().to(self._dtype).t().contiguous()

    def _add_tokens(self, new: Sequence[int]) -> None:
        """Compute what token ids add to an input."""
        a, ids = self.adapter, torch.tensor(new, device=self.ids.device)
        weight, bias, own_bias, previous, candidate = (
            x.to(self._wide) for x in (a.token.weight, a.token.bias, a.own.bias, a.previous.weight, a.candidate.weight)
        )
        tokens = F.linear(self._embeddings[ids.clamp(min=0)].to(self._wide), weight, bias) * (ids >= 0)[:, None]
        maps = previous, *candidate.split(a.width, dim=1)
        parts = torch.stack([tokens + own_bias, *(F.linear(tokens, x) for x in maps)], 1)
        begin, end = self._num_parts, self._num_parts + TABLES * len(new)
        if end > len(self._parts):
            self._parts = F.pad(self._parts[:begin], (0, 0, 0, 2 * end - begin))
        self._parts[begin:end] = parts.flatten(0, 1)
        self._first_of.update(zip(new, range(begin, end, TABLES), strict=True))
        self._num_parts = end

    def _rest(self, text: Sequence[int], proposed: Sequence[Proposed]) -> Tensor:
        """The inputs [n, w] without what comes from the states; arguments as in `read`."""
        first_of = self._first_of
        try:
            tokens = [first_of[token] for token in text]
            rows = [[token, before + 1] for before, token in pairwise(tokens)]
            if self._reads_candidates:
                for row, found in zip(rows, proposed, strict=True):
                    for source, (token, bucket) in enumerate(found, start=2):
                        row += first_of[token] + source, bucket
        except KeyError:
            asked = {*text, *(token for found in proposed for token, _ in found)}
            self._add_tokens(sorted(asked - first_of.keys()))
            return self._rest(text, proposed)
        n, k = len(rows), len(rows[0])
        parts = self._parts.index_select(0, torch.tensor(rows, device=self._parts.device).view(-1))
        return parts.view(n, k, -1).sum(1)

    # ---- the layer

    def _layer(self, position: int, inputs: Tensor) -> Tensor:
        """`AttendingAdapter.forward` for n inputs [n, w] from a position on; returns the output [1, w] at the last one."""
        n, w = inputs.shape
        begin, end = self._begin + position, self._begin + position + n
        self._reserve(end)
        found = self._normed_product(inputs, self._attention, self._no_bias).view(n, 3, HEADS, -1)
        first = self.adapter.num_prompt + position
        swapped = found.view(n, 3, HEADS, 2, -1).flip(3).view(found.shape)
        turned = torch.addcmul(found * self._cos[first : first + n], swapped, self._sin[first : first + n])
        self._cache[begin:end] = turned[:, 1:]
        scores = torch.bmm(turned[-1, 0].unsqueeze(1), self._keys.narrow(2, self._num_events, end - self._num_events))
        if self._num_events:
            scores = torch.cat([torch.bmm(found[-1, 0].unsqueeze(1), self._of_events), scores], -1)
        read = torch.bmm(scores.softmax(-1), self._values.narrow(1, 0, end)).view(1, w)
        x = torch.addmm(inputs[-1:], read, self._mix)
        y = self._normed_product(x, self._up, self._up_bias)
        y = torch.addcmul(y, y, torch.erf(y)) if self._is_split else F.gelu(y)
        return self._normed(torch.addmm(self._down_bias, y, self._down).add_(x))

    def _normed_product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Linear layer of x [n, w] divided by its root mean square."""
        if len(x) > 1 or not self._is_split:
            return torch.addmm(bias, F.rms_norm(x, x.shape[1:], None, EPS), weight)
        return torch.addmm(bias, x, weight, alpha=_inverse_rms(x))

    def _normed(self, x: Tensor) -> Tensor:
        """Divide x [1, w] by its root mean square, in place where that is possible."""
        return x.mul_(_inverse_rms(x)) if self._is_split else F.rms_norm(x, x.shape[1:], None, EPS)

    def _put(self, first: int, new: Tensor) -> None:
        """Write keys and values [n, 2, heads, w / heads] to the cache from entry `first` on, over whatever it holds there."""
        self._reserve(first + len(new))
        self._cache[first : first + len(new)] = new

    def _reserve(self, size: int) -> None:
        """Make room for so many entries, and for the rotations of queries, keys and (none) values at their positions."""
        if size <= len(self._cache):
            return
        self._cache = F.pad(self._cache, (0, 0, 0, 0, 0, 0, 0, size + ROOM - len(self._cache)))
        self._keys, self._values = self._cache[:, 0].permute(1, 2, 0), self._cache[:, 1].transpose(0, 1)
        entries, _, _, d = self._cache.shape
        cos, sin = rotations(d // 2, self._cache.device, self._cache.dtype, self.adapter.num_prompt + entries)
        turning, still = (torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)), (cos.new_ones(1, d), sin.new_zeros(1, d))
        self._cos, self._sin = (torch.stack([x, x, y.expand_as(x)], 1)[:, :, None] for x, y in zip(turning, still, strict=True))


def _inverse_rms(x: Tensor) -> float:
    """1 / root mean square of x [1, w]."""
    return 1 / math.sqrt(float(torch.dot(x[0], x[0])) / x.shape[1] + EPS)
