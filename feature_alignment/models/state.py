"""What decoding passes around: a prompt, and the state of the texts that a decoder has read."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass
class State:
    """Progress of a decoder in a batch of texts.

    Args:
        cache: Keys and values of all positions read.
        last: [b, d], hidden state on the last token read.
        length: Number of positions read.
        ids: [b, s] int64, prompt tokens.
        prompt: [b, s, d], hidden states on the prompt, of a decoder that reads one layer.
    """

    cache: DynamicCache | FixedCache
    last: Tensor
    length: int
    ids: Tensor | None = None
    prompt: Tensor | None = None

    def prompt_states(self, row: int = 0) -> Tensor:
        """[s, d], the hidden states on the prompt of one row."""
        assert self.prompt is not None  # the target reads its last layer only
        return self.prompt[row]


def position_limit(config: PreTrainedConfig) -> int:
    """The number of positions a text may have: the config's value times the scaling factor of its rotary embedding."""
    rope = getattr(config, "rope_parameters", None) or {}
    scaling = 1.0 if "original_max_position_embeddings" in rope else rope.get("factor") or 1.0  # then the config states the product
    return int(config.max_position_embeddings * scaling)
