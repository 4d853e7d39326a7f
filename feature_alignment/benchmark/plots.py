"""The pictures of a benchmark. Each says what it shows, of how many, in its own caption. Colours are safe for the colour-blind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from feature_alignment.benchmark import speed_model
from feature_alignment.benchmark.rows import row_name
from feature_alignment.decoding.generation import Generation
from feature_alignment.measurement.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, plt, save

STAGE_COLOURS = {
    "target_prefill": "#999999",
    "draft_prefill": "#CCCCCC",
    "draft": "#0072B2",
    "adapter": "#56B4E9",
    "head": "#009E73",
    "verify": "#E69F00",
    "accept": "#F0E442",
    "rollback": "#CC79A7",
    "recompute": "#D55E00",
}
PICTURES = ("speedup", "by_length", "map", "timeline", "stages")


def all_of_them(result: dict[str, Any], shown: dict[str, Generation], out: Path) -> None:
    """shown: name -> a generation of the same prompt, for the timeline"""
    speedup_bars(result["rows"], out / "speedup.png")
    speedup_by_length(result["rows"], out / "by_length.png")
    break_even_map(result["rows"], result["cost"], out / "map.png")
    timeline(shown, out / "timeline.png")
    stage_stack(result["baselines"][0], result["rows"], out / "stages.png")


def speedup_by_length(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-up in decoding against the number of drafts: measured, by TASKS.md's formula, by the corrected one."""
    rows = [r for r in rows if r["accept"] == "token" and not r["adaptive"] and r["corrected_speedup"] and r["exit_layer"] is None]
    lengths = {draft: sum(r["draft"] == draft for r in rows) for draft in dict.fromkeys(r["draft"] for r in rows)}
    figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for (draft, number), colour in zip(((d, n) for d, n in lengths.items() if n > 1), (BLUE, VERMILION, GREEN), strict=False):
        mine = sorted((r for r in rows if r["draft"] == draft), key=lambda r: r["num_draft_tokens"])
        x = [r["num_draft_tokens"] for r in mine]
        value = np.array([r["decode_speedup"]["value"] for r in mine])
        ends = np.array([[np.nan if e is None else e for e in r["decode_speedup"]["ci95"]] for r in mine])
        error = np.nan_to_num(np.abs(ends - value[:, None])).T
        axis.errorbar(x, value, error, color=colour, marker="o", capsize=3, label=f"{draft}, measured ({number} lengths)")
        for key, style, name in (("corrected_speedup", "--", "corrected formula"), ("modelled_speedup", ":", "TASKS.md's formula")):
            if all(r[key] for r in mine):
                axis.plot(x, [r[key] for r in mine], style, color=colour, label=f"{draft}, {name}")
    axis.axhline(1.0, color=GREY)
    axis.set(xlabel="drafts per verification", ylabel="speed-up, decoding alone", title="Measured (bars: 95 % by clip) and modelled")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    save(figure, path)


def break_even_map(rows: list[dict[str, Any]], cost: dict[str, Any], path: Path) -> None:
    """S over acceptance and draft length by the corrected formula, one panel per kind of draft, with what was measured on it."""
    figure, axes = plt.subplots(
        1, max(1, len(cost["bound"])), figsize=(5.4 * max(1, len(cost["bound"])), 4.6), layout="constrained", squeeze=False
    )
    acceptance, lengths = np.linspace(0, 0.99, 100), np.arange(1, 17)
    for axis, (draft, b) in zip(axes[0], cost["bound"].items(), strict=False):
        s = np.array(
            [[speed_model.speedup_at(a, int(g), speed_model.RoundCost(b["c"], b["r"]), cost) for a in acceptance] for g in lengths]
        )
        image = axis.pcolormesh(acceptance, lengths, s, cmap="cividis", shading="nearest", vmin=0.3, vmax=4)
        lines = axis.contour(acceptance, lengths, s, levels=[1.0, 1.3, 1.5], colors="white", linestyles=["-", "--", ":"])
        axis.clabel(lines, fmt="%.1fx")
        for r in rows:
            if r["draft"] == draft and r["accept"] == "token" and not r["adaptive"] and r["exit_layer"] is None:
                at = (r["acceptance_rate"]["value"], r["num_draft_tokens"])
                axis.plot(*at, "o", color=VERMILION, markeredgecolor="white")
                text = f"{r['decode_speedup']['value']:.2f}x"
                axis.annotate(text, at, xytext=(-6, 5), textcoords="offset points", ha="right", color="white")
        axis.set(xlabel="acceptance rate of a draft", ylabel="drafts per verification", title=f"{draft} drafts, c = {b['c']:.3f} passes")
        figure.colorbar(image, ax=axis, label="speed-up, decoding alone")
    figure.suptitle("Where drafting pays: S = E / (g c + v(g + 1) + r); points: measured", fontsize=11)
    save(figure, path)


