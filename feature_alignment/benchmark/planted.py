"""Wall clock under a stated acceptance: what speculative decoding would bring at a geometry whose trained weights are not at hand.

Every draft is kept by chance, at a given rate, whatever it says; everything else runs as it does in decoding: both prefills, drafts,
verification, rollback. The texts are noise and mean nothing, the milliseconds are real. No number of this is an acceptance, a cosine or
a target met, and each says that it was planted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from feature_alignment.benchmark import speed_model, timing
from feature_alignment.benchmark.rows import Mode, answering, speeds
from feature_alignment.benchmark.timing import Timed
from feature_alignment.cli.config import Common, StepsSetting
from feature_alignment.cli.console import markdown_table, print_table, progress, rate_text
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.generation import Generation
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.sources import Sources
from feature_alignment.inputs.samples import Sample
from feature_alignment.models import fixed
from feature_alignment.models.pair import load_pair
from feature_alignment.storage.artifacts import provenance
from feature_alignment.storage.files import write_hashed_json, write_text
from feature_alignment.storage.identity import RunIdentity

Table = tuple[str, list[str], list[list[str]]]


def kept_by_chance(rate: float, seed: int, device: torch.device) -> Callable[..., Tensor]:
    """An acceptance rule that keeps each draft with probability `rate`."""
    chance = torch.Generator(device).manual_seed(seed)
    return lambda draft_ids, target_ids, cosine, threshold: torch.rand(len(draft_ids), generator=chance, device=device) < rate


@torch.inference_mode()
def run(
    cfg: Common,
    steps: StepsSetting,
    samples: Sequence[Sample],
    drafters: Sequence[str],
    gammas: Sequence[int],
    rates: Sequence[float],
    max_new_tokens: int,
    repeats: int,
    warmup: int,
    made_from: dict[str, Any],
    identity: RunIdentity | None = None,
) -> dict[str, Any]:
    """One row for each draft source, length and rate, beside plain greedy decoding in turn; adapters that were never trained will do."""
    pair = load_pair(cfg)
    pair.use_steps(steps)
    pair.target.head_weight[sorted(pair.target.eos_ids)] = 0  # no text ends early: all are `max_new_tokens` long
    pair.choose_linear()  # After the head was changed: packed weights are a copy.
    sources = Sources(pair, cfg, untrained=True)
    prompts = [(pair.target.prepare(s), pair.draft.prepare(s)) for s in samples]
    proposers = {name: sources.open(name) for name in drafters}
    chained = sources.chained_adapter if "chained" in drafters else None
    cost = timing.costs(pair.target, pair.draft, sources.adapter, chained, *prompts[0])
    cost |= timing.machine_costs(pair.target, sources.full_draft, cost, *prompts[0])
    on_gpu = pair.target.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()  # not of measuring the bandwidth

    def method(mode: Mode, rate: float) -> Callable[[int], Generation]:
        def answer(i: int) -> Generation:
            rule = kept_by_chance(rate, cfg.seed + i, pair.target.device)  # of a prompt all repeats, lengths and drafters have one fate
            g = mode.num_draft_tokens
            return speculate(
                pair.target, proposers[mode.draft], *prompts[i], accept=rule, num_draft_tokens=g, max_new_tokens=max_new_tokens
            )

        return answer

    planted = [(Mode(draft, "token", g), rate) for draft in drafters for g in gammas for rate in rates]
    methods: dict[Any, Callable[[int], Generation]] = {mode: method(*mode) for mode in planted}
    methods["plain"] = answering(lambda prompt: greedy(pair.target, prompt, max_new_tokens), prompts)
    for _ in range(2):
        timing.run_in_turns(methods, min(warmup, len(samples)), 1, iter)
    timed = timing.run_in_turns(methods, len(samples), repeats, lambda x: progress(x, desc="planted", unit="prompt"))
    clips, plain, rows = [s.sequence for s in samples], timed["plain"], []
    costs = speed_model.Costs.of([(mode, timed[mode, rate]) for mode, rate in planted], plain, cost["loop"]["v"])
    cost |= costs.report(cost["loop"], clips)
    for mode, rate in planted:
        row = speeds(mode, timed[mode, rate], plain, clips, costs)
        row |= {"accept": "planted", "planted_acceptance": rate, "draft_layers": list(pair.draft.taps)}
        rows.append({k: v for k, v in row.items() if not k.startswith("modelled")})
    baseline = {
        "name": "plain greedy",
        "prompts": len(samples),
        "tokens": sum(map(len, plain.texts)),
        "total_ms": float(plain.per_prompt(lambda g: g.total_ms).sum()),
        "decode_ms": float(plain.per_prompt(lambda g: g.decode_ms).sum()),
    }
    meta = provenance("benchmark_feature_sd", cfg, made_from, identity, device=cfg.device, dtype=cfg.dtype, planted=True)
    meta["peak_memory_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else None
    meta["unrecorded"] = fixed.eager_fallbacks
    meta["linear"] = {"target": pair.target.linear.to_json(), "draft": pair.draft.linear.to_json()}
    return {"meta": meta, "planted": True, "baselines": [baseline], "rows": rows, "cost": cost, "best": best_lengths(planted, timed, clips)}


def best_lengths(planted: Sequence[tuple[Mode, float]], timed: Mapping[Any, Timed], clips: Sequence[str]) -> list[dict[str, Any]]:
    """Of each drafter and rate the length that is fastest end to end, measured on the clips that did not choose it."""
    groups: dict[tuple[str, float], list[tuple[Mode, float]]] = {}
    for mode, rate in planted:
        groups.setdefault((mode.draft, rate), []).append((mode, rate))
    found, whats = [], {"speedup": lambda g: g.total_ms, "decode_speedup": lambda g: g.decode_ms}
    for (draft, rate), some in groups.items():
        best = timing.fastest([timed[key] for key in some], timed["plain"], clips, whats["speedup"])
        row = {"draft": draft, "planted_acceptance": rate, "num_draft_tokens": some[best.best][0].num_draft_tokens}
        row |= {"chosen": [some[i][0].num_draft_tokens for i in best.chosen]}
        found.append(row | {k: timing.speedup(timed["plain"], best.runs, clips, what) for k, what in whats.items()})
    return found


def tables(result: dict[str, Any]) -> list[Table]:
    cost, base = result["cost"], result["baselines"][0]
    size = f"{base['prompts']} prompts, {base['tokens']:,} tokens"
    header = ["drafts, a round", "PLANTED acceptance", "kept of those reached", "tokens per pass", "end to end", "decoding", "corrected"]
    rows = [
        [
            f"{r['draft']}, {r['num_draft_tokens']}",
            f"{r['planted_acceptance']:g}",
            f"{r['acceptance_rate']['value']:.3f}",
            f"{r['tokens_per_pass']:.2f}",
            rate_text(r["speedup"], 2, unit="x"),
            rate_text(r["decode_speedup"], 2, unit="x"),
            "-" if r["corrected_speedup"] is None else f"{r['corrected_speedup']:.2f} ({r['corrected_error']:+.0%})",
        ]
        for r in result["rows"]
    ]
    best = [
        [
            r["draft"],
            f"{r['planted_acceptance']:g}",
            str(r["num_draft_tokens"]),
            rate_text(r["speedup"], 2),
            rate_text(r["decode_speedup"], 2),
        ]
        for r in result["best"]
    ]
    costs = [
        ["one step of Video-LLaVA, head included, ms", f"{cost['t_target_ms']:.3f}"],
        ["hidden adapter, one token, ms", f"{cost['t_adapter_ms']:.3f}"],
        ["chained adapter, one token, ms", "-" if cost["t_chained_ms"] is None else f"{cost['t_chained_ms']:.3f}"],
        ["target's head, one token, ms", f"{cost['t_head_ms']:.3f}"],
        *machine_rows(cost),
        *[[f"v({k}), steps", f"{v:.3f}"] for k, v in cost["v"].items()],
    ]
    return [
        (f"PLANTED acceptance, drafts kept by chance: only the wall clock is real. {size}", header, rows),
        (
            "The best length at each planted acceptance, chosen on one half of the clips and timed on the other, both ways",
            ["drafts", "PLANTED acceptance", "a round", "end to end", "decoding"],
            best,
        ),
        ("Costs (medians)", ["part", ""], costs),
    ]


def machine_rows(cost: dict[str, Any]) -> list[list[str]]:
    """What `timing.machine_costs` found, for a table of two columns."""
    b = cost["bandwidth"]
    return [
        [
            "memory read by that step, and what a plain copy reaches",
            f"{b['step_bytes'] / 1e9:.3g} GB at {b['step_gb_per_s']:.4g} GB/s, {b['share']:.0%} of {b['copy_gb_per_s']:.4g} GB/s",
        ],
        *[
            [f"EventGPT up to layer {k}: one step, ms; c, steps", f"{e['t_draft_ms']:.3f}; {e['c']:.3f}"]
            for k, e in cost["exit_layers"].items()
        ],
    ]


def write(result: dict[str, Any], out: Path) -> None:
    meta = result["meta"]
    lines = [f"# Planted acceptance: {meta['device']}, {meta['dtype']}, {meta['created']}", "", (__doc__ or "").strip()]
    for title, header, rows in tables(result):
        lines += ["", f"## {title}", "", markdown_table(header, rows)]
    write_text(out / "planted.md", "\n".join(lines) + "\n")
    write_hashed_json(out / "planted.json", result, ("planted.md",))


def show(result: dict[str, Any]) -> None:
    for title, header, rows in reversed(tables(result)):
        print_table(title, header, rows)
