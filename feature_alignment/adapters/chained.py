"""The chained adapter: it continues from the target's last verified state, token by token, and attends to EventGPT's view of the clip.

    v̂[t+1] = f(v[t], x[t], m[t-1], events)      x[t]: the token that v[t] emits; m: a recurrent memory of the text so far

    token x[t] ─┐
    state v[t] ─┴─> GRU, memory m[t] ──> attends to EventGPT's states over its event tokens ──> v̂[t+1] ──W──> next draft x̂[t+1]
                        ^                                                                          │
                        └───────────────────────── the next step reads v̂[t+1] and x̂[t+1] ──────────┘

EventGPT runs once per clip and its decoder does no steps, so a draft token costs this adapter and the target's LM head. The adapter never
sees v[t+1] or anything later. Predicting the target's next state from its last one and the sampled token is EAGLE's idea (Li et al.
2401.15077); here the head is recurrent, low-rank, and attends to states of another model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feature_alignment.adapters.scaling import InputScale, standardized
from feature_alignment.cli.advice import command_for
from feature_alignment.cli.console import UserError
from feature_alignment.storage.files import load_trained, trained_layers
from feature_alignment.storage.hidden_states import HiddenStates
from feature_alignment.storage.pretrained import SharedModule

HEADS = 4


class EventKeyValues(NamedTuple):
    """EventGPT's event states as keys and values: [b, heads, e, width / heads] each."""

    keys: Tensor
    values: Tensor


class ChainedAdapter(SharedModule):
    """Predicts the target's next state from its last one.

    Args:
        d_target: width of the target's states
        d_event: width of EventGPT's states
        num_events: number of event tokens of a clip
        width: of all layers inside
        blind: do not attend to the events, to measure what they add
    """

    kind = "chained"

    def __init__(self, d_target: int, d_event: int, num_events: int, width: int = 192, blind: bool = False) -> None:
        super().__init__()
        if min(d_target, d_event, num_events, width) < 1 or width % HEADS:
            raise ValueError(
                f"sizes must be positive and the width a multiple of {HEADS}, "
                f"got d_target={d_target}, d_event={d_event}, num_events={num_events}, width={width}"
            )
        self.geometry = {"d_target": d_target, "d_event": d_event, "num_events": num_events, "width": width, "blind": blind}
        self.state, self.token = nn.Linear(d_target, width), nn.Linear(d_target, width, bias=False)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(d_event, width), nn.Linear(d_event, width)
        self.place = nn.Parameter(torch.randn(num_events, width) * 0.02)  # position embedding of the event tokens
        self.mix, self.out = nn.Linear(2 * width, width), nn.Linear(width, d_target)
        self.scale: InputScale | None = None  # during training only

    @property
    def num_parameters(self) -> int:
        """Number of trained weights."""
        return sum(p.numel() for p in self.parameters())

    def standardize(self, target: Tensor, embeddings: Tensor, events: Tensor) -> None:
        """Standardize all inputs from now on, by the statistics of a sample.

        Args:
            target: [p, d_target], the target's states
            embeddings: [v, d_target], its input embeddings
            events: [.., d_event], EventGPT's event states
        """
        self.scale = InputScale.of(target, embeddings, events)

    @torch.no_grad()
    def folded(self) -> ChainedAdapter:
        """A copy with the scales folded into its weights. It predicts the same and is what is saved."""
        plain = copy.deepcopy(self)
        if self.scale is None:
            return plain
        (v_mean, v_std), (x_mean, x_std), (e_mean, e_std) = self.scale
        plain.scale = None
        for layer, mean, std in ((plain.state, v_mean, v_std), (plain.token, x_mean, x_std)):
            layer.weight /= std
            plain.state.bias.sub_(layer.weight @ mean)  # states and tokens are only added
        for layer in () if self.geometry["blind"] else (plain.key, plain.value):
            layer.weight /= e_std
            layer.bias.sub_(layer.weight @ e_mean)
        plain.out.weight *= v_std[:, None]
        plain.out.bias.mul_(v_std).add_(v_mean)
        return plain

    def tokens(self, embeddings: Tensor) -> Tensor:
        """Token inputs [v, width], from the target's input embeddings [v, d_target]; computed once."""
        inputs: Tensor = self.token(embeddings if self.scale is None else standardized(embeddings, self.scale.token))
        return inputs

    def encode_events(self, events: Tensor) -> EventKeyValues:
        """Keys and values of EventGPT's event states.

        Args:
            events: [b, e, d_event]
        """
        x = (events if self.scale is None else standardized(events, self.scale.event)) * (not self.geometry["blind"])
        keys, values = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (self.key(x) + self.place, self.value(x)))
        return EventKeyValues(keys, values)

    def read(self, states: Tensor, tokens: Tensor, memory: Tensor | None) -> Tensor:
        """Read n states and the tokens that they emitted, in order.

        Args:
            states: [b, n, d_target]
            tokens: [b, n, width], token inputs, rows of `tokens`
            memory: [b, width], the memory of the text before; None at its beginning

        Returns:
            [b, n, width], the memory after each of them
        """
        x = self._joined(states, tokens)
        if x.shape[1] == 1 and memory is not None:  # one draft token: the bare cell takes half the time of the module
            return self._one_step(x, memory[:, None])
        memories: Tensor = self.memory(x, None if memory is None else memory[None])[0]
        return memories

    def predict(self, memory: Tensor, seen: EventKeyValues) -> Tensor:
        """Predict the target's next states.

        Args:
            memory: [b, n, width]
            seen: of the same b clips

        Returns:
            [b, n, d_target]
        """
        query = self.query(memory).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        found = F.scaled_dot_product_attention(query, *seen).transpose(1, 2).flatten(2)
        expected: Tensor = self.out(F.gelu(self.mix(torch.cat([memory, found], -1))))
        return expected if self.scale is None else expected * self.scale.target[1] + self.scale.target[0]

    def roll_out(self, states: Tensor, tokens: Tensor, seen: EventKeyValues, steps: int) -> list[Tensor]:
        """Chain from every position of known texts: entry k at position t is v̂[t+1+k], from v[t] and k predicted states.

        Args:
            states: [b, n, d_target]
            tokens: [b, n, width], token inputs
            seen: of the same b clips
            steps: number of predictions of a chain

        Returns:
            `steps` tensors, the k-th [b, n - k, d_target]
        """
        memory = self.read(states, tokens, None)
        expected = [self.predict(memory, seen)]
        for k in range(1, steps):
            memory = self._one_step(self._joined(expected[-1][:, :-1], tokens[:, k:]), memory[:, :-1])
            expected.append(self.predict(memory, seen))
        return expected

    def _joined(self, states: Tensor, tokens: Tensor) -> Tensor:
        return F.gelu(self.state(states if self.scale is None else standardized(states, self.scale.target)) + tokens)

    def _one_step(self, x: Tensor, memory: Tensor) -> Tensor:
        """One step of the GRU from every position: x and memory [b, n, width] -> [b, n, width]."""
        w_ih, w_hh, b_ih, b_hh = self.memory.all_weights[0]
        following: Tensor = torch.gru_cell(x.flatten(0, 1), memory.flatten(0, 1), w_ih, w_hh, b_ih, b_hh).unflatten(0, x.shape[:2])
        return following


