"""The attending adapter: one transformer layer drafts from the target's last states, token by token, with a cache of its own.

    at place t it reads    the state v[t], the token x[t] it emitted, the token before, and what tables propose for x[t+1]
    it attends to          EventGPT's event states · the target's own states of its prompt · its own inputs so far
    it gives               v̂[t+1], and the draft x̂[t+1] through the target's head, with a gated bonus for what the tables propose

Where a state is not verified yet, a [w, w] map of this adapter's own last output stands for it. The target's states of its prompt are
there once it has read the prompt, and cost nothing. EventGPT reads its events once per clip. Inputs are low-rank maps that begin as
principal directions, so that all inside is of width w. Drafting from one's own states over a trained roll-out is EAGLE-3's idea
(Li et al. 2503.01840); here the drafter also reads another model's eyes, the prompt and n-gram tables (see `tables`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feature_alignment.adapters import tables
from feature_alignment.cli.advice import command_for
from feature_alignment.cli.console import UserError
from feature_alignment.storage.files import load_trained, trained_layers

HEADS = 4
EVENT_RANK = 64
ROPE_BASE = 10_000.0
Part = Literal["events", "prompt", "candidates"]


class Keys(NamedTuple):
    """Keys and values [b, heads, n, width / heads]."""

    keys: Tensor
    values: Tensor


class Chain(NamedTuple):
    """The adapter's output at some places [b, m, w], and the keys and values of its inputs there."""

    output: Tensor
    own: Keys


class _Scale(NamedTuple):
    """Mean and standard deviation per channel of what is read."""

    target: tuple[Tensor, Tensor]
    token: tuple[Tensor, Tensor]
    event: tuple[Tensor, Tensor]


def _mean_and_std(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), x.std(0, correction=0).clamp(min=1e-4)


