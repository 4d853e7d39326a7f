"""What packed linear weights bring on this CPU: steps of 1 to 9 tokens of a pair's target, decoding, texts that differ.

    python tests/benchmarks/packed_linear.py --config configs/language.yaml --limit 5 --num_draft_tokens 8 --drafters attending tables

Torch's own products, packed ones, and torch's for one token with packed ones for several, in turn, one thread. Every difference of texts
is counted and its logit gap is printed. The adapters and answers of a finished run draft.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from dataclasses import dataclass

import numpy as np
import torch

from feature_alignment.benchmark.timing import step_ms
from feature_alignment.cli.config import Common, parse_config
from feature_alignment.cli.console import print_json_line, print_table, run
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.generation import Generation
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.settings import DrafterName
from feature_alignment.decoding.sources import Sources
from feature_alignment.inputs.samples import read_samples
from feature_alignment.measurement.metrics import Counts
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.pair import Pair, load_pair
from feature_alignment.models.state import Prompt

NUMBERS = (1, 2, 6, 9)
KINDS = ("torch", "packed", "mixed")


@dataclass(frozen=True)
class PackedConfig(Common):
    """Compare torch's own linear products with packed ones.

    Args:
        split: whose prompts are answered, `limit` of them spread over all
        drafters: drafters that decode
        num_draft_tokens: draft length
        max_new_tokens: longest answer
        repeats: turns of three steps of each kind
    """

    split: str = "test"
    drafters: list[DrafterName] = dataclasses.field(default_factory=lambda: ["tables"])
    num_draft_tokens: int = 5
    max_new_tokens: int = 64
    repeats: int = 5


def steps_in_turns(models: dict[str, Decoder], prompt: Prompt, repeats: int) -> dict[str, dict[int, float]]:
    """Median milliseconds of a step of each number of tokens. The models take turns, because the machine's pace changes."""
    found = [{name: step_ms(model, prompt, NUMBERS, 3, with_head=True) for name, model in models.items()} for _ in range(repeats)]
    return {name: {k: statistics.median(turn[name][k] for turn in found) for k in NUMBERS} for name in models}


@torch.inference_mode()
def first_difference(model: Decoder, prompt: Prompt, a: list[int], b: list[int]) -> str:
    """Where two texts part, and how far apart this model's logits of the two tokens are there."""
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    if at >= min(len(a), len(b)):
        return f"one ends at token {at}"
    states = model.teacher_force(model.prefill([prompt]), torch.tensor([a[: at + 1]]))
    logits = model.lm_head(states)[0, -1]
    return f"token {at}: {a[at]} or {b[at]}, logits {abs(float(logits[a[at]] - logits[b[at]])):.1e} apart"


def opened(cfg: PackedConfig, kind: str) -> Pair:
    """The pair with one kind of products."""
    pair = load_pair(cfg)
    for decoder in (pair.target, pair.draft):
        if kind != "torch":
            decoder.pack_linear(is_mixed=kind == "mixed")
    return pair


def main() -> None:
    cfg = parse_config(PackedConfig, sys.argv[1:], "packed_linear")
    torch.set_num_threads(cfg.threads or 1)
    pairs = {kind: opened(cfg, kind) for kind in KINDS}
    choice = load_pair(cfg).target.choose_linear()
    proposers = {kind: {name: Sources(pair, cfg).open(name) for name in cfg.drafters} for kind, pair in pairs.items()}
    samples = read_samples(cfg.manifests, cfg.split, questions=cfg.questions, allow_outside=cfg.allow_outside)
    number = min(cfg.limit or len(samples), len(samples))
    samples = [samples[i * len(samples) // number] for i in range(number)]
    target = pairs["torch"].target
    prompts = [(target.prepare(sample), pairs["torch"].draft.prepare(sample)) for sample in samples]
    ms = steps_in_turns({kind: pair.target for kind, pair in pairs.items()}, prompts[0][0], cfg.repeats)

    def answer(way: str, kind: str, i: int) -> Generation:
        model, (prompt, draft_prompt) = pairs[kind].target, prompts[i]
        if way == "plain":
            return greedy(model, prompt, cfg.max_new_tokens)
        lengths = {"max_new_tokens": cfg.max_new_tokens, "num_draft_tokens": cfg.num_draft_tokens}
        return speculate(model, proposers[kind][way], prompt, draft_prompt, cosines=False, **lengths)

    ways = [(way, kind) for way in ("plain", *cfg.drafters) for kind in KINDS]
    found: dict[tuple[str, str], list[Generation]] = {way: [] for way in ways}
    for turn in range(2):  # the first is a warm-up
        for i in range(number):
            for way in ways if (i + turn) % 2 else reversed(ways):
                found[way][i : i + 1] = [answer(*way, i)]
    differences = [
        f"{samples[i].id}, {way} {kind}: {first_difference(target, prompts[i][0], plain.token_ids, g.token_ids)}"
        for (way, kind), generations in found.items()
        for i, (plain, g) in enumerate(zip(found["plain", "torch"], generations, strict=True))
        if g.token_ids != plain.token_ids
    ]
    rows = [(name, *(f"{step[k]:.1f} ({step[k] / step[1]:.2f})" for k in NUMBERS)) for name, step in ms.items()]
    print_table("a step of the target with its head, ms (in steps of one token)", ("linear", *map(str, NUMBERS)), rows)
    plain_ms, clips = np.array([g.decode_ms for g in found["plain", "torch"]]), [s.sequence for s in samples]
    shown = []
    for (way, kind), generations in found.items():
        decode_ms = np.array([g.decode_ms for g in generations])
        tokens = sum(len(g.token_ids) - 1 for g in generations) / sum(g.passes for g in generations)
        shown.append((way, kind, f"{decode_ms.mean():.0f}", Counts(plain_ms, decode_ms).rate(clips).text(2), f"{tokens:.2f}"))
    print_table("decoding", ("way", "linear", "ms a prompt", "speed-up over plain, torch", "tokens per pass"), shown)
    for line in differences:
        print(line)
    texts = (len(ways) - 1) * number
    print_json_line(
        {"step_ms": ms, "choice": choice.to_json(), "rows": shown, "prompts": number, "texts": texts, "different": len(differences)}
    )


if __name__ == "__main__":
    run(main)
