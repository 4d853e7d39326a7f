"""Timing of single steps, and of whole methods on the same prompts in one process.

Methods take turns on every prompt, so that drift of the machine affects all of them alike. Ratios are sums over sums, and their
intervals resample clips.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feature_alignment.adapters.attending import AttendingAdapter
from feature_alignment.adapters.attending_drafts import FoldedAttending
from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.folded import FoldedChain
from feature_alignment.adapters.hidden import HiddenAdapter, call_ms
from feature_alignment.adapters.tables import NO_TOKEN, SOURCES
from feature_alignment.benchmark.costs import Bandwidth, ExitCost, LoopCosts, PartCosts
from feature_alignment.benchmark.results import Speedup
from feature_alignment.cli.config import Steps
from feature_alignment.decoding.generation import Generation
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.measurement.metrics import Counts
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.fixed import captured
from feature_alignment.models.state import Prompt

VERIFIED = (*range(1, 13), 16, 20, 24, 28, 32)  # numbers of tokens whose verification is timed
NUM_UNTIMED = 5  # steps before the timed ones
Method = TypeVar("Method", bound=Hashable)
Measure = Callable[[Generation], float]  # what is timed of a generation, in milliseconds


@dataclass
class Timed:
    """All runs of one method: generations[prompt][repeat]."""

    generations: list[list[Generation]] = field(default_factory=list)

    def per_prompt(self, measure: Measure) -> NDArray[np.float64]:
        """Mean over the repeats of each prompt, [n] float64; every prompt has the same number of repeats."""
        return np.array([statistics.fmean(measure(g) for g in runs) for runs in self.generations])

    @property
    def every(self) -> list[Generation]:
        """All repeats of all prompts."""
        return [g for runs in self.generations for g in runs]

    @property
    def texts(self) -> list[list[int]]:
        """Token ids of each prompt's first repeat."""
        return [runs[0].token_ids for runs in self.generations]


def total_ms(g: Generation) -> float:
    """Milliseconds end to end: vision, prefill and decoding."""
    return g.total_ms


def decode_ms(g: Generation) -> float:
    """Milliseconds of decoding alone."""
    return g.decode_ms


