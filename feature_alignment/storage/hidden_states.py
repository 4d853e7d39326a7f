"""One split of paired hidden states, read from the files that extraction wrote."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from feature_alignment.cli.advice import command_for, verify_command
from feature_alignment.cli.console import UserError
from feature_alignment.cli.text_files import read_text, rows_of
from feature_alignment.storage.files import altered_files, load_pt, read_hashed_json
from feature_alignment.storage.state_files import frame_hash, row_hashes

DEFAULT_EOS_IDS = [2]  # files written before their meta recorded the ids

log = logging.getLogger(__name__)

EVENT_STATES, PROMPT_STATES, PROMPT_INPUTS = "egpt_event_states.pt", "vl_prompt_states.pt", "vl_prompt_inputs.pt"
FIXED_LENGTH_FILES = (EVENT_STATES, PROMPT_STATES, PROMPT_INPUTS)  # files whose rows are all equally long
MAX_BYTES_CHECKED_ON_LOAD = 1 << 30  # larger files are compared with their hashes by `verification` only


@dataclass(frozen=True)
class HiddenStates:
    """One split of paired hidden states, memory-mapped.

    draft:     [n, s, d_draft]   EventGPT's states of its tapped layers, concatenated, or of one requested layer; zero where padded
    target:    [n, s, d_target]  Video-LLaVA's, post-norm
    token_ids: [n, s] int64      the tokens both models read; state t *emits* token t
    mask:      [n, s] bool       real positions, EOS included
    lengths:   [n] int64
    rows:      one dict per row: id, sequence, question, both texts
    events:    [c, e, d_event]   EventGPT's states over its event tokens, if asked for: of the last tapped layer, once per clip
    prompt:    [n, p, d_target]  Video-LLaVA's states of its prompt's end, without its very last position, if asked for; zeros in front
                                 where the prompt is shorter. A row's "prompt_ids" are the ids there and the last one, -1 for vision
    prompt_inputs: [n, p, d_target]  its input embeddings, vision included, of the position after each of these states
    clip_index: [n] int64        each row's row of `events`; None: one of its own
    """

    draft: Tensor
    target: Tensor
    token_ids: Tensor
    mask: Tensor
    lengths: Tensor
    rows: list[dict[str, Any]]
    meta: dict[str, Any]
    events: Tensor | None = None
    prompt: Tensor | None = None
    prompt_inputs: Tensor | None = None
    clip_index: Tensor | None = None

    def events_of(self, rows: Tensor) -> Tensor:
        """EventGPT's event states [b, e, d_event] of the rows [b] int64."""
        assert self.events is not None  # asked for when the split was loaded
        return self.events[rows if self.clip_index is None else self.clip_index[rows]]

    def with_events_of(self, rows: Tensor) -> HiddenStates:
        """This split with the event states of other rows: row i has those of row rows[i]; rows: [n] int64."""
        return dataclasses.replace(self, clip_index=rows if self.clip_index is None else self.clip_index[rows])

    def refuse_non_finite(self, rows: Tensor | Sequence[int], *states: Tensor) -> None:
        """Raise UserError for states with infinities or NaN; it names the first sample.

        Args:
            rows: [b] int64, rows of this split
            *states: [b, ...] float, states of these rows
        """
        for part in states:
            bad = ~torch.isfinite(part.flatten(1)).all(1)
            if bad.any():
                row = self.rows[int(rows[int(bad.nonzero()[0])])]
                raise UserError(f"sample {row['id']}: its states are not finite. Look for what was altered:\n  {verify_command()}")

    @property
    def ended(self) -> Tensor:
        """[n] bool: texts that end with EOS, not at the length limit."""
        ids = eos_ids_of(self.meta, "draft_eos_token_ids" if self.meta.get("prefix") == "drafter" else "eos_token_ids")
        return torch.isin(self.token_ids[torch.arange(len(self.lengths)), self.lengths - 1], torch.tensor(ids))

    @property
    def names(self) -> list[str]:
        """The samples' ids."""
        return [row["id"] for row in self.rows]

    @property
    def clips(self) -> list[str]:
        """The cluster each row belongs to: intervals resample these."""
        return [row["sequence"] for row in self.rows]


def eos_ids_of(meta: dict[str, Any] | None, key: str = "eos_token_ids") -> list[int]:
    """The EOS token ids recorded in the meta of an extraction or of its token pairs.

    Args:
        meta: the meta; None gives DEFAULT_EOS_IDS
        key: `eos_token_ids` for the target, `draft_eos_token_ids` for the drafter
    """
    ids = (meta or {}).get(key, DEFAULT_EOS_IDS)
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise UserError(f"{key} in a meta.json: wanted a list of token ids, got {str(ids)[:80]}. Extract again with --no_resume.")
    return ids


def event_rows(entries: Iterable[Mapping[str, Any]]) -> Iterator[int]:
    """For each row, its row of egpt_event_states.pt: clips in the order in which they are first asked about.

    Args:
        entries: entries of samples.jsonl; `events` names what a row's event states depend on. A row without it has states of its own
    """
    first: dict[Any, int] = {}
    for row, about in enumerate(entries):
        yield first.setdefault(about.get("events", row), len(first))


def rows_in_file(name: str, clip_index: Sequence[int]) -> Sequence[int]:
    """The rows whose states a file holds, in its order: all of them, or the first row of each clip for event states.

    Args:
        name: name of the file
        clip_index: for each row, its row of egpt_event_states.pt
    """
    if name != EVENT_STATES:
        return range(len(clip_index))
    first: dict[int, int] = {}
    for row, clip in enumerate(clip_index):
        first.setdefault(clip, row)
    return [first[clip] for clip in range(len(first))]


