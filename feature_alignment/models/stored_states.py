"""What an extraction stores for a pair: the states of a batch, the files and their shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from feature_alignment.inputs.samples import Sample
from feature_alignment.models.batches import ClipBatch
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.pair import Pair
from feature_alignment.storage.hidden_states import EVENT_STATES, PROMPT_INPUTS, PROMPT_STATES, layer_file


def draft_files(taps: Sequence[int], hidden: Tensor, separate_layers: bool) -> dict[str, Tensor]:
    """File name -> the drafter's states [s, d] in it, from the states [s, taps * d] of its tapped layers."""
    if not separate_layers:
        return {"egpt_hidden_states.pt": hidden}
    return {layer_file(k): part for k, part in zip(taps, hidden.chunk(len(taps), dim=-1), strict=True)}


class ExtractionSettings(Protocol):
    """What an extraction computes; its ExtractConfig describes each."""

    @property
    def prefix(self) -> Literal["verifier", "drafter", "own"]:
        """Text that both models read."""

    @property
    def max_new_tokens(self) -> int:
        """Longest answer in tokens."""

    @property
    def max_positions(self) -> int | None:
        """Most states of an answer; None for all."""

    @property
    def separate_layers(self) -> bool:
        """Whether the drafter's layers have files of their own."""

    @property
    def prompt_states(self) -> int:
        """Number of the target's prompt positions."""

    @property
    def draft_answers(self) -> bool:
        """Whether the drafter's own answers are wanted."""

    @property
    def own_drafts(self) -> bool:
        """Whether the drafter's own next tokens are wanted."""


class RowStates(NamedTuple):
    """What an extraction stores of one row.

    Args:
        files: File name -> states [n, d].
        token_ids: The n token ids that they emit.
        read: The token ids that the target read, before both models' states were cut to the shorter text.
        vl_tokens: The target's own answer.
        egpt_tokens: The drafter's own answer; empty if it is not wanted.
        about: Further keys of the row's entry.
    """

    files: dict[str, Tensor]
    token_ids: list[int]
    read: list[int]
    vl_tokens: list[int]
    egpt_tokens: list[int]
    about: dict[str, list[int]]


def states_of(
    pair: Pair,
    full_depth_draft: Decoder,
    samples: Sequence[Sample],
    answers: Sequence[tuple[Sequence[int], Sequence[int]] | None],
    cfg: ExtractionSettings,
    with_events: bool,
) -> Iterator[RowStates]:
    """The states of one batch; floats depend on their batch.

    Args:
        pair: Both models, the drafter with its tapped layers.
        full_depth_draft: The drafter with its own LM head.
        samples: Rows of the batch.
        answers: Known answers of the target and the drafter; both are generated if one row has none.
        cfg: Settings.
        with_events: Whether event states are wanted.
    """
    target, deep = ClipBatch(pair.target, samples), ClipBatch(full_depth_draft, samples)
    draft = deep if full_depth_draft is pair.draft else ClipBatch(pair.draft, samples, deep)
    known = [answer for answer in answers if answer is not None]
    if len(known) == len(samples):
        vl, egpt = ([list(answer[model]) for answer in known] for model in (0, 1))
        target.replay(vl)
        if deep is draft and cfg.draft_answers:
            deep.replay(egpt)
    else:
        vl = target.generate(cfg.max_new_tokens)
        egpt = deep.generate(cfg.max_new_tokens) if cfg.draft_answers else [[] for _ in samples]
    texts = {"verifier": (vl, vl), "drafter": (egpt, egpt), "own": (vl, egpt)}[cfg.prefix]
    target_reads, draft_reads = ([answer[: cfg.max_positions] for answer in text] for text in texts)
    events = draft.vision_states() if with_events else None
    own = deep.predict_tokens(draft_reads) if cfg.own_drafts else None
    p = cfg.prompt_states
    prompt_ids, inputs = target.prompt_ids(p + 1), target.prompt_inputs(p)
    found = target.states(target_reads, p), draft.states(draft_reads)
    for i, (pv, g) in enumerate(zip(*found, strict=True)):
        v, about = pv[p:], {}
        length = min(len(v), len(g))  # texts of one's own are paired by index, up to the shorter one
        files = {**draft_files(pair.draft.taps, g[:length], cfg.separate_layers), "vl_hidden_states.pt": v[:length]}
        if events is not None:
            files[EVENT_STATES] = events[i]
        if p:
            files[PROMPT_STATES], files[PROMPT_INPUTS] = pv[:p], inputs[i]
            about["prompt_ids"] = prompt_ids[i]
        if own is not None:
            about["egpt_drafts"] = own[i][:length]
        yield RowStates(files, target_reads[i][:length], target_reads[i], vl[i], egpt[i], about)


def depend_on_the_clip_alone(prompts: Iterable[Tensor], placeholder: int) -> bool:
    """Whether event states are the same for all questions of a run: the prompts begin alike, up to the last event token.

    Args:
        prompts: The drafter's prompt ids [s] int64 for each question.
        placeholder: Token id that marks the events.
    """
    ends = ((ids, int((ids == placeholder).nonzero()[-1])) for ids in prompts)
    return len({tuple(ids[: last + 1].tolist()) for ids, last in ends}) == 1


class StateGeometry(NamedTuple):
    """Sizes of a pair that decide the shapes of its states.

    Args:
        taps: The drafter's tapped layers.
        draft_width: Width of each.
        event_tokens: Number of the drafter's event tokens.
        target_width: Width of the target's states.
    """

    taps: Sequence[int]
    draft_width: int
    event_tokens: int
    target_width: int

    @classmethod
    def of(cls, pair: Pair) -> StateGeometry:
        """The sizes of a loaded pair."""
        return cls(pair.draft.taps, pair.draft.width, pair.draft.vision_tokens, pair.target.hidden_size)


def shapes_of(pair: StateGeometry, width: int, separate_layers: bool, event_states: bool, prompt_states: int) -> dict[str, tuple[int, int]]:
    """File name -> (positions, size) of one row in it.

    Args:
        pair: Sizes of both models.
        width: Positions of the longest answer.
        separate_layers: Whether the drafter's layers have files of their own.
        event_states: Whether its event states are stored.
        prompt_states: Number of the target's prompt positions whose states and inputs are stored.
    """
    nothing = draft_files(pair.taps, torch.empty(0, pair.draft_width * len(pair.taps)), separate_layers)
    shapes = {name: (width, states.shape[-1]) for name, states in nothing.items()}
    shapes["vl_hidden_states.pt"] = width, pair.target_width
    if event_states:
        shapes[EVENT_STATES] = pair.event_tokens, pair.draft_width
    if prompt_states:
        shapes[PROMPT_STATES] = shapes[PROMPT_INPUTS] = prompt_states, pair.target_width
    return shapes
