"""The chained adapter: from the target's last verified state it goes on alone, token by token, remembering what EventGPT saw.

    v̂[t+1] = f(v[t], x[t], m[t-1], events)      x[t]: the token v[t] emits; m: a recurrent memory of the text so far

    token x[t] ─┐
    state v[t] ─┴─> GRU, memory m[t] ──> attends to EventGPT's states over its event tokens ──> v̂[t+1] ──W──> next draft x̂[t+1]
                        ^                                                                          │
                        └───────────────────────── the next step reads v̂[t+1] and x̂[t+1] ──────────┘

EventGPT is asked once per clip: its decoder never steps, so a draft costs this adapter and the target's head. It never sees v[t+1] or
anything later. Predicting the target's next state from its last one and the sampled token is EAGLE's idea (Li et al. 2401.15077);
here the head is recurrent, low-rank, and reads another model's eyes.
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

from feature_alignment.cli.advice import command_for
from feature_alignment.cli.console import UserError
from feature_alignment.storage.files import load_trained, trained_layers
from feature_alignment.storage.hidden_states import HiddenStates
from feature_alignment.storage.pretrained import load_pretrained, save_pretrained

HEADS = 4


class Seen(NamedTuple):
    """EventGPT's event states as keys and values: [b, heads, e, width / heads] each."""

    keys: Tensor
    values: Tensor


class _Scale(NamedTuple):
    """Mean and standard deviation per channel of what is read. Channels differ in size by orders of magnitude."""

    target: tuple[Tensor, Tensor]
    token: tuple[Tensor, Tensor]
    event: tuple[Tensor, Tensor]


def _mean_and_std(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), x.std(0, correction=0).clamp(min=1e-4)


def _standard(x: Tensor, scale: tuple[Tensor, Tensor]) -> Tensor:
    return (x - scale[0]) / scale[1]


class ChainedAdapter(nn.Module):
    """d_event: width of EventGPT's states; num_events: how many event tokens a clip has; width: of everything inside.

    blind: pay no attention to the events; what is lost is what they add
    """

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
        self.place = nn.Parameter(torch.randn(num_events, width) * 0.02)  # which event token is which
        self.mix, self.out = nn.Linear(2 * width, width), nn.Linear(width, d_target)
        self.scale: _Scale | None = None  # only while it learns

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def save_pretrained(self, directory: Path | str, meta: dict[str, Any]) -> None:
        """Write this adapter as a directory that can be shared; `python -m feature_alignment.adapters.share` adds a model card.

        Args:
            directory: made if missing
            meta: of its adapter.pt
        """
        save_pretrained(self, "chained", meta, directory)

    @classmethod
    def from_pretrained(cls, directory: Path | str) -> ChainedAdapter:
        """Load an adapter from a directory that `save_pretrained` wrote; raises UserError if it is altered or of another kind."""
        return load_pretrained(cls, "chained", directory)[0]

    def standardise(self, target: Tensor, embeddings: Tensor, events: Tensor) -> None:
        """Learn on standardised inputs from now on: states [p, d_target], embeddings [v, d_target], event states [.., d_event]."""
        self.scale = _Scale(*(_mean_and_std(x.float()) for x in (target, embeddings, events.flatten(0, -2))))

    @torch.no_grad()
    def folded(self) -> ChainedAdapter:
        """A copy that gives the same and has the scales in its weights: what is saved, and faster."""
        plain = copy.deepcopy(self)
        if self.scale is None:
            return plain
        (v_mean, v_std), (x_mean, x_std), (e_mean, e_std) = self.scale
        plain.scale = None
        for layer, mean, std in ((plain.state, v_mean, v_std), (plain.token, x_mean, x_std)):
            layer.weight /= std
            plain.state.bias.sub_(layer.weight @ mean)  # the two are only ever added
        for layer in () if self.geometry["blind"] else (plain.key, plain.value):
            layer.weight /= e_std
            layer.bias.sub_(layer.weight @ e_mean)
        plain.out.weight *= v_std[:, None]
        plain.out.bias.mul_(v_std).add_(v_mean)
        return plain

    def tokens(self, embeddings: Tensor) -> Tensor:
        """The target's input embeddings [v, d_target] as this adapter reads them: [v, width], made once."""
        return self.token(embeddings if self.scale is None else _standard(embeddings, self.scale.token))

    def see(self, events: Tensor) -> Seen:
        """EventGPT's states over its event tokens, [b, e, d_event]."""
        x = (events if self.scale is None else _standard(events, self.scale.event)) * (not self.geometry["blind"])
        split = lambda y: y.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # noqa: E731
        return Seen(split(self.key(x) + self.place), split(self.value(x)))

    def read(self, states: Tensor, tokens: Tensor, memory: Tensor | None) -> Tensor:
        """Memories [b, n, width] behind n states [b, n, d_target] and the tokens they emitted [b, n, width], in order.

        memory: [b, width] what was remembered before, None at the beginning of a text
        """
        x = self._joined(states, tokens)
        if x.shape[1] == 1 and memory is not None:  # drafting: the bare cell is twice as fast as the module around it
            return self._one_step(x, memory[:, None])
        return self.memory(x, None if memory is None else memory[None])[0]

    def expect(self, memory: Tensor, seen: Seen) -> Tensor:
        """The target states [b, n, d_target] that come next, for memories [b, n, width]."""
        query = self.query(memory).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        found = F.scaled_dot_product_attention(query, *seen).transpose(1, 2).flatten(2)
        expected = self.out(F.gelu(self.mix(torch.cat([memory, found], -1))))
        return expected if self.scale is None else expected * self.scale.target[1] + self.scale.target[0]

    def roll_out(self, states: Tensor, tokens: Tensor, seen: Seen, steps: int) -> list[Tensor]:
        """What chaining from every position expects, with the text known: `[k][:, t]` is v̂[t+1+k] from v[t], k states of its own.

        states: [b, n, d_target]; tokens: [b, n, width]; the k-th tensor is [b, n - k, d_target]
        """
        memory = self.read(states, tokens, None)
        expected = [self.expect(memory, seen)]
        for k in range(1, steps):
            memory = self._one_step(self._joined(expected[-1][:, :-1], tokens[:, k:]), memory[:, :-1])
            expected.append(self.expect(memory, seen))
        return expected

    def _joined(self, states: Tensor, tokens: Tensor) -> Tensor:
        return F.gelu(self.state(states if self.scale is None else _standard(states, self.scale.target)) + tokens)

    def _one_step(self, x: Tensor, memory: Tensor) -> Tensor:
        """The GRU's step from every position at once: [b, n, width] each."""
        w_ih, w_hh, b_ih, b_hh = self.memory.all_weights[0]
        return torch.gru_cell(x.flatten(0, 1), memory.flatten(0, 1), w_ih, w_hh, b_ih, b_hh).unflatten(0, x.shape[:2])


