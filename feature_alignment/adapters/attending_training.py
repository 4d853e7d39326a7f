"""Training of the attending adapter: roll-outs from random positions, and the loss.

Training inputs look like those of drafting: own outputs instead of target states, and tables without the text's own clip.
`cfg` is the TrainConfig of train_hidden_adapter; its device is that of this process.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from feature_alignment.adapters import tables
from feature_alignment.adapters.attending import AttendingAdapter, KeysValues, Part
from feature_alignment.adapters.attending_texts import PromptedTexts, Proposals, answers_of, drafted_ids, prompted_texts, proposals
from feature_alignment.adapters.fitting import Batch, Checkpoint, History, ProcessShare, fit, mean_over_positions, shuffled
from feature_alignment.adapters.rounds import ROUND_DRAFT_TOKENS, tokens_per_pass
from feature_alignment.adapters.training import STEP_DECAY, TV_WEIGHT, mean_variance, mixed_precision, total_variation
from feature_alignment.cli.console import UserError
from feature_alignment.storage.hidden_states import HiddenStates


class Step(NamedTuple):
    """One draft step from m positions of each text.

    Args:
        expected: [b, m, d_target], predicted target states
        logits: [b, m, ids]
        position: [b, m] int64, position of the draft token
        real: [b, m] bool, whether the text is long enough
    """

    expected: Tensor
    logits: Tensor
    position: Tensor
    real: Tensor


class Reader:
    """Teacher-forced roll-outs of an adapter, for training and for scores.

    Args:
        adapter: trained or in training
        head: [v, d_target], W
        embeddings: [v, d_target]
    """

    def __init__(self, adapter: AttendingAdapter, head: Tensor, embeddings: Tensor) -> None:
        self.adapter, self.embeddings = adapter, embeddings
        self.head = head[adapter.ids]
        self.column_of = torch.full(
            (len(head) + 1,), -1, device=head.device
        )  # token id -> its row of `head`; the last entry is for NO_TOKEN
        self.column_of[adapter.ids] = torch.arange(len(adapter.ids), device=head.device)

    def tokens(self, *ids: Tensor) -> list[Tensor]:
        """Token inputs [.., w] of each tensor of token ids [..] int64; zeros for negative ids."""
        every = torch.cat([x.flatten() for x in ids])
        known, where = every.clamp(min=0).unique(return_inverse=True)
        read = F.embedding(where, self.adapter.read_tokens(self.embeddings[known])) * (every >= 0)[:, None]
        return [part.view(*x.shape, -1) for x, part in zip(ids, read.split([x.numel() for x in ids]), strict=True)]

    def roll_out(self, texts: PromptedTexts, origins: Tensor, steps: int) -> Iterator[Step]:
        """Draft from given positions with the text known: step k drafts position origin + 1 + k after k draft tokens.

        A step reads the target states up to its origin and the tokens before the one it drafts.

        Args:
            texts: the batch
            origins: [b, m] int64
            steps: number of draft tokens
        """
        a, s, p = self.adapter, texts.states.shape[1], texts.prompt.shape[1] if self.adapter.reads_prompt else 0
        before = torch.cat([texts.before[:, None], texts.token_ids[:, :-1]], 1)
        tokens, tokens_before, candidates = self.tokens(texts.token_ids, before, texts.proposed)
        read, rest = a.read_states(texts.states), a.around(tokens, tokens_before, a.read_candidates(candidates, texts.buckets))
        text, hidden = self._seen(texts, a.joined(read, rest))
        events, head = a.read_events(texts.events), self._folded_head()

        def at(x: Tensor, position: Tensor) -> Tensor:
            return x.gather(1, position[..., None].expand(-1, -1, x.shape[-1]))

        late = torch.arange(s, device=origins.device) >= origins[..., None]  # the origin itself is in `chain`
        hidden = torch.cat([hidden[:, None].expand(-1, origins.shape[1], -1), late], -1)
        output, chain = None, list[KeysValues]()
        for k in range(steps):
            position = origins + k
            real = (position + 1 < s) & (position >= 0)
            here = position.clamp(max=s - 1)
            state = at(read, here) if output is None else a.own(output)
            output, own = a(a.joined(state, at(rest, here)), p + position, events, text, hidden, chain)
            chain.append(own)
            wanted = (position + 1).clamp(max=s - 1)
            real = real & texts.mask.gather(1, wanted)
            yield Step(a.expect(output), self._logits(output, head, texts.proposed, here), wanted, real)

    def _seen(self, texts: PromptedTexts, of_text: Tensor) -> tuple[KeysValues, Tensor]:
        """Keys and values of prompt and text, and which prompt positions [b, p] are masked; p = 0 if the adapter reads none."""
        a = self.adapter
        if not a.reads_prompt:
            return a.keys(of_text, torch.arange(of_text.shape[1], device=of_text.device)), texts.prompt_mask[:, :0]
        inputs = torch.cat([a.prompt_inputs(texts.prompt, texts.prompt_inputs, texts.prompt_mask), of_text], 1)
        return a.keys(inputs, torch.arange(inputs.shape[1], device=of_text.device)), ~texts.prompt_mask

    def _folded_head(self) -> tuple[Tensor, Tensor]:
        """Weight [ids, w] and bias [ids] of the draft logits of an output: `head` after `AttendingAdapter.expect`."""
        a = self.adapter
        rows, bias = (self.head, a.out.bias) if a.scale is None else (self.head * a.scale.target[1], a.out.bias)
        shift = 0.0 if a.scale is None else self.head @ a.scale.target[0]
        return rows @ a.out.weight, rows @ bias + shift

    def _logits(self, output: Tensor, head: tuple[Tensor, Tensor], proposed: Tensor, here: Tensor) -> Tensor:
        logits = F.linear(output, *head)
        if "candidates" in self.adapter.without:
            return logits
        column = self.column_of[proposed].gather(1, here[..., None].expand(-1, -1, tables.SOURCES))  # [b, m, SOURCES]
        return logits.scatter_add(-1, column.clamp(min=0), (self.adapter.bonus(output) * (column >= 0)).to(logits.dtype))


def losses(
    reader: Reader, texts: PromptedTexts, origins: Tensor, variance: float, cfg: Any, num_drafts: int = 0
) -> tuple[Tensor, dict[str, Tensor], int, Tensor]:
    """The training loss and its parts.

    Args:
        reader: of the adapter in training
        texts: the batch
        origins: [b, m] int64, positions to draft from
        variance: mean variance of the channels of the target states
        cfg: settings
        num_drafts: draft at least so many tokens; those after `cfg.roll_out_steps` are only compared with the text

    Returns:
        the loss; the scores for the history; the number of draft tokens that both are means of (later steps weigh less); and which
        draft tokens are the text's own, [b, m, steps] bool
    """
    says = (texts.states @ reader.head.T).log_softmax(-1).flatten(0, 1)
    target = says.exp()
    entropy, labels = -(target * says).sum(-1), reader.column_of[texts.token_ids].flatten()
    total: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=says.device))
    steps, hits = max(cfg.roll_out_steps, num_drafts), []
    weights, count, weight = 0.0, 0, 1.0
    for k, step in enumerate(reader.roll_out(texts, origins, steps)):
        index = (step.position + torch.arange(len(origins), device=says.device)[:, None] * texts.states.shape[1]).flatten()
        real, logits, label = step.real.flatten(), step.logits.flatten(0, 1).log_softmax(-1), labels[index]
        of_label = logits.gather(-1, label.clamp(min=0)[:, None])[:, 0]
        match = (of_label >= logits.amax(-1)) & (label >= 0) & real
        hits.append(match.view_as(step.real))
        if k >= cfg.roll_out_steps:
            continue
        expected, wanted, soft = step.expected.flatten(0, 1).float(), texts.states.flatten(0, 1)[index], target[index]
        parts = {
            "mse": (expected - wanted).square().mean(-1) / variance,
            "cosine": F.cosine_similarity(expected, wanted, dim=-1),
            "kl": -entropy[index] - (soft * logits).sum(-1),
            "ce": -of_label * (label >= 0),
            "token_match": match.float(),
        }
        if cfg.loss == "tv":
            parts["tv"] = total_variation(logits, soft)
        for name, values in parts.items():
            total[name] = total[name] + weight * (values * real).sum()
        number = int(real.sum())
        weights, count, weight = weights + weight * number, count + number, weight * STEP_DECAY
    means = {name: value / max(weights, 1e-9) for name, value in total.items()}
    loss = (1 - cfg.soft_targets) * means["ce"] + cfg.soft_targets * means["kl"]
    if cfg.loss == "tv":
        loss = TV_WEIGHT * means["tv"] + (1 - TV_WEIGHT) * loss
    elif cfg.loss == "ce_cosine":
        loss = loss + cfg.cosine_weight * (1 - means["cosine"])
    return loss, {"loss": loss, **means}, count, torch.stack(hits, -1)


def train_attending(
    states: HiddenStates,
    validation: HiddenStates,
    head: Tensor,
    embeddings: Tensor,
    cfg: Any,
    checkpoint: Checkpoint | None = None,
    share: ProcessShare | None = None,
) -> tuple[AttendingAdapter, History]:
    """Train the attending adapter on its own roll-outs from random positions of each text.

    Args:
        states: to train on, with event states and prompt states
        validation: to choose the best epoch by
        head: [v, d_target], the target's LM head
        embeddings: [v, d_target], the target's input embeddings
        cfg: settings
        checkpoint: to resume from and to write; None for neither
        share: this process's part of each batch

    Returns:
        the adapter of the best epoch and the scores of all epochs
    """
    share = share or ProcessShare()
    torch.manual_seed(cfg.seed)
    head, embeddings = head.float().to(cfg.device), embeddings.float().to(cfg.device)
    if int(states.lengths.max()) < 2 or int(validation.lengths.max()) < 2:
        raise UserError("the attending adapter learns from texts of at least two tokens; these have one.")
    answers = answers_of(states)
    counts = tables.Counts(answers)
    entries, ids = counts.entries(), drafted_ids(answers)
    found = proposals(states, counts, leave_out=True), proposals(validation, tables.NGramTable(entries), leave_out=False)
    adapter, variance = initialized_adapter(states, found[0], embeddings, entries, ids, cfg)
    reader = Reader(adapter, head, embeddings)

    def score(texts: PromptedTexts, origins: Tensor) -> Batch:
        with mixed_precision(str(cfg.device), on_cpu=True):
            return Batch(*losses(reader, texts, origins, variance, cfg)[:3])

    def epoch(number: int) -> Iterator[Batch]:
        batches = tuple(map(share.rows, shuffled(len(states.target), cfg.batch_size, cfg.seed, number)))
        chance = torch.Generator().manual_seed(cfg.seed + 1_000_003 * number + 1)
        torch.manual_seed(cfg.seed + number)  # dropout is the same after a resume
        for rows, texts in zip(batches, prompted_texts(states, found[0], batches, cfg.device, cfg.reads_prompt), strict=True):
            origins = random_origins(states.lengths[rows], cfg.origins, chance).to(cfg.device)
            yield score(texts, origins)._replace(rows=tuple(rows.tolist()))

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        batches = share.rows(torch.arange(len(validation.target))).split(16)
        scores, bits = [], torch.zeros(*validation.mask.shape, ROUND_DRAFT_TOKENS, dtype=torch.uint8, device=cfg.device)
        for rows, texts in zip(batches, prompted_texts(validation, found[1], batches, cfg.device, cfg.reads_prompt), strict=True):
            origins = all_origins(texts)[:, :-1]
            with mixed_precision(str(cfg.device)):
                _, parts, count, correct = losses(reader, texts, origins, variance, cfg, ROUND_DRAFT_TOKENS)
            scores.append((count, parts))
            bits[rows, 1 : 1 + origins.shape[1]] = correct[..., :ROUND_DRAFT_TOKENS].to(bits)  # a round at t follows position t - 1
        share.all_reduce(bits)
        passes = tokens_per_pass(bits.cpu() > 0, validation.mask, validation.ended)
        return {**mean_over_positions(scores, share), "tokens_per_pass": passes}

    steps = math.ceil(len(states.target) / cfg.batch_size)
    return fit(adapter, epoch, steps, evaluate, adapter.folded, cfg, states.names, checkpoint, share)


def initialized_adapter(
    states: HiddenStates, found: Proposals, embeddings: Tensor, entries: Tensor, ids: Tensor, cfg: Any
) -> tuple[AttendingAdapter, float]:
    """A new adapter with its table, draft vocabulary and scales, and the mean variance of the target states."""
    assert states.prompt is not None  # asked for when the split was loaded
    (sample,) = prompted_texts(states, found, shuffled(len(states.target), 512, 0, 0)[:1], cfg.device, reads_prompt=False)
    real = sample.states[sample.mask]
    num_events, d_event = sample.events.shape[1:]
    left_out: dict[Part, bool] = {"events": cfg.blind, "prompt": not cfg.reads_prompt, "candidates": "candidates" in cfg.without}
    without = [part for part, is_left_out in left_out.items() if is_left_out]
    adapter = AttendingAdapter(
        real.shape[1],
        d_event,
        num_events,
        num_ids=len(ids),
        num_entries=len(entries),
        num_prompt=states.prompt.shape[1],  # how far lookup looks back, too
        width=cfg.bottleneck,
        without=without,
        dropout=cfg.dropout,
    )
    adapter.ids.copy_(ids)
    adapter.table.copy_(entries)
    adapter.to(cfg.device).initialize(real, embeddings, embeddings[ids.to(cfg.device)], sample.events)
    return adapter, mean_variance(real)


def random_origins(lengths: Tensor, count: int, chance: torch.Generator) -> Tensor:
    """Random positions [b, count] int64, each with at least one token after it."""
    return (torch.rand(len(lengths), count, generator=chance) * (lengths[:, None] - 1).clamp(min=1)).long()


def all_origins(texts: PromptedTexts) -> Tensor:
    """All positions [b, s] int64."""
    return torch.arange(texts.states.shape[1], device=texts.states.device).expand(len(texts.states), -1)
