"""Training of the attending adapter: texts with what the tables propose, roll-outs from some places of each, and the loss.

At training the adapter meets what it meets when it drafts: its own outputs instead of states, and tables that do not know the clip.
`cfg` is the TrainConfig of train_hidden_adapter; its device is this process's own.
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
from feature_alignment.adapters.attending import AttendingAdapter, Keys
from feature_alignment.adapters.fitting import Batch, Checkpoint, History, ProcessShare, fit, mean_over_positions, shuffled
from feature_alignment.adapters.training import mean_variance, mixed_precision
from feature_alignment.cli.console import UserError
from feature_alignment.storage.hidden_states import HiddenStates

MOST_IDS = 8192  # that may be drafted
FADING = 0.9  # weight of a draft step's loss, relative to the step before
EXACT = 1 << 30  # origins: every place


@dataclass(frozen=True)
class Proposals:
    """What the tables propose after each token of each row's text: tokens [n, s, SOURCES] (`tables.NOTHING` where nothing), buckets."""

    tokens: Tensor
    buckets: Tensor


@dataclass(frozen=True)
class PromptedTexts:
    """Some rows, cut to the longest text.

    Args:
        states: [b, s, d_target], the target's
        token_ids: [b, s]
        mask: [b, s]
        events: [b, e, d_event]
        prompt: [b, p, d_target], the target's on the prompt's end without its last position
        prompt_ids: [b, p + 1], of these positions and the last; negative ones are vision, or in front of the prompt
        prompt_mask: [b, p], where there is a prompt
        proposed: [b, s, SOURCES], ids that the tables propose for the next token
        buckets: [b, s, SOURCES]
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
    """One draft step from m places of each text.

    Args:
        expected: [b, m, d_target], the target states expected
        logits: [b, m, ids]
        place: [b, m], of what is drafted
        real: [b, m], whether it is in the text
    """

    expected: Tensor
    logits: Tensor
    place: Tensor
    real: Tensor


def answers_of(states: HiddenStates) -> list[tables.Answer]:
    """The texts of a split, as tables count them."""
    return [
        tables.Answer(row["sequence"], tables.question_number(row["question"]), states.token_ids[i, : int(states.lengths[i])].tolist())
        for i, row in enumerate(states.rows)
    ]


def drafted_ids(answers: Iterable[tables.Answer]) -> Tensor:
    """[ids] int64, ascending: the most frequent ids of the answers, at most `MOST_IDS`."""
    counts = Counter(token for answer in answers for token in answer.tokens)
    return torch.tensor(sorted(token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_IDS]))


def proposals(states: HiddenStates, counts: tables.Counts | tables.NGramTable, leave_out: bool) -> Proposals:
    """What the tables propose along each row's text. leave_out: the rows are among those counted, and each leaves its own clip out"""
    answers, clips = answers_of(states), defaultdict(list)
    for answer in answers:
        clips[answer.clip].append(answer)
    tokens = torch.full((*states.token_ids.shape, tables.SOURCES), tables.NOTHING)
    buckets = torch.zeros_like(tokens)
    known: dict[str, Any] = {}
    for i, answer in enumerate(answers):
        if answer.clip not in known:
            known = {answer.clip: tables.Without(counts, clips[answer.clip]) if leave_out else counts}
        found = tables.candidates_along(known[answer.clip], answer.question, states.rows[i]["prompt_ids"], answer.tokens)
        tokens[i, : len(found)], buckets[i, : len(found)] = torch.tensor(found).unbind(-1)
    return Proposals(tokens, buckets)


def prompted_texts(states: HiddenStates, found: Proposals, batches: Iterable[Tensor], device: str) -> Iterator[PromptedTexts]:
    """The rows of each batch."""
    assert states.events is not None and states.prompt is not None  # asked for when they were loaded
    p = states.prompt.shape[1]
    for rows in batches:
        s = int(states.lengths[rows].max())
        parts = [states.target[rows, :s].float(), states.token_ids[rows, :s], states.mask[rows, :s], states.events[rows].float()]
        parts.append(states.prompt[rows].float())
        states.refuse_non_finite(rows, parts[0], parts[3], parts[4])
        ids, lengths = torch.full((len(rows), p + 1), -1), torch.zeros(len(rows), dtype=torch.int64)
        for i, row in enumerate(rows.tolist()):
            last = states.rows[row]["prompt_ids"][-p - 1 :]
            ids[i, p + 1 - len(last) :], lengths[i] = torch.tensor(last), len(last) - 1
        parts += [ids, torch.arange(p) >= p - lengths[:, None], found.tokens[rows, :s], found.buckets[rows, :s]]
        yield PromptedTexts(*(part.to(device) for part in parts))


