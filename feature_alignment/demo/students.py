"""The two models while they are being made: geometry, tokenizers, inputs, losses. Only `build_pair` and tests need this."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feature_alignment.demo import cameras, captions, world
from feature_alignment.inputs import events as event_inputs
from feature_alignment.inputs.video import NUM_FRAMES, sample_indices

PAIR_SEED = 1_000_000  # scenes 1,000,000 onwards train the pair; adapters and tests see other seeds
WIDTH, LAYERS, HEADS, INTERMEDIATE = 160, 10, 5, 432
VOCAB, TARGET_ROWS = 1024, 1088  # as 32,000 and 32,064
VISION: dict[str, Any] = dict(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=cameras.SIZE,
    patch_size=12,
    hidden_act="quick_gelu",
    projection_dim=64,
)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
EVENT_MEAN, EVENT_STD = (1.0, 1.0, 1.0), (0.5, 0.5, 0.5)  # an event image's white background becomes zero
SLOTS = {slot: sorted(values) for slot, values in world.WORDS.items()}
DIALECTS = {"target": captions.target_answer, "draft": captions.draft_answer}


def tokenizers() -> dict[str, object]:
    """One vocabulary for both: the target's has `<image>`, `<video>` and `<pad>` on top, as the real pair's."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    from feature_alignment.models import eventgpt, video_llava

    texts = [say(world.scene(seed), q) for seed in range(400) for q in range(10) for say in DIALECTS.values()]
    prompts = [p.format(question=q) for p in (eventgpt.PROMPT, video_llava.PROMPT) for q in captions.QUESTIONS]
    prompts = [p.replace("<event>", " ").replace("<video>", " ") for p in prompts]
    bpe = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # no token spans a word and its punctuation, as in LLaMA's vocabulary
        [pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True), pre_tokenizers.Split(Regex("[.,:;?]"), "isolated")]
    )
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    bpe.train_from_iterator(texts + prompts * 40, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False))
    table = json.loads(bpe.to_str())["model"]
    made = {}
    for who in ("draft", "target"):
        vocab = dict(table["vocab"])
        for i in range(len(vocab), VOCAB):  # the corpus may need fewer merges than there are rows
            vocab[f"<unused_{i}>"] = i
        made[who] = LlamaTokenizer(
            vocab=vocab,
            merges=[tuple(m) for m in table["merges"]],
            add_bos_token=True,
            model_max_length=2048,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
        )
    made["target"].add_tokens(["<image>", "<video>"], special_tokens=True)
    made["target"].add_special_tokens({"pad_token": "<pad>"})
    made["draft"].add_special_tokens({"pad_token": "<unk>"})
    return made


def render_inputs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene as both cameras' model inputs: frames uint8 [8, 72, 72, 3], event images uint8 [5, 72, 72, 3]."""
    s = world.scene(seed)
    intensity = cameras.render(s)
    stream = cameras.events(intensity, seed)
    images = event_inputs.event_images({k: v.astype(np.int64) for k, v in stream.items()}, 5, (cameras.SIZE, cameras.SIZE))
    return cameras.frames(intensity, seed)[sample_indices(cameras.VIDEO_FRAMES, NUM_FRAMES)], np.stack(images)


