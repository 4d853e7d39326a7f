"""Generation for many questions about many clips at once: each clip is encoded and prefilled once, all its questions share its cache.

    clip 1 | vision tokens and the shared prompt prefix | question a | question b | answer tokens of a, b, a, b …
    clip 2 | vision tokens and the shared prompt prefix | question a | …

A clip is one row of the batch. The tokens of its questions stand in that row in any order: each token has the position it has in its own
text, and a mask lets it attend to the clip and to earlier tokens of its own text only (tree attention). So no question copies the clip's
keys and values.

The batches depend on the samples alone. A float may change in its last bit with its batch, so a resumed run or a run of several processes
is bit-identical only if its batches are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from feature_alignment.inputs.samples import Sample
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.generation import most_likely
from feature_alignment.models.state import State

_PADDING = -1  # text number of padding tokens


def plan_batches(samples: Sequence[Sample], size: int) -> list[range]:
    """Split samples into batches of at most `size`; questions of one clip stay together unless they are more than that."""
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
    """A batch of samples whose clips one model has prefilled, up to the first token in which their prompts differ."""

    def __init__(self, model: Decoder, samples: Sequence[Sample], deeper: ClipBatch | None = None) -> None:
        """Encode and prefill the clips of the samples.

        Args:
            model: Reads the clips.
            samples: Rows of the batch.
            deeper: Batch of the same samples and checkpoint at a greater depth, whose prefill is reused.
        """
        self.model = model
        prompts = [model.encode_prompt(s.question) for s in samples]
        shared = _common_prefix(prompts)
        self._rules = [model.rules(ids) for ids in prompts]
        self._tails: list[list[int]] = [ids[shared:].tolist() for ids in prompts]
        clips = {_clip(s): s for s in samples}
        order = list(clips)
        self._clip_of = [order.index(_clip(s)) for s in samples]
        self._shared = prompts[0][:shared].expand(len(clips), -1)
        self._keeps_states = model.device.type == "cpu"  # where every token costs; on a GPU a pass over whole texts costs about one step
        self._answers_read: Sequence[Sequence[int]] = []
        self._states_read: list[list[Tensor]] = []  # of each text: states [n, d] on its tail, then on each of its tokens but the last
        if deeper is None:  # each clip is encoded alone: its vision tokens do not depend on the batch, and little pixel memory is needed
            self._vision = torch.cat([model.encode_vision(model.read_pixels(s)[None]) for s in clips.values()])
            self._state = model.prefill_encoded(self._shared, self._vision)
        else:
            self._vision, self._state = deeper._vision, _truncated_to(deeper._state, model.taps[-1])

    @torch.inference_mode()
    def generate(self, max_new_tokens: int) -> list[list[int]]:
        """Greedy answers, each up to and including its EOS. Finished questions and clips leave the batch."""
        answers: list[list[int]] = [[] for _ in self._tails]

        def extend(rows: list[int], states: list[Tensor], _: int) -> list[int]:
            logits = self.model.lm_head(torch.cat(states))
            tokens = most_likely([self._rules[row] for row in rows], logits, [answers[row] for row in rows])
            for row, token in zip(rows, tokens, strict=True):
                answers[row].append(token)
            return [row for row in rows if len(answers[row]) < max_new_tokens and not self._has_ended(row, answers[row])]

        self._read_step_by_step(answers, max_new_tokens, extend)
        return answers

    def replay(self, answers: Sequence[Sequence[int]]) -> None:
        """Read answers that `generate` has written earlier in the same steps, if it keeps their states: `states` gives the same bits."""
        if self._keeps_states:
            self._read_step_by_step(answers, max(map(len, answers)), lambda rows, _, length: [r for r in rows if len(answers[r]) > length])

    @torch.inference_mode()
    def _read_step_by_step(
        self, answers: Sequence[Sequence[int]], most: int, remaining: Callable[[list[int], list[Tensor], int], list[int]]
    ) -> None:
        """Read all tails, then answers of at most `most` tokens, one token of each unfinished text at a time.

        Args:
            answers: Token ids, which may grow meanwhile.
            most: Length of the longest answer.
            remaining: Rows still in the batch, the states [1, d] on their last tokens, and the number of tokens that these states emit
                -> the rows with another token to read.
        """
        together = max(self._clip_of.count(clip) for clip in set(self._clip_of))
        texts = _Texts(self.model, self._state, self._clip_of, self._max_tail_tokens(self._tails) + together * most)
        rows, read, length = list(range(len(self._tails))), texts.read(self._tails), 1
        kept = [[states] for states in read]
        while rows := remaining(rows, [states[-1:] for states in read], length):
            read, length = texts.read([[answers[row][length - 1]] for row in rows], rows), length + 1
            if self._keeps_states:
                for row, states in zip(rows, read, strict=True):
                    kept[row].append(states)
        if self._keeps_states:
            self._answers_read, self._states_read = answers, kept

    def _has_ended(self, row: int, answer: list[int]) -> bool:
        return self._rules[row].end_of(answer[:-1], answer[-1:]) is not None

    @torch.inference_mode()
    def states(self, answers: Sequence[Sequence[int]], before: int = 0) -> list[Tensor]:
        """The hidden states [before + n, d] that emit the given answers of n tokens each.

        On a CPU, answers of `generate` or `replay` are not read again. Of all others, one forward pass reads one question of every clip.
        With all questions of a clip in one row, most of the attention would be computed between questions, where the mask discards it.

        Args:
            answers: Token ids.
            before: Number of positions of each prompt to return as well, without its last, which emits the first token; zeros in front
                where the prompt is shorter.
        """
        found: dict[int, Tensor] = {}
        for text, (answer, states) in enumerate(zip(answers, self._states_read, strict=False)):
            if list(answer) == list(self._answers_read[text][: len(answer)]):
                found[text] = torch.cat(states)[: len(self._tails[text]) + len(answer) - 1]
        tails = [[*tail, *answer[:-1]] for tail, answer in zip(self._tails, answers, strict=True)]
        for texts in self._one_of_each_clip(set(range(len(tails))) - set(found)):
            room = max(len(tails[text]) for text in texts)
            read = _Texts(self.model, self._state, self._clip_of, room).read([tails[text] for text in texts], texts)
            found |= dict(zip(texts, read, strict=True))
        return [self._after_prompt(text, found[text], before, before + len(answer)).cpu() for text, answer in enumerate(answers)]

    def _after_prompt(self, text: int, states: Tensor, before: int, wanted: int) -> Tensor:
        """The last `wanted` states [wanted, d] of a text, with at most `before` of its prompt's before those read; zeros in front."""
        full = torch.cat([self._prompt_end(self._clip_of[text], before), states])
        return F.pad(full, (0, 0, max(0, wanted - len(full)), 0))[-wanted:]

    def _one_of_each_clip(self, texts: Collection[int]) -> list[list[int]]:
        """Texts, as groups that hold at most one text of a clip."""
        groups: list[list[int]] = []
        seen: Counter[int] = Counter()
        for text in sorted(texts):
            clip = self._clip_of[text]
            if seen[clip] == len(groups):
                groups.append([])
            groups[seen[clip]].append(text)
            seen[clip] += 1
        return groups

    def _prompt_end(self, clip: int, most: int) -> Tensor:
        """The last states [n, d], at most `most`, on the prompt that all questions about a clip share."""
        if not most:
            return self._state.last.new_empty(0, self.model.hidden_size)
        assert self._state.prompt is not None  # prefilled by this model, which reads one layer
        return self._state.prompt[clip, -most:]

    def prompt_inputs(self, most: int) -> list[Tensor]:
        """Input embeddings [most, d] of the last positions of each prompt, the very last included; zeros in front where it is shorter."""
        assert self._state.inputs is not None  # prefilled by this model
        inputs = []
        for clip, tail in zip(self._clip_of, self._tails, strict=True):
            own = self.model.embeddings_of(tail)
            full = torch.cat([self._state.inputs[clip, max(0, self._state.length + len(tail) - most) :], own])[-most:]
            inputs.append(F.pad(full, (0, 0, most - len(full), 0)).cpu())
        return inputs

    def prompt_ids(self, most: int) -> list[list[int]]:
        """The last token ids of each prompt, at most `most`, as `Decoder.text_ids` gives them."""
        return [self.model.text_ids([*self._shared[0].tolist(), *tail][-most:]) for tail in self._tails]

    def predict_tokens(self, answers: Sequence[Sequence[int]]) -> list[list[int]]:
        """The model's argmax token at each position of the given answers, given the answer tokens before it."""
        return [self.model.lm_head(states.to(self.model.device)).argmax(-1).tolist() for states in self.states(answers)]

    def vision_states(self) -> list[Tensor]:
        """The hidden states [e, d] on each row's vision tokens."""
        states = self.model.vision_states(self._shared, self._vision).cpu()
        return [states[clip] for clip in self._clip_of]

    def _max_tail_tokens(self, tails: Sequence[Sequence[int]]) -> int:
        """The largest number of tokens that the tails of one clip have together."""
        total = [0] * len(self._shared)
        for clip, tail in zip(self._clip_of, tails, strict=True):
            total[clip] += len(tail)
        return max(total)


