"""Generation settings of a checkpoint: the text is the one that transformers' own `generate` gives, drafted or not."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHARED, as_decoder, needs, prompt_of, tiny_llama
from oracle import states_behind
from test_sampling import ERROR, PROMPT, TEMPERATURE, TEXTS, VOCAB, Remembered, counted, p_value, proposer_for
from transformers import GenerationConfig

from feature_alignment import feature_sd_inference
from feature_alignment.benchmark import transformers_baselines as generate
from feature_alignment.cli.config import Common, parse_config
from feature_alignment.cli.console import UserError
from feature_alignment.decoding.baseline_drafters import HybridProposer, NGram, TableProposer
from feature_alignment.decoding.batch import speculate_batch
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.proposers import ModelProposer
from feature_alignment.decoding.sampling import Sampler
from feature_alignment.inputs.samples import read_samples
from feature_alignment.models.batches import ClipBatch
from feature_alignment.models.generation import GenerationRules, read_settings, with_flags
from feature_alignment.models.pair import load_pair

CASES = SHARED / "public_cases"
MAX = 24


class Bench:
    """A pair, some prompts, its answers without settings, and drafters that are often right."""

    def __init__(self, cfg: Common, split: str) -> None:
        self.pair = load_pair(cfg)
        self.target = self.pair.target
        self.samples = read_samples(cfg.manifests, split)[:6]
        self.prompts = [(self.target.prepare(s), self.pair.draft.prepare(s)) for s in self.samples]
        self.plain = GenerationConfig(eos_token_id=sorted(self.target.eos_ids))
        self.texts = [greedy(self.target, p, MAX).token_ids for p, _ in self.prompts]

    def proposers(self):
        table, own = NGram([("", t) for t in self.texts]), ModelProposer(self.pair.draft, None, None)
        return {"own": own, "ngram": TableProposer(table), "hybrid": HybridProposer(table, own, sure=0.5)}

    def settings(self, r: random.Random) -> GenerationConfig:
        """Some settings at random, that name tokens and strings of the texts."""
        said = sorted({t for text in self.texts for t in text})
        some = lambda most: r.sample(said, min(len(said), r.randint(1, most)))  # noqa: E731
        word = self.target.tokenizer.decode(r.choice(self.texts)[3:6]).strip()
        every = {
            "repetition_penalty": r.choice([0.8, 1.1, 1.3, 2.0]),
            "no_repeat_ngram_size": r.randint(1, 4),
            "min_new_tokens": r.randint(1, 20),
            "min_length": len(self.prompts[0][0].ids) + r.randint(1, 20),
            "suppress_tokens": some(5),
            "begin_suppress_tokens": some(3),
            "bad_words_ids": [some(2) for _ in range(r.randint(1, 3))],
            "sequence_bias": [[some(2), r.uniform(-9, 5)] for _ in range(r.randint(1, 3))],
            "exponential_decay_length_penalty": (r.randint(1, 10), r.uniform(1.01, 1.4)),
            "stop_strings": [word or ".", r.choice([".", " a", "the", ","])][: r.randint(1, 2)],
            "eos_token_id": [*self.target.eos_ids, *some(2)],
            "temperature": 0.7,
            "top_p": 0.5,  # of sampling only: greedy decoding ignores them, here and there
        }
        chosen = r.sample(sorted(every), r.randint(1, 4))
        return GenerationConfig(**{"eos_token_id": self.plain.eos_token_id, **{k: every[k] for k in chosen}})

    def follow(self, settings: GenerationConfig | None) -> None:
        self.target.settings = with_flags(settings) if settings else None
        self.target.eos_ids = frozenset((settings or self.plain).eos_token_id)

    @torch.inference_mode()
    def by_transformers(self, prompt, settings: GenerationConfig) -> list[int]:
        ids, pixels = prompt.ids[None], prompt.pixels[None].to(self.target.head_weight.dtype)
        not_shared = range(self.target.vocab_size, self.target._head_weight.shape[0])
        out = self.target.full_model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values_videos=pixels,
            generation_config=settings,
            tokenizer=self.target.tokenizer,
            max_new_tokens=MAX,
            do_sample=False,
            pad_token_id=0,
            suppress_tokens=[*(settings.suppress_tokens or ()), *not_shared] or None,
        )
        return out[0, ids.shape[1] :].tolist()

    def check(self, seed: int) -> tuple[int, int]:
        """One random setting: all ways of decoding give `generate`'s text. Draft tokens kept, and whether the settings changed it."""
        r = random.Random(seed)
        settings, i = self.settings(r), r.randrange(len(self.prompts))
        prompt, draft_prompt = self.prompts[i]
        wanted = self.by_transformers(prompt, settings)
        self.follow(settings)
        try:
            name, proposer = r.choice(sorted(self.proposers().items()))
            about = f"setting {seed}, {name}: {settings.to_diff_dict()}"
            assert greedy(self.target, prompt, MAX).token_ids == wanted, about
            got = speculate(self.target, proposer, prompt, draft_prompt, num_draft_tokens=r.randint(1, 7), max_new_tokens=MAX)
            assert got.token_ids == wanted, about
            if seed % 5 == 0:
                batch = speculate_batch(self.target, [proposer], [prompt], [draft_prompt], num_draft_tokens=3, max_new_tokens=MAX)
                assert batch.token_ids == [wanted], about
                assert ClipBatch(self.target, [self.samples[i]]).generate(MAX) == [wanted], about
                assert self.target.generate(self.target.prefill([prompt]), MAX) == [wanted], about
        finally:
            self.follow(None)
        return sum(x.num_accepted for x in got.rounds), wanted != self.texts[i]


