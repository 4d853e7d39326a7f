"""Both models behind one small interface, so that nothing above knows LLaMA from LLaVA.

    python -m feature_alignment.models.pair --config configs/eventgpt_videollava_7b.yaml
        checks both checkpoints without reading their weights: what was found, memory needed, memory there

A `Decoder` is a LLaMA with a way to embed a prompt (vision and text). State t of a text is the hidden state that *emits* token t:

    prompt            | x0   x1   x2   </s>       tokens
    state   h0 stands on the last prompt token, h1 on x0, …       h[t] emits x[t]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from feature_alignment.config import Common, parse_config
from feature_alignment.console import UserError, print_json_line, print_table, run
from feature_alignment.inputs import events as event_inputs
from feature_alignment.inputs.samples import Sample
from feature_alignment.inputs.video import NUM_FRAMES, clip_pixels, read_frames
from feature_alignment.models import loading
from feature_alignment.models.fixed import FixedCache, Steps

EOS = 2  # of both vocabularies
_ROOM = 64  # tokens of an answer, where memory is reckoned


@dataclass(frozen=True)
class Prompt:
    """A sample ready for one model. ids [s] int64 with vision placeholders; pixels [t, 3, h, w]."""

    ids: Tensor
    pixels: Tensor
    question: str = ""


@dataclass
class State:
    """What a decoder remembers. `last` [b, d] is the state on the last token read; `length` counts positions read."""

    cache: DynamicCache | FixedCache
    last: Tensor
    length: int


class Decoder:
    """One model of the pair.

    taps: which decoder layers' outputs make up a hidden state, ascending; the model runs no deeper than the last one. The last
    layer is read after the final norm (`norm="post"`), any earlier one before it.
    device: where tensors go in and come out, and where the head is; a device map may have put the layers elsewhere.
    placeholder: the id that stands for vision in a prompt; vision_tokens: how many tokens a clip becomes there.
    whole: the model all of this is part of, for transformers' own `generate`.
    """

    def __init__(
        self,
        llama: PreTrainedModel,
        lm_head: nn.Linear,
        tokenizer,
        encode_prompt: Callable[[str], Tensor],
        read_pixels: Callable[[Sample], Tensor],
        encode_vision: Callable[[Tensor], Tensor],
        splice: Callable[[Tensor, Tensor], Tensor],
        taps: Sequence[int] | None = None,
        device: str | None = None,
        placeholder: int = -1,
        vision_tokens: int = 0,
        whole: PreTrainedModel | None = None,
    ) -> None:
        self.placeholder, self.vision_tokens, self.whole = placeholder, vision_tokens, whole
        self.llama, self.tokenizer, self.encode_prompt, self.read_pixels = llama, tokenizer, encode_prompt, read_pixels
        self._encode_vision, self._splice = encode_vision, splice
        self.num_layers = llama.config.num_hidden_layers
        self.taps = tuple(taps or (self.num_layers,))
        if list(self.taps) != sorted(set(self.taps)) or not 1 <= self.taps[0] <= self.taps[-1] <= self.num_layers:
            raise UserError(f"--draft_layers {list(self.taps)}: wanted ascending layer numbers from 1 to {self.num_layers}.")
        self.width = llama.config.hidden_size
        self.hidden_size = self.width * len(self.taps)
        self._head = lm_head
        if device is not None and lm_head.weight.device != torch.empty(0, device=device).device:
            lm_head.weight.data = lm_head.weight.data.to(device)
        self.vocab_size = lm_head.weight.shape[0]
        self.steps: Steps = "eager"
        self._fixed: FixedCache | None = None
        if self.taps[-1] < self.num_layers:  # an early exit: later layers are neither run nor cached
            llama.layers = llama.layers[: self.taps[-1]]
            llama.config.num_hidden_layers = self.taps[-1]
            llama.norm = nn.Identity()

    @property
    def norm(self) -> str:
        return "post" if self.taps == (self.num_layers,) else "pre"

    @property
    def norms(self) -> dict[int, str]:
        """Whether each tapped layer is read before or after the final norm."""
        return {k: "post" if k == self.num_layers else "pre" for k in self.taps}

    @property
    def device(self) -> torch.device:
        return self._head.weight.device

    def restrict_vocabulary(self, rows: int) -> None:
        """Keep only the first `rows` ids of the head: ids the drafter has no embedding for are masked in every mode alike."""
        self.vocab_size = rows

    def record(self, steps: Steps) -> None:
        """From the next prompt on, steps of single prompts run over one fixed cache, recorded on a GPU. Prompts of several rows do not."""
        self.steps, self._fixed = steps, None if steps == "eager" else FixedCache(self._forward, steps)

    @property
    def head_weight(self) -> Tensor:
        """[v, d]: the LM head on the shared ids."""
        return self._head.weight[: self.vocab_size]

    @property
    def has_own_head(self) -> bool:
        return self.taps[-1] == self.num_layers

    @torch.inference_mode()
    def lm_head(self, hidden: Tensor) -> Tensor:
        """Logits [.., v] over the shared ids. hidden [.., d], post-norm; of several taps only the last counts."""
        return nn.functional.linear(hidden[..., -self.width :], self.head_weight)

    def prepare(self, sample: Sample) -> Prompt:
        return Prompt(self.encode_prompt(sample.question), self.read_pixels(sample), sample.question)

    @torch.inference_mode()
    def encode_vision(self, pixels: Tensor) -> Tensor:
        """Vision tokens [b, e, d] of pixels [b, t, 3, h, w]. They know no question: a clip is encoded once for all of its own."""
        return self._encode_vision(pixels.to(self.device, self._head.weight.dtype))

    @torch.inference_mode()
    def vision_states(self, ids: Tensor, vision: Tensor) -> Tensor:
        """States of the last tapped layer on the vision tokens: ids [b, s], vision [b, e, d] -> [b, e, d]. No question is read."""
        at = (ids[0] == self.placeholder).nonzero()[:, 0]
        ids = ids[:, : int(at[-1]) + 1].to(self.device)
        state = State(DynamicCache(config=self.llama.config), ids, 0)
        return self._read(state, {"inputs_embeds": self._splice(ids, vision)})[:, int(at[0]) :, -self.width :]

    @property
    def embeddings(self) -> Tensor:
        """[v, d]: what the decoder reads for the shared ids."""
        return self.llama.embed_tokens.weight[: self.vocab_size].detach().to(self.device)

    def prefill(self, prompts: Sequence[Prompt]) -> State:
        """Read prompts of equal length, vision included. Afterwards `state.last` is h0."""
        vision = self.encode_vision(torch.stack([p.pixels for p in prompts]))
        return self.prefill_encoded(torch.stack([p.ids for p in prompts]), vision)

    @torch.inference_mode()
    def prefill_encoded(self, ids: Tensor, vision: Tensor) -> State:
        """`prefill` of ids [b, s] for clips whose vision tokens [b, e, d] are there already; ids may end before the question."""
        ids = ids.to(self.device)
        cache = DynamicCache(config=self.llama.config)
        state = State(cache, ids, 0)
        self._read(state, {"inputs_embeds": self._splice(ids, vision)}, keep=1)
        if self._fixed is not None and len(ids) == 1:
            state.cache = self._fixed.take(cache, state)
        return state

    @torch.inference_mode()
    def step(self, state: State, token_ids: Tensor, **where: Tensor) -> Tensor:
        """Read more tokens [b, k]; returns the k states behind them [b, k, d] and moves `state` on.

        where: position_ids [b, k] and attention_mask [b, length + k], if the rows' texts are not equally long
        """
        return self._read(state, {"input_ids": token_ids, **where})

    def _read(self, state: State, inputs: dict[str, Tensor], keep: int | None = None) -> Tensor:
        if isinstance(state.cache, FixedCache):
            hidden = state.cache.step(inputs["input_ids"], state.length, state)
        else:
            hidden = self._forward(inputs, state.cache, keep)
        state.length += next(iter(inputs.values())).shape[1]
        state.last = hidden[:, -1]
        return hidden

    def _forward(self, inputs: dict[str, Tensor], cache: DynamicCache, keep: int | None = None) -> Tensor:
        out = self.llama(**inputs, cache=cache, use_cache=True, output_hidden_states=len(self.taps) > 1)
        if len(self.taps) == 1:
            return out.last_hidden_state.to(self.device)
        # hidden_states[k] is the output of layer k, pre-norm; the very last one has passed the final norm
        kept = [out.hidden_states[k] if keep is None else out.hidden_states[k][:, -keep:] for k in self.taps]
        return torch.cat([h.to(self.device) for h in kept], dim=-1)

    def rollback(self, state: State, n: int) -> None:
        """Forget the last n positions. `state.last` is stale until the next step."""
        if n:  # crop(0) empties the cache in some versions and does nothing in others
            if not isinstance(state.cache, FixedCache):
                state.cache.crop(-n)
            state.length -= n

    @torch.inference_mode()
    def generate(self, state: State, max_new_tokens: int) -> list[list[int]]:
        """Greedy answers of a freshly prefilled batch, each up to and including its EOS. Leaves `state` as it was."""
        first, length = state.last, state.length
        tokens = [self.lm_head(first).argmax(-1)]
        ended = tokens[0] == EOS
        while len(tokens) < max_new_tokens and not ended.all():
            tokens.append(self.lm_head(self.step(state, tokens[-1][:, None])[:, -1]).argmax(-1))
            ended |= tokens[-1] == EOS
        self.rollback(state, state.length - length)
        state.last = first
        rows = torch.stack(tokens, 1).tolist()
        return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]

    @torch.inference_mode()
    def teacher_force(self, state: State, token_ids: Tensor) -> Tensor:
        """The states that emit given tokens, from one pass over them.

        state:     freshly prefilled, one row per row of token_ids
        token_ids: [b, n]; returns [b, n, d]: h0 (from the prompt) … h(n-1), which has read token_ids[:, : n - 1]
        """
        first = state.last[:, None]
        return first if token_ids.shape[1] == 1 else torch.cat([first, self.step(state, token_ids[:, :-1])], dim=1)


def _probed(decoder: Decoder, path: Path, side: int) -> Decoder:
    """The decoder itself, once it has read a blank picture and two tokens."""
    with loading.refused_if_it_fails(path) as made:
        made.append(decoder.encode_vision(torch.zeros(1, 1, 3, side, side)))
        nothing, two = State(DynamicCache(config=decoder.llama.config), made[0], 0), torch.tensor([[1, 1]], device=decoder.device)
        made.append(decoder.step(nothing, two))
    return decoder


@dataclass(frozen=True)
class Pair:
    target: Decoder
    draft: Decoder

    def record(self, steps: Steps) -> None:
        self.target.record(steps)
        self.draft.record(steps)


def load_pair(cfg: Common) -> Pair:
    """Both decoders of a config, on its device and dtype; refuses checkpoints whose vocabularies do not share ids."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    target, draft = load_target(cfg), load_draft(cfg)
    loading.check_shared_ids(cfg.draft_id, draft.tokenizer, cfg.target_id, target.tokenizer)
    shared = min(target.vocab_size, draft.vocab_size)
    target.restrict_vocabulary(shared)
    draft.restrict_vocabulary(shared)
    return Pair(target, draft)


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
        whole=model,
    )
    return _probed(decoder, cfg.target_id, model.config.vision_config.image_size)


def load_draft(cfg: Common) -> Decoder:
    """EventGPT as a `Decoder`, cut off behind the last of `cfg.draft_layers`."""
    from feature_alignment.models import eventgpt

    model, tokenizer, processor, vision_tokens, _ = open_draft(cfg)
    canvas = model.config.event_canvas_hw

    def read_pixels(sample: Sample) -> Tensor:
        start_ms = cfg.event_start_ms if sample.event_start_ms is None else sample.event_start_ms
        stream = event_inputs.load_events(sample.events, cfg.event_window_ms, start_ms)
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
    return {"models": found, "needed_bytes": needed, "there_bytes": loading.memory_there(cfg.device, cfg.device_map)}


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


if __name__ == "__main__":
    run(main)
