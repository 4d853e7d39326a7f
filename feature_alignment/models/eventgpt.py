"""EventGPT in current transformers: LLaMA with an event vision tower, under the key names of the released checkpoint.

    five event images -> CLIP tower (all patches and CLS, no final norm) -> visual_projector -> feature_adaptor
    [T, P, H]  -> T temporal tokens (mean over P), P spatial tokens (mean over T) -> spliced into the prompt at id -200

The released `config.json` stores no vision geometry, so CLIP-L/14-336 is the default; a `vision_config` in it wins.
Geometry and order follow the released inference code; `tests/test_eventgpt.py` compares this file with its outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerBase,
)

from feature_alignment.models.loading import load_model
from feature_alignment.models.prompts import prompt_ids, prompt_text, text_ids

EVENT_TOKEN_INDEX = -200  # placeholder of the event stream in input_ids; never embedded
NUM_EVENT_SLICES = 5
PROMPT = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the human's questions. USER: <ev_start><event><ev_end>\n{question} ASSISTANT:"
)
UNQUANTIZED = ("lm_head", "model.visual_tower", "model.visual_projector", "model.feature_adaptor")
KNOWN_TEXT_TOKENS = (59,)  # of the probe question's prompt with the released tokenizer
_CLIP_L_336 = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
)


class EventGPTConfig(LlamaConfig):
    """LLaMA's config plus the vision tower's and the canvas of event images."""

    model_type = "EventChat_llama"
    sub_configs = {"vision_config": CLIPVisionConfig}
    vision_config: dict[str, Any] | None = None
    event_canvas_hw: list[int] | None = None  # null: the extent of each slice, as released

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_config is None:
            self.vision_config = CLIPVisionConfig(**_CLIP_L_336)
        elif isinstance(self.vision_config, dict):
            self.vision_config = CLIPVisionConfig(**self.vision_config)
        super().__post_init__(**kwargs)


class _Tower(nn.Module):
    """Gives weights the doubled prefix `visual_tower.visual_tower` of the released keys."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.visual_tower = CLIPVisionModel(config)


class EventGPTModel(LlamaModel):
    """LLaMA with an event vision tower, projector and feature adaptor."""

    config_class = EventGPTConfig

    def __init__(self, config: EventGPTConfig) -> None:
        super().__init__(config)
        width, vision = config.hidden_size, config.vision_config
        assert isinstance(vision, CLIPVisionConfig)  # EventGPTConfig converts it
        self.visual_tower = _Tower(vision)
        self.visual_projector = nn.Sequential(nn.Linear(vision.hidden_size, width), nn.GELU(), nn.Linear(width, width))
        self.feature_adaptor = nn.Linear(width, width)
        self.post_init()

    def encode_events(self, pixel_values: Tensor) -> Tensor:
        """Event tokens of event streams.

        Args:
            pixel_values: [b, t, 3, h, w], t event images, CLIP-normalized.

        Returns:
            [b, t + p, d_draft]: t temporal tokens, then p spatial tokens (p = patches + CLS).
        """
        b, t = pixel_values.shape[:2]
        patches = self.visual_tower.visual_tower(pixel_values.flatten(0, 1)).last_hidden_state  # [b*t, p, d_vision]
        tokens = self.feature_adaptor(self.visual_projector(patches)).unflatten(0, (b, t))  # [b, t, p, d_draft]
        return torch.cat([tokens.mean(2), tokens.mean(1)], dim=1)

    def splice(self, input_ids: Tensor, event_tokens: Tensor) -> Tensor:
        """Prompt embeddings with the event tokens in place of the id -200.

        Args:
            input_ids: [b, s] int64 with one -200 per row, at the same position in all rows.
            event_tokens: [b, e, d_draft].

        Returns:
            [b, s - 1 + e, d_draft].

        Raises:
            ValueError: If there is not exactly one -200 per row.
        """
        found = (input_ids[0] == EVENT_TOKEN_INDEX).nonzero()
        if len(found) != 1 or not (input_ids[:, found[0]] == EVENT_TOKEN_INDEX).all():
            raise ValueError(f"expected exactly one {EVENT_TOKEN_INDEX} at one position in every row, got {input_ids.tolist()}")
        at = int(found[0])
        before, after = self.embed_tokens(input_ids[:, :at]), self.embed_tokens(input_ids[:, at + 1 :])
        return torch.cat([before, event_tokens.to(before), after], dim=1)


class EventGPTForCausalLM(LlamaForCausalLM):
    """EventGPT with its LM head."""

    config_class = EventGPTConfig
    _no_split_modules = ["LlamaDecoderLayer", "CLIPEncoderLayer", "CLIPVisionEmbeddings"]

    def __init__(self, config: EventGPTConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = EventGPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("EventChat_llama", EventGPTConfig)
AutoModelForCausalLM.register(EventGPTConfig, EventGPTForCausalLM)


def load_eventgpt(
    path: str | Path, dtype: torch.dtype, device: str = "cpu", config: EventGPTConfig | None = None, **options: Any
) -> EventGPTForCausalLM:
    """Load a checkpoint in the released key format.

    Args:
        path: Checkpoint directory.
        dtype: Of the weights.
        device: Where the model runs.
        config: Overrides the checkpoint's config.json.
        **options: Of `load_model`.

    Raises:
        UserError: If tensors are missing or unexpected.
    """
    options = {"dtype": dtype, "device": device, "config": config, "unquantized": UNQUANTIZED, **options}
    model: EventGPTForCausalLM = load_model(EventGPTForCausalLM, path, "EventGPT", **options)
    return model


def encode_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Token ids of a question's prompt, with -200 for the events. Only its first part starts with BOS, as released."""
    message = f"<ev_start><event><ev_end>\n{question}"
    contents = (message, [{"type": "text", "text": message}])
    before, after = prompt_text(tokenizer, PROMPT.format(question=question), contents, "<event>", question).split("<event>")
    return [*prompt_ids(tokenizer, before), EVENT_TOKEN_INDEX, *text_ids(tokenizer, after)]