def run_in_turns(
    methods: Mapping[Method, Callable[[int], Generation]],
    num_prompts: int,
    repeats: int,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> dict[Method, Timed]:
    """Run every method on every prompt; the order of the methods rotates from repeat to repeat.

    Args:
        methods: name -> function that answers the i-th prompt
        num_prompts: prompts
        repeats: runs of each method on each prompt
        progress: wraps the prompt numbers in a progress bar; `iter` shows none
    """
    timed = {name: Timed([[] for _ in range(num_prompts)]) for name in methods}
    names = list(methods)
    for i in progress(range(num_prompts)):
        for repeat in range(repeats):
            turn = (i + repeat) % len(names)
            for name in names[turn:] + names[:turn]:
                timed[name].generations[i].append(methods[name](i))
    return timed


def speedup(baseline: Timed, method: Timed, clips: Sequence[str], measure: Measure) -> Speedup:
    """Speed-up Σ baseline ms / Σ method ms.

    Args:
        baseline: runs of the baseline
        method: runs of the method on the same prompts
        clips: clip of each prompt
        measure: `total_ms` or `decode_ms`
    """
    a, b = baseline.per_prompt(measure), method.per_prompt(measure)
    p05, p50, p95 = (float(p) for p in np.percentile(a / b, (5, 50, 95)))
    return Speedup(**vars(Counts(a, b).rate(clips)), p50=p50, p05=p05, p95=p95, share_slower=float((a / b < 1).mean()))


@dataclass(frozen=True)
class Fastest:
    """The fastest of several methods, measured on clips that did not choose it.

    Args:
        best: index of the method that is fastest on all clips
        chosen: index of the method chosen on each half of the clips
        runs: for each prompt, the runs of the method chosen on the half of the clips that does not hold the prompt's clip
    """

    best: int
    chosen: tuple[int, int]
    runs: Timed


def fastest(methods: Sequence[Timed], baseline: Timed, clips: Sequence[str], measure: Measure) -> Fastest:
    """Choose the fastest method on one half of the clips and measure it on the other, both ways.

    An interval on the clips that chose the maximum would be biased upwards. A single clip both chooses and measures, and has no interval.

    Args:
        methods: runs of each method
        baseline: runs of the baseline
        clips: clip of each prompt
        measure: `total_ms` or `decode_ms`
    """
    order = {clip: number for number, clip in enumerate(dict.fromkeys(clips))}
    half = np.array([order[clip] % 2 for clip in clips])
    times, baseline_times = np.stack([m.per_prompt(measure) for m in methods]), baseline.per_prompt(measure)

    def best_on(some: NDArray[np.bool_]) -> int:
        return int((baseline_times[some].sum() / times[:, some].sum(1)).argmax())

    everywhere = np.ones(len(half), dtype=bool)
    chosen = (best_on(half == 0), best_on(half == 1)) if len(order) > 1 else (best_on(everywhere),) * 2
    runs = [methods[chosen[1 - h]].generations[i] for i, h in enumerate(half)]
    return Fastest(best_on(everywhere), chosen, Timed(runs))


@torch.inference_mode()
def step_ms(model: Decoder, prompt: Prompt, numbers: Sequence[int] = (1,), repeats: int = 40, with_head: bool = False) -> dict[int, float]:
    """Median milliseconds of one forward pass over new tokens; the rollback of the cache is not timed.

    Args:
        model: model to time
        prompt: prompt that precedes the new tokens
        numbers: numbers of new tokens, which take turns
        repeats: timed passes for each number
        with_head: include the LM head and the argmax at every token, as in decoding

    Returns:
        number of new tokens -> milliseconds
    """
    watch = Stopwatch(model.device)
    state = model.prefill([prompt])
    times: dict[int, list[float]] = {k: [] for k in numbers}
    for i in range(repeats + NUM_UNTIMED):
        for k in numbers:
            ids = torch.full((1, k), 5, device=model.device)
            start = watch.now()
            hidden = model.step(state, ids)
            if with_head:
                model.lm_head(hidden).argmax(-1).tolist()
            end = watch.now()
            model.rollback(state, k)
            if i >= NUM_UNTIMED:
                times[k].append(end - start)
    return {k: statistics.median(found) for k, found in times.items()}


@torch.inference_mode()
def hidden_ms(adapter: HiddenAdapter, steps: Steps, repeats: int = 200) -> float:
    """Median milliseconds of the hidden adapter on one state, with `steps` as in decoding."""
    like = adapter.down.weight
    state = torch.randn(1, adapter.d_draft, device=like.device, dtype=like.dtype)
    call = captured(adapter, steps)
    return call_ms(lambda: call(state), repeats, like.device.type)


@torch.inference_mode()
def chained_ms(adapter: ChainedAdapter, steps: Steps, repeats: int = 200, head: Tensor | None = None) -> float:
    """Median milliseconds of one draft step of the chained adapter as decoding runs it: inside the adapter's own width.

    Args:
        adapter: the chained adapter
        steps: how it steps
        repeats: number of timed steps
        head: [v, d_target], the target's LM head; the step then includes logits and argmax
    """
    like, size = adapter.out.bias, adapter.geometry
    rows = like.new_zeros(1, size["d_target"])
    chain = FoldedChain(adapter, rows if head is None else head, rows)
    context = chain.context(
        adapter.encode_events(torch.randn(1, size["num_events"], size["d_event"], device=like.device, dtype=like.dtype))
    )
    z, token = like.new_ones(1, size["width"]), torch.zeros(1, dtype=torch.long, device=like.device)

    def step(z: Tensor, token: Tensor, memory: Tensor) -> Tensor:
        hidden = chain.expect(chain.go_on(z, token, memory), context)
        return hidden if head is None else chain.logits(hidden).argmax(-1)

    draft = captured(step, steps)
    return call_ms(lambda: draft(z, token, z), repeats, like.device.type)


@torch.inference_mode()
def attending_ms(adapter: AttendingAdapter, repeats: int = 200) -> float:
    """Median milliseconds of one draft of an attending adapter without the head: a draft token read, the next state expected."""
    like, size, n = adapter.out.bias, adapter.geometry, adapter.num_prompt

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, device=like.device, dtype=like.dtype)

    rows = new(max(16, int(adapter.ids.max()) + 1), size["d_target"])
    folded = FoldedAttending(adapter, rows, rows)
    folded.start(new(1, size["num_events"], size["d_event"]))
    folded.read_prompt(new(n, size["d_target"]), new(n, size["d_target"]))
    none, two = [(NO_TOKEN, 0)] * SOURCES, [3, 4]
    output = folded.read(0, new(1, size["d_target"]), two, [none])
    return call_ms(lambda: folded.go_on(1, output, two, none), repeats, like.device.type)


