"""Captured steps over a fixed cache: the same states, texts and drafts as eager steps, and no synchronization with the device."""

from __future__ import annotations

import contextlib
import gc
import time
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from conftest import as_decoder, main_of, noisy_copy, prompt_of, tiny_llama

from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.decoding import overlap
from feature_alignment.decoding.chained_proposer import ChainedProposer
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.overlap import _in_thread
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.proposers import ModelProposer
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.models import fixed, fused
from feature_alignment.models.fixed import FixedCache


def both(taps=None, steps="graphs", kv_heads=2):
    model = tiny_llama(0, layers=3, kv_heads=kv_heads)
    eager, other = as_decoder(model, taps), as_decoder(model, taps)
    other.use_steps(steps)
    return eager, other


@pytest.mark.parametrize(("taps", "kv_heads"), [(None, 2), ([2], 2), ([1, 3], 2), (None, 1)])
def test_states_are_those_of_eager_steps(taps, kv_heads):
    eager, other = both(taps, kv_heads=kv_heads)
    for prompt in (prompt_of(1, 5, 9, 3), prompt_of(1, 7, 9, 3, 4, 4)):  # the second prompt replaces the first in the cache
        a, b = eager.prefill([prompt]), other.prefill([prompt])
        for ids, back in (([5], 0), ([5, 6, 7], 2), ([8, 3, 3, 1, 1, 9, 9], 7), (list(range(3, 40)), 30), ([3], 0)):
            found, wanted = other.step(b, torch.tensor([ids])), eager.step(a, torch.tensor([ids]))
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
            eager.rollback(a, back)
            other.rollback(b, back)
            assert a.length == b.length


def test_a_longer_text_gets_more_room(monkeypatch):
    monkeypatch.setattr(fixed, "ROOM", 4)
    eager, other = both()
    for prompt in (prompt_of(1, 5), prompt_of(*range(1, 62)), prompt_of(1, 5)):
        assert other.prefill([prompt]).length == eager.prefill([prompt]).length
        assert greedy(other, prompt, 120).token_ids == greedy(eager, prompt, 120).token_ids


