"""Train and save the demo pair: a small Video-LLaVA and a small EventGPT, with the real classes and the released formats.

    python -m feature_alignment.demo.build_pair --out data/demo

1. a byte-fallback BPE vocabulary of LLaMA's kind
2. one text decoder on both dialects, as a common base (the real two both descend from Vicuna)
3. per model, its vision tower on the slots of scenes, through an attention pooling that is discarded afterwards
4. per model, the answers of its dialect, with a small weight on slots and texts against forgetting

The two models are trained in parallel with one thread each, in about an hour on two cores. Seeds are fixed.
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    from feature_alignment.cli.console import run_module

    run_module("feature_alignment.demo.build_pair")

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from feature_alignment.cli.ranges import number_argument, path_argument
from feature_alignment.demo import cameras, captions
from feature_alignment.demo.students import (
    CLIP_MEAN,
    CLIP_STD,
    DIALECTS,
    EVENT_MEAN,
    EVENT_STD,
    PAIR_SEED,
    SLOTS,
    CellHead,
    SlotHead,
    Student,
    render_inputs,
    tokenizers,
)
from feature_alignment.measurement.lexicon import Lexicon
from feature_alignment.storage.processes import check_writable, children_ignore_interrupts

log = logging.getLogger(__name__)


def _schedule(step: int, steps: int, lr: float) -> float:
    warm = min(1.0, (step + 1) / 50)
    return lr * warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _optimizer(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    parameters = list(parameters)
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.02},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, 0.98),
    )


def _steps(name: str, steps: int, lr: float, modules: list[nn.Module], one_step: Callable[[int], tuple[Tensor, str]]) -> None:
    """Run `one_step(i) -> (loss, message)` with AdamW, warm-up, cosine decay and clipping, under bfloat16 autocast."""
    parameters = list(dict.fromkeys(p for m in modules for p in m.parameters()))  # EventGPT's tower is part of its decoder
    optimizer, start = _optimizer(parameters, lr), time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _schedule(step, steps, lr)
        with torch.autocast("cpu", torch.bfloat16):
            loss, message = one_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            log.info("%s %4d/%d  loss %.4f  %s  %.0f s", name, step, steps, float(loss.detach()), message, time.time() - start)


def train_base(out: Path, tokenizer: PreTrainedTokenizerBase, steps: int) -> None:
    """Train the common base of both decoders for `steps` on texts of both dialects; write its weights to `out`."""
    torch.manual_seed(0)
    student, rng = Student("target", tokenizer), random.Random(0)
    _steps("base", steps, 2e-3, [student.llama, student.model.lm_head], lambda _: (student.text_loss(rng, 48), ""))
    torch.save({"llama": student.llama.state_dict(), "lm_head": student.model.lm_head.state_dict()}, out)


def _load_base(student: Student, base: Path) -> None:
    state = torch.load(base, weights_only=True)
    rows = student.model.lm_head.weight.shape[0]
    llama = {k: (v[:rows] if k == "embed_tokens.weight" else v) for k, v in state["llama"].items()}
    missing, unexpected = student.llama.load_state_dict(llama, strict=False)
    assert not unexpected and all("visual" in k or "feature_adaptor" in k for k in missing), (missing, unexpected)
    student.model.lm_head.load_state_dict({"weight": state["lm_head"]["weight"][:rows]})


@dataclass(frozen=True)
class Round:
    """One round of training of a model: first its vision tower on slots, then its answers.

    The rounds of the target show why `places` and `side_weight` exist. With positions of all tokens ("token"), the tower need not encode
    positions in its tokens, and the decoder never learned sides from 296 tokens. With frames only ("frame"), it did not learn them either.
    With a prediction of each token's cell ("cell"), the tower learned them at once, but the decoder still guessed, because a side is one
    word in a hundred. So the last round gives that word a higher weight.

    Args:
        places: Positions given to the slot head: of every token, or of frames only; "cell" also predicts the cell of each token.
        vision_steps: Steps of the vision tower.
        vision_lr: Their learning rate.
        caption_steps: Steps on answers.
        caption_lr: Their learning rate.
        caption_batch: Scenes per step.
        questions: Questions per scene.
        side_weight: Weight of the words that state a landmark's side.
        weights: Weights of the losses on slots, cells and texts in addition to the answers.
    """

    places: Literal["token", "frame", "cell"]
    vision_steps: int
    vision_lr: float
    caption_steps: int
    caption_lr: float
    caption_batch: int = 12
    questions: int = 6
    side_weight: float = 1.0
    weights: tuple[float, float, float] = (0.1, 0.0, 0.2)


ROUNDS = {
    "target": [
        Round("token", 1600, 1.5e-3, 900, 1e-3),
        Round("frame", 500, 7e-4, 650, 7e-4),
        Round("cell", 400, 1e-3, 560, 5e-4, caption_batch=6, weights=(0.3, 0.1, 0.15)),
        Round("cell", 0, 0.0, 400, 7e-4, caption_batch=6, questions=3, side_weight=10.0, weights=(0.3, 0.1, 0.15)),
    ],
    "draft": [Round("token", 1600, 1.5e-3, 900, 1e-3)],
}
VISION_BATCH = 32


def train_one(role: str, work: Path) -> None:
    """Train all rounds of a model and write its weights to `<work>/<role>.pt`.

    Args:
        role: "target" or "draft".
        work: Folder of rendered scenes and weights.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", filename=work / f"{role}.log", filemode="a")
    torch.set_num_threads(1)
    torch.manual_seed(1 if role == "target" else 2)
    images = np.load(work / ("frames.npy" if role == "target" else "event_images.npy"), mmap_mode="r")
    student = Student(role, tokenizers()[role])
    _load_base(student, work / "base.pt")
    for number, plan in enumerate(ROUNDS[role]):
        train_round(student, images, plan, seed=number)
        torch.save(student.model.state_dict(), work / f"{role}.pt")


