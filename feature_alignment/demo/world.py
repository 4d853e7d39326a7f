"""The synthetic driving world: the facts of a scene and the words for them.

A scene is a pure function of its seed. `cameras` renders it for a frame camera and an event camera; `captions` holds the two models'
answers. The target's words include color and light, which cannot be read from events; the drafter never names them.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass

# slot -> value -> (target's word, drafter's word); the lexicon looks for these words
WORDS: dict[str, dict[str, tuple[str, str]]] = {
    "kind": {
        "car": ("car", "automobile"),
        "truck": ("truck", "lorry"),
        "bus": ("bus", "coach"),
        "van": ("van", "minibus"),
        "tram": ("tram", "streetcar"),
        "tractor": ("tractor", "harvester"),
        "motorcycle": ("motorcycle", "motorbike"),
        "cyclist": ("cyclist", "biker"),
        "pedestrian": ("pedestrian", "walker"),
        "dog": ("dog", "hound"),
    },
    "number": {"one": ("a", "one"), "two": ("two", "several")},
    "colour": {c: (c, "") for c in ("red", "blue", "green", "yellow", "white", "black", "orange")},
    "speed": {"slow": ("creeping", "crawling"), "medium": ("cruising", "advancing"), "fast": ("racing", "rushing")},
    "direction": {"left": ("leftward", "westbound"), "right": ("rightward", "eastbound")},
    "lane": {"near": ("near", "closest"), "far": ("far", "distant")},
    "place": {
        "city": ("street", "downtown"),
        "forest": ("forest", "woodland"),
        "bridge": ("bridge", "overpass"),
        "highway": ("highway", "motorway"),
        "village": ("village", "settlement"),
        "farm": ("farm", "countryside"),
    },
    "light": {"day": ("daylight", ""), "dusk": ("dusk", ""), "night": ("night", "")},
    "landmark": {
        "signal": ("signal", "stoplight"),
        "sign": ("sign", "placard"),
        "bench": ("bench", "seat"),
        "lamp": ("lamp", "streetlight"),
        "mailbox": ("mailbox", "postbox"),
        "none": ("nothing", "emptiness"),
    },
    "side": {"left": ("left", "lefthand"), "right": ("right", "righthand")},
    "parked": {
        "car": ("car", "automobile"),
        "van": ("van", "minibus"),
        "truck": ("truck", "lorry"),
        "none": ("nobody", "vacancy"),
    },
}
HIDDEN_FROM_EVENTS = ("colour", "light")
SMALL_KINDS = ("motorcycle", "cyclist", "pedestrian", "dog")  # small enough for two in a frame


@dataclass(frozen=True)
class Scene:
    """The facts of one clip; each field is a key of `WORDS` and holds one of its values."""

    kind: str
    number: str
    colour: str
    speed: str
    direction: str
    lane: str
    place: str
    light: str
    landmark: str
    side: str
    parked: str
    seed: int  # texture, exact positions and noise


def scene(seed: int) -> Scene:
    """The scene of a seed; slots are drawn independently, except that only small road users come in pairs."""
    rng = random.Random(seed)
    facts = {slot: rng.choice(sorted(values)) for slot, values in WORDS.items()}
    if facts["kind"] not in SMALL_KINDS:
        facts["number"] = "one"
    return Scene(**facts, seed=seed)


def facts(s: Scene) -> dict[str, str]:
    """Slot -> value of a scene."""
    return {slot: value for slot, value in asdict(s).items() if slot in WORDS}
