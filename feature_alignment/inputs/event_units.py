"""Recognize the unit of time stamps and convert them to whole microseconds.

A file rarely states its unit. It is recognized from the magnitude of the stamps (epoch times), from fractions, from their grid (cameras
stamp whole microseconds), and from the duration and event rate that each unit implies. A unit is accepted only if the others are
implausible; otherwise the error asks for `--event_time_unit`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from feature_alignment.cli.console import UserError, record_repair

TimeUnit = Literal["s", "ms", "us", "ns"]
UNITS: tuple[TimeUnit, ...] = ("s", "ms", "us", "ns")
NAMES: dict[str, str] = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
FARTHEST_US = 2**61  # differences of smaller numbers fit into 64 bits
_PER_UNIT = {"s": 1_000_000, "ms": 1000, "us": 1}  # microseconds per unit; nanoseconds are divided by 1000
_EPOCH_S = (1.0e9, 2.2e9)  # 2001 to 2039, in seconds
_SHORTEST_US, _LONGEST_US = 3_000, 24 * 3600 * 1_000_000  # of a recording
_FASTEST = 2e8  # events a second; the fastest cameras reach about 1e8 over a clip
_SLOWEST = 1.0
_FEW = 50  # fewer events are too few to estimate a duration or a rate


@dataclass(frozen=True)
class TimeSample:
    """Time stamps from which a unit is recognized.

    Args:
        values: [k], runs of consecutive stamps as stored.
        first: Smallest stamp of the stream.
        last: Largest stamp of the stream.
        count: Number of events of the stream.
        step: Length of one run in `values`; 0 for a single run.
    """

    values: np.ndarray
    first: float
    last: float
    count: int
    step: int = 0

    def gaps(self) -> np.ndarray:
        """Absolute differences of consecutive stamps within runs."""
        gaps = np.abs(np.diff(self.values))
        if self.step:
            gaps = gaps[np.arange(1, len(self.values)) % self.step != 0]
        return gaps


def choose_unit(sample: TimeSample, name: str, asked: TimeUnit | None = None, stated: TimeUnit | None = None) -> TimeUnit:
    """The unit of a stream: stated by its format, given by the user, or recognized.

    Args:
        sample: Time stamps of the stream.
        name: For messages.
        asked: Unit given by the user.
        stated: Unit stated by the format.

    Raises:
        UserError: If two units are plausible, or none, or if `asked` contradicts `stated`.
    """
    if stated and asked and stated != asked:
        raise UserError(
            f"{name} states its times in {NAMES[stated]}, but --event_time_unit {asked} was given. Drop the flag for this file."
        )
    _refuse_impossible(sample, name, stated)
    unit = stated or asked or _recognize(sample, name)
    if sample.values.dtype.kind == "f":
        _refuse_coarse(sample, name, unit)
    if unit != "us":
        how = "stated by the file" if stated else "asked for" if asked else "recognized"
        span_ms = abs(sample.last - sample.first) * _us_per(unit) / 1000
        record_repair(
            name, f"times converted from {NAMES[unit]}", f"times are {NAMES[unit]} ({how}): {sample.count:,} events in {span_ms:,.6g} ms."
        )
    return unit


def to_us(t: np.ndarray, unit: TimeUnit, name: str) -> np.ndarray:
    """Convert time stamps to whole microseconds, rounding half to even.

    Args:
        t: [n], as stored.
        unit: Of t.
        name: For messages.

    Returns:
        [n] int64.

    Raises:
        UserError: For stamps that are not finite or too large.
    """
    if t.dtype.kind == "f" and not np.isfinite(t).all():
        raise UserError(f"{name}: non-finite values among the events.")
    if len(t):
        low, high = t.min().item() * _us_per(unit), t.max().item() * _us_per(unit)
        if not -FARTHEST_US < low <= high < FARTHEST_US:
            raise UserError(f"{name}: t goes from {t.min():g} to {t.max():g} {NAMES[unit]}; expected times within 70,000 years of zero.")
    if t.dtype.kind == "f":
        whole = np.floor(t.astype(np.float64))  # split, so that the fraction keeps its precision
        fraction = t.astype(np.float64) - whole
        if unit == "ns":
            return whole.astype(np.int64) // 1000
        return whole.astype(np.int64) * _PER_UNIT[unit] + np.round(fraction * _PER_UNIT[unit]).astype(np.int64)
    t = t.astype(np.int64)
    return t // 1000 if unit == "ns" else t * _PER_UNIT[unit]


def _us_per(unit: TimeUnit) -> float:
    return _PER_UNIT.get(unit, 0.001)


def _refuse_impossible(sample: TimeSample, name: str, stated: TimeUnit | None) -> None:
    values = sample.values
    if values.dtype.kind not in "iuf":
        raise UserError(f"{name}: x, y, t, p must be numbers, got t of {values.dtype}.")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UserError(f"{name}: non-finite values among the events.")
    if not stated and sample.count >= 5 and sample.first == sample.last and (values == sample.first).all():
        raise UserError(
            f"{name}: all {sample.count:,} events have the time {sample.first:g}. Were seconds cast to integers? "
            "Write the file again with microseconds as integers."
        )


def _refuse_coarse(sample: TimeSample, name: str, unit: TimeUnit) -> None:
    """Refuse floats without enough precision: float32 resolves an epoch time to two minutes."""
    largest = np.abs(sample.values).max(initial=0)
    resolution_us = float(np.spacing(largest)) * _us_per(unit)
    if resolution_us > 1000:
        raise UserError(
            f"{name}: {sample.values.dtype} holds times around {largest:g} {NAMES[unit]} only to {resolution_us / 1000:,.3g} ms. "
            "Write the file again with float64 or integers, or with times relative to its first event."
        )


def _recognize(sample: TimeSample, name: str) -> TimeUnit:
    fractions = sample.values.dtype.kind == "f" and bool((sample.values != np.floor(sample.values)).any())
    plausible = [u for u in (UNITS[:3] if fractions else UNITS) if _is_plausible(sample, u)]
    if epoch := _epoch_unit(sample, fractions):
        return epoch
    found = _from_fractions(sample, plausible) if fractions else _from_integers(sample)
    if found:
        return found
    if not fractions and "us" not in plausible:
        plausible.append("us")
    meanings = ", ".join(f"--event_time_unit {u} ({_meaning(sample, u)})" for u in (plausible or UNITS))
    likely = " look like seconds, but" if fractions else ""
    raise UserError(
        f"{name}: times from {sample.first:.12g} to {sample.last:.12g}{likely} could be of more than one unit. Say which one: {meanings}."
    )


def _is_plausible(sample: TimeSample, unit: TimeUnit) -> bool:
    span_us = abs(sample.last - sample.first) * _us_per(unit)
    rate = sample.count / max(span_us, 1e-3) * 1e6
    return _SHORTEST_US <= span_us <= _LONGEST_US and _SLOWEST <= rate <= _FASTEST


def _meaning(sample: TimeSample, unit: TimeUnit) -> str:
    span_s = abs(sample.last - sample.first) * _us_per(unit) / 1e6
    return f"{span_s:.3g} s, {sample.count / max(span_s, 1e-9):,.3g} events/s"


def _epoch_unit(sample: TimeSample, fractions: bool) -> TimeUnit | None:
    """The unit in which all stamps are dates of this century and the stream has a plausible length.

    Integers of the size of epoch seconds are microseconds half an hour into a recording: no camera stamps whole seconds.
    """
    for unit in UNITS:
        low, high = (s * 1e6 / _us_per(unit) for s in _EPOCH_S)
        inside = low <= min(sample.first, sample.last) and max(sample.first, sample.last) <= high
        span_us = abs(sample.last - sample.first) * _us_per(unit)
        rate = sample.count / max(span_us, 1e-3) * 1e6
        if inside and (unit != "s" or fractions) and span_us <= _LONGEST_US and (rate <= _FASTEST or sample.count < _FEW):
            return unit
    return None


def _on_grid(values: np.ndarray, per_unit: float) -> bool:
    """Whether values * per_unit are whole numbers within float precision."""
    scaled = values.astype(np.float64) * per_unit
    tolerance = 4 * np.spacing(np.abs(values)).astype(np.float64) * per_unit
    return bool((tolerance < 0.1).all() and (np.abs(scaled - np.round(scaled)) <= np.maximum(tolerance, 1e-6)).all())


def _from_fractions(sample: TimeSample, plausible: list[TimeUnit]) -> TimeUnit | None:
    """Seconds if the stamps are whole microseconds and not whole milliseconds; otherwise the only plausible unit."""
    if sample.count < _FEW and not plausible and abs(sample.last - sample.first) < 10:
        return "s"
    if "s" in plausible and _on_grid(sample.values, 1e6) and not _on_grid(sample.values, 1e3):
        return "s"
    return plausible[0] if len(plausible) == 1 else None


def _from_integers(sample: TimeSample) -> TimeUnit | None:
    """Microseconds unless the stream would be too short, too fast, or equally likely nanoseconds; None if ambiguous."""
    span = abs(sample.last - sample.first)
    rate = sample.count / max(span, 1) * 1e6  # events a second if the stamps are microseconds
    if sample.count < _FEW and span < 1e6:
        return "us"
    if span < _SHORTEST_US or rate > _FASTEST:
        return None
    if span < 1e6 or rate > 1e5:  # as nanoseconds it would be shorter than a millisecond, or faster than any camera
        return "us"
    gaps = sample.gaps()
    if len(gaps) and gaps.any() and not (gaps % 1000).any():
        return "ns" if rate < 5000 and rate * 1000 <= _FASTEST else None
    mean_gap = span / max(sample.count - 1, 1)
    if (
        len(gaps) >= 1000 and (gaps == 0).mean() > 5 / max(mean_gap, 1) + 0.02
    ):  # bursts within one microsecond are typical of a camera's clock
        return "us"
    return None


def refuse_wrapped(t: np.ndarray, name: str) -> None:
    """Refuse whole times of 32 bits that wrap around, where sorting would move the recording's end before its begin.

    Sorted times step back by nearly 2**32 there and nowhere forward by half of that, which times in no order do as well.

    Args:
        t: [n], as stored, all or a sample in the order of the file.
        name: For the message.

    Raises:
        UserError: If they wrap around.
    """
    if t.dtype.kind not in "iu" or len(t) < 2 or int(t.max()) - int(t.min()) >= 2**32:
        return
    values = t.astype(np.int64) if t.dtype != np.uint64 else (t - t.min()).astype(np.int64)
    steps = np.diff(values)
    if steps.min() < -(2**31) and steps.max() < 2**31:
        at = int(steps.argmin())
        raise UserError(
            f"{name}: its 32-bit times wrap around, from {t[at]:,} back to {t[at + 1]:,}. Cut it there, or add 2**32 to the times after it "
            "and write it again with 64-bit times, for example np.savez('events.npz', x=x, y=y, t=t, p=p)."
        )
