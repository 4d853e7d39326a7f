"""Do the language pair's answers say what their videos and events show? Share of stated facts that are true, and the controls.

    python -m feature_alignment.demo.language_grounding                                        prints the table
    python -m feature_alignment.demo.language_grounding --card data/language/MODEL_CARD.md     writes it into the model card as well

Reads the answers that extraction has stored for the test split, whose scenes train nothing. A fact is what `language_world.lexicon`
reads from a text; a kind or a color is true if it is the moving road user's or the parked vehicle's, a thing is a color with the kind
that follows it. The control judges the same answers by the facts of another clip that was asked the same question: an answer depends on
nothing but its clip and its question, so this is what the model would say of another clip's video.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    from feature_alignment.cli.console import run_module

    run_module("feature_alignment.demo.language_grounding")

from feature_alignment.cli.console import UserError, print_json_line, print_table
from feature_alignment.cli.ranges import path_argument
from feature_alignment.demo import language_world
from feature_alignment.demo.language_models import Role
from feature_alignment.inputs.samples import Sample, read_samples
from feature_alignment.measurement.lexicon import Fact, Lexicon
from feature_alignment.storage.answers import eos_ids, read_token_pairs

MARK = "<!-- measured -->"
NAMES: dict[Role, str] = {"target": "Video-LLaVA", "draft": "EventGPT"}
KEYS: dict[Role, str] = {"target": "vl", "draft": "egpt"}  # as token pairs files name them
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
    """Slot -> (true claims, claims) of answers, judged by the facts of one scene each; `all` counts every slot but `thing`."""
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


def read_answers(token_pairs: Path, manifest: Path) -> dict[Role, list[Answer]]:
    """Both models' stored answers to the samples of a manifest.

    Args:
        token_pairs: token_pairs/<split>.json of an extraction.
        manifest: of the same split, with the facts of each scene.
    """
    samples = {sample.id: sample for sample in read_samples({manifest.stem: manifest}, manifest.stem)}
    rows, ends = read_token_pairs(token_pairs), eos_ids(token_pairs)
    unknown = [row["sample_id"] for row in rows if row["sample_id"] not in samples]
    if unknown:
        raise UserError(f"{token_pairs} answers {unknown[0]}, which {manifest} does not have; expected the manifest it was made from.")
    answers: dict[Role, list[Answer]] = {"target": [], "draft": []}
    for row in rows:
        for role, name in KEYS.items():
            tokens = row[f"{name}_tokens"]
            answers[role].append(Answer(samples[row["sample_id"]], row[f"{name}_text"], len(tokens), tokens[-1] in ends))
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
            f"{NAMES[role]}: {len(said)} answers, {mean:.1f} tokens on average, {ended:.0%} end with EOS. Examples:",
            "",
        ]
        lines += [f"- *{a.sample.question}* {' '.join(a.text.split())}" for a in said[:: len(said) // 6 + 1]]
    return lines


def main() -> None:
    """Print the share of true claims for each slot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--token_pairs", type=path_argument, default=Path("outputs/language/token_pairs/test.json"))
    parser.add_argument("--manifest", type=path_argument, default=Path("outputs/language/scenes/test.jsonl"))
    parser.add_argument("--card", type=path_argument, help="model card whose measured part is replaced")
    args = parser.parse_args()
    answers = read_answers(args.token_pairs, args.manifest)
    lines = report(answers)
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[2:] if line.startswith("|")]
    print_table(
        "grounding: share of stated facts that are true", ("claim", *(h for r in answers for h in (NAMES[r], "another clip's"))), rows
    )
    if args.card is not None:
        text = args.card.read_text().split(MARK)[0] if args.card.is_file() else "# The language pair\n\n"
        args.card.write_text(text + MARK + "\n" + "\n".join(lines) + "\n")
    print_json_line({"answers": {NAMES[role]: len(said) for role, said in answers.items()}})