def _principal(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` strongest principal directions of standardized rows x [p, d], as rows [k, d], and the spread along each [k]."""
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    k = min(width, x.shape[1])
    return vectors.T.flip(0)[:k], values.flip(0)[:k].clamp(min=1e-8).sqrt()


class AttendingAdapter(nn.Module):
    """
    Args:
        d_target: width of the target's states
        d_event: width of EventGPT's states
        num_events: event tokens of a clip
        num_ids: token ids that may be drafted
        num_entries: rows of the n-gram table
        num_prompt: how many of the prompt's last states are read
        width: of everything inside
        without: parts that are left out, to see what they add
        dropout: while it learns
    """

    ids: Tensor
    table: Tensor

    def __init__(
        self,
        d_target: int,
        d_event: int,
        num_events: int,
        num_ids: int,
        num_entries: int = 0,
        num_prompt: int = 160,
        width: int = 256,
        without: Sequence[Part] = (),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(d_target, d_event, num_events, num_ids, width) < 1 or num_prompt < 0 or width % (2 * HEADS):
            raise ValueError(
                f"sizes must be positive and the width a multiple of {2 * HEADS}, got d_target={d_target}, d_event={d_event}, "
                f"num_events={num_events}, num_ids={num_ids}, num_prompt={num_prompt}, width={width}"
            )
        self.geometry = {name: value for name, value in locals().items() if name not in ("self", "__class__", "without", "dropout")}
        self.geometry["without"] = list(without)
        self.width, self.num_prompt, self.without, self.dropout = width, num_prompt, frozenset(without), dropout
        self.state, self.token = nn.Linear(d_target, width), nn.Linear(d_target, width)
        self.previous, self.own = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.candidate, self.bucket = nn.Linear(tables.SOURCES * width, width, bias=False), nn.Embedding(tables.BUCKETS, width)
        self.event = nn.Linear(d_event, EVENT_RANK)
        self.event_place = nn.Parameter(torch.randn(num_events, EVENT_RANK) * 0.02)  # which event token is which
        self.event_keys = nn.Linear(EVENT_RANK, 2 * width, bias=False)
        self.read_norm, self.think_norm, self.said_norm = (nn.RMSNorm(width, eps=1e-6) for _ in range(3))
        self.attention, self.mix = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.out, self.gate = nn.Linear(width, d_target), nn.Linear(width, tables.SOURCES)
        nn.init.normal_(self.bucket.weight, std=0.02)
        self.register_buffer("ids", torch.zeros(num_ids, dtype=torch.int64))
        self.register_buffer("table", torch.zeros(num_entries, tables.COLUMNS, dtype=torch.int32))
        self.scale: _Scale | None = None  # only while it learns

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    # ------------------------------------------------------------------------------------------------- what it begins with

    @torch.no_grad()
    def begin(self, target: Tensor, embeddings: Tensor, seen: Tensor, events: Tensor) -> None:
        """Learn on standardized inputs from now on, which are read along their principal directions.

        Args:
            target: [p, d_target], states
            embeddings: [v, d_target], the target's input embeddings
            seen: [q, d_target], those of them that are read
            events: [.., d_event], event states
        """
        self.scale = _Scale(*(_mean_and_std(x.float()) for x in (target, embeddings, events.flatten(0, -2))))
        for layer, rows, scale in ((self.state, target, self.scale.target), (self.token, seen, self.scale.token)):
            directions, spread = _principal((rows.float() - scale[0]) / scale[1], self.width)
            k = len(directions)
            layer.weight[:k] = directions / spread.square().mean().sqrt()
            layer.bias.zero_()
            if layer is self.state:
                self.out.weight[:, :k] = (directions * spread[:, None]).T
                self.out.bias.zero_()

    @torch.no_grad()
    def folded(self) -> AttendingAdapter:
        """A copy that gives the same and has the scales in its weights: what is saved."""
        plain = copy.deepcopy(self)
        plain.dropout = 0.0
        if self.scale is None:
            return plain
        plain.scale = None
        layers = (plain.state, plain.token, plain.event)
        for layer, (mean, std) in zip(layers, self.scale, strict=True):
            layer.weight /= std
            layer.bias.sub_(layer.weight @ mean)
        mean, std = self.scale.target
        plain.out.weight *= std[:, None]
        plain.out.bias.mul_(std).add_(mean)
        return plain

    # ------------------------------------------------------------------------------------------------------- what it reads

    def read_states(self, states: Tensor) -> Tensor:
        """[.., d_target] -> [.., w]"""
        return self.state(states if self.scale is None else (states - self.scale.target[0]) / self.scale.target[1])

    def read_tokens(self, embeddings: Tensor) -> Tensor:
        """The target's input embeddings [.., d_target] as this adapter reads them [.., w]."""
        return self.token(embeddings if self.scale is None else (embeddings - self.scale.token[0]) / self.scale.token[1])

    def read_events(self, events: Tensor) -> Keys:
        """EventGPT's states over its event tokens [b, e, d_event] as keys and values; none of them where events are left out."""
        if "events" in self.without:
            events, place = events[:, :0], self.event_place[:0]
        else:
            place = self.event_place
        x = self.event(events if self.scale is None else (events - self.scale.event[0]) / self.scale.event[1])
        keys, values = self.event_keys(x + place).chunk(2, -1)
        return Keys(_by_head(keys), _by_head(values))

    def read_candidates(self, proposed: Tensor, buckets: Tensor) -> Tensor | float:
        """What the tables propose, as a part of the input.

        Args:
            proposed: [.., SOURCES, w], from `read_tokens`, zeros where a source proposes nothing
            buckets: [.., SOURCES]
        """
        if "candidates" in self.without:
            return 0.0
        return self.candidate(proposed.flatten(-2)) + self.bucket(buckets).sum(-2)

    def inputs(self, states: Tensor, tokens: Tensor, before: Tensor, proposals: Tensor | float = 0.0) -> Tensor:
        """The inputs [.., w] of places, from their states and tokens and the tokens before [.., w] each."""
        return self._dropped(states + tokens + self.previous(before) + proposals)

    # ------------------------------------------------------------------------------------------------------- what it thinks

    def keys(self, inputs: Tensor, places: Tensor) -> Keys:
        """Keys and values of inputs [b, n, w] at places [n] or [b, n]."""
        _, keys, values = self.attention(self.read_norm(inputs)).chunk(3, -1)
        return Keys(rotated(_by_head(keys), places), _by_head(values))

    def forward(self, inputs: Tensor, places: Tensor, events: Keys, text: Keys, hidden: Tensor | None, chain: Sequence[Keys]) -> Chain:
        """The outputs at places whose inputs [b, m, w] are given.

        Args:
            inputs: of these places
            places: [m] or [b, m]
            events: keys and values of the event states
            text: of places before and, where the input itself is not in `chain`, of these
            hidden: [b, m, n], True where a place does not see one of `text`; None where all is seen
            chain: of other inputs, one for each place, with m entries each; the places' own are added to them
        """
        queries, keys, values = map(_by_head, self.attention(self.read_norm(inputs)).chunk(3, -1))
        turned = rotated(queries, places)
        own = Keys(rotated(keys, places), values)
        chain = [*chain, own]
        scores = turned @ text.keys.transpose(-1, -2)
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None], -torch.inf)
        alone = torch.stack([(turned * k.keys).sum(-1) for k in chain], -1)
        e, n = events.keys.shape[2], text.keys.shape[2]
        weights = (torch.cat([queries @ events.keys.transpose(-1, -2), scores, alone], -1) * queries.shape[-1] ** -0.5).softmax(-1)
        found = weights[..., :e] @ events.values + weights[..., e : e + n] @ text.values
        for i, k in enumerate(chain):
            found = found + weights[..., e + n + i, None] * k.values
        x = inputs + self._dropped(self.mix(found.transpose(1, 2).flatten(2)))
        x = x + self._dropped(self.down(F.gelu(self.up(self.think_norm(x)))))
        return Chain(self.said_norm(x), own)

    def expect(self, output: Tensor) -> Tensor:
        """The target states [.., d_target] that outputs [.., w] expect next."""
        expected = self.out(output)
        return expected if self.scale is None else expected * self.scale.target[1] + self.scale.target[0]

    def bonus(self, output: Tensor) -> Tensor:
        """What is added to the logit of each source's proposal: [.., SOURCES]"""
        return self.gate(output)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.dropout > 0 and torch.is_grad_enabled())


def _by_head(x: Tensor) -> Tensor:
    """[b, n, w] -> [b, heads, n, w / heads]"""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def rotated(x: Tensor, places: Tensor) -> Tensor:
    """Rotary positions: x [b, heads, n, d] at places [n] or [b, n], from 0 on."""
    cos, sin = _rotations(x.shape[-1] // 2, x.device, x.dtype, 64 * (int(places.max()) // 64 + 1) if places.numel() else 64)
    cos, sin = cos[places], sin[places]
    if places.ndim == 2:
        cos, sin = cos[:, None], sin[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@lru_cache(maxsize=64)
def _rotations(half: int, device: torch.device, dtype: torch.dtype, places: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine at each place, [places, half]."""
    with torch.inference_mode(False):
        speeds = ROPE_BASE ** (-torch.arange(half, device=device, dtype=torch.float64) / half)
        angles = torch.arange(places, device=device)[:, None] * speeds
        return angles.cos().to(dtype), angles.sin().to(dtype)


def load_attending_adapter(path: Path, draft_layers: Sequence[int] | None = None) -> tuple[AttendingAdapter, dict[str, Any]]:
    """An attending adapter and its meta. Refuses (UserError) one trained on states of another layer of EventGPT."""
    make_it = command_for("train_hidden_adapter", adapter="attending")
    adapter, meta = load_trained(path, "an attending adapter", AttendingAdapter, "num_entries", make_it)
    layers = trained_layers(path, meta, make_it)
    if draft_layers is not None and layers[-1] != draft_layers[-1]:
        raise UserError(
            f"{path} was trained on event states of EventGPT's layer {layers[-1]}, this run ends at {draft_layers[-1]}. "
            f"Pass --draft_layers {' '.join(map(str, layers))}, or train again."
        )
    return adapter, meta