def timeline(shown: dict[str, Generation], path: Path) -> None:
    """One prompt, from real time stamps: what each model did when."""
    lanes = [(name, side) for name, g in shown.items() for side in ("Video-LLaVA", "drafter") if g.rounds or side == "Video-LLaVA"]
    figure, axis = plt.subplots(figsize=(11, 0.62 * len(lanes) + 1.7), layout="constrained")
    drafting = {"draft_prefill", "draft", "adapter", "head"}
    for name, g in shown.items():
        for stage, begin, end in g.spans:
            kind, _, beside = stage.partition(", ")
            if kind == "draft_prefill" and not beside and any(s.endswith("beside") for s, *_ in g.spans):
                continue  # only waited for what ran beside
            y = lanes.index((name, "drafter" if kind in drafting else "Video-LLaVA"))
            axis.barh(y, end - begin, left=begin, height=0.8, color=STAGE_COLOURS[kind], edgecolor="white", linewidth=0.2)
        axis.text(g.total_ms, lanes.index((name, "Video-LLaVA")), f"  {g.total_ms:.0f} ms", va="center")
    axis.set_yticks(range(len(lanes)), [f"{name}: {side}" for name, side in lanes])
    axis.invert_yaxis()
    axis.margins(x=0.08)
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour, label=stage.replace("_", " ")) for stage, colour in STAGE_COLOURS.items()]
    figure.legend(handles=patches, ncols=len(patches), fontsize=7, loc="outside lower center")
    tokens = len(next(iter(shown.values())).token_ids)
    axis.set(xlabel="milliseconds", title=f"One prompt, {tokens} tokens, drawn from its time stamps")
    save(figure, path)


def speedup_bars(rows: list[dict[str, Any]], path: Path) -> None:
    """Measured speed-up of every mode with its interval, end to end and in decoding alone."""
    figure, axis = plt.subplots(figsize=(9, 0.5 * len(rows) + 1.6), layout="constrained")
    y = np.arange(len(rows))
    for key, colour, shift, label in (("speedup", BLUE, 0.2, "end to end"), ("decode_speedup", ORANGE, -0.2, "decoding alone")):
        value = np.array([r[key]["value"] for r in rows])
        ends = np.array([[np.nan if e is None else e for e in r[key]["ci95"]] for r in rows])
        error = np.nan_to_num(np.abs(ends - value[:, None])).T
        axis.barh(y + shift, value, 0.38, xerr=error, color=colour, label=label, ecolor="#333333", capsize=2)
    axis.set_yticks(y, [row_name(r) + " drafts" + ("" if r["accept"] == "token" else " (lossy)") for r in rows])
    axis.invert_yaxis()
    axis.axvline(1.0, color=GREY)
    axis.axvline(1.3, color=GREY, linestyle=":")
    axis.set(xlabel="speed-up over plain greedy (bars: 95 % by clip; dotted: the target)")
    axis.legend()
    save(figure, path)


def stage_stack(baseline: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Where the milliseconds of one prompt go, per mode."""
    n = baseline["prompts"]
    bars = [("plain greedy", {"target_prefill": baseline["prefill_ms"] / n, "verify": baseline["decode_ms"] / n})]
    bars += [(row_name(r), r["ms"]) for r in rows]
    figure, axis = plt.subplots(figsize=(9, 0.4 * len(bars) + 1.6), layout="constrained")
    left = np.zeros(len(bars))
    for stage, colour in STAGE_COLOURS.items():
        width = np.array([ms.get(stage, 0.0) for _, ms in bars])
        axis.barh([name for name, _ in bars], width, left=left, color=colour, label=stage.replace("_", " "))
        left += width
    axis.invert_yaxis()
    axis.set(xlabel=f"milliseconds per prompt, mean over {n} prompts")
    axis.legend(ncols=1, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)
