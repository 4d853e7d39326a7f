"""What decoding passes around: a prompt, and the state of the texts that a decoder has read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from feature_alignment.models.fixed import FixedCache


@dataclass(frozen=True)
class Prompt:
    """A sample ready for one model.

    Args:
        ids: [s] int64, prompt tokens with vision placeholders.
        pixels: [t, 3, h, w] float32, normalized video frames or event images.
        question: Text of the question.
    """

    ids: Tensor
    pixels: Tensor
    question: str = ""


class ReadPrompt(NamedTuple):
    """What a decoder read of one prompt: hidden states [s, d] on it, and the input embeddings [s, d] of its tokens and of its vision."""

    states: Tensor
    inputs: Tensor


@dataclass
class State:
    """Progress of a decoder in a batch of texts.

    Args:
        cache: Keys and values of all positions read.
        last: [b, d], hidden state on the last token read.
        length: Number of positions read.
        ids: [b, s] int64, prompt tokens.
        prompt: [b, s, d], hidden states on the prompt, of a decoder that reads one layer.
        inputs: [b, s, d], input embeddings of the prompt, vision included.
    """

    cache: DynamicCache | FixedCache
    last: Tensor
    length: int
    ids: Tensor | None = None
    prompt: Tensor | None = None
    inputs: Tensor | None = None

    def read_prompt(self, row: int = 0, length: int | None = None) -> ReadPrompt:
        """What was read of one row's prompt, up to `length` tokens."""
        assert self.prompt is not None and self.inputs is not None  # the target reads its last layer only
        return ReadPrompt(self.prompt[row, :length], self.inputs[row, :length])


def position_limit(config: PreTrainedConfig) -> int:
    """The number of positions a text may have: the config's value times the scaling factor of its rotary embedding."""
    rope = getattr(config, "rope_parameters", None) or {}
    scaling = 1.0 if "original_max_position_embeddings" in rope else rope.get("factor") or 1.0  # then the config states the product
    return int(config.max_position_embeddings * scaling)
