"""Training of the attending adapter: texts with table candidates, roll-outs from random positions, and the loss.

Training inputs look like those of drafting: own outputs instead of target states, and tables without the text's own clip.
`cfg` is the TrainConfig of train_hidden_adapter; its device is that of this process.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from feature_alignment.adapters import tables
from feature_alignment.adapters.attending import AttendingAdapter, KeysValues, Part
from feature_alignment.adapters.fitting import Batch, Checkpoint, History, ProcessShare, fit, mean_over_positions, shuffled
from feature_alignment.adapters.training import mean_variance, mixed_precision
from feature_alignment.cli.console import UserError
from feature_alignment.storage.hidden_states import HiddenStates

MOST_IDS = 8192  # largest draft vocabulary
STEP_DECAY = 0.9  # weight of a draft step in the loss, relative to the step before


@dataclass(frozen=True)
class Proposals:
    """Table candidates after each token of each row's text: tokens [n, s, SOURCES] int64 (`tables.NO_TOKEN` for none) and buckets."""

    tokens: Tensor
    buckets: Tensor


@dataclass(frozen=True)
class PromptedTexts:
    """A batch of texts, cut to the longest.

    Args:
        states: [b, s, d_target], target states
        token_ids: [b, s]
        mask: [b, s]
        events: [b, e, d_event]
        prompt: [b, p, d_target], target states on the last prompt positions except the very last
        prompt_ids: [b, p + 1] int64, of these positions and the very last; negative for vision and for padding
        prompt_mask: [b, p] bool, False for padding
        proposed: [b, s, SOURCES] int64, candidates for the next token
        buckets: [b, s, SOURCES] int64
    """

    states: Tensor
    token_ids: Tensor
    mask: Tensor
    events: Tensor
    prompt: Tensor
    prompt_ids: Tensor
    prompt_mask: Tensor
    proposed: Tensor
    buckets: Tensor


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


def answers_of(states: HiddenStates) -> list[tables.Answer]:
    """The texts of a split."""
    return [
        tables.Answer(row["sequence"], tables.question_number(row["question"]), states.token_ids[i, : int(states.lengths[i])].tolist())
        for i, row in enumerate(states.rows)
    ]


def drafted_ids(answers: Iterable[tables.Answer]) -> Tensor:
    """The draft vocabulary [ids] int64, ascending: the most frequent ids of the answers, at most `MOST_IDS`."""
    counts = Counter(token for answer in answers for token in answer.tokens)
    return torch.tensor(sorted(token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_IDS]))


def proposals(states: HiddenStates, counts: tables.Counts | tables.NGramTable, leave_out: bool) -> Proposals:
    """Table candidates along the text of each row.

    Args:
        states: rows with their questions and prompt ids
        counts: the table
        leave_out: subtract the counts of each row's own clip; for rows that were counted
    """
    answers, clips = answers_of(states), defaultdict(list)
    for answer in answers:
        clips[answer.clip].append(answer)
    tokens = torch.full((*states.token_ids.shape, tables.SOURCES), tables.NO_TOKEN)
    buckets = torch.zeros_like(tokens)
    known: dict[str, Any] = {}
    for i, answer in enumerate(answers):
        if answer.clip not in known:
            known = {answer.clip: counts}
            if leave_out:
                assert isinstance(counts, tables.Counts)  # a saved table does not know what each clip added
                known = {answer.clip: tables.LeaveOneOut(counts, clips[answer.clip])}
        found = tables.candidates_along(known[answer.clip], answer.question, states.rows[i]["prompt_ids"], answer.tokens)
        tokens[i, : len(found)], buckets[i, : len(found)] = torch.tensor(found).unbind(-1)
    return Proposals(tokens, buckets)


