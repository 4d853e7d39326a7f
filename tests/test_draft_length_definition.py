"""The controller of the draft length against its definition, written down once more with plain lists, over random costs and gains."""

from __future__ import annotations

import math
import random
from collections import Counter
from statistics import median

import pytest

from feature_alignment.decoding.draft_length import DraftLengthController


class Definition:
    """Credit in passes without drafts; see the module's docstring. `seen` counts the decisions that were taken."""

    def __init__(self, acceptance: float | None) -> None:
        self.good = self.on = acceptance is not None and acceptance >= 0.5
        self.credit, self.aside = (3.0 if self.good else 0.0), 0.0
        self.passes, self.readings, self.rounds = [], [], []  # ms of a pass; of a drafter's prompt; (drafts, verify ms, ms a draft)
        self.draft_ms = []
        self.tokens = self.ms = self.kept = self.reached = 0.0
        self.target_ms, self.has_read, self.owed, self.since = 0.0, False, 0.0, 0
        self.seen: Counter[str] = Counter()

    def in_passes(self, ms):
        return ms / median(self.passes[-5:]) if self.passes else 0.0

    def reading(self):
        return self.in_passes(median(self.readings[-5:]) if self.readings else self.target_ms)

    def wanted(self):
        return 0.5 if self.has_read else 0.5 + self.reading()

    def save(self, ms):
        if self.credit < 0.5 + self.reading():
            self.credit += self.in_passes(ms) / 80

    def settle(self, gain):
        limit = 4 * 3.0 + 2 * self.reading()
        self.credit = min(self.credit + gain, limit)
        self.seen["limit"] += self.credit == limit
        if self.on and not self.aside and gain > 0 and self.credit >= 6.0 + self.reading():
            self.credit, self.aside, self.good = self.credit - 3.0, 3.0, True
            self.seen["put aside"] += 1
        if self.credit <= 0 and self.aside:
            self.passes.clear()
            self.credit, self.aside = self.credit + self.aside, 0.0
            self.seen["taken from what was put aside"] += 1
        elif self.credit <= 0:
            self.give_up()

    def give_up(self):
        self.seen["owed" if self.owed and self.passes else "given up"] += 1
        self.credit = min(self.credit, 0.0) - self.in_passes(self.owed)
        self.on = self.good = False
        self.owed = 0.0

    def prompt(self, ms):
        self.target_ms, self.has_read = ms, False
        self.save(ms)

    def draft_prompt(self, ms):
        self.has_read = True
        if self.good and not self.readings:
            self.owed = ms
        else:
            self.credit -= self.in_passes(ms)
        self.readings.append(ms)

    def needs_prefill(self):
        return (self.on and self.good) or self.credit >= 0.5 + self.reading()

    def rest(self):
        return 1 if self.on else max(1, math.ceil((self.wanted() - self.credit) * 80))

    def max_draft_tokens(self, floor, has_confidence):
        if has_confidence:
            return 1 if not self.draft_ms and not self.good else None
        return max(1, int(math.log(max(floor, 1e-9)) / math.log((self.kept + 0.5) / (self.reached + 1))))

    def floor(self):
        self.on = (self.on and (self.good or self.has_read)) or self.credit >= self.wanted()
        if not self.on:
            return None
        verify = [v for _, v in self.rounds[-31:]]
        if len(verify) >= 8 and not self.passes:
            self.seen["a pass is needed"] += 1
            return None
        unclear = verify and self.tokens / self.ms * median(verify) < 2.0
        if unclear and (min(len(self.passes), 5) < 3 or self.since >= (12 if self.aside else 3)):
            self.seen["compared again"] += 1
            return None
        if not self.draft_ms:
            return 0.8
        counts = [g for g, _ in self.rounds[-31:]]
        slope = 0.0
        if len(set(counts)) > 1:
            mean_g, mean_v = sum(counts) / len(counts), sum(verify) / len(verify)
            slope = sum((g - mean_g) * (v - mean_v) for g, v in zip(counts, verify, strict=True)) / sum((g - mean_g) ** 2 for g in counts)
        cost = median(self.draft_ms[-31:]) + max(0.0, slope)
        self.seen["slope"] += slope > 0
        undrafted = 1 / median(self.passes[-5:]) if self.passes else 0.0
        if undrafted * cost >= 1:
            self.seen["too dear"] += 1
            self.give_up()
            self.draft_ms.clear()
            return None
        return max(self.tokens / self.ms, undrafted) * cost

    def over(self, drafts, tokens, draft_ms, other_ms):
        if not drafts:
            self.since = 0
            self.save(other_ms)
            self.passes.append(other_ms / tokens)
            self.settle(max(-1.0, -self.in_passes(draft_ms)))
            return
        self.since += 1
        verify, each = (
            usual(ms, history) for ms, history in ((other_ms, [v for _, v in self.rounds[-31:]]), (draft_ms / drafts, self.draft_ms[-31:]))
        )
        self.rounds.append((drafts, verify))
        self.draft_ms.append(each)
        ms = verify + drafts * each
        self.tokens, self.ms = 0.9 * self.tokens + tokens, 0.9 * self.ms + ms
        self.kept, self.reached = 0.9 * self.kept + tokens - 1, 0.9 * self.reached + min(tokens, drafts)
        if self.passes:
            self.settle(tokens - self.in_passes(ms))