@dataclass(frozen=True)
class Texts:
    """Some rows, cut to the longest: states [b, s, d_target], token_ids [b, s], mask [b, s], events [b, e, d_event]."""

    states: Tensor
    token_ids: Tensor
    mask: Tensor
    events: Tensor


def text_batches(states: HiddenStates, batches: Iterable[Tensor], device: str) -> Iterator[Texts]:
    """The rows of each batch. States stay in order: the chained adapter reads texts."""
    assert states.events is not None  # asked for when they were loaded
    for rows in batches:
        s = int(states.lengths[rows].max())
        parts = (states.target[rows, :s].float(), states.token_ids[rows, :s], states.mask[rows, :s], states.events[rows].float())
        states.refuse_non_finite(rows, parts[0], parts[3])
        yield Texts(*(part.to(device) for part in parts))


def chain_over(adapter: ChainedAdapter, texts: Texts, embeddings: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Chained from every position: per step k, what is expected [b, s-1-k, d_target], the true states, and where they are real.

    embeddings: [v, d_target], the target's; the text is the target's own, so this is what drafting meets as long as it is right
    """
    tokens = adapter.tokens(embeddings)[texts.token_ids]
    steps = min(steps, texts.states.shape[1] - 1)
    inputs = texts.states[:, :-1], tokens[:, :-1]  # nothing follows the last token
    for k, expected in enumerate(adapter.roll_out(*inputs, adapter.see(texts.events), steps)):
        yield expected, texts.states[:, 1 + k :], texts.mask[:, 1 + k :]


def load_chained_adapter(path: Path, draft_layers: Sequence[int] | None = None) -> tuple[ChainedAdapter, dict[str, Any]]:
    """A chained adapter and its meta. Refuses (UserError) one trained on states of another layer of EventGPT."""
    remake_command = command_for("train_hidden_adapter", adapter="chained")
    adapter, meta = load_trained(path, "a chained adapter", ChainedAdapter, "num_events", remake_command)
    layers = trained_layers(path, meta, remake_command)
    if draft_layers is not None and layers[-1] != draft_layers[-1]:
        raise UserError(
            f"{path} was trained on event states of EventGPT's layer {layers[-1]}, this run ends at {draft_layers[-1]}. "
            f"Pass --draft_layers {' '.join(map(str, layers))}, or train again."
        )
    return adapter, meta
