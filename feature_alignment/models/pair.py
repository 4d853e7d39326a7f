"""The pair of models: EventGPT drafts, Video-LLaVA is the target. Both are loaded as a `Decoder`.

python -m feature_alignment.models.pair --config configs/eventgpt_videollava_7b.yaml
    checks both checkpoints without reading their weights, and prints what was found, the memory they need and the free memory
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

from feature_alignment.cli.config import Common, StepsSetting, parse_config
from feature_alignment.cli.console import UserError, print_json_line, print_table
from feature_alignment.inputs import events as event_inputs
from feature_alignment.inputs.clip_pixels import clip_pixels
from feature_alignment.inputs.samples import Sample
from feature_alignment.inputs.video import NUM_FRAMES, read_frames
from feature_alignment.models import generation, loading, preprocessing
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.packed import LinearChoice
from feature_alignment.models.state import State
from feature_alignment.storage.processes import check_device

ANSWER_TOKENS = 64  # for the estimate of the cache


def _probed(decoder: Decoder, path: Path, image_size: int) -> Decoder:
    """Return the decoder after it has read a blank image and two tokens without an error."""
    with loading.report_load_errors(path) as outputs:
        outputs.append(decoder.encode_vision(torch.zeros(1, 1, 3, image_size, image_size)))
        empty, tokens = State(DynamicCache(config=decoder.llama.config), outputs[0], 0), torch.tensor([[1, 1]], device=decoder.device)
        outputs.append(decoder.step(empty, tokens))
    return decoder


@dataclass(frozen=True)
class Pair:
    """Target and drafter of a run, with one vocabulary."""

    target: Decoder
    draft: Decoder

    def use_steps(self, steps: StepsSetting) -> None:
        """Choose how both models step; see `Decoder.use_steps`."""
        self.target.use_steps(steps)
        self.draft.use_steps(steps)

    def choose_linear(self) -> dict[str, LinearChoice]:
        """Choose the product of both models' linear layers by a trial; see `Decoder.choose_linear`."""
        return {"target": self.target.choose_linear(), "draft": self.draft.choose_linear()}

    def draft_with(self, layers: list[int] | None, cfg: Common) -> Decoder:
        """Load the drafter's checkpoint again with other layers, and with the pair's vocabulary and steps.

        Args:
            layers: Layers it reads; None for all.
            cfg: Settings of the pair.
        """
        return self._adapted(load_draft(dataclasses.replace(cfg, draft_layers=layers)))

    def _adapted(self, draft: Decoder) -> Decoder:
        draft.restrict_vocabulary(self.target.vocab_size)
        draft.use_steps(self.draft.steps)
        if self.draft.linear.kind != "torch":
            draft.pack_linear(is_mixed=self.draft.linear.kind == "mixed")
        return draft


