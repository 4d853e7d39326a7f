"""The demo pair in training: geometry, tokenizers, inputs and losses. Only `build_pair` and tests use this module."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from feature_alignment.demo import cameras, captions, world
from feature_alignment.inputs import events as event_inputs
from feature_alignment.inputs.video import NUM_FRAMES, sample_indices

PAIR_SEED = 1_000_000  # scenes 1,000,000 onwards train the pair; adapters and tests see other seeds
WIDTH, LAYERS, HEADS, INTERMEDIATE = 160, 10, 5, 432
VOCAB, TARGET_ROWS = 1024, 1088  # in place of 32,000 and 32,064
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2  # the first special tokens of `tokenizers`
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
EVENT_MEAN, EVENT_STD = (1.0, 1.0, 1.0), (0.5, 0.5, 0.5)  # maps the white background of event images to zero
SLOTS = {slot: sorted(values) for slot, values in world.WORDS.items()}
DIALECTS = {"target": captions.target_answer, "draft": captions.draft_answer}


def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    """Train one vocabulary for both models; as in the real pair, the target adds `<image>`, `<video>` and `<pad>`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    from feature_alignment.models import eventgpt, video_llava

    texts = [answer(world.scene(seed), q) for seed in range(400) for q in range(10) for answer in DIALECTS.values()]
    prompts = [p.format(question=q) for p in (eventgpt.PROMPT, video_llava.PROMPT) for q in captions.QUESTIONS]
    prompts = [p.replace("<event>", " ").replace("<video>", " ") for p in prompts]
    bpe = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # no token spans a word and its punctuation, as in LLaMA's vocabulary
        [pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True), pre_tokenizers.Split(Regex("[.,:;?]"), "isolated")]
    )
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    bpe.train_from_iterator(texts + prompts * 40, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False))
    table = json.loads(bpe.to_str())["model"]
    tokenizers_by_role = {}
    for role in ("draft", "target"):
        vocab = dict(table["vocab"])
        for i in range(len(vocab), VOCAB):  # the corpus may need fewer merges than there are rows
            vocab[f"<unused_{i}>"] = i
        tokenizers_by_role[role] = LlamaTokenizer(
            vocab=vocab,
            merges=[tuple(m) for m in table["merges"]],
            add_bos_token=True,
            model_max_length=2048,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
        )
    tokenizers_by_role["target"].add_tokens(["<image>", "<video>"], special_tokens=True)
    tokenizers_by_role["target"].add_special_tokens({"pad_token": "<pad>"})
    tokenizers_by_role["draft"].add_special_tokens({"pad_token": "<unk>"})
    return tokenizers_by_role


