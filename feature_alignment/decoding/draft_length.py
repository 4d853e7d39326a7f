"""Adaptive draft length: draft on while one more token is expected to gain more than it costs, and not at all where nothing pays.

A draft that costs d ms to make and s ms to verify is worth it if its chance to be kept, with all before it, is above R (d + s), where R
is the tokens per ms that would be emitted otherwise: the better of drafting so far and of not drafting (Dinkelbach's rule for a ratio of
sums). The chance is the product of the drafter's own confidences, the probability of each draft under its head; of a table, which has
none, it is the share of its drafts that were kept.

Whether rounds pay at all is a matter of credit, counted in passes without drafts. Each round adds what it gained over emitting its tokens
one by one; each prompt the drafter reads takes what that costs. All that the target does adds a small share of itself, and a drafter of
which nothing is known is tried only when that has paid for its prompt and a poor round, so that what is lost stays below that share,
from the first prompt on. One that was seen to be right before, on other clips, has an allowance and begins at once. A part of what is
earned is put aside, for the day when only the machine has become slower. All costs are measured as decoding goes, as medians of the last
passes.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import deque

SHARE = 1 / 80  # of the target's own time that may be lost
RISK = 0.5  # passes that a poor round loses
ALLOWANCE = 3.0  # passes that a drafter known to be good may lose before it has earned any, and that are put aside once it has
GOOD = 0.5  # acceptance rate from which on a drafter is known to be good
FIRST_FLOOR = 0.8  # until a draft's cost is known
KNOWN = 8  # rounds after which a pass without drafts is needed to judge them, however well they do
CLEAR = 2.0  # tokens in the time of one verification above which drafting pays whatever a pass without drafts costs
MEMORY = 0.9  # what a round still weighs in R after the next


class Pace:
    """What drafting has cost and gained. Lives as long as its caller: prompts to come go on with what the last ones taught.

    acceptance: the drafter's acceptance rate or token match on clips it was not trained on, if it was measured before
    """

    def __init__(self, acceptance: float | None = None) -> None:
        self._pass = deque[float](maxlen=5)
        self._drafts, self._verify, self._draft = (deque[float](maxlen=31) for _ in range(3))
        self._tokens = self._ms = self._kept = self._reached = 0.0  # of rounds with drafts, fading
        self._good = acceptance is not None and acceptance >= GOOD  # on its word, or by what it has earned
        self._credit, self._aside, self._on = ALLOWANCE if self._good else 0.0, 0.0, self._good
        self._readings, self._target_ms, self._has_read = deque[float](maxlen=5), 0.0, False
        self._owed_ms = 0.0  # for the first prompt, paid by a good drafter only if it fails
        self._since_pass = 0

    @property
    def drafting(self) -> bool:
        """Is the drafter to read a prompt that begins?"""
        return (self._on and self._good) or self._credit >= RISK + self._reading()

    @property
    def rest(self) -> int:
        """How many passes to go without drafts, where next_floor says so."""
        return 1 if self._on else max(1, math.ceil((self._wanted() - self._credit) / SHARE))

    def most(self, floor: float, knows_chance: bool = True) -> int:
        """Drafts of the coming round, at most. knows_chance: the drafter has confidences of its own, and heeds the floor"""
        if knows_chance:
            return 1 if not self._draft and not self._good else sys.maxsize
        chance = (self._kept + 0.5) / (self._reached + 1)  # of one draft; even, before any
        return max(1, int(math.log(max(floor, 1e-9)) / math.log(chance)))

    def prompted(self, ms: float) -> None:
        """The target has read a prompt."""
        self._target_ms, self._has_read = ms, False
        self._save(ms)

    def started(self, ms: float) -> None:
        """The drafter has read it too."""
        self._has_read = True
        if self._good and not self._readings:
            self._owed_ms = ms
        else:
            self._credit -= self._in_passes(ms)
        self._readings.append(ms)

    def next_floor(self) -> float | None:
        """The chance below which the coming round drafts no further; None: this pass does without drafts."""
        self._on = (self._on and (self._good or self._has_read)) or self._credit >= self._wanted()
        if not self._on:
            return None
        unclear = self._verify and self._tokens / self._ms * statistics.median(self._verify) < CLEAR
        unknown = len(self._verify) >= KNOWN and not self._pass  # a verification may take more than any drafts bring
        if unknown or (unclear and (len(self._pass) < 3 or self._since_pass >= (12 if self._aside else 3))):
            return None  # what drafting is compared with is not known, or no longer: machines become slower and faster
        if not self._draft:
            return FIRST_FLOOR
        undrafted = 1 / statistics.median(self._pass) if self._pass else 0.0
        cost = statistics.median(self._draft) + self._slope()
        if undrafted * cost < 1:
            return max(self._tokens / self._ms, undrafted) * cost
        self._give_up()  # not even a draft that is sure to be kept is worth it
        self._draft.clear()
        return None

    def passed(self, drafts: int, tokens: int, draft_ms: float, other_ms: float) -> None:
        """A pass of the target is over: how many drafts it verified, tokens it emitted, what drafting took and what everything else.
        Without drafts these may be several passes of a token each, and drafting is all that plain decoding would not have done: the
        drafter was asked and had no idea, or the books were kept."""
        if not drafts:
            self._since_pass = 0
            self._save(other_ms)
            self._pass.append(other_ms / tokens)
            self._settle(max(-1.0, -self._in_passes(draft_ms)))
            return
        self._since_pass += 1
        self._drafts.append(drafts)
        ms = _usual(other_ms, self._verify) + drafts * _usual(draft_ms / drafts, self._draft)
        self._tokens, self._ms = MEMORY * self._tokens + tokens, MEMORY * self._ms + ms
        self._kept, self._reached = MEMORY * self._kept + tokens - 1, MEMORY * self._reached + min(tokens, drafts)
        if self._pass:
            self._settle(tokens - self._in_passes(ms))

    def _slope(self) -> float:
        """Milliseconds by which one more draft makes a verification longer."""
        if len(set(self._drafts)) < 2:
            return 0.0
        return max(0.0, statistics.linear_regression(self._drafts, self._verify).slope)

    def _in_passes(self, ms: float) -> float:
        return ms / statistics.median(self._pass) if self._pass else 0.0

    def _reading(self) -> float:
        """Passes that the drafter's reading of a prompt takes; as many as the target's, until it is known."""
        return self._in_passes(statistics.median(self._readings) if self._readings else self._target_ms)

    def _wanted(self) -> float:
        """The credit for a try."""
        return RISK + (0.0 if self._has_read else self._reading())

    def _save(self, ms: float) -> None:
        """The share of the target's own time, as long as it is needed."""
        if self._credit < RISK + self._reading():
            self._credit += SHARE * self._in_passes(ms)

    def _settle(self, gain: float) -> None:
        self._credit = min(self._credit + gain, 4 * ALLOWANCE + 2 * self._reading())
        if not self._aside and gain > 0 and self._on and self._credit >= 2 * ALLOWANCE + self._reading():
            self._credit, self._aside, self._good = self._credit - ALLOWANCE, ALLOWANCE, True
        if self._credit > 0:
            return
        if self._aside:  # perhaps only the machine has become slower: measure anew what drafting is compared with
            self._pass.clear()
            self._credit, self._aside = self._credit + self._aside, 0.0
        else:
            self._give_up()

    def _give_up(self) -> None:
        self._credit = min(self._credit, 0.0) - self._in_passes(self._owed_ms)
        self._on, self._good, self._owed_ms = False, False, 0.0


def _usual(ms: float, history: deque[float]) -> float:
    """Remembered as at most three times the usual: what else the machine did is not drafting's fault."""
    history.append(min(ms, 3 * statistics.median(history)) if history else ms)
    return history[-1]
