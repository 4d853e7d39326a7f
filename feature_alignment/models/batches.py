"""Many questions about many clips at once: each clip is seen and read once, then all its questions go on from there.

    clip 1 | vision and the words before the question | question a | answer a |
                                                       | question b | answer b, longer |      one pass over all these tails
    clip 2 | vision and the words before the question | question a | answer a |

Tails are padded behind their ends only, where nothing real looks, so no position is shifted and that pass needs no mask.
A plan depends on the samples alone, never on what is done or who does it: a float may change in its last bit with its batch, so a
resumed run, or one of many processes, is bit-identical only if its batches are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from feature_alignment.inputs.samples import Sample
from feature_alignment.models.decoder import EOS, Decoder, State


def batches(samples: Sequence[Sample], size: int) -> list[range]:
    """All rows, at most `size` together; the questions of a clip are not split unless they are more than that."""
    found, first = [], 0
    while first < len(samples):
        last = min(first + size, len(samples))
        if last < len(samples):
            cut = next((row for row in range(last, first, -1) if _clip(samples[row]) != _clip(samples[row - 1])), last)
            last = cut
        found.append(range(first, last))
        first = last
    return found


class ClipBatch:
    """A batch of samples whose clips one model has read, up to where their prompts differ."""

    def __init__(self, model: Decoder, samples: Sequence[Sample]) -> None:
        self.model = model
        prompts = [model.encode_prompt(s.question) for s in samples]
        shared = _common_prefix(prompts)
        self._tails = [ids[shared:].tolist() for ids in prompts]
        clips = {_clip(s): s for s in samples}
        order = list(clips)
        self._clip_of = [order.index(_clip(s)) for s in samples]
        # A clip is encoded alone: its vision tokens are then the same in every batch, and pixels of one clip only are in memory.
        vision = torch.cat([model.encode_vision(model.read_pixels(s)[None]) for s in clips.values()])
        self._shared, self._vision = prompts[0][:shared].expand(len(clips), -1), vision
        self._state = model.prefill_encoded(self._shared, vision)

    @torch.inference_mode()
    def generate(self, max_new_tokens: int) -> list[list[int]]:
        """Greedy answers, each up to and including its EOS. A row leaves the batch when it is done."""
        ids, rows = self._tensor(self._tails), list(range(len(self._tails)))
        ends = torch.tensor([len(tail) for tail in self._tails], device=ids.device)[:, None]
        state = branch(self._state, self._clip_of, ids.shape[1] + max_new_tokens)
        place = state.length + ends  # [b, 1] position of the next token; shorter questions have padding between it and their end
        seen = torch.cat([ids.new_ones(len(rows), state.length), torch.arange(ids.shape[1], device=ids.device) < ends], dim=1)
        state.last = self.model.step(state, ids)[torch.arange(len(rows)), ends[:, 0] - 1]
        answers: list[list[int]] = [[] for _ in rows]
        while True:
            tokens = self.model.lm_head(state.last).argmax(-1)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                answers[row].append(token)
            going = [i for i, row in enumerate(rows) if answers[row][-1] != EOS and len(answers[row]) < max_new_tokens]
            if not going:
                return answers
            if len(going) < len(rows):
                order = _keep(state, going)
                rows, tokens, place, seen = [rows[i] for i in order], tokens[order], place[order], seen[order]
            seen = torch.cat([seen, seen.new_ones(len(rows), 1)], dim=1)
            self.model.step(state, tokens[:, None], position_ids=place, attention_mask=seen)
            place = place + 1

    def states(self, answers: Sequence[Sequence[int]]) -> list[Tensor]:
        """The states [n, d] that emit the given answers of n tokens each, from one pass."""
        tails = [[*tail, *answer[:-1]] for tail, answer in zip(self._tails, answers, strict=True)]
        state = branch(self._state, self._clip_of, max(map(len, tails)))
        hidden = self.model.step(state, self._tensor(tails)).cpu()
        return [hidden[i, len(tail) - len(answer) : len(tail)] for i, (tail, answer) in enumerate(zip(tails, answers, strict=True))]

    def says(self, answers: Sequence[Sequence[int]]) -> list[list[int]]:
        """What the model would have said in each place of the given answers, knowing what stands before."""
        return [self.model.lm_head(states.to(self.model.device)).argmax(-1).tolist() for states in self.states(answers)]

    def vision_states(self) -> list[Tensor]:
        """The states [e, d] on each row's vision tokens."""
        seen = self.model.vision_states(self._shared, self._vision).cpu()
        return [seen[clip] for clip in self._clip_of]

    def _tensor(self, tails: Sequence[Sequence[int]]) -> Tensor:
        width = max(map(len, tails))
        return torch.tensor([[*tail, *[0] * (width - len(tail))] for tail in tails], device=self.model.device)


class _RoomyLayer(DynamicLayer):
    """Keys and values in buffers with room to grow: a token is put behind the others, which need not be copied for it."""

    @torch.inference_mode()
    def __init__(self, layer: DynamicLayer, rows: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        b = len(rows)
        heads, self._length, d = layer.keys.shape[1:]
        self._buffers = [old.new_empty(b, heads, self._length + room, d) for old in (layer.keys, layer.values)]
        for new, old in zip(self._buffers, (layer.keys, layer.values), strict=True):
            torch.index_select(old, 0, rows, out=new[:, :, : self._length])
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        begin, self._length = self._length, self._length + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin : self._length] = states
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)
        return self.keys, self.values

    def keep(self, holes: list[int], movers: list[int], count: int) -> None:
        """Go on with the first `count` rows, after `movers` have taken the places `holes` among them."""
        for buffer in self._buffers:
            buffer[holes] = buffer[movers]
        self._buffers = [buffer[:count] for buffer in self._buffers]


def _keep(state: State, going: list[int]) -> list[int]:
    """Drop all rows of `state` but `going`; returns their new order. The last ones fill the gaps, so few are copied."""
    count, holes = len(going), sorted(set(range(len(going))) - set(going))
    movers, order = [i for i in going if i >= count], list(range(count))
    for hole, mover in zip(holes, movers, strict=True):
        order[hole] = mover
    assert isinstance(state.cache, DynamicCache)
    for layer in state.cache.layers:
        layer.keep(holes, movers, count)
    return order


def branch(state: State, rows: Sequence[int], room: int) -> State:
    """A state of its own for each of `rows` of `state`, repeats allowed, so that several texts of up to `room` tokens go on from it."""
    index = torch.tensor(rows, device=state.last.device)
    cache = DynamicCache()
    assert isinstance(state.cache, DynamicCache)
    cache.layers = [_RoomyLayer(layer, index, room) for layer in state.cache.layers]
    return State(cache, state.last[index], state.length)


def _common_prefix(prompts: Sequence[Tensor]) -> int:
    """How many ids all prompts begin with; at least one is left to each, because its state emits the answer's first token."""
    shortest = min(map(len, prompts))
    same = torch.stack([ids[: shortest - 1] for ids in prompts])
    return int((same == same[0]).all(0).long().cumprod(0).sum())


def _clip(sample: Sample) -> tuple:
    return sample.video, sample.events
