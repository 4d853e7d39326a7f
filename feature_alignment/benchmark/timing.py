"""Measuring speed: what one step costs, and how long methods take on the same prompts in one process.

Ratios are sums over sums, intervals resample clips, methods take turns on every prompt so that drift hits all alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from feature_alignment.adapters.attending import AttendingAdapter
from feature_alignment.adapters.attending_drafts import FoldedAttending
from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.hidden import HiddenAdapter, call_ms
from feature_alignment.adapters.tables import NO_TOKEN, SOURCES
from feature_alignment.cli.config import Steps
from feature_alignment.decoding.generation import Generation
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.inputs.samples import Sample
from feature_alignment.measurement.lexicon import Lexicon
from feature_alignment.measurement.metrics import Counts
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.fixed import captured
from feature_alignment.models.state import Prompt

VERIFIED = (*range(1, 13), 16, 20, 24, 28, 32)


@dataclass
class Timed:
    """All runs of one method: generations[prompt][repeat]."""

    generations: list[list[Generation]] = field(default_factory=list)

    def per_prompt(self, what: Callable[[Generation], float]) -> np.ndarray:
        """Mean over all repeats, per prompt: [n] float64. A ratio of sums of these is one of sums over all runs."""
        return np.array([statistics.fmean(what(g) for g in runs) for runs in self.generations])

    @property
    def every(self) -> list[Generation]:
        """All runs: of all prompts, all repeats."""
        return [g for runs in self.generations for g in runs]

    @property
    def texts(self) -> list[list[int]]:
        """Of the first repeat."""
        return [runs[0].token_ids for runs in self.generations]


def run_in_turns(
    methods: dict[Hashable, Callable[[int], Generation]], num_prompts: int, repeats: int, progress: Callable
) -> dict[Hashable, Timed]:
    """Every method on every prompt, `repeats` times, the order rotating."""
    timed = {name: Timed([[] for _ in range(num_prompts)]) for name in methods}
    names = list(methods)
    for i in progress(range(num_prompts)):
        for repeat in range(repeats):
            turn = (i + repeat) % len(names)
            for name in names[turn:] + names[:turn]:
                timed[name].generations[i].append(methods[name](i))
    return timed


def speedup(baseline: Timed, method: Timed, clips: Sequence[str], what: Callable[[Generation], float]) -> dict[str, Any]:
    """Σ baseline ms / Σ method ms with its interval, P50 and P95 of the per-prompt ratio, and the share of slower prompts."""
    a, b = baseline.per_prompt(what), method.per_prompt(what)
    ratios = a / b
    return Counts(a, b).rate(clips) | {
        "p50": float(np.percentile(ratios, 50)),
        "p05": float(np.percentile(ratios, 5)),
        "p95": float(np.percentile(ratios, 95)),
        "share_slower": float((ratios < 1).mean()),
    }


@dataclass(frozen=True)
class Fastest:
    """The fastest of several methods, measured where it was not chosen.

    Args:
        best: index of the method that is fastest on all clips
        chosen: index chosen on each half of the clips
        runs: of each prompt the runs of the method that was chosen on the half its clip is not in
    """

    best: int
    chosen: tuple[int, int]
    runs: Timed


def fastest(methods: Sequence[Timed], baseline: Timed, clips: Sequence[str], what: Callable[[Generation], float]) -> Fastest:
    """Choose on one half of the clips, measure on the other, both ways. An interval taken on the clips that chose the maximum would
    lie too high. With one clip there is nothing to choose on: that clip both chooses and measures, and has no interval."""
    order = {clip: number for number, clip in enumerate(dict.fromkeys(clips))}
    half = np.array([order[clip] % 2 for clip in clips])
    gains = np.stack([m.per_prompt(what) for m in methods]), baseline.per_prompt(what)

    def best_on(some: np.ndarray) -> int:
        return int((gains[1][some].sum() / gains[0][:, some].sum(1)).argmax())

    everywhere = np.ones(len(half), dtype=bool)
    chosen = (best_on(half == 0), best_on(half == 1)) if len(order) > 1 else (best_on(everywhere),) * 2
    runs = [methods[chosen[1 - h]].generations[i] for i, h in enumerate(half)]
    return Fastest(best_on(everywhere), chosen, Timed(runs))


@torch.inference_mode()
def step_ms(model: Decoder, prompt: Prompt, numbers: Sequence[int] = (1,), repeats: int = 40, says: bool = False) -> dict[int, float]:
    """Number of new tokens behind a prompt -> median milliseconds of one forward pass over them, all numbers in turn; the cache is
    rolled back untimed.

    says: the head and the argmax behind every token are part of it, as in decoding
    """
    watch = Stopwatch(model.device)
    state = model.prefill([prompt])
    times: dict[int, list[float]] = {k: [] for k in numbers}
    for i in range(repeats + 5):
        for k in numbers:
            ids = torch.full((1, k), 5, device=model.device)
            start = watch.now()
            hidden = model.step(state, ids)
            if says:
                model.lm_head(hidden).argmax(-1).tolist()
            end = watch.now()
            model.rollback(state, k)
            if i >= 5:
                times[k].append(end - start)
    return {k: statistics.median(found) for k, found in times.items()}


@torch.inference_mode()
def hidden_ms(adapter: HiddenAdapter, repeats: int = 200, steps: Steps = "eager") -> float:
    """Median milliseconds of the hidden adapter on one state, stepping as decoding does."""
    like = adapter.down.weight
    state = torch.randn(1, adapter.d_draft, device=like.device, dtype=like.dtype)
    call = captured(adapter, steps)
    return call_ms(lambda: call(state), repeats, like.device.type)


@torch.inference_mode()
def chained_ms(adapter: ChainedAdapter, repeats: int = 200, steps: Steps = "eager") -> float:
    """Median milliseconds of one chained draft without the head: the last state and token read, the next state expected."""
    like = adapter.out.bias
    size = adapter.geometry
    events = torch.randn(1, size["num_events"], size["d_event"], device=like.device, dtype=like.dtype)
    state, token = events.new_ones(1, 1, size["d_target"]), events.new_ones(1, 1, size["width"])
    seen, memory = adapter.encode_events(events), token[:, 0]
    draft = captured(lambda state, token, memory: adapter.predict(adapter.read(state, token, memory), seen), steps)
    return call_ms(lambda: draft(state, token, memory), repeats, like.device.type)


@torch.inference_mode()
def attending_ms(adapter: AttendingAdapter, repeats: int = 200) -> float:
    """Median milliseconds of one draft of an attending adapter without the head: a draft token read, the next state expected."""
    like, size, n = adapter.out.bias, adapter.geometry, adapter.num_prompt
    new = lambda *shape: torch.randn(*shape, device=like.device, dtype=like.dtype)  # noqa: E731
    folded = FoldedAttending(adapter, new(int(adapter.ids.max()) + 1, size["d_target"]), new(16, size["d_target"]))
    folded.start(new(1, size["num_events"], size["d_event"]))
    folded.read_prompt(new(n, size["d_target"]), [3] * (n + 1))
    none, two = [(NO_TOKEN, 0)] * SOURCES, torch.tensor([3, 4], device=like.device)
    output = folded.read(0, new(1, size["d_target"]), two, [none])
    return call_ms(lambda: folded.go_on(1, output, two, none), repeats, like.device.type)


@torch.inference_mode()
def costs(
    target: Decoder, draft: Decoder, adapter: HiddenAdapter, chained: ChainedAdapter | None, target_prompt: Prompt, draft_prompt: Prompt
) -> dict[str, Any]:
    """What each part of a round costs in a loop of its own, whose caches are warm: milliseconds of the parts, and under "loop" the
    target's step there, v(k) in such steps (head and argmax included) and one draft token in such steps: aligned, c = (draft step +
    adapter + head) / target step, chained, c_chained = (chained adapter + head) / target step. What decoding spends is measured in
    its own rounds: `speed_model.Costs`."""
    device, repeats = target.device.type, 200
    steps = step_ms(target, target_prompt, VERIFIED, says=True)
    state = torch.randn(1, draft.hidden_size, device=target.device, dtype=target.head_weight.dtype)
    aligned = adapter(state)
    t_adapter = hidden_ms(adapter, repeats, draft.steps)
    t_head = call_ms(lambda: target.lm_head(aligned).argmax(-1), repeats, device)
    t_draft = step_ms(draft, draft_prompt)[1]
    t_chained = None if chained is None else chained_ms(chained, steps=draft.steps)
    return {
        "t_draft_ms": t_draft,
        "t_adapter_ms": t_adapter,
        "t_chained_ms": t_chained,
        "t_head_ms": t_head,
        "loop": {
            "t_target_ms": steps[1],
            "c": (t_draft + t_adapter + t_head) / steps[1],
            "c_chained": None if t_chained is None else (t_chained + t_head) / steps[1],
            "v": {str(k): ms / steps[1] for k, ms in steps.items()},
        },
    }


@torch.inference_mode()
def machine_costs(
    target: Decoder, draft: Decoder, cost: dict[str, Any], target_prompt: Prompt, draft_prompt: Prompt, layers: Iterable[int] = ()
) -> dict[str, Any]:
    """What an early exit saves, and how near a step of the target comes to the machine's memory bandwidth.

    draft:  at full depth; cost: what `costs` found; the adapter's cost there is taken for all exits
    layers: exits to measure beside layers 1, 2, 4, … and the last
    """
    depth, taps = draft.num_layers, draft.taps
    exits, rest_ms = {}, cost["t_adapter_ms"] + cost["t_head_ms"]
    try:
        for k in sorted({depth, *layers, *(2**i for i in range(depth.bit_length()) if 2**i <= depth)}):
            draft.llama.config.num_hidden_layers, draft.taps = k, (k,)
            draft.use_steps(draft.steps)
            ms = step_ms(draft, draft_prompt, repeats=20)[1]
            exits[str(k)] = {"t_draft_ms": ms, "c": (ms + rest_ms) / cost["loop"]["t_target_ms"]}
    finally:
        draft.llama.config.num_hidden_layers, draft.taps = depth, taps
        draft.use_steps(draft.steps)
    state = target.prefill([target_prompt])
    weights = [*target.llama.layers.parameters(), *target.llama.norm.parameters(), target.head_weight]
    cached = 2 * target.num_layers * state.length * target.llama.config.num_key_value_heads * target.llama.layers[0].self_attn.head_dim
    step_bytes = sum(x.numel() * x.element_size() for x in weights) + cached * target.head_weight.element_size()
    source = torch.zeros(1 << (31 if target.device.type == "cuda" else 27), dtype=torch.uint8, device=target.device)
    copy = torch.empty_like(source)
    copy_gb_per_s = 2 * source.numel() / 1e6 / call_ms(lambda: copy.copy_(source), 10, target.device.type, warmup=3)
    reached = step_bytes / 1e6 / cost["loop"]["t_target_ms"]
    bandwidth = {"step_bytes": step_bytes, "step_gb_per_s": reached, "copy_gb_per_s": copy_gb_per_s, "share": reached / copy_gb_per_s}
    return {"exit_layers": exits, "bandwidth": bandwidth}


@torch.inference_mode()
def mismatches(target: Decoder, prompts: Sequence[Prompt], samples: Sequence[Sample], texts: Timed, plain: Timed) -> list[dict[str, Any]]:
    """Where a text first leaves the target's own, and how near the target's two best tokens were there (logits): rounding in low
    precision can turn over a small gap, and only a small one."""
    found = []
    for prompt, sample, runs, own in zip(prompts, samples, texts.generations, plain.texts, strict=True):
        for text in sorted({tuple(g.token_ids) for g in runs} - {tuple(own)}):  # repeats may differ, each text is named once
            at = next((i for i, (a, b) in enumerate(zip(text, own, strict=False)) if a != b), min(len(text), len(own)))
            ids = torch.tensor([own], device=target.device)
            logits = target.lm_head(target.teacher_force(target.prefill([prompt]), ids))[0, min(at, len(own) - 1)]
            best = logits.float().topk(2).values
            found.append({"sample": sample.id, "position": at, "top2_gap": float(best[0] - best[1])})
    return found


def log_likelihoods(target: Decoder, prompts: Sequence[Prompt]) -> Callable[[int, tuple[int, ...]], float]:
    """(prompt, text) -> the target's log-probability of the text behind the prompt, computed once for each."""

    @cache
    @torch.inference_mode()
    def log_likelihood(i: int, tokens: tuple[int, ...]) -> float:
        ids = torch.tensor([tokens], device=target.device)
        log_p = target.lm_head(target.teacher_force(target.prefill([prompts[i]]), ids)).float().log_softmax(-1)
        return float(log_p.gather(-1, ids[..., None]).sum())

    return log_likelihood