@pytest.fixture(scope="module")
def tiny(tiny_run) -> Bench:
    return Bench(
        parse_config(feature_sd_inference.InferenceConfig, ["--config", str(tiny_run / "tiny.yaml")], "feature_sd_inference"), "test"
    )


@pytest.fixture(scope="module")
def demo() -> Bench:
    cfg = parse_config(feature_sd_inference.InferenceConfig, ["--config", str(ROOT / "configs" / "demo.yaml")], "feature_sd_inference")
    return Bench(dataclasses.replace(cfg, manifests={"test": ROOT / "data" / "demo" / "test.jsonl"}), "test")


def test_texts_equal_those_of_generate_under_random_settings(tiny):
    found = [tiny.check(seed) for seed in range(15)]
    assert sum(kept for kept, _ in found) > 0 and sum(changed for _, changed in found) > 7


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_texts_of_the_demo_pair_equal_those_of_generate_under_200_random_settings(demo, part):
    found = [demo.check(seed) for seed in range(1000 + 50 * part, 1050 + 50 * part)]
    assert sum(kept for kept, _ in found) > 50 and sum(changed for _, changed in found) > 15  # many settings change nothing


def law_by_transformers(model, settings: GenerationConfig, length: int = 3) -> dict[tuple[int, ...], float]:
    """The probability of every beginning of a sampled text, by the processors that `generate` itself makes."""
    settings._eos_token_tensor = torch.tensor(settings.eos_token_id)
    settings.do_sample, settings.temperature = True, TEMPERATURE
    rules = model._get_logits_processor(settings, input_ids_seq_length=len(PROMPT), device="cpu")
    law, open_ends = {}, {(): 1.0}
    for _ in range(length):
        longer = {}
        for text, p in open_ends.items():
            logits = model.lm_head(states_behind(model.model, [*PROMPT, *text])[-1:]).detach()
            logits[:, VOCAB:] = -torch.inf
            probs = rules(torch.tensor([[*PROMPT, *text]]), logits).softmax(-1)[0]
            longer |= {(*text, i): p * float(probs[i]) for i in range(VOCAB) if probs[i] > 0}
        law |= {t: p for t, p in longer.items() if t[-1] in settings.eos_token_id}
        open_ends = {t: p for t, p in longer.items() if t[-1] not in settings.eos_token_id}
    return law | open_ends


SAMPLED = [
    {"top_p": 0.8},
    {"top_k": 3},
    {"min_p": 0.2},
    {"top_p": 0.9, "top_k": 4, "repetition_penalty": 1.4},
    {"min_new_tokens": 3, "min_p": 0.05},
    {"typical_p": 0.7, "eos_token_id": [2, 0]},
    {"epsilon_cutoff": 0.1, "no_repeat_ngram_size": 2},
]
FAST = [("hybrid", 0, 400, False), ("own", 3, 400, True)]


