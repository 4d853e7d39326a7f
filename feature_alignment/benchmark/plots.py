"""Pictures of a benchmark. The colors can be told apart by color-blind readers (Okabe and Ito)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt  # the Agg backend is set by measurement.plots
import numpy as np
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from feature_alignment.benchmark import speed_model
from feature_alignment.benchmark.costs import Bound, Cost
from feature_alignment.benchmark.profile import SpeculationProfile
from feature_alignment.benchmark.results import BenchmarkReport, BenchmarkRow, PlainBaseline
from feature_alignment.benchmark.sweep import LossySweep
from feature_alignment.decoding.generation import DRAFT_STAGES, Generation
from feature_alignment.decoding.settings import DEFAULT_THRESHOLDS
from feature_alignment.measurement.metrics import Rate
from feature_alignment.measurement.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, save

STAGE_COLORS = {
    "target_prefill": "#999999",
    "draft_prefill": "#CCCCCC",
    "draft": "#0072B2",
    "read": "#A6CEE3",
    "adapter": "#56B4E9",
    "head": "#009E73",
    "verify": "#E69F00",
    "accept": "#F0E442",
    "rollback": "#CC79A7",
    "recompute": "#D55E00",
}
PICTURES = ("speedup", "lossy_rules", "by_position", "by_length", "map", "timeline", "stages")
RULE_STYLES = {"feature": (BLUE, "o"), "relaxed": (ORANGE, "s"), "typical": (GREEN, "^"), "kl": (VERMILION, "D")}


def all_pictures(
    result: BenchmarkReport, profiles: Sequence[SpeculationProfile], sweep: LossySweep, shown: Mapping[str, Generation], out: Path
) -> None:
    """Draw all pictures.

    Args:
        result: content of benchmark.json
        profiles: content of speculation_profile.json
        sweep: content of lossy_rules.json
        shown: name -> a generation of the same prompt, for the timeline
        out: directory
    """
    lossy_rules(sweep, out / "lossy_rules.png")
    acceptance_by_position(profiles, out / "by_position.png")
    speedup_bars(result.rows, out / "speedup.png")
    speedup_by_length(result.rows, out / "by_length.png")
    break_even_map(result.rows, result.cost, out / "map.png")
    timeline(shown, out / "timeline.png")
    stage_stack(result.plain, result.rows, out / "stages.png")


def lossy_rules(sweep: LossySweep, path: Path) -> None:
    """Draw fidelity over tokens per pass, one line for each lossy rule from strict (left) to loose, and the lossless rule as a star."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharex=True)
    for axis, key, label in zip(axes, ("token_agreement", "log_likelihood"), ("token agreement", "log-likelihood per token"), strict=True):
        for rule in sweep.rules:
            points, (color, marker) = sweep.of_rule(rule), RULE_STYLES[rule]
            x, x_error = _values_and_errors([p.tokens_per_pass for p in points])
            y, y_error = _values_and_errors([getattr(p.fidelity, key) for p in points])
            axis.errorbar(x, y, y_error, x_error, color=color, marker=marker, markersize=4, linewidth=1.2, elinewidth=0.4, label=rule)
            for p in points:
                if p.threshold == DEFAULT_THRESHOLDS[rule]:
                    at = (p.tokens_per_pass.value, getattr(p.fidelity, key).value)
                    axis.plot(*at, marker, color=color, markersize=9, markeredgecolor="black")
        exact = sweep.lossless
        at = (exact.tokens_per_pass.value, getattr(exact.fidelity, key).value)
        axis.plot(*at, "*", color="black", markersize=14, label="token (lossless)")
        axis.axvline(at[0], color=GREY, linestyle=":")
        axis.set(xlabel="tokens per pass of the target", ylabel=f"{label}, against plain decoding" if axis is axes[0] else label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc="lower left")
    figure.suptitle(
        f"Lossy rules on {sweep.draft} draft tokens, {sweep.num_draft_tokens} a round, {sweep.prompts} prompts; large: default threshold; "
        "bars: 95 % intervals by clip",
        fontsize=10,
    )
    save(figure, path)


