"""Many questions about many clips at once: each clip is seen and read once, then all its questions go on from there.

    clip 1 | vision and the words before the question | question a | answer a |
                                                       | question b | answer b, longer |      one pass over all these tails
    clip 2 | vision and the words before the question | question a | answer a |

Tails are padded behind their ends only, where nothing real looks, so no position is shifted and no mask is needed.
A plan depends on the samples alone, never on what is done or who does it: a float may change in its last bit with its batch, so a
resumed run, or one of many processes, is bit-identical only if its batches are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from feature_alignment.inputs.samples import Sample
from feature_alignment.models.pair import Decoder, State


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
        self._state = model.prefill_encoded(prompts[0][:shared].expand(len(clips), -1), vision)

    def generate(self, max_new_tokens: int) -> list[list[int]]:
        """Greedy answers, each up to and including its EOS; questions of equal length go together."""
        groups: dict[int, list[int]] = {}
        for row, tail in enumerate(self._tails):
            groups.setdefault(len(tail), []).append(row)
        answers: dict[int, list[int]] = {}
        for rows in groups.values():
            state = self._branch(rows)
            self.model.step(state, self._tensor([self._tails[row] for row in rows]))
            answers |= zip(rows, self.model.generate(state, max_new_tokens), strict=True)
        return [answers[row] for row in range(len(self._tails))]

    def states(self, answers: Sequence[Sequence[int]]) -> list[Tensor]:
        """The states [n, d] that emit the given answers of n tokens each, from one pass."""
        tails = [[*tail, *answer[:-1]] for tail, answer in zip(self._tails, answers, strict=True)]
        hidden = self.model.step(self._branch(range(len(tails))), self._tensor(tails)).cpu()
        return [hidden[i, len(tail) - len(answer) : len(tail)] for i, (tail, answer) in enumerate(zip(tails, answers, strict=True))]

    def _branch(self, rows: Sequence[int]) -> State:
        return self.model.branch(self._state, [self._clip_of[row] for row in rows])

    def _tensor(self, tails: Sequence[Sequence[int]]) -> Tensor:
        width = max(map(len, tails))
        return torch.tensor([[*tail, *[0] * (width - len(tail))] for tail in tails], device=self.model.device)


def _common_prefix(prompts: Sequence[Tensor]) -> int:
    """How many ids all prompts begin with; at least one is left to each, because its state emits the answer's first token."""
    shortest = min(map(len, prompts))
    same = torch.stack([ids[: shortest - 1] for ids in prompts])
    return int((same == same[0]).all(0).long().cumprod(0).sum())


def _clip(sample: Sample) -> tuple:
    return sample.video, sample.events
