"""Adaptive draft length: draft on while one more token is expected to gain more than it costs, and not at all where nothing pays.

A draft that costs d ms to make and s ms to verify is worth it if its chance to be kept, with all before it, is above R (d + s), where R
is the tokens per ms that would be emitted otherwise: the better of drafting so far and of not drafting (Dinkelbach's rule for a ratio of
sums). The chance is the product of the drafter's own confidences, the probability of each draft under its head.

Whether rounds pay at all is a matter of credit, counted in passes without drafts: each round adds what it gained over emitting its
tokens one by one, each prompt the drafter reads takes what that costs, but for the very first. No credit left: no drafts, and the drafter
reads no prompts, for so many passes that all that was lost is small among them; then one round is tried. A drafter that has not earned
anything yet has one allowance, one that has gets a second, in case only the machine has become slower. All costs are measured as
decoding goes, as medians of the last passes; nothing is known in advance.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

ALLOWANCE = 3.0  # passes that may be lost before drafting is given up
REST = 60  # passes without drafts for each pass that was lost
FIRST_FLOOR = 0.8  # until a draft's cost is known
CLEAR = 2.0  # tokens in the time of one verification above which drafting pays whatever a pass without drafts costs
MEMORY = 0.9  # what a round still weighs in R after the next


class Pace:
    """What drafting has cost and gained. Lives as long as its caller: prompts to come go on with what the last ones taught."""

    def __init__(self) -> None:
        self._pass = deque[float](maxlen=5)
        self._drafts, self._verify, self._draft = (deque[float](maxlen=31) for _ in range(3))
        self._tokens = self._ms = 0.0  # of rounds with drafts, fading
        self._credit, self._wait, self._resting, self._doubted = ALLOWANCE, 0.0, False, True
        self._first_prompt_ms = 0.0
        self._since_pass = 0

    @property
    def drafting(self) -> bool:
        return self._wait <= 0

    @property
    def rest(self) -> int:
        """How many passes to go without drafts, where next_floor says so."""
        return max(1, math.ceil(self._wait))

    def next_floor(self) -> float | None:
        """The chance below which the coming round drafts no further; None: this pass does without drafts."""
        if not self.drafting:
            return None
        unclear = self._verify and self._tokens / self._ms * statistics.median(self._verify) < CLEAR
        if unclear and (len(self._pass) < 3 or self._since_pass >= (12 if self._credit > 2 * ALLOWANCE else 3)):
            return None  # what drafting is compared with is not known, or no longer: machines become slower and faster
        if not self._draft:
            return FIRST_FLOOR
        undrafted = 1 / statistics.median(self._pass) if self._pass else 0.0
        floor = max(self._tokens / self._ms, undrafted) * (statistics.median(self._draft) + self._slope())
        if floor < 1:
            return floor
        self._rest(ALLOWANCE)  # not even a draft that is sure to be kept is worth it
        return None

    def passed(self, drafts: int, tokens: int, draft_ms: float, other_ms: float) -> None:
        """A pass of the target is over: how many drafts it verified, tokens it emitted, what drafting took and what everything else.
        Without drafts these may be several passes of a token each."""
        if not drafts:
            self._pass.append(other_ms / tokens)
            self._wait -= tokens
            self._since_pass = 0
            if draft_ms:  # the drafter was asked and had no idea
                self._settle(-draft_ms / statistics.median(self._pass))
            return
        self._since_pass += 1
        self._drafts.append(drafts)
        ms = _usual(other_ms, self._verify) + drafts * _usual(draft_ms / drafts, self._draft)
        self._tokens, self._ms = MEMORY * self._tokens + tokens, MEMORY * self._ms + ms
        if self._pass:
            self._settle(tokens - ms / statistics.median(self._pass))

    def started(self, ms: float) -> None:
        """The drafter has read a prompt."""
        if self._pass:
            self._credit -= ms / statistics.median(self._pass)
        else:
            self._first_prompt_ms = ms

    def _slope(self) -> float:
        """Milliseconds by which one more draft makes a verification longer."""
        if len(set(self._drafts)) < 2:
            return 0.0
        return max(0.0, statistics.linear_regression(self._drafts, self._verify).slope)

    def _settle(self, gain: float) -> None:
        self._credit = min(4 * ALLOWANCE, self._credit + gain)
        self._doubted = self._doubted and self._credit < 2 * ALLOWANCE
        if self._credit > 0:
            self._resting = False
        elif self._resting or self._doubted:  # a failed try, lost again, or never won
            self._rest(-self._credit + (0.0 if self._resting else ALLOWANCE))
        else:  # perhaps only the machine has become slower: measure anew what drafting is compared with
            self._pass.clear()
            self._credit, self._doubted = ALLOWANCE, True

    def _rest(self, lost: float) -> None:
        if self._first_prompt_ms and self._pass:
            lost += self._first_prompt_ms / statistics.median(self._pass)
        self._credit, self._wait, self._resting, self._doubted = 0.0, REST * lost, True, False
        self._first_prompt_ms = 0.0


def _usual(ms: float, history: deque[float]) -> float:
    """Remembered as at most three times the usual: what else the machine did is not drafting's fault."""
    history.append(min(ms, 3 * statistics.median(history)) if history else ms)
    return history[-1]
