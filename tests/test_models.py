"""Parts of the models on their own: texts that leave a batch, caches with room, vocabularies that are cut, limits of checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import as_decoder, prompt_of, tiny_llama
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from feature_alignment.cli.config import Common, parse_config
from feature_alignment.cli.console import UserError
from feature_alignment.inputs.samples import read_samples
from feature_alignment.inputs.video import NUM_FRAMES
from feature_alignment.models import eventgpt, loading, pair, preprocessing, tree_attention, video_llava
from feature_alignment.models.batches import _common_prefix, _keep_rows, _Texts, _truncated_to, _with_room
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.eventgpt import EventGPTConfig, EventGPTForCausalLM, load_eventgpt
from feature_alignment.models.state import State, position_limit
from feature_alignment.models.vision_cache import VisionCache

PROMPTS = [(1, 5, 9, 13), (1, 40, 3, 8), (1, 7, 7, 20), (1, 9, 33, 4)]


def alone(model, prompt, texts):
    """The states on the tokens of each of `texts`, each read in its own pass after the prompt."""
    return [model.step(model.prefill([prompt_of(*prompt)]), torch.tensor([text]))[0] for text in texts]


@pytest.mark.parametrize("leaving", [(0,), (3,), (1, 2), (0, 3), (0, 1, 2), (2, 3)])
@torch.inference_mode()
def test_answers_do_not_depend_on_finished_clips(leaving):
    """Two texts of each of four clips; the clips that are done leave one after the other, from the front, the middle and the end."""
    model = as_decoder(tiny_llama(0))
    state = model.prefill([prompt_of(*p) for p in PROMPTS])
    clip_of = [0, 0, 1, 1, 2, 2, 3, 3]
    read = _Texts(model, state, clip_of, 20)
    first = [[5 + i, 6 + i, 7][: 1 + i % 3] for i in range(8)]
    rest = [[30 + i] for i in range(8)]
    found = read.read(first)
    staying = [i for i in range(8) if clip_of[i] not in leaving]
    later = dict(zip(staying, read.read([rest[i] for i in staying], staying), strict=True))
    last = staying[-2:]
    latest = dict(zip(last, read.read([[3, 4] for _ in last], last), strict=True))
    for i in range(8):
        whole = [*first[i], *(rest[i] if i in later else []), *([3, 4] if i in latest else [])]
        (wanted,) = alone(model, PROMPTS[clip_of[i]], [whole])
        got = torch.cat([found[i], *([later[i]] if i in later else []), *([latest[i]] if i in latest else [])])
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_cache_with_room_is_a_copy_of_the_original():
    model = as_decoder(tiny_llama(0))
    state = model.prefill([prompt_of(*p) for p in PROMPTS])
    roomy = _with_room(state, 5)
    assert roomy.length == state.length == roomy.cache.get_seq_length() == 4
    before = [layer.keys.clone() for layer in state.cache.layers]
    model.step(roomy, torch.tensor([[5, 6]] * 4))
    assert roomy.cache.get_seq_length() == 6 and state.cache.get_seq_length() == 4
    for layer, old, new in zip(state.cache.layers, before, roomy.cache.layers, strict=True):
        assert torch.equal(layer.keys, old) and torch.equal(new.keys[:, :, :4], old)
        assert new._buffers[0].shape[2] == new._buffers[1].shape[2] == 4 + 5
    assert _keep_rows(roomy, [1, 3]) == [3, 1]
    assert all(torch.equal(layer._buffers[0][:, :, :4], old[[3, 1]]) for layer, old in zip(roomy.cache.layers, before, strict=True))


def test_a_shallower_model_reuses_the_cache_of_the_deeper_one():
    deep, shallow = as_decoder(tiny_llama(0, layers=3)), as_decoder(tiny_llama(0, layers=3), taps=[2])
    prompt = prompt_of(*PROMPTS[0])
    state = _truncated_to(deep.prefill([prompt]), 2)
    assert state.length == 4 and len(state.cache.layers) == 2
    torch.testing.assert_close(shallow.step(state, torch.tensor([[5, 6]])), shallow.step(shallow.prefill([prompt]), torch.tensor([[5, 6]])))


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [([(1, 2, 3)], 2), ([(1, 2, 3), (1, 2, 3)], 2), ([(1, 2, 3, 4), (1, 2, 9)], 2), ([(1, 2), (3, 2)], 0), ([(1,)], 0)],
)
def test_every_prompt_keeps_at_least_one_token_after_the_shared_prefix(prompts, shared):
    assert _common_prefix([torch.tensor(p) for p in prompts]) == shared


# ---- one decoder


def test_ids_outside_the_shared_vocabulary_are_neither_emitted_nor_read():
    model = as_decoder(tiny_llama(0))
    before = model.lm_head(torch.ones(3, 32))
    model.restrict_vocabulary(40)
    assert model.vocab_size == 40 and model.head_weight.shape == model.embeddings.shape == (40, 32)
    assert torch.equal(model.lm_head(torch.ones(3, 32)), before[:, :40])
    assert torch.equal(model.embeddings, model.llama.embed_tokens.weight[:40])


def test_ids_of_vision_and_beyond_the_shared_vocabulary_are_minus_one():
    model = as_decoder(tiny_llama(0))  # its placeholder is 1
    model.restrict_vocabulary(40)
    assert model.text_ids([0, 1, 2, 39, 40, 63, -1, -200]) == [0, -1, 2, 39, -1, -1, -1, -1]


@torch.inference_mode()
def test_only_single_clips_are_kept_in_the_vision_cache():
    model, encoded = as_decoder(tiny_llama(0), [1]), []
    model._encode_vision = lambda pixels: (encoded.append(len(pixels)), pixels)[1]
    model.vision_cache = VisionCache()
    for clips in (2, 2, 1, 1, 3):
        vision = model.encode_vision(torch.zeros(clips, 1))
    assert encoded == [2, 2, 1, 3] and model.vision_cache.hits == 1
    ids, one, reads = torch.tensor([[5, 1, 7]]), model.encode_vision(torch.zeros(1, 1)), []
    read = model._read
    model._read = lambda *more: (reads.append(1), read(*more))[1]
    for batch, clips in ((ids.expand(2, -1), torch.zeros(2, 1)), (ids.expand(2, -1), torch.zeros(2, 1)), (ids, one), (ids, one)):
        assert model.vision_states(batch, clips).shape == (len(batch), 1, 32)
    assert len(reads) == 3 and vision.shape == (3, 1)


def test_a_prompt_that_was_read_is_given_row_by_row():
    state = State(DynamicCache(), torch.zeros(2, 3), 4, prompt=torch.arange(24.0).view(2, 4, 3), inputs=-torch.arange(24.0).view(2, 4, 3))
    for row, length in ((0, None), (1, None), (1, 2)):
        found = state.read_prompt(row, length)
        assert torch.equal(found.states, state.prompt[row, :length]) and torch.equal(found.inputs, state.inputs[row, :length])
    assert torch.equal(state.read_prompt().states, state.prompt[0])


def test_video_tokens_stand_where_their_ids_stood_and_are_as_many():
    words = torch.nn.Embedding(12, 4)
    model = SimpleNamespace(get_input_embeddings=lambda: words, config=SimpleNamespace(video_token_index=9))
    ids, video = torch.tensor([[1, 9, 9, 9, 4], [2, 9, 9, 9, 5]]), torch.randn(2, 3, 4, dtype=torch.float64)
    found = video_llava.splice(model, ids, video)
    assert torch.equal(found, torch.cat([words(ids[:, :1]), video.float(), words(ids[:, 4:])], 1))
    for wrong in (video[:, :2], video[:1], torch.randn(3, 2, 4)[:, :1]):
        with pytest.raises(ValueError, match=r"6 <video> ids for \(\d, \d\) video tokens"):
            video_llava.splice(model, ids, wrong)


@pytest.mark.parametrize(
    ("taps", "norms", "norm", "own"),
    [
        (None, {3: "post"}, "post", True),
        ([3], {3: "post"}, "post", True),
        ([1, 3], {1: "pre", 3: "post"}, "pre", True),
        ([1], {1: "pre"}, "pre", False),
    ],
)
def test_meta_states_which_layers_passed_the_final_norm(taps, norms, norm, own):
    model = as_decoder(tiny_llama(0, layers=3), taps)
    assert (model.norms, model.norm, model.has_own_head) == (norms, norm, own)
    assert model.hidden_size == 32 * len(norms) and model.width == 32 and len(model.llama.layers) == max(norms)


@pytest.mark.parametrize("taps", [[0], [4], [2, 1], [1, 1], [-1], [1, 4]])
def test_missing_layers_are_refused(taps):
    with pytest.raises(UserError, match="ascending layer numbers from 1 to 3"):
        as_decoder(tiny_llama(0, layers=3), taps)


def test_texts_end_with_their_end_or_at_the_limit():
    """`generate` of several rows is greedy of each alone, leaves no trace, and may be asked again."""
    model = as_decoder(tiny_llama(0))
    prompts = [prompt_of(*p) for p in PROMPTS]
    single = [model.generate(model.prefill([p]), 9)[0] for p in prompts]
    for text, p in zip(single, PROMPTS, strict=True):
        ids = list(p)
        for token in text:
            assert token == int(model.lm_head(model.llama(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]).argmax())
            ids.append(token)
        assert len(text) == 9 or text[-1] in model.eos_ids
    state = model.prefill(prompts)
    length, last = state.length, state.last.clone()
    assert model.generate(state, 9) == single and model.generate(state, 9) == single
    assert state.length == length and torch.equal(state.last, last)
    assert model.generate(state, 1) == [text[:1] for text in single]


@pytest.mark.parametrize(
    ("usual", "mask", "device", "wanted"),
    [
        ("sdpa", None, "cpu", "sdpa"),
        ("sdpa", torch.bool, "cpu", "sdpa"),
        ("sdpa", torch.float32, "cpu", tree_attention.NAME),
        ("sdpa", torch.float32, "meta", "sdpa"),
        ("eager", torch.bool, "cpu", "sdpa"),
        ("eager", torch.float32, "cpu", "eager"),
        ("flash_attention_2", None, "cpu", "flash_attention_2"),
        ("flash_attention_2", torch.bool, "cpu", "sdpa"),
        ("flash_attention_2", torch.float32, "cpu", "sdpa"),
    ],
)
def test_the_attention_function_is_one_that_takes_the_mask(usual, mask, device, wanted):
    """Only sdpa takes a boolean mask, flash takes none of four dimensions, and on a CPU an additive one has a function of its own."""
    decoder, seen = as_decoder(tiny_llama(0)), []

    class Layers:
        config = decoder.llama.config

        def __call__(self, **inputs):
            seen.append(self.config._attn_implementation)
            return SimpleNamespace(last_hidden_state=torch.zeros(1, 2, 32))

    decoder.llama = Layers()
    decoder.llama.config._attn_implementation = usual
    layout = {} if mask is None else {"attention_mask": torch.zeros(1, 1, 2, 2, dtype=mask, device=device)}
    decoder.step(State(DynamicCache(), torch.zeros(1, 32), 0), torch.tensor([[5, 6]]), **layout)
    assert seen == [wanted] and decoder.llama.config._attn_implementation == usual
    padding = torch.ones(1, 2, dtype=mask)  # of two dimensions: any function takes it
    decoder.step(State(DynamicCache(), torch.zeros(1, 32), 0), torch.tensor([[5, 6]]), attention_mask=padding)
    assert seen == [wanted, usual]


@pytest.mark.parametrize(
    ("kv_heads", "new", "past", "usual", "wanted"),
    [
        (1, 3, True, "sdpa", tree_attention.NAME),
        (1, 40, True, "sdpa", tree_attention.NAME),
        (2, 3, True, "sdpa", "sdpa"),
        (1, 1, True, "sdpa", "sdpa"),
        (1, 3, False, "sdpa", "sdpa"),
        (1, 3, True, "eager", "eager"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tokens_after_a_text_share_its_keys(kv_heads, new, past, usual, wanted, dtype, monkeypatch):
    """Several of them read keys that query heads share uncopied; the states are those of one pass over all."""
    decoder, seen = as_decoder(tiny_llama(0, kv_heads=kv_heads).to(dtype)), []
    model, ids = decoder.llama, torch.randint(3, 60, (2, 12 + new), generator=torch.Generator().manual_seed(0))
    model.config._attn_implementation = usual
    whole = model(input_ids=ids).last_hidden_state[:, -new:]
    state = State(DynamicCache(), ids, 0)
    if past:
        decoder.step(state, ids[:, :12])
    else:
        ids, whole = ids[:, -new:], model(input_ids=ids[:, -new:]).last_hidden_state
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **given: (seen.append(model.config._attn_implementation), forward(**given))[1])
    found = decoder.step(state, ids[:, -new:])
    limits = {"atol": 1e-9, "rtol": 1e-9} if dtype == torch.float64 else {"atol": 0.1, "rtol": 0.1}
    torch.testing.assert_close(found, whole, **limits)
    assert seen == [wanted] and decoder.llama.config._attn_implementation == usual


@torch.inference_mode()
def test_a_sliding_window_keeps_its_mask():
    """A text decoder whose layers attend to the last 8 tokens only: steps of several tokens give the states of one pass."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MistralForCausalLM(MistralConfig(vocab_size=64, sliding_window=8, initializer_range=0.3, **sizes)).eval()
    decoder, ids = as_decoder(model), torch.randint(3, 60, (1, 24))
    state = State(DynamicCache(config=model.config), ids, 0)
    found = [decoder.step(state, part) for part in ids.split(6, 1)]
    torch.testing.assert_close(torch.cat(found, 1), decoder.llama(input_ids=ids).last_hidden_state, atol=1e-4, rtol=1e-4)


