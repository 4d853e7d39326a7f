"""lossy_rules.json: every lossy rule over a range of thresholds, its texts compared with plain greedy decoding.

A cosine rule is worth having only if it accepts more at equal fidelity than a rule that needs no adapter, so all rules verify the same
drafter at the same draft length on the same prompts. Nothing here is timed, and nothing here is lossless but the rule `token`.

A run whose recorded scores lead to the same decisions at the next threshold is that threshold's run too, so it is not decoded again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from feature_alignment.benchmark import fidelity
from feature_alignment.benchmark.results import Fidelity, rule_name
from feature_alignment.benchmark.rows import Mode, acceptance_of
from feature_alignment.benchmark.run import Measurements, speculative
from feature_alignment.benchmark.timing import Timed
from feature_alignment.cli.console import progress
from feature_alignment.decoding.acceptance import accepted_drafts
from feature_alignment.decoding.generation import Generation
from feature_alignment.decoding.settings import RuleName
from feature_alignment.measurement.metrics import Counts, Rate
from feature_alignment.measurement.records import Record

MOST_PROMPTS = 16
COSINES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
THRESHOLDS: dict[RuleName, tuple[float, ...]] = {  # strict to loose
    "feature": COSINES,
    "relaxed": COSINES,
    "typical": (0.5, 0.25, 0.09, 0.03, 0.01, 1e-3, 1e-4),
    "kl": (0.03, 0.1, 0.3, 1.0, 2.0, 4.0, 8.0),
}


@dataclass(frozen=True)
class SweepPoint(Record):
    """A rule at one threshold.

    Args:
        accept: name of the rule
        threshold: its threshold; None for `token`
        tokens_per_pass: tokens after the first / passes of the target
        acceptance_rate: accepted / reached draft tokens
        fidelity: comparison of the texts with plain greedy decoding
    """

    accept: str
    threshold: float | None
    tokens_per_pass: Rate
    acceptance_rate: Rate
    fidelity: Fidelity

    @property
    def name(self) -> str:
        """The rule with its threshold, e.g. "kl < 0.1"."""
        return rule_name(self.accept, self.threshold)


@dataclass(frozen=True)
class LossySweep(Record):
    """Content of lossy_rules.json, next to its provenance.

    Args:
        draft, num_draft_tokens: what all rules verify
        prompts, tokens: number of prompts, and of tokens of plain greedy decoding
        lossless: the rule `token`
        points: the lossy rules, each from strict to loose
    """

    draft: str
    num_draft_tokens: int
    prompts: int
    tokens: int
    lossless: SweepPoint
    points: list[SweepPoint]

    def of_rule(self, accept: str) -> list[SweepPoint]:
        """The points of one rule, from strict to loose."""
        return [p for p in self.points if p.accept == accept]

    @property
    def rules(self) -> list[str]:
        """Names of the lossy rules."""
        return list(dict.fromkeys(p.accept for p in self.points))


def sweep(found: Measurements, max_new_tokens: int) -> LossySweep:
    """Decode up to `MOST_PROMPTS` prompts, spread over those of the benchmark, with every lossy rule of its first drafter.

    Args:
        found: timed runs; the `token` row of the same draft length and plain decoding are taken from them
        max_new_tokens: longest answer, EOS included
    """
    setup, chosen = found.setup, spread(len(found.setup.prompts))
    rows = {m.accept: m for m in setup.modes if m.draft == setup.modes[0].draft and m.accept != "token"}
    lossy = [replace(row, threshold=t) for rule, row in rows.items() for t in THRESHOLDS[rule]]
    lossless = replace(lossy[0], accept="token", threshold=None)
    runs: dict[Mode, Timed] = {mode: Timed() for mode in lossy}
    for i in progress(chosen, desc="lossy rules", unit="prompt"):
        for rule in rows:
            modes = [m for m in lossy if m.accept == rule]
            decode = [functools.partial(speculative(setup, m, max_new_tokens), i) for m in modes]
            for mode, text in zip(modes, decode_range(rule, THRESHOLDS[rule], decode), strict=True):
                runs[mode].generations.append([text])
    plain, exact = (Timed([timed.generations[i][:1] for i in chosen]) for timed in (found.plain, found.timed[lossless]))
    return LossySweep(
        draft=lossless.draft,
        num_draft_tokens=lossless.num_draft_tokens,
        prompts=len(chosen),
        tokens=sum(map(len, plain.texts)),
        lossless=point_of(found, chosen, plain, lossless, exact),
        points=[point_of(found, chosen, plain, mode, timed) for mode, timed in runs.items()],
    )


def spread(total: int) -> list[int]:
    """Indices of at most `MOST_PROMPTS` of so many prompts."""
    number = min(MOST_PROMPTS, total)
    return [i * total // number for i in range(number)]


def decode_range(rule: RuleName, thresholds: Sequence[float], decode: Sequence[Callable[[], Generation]]) -> list[Generation]:
    """The generation of one prompt at each threshold; those that decide alike share one.

    Args:
        rule: name of a lossy rule
        thresholds: of the rule
        decode: decodes the prompt at each of them
    """
    texts: list[Generation] = []
    for threshold, run in zip(thresholds, decode, strict=True):
        known = (g for g, t in zip(texts, thresholds, strict=False) if decides_alike(g, rule, t, threshold))
        texts.append(next(known, None) or run())
    return texts


def decides_alike(g: Generation, rule: RuleName, threshold: float, other: float) -> bool:
    """Whether every round of a generation, decoded at one threshold, has the same decisions at another: then so has the whole text."""

    def decisions(score: torch.Tensor, at: float) -> list[bool]:
        none = score.new_zeros(len(score), dtype=torch.long)  # lossy rules do not compare token ids
        return accepted_drafts(rule, none, none, score, at).tolist()

    scores = [torch.tensor(r.score) for r in g.rounds if r.score]
    return all(decisions(score, threshold) == decisions(score, other) for score in scores)


def point_of(found: Measurements, chosen: Sequence[int], plain: Timed, mode: Mode, runs: Timed) -> SweepPoint:
    """One point of the sweep.

    Args:
        found: for the target, the samples and the lexicon
        chosen: indices of the prompts
        plain: plain greedy decoding of them
        mode: rule and threshold
        runs: one run of each prompt
    """
    samples = [found.setup.samples[i] for i in chosen]
    clips = [s.sequence for s in samples]
    emitted, passes = (np.array(column, float) for column in zip(*((len(g.token_ids) - 1, g.passes) for g in runs.every), strict=True))
    return SweepPoint(
        accept=mode.accept,
        threshold=mode.threshold,
        tokens_per_pass=Counts(emitted, passes).rate(clips),
        acceptance_rate=acceptance_of(runs, clips, mode.accept),
        fidelity=fidelity.fidelity(
            found.setup.pair.target,
            lambda i, tokens: found.log_likelihood(chosen[i], tokens),
            samples,
            runs,
            plain,
            found.setup.lexicon,
        ),
    )
