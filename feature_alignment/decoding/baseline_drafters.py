"""Baseline drafters: they see no image and cost almost nothing. An adapter must beat them; all are verified in the same way.

`template` proposes the most frequent token at each position of training answers to the question, `ngram` the most frequent token after
the last few (longest known context first). `lookup` (prompt lookup) continues as question and answer continued before, `previous` as the
last answer to the question did. `tables` chooses between n-grams and lookup by their records (`best_table`).

All have one interface, offline and while decoding: built from training texts, `next_token(question, prefix)` returns a token or None.
`finished(question, tokens)` reports answers in the order they are given; only `previous` uses it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from feature_alignment.decoding.best_table import BestTable
from feature_alignment.decoding.proposers import Draft, Proposer
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.decoding.token_selection import TokenSelector
from feature_alignment.models.state import Prompt, ReadPrompt

Text = tuple[str, Sequence[int]]  # question, token ids up to EOS


class Table(Protocol):
    """Proposes a next token from texts alone."""

    def next_token(self, question: str, prefix: Sequence[int]) -> int | None:
        """The most likely token after the answer's prefix; None if there is no candidate."""

    def finished(self, question: str, tokens: Sequence[int]) -> None:
        """An answer is complete and may be used from now on."""
        return None


class Template(Table):
    """argmax over training answers of P(token | question, position)."""

    def __init__(self, texts: Iterable[Text]) -> None:
        table: dict[tuple[str, int], Counter[int]] = defaultdict(Counter)
        for question, tokens in texts:
            for t, token in enumerate(tokens):
                table[question, t][token] += 1
                table["", t][token] += 1  # for unknown questions
        self._best = {key: count.most_common(1)[0][0] for key, count in table.items()}

    def next_token(self, question: str, prefix: Sequence[int]) -> int | None:
        """See `Table`."""
        return self._best.get((question, len(prefix)), self._best.get(("", len(prefix))))


class NGram(Table):
    """argmax of P(token | question, last n - 1 tokens), backing off to shorter contexts, then to any question."""

    def __init__(self, texts: Iterable[Text], n: int = 5) -> None:
        self._n = n
        table: dict[tuple[str, tuple[int, ...]], Counter[int]] = defaultdict(Counter)
        for question, tokens in texts:
            for t, token in enumerate(tokens):
                for size in range(min(n - 1, t) + 1):
                    context = tuple(tokens[t - size : t])
                    table[question, context][token] += 1
                    table["", context][token] += 1
        self._best = {key: (*count.most_common(1)[0], count.total()) for key, count in table.items()}

    def next_token(self, question: str, prefix: Sequence[int]) -> int | None:
        """See `Table`."""
        return self.guess(question, prefix)[0]

    def guess(self, question: str, prefix: Sequence[int]) -> tuple[int | None, float]:
        """The next token, and its share among the tokens that followed the longest known context (one unseen case added)."""
        for size in range(min(self._n - 1, len(prefix)), -1, -1):
            context = tuple(prefix[len(prefix) - size :])
            for key in ((question, context), ("", context)):
                if key in self._best:
                    token, count, total = self._best[key]
                    return token, count / (total + 1)
        return None, 0.0  # there were no texts


class Lookup(Table):
    """Prompt lookup (Saxena 2023): the token after the longest earlier match of the text's end, the latest of equally long ones.

    Args:
        texts: not used
        encode: question -> token ids; without it only the answer itself is searched
    """

    def __init__(self, texts: Iterable[Text] = (), encode: Callable[[str], Sequence[int]] = lambda question: ()) -> None:
        self._encode = encode

    def next_token(self, question: str, prefix: Sequence[int]) -> int | None:
        """See `Table`."""
        text = [*self._encode(question), *prefix]
        return _token_after_longest_match(text, text, near=len(text))


class Previous(Table):
    """The last answer to the same question about another clip; at first, of the last training clip.

    Continues after the longest match of the text's end, nearest to the same position; without a match, with the token at that position.
    """

    def __init__(self, texts: Iterable[Text]) -> None:
        self._last = {question: list(tokens) for question, tokens in texts}

    def finished(self, question: str, tokens: Sequence[int]) -> None:
        """See `Table`."""
        self._last[question] = list(tokens)

    def next_token(self, question: str, prefix: Sequence[int]) -> int | None:
        """See `Table`."""
        last, t = self._last.get(question, []), len(prefix)
        token = _token_after_longest_match(last, prefix, near=t)
        return last[t] if token is None and t < len(last) else token


def _token_after_longest_match(known: Sequence[int], text: Sequence[int], near: int) -> int | None:
    """The token of `known` after the longest match of the text's end; of equally long matches, the one that ends nearest to `near`."""
    best, token = (0, 0), None
    for end in range(1, len(known)):
        size = 0
        while size < min(end, len(text)) and known[end - 1 - size] == text[len(text) - 1 - size]:
            size += 1
        if size and (size, -abs(end - near)) > best:
            best, token = (size, -abs(end - near)), known[end]
    return token


BASELINE_DRAFTERS: dict[str, Callable[[Iterable[Text]], Table]] = {
    "template": Template,
    "ngram": NGram,
    "lookup": Lookup,
    "previous": Previous,
    "tables": BestTable,
}
# these search the question's token ids as well
SEARCH_THE_QUESTION: dict[str, Callable[[Iterable[Text], Callable[[str], Sequence[int]]], Table]] = {
    "lookup": Lookup,
    "tables": BestTable,
}


