"""How many token ids a chained adapter drafts from: all, or the N most frequent in training answers if that is expected to pay.

    speed(N) = max over g of E(a · coverage(N), g) / (1 + g · draft_ms(N) / step_ms)        E(a, g) = 1 + a + … + a^g

A smaller head makes each draft token cheaper; a token outside the N ids is never drafted, so the acceptance rate a falls with the coverage.
Coverage is measured on answers other than those that the ids are counted in, and both times on this device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.folded import FoldedChain
from feature_alignment.adapters.hidden import call_ms
from feature_alignment.cli.config import Steps
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.fixed import captured

SMALLEST = 256
LONGEST_DRAFT = 32
MARGIN = 1.02  # expected gain below which all ids are kept: timings vary by as much
REPEATS = 30


class Candidate(NamedTuple):
    """A number of ids, the share of held-out tokens among them, and milliseconds of one draft token."""

    size: int
    coverage: float
    draft_ms: float


def frequent_ids(counts: Counter[int], size: int, ends: Iterable[int]) -> list[int]:
    """The `size` most frequent ids, ascending; those that end a text are always among them.

    Args:
        counts: how often each id occurs
        size: number of ids
        ends: ids that end a text
    """
    ends = set(ends)
    frequent = [token for token, _ in counts.most_common(size)]
    return sorted(set(frequent[: max(1, size - len(ends))]) | ends)


def sizes(vocab_size: int) -> list[int]:
    """Numbers of ids that are tried: powers of two from 256, then all ids."""
    return [*(SMALLEST << k for k in range(32) if SMALLEST << k < vocab_size), vocab_size]


def coverages(answers: Sequence[Sequence[int]], numbers: Sequence[int], ends: Iterable[int]) -> list[float]:
    """Share of tokens that the most frequent ids cover, counted in one half of the answers and measured in the other.

    Args:
        answers: token ids of training answers, those of a clip next to each other
        numbers: numbers of ids
        ends: ids that end a text
    """
    half, ends = len(answers) // 2, set(ends)
    counts, held_out = (Counter(token for answer in part for token in answer) for part in (answers[:half], answers[half:]))
    total = max(1, held_out.total())
    return [sum(held_out[i] for i in frequent_ids(counts, number, ends)) / total for number in numbers]


def best_size(candidates: Sequence[Candidate], acceptance: float, step_ms: float) -> tuple[int, float]:
    """The number of ids with the highest expected speed, and its gain over all ids; all ids and 1.0 if the gain is below `MARGIN`.

    Args:
        candidates: at least one, all ids last
        acceptance: chance that a draft token is accepted, with all ids
        step_ms: milliseconds of one pass of the target
    """
    speeds = [_expected_speed(acceptance * c.coverage, c.draft_ms / step_ms) for c in candidates[:-1]]
    whole = candidates[-1]
    base = _expected_speed(acceptance, whole.draft_ms / step_ms)
    best = max(range(len(speeds)), key=speeds.__getitem__, default=None)
    if best is None or speeds[best] / base < MARGIN:
        return whole.size, 1.0
    return candidates[best].size, speeds[best] / base


def _expected_speed(acceptance: float, c: float) -> float:
    """Tokens per pass of the target, drafting included, at the best draft length."""
    return max(sum(acceptance**i for i in range(g + 1)) / (1 + g * c) for g in range(1, LONGEST_DRAFT + 1))


@torch.inference_mode()
def draft_ms(adapter: ChainedAdapter, target: Decoder, numbers: Sequence[int], steps: Steps) -> list[float]:
    """Median milliseconds of one chained draft token with heads of so many ids, argmax included.

    Args:
        adapter: on the target's device
        target: whose head and embeddings are folded
        numbers: numbers of ids
        steps: how draft steps run
    """
    chain, size = FoldedChain(adapter, target.head_weight, target.embeddings), adapter.geometry
    events = chain.head.new_ones(1, size["num_events"], size["d_event"])
    context, z = chain.context(adapter.encode_events(events)), chain.head.new_ones(1, size["width"])
    token, found = torch.zeros(1, dtype=torch.long, device=z.device), []
    for number in numbers:
        head, bias = chain.head[:number], chain.head_bias[:number]

        def step(z: Tensor, token: Tensor, memory: Tensor, head: Tensor = head, bias: Tensor = bias) -> Tensor:
            return F.linear(chain.expect(chain.go_on(z, token, memory), context), head, bias).argmax(-1)

        draft = captured(step, steps)
        found.append(call_ms(lambda draft=draft: draft(z, token, z), REPEATS, z.device.type))  # type: ignore[misc]
    return found


@torch.inference_mode()
def step_ms(target: Decoder, question: str) -> float:
    """Median milliseconds of one pass of the target over one token, LM head included, after the prompt of a question and a blank clip."""
    ids = target.encode_prompt(question)[None]
    state = target.prefill_encoded(ids, target.head_weight.new_zeros(1, target.vision_tokens, target.width))
    token = torch.full((1, 1), 5, device=target.device)

    def step() -> None:
        target.lm_head(target.step(state, token)).argmax(-1)
        target.rollback(state, 1)

    return call_ms(step, REPEATS, target.device.type)
