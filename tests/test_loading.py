"""Both checkpoints in every released form; mismatched files are refused by name."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import VideoLlavaForConditionalGeneration

from feature_alignment.cli.config import SCRIPTS, Common, parse_config
from feature_alignment.cli.console import UserError
from feature_alignment.decoding.sources import Sources
from feature_alignment.inputs.samples import read_samples
from feature_alignment.models import eventgpt, loading, pair, preprocessing, video_llava
from feature_alignment.models.state import position_limit

MODELS = {"eventgpt": eventgpt.EventGPTForCausalLM, "video_llava": VideoLlavaForConditionalGeneration}


def vision_config(image_size):
    return dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=image_size, patch_size=12)


@pytest.fixture(scope="module")
def wide(tiny_run, tmp_path_factory) -> Common:
    """The tiny pair at hidden size 64: bitsandbytes wants at least 64 inputs to a layer."""
    root = tmp_path_factory.mktemp("wide")
    shutil.copytree(tiny_run / "pair", root, dirs_exist_ok=True)
    text = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
    for seed, (name, cls) in enumerate(MODELS.items()):
        config = json.loads((root / name / "config.json").read_text())
        inner = config if name == "eventgpt" else config["text_config"]
        inner.update(text)
        inner.pop("head_dim", None)
        config["vision_config"] = {**config["vision_config"], **vision_config(72), "projection_dim": 64}
        torch.manual_seed(seed)
        model = cls(cls.config_class.from_dict(config))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 4 if parameter.ndim > 1 else 1
        model.save_pretrained(root / name)
    return Common(target_id=root / "video_llava", draft_id=root / "eventgpt", manifests={"test": tiny_run / "scenes" / "test.jsonl"})


@pytest.fixture
def copied(wide, tmp_path) -> Common:
    shutil.copytree(wide.target_id.parent, tmp_path, dirs_exist_ok=True)
    return dataclasses.replace(wide, target_id=tmp_path / "video_llava", draft_id=tmp_path / "eventgpt")


def answer(cfg, tokens=8):
    both = pair.load_pair(cfg)
    sample = read_samples(cfg.manifests, "test")[0]
    return [m.generate(m.prefill([m.prepare(sample)]), tokens) for m in (both.target, both.draft)]


def rewrite(folder: Path, change):
    state = load_file(folder / "model.safetensors")
    changed = change(dict(state))
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})


def released_keys(state):
    """As on the hub: towers with `vision_model.`, the language model with its own `model.` and head."""
    towers = ("video_tower.", "image_tower.", "model.visual_tower.visual_tower.")
    return {next((k.replace(t, t + "vision_model.", 1) for t in towers if k.startswith(t)), k): v for k, v in state.items()}


def new_keys(state):
    """As transformers names Video-LLaVA's parameters today."""
    heads = ("language_model.lm_head.", "lm_head."), ("language_model.model.", "model.language_model.")
    renamed = {}
    for key, value in state.items():
        old, new = next((names for names in heads if key.startswith(names[0])), ("", "model."))
        renamed[new + key.removeprefix(old)] = value
    return renamed


def to_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def to_shards(folder, cls):
    cls.from_pretrained(folder).save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("form", ["released keys", "new keys", "bin", "shards"])
def test_every_form_of_a_checkpoint_loads_the_same_model(wide, copied, form):
    if form == "new keys":
        rewrite(copied.target_id, new_keys)
    elif form == "released keys":
        rewrite(copied.target_id, released_keys)
        rewrite(copied.draft_id, released_keys)
    for cls, folder in zip(MODELS.values(), (copied.draft_id, copied.target_id), strict=True):
        if form == "bin":
            to_bin(folder)
        elif form == "shards":
            to_shards(folder, cls)
    for loader, old, new in (
        (eventgpt.load_eventgpt, wide.draft_id, copied.draft_id),
        (video_llava.load_video_llava, wide.target_id, copied.target_id),
    ):
        one, other = loader(old, torch.float32).state_dict(), loader(new, torch.float32).state_dict()
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def rename(state):
    state["multi_modal_projector.linear_9.weight"] = state.pop("multi_modal_projector.linear_1.weight")
    return state


def drop(state):
    state.pop("language_model.model.layers.1.mlp.up_proj.weight")
    return state


def reshape(state):
    return {**state, "multi_modal_projector.linear_1.bias": torch.zeros(7)}