def test_the_states_of_a_whole_prompt_are_kept_of_a_single_layer_alone():
    """Of several layers they would fill memory; the last one is all that decoding needs."""
    prompt = prompt_of(*PROMPTS[0])
    for taps, kept in ((None, 4), ([1], 4), ([1, 2], 1)):
        state = as_decoder(tiny_llama(0), taps).prefill([prompt])
        assert state.prompt.shape == (1, kept, 32 * len(taps or [2])) and torch.equal(state.prompt[:, -1], state.last)
        assert state.inputs.shape == (1, 4, 32) and state.length == 4


@pytest.mark.parametrize("ends", [0, 3, 8])
def test_a_text_is_truncated_after_its_end(ends):
    model = as_decoder(tiny_llama(0))
    text = model.generate(model.prefill([prompt_of(*PROMPTS[0])]), 9)[0]
    model.eos_ids = frozenset({text[ends]})
    assert model.generate(model.prefill([prompt_of(*PROMPTS[0])]), 9)[0] == text[: text.index(text[ends]) + 1]


# ---- what a checkpoint directory may say


def folder_with(tmp_path, name="config.json", **content):
    (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


LARGEST = {"num_hidden_layers": 512, "num_attention_heads": 1024, "hidden_size": 65_536, "intermediate_size": 2**20, "vocab_size": 2**22}
LARGEST |= {"image_size": 4096, "patch_size": 4096, "shortest_edge": 4096}


@pytest.mark.parametrize(("key", "most"), LARGEST.items())
def test_sizes_above_their_limit_are_refused(tmp_path, key, most):
    assert loading.LARGEST == LARGEST
    for fine in (1, most, None, [1, most]):
        loading.refuse_executable_code(folder_with(tmp_path, **{key: fine}))
    for wrong in (0, most + 1, -1, True, "5", 2.0, [1, most + 1]):
        with pytest.raises(UserError, match=f"{key} is .*expected a number from 1 to {most:,}"):
            loading.refuse_executable_code(folder_with(tmp_path, text_config=[{"deep": {key: wrong}}]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"auto_map": {"AutoModel": "x.py"}}, "run code of its own"),
        ({"a": [{"trust_remote_code": True}]}, "run code of its own"),
        ({"_attn_implementation": "kernels/flash"}, "attention code from another source"),
        ({"weight_map": {"a": "../b.safetensors"}}, "weights outside its directory"),
        ({"weight_map": ["a"]}, "weights outside its directory"),
    ],
)
def test_references_outside_a_checkpoint_are_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        loading.refuse_executable_code(folder_with(tmp_path, "other.json", **content))
    folder_with(tmp_path, "other.json", auto_map=None, trust_remote_code=False, attn_implementation="sdpa", weight_map={"a": "b"})
    loading.refuse_executable_code(tmp_path)
    for ignored in ("tokenizer.json", "vocab.json"):
        loading.refuse_executable_code(folder_with(tmp_path, ignored, **content))
    folder_with(tmp_path, "adapter_config.json")
    with pytest.raises(UserError, match="PEFT adapter"):
        loading.refuse_executable_code(tmp_path)