class _Texts:
    """Texts that continue prefilled clips, with at most `room` tokens per clip. clip_of: the clip of each text."""

    def __init__(self, model: Decoder, state: State, clip_of: Sequence[int], room: int) -> None:
        self._model, self._clip_of, self._begin = model, clip_of, state.length
        self._state = _with_room(state, room)
        self._clips = list(range(len(state.last)))  # the clip of each row
        self._lengths = [0] * len(clip_of)
        self._text_of = torch.empty(len(self._clips), 0, dtype=torch.long, device=model.device)  # [rows, read]: text of each token

    def read(self, tokens: Sequence[Sequence[int]], texts: Sequence[int] | None = None) -> list[Tensor]:
        """The hidden states [n, d] on n more tokens of each of `texts`, default all. Clips without a text in `texts` are dropped."""
        texts = range(len(tokens)) if texts is None else texts
        remaining = {self._clip_of[text] for text in texts}
        if len(remaining) < len(self._clips):
            order = _keep_rows(self._state, [row for row, clip in enumerate(self._clips) if clip in remaining])
            self._clips, self._text_of = [self._clips[row] for row in order], self._text_of[order]
        row_of = {clip: row for row, clip in enumerate(self._clips)}
        new_tokens: list[list[tuple[int, int, int]]] = [[] for _ in self._clips]  # per row: token id, text, position in the text
        spans = []
        for text, new in zip(texts, tokens, strict=True):
            row, first = row_of[self._clip_of[text]], self._begin + self._lengths[text]
            spans.append((row, len(new_tokens[row]), len(new_tokens[row]) + len(new)))
            new_tokens[row] += [(token, text, first + i) for i, token in enumerate(new)]
            self._lengths[text] += len(new)
        width = max(map(len, new_tokens))
        padded = [[*row, *[(0, _PADDING, 0)] * (width - len(row))] for row in new_tokens]
        ids, text_of, positions = torch.tensor(padded, device=self._model.device).unbind(-1)
        mask = self._mask(text_of)
        self._text_of = torch.cat([self._text_of, text_of], dim=1)
        hidden = self._model.step(self._state, ids, position_ids=positions, attention_mask=mask)
        return [hidden[row, begin:end] for row, begin, end in spans]

    def _mask(self, text_of: Tensor) -> Tensor:
        """[rows, 1, new, clip + read + new], additive: each new token attends to the clip, its own text so far and itself."""
        earlier = self._text_of[:, None] == text_of[..., None]
        new = (text_of[:, None] == text_of[..., None]).tril()
        allowed = torch.cat([earlier.new_ones(*text_of.shape, self._begin), earlier, new], dim=-1)
        dtype = self._state.last.dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=text_of.device).masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


