"""How long the scripts of a run will take: from a calibration of about 30 seconds on this machine, or from stated tokens per second.

The calibration runs what the scripts run, on a few rows: one or two batches of the extraction, a few epochs of both trainings, the fit and
score of the predictors, and plain decoding of some prompts. Times that grow with the rows are scaled; start-up and loading are added.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from feature_alignment.adapters.attending_training import train_attending
from feature_alignment.adapters.training import train_chained, train_hidden
from feature_alignment.benchmark.plan_sizes import PlannedSplit, Settings
from feature_alignment.benchmark.rows import attending_modes, modes, of_drafters
from feature_alignment.benchmark.sweep import MOST_PROMPTS, THRESHOLDS
from feature_alignment.cli.config import Common
from feature_alignment.decoding.plain import greedy
from feature_alignment.inputs.samples import Sample
from feature_alignment.measurement.scoring import null_predictors, score
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.pair import Pair, load_pair
from feature_alignment.models.stored_states import RowStates, states_of
from feature_alignment.storage.hidden_states import EVENT_STATES, PROMPT_INPUTS, PROMPT_STATES, HiddenStates, layer_file

T = TypeVar("T")
BATCH_SECONDS = 6.0  # a second batch is extracted if the first, which also warms up, took less
TRAINING_EPOCHS = 4  # that a training is timed for
FORWARD_SHARE = 0.3  # of a training step: validation runs forward only
REPORT_SECONDS = 3.0  # pictures, intervals and tables of one result
WIDE_LAYER_SECONDS = 8.0  # of `hidden_adapter`, which times one decoder layer of width 4096 whatever the pair
COMPILE_SECONDS = 60.0  # of compiled steps
LINEAR_TRIAL_SECONDS = 2.0  # both models' choice of their linear layers, on a CPU
GENERATE_BASELINES = 3
CALIBRATION_PROMPTS = 3
PART_COST_STEPS = 600  # target steps that the costs of single parts take together
PROMPT_TOKENS_PER_STEP = 170  # prompt tokens that are read in the time of one decoding step: 86 and 6.94 ms on an H100 at 7B geometry


@dataclass(frozen=True)
class Rates:
    """What a calibration measured, in seconds.

    Args:
        start: Start of Python and its imports.
        load: Loading of both models.
        row: Extraction of one row by one process.
        tokens: Mean length of the target's answers, in tokens.
        draft_tokens: Mean length of the drafter's own answers, in tokens.
        hidden_start: Initialization of the hidden adapter, per row of the training split.
        hidden: One row in one epoch of the hidden adapter's training.
        chained: The same for the chained adapter; None where the run trains none.
        fit: Fit of the predictors, per row of the training split.
        score: Scores of all predictors, per row of the measured split.
        prefill: Prefill of one prompt of the target.
        step: One decoding step of the target.
        attending_start: Initialization of the attending adapter, its table and its candidates, per row of the training split.
        attending: One training row in one epoch of the attending adapter's training, its part of the validation included.
    """

    start: float
    load: float
    row: float
    tokens: float
    draft_tokens: float
    hidden_start: float
    hidden: float
    chained: float | None
    fit: float
    score: float
    prefill: float
    step: float
    attending_start: float = 0.0
    attending: float | None = None


def hours(settings: Mapping[str, Settings], splits: Mapping[str, PlannedSplit], rates: Rates, processes: int) -> dict[str, float]:
    """Script -> its seconds, from a calibration.

    Args:
        settings: Script -> its settings.
        splits: "train", "validation" and "test" -> split.
        rates: What was measured.
        processes: Processes that share the extraction.
    """
    started, rows = rates.start + rates.load, {name: len(split.samples) for name, split in splits.items()}
    found = {f"extract_hidden_states, {name}": started + n * rates.row / processes for name, n in rows.items()}
    found["hidden_adapter"] = rates.start + WIDE_LAYER_SECONDS
    per_epoch = rows["train"] + FORWARD_SHARE * rows["validation"]
    epochs = settings["train_hidden_adapter.hidden"].num_epochs
    found["train_hidden_adapter, hidden"] = rates.start + rates.hidden_start * rows["train"] + epochs * per_epoch * rates.hidden
    if rates.chained is not None:
        epochs = settings["train_hidden_adapter.chained"].num_epochs
        found["train_hidden_adapter, chained"] = rates.start + epochs * per_epoch * rates.chained
    if rates.attending is not None:
        epochs = settings["train_hidden_adapter.attending"].num_epochs
        found["train_hidden_adapter, attending"] = rates.start + rows["train"] * (rates.attending_start + epochs * rates.attending)
    found["measure_feature_acceptance"] = rates.start + rates.fit * rows["train"] + rates.score * rows["test"] + REPORT_SECONDS
    found["compare_token_baseline"] = rates.start + REPORT_SECONDS
    return found | decoding_seconds(settings, rows["test"], rates, started)


def decoding_seconds(settings: Mapping[str, Settings], rows: int, rates: Rates, started: float) -> dict[str, float]:
    """Seconds of inference and benchmark. Every method counts as plain decoding: some are faster, others slower.

    Args:
        settings: Script -> its settings.
        rows: Rows of the measured split.
        rates: `prefill`, `step` and `tokens` are read, and whether there is one of the attending adapter.
        started: Seconds until both models are loaded.
    """
    bench, prompt = settings["benchmark_feature_sd"], rates.prefill + rates.tokens * rates.step
    prompts = min(bench.limit or rows, rows)
    methods = modes(bench.num_draft_tokens, bench.most_draft_tokens, bench.threshold, ("chained", "aligned"), bench.exit_adapters)
    if rates.attending is not None:
        methods += attending_modes(bench.num_draft_tokens, bench.most_draft_tokens)
    methods = of_drafters(methods, bench.drafters)
    texts = 1 + sum(mode.accept != "token" for mode in methods)  # texts whose likelihood the target computes
    runs = (len(methods) + 1 + GENERATE_BASELINES) * (prompts * bench.repeats + 2 * min(bench.warmup, prompts))
    compiling = COMPILE_SECONDS if bench.steps == "compiled" or (bench.steps == "auto" and bench.device != "cpu") else 0.0
    trial = LINEAR_TRIAL_SECONDS if bench.device == "cpu" else 0.0
    swept = sum(map(len, THRESHOLDS.values())) * min(MOST_PROMPTS, prompts) / 2  # about every second threshold decides as the one before
    spent = (runs + swept) * prompt + texts * prompts * rates.prefill + PART_COST_STEPS * rates.step
    return {
        "feature_sd_inference": started + trial + 2 * prompt,
        "benchmark_feature_sd": started + trial + compiling + spent + REPORT_SECONDS,
    }


def stated_hours(
    settings: Mapping[str, Settings], splits: Mapping[str, PlannedSplit], prompt_tokens: int, tokens_per_second: float, processes: int
) -> dict[str, float]:
    """Script -> its seconds, of the scripts whose time follows from the speed of plain decoding. Start-up and loading are not included.

    A batch takes one step for each token of its longest answer, both models' answers one after another, and a clip's prefill as many
    steps as PROMPT_TOKENS_PER_STEP says; EventGPT counts as much as the target.

    Args:
        settings: Script -> its settings.
        splits: Splits that are extracted.
        prompt_tokens: Of the target, vision included.
        tokens_per_second: Of plain decoding of one prompt by the target.
        processes: Processes that share the extraction.
    """
    step, extract = 1 / tokens_per_second, settings["extract_hidden_states"]
    prefill, found = prompt_tokens / PROMPT_TOKENS_PER_STEP, {}
    for name, split in splits.items():
        clips = sum(len({split.clip_index[row] for row in batch}) for batch in split.batches)
        answers = len(split.batches) * extract.max_new_tokens * (1 + extract.draft_answers)
        steps = 2 * clips * prefill + answers + 2 * len(split.samples)  # both models read every answer, one forward pass each
        found[f"extract_hidden_states, {name}"] = steps * step / processes
    tokens = settings["benchmark_feature_sd"].max_new_tokens
    attending = 0.0 if "train_hidden_adapter.attending" in settings else None
    stated = Rates(0, 0, 0, tokens, tokens, 0, 0, None, 0, 0, prefill * step, step, attending=attending)
    return found | decoding_seconds(settings, len(splits["test"].samples), stated, 0.0)


def calibrate(cfg: Common, settings: Mapping[str, Settings], splits: Mapping[str, PlannedSplit], start: float) -> Rates:
    """Measure `Rates` on the first rows of the training and test splits.

    Args:
        cfg: Settings that all scripts share.
        settings: Script -> its settings.
        splits: "train" and "test" among them.
        start: Seconds that this process took to start.
    """
    extract, train = settings["extract_hidden_states"], splits["train"]
    load, (pair, full) = timed(lambda: loaded(cfg, extract))
    for count, batch in enumerate(train.batches[:2]):
        samples = [train.samples[row] for row in batch]
        seconds, found = timed(functools.partial(batch_states, pair, full, samples, extract))
        row = seconds / len(samples)
        if count == 0 and seconds > BATCH_SECONDS:
            break
    n, states = len(found), as_split(pair, found, extract.separate_layers)
    head, embeddings = pair.target.head_weight.detach().float(), pair.target.embeddings.float()
    hidden = training_seconds(lambda s: train_hidden(states, states, head, s), settings["train_hidden_adapter.hidden"])
    chained = attending = None
    if (training := settings.get("train_hidden_adapter.chained")) is not None:
        chained = training_seconds(lambda s: train_chained(states, states, head, embeddings, s), training)
    if (training := settings.get("train_hidden_adapter.attending")) is not None:
        texts = with_prompts(states, found, samples)
        share = max(1, round(n * len(splits["validation"].samples) / len(train.samples)))  # its validation costs as much as training
        validation = with_prompts(as_split(pair, found[:share], extract.separate_layers), found, samples)
        attending = training_seconds(lambda s: train_attending(texts, validation, head, embeddings, s), training)
    fit, scored = measurement_seconds(states, head, settings["train_hidden_adapter.hidden"].bottleneck)
    prompts = [pair.target.prepare(sample) for sample in splits["test"].samples[:CALIBRATION_PROMPTS]]
    runs = [greedy(pair.target, prompt, settings["benchmark_feature_sd"].max_new_tokens) for prompt in (prompts[0], *prompts)][1:]
    steps = sum(run.passes for run in runs)
    tokens, draft_tokens = (sum(map(len, texts)) / n for texts in ([f.vl_tokens for f in found], [f.egpt_tokens for f in found]))
    return Rates(
        start=start,
        load=load,
        row=row,
        tokens=tokens,
        draft_tokens=draft_tokens,
        hidden_start=hidden[0] / n,
        hidden=hidden[1] / n / (1 + FORWARD_SHARE),
        chained=chained and chained[1] / n / (1 + FORWARD_SHARE),
        fit=fit / n,
        score=scored / n,
        prefill=sum(run.ms["target_prefill"] for run in runs) / len(runs) / 1e3,
        step=sum(run.ms["verify"] for run in runs) / max(1, steps) / 1e3,
        attending_start=attending[0] / n if attending else 0.0,
        attending=attending and attending[1] / n,
    )


def batch_states(pair: Pair, full: Decoder, samples: Sequence[Sample], extract: Settings) -> list[RowStates]:
    """What the extraction computes of one batch."""
    return list(states_of(pair, full, samples, [None] * len(samples), extract, extract.event_states))


def loaded(cfg: Common, extract: Settings) -> tuple[Pair, Decoder]:
    """The pair, and EventGPT at full depth if its own texts are wanted; all run as extraction runs them."""
    pair = load_pair(cfg)
    full = pair.draft
    if (extract.own_drafts or extract.draft_answers) and not full.has_own_head:
        full = pair.draft_with(None, cfg)
    for decoder in (pair.target, pair.draft, full):
        decoder.pack_linear(extract.bfloat16_products)
    return pair, full


def as_split(pair: Pair, found: Sequence[RowStates], separate_layers: bool) -> HiddenStates:
    """Extracted rows as a split that trainings and scores read.

    Args:
        pair: Both models.
        found: The rows.
        separate_layers: Whether the drafter's layers are in files of their own; the last one is read.
    """
    lengths = torch.tensor([len(row.token_ids) for row in found])
    width = int(lengths.max())

    def padded(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([F.pad(t.float(), (0, 0, 0, width - len(t))) for t in tensors])

    draft = layer_file(pair.draft.taps[-1]) if separate_layers else "egpt_hidden_states.pt"
    ids = torch.tensor([[*row.token_ids, *[0] * (width - len(row.token_ids))] for row in found])
    rows = [{"id": str(i), "sequence": str(i % 2), "question": ""} for i in range(len(found))]
    events = torch.stack([row.files[EVENT_STATES].float() for row in found]) if EVENT_STATES in found[0].files else None
    g, v = (padded([row.files[name] for row in found]) for name in (draft, "vl_hidden_states.pt"))
    return HiddenStates(g, v, ids, torch.arange(width) < lengths[:, None], lengths, rows, {}, events)


def with_prompts(states: HiddenStates, found: Sequence[RowStates], samples: Sequence[Sample]) -> HiddenStates:
    """A split with what the attending adapter reads as well: prompt states, and the ids, questions and clips of its rows.

    Args:
        states: The first rows of the batch.
        found: All rows of the batch.
        samples: Their samples.
    """
    n = len(states.rows)
    prompt, inputs = (torch.stack([row.files[name].float() for row in found[:n]]) for name in (PROMPT_STATES, PROMPT_INPUTS))
    rows = [
        {"id": sample.id, "sequence": sample.sequence, "question": sample.question, **row.about}
        for row, sample in zip(found[:n], samples[:n], strict=True)
    ]
    return dataclasses.replace(states, rows=rows, prompt=prompt, prompt_inputs=inputs)


def training_seconds(learn: Callable[[Settings], object], settings: Settings) -> tuple[float, float]:
    """Seconds of a training's initialization and of one of its epochs, with its validation.

    Args:
        learn: Trains with these settings.
        settings: Of the script.
    """
    quiet = {**vars(settings), "tensorboard": False, "patience": TRAINING_EPOCHS}
    runs = [functools.partial(learn, Settings(**quiet | {"num_epochs": n})) for n in (1, TRAINING_EPOCHS)]
    one, more = (min(timed(run)[0] for _ in range(2)) for run in runs)
    epoch = max(0.0, (more - one) / (TRAINING_EPOCHS - 1))
    return max(0.0, one - epoch), epoch


def measurement_seconds(states: HiddenStates, head: Tensor, rank: int) -> tuple[float, float]:
    """Seconds of fitting the null predictors on a split, and of scoring them on it."""
    fit, fitted = timed(lambda: null_predictors(states, states, states, rank, head))
    return fit, timed(lambda: score({name: one.predict for name, one in fitted.items()}, states, head))[0]


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of a call, and its result."""
    began = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result
