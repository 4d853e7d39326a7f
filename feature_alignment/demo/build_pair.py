"""Train and save the embedded pair: a small Video-LLaVA and a small EventGPT, in the real classes and the released formats.

    python -m feature_alignment.demo.build_pair --out data/demo

1. one byte-fallback BPE of LLaMA's kind; 2. one text decoder on both dialects (the real two are sisters as well: both descend
from Vicuna); 3. per model, its vision tower on the scenes' slots through an attention pooling that is thrown away afterwards;
4. per model, its own dialect's answers, with a little of the slot loss and a little of the old text, so that it forgets neither.
Both models are trained at once, one thread each; about an hour on two cores. Seeds are fixed.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feature_alignment.console import run
from feature_alignment.demo import captions, world
from feature_alignment.inputs import events as event_inputs
from feature_alignment.inputs.video import NUM_FRAMES, sample_indices

log = logging.getLogger(__name__)

PAIR_SEED = 1_000_000  # scenes 1,000,000 onwards train the pair; adapters and tests see other seeds
HELD_OUT_SEED = 3_000_000  # what the model card's accuracies are measured on
WIDTH, LAYERS, HEADS, INTERMEDIATE = 160, 10, 5, 432
VOCAB, TARGET_ROWS = 1024, 1088  # as 32,000 and 32,064
VISION = dict(
    hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, image_size=world.SIZE, patch_size=12,
    hidden_act="quick_gelu", projection_dim=64,
)  # fmt: skip
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
            vocab=vocab, merges=[tuple(m) for m in table["merges"]], add_bos_token=True, model_max_length=2048, unk_token="<unk>",
            bos_token="<s>", eos_token="</s>",
        )  # fmt: skip
    made["target"].add_tokens(["<image>", "<video>"], special_tokens=True)
    made["target"].add_special_tokens({"pad_token": "<pad>"})
    made["draft"].add_special_tokens({"pad_token": "<unk>"})
    return made


def render_inputs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene as both cameras' model inputs: frames uint8 [8, 72, 72, 3], event images uint8 [5, 72, 72, 3]."""
    s = world.scene(seed)
    intensity = world.render(s)
    stream = world.events(intensity, seed)
    images = event_inputs.event_images({k: v.astype(np.int64) for k, v in stream.items()}, 5, (world.SIZE, world.SIZE))
    return world.frames(intensity, seed)[sample_indices(world.VIDEO_FRAMES, NUM_FRAMES)], np.stack(images)