class Reader:
    """Reads texts by an adapter, with the target's embeddings and head at hand.

    Args:
        adapter: it may still learn
        head: [v, d_target], W
        embeddings: [v, d_target]
    """

    def __init__(self, adapter: AttendingAdapter, head: Tensor, embeddings: Tensor) -> None:
        self.adapter, self.embeddings = adapter, embeddings
        self.head = head[adapter.ids]
        self.place_of = torch.full((len(head) + 1,), -1, device=head.device)  # id -> its row of `head`; the last is for NOTHING
        self.place_of[adapter.ids] = torch.arange(len(adapter.ids), device=head.device)

    def tokens(self, ids: Tensor) -> Tensor:
        """[..] -> [.., w]; zeros for negative ids."""
        known, where = ids.clamp(min=0).unique(return_inverse=True)
        read = self.adapter.read_tokens(self.embeddings[known])[where]
        return read * (ids >= 0)[..., None]

    def roll_out(self, texts: PromptedTexts, origins: Tensor, steps: int) -> Iterator[Step]:
        """Drafts from places `origins` [b, m], with the text known: step k drafts the token at origin + 1 + k, from k outputs of its own.

        Causal: what is drafted from a place knows the states up to there, and the tokens up to the one before it.
        """
        a, s, p = self.adapter, texts.states.shape[1], texts.prompt.shape[1]
        before = torch.cat([texts.prompt_ids[:, -1:], texts.token_ids[:, :-1]], 1)
        tokens, tokens_before = self.tokens(texts.token_ids), self.tokens(before)
        proposed = a.read_candidates(self.tokens(texts.proposed), texts.buckets)
        events, text, hidden = a.read_events(texts.events), *self._seen(texts, tokens, tokens_before, proposed)
        at = lambda x, place: x.gather(1, place[..., None].expand(-1, -1, x.shape[-1]))  # noqa: E731
        late = torch.arange(s, device=origins.device) >= origins[..., None]  # the origin's own input is in its chain
        hidden = torch.cat([hidden[:, None].expand(-1, origins.shape[1], -1), late], -1)
        output, chain = None, list[Keys]()
        for k in range(steps):
            place = origins + k
            real = (place + 1 < s) & (place >= 0)
            here = place.clamp(max=s - 1)
            state = a.read_states(at(texts.states, here)) if output is None else a.own(output)
            given = at(proposed, here) if isinstance(proposed, Tensor) else 0.0
            output, own = a(a.inputs(state, at(tokens, here), at(tokens_before, here), given), p + place, events, text, hidden, chain)
            chain.append(own)
            wanted = (place + 1).clamp(max=s - 1)
            real = real & texts.mask.gather(1, wanted)
            expected = a.expect(output)
            yield Step(expected, self._logits(expected, output, texts.proposed, here), wanted, real)

    def _seen(self, texts: PromptedTexts, tokens: Tensor, before: Tensor, proposed: Tensor | float) -> tuple[Keys, Tensor]:
        """Keys and values of prompt and text, and which of the prompt's [b, p] are hidden."""
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
        column = self.place_of[proposed].gather(1, here[..., None].expand(-1, -1, tables.SOURCES))  # [b, m, SOURCES]
        return logits.scatter_add(-1, column.clamp(min=0), self.adapter.bonus(output) * (column >= 0))


