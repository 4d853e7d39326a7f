"""The language pair's world: the demo's road scenes with weather and a parked vehicle's color, and their canonical descriptions.

The language pair's text decoder is a public instruction model that stays as it is. Its towers are trained to turn pictures into the
token embeddings of a plain English description, so that the decoder reads a video as if somebody had described it. A tower emits as many
tokens as it has patches, whatever there is to say. Repeated sentences, and newlines or other fillers, make a small language model
repeat itself. Spaces in front of the description do not: the first six frames say nothing but spaces, the last two say it all.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from feature_alignment.demo import cameras, world

# slot -> value -> the words that state it in a description; each is one token of the text decoder
KINDS = {kind: {"cyclist": "bike"}.get(kind, kind) for kind in world.WORDS["kind"]}
COLORS = tuple(world.WORDS["colour"])
WEATHER = {"clear": ("clear", "dry"), "rainy": ("rainy", "wet"), "snowy": ("snowy", "icy"), "cloudy": ("cloudy", "damp")}
SPEEDS = {"slow": "slowly", "medium": "steadily", "fast": "fast"}
PLACES = {
    "city": "city street",
    "forest": "forest road",
    "bridge": "long bridge",
    "highway": "wide highway",
    "village": "village street",
    "farm": "farm road",
}
LIGHTS = {"day": "noon", "dusk": "dusk", "night": "night"}
LANDMARKS = {"signal": "signal", "sign": "sign", "bench": "bench", "lamp": "lamp", "mailbox": "box"}
SURROUNDINGS = {
    "city": "Tall buildings with many windows stand along the street.",
    "forest": "Tall trees with thick leaves stand along the road.",
    "bridge": "Steel rails and high towers stand along the bridge.",
    "highway": "A long wall and rails run along the highway.",
    "village": "Small houses with pointed roofs stand along the street.",
    "farm": "Open fields and wooden fences run along the road.",
}
QUESTIONS = (
    "Describe this video to a blind passenger.",
    "What should a driver do here, and why?",
    "What will probably happen next?",
    "Which dangers are there in this scene?",
    "What can be seen on the road and next to it?",
    "Who or what is moving, and where is it going?",
    "What does the weather change for the traffic?",
    "Write a short report about this scene.",
    "What makes this place special?",
    "Tell a child what happens in this video.",
    "How would you warn somebody who wants to cross the road here?",
    "What would a police officer write down about this moment?",
    "Which things in this video stand still, and which move?",
    "What is the mood of this place?",
    "How fast may a careful driver go here, and what decides it?",
    "What should a person on a bike watch out for in this place?",
    "Give the video a title and explain it.",
    "What would you tell a friend who drives here tomorrow?",
    "How does the time of day change what a driver can see?",
    "Name the most important thing in this video and say why it matters.",
    "What is parked or standing near the road, and does it block the way?",
    "Imagine you are the one who is moving. What do you see?",
    "What sounds would you hear if you stood there?",
    "Compare the moving road user with the things around it.",
    "Which lane is used, and by whom?",
    "What could have happened just before this video starts?",
    "What would an insurance company want to know about this scene?",
    "Explain the scene as a radio reporter would.",
    "Which advice would a driving teacher give here?",
    "How would this place look at another time of day?",
    "What can you say about the ground and the sky?",
    "Where would you stop the car, and why there?",
    "What is the first thing that you notice, and what do you notice later?",
    "How would you draw this scene on paper?",
    "What would a camera on the other side of the road show?",
    "Why could somebody be in a hurry here, or not?",
)


@dataclass(frozen=True)
class LanguageScene:
    """The facts of one clip: a scene of the demo world, the weather, and the color of what is parked."""

    road: world.Scene
    weather: str
    parked_color: str


def scene(seed: int) -> LanguageScene:
    """The scene of a seed; all slots are drawn independently, except that only small road users come in twos."""
    rng = random.Random(f"language {seed}")
    return LanguageScene(world.scene(seed), rng.choice(sorted(WEATHER)), rng.choice(sorted(COLORS)))


def facts(s: LanguageScene) -> dict[str, str]:
    """Slot -> value, for a manifest's `facts`."""
    known = {slot: value for slot, value in asdict(s.road).items() if slot in world.WORDS} | {"weather": s.weather}
    return known | ({"parked_color": s.parked_color} if s.road.parked != "none" else {})


