"""Packed linear weights on a CPU: the same products, chosen only where they are faster, and left alone where they cannot be made."""

from __future__ import annotations

import pytest
import torch
from conftest import as_decoder, prompt_of, tiny_llama
from torch import nn

from feature_alignment.decoding.plain import greedy
from feature_alignment.models import packed
from feature_alignment.models.packed import PackedLinear, best_cpu_linear, pack, packed_product, unsupported

CAN_PACK = unsupported(nn.Linear(8, 8)) is None
needs_packing = pytest.mark.skipif(not CAN_PACK, reason="this torch or this CPU packs no linear weights")
TIMES = {"torch": {"1": 2.0, "6": 4.0}, "packed": {"1": 1.0, "6": 1.5}, "several": {"1": 3.0, "6": 3.0}}


def timed(monkeypatch, torch_ms, packed_ms):
    """Let the trial find these times."""
    monkeypatch.setattr(packed, "_milliseconds", lambda *ways: [torch_ms, packed_ms])


def packed_layers(model):
    return sum(isinstance(module, PackedLinear) for module in model.modules())


@pytest.fixture
def small_layers(monkeypatch):
    """Layers of the tests' tiny models count as large enough."""
    monkeypatch.setattr(packed, "SMALLEST", 1)


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (9, 24), (2, 3, 24), (64, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_product_is_torchs_own(dtype, shape, bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 40, bias=bias).to(dtype), torch.randn(shape).to(dtype)
    with torch.inference_mode():
        wanted, found = linear(x), PackedLinear(linear)(x)
    assert found.shape == wanted.shape and found.dtype == dtype
    torch.testing.assert_close(found, wanted, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.skipif(not CAN_PACK or not packed.multiplies_bfloat16(), reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_in_bfloat16_is_that_of_rounded_numbers(bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 40, bias=bias), torch.randn(2, 3, 24)
    with torch.inference_mode():
        found, rounded = PackedLinear(linear, in_bfloat16=True)(x), nn.Linear(24, 40, bias=bias)
        rounded.weight.copy_(linear.weight.bfloat16())
        if bias:
            rounded.bias.copy_(linear.bias.bfloat16())
        wanted = rounded(x.bfloat16().float())
    assert found.dtype == torch.float32 and linear.weight.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1 / 128)  # the sum is rounded as well
    assert not torch.allclose(found, linear(x), atol=1e-5)


@needs_packing
def test_an_input_that_is_a_slice_of_another_is_read_right():
    torch.manual_seed(0)
    linear, wide = nn.Linear(24, 40, bias=False), torch.randn(3, 5, 48)
    with torch.inference_mode():
        for x in (wide[..., 24:], wide[..., ::2], wide.transpose(0, 1)[..., :24]):
            torch.testing.assert_close(packed_product(linear.weight)(x), linear(x), atol=1e-6, rtol=1e-5)


@needs_packing
def test_a_packed_decoder_writes_the_same_texts(small_layers, monkeypatch):
    timed(monkeypatch, TIMES["torch"], TIMES["packed"])
    usual, other = as_decoder(tiny_llama(0)), as_decoder(tiny_llama(0))
    assert other.choose_linear().kind == "packed" and packed_layers(other.llama) == 14 and other._packed_head is not None
    for prompt in (prompt_of(1, 5, 9, 3), prompt_of(1, 7)):
        assert greedy(other, prompt, 20).token_ids == greedy(usual, prompt, 20).token_ids
        a, b = usual.prefill([prompt]), other.prefill([prompt])
        ids = torch.tensor([[4, 8, 15, 16, 23, 42]])
        torch.testing.assert_close(other.lm_head(other.step(b, ids)), usual.lm_head(usual.step(a, ids)), atol=1e-4, rtol=1e-4)


@needs_packing
def test_one_token_through_torchs_product_where_that_is_faster(small_layers, monkeypatch):
    """To the bit as without packed weights, in layers, head and `generate`; several tokens, also of several rows, over packed weights."""
    timed(monkeypatch, TIMES["torch"], {"1": 2.5, "6": 1.5})
    usual, other = as_decoder(tiny_llama(0)), as_decoder(tiny_llama(0))
    other.full_model = tiny_llama(0)
    assert other.choose_linear().kind == "mixed" and "torch's own product for one" in other.linear.reason
    other.restrict_vocabulary(60)
    linear, calls, product = other.llama.layers[0].mlp.up_proj, [], torch.ops.mkldnn._linear_pointwise
    found = {n: linear(torch.ones(1, n, 32)) for n in (1, 6)} | {"rows": linear(torch.ones(3, 1, 32))}
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *given: calls.append(given[0].shape) or product(*given))
    again = PackedLinear(usual.llama.layers[0].mlp.up_proj, is_mixed=True)
    for n, wanted in found.items():
        x = torch.ones(3, 1, 32) if n == "rows" else torch.ones(1, n, 32)
        assert torch.equal(again(x), wanted)
    assert calls == [(1, 6, 32), (3, 1, 32)]
    for prompt in (prompt_of(1, 5, 9, 3), prompt_of(1, 7)):
        a, b = usual.prefill([prompt]), other.prefill([prompt])
        b.cache, b.last = a.cache, a.last  # the same keys and values, to compare one step to the bit
        h = other.step(b, torch.tensor([[4]]))
        a.cache.crop(-1)  # both read the token after the same keys and values
        assert torch.equal(usual.step(a, torch.tensor([[4]])), h) and torch.equal(usual.lm_head(h[0])[:, :60], other.lm_head(h[0]))
    assert packed_layers(other.full_model) == 15


@needs_packing
def test_an_early_exit_has_no_head_to_pack(small_layers):
    decoder = as_decoder(tiny_llama(0), [1])
    decoder.pack_linear()
    assert decoder.linear.kind == "packed" and packed_layers(decoder.llama) == 7 and decoder._packed_head is None


@needs_packing
def test_a_smaller_vocabulary_packs_its_own_head(small_layers):
    decoder = as_decoder(tiny_llama(0))
    decoder.pack_linear()
    decoder.restrict_vocabulary(9)
    hidden = torch.randn(2, decoder.width)
    torch.testing.assert_close(decoder.lm_head(hidden), hidden @ decoder.head_weight.T, atol=1e-5, rtol=1e-5)
    assert decoder.lm_head(hidden).shape == (2, 9)


@needs_packing
@pytest.mark.parametrize(
    ("torch_ms", "packed_ms", "kind"),
    [
        ("torch", "packed", "packed"),
        ("packed", "torch", "torch"),
        ("torch", "torch", "torch"),
        ("torch", "several", "mixed"),
        ("several", "torch", "torch"),
    ],
)
def test_the_faster_product_is_chosen_and_the_choice_says_why(small_layers, monkeypatch, torch_ms, packed_ms, kind):
    timed(monkeypatch, TIMES[torch_ms], TIMES[packed_ms])
    llama = tiny_llama(0).model
    choice = best_cpu_linear(llama)
    assert choice.kind == kind and (packed_layers(llama) > 0) is (kind != "torch")
    assert (
        choice.to_json()["torch_ms"] == TIMES[torch_ms] and choice.to_json()["packed_ms"] == TIMES[packed_ms] and "faster" in choice.reason
    )


def test_a_torch_without_the_operators_keeps_its_own_product(small_layers, monkeypatch):
    def missing(weight, *settings):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")

    monkeypatch.setattr(packed, "unsupported", lambda model: None)
    monkeypatch.setattr(packed, "packed_product", missing)
    decoder = as_decoder(tiny_llama(0))
    choice = decoder.choose_linear()
    assert choice.kind == "torch" and "_reorder_linear_weight" in choice.reason and not packed_layers(decoder.llama)
    assert greedy(decoder, prompt_of(1, 5), 4).token_ids


def test_weights_that_no_cpu_kernel_reads_are_left_alone():
    half, other = nn.Linear(8, 8).half(), nn.Linear(8, 8).double()
    assert "float16" in unsupported(half) and "float64" in unsupported(other)
    assert "CPU" in unsupported(nn.Linear(8, 8, device="meta"))
    assert best_cpu_linear(half).kind == "torch" and best_cpu_linear(half).torch_ms == {}


@needs_packing
def test_only_bfloat16_weights_need_a_cpu_that_multiplies_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert unsupported(nn.Linear(8, 8)) is None
    assert unsupported(nn.Linear(8, 8).bfloat16()) == "this CPU does not multiply bfloat16"
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert unsupported(nn.Linear(8, 8).bfloat16()) is None


def test_steps_over_a_fixed_cache_keep_torchs_product():
    decoder = as_decoder(tiny_llama(0))
    decoder.use_steps("graphs")
    assert decoder.choose_linear().kind == "torch" and "graphs" in decoder.linear.reason and not packed_layers(decoder.llama)


@needs_packing
def test_packing_leaves_weights_names_and_ties_as_they_are(small_layers):
    model = tiny_llama(0)
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    pack(model)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before
    assert packed_layers(model) == 15 and type(model.lm_head) is PackedLinear
    pack(model)  # a second time changes nothing
    assert packed_layers(model) == 15


def test_a_copy_that_does_not_fit_into_memory_is_not_made(small_layers, monkeypatch):
    model = nn.Sequential(nn.Linear(1024, 1024))
    monkeypatch.setattr(packed.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 5 << 20}))
    assert unsupported(model) == "a packed copy takes 4 MiB and 5 MiB are free"
    monkeypatch.setattr(packed.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 6 << 20}))
    assert "MiB" not in (unsupported(model) or "")


def test_the_trial_takes_the_best_of_several_turns(monkeypatch):
    """A busy machine in the first turn, which slows one way down, does not decide."""
    now, turns = [0.0], []
    monkeypatch.setattr(packed, "TRIAL_SECONDS", 0.0)
    monkeypatch.setattr(packed.time, "perf_counter", lambda: now[0])

    class Timed(nn.Linear):
        milliseconds = 1.0

        def forward(self, x):
            turns.append(self.milliseconds)
            busy = len(turns) <= 2
            now[0] += self.milliseconds * (1e-2 if busy else 1e-3)
            return x

    fast, slow = Timed(4, 4), Timed(4, 4)
    slow.milliseconds = 2.0
    assert packed._milliseconds([fast, fast], [slow]) == [{"1": 2.0, "6": 2.0}, {"1": 2.0, "6": 2.0}]
    assert turns[:6] == [1.0, 1.0, 2.0] * 2 and len(turns) == 3 * 2 * 3  # three rounds at least, of three layers and two numbers of tokens