def losses(reader: Reader, texts: PromptedTexts, origins: Tensor, variance: float, cfg: Any) -> tuple[Tensor, dict[str, Tensor], int]:
    """The training loss, what goes into the history, and over how many drafts these are means (a later step weighs less).

    variance: mean over channels, of the target's states
    """
    says = (texts.states @ reader.head.T).log_softmax(-1)
    wanted_column = reader.place_of[texts.token_ids]
    total: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=says.device))
    weights, count, weight = 0.0, 0, 1.0
    for step in reader.roll_out(texts, origins, cfg.roll_out_steps):
        row, column = step.real.nonzero(as_tuple=True)
        place = step.place[row, column]
        logits, expected = step.logits[row, column].log_softmax(-1), step.expected[row, column]
        wanted, label, soft = texts.states[row, place], wanted_column[row, place], says[row, place]
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
        weights, count, weight = weights + weight * len(row), count + len(row), weight * FADING
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
    """The attending adapter, on its own roll-outs from some places of each text."""
    share = share or ProcessShare()
    torch.manual_seed(cfg.seed)
    head, embeddings = head.float().to(cfg.device), embeddings.float().to(cfg.device)
    if int(states.lengths.max()) < 2 or int(validation.lengths.max()) < 2:
        raise UserError("the attending adapter learns from texts of at least two tokens; these have one.")
    answers = answers_of(states)
    counts = tables.Counts(answers)
    entries, ids = counts.entries(), drafted_ids(answers)
    found = proposals(states, counts, leave_out=True), proposals(validation, tables.NGramTable(entries), leave_out=False)
    adapter, variance = begun(states, found[0], embeddings, entries, ids, cfg)
    reader = Reader(adapter, head, embeddings)

    def score(texts: PromptedTexts, origins: Tensor) -> Batch:
        with mixed_precision(str(cfg.device)):
            return Batch(*losses(reader, texts, origins, variance, cfg))

    def epoch(number: int) -> Iterator[Batch]:
        batches = tuple(map(share.rows, shuffled(len(states.target), cfg.batch_size, cfg.seed, number)))
        chance = torch.Generator().manual_seed(cfg.seed + 1_000_003 * number + 1)
        torch.manual_seed(cfg.seed + number)  # of dropout, also where training resumes
        for rows, texts in zip(batches, prompted_texts(states, found[0], batches, cfg.device), strict=True):
            origins = some_places(states.lengths[rows], cfg.origins, chance).to(cfg.device)
            yield score(texts, origins)._replace(rows=tuple(rows.tolist()))

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        batches = torch.arange(len(validation.target)).split(16)
        every = prompted_texts(validation, found[1], batches, cfg.device)
        return mean_over_positions((b.n, b.parts) for b in (score(t, every_place(t)) for t in every))

    steps = math.ceil(len(states.target) / cfg.batch_size)
    return fit(adapter, epoch, steps, evaluate, adapter.folded, cfg, states.names, checkpoint, share)


def begun(
    states: HiddenStates, found: Proposals, embeddings: Tensor, entries: Tensor, ids: Tensor, cfg: Any
) -> tuple[AttendingAdapter, float]:
    """An adapter that has learned nothing, with its tables and scales, and the mean variance of the target's states."""
    (sample,) = prompted_texts(states, found, shuffled(len(states.target), 512, 0, 0)[:1], cfg.device)
    real = sample.states[sample.mask]
    num_events, d_event = sample.events.shape[1:]
    adapter = AttendingAdapter(
        real.shape[1],
        d_event,
        num_events,
        num_ids=len(ids),
        num_entries=len(entries),
        num_prompt=sample.prompt.shape[1],
        width=cfg.bottleneck,
        without=[*["events"] * cfg.blind, *cfg.without],
        dropout=cfg.dropout,
    )
    adapter.ids.copy_(ids)
    adapter.table.copy_(entries)
    adapter.to(cfg.device).begin(real, embeddings, embeddings[ids.to(cfg.device)], sample.events)
    return adapter, mean_variance(real)


def some_places(lengths: Tensor, count: int, chance: torch.Generator) -> Tensor:
    """[b, count] int64: places to draft from, by chance, each with at least one token after it."""
    return (torch.rand(len(lengths), count, generator=chance) * (lengths[:, None] - 1).clamp(min=1)).long()


def every_place(texts: PromptedTexts) -> Tensor:
    """[b, s] int64"""
    return torch.arange(texts.states.shape[1], device=texts.states.device).expand(len(texts.states), -1)
