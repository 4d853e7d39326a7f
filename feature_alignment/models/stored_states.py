"""Which files an extraction stores for a pair, and their shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from feature_alignment.models.decoder import Decoder
from feature_alignment.models.pair import Pair
from feature_alignment.storage.hidden_states import EVENT_STATES, PROMPT_INPUTS, PROMPT_STATES, layer_file


def draft_files(draft: Decoder, hidden: Tensor, separate_layers: bool) -> dict[str, Tensor]:
    """File name -> the drafter's states [s, d] in it, from the states [s, taps * d] of its tapped layers."""
    if not separate_layers:
        return {"egpt_hidden_states.pt": hidden}
    return {layer_file(k): part for k, part in zip(draft.taps, hidden.chunk(len(draft.taps), dim=-1), strict=True)}


def shapes_of(pair: Pair, width: int, separate_layers: bool, event_states: bool, prompt_states: int) -> dict[str, tuple[int, int]]:
    """File name -> (positions, size) of one row in it.

    Args:
        pair: Both models.
        width: Positions of the longest answer.
        separate_layers: Whether the drafter's layers have files of their own.
        event_states: Whether its event states are stored.
        prompt_states: Number of the target's prompt positions whose states and inputs are stored.
    """
    nothing = draft_files(pair.draft, torch.empty(0, pair.draft.hidden_size), separate_layers)
    shapes = {name: (width, states.shape[-1]) for name, states in nothing.items()}
    shapes["vl_hidden_states.pt"] = width, pair.target.hidden_size
    if event_states:
        shapes[EVENT_STATES] = pair.draft.vision_tokens, pair.draft.width
    if prompt_states:
        shapes[PROMPT_STATES] = shapes[PROMPT_INPUTS] = prompt_states, pair.target.hidden_size
    return shapes