@pytest.mark.parametrize(
    ("source", "which", "n", "shared"),
    [*FAST, *[pytest.param(["own", "hybrid", "ngram"][i % 3], i, 20_000, i % 2 == 1, marks=pytest.mark.slow) for i in range(len(SAMPLED))]],
)
@torch.inference_mode()
def test_sampled_texts_follow_the_distribution_of_generate(source, which, n, shared):
    model = tiny_llama(5)
    decoder = as_decoder(model)
    settings = GenerationConfig(**{"eos_token_id": [2], **SAMPLED[which]})
    decoder.settings, decoder.eos_ids = with_flags(settings), frozenset(settings.eos_token_id)
    decoder.restrict_vocabulary(VOCAB)
    target = Remembered(decoder)
    counts, kept = counted(target, proposer_for(source, target), Sampler(TEMPERATURE, 5, shared_noise=shared), n, 2)
    assert kept > n / 20 and p_value(counts, law_by_transformers(model, settings)) > ERROR


def copied(run: Path, out: Path, content: dict | str | Path | None) -> Common:
    """The tiny pair with another generation_config.json of the target's."""
    shutil.copytree(run / "pair", out / "pair")
    file = out / "pair" / "video_llava" / "generation_config.json"
    file.unlink(missing_ok=True)
    if isinstance(content, Path):
        shutil.copy(content, file)
    elif content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    cfg = parse_config(feature_sd_inference.InferenceConfig, ["--config", str(run / "tiny.yaml")], "feature_sd_inference")
    return dataclasses.replace(cfg, target_id=out / "pair" / "video_llava", output_dir=out)


@pytest.mark.parametrize("name", ["d1", "d2"])
@needs(CASES)
def test_the_public_cases_give_the_text_of_generate(tmp_path, name):
    file = CASES / f"{name}_generation_config.json"
    shutil.copytree(ROOT / "data" / "demo" / "video_llava", tmp_path / "video_llava")
    shutil.copy(file, tmp_path / "video_llava" / "generation_config.json")
    cfg = parse_config(feature_sd_inference.InferenceConfig, ["--config", str(ROOT / "configs" / "demo.yaml")], "feature_sd_inference")
    bench = Bench(
        dataclasses.replace(cfg, target_id=tmp_path / "video_llava", manifests={"test": ROOT / "data" / "demo" / "test.jsonl"}), "test"
    )
    stated = GenerationConfig(**json.loads(file.read_text()))
    for i, (prompt, draft_prompt) in enumerate(bench.prompts[:3]):
        assert bench.texts[i] == bench.by_transformers(prompt, stated)
        got = speculate(bench.target, bench.proposers()["hybrid"], prompt, draft_prompt, max_new_tokens=MAX)
        assert got.token_ids == bench.texts[i]
        if name == "d1":
            assert bench.texts[i][-1] in (2, 261) and 261 not in bench.texts[i][:-1]
    if name == "d1":
        assert any(text[-1] == 261 for text in bench.texts)
    ways = generate.ways(bench.target, MAX, 3, 2)
    prompt = bench.prompts[0][0]
    assert {way: answer(prompt).token_ids == bench.texts[0] for way, answer in ways.items()} == dict.fromkeys(ways, True)


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        ({"eos_token_id": [2, 7]}, {2, 7}),
        ({"eos_token_id": 7}, {7}),
        ({}, {2}),  # the config's
        (None, {2}),
        ({"eos_token_id": []}, {2}),
    ],
)
def test_texts_end_at_the_eos_ids_of_the_checkpoint(tiny_run, tmp_path, content, ids):
    pair = load_pair(copied(tiny_run, tmp_path, content))
    assert pair.target.eos_ids == ids and pair.draft.eos_ids == {2}