@pytest.mark.parametrize(("size", "known"), [(31_999, False), (32_000, True), (32_063, True), (32_064, False)])
def test_prompt_lengths_are_known_for_one_size_of_vocabulary(tmp_path, size, known):
    tokenizer = range(size)
    preprocessing.check_prompt(tmp_path, tokenizer, 21, (20, 21))
    if not known:
        preprocessing.check_prompt(tmp_path, tokenizer, 22, (20, 21))
    else:
        with pytest.raises(UserError, match="has 22 text tokens"):
            preprocessing.check_prompt(tmp_path, tokenizer, 22, (20, 21))


def test_weights_in_four_bits_are_counted_where_they_are_in_four_bits():
    """A linear layer of 64 x 64 outside the named modules takes 4.127 bits a weight, everything else its dtype."""
    part = lambda: torch.nn.ModuleDict({"linear": torch.nn.Linear(64, 64), "norm": torch.nn.LayerNorm(64)})  # noqa: E731
    model = torch.nn.ModuleDict({"body": part(), "head": part(), "header": part()})
    per_part, packed = 64 * 64 + 64 + 2 * 64, 64 * 64 * (0.5 + 1 / 64 + 4 / (64 * 256))
    assert loading.weight_bytes(model, torch.bfloat16, "none", ["head"]) == 3 * per_part * 2
    assert loading.weight_bytes(model, torch.float32, "none", []) == 3 * per_part * 4
    assert loading.weight_bytes(model, torch.bfloat16, "nf4", ["head"]) == round(2 * (packed + 3 * 64 * 2) + per_part * 2)
    assert loading.weight_bytes(model, torch.bfloat16, "nf4", ["body.linear"]) == round(2 * (packed + 3 * 64 * 2) + per_part * 2)


