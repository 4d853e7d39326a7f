"""Shapes of the road users that `cameras` draws: boxes and discs, from back to front.

Lengths are pixels in the far lane. x is the distance from the rear of a road user that faces right; heights count from the ground up.
"""

from __future__ import annotations

from typing import NamedTuple

RGB = tuple[float, ...]
GRAY, DARK, GLASS, SKIN = (0.55, 0.55, 0.55), (0.05, 0.05, 0.06), (0.55, 0.75, 0.85), (0.9, 0.7, 0.55)


class Box(NamedTuple):
    """A rectangle with its upper edge at height `top`; without `rgb` it has the color of the road user."""

    x: float
    top: float
    w: float
    h: float
    rgb: RGB | None = None


class Disc(NamedTuple):
    """A disc of radius r at height y, in the middle of the w pixels from x on."""

    x: float
    w: float
    y: float
    r: float
    rgb: RGB | None = None


def _wheel(x: float, r: float) -> Disc:
    """A wheel on the ground with its axle at x."""
    return Disc(x - r, 2 * r, r, r, DARK)


def _hub(x: float, y: float, r: float) -> Disc:
    return Disc(x - r, 2 * r, y, r, GRAY)


# kind -> (length, height)
BODY = {
    "car": (17, 8),
    "truck": (26, 13),
    "bus": (27, 12),
    "van": (17, 11),
    "tram": (38, 12),
    "tractor": (15, 12),
    "motorcycle": (12, 8),
    "cyclist": (11, 12),
    "pedestrian": (4, 12),
    "dog": (10, 6),
}
SHAPES: dict[str, tuple[Box | Disc, ...]] = {
    "car": (Box(0, 5, 17, 4), Box(4, 8, 7, 3), Box(8, 7.5, 2.5, 2, GLASS), _wheel(4, 2), _wheel(13, 2)),
    "van": (Box(0, 11, 13, 10), Box(13, 7, 4, 6), Box(12, 10, 3, 3, GLASS), _wheel(3.5, 2), _wheel(13.5, 2)),
    "truck": (
        Box(0, 13, 18, 11),
        Box(20, 9, 6, 8, GRAY),
        Box(23, 8, 3, 3, GLASS),
        _wheel(4, 2),
        _wheel(9, 2),
        _wheel(23, 2),
    ),
    "bus": (
        Box(0, 12, 27, 11),
        Box(1, 10, 25, 4, GLASS),
        *(Box(1 + 4.2 * i, 10, 1, 4) for i in range(1, 6)),
        _wheel(5, 2),
        _wheel(21, 2),
    ),
    "tram": (
        Box(0, 10, 18, 9),
        Box(20, 10, 18, 9),
        Box(18, 8, 2, 5, DARK),
        Box(1, 8.5, 36, 3, GLASS),
        Box(18, 8, 2, 5, DARK),
        Box(8, 12.5, 1, 3, DARK),
        Box(28, 12.5, 1, 3, DARK),
    ),
    "tractor": (Box(4, 12, 6, 7), Box(5, 11, 4, 4, GLASS), Box(8, 6.5, 7, 4), _wheel(4, 4), _wheel(13, 2)),
    "motorcycle": (Box(2, 4.5, 8, 2.5), Box(4, 8, 3, 4), _wheel(2.2, 2.2), _wheel(9.8, 2.2)),
    "cyclist": (
        Box(2, 4, 7, 1, GRAY),
        Box(4, 10, 3, 6),
        Disc(4, 3, 11, 1.6, SKIN),
        _wheel(2.2, 2.4),
        _wheel(8.8, 2.4),
        _hub(2.2, 2.4, 1.2),
        _hub(8.8, 2.4, 1.2),
    ),
    "pedestrian": (
        Box(0.5, 9, 3, 5),
        Box(0.5, 4, 1.2, 4, DARK),
        Box(2.4, 4, 1.2, 4, DARK),
        Disc(0.5, 3, 10.5, 1.7, SKIN),
    ),
    "dog": (
        Box(1.5, 5, 6, 2.5),
        Box(7, 6.5, 3, 2.5),
        Box(0, 6.5, 1.5, 2),
        *(Box(x, 2.6, 0.8, 2.6) for x in (1.6, 3.0, 5.4, 6.6)),
    ),
}
