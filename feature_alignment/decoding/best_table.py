"""The best table: n-grams and prompt lookup, at each position the one that was right most often in its confidence bucket."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from feature_alignment.adapters import tables
from feature_alignment.adapters.tables import Answer, Counts, candidates, candidates_along, question_number

MOST_JUDGED = 600  # texts that records are taken from: 37,000 positions of 62-token answers


class BestTable:
    """Chooses among the candidates of `adapters.tables`; the same candidates are an input of the attending adapter.

    A bucket's record is its share of right candidates on training texts. Each half of the texts is judged by tables of the other half:
    a table that holds the text itself is always right.

    Args:
        texts: (question, token ids) of training answers
        encode: question -> token ids, which lookup searches as well
    """

    def __init__(self, texts: Iterable[tuple[str, Sequence[int]]], encode: Callable[[str], Sequence[int]] = lambda question: ()) -> None:
        self._encode, texts = cache(encode), list(texts)
        answers = [Answer("", question_number(question), tokens) for question, tokens in texts]
        right: Counter[int] = Counter()
        seen: Counter[int] = Counter()
        half, step = len(answers) // 2, -(-len(answers) // MOST_JUDGED)
        for judged, others in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
            counts = Counts(answers[others])
            for (question, _), answer in list(zip(texts, answers, strict=True))[judged][:: max(1, step)]:
                found = candidates_along(counts, answer.question, self._encode(question), answer.tokens)
                for proposals, wanted in zip(found, answer.tokens[1:], strict=False):
                    seen.update(bucket for _, bucket in proposals)
                    right.update(bucket for token, bucket in proposals if token == wanted)
        self._record = [right[bucket] / max(1, seen[bucket]) for bucket in range(tables.BUCKETS)]
        self._counts = Counts(answers)

    def next_token(self, question: str, prefix: Sequence[int]) -> int | None:
        """See `Table`."""
        found = candidates(self._counts, question_number(question), self._encode(question), prefix)
        token, _ = max(found, key=lambda of: (of[0] != tables.NO_TOKEN, self._record[of[1]]))
        return None if token == tables.NO_TOKEN else token

    def finished(self, question: str, tokens: Sequence[int]) -> None:
        """Nothing is learned from answers while decoding."""
        return None
