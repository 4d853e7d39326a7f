"""What a benchmark row ought to have taken, from costs measured apart: TASKS.md's formula, the corrected one, and the bound they imply.

All costs are in passes of the target, each with the head and the argmax behind it, as plain decoding spends them on a token:

    S = tokens / sum over rounds of (g c + v(g + 1) + r)

c: one draft; v(k): verifying k tokens; r: accepting, rolling back and the loop around it. c and r are taken from the warm-up's rounds,
because a draft between two passes of a larger model costs more than in a loop of its own; v is measured apart.
"""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import numpy as np

from feature_alignment import metrics
from feature_alignment.decoding.engine import DRAFT_STAGES
from feature_alignment.decoding.measure import Timed

LONGEST = 32  # drafts a round, where the best number is looked for


class RoundCost(NamedTuple):
    """In passes of plain decoding: one draft, and what a round takes besides drafting and verifying."""

    c: float
    r: float


def round_costs(timed: Timed, plain: Timed) -> RoundCost | None:
    """Medians over prompts of what rounds with drafts took, in passes of plain decoding of the same prompts; None without drafts."""
    drafts, rounds = [], []
    for runs, alone in zip(timed.generations, plain.generations, strict=True):
        for g, p in zip(runs, alone, strict=True):
            asked = [r for r in g.rounds if r.proposed]
            if asked and p.passes:
                drafting = sum(g.ms.get(s, 0.0) for s in DRAFT_STAGES)
                verifying = sum(g.ms.get(s, 0.0) for s in ("verify", "recompute"))
                drafts.append(drafting / sum(len(r.proposed) for r in asked) / (p.decode_ms / p.passes))
                rounds.append((g.decode_ms - drafting - verifying) / len(asked) / (p.decode_ms / p.passes))
    return RoundCost(statistics.median(drafts), statistics.median(rounds)) if drafts else None


def verification_cost(cost: dict[str, Any], num_tokens: float) -> float:
    """v(num_tokens), linear between the measured points."""
    points = sorted((int(k), v) for k, v in cost["v"].items())
    return float(np.interp(num_tokens, [k for k, _ in points], [v for _, v in points]))


def speedup_at(acceptance_rate: float, num_draft_tokens: int, spent: RoundCost, cost: dict[str, Any]) -> float:
    """S of rounds of a fixed length whose drafts are kept independently."""
    tokens = metrics.tokens_per_pass_iid(acceptance_rate, num_draft_tokens)
    return metrics.corrected_speedup(tokens, num_draft_tokens, spent.c, verification_cost(cost, num_draft_tokens + 1) + spent.r)


def bound(acceptance_rate: float, spent: RoundCost, cost: dict[str, Any]) -> dict[str, float]:
    """The best fixed number of drafts by the corrected formula, and what it brings."""
    best = max(range(1, LONGEST), key=lambda g: speedup_at(acceptance_rate, g, spent, cost))
    found = speedup_at(acceptance_rate, best, spent, cost)
    return {"acceptance_rate": acceptance_rate, **spent._asdict(), "num_draft_tokens": best, "speedup": found}


def warnings(cost: dict[str, Any]) -> list[str]:
    """Reasons why no setting can win, if there are any."""
    found = [
        f"{draft} drafts: acceptance {b['acceptance_rate']:.3f} is not above their cost of {b['c']:.3f} passes: no length can win"
        for draft, b in cost["bound"].items()
        if b["acceptance_rate"] <= b["c"]
    ]
    eight = verification_cost(cost, 8)
    return found + ([f"verifying 8 tokens costs {eight:.2f} passes: long drafts cannot win"] if eight > 1.5 else [])


def modelled(row: dict[str, Any], timed: Timed, cost: dict[str, Any]) -> float:
    """TASKS.md's formula, for rounds of a fixed length: E / (1 + overhead), relaxed: γ a / (1 + overhead + rejection cost)."""
    c, layer = cost["c_chained" if row["draft"] == "chained" else "c"], row["exit_layer"]
    if layer is not None:
        c = cost["exit_layers"][str(layer)]["c"]
    g, overhead = row["num_draft_tokens"], row["num_draft_tokens"] * c
    if row["accept"] != "relaxed":
        return metrics.modelled_speedup(metrics.tokens_per_pass_iid(row["acceptance_rate"]["value"], g), overhead)
    rounds = [r for runs in timed.generations for r in runs[0].rounds]
    kept, recompute = sum(r.num_accepted for r in rounds), sum(runs[0].ms.get("recompute", 0.0) for runs in timed.generations)
    n = max(1, len(rounds))
    return metrics.modelled_speedup(kept / n, overhead, recompute / n / cost["t_target_ms"])


def corrected(timed: Timed, plain: Timed, live: RoundCost, cost: dict[str, Any]) -> float:
    """S from this row's own rounds: how many drafts, how many passes, tokens that came of them; every cost measured apart but the
    second passes of `relaxed`, whose length is decided by what was rejected."""
    spent = emitted = 0.0
    for runs, alone in zip(timed.generations, plain.generations, strict=True):
        g, p = runs[0], alone[0]
        emitted += len(g.token_ids) - 1
        asked = [r for r in g.rounds if r.proposed]
        spent += sum(len(r.proposed) * live.c + verification_cost(cost, len(r.proposed) + 1) + live.r for r in asked)
        spent += g.passes - len(asked) - sum(r.recomputed for r in asked)
        spent += g.ms.get("recompute", 0.0) / (p.decode_ms / max(1, p.passes))
    return emitted / spent


def of_row(row: dict[str, Any], timed: Timed, plain: Timed, live: RoundCost | None, cost: dict[str, Any]) -> dict[str, Any]:
    """Both formulas beside the measured speed-up of decoding alone. TASKS.md's is for adapted drafts of a fixed number only."""
    measured, found = row["decode_speedup"]["value"], dict[str, float | None](modelled_speedup=None, corrected_speedup=None)
    if row["draft"] in ("aligned", "chained") and not row["adaptive"]:
        found["modelled_speedup"] = modelled(row, timed, cost)
    if live:
        found["corrected_speedup"] = corrected(timed, plain, live, cost)
    errors = {f"{name.split('_')[0]}_error": None if value is None else value / measured - 1 for name, value in found.items()}
    return {**found, **errors}