def test_without_eos_ids_in_a_config_the_tokenizers_applies(tiny, tmp_path):
    config = tiny.target.full_model.config.__class__.from_dict(tiny.target.full_model.config.to_dict())
    config.eos_token_id = config.text_config.eos_token_id = None
    assert read_settings(tmp_path, config, tiny.target.tokenizer).eos_token_id == tiny.target.tokenizer.eos_token_id is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"num_beams": 4}, "num_beams = 4"),
        ({"guidance_scale": 1.5}, "guidance_scale = 1.5"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha = 0.6"),
        ({"encoder_repetition_penalty": 1.2}, "encoder_repetition_penalty = 1.2"),
        ({"forced_eos_token_id": 2}, "forced_eos_token_id = 2"),
        ({"repetition_penalty": -1.0}, "strictly positive"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        ({"eos_token_id": [2, -5]}, "eos_token_id must be a token id"),
        ({"no_repeat_ngram_size": "two"}, "generation_config.json"),
        ("[1, 2]", "mapping|JSON object"),
    ],
)
def test_unsupported_settings_are_refused_by_name(tiny_run, tmp_path, content, message):
    with pytest.raises(UserError, match=message) as found:
        load_pair(copied(tiny_run, tmp_path, content))
    assert "generation_config.json" in str(found.value) or "mapping" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top_p", "0.9"], "--top_p: changes only what is sampled.*--temperature 1"),
        (["--top_p", "1.5", "--temperature", "1"], "--top_p 1.5"),
        (["--top_k", "-3", "--temperature", "1"], "--top_k -3"),
        (["--min_p", "2", "--temperature", "1"], "--min_p 2"),
        (["--repetition_penalty", "0"], "--repetition_penalty 0"),
        (["--min_new_tokens", "-1"], "--min_new_tokens -1"),
    ],
)
def test_flags_out_of_range_are_refused_by_name(tiny_run, flags, message):
    with pytest.raises(UserError, match=message):
        feature_sd_inference.main(["--config", str(tiny_run / "tiny.yaml"), "--draft", "own", *flags])


def test_flags_change_the_answer_and_a_seed_repeats_it(tmp_path):
    data, question = ROOT / "data" / "demo", "What are the key elements in this scene?"
    clip = ["--events", str(data / "events" / "test-0000.npy"), "--video", str(data / "video" / "test-0000.mp4"), "--question", question]
    base = ["--config", str(ROOT / "configs" / "demo.yaml"), *clip, "--draft", "own", "--output_dir", str(tmp_path)]
    base += ["--max_new_tokens", "16"]
    plain = feature_sd_inference.main(base)
    for more in (["--repetition_penalty", "1.8"], ["--min_new_tokens", "12"]):
        assert feature_sd_inference.main([*base, *more])["exact_match"]
    word = plain["text"].split()[1][1:4]  # inside a token
    stopped = feature_sd_inference.main([*base, "--stop", word, "zzz"])
    assert word in stopped["text"] and len(stopped["token_ids"]) < len(plain["token_ids"]) and stopped["exact_match"]
    sampled = [*base, "--temperature", "1", "--top_p", "0.9", "--top_k", "20"]
    adaptive = [feature_sd_inference.main([*sampled, "--adaptive"]) for _ in range(2)]
    fixed = [feature_sd_inference.main(sampled)["token_ids"] for _ in range(2)]
    assert fixed[0] == fixed[1] and adaptive[0]["token_ids"] == adaptive[1]["token_ids"] and all(a["exact_match"] for a in adaptive)


def test_no_hard_coded_id_ends_a_text():
    """EOS ids are read from the checkpoint; only the builder of the demo pair knows its vocabulary."""
    package = ROOT / "feature_alignment"
    guilty = [
        f"{file.name}: {line.strip()}"
        for file in package.rglob("*.py")
        if file.parent.name != "demo"
        for line in file.read_text().splitlines()
        if "EOS = 2" in line or "[-1] == 2" in line or "- 1] == 2" in line
    ]
    assert guilty == []


def test_prompt_tokens_count_for_the_repetition_penalty():
    """`generate` sees the prompt's ids; so do the rules, at every drafted position."""
    model = tiny_llama(0)
    target, prompt = as_decoder(model), prompt_of(1, 5, 9, 13)
    plain = greedy(target, prompt, MAX).token_ids
    target.settings = with_flags(GenerationConfig(eos_token_id=[2]), repetition_penalty=3.0)
    longer = prompt_of(*prompt.ids.tolist(), plain[0])
    wanted = model.generate(longer.ids[None], max_new_tokens=MAX, do_sample=False, repetition_penalty=3.0, pad_token_id=0)[0, 5:].tolist()
    assert greedy(target, longer, MAX).token_ids == wanted
    got = speculate(target, TableProposer(NGram([*TEXTS, ("", wanted)])), longer, longer, max_new_tokens=MAX)
    assert got.token_ids == wanted and sum(r.num_accepted for r in got.rounds) > 5


EVERYTHING = {
    "sequence_bias": [[[5], 2.0]],
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[9]],
    "min_length": 6,
    "min_new_tokens": 3,
    "exponential_decay_length_penalty": (1, 1.2),
    "suppress_tokens": [7],
    "begin_suppress_tokens": [8],
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.01,
    "typical_p": 0.95,
    "epsilon_cutoff": 0.001,
    "eta_cutoff": 0.002,
}


