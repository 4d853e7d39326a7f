"""Adaptive draft length: draft while one more token gains more than it costs, and not at all where drafting does not pay.

**How far to draft.** A draft token that takes d ms to propose and s ms to verify pays if its chance to be accepted, together with all
draft tokens before it, is above R (d + s). R is the rate in tokens per ms that is reached otherwise: the better of drafting so far and of
plain decoding (Dinkelbach's rule for a ratio of sums). The chance is the product of the drafter's own confidences, the probability of
each draft token under its head. A table has no confidences; the share of its draft tokens that were accepted replaces them.

**Whether to draft.** A credit, counted in steps of plain decoding, decides. Each round adds what it gained over plain decoding; each
drafter prefill costs what it takes. All work of the target adds a small share of its time. A drafter without a record is tried only when
these shares have paid for its prefill and one poor round, so that the loss stays below that share from the first prompt on. A drafter
with a good acceptance rate on other clips starts with an allowance. A part of what is earned is held in reserve so that a machine-wide
slowdown does not switch drafting off. All costs are measured while decoding, as medians of recent steps.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import deque

SHARE = 1 / 80  # of the target's own time that may be lost
RISK = 0.5  # steps that a poor round loses
ALLOWANCE = 3.0  # steps that a drafter with a good record may lose before it has earned any; also the size of the reserve
GOOD = 0.5  # acceptance rate of a good record
FIRST_FLOOR = 0.8  # until the cost of a draft token is known
KNOWN = 8  # rounds after which a plain step must be measured, however well they do
CLEAR = 2.0  # tokens per verification time above which drafting pays whatever a plain step costs
MEMORY = 0.9  # weight of a round in R after the next one


class DraftLengthController:
    """Chooses the draft length of each round from measured costs and gains. It learns across prompts.

    Args:
        acceptance: the drafter's acceptance rate or token match on clips that it was not trained on; None if not measured
    """

    def __init__(self, acceptance: float | None = None) -> None:
        self._plain_ms = deque[float](maxlen=5)
        self._num_drafts, self._verify_ms, self._draft_ms = (deque[float](maxlen=31) for _ in range(3))
        self._tokens = self._ms = self._accepted = self._reached = 0.0  # of rounds with draft tokens, with exponential decay
        self._has_good_record = acceptance is not None and acceptance >= GOOD
        self._credit, self._reserve, self._is_on = ALLOWANCE if self._has_good_record else 0.0, 0.0, self._has_good_record
        self._draft_prefill_ms, self._target_prefill_ms, self._is_prefilled = deque[float](maxlen=5), 0.0, False
        self._deferred_ms = 0.0  # the first drafter prefill; a drafter with a good record pays for it only if it fails
        self._rounds_since_plain = 0

    @property
    def needs_prefill(self) -> bool:
        """Whether the drafter should read a prompt that begins now."""
        return (self._is_on and self._has_good_record) or self._credit >= RISK + self._prefill_cost()

    @property
    def plain_steps(self) -> int:
        """Number of plain decoding steps to do when `next_confidence_floor` returns None."""
        return 1 if self._is_on else max(1, math.ceil((self._required_credit() - self._credit) / SHARE))

    def max_draft_tokens(self, confidence_floor: float, has_confidence: bool = True) -> int:
        """Upper limit of the draft length of the next round.

        Args:
            confidence_floor: result of `next_confidence_floor`
            has_confidence: the drafter has confidences of its own and stops at the floor
        """
        if has_confidence:
            return 1 if not self._draft_ms and not self._has_good_record else sys.maxsize
        chance = (self._accepted + 0.5) / (self._reached + 1)  # of one draft token
        return max(1, int(math.log(max(confidence_floor, 1e-9)) / math.log(chance)))

    def record_prefill(self, ms: float) -> None:
        """The target has read a prompt."""
        self._target_prefill_ms, self._is_prefilled = ms, False
        self._add_share(ms)

    def record_draft_prefill(self, ms: float) -> None:
        """The drafter has read the prompt."""
        self._is_prefilled = True
        if self._has_good_record and not self._draft_prefill_ms:
            self._deferred_ms = ms
        else:
            self._credit -= self._in_steps(ms)
        self._draft_prefill_ms.append(ms)

    def next_confidence_floor(self) -> float | None:
        """The chance of acceptance below which the next round stops drafting; None: do `plain_steps` steps without drafting."""
        self._is_on = (self._is_on and (self._has_good_record or self._is_prefilled)) or self._credit >= self._required_credit()
        if not self._is_on:
            return None
        unclear = self._verify_ms and self._tokens / self._ms * statistics.median(self._verify_ms) < CLEAR
        unknown = len(self._verify_ms) >= KNOWN and not self._plain_ms  # a verification may cost more than any draft gains
        if unknown or (unclear and (len(self._plain_ms) < 3 or self._rounds_since_plain >= (12 if self._reserve else 3))):
            return None  # the cost of a plain step is unknown or outdated: the speed of a machine changes
        if not self._draft_ms:
            return FIRST_FLOOR
        plain_rate = 1 / statistics.median(self._plain_ms) if self._plain_ms else 0.0
        cost_ms = statistics.median(self._draft_ms) + self._verify_slope()
        if plain_rate * cost_ms < 1:
            return max(self._tokens / self._ms, plain_rate) * cost_ms
        self._switch_off()  # even a draft token that is certain to be accepted does not pay
        self._draft_ms.clear()
        return None

    def record_round(self, num_draft_tokens: int, num_tokens: int, draft_ms: float, other_ms: float) -> None:
        """One round, or several steps of plain decoding, are finished.

        Args:
            num_draft_tokens: draft tokens that were verified; 0 for plain decoding
            num_tokens: tokens that were emitted
            draft_ms: time of drafting. Without draft tokens: all time that plain decoding would not have taken, for example asking a
                drafter that had no candidate
            other_ms: all other time
        """
        if not num_draft_tokens:
            self._rounds_since_plain = 0
            self._add_share(other_ms)
            self._plain_ms.append(other_ms / num_tokens)
            self._settle(max(-1.0, -self._in_steps(draft_ms)))
            return
        self._rounds_since_plain += 1
        self._num_drafts.append(num_draft_tokens)
        ms = _append_clipped(other_ms, self._verify_ms) + num_draft_tokens * _append_clipped(draft_ms / num_draft_tokens, self._draft_ms)
        self._tokens, self._ms = MEMORY * self._tokens + num_tokens, MEMORY * self._ms + ms
        self._accepted = MEMORY * self._accepted + num_tokens - 1
        self._reached = MEMORY * self._reached + min(num_tokens, num_draft_tokens)
        if self._plain_ms:
            self._settle(num_tokens - self._in_steps(ms))

    def _verify_slope(self) -> float:
        """Milliseconds that one more draft token adds to a verification."""
        if len(set(self._num_drafts)) < 2:
            return 0.0
        return max(0.0, statistics.linear_regression(self._num_drafts, self._verify_ms).slope)

    def _in_steps(self, ms: float) -> float:
        """Milliseconds as a number of plain decoding steps; 0 until one was measured."""
        return ms / statistics.median(self._plain_ms) if self._plain_ms else 0.0

    def _prefill_cost(self) -> float:
        """Steps that a drafter prefill takes; before it was measured, as many as the target's."""
        return self._in_steps(statistics.median(self._draft_prefill_ms) if self._draft_prefill_ms else self._target_prefill_ms)

    def _required_credit(self) -> float:
        """The credit that a try needs."""
        return RISK + (0.0 if self._is_prefilled else self._prefill_cost())

    def _add_share(self, ms: float) -> None:
        """Add the share of the target's time to the credit, up to the cost of one try."""
        if self._credit < RISK + self._prefill_cost():
            self._credit += SHARE * self._in_steps(ms)

    def _settle(self, gain: float) -> None:
        """Book the gain of a round, in steps; fill or use the reserve."""
        self._credit = min(self._credit + gain, 4 * ALLOWANCE + 2 * self._prefill_cost())
        if not self._reserve and gain > 0 and self._is_on and self._credit >= 2 * ALLOWANCE + self._prefill_cost():
            self._credit, self._reserve, self._has_good_record = self._credit - ALLOWANCE, ALLOWANCE, True
        if self._credit > 0:
            return
        if self._reserve:  # perhaps only the machine has become slower: measure plain steps again
            self._plain_ms.clear()
            self._credit, self._reserve = self._credit + self._reserve, 0.0
        else:
            self._switch_off()

    def _switch_off(self) -> None:
        self._credit = min(self._credit, 0.0) - self._in_steps(self._deferred_ms)
        self._is_on, self._has_good_record, self._deferred_ms = False, False, 0.0


def _append_clipped(ms: float, history: deque[float]) -> float:
    """Append at most three times the median, so that a pause of the machine is not attributed to drafting; returns the appended value."""
    history.append(min(ms, 3 * statistics.median(history)) if history else ms)
    return history[-1]