def target_sentences(s: LanguageScene) -> list[str]:
    """What the target's last two frames say, 74 tokens of the text model in all."""
    r, kind = s.road, KINDS[s.road.kind]
    two = r.number == "two"
    users = f"are two {r.colour} {kind}s" if two else f"is a {r.colour} {kind}"
    landmark = f" A {LANDMARKS[r.landmark]} is on the {r.side} of the road." if r.landmark != "none" else None
    parked = f" A {s.parked_color} {r.parked} is parked in the other lane." if r.parked != "none" else None
    return [
        f" The video shows a {PLACES[r.place]} at {LIGHTS[r.light]}.",
        f" The weather is {WEATHER[s.weather][0]} and the road is {WEATHER[s.weather][1]}.",
        f" There {users} in the {r.lane} lane.",
        f" {'They are' if two else 'It is'} moving {SPEEDS[r.speed]} to the {r.direction}.",
        landmark or " There is nothing on the side of the road.",
        parked or " No vehicle at all is parked in the lane.",
        f" {SURROUNDINGS[r.place]}",
        f" Drivers should watch the {r.colour} {kind}{'s' if two else ''}.",
    ]


def draft_part(s: LanguageScene) -> str:
    """What the drafter's patches say: 16 tokens, about what moves an edge; no color, no light, no weather."""
    r, kind = s.road, KINDS[s.road.kind]
    who = f"Two {kind}s move" if r.number == "two" else f"A {kind} moves"
    return f" {who} {SPEEDS[r.speed]} to the {r.direction} in the {r.lane} lane on a {PLACES[r.place]}."


def render(s: LanguageScene) -> np.ndarray:
    """Intensity images float32 [49, 72, 72, 3], as `cameras.render`, with the weather in them."""
    image = cameras.render(s.road, s.parked_color)
    rng = np.random.default_rng([s.road.seed, 4])
    level = float(image.mean())
    if s.weather == "cloudy":
        image = 0.55 * image + 0.45 * level
    elif s.weather in ("rainy", "snowy"):
        drops = 26 if s.weather == "rainy" else 34
        x, y = rng.integers(0, cameras.SIZE, drops), rng.uniform(0, cameras.SIZE, drops)
        for step in range(len(image)):
            if s.weather == "rainy":
                for length in range(5):
                    rows = (y + 2.5 * step + length).astype(int) % (cameras.SIZE - 4)
                    image[step, rows, x] = 0.6 * image[step, rows, x] + 0.4 * (0.35 + 0.5 * level)
            else:
                rows, columns = (y + 0.25 * step).astype(int) % (cameras.SIZE - 5), (x + step // 12) % (cameras.SIZE - 1)
                for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    image[step, rows + dy, columns + dx] = min(1.0, 0.5 + level)
    return image


def frames(intensity: np.ndarray, seed: int) -> np.ndarray:
    """Frames uint8 [16, 72, 72, 3] with a time stamp in their lowest rows, as dash cams write one: a bar that grows with time."""
    images = cameras.frames(intensity, seed)
    for i, image in enumerate(images):
        image[-4:] = 0
        image[-3:, : round(cameras.SIZE * (i + 1) / len(images))] = 255
    return images


def lexicon() -> dict[str, Any]:
    """The content of `lexicon.json` (see `feature_alignment.measurement.lexicon`): which words of an answer state which facts."""

    def single(values: Mapping[str, str]) -> dict[str, list[str]]:
        return {value: [word] for value, word in values.items()}

    kinds = {value: [word, f"{word}s"] for value, word in KINDS.items()}
    found: dict[str, dict[str, list[str]]] = {
        "kind": kinds | {"cyclist": ["bike", "bikes", "cyclist", "cyclists", "bicycle", "bicycles"]},
        "colour": {color: [color] for color in COLORS},
        "speed": {"slow": ["slowly"], "medium": ["steadily"], "fast": ["fast", "quickly"]},
        "place": {
            "city": ["city"],
            "forest": ["forest"],
            "bridge": ["bridge"],
            "highway": ["highway"],
            "village": ["village"],
            "farm": ["farm"],
        },
        "light": {"day": ["noon"], "dusk": ["dusk"], "night": ["night"]},
        "landmark": single(LANDMARKS),
        "weather": {value: [value] for value in WEATHER},
        "lane": {value: [f"{value} lane"] for value in ("near", "far")},
        "direction": {value: [f"to the {value}"] for value in ("left", "right")},
    }
    return {"facts": found, "hidden_from_events": ["colour", "light", "weather"]}
