"""Many questions about many clips at once: each clip is seen and read once, then all its questions go on from there, side by side.

    clip 1 | vision and the words before the question | question a | question b | answer a, answer b, word by word …
    clip 2 | vision and the words before the question | question a | …

A clip is one row. What is read of its questions stands in that row in any order: each token has the place it has in its own text, and a
mask lets it see the clip and what stands before it in its own text alone (tree attention). So no question copies the clip's keys and
values, and all read them together.

A plan depends on the samples alone, never on what is done or who does it: a float may change in its last bit with its batch, so a
resumed run, or one of many processes, is bit-identical only if its batches are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from feature_alignment.inputs.samples import Sample
from feature_alignment.models.decoder import Decoder, State
from feature_alignment.models.generation import most_likely

_NOBODY = -1  # whose token stands where a row is filled up


def plan_batches(samples: Sequence[Sample], size: int) -> list[range]:
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
    """A batch of samples whose clips one model has read, up to where their prompts differ.

    deeper: the same samples' batch of the same model at a greater depth, whose reading is this one's too
    """

    def __init__(self, model: Decoder, samples: Sequence[Sample], deeper: ClipBatch | None = None) -> None:
        self.model = model
        prompts = [model.encode_prompt(s.question) for s in samples]
        shared = _common_prefix(prompts)
        self._rules = [model.rules(ids) for ids in prompts]
        self._tails = [ids[shared:].tolist() for ids in prompts]
        clips = {_clip(s): s for s in samples}
        order = list(clips)
        self._clip_of = [order.index(_clip(s)) for s in samples]
        self._shared = prompts[0][:shared].expand(len(clips), -1)
        if deeper is None:  # a clip is encoded alone: its vision tokens are then the same in every batch, and few pixels are in memory
            self._vision = torch.cat([model.encode_vision(model.read_pixels(s)[None]) for s in clips.values()])
            self._state = model.prefill_encoded(self._shared, self._vision)
        else:
            self._vision, self._state = deeper._vision, _up_to(deeper._state, model.taps[-1])

    @torch.inference_mode()
    def generate(self, max_new_tokens: int) -> list[list[int]]:
        """Greedy answers, each up to and including its EOS. A question, and a clip, leaves the batch when it is done."""
        most = max(self._clip_of.count(clip) for clip in set(self._clip_of))
        texts = _Texts(self.model, self._state, self._clip_of, self._longest(self._tails) + most * max_new_tokens)
        rows, answers = list(range(len(self._tails))), [[] for _ in self._tails]  # type: list[int], list[list[int]]
        states = [found[-1:] for found in texts.read(self._tails)]
        while True:
            said = most_likely([self._rules[row] for row in rows], self.model.lm_head(torch.cat(states)), [answers[row] for row in rows])
            for row, token in zip(rows, said, strict=True):
                answers[row].append(token)
            rows = [row for row in rows if len(answers[row]) < max_new_tokens and not self._ended(row, answers[row])]
            if not rows:
                return answers
            states = texts.read([[answers[row][-1]] for row in rows], rows)

    def _ended(self, row: int, answer: list[int]) -> bool:
        return self._rules[row].end_of(answer[:-1], answer[-1:]) is not None

    @torch.inference_mode()
    def states(self, answers: Sequence[Sequence[int]], before: int = 0) -> list[Tensor]:
        """The states [before + n, d] that emit the given answers of n tokens each, from one pass. `before` states of the prompt stand in
        front of them, without the prompt's very last, which emits the first token; zeros where the prompt is shorter."""
        tails = [[*tail, *answer[:-1]] for tail, answer in zip(self._tails, answers, strict=True)]
        states = _Texts(self.model, self._state, self._clip_of, self._longest(tails)).read(tails)
        shared = [self._prompt_end(clip, before) for clip in self._clip_of]
        whole = [torch.cat([begin, found]) for begin, found in zip(shared, states, strict=True)]
        wanted = [before + len(answer) for answer in answers]
        return [F.pad(found, (0, 0, max(0, n - len(found)), 0))[-n:].cpu() for found, n in zip(whole, wanted, strict=True)]

    def _prompt_end(self, clip: int, most: int) -> Tensor:
        """The last states [n, d], at most `most`, of what all questions about a clip begin with."""
        if not most:
            return self._state.last.new_empty(0, self.model.hidden_size)
        assert self._state.prompt is not None  # it was read by this model
        return self._state.prompt[clip, -most:]

    def prompt_ids(self, most: int) -> list[list[int]]:
        """The last ids of each prompt, at most `most`, as `Decoder.text_ids` says."""
        return [self.model.text_ids([*self._shared[0].tolist(), *tail][-most:]) for tail in self._tails]

    def predict_tokens(self, answers: Sequence[Sequence[int]]) -> list[list[int]]:
        """What the model would have said in each place of the given answers, knowing what stands before."""
        return [self.model.lm_head(states.to(self.model.device)).argmax(-1).tolist() for states in self.states(answers)]

    def vision_states(self) -> list[Tensor]:
        """The states [e, d] on each row's vision tokens."""
        seen = self.model.vision_states(self._shared, self._vision).cpu()
        return [seen[clip] for clip in self._clip_of]

    def _longest(self, tails: Sequence[Sequence[int]]) -> int:
        """Tokens of all of a clip's tails, at most."""
        total = [0] * len(self._shared)
        for clip, tail in zip(self._clip_of, tails, strict=True):
            total[clip] += len(tail)
        return max(total)