def fidelity(
    target: Decoder,
    log_likelihood: Callable[[int, tuple[int, ...]], float],
    samples: Sequence[Sample],
    texts: Timed,
    plain: Timed,
    lexicon: Lexicon | None = None,
) -> dict[str, Any]:
    """How a method's texts differ from the target's own: exact match, token agreement, log-likelihood, true facts, kept drafts.

    token_agreement: same token at the same place, over the longer text; log_likelihood: (prompt, text) -> the target's log-probability
    of the text, reported per token; kept_differently: accepted draft tokens the target would not have said, as synonyms or
    errors; lexicon: which words state which facts; without it, or without facts of every sample, facts and synonyms are not reported
    """
    clips = [s.sequence for s in samples]
    own = [tokens for tokens, runs in zip(plain.texts, texts.generations, strict=True) for _ in runs]
    pairs = [(g.token_ids, tokens) for g, tokens in zip(texts.every, own, strict=True)]
    prompt_of = [i for i, runs in enumerate(texts.generations) for _ in runs]

    def rate(count: list[float], total: list[float]) -> dict[str, Any]:
        """Sums over all repeats of a prompt, as every figure of a row."""
        summed = (np.bincount(prompt_of, values, len(clips)) for values in (count, total))
        return Counts(*summed).rate(clips)

    report: dict[str, Any] = {
        "exact_match": rate([float(a == b) for a, b in pairs], [1.0] * len(pairs)),
        "token_agreement": rate(
            [float(sum(x == y for x, y in zip(a, b, strict=False))) for a, b in pairs], [float(max(len(a), len(b))) for a, b in pairs]
        ),
        "log_likelihood": rate(
            [log_likelihood(i, tuple(a)) for i, (a, _) in zip(prompt_of, pairs, strict=True)], [float(len(a)) for a, _ in pairs]
        ),
    }
    if lexicon and all(s.facts for s in samples):
        report |= _judged_by(lexicon, target, samples, texts)
    return report