@pytest.mark.parametrize(("length", "k"), [(57, 7), (61, 3), (40, 18), (62, 1), (60, 4)])
def test_a_cache_grows_for_the_padding_alone(monkeypatch, length, k):
    """The tokens fit and their padding does not; padding is written to the cache too."""
    monkeypatch.setattr(fixed, "ROOM", 1)
    eager, other = both()
    prompt = prompt_of(1, *range(3, length + 2))
    a, b = eager.prefill([prompt]), other.prefill([prompt])
    size, ids = b.cache._size, torch.arange(4, 4 + k)[None]
    padded = next(n for n in fixed.LENGTHS if n >= k)
    assert length + k <= size
    torch.testing.assert_close(other.step(b, ids), eager.step(a, ids), atol=1e-4, rtol=1e-4)
    assert (b.cache._size > size) is (length + padded > size)
    torch.testing.assert_close(other.step(b, ids[:, :1]), eager.step(a, ids[:, :1]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_model_with_one_layer_on_another_device_runs_eagerly(caplog, layer):
    model = tiny_llama(0, layers=3)
    decoder = as_decoder(model)
    assert fused.unsupported_reason(decoder.llama) is None
    decoder.llama.layers[layer].to("meta")
    assert fused.unsupported_reason(decoder.llama) == "layers on several devices"
    decoder.use_steps("graphs")
    assert decoder.steps == "eager" and "several devices" in caplog.text


def test_a_text_whose_prompt_was_replaced_is_refused():
    _, other = both()
    first = other.prefill([prompt_of(1, 5)])
    other.prefill([prompt_of(1, 6)])
    with pytest.raises(ValueError, match="holds one prompt at a time"):
        other.step(first, torch.tensor([[5]]))


def test_a_batch_of_prompts_uses_eager_steps():
    eager, other = both()
    prompts = [prompt_of(1, 5), prompt_of(1, 6)]
    assert other.generate(other.prefill(prompts), 20) == eager.generate(eager.prefill(prompts), 20)


@torch.inference_mode()
def test_drafts_and_texts_are_those_of_eager_steps():
    model = tiny_llama(0, layers=3)
    adapter, chained = HiddenAdapter(32, 32, 8), ChainedAdapter(32, 32, 1, width=8)
    found = []
    for steps in ("eager", "graphs"):
        target, draft = as_decoder(model), as_decoder(noisy_copy(model, 0.05))
        target.use_steps(steps)
        draft.use_steps(steps)
        proposers = (
            ModelProposer(draft, None, None),
            ModelProposer(draft, adapter, target.lm_head),
            ChainedProposer(draft, chained, target.head_weight, target.embeddings),
        )
        for proposer in proposers:
            for last in (3, 4):
                prompt = prompt_of(1, 5, 9, last)
                for rule in ("token",) if proposer is proposers[0] else ("token", "feature", "relaxed"):
                    got = speculate(target, proposer, prompt, prompt, accept=rule, threshold=0.3, num_draft_tokens=4, max_new_tokens=16)
                    assert rule != "token" or got.token_ids == greedy(target, prompt, 16).token_ids
                    found.append((got.token_ids, [(r.proposed, r.accepted) for r in got.rounds]))
    half = len(found) // 2
    assert found[:half] == found[half:]


def one_graph(call):
    """The call as one graph without a break: reading a tensor's value would raise here, and would make a capture fail."""
    return torch.compile(call, fullgraph=True, dynamic=False, backend="eager")


@pytest.mark.parametrize(("taps", "norm"), [(None, "post"), ([3], "post"), ([2], "pre"), ([1, 3], "pre")])
def test_states_of_several_layers_are_labeled_pre_norm(taps, norm):
    """Of layers 1 and 3, only layer 3 passes the final norm."""
    model = as_decoder(tiny_llama(0, layers=3), taps)
    assert model.norm == norm
    assert model.norms == {k: "post" if k == 3 else "pre" for k in taps or [3]}


@pytest.mark.parametrize("taps", [None, [1, 3]])
@torch.inference_mode()
def test_steps_never_synchronize_with_the_device(taps, monkeypatch):
    eager, other = both(taps)
    a, b = eager.prefill([prompt_of(1, 5, 9)]), other.prefill([prompt_of(1, 5, 9)])
    assert isinstance(b.cache, FixedCache)
    b.cache._step = one_graph(b.cache._forward)
    for ids in ([4], [4, 5]):
        found, wanted = other.step(b, torch.tensor([ids])), eager.step(a, torch.tensor([ids]))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_drafting_steps_never_synchronize_with_the_device(monkeypatch):
    target = as_decoder(tiny_llama(0))
    prompt, watch = prompt_of(1, 5, 9), Stopwatch()
    states = target.teacher_force(target.prefill([prompt]), torch.tensor([[5, 6, 7]]))[0]
    proposers = [ChainedProposer(target, ChainedAdapter(32, 32, 1, width=8), target.head_weight, target.embeddings) for _ in range(2)]
    proposers[1]._adapter, proposers[1]._chain = proposers[0]._adapter, proposers[0]._chain
    proposers[1]._block = one_graph(proposers[1]._draft_block)
    proposers[1]._first, proposers[1]._next = one_graph(proposers[1]._expect), one_graph(proposers[1]._read_and_expect)
    monkeypatch.setattr(torch._dynamo.config, "allow_rnn", True)  # a limit of torch.compile, not of CUDA graphs
    drafts = []
    for proposer in proposers:
        proposer.start(prompt, watch)
        drafts.append([proposer.propose([5, 6, 7], states, 6, watch, floor).token_ids.tolist() for floor in (0.0, 1e-9)])
    assert drafts[0] == drafts[1] and drafts[0][0] == drafts[0][1]  # a whole round at once, and one token after the other
    adapter, state = HiddenAdapter(32, 32, 8), torch.randn(1, 32)
    torch.testing.assert_close(one_graph(adapter)(state), adapter(state))


def test_a_prompt_that_fits_keeps_the_captured_graphs():
    _, other = both()
    steps = set()
    for length in (10, 60, 30):
        state = other.prefill([prompt_of(1, *[5] * length)])
        other.step(state, torch.tensor([[5, 6]]))
        steps.add(id(state.cache._step))
    assert len(steps) == 1


def test_joined_weights_are_stored_once():
    _, other = both()
    before = sum(p.numel() for p in other.llama.parameters())
    state = other.prefill([prompt_of(1, 5)])
    layers = state.cache._layers
    assert sum(p.numel() for p in other.llama.parameters()) == before
    for layer, held in zip(other.llama.layers, layers, strict=True):
        q, k, v = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight
        assert {w.untyped_storage().data_ptr() for w in (q, k, v)} == {held.qkv.untyped_storage().data_ptr()}
        torch.testing.assert_close(held.qkv, torch.cat([q, k, v]), atol=0, rtol=0)
    other.use_steps("graphs")
    again = other.prefill([prompt_of(1, 5)]).cache._layers
    for new, old in zip(again, layers, strict=True):
        assert new.qkv.data_ptr() == old.qkv.data_ptr() and new.qkv.shape == old.qkv.shape
        assert new.gate_up.data_ptr() == old.gate_up.data_ptr() and new.keys.data_ptr() != old.keys.data_ptr()


@pytest.mark.parametrize("asked", ["graphs", "auto"])
def test_unsupported_layers_run_eagerly(asked, caplog, monkeypatch):
    """Also where `auto` would compile them, on a GPU."""
    model = tiny_llama(0)
    model.model.layers[0].mlp.gate_proj = torch.nn.Linear(32, 64, bias=True)
    decoder = as_decoder(model)
    monkeypatch.setattr(fixed, "eager_fallbacks", [])
    with monkeypatch.context() as patch:
        patch.setattr(type(decoder), "device", property(lambda self: torch.device("cuda")))
        decoder.use_steps(asked)
    wanted = "graphs" if asked == "graphs" else "compiled"
    assert decoder.steps == "eager" and "quantized or have a bias" in caplog.text
    assert len(fixed.eager_fallbacks) == 1 and f"{wanted} steps of LlamaModel run eagerly: weights" in fixed.eager_fallbacks[0]
    assert not isinstance(decoder.prefill([prompt_of(1, 5)]).cache, FixedCache)


@pytest.mark.parametrize(("device", "steps"), [("cpu", "eager"), ("cuda", "compiled")])
def test_auto_steps_are_compiled_on_a_gpu_and_eager_on_a_cpu(device, steps, monkeypatch):
    decoder = as_decoder(tiny_llama(0))
    monkeypatch.setattr(type(decoder), "device", property(lambda self: torch.device(device)))
    decoder.use_steps("auto")
    assert decoder.steps == steps and (decoder.fixed_cache is None) is (steps == "eager")


@pytest.mark.slow
def test_compiled_steps():
    """Each length is compiled once per model, for two models of different sizes; none falls back to eager."""
    before = len(fixed.eager_fallbacks)
    for kv_heads in (2, 1):
        eager, other = both(steps="compiled", kv_heads=kv_heads)
        prompt = prompt_of(1, 5, 9)
        assert greedy(other, prompt, 20).token_ids == greedy(eager, prompt, 20).token_ids
        a, b = eager.prefill([prompt]), other.prefill([prompt])
        for length in (*fixed.LENGTHS, 32):
            ids = torch.full((1, length), 5)
            torch.testing.assert_close(other.step(b, ids), eager.step(a, ids), atol=1e-4, rtol=1e-4)
            eager.rollback(a, length)
            other.rollback(b, length)
    assert len(fixed.eager_fallbacks) == before


def test_steps_that_cannot_be_compiled_fall_back_to_eager(monkeypatch, caplog):
    def compiler(call, **_):
        def fail(*inputs):
            raise RuntimeError("no C compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(fixed, "eager_fallbacks", [])
    eager, other = both(steps="compiled")
    prompt = prompt_of(1, 5, 9)
    assert greedy(other, prompt, 8).token_ids == greedy(eager, prompt, 8).token_ids
    assert fixed.eager_fallbacks == ["steps cannot be compiled: no C compiler here"]


class OnFakeGpu(torch.Tensor):
    """A tensor that reports a GPU as its device."""

    @property
    def device(self):
        return torch.device("cuda")


def test_steps_that_cannot_be_captured_fall_back_to_eager(monkeypatch, caplog):
    tried = []

    def capture(self, inputs):
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(fixed.CapturedStep, "_capture", capture)
    monkeypatch.setattr(fixed, "eager_fallbacks", [])
    double = fixed.CapturedStep(lambda x: x * 2)
    assert [double(torch.full((1,), float(i)).as_subclass(OnFakeGpu)).item() for i in range(3)] == [0, 2, 4]
    assert len(tried) == 1 and "run eagerly: operation not permitted" in caplog.text
    assert len(fixed.eager_fallbacks) == 1


def test_a_graph_is_captured_once_per_shape_and_replayed(monkeypatch):
    """The bookkeeping of captured graphs, with a fake capture that notes its calls."""
    made, replayed = [], []

    def capture(self, inputs):
        out = self._call(*inputs)
        made.append(tuple(x.shape for x in inputs))

        class Graph:
            def replay(self):
                out.copy_(call(*inputs))
                replayed.append(1)

        return inputs, Graph(), out

    def call(x):
        return x * 2

    monkeypatch.setattr(fixed.CapturedStep, "_capture", capture)
    double = fixed.CapturedStep(call)
    results = [double(torch.full((n,), float(i)).as_subclass(OnFakeGpu)) for i, n in enumerate((2, 2, 3, 2))]
    assert [r.tolist() for r in results] == [[0, 0], [2, 2], [4, 4, 4], [6, 6]]  # none was overwritten by a later one
    assert made == [(torch.Size([2]),), (torch.Size([3]),)] and len(replayed) == 4


def test_no_garbage_is_collected_during_a_capture():
    """A decoder and its graphs form a reference cycle, which the garbage collector may free at any time but during a capture."""

    class Cycle:
        def __init__(self):
            self.itself = self

        def __del__(self):
            freed.append(1)

    freed: list[int] = []
    Cycle()
    assert not freed
    with fixed.gc_paused():
        assert freed == [1]
        Cycle()
        list(range(10**5)), [[] for _ in range(10**5)]
        assert freed == [1]
    gc.collect()
    assert freed == [1, 1] and gc.isenabled()


def test_gpu_stages_are_timed_by_events_without_waiting(monkeypatch):
    ticks, waits = count(), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(ticks)

        def synchronize(self):
            waits.append(self.at)

        def elapsed_time(self, other):
            return float(other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append("all"))
    watch = Stopwatch("cuda")
    before = len(waits)
    for stage in ("draft", "verify", "draft"):
        with watch(stage):
            time.sleep(0)
    assert len(waits) == before  # no synchronization yet
    assert watch.ms == {"draft": 2.0, "verify": 1.0} and waits[before:] == [2, 4, 6]  # for the end of each stage
    assert [(stage, end - begin) for stage, begin, end in watch.spans] == [("draft", 1.0), ("verify", 1.0), ("draft", 1.0)]
    assert watch.ms["draft"] == 2.0  # the events are read once


def test_inference_with_captured_steps(finished):
    config = ["--config", str(finished / "tiny.yaml"), "--draft", "chained"]
    eager = main_of("feature_sd_inference")(config)
    found = main_of("feature_sd_inference")([*config, "--steps", "graphs"])
    assert found["exact_match"] and found["token_ids"] == eager["token_ids"]
    assert [r["proposed"] for r in found["rounds"]] == [r["proposed"] for r in eager["rounds"]]


def test_lengths_are_rounded_up_to_few_and_buffers_have_room():
    """What a recording costs is one for each of these lengths; a cache has room for a text of 192 tokens, in steps of 64."""
    for length, size in ((5, 256), (64, 256), (65, 320)):
        _, other = both()
        state = other.prefill([prompt_of(1, *[5] * (length - 1))])
        assert state.cache._size == size and state.cache._layers[0].keys.shape[2] == size
    read, step = [], state.cache._step
    state.cache._step = lambda ids: (read.append(ids.shape[1]), step(ids))[1]
    asked = (1, 2, 3, 4, 5, 6, 7, 9, 10, 13, 14, 17, 18, 25, 26, 32, 33, 64)
    for k in asked:
        assert other.step(state, torch.full((1, k), 5)).shape[1] == k
        other.rollback(state, k)
    assert read == [1, 2, 4, 4, 6, 6, 9, 9, 13, 13, 17, 17, 25, 25, 32, 32, 64, 64]


def test_a_prompt_as_long_as_the_cache_gets_a_larger_one(monkeypatch):
    monkeypatch.setattr(fixed, "ROOM", 1)
    _, other = both()
    assert other.prefill([prompt_of(1, *[5] * 62)]).cache._size == 64
    assert other.prefill([prompt_of(1, *[5] * 63)]).cache._size == 128


def test_a_watch_adds_up_its_stages(monkeypatch):
    now = [7.0]
    monkeypatch.setattr("feature_alignment.decoding.stopwatch.time.perf_counter", lambda: now[0])
    watch = Stopwatch()
    for stage, seconds in (("draft", 2.0), ("verify", 0.5), ("draft", 1.0)):
        with pytest.raises(ArithmeticError), watch(stage):
            now[0] += seconds
            raise ArithmeticError
    assert watch.ms == {"draft": 3000.0, "verify": 500.0} == watch.ms and watch.now() == 10_500.0
    assert watch.spans == [("draft", 7000.0, 9000.0), ("verify", 9000.0, 9500.0), ("draft", 9500.0, 10_500.0)]


class FakeGpu:
    """What torch.cuda is asked for, in order."""

    def __init__(self, monkeypatch) -> None:
        self.done, self.capture = [], {}
        gpu = self

        class Stream:
            def __init__(self, device=None) -> None:
                self.name = "side" if device is None else f"side of {device}"

            def wait_stream(self, other):
                gpu.done.append(f"{self.name} waits for {other.name}")

            def synchronize(self):
                gpu.done.append(f"all of {self.name}")

        @contextlib.contextmanager
        def inside(what):
            gpu.done.append(f"begin {what.name}")
            yield
            gpu.done.append(f"end {what.name}")

        usual = Stream()
        usual.name = "usual"
        fakes = {
            "Stream": Stream,
            "current_stream": lambda device=None: usual,
            "stream": inside,
            "CUDAGraph": lambda: SimpleNamespace(name="graph"),
        }
        fakes["graph"] = lambda graph, **options: (self.capture.update(options), inside(graph))[1]
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


def test_a_step_is_warmed_up_aside_and_captured_once(monkeypatch):
    """Libraries choose kernels and lay out workspaces on a side stream that waits and is waited for; other threads go on."""
    gpu = FakeGpu(monkeypatch)

    def call(x):
        gpu.done.append("call")
        return x + 1

    inputs, graph, outputs = fixed.CapturedStep(call)._capture((torch.ones(2),))
    calls = ["begin side", "call", "call", "call", "end side"]
    assert gpu.done == ["side waits for usual", *calls, "usual waits for side", "begin graph", "call", "end graph"]
    assert gpu.capture == {"capture_error_mode": "thread_local"} and graph.name == "graph"
    assert inputs[0].tolist() == [1, 1] and outputs.tolist() == [2, 2] and gc.isenabled()


def test_all_threads_have_the_same_stream_of_their_own_on_a_gpu(monkeypatch):
    """Memory is kept per stream: with one for each prompt it would grow."""
    gpu, made = FakeGpu(monkeypatch), []
    stream = torch.cuda.Stream
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or stream(device))
    overlap._stream_of.cache_clear()
    try:
        for _ in range(2):
            gpu.done.clear()
            _in_thread(torch.device("cuda:1"), lambda: gpu.done.append("call")).result()
            side = "side of cuda:1"
            assert gpu.done == [f"{side} waits for usual", f"begin {side}", "call", f"all of {side}", f"end {side}"]
    finally:
        overlap._stream_of.cache_clear()
    assert made == [torch.device("cuda:1")]


def test_weights_are_joined_before_any_prompt_is_read():
    """A drafter reads its prompt in a second thread, where memory that is freed may be used again too early."""
    decoder = as_decoder(tiny_llama(0))
    decoder.use_steps("graphs")
    q, k = (getattr(decoder.llama.layers[0].self_attn, name).weight for name in ("q_proj", "k_proj"))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


def test_garbage_stays_uncollected_where_it_was():
    gc.disable()
    try:
        with fixed.gc_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(ArithmeticError), fixed.gc_paused():
        raise ArithmeticError
    assert gc.isenabled()


def test_each_length_is_compiled_for_its_own_shape_and_a_capture_is_not_left_half(monkeypatch):
    asked, limits = [], []

    def compiler(call, **options):
        asked.append(options)
        return lambda *inputs: (limits.append(torch._dynamo.config.recompile_limit), call(*inputs))[1]

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(fixed, "eager_fallbacks", [])
    usual = torch._dynamo.config.recompile_limit
    assert fixed.compiled(lambda x: x + 1)(2) == 3
    assert asked == [{"dynamic": False}] and limits == [64] and torch._dynamo.config.recompile_limit == usual

    def broken(x):
        raise RuntimeError("while capturing")

    monkeypatch.setattr(torch, "compile", lambda call, **_: broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    run = fixed.compiled(lambda x: x + 1)
    with pytest.raises(RuntimeError, match="while capturing"):
        run(2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert run(2) == 3 and run(3) == 4 and len(fixed.eager_fallbacks) == 1
    with pytest.raises(RuntimeError, match="while capturing"):  # what fails uncompiled as well is the function's own fault
        fixed.compiled(broken)(2)


@pytest.mark.parametrize(("change", "why"), [({"hidden_act": "gelu"}, "the activation gelu"), ({"hidden_act": "silu"}, None)])
def test_an_activation_that_is_not_read_is_named(change, why):
    llama = tiny_llama(0).model
    for name, value in change.items():
        setattr(llama.config, name, value)
    assert fused.unsupported_reason(llama) == why