def acceptance_by_position(profiles: Sequence[SpeculationProfile], path: Path) -> None:
    """Draw marginal and conditional acceptance of each draft position, one line with intervals for each drafter."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharey=True)
    for axis, key, title in zip(
        axes,
        ("marginal_acceptance", "conditional_acceptance"),
        ("marginal: of all rounds", "conditional: of the rounds that reached it"),
        strict=True,
    ):
        for i, profile in enumerate(profiles):
            value, error = _values_and_errors(getattr(profile, key))
            x = np.arange(1, len(value) + 1) + 0.06 * (i - (len(profiles) - 1) / 2)
            label = f"{profile.draft}: {profile.mean_acceptance_length:.2f} tokens a round"
            axis.errorbar(x, value, error, color=f"C{i}", marker="o", markersize=4, capsize=2, label=label)
        axis.set(xlabel="position of the draft token in its round", title=title, ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share accepted (bars: 95 % intervals by clip)")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=4, fontsize=8, loc="outside lower center")
    save(figure, path)


def speedup_by_length(rows: Sequence[BenchmarkRow], path: Path) -> None:
    """Draw decoding speed-up by draft length: measured, by TASKS.md's formula, and by the corrected formula."""
    rows = [r for r in rows if _is_fixed_lossless(r) and r.corrected_speedup]
    lengths = {draft: sum(r.draft == draft for r in rows) for draft in dict.fromkeys(r.draft for r in rows)}
    figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for (draft, number), color in zip(((d, n) for d, n in lengths.items() if n > 1), (BLUE, VERMILION, GREEN), strict=False):
        of_draft = sorted((r for r in rows if r.draft == draft), key=lambda r: r.num_draft_tokens)
        x = [r.num_draft_tokens for r in of_draft]
        value, error = _values_and_errors([r.decode_speedup for r in of_draft])
        axis.errorbar(x, value, error, color=color, marker="o", capsize=3, label=f"{draft}, measured ({number} lengths)")
        for key, style, name in (("corrected_speedup", "--", "corrected formula"), ("modelled_speedup", ":", "TASKS.md's formula")):
            predicted = [getattr(r, key) for r in of_draft]
            if all(predicted):
                axis.plot(x, predicted, style, color=color, label=f"{draft}, {name}")
    axis.axhline(1.0, color=GREY)
    axis.set(xlabel="draft length", ylabel="speed-up, decoding alone", title="Measured (bars: 95 % intervals by clip) and modelled")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    save(figure, path)


def break_even_map(rows: Sequence[BenchmarkRow], cost: Cost, path: Path) -> None:
    """Draw S over acceptance and draft length by the corrected formula, one panel per adapter, and the measured rows as points."""
    bounds: dict[str, Bound] = cost.bound or {}
    panels = max(1, len(bounds))
    figure, axes = plt.subplots(1, panels, figsize=(5.4 * panels, 4.6), layout="constrained", squeeze=False)
    acceptance, lengths = np.linspace(0, 0.99, 100), np.arange(1, 17)
    for axis, (draft, b) in zip(axes[0], bounds.items(), strict=False):
        round_cost = speed_model.RoundCost(b.c, b.r)
        s = np.array([[speed_model.speedup_at(a, int(g), round_cost, cost.v) for a in acceptance] for g in lengths])
        image = axis.pcolormesh(acceptance, lengths, s, cmap="cividis", shading="nearest", vmin=0.3, vmax=4)
        lines = axis.contour(acceptance, lengths, s, levels=[1.0, 1.3, 1.5], colors="white", linestyles=["-", "--", ":"])
        axis.clabel(lines, fmt="%.1fx")
        for r in rows:
            if r.draft == draft and _is_fixed_lossless(r):
                at = (r.acceptance_rate.value, r.num_draft_tokens)
                axis.plot(*at, "o", color=VERMILION, markeredgecolor="white")
                text = f"{r.decode_speedup.value:.2f}x"
                axis.annotate(text, at, xytext=(-6, 5), textcoords="offset points", ha="right", color="white")
        axis.set(xlabel="acceptance rate of a draft token", ylabel="draft length", title=f"{draft}, c = {b.c:.3f} passes")
        figure.colorbar(image, ax=axis, label="speed-up, decoding alone")
    figure.suptitle("Predicted speed-up: S = E / (g c + v(g + 1) + r); points: measured", fontsize=11)
    save(figure, path)