def prompted_texts(states: HiddenStates, found: Proposals, batches: Iterable[Tensor], device: str) -> Iterator[PromptedTexts]:
    """The texts of each batch of rows."""
    assert states.prompt is not None  # asked for when it was loaded
    p = states.prompt.shape[1]
    for rows in batches:
        s = int(states.lengths[rows].max())
        parts = [states.target[rows, :s].float(), states.token_ids[rows, :s], states.mask[rows, :s], states.events_of(rows).float()]
        parts.append(states.prompt[rows].float())
        states.refuse_non_finite(rows, parts[0], parts[3], parts[4])
        ids, lengths = torch.full((len(rows), p + 1), -1), torch.zeros(len(rows), dtype=torch.int64)
        for i, row in enumerate(rows.tolist()):
            last = states.rows[row]["prompt_ids"][-p - 1 :]
            ids[i, p + 1 - len(last) :], lengths[i] = torch.tensor(last), len(last) - 1
        parts += [ids, torch.arange(p) >= p - lengths[:, None], found.tokens[rows, :s], found.buckets[rows, :s]]
        yield PromptedTexts(*(part.to(device) for part in parts))


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

    def tokens(self, ids: Tensor) -> Tensor:
        """Token inputs [.., w] of token ids [..] int64; zeros for negative ids."""
        known, where = ids.clamp(min=0).unique(return_inverse=True)
        read = self.adapter.read_tokens(self.embeddings[known])[where]
        return read * (ids >= 0)[..., None]

    def roll_out(self, texts: PromptedTexts, origins: Tensor, steps: int) -> Iterator[Step]:
        """Draft from given positions with the text known: step k drafts position origin + 1 + k after k draft tokens.

        A step reads the target states up to its origin and the tokens before the one it drafts.

        Args:
            texts: the batch
            origins: [b, m] int64
            steps: number of draft tokens
        """
        a, s, p = self.adapter, texts.states.shape[1], texts.prompt.shape[1]
        before = torch.cat([texts.prompt_ids[:, -1:], texts.token_ids[:, :-1]], 1)
        tokens, tokens_before = self.tokens(texts.token_ids), self.tokens(before)
        proposed = a.read_candidates(self.tokens(texts.proposed), texts.buckets)
        events, text, hidden = a.read_events(texts.events), *self._seen(texts, tokens, tokens_before, proposed)

        def at(x: Tensor, position: Tensor) -> Tensor:
            return x.gather(1, position[..., None].expand(-1, -1, x.shape[-1]))

        late = torch.arange(s, device=origins.device) >= origins[..., None]  # the origin itself is in `chain`
        hidden = torch.cat([hidden[:, None].expand(-1, origins.shape[1], -1), late], -1)
        output, chain = None, list[KeysValues]()
        for k in range(steps):
            position = origins + k
            real = (position + 1 < s) & (position >= 0)
            here = position.clamp(max=s - 1)
            state = a.read_states(at(texts.states, here)) if output is None else a.own(output)
            given = at(proposed, here) if isinstance(proposed, Tensor) else 0.0
            output, own = a(a.inputs(state, at(tokens, here), at(tokens_before, here), given), p + position, events, text, hidden, chain)
            chain.append(own)
            wanted = (position + 1).clamp(max=s - 1)
            real = real & texts.mask.gather(1, wanted)
            expected = a.expect(output)
            yield Step(expected, self._logits(expected, output, texts.proposed, here), wanted, real)

    def _seen(self, texts: PromptedTexts, tokens: Tensor, before: Tensor, proposed: Tensor | float) -> tuple[KeysValues, Tensor]:
        """Keys and values of prompt and text, and which prompt positions [b, p] are masked."""
        a, p, s = self.adapter, texts.prompt.shape[1], texts.states.shape[1]
        hidden = ~texts.prompt_mask if "prompt" not in a.without else torch.ones_like(texts.prompt_mask)
        prompt_tokens = self.tokens(texts.prompt_ids)
        of_prompt = a.inputs(a.read_states(texts.prompt), prompt_tokens[:, 1:], prompt_tokens[:, :-1])
        of_text = a.inputs(a.read_states(texts.states), tokens, before, proposed)
        return a.keys(torch.cat([of_prompt, of_text], 1), torch.arange(p + s, device=tokens.device)), hidden

    def _logits(self, expected: Tensor, output: Tensor, proposed: Tensor, here: Tensor) -> Tensor:
        logits = expected @ self.head.T
        if "candidates" in self.adapter.without:
            return logits
        column = self.column_of[proposed].gather(1, here[..., None].expand(-1, -1, tables.SOURCES))  # [b, m, SOURCES]
        return logits.scatter_add(-1, column.clamp(min=0), self.adapter.bonus(output) * (column >= 0))


