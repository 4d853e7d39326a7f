"""Both models behind one small interface, so that nothing above knows LLaMA from LLaVA.

python -m feature_alignment.models.pair --config configs/eventgpt_videollava_7b.yaml
    checks both checkpoints without reading their weights: what was found, memory needed, memory there
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    from feature_alignment.cli.console import run_module

    run_module("feature_alignment.models.pair")

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from feature_alignment.cli.config import Common, Steps, parse_config
from feature_alignment.cli.console import UserError, print_json_line, print_table
from feature_alignment.inputs import events as event_inputs
from feature_alignment.inputs.samples import Sample
from feature_alignment.inputs.video import NUM_FRAMES, clip_pixels, read_frames
from feature_alignment.models import generation, loading
from feature_alignment.models.decoder import Decoder, State
from feature_alignment.models.packed import LinearChoice

_ROOM = 64  # tokens of an answer, where memory is reckoned


def _probed(decoder: Decoder, path: Path, side: int) -> Decoder:
    """The decoder itself, once it has read a blank picture and two tokens."""
    with loading.report_load_errors(path) as made:
        made.append(decoder.encode_vision(torch.zeros(1, 1, 3, side, side)))
        nothing, two = State(DynamicCache(config=decoder.llama.config), made[0], 0), torch.tensor([[1, 1]], device=decoder.device)
        made.append(decoder.step(nothing, two))
    return decoder


@dataclass(frozen=True)
class Pair:
    target: Decoder
    draft: Decoder

    def use_steps(self, steps: Steps) -> None:
        self.target.use_steps(steps)
        self.draft.use_steps(steps)

    def choose_linear(self) -> dict[str, LinearChoice]:
        """Choose the product of both models' linear layers by a trial; see `Decoder.choose_linear`."""
        return {"target": self.target.choose_linear(), "draft": self.draft.choose_linear()}

    def draft_with(self, layers: list[int] | None, cfg: Common) -> Decoder:
        """Another decoder of the drafter's checkpoint, with the pair's vocabulary and steps.

        Args:
            layers: which of its layers it reads; None for all of them.
            cfg: of the pair.
        """
        return self._fitted(load_draft(dataclasses.replace(cfg, draft_layers=layers)))

    def _fitted(self, draft: Decoder) -> Decoder:
        draft.restrict_vocabulary(self.target.vocab_size)
        draft.use_steps(self.draft.steps)
        if self.draft.linear.kind == "packed":
            draft.pack_linear()
        return draft


