"""Baseline drafters by plain loops over all texts, and what they learn from one prompt to the next."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import prompt_of

from feature_alignment.adapters import tables
from feature_alignment.decoding import best_table
from feature_alignment.decoding.baseline_drafters import Lookup, NGram, Previous, TableProposer, Template
from feature_alignment.decoding.best_table import BestTable
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.decoding.token_selection import TokenSelector
from feature_alignment.models.generation import GenerationRules

QUESTIONS = ("q", "r", "s")


def random_texts(seed: int, number: int = 12, words: int = 3):
    r = random.Random(seed)
    return [(r.choice(QUESTIONS[:2]), [r.randrange(words) for _ in range(r.randint(1, 8))]) for _ in range(number)]


def prefixes(seed: int, number: int = 150):
    r = random.Random(1000 + seed)
    return [(r.choice(QUESTIONS), [r.randrange(3) for _ in range(r.randint(0, 9))]) for _ in range(number)]


@pytest.mark.parametrize("seed", range(3))
def test_a_template_says_the_most_frequent_token_of_a_position(seed):
    """Of answers to this question, and of all answers where none to it is as long."""
    texts = random_texts(seed)
    table, told, other_question = Template(iter(texts)), 0, 0
    for question, prefix in prefixes(seed):
        t = len(prefix)
        asked = Counter(text[t] for q, text in texts if q == question and t < len(text))
        counts = asked or Counter(text[t] for _, text in texts if t < len(text))
        token = table.next_token(question, prefix)
        assert (counts[token] == max(counts.values())) if counts else token is None
        told, other_question = told + bool(counts), other_question + bool(counts and not asked)
    assert told > other_question > 5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [2, 3, 5])
def test_an_ngram_table_backs_off_to_shorter_contexts_then_to_any_question(seed, n):
    """The most frequent token after the longest known context of at most n - 1 tokens, and its share with one unseen case added."""
    texts = random_texts(seed)
    table, found = NGram(iter(texts), n), Counter()
    for question, prefix in prefixes(seed):
        counts, size = Counter(), min(n - 1, len(prefix)) + 1
        while not counts:
            size -= 1
            context = prefix[len(prefix) - size :]
            for asked in (question, None):
                counts = Counter(
                    text[t] for q, text in texts if asked in (None, q) for t in range(size, len(text)) if text[t - size : t] == context
                )
                if counts:
                    break
        token, share = table.guess(question, prefix)
        assert counts[token] == max(counts.values()) and share == pytest.approx(counts[token] / (sum(counts.values()) + 1))
        assert table.next_token(question, prefix) == token
        found[size, asked is None] += 1
    assert {size for size, _ in found} >= {n - 2, n - 1} and {other for _, other in found} == {True, False}
    assert NGram([]).guess("q", [1]) == (None, 0.0) and NGram([]).next_token("q", []) is None
    assert NGram([("q", [7, 8, 9, 5, 6]), ("q", [1, 8, 9, 5, 3]), ("q", [1, 8, 9, 5, 3])]).next_token("q", [7, 8, 9, 5]) == 6  # n = 5
    assert NGram([("q", [7, 8, 9, 5, 1, 6]), *[("q", [3, 8, 9, 5, 1, 4])] * 2]).next_token("q", [7, 8, 9, 5, 1]) == 4  # and no more


def after_longest_match(known, text, near):
    """(length of the match, -distance to `near`, -end) decides; of each end, how much before it equals the end of the text."""
    best = None
    for end in range(1, len(known)):
        size = max(n for n in range(min(end, len(text)) + 1) if known[end - n : end] == text[len(text) - n :])
        if size and (best is None or (size, -abs(end - near), -end) > best[0]):
            best = (size, -abs(end - near), -end), known[end]
    return None if best is None else best[1]


@pytest.mark.parametrize("seed", range(3))
def test_lookup_and_previous_by_trying_every_place(seed):
    r, texts = random.Random(seed), random_texts(seed)
    questions = {"q": [0, 1], "r": [2, 2, 1], "s": []}
    lookup, previous = Lookup(texts, questions.__getitem__), Previous(texts)
    last = dict(texts)
    at_same_place = 0
    for question, prefix in prefixes(seed):
        whole = [*questions[question], *prefix]
        assert lookup.next_token(question, prefix) == after_longest_match(whole, whole, len(whole))
        known, t = last.get(question, []), len(prefix)
        wanted = after_longest_match(known, prefix, t)
        if wanted is None and t < len(known):
            wanted, at_same_place = known[t], at_same_place + 1
        assert previous.next_token(question, prefix) == wanted
        if r.random() < 0.3:
            last[question] = [r.randrange(3) for _ in range(r.randint(0, 6))]
            previous.finished(question, last[question])
    assert at_same_place > 3 and Lookup().next_token("q", [4, 5, 4]) == 5


class Echo(Template):
    """Says the length of the answer so far, up to a limit, and notes what it is told."""

    def __init__(self, limit: int) -> None:
        self.limit, self.told = limit, []

    def next_token(self, question, prefix):
        return len(prefix) if len(prefix) < self.limit else None

    def finished(self, question, tokens):
        self.told.append((question, list(tokens)))


def test_a_table_drafts_as_many_as_asked_for_or_known_and_nothing_after_an_end():
    proposer, watch = TableProposer(Echo(6)), Stopwatch()
    proposer.selector = TokenSelector(GenerationRules({4}))
    proposer.start(prompt_of(1), watch)
    ask = lambda emitted, n: proposer.propose(emitted, torch.zeros(1, 1), n, watch).token_ids  # noqa: E731
    assert ask([9], 2).tolist() == [1, 2] and ask([9], 9).tolist() == [1, 2, 3, 4] and ask([9] * 5, 9).tolist() == [5]
    assert ask([9], 0).tolist() == [] and ask([9], 0).dtype == torch.int64 and ask([9] * 6, 9).tolist() == []
    assert set(watch.ms) == {"draft"} and not TableProposer.reads_prompt and not TableProposer.has_confidence


def test_a_table_is_told_of_an_answer_when_another_prompt_begins():
    table, watch = Echo(0), Stopwatch()
    proposer, first, second = TableProposer(table), prompt_of(1), prompt_of(1)
    for prompt, answer in ((first, [5]), (first, [6]), (second, [7]), (first, [8])):
        proposer.start(prompt, watch)
        proposer.finish(answer)
    assert table.told == [("", [6]), ("", [7])]


def test_an_answer_of_an_earlier_process_follows_those_of_this_one():
    table, watch = Echo(0), Stopwatch()
    proposer = TableProposer(table)
    first, second = (replace(prompt_of(1), question=question) for question in ("first", "second"))
    proposer.remember("before", [4])
    assert table.told == [("before", [4])]
    proposer.start(first, watch)
    proposer.finish([5])
    proposer.remember("after", (6, 7))
    assert table.told[1:] == [("first", [5]), ("after", [6, 7])]
    proposer.start(second, watch)
    assert len(table.told) == 3, "each answer is told once"


# ---------------------------------------------------------------------------------------------------------------------- the best table


def rhymes(number: int, seed: int) -> list[tuple[str, list[int]]]:
    """Texts of random tokens, each said twice, with an 8 in between: after the 8 a lookup is right and an n-gram is not."""
    r = random.Random(seed)
    words = [[r.randrange(10, 40) for _ in range(6)] for _ in range(number)]
    return [("q", [7, *w, 8, *w, 9]) for w in words]


def formulas(number: int, seed: int) -> list[tuple[str, list[int]]]:
    """Texts of one formula, with a token that was not there before in place of what a lookup would repeat."""
    r = random.Random(seed)
    return [("q", [7, 1, 2, r.randrange(50, 60), 3, 1, 2, 4, 9]) for _ in range(number)]


def test_the_best_table_trusts_what_was_right_on_texts_that_it_did_not_hold():
    copied = rhymes(1, 99)[0][1]
    table, ngram, lookup = BestTable(rhymes(40, 1)), NGram(rhymes(40, 1)), Lookup()
    second = range(10, 14)  # from the third word after the 8 on: a match of two tokens or more
    wanted = [copied[t] for t in second]
    assert all([drafter.next_token("q", copied[:t]) for t in second] == wanted for drafter in (table, lookup))
    assert [ngram.next_token("q", copied[:t]) for t in second] != [copied[t] for t in second]
    said = formulas(1, 99)[0][1]
    table, lookup = BestTable(formulas(40, 1)), Lookup()
    assert table.next_token("q", said[:7]) == said[7] == 4 and lookup.next_token("q", said[:7]) == said[3]


@pytest.mark.parametrize(("number", "judged"), [(13, [0, 3, 6, 9, 12]), (4, [0, 1, 2, 3]), (1, [0])])
def test_a_record_is_the_share_of_right_candidates_on_texts_of_the_other_half(monkeypatch, number, judged):
    """Of at most five texts, evenly spread over both halves; then the candidate of the best record wins, the first of equal ones."""
    monkeypatch.setattr(best_table, "MOST_JUDGED", 5)
    texts, questions = random_texts(number, number), {"q": [0, 1], "r": [2, 2, 1], "s": []}
    numbered = [tables.Answer("", tables.question_number(question), text) for question, text in texts]
    table, half, seen, right = BestTable(iter(texts), questions.__getitem__), number // 2, Counter(), Counter()
    for i in judged:
        question, text = texts[i]
        counts = tables.Counts(numbered[half:] if i < half else numbered[:half])
        for t in range(1, len(text)):
            for token, bucket in tables.candidates(counts, tables.question_number(question), questions[question], text[:t]):
                seen[bucket] += 1
                right[bucket] += token == text[t]
    record = [right[bucket] / seen[bucket] if seen[bucket] else 0.0 for bucket in range(tables.BUCKETS)]
    assert table._record == record and (number == 1 or max(record) > 0)
    counts = tables.Counts(numbered)
    for question, prefix in prefixes(number):
        found = tables.candidates(counts, tables.question_number(question), questions[question], prefix)
        valid = [(token, record[bucket]) for token, bucket in found if token != tables.NO_TOKEN]
        best = max(share for _, share in valid)
        assert table.next_token(question, prefix) == next(token for token, share in valid if share == best)


def test_the_best_table_of_nothing_proposes_what_lookup_finds():
    table = BestTable([])
    assert table.next_token("q", [5, 6, 7, 5]) == 6 and table.next_token("q", [5]) is None
    assert BestTable([], lambda question: [3, 5, 4]).next_token("q", [5]) == 4
