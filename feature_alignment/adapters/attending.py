"""The attending adapter: one transformer layer that drafts from the target's hidden states, with a key-value cache of its own.

    input at position t    state v[t], token x[t] that it emitted, the token before it, and table candidates for x[t+1]
    attention over         EventGPT's event states · the target's hidden states on its prompt · all inputs so far
    output                 v̂[t+1]; draft token x̂[t+1] = argmax of W v̂[t+1] plus a gated bonus for the candidates

For a draft token there is no target state yet: a [w, w] map of the adapter's own last output replaces it. The target's prompt states are a
by-product of its prefill. EventGPT reads its events once per clip. State and token inputs are low-rank maps, initialized with principal
directions, so that everything inside has width w. Training on one's own roll-out follows EAGLE-3 (Li et al. 2503.01840); event states,
prompt states and table candidates (`tables`) are added here.
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
from feature_alignment.adapters.scaling import InputScale, standardized
from feature_alignment.cli.advice import command_for
from feature_alignment.cli.console import UserError
from feature_alignment.storage.files import load_trained, trained_layers
from feature_alignment.storage.pretrained import SharedModule

HEADS = 4
EPS = 1e-6  # of the norms
EVENT_RANK = 64
ROPE_BASE = 10_000.0
Part = Literal["events", "prompt", "candidates"]


class KeysValues(NamedTuple):
    """Keys and values of attention, [b, heads, n, w / heads] each."""

    keys: Tensor
    values: Tensor


class Chain(NamedTuple):
    """Output of the adapter at m positions [b, m, w], and the keys and values of its inputs there."""

    output: Tensor
    own: KeysValues


def _principal(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The strongest principal directions of standardized rows x [p, d], at most `width`: [k, d], and the standard deviations [k]."""
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    k = min(width, x.shape[1])
    return vectors.T.flip(0)[:k], values.flip(0)[:k].clamp(min=1e-8).sqrt()


