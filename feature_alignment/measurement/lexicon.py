r"""A lexicon: which words state which facts. It is a JSON file, so that synonyms and errors can be counted on any data set.

    {"facts": {"color": {"red": ["red", "crimson"], …}, "parked": {"car": ["parked car"], "none": ["nobody"]}, …},
     "implied": {"kind": {"number": "one"}},
     "ignored": [{"phrase": "the (near|far)", "where": "\\bholds\\b"}],
     "hidden_from_events": ["color"]}

- `facts` maps each slot and value to the phrases (one or several words, any case) that state it. The other keys are optional.
- `implied`: a text that states the first slot but not the second implies this value of the second.
- `ignored`: in a text that matches `where`, matches of `phrase` state nothing. Both are regular expressions.
- `hidden_from_events`: slots that an event camera cannot show.

The facts of a sample, slot -> value, are the key `facts` of its manifest row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from feature_alignment.cli.console import UserError

Fact = tuple[str, str]  # (slot, value)
Verdict = Literal["same", "synonym", "other_fact", "other_word"]
Filled = TypeVar("Filled", bound=Sized)
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Lexicon:
    """The facts that words state.

    Args:
        phrases: words of a phrase in lower case -> the fact it states
        implied: slot -> the values of other slots that it implies
        ignored: compiled pairs (phrase, where), as in the file
        hidden_from_events: slots that an event camera cannot show
    """

    phrases: Mapping[tuple[str, ...], Fact]
    implied: Mapping[str, Mapping[str, str]]
    ignored: tuple[tuple[re.Pattern[str], re.Pattern[str]], ...]
    hidden_from_events: frozenset[str]

    @classmethod
    def load(cls, path: Path) -> Lexicon:
        """Read a lexicon file.

        Raises:
            UserError: the file is missing, is not JSON, or does not have the layout of this module's docstring
        """
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8-sig")))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"--lexicon {path}: {error}; expected JSON like "
                '{"facts": {"color": {"red": ["red", "crimson"]}}, "hidden_from_events": ["color"]}.'
            ) from None

    @classmethod
    def from_json(cls, content: Any) -> Lexicon:
        """A lexicon from parsed JSON.

        Raises:
            ValueError: the content does not have the layout of this module's docstring
        """
        if not isinstance(content, dict) or not isinstance(content.get("facts"), dict) or not content["facts"]:
            raise ValueError("the key `facts` is missing or empty")
        if unknown := sorted(set(content) - {"facts", "implied", "ignored", "hidden_from_events"}):
            raise ValueError(f"unknown keys: {', '.join(unknown)}")
        phrases: dict[tuple[str, ...], Fact] = {}
        for slot, values in content["facts"].items():
            for value, spelled in _filled(_mapping(values, f"facts.{slot}"), f"facts.{slot}").items():
                for phrase in _filled(_strings(spelled, f"facts.{slot}.{value}"), f"facts.{slot}.{value}"):
                    words = tuple(_WORD.findall(phrase.lower()))
                    if not words or phrases.get(words, (slot, value)) != (slot, value):
                        raise ValueError(f"{phrase!r} of facts.{slot}.{value} has no word, or already states {phrases.get(words)}")
                    phrases[words] = slot, value
        implied = {
            slot: {other: str(value) for other, value in _mapping(others, f"implied.{slot}").items()}
            for slot, others in _mapping(content.get("implied", {}), "implied").items()
        }
        hidden = frozenset(_strings(content.get("hidden_from_events", []), "hidden_from_events"))
        slots = set(content["facts"])
        if foreign := sorted((hidden | set(implied) | {s for others in implied.values() for s in others}) - slots):
            raise ValueError(f"slots without facts: {', '.join(foreign)}")
        ignored = []
        rules = content.get("ignored", [])
        if not isinstance(rules, list):
            raise ValueError(f"ignored is {type(rules).__name__}, expected a list")
        for rule in rules:
            if not isinstance(rule, dict) or set(rule) != {"phrase", "where"}:
                raise ValueError("each entry of `ignored` must have the keys phrase and where")
            try:
                ignored.append((re.compile(rule["phrase"], re.IGNORECASE), re.compile(rule["where"], re.IGNORECASE)))
            except (re.error, TypeError) as error:
                raise ValueError(f"ignored {rule}: {error}") from None
        return cls(phrases, implied, tuple(ignored), hidden)

    def fact_of(self, word: str) -> Fact | None:
        """The (slot, value) that one word states; None if it states no fact."""
        return self.phrases.get(tuple(_WORD.findall(word.lower())))

    def facts_in(self, text: str) -> dict[str, str]:
        """The facts that a text states, slot -> value; if a slot is stated twice, the first value counts."""
        for phrase, where in self.ignored:
            if where.search(text):
                text = phrase.sub(" ", text)
        words = _WORD.findall(text.lower())
        longest = max(map(len, self.phrases))
        stated: dict[str, str] = {}
        at = 0
        while at < len(words):
            lengths = range(min(longest, len(words) - at), 0, -1)
            length = next((n for n in lengths if tuple(words[at : at + n]) in self.phrases), None)
            if length is not None:
                slot, value = self.phrases[tuple(words[at : at + length])]
                stated.setdefault(slot, value)
            at += length or 1
        for slot, others in self.implied.items():
            if slot in stated:
                for other, value in others.items():
                    stated.setdefault(other, value)
        return stated

    def compare(self, draft: str, target: str) -> tuple[Verdict, str | None]:
        """Compare a draft word with the target's word.

        Returns:
            The verdict: "same" word, "synonym" (another word for the same fact), "other_fact" (another value of the same slot) or
            "other_word" (another slot, or a word that states no fact); and the slot of the target's word, if it states a fact.
        """
        draft_fact, target_fact = self.fact_of(draft), self.fact_of(target)
        slot = target_fact[0] if target_fact else None
        if draft == target:
            return "same", slot
        if draft_fact is None or target_fact is None or draft_fact[0] != target_fact[0]:
            return "other_word", slot
        return ("synonym" if draft_fact == target_fact else "other_fact"), slot


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {type(value).__name__}, expected an object")
    return value


def _filled(value: Filled, name: str) -> Filled:
    if not value:
        raise ValueError(f"{name} is empty")
    return value


def _strings(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{name}: expected a list of strings, got {str(value)[:60]}")
    return value
