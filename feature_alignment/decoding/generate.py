"""What transformers' own `generate` does with Video-LLaVA: greedy, with prompt lookup, and assisted by the model's own first layers.

Texts are what plain greedy decoding gives; the time is that of vision, prefill and decoding, as everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from feature_alignment.decoding.engine import Generation
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.models.decoder import Decoder, Prompt


def first_layers(model: PreTrainedModel, depth: int) -> PreTrainedModel:
    """The same model, cut off behind `depth` decoder layers: same vision, embeddings, norm and head, no copy of a weight."""

    def shallow(module: Any) -> Any:
        twin = copy.copy(module)
        twin._modules = dict(module._modules)
        twin.config = copy.deepcopy(module.config)
        return twin

    outer, inner, llama = shallow(model), shallow(model.model), shallow(model.model.language_model)
    llama.layers = llama.layers[:depth]
    llama.config.num_hidden_layers = outer.config.text_config.num_hidden_layers = depth
    inner.language_model, outer.model = llama, inner
    outer.generation_config = copy.deepcopy(model.generation_config)
    return outer


def ways(target: Decoder, max_new_tokens: int, num_draft_tokens: int, depth: int) -> dict[str, Callable[[Prompt], Generation]]:
    """Name -> answer a prompt. depth: how many of the target's own layers assist

    With embeddings for a prompt, `generate` knows no prompt ids: prompt lookup sees the answer only. With ids it would propose the video's
    placeholders too, which the model refuses as a video without pixels.
    """
    model = target.whole
    if model is None:
        raise ValueError("this decoder was not made from a whole model")
    beyond = list(range(target.vocab_size, target._head.weight.shape[0])) or None  # ids that no mode may say

    def embedded(prompt: Prompt) -> dict[str, Any]:
        vision = target.encode_vision(prompt.pixels[None])
        return {"inputs_embeds": target._splice(prompt.ids[None].to(target.device), vision)}

    def by_ids(prompt: Prompt) -> dict[str, Any]:
        ids = prompt.ids[None].to(target.device)
        pixels = prompt.pixels[None].to(target.device, target.head_weight.dtype)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}

    def answer(inputs: Callable[[Prompt], dict[str, Any]], **options: Any) -> Callable[[Prompt], Generation]:
        @torch.inference_mode()
        def generate(prompt: Prompt) -> Generation:
            watch = Stopwatch(target.device)
            start = watch.now()
            given = inputs(prompt)
            out: Tensor = model.generate(
                **given,
                **options,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=sorted(target.eos_ids),
                pad_token_id=min(target.eos_ids, default=0),
                suppress_tokens=beyond,
            )
            text = out[0, given["input_ids"].shape[1] if "input_ids" in given else 0 :].tolist()
            return Generation(text, 0, watch.now() - start, {})

        return generate

    return {
        "generate": answer(embedded),
        "generate, prompt lookup": answer(embedded, prompt_lookup_num_tokens=num_draft_tokens),
        f"generate, assisted by its first {depth} layer{'s' * (depth > 1)}": answer(by_ids, assistant_model=first_layers(model, depth)),
    }