class AttendingAdapter(SharedModule):
    """A transformer layer over the target's hidden states.

    Args:
        d_target: width of the target's states
        d_event: width of EventGPT's states
        num_events: event tokens of a clip
        num_ids: token ids that may be drafted
        num_entries: rows of the n-gram table
        num_prompt: number of prompt positions it attends to
        width: w, of all hidden layers
        without: inputs that are left out, to measure what they add
        dropout: dropout rate in training
    """

    kind = "attending"
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
        self.event_place = nn.Parameter(torch.randn(num_events, EVENT_RANK) * 0.02)  # distinguishes the event tokens
        self.event_keys = nn.Linear(EVENT_RANK, 2 * width, bias=False)
        self.attention_norm, self.mlp_norm, self.output_norm = (nn.RMSNorm(width, eps=EPS) for _ in range(3))
        self.attention, self.mix = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.out, self.gate = nn.Linear(width, d_target), nn.Linear(width, tables.SOURCES)
        nn.init.normal_(self.bucket.weight, std=0.02)
        self.register_buffer("ids", torch.zeros(num_ids, dtype=torch.int64))
        self.register_buffer("table", torch.zeros(num_entries, tables.COLUMNS, dtype=torch.int32))
        self.scale: InputScale | None = None  # in training only

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters; the table is not one."""
        return sum(p.numel() for p in self.parameters())

    @property
    def reads_prompt(self) -> bool:
        """Whether it attends to the target's states on the prompt."""
        return "prompt" not in self.without

    @torch.no_grad()
    def initialize(self, target: Tensor, embeddings: Tensor, seen: Tensor, events: Tensor) -> None:
        """Standardize inputs from now on, and initialize input and output maps with the principal directions of states and embeddings.

        Args:
            target: [p, d_target], states
            embeddings: [v, d_target], the target's input embeddings
            seen: [q, d_target], those of the token ids in the training texts
            events: [.., d_event], event states
        """
        self.scale = InputScale.of(target, embeddings, events)
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
        """A copy with the same outputs whose weights include the scales; this is what is saved."""
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

    # ---- inputs

    def read_states(self, states: Tensor) -> Tensor:
        """The state input [.., w] of states [.., d_target]."""
        inputs: Tensor = self.state(states if self.scale is None else standardized(states, self.scale.target))
        return inputs

    def read_tokens(self, embeddings: Tensor) -> Tensor:
        """The token input [.., w] of the target's input embeddings [.., d_target]."""
        inputs: Tensor = self.token(embeddings if self.scale is None else standardized(embeddings, self.scale.token))
        return inputs

    def read_events(self, events: Tensor) -> KeysValues:
        """Keys and values of EventGPT's event states [b, e, d_event]; e = 0 if the adapter is trained without events."""
        if "events" in self.without:
            events, position = events[:, :0], self.event_place[:0]
        else:
            position = self.event_place
        x = self.event(events if self.scale is None else standardized(events, self.scale.event))
        keys, values = self.event_keys(x + position).chunk(2, -1)
        return KeysValues(_split_heads(keys), _split_heads(values))

    def read_candidates(self, proposed: Tensor, buckets: Tensor) -> Tensor | float:
        """The candidate input [.., w]; 0 if the adapter is trained without candidates.

        Args:
            proposed: [.., SOURCES, w], token inputs of the candidates, zeros for a source without one
            buckets: [.., SOURCES] int64, their confidence buckets
        """
        if "candidates" in self.without:
            return 0.0
        inputs: Tensor = self.candidate(proposed.flatten(-2)) + self.bucket(buckets).sum(-2)
        return inputs

    def inputs(self, states: Tensor, tokens: Tensor, before: Tensor, proposals: Tensor | float = 0.0) -> Tensor:
        """The input [.., w] at each position: the sum of state, token, previous token and candidate inputs [.., w]."""
        return self.joined(states, self.around(tokens, before, proposals))

    def around(self, tokens: Tensor, before: Tensor, proposals: Tensor | float = 0.0) -> Tensor:
        """The part [.., w] of `inputs` that does not depend on the state."""
        rest: Tensor = tokens + self.previous(before) + proposals
        return rest

    def joined(self, states: Tensor, rest: Tensor) -> Tensor:
        """The input [.., w] of state inputs and `around`, both [.., w]."""
        return self._dropped(states + rest)

    def prompt_inputs(self, states: Tensor, read: Tensor, mask: Tensor | None = None) -> Tensor:
        """The input [b, p, w] at prompt positions; the first one has no token before it.

        Args:
            states: [b, p, d_target], the target's states
            read: [b, p, d_target], the target's input embedding after each of them, of a token or of vision
            mask: [b, p] bool, False for padding in front
        """
        tokens = self.read_tokens(read)
        if mask is not None:
            tokens = tokens * mask[..., None]
        return self.inputs(self.read_states(states), tokens, F.pad(tokens[:, :-1], (0, 0, 1, 0)))

    # ---- the layer

    def keys(self, inputs: Tensor, positions: Tensor) -> KeysValues:
        """Keys and values of inputs [b, n, w] at positions [n] or [b, n]."""
        keys, values = F.linear(self.attention_norm(inputs), self.attention.weight[self.width :]).chunk(2, -1)
        return KeysValues(rotated(_split_heads(keys), positions), _split_heads(values))

    def forward(
        self, inputs: Tensor, positions: Tensor, events: KeysValues, text: KeysValues, hidden: Tensor | None, chain: Sequence[KeysValues]
    ) -> Chain:
        """Output at m positions.

        Args:
            inputs: [b, m, w]
            positions: [m] or [b, m] int64, their positions
            events: keys and values of the event states
            text: keys and values of n earlier positions
            hidden: [b, m, n] bool, True where a position must not attend to one of `text`; None if it attends to all
            chain: further keys and values, one for each of the m positions: its earlier draft tokens. Its own are added
        """
        queries, keys, values = map(_split_heads, self.attention(self.attention_norm(inputs)).chunk(3, -1))
        turned = rotated(queries, positions)
        own = KeysValues(rotated(keys, positions), values)
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
        x = x + self._dropped(self.down(F.gelu(self.up(self.mlp_norm(x)))))
        return Chain(self.output_norm(x), own)

    def expect(self, output: Tensor) -> Tensor:
        """The predicted target states [.., d_target] of outputs [.., w]."""
        expected: Tensor = self.out(output)
        return expected if self.scale is None else expected * self.scale.target[1] + self.scale.target[0]

    def bonus(self, output: Tensor) -> Tensor:
        """The gated bonus [.., SOURCES] on the logit of each source's candidate, of outputs [.., w]."""
        bonus: Tensor = self.gate(output)
        return bonus

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.dropout > 0 and torch.is_grad_enabled())


def _split_heads(x: Tensor) -> Tensor:
    """[b, n, w] -> [b, heads, n, w / heads]."""
    heads: Tensor = x.unflatten(-1, (HEADS, -1))
    return heads.transpose(1, 2)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding of x [b, heads, n, d] at positions [n] or [b, n], at least 0."""
    cos, sin = rotations(x.shape[-1] // 2, x.device, x.dtype, 64 * (int(positions.max()) // 64 + 1) if positions.numel() else 64)
    cos, sin = cos[positions], sin[positions]
    if positions.ndim == 2:
        cos, sin = cos[:, None], sin[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@lru_cache(maxsize=64)
def rotations(half: int, device: torch.device, dtype: torch.dtype, positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine at each position, [positions, half]."""
    with torch.inference_mode(False):
        speeds = ROPE_BASE ** (-torch.arange(half, device=device, dtype=torch.float64) / half)
        angles = torch.arange(positions, device=device)[:, None] * speeds
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