def test_a_config_may_not_describe_far_more_parameters_than_the_weights_hold(tmp_path):
    """A parameter takes half a byte at least, so four a byte is too many; weights of either format count."""
    from transformers import LlamaForCausalLM

    model = tiny_llama(0)
    model.config.save_pretrained(tmp_path)
    number = sum(p.numel() for p in model.parameters())
    size = -(-number // 4)
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(bytes(size))
        loading._refuse_missing_weights(LlamaForCausalLM, tmp_path, "LLaMA", None)
        (tmp_path / name).write_bytes(bytes(size - 1))
        with pytest.raises(UserError, match=f"describes {number:,} parameters, but the weight files have {size - 1:,} bytes"):
            loading._refuse_missing_weights(LlamaForCausalLM, tmp_path, "LLaMA", None)
        (tmp_path / name).rename(tmp_path / "weights.txt")  # of no format that is read


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_states_that_are_not_finite_are_refused(tmp_path, bad):
    with pytest.raises(UserError, match="not finite in float16"), loading.report_load_errors(tmp_path) as made:
        made += [torch.zeros(2, dtype=torch.float16), torch.tensor([0.0, bad])]
    with pytest.raises(UserError, match="does not fit its weights: no such shape"), loading.report_load_errors(tmp_path) as made:
        raise RuntimeError("no such shape\nat all")
    with loading.report_load_errors(tmp_path) as made:
        made.append(torch.zeros(2))


@pytest.mark.parametrize(
    ("files", "kind"),
    [(["tokenizer.model"], "LLaMA's"), (["tokenizer.model", "tokenizer.json"], "any"), (["tokenizer.json"], "any"), ([], "any")],
)
def test_a_lone_sentencepiece_model_needs_its_own_class_and_libraries(tmp_path, monkeypatch, files, kind):
    class Reader:
        def __init__(self, name):
            self.name = name

        def from_pretrained(self, path):
            return [self.name] * 7

    monkeypatch.setattr(preprocessing, "LlamaTokenizer", Reader("LLaMA's"))
    monkeypatch.setattr(preprocessing, "AutoTokenizer", Reader("any"))
    monkeypatch.setattr(preprocessing, "prepare_for_prompts", lambda *_: None)
    monkeypatch.setattr(preprocessing, "_installed", lambda name: True)
    for name in files:
        (tmp_path / name).touch()
    assert set(preprocessing.load_tokenizer(tmp_path)) == {kind} and preprocessing.load_tokenizer(tmp_path, 7)
    with pytest.raises(UserError, match="has 7 ids, the model 6 embedding rows"):
        preprocessing.load_tokenizer(tmp_path, 6)
    monkeypatch.setattr(preprocessing, "_installed", lambda name: False)
    if kind == "any":
        preprocessing.load_tokenizer(tmp_path)
    else:
        with pytest.raises(UserError, match=r"needs sentencepiece and google\.protobuf"):
            preprocessing.load_tokenizer(tmp_path)


class Pieces:
    """A tokenizer that is a list of pieces."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self, pieces, reads=lambda text: [1]):
        self.pieces, self.reads = pieces, reads

    def __len__(self):
        return len(self.pieces)

    def __call__(self, text, **_):
        return type("Encoding", (), {"input_ids": self.reads(text)})

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[i] for i in ids]


def test_an_id_of_another_piece_is_named(tmp_path):
    preprocessing.check_shared_ids(tmp_path, Pieces("abc"), tmp_path, Pieces("abcd"))  # extra ids of one tokenizer are ignored
    preprocessing.check_shared_ids(tmp_path, Pieces("abcd"), tmp_path, Pieces("abc"))
    with pytest.raises(UserError, match=r"1 of 3 differ, e\.g\. 2 is 'c' in the former and 'x' in the latter"):
        preprocessing.check_shared_ids(tmp_path, Pieces("abc"), tmp_path, Pieces("abx"))
    with pytest.raises(UserError, match=r"2 of 3 differ, e\.g\. 0 is 'a' in the former and 'b' in the latter"):
        preprocessing.check_shared_ids(tmp_path, Pieces("abc"), tmp_path, Pieces("bac"))
    with pytest.raises(UserError, match="tokenize text differently"):
        preprocessing.check_shared_ids(tmp_path, Pieces("abc"), tmp_path, Pieces("abc", lambda text: [1, 3]))


def test_free_memory_is_that_of_the_gpus_in_use(monkeypatch):
    import psutil

    free = {0: 10, 1: 30, torch.device("cuda:1"): 30, torch.device("cuda"): 10}
    assert loading.available_memory("cpu", None) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loading.available_memory("cuda", None) == loading.available_memory("cuda", "auto") == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free[gpu], 1000))
    assert [loading.available_memory(*asked) for asked in (("cuda", None), ("cuda:1", None), ("cuda", "auto"))] == [10, 30, 40]


def test_a_pair_is_restricted_to_shared_ids_and_runs_on_the_chosen_gpu(monkeypatch, tmp_path):
    decoders = {}
    for name, size in (("target", 60), ("draft", 50)):
        decoders[name] = as_decoder(tiny_llama(0))
        decoders[name].restrict_vocabulary(size)
        decoders[name].tokenizer = Pieces("abc")
        monkeypatch.setattr(pair, f"load_{name}", lambda cfg, name=name: decoders[name])
    chosen, threads = [], []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cpu", "cuda:1", "cuda"):
        found = pair.load_pair(Common(device=device))
        assert (found.target, found.draft) == (decoders["target"], decoders["draft"])
        assert found.target.vocab_size == found.draft.vocab_size == 50
    assert chosen == ["cuda:1"] and threads == []
    pair.load_pair(Common(device="cpu", threads=3))
    assert threads == [3]
    found.use_steps("graphs")
    assert found.target.steps == found.draft.steps == "graphs"


def test_the_check_computes_prompt_length_and_memory(tiny_run):
    cfg = parse_config(Common, ["--config", str(tiny_run / "tiny.yaml"), "--device", "cpu"], "models/pair")
    report, both = pair.check_pair(cfg).to_json(), pair.load_pair(cfg)
    sample = dataclasses.replace(read_samples(cfg.manifests, "test")[0], question=preprocessing.PROBE_QUESTION)
    needed = 0
    for name, model in (("EventGPT", both.draft), ("Video-LLaVA", both.target)):
        found, text = report["models"][name], model.llama.config
        assert found["prompt_tokens"] == model.prefill([model.prepare(sample)]).length
        per_token = 2 * 3 * 2 * (32 // 2) * 4  # keys and values of three layers of two heads, in float32
        assert found["cache_bytes"] == per_token * (found["prompt_tokens"] + 64)
        assert (found["layers"], found["hidden_size"]) == (3, 32) == (text.num_hidden_layers, text.hidden_size)
        assert found["vision_tokens"] == model.vision_tokens and found["embedding_rows"] == len(model.llama.embed_tokens.weight)
        assert found["weight_bytes"] == 4 * found["parameters"] and found["weights"] == "complete"
        assert found["layer_bytes"] == 4 * sum(p.numel() for p in model.llama.layers[0].parameters())
        needed += found["weight_bytes"] + found["cache_bytes"]
    assert report["needed_bytes"] == needed


def test_the_check_reads_no_weights_whatever_the_flags(tiny_run, monkeypatch):
    cfg = parse_config(Common, ["--config", str(tiny_run / "tiny.yaml"), "--device_map", "auto", "--quantize", "nf4"], "models/pair")
    opened = []
    for name in ("open_draft", "open_target"):
        usual = getattr(pair, name)
        monkeypatch.setattr(pair, name, lambda cfg, usual=usual: (opened.append(usual(cfg)), opened[-1])[1])
    pair.check_pair(cfg)
    assert [{p.device.type for p in checkpoint.model.parameters()} for checkpoint in opened] == [{"meta"}, {"meta"}]


def test_a_loaded_model_is_probed_with_one_blank_image_and_two_tokens(tmp_path):
    asked = []

    def step(state, ids):
        asked.append((state.length, state.cache.get_seq_length(), ids.tolist()))
        return torch.zeros(1, 2, 8)

    def encode(pixels):
        asked.append((tuple(pixels.shape), bool(pixels.any())))
        return torch.zeros(1, 3, 8)

    decoder = SimpleNamespace(encode_vision=encode, step=step, llama=tiny_llama(0).model, device=torch.device("cpu"))
    assert pair._probed(decoder, tmp_path, 48) is decoder
    assert asked == [((1, 1, 3, 48, 48), False), (0, 0, [[1, 1]])]
    for name, wrong in (("encode_vision", torch.full((1, 3, 8), torch.nan)), ("step", torch.full((1, 2, 8), torch.inf))):
        with pytest.raises(UserError, match="not finite"):
            pair._probed(SimpleNamespace(**vars(decoder) | {name: lambda *_, wrong=wrong: wrong}), tmp_path, 48)


def test_finding_a_checkpoint_checks_it(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint at .*config\.json is missing"):
        loading.find_checkpoint(tmp_path, "--target_id")
    assert loading.find_checkpoint(folder_with(tmp_path), "--target_id") == tmp_path
    with pytest.raises(UserError, match="run code of its own"):
        loading.find_checkpoint(folder_with(tmp_path, auto_map={"AutoModel": "x.py"}), "--target_id")


def test_the_prompts_of_both_tokenizers_are_checked_on_loading(tiny_run, monkeypatch):
    """Path, number of text tokens in the probe question's prompt, and the numbers that the released tokenizer gives."""
    seen = []
    monkeypatch.setattr(pair.preprocessing, "check_prompt", lambda path, tokenizer, found, known: seen.append((path.name, found, known)))
    cfg = Common(target_id=tiny_run / "pair" / "video_llava", draft_id=tiny_run / "pair" / "eventgpt")
    opened = pair.open_target(cfg), pair.open_draft(cfg)
    texts = [checkpoint.prompt_tokens - checkpoint.vision_tokens for checkpoint in opened]
    assert seen == [("video_llava", texts[0], (20, 21)), ("eventgpt", texts[1], (59,))] and min(texts) > 5


def test_auto_classes_load_an_eventgpt(tiny_run):
    from transformers import AutoConfig, AutoModelForCausalLM

    path = tiny_run / "pair" / "eventgpt"
    assert type(AutoConfig.from_pretrained(path)) is EventGPTConfig
    assert type(AutoModelForCausalLM.from_pretrained(path)) is EventGPTForCausalLM


def test_event_tokens_are_means_over_patches_then_over_time(tiny_run):
    model = load_eventgpt(tiny_run / "pair" / "eventgpt", torch.float32)
    side = model.config.vision_config.image_size
    pixels = torch.randn(2, 5, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tokens = model.model.encode_events(pixels)
        patches = (side // model.config.vision_config.patch_size) ** 2 + 1
        assert tokens.shape == (2, 5 + patches, 32)
        one = [model.model.encode_events(pixels[:1, t : t + 1])[0, 1:] for t in range(5)]  # of one image its spatial tokens are its patches
        torch.testing.assert_close(tokens[0, :5], torch.stack([patch.mean(0) for patch in one]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(tokens[0, 5:], torch.stack(one).mean(0), atol=1e-5, rtol=1e-4)
        ids = torch.tensor([[1, 9, -200, 7, 5], [1, 8, -200, 6, 4]])
        spliced = model.model.splice(ids, tokens)
        words = model.model.embed_tokens
        assert torch.equal(spliced, torch.cat([words(ids[:, :2]), tokens, words(ids[:, 3:])], 1))
        for wrong in ([[1, 2, 3]], [[1, -200, -200]], [[1, -200, 3], [-200, 2, 3]]):
            with pytest.raises(ValueError, match="exactly one -200"):
                model.model.splice(torch.tensor(wrong), tokens)


def test_a_config_without_a_vision_tower_has_clips_large_one_at_336_pixels():
    """The released EventGPT has a config.json without vision geometry."""
    vision = EventGPTConfig().vision_config
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers, vision.num_attention_heads) == (1024, 4096, 24, 16)
    assert (vision.image_size, vision.patch_size, vision.hidden_act, vision.layer_norm_eps) == (336, 14, "quick_gelu", 1e-5)
    assert EventGPTConfig(vision_config={"image_size": 48}).vision_config.image_size == 48


@pytest.mark.parametrize(("beyond", "start"), [((0, 0), None), ((0, 0), 20.0), ((1, 0), None), ((0, 1), None)])
def test_events_are_drawn_on_the_canvas_unless_they_exceed_it(tiny_run, monkeypatch, beyond, start):
    cfg = parse_config(
        Common,
        ["--config", str(tiny_run / "tiny.yaml"), "--device", "cpu", "--event_start_ms", "5", "--event_window_ms", "50"],
        "models/pair",
    )
    canvas = json.loads((tiny_run / "pair" / "eventgpt" / "config.json").read_text())["event_canvas_hw"]
    stream = {"y": np.array([0, canvas[0] - 1 + beyond[0]]), "x": np.array([canvas[1] - 1 + beyond[1], 3])}
    asked = []
    monkeypatch.setattr(
        pair.event_inputs, "load_events", lambda path, window, begin, unit: (asked.append((path, window, begin)), stream)[1]
    )
    monkeypatch.setattr(
        pair.event_inputs,
        "event_images",
        lambda stream, slices, on: (asked.append((slices, on)), [np.zeros((*canvas, 3), np.uint8)] * 5)[1],
    )
    sample = dataclasses.replace(read_samples(cfg.manifests, "test")[0], event_start_ms=start)
    pixels = pair.load_draft(cfg).read_pixels(sample)
    assert asked == [(sample.events, cfg.event_window_ms, 5.0 if start is None else 20.0), (5, None if any(beyond) else tuple(canvas))]
    assert torch.equal(pixels, pixels.bfloat16().float()) and len(pixels) == 5


# ---- how a model is loaded


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({}, {}),
        ({"device": "cuda:1"}, {"device_map": {"": "cuda:1"}}),
        ({"device": "meta"}, {"device_map": {"": "meta"}}),
        ({"device_map": "auto"}, {"device_map": "auto"}),
        ({"device": "cuda", "device_map": "auto"}, {"device_map": "auto"}),
        ({"quantize": "nf4"}, {"device_map": {"": "cpu"}, "quantization_config": "4 bits"}),
        ({"quantize": "nf4", "device": "cuda"}, {"device_map": {"": "cuda"}, "quantization_config": "4 bits"}),
        ({"quantize": "nf4", "device": "meta"}, {"device_map": {"": "meta"}}),
        ({"attn_implementation": "eager"}, {"attn_implementation": "eager"}),
        ({"attn_implementation": "flash_attention_2"}, {}),
        (
            {"attn_implementation": "flash_attention_2", "device": "cuda"},
            {"attn_implementation": "flash_attention_2", "device_map": {"": "cuda"}},
        ),
    ],
)
def test_a_model_goes_straight_to_where_it_runs(monkeypatch, tmp_path, asked, wanted):
    seen, checked, promised = [], [], []
    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(
        loading, "load_complete", lambda cls, path, what, config, **options: (seen.append((cls, path, what, config, options)), model)[1]
    )
    monkeypatch.setattr(loading, "check_device", checked.append)
    monkeypatch.setattr(loading, "_refuse_missing_weights", lambda *given: promised.append(given))
    monkeypatch.setattr(loading, "_nf4", lambda dtype, names: {(torch.float16, ("head",)): "4 bits"}[dtype, names])
    monkeypatch.setattr(loading, "is_flash_attn_2_available", lambda: True)
    found = loading.load_model(int, tmp_path, "a model", dtype=torch.float16, unquantized=("head",), config="c", **asked)
    ((cls, path, what, config, options),) = seen
    assert (cls, path, what, config) == (int, tmp_path, "a model", "c") and promised == [(int, tmp_path, "a model", "c")]
    assert options == {"dtype": torch.float16, "attn_implementation": "sdpa"} | wanted and found is model and not model.training
    assert checked == ([] if asked.get("device") == "meta" else [asked.get("device", "cpu")])


def test_loading_a_model_says_nothing_of_its_own(monkeypatch, tmp_path):
    model, logging = torch.nn.Linear(2, 2), loading.transformers_logging
    monkeypatch.setattr(loading, "load_complete", lambda *_, **__: model)
    monkeypatch.setattr(loading, "_refuse_missing_weights", lambda *_: None)
    usual = logging.get_verbosity()
    logging.set_verbosity_info(), logging.enable_progress_bar()
    try:
        loading.load_model(int, tmp_path, "a model", dtype=torch.float32)
        assert logging.get_verbosity() == logging.ERROR and not logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(usual)


def test_a_model_of_which_a_part_fits_nowhere_is_refused(monkeypatch, tmp_path):
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta")])
    monkeypatch.setattr(loading, "load_complete", lambda *_, **__: model)
    monkeypatch.setattr(loading, "_refuse_missing_weights", lambda *_: None)
    with pytest.raises(UserError, match="does not fit into the GPUs of --device_map auto"):
        loading.load_model(int, tmp_path, "a model", dtype=torch.float32, device_map="auto")
    assert loading.load_model(int, tmp_path, "a model", dtype=torch.float32, device="meta") is model


def test_both_models_keep_their_towers_and_projectors_out_of_four_bits(monkeypatch, tiny_run):
    """Quantized are the text model's linear layers alone, and every module that is kept out exists."""
    seen = {}
    for name, module in (("video_llava", video_llava), ("eventgpt", eventgpt)):
        monkeypatch.setattr(module, "load_model", lambda cls, path, what, **options: seen.setdefault(what, options["unquantized"]))
        getattr(module, f"load_{name}")(tiny_run / "pair" / name, torch.float32)
    models = {"Video-LLaVA": video_llava.load_video_llava, "EventGPT": load_eventgpt}
    monkeypatch.undo()
    for (what, kept), folder in zip(seen.items(), ("video_llava", "eventgpt"), strict=True):
        model = models[what](tiny_run / "pair" / folder, torch.float32)
        linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        quantized = [name for name in linear if not any(name == k or name.startswith(f"{k}.") for k in kept)]
        assert quantized and all(".layers." in name and "tower" not in name for name in quantized)
        assert all(any(name == k or name.startswith(f"{k}.") for name, _ in model.named_modules()) for k in kept)


def test_four_bits_are_nf4_with_double_quantization(monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(loading, "BitsAndBytesConfig", dict)
    wanted = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    assert loading._nf4(torch.bfloat16, ("a", "b")) == {
        **wanted,
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "llm_int8_skip_modules": ["a", "b"],
    }


def test_only_checkpoints_of_the_hub_are_fetched(monkeypatch):
    fetched = []
    monkeypatch.setattr(loading, "find_checkpoint", lambda *what: fetched.append(what))
    both = {"target_id": Path("hub:a/b"), "draft_id": Path("hub:c/d")}
    for here in ({}, {"target_id": Path("a")}, {"draft_id": Path("c")}, {"target_id": Path("a"), "draft_id": Path("c")}):
        loading.fetch_checkpoints(Common(**(both | here)))
    first, second = (Path("hub:a/b"), "--target_id"), (Path("hub:c/d"), "--draft_id")
    assert fetched == [first, second, second, first]


def test_an_error_is_quoted_by_its_first_line():
    assert loading.first_line(ValueError("\n first\nsecond")) == "first" and loading.first_line(ValueError("")) == "ValueError"
    assert loading.first_line(ValueError("x" * 500)) == "x" * 200
    assert (
        preprocessing._installed("torch")
        and not preprocessing._installed("no_such_module")
        and not preprocessing._installed("no_such.module")
    )


def test_a_missing_preprocessor_is_clips_own(tmp_path):
    made = preprocessing.load_processor(tmp_path, 48, default=True)
    assert dict(made.size) == {"shortest_edge": 48} and dict(made.crop_size) == {"height": 48, "width": 48}
    pixels = preprocessing.clip_pixels([np.full((30, 60, 3), 200, np.uint8)], made)
    assert pixels.shape == (1, 3, 48, 48)
    made.save_pretrained(tmp_path)
    assert dict(preprocessing.load_processor(tmp_path, 48).size) == {"shortest_edge": 48}
    with pytest.raises(UserError, match="crops to 48 x 48, the vision tower expects 49 x 49"):
        preprocessing.load_processor(tmp_path, 49)


def test_a_preprocessor_is_tried_on_a_wide_image_and_crops_to_the_tower_both_ways(tmp_path, monkeypatch):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tried, usual = [], preprocessing.clip_pixels
    monkeypatch.setattr(preprocessing, "clip_pixels", lambda images, by: (tried.extend(images), usual(images, by))[1])
    for height, width in ((48, 40), (40, 48), (48, 48)):
        CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": height, "width": width}).save_pretrained(tmp_path)
        if (height, width) == (48, 48):
            preprocessing.load_processor(tmp_path, 48)
        else:
            with pytest.raises(UserError, match=f"crops to {height} x {width}, the vision tower expects 48 x 48"):
                preprocessing.load_processor(tmp_path, 48)
    assert [(image.shape, image.dtype, image.any()) for image in tried] == [((25, 48, 3), np.uint8, False)] * 3
    monkeypatch.setattr(preprocessing, "clip_pixels", lambda images, by: np.array([1.0, np.nan]))
    with pytest.raises(UserError, match="pixels that are not finite"):
        preprocessing.load_processor(tmp_path, 48)


def test_facts_of_the_released_pair():
    """Read from the released code and tokenizers; nothing here could recompute them."""
    assert (eventgpt.EVENT_TOKEN_INDEX, eventgpt.NUM_EVENT_SLICES, eventgpt.KNOWN_TEXT_TOKENS) == (-200, 5, (59,))
    assert video_llava.KNOWN_TEXT_TOKENS == (20, 21) and preprocessing.LLAMA_VOCABULARY == 32_000 and NUM_FRAMES == 8
    assert pytest.approx(0.516, abs=1e-3) == loading.NF4_BYTES


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        (None, 100),
        ({}, 100),
        ({"rope_type": "default"}, 100),
        ({"rope_type": "linear", "factor": 2.5}, 250),
        ({"rope_type": "default", "factor": None}, 100),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 25}, 100),  # the config states the product
    ],
)
def test_positions_are_what_the_rotary_embedding_is_stretched_to(rope, positions):
    assert position_limit(SimpleNamespace(max_position_embeddings=100, rope_parameters=rope)) == positions
    assert position_limit(SimpleNamespace(max_position_embeddings=100)) == 100