def load_pair(cfg: Common) -> Pair:
    """Load both models of a config on its device.

    Raises:
        UserError: If a checkpoint cannot be used, or the two vocabularies differ.
    """
    check_device(cfg.device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.device.startswith("cuda:"):
        torch.cuda.set_device(cfg.device)  # CUDA graphs and timing use the current device
    target, draft = load_target(cfg), load_draft(cfg)
    preprocessing.check_shared_ids(cfg.draft_id, draft.tokenizer, cfg.target_id, target.tokenizer)
    target.restrict_vocabulary(min(target.vocab_size, draft.vocab_size))
    pair = Pair(target, draft)
    pair._adapted(draft)
    return pair


def load_target(cfg: Common) -> Decoder:
    """Load Video-LLaVA; its LM head keeps all rows."""
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
    """Load EventGPT up to the last of `cfg.draft_layers`."""
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


class OpenedCheckpoint(NamedTuple):
    """A checkpoint that passed all checks.

    Args:
        model: Loaded model.
        tokenizer: Of the checkpoint.
        processor: Image preprocessing.
        vision_tokens: Tokens of one clip.
        prompt_tokens: Length of the probe question's prompt, vision included.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processor: CLIPImageProcessorPil
    vision_tokens: int
    prompt_tokens: int


def open_target(cfg: Common) -> OpenedCheckpoint:
    """Load and check Video-LLaVA's checkpoint on cfg.device ("meta": names and shapes only), its tokenizer and preprocessing."""
    from feature_alignment.models import video_llava

    path = loading.find_checkpoint(cfg.target_id, "--target_id")
    model = video_llava.load_video_llava(path, getattr(torch, cfg.dtype), cfg.device, **_options(cfg))
    vision = model.config.vision_config
    vision_tokens = NUM_FRAMES * ((vision.image_size // vision.patch_size) ** 2 + 1)
    tokenizer = preprocessing.load_tokenizer(path, model.lm_head.weight.shape[0])
    prompt_tokens = len(video_llava.encode_prompt(tokenizer, preprocessing.PROBE_QUESTION, vision_tokens))
    preprocessing.check_prompt(path, tokenizer, prompt_tokens - vision_tokens, video_llava.KNOWN_TEXT_TOKENS)
    return OpenedCheckpoint(model, tokenizer, preprocessing.load_processor(path, vision.image_size), vision_tokens, prompt_tokens)


def open_draft(cfg: Common) -> OpenedCheckpoint:
    """Load and check EventGPT's checkpoint on cfg.device ("meta": names and shapes only), its tokenizer and preprocessing."""
    from feature_alignment.models import eventgpt

    path = loading.find_checkpoint(cfg.draft_id, "--draft_id")
    model = eventgpt.load_eventgpt(path, getattr(torch, cfg.dtype), cfg.device, **_options(cfg))
    vision = model.config.vision_config
    vision_tokens = eventgpt.NUM_EVENT_SLICES + (vision.image_size // vision.patch_size) ** 2 + 1
    tokenizer = preprocessing.load_tokenizer(path, model.lm_head.weight.shape[0])
    text_tokens = len(eventgpt.encode_prompt(tokenizer, preprocessing.PROBE_QUESTION)) - 1
    preprocessing.check_prompt(path, tokenizer, text_tokens, eventgpt.KNOWN_TEXT_TOKENS)
    processor = preprocessing.load_processor(path, vision.image_size, default=True)
    return OpenedCheckpoint(model, tokenizer, processor, vision_tokens, text_tokens + vision_tokens)


def _options(cfg: Common) -> dict[str, Any]:
    return {name: getattr(cfg, name) for name in ("device_map", "quantize", "attn_implementation", "random_weights", "seed")}


@dataclass(frozen=True)
class CheckConfig(Common):
    """Check a pair of checkpoints before anything runs: complete, matching, small enough. Weights are not read."""


@dataclass(frozen=True)
class ModelReport:
    """One model of a checked pair.

    Args:
        checkpoint: Its directory.
        weights: "complete", or "random" with --random_weights.
        parameters: Number of parameters.
        layers: Number of decoder layers.
        hidden_size: Width of hidden states.
        embedding_rows: Rows of the LM head.
        tokenizer_ids: Ids of the tokenizer.
        vision_tokens: Tokens of one clip.
        prompt_tokens: Length of the probe question's prompt, vision included.
        weight_bytes: Memory of the weights.
        layer_bytes: Memory of the weights of one decoder layer.
        cache_bytes: Memory of the key/value cache of one prompt and answer.
    """

    checkpoint: str
    weights: str
    parameters: int
    layers: int
    hidden_size: int
    embedding_rows: int
    tokenizer_ids: int
    vision_tokens: int
    prompt_tokens: int
    weight_bytes: int
    layer_bytes: int
    cache_bytes: int


@dataclass(frozen=True)
class PairReport:
    """A checked pair: both models, the memory they need and the free memory, in bytes."""

    models: dict[str, ModelReport]
    needed_bytes: int
    free_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The report under the keys of the printed JSON."""
        models = {name: dataclasses.asdict(model) for name, model in self.models.items()}
        return {"models": models, "needed_bytes": self.needed_bytes, "there_bytes": self.free_bytes}


def check_pair(cfg: Common) -> PairReport:
    """Check both checkpoints of a config and compute the memory that they need.

    Raises:
        UserError: If a checkpoint or the pair cannot be used.
    """
    from feature_alignment.models import eventgpt, video_llava

    names_only = dataclasses.replace(cfg, device="meta", device_map=None, quantize="none")
    opened = {
        "EventGPT": (open_draft(names_only), cfg.draft_id, eventgpt.UNQUANTIZED),
        "Video-LLaVA": (open_target(names_only), cfg.target_id, video_llava.UNQUANTIZED),
    }
    preprocessing.check_shared_ids(cfg.draft_id, opened["EventGPT"][0].tokenizer, cfg.target_id, opened["Video-LLaVA"][0].tokenizer)
    dtype, models = getattr(torch, cfg.dtype), {}
    for name, (checkpoint, path, unquantized) in opened.items():
        text = checkpoint.model.config.get_text_config()
        layers = getattr(checkpoint.model.model, "language_model", checkpoint.model.model).layers
        d_kv = text.num_key_value_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        models[name] = ModelReport(
            checkpoint=str(path),
            weights="random" if cfg.random_weights else "complete",
            parameters=sum(p.numel() for p in checkpoint.model.parameters()),
            layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            embedding_rows=checkpoint.model.lm_head.weight.shape[0],
            tokenizer_ids=len(checkpoint.tokenizer),
            vision_tokens=checkpoint.vision_tokens,
            prompt_tokens=checkpoint.prompt_tokens,
            weight_bytes=loading.weight_bytes(checkpoint.model, dtype, cfg.quantize, unquantized),
            layer_bytes=loading.weight_bytes(layers[0], dtype, cfg.quantize, ()),
            cache_bytes=2 * text.num_hidden_layers * d_kv * dtype.itemsize * (checkpoint.prompt_tokens + ANSWER_TOKENS),
        )
    needed = sum(model.weight_bytes + model.cache_bytes for model in models.values())
    return PairReport(models, needed, loading.available_memory(cfg.device, cfg.device_map))


def _as_text(value: str | int) -> str:
    return f"{value:,}" if isinstance(value, int) else value


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the check with these arguments, default those of the command line; returns the printed JSON."""
    cfg = parse_config(CheckConfig, argv, "models/pair")
    report = check_pair(cfg)
    models = report.models
    shown = ("checkpoint", "weights", "parameters", "layers", "hidden_size", "embedding_rows", "tokenizer_ids", "vision_tokens")
    rows = [(key.replace("_", " "), *(_as_text(getattr(m, key)) for m in models.values())) for key in (*shown, "prompt_tokens")]
    dtype = cfg.dtype if cfg.quantize == "none" else f"{cfg.quantize} and {cfg.dtype}"
    rows.append((f"weights as {dtype}", *(_gib(m.weight_bytes) for m in models.values())))
    rows.append((f"cache of one prompt and {ANSWER_TOKENS} tokens", *(_gib(m.cache_bytes) for m in models.values())))
    rows.append(("memory needed by both", "", _gib(report.needed_bytes)))
    rows.append((f"free memory, {cfg.device}", "", _gib(report.free_bytes)))
    print_table("the pair", ("", *models), rows)
    check_device(cfg.device)
    if report.needed_bytes > report.free_bytes:
        raise UserError(
            f"the pair needs {_gib(report.needed_bytes)} and {cfg.device} has {_gib(report.free_bytes)} free. "
            "Pass --quantize nf4, --dtype bfloat16 or --device_map auto (several GPUs), or free some memory."
        )
    print_json_line(report.to_json())
    return report.to_json()
