"""Drafters that look at no picture and cost nothing: what D + A must beat, verified in the same way.

Fitted on training texts only. `template` says the most frequent token of each position of answers to this question, `ngram` the most
frequent token after the last few (longest known context first).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from feature_alignment.decoding.proposers import Draft, ModelProposer
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.models.pair import Prompt

Text = tuple[str, Sequence[int]]  # question, token ids up to EOS


class Template:
    """argmax over training answers of P(token | question, position)."""

    def __init__(self, texts: Iterable[Text]) -> None:
        table: dict[tuple[str, int], Counter[int]] = defaultdict(Counter)
        for question, tokens in texts:
            for t, token in enumerate(tokens):
                table[question, t][token] += 1
                table["", t][token] += 1  # for questions never seen
        self._best = {key: count.most_common(1)[0][0] for key, count in table.items()}

    def next_token(self, question: str, prefix: Sequence[int]) -> int:
        return self._best.get((question, len(prefix)), self._best.get(("", len(prefix)), 2))


class NGram:
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

    def next_token(self, question: str, prefix: Sequence[int]) -> int:
        return self.guess(question, prefix)[0]

    def guess(self, question: str, prefix: Sequence[int]) -> tuple[int, float]:
        """The next token and how sure the table is: its share behind the longest known context, one unseen case added."""
        for size in range(min(self._n - 1, len(prefix)), -1, -1):
            context = tuple(prefix[len(prefix) - size :])
            for who in (question, ""):
                if (who, context) in self._best:
                    token, count, total = self._best[who, context]
                    return token, count / (total + 1)
        return 2, 0.0


NULL_DRAFTERS = {"template": Template, "ngram": NGram}


class TableProposer:
    """A null drafter in the decoding loop: it knows the question and no picture."""

    def __init__(self, table: Template | NGram) -> None:
        self._table = table

    def start(self, prompt: Prompt, watch: Stopwatch) -> None:
        self._question = prompt.question

    def propose(self, emitted: Sequence[int], states: Tensor, num_tokens: int, watch: Stopwatch) -> Draft:
        text = list(emitted)
        with watch("draft"):
            for _ in range(num_tokens):
                text.append(self._table.next_token(self._question, text))
        return Draft(torch.tensor(text[len(emitted) :]), None)


class HybridProposer:
    """The n-gram table where it is sure, the model where it is not. The model reads the table's tokens when it is next asked."""

    def __init__(self, table: NGram, model: ModelProposer, sure: float = 0.8) -> None:
        self._table, self._model, self._sure = table, model, sure

    def start(self, prompt: Prompt, watch: Stopwatch) -> None:
        self._question = prompt.question
        self._model.start(prompt, watch)

    def propose(self, emitted: Sequence[int], states: Tensor, num_tokens: int, watch: Stopwatch) -> Draft:
        text = list(emitted)
        for _ in range(num_tokens):
            token, share = self._table.guess(self._question, text)
            if share < self._sure:
                token = int(self._model.propose(text, states, 1, watch).token_ids[0])
            text.append(token)
        return Draft(torch.tensor(text[len(emitted) :]), None)
