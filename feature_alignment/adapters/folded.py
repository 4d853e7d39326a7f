"""The chained adapter's draft step with its products folded: nothing as wide as the target's states is touched between two drafts.

    once per adapter    A = W_state W_out    [w, w]     how the GRU's input reads an expected state
                        T = W_token E        [v, w]     token inputs
                        L = W W_out          [v, w]     draft logits straight from the hidden layer z before `out`
    once per prompt     keys and values of EventGPT's event states, folded with the query's and the mix layer's weights where that
                        is the smaller product
    every draft         m <- GRU(gelu(A z + a + T[token]), m);   z <- gelu(mix(m, attention(m)));   logits = L z + l
    once per round      expected states [g, d_target] = out(z), only where an acceptance rule, a trace or a score reads them

Exact up to rounding. Folded products are formed in float32 and stored in the adapter's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class _GRU:
    """Weights of the recurrent cell, in the order torch.gru_cell takes them."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor
    b_hh: Tensor


class FoldedChain:
    """Drafts of a chained adapter through the target's head.

    Args:
        adapter: trained, with its scales folded in (`ChainedAdapter.folded`), on the device drafts are made on
        head: [v, d_target], rows of the target's LM head for the ids that may be drafted
        embeddings: [v_in, d_target], the target's input embeddings of all shared ids
    """

    @torch.inference_mode()
    def __init__(self, adapter: ChainedAdapter, head: Tensor, embeddings: Tensor) -> None:
        if adapter.scale is not None:
            raise ValueError("the adapter still standardizes its inputs; pass adapter.folded()")
        if head.shape[1] != adapter.geometry["d_target"]:
            raise ValueError(f"the head reads states of width {head.shape[1]}, the adapter expects {adapter.geometry['d_target']}")
        self.adapter, dtype = adapter, adapter.out.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        w_out, b_out, w_state = (x.to(wide) for x in (adapter.out.weight, adapter.out.bias, adapter.state.weight))
        self.state = (w_state @ w_out).to(dtype)  # A
        self.state_bias = (w_state @ b_out + adapter.state.bias).to(dtype)
        self.tokens = adapter.tokens(embeddings)  # T
        self.head = torch.cat([(rows.to(wide) @ w_out).to(dtype) for rows in head.split(8192)])  # L; rows in parts bound the peak memory
        self.head_bias = torch.cat([(rows.to(wide) @ b_out).to(dtype) for rows in head.split(8192)])
        self.gru = _GRU(*adapter.memory.all_weights[0])
        width, e = adapter.geometry["width"], adapter.geometry["num_events"]
        self.mix_memory, self.mix_found = adapter.mix.weight.split(width, dim=1)
        self.mix_memory = self.mix_memory.contiguous()
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
        mix = self.mix_found.to(k.dtype).unflatten(1, (HEADS, d_head))
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
        mixed = F.linear(memory, self.mix_memory, self.adapter.mix.bias)
        b, width = memory.shape
        if self.folds_attention:
            scores = torch.baddbmm(context.bias[:, :, None], context.keys, memory[:, :, None])
            weights = scores.view(b, HEADS, -1).softmax(-1).view(b, 1, -1)
            return F.gelu(torch.baddbmm(mixed[:, None], weights, context.values)[:, 0])
        query = F.linear(memory, self.adapter.query.weight, self.adapter.query.bias).view(b * HEADS, 1, -1)
        weights = torch.bmm(query, context.keys.flatten(0, 1).transpose(1, 2)).softmax(-1)
        found = torch.bmm(weights, context.values.flatten(0, 1)).view(b, width)
        return F.gelu(mixed + F.linear(found, self.mix_found))

    def logits(self, z: Tensor) -> Tensor:
        """Draft logits [.., v] of hidden layers z [.., w]."""
        return F.linear(z, self.head, self.head_bias)

    def go_on(self, z: Tensor, token: Tensor, memory: Tensor) -> Tensor:
        """The memory [b, w] after one more draft token.

        Args:
            z: [b, w], what was expected and emitted the token
            token: [b] int64, the draft token
            memory: [b, w], the memory that z was expected from
        """
        x = F.gelu(F.linear(z, self.state, self.state_bias) + self.tokens[token])
        gru = self.gru
        return torch.gru_cell(x, memory, gru.w_ih, gru.w_hh, gru.b_ih, gru.b_hh)

    def states(self, z: Tensor) -> Tensor:
        """The expected target states [.., d_target] of hidden layers z [.., w]: one product for a whole round."""
        states: Tensor = self.adapter.out(z)
        return states
