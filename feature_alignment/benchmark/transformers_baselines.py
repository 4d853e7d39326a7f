"""Baselines: transformers' own `generate` with Video-LLaVA, greedy, with prompt lookup, and assisted by the model's first layers.

Their texts are those of plain greedy decoding; their time includes vision, prefill and decoding, as everywhere.
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

SAMPLING_SETTINGS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def first_layers(model: PreTrainedModel, depth: int) -> PreTrainedModel:
    """The same model with its first `depth` decoder layers only; it shares all weights."""

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
    """The baselines: name -> function that answers a prompt.

    Prompt lookup gets embeddings as the prompt and so searches the answer only: with prompt ids it would also propose the video's
    placeholder tokens, which the model rejects. If a logits processor reads the prompt, `generate` gets the ids as well, and there is no
    prompt lookup. The checkpoint's generation settings apply, as in plain decoding.

    Args:
        target: target model
        max_new_tokens: longest answer
        num_draft_tokens: draft length of prompt lookup
        depth: number of the target's own layers that assist

    Raises:
        ValueError: the decoder was not made from a complete model
    """
    model = target.full_model
    if model is None:
        raise ValueError("this decoder was not made from a complete model")
    unshared = list(range(target.vocab_size, target._head_weight.shape[0]))  # token ids outside the shared vocabulary

    settings = target.settings or GenerationConfig()
    needs_ids = bool(target.rules(torch.zeros(0, dtype=torch.long)).processors) or bool(settings.stop_strings)
    plain = GenerationConfig(**{k: v for k, v in settings.to_diff_dict().items() if k not in SAMPLING_SETTINGS})

    def embedded(prompt: Prompt) -> dict[str, Any]:
        vision, ids = target.encode_vision(prompt.pixels[None]), prompt.ids[None].to(target.device)
        return {"inputs_embeds": target._splice(ids, vision), **({"input_ids": ids} if needs_ids else {})}

    def by_ids(prompt: Prompt) -> dict[str, Any]:
        ids = prompt.ids[None].to(target.device)
        pixels = prompt.pixels[None].to(target.device, target.head_weight.dtype)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}

    def answer(inputs_of: Callable[[Prompt], dict[str, Any]], **options: Any) -> Callable[[Prompt], Generation]:
        @torch.inference_mode()
        def generate(prompt: Prompt) -> Generation:
            watch = Stopwatch(target.device)
            start = watch.now()
            inputs = inputs_of(prompt)
            out: Tensor = model.generate(
                **inputs,
                **options,
                generation_config=plain,
                tokenizer=target.tokenizer,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=sorted(target.eos_ids),
                pad_token_id=min(target.eos_ids, default=0),
                suppress_tokens=[*(plain.suppress_tokens or ()), *unshared] or None,
            )
            text = out[0, inputs["input_ids"].shape[1] if "input_ids" in inputs else 0 :].tolist()
            return Generation(text, 0, watch.now() - start, {})

        return generate

    lookup = {} if needs_ids else {"generate, prompt lookup": answer(embedded, prompt_lookup_num_tokens=num_draft_tokens)}
    return {
        "generate": answer(embedded),
        **lookup,
        f"generate, assisted by its first {depth} layer{'s' * (depth > 1)}": answer(by_ids, assistant_model=first_layers(model, depth)),
    }