def layer_file(layer: int) -> str:
    """Name of the file that holds one draft layer, if layers are stored separately."""
    return f"egpt_hidden_states.layer{layer:02d}.pt"


def load_hidden_states(directory: Path, layers: Sequence[int] | None = None, events: bool = False, prompt: bool = False) -> HiddenStates:
    """One split of a complete extraction.

    Args:
        directory: folder of the split
        layers: EventGPT's layers to load; None loads all. With `--separate_layers` it must be one layer, and `meta` then describes it alone
        events: load EventGPT's event states as well
        prompt: load Video-LLaVA's states and inputs of its prompt as well

    Raises:
        UserError: the extraction is incomplete or altered, lacks the requested states, or its files do not fit each other
    """
    command = command_for("extract_hidden_states", split=directory.name)
    meta = read_hashed_json(directory / "meta.json", command)
    small = [n for n in meta["files"] if n.endswith((".pt", ".jsonl"))]
    if changed := altered_files(directory / "meta.json", meta, small):
        raise UserError(f"{directory}: {', '.join(changed)} was altered after this split was extracted. Make it again:\n  {command}")
    name, stored = "egpt_hidden_states.pt", meta["draft_layers"]
    if meta.get("separate_layers"):
        if layers is None or len(layers) != 1 or layers[0] not in stored:
            raise UserError(
                f"{directory} holds EventGPT's layers {stored} separately; expected one of them, got {layers}: --draft_layers {stored[-1]}"
            )
        name = layer_file(layers[0])
        norm, width = meta["draft_norms"][str(layers[0])], meta["hidden_size_draft"] // len(stored)
        meta = {**meta, "draft_layers": list(layers), "draft_norm": norm, "hidden_size_draft": width}
    elif layers is not None and list(layers) != list(stored):
        raise UserError(
            f"{directory} holds EventGPT's layers {stored} as one state, not {list(layers)}. Extract those, or all with --separate_layers."
        )
    positions = load_pt(directory / "positions.pt", command)
    rows = [json.loads(row) for _, row in rows_of(read_text(directory / "samples.jsonl"))]
    draft, target = (_load_states(directory / file, rows, meta, command) for file in (name, "vl_hidden_states.pt"))
    if draft.shape[:2] != target.shape[:2] or draft.shape[:2] != positions["token_ids"].shape:
        shapes = {"egpt": draft.shape, "vl": target.shape, "token_ids": positions["token_ids"].shape}
        raise UserError(f"the files in {directory} do not fit each other: {shapes}. Make them again:\n  {command}")
    for file, tensor, width in ((name, draft, "hidden_size_draft"), ("vl_hidden_states.pt", target, "hidden_size_target")):
        if tensor.shape[-1] != meta[width]:
            raise UserError(f"{directory}/{file} is {tensor.shape[-1]} wide, its meta.json says {meta[width]}: files swapped?")
    if events and not meta.get("event_states"):
        raise UserError(
            f"{directory} holds no event states, which the chained and the attending adapter read. Extract them:\n"
            f"  {command} --event_states"
        )
    if prompt and not meta.get("prompt_states"):
        raise UserError(
            f"{directory} holds no prompt states, which the attending adapter reads. Extract them:\n  {command} --prompt_states 160"
        )
    files = ({"events": EVENT_STATES} if events else {}) | ({"prompt": PROMPT_STATES, "prompt_inputs": PROMPT_INPUTS} if prompt else {})
    clip_index = positions.get("clip_index", torch.arange(len(rows)))  # files of earlier versions have event states of every row
    if clip_index.tolist() != list(event_rows(rows)):
        raise UserError(f"{directory}: clip_index of positions.pt is not that of samples.jsonl. Make them again:\n  {command}")
    more = {
        name: _load_states(directory / file, [rows[row] for row in rows_in_file(file, clip_index.tolist())], meta, command)
        for name, file in files.items()
    }
    tensors = {k: positions[k] for k in ("token_ids", "mask", "lengths")}
    return HiddenStates(draft, target, **tensors, rows=rows, meta=meta, clip_index=clip_index, **more)


def _load_states(path: Path, rows: Sequence[dict[str, Any]], meta: dict[str, Any], command: str) -> Tensor:
    """One memory-mapped file of the states [n, s, d] of `rows`; its frame, and in a small file its rows, are compared with their hashes."""
    states = load_pt(path, command)
    if not isinstance(states, Tensor) or states.ndim != 3 or not 0 < len(states) == len(rows):
        raise UserError(f"{path} does not hold the {len(rows)} rows of states that samples.jsonl lists. Make it again:\n  {command}")
    if frame_hash(path, states.nbytes) != meta["frames"].get(path.name):
        raise UserError(f"{path} is not the file that its meta.json describes: files swapped, or altered? Make it again:\n  {command}")
    if states.nbytes <= MAX_BYTES_CHECKED_ON_LOAD:
        for about, found in zip(rows, row_hashes(path, len(rows), states[0].nbytes), strict=True):
            if about["sha256"][path.name] != found:
                raise UserError(f"{path}: the states of sample {about['id']} were altered. Make them again:\n  {command}")
    else:
        log.info("%s: %.3g GB are not compared with their hashes now; that takes\n  %s", path, states.nbytes / 1e9, verify_command())
    return states
