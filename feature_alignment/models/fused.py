"""LLaMA's decoder layers for a few new tokens after a long prompt: few kernels, over a key/value cache of fixed size.

At batch 1 a step is bound by reading the weights and the cache, so further kernel launches only add waiting time. Hence q, k and v are
one product, gate and up are one, and attention is two batched products around a softmax. On an H100 with 2,304 cached positions this
attention took 25 to 27 us per layer; single-kernel attention, split over the cache or compiled for its mask, took 30 to 90.
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
    """One decoder layer: weights, each [out, in], and keys and values of b rows, each [b, h_kv, size, d_head]."""

    norm: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    keys: Tensor
    values: Tensor

    def of_rows(self, number: int) -> Layer:
        """The layer with the first rows of its cache."""
        return self if number == len(self.keys) else self._replace(keys=self.keys[:number], values=self.values[:number])


class StepInputs(NamedTuple):
    """Tensors that all layers of a step share.

    Args:
        cos: [b * k, 1, d_head], rotary cosines.
        sin: [b * k, 1, d_head], rotary sines, the first half negated.
        bias: [b, 1, groups * k, size] float32, attention bias; see `causal_bias`.
        positions: [b, k] int64, positions of the new tokens of each row.
        rows: [b, 1] int64, 0 … b - 1.
    """

    cos: Tensor
    sin: Tensor
    bias: Tensor
    positions: Tensor
    rows: Tensor


ReadLayer = Callable[[Tensor, Layer, StepInputs, float], Tensor]


def unsupported_reason(llama: PreTrainedModel) -> str | None:
    """Why this module cannot run a model's layers; None if it can."""
    linear = [m for layer in llama.layers for m in layer.modules() if hasattr(m, "weight") and "norm" not in type(m).__name__.lower()]
    if any(type(m) is not nn.Linear or m.bias is not None for m in linear):
        return "weights that are quantized or have a bias"
    if len({p.device for p in llama.parameters()}) > 1:
        return "layers on several devices"
    return None if llama.config.hidden_act == "silu" else f"the activation {llama.config.hidden_act}"


@torch.no_grad()
def join_weights(modules: list[nn.Linear]) -> Tensor:
    """One matrix of the weights of several modules, [sum of out, in].

    The modules keep views of it, so no weight is stored twice. Weights that are already joined are returned as they are.
    """
    weights, width = [m.weight for m in modules], modules[0].weight.shape[1]
    rows = [len(w) for w in weights]
    locations = [(w.untyped_storage().data_ptr(), w.storage_offset()) for w in weights]
    start, offset = locations[0]
    if locations == [(start, offset + width * above) for above in itertools.accumulate(rows[:-1], initial=0)]:
        return weights[0].data.as_strided((sum(rows), width), (width, 1))
    with torch.inference_mode(weights[0].is_inference()):  # an inference tensor cannot become the data of a normal parameter
        joined = torch.cat([w.data for w in weights])
        for m, part in zip(modules, joined.split(rows), strict=True):
            m.weight.data = part
    return joined


def join_layers(llama: PreTrainedModel, number: int) -> list[tuple[Tensor, Tensor]]:
    """The joined weights q, k, v and gate, up of the first decoder layers of a model, which are joined in place if they are not yet."""
    parts = [(layer.self_attn, layer.mlp) for layer in llama.layers[:number]]
    return [(join_weights([a.q_proj, a.k_proj, a.v_proj]), join_weights([m.gate_proj, m.up_proj])) for a, m in parts]


def fused_layers(llama: PreTrainedModel, number: int, rows: int, size: int) -> list[Layer]:
    """The first decoder layers of a model, each with an empty cache.

    Args:
        llama: Model whose q, k, v and gate, up weights get joined in place.
        number: Number of layers.
        rows: Rows of the cache.
        size: Positions of each row.
    """
    layers, heads = [], llama.config.num_key_value_heads
    for layer, joined in zip(llama.layers, join_layers(llama, number), strict=False):
        attention, mlp = layer.self_attn, layer.mlp
        keys, values = (joined[0].new_zeros(rows, heads, size, attention.head_dim) for _ in range(2))
        norms = layer.input_layernorm.weight.data, layer.post_attention_layernorm.weight.data
        layers.append(
            Layer(norms[0], joined[0], attention.o_proj.weight.data, norms[1], joined[1], mlp.down_proj.weight.data, keys, values)
        )
    return layers