@pytest.mark.parametrize("name", [*EVERYTHING, "all"])
def test_processors_are_those_of_generate_in_its_order(name):
    """Of each setting alone, and of all at once: the same kinds, and the same scores after every token of a text."""
    settings = GenerationConfig(eos_token_id=[2, 3], do_sample=True, **(EVERYTHING if name == "all" else {name: EVERYTHING[name]}))
    settings._eos_token_tensor = torch.tensor([2, 3])
    wanted = tiny_llama(0)._get_logits_processor(settings, input_ids_seq_length=2, device="cpu")
    rules = GenerationRules.of(settings, {2, 3}, [0, 5], 40, None, "cpu")  # id 0 is a token like any other
    assert [type(p) for p in (*rules.processors, *rules.warpers)] == [type(p) for p in wanted] and len(wanted) in (1, len(EVERYTHING))
    text, logits = [4, 5, 4, 9, 5], torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    found = rules.scores(logits, [], text)
    for i in range(6):
        ids = torch.tensor([[0, 5, *text[:i]]])
        torch.testing.assert_close(rules.warpers(ids, found[i : i + 1]), wanted(ids, logits[i : i + 1].clone()))


def test_a_text_without_ends_has_no_least_length_and_an_empty_prompt_has_no_ids():
    rules = GenerationRules.of(GenerationConfig(min_length=4, min_new_tokens=4), (), [], 10, None, "cpu")
    assert not rules.processors and list(rules.prompt) == [] and rules.rows == 10
    assert GenerationRules.of(None, {2}, [0, 5], 10, None, "cpu") == GenerationRules({2})


def test_an_error_names_the_flags_or_the_checkpoint():
    beams = GenerationConfig(num_beams=4)
    with pytest.raises(UserError, match=r"^the checkpoint asks for num_beams = 4"):
        with_flags(beams, top_k=None)
    with pytest.raises(UserError, match=r"^--top_k 3 --stop x asks for num_beams = 4"):
        with_flags(beams, top_k=3, stop_strings="x")
    assert with_flags(GenerationConfig(top_k=5)).top_k == 5 and with_flags(None, top_k=3).top_k == 3


NOTHING = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0.0,
    "penalty_alpha": 0.0,
    "guidance_scale": 1.0,
    "constraints": [],
    "force_words_ids": [],
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "remove_invalid_values": False,
    "token_healing": False,
    "use_mtp": False,
    "repetition_penalty": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "typical_p": 1.0,
    "no_repeat_ngram_size": 0,
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_setting_without_effect_is_accepted(tiny, tmp_path, name):
    """And makes no processor: logits go through as they are, sampled or not."""
    config, tokenizer = tiny.target.full_model.config, tiny.target.tokenizer
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, name: NOTHING[name]}))
    rules = GenerationRules.of(read_settings(tmp_path, config, tokenizer), {2}, [1, 5], 300, tokenizer, "cpu")
    assert not rules.processors and not rules.warpers and rules.stop is None
    logits = torch.randn(2, 40)
    assert rules.scores(logits, [7], [8]) is logits


def test_a_block_is_scored_token_by_token():
    """Row i knows the prompt, the text and the first i tokens of the block; ids that only the prompt has are outside the shared rows."""
    settings = with_flags(GenerationConfig(eos_token_id=[2]), repetition_penalty=2.0)
    rules = GenerationRules.of(settings, {2}, [3, 11], 10, None, "cpu")
    assert rules.rows == 12 and GenerationRules.of(settings, {2}, [3, -200], 10, None, "cpu").prompt == ()
    logits = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) + 1
    found = rules.scores(logits, [4], [5, 6])
    for i, said in enumerate(({3, 4}, {3, 4, 5}, {3, 4, 5, 6})):
        wanted = [x / 2 if token in said else x for token, x in enumerate(logits[i].tolist())]
        assert found[i].tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("text", "new", "end"), [([], [5, 2, 6], 2), ([], [5, 6], None), ([2], [5, 6, 2], 3), ([], [], None), ([], [2], 1)]
)
def test_a_text_ends_after_its_first_end_among_the_new_tokens(text, new, end):
    assert GenerationRules({2}).end_of(text, new) == end
