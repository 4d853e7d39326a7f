"""The native EventGPT against outputs of the released code on a real event stream."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import SHARED, needs
from safetensors.torch import load_file, save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from feature_alignment.cli.console import UserError
from feature_alignment.inputs.clip_pixels import clip_pixels
from feature_alignment.inputs.events import event_images, load_events
from feature_alignment.models.eventgpt import EventGPTConfig, load_eventgpt

REFERENCE = SHARED / "eventgpt_reference"
pytestmark = needs(REFERENCE)


def load(path=REFERENCE):
    config = EventGPTConfig.from_pretrained(REFERENCE, vision_config=json.loads((REFERENCE / "vision_config.json").read_text()))
    return load_eventgpt(path, torch.float32, config=config)


@pytest.fixture(scope="module")
def expected():
    return np.load(REFERENCE / "expected.npz")


@pytest.fixture(scope="module")
def pixels():
    images = event_images(load_events(SHARED / "events" / "interlaken_00_d_000099.npy"), 5)
    processor = CLIPImageProcessorPil.from_pretrained(REFERENCE)
    return images, torch.from_numpy(clip_pixels(images, processor)).bfloat16().float()


def test_event_images_and_pixels(expected, pixels):
    images, values = pixels
    for i in (0, 2, 4):
        np.testing.assert_array_equal(images[i], expected[f"event_image_{i}"])
    torch.testing.assert_close(values, torch.from_numpy(expected["pixel_values"]), atol=1e-4, rtol=0)


@torch.inference_mode()
def test_embeddings_states_logits_and_greedy_ids(expected, pixels):
    model = load()
    ids = torch.from_numpy(expected["input_ids"]).long()
    embeds = model.model.splice(ids, model.model.encode_events(pixels[1][None]))
    hidden = model.model(inputs_embeds=embeds).last_hidden_state
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(embeds, torch.from_numpy(expected["inputs_embeds"]), **close)
    torch.testing.assert_close(hidden, torch.from_numpy(expected["last_hidden_state"]), **close)
    torch.testing.assert_close(model.lm_head(hidden), torch.from_numpy(expected["logits"]), **close)
    generated = model.generate(inputs_embeds=embeds, max_new_tokens=24, do_sample=False)
    assert generated.tolist() == expected["generated_ids"].tolist()


def altered(tmp_path, change):
    shutil.copytree(REFERENCE, tmp_path / "ckpt", ignore=shutil.ignore_patterns("*.npz"), copy_function=shutil.copyfile)
    (tmp_path / "ckpt").chmod(0o755)
    state = load_file(REFERENCE / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "ckpt" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "ckpt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.feature_adaptor.weight"), "missing keys: 1"),
        (lambda s: s.update({"model.extra.weight": torch.zeros(3)}), "unexpected keys: 1"),
        (lambda s: s.update({"model.query_embedder.weight": torch.zeros(3)}), "Q-Former"),
        (lambda s: s.update({"model.attention_layers.0.weight": torch.zeros(3)}), "Q-Former"),
        (lambda s: s.update({"lm_head.weight": torch.zeros(7, 64)}), "mismatched keys: 1"),
    ],
)
def test_incomplete_checkpoints_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load(altered(tmp_path, change))


def test_saving_writes_the_released_keys_back(tmp_path):
    load().save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(load_file(REFERENCE / "model.safetensors"))
