"""Which rows are read together. A plan depends on the samples alone, never on what is done or who does it: a float may change in its
last bit with its batch, so a resumed run, or one of many processes, is bit-identical only if its batches are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from feature_alignment.inputs.samples import Sample
from feature_alignment.models.pair import Decoder, Pair, State

WINDOW = 8  # batches: enough rows of every prompt length to fill some, few enough clips to remember


def windows(samples: Sequence[Sample], size: int) -> list[range]:
    """All rows in stretches of about WINDOW batches of `size`; none ends inside a clip, so each clip is read by one process, once."""
    cuts = [0]
    for row in range(1, len(samples)):
        if row - cuts[-1] >= WINDOW * size and _clip(samples[row]) != _clip(samples[row - 1]):
            cuts.append(row)
    return [range(a, b) for a, b in pairwise([*cuts, len(samples)])]


def batches(pair: Pair, samples: Sequence[Sample], window: range, size: int) -> list[list[int]]:
    """Rows whose prompts are equally long for both models, at most `size` together: no padding, so no position is ever shifted."""

    @cache
    def lengths(question: str) -> tuple[int, int]:
        return len(pair.target.encode_prompt(question)), len(pair.draft.encode_prompt(question))

    groups: dict[tuple[int, int], list[int]] = {}
    for row in window:
        groups.setdefault(lengths(samples[row].question), []).append(row)
    return [rows[i : i + size] for rows in groups.values() for i in range(0, len(rows), size)]


class ClipReader:
    """Prefills one model's batches, each clip's vision tokens made once and kept until `forget`.

    A clip is encoded alone, not with whatever clips happen to be in its batch, so that its tokens are the same everywhere.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self._vision: dict[tuple, Tensor] = {}

    def forget(self) -> None:
        self._vision.clear()

    def inputs(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Prompt ids [b, s] and vision tokens [b, e, d] of samples whose prompts are equally long."""
        ids = torch.stack([self.model.encode_prompt(s.question) for s in samples])
        return ids, torch.stack([self._see(s) for s in samples])

    def prefill(self, samples: Sequence[Sample]) -> State:
        return self.model.prefill_encoded(*self.inputs(samples))

    def _see(self, sample: Sample) -> Tensor:
        clip = _clip(sample)
        if clip not in self._vision:
            self._vision[clip] = self.model.encode_vision(self.model.read_pixels(sample)[None])[0]
        return self._vision[clip]


def _clip(sample: Sample) -> tuple:
    return sample.video, sample.events