def losses(reader: Reader, texts: PromptedTexts, origins: Tensor, variance: float, cfg: Any) -> tuple[Tensor, dict[str, Tensor], int]:
    """The training loss, the scores for the history, and the number of draft tokens they are means of (later steps weigh less).

    Args:
        reader: of the adapter in training
        texts: the batch
        origins: [b, m] int64, positions to draft from
        variance: mean variance of the channels of the target states
        cfg: settings
    """
    says = (texts.states @ reader.head.T).log_softmax(-1)
    wanted_column = reader.column_of[texts.token_ids]
    total: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=says.device))
    weights, count, weight = 0.0, 0, 1.0
    for step in reader.roll_out(texts, origins, cfg.roll_out_steps):
        row, column = step.real.nonzero(as_tuple=True)
        position = step.position[row, column]
        logits, expected = step.logits[row, column].log_softmax(-1), step.expected[row, column]
        wanted, label, soft = texts.states[row, position], wanted_column[row, position], says[row, position]
        kl = (soft.exp() * (soft - logits)).sum(-1)
        parts = {
            "mse": (expected - wanted).square().mean(-1) / variance,
            "cosine": F.cosine_similarity(expected, wanted, dim=-1),
            "kl": kl,
            "ce": -logits.gather(-1, label.clamp(min=0)[:, None])[:, 0] * (label >= 0),
            "token_match": (logits.argmax(-1) == label).float(),
        }
        for name, values in parts.items():
            total[name] = total[name] + weight * values.sum()
        weights, count, weight = weights + weight * len(row), count + len(row), weight * STEP_DECAY
    means = {name: value / max(weights, 1e-9) for name, value in total.items()}
    loss = (1 - cfg.soft_targets) * means["ce"] + cfg.soft_targets * means["kl"] + cfg.cosine_weight * (1 - means["cosine"])
    return loss, {"loss": loss, **means}, count


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
        with mixed_precision(str(cfg.device)):
            return Batch(*losses(reader, texts, origins, variance, cfg))

    def epoch(number: int) -> Iterator[Batch]:
        batches = tuple(map(share.rows, shuffled(len(states.target), cfg.batch_size, cfg.seed, number)))
        chance = torch.Generator().manual_seed(cfg.seed + 1_000_003 * number + 1)
        torch.manual_seed(cfg.seed + number)  # dropout is the same after a resume
        for rows, texts in zip(batches, prompted_texts(states, found[0], batches, cfg.device), strict=True):
            origins = random_origins(states.lengths[rows], cfg.origins, chance).to(cfg.device)
            yield score(texts, origins)._replace(rows=tuple(rows.tolist()))

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        batches = torch.arange(len(validation.target)).split(16)
        every = prompted_texts(validation, found[1], batches, cfg.device)
        return mean_over_positions((b.n, b.parts) for b in (score(t, all_origins(t)) for t in every))

    steps = math.ceil(len(states.target) / cfg.batch_size)
    return fit(adapter, epoch, steps, evaluate, adapter.folded, cfg, states.names, checkpoint, share)


def initialized_adapter(
    states: HiddenStates, found: Proposals, embeddings: Tensor, entries: Tensor, ids: Tensor, cfg: Any
) -> tuple[AttendingAdapter, float]:
    """A new adapter with its table, draft vocabulary and scales, and the mean variance of the target states."""
    (sample,) = prompted_texts(states, found, shuffled(len(states.target), 512, 0, 0)[:1], cfg.device)
    real = sample.states[sample.mask]
    num_events, d_event = sample.events.shape[1:]
    without: list[Part] = [*cfg.without]
    if cfg.blind:
        without.append("events")
    adapter = AttendingAdapter(
        real.shape[1],
        d_event,
        num_events,
        num_ids=len(ids),
        num_entries=len(entries),
        num_prompt=sample.prompt.shape[1],
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
