"""Tiny real models: the real classes, random weights, milliseconds to run."""

from __future__ import annotations

import copy
import json
import os
import sys
from importlib import import_module
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from feature_alignment.cli.config import SCRIPTS
from feature_alignment.models import packed
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.preprocessing import load_tokenizer
from feature_alignment.models.state import Prompt

torch.set_num_threads(1)
packed.TRIAL_SECONDS = 0.0  # tiny models: what a trial finds does not matter
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
SHARED = ROOT.parent / "shared" / "fixtures"
VOCAB = 64
EOS = 2  # of the tiny models


def needs(path: Path):
    return pytest.mark.skipif(not path.exists(), reason=f"fixture {path.name} is not here")


def tiny_llama(seed: int, layers: int = 2, kv_heads: int = 2, hidden_size: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def noisy_copy(model: LlamaForCausalLM, noise: float, seed: int = 9) -> LlamaForCausalLM:
    """A drafter that agrees with `model` always (0), sometimes (0.02) or hardly ever (1)."""
    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += noise * torch.randn_like(parameter) * parameter.std()
    return other


def as_decoder(model: LlamaForCausalLM, taps=None) -> Decoder:
    """A text-only decoder: the prompt's pixels are ignored, everything behind the embedding is what the real pair runs. BOS stands
    for vision."""
    model = copy.deepcopy(model)
    embed = lambda ids, _: model.model.embed_tokens(ids)  # noqa: E731
    return Decoder(model.model, model.lm_head, None, None, None, lambda pixels: pixels, embed, taps, placeholder=1, vision_tokens=1)


def fork() -> int:
    """os.fork for a process that used torch. The child lays torch's thread pool anew at once: where several threads would try to at the
    same time, as those that load weights do, torch fails."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
    return pid


def prompt_of(*ids: int) -> Prompt:
    return Prompt(torch.tensor(ids), torch.zeros(1))


@pytest.fixture(scope="session")
def geometry(tiny_run, tmp_path_factory) -> Path:
    """What `tests/benchmarks/geometry_7b.py` writes, with the tiny pair's tokenizers."""
    from geometry_7b import write_geometry

    out = tmp_path_factory.mktemp("geometry") / "geometry_7b"
    names = {"draft": "eventgpt", "target": "video_llava"}
    write_geometry(out, {who: load_tokenizer(tiny_run / "pair" / name, 10**6) for who, name in names.items()})
    return out


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """A folder with a tiny random pair in the released formats, a few clips of every split, and a config that ties them together."""
    from feature_alignment.demo import build_pair, scenes, students

    root = tmp_path_factory.mktemp("run")
    small = {"WIDTH": 32, "LAYERS": 3, "HEADS": 2, "INTERMEDIATE": 48}
    vision = {**students.VISION, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small.items():
            patch.setattr(students, name, value)
        patch.setattr(students, "VISION", vision)
        for seed, who in enumerate(("target", "draft")):
            torch.manual_seed(seed)
            model = students.new_model(who)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter *= 4 if parameter.ndim > 1 else 1  # far from ties, and saying various things
            torch.save(model.state_dict(), root / f"{who}.pt")
            build_pair.save(who, root, root / "pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(scenes.SPLITS, "train", (2_000_000, 6, 3))  # three questions about a clip: batches that do not divide evenly
        for split, clips in (("train", 6), ("validation", 3), ("test", 4)):
            scenes.write_split(root / "scenes", split, clips)
    config = {
        "common": {
            "target_id": str(root / "pair" / "video_llava"),
            "draft_id": str(root / "pair" / "eventgpt"),
            "manifests": {s: str(root / "scenes" / f"{s}.jsonl") for s in ("train", "validation", "test")},
            "lexicon": str(ROOT / "data" / "demo" / "lexicon.json"),
            "output_dir": str(root / "out"),
            "threads": 1,
        },
        "extract_hidden_states": {
            "max_new_tokens": 12,
            "batch_size": 4,
            "store_dtype": "float32",
            "event_states": True,
            "prompt_states": 6,
            "own_drafts": True,
        },
        "train_hidden_adapter": {"num_epochs": 2, "batch_size": 4},
        "feature_sd_inference": {"max_new_tokens": 12},
        "benchmark_feature_sd": {"max_new_tokens": 12, "limit": 4, "repeats": 1, "warmup": 1, "num_draft_tokens": [2, 3]},
    }
    (root / "tiny.yaml").write_text(json.dumps(config))
    return root


def main_of(script: str):
    return import_module(f"feature_alignment.{script}").main


@pytest.fixture(scope="session")
def finished(tiny_run) -> Path:
    """`tiny_run` after all seven scripts; read it, write elsewhere."""
    config = ["--config", str(tiny_run / "tiny.yaml")]
    for split in ("train", "validation", "test"):
        main_of("extract_hidden_states")([*config, "--split", split])
    for blind in ("false", "true"):
        main_of("train_hidden_adapter")([*config, "--adapter", "chained", "--bottleneck", "16", "--blind", blind])
    main_of("train_hidden_adapter")([*config, "--adapter", "attending", "--bottleneck", "16", "--roll_out_steps", "2"])
    main_of("train_hidden_adapter")([*config, "--adapter", "plain"])
    for script in SCRIPTS[1:]:
        main_of(script)([*config, *(["--hidden_size", "64"] if script == "hidden_adapter" else [])])
    return tiny_run
