"""Table candidates: next-token proposals of an n-gram table and of prompt lookup, with a confidence bucket each.

    n-gram, same question   most frequent next token after the longest known context of at most four tokens, in answers to this question
    n-gram, any question    the same in all answers
    lookup                  the token after the longest earlier match of the text's end, in the prompt and the answer so far

The attending adapter has an embedding of each bucket: context length, count and share of an n-gram; length of a match and agreement with
the n-gram. The table is built from training answers. For a training text, all answers about the same clip are left out of the counts:
otherwise the table contains the text itself, and the adapter learns to trust it too much.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CONTEXT = 4  # tokens of the longest context
LONGEST_MATCH = 8
SOURCES = 3
NO_TOKEN = -1  # of a source without a candidate
_COUNTS, _SHARES = (2, 3, 6), (0.4, 0.6, 0.8, 0.95)
_PER_ORDER = (len(_COUNTS) + 1) * (len(_SHARES) + 1)
_NGRAM = (CONTEXT + 1) * _PER_ORDER + 1
_LOOKUP = 2 * LONGEST_MATCH + 1
BUCKETS = 2 * _NGRAM + _LOOKUP
COLUMNS = CONTEXT + 4  # question, context (padded in front), token, count, count of the context

Best = tuple[int, int, int]  # a token, how often it followed a context, how often the context occurred
Key = tuple[int, ...]  # question, context


class Answer(NamedTuple):
    """A training answer: its clip, its question's number and its token ids."""

    clip: str
    question: int
    tokens: Sequence[int]


def question_number(question: str) -> int:
    """The number of a question in a table; 0 is any question."""
    return zlib.crc32(question.encode()) >> 1 | 1


class Counts:
    """Counts of the next token after each context of up to `CONTEXT` tokens, per question and over all questions."""

    def __init__(self, answers: Iterable[Answer]) -> None:
        self._next: dict[Key, dict[int, int]] = {}
        for _, question, tokens in answers:
            for t, token in enumerate(tokens):
                for size in range(min(CONTEXT, t) + 1):
                    context = tuple(tokens[t - size : t])
                    for who in (question, 0):
                        following = self._next.setdefault((who, *context), {})
                        following[token] = following.get(token, 0) + 1
        self._ordered = {key: sorted(found.items(), key=lambda item: (-item[1], item[0])) for key, found in self._next.items()}
        self._totals = {key: sum(found.values()) for key, found in self._next.items()}

    def best(self, key: Key, without: Counts | None = None) -> Best | None:
        """The most frequent token after a context, the counts of `without` subtracted; the smallest id among equal counts."""
        total = self._totals.get(key, 0)
        left_out = {} if without is None else without._next.get(key, {})
        total -= sum(left_out.values())
        if total <= 0:
            return None
        token, most = NO_TOKEN, 0
        for candidate, count in self._ordered[key]:
            if count <= most and (count < most or candidate > token):
                break
            rest = count - left_out.get(candidate, 0)
            if rest > most or (rest == most and candidate < token):
                token, most = candidate, rest
        return token, most, total

    def entries(self) -> Tensor:
        """[m, COLUMNS] int32, the saved form of the table."""
        rows = []
        for question, *context in sorted(self._next):
            best = self.best((question, *context))
            assert best is not None
            rows.append([question, *[NO_TOKEN] * (CONTEXT - len(context)), *context, *best])
        return torch.tensor(rows, dtype=torch.int32).view(-1, COLUMNS)


class LeaveOneOut:
    """A table of all answers except those about one clip."""

    def __init__(self, counts: Counts, clip_answers: Iterable[Answer]) -> None:
        self._all, self._left_out = counts, Counts(clip_answers)

    def best(self, key: Key) -> Best | None:
        """See `Counts.best`."""
        return self._all.best(key, self._left_out)


class NGramTable:
    """A saved table. entries: [m, COLUMNS] int32."""

    def __init__(self, entries: Tensor) -> None:
        self._best: dict[Key, Best] = {}
        for question, *rest in entries.tolist():
            context = [token for token in rest[:CONTEXT] if token != NO_TOKEN]
            self._best[(question, *context)] = (rest[-3], rest[-2], rest[-1])

    def best(self, key: Key) -> Best | None:
        """See `Counts.best`."""
        return self._best.get(key)


def candidates(
    table: NGramTable | LeaveOneOut | Counts, question: int, prompt: Sequence[int], answer: Sequence[int]
) -> list[tuple[int, int]]:
    """(token id, bucket) of each source for the token after an answer; the id is `NO_TOKEN` for a source without a candidate.

    Args:
        table: n-gram table
        question: its number
        prompt: token ids of the end of the prompt; negative for vision tokens
        answer: token ids so far
    """
    found = []
    for source, who in enumerate((question, 0)):
        token, bucket = _by_ngram(table, who, answer)
        found.append((token, bucket + source * _NGRAM))
    token, size = prompt_lookup([*prompt, *answer])
    bucket = 0 if size == 0 else 1 + 2 * (size - 1) + (token == found[1][0])
    return [*found, (token, 2 * _NGRAM + bucket)]


def _by_ngram(table: NGramTable | LeaveOneOut | Counts, question: int, answer: Sequence[int]) -> tuple[int, int]:
    for size in range(min(CONTEXT, len(answer)), -1, -1):
        best = table.best((question, *answer[len(answer) - size :]))
        if best is not None:
            token, count, total = best
            share = bisect_right(_SHARES, count / total)
            return token, 1 + size * _PER_ORDER + bisect_right(_COUNTS, count) * (len(_SHARES) + 1) + share
    return NO_TOKEN, 0


def prompt_lookup(text: Sequence[int]) -> tuple[int, int]:
    """The token after the longest earlier match of the text's end, the latest among equal lengths.

    Returns:
        the token and the length of the match, at most `LONGEST_MATCH`; (NO_TOKEN, 0) without a match
    """
    token, longest, last = NO_TOKEN, 0, len(text) - 1
    if last < 1 or text[last] < 0:
        return token, longest
    end = -1
    for _ in range(text.count(text[last]) - 1):
        end = text.index(text[last], end + 1)
        if text[end + 1] >= 0:
            size = 1
            while size < LONGEST_MATCH and size <= end and text[end - size] == text[last - size] and text[end - size] >= 0:
                size += 1
            if size >= longest:
                token, longest = text[end + 1], size
    return token, longest


def candidates_along(
    table: NGramTable | LeaveOneOut | Counts, question: int, prompt: Sequence[int], answer: Sequence[int]
) -> list[list[tuple[int, int]]]:
    """Candidates after each token of an answer: entry t proposes the token after answer[: t + 1]."""
    return [candidates(table, question, prompt, answer[: t + 1]) for t in range(len(answer))]