def test_without_vision_a_prompt_is_as_long_as_its_ids():
    model = tiny_llama(0)
    prompts = {"fits": torch.ones(255, dtype=torch.long), "too long": torch.ones(256, dtype=torch.long)}
    decoder = Decoder(model.model, model.lm_head, None, prompts.__getitem__, None, lambda pixels: pixels, None)
    assert len(decoder.encode_prompt("fits")) == 255
    with pytest.raises(UserError, match=r"makes a prompt of 256 tokens.*for 256 positions"):
        decoder.encode_prompt("too long")


@pytest.mark.parametrize("taps", [None, [1, 2], [1]])
@torch.inference_mode()
def test_states_on_vision_tokens_know_what_stands_before_them_alone(taps):
    """Of the last tapped layer, from the first vision token to the last; whatever follows is not read."""
    model, decoder = tiny_llama(0), as_decoder(tiny_llama(0), taps)
    for ids, first, last in (([7, 1, 9], 1, 1), ([7, 8, 1, 1, 1, 9, 9], 2, 4), ([1, 5], 0, 0)):
        found = decoder.vision_states(torch.tensor([ids, ids]), torch.zeros(2, 1))
        every = model.model(input_ids=torch.tensor([ids[: last + 1]]), output_hidden_states=True).hidden_states
        wanted = every[taps[-1] if taps else 2][:, first:]
        torch.testing.assert_close(found, wanted.expand(2, -1, -1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_pair_that_does_not_fit_into_memory_is_refused_after_its_table(monkeypatch, capsys, missing):
    numbers = {f.name: 1000 + i for i, f in enumerate(dataclasses.fields(pair.ModelReport))}
    model = pair.ModelReport(**numbers | {"checkpoint": "here", "weights": "complete", "weight_bytes": 1 << 30, "cache_bytes": 1 << 29})
    report = pair.PairReport({"EventGPT": model, "Video-LLaVA": model}, (3 << 30) + missing, 3 << 30)
    monkeypatch.setattr(pair, "check_pair", lambda cfg: report)
    if not missing:
        assert pair.main(["--quantize", "nf4"]) == json.loads(capsys.readouterr().out.splitlines()[-1]) == report.to_json()
        assert report.to_json()["there_bytes"] == 3 << 30 and report.to_json()["models"]["EventGPT"]["layers"] == 1003
    else:
        with pytest.raises(UserError, match=r"the pair needs 3\.00 GiB and cpu has 3\.00 GiB free.*--quantize nf4"):
            pair.main([])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(UserError, match="sees no GPU"):  # rather than that 0 bytes are free there
            pair.main(["--device", "cuda"])
        said = capsys.readouterr().out
        lines = ("layers", "1,003", "weights as float32", "1.00 GiB", "cache of one prompt and 64 tokens", "0.50 GiB", "3.00 GiB")
        assert all(line in said for line in lines)
