"""The chained adapter's draft step with its products folded: nothing as wide as the target's states is touched between two drafts.

    once per adapter    A = W_state W_out    [w, w]     how the GRU's input reads an expected state
                        T = W_token E        [v, w]     token inputs
                        L = W W_out          [v, w]     draft logits straight from the hidden layer z before `out`
    once per prompt     keys and values of EventGPT's event states, folded with the query's and the mix layer's weights where that
                        is the smaller product
    every draft         m <- GRU(gelu(A z + a + T[token]), m);   z <- gelu(mix(m, attention(m)));   logits = L z + l
    once per round      expected states [g, d_target] = out(z), only where an acceptance rule, a trace or a score reads them

Exact up to rounding. Folded products are formed in float32 and stored in the adapter's dtype.

On a CPU the first call of an operator after a pass of the target finds its code and its weights in no cache, which costs more than the
operator. So drafting and reading use few operators, and gelu is not torch's, whose oneDNN primitive took 80 to 90 us there and 9 us warm:

    gelu(x) = sqrt(1/2) (y + y erf(y)),  y = sqrt(1/2) x      both factors are part of the folded weights
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from feature_alignment.adapters.chained import HEADS, ChainedAdapter, EventKeyValues


class EventContext(NamedTuple):
    """What one prompt's attention reads, for b prompts of e event tokens each.

    keys:   [b, heads * e, w] folded with the query, or [b, heads, e, w / heads]
    bias:   [b, heads * e] the folded query's bias over the keys; zeros otherwise
    values: [b, heads * e, w] folded with the mix layer, or [b, heads, e, w / heads]
    """

    keys: Tensor
    bias: Tensor
    values: Tensor


class Drafts(NamedTuple):
    """Greedy draft tokens of b rows.

    tokens:     [b, g] int64
    hidden:     [b, g, w], hidden layers that `FoldedChain.states` turns into expected states
    memory:     [b, w], the memory after all tokens but the last
    confidence: [b, g] float32, probability of each token; [b, 0] if it was not requested
    """

    tokens: Tensor
    hidden: Tensor
    memory: Tensor
    confidence: Tensor


class FoldedChain:
    """Drafts of a chained adapter through the target's head.

    Args:
        adapter: trained, with its scales folded in (`ChainedAdapter.folded`), on the device drafts are made on
        head: [v, d_target], the target's LM head
        embeddings: [v_in, d_target], the target's input embeddings of all shared ids
        ids: [n] int64, ascending: the only token ids that may be drafted; None for all
    """

    @torch.inference_mode()
    def __init__(self, adapter: ChainedAdapter, head: Tensor, embeddings: Tensor, ids: Tensor | None = None) -> None:
        if adapter.scale is not None:
            raise ValueError("the adapter still standardizes its inputs; pass adapter.folded()")
        if head.shape[1] != adapter.geometry["d_target"]:
            raise ValueError(f"the head reads states of width {head.shape[1]}, the adapter expects {adapter.geometry['d_target']}")
        self.adapter, dtype = adapter, adapter.out.weight.dtype
        self.ids = None if ids is None else ids.to(head.device)
        head = head if self.ids is None else head[self.ids]
        wide = torch.promote_types(dtype, torch.float32)
        # in bfloat16, erf near -1 would lose what gelu needs; on a GPU, gelu is one kernel
        self._has_split_gelu = head.device.type == "cpu" and dtype in (torch.float32, torch.float64)
        self._factor = f = 0.5**0.5 if self._has_split_gelu else 1.0
        w_out, b_out, w_state = (x.to(wide) for x in (adapter.out.weight, adapter.out.bias, adapter.state.weight))
        self.state = (w_state @ w_out * (f * f)).to(dtype)  # A
        self._tokens = (f * (adapter.tokens(embeddings) + (w_state @ b_out + adapter.state.bias))).to(dtype)  # T + a
        self._read_weight, self._read_bias = (f * w_state).to(dtype), (-f * w_state @ b_out).to(dtype)  # of true states, which hold b_out
        self.head = torch.cat([(rows.to(wide) @ w_out * f).to(dtype) for rows in head.split(8192)])  # L; parts bound the peak memory
        self.head_bias = torch.cat([(rows.to(wide) @ b_out).to(dtype) for rows in head.split(8192)])
        w_ih, w_hh, b_ih, b_hh = adapter.memory.all_weights[0]
        self._gru = [w_ih if f == 1 else w_ih * f, w_hh, b_ih, b_hh]
        width, e = adapter.geometry["width"], adapter.geometry["num_events"]
        self._mix_memory, self._mix_found = (part.contiguous() * f for part in adapter.mix.weight.split(width, dim=1))
        self._mix_bias = adapter.mix.bias * f
        # folded keys and values are `heads` times wider, and save the query's and half of the mix layer's product
        self.folds_attention = e * (HEADS - 1) < width

    @torch.inference_mode()
    def context(self, seen: EventKeyValues) -> EventContext:
        """What drafts after a prompt attend to.

        Args:
            seen: keys and values of EventGPT's event states, [b, heads, e, w / heads] each, from `ChainedAdapter.encode_events`
        """
        keys, values = seen
        b, _, e, d_head = keys.shape
        dtype, scale = keys.dtype, d_head**-0.5
        k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in seen)
        if not self.folds_attention:
            return EventContext((k * scale).to(dtype), keys.new_zeros(b, HEADS * e), values)
        query = self.adapter.query.weight.to(k.dtype).unflatten(0, (HEADS, d_head))
        mix = self._mix_found.to(k.dtype).unflatten(1, (HEADS, d_head))
        folded_keys = torch.einsum("bhed,hdw->bhew", k, query).flatten(1, 2) * scale
        bias = torch.einsum("bhed,hd->bhe", k, self.adapter.query.bias.to(k.dtype).view(HEADS, d_head)).flatten(1) * scale
        folded_values = torch.einsum("bhed,whd->bhew", v, mix).flatten(1, 2)
        return EventContext(folded_keys.to(dtype), bias.to(dtype), folded_values.to(dtype))

    def expect(self, memory: Tensor, context: EventContext) -> Tensor:
        """The hidden layer before `out`.

        Args:
            memory: [b, w], the memory of the text so far
            context: of the same b prompts

        Returns:
            z [b, w]; `self.adapter.out(z)` is the target state expected next.
        """
        mixed = F.linear(memory, self._mix_memory, self._mix_bias)
        b, width = memory.shape
        if self.folds_attention:
            scores = torch.baddbmm(context.bias[:, :, None], context.keys, memory[:, :, None])
            weights = scores.view(b, HEADS, -1).softmax(-1).view(b, 1, -1)
            return self._gelu(torch.baddbmm(mixed[:, None], weights, context.values)[:, 0])
        query = F.linear(memory, self.adapter.query.weight, self.adapter.query.bias).view(b * HEADS, 1, -1)
        weights = torch.bmm(query, context.keys.flatten(0, 1).transpose(1, 2)).softmax(-1)
        found = torch.bmm(weights, context.values.flatten(0, 1)).view(b, width)
        return self._gelu(mixed + F.linear(found, self._mix_found))

    def logits(self, z: Tensor) -> Tensor:
        """Draft logits [.., v] of hidden layers z [.., w], over the ids that may be drafted."""
        return F.linear(z, self.head, self.head_bias)

    def go_on(self, z: Tensor, token: Tensor, memory: Tensor) -> Tensor:
        """The memory [b, w] after one more draft token.

        Args:
            z: [b, w], what was expected and emitted the token
            token: [b] int64, the draft token
            memory: [b, w], the memory that z was expected from
        """
        x = self._gelu(torch.addmm(self._tokens.index_select(0, token), z, self.state.t()))
        return torch.gru_cell(x, memory, *self._gru)

    def read(self, states: Tensor, tokens: Tensor, memory: Tensor | None) -> Tensor:
        """Read verified tokens with the target's states that emitted them, in order: one product for all, then the GRU.

        Args:
            states: [b, n, d_target]
            tokens: [b, n] int64
            memory: [b, w], the memory of the text before; None at its beginning

        Returns:
            [b, n, w], the memory after each of them
        """
        b, n, d = states.shape
        x = F.linear(states.reshape(b * n, d), self._read_weight, self._read_bias)
        x = self._gelu(x + self._tokens.index_select(0, tokens.reshape(-1)))
        memory = x.new_zeros(b, x.shape[1]) if memory is None else memory
        if n == 1:
            return torch.gru_cell(x, memory, *self._gru)[:, None]
        memories: Tensor = torch.gru(x.view(b, n, -1), memory[None], self._gru, True, 1, 0.0, False, False, True)[0]
        return memories

    def draft(
        self,
        memory: Tensor,
        context: EventContext,
        num_tokens: int,
        with_confidence: bool = False,
        ends: Collection[int] | None = None,
        floor: float = 0.0,
    ) -> Drafts:
        """Greedy draft tokens of all rows. Nothing is read from the device, unless `ends` are given.

        Args:
            memory: [b, w], of the text so far
            context: of the same b prompts
            num_tokens: g, at least 1
            with_confidence: also compute the probability of each token
            ends: token ids that end a text; drafting stops when all rows have one. For a CPU, where reading a token is free
            floor: with `ends` and confidences, drafting also stops when the product of all confidences is below this
        """
        tokens: list[Tensor] = []
        hidden: list[Tensor] = []
        confidence: list[Tensor] = []
        going, chance = set(range(len(memory))), 1.0
        for i in range(num_tokens):
            if i:
                memory = self.go_on(hidden[-1], tokens[-1], memory)
            hidden.append(self.expect(memory, context))
            logits = self.logits(hidden[-1])
            best = logits.argmax(-1)
            tokens.append(best if self.ids is None else self.ids.index_select(0, best))
            if with_confidence:
                confidence.append(logits.float().softmax(-1).amax(-1))
            if ends is not None:
                going -= {row for row, token in enumerate(tokens[-1].tolist()) if token in ends}
                chance *= math.prod(confidence[-1].tolist()) if floor else 1.0
                if not going or chance < floor:
                    break
        chances = torch.stack(confidence, 1) if confidence else memory.new_empty(len(memory), 0, dtype=torch.float32)
        return Drafts(torch.stack(tokens, 1), torch.stack(hidden, 1), memory, chances)

    def is_chain_of(self, other: FoldedChain) -> bool:
        """Whether both draft with the same adapter over the same ids, so that one can draft for both."""
        same_ids = self.ids is other.ids or (self.ids is not None and other.ids is not None and torch.equal(self.ids, other.ids))
        return self.adapter is other.adapter and same_ids

    def states(self, z: Tensor) -> Tensor:
        """The expected target states [.., d_target] of hidden layers z [.., w]: one product for a whole round."""
        states: Tensor = self.adapter.out(z * self._factor)
        return states

    def _gelu(self, y: Tensor) -> Tensor:
        """gelu, up to the factors in the weights before and after it."""
        return torch.addcmul(y, y, torch.erf(y)) if self._has_split_gelu else F.gelu(y)
