"""What transformers' own `generate` does with Video-LLaVA: greedy, with prompt lookup, and assisted by the model's own first layers.

Texts are what plain greedy decoding gives; the time is that of vision, prefill and decoding, as everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from feature_alignment.decoding.generation import Generation
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.state import Prompt

OF_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


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
    placeholders too, which the model refuses as a video without pixels. Where a processor reads the prompt, `generate` is given the ids
    as well, and there is no prompt lookup. The checkpoint's settings of generation are those that plain decoding follows.
    """
    model = target.full_model
    if model is None:
        raise ValueError("this decoder was not made from a whole model")
    beyond = list(range(target.vocab_size, target._head_weight.shape[0]))  # ids that no mode may say

    settings = target.settings or GenerationConfig()
    changed = bool(target.rules(torch.zeros(0, dtype=torch.long)).processors) or bool(settings.stop_strings)
    plain = GenerationConfig(**{k: v for k, v in settings.to_diff_dict().items() if k not in OF_SAMPLING})

    def embedded(prompt: Prompt) -> dict[str, Any]:
        vision, ids = target.encode_vision(prompt.pixels[None]), prompt.ids[None].to(target.device)
        return {"inputs_embeds": target._splice(ids, vision), **({"input_ids": ids} if changed else {})}

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
                generation_config=plain,
                tokenizer=target.tokenizer,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=sorted(target.eos_ids),
                pad_token_id=min(target.eos_ids, default=0),
                suppress_tokens=[*(plain.suppress_tokens or ()), *beyond] or None,
            )
            text = out[0, given["input_ids"].shape[1] if "input_ids" in given else 0 :].tolist()
            return Generation(text, 0, watch.now() - start, {})

        return generate

    lookup = {} if changed else {"generate, prompt lookup": answer(embedded, prompt_lookup_num_tokens=num_draft_tokens)}
    return {
        "generate": answer(embedded),
        **lookup,
        f"generate, assisted by its first {depth} layer{'s' * (depth > 1)}": answer(by_ids, assistant_model=first_layers(model, depth)),
    }
