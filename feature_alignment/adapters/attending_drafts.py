"""Drafting with the attending adapter, one text at a time: folded products and a key-value cache with free rollback.

once per adapter    T = token inputs of all embeddings [v, w];  L = W W_out [ids, w], draft logits straight from the output
once per prompt     keys and values of EventGPT's event states and of the target's prompt states
every draft token   one layer over [1, w], then L

cache entries       | prompt | verified tokens | draft tokens ...     rollback: the next draft token overwrites the rejected ones
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from feature_alignment.adapters import tables
from feature_alignment.adapters.attending import HEADS, AttendingAdapter, KeysValues, rotated

ROOM = 64  # entries by which the cache grows


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
        self.adapter, dtype = adapter, adapter.out.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        rows, out = head[adapter.ids].to(wide), adapter.out
        self.head = (rows @ out.weight.to(wide)).to(dtype)
        self.head_bias = (rows @ out.bias.to(wide)).to(dtype)
        self.tokens = torch.cat([adapter.read_tokens(embeddings), embeddings.new_zeros(1, adapter.width)])  # the last: id -1, no token
        self.ids, self.vocab_size = adapter.ids, len(head)
        self.columns = {token: column for column, token in enumerate(adapter.ids.tolist())}
        self.table = tables.NGramTable(adapter.table)
        self._cache = KeysValues(*(self.head.new_empty(1, HEADS, ROOM, adapter.width // HEADS) for _ in range(2)))

    def start(self, events: Tensor) -> None:
        """Start a new text with EventGPT's event states [1, e, d_event]."""
        self._events, self._begin = self.adapter.read_events(events), 0

    def read_prompt(self, states: Tensor, inputs: Tensor) -> None:
        """Cache the end of the target's prompt.

        Args:
            states: [p, d_target], on the last prompt positions except the very last
            inputs: [p, d_target], the target's input embedding after each of these positions
        """
        if "prompt" in self.adapter.without or not len(states):
            self._begin = 0
            return
        self._begin = len(states)
        self._put(0, self.adapter.keys(self.adapter.prompt_inputs(states[None], inputs[None]), self._places(-len(states), len(states))))

    def read(self, position: int, states: Tensor, text: Tensor, proposed: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
        """Cache n verified tokens; returns the output [1, 1, w] at the last one.

        Args:
            position: position of the first in the answer
            states: [n, d_target], the target states that emitted them
            text: [n + 1] int64, the token before them (-1 for none) and the tokens
            proposed: n lists of candidates for the next token
        """
        inputs = self._inputs(self.adapter.read_states(states), text, proposed)
        if len(states) > 1:
            self._put(self._begin + position, self.adapter.keys(inputs[:, :-1], self._places(position, len(states) - 1)))
        return self._forward_one(position + len(states) - 1, inputs[:, -1:])

    def go_on(self, position: int, output: Tensor, text: Tensor, proposed: Sequence[tuple[int, int]]) -> Tensor:
        """Cache one more draft token; returns the output [1, 1, w] after it.

        Args:
            position: its position in the answer
            output: [1, 1, w], the output that drafted it
            text: [2] int64, the token before it and the draft token
            proposed: candidates for the next token
        """
        return self._forward_one(position, self._inputs(self.adapter.own(output[0]), text, [proposed]))

    def logits(self, output: Tensor, proposed: Sequence[tuple[int, int]]) -> Tensor:
        """Draft logits [1, ids] of an output [1, 1, w] whose input included the candidates `proposed`."""
        logits = F.linear(output[0], self.head, self.head_bias)
        if "candidates" not in self.adapter.without:
            columns = [self.columns.get(token, -1) for token, _ in proposed]
            if max(columns) >= 0:
                bonus = self.adapter.bonus(output)[0, 0]
                for source, column in enumerate(columns):
                    if column >= 0:
                        logits[0, column] += bonus[source]
        return logits

    def over_all_ids(self, logits: Tensor) -> Tensor:
        """Draft logits [1, ids] as logits over all shared token ids [1, v]; the others get probability 0."""
        return logits.new_full((1, self.vocab_size), torch.finfo(logits.dtype).min / 4).index_copy(1, self.ids, logits)

    def states(self, outputs: Sequence[Tensor]) -> Tensor:
        """The predicted target states [g, d_target] of g outputs."""
        return self.adapter.expect(torch.cat(list(outputs))[:, 0])

    def candidates(self, question: int, prompt: Sequence[int], answer: Sequence[int]) -> list[tuple[int, int]]:
        """Candidates for the next token; see `tables.candidates`."""
        return tables.candidates(self.table, question, prompt, answer)

    def _places(self, first: int, n: int) -> Tensor:
        return torch.arange(first, first + n, device=self.head.device) + self.adapter.num_prompt

    def _inputs(self, states: Tensor, text: Tensor, proposed: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
        tokens = self.tokens[text]
        given: Tensor | float = 0.0
        if "candidates" not in self.adapter.without:
            ids, buckets = torch.tensor(proposed, device=self.head.device).unbind(-1)
            given = self.adapter.read_candidates(self.tokens[ids], buckets)
        return self.adapter.inputs(states, tokens[1:], tokens[:-1], given)[None]

    def _forward_one(self, position: int, inputs: Tensor) -> Tensor:
        """`AttendingAdapter.forward` for one position after all cached ones, in few small products."""
        a, end = self.adapter, self._begin + position + 1
        queries, keys, values = F.linear(a.attention_norm(inputs[0]), a.attention.weight).view(3, HEADS, 1, -1)
        positions = self._places(position, 1)
        self._put(self._begin + position, KeysValues(rotated(keys[None], positions), values[None]))
        scores = rotated(queries[None], positions)[0] @ self._cache.keys[0, :, :end].transpose(1, 2)
        of_events = queries @ self._events.keys[0].transpose(1, 2)
        weights = (torch.cat([of_events, scores], -1) * queries.shape[-1] ** -0.5).softmax(-1)
        e = of_events.shape[-1]
        found = torch.baddbmm(weights[..., :e] @ self._events.values[0], weights[..., e:], self._cache.values[0, :, :end])
        x = torch.addmm(inputs[0], found.view(1, -1), a.mix.weight.T)
        output: Tensor = a.output_norm(x + a.down(F.gelu(a.up(a.mlp_norm(x)))))
        return output[None]

    def _put(self, first: int, new: KeysValues) -> None:
        """Write keys and values to the cache from entry `first` on, over whatever it holds there."""
        n, room = new.keys.shape[2], self._cache.keys.shape[2]
        if first + n > room:
            self._cache = KeysValues(*(F.pad(x, (0, 0, 0, first + n + ROOM - room)) for x in self._cache))
        for position, x in zip(self._cache, new, strict=True):
            position[:, :, first : first + n] = x
