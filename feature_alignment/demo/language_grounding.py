"""Do the language pair's answers say what their videos and events show? Share of stated facts that are true, and the controls.

    python -m feature_alignment.demo.language_grounding              prints the tables and writes them into data/language/MODEL_CARD.md

Held-out scenes, inputs through the real files. A fact is what `language_world.lexicon` reads from a text; a kind or a color is true
if it is the moving road user's or the parked vehicle's, a thing is a color with the kind that follows it. The control judges the same
answers by the facts of another clip that was asked the same question: an answer depends on nothing but its clip and its question, so
this is what the model would say of another clip's video.
"""

from __future__ import annotations

import argparse
import logging
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    from feature_alignment.cli.console import run_module

    run_module("feature_alignment.demo.language_grounding")

import torch

from feature_alignment.cli.config import Common
from feature_alignment.cli.console import print_json_line, print_table, progress
from feature_alignment.cli.ranges import number_argument, path_argument
from feature_alignment.demo import language_world
from feature_alignment.demo.language_models import FOLDERS, Role
from feature_alignment.demo.language_scenes import write_split
from feature_alignment.inputs.samples import Sample, read_samples
from feature_alignment.measurement.lexicon import Fact, Lexicon
from feature_alignment.models.batches import ClipBatch, plan_batches

log = logging.getLogger(__name__)

MARK = "<!-- measured -->"
LONGEST = 64  # tokens of an answer
NAMES: dict[Role, str] = {"target": "Video-LLaVA", "draft": "EventGPT"}
_KIND_OF = {word: kind for kind, words in language_world.lexicon()["facts"]["kind"].items() for word in words}
_THING = re.compile(rf"\b({'|'.join(language_world.COLORS)}) ({'|'.join(sorted(_KIND_OF, key=len, reverse=True))})\b")


@dataclass(frozen=True)
class Answer:
    """What one model said: to which sample, its text, its tokens, whether it ended with EOS."""

    sample: Sample
    text: str
    num_tokens: int
    ended: bool


def claims_in(text: str, lexicon: Lexicon) -> Iterator[Fact]:
    """(slot, value) of everything that a text states; each colored thing is a claim of its own, `thing`."""
    yield from lexicon.facts_in(text).items()
    for color, word in dict.fromkeys(_THING.findall(text.lower())):
        yield "thing", f"{color} {_KIND_OF[word]}"


def is_true(claim: Fact, facts: Mapping[str, str]) -> bool:
    """Whether a claim holds in a scene."""
    slot, value = claim
    kinds = [(facts["colour"], facts["kind"]), (facts.get("parked_color", ""), facts["parked"])]
    if slot == "thing":
        return value in [f"{color} {kind}" for color, kind in kinds]
    if slot in ("colour", "kind"):
        return value in [pair[slot == "kind"] for pair in kinds]
    return facts.get(slot) == value


def count_claims(answers: Sequence[Answer], facts: Sequence[Mapping[str, str]], lexicon: Lexicon) -> dict[str, tuple[int, int]]:
    """slot -> (true claims, claims) of answers, judged by the facts of one scene each; `all` counts every slot but `thing`."""
    true: Counter[str] = Counter()
    stated: Counter[str] = Counter()
    for answer, scene_facts in zip(answers, facts, strict=True):
        for slot, value in claims_in(answer.text, lexicon):
            for name in (slot,) if slot == "thing" else (slot, "all"):
                stated[name] += 1
                true[name] += is_true((slot, value), scene_facts)
    return {slot: (true[slot], stated[slot]) for slot in stated}


def others_facts(answers: Sequence[Answer]) -> list[Mapping[str, str]]:
    """For each answer the facts of the next clip that was asked the same question."""
    asked: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        asked[answer.sample.question].append(answer)
    following = {id(answer): same[(i + 1) % len(same)].sample.facts or {} for same in asked.values() for i, answer in enumerate(same)}
    return [following[id(answer)] for answer in answers]


def answer_all(role: Role, checkpoints: Path, samples: Sequence[Sample]) -> list[Answer]:
    """Greedy answers of one model to every sample."""
    from feature_alignment.models.pair import load_draft, load_target

    cfg = Common(target_id=checkpoints / FOLDERS["target"], draft_id=checkpoints / FOLDERS["draft"], threads=1)
    torch.set_num_threads(1)
    model = load_draft(cfg) if role == "draft" else load_target(cfg)
    model.pack_linear()
    answers, begin = [], time.perf_counter()
    with progress(total=len(samples), desc=f"answers of {NAMES[role]}", unit="answer") as bar:
        for rows in plan_batches(samples, 25):
            asked = [samples[i] for i in rows]
            for sample, tokens in zip(asked, ClipBatch(model, asked).generate(LONGEST), strict=True):
                text = model.tokenizer.decode(tokens, skip_special_tokens=True)
                answers.append(Answer(sample, text, len(tokens), tokens[-1] in model.eos_ids))
            bar.update(len(asked))
    log.info("%s: %.2f answers per second", NAMES[role], len(answers) / (time.perf_counter() - begin))
    return answers


def report(answers: Mapping[Role, Sequence[Answer]]) -> list[str]:
    """Lines of Markdown: per slot the share of true claims of both models, by the own clip and by another."""
    lexicon = Lexicon.from_json(language_world.lexicon())
    lines = ["| claim | " + " | ".join(f"{NAMES[role]} | another clip's" for role in answers) + " |", "|---" * (1 + 2 * len(answers)) + "|"]
    counted = {}
    for role, said in answers.items():
        own = count_claims(said, [a.sample.facts or {} for a in said], lexicon)
        counted[role] = own, count_claims(said, others_facts(said), lexicon)
    for slot in [*language_world.lexicon()["facts"], "thing", "all"]:
        cells = []
        for own, other in counted.values():
            true, stated = own.get(slot, (0, 0))
            cells += [f"{true / stated:.3f} ({true}/{stated})", f"{other[slot][0] / other[slot][1]:.3f}"] if stated else ["never said", ""]
        lines.append(f"| {slot} | " + " | ".join(cells) + " |")
    for role, said in answers.items():
        mean, ended = sum(a.num_tokens for a in said) / len(said), sum(a.ended for a in said) / len(said)
        lines += [
            "",
            f"{NAMES[role]}: {len(said)} answers, {mean:.1f} tokens on average, {ended:.0%} end with EOS within {LONGEST}. Examples:",
            "",
        ]
        lines += [f"- *{a.sample.question}* {' '.join(a.text.split())}" for a in said[:: len(said) // 6 + 1]]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=path_argument, default=Path("outputs/language"))
    parser.add_argument("--card", type=path_argument, default=Path("data/language/MODEL_CARD.md"))
    parser.add_argument("--clips", type=number_argument("clips"), default=60)
    args = parser.parse_args()
    split = "held_out"
    manifest = write_split(args.checkpoints / "scenes", split, args.clips)
    samples = read_samples({split: manifest}, split)
    answers: dict[Role, list[Answer]] = {role: answer_all(role, args.checkpoints, samples) for role in FOLDERS}
    lines = report(answers)
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[2:] if line.startswith("|")]
    print_table(
        "grounding: share of stated facts that are true", ("claim", *(h for r in answers for h in (NAMES[r], "another clip's"))), rows
    )
    text = args.card.read_text().split(MARK)[0] if args.card.is_file() else "# The language pair\n\n"
    args.card.write_text(text + MARK + "\n" + "\n".join(lines) + "\n")
    print_json_line({"model_card": str(args.card), "answers": {NAMES[role]: len(said) for role, said in answers.items()}})
