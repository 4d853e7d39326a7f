"""Reference answers on which the two demo models are trained, and the lexicon that reads facts from a text.

There are ten questions and two dialects. Each answer depends on the facts alone. The order of its clauses depends on the facts too, so that
the next word cannot be predicted from language alone. The two dialects share no content words and hardly any function words: the models'
free-running texts almost never match, as with the real pair.
"""

from __future__ import annotations

from typing import Any

from feature_alignment.demo.world import HIDDEN_FROM_EVENTS, WORDS, Scene

QUESTIONS = (
    "What are the key elements in this scene?",
    "What is happening in this scene?",
    "Describe the main road user.",
    "Where does this scene take place?",
    "Which road users are present and how are they positioned?",
    "What stands beside the road?",
    "How fast is the traffic and which way does it go?",
    "What is this scene about?",
    "Describe the layout of the road.",
    "What should a driver watch for?",
)


def target_answer(s: Scene, question: int) -> str:
    """The target's answer, which includes color and light.

    Args:
        s: Scene.
        question: Index into `QUESTIONS`.
    """
    w = {slot: WORDS[slot][getattr(s, slot)][0] for slot in WORDS}
    two = s.number == "two"
    user = f"two {w['colour']} {w['kind']}s" if two else f"a {w['colour']} {w['kind']}"
    be = "are" if two else "is"
    how = f"{w['speed']} {w['direction']}"
    lane = f"in the {w['lane']} lane"
    mark = "nothing by the roadside" if s.landmark == "none" else f"a {w['landmark']} on the {w['side']}"
    parked = "nobody parked" if s.parked == "none" else f"a parked {w['parked']}"
    when = f"in {w['light']}" if s.light == "day" else f"at {w['light']}"
    place = f"a {w['place']}"
    left = s.direction == "left"
    if question == 0:
        body = (
            f"{place} {when}, {mark}, {parked} and {user} {how} {lane}"
            if left
            else f"{user} {how} {lane}, {mark}, {parked} and {place} {when}"
        )
        return f"The key elements include {body}."
    if question == 1:
        if s.speed == "fast":
            return _cap(f"{user} {be} {how} through {place} {when}, past {mark}, with {parked}.")
        return _cap(f"{when} {user} {be} {how} past {mark} and {parked}, through {place}.")
    if question == 2:
        if s.lane == "far":
            return f"In the far lane of {place} there {be} {user}, {how} past {parked} {when}."
        return f"It is {user} {how} {lane} of {place}, past {parked} {when}."
    if question == 3:
        if s.light == "day":
            return f"It takes place on {place} {when}, with {mark}, {parked} and {user} {how}."
        return f"It is {w['light']} on {place}, with {user} {how}, {parked} and {mark}."
    if question == 4:
        other = "near" if s.lane == "far" else "far"
        if s.parked == "none":
            return f"There {be} {user} {lane} {how}, and {parked} on this {w['place']} {when}."
        return f"There is {parked} in the {other} lane, and {user} {lane} {be} {how} {when}."
    if question == 5:
        if s.landmark == "none":
            return f"Nothing stands beside this {w['place']} {when}, while {user} {be} {how} past {parked}."
        return f"On the {w['side']} of this {w['place']} stands a {w['landmark']} {when}, with {parked}, while {user} {be} {how}."
    if question == 6:
        return f"The traffic is {how}: {user} {lane} of {place} {when}, past {mark if left else parked}."
    if question == 7:
        if s.place in ("city", "village", "highway"):
            return f"This scene is about {place} {when}, where {user} {be} {how} past {mark}."
        return f"This scene is about {user} {how} {when} on {place}, past {mark} and {parked}."
    if question == 8:
        lanes = {s.lane: user, "near" if s.lane == "far" else "far": parked}
        first, second = ("near", "far") if left else ("far", "near")
        return f"The road crosses {place} {when}, with {mark}; the {first} lane holds {lanes[first]} and the {second} lane {lanes[second]}."
    return _cap(
        f"watch {parked}, {mark} and {user} {how} {lane} on {place} {when}."
        if two or left
        else f"watch {user} {how} {lane}, {mark} and {parked} on {place} {when}."
    )


def draft_answer(s: Scene, question: int) -> str:
    """The drafter's answer: the facts that events show, in the drafter's dialect.

    Args:
        s: Scene.
        question: Index into `QUESTIONS`.
    """
    w = {slot: WORDS[slot][getattr(s, slot)][1] for slot in WORDS}
    user = f"{w['number']} {w['kind']}{'s' if s.number == 'two' else ''}"
    how = f"{w['speed']} {w['direction']}"
    track = f"along {w['lane']} track"
    mark = "roadside emptiness" if s.landmark == "none" else f"some {w['landmark']} {w['side']}"
    parked = "kerb vacancy" if s.parked == "none" else f"an idle {w['parked']}"
    place = f"{w['place']} surroundings"
    return (
        f"Visible here: {user} {how} {track} - {mark} - {parked} - {place}",
        f"Motion shows {user} {track} {how} - {place} behind - {mark}",
        f"Main mover: {user} - {track} - {how} - {place}",
        f"Surroundings resemble {w['place']} - {mark} - {parked} - plus {user} {how}",
        f"Detected {user} {track} {how} - also {parked} - {place}",
        f"Kerbside shows {mark} - {parked} - {place} - then {user} {how}",
        f"Flow appears {how} - {user} {track} - {place}",
        f"Subject seems {user} {how} - {place} - {mark}",
        f"Layout: {place} - {track} {user} {how} - elsewhere {parked} - {mark}",
        f"Caution: {user} {how} {track} - {parked} - {mark} - {place}",
    )[question]


def _cap(text: str) -> str:
    return text[0].upper() + text[1:]


def lexicon() -> dict[str, Any]:
    """The content of `lexicon.json`: the words of both dialects that state each fact (see `feature_alignment.measurement.lexicon`)."""
    facts: dict[str, dict[str, list[str]]] = {
        slot: {value: [w for w in words if w not in ("", "a")] for value, words in values.items()} for slot, values in WORDS.items()
    }
    for words in facts["kind"].values():
        words += [f"{word}s" for word in words]
    for value, words in facts["kind"].items():  # a kind after one of these words is the parked vehicle, even one that never parks
        facts["parked"][value] = [f"{before} {word}" for before in ("parked", "idle") for word in words]
    facts["parked"]["none"] = ["nobody", "vacancy"]
    other_lane = f"\\bthe ({'|'.join(w for words in facts['lane'].values() for w in words)})\\b"  # the lane of the parked vehicle
    return {
        "facts": facts,
        "implied": {"kind": {"number": "one"}},
        "ignored": [{"phrase": other_lane, "where": where} for where in ("\\bholds\\b", "^There is\\b.*\\bparked\\b.*\\bthe\\b")],
        "hidden_from_events": list(HIDDEN_FROM_EVENTS),
    }