def _judged_by(lexicon: Lexicon, target: Decoder, samples: Sequence[Sample], texts: Timed) -> dict[str, Any]:
    """Share of stated facts that are true, of slots that events show and hide, and accepted draft tokens that differ from the target's."""
    decode = target.tokenizer.decode
    true, told = {k: np.zeros(len(samples)) for k in ("visible", "hidden")}, {k: np.zeros(len(samples)) for k in ("visible", "hidden")}
    kinds = {"kept": 0, "same": 0, "synonym": 0, "error": 0}
    for i, sample in enumerate(samples):
        for g in texts.generations[i]:
            for slot, value in lexicon.facts_in(decode(g.token_ids, skip_special_tokens=True)).items():
                kind = "hidden" if slot in lexicon.hidden_from_events else "visible"
                told[kind][i] += 1
                true[kind][i] += (sample.facts or {}).get(slot) == value
        for r in (r for g in texts.generations[i] for r in g.rounds):
            for drafted, said, kept in zip(r.proposed, r.target_tokens, r.accepted, strict=True):
                if kept:
                    kinds["kept"] += 1
                    fact = lexicon.fact_of(decode([drafted]))
                    same_fact = fact is not None and fact == lexicon.fact_of(decode([said]))
                    kinds["same" if drafted == said else "synonym" if same_fact else "error"] += 1
    clips = [s.sequence for s in samples]
    return {f"true_facts_{k}": Counts(true[k], told[k]).rate(clips) for k in true} | {"kept_drafts": kinds}