def train_round(student: Student, images: np.ndarray, plan: Round, seed: int) -> None:
    """Train one round, in place.

    Args:
        student: Model to train.
        images: [scenes, t, h, w, 3] uint8; scene i has seed PAIR_SEED + i.
        plan: Of the round.
        seed: Of the order of scenes and questions.
    """
    role, rng = student.role, random.Random(f"{student.role} {seed}")
    num_tokens = student.vision(images[:1]).shape[1]
    head = SlotHead(num_tokens, num_tokens if plan.places == "token" else images.shape[1])
    cells = CellHead(num_tokens, images.shape[1]) if plan.places == "cell" else None
    parts = ("visual_tower", "visual_projector", "feature_adaptor", "video_tower", "multi_modal_projector")
    vision_modules = [module for name, module in student.model.model.named_children() if name in parts]
    order = [i for epoch in range(200) for i in random.Random(f"{seed} {epoch}").sample(range(len(images)), len(images))]
    cursor = 0

    def draw(n: int) -> tuple[np.ndarray, list[int]]:
        nonlocal cursor
        rows = order[cursor : cursor + n]
        cursor += n
        return np.stack([images[i] for i in rows]), [PAIR_SEED + i for i in rows]

    def vision_step(_: int) -> tuple[Tensor, str]:
        pictures, seeds = draw(VISION_BATCH)
        vision = student.vision(pictures)
        loss, accuracy = head.loss(vision, seeds, role)
        if cells:
            loss = loss + 0.3 * cells.loss(vision)
        return loss, " ".join(f"{k}={v:.2f}" for k, v in accuracy.items())

    def caption_step(_: int) -> tuple[Tensor, str]:
        pictures, seeds = draw(plan.caption_batch)
        vision = student.vision(pictures)
        slots, accuracy = head.loss(vision, seeds, role)
        words = student.caption_loss(vision, seeds, [rng.sample(range(10), plan.questions) for _ in seeds], plan.side_weight)
        text = student.text_loss(rng, 12)
        of_slots, of_cells, of_text = plan.weights
        loss = words + of_slots * slots + of_text * text + (of_cells * cells.loss(vision) if cells else 0.0)
        return loss, f"words {float(words.detach()):.4f} slots {np.mean(list(accuracy.values())):.3f}"

    modules = [*vision_modules, head, *([cells] if cells else [])]
    _steps(f"{role} vision", plan.vision_steps, plan.vision_lr, modules, vision_step)
    _steps(
        f"{role} captions",
        plan.caption_steps,
        plan.caption_lr,
        [*modules, student.llama, student.model.lm_head],
        caption_step,
    )