class _Texts:
    """Texts that go on from clips that were read, `room` tokens of each clip at most.

    clip_of: the clip of each text
    """

    def __init__(self, model: Decoder, state: State, clip_of: Sequence[int], room: int) -> None:
        self._model, self._clip_of, self._begin = model, clip_of, state.length
        self._state = _with_room(state, room)
        self._clips = list(range(len(state.last)))  # of each row
        self._lengths = [0] * len(clip_of)
        self._owner = torch.empty(len(self._clips), 0, dtype=torch.long, device=model.device)  # [rows, read]: each token's text

    def read(self, tokens: Sequence[Sequence[int]], texts: Sequence[int] | None = None) -> list[Tensor]:
        """The states [n, d] behind n more tokens of each of `texts`, by default of all. Clips none of which is named are left behind."""
        texts = range(len(tokens)) if texts is None else texts
        going = {self._clip_of[text] for text in texts}
        if len(going) < len(self._clips):
            order = _keep(self._state, [row for row, clip in enumerate(self._clips) if clip in going])
            self._clips, self._owner = [self._clips[row] for row in order], self._owner[order]
        row_of = {clip: row for row, clip in enumerate(self._clips)}
        laid: list[list[tuple[int, int, int]]] = [[] for _ in self._clips]  # a row's new tokens: id, text, place in it
        spots = []
        for text, new in zip(texts, tokens, strict=True):
            row, first = row_of[self._clip_of[text]], self._begin + self._lengths[text]
            spots.append((row, len(laid[row]), len(laid[row]) + len(new)))
            laid[row] += [(token, text, first + i) for i, token in enumerate(new)]
            self._lengths[text] += len(new)
        width = max(map(len, laid))
        filled = [[*row, *[(0, _NOBODY, 0)] * (width - len(row))] for row in laid]
        ids, owner, place = torch.tensor(filled, device=self._model.device).unbind(-1)
        mask = self._mask(owner)
        self._owner = torch.cat([self._owner, owner], dim=1)
        hidden = self._model.step(self._state, ids, position_ids=place, attention_mask=mask)
        return [hidden[row, begin:end] for row, begin, end in spots]

    def _mask(self, owner: Tensor) -> Tensor:
        """[rows, 1, new, clip + read + new], additive: each new token sees the clip, its own text so far and itself."""
        before = self._owner[:, None] == owner[..., None]
        among = (owner[:, None] == owner[..., None]).tril()
        sees = torch.cat([before.new_ones(*owner.shape, self._begin), before, among], dim=-1)
        dtype = self._state.last.dtype
        return torch.zeros(sees.shape, dtype=dtype, device=owner.device).masked_fill(~sees, torch.finfo(dtype).min)[:, None]


class _RoomyLayer(DynamicLayer):
    """Keys and values in buffers with room to grow: a token is put behind the others, which need not be copied for it."""

    @torch.inference_mode()
    def __init__(self, layer: DynamicLayer, room: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        rows, heads, self._length, d = layer.keys.shape
        self._buffers = [old.new_empty(rows, heads, self._length + room, d) for old in (layer.keys, layer.values)]
        for new, old in zip(self._buffers, (layer.keys, layer.values), strict=True):
            new[:, :, : self._length] = old
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


def _with_room(state: State, room: int) -> State:
    """A copy of `state` that up to `room` tokens can go on from."""
    cache = DynamicCache()
    assert isinstance(state.cache, DynamicCache)
    cache.layers = [_RoomyLayer(layer, room) for layer in state.cache.layers]
    return State(cache, state.last, state.length)


def _up_to(state: State, depth: int) -> State:
    """What the first `depth` layers remember of it; `last` is the deeper model's and says nothing here."""
    cache = DynamicCache()
    assert isinstance(state.cache, DynamicCache)
    cache.layers = state.cache.layers[:depth]
    return State(cache, state.last, state.length)


def _common_prefix(prompts: Sequence[Tensor]) -> int:
    """How many ids all prompts begin with; at least one is left to each, because its state emits the answer's first token."""
    shortest = min(map(len, prompts))
    same = torch.stack([ids[: shortest - 1] for ids in prompts])
    return int((same == same[0]).all(0).long().cumprod(0).sum())


def _clip(sample: Sample) -> tuple:
    return sample.video, sample.events, sample.event_start_ms, sample.event_time_unit