@pytest.mark.parametrize(
    ("change", "message"),
    [(rename, "missing keys: 1.*linear_1(.|\n)*unexpected keys: 1.*linear_9"), (drop, "up_proj"), (reshape, "mismatched keys: 1")],
)
def test_an_incomplete_video_llava_is_refused(copied, change, message):
    rewrite(copied.target_id, change)
    for check in (pair.load_target, pair.check_pair):  # the check reads names and shapes only, and finds the same
        with pytest.raises(UserError, match=message):
            check(copied)


def test_damaged_weights_are_refused(copied):
    whole = (copied.target_id / "model.safetensors").read_bytes()
    (copied.target_id / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="could not be loaded as Video-LLaVA"):
        pair.check_pair(copied)


def test_a_tokenizer_with_more_ids_than_rows_is_refused(copied):
    tokenizer = preprocessing.load_tokenizer(copied.draft_id, 10**6)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(2000)])
    tokenizer.save_pretrained(copied.draft_id)
    with pytest.raises(UserError, match=r"the tokenizer has \d+ ids, the model \d+ embedding rows"):
        pair.load_draft(copied)


def test_tokenizers_with_different_pieces_are_refused(copied):
    path = copied.draft_id / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    pieces = [p for p, i in sorted(vocab.items(), key=lambda item: item[1]) if len(p) == 1][-2:]
    vocab[pieces[0]], vocab[pieces[1]] = vocab[pieces[1]], vocab[pieces[0]]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"do not share ids: 2 of \d+ differ"):
        pair.load_pair(copied)


@pytest.mark.parametrize("content", [b"{", b"{}"])
def test_a_damaged_tokenizer_is_named(copied, content):
    (copied.draft_id / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="eventgpt: its tokenizer could not be loaded"):
        pair.load_draft(copied)


def test_the_preprocessor_must_fit_its_tower(copied, caplog):
    path = copied.target_id / "preprocessor_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "crop_size": {"height": 336, "width": 336}}))
    with pytest.raises(UserError, match=r"crops to 336 x 336, the vision tower expects 72 x 72"):
        pair.load_target(copied)
    path.unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json could not be loaded"):
        pair.load_target(copied)
    (copied.draft_id / "preprocessor_config.json").unlink()  # the released EventGPT names its tower's directory instead of having one
    caplog.set_level("INFO")
    assert pair.load_draft(copied).read_pixels(read_samples(copied.manifests, "test")[0]).shape == (5, 3, 72, 72)
    assert "CLIP's at 72 pixels" in caplog.text


def test_a_checkpoint_with_only_a_sentencepiece_model(tmp_path, monkeypatch):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    text = tmp_path / "text"
    text.write_text("\n".join(f"USER: What are the key elements in scene {i}? ASSISTANT: A car, {i} people." for i in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=350, model_type="bpe", byte_fallback=True, minloglevel=2
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}))
    tokenizer = preprocessing.load_tokenizer(tmp_path, 350)
    raw = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert tokenizer("USER: A car").input_ids == [1, *raw.encode("USER: A car")]
    monkeypatch.setattr(loading, "_installed", lambda name: name != "google.protobuf")
    with pytest.raises(UserError, match=r"only a tokenizer\.model, which needs google\.protobuf\. Type:\n  pip install"):
        preprocessing.load_tokenizer(tmp_path, 350)


def test_prompt_lengths_are_held_for_the_released_vocabulary_only():
    class Released:
        def __len__(self):
            return 32_003

    preprocessing.check_prompt(Path("x"), Released(), 20, (20, 21))
    preprocessing.check_prompt(Path("x"), "a tokenizer of another size", 44, (20, 21))
    with pytest.raises(UserError, match="has 25 text tokens, the released tokenizer gives 20 or 21"):
        preprocessing.check_prompt(Path("x"), Released(), 25, (20, 21))


# ---- ways to run


def test_four_bits_do_not_apply_to_towers_projectors_and_heads(wide):
    pytest.importorskip("bitsandbytes")
    cfg = dataclasses.replace(wide, quantize="nf4", dtype="bfloat16")
    for opened, keep in ((pair.open_draft(cfg), eventgpt.UNQUANTIZED), (pair.open_target(cfg), video_llava.UNQUANTIZED)):
        names = dict(opened.model.named_modules())
        assert all(name in names for name in keep)
        packed = {n.rpartition(".")[0] for n, p in opened.model.named_parameters() if p.dtype == torch.uint8}
        wanted = {n for n, m in names.items() if isinstance(m, torch.nn.Linear) and not n.startswith(keep)}
        assert packed == wanted and len(packed) == 2 * 7
        assert all(p.dtype == torch.bfloat16 for n, p in opened.model.named_parameters() if n.rpartition(".")[0] not in packed)
    assert all(len(rows[0]) > 1 for rows in answer(cfg))


