"""LLaMA's layers for a few tokens behind a long prompt: few kernels, over keys and values of a fixed size.

At batch 1 a step is the reading of all weights and of the cache; what else is launched only keeps them waiting. So q, k, v are one
product, gate and up are one, and attention is two batched products around a softmax: on an H100 at 2,304 places they took 25 to 27 us a
layer, where attention in one kernel, over chunks of the cache side by side or compiled for its mask, took 30 to 90.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel


class Layer(NamedTuple):
    """Weights of one decoder layer, each [out, in], and its part of the cache, [heads, size, d_head]."""

    norm: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    keys: Tensor
    values: Tensor


class Shared(NamedTuple):
    """What all layers of a step share. cos, sin: [k, 1, d_head], the first half of sin negated; bias: see `causal_bias`; places: [k]
    int64"""

    cos: Tensor
    sin: Tensor
    bias: Tensor
    places: Tensor


Read = Callable[[Tensor, Layer, Shared, float], Tensor]


def unsupported_reason(llama: PreTrainedModel) -> str | None:
    """Why these layers cannot be read here; None if they can."""
    linear = [m for layer in llama.layers for m in layer.modules() if hasattr(m, "weight") and "norm" not in type(m).__name__.lower()]
    if any(type(m) is not nn.Linear or m.bias is not None for m in linear):
        return "weights that are quantised or have a bias"
    if len({p.device for p in llama.parameters()}) > 1:
        return "layers on several devices"
    return None if llama.config.hidden_act == "silu" else f"the activation {llama.config.hidden_act}"


@torch.no_grad()
def join(modules: list[nn.Linear]) -> Tensor:
    """Their weights as one; the modules go on with their parts of it, so that nothing is held twice, nor joined twice."""
    weights, width = [m.weight for m in modules], modules[0].weight.shape[1]
    rows = [len(w) for w in weights]
    places = [(w.untyped_storage().data_ptr(), w.storage_offset()) for w in weights]
    start, offset = places[0]
    if places == [(start, offset + width * above) for above in itertools.accumulate(rows[:-1], initial=0)]:
        return weights[0].data.as_strided((sum(rows), width), (width, 1))
    with torch.inference_mode(weights[0].is_inference()):  # as they were: a weight made while inferring could not be one
        whole = torch.cat([w.data for w in weights])
        for m, part in zip(modules, whole.split(rows), strict=True):
            m.weight.data = part
    return whole


def layers_of(llama: PreTrainedModel, number: int, size: int) -> list[Layer]:
    """The first layers with an empty cache of `size` places."""
    found, heads = [], llama.config.num_key_value_heads
    for layer in llama.layers[:number]:
        attention, mlp = layer.self_attn, layer.mlp
        joined = join([attention.q_proj, attention.k_proj, attention.v_proj]), join([mlp.gate_proj, mlp.up_proj])
        keys, values = (joined[0].new_zeros(heads, size, attention.head_dim) for _ in range(2))
        norms = layer.input_layernorm.weight.data, layer.post_attention_layernorm.weight.data
        found.append(Layer(norms[0], joined[0], attention.o_proj.weight.data, norms[1], joined[1], mlp.down_proj.weight.data, keys, values))
    return found


def causal_bias(places: Tensor, slots: Tensor, groups: int) -> Tensor:
    """What is added to attention's scores so that each token sees the places up to its own: [groups k, size].

    groups: query heads that share keys; they are read as if they were further tokens
    """
    return torch.zeros(len(places), len(slots), device=slots.device).masked_fill(slots > places[:, None], -torch.inf).repeat(groups, 1)


def attend(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """q [h, k, d], keys and values [h_kv, size, d] -> [h, k, d]: scaled dot-product attention with this bias, scores in float32."""
    rows = q.reshape(len(keys), -1, q.shape[-1])
    if q.device.type == "cuda":
        scores = torch.bmm(rows, keys.transpose(1, 2), out_dtype=torch.float32)
    else:
        scores = torch.bmm(rows.float(), keys.transpose(1, 2).float())
    return torch.bmm((scores * q.shape[-1] ** -0.5 + bias).softmax(-1).to(q.dtype), values).view(q.shape)


def read(x: Tensor, layer: Layer, shared: Shared, eps: float) -> Tensor:
    """x [k, d] through one decoder layer; writes the new keys and values to `shared.places`."""
    d_head, kv_heads = layer.keys.shape[-1], layer.keys.shape[0]
    heads = layer.out.shape[1] // d_head
    qkv = F.linear(F.rms_norm(x, x.shape[-1:], layer.norm, eps), layer.qkv).view(len(x), -1, d_head)
    turned, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    turned = turned * shared.cos + turned.roll(d_head // 2, -1) * shared.sin
    layer.keys.index_copy_(1, shared.places, turned[:, heads:].transpose(0, 1))
    layer.values.index_copy_(1, shared.places, v.transpose(0, 1))
    mixed = attend(turned[:, :heads].transpose(0, 1), layer.keys, layer.values, shared.bias)
    x = x + F.linear(mixed.transpose(0, 1).reshape(len(x), -1), layer.out)
    gate, up = F.linear(F.rms_norm(x, x.shape[-1:], layer.mlp_norm, eps), layer.gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, layer.down)


def step_inputs(llama: PreTrainedModel, x: Tensor, places: Tensor, slots: Tensor) -> Shared:
    cos, sin = (t[0, :, None] for t in llama.rotary_emb(x[None], places[None]))
    half = sin.shape[-1] // 2
    groups = llama.config.num_attention_heads // llama.config.num_key_value_heads
    return Shared(cos, torch.cat([-sin[..., :half], sin[..., half:]], -1), causal_bias(places, slots, groups), places)
