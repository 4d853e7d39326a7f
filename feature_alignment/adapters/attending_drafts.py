"""The attending adapter at drafting: one text at a time, over a cache of its own that goes back for free.

once per adapter    T = the token map of all embeddings [v, w];  L = W W_out [ids, w], draft logits straight from an output
once per prompt     keys and values of EventGPT's event states and of the target's prompt states
every draft         one layer over [1, w], then L

places in the cache | prompt, ending at num_prompt - 1 | verified tokens | drafts …     going back: the next draft overwrites
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from feature_alignment.adapters import tables
from feature_alignment.adapters.attending import HEADS, AttendingAdapter, Keys, rotated

ROOM = 64  # places that a cache grows by


class FoldedAttending:
    """
    Args:
        adapter: trained, with its scales in its weights, on the device drafts are made on
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
        self._cache = Keys(*(self.head.new_empty(1, HEADS, ROOM, adapter.width // HEADS) for _ in range(2)))

    def start(self, events: Tensor) -> None:
        """Forget all, and read EventGPT's event states [1, e, d_event]."""
        self._events, self._begin = self.adapter.read_events(events), 0

    def read_prompt(self, states: Tensor, ids: Sequence[int]) -> None:
        """Read the target's states [p, d_target] on the prompt's end without its last position; ids: p + 1, the last one included."""
        if "prompt" in self.adapter.without or not len(states):
            self._begin = 0
            return
        tokens = self.tokens[torch.tensor(ids, device=self.head.device)]
        inputs = self.adapter.inputs(self.adapter.read_states(states), tokens[1:], tokens[:-1])[None]
        self._begin = len(states)
        self._put(0, self.adapter.keys(inputs, self._places(-len(states), len(states))))

    def read(self, place: int, states: Tensor, text: Tensor, proposed: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
        """Read verified tokens; returns the output [1, 1, w] at the last of them.

        Args:
            place: of the first in the text
            states: [n, d_target], the target's that emitted them
            text: [n + 1] int64, the token before them (-1: none) and they themselves
            proposed: n times, what the tables propose for the token after
        """
        inputs = self._inputs(self.adapter.read_states(states), text, proposed)
        if len(states) > 1:
            self._put(self._begin + place, self.adapter.keys(inputs[:, :-1], self._places(place, len(states) - 1)))
        return self._think(place + len(states) - 1, inputs[:, -1:])

    def go_on(self, place: int, output: Tensor, text: Tensor, proposed: Sequence[tuple[int, int]]) -> Tensor:
        """The output [1, 1, w] behind one more draft: it stands at `place`, and `output` is what drafted it.

        text: [2], the token before it and the draft token
        """
        return self._think(place, self._inputs(self.adapter.own(output[0]), text, [proposed]))

    def logits(self, output: Tensor, proposed: Sequence[tuple[int, int]]) -> Tensor:
        """Logits [1, ids] over the ids that may be drafted, of an output [1, 1, w] whose input knew `proposed`."""
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
        """Logits [1, ids] as logits over the target's shared ids [1, v]: the others are never drafted."""
        return logits.new_full((1, self.vocab_size), torch.finfo(logits.dtype).min / 4).index_copy(1, self.ids, logits)

    def states(self, outputs: Sequence[Tensor]) -> Tensor:
        """The target states [g, d_target] that g outputs expect."""
        return self.adapter.expect(torch.cat(list(outputs))[:, 0])

    def candidates(self, question: int, prompt: Sequence[int], answer: Sequence[int]) -> list[tuple[int, int]]:
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

    def _think(self, place: int, inputs: Tensor) -> Tensor:
        """`AttendingAdapter.forward` for one place behind all of the cache, in few small products."""
        a, end = self.adapter, self._begin + place + 1
        queries, keys, values = F.linear(a.read_norm(inputs[0]), a.attention.weight).view(3, HEADS, 1, -1)
        places = self._places(place, 1)
        self._put(self._begin + place, Keys(rotated(keys[None], places), values[None]))
        scores = rotated(queries[None], places)[0] @ self._cache.keys[0, :, :end].transpose(1, 2)
        of_events = queries @ self._events.keys[0].transpose(1, 2)
        weights = (torch.cat([of_events, scores], -1) * queries.shape[-1] ** -0.5).softmax(-1)
        e = of_events.shape[-1]
        found = torch.baddbmm(weights[..., :e] @ self._events.values[0], weights[..., e:], self._cache.values[0, :, :end])
        x = torch.addmm(inputs[0], found.view(1, -1), a.mix.weight.T)
        return a.said_norm(x + a.down(F.gelu(a.up(a.think_norm(x)))))[None]

    def _put(self, first: int, new: Keys) -> None:
        """Keys and values into the cache, from entry `first` on; what stood there or behind is forgotten."""
        n, room = new.keys.shape[2], self._cache.keys.shape[2]
        if first + n > room:
            self._cache = Keys(*(F.pad(x, (0, 0, 0, first + n + ROOM - room)) for x in self._cache))
        for place, x in zip(self._cache, new, strict=True):
            place[:, :, first : first + n] = x