def render_inputs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Render a scene as model inputs: frames [8, 72, 72, 3] uint8 and event images [5, 72, 72, 3] uint8."""
    s = world.scene(seed)
    intensity = cameras.render(s)
    stream = cameras.events(intensity, seed)
    images = event_inputs.event_images({k: v.astype(np.int64) for k, v in stream.items()}, 5, (cameras.SIZE, cameras.SIZE))
    return cameras.frames(intensity, seed)[sample_indices(cameras.VIDEO_FRAMES, NUM_FRAMES)], np.stack(images)


def new_model(role: str) -> PreTrainedModel:
    """A randomly initialized target or drafter in the miniature geometry."""
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
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=UNK_ID,
        tie_word_embeddings=False,
    )
    if role == "draft":
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
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    return VideoLlavaForConditionalGeneration(config)


class Student:
    """A model in training, with its inputs and its dialect."""

    def __init__(self, role: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Create a model with random weights.

        Args:
            role: "target" or "draft".
            tokenizer: Of this role.
        """
        self.role, self.tokenizer, self.model = role, tokenizer, new_model(role)
        inner = self.model.model
        tower = inner.visual_tower.visual_tower if role == "draft" else inner.video_tower
        nn.init.normal_(tower.embeddings.position_embedding.weight, std=0.2)  # as large as patch embeddings
        self.llama = inner if role == "draft" else inner.language_model
        mean, std = (EVENT_MEAN, EVENT_STD) if role == "draft" else (CLIP_MEAN, CLIP_STD)
        self.mean, self.std = torch.tensor(mean).view(1, 1, 3, 1, 1) * 255, torch.tensor(std).view(1, 1, 3, 1, 1) * 255
        self.prompts = [self._prompt(q) for q in captions.QUESTIONS]
        first = min(len(p) for p in self.prompts)
        self.shared = next(i for i in range(first) if len({p[i] for p in self.prompts}) > 1)  # number of ids that all prompts begin with

    def _prompt(self, question: str) -> list[int]:
        from feature_alignment.models import eventgpt, video_llava

        if self.role == "draft":
            return eventgpt.encode_prompt(self.tokenizer, question)
        return video_llava.encode_prompt(self.tokenizer, question, self.model.config.video_seq_length)

    def pixels(self, images: np.ndarray) -> Tensor:
        """Normalize images [b, t, h, w, 3] uint8 to [b, t, 3, h, w] float32."""
        return (torch.tensor(images).permute(0, 1, 4, 2, 3).float() - self.mean) / self.std

    def vision(self, images: np.ndarray) -> Tensor:
        """Vision tokens [b, n, d] of images [b, t, h, w, 3] uint8."""
        from feature_alignment.models.video_llava import encode_video

        pixels = self.pixels(images)
        return self.model.model.encode_events(pixels) if self.role == "draft" else encode_video(self.model, pixels)

    def embed(self, input_ids: Tensor, vision: Tensor) -> Tensor:
        """Prompt embeddings of ids [b, s] with vision tokens [b, n, d] spliced in."""
        from feature_alignment.models.video_llava import splice

        return self.model.model.splice(input_ids, vision) if self.role == "draft" else splice(self.model, input_ids, vision)

    def answer_ids(self, seed: int, question: int) -> list[int]:
        """Token ids of a reference answer, EOS included."""
        text = DIALECTS[self.role](world.scene(seed), question)
        return [*self.tokenizer(text, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]

    def caption_loss(self, vision: Tensor, seeds: list[int], questions: list[list[int]], side_weight: float = 1.0) -> Tensor:
        """Next-token loss of several questions per scene, which share the prompt before the question.

        [ shared prompt with vision | question 1, answer 1 | question 2, answer 2 | … ]: each branch attends to the prefix and itself.

        Args:
            vision: [b, n, d], vision tokens.
            seeds: b scenes.
            questions: b lists of equally many questions.
            side_weight: Weight of the words that state a landmark's side.
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
        allowed = (position[None, :] <= position[:, None]) & ((branch[None, :] == -1) | (branch[None, :] == branch[:, None]))
        hidden = self.llama(
            inputs_embeds=embeds, position_ids=position[None], attention_mask=allowed[None, None].expand(b, 1, -1, -1), use_cache=False
        ).last_hidden_state[:, p:]
        keep = labels.flatten() >= 0
        logits = self.model.lm_head(hidden.flatten(0, 1)[keep]).float()
        weights = torch.ones(logits.shape[-1])
        weights[self.tokenizer.convert_tokens_to_ids(["▁left", "▁right"])] = side_weight  # the target's words
        return F.cross_entropy(logits, labels.flatten()[keep], weight=weights)

    def text_loss(self, rng: random.Random, rows: int) -> Tensor:
        """Next-token loss on `rows` random texts of both dialects without images, as in the training of the common base."""
        texts = []
        for _ in range(rows):
            s, q = world.scene(rng.randrange(PAIR_SEED, PAIR_SEED + 200_000)), rng.randrange(10)
            answer = rng.choice((captions.target_answer, captions.draft_answer))(s, q)
            texts.append(f"USER: {captions.QUESTIONS[q]} ASSISTANT: {answer}" if rng.random() < 0.5 else answer)
        texts_ids = [torch.tensor([*self.tokenizer(t).input_ids, self.tokenizer.eos_token_id]) for t in texts]
        ids = nn.utils.rnn.pad_sequence(texts_ids, batch_first=True, padding_value=-100)
        hidden = self.llama(input_ids=ids[:, :-1].clamp(min=0), use_cache=False).last_hidden_state
        return F.cross_entropy(self.model.lm_head(hidden).float().flatten(0, 1), ids[:, 1:].flatten())


class SlotHead(nn.Module):
    """Auxiliary head that predicts every slot from the vision tokens by attention; used in training only."""

    def __init__(self, num_tokens: int, num_places: int) -> None:
        """Create a head.

        Args:
            num_tokens: Vision tokens.
            num_places: Positions that it distinguishes: all tokens, or only whole frames. With frames, the tokens themselves must encode
                positions within a frame, which the decoder can then use.
        """
        super().__init__()
        self.tokens_per_place = num_tokens // num_places
        self.position = nn.Parameter(torch.randn(num_places, WIDTH) * 0.5)
        self.query = nn.Parameter(torch.randn(len(SLOTS), WIDTH) * 0.5)
        self.norm, self.attend = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mix = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.out = nn.ModuleList(nn.Linear(WIDTH, len(values)) for values in SLOTS.values())

    def forward(self, vision: Tensor) -> list[Tensor]:
        """Logits [b, values] of every slot from vision tokens [b, n, d]."""
        keys = self.norm(vision) + self.position.repeat_interleave(self.tokens_per_place, 0)
        pooled, _ = self.attend(self.query.expand(len(vision), -1, -1), keys, keys, need_weights=False)
        pooled = pooled + self.mix(pooled)
        return [layer(pooled[:, i]) for i, layer in enumerate(self.out)]

    def loss(self, vision: Tensor, seeds: list[int], role: str) -> tuple[Tensor, dict[str, float]]:
        """Mean cross entropy over the slots that this model can see and the scene has.

        Args:
            vision: [b, n, d], vision tokens.
            seeds: b scenes.
            role: "target" or "draft".

        Returns:
            The loss and the accuracy of each slot.
        """
        slot_losses, accuracy = [], {}
        scenes = [world.facts(world.scene(s)) for s in seeds]
        for slot, logits in zip(SLOTS, self(vision), strict=True):
            if role == "draft" and slot in world.HIDDEN_FROM_EVENTS:
                continue
            is_stated = [slot != "side" or f["landmark"] != "none" for f in scenes]
            gold = torch.tensor([SLOTS[slot].index(f[slot]) if t else -100 for f, t in zip(scenes, is_stated, strict=True)])
            slot_losses.append(F.cross_entropy(logits.float(), gold, ignore_index=-100))
            accuracy[slot] = float((logits.argmax(-1) == gold)[gold >= 0].float().mean())
        return torch.stack(slot_losses).mean(), accuracy


class CellHead(nn.Module):
    """Auxiliary head that predicts from each vision token its cell in the image; used in training only.

    A decoder can tell left from right only if the tokens encode their positions.
    """

    def __init__(self, num_tokens: int, num_images: int) -> None:
        """Create a head for `num_tokens` tokens of `num_images` images."""
        super().__init__()
        self.cells = torch.arange(num_tokens // num_images).repeat(num_images)
        self.out = nn.Linear(WIDTH, num_tokens // num_images)

    def loss(self, vision: Tensor) -> Tensor:
        """Mean cross entropy over all tokens of vision [b, num_tokens, d]."""
        return F.cross_entropy(self.out(vision).float().flatten(0, 1), self.cells.repeat(len(vision)))