@dataclass(frozen=True)
class Texts:
    """Some rows, cut to the longest.

    Args:
        states: [b, s, d_target] float32
        token_ids: [b, s] int64
        mask: [b, s] bool, real positions
        events: [b, e, d_event] float32
    """

    states: Tensor
    token_ids: Tensor
    mask: Tensor
    events: Tensor


def text_batches(states: HiddenStates, batches: Iterable[Tensor], device: str) -> Iterator[Texts]:
    """The rows of each batch, on a device; positions stay in order, because the chained adapter reads texts.

    Args:
        states: with event states
        batches: row numbers of each batch
        device: where the batch goes
    """
    for rows in batches:
        s = int(states.lengths[rows].max())
        parts = (states.target[rows, :s].float(), states.token_ids[rows, :s], states.mask[rows, :s], states.events_of(rows).float())
        states.refuse_non_finite(rows, parts[0], parts[3])
        yield Texts(*(part.to(device) for part in parts))


def chained_predictions(adapter: ChainedAdapter, texts: Texts, embeddings: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Chain from every position of the target's own texts, which is what drafting does as long as its draft tokens are correct.

    Args:
        adapter: the chained adapter
        texts: b rows of s positions
        embeddings: [v, d_target], the target's input embeddings
        steps: draft tokens of a chain

    Yields:
        for each step k: predicted states [b, s-1-k, d_target], true states of the same shape, and a mask [b, s-1-k] of real positions
    """
    tokens = adapter.tokens(embeddings)[texts.token_ids]
    steps = min(steps, texts.states.shape[1] - 1)
    if steps < 1:  # texts of one token have nothing to predict
        return
    inputs = texts.states[:, :-1], tokens[:, :-1]  # no state follows the last token
    for k, expected in enumerate(adapter.roll_out(*inputs, adapter.encode_events(texts.events), steps)):
        yield expected, texts.states[:, 1 + k :], texts.mask[:, 1 + k :]


def load_chained_adapter(path: Path, draft_layers: Sequence[int] | None = None) -> tuple[ChainedAdapter, dict[str, Any]]:
    """Load a chained adapter and its meta.

    Args:
        path: adapter.pt of train_hidden_adapter
        draft_layers: EventGPT's layers of this run; None skips the check

    Raises:
        UserError: the file is missing or damaged, or was trained on event states of another layer
    """
    remake_command = command_for("train_hidden_adapter", adapter="chained")
    adapter, meta = load_trained(path, "a chained adapter", ChainedAdapter, "num_events", remake_command)
    layers = trained_layers(path, meta, remake_command)
    if draft_layers is not None and layers[-1] != draft_layers[-1]:
        raise UserError(
            f"{path} was trained on event states of EventGPT's layer {layers[-1]}, this run ends at {draft_layers[-1]}. "
            f"Pass --draft_layers {' '.join(map(str, layers))}, or train again."
        )
    return adapter, meta