def load_pair(cfg: Common) -> Pair:
    """Both decoders of a config, on its device and dtype; refuses checkpoints whose vocabularies do not share ids."""
    loading.check_device(cfg.device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.device.startswith("cuda:"):
        torch.cuda.set_device(cfg.device)  # where steps are recorded and timed
    target, draft = load_target(cfg), load_draft(cfg)
    loading.check_shared_ids(cfg.draft_id, draft.tokenizer, cfg.target_id, target.tokenizer)
    target.restrict_vocabulary(min(target.vocab_size, draft.vocab_size))
    pair = Pair(target, draft)
    pair._fitted(draft)
    return pair


def load_target(cfg: Common) -> Decoder:
    """Video-LLaVA as a `Decoder`; its head still has all rows."""
    from feature_alignment.models import video_llava

    model, tokenizer, processor, vision_tokens, _ = open_target(cfg)

    def read_pixels(sample: Sample) -> Tensor:
        return torch.from_numpy(clip_pixels(list(read_frames(sample.video, sampling=cfg.frame_sampling)), processor))

    decoder = Decoder(
        model.model.language_model,
        model.lm_head,
        tokenizer,
        encode_prompt=lambda question: torch.tensor(video_llava.encode_prompt(tokenizer, question, vision_tokens)),
        read_pixels=read_pixels,
        encode_vision=lambda pixels: video_llava.encode_video(model, pixels),
        splice=lambda ids, vision: video_llava.splice(model, ids, vision),
        device=cfg.device,
        placeholder=model.config.video_token_index,
        vision_tokens=vision_tokens,
        full_model=model,
        settings=generation.read_settings(loading.find_checkpoint(cfg.target_id, "--target_id"), model.config, tokenizer),
    )
    return _probed(decoder, cfg.target_id, model.config.vision_config.image_size)


def load_draft(cfg: Common) -> Decoder:
    """EventGPT as a `Decoder`, cut off behind the last of `cfg.draft_layers`."""
    from feature_alignment.models import eventgpt

    model, tokenizer, processor, vision_tokens, _ = open_draft(cfg)
    canvas = model.config.event_canvas_hw

    def read_pixels(sample: Sample) -> Tensor:
        start_ms = cfg.event_start_ms if sample.event_start_ms is None else sample.event_start_ms
        stream = event_inputs.load_events(sample.events, cfg.event_window_ms, start_ms, sample.event_time_unit or cfg.event_time_unit)
        extent = int(stream["y"].max()) + 1, int(stream["x"].max()) + 1
        fits = canvas is not None and extent[0] <= canvas[0] and extent[1] <= canvas[1]
        images = event_inputs.event_images(stream, eventgpt.NUM_EVENT_SLICES, tuple(canvas) if fits else None)
        return torch.from_numpy(clip_pixels(images, processor)).bfloat16().float()  # the released code rounds pixels to bfloat16

    decoder = Decoder(
        model.model,
        model.lm_head,
        tokenizer,
        encode_prompt=lambda question: torch.tensor(eventgpt.encode_prompt(tokenizer, question)),
        read_pixels=read_pixels,
        encode_vision=model.model.encode_events,
        splice=model.model.splice,
        taps=cfg.draft_layers,
        device=cfg.device,
        placeholder=eventgpt.EVENT_TOKEN_INDEX,
        vision_tokens=vision_tokens,
        settings=generation.read_settings(loading.find_checkpoint(cfg.draft_id, "--draft_id"), model.config, tokenizer),
    )
    return _probed(decoder, cfg.draft_id, model.config.vision_config.image_size)


class Opened(NamedTuple):
    """A checkpoint that has passed its gates. prompt_tokens: length of the probe question's prompt, vision included."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processor: CLIPImageProcessorPil
    vision_tokens: int
    prompt_tokens: int


def open_target(cfg: Common) -> Opened:
    """Video-LLaVA's checkpoint on cfg.device ("meta": names and shapes only), its tokenizer and preprocessing."""
    from feature_alignment.models import video_llava

    path = loading.find_checkpoint(cfg.target_id, "--target_id")
    model = video_llava.load_video_llava(path, getattr(torch, cfg.dtype), cfg.device, **_options(cfg))
    vision = model.config.vision_config
    vision_tokens = NUM_FRAMES * ((vision.image_size // vision.patch_size) ** 2 + 1)
    tokenizer = loading.load_tokenizer(path, model.lm_head.weight.shape[0])
    prompt_tokens = len(video_llava.encode_prompt(tokenizer, loading.PROBE_QUESTION, vision_tokens))
    loading.check_prompt(path, tokenizer, prompt_tokens - vision_tokens, video_llava.KNOWN_TEXT_TOKENS)
    return Opened(model, tokenizer, loading.load_processor(path, vision.image_size), vision_tokens, prompt_tokens)


def open_draft(cfg: Common) -> Opened:
    """EventGPT's checkpoint on cfg.device ("meta": names and shapes only), its tokenizer and preprocessing."""
    from feature_alignment.models import eventgpt

    path = loading.find_checkpoint(cfg.draft_id, "--draft_id")
    model = eventgpt.load_eventgpt(path, getattr(torch, cfg.dtype), cfg.device, **_options(cfg))
    vision = model.config.vision_config
    vision_tokens = eventgpt.NUM_EVENT_SLICES + (vision.image_size // vision.patch_size) ** 2 + 1
    tokenizer = loading.load_tokenizer(path, model.lm_head.weight.shape[0])
    text_tokens = len(eventgpt.encode_prompt(tokenizer, loading.PROBE_QUESTION)) - 1
    loading.check_prompt(path, tokenizer, text_tokens, eventgpt.KNOWN_TEXT_TOKENS)
    processor = loading.load_processor(path, vision.image_size, default=True)
    return Opened(model, tokenizer, processor, vision_tokens, text_tokens + vision_tokens)


def _options(cfg: Common) -> dict[str, Any]:
    return {name: getattr(cfg, name) for name in ("device_map", "quantize", "attn_implementation", "random_weights", "seed")}


@dataclass(frozen=True)
class CheckConfig(Common):
    """Check a pair of checkpoints before anything runs: complete, matching, small enough. Weights are not read."""


def check_pair(cfg: Common) -> dict[str, Any]:
    """What a config's pair is and what it needs, in bytes; UserError for a checkpoint or a pair that would not work."""
    from feature_alignment.models import eventgpt, video_llava

    names_only = dataclasses.replace(cfg, device="meta", device_map=None, quantize="none")
    opened = {
        "EventGPT": (open_draft(names_only), cfg.draft_id, eventgpt.UNQUANTISED),
        "Video-LLaVA": (open_target(names_only), cfg.target_id, video_llava.UNQUANTISED),
    }
    loading.check_shared_ids(cfg.draft_id, opened["EventGPT"][0].tokenizer, cfg.target_id, opened["Video-LLaVA"][0].tokenizer)
    dtype = getattr(torch, cfg.dtype)
    found = {}
    for name, (o, path, unquantised) in opened.items():
        text = o.model.config.get_text_config()
        heads = text.num_key_value_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        found[name] = {
            "checkpoint": str(path),
            "weights": "random" if cfg.random_weights else "complete",
            "parameters": sum(p.numel() for p in o.model.parameters()),
            "layers": text.num_hidden_layers,
            "hidden_size": text.hidden_size,
            "embedding_rows": o.model.lm_head.weight.shape[0],
            "tokenizer_ids": len(o.tokenizer),
            "vision_tokens": o.vision_tokens,
            "prompt_tokens": o.prompt_tokens,
            "weight_bytes": loading.weight_bytes(o.model, dtype, cfg.quantize, unquantised),
            "cache_bytes": 2 * text.num_hidden_layers * heads * dtype.itemsize * (o.prompt_tokens + _ROOM),
        }
    needed = sum(f["weight_bytes"] + f["cache_bytes"] for f in found.values())
    return {"models": found, "needed_bytes": needed, "there_bytes": loading.available_memory(cfg.device, cfg.device_map)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    cfg = parse_config(CheckConfig, argv, "models/pair")
    report, gib = check_pair(cfg), 2.0**30
    kinds = report["models"]
    shown = ("checkpoint", "weights", "parameters", "layers", "hidden_size", "embedding_rows", "tokenizer_ids", "vision_tokens")
    text = lambda value: f"{value:,}" if isinstance(value, int) else value  # noqa: E731
    rows = [(key.replace("_", " "), *(text(m[key]) for m in kinds.values())) for key in (*shown, "prompt_tokens")]
    held = cfg.dtype if cfg.quantize == "none" else f"{cfg.quantize} and {cfg.dtype}"
    rows.append((f"weights as {held}", *(f"{m['weight_bytes'] / gib:.2f} GiB" for m in kinds.values())))
    rows.append((f"cache of one prompt and {_ROOM} tokens", *(f"{m['cache_bytes'] / gib:.2f} GiB" for m in kinds.values())))
    rows.append(("memory needed, both together", "", f"{report['needed_bytes'] / gib:.2f} GiB"))
    rows.append((f"memory there, {cfg.device}", "", f"{report['there_bytes'] / gib:.2f} GiB"))
    print_table("the pair", ("", *kinds), rows)
    loading.check_device(cfg.device)
    if report["needed_bytes"] > report["there_bytes"]:
        raise UserError(
            f"the pair needs {report['needed_bytes'] / gib:.2f} GiB and {cfg.device} has {report['there_bytes'] / gib:.2f} GiB free. "
            "Type --quantize nf4, --dtype bfloat16 or --device_map auto (several GPUs), or free some memory."
        )
    print_json_line(report)
    return report