def save(role: str, work: Path, out: Path) -> None:
    """Write a checkpoint in the released format: half precision, with tokenizer and preprocessor.

    Args:
        role: "target" or "draft".
        work: Folder of its trained weights.
        out: Folder of the checkpoints.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    student = Student(role, tokenizers()[role])
    student.model.load_state_dict(torch.load(work / f"{role}.pt", weights_only=True))
    if role == "target":  # the image tower is not trained; a copy of the video tower replaces its random weights
        student.model.model.image_tower.load_state_dict(student.model.model.video_tower.state_dict())
    folder = out / ("eventgpt" if role == "draft" else "video_llava")
    student.model.half().save_pretrained(folder)
    student.tokenizer.save_pretrained(folder)
    mean, std = (EVENT_MEAN, EVENT_STD) if role == "draft" else (CLIP_MEAN, CLIP_STD)
    size = cameras.SIZE
    CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=list(mean), image_std=list(std)
    ).save_pretrained(folder)


def slot_accuracies(role: str, work: Path, out: Path) -> dict[str, float]:
    """Accuracy of the facts that a saved model states about unseen scenes, through real input files.

    Args:
        role: "target" or "draft".
        work: Folder for the scenes.
        out: Folder of the checkpoints.

    Returns:
        Share of true facts per slot, and over "all".
    """
    from feature_alignment.cli.config import Common
    from feature_alignment.demo.scenes import write_split
    from feature_alignment.inputs.samples import read_samples
    from feature_alignment.models.pair import load_draft, load_target

    samples = read_samples({"held_out": write_split(work / "held_out", "held_out")}, "held_out")
    cfg = Common(target_id=out / "video_llava", draft_id=out / "eventgpt", threads=1)
    model = load_draft(cfg) if role == "draft" else load_target(cfg)
    is_true: dict[str, list[bool]] = {}
    lexicon = Lexicon.from_json(captions.lexicon())
    for question in captions.QUESTIONS:
        asked = [s for s in samples if s.question == question]
        answers = model.generate(model.prefill([model.prepare(s) for s in asked]), 48)
        for sample, answer in zip(asked, answers, strict=True):
            for slot, value in lexicon.facts_in(model.tokenizer.decode(answer, skip_special_tokens=True)).items():
                is_true.setdefault(slot, []).append((sample.facts or {})[slot] == value)
    return {slot: float(np.mean(is_true[slot])) for slot in SLOTS if slot in is_true} | {
        "all": float(np.mean([r for answers in is_true.values() for r in answers]))
    }


def write_card(work: Path, out: Path) -> None:
    """Write measured accuracies into `MODEL_CARD.md` next to the two checkpoints.

    Args:
        work: Folder for the scenes.
        out: Folder of the checkpoints.
    """
    accuracy = {role: slot_accuracies(role, work, out) for role in DIALECTS}
    rows = [
        f"| {slot} | {accuracy['target'].get(slot, float('nan')):.3f} | {accuracy['draft'].get(slot, float('nan')):.3f} |"
        for slot in [*SLOTS, "all"]
    ]
    text = (
        (out / "MODEL_CARD.md").read_text().split("<!-- measured -->")[0] if (out / "MODEL_CARD.md").exists() else "# The embedded pair\n\n"
    )
    table = ["| slot | Video-LLaVA (frames) | EventGPT (events) |", "|---|---|---|", *rows]
    (out / "MODEL_CARD.md").write_text(text + "<!-- measured -->\n" + "\n".join(table).replace("nan", "never said") + "\n")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=path_argument, default=Path("data/demo"))
    parser.add_argument("--work", type=path_argument, default=Path("outputs/build_pair"), help="scenes and intermediate weights")
    parser.add_argument("--num_scenes", type=number_argument("num_scenes"), default=12_000)
    parser.add_argument("--base_steps", type=number_argument("base_steps"), default=400)
    args = parser.parse_args()
    check_writable(args.out / "MODEL_CARD.md")
    check_writable(args.work / "base.pt")
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    pool = multiprocessing.get_context("spawn")
    base = pool.Process(target=_train_base_alone, args=(args.work, args.base_steps))
    if not (args.work / "base.pt").exists():
        with children_ignore_interrupts():
            base.start()
    if not (args.work / "frames.npy").exists():
        log.info("rendering %d scenes", args.num_scenes)
        with children_ignore_interrupts():
            renderers = pool.Pool(2)
        with renderers as workers:
            inputs = list(workers.imap(render_inputs, range(PAIR_SEED, PAIR_SEED + args.num_scenes), chunksize=50))
        np.save(args.work / "event_images.npy", np.stack([e for _, e in inputs]))
        np.save(args.work / "frames.npy", np.stack([f for f, _ in inputs]))
    if base.pid:
        base.join()
    both = [pool.Process(target=train_one, args=(role, args.work)) for role in DIALECTS]
    with children_ignore_interrupts():
        for process in both:
            process.start()
    for process in both:
        process.join()
        if process.exitcode:
            raise SystemExit(f"training failed; see the logs in {args.work}")
    for role in DIALECTS:
        save(role, args.work, args.out)
    write_card(args.work, args.out)


def _train_base_alone(work: Path, steps: int) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", filename=work / "base.log", filemode="w")
    torch.set_num_threads(1)
    train_base(work / "base.tmp", tokenizers()["target"], steps)
    (work / "base.tmp").replace(work / "base.pt")