def timeline(shown: Mapping[str, Generation], path: Path) -> None:
    """Draw the stages of one prompt from their time stamps.

    Args:
        shown: name -> a generation, all of the same prompt
        path: of the picture
    """
    lanes = [(name, side) for name, g in shown.items() for side in ("Video-LLaVA", "drafter") if g.rounds or side == "Video-LLaVA"]
    figure, axis = plt.subplots(figsize=(11, 0.62 * len(lanes) + 1.7), layout="constrained")
    drafting = {"draft_prefill", *DRAFT_STAGES}
    for name, g in shown.items():
        for stage, begin, end in g.spans:
            kind, _, is_parallel = stage.partition(", ")
            if kind == "draft_prefill" and not is_parallel and any(s.endswith("overlapped") for s, *_ in g.spans):
                continue  # This span only waited for the parallel one.
            y = lanes.index((name, "drafter" if kind in drafting else "Video-LLaVA"))
            axis.barh(y, end - begin, left=begin, height=0.8, color=STAGE_COLORS[kind], edgecolor="white", linewidth=0.2)
        axis.text(g.total_ms, lanes.index((name, "Video-LLaVA")), f"  {g.total_ms:.0f} ms", va="center")
    axis.set_yticks(range(len(lanes)), [f"{name}: {side}" for name, side in lanes])
    axis.invert_yaxis()
    axis.margins(x=0.08)
    patches = [Rectangle((0, 0), 1, 1, color=color, label=stage.replace("_", " ")) for stage, color in STAGE_COLORS.items()]
    figure.legend(handles=patches, ncols=len(patches), fontsize=7, loc="outside lower center")
    tokens = len(next(iter(shown.values())).token_ids)
    axis.set(xlabel="milliseconds", title=f"One prompt, {tokens} tokens, from its time stamps")
    save(figure, path)


def speedup_bars(rows: Sequence[BenchmarkRow], path: Path) -> None:
    """Draw the measured speed-up of every row with its interval, end to end and in decoding alone."""
    figure, axis = plt.subplots(figsize=(9, 0.5 * len(rows) + 1.6), layout="constrained")
    y = np.arange(len(rows))
    for key, color, shift, label in (("speedup", BLUE, 0.2, "end to end"), ("decode_speedup", ORANGE, -0.2, "decoding alone")):
        value, error = _values_and_errors([getattr(r, key) for r in rows])
        axis.barh(y + shift, value, 0.38, xerr=error, color=color, label=label, ecolor="#333333", capsize=2)
    axis.set_yticks(y, [r.name + ("" if r.accept == "token" else " (lossy)") for r in rows])
    axis.invert_yaxis()
    axis.axvline(1.0, color=GREY)
    axis.axvline(1.3, color=GREY, linestyle=":")
    axis.set(xlabel="speed-up over plain greedy decoding (bars: 95 % intervals by clip; dotted line: the goal)")
    axis.legend()
    save(figure, path)


def stage_stack(plain: PlainBaseline, rows: Sequence[BenchmarkRow], path: Path) -> None:
    """Draw the mean milliseconds of each stage, for plain greedy decoding and every row."""
    n = plain.prompts
    bars = [("plain greedy", {"target_prefill": (plain.prefill_ms or 0.0) / n, "verify": plain.decode_ms / n})]
    bars += [(r.name, r.ms) for r in rows]
    figure, axis = plt.subplots(figsize=(9, 0.4 * len(bars) + 1.6), layout="constrained")
    left = np.zeros(len(bars))
    for stage, color in STAGE_COLORS.items():
        width = np.array([ms.get(stage, 0.0) for _, ms in bars])
        axis.barh([name for name, _ in bars], width, left=left, color=color, label=stage.replace("_", " "))
        left += width
    axis.invert_yaxis()
    axis.set(xlabel=f"milliseconds per prompt, mean over {n} prompts")
    axis.legend(ncols=1, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)


def _is_fixed_lossless(row: BenchmarkRow) -> bool:
    return row.accept == "token" and not row.adaptive and row.exit_layer is None


def _values_and_errors(rates: Sequence[Rate]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values [n], and lengths of the error bars below and above them [2, n]; 0 without an interval."""
    value = np.array([r.value for r in rates])
    return value, np.nan_to_num(np.abs(np.array([r.ci95 for r in rates]) - value[:, None])).T