def new_model(who: str):
    """A randomly initialised model of either kind, in the miniature geometry."""
    from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

    from feature_alignment.models.eventgpt import EventGPTConfig, EventGPTForCausalLM

    text = dict(
        hidden_size=WIDTH, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        max_position_embeddings=2048, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    if who == "draft":
        canvas = [world.SIZE, world.SIZE]
        extra = dict(event_feature_adaptor=True, mm_visual_tower="embedded", event_canvas_hw=canvas)
        return EventGPTForCausalLM(EventGPTConfig(**text, vocab_size=VOCAB, vision_config=VISION, **extra))
    tokens_per_frame = (world.SIZE // VISION["patch_size"]) ** 2 + 1
    config = VideoLlavaConfig(
        text_config=LlamaConfig(**text, vocab_size=TARGET_ROWS), vision_config=CLIPVisionConfig(**VISION), image_token_index=VOCAB,
        video_token_index=VOCAB + 1, vision_feature_layer=-1, image_seq_length=tokens_per_frame - 1, video_seq_length=8 * tokens_per_frame,
        pad_token_id=VOCAB + 2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
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

    def caption_loss(self, vision: Tensor, seeds: list[int], questions: list[list[int]]) -> Tensor:
        """Next-token loss of several questions per scene; they share the part of the prompt before the question.

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
        return F.cross_entropy(self.model.lm_head(hidden.flatten(0, 1)[keep]).float(), labels.flatten()[keep])

    def text_loss(self, rng: random.Random, rows: int) -> Tensor:
        """Next-token loss on both dialects without any picture: what the common ancestor knew."""
        texts = []
        for _ in range(rows):
            s, q = world.scene(rng.randrange(PAIR_SEED, PAIR_SEED + 200_000)), rng.randrange(10)
            answer = rng.choice((captions.target_answer, captions.draft_answer))(s, q)
            texts.append(f"USER: {captions.QUESTIONS[q]} ASSISTANT: {answer}" if rng.random() < 0.5 else answer)
        ids = [torch.tensor([*self.tokenizer(t).input_ids, 2]) for t in texts]
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
        hidden = self.llama(input_ids=ids[:, :-1].clamp(min=0), use_cache=False).last_hidden_state
        return F.cross_entropy(self.model.lm_head(hidden).float().flatten(0, 1), ids[:, 1:].flatten())


class SlotHead(nn.Module):
    """Reads every slot off the vision tokens by attention; exists only while training."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(num_tokens, WIDTH) * 0.5)
        self.query = nn.Parameter(torch.randn(len(SLOTS), WIDTH) * 0.5)
        self.norm, self.attend = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mix = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.out = nn.ModuleList(nn.Linear(WIDTH, len(values)) for values in SLOTS.values())

    def forward(self, vision: Tensor) -> list[Tensor]:
        keys = self.norm(vision) + self.position
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


def _schedule(step: int, steps: int, lr: float) -> float:
    warm = min(1.0, (step + 1) / 50)
    return lr * warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _optimise(parameters, lr: float):
    parameters = list(parameters)
    return torch.optim.AdamW(
        [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.02}, {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}],
        lr=lr, betas=(0.9, 0.98),
    )  # fmt: skip


def _steps(name: str, steps: int, lr: float, modules: list[nn.Module], one_step) -> None:
    """Run `one_step(i) -> (loss, message)` with AdamW, warm-up, cosine decay and clipping, under bfloat16 autocast."""
    parameters = list(dict.fromkeys(p for m in modules for p in m.parameters()))  # EventGPT's tower is part of its decoder
    optimiser, start = _optimise(parameters, lr), time.time()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = _schedule(step, steps, lr)
        with torch.autocast("cpu", torch.bfloat16):
            loss, message = one_step(step)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if step % 25 == 0 or step == steps - 1:
            log.info("%s %4d/%d  loss %.4f  %s  %.0f s", name, step, steps, float(loss.detach()), message, time.time() - start)


def train_base(out: Path, tokenizer, steps: int) -> None:
    """The common ancestor of both decoders: text alone, both dialects."""
    torch.manual_seed(0)
    student, rng = Student("target", tokenizer), random.Random(0)
    _steps("base", steps, 2e-3, [student.llama, student.model.lm_head], lambda _: (student.text_loss(rng, 48), ""))
    torch.save({"llama": student.llama.state_dict(), "lm_head": student.model.lm_head.state_dict()}, out)


def _inherit(student: Student, base: Path) -> None:
    state = torch.load(base, weights_only=True)
    rows = student.model.lm_head.weight.shape[0]
    llama = {k: (v[:rows] if k == "embed_tokens.weight" else v) for k, v in state["llama"].items()}
    missing, unexpected = student.llama.load_state_dict(llama, strict=False)
    assert not unexpected and all("visual" in k or "feature_adaptor" in k for k in missing), (missing, unexpected)
    student.model.lm_head.load_state_dict({"weight": state["lm_head"]["weight"][:rows]})


def train_one(who: str, work: Path, vision_steps: int, caption_steps: int, batch: int) -> None:
    """Vision tower, then captions, of one model; leaves `<work>/<who>.pt` (weights only)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", filename=work / f"{who}.log", filemode="a")
    torch.set_num_threads(1)
    torch.manual_seed(1 if who == "target" else 2)
    rng = random.Random(who)
    images = np.load(work / ("frames.npy" if who == "target" else "event_images.npy"), mmap_mode="r")
    student = Student(who, tokenizers()[who])
    _inherit(student, work / "base.pt")
    head = SlotHead(student.vision(images[:1]).shape[1])
    seen_modules = [m for name, m in student.model.model.named_children() if name in ("visual_tower", "visual_projector", "feature_adaptor", "video_tower", "multi_modal_projector")]  # fmt: skip
    order = [i for epoch in range(200) for i in random.Random(epoch).sample(range(len(images)), len(images))]
    cursor = 0

    def draw(n: int) -> tuple[np.ndarray, list[int]]:
        nonlocal cursor
        rows = order[cursor : cursor + n]
        cursor += n
        return np.stack([images[i] for i in rows]), [PAIR_SEED + i for i in rows]

    def vision_step(_: int):
        pictures, seeds = draw(32)
        loss, right = head.loss(student.vision(pictures), seeds, who)
        return loss, " ".join(f"{k}={v:.2f}" for k, v in right.items())

    _steps(f"{who} vision", vision_steps, 1.5e-3, [*seen_modules, head], vision_step)

    def caption_step(_: int):
        pictures, seeds = draw(batch)
        vision = student.vision(pictures)
        slots, right = head.loss(vision, seeds, who)
        words = student.caption_loss(vision, seeds, [rng.sample(range(10), 6) for _ in seeds])
        text = student.text_loss(rng, 12)
        return words + 0.1 * slots + 0.2 * text, f"words {float(words.detach()):.4f} text {float(text.detach()):.3f} slots {np.mean(list(right.values())):.3f}"

    modules = [*seen_modules, head, student.llama, student.model.lm_head]
    _steps(f"{who} captions", caption_steps, 1e-3, modules, caption_step)
    torch.save(student.model.state_dict(), work / f"{who}.pt")


def save(who: str, work: Path, out: Path) -> None:
    """Write `<out>/<who's directory>` in the released format: half precision, tokenizer and preprocessor beside it."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    student = Student(who, tokenizers()[who])
    student.model.load_state_dict(torch.load(work / f"{who}.pt", weights_only=True))
    if who == "target":  # the image tower is never trained here; a copy of the video tower is at least not noise
        student.model.model.image_tower.load_state_dict(student.model.model.video_tower.state_dict())
    folder = out / ("eventgpt" if who == "draft" else "video_llava")
    student.model.half().save_pretrained(folder)
    student.tokenizer.save_pretrained(folder)
    mean, std = (EVENT_MEAN, EVENT_STD) if who == "draft" else (CLIP_MEAN, CLIP_STD)
    size = world.SIZE
    CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=list(mean), image_std=list(std)
    ).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/demo"))
    parser.add_argument("--work", type=Path, default=Path("outputs/build_pair"), help="scenes and intermediate weights")
    parser.add_argument("--num_scenes", type=int, default=12_000)
    parser.add_argument("--base_steps", type=int, default=400)
    parser.add_argument("--vision_steps", type=int, default=1600)
    parser.add_argument("--caption_steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=12, help="scenes per step, six questions each")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    pool = multiprocessing.get_context("spawn")
    base = pool.Process(target=_train_base_alone, args=(args.work, args.base_steps))
    if not (args.work / "base.pt").exists():
        base.start()
    if not (args.work / "frames.npy").exists():
        log.info("rendering %d scenes", args.num_scenes)
        with pool.Pool(2) as workers:
            made = list(workers.imap(render_inputs, range(PAIR_SEED, PAIR_SEED + args.num_scenes), chunksize=50))
        np.save(args.work / "event_images.npy", np.stack([e for _, e in made]))
        np.save(args.work / "frames.npy", np.stack([f for f, _ in made]))
    if base.pid:
        base.join()
    both = [pool.Process(target=train_one, args=(w, args.work, args.vision_steps, args.caption_steps, args.batch)) for w in DIALECTS]
    for process in both:
        process.start()
    for process in both:
        process.join()
        if process.exitcode:
            raise SystemExit(f"training failed; see the logs in {args.work}")
    for who in DIALECTS:
        save(who, args.work, args.out)


def _train_base_alone(work: Path, steps: int) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", filename=work / "base.log", filemode="w")
    torch.set_num_threads(1)
    train_base(work / "base.tmp", tokenizers()["target"], steps)
    (work / "base.tmp").replace(work / "base.pt")


if __name__ == "__main__":
    run(main)