class _RoomyLayer(DynamicLayer):
    """Keys and values in preallocated buffers: appending a token copies no earlier ones."""

    @torch.inference_mode()
    def __init__(self, layer: DynamicLayer, room: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        rows, heads, self._length, d = layer.keys.shape
        self._buffers = [old.new_empty(rows, heads, self._length + room, d) for old in (layer.keys, layer.values)]
        for new, old in zip(self._buffers, (layer.keys, layer.values), strict=True):
            new[:, :, : self._length] = old
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [rows, heads, k, d_head]; returns all of them."""
        begin, self._length = self._length, self._length + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin : self._length] = states
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)
        return self.keys, self.values

    def keep_rows(self, gaps: list[int], movers: list[int], count: int) -> None:
        """Keep the first `count` rows after moving the rows `movers` to `gaps`."""
        for buffer in self._buffers:
            buffer[gaps] = buffer[movers]
        self._buffers = [buffer[:count] for buffer in self._buffers]


def _keep_rows(state: State, remaining: list[int]) -> list[int]:
    """Drop all other rows of `state` and return the new order. The last remaining rows fill the gaps, so few are copied."""
    count, gaps = len(remaining), sorted(set(range(len(remaining))) - set(remaining))
    movers, order = [i for i in remaining if i >= count], list(range(count))
    for gap, mover in zip(gaps, movers, strict=True):
        order[gap] = mover
    assert isinstance(state.cache, DynamicCache)
    for layer in state.cache.layers:
        layer.keep_rows(gaps, movers, count)
    return order


def _with_room(state: State, room: int) -> State:
    """A copy of `state` with room for that many more tokens."""
    cache = DynamicCache()
    assert isinstance(state.cache, DynamicCache)
    cache.layers = [_RoomyLayer(layer, room) for layer in state.cache.layers]
    return State(cache, state.last, state.length)


def _truncated_to(state: State, depth: int) -> State:
    """The cache of the first `depth` layers; `last` is the deeper model's and is not used."""
    cache = DynamicCache()
    assert isinstance(state.cache, DynamicCache)
    cache.layers = state.cache.layers[:depth]
    return State(cache, state.last, state.length)


def _common_prefix(prompts: Sequence[Tensor]) -> int:
    """The number of ids that all prompts begin with; at least one is left to each, because its state emits the first answer token."""
    shortest = min(map(len, prompts))
    same = torch.stack([ids[: shortest - 1] for ids in prompts])
    return int((same == same[0]).all(0).long().cumprod(0).sum())


def _clip(sample: Sample) -> tuple[object, ...]:
    return sample.video, sample.events, sample.event_start_ms, sample.event_time_unit
