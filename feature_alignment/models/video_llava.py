"""Video-LLaVA through transformers' own class, without its processor, which needs torchvision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, VideoLlavaForConditionalGeneration

from feature_alignment.cli.console import UserError
from feature_alignment.models.loading import load_model
from feature_alignment.models.prompts import prompt_ids, prompt_text

PROMPT = "USER: <video>\n{question} ASSISTANT:"
UNQUANTIZED = ("lm_head", "model.video_tower", "model.image_tower", "model.multi_modal_projector")
KNOWN_TEXT_TOKENS = (20, 21)  # of the probe question's prompt with the released tokenizer; legacy tokenization gives one more


def load_video_llava(path: str | Path, dtype: torch.dtype, device: str = "cpu", **options: Any) -> VideoLlavaForConditionalGeneration:
    """Load a checkpoint in the released or the re-saved key format.

    Args:
        path: Checkpoint directory.
        dtype: Of the weights.
        device: Where the model runs.
        **options: Of `load_model`.

    Raises:
        UserError: If the checkpoint is incomplete or in the layout of the LLaVA code.
    """
    refuse_llava_layout(Path(path))
    return load_model(
        VideoLlavaForConditionalGeneration, path, "Video-LLaVA", dtype=dtype, device=device, unquantized=UNQUANTIZED, **options
    )


def refuse_llava_layout(path: Path) -> None:
    """Refuse Video-LLaVA in the layout of its authors' LLaVA code: other weight names, vision towers in separate repositories.

    Raises:
        UserError: For such a checkpoint; any other config.json is left to the loader.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if not isinstance(config, dict) or "text_config" in config:
        return
    kind = str(config.get("model_type"))
    found = [key for key in ("mm_video_tower", "mm_image_tower", "mm_vision_tower") if config.get(key)]
    if found or kind.startswith("llava") or "LlavaLlamaForCausalLM" in (config.get("architectures") or ()):
        raise UserError(
            f"{path} has the layout of the LLaVA code ({', '.join(found) or f'model_type {kind}'}), in which LanguageBind/Video-LLaVA-7B "
            "was released; expected the layout of transformers (model_type video_llava). Take the converted checkpoint:\n"
            "  --target_id hub:LanguageBind/Video-LLaVA-7B-hf\n"
            "or convert your own with transformers' src/transformers/models/video_llava/convert_video_llava_weights_to_hf.py."
        )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, question: str, num_video_tokens: int) -> list[int]:
    """Prompt ids of a question.

    Args:
        tokenizer: Of the checkpoint.
        question: Text of the question.
        num_video_tokens: Frames x (patches + CLS), 8 x 257 = 2,056 in the 7B; `<video>` is repeated as often.

    Raises:
        UserError: If the tokenizer does not read `<video>` as one token.
    """
    contents = ([{"type": "video"}, {"type": "text", "text": question}], f"<video>\n{question}")
    ids = prompt_ids(tokenizer, prompt_text(tokenizer, PROMPT.format(question=question), contents, "<video>", question))
    video = tokenizer.convert_tokens_to_ids("<video>")
    if ids.count(video) != 1:
        raise UserError(
            f"Video-LLaVA's tokenizer gives {ids.count(video)} <video> tokens for a prompt with one. Take the released tokenizer."
        )
    at = ids.index(video)
    return ids[:at] + [video] * num_video_tokens + ids[at + 1 :]


def encode_video(model: VideoLlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """Video tokens of a batch of clips.

    Args:
        model: Video-LLaVA.
        pixel_values: [b, f, 3, h, w], normalized frames.

    Returns:
        [b, f * p, d_target], p = patches + CLS of one frame.
    """
    layer = model.config.vision_feature_layer
    features: Tensor = model.model.get_video_features(pixel_values, vision_feature_layer=layer, output_hidden_states=True).pooler_output
    return features.reshape(len(pixel_values), -1, features.shape[-1])


def splice(model: VideoLlavaForConditionalGeneration, input_ids: Tensor, video_tokens: Tensor) -> Tensor:
    """Prompt embeddings with video tokens in place of the `<video>` ids.

    Args:
        model: Video-LLaVA.
        input_ids: [b, s] int64.
        video_tokens: [b, n, d_target].

    Returns:
        [b, s, d_target].

    Raises:
        ValueError: If the numbers of `<video>` ids and video tokens differ.
    """
    embeds: Tensor = model.get_input_embeddings()(input_ids)
    is_video = (input_ids == model.config.video_token_index).unsqueeze(-1)
    if int(is_video.sum()) != video_tokens.shape[0] * video_tokens.shape[1]:
        raise ValueError(f"{int(is_video.sum())} <video> ids for {tuple(video_tokens.shape[:2])} video tokens")
    return embeds.masked_scatter(is_video.to(embeds.device), video_tokens.to(embeds))