def usual(ms, history):
    return min(ms, 3 * median(history)) if history else ms


def compared(seed: int) -> Counter[str]:
    """One random life of a controller, every answer compared; how often each decision was taken."""
    r = random.Random(seed)
    acceptance = r.choice([None, 0.2, 0.5, 0.9, 0.9])
    controller, wanted = DraftLengthController(acceptance), Definition(acceptance)
    good, draft_ms, left = 0.5, 0.1, 9 * (seed % 2)  # half of the lives begin before any prompt
    unit = r.choice([1.0, 30.0])
    has_confidence = r.random() < 0.6
    for i in range(600):
        if i % 60 == 0:
            good, draft_ms, slow = r.choice([0.05, 0.6, 0.95]), r.choice([0.02, 0.2, 1.2]), unit * r.choice([0.6, 1.0, 2.5])
        if left <= 0:
            left, ms = r.randint(5, 40), unit * r.uniform(2, 12)
            assert controller.needs_prefill == wanted.needs_prefill()
            controller.record_prefill(ms)
            wanted.prompt(ms)
            if controller.needs_prefill and r.random() < 0.9:
                ms = unit * r.choice([0.0, r.uniform(0.5, 6)])
                controller.record_draft_prefill(ms)
                wanted.draft_prompt(ms)
        found, floor = controller.next_confidence_floor(), wanted.floor()
        assert (found is None) == (floor is None) and (found is None or found == pytest.approx(floor, rel=1e-9)), i
        assert controller.plain_steps == wanted.rest() and controller.needs_prefill == wanted.needs_prefill(), i
        noise = slow * (20.0 if r.random() < 0.02 else r.uniform(0.9, 1.1))
        if floor is None or r.random() < 0.05:  # perhaps it is asked and has no idea
            tokens = controller.plain_steps if floor is None else 1
            what = 0, tokens, unit * r.choice([0.0, 0.02, 1.5]), tokens * noise
        else:
            if not wanted.has_read:
                controller.record_draft_prefill(0.3)
                wanted.draft_prompt(0.3)
            most, limit = controller.max_draft_tokens(floor, has_confidence), wanted.max_draft_tokens(floor, has_confidence)
            assert most == limit or (limit is None and most > 10**6), i
            drafts = r.randint(1, min(most, 6))
            kept = next((k for k in range(drafts) if r.random() > good), drafts)
            what = drafts, kept + 1, drafts * draft_ms * noise, (1.2 + 0.05 * drafts) * noise
        controller.record_round(*what)
        wanted.over(*what)
        left -= what[1]
    return wanted.seen


def test_every_decision_is_the_definitions():
    seen = sum((compared(seed) for seed in range(30)), Counter())
    decisions = (
        "limit",
        "put aside",
        "taken from what was put aside",
        "owed",
        "given up",
        "a pass is needed",
        "compared again",
        "slope",
        "too dear",
    )
    assert min(seen[name] for name in decisions) > 5, seen


def test_a_credit_of_exactly_nothing_is_spent():
    controller = DraftLengthController(0.9)
    controller.record_prefill(4.0)
    controller.record_round(0, 1, 0.0, 1.0)
    controller.record_draft_prefill(0.0)
    assert controller.needs_prefill
    controller.record_round(1, 1, 1.0, 3.0)  # one token in the time of four passes: all three that it may lose
    assert not controller.needs_prefill and controller.next_confidence_floor() is None
