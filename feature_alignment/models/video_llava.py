"""Video-LLaVA through transformers' own class, without its processor (which wants torchvision)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import VideoLlavaForConditionalGeneration

from feature_alignment.cli.console import UserError
from feature_alignment.models.loading import load_model
from feature_alignment.models.prompts import prompt_ids, prompt_text

PROMPT = "USER: <video>\n{question} ASSISTANT:"
UNQUANTISED = ("lm_head", "model.video_tower", "model.image_tower", "model.multi_modal_projector")
KNOWN_TEXT_TOKENS = (20, 21)  # of the probe question's prompt with the released tokenizer; the older, legacy tokenising gives one more


def load_video_llava(path: str | Path, dtype: torch.dtype, device: str = "cpu", **options) -> VideoLlavaForConditionalGeneration:
    """Load a checkpoint directory of the released (or the re-saved) key format, or refuse it (UserError) if incomplete."""
    refuse_llava_layout(Path(path))
    return load_model(
        VideoLlavaForConditionalGeneration, path, "Video-LLaVA", dtype=dtype, device=device, unquantised=UNQUANTISED, **options
    )


def refuse_llava_layout(path: Path) -> None:
    """Refuse Video-LLaVA in the layout its authors (PKU) released: the same weights under other names, its towers elsewhere.

    Raises:
        UserError: For such a checkpoint. Any other config.json is left to whoever loads it.
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
            "was released; wanted the layout of transformers (model_type video_llava). Take the converted checkpoint:\n"
            "  --target_id hub:LanguageBind/Video-LLaVA-7B-hf\n"
            "or convert your own with transformers' src/transformers/models/video_llava/convert_video_llava_weights_to_hf.py."
        )


def encode_prompt(tokenizer, question: str, num_video_tokens: int) -> list[int]:
    """Prompt ids with `<video>` repeated once per video token (frames x (patches + CLS): 8 x 257 = 2,056 in the 7B)."""
    contents = ([{"type": "video"}, {"type": "text", "text": question}], f"<video>\n{question}")
    ids = prompt_ids(tokenizer, prompt_text(tokenizer, PROMPT.format(question=question), contents, "<video>", question))
    video = tokenizer.convert_tokens_to_ids("<video>")
    if ids.count(video) != 1:
        raise UserError(f"Video-LLaVA's tokenizer reads {ids.count(video)} <video> (id {video}) in a prompt with one: not its own files?")
    at = ids.index(video)
    return ids[:at] + [video] * num_video_tokens + ids[at + 1 :]


def encode_video(model: VideoLlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """Video tokens: pixel_values [b, f, 3, h, w] -> [b, f * p, d_target], p = patches + CLS of one frame."""
    layer = model.config.vision_feature_layer
    features = model.model.get_video_features(pixel_values, vision_feature_layer=layer, output_hidden_states=True).pooler_output
    return features.reshape(len(pixel_values), -1, features.shape[-1])


def splice(model: VideoLlavaForConditionalGeneration, input_ids: Tensor, video_tokens: Tensor) -> Tensor:
    """Prompt embeddings [b, s, d_target] with video_tokens [b, n, d_target] where input_ids [b, s] say `<video>`."""
    embeds = model.get_input_embeddings()(input_ids)
    places = (input_ids == model.config.video_token_index).unsqueeze(-1)
    if int(places.sum()) != video_tokens.shape[0] * video_tokens.shape[1]:
        raise ValueError(f"{int(places.sum())} <video> ids for {tuple(video_tokens.shape[:2])} video tokens")
    return embeds.masked_scatter(places.to(embeds.device), video_tokens.to(embeds))