def test_four_bits_without_bitsandbytes_are_refused(wide, monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"bitsandbytes is not installed. Type:\n  pip install"):
        pair.load_draft(dataclasses.replace(wide, quantize="nf4"))


def test_a_device_map_changes_nothing(wide):
    assert answer(dataclasses.replace(wide, device_map="auto")) == answer(wide)


def test_flash_attention_falls_back(wide, caplog):
    assert answer(dataclasses.replace(wide, attn_implementation="flash_attention_2")) == answer(wide)
    assert caplog.text.count("falling back to sdpa") == 2
    eager = pair.open_draft(dataclasses.replace(wide, attn_implementation="eager")).model
    assert eager.config._attn_implementation == eager.config.vision_config._attn_implementation == "eager"


def test_random_weights_are_logged_and_reproducible(copied, caplog):
    cfg = dataclasses.replace(copied, random_weights=True)
    for folder in (copied.draft_id, copied.target_id):
        (folder / "model.safetensors").unlink()
    assert answer(cfg) == answer(cfg)
    assert "RANDOM WEIGHTS" in caplog.text
    with pytest.raises(UserError, match="cannot be combined"):
        pair.load_draft(dataclasses.replace(cfg, quantize="nf4"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_device_is_refused(wide):
    with pytest.raises(UserError, match=r"sees no GPU\. Pass --device cpu"):
        pair.load_pair(dataclasses.replace(wide, device="cuda"))
    with pytest.raises(UserError, match="wanted cpu, cuda"):
        pair.load_pair(dataclasses.replace(wide, device="gpu"))


# ---- the check


def check(*argv):
    command = [sys.executable, "-m", "feature_alignment.models.pair", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_check_prints_one_table(tiny_run):
    done = check("--config", tiny_run / "tiny.yaml")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["models"]["EventGPT"]["weights"] == "complete" and 0 < report["needed_bytes"] < report["there_bytes"]
    for line in ("parameters", "vision tokens", "memory needed", "free memory"):
        assert line in done.stdout
    with pytest.raises(UserError, match="no checkpoint at absent"):
        pair.main(["--config", str(tiny_run / "tiny.yaml"), "--target_id", "absent"])


def test_the_7b_geometry_without_weights(geometry):
    """Names and shapes only: parameters, tokens and memory of the released pair."""
    cfg = parse_config(Common, ["--config", str(geometry / "random_7b.yaml"), "--device", "cpu"], "models/pair")
    found = pair.check_pair(cfg).to_json()["models"]
    assert [m["weights"] for m in found.values()] == ["random"] * 2
    assert [m["parameters"] for m in found.values()] == [7_079_684_096, 7_366_279_168]
    assert [m["vision_tokens"] for m in found.values()] == [582, 2056]
    assert [round(m["weight_bytes"] / 2**30, 2) for m in found.values()] == [13.19, 13.72]
    in_4_bits = pair.check_pair(dataclasses.replace(cfg, quantize="nf4")).to_json()["models"]
    assert [round(m["weight_bytes"] / 2**30, 2) for m in in_4_bits.values()] == [4.24, 4.77]


def test_settings_of_the_inputs_are_used_and_recorded(tiny_run, tmp_path):
    from feature_alignment.extract_hidden_states import main

    (tmp_path / "q.txt").write_text("What is this scene about?\nWhat do you see?\n")
    argv = [
        "--config",
        str(tiny_run / "tiny.yaml"),
        "--split",
        "test",
        "--output_dir",
        str(tmp_path / "out"),
        "--questions",
        str(tmp_path / "q.txt"),
    ]
    settings = ["--frame_sampling", "arange", "--event_window_ms", "40", "--event_start_ms", "10"]
    meta = main([*argv, *settings])
    assert meta["rows"] == 4 * 2
    kept = json.loads((tmp_path / "out" / "hidden_states" / "test" / "meta.json").read_text())["settings"]
    assert (kept["frame_sampling"], kept["event_window_ms"], kept["event_start_ms"], kept["random_weights"]) == (
        "arange",
        40.0,
        10.0,
        False,
    )
    (tmp_path / "q.txt").write_text("What is this scene about?\n")
    with pytest.raises(UserError, match="questions"):  # other questions under the same name are another run
        main([*argv, *settings])
    assert main([*argv, *settings, "--no_resume"])["rows"] == 4


def test_a_hub_name_that_cannot_be_downloaded_is_refused(wide, monkeypatch):
    import huggingface_hub

    def offline(name):
        raise OSError(f"no route to {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"--target_id hub:someone/pair: not in the cache.*no route to someone/pair"):
        pair.load_target(dataclasses.replace(wide, target_id=Path("hub:someone/pair")))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: str(wide.target_id))
    assert pair.load_target(dataclasses.replace(wide, target_id=Path("hub:someone/pair"))).num_layers == 2


def test_all_scripts_run_on_random_weights(tiny_run, tmp_path):
    """The run of a GPU at 7B geometry, with tiny models: all seven scripts, and every file records that the weights were random."""
    shutil.copytree(tiny_run / "pair", tmp_path / "pair", ignore=shutil.ignore_patterns("*.safetensors"))
    argv = ["--config", str(tiny_run / "tiny.yaml"), "--output_dir", str(tmp_path / "out"), "--random_weights"]
    argv += ["--target_id", str(tmp_path / "pair" / "video_llava"), "--draft_id", str(tmp_path / "pair" / "eventgpt")]
    mains = {script: importlib.import_module(f"feature_alignment.{script}").main for script in SCRIPTS}
    for split in ("train", "validation", "test"):
        mains["extract_hidden_states"]([*argv, "--split", split])
    for script in SCRIPTS[2:]:
        mains[script]([*argv, *(["--limit", "2"] if script == "benchmark_feature_sd" else [])])
    for file in ("hidden_states/test/meta.json", "adapter/meta.json", "acceptance/acceptance.json", "benchmark/benchmark.json"):
        content = json.loads((tmp_path / "out" / file).read_text())
        assert content.get("meta", content)["config"]["random_weights"] is True


@pytest.mark.parametrize("rows", [250, 200])
def test_every_drafter_is_restricted_to_the_shared_ids(wide, monkeypatch, rows):
    """A target with fewer rows than the drafter: no decoder that the pair opens may propose an id beyond them."""
    whole = pair.load_target

    def fewer(cfg):
        target = whole(cfg)
        target._head_weight = target._head_weight[:rows]
        target.restrict_vocabulary(rows)
        return target

    monkeypatch.setattr(pair, "load_target", fewer)
    cfg = dataclasses.replace(wide, draft_layers=[1], output_dir=Path("unused"))
    both = pair.load_pair(cfg)
    decoders = [both.draft, both.draft_with(None, cfg), both.draft_with([1], cfg), Sources(both, cfg).full_draft]
    assert both.draft._head_weight.shape[0] > rows
    assert [d.vocab_size for d in decoders] == [rows] * 4 and {len(d.embeddings) for d in decoders} == {rows}
    assert all(d.lm_head(torch.zeros(1, d.hidden_size)).shape[-1] == rows for d in decoders)


def test_only_the_pair_loads_drafters():
    """So that none is left unrestricted."""
    loads = [f.name for f in sorted((ROOT / "feature_alignment").rglob("*.py")) if re.search(r"\bload_draft\(", f.read_text())]
    assert loads == ["build_pair.py", "pair.py"]  # The first looks at one model alone.


def test_a_prompt_longer_than_the_model_has_positions_for_is_refused(wide):
    both = pair.load_pair(wide)
    for model in (both.target, both.draft):
        fits = len(model.encode_prompt("What is there?")) + (model.vision_tokens - 1 if model is both.draft else 0)
        for most in (fits, fits + 1):
            model.llama.config.max_position_embeddings = most
            if most > fits:
                model.encode_prompt("What is there?")
                continue
            with pytest.raises(UserError, match=f"prompt of {fits} tokens, vision included.*for {fits} positions"):
                model.encode_prompt("What is there?")
    config = both.target.llama.config
    config.max_position_embeddings, config.rope_parameters = 100, {"rope_type": "linear", "factor": 4.0}
    assert position_limit(config) == 400
