"""Train the language pair's towers and projectors: pictures -> the token embeddings of a plain English description.

    python -m feature_alignment.demo.build_language_pair --out data/language

The text model is never run here: every position of a description has a few possible tokens, so a tower is trained like a classifier,
by the distance of its output to the embeddings of all tokens that descriptions hold. A second loss, through a linear layer that is
thrown away, asks every picture for all facts of its scene, though each picture describes only some of them. Seeds are fixed. One
thread a model; under 20 minutes with the rendering.
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
from typing import Any

if __name__ == "__main__":
    from feature_alignment.cli.console import run_module

    run_module("feature_alignment.demo.build_language_pair")

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from feature_alignment.demo import cameras, language_world
from feature_alignment.demo.language_models import (
    FOLDERS,
    NORMALIZATION,
    PATCH,
    Role,
    convert_text_model,
    encode_pictures,
    new_model,
    seeing_part,
    write_trained,
)
from feature_alignment.inputs import events as event_inputs
from feature_alignment.inputs.video import NUM_FRAMES, sample_indices

log = logging.getLogger(__name__)

SEEDS = (*range(4_300_000, 4_304_500), *range(4_310_000, 4_312_500))  # scenes that train the pair; nothing else sees them
STEPS: dict[Role, int] = {"target": 4500, "draft": 1000}
BATCH: dict[Role, int] = {"target": 16, "draft": 20}  # clips a step
LEARNING_RATE = 1.5e-3
TOKENS_PER_FRAME = (cameras.SIZE // PATCH["target"]) ** 2 + 1
SLOT_WEIGHT = 0.5  # of the loss on all facts, next to the words
HIDDEN_FROM_EVENTS = {*language_world.lexicon()["hidden_from_events"], "parked_color"}


def render_inputs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene as both models' inputs: frames uint8 [8, 72, 72, 3], event images uint8 [5, 72, 72, 3]."""
    intensity = language_world.render(language_world.scene(seed))
    stream = cameras.events(intensity, seed)
    images = event_inputs.event_images({k: v.astype(np.int64) for k, v in stream.items()}, 5, (cameras.SIZE, cameras.SIZE))
    return language_world.frames(intensity, seed)[sample_indices(cameras.VIDEO_FRAMES, NUM_FRAMES)], np.stack(images)