class TableProposer(Proposer):
    """A baseline drafter in the decoding loop. It knows the question and sees no image."""

    reads_prompt = has_confidence = False

    def __init__(self, table: Table) -> None:
        self._table = table
        self._answered: tuple[Prompt, Sequence[int]] | None = None

    def start(self, prompt: Prompt, watch: Stopwatch) -> None:
        """See `Proposer`. The last answer enters the table unless the same prompt is asked again: it must not help itself."""
        if self._answered is not None and self._answered[0] is not prompt:
            self._table.finished(self._answered[0].question, self._answered[1])
        self._prompt = prompt

    def propose(self, emitted: Sequence[int], states: Tensor, num_tokens: int, watch: Stopwatch, confidence_floor: float = 0.0) -> Draft:
        """See `Proposer`."""
        text, token = list(emitted), None
        with watch("draft"):
            while len(text) < len(emitted) + num_tokens and token not in self.selector.eos_ids:
                token = self._table.next_token(self._prompt.question, text)
                if token is None:
                    break
                text.append(token)
        return Draft(torch.tensor(text[len(emitted) :], dtype=torch.long))

    def finish(self, emitted: Sequence[int]) -> None:
        """See `Proposer`."""
        self._answered = self._prompt, list(emitted)

    def remember(self, question: str, token_ids: Sequence[int]) -> None:
        """Enter an answer that an earlier process gave, after those of this one.

        Args:
            question: of the answer
            token_ids: of the answer
        """
        if self._answered is not None:
            self._table.finished(self._answered[0].question, self._answered[1])
            self._answered = None
        self._table.finished(question, token_ids)


class HybridProposer(Proposer):
    """A model drafts and an n-gram table corrects it.

    Where the table is sure of another token, that token replaces the model's, and the model continues after it. Where the model stops,
    the table continues at no cost as long as it is sure.

    Args:
        table: the n-gram table
        model: the drafter
        sure: share from which on the table is used. On validation texts of the embedded pair the table is then correct at 0.9996 of
            these positions, 0.29 of all; with 0.9 at 0.998, with 0.8 at 0.985
    """

    def __init__(self, table: NGram, model: Proposer, sure: float = 0.95) -> None:
        self._table, self._model, self._sure = table, model, sure

    @property
    def selector(self) -> TokenSelector:
        """The model's token selector."""
        return self._model.selector

    @selector.setter
    def selector(self, selector: TokenSelector) -> None:
        self._model.selector = selector

    def start(self, prompt: Prompt, watch: Stopwatch) -> None:
        """See `Proposer`."""
        self._question = prompt.question
        self._model.start(prompt, watch)

    def read_target_prompt(self, prompt: Prompt, read: ReadPrompt, watch: Stopwatch) -> None:
        """See `Proposer`."""
        self._model.read_target_prompt(prompt, read, watch)

    def propose(self, emitted: Sequence[int], states: Tensor, num_tokens: int, watch: Stopwatch, confidence_floor: float = 0.0) -> Draft:
        """See `Proposer`."""
        text, end, chance = list(emitted), len(emitted) + num_tokens, 1.0
        drawn_from: dict[int, Tensor] = {}
        model_continues = True
        while model_continues and len(text) < end and chance >= confidence_floor and text[-1] not in self.selector.eos_ids:
            draft = self._model.propose(text, states, end - len(text), watch, confidence_floor / chance)
            model_continues = False
            with watch("draft"):
                for i, token in enumerate(draft.token_ids.tolist()):
                    guess, share = self._sure_guess(text)
                    by_table = guess is not None
                    text.append(token if guess is None else guess)
                    chance *= share if by_table else 1.0 if draft.confidence is None else draft.confidence[i]
                    if not by_table and draft.probs is not None:  # the table's tokens are not drawn, even where they equal the model's
                        drawn_from[len(text) - 1 - len(emitted)] = draft.probs[i : i + 1]
                    model_continues = by_table  # the model may continue after a token of the table
                    if text[-1] != token:
                        break
        with watch("draft"):
            while len(text) < end and text[-1] not in self.selector.eos_ids and (guess := self._sure_guess(text)[0]) is not None:
                text.append(guess)
        token_ids = torch.tensor(text[len(emitted) :], dtype=torch.long)
        return Draft(token_ids, probs=_with_point_masses(token_ids, drawn_from))

    def _sure_guess(self, text: Sequence[int]) -> tuple[int | None, float]:
        token, share = self._table.guess(self._question, text)
        return (token, share) if share >= self._sure else (None, 0.0)

    def finish(self, emitted: Sequence[int]) -> None:
        """See `Proposer`."""
        self._model.finish(emitted)


def _with_point_masses(token_ids: Tensor, drawn_from: dict[int, Tensor]) -> Tensor | None:
    """The distribution of every draft token; tokens that were not drawn are point masses.

    Args:
        token_ids: [g] int64
        drawn_from: index of a draft token -> [1, v], the distribution it was drawn from

    Returns:
        [g, v], or None if no token was drawn
    """
    if not drawn_from:
        return None
    one = next(iter(drawn_from.values()))
    point = F.one_hot(token_ids.to(one.device), one.shape[-1]).to(one.dtype)
    return torch.cat([drawn_from.get(i, point[i : i + 1]) for i in range(len(token_ids))])