@torch.inference_mode()
def part_costs(
    target: Decoder,
    draft: Decoder,
    full_draft: Decoder,
    adapter: HiddenAdapter,
    chained: ChainedAdapter | None,
    prompts: tuple[Prompt, Prompt],
    layers: Iterable[int] = (),
) -> PartCosts:
    """Time each part of a round in a loop of nothing else, with warm caches. Costs during decoding are those of `speed_model.Costs`.

    Args:
        target: target model
        draft: EventGPT up to the layers that the adapters read
        full_draft: EventGPT with all layers
        adapter: hidden adapter
        chained: chained adapter, if there is one
        prompts: the target's and EventGPT's prompt
        layers: further layers of EventGPT to time
    """
    target_prompt, draft_prompt = prompts
    device, repeats = target.device.type, 200
    target_ms = step_ms(target, target_prompt, VERIFIED, with_head=True)
    state = torch.randn(1, draft.hidden_size, device=target.device, dtype=target.head_weight.dtype)
    aligned = adapter(state)
    t_adapter = hidden_ms(adapter, draft.steps, repeats)
    t_head = call_ms(lambda: target.lm_head(aligned).argmax(-1), repeats, device)
    t_draft = step_ms(draft, draft_prompt)[1]
    t_chained = None if chained is None else chained_ms(chained, draft.steps, repeats)
    chained_draft = None if chained is None else chained_ms(chained, draft.steps, repeats, target.head_weight)
    loop = LoopCosts(
        t_target_ms=target_ms[1],
        c=(t_draft + t_adapter + t_head) / target_ms[1],
        c_chained=None if chained_draft is None else chained_draft / target_ms[1],
        v={str(k): ms / target_ms[1] for k, ms in target_ms.items()},
    )
    exits = exit_costs(full_draft, draft_prompt, t_adapter + t_head, target_ms[1], layers)
    return PartCosts(t_draft, t_adapter, t_chained, t_head, loop, exits, step_bandwidth(target, target_prompt, target_ms[1]))


def exit_costs(draft: Decoder, prompt: Prompt, rest_ms: float, target_ms: float, layers: Iterable[int] = ()) -> dict[str, ExitCost]:
    """Cost of a draft token that reads EventGPT's layer 1, 2, 4, …, the last one, or one of `layers`.

    Args:
        draft: EventGPT with all layers
        prompt: its prompt
        rest_ms: milliseconds of adapter and LM head, taken to be the same for all layers
        target_ms: milliseconds of one step of the target
        layers: further layers
    """
    depth, taps, exits = draft.num_layers, draft.taps, {}
    try:
        for k in sorted({depth, *layers, *(2**i for i in range(depth.bit_length()) if 2**i <= depth)}):
            draft.llama.config.num_hidden_layers, draft.taps = k, (k,)
            draft.use_steps(draft.steps)
            ms = step_ms(draft, prompt, repeats=20)[1]
            exits[str(k)] = ExitCost(ms, (ms + rest_ms) / target_ms)
    finally:
        draft.llama.config.num_hidden_layers, draft.taps = depth, taps
        draft.use_steps(draft.steps)
    return exits


def step_bandwidth(target: Decoder, prompt: Prompt, target_ms: float) -> Bandwidth:
    """Memory bandwidth that one step of the target reaches, and that of a plain copy.

    Args:
        target: target model
        prompt: prompt that precedes the step
        target_ms: milliseconds of the step
    """
    state = target.prefill([prompt])
    weights = [*target.llama.layers.parameters(), *target.llama.norm.parameters(), target.head_weight]
    cached = 2 * target.num_layers * state.length * target.llama.config.num_key_value_heads * target.llama.layers[0].self_attn.head_dim
    step_bytes = sum(x.numel() * x.element_size() for x in weights) + cached * target.head_weight.element_size()
    source = torch.zeros(1 << (31 if target.device.type == "cuda" else 27), dtype=torch.uint8, device=target.device)
    copy = torch.empty_like(source)
    copy_gb_per_s = 2 * source.numel() / 1e6 / call_ms(lambda: copy.copy_(source), 10, target.device.type, warmup=3)
    step_gb_per_s = step_bytes / 1e6 / target_ms
    return Bandwidth(step_bytes, step_gb_per_s, copy_gb_per_s, step_gb_per_s / copy_gb_per_s)