class Words:
    """The tokens that the towers learn to emit: descriptions of all training scenes as indices into their own small vocabulary.

    embeddings: float32 [v, d], the text model's, of that vocabulary; the draft's last row is the filler of its CLS token
    targets: int64 [scenes, 3 * n] of the target: a frame of spaces and the two that describe; [scenes, n] of the draft, whose tokens are
        means over its pictures
    """

    def __init__(self, role: Role, tokenizer: PreTrainedTokenizerBase, table: Tensor) -> None:
        scenes = [language_world.scene(seed) for seed in SEEDS]
        if role == "target":
            texts = [tokenizer("".join(language_world.target_sentences(s))).input_ids for s in scenes]
            ids = F.pad(torch.tensor(texts), (TOKENS_PER_FRAME, 0), value=tokenizer(" ").input_ids[0])
        else:
            ids = torch.tensor([tokenizer(language_world.draft_part(s)).input_ids for s in scenes])
        self.ids, self.targets = ids.unique(return_inverse=True)
        self.embeddings = table[self.ids].float()
        distances = torch.cdist(self.embeddings, self.embeddings).square()
        self.scale = 0.05 * float(distances.sum() / (len(distances) * (len(distances) - 1)))
        if role == "draft":
            filler = filler_embedding(self.embeddings[self.targets], table[tokenizer("\n").input_ids[0]].float())
            self.embeddings = torch.cat([self.embeddings, filler[None]])
            self.targets = F.pad(self.targets, (1, 0), value=len(self.ids))
        self.norms = self.embeddings.square().sum(-1)

    def loss(self, seen: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Cross-entropy by distance plus relative squared distance, and which tokens are nearest to the right embedding.

        seen: [b, n, d] float32, what the text model would read; rows: b scenes
        """
        wanted = self.targets[rows]
        distances = seen.square().sum(-1, keepdim=True) - 2 * seen @ self.embeddings.T + self.norms  # squared
        relative = distances.gather(-1, wanted[..., None])[..., 0] / self.norms[wanted]
        words = wanted < len(self.ids)
        crossed = F.cross_entropy(-distances[words] / (2 * self.scale), wanted[words])
        return crossed + relative.mean(), (distances.argmin(-1) == wanted)[words]


def filler_embedding(words: Tensor, harmless: Tensor) -> Tensor:
    """What EventGPT's CLS token says, so that its temporal tokens are a harmless token, float32 [d].

    A temporal token is the mean over all tokens of its event image. Five such means of a description make a small language model
    repeat itself; five newlines do not. The CLS token alone can move the mean without touching a word.

    words: float32 [scenes, n, d], embeddings of descriptions; harmless: float32 [d]
    """
    return (words.shape[1] + 1) * harmless - words.sum(1).mean(0)


def start_from_words(role: Role, model: Any, words: Words) -> None:
    """Let the projector's last layer begin as a mixture of the words' embeddings, and the place of a patch count from the start."""
    inner = model.model
    tower = inner.visual_tower.visual_tower if role == "draft" else inner.video_tower
    last = inner.visual_projector[2] if role == "draft" else inner.multi_modal_projector.linear_2
    with torch.no_grad():
        nn.init.normal_(tower.embeddings.position_embedding.weight, std=0.2)
        n = min(len(words.embeddings), last.weight.shape[1])
        last.weight[:, :n] = words.embeddings[:n].T
        last.bias.zero_()
        if role == "draft":
            inner.feature_adaptor.weight.copy_(torch.eye(last.weight.shape[0]))
            inner.feature_adaptor.bias.zero_()


def fact_labels(role: Role) -> dict[str, Tensor]:
    """The index of each slot's value in every training scene, -100 where the scene has none."""
    all_facts = [language_world.facts(language_world.scene(seed)) for seed in SEEDS]
    for f in all_facts:
        if f["landmark"] == "none":
            f.pop("side")
    slots = sorted({slot for f in all_facts for slot in f} - (HIDDEN_FROM_EVENTS if role == "draft" else set()))
    values = {slot: sorted({f[slot] for f in all_facts if slot in f}) for slot in slots}
    return {slot: torch.tensor([values[slot].index(f[slot]) if slot in f else -100 for f in all_facts]) for slot in slots}


class Trainer:
    """One model while its tower and projector are trained."""

    def __init__(self, role: Role, text_model: Path, pictures: np.ndarray) -> None:
        from safetensors import safe_open
        from transformers import AutoTokenizer

        torch.manual_seed(1 if role == "target" else 2)
        with safe_open(text_model / "model.safetensors", "pt") as file:
            table = file.get_tensor("model.embed_tokens.weight")
        settings = json.loads((text_model / "config.json").read_text())
        self.role, self.pictures, self.rng = role, pictures, random.Random(0)
        self.model = new_model(role, settings | {"num_hidden_layers": 1, "vocab_size": 16})  # its text decoder is not used
        self.words, self.labels = Words(role, AutoTokenizer.from_pretrained(text_model), table), fact_labels(role)
        start_from_words(role, self.model, self.words)
        mean, std = NORMALIZATION[role]
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1) * 255, torch.tensor(std).view(3, 1, 1) * 255
        self.tower = self.model.model.visual_tower.visual_tower if role == "draft" else self.model.model.video_tower
        self.slots = nn.Linear(self.tower.config.hidden_size, sum(int(v.max()) + 1 for v in self.labels.values()))
        self.features: list[Tensor] = []
        self.tower.register_forward_hook(lambda *call: self.features.append(call[-1].last_hidden_state))

    def step(self, rows: list[int]) -> tuple[Tensor, str]:
        """The loss on some clips, and a message for the log."""
        pictures = torch.tensor(np.stack([self.pictures[i] for i in rows]))
        if self.role == "target":  # one of the frames that say spaces, and the two that describe
            pictures = pictures[:, [self.rng.randrange(NUM_FRAMES - 2), -2, -1]]
        pixels = (pictures.permute(0, 1, 4, 2, 3).float() - self.mean) / self.std
        with torch.autocast("cpu", torch.bfloat16):
            seen = encode_pictures(self.role, self.model, pixels)
            hidden = self.features.pop()  # [b * t, p, w]
            logits = self.slots(hidden.mean(1)).float().unflatten(0, (len(rows), -1))
        if self.role == "draft":
            seen, logits = seen[:, pixels.shape[1] :], logits.mean(1, keepdim=True)  # the temporal tokens follow from the others
        loss, right = self.words.loss(seen.float(), rows)
        at, facts = 0, []
        for labels in self.labels.values():
            n = int(labels.max()) + 1
            wanted = labels[rows][:, None].expand(-1, logits.shape[1]).flatten()
            if (wanted >= 0).any():
                facts.append(F.cross_entropy(logits[..., at : at + n].flatten(0, 1), wanted))
            at += n
        message = f"words {float(right.float().mean()):.4f} facts {float(torch.stack(facts).mean().detach()):.3f}"
        return loss + SLOT_WEIGHT * torch.stack(facts).mean(), message

    def train(self, steps: int) -> None:
        """AdamW, warm-up, cosine decay, clipping."""
        names = seeing_part(self.role, self.model)
        parameters = [p for k, p in self.model.named_parameters() if k in names] + list(self.slots.parameters())
        decayed = [{"params": [p for p in parameters if (p.ndim > 1) == matrix], "weight_decay": 0.02 * matrix} for matrix in (True, False)]
        optimizer = torch.optim.AdamW(decayed, lr=LEARNING_RATE, betas=(0.9, 0.98))
        batch, begin = BATCH[self.role], time.time()
        order = [i for epoch in range(100) for i in random.Random(epoch).sample(range(len(self.pictures)), len(self.pictures))]
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            loss, message = self.step(order[step * batch : (step + 1) * batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if step % 25 == 0 or step == steps - 1:
                log.info("%s %4d/%d  loss %.4f  %s  %.0f s", self.role, step, steps, float(loss.detach()), message, time.time() - begin)


def train_one(role: Role, text_model: Path, work: Path, out: Path) -> None:
    """Train one model and write what is kept of it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", filename=work / f"{role}.log", filemode="w")
    torch.set_num_threads(1)
    pictures = np.load(work / ("frames.npy" if role == "target" else "event_images.npy"), mmap_mode="r")
    trainer = Trainer(role, text_model, pictures)
    trainer.train(STEPS[role])
    write_trained(role, trainer.model, out / FOLDERS[role])


def main() -> None:
    """Train the towers of both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/language"))
    parser.add_argument("--work", type=Path, default=Path("outputs/build_language_pair"), help="scenes, logs")
    parser.add_argument("--text_model", type=Path, default=Path("outputs/language/text_model"))
    parser.add_argument("--roles", nargs="+", choices=sorted(FOLDERS), default=sorted(FOLDERS))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.text_model.parent.mkdir(parents=True, exist_ok=True)
    convert_text_model(args.text_model)
    pool = multiprocessing.get_context("spawn")
    if not (args.work / "frames.npy").exists():
        log.info("rendering %d scenes", len(SEEDS))
        with pool.Pool(2) as workers:
            made = list(workers.imap(render_inputs, SEEDS, chunksize=50))
        np.save(args.work / "event_images.npy", np.stack([e for _, e in made]))
        np.save(args.work / "frames.npy", np.stack([f for f, _ in made]))
    both = [pool.Process(target=train_one, args=(role, args.text_model, args.work, args.out)) for role in args.roles]
    for process in both:
        process.start()
    for process in both:
        process.join()
        if process.exitcode:
            raise SystemExit(f"training failed; see the logs in {args.work}")
