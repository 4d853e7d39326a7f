"""Recognize the columns x, y, t and p: by the names that files use, or by the content of four unnamed columns."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from feature_alignment.cli.console import UserError
from feature_alignment.inputs.event_units import TimeUnit
from feature_alignment.inputs.event_windows import EVENT_FIELDS

MAX_COORDINATE = 4096  # of any sensor; the largest made so far has 1280 x 720 pixels
SPELLINGS = {
    "x": {"x", "xs", "x_pos", "x_position", "x_coord", "x_coordinate", "col", "column"},
    "y": {"y", "ys", "y_pos", "y_position", "y_coord", "y_coordinate", "row"},
    "t": {"t", "ts", "time", "times", "timestamp", "timestamps", "time_stamp", "time_stamps"},
    "p": {"p", "ps", "pol", "pols", "polarity", "polarities", "on", "polarity_on"},
}
_UNIT_SUFFIX: dict[str, TimeUnit] = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), "s"),
    **dict.fromkeys(("ms", "msec", "millis", "milliseconds"), "ms"),
    **dict.fromkeys(("us", "usec", "micros", "microseconds", "µs"), "us"),
    **dict.fromkeys(("ns", "nsec", "nanos", "nanoseconds"), "ns"),
}
ORDERS = ("txyp", "xytp", "xypt")  # of tables without names: v2e and rpg text, MVSEC, Metavision


def columns_by_name(names: Iterable[str]) -> tuple[dict[str, str], TimeUnit | None] | None:
    """Match column names with x, y, t and p.

    Args:
        names: Of the columns in a file.

    Returns:
        Field -> column name, and the unit in the time's name (`timestamp_ns`) if any; None if a field is missing.

    Raises:
        UserError: If two columns have the same meaning.
    """
    found: dict[str, str] = {}
    unit: TimeUnit | None = None
    for name in names:
        plain = re.sub(r"[^\wµ]+", "_", name.strip().lower()).strip("_")
        stem, _, suffix = plain.rpartition("_")
        stated = _UNIT_SUFFIX.get(suffix) if stem in SPELLINGS["t"] else None
        field = "t" if stated else next((k for k, spellings in SPELLINGS.items() if plain in spellings), None)
        if field is None:
            continue
        if field in found:
            raise UserError(f"columns {found[field]!r} and {name!r} could both be {field}; expected one. Remove or rename the other.")
        found[field] = name
        unit = stated or unit
    return (found, unit) if set(found) == set(EVENT_FIELDS) else None


def order_of(columns: list[np.ndarray], name: str) -> str:
    """Recognize the order of four unnamed columns: `txyp`, `xytp` or `xypt`. x is assumed to come before y.

    Args:
        columns: Four arrays [k], rows of the table in order.
        name: For messages.

    Raises:
        UserError: If no order, or more than one, fits.
    """
    fitting = [order for order in ORDERS if _fits(dict(zip(order, columns, strict=True)))]
    if len(fitting) == 1:
        return fitting[0]
    ranges = "; ".join(f"{c.min():g} to {c.max():g}" for c in columns) if len(columns[0]) else "no rows"
    raise UserError(
        f"{name} holds four columns without names ({ranges}), and {'none' if not fitting else 'more than one'} of the orders "
        f"{', '.join(' '.join(o) for o in ORDERS)} fits. Give them names and write them again, for example:\n"
        "  np.savez('events.npz', t=a[:, 0], x=a[:, 1], y=a[:, 2], p=a[:, 3])"
    )


def _fits(c: dict[str, np.ndarray]) -> bool:
    """Whether columns can be x, y, t, p: two polarities, whole pixels of a sensor, increasing times."""
    polarity = set(np.unique(c["p"])[:3].tolist())
    if not (polarity <= {0, 1} or polarity <= {-1, 1}):
        return False
    for side in ("x", "y"):
        values = c[side]
        if values.dtype.kind == "b" or values.min(initial=0) < 0 or values.max(initial=0) >= MAX_COORDINATE or (values % 1).any():
            return False
    steps = np.diff(c["t"].astype(np.float64))
    return len(steps) == 0 or (bool(c["t"].max() > c["t"].min()) and (steps < 0).mean() < 0.05)
