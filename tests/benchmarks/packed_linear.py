"""What packed linear weights bring on this CPU: steps of 1 to 9 tokens of a pair's target, texts that differ, decoding with free tables.

    python tests/benchmarks/packed_linear.py --config configs/language.yaml --split test --limit 40

Torch's own products, packed ones, and torch's for one token with packed ones for several, in turn, one thread. Every difference of texts
is counted and its logit gap is printed.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass

import torch

from feature_alignment.benchmark.timing import step_ms
from feature_alignment.cli.config import Common, parse_config
from feature_alignment.cli.console import print_json_line, print_table, run
from feature_alignment.decoding.baseline_drafters import NGram, TableProposer
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.plain import greedy
from feature_alignment.inputs.samples import read_samples
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.pair import load_target
from feature_alignment.models.state import Prompt
from feature_alignment.storage.answers import read_token_pairs

NUMBERS = (1, 2, 6, 9)
DRAFT_TOKENS = 5


@dataclass(frozen=True)
class PackedConfig(Common):
    """Compare torch's own linear products with packed ones.

    Args:
        split: whose prompts are answered
        max_new_tokens: longest answer
        repeats: turns of three steps of each kind
    """

    split: str = "test"
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


def main() -> None:
    cfg = parse_config(PackedConfig, sys.argv[1:], "packed_linear")
    torch.set_num_threads(cfg.threads or 1)
    models = {kind: load_target(cfg) for kind in ("torch", "packed", "mixed")}
    models["packed"].pack_linear()
    models["mixed"].pack_linear(is_mixed=True)
    choice = load_target(cfg).choose_linear()
    samples = read_samples(cfg.manifests, cfg.split, cfg.limit, cfg.questions, cfg.allow_outside)
    prompts = [models["torch"].prepare(sample) for sample in samples]
    ms = steps_in_turns(models, prompts[0], cfg.repeats)
    train = read_token_pairs(cfg.out / "token_pairs" / "train.json")
    table = TableProposer(NGram([(row["query"], row["vl_tokens"]) for row in train]))
    times: dict[str, list[float]] = {f"{name} {way}": [] for name in models for way in ("plain", "n-gram")}
    tokens, passes, differences = 0, 0, []
    for sample, prompt in zip(samples, prompts, strict=True):
        texts = {}
        for name, model in models.items():
            plain = greedy(model, prompt, cfg.max_new_tokens)
            drafted = speculate(model, table, prompt, prompt, max_new_tokens=cfg.max_new_tokens, num_draft_tokens=DRAFT_TOKENS)
            times[f"{name} plain"].append(plain.decode_ms)
            times[f"{name} n-gram"].append(drafted.decode_ms)
            texts |= {f"{name} plain": plain.token_ids, f"{name} n-gram": drafted.token_ids}
            tokens, passes = tokens + len(drafted.token_ids), passes + len(drafted.rounds)
        wanted = texts["torch plain"]
        for way, text in texts.items():
            if text != wanted:
                differences.append(f"{sample.id}, {way}: {first_difference(models['torch'], prompt, wanted, text)}")
    rows = [(name, *(f"{found[k]:.1f} ({found[k] / found[1]:.2f})" for k in NUMBERS)) for name, found in ms.items()]
    print_table("a step of the target with its head, ms (in steps of one token)", ("linear", *map(str, NUMBERS)), rows)
    total = {name: sum(found) for name, found in times.items()}
    shown = []
    for name, found in times.items():
        of_torch, of_its_own = total["torch plain"] / total[name], total[f"{name.split()[0]} plain"] / total[name]
        shown.append((name, f"{statistics.mean(found):.0f}", f"{of_torch:.2f}", f"{of_its_own:.2f}"))
    print_table("decoding", ("way", "ms a prompt", "speed-up over torch, plain", "over plain of the same weights"), shown)
    for line in differences:
        print(line)
    print_json_line(
        {
            "step_ms": ms,
            "choice": choice.to_json(),
            "decode_ms": total,
            "prompts": len(prompts),
            "tokens_per_pass": tokens / passes,
            "texts": len(times) * len(prompts) - len(prompts),
            "different": len(differences),
        }
    )


if __name__ == "__main__":
    run(main)