def new_model(who: str):
    """A randomly initialised model of either kind, in the miniature geometry."""
    from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

    from feature_alignment.models.eventgpt import EventGPTConfig, EventGPTForCausalLM

    text = dict(
        hidden_size=WIDTH,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    if who == "draft":
        canvas = [cameras.SIZE, cameras.SIZE]
        extra = dict(event_feature_adaptor=True, mm_visual_tower="embedded", event_canvas_hw=canvas)
        return EventGPTForCausalLM(EventGPTConfig(**text, vocab_size=VOCAB, vision_config=VISION, **extra))
    tokens_per_frame = (cameras.SIZE // VISION["patch_size"]) ** 2 + 1
    config = VideoLlavaConfig(
        text_config=LlamaConfig(**text, vocab_size=TARGET_ROWS),
        vision_config=CLIPVisionConfig(**VISION),
        image_token_index=VOCAB,
        video_token_index=VOCAB + 1,
        vision_feature_layer=-1,
        image_seq_length=tokens_per_frame - 1,
        video_seq_length=8 * tokens_per_frame,
        pad_token_id=VOCAB + 2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return VideoLlavaForConditionalGeneration(config)


class Student:
    """One model under training: its parts under common names, its inputs, its dialect."""

    def __init__(self, who: str, tokenizer) -> None:
        self.who, self.tokenizer, self.model = who, tokenizer, new_model(who)
        inner = self.model.model
        tower = inner.visual_tower.visual_tower if who == "draft" else inner.video_tower
        nn.init.normal_(tower.embeddings.position_embedding.weight, std=0.2)  # of the size of the patches: where matters at once
        self.llama = inner if who == "draft" else inner.language_model
        mean, std = (EVENT_MEAN, EVENT_STD) if who == "draft" else (CLIP_MEAN, CLIP_STD)
        self.mean, self.std = torch.tensor(mean).view(1, 1, 3, 1, 1) * 255, torch.tensor(std).view(1, 1, 3, 1, 1) * 255
        self.prompts = [self._prompt(q) for q in captions.QUESTIONS]
        first = min(len(p) for p in self.prompts)
        self.shared = next(i for i in range(first) if len({p[i] for p in self.prompts}) > 1)  # ids common to all questions' prompts

    def _prompt(self, question: str) -> list[int]:
        from feature_alignment.models import eventgpt, video_llava

        if self.who == "draft":
            return eventgpt.encode_prompt(self.tokenizer, question)
        return video_llava.encode_prompt(self.tokenizer, question, self.model.config.video_seq_length)

    def pixels(self, images: np.ndarray) -> Tensor:
        """uint8 [b, t, h, w, 3] -> normalised float32 [b, t, 3, h, w]."""
        return (torch.tensor(images).permute(0, 1, 4, 2, 3).float() - self.mean) / self.std

    def vision(self, images: np.ndarray) -> Tensor:
        """Tokens the decoder will see: [b, n, d]."""
        from feature_alignment.models.video_llava import encode_video

        pixels = self.pixels(images)
        return self.model.model.encode_events(pixels) if self.who == "draft" else encode_video(self.model, pixels)

    def embed(self, input_ids: Tensor, vision: Tensor) -> Tensor:
        from feature_alignment.models.video_llava import splice

        return self.model.model.splice(input_ids, vision) if self.who == "draft" else splice(self.model, input_ids, vision)

    def answer_ids(self, seed: int, question: int) -> list[int]:
        text = DIALECTS[self.who](world.scene(seed), question)
        return [*self.tokenizer(text, add_special_tokens=False).input_ids, 2]

    def caption_loss(self, vision: Tensor, seeds: list[int], questions: list[list[int]], side_weight: float = 1.0) -> Tensor:
        """Next-token loss of several questions per scene; they share the part of the prompt before the question.

        side_weight: how much the words that tell a landmark's side count

        [ shared prompt with vision | question 1, answer 1 | question 2, answer 2 | … ]: each branch sees the prefix and itself.
        """
        b, k = len(seeds), len(questions[0])
        tails = [[self.prompts[q][self.shared :] + self.answer_ids(s, q) for q in qs] for s, qs in zip(seeds, questions, strict=True)]
        width = max(len(t) for row in tails for t in row)
        ids = torch.zeros(b, k, width, dtype=torch.long)
        labels = torch.full((b, k, width), -100)
        for i, row in enumerate(tails):
            for j, tail in enumerate(row):
                ids[i, j, : len(tail)] = torch.tensor(tail)
                start = len(self.prompts[questions[i][j]]) - self.shared
                labels[i, j, start - 1 : len(tail) - 1] = torch.tensor(tail[start:])  # state t emits token t + 1
        prefix = self.embed(torch.tensor(self.prompts[0][: self.shared]).expand(b, -1), vision)
        p = prefix.shape[1]
        embeds = torch.cat([prefix, self.llama.embed_tokens(ids.flatten(1))], dim=1)
        branch = torch.cat([torch.full((p,), -1), torch.arange(k).repeat_interleave(width)])
        position = torch.cat([torch.arange(p), (p + torch.arange(width)).repeat(k)])
        sees = (position[None, :] <= position[:, None]) & ((branch[None, :] == -1) | (branch[None, :] == branch[:, None]))
        hidden = self.llama(
            inputs_embeds=embeds, position_ids=position[None], attention_mask=sees[None, None].expand(b, 1, -1, -1), use_cache=False
        ).last_hidden_state[:, p:]
        keep = labels.flatten() >= 0
        logits = self.model.lm_head(hidden.flatten(0, 1)[keep]).float()
        weights = torch.ones(logits.shape[-1])
        weights[self.tokenizer.convert_tokens_to_ids(["▁left", "▁right"])] = side_weight  # the target's words
        return F.cross_entropy(logits, labels.flatten()[keep], weight=weights)

    def text_loss(self, rng: random.Random, rows: int) -> Tensor:
        """Next-token loss on both dialects without any picture: what the common ancestor knew."""
        texts = []
        for _ in range(rows):
            s, q = world.scene(rng.randrange(PAIR_SEED, PAIR_SEED + 200_000)), rng.randrange(10)
            answer = rng.choice((captions.target_answer, captions.draft_answer))(s, q)
            texts.append(f"USER: {captions.QUESTIONS[q]} ASSISTANT: {answer}" if rng.random() < 0.5 else answer)
        texts_ids = [torch.tensor([*self.tokenizer(t).input_ids, 2]) for t in texts]
        ids = nn.utils.rnn.pad_sequence(texts_ids, batch_first=True, padding_value=-100)
        hidden = self.llama(input_ids=ids[:, :-1].clamp(min=0), use_cache=False).last_hidden_state
        return F.cross_entropy(self.model.lm_head(hidden).float().flatten(0, 1), ids[:, 1:].flatten())


class SlotHead(nn.Module):
    """Reads every slot off the vision tokens by attention; exists only while training.

    num_places: how many positions it tells apart: all tokens, or only whole frames (then where a thing is within a frame must be
    in the tokens themselves, where the decoder can find it)
    """

    def __init__(self, num_tokens: int, num_places: int) -> None:
        super().__init__()
        self.tokens_per_place = num_tokens // num_places
        self.position = nn.Parameter(torch.randn(num_places, WIDTH) * 0.5)
        self.query = nn.Parameter(torch.randn(len(SLOTS), WIDTH) * 0.5)
        self.norm, self.attend = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mix = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.out = nn.ModuleList(nn.Linear(WIDTH, len(values)) for values in SLOTS.values())

    def forward(self, vision: Tensor) -> list[Tensor]:
        keys = self.norm(vision) + self.position.repeat_interleave(self.tokens_per_place, 0)
        pooled, _ = self.attend(self.query.expand(len(vision), -1, -1), keys, keys, need_weights=False)
        pooled = pooled + self.mix(pooled)
        return [layer(pooled[:, i]) for i, layer in enumerate(self.out)]

    def loss(self, vision: Tensor, seeds: list[int], who: str) -> tuple[Tensor, dict[str, float]]:
        """Mean cross entropy over the slots this model can see and the scene has, and each slot's accuracy."""
        total, right = [], {}
        scenes = [world.facts(world.scene(s)) for s in seeds]
        for slot, logits in zip(SLOTS, self(vision), strict=True):
            if who == "draft" and slot in world.HIDDEN_FROM_EVENTS:
                continue
            there = [slot != "side" or f["landmark"] != "none" for f in scenes]
            gold = torch.tensor([SLOTS[slot].index(f[slot]) if t else -100 for f, t in zip(scenes, there, strict=True)])
            total.append(F.cross_entropy(logits.float(), gold, ignore_index=-100))
            right[slot] = float((logits.argmax(-1) == gold)[gold >= 0].float().mean())
        return torch.stack(total).mean(), right


class CellHead(nn.Module):
    """Reads off each vision token which cell of its image it stands for; exists only while training. Tokens that carry their place
    are what lets a decoder tell left from right."""

    def __init__(self, num_tokens: int, num_images: int) -> None:
        super().__init__()
        self.cells = torch.arange(num_tokens // num_images).repeat(num_images)
        self.out = nn.Linear(WIDTH, num_tokens // num_images)

    def loss(self, vision: Tensor) -> Tensor:
        """Mean cross entropy over all tokens of vision [b, num_tokens, d]."""
        return F.cross_entropy(self.out(vision).float().flatten(0, 1), self.cells.repeat(len(vision)))