def causal_bias(positions: Tensor, cache_positions: Tensor, groups: int) -> Tensor:
    """Additive attention bias under which each token attends to all positions of its row up to its own.

    Args:
        positions: [b, k] int64, positions of the new tokens.
        cache_positions: [size] int64, 0 … size - 1.
        groups: Query heads per key/value head; `attend` treats them as further tokens.

    Returns:
        [b, 1, groups * k, size] float32: 0 where attention is allowed, -inf elsewhere.
    """
    later = cache_positions > positions[:, None, :, None]
    return torch.zeros(later.shape, device=later.device).masked_fill(later, -torch.inf).repeat(1, 1, groups, 1)


def attend(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Scaled dot-product attention with an additive bias; scores are computed in float32.

    Args:
        q: [b, h, k, d_head], queries after the rotary embedding.
        keys: [b, h_kv, size, d_head].
        values: [b, h_kv, size, d_head].
        bias: [b, 1, h / h_kv * k, size] float32.

    Returns:
        [b, h, k, d_head].
    """
    b, heads, size, d_head = keys.shape
    rows, columns = q.reshape(b * heads, -1, d_head), keys.flatten(0, 1).transpose(1, 2)
    on_gpu = q.device.type == "cuda"
    scores = torch.bmm(rows, columns, out_dtype=torch.float32) if on_gpu else torch.bmm(rows.float(), columns.float())
    weights = (scores.view(b, heads, -1, size) * d_head**-0.5 + bias).softmax(-1).to(q.dtype)
    return torch.bmm(weights.flatten(0, 1), values.flatten(0, 1)).view(q.shape)


def write(cache: Tensor, new: Tensor, inputs: StepInputs) -> None:
    """Write the new tokens' keys or values [b, k, h_kv, d_head] to a cache [b, h_kv, size, d_head]."""
    if len(cache) == 1:
        cache[0].index_copy_(1, inputs.positions[0], new[0].transpose(0, 1))
    else:
        cache[inputs.rows, :, inputs.positions] = new


def read_layer(x: Tensor, layer: Layer, inputs: StepInputs, eps: float) -> Tensor:
    """Run one decoder layer; the new keys and values are written to the layer's cache in place.

    Args:
        x: [b * k, d], hidden states of the new tokens, row by row.
        layer: Weights and cache.
        inputs: Rotary angles, bias and positions of this step.
        eps: Epsilon of the RMS norms.

    Returns:
        [b * k, d], the layer's output.
    """
    b, kv_heads, _, d_head = layer.keys.shape
    heads = layer.out.shape[1] // d_head
    qkv = F.linear(F.rms_norm(x, x.shape[-1:], layer.norm, eps), layer.qkv).view(len(x), -1, d_head)
    rotated, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    rotated = (rotated * inputs.cos + rotated.roll(d_head // 2, -1) * inputs.sin).unflatten(0, (b, -1))
    write(layer.keys, rotated[:, :, heads:], inputs)
    write(layer.values, v.unflatten(0, (b, -1)), inputs)
    mixed = attend(rotated[:, :, :heads].transpose(1, 2), layer.keys, layer.values, inputs.bias)
    x = x + F.linear(mixed.transpose(1, 2).reshape(len(x), -1), layer.out)
    gate, up = F.linear(F.rms_norm(x, x.shape[-1:], layer.mlp_norm, eps), layer.gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, layer.down)


def step_inputs(llama: PreTrainedModel, x: Tensor, positions: Tensor, cache_positions: Tensor) -> StepInputs:
    """Compute what all layers of a step share.

    Args:
        llama: Model with the rotary embedding.
        x: [b * k, d], embedded tokens; only their dtype and device count.
        positions: [b, k] int64, positions of the tokens.
        cache_positions: [size] int64, 0 … size - 1.
    """
    cos, sin = (t[0, :, None] for t in llama.rotary_emb(x[None], positions.view(1, -1)))
    half = sin.shape[-1] // 2
    groups = llama.config.num_attention_heads // llama.config.num_key_value_heads
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    return StepInputs(cos, sin, causal_bias(positions, cache_positions, groups), positions, rows)
