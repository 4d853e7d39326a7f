"""Facts are read from texts by a file of words, not by code of the demo world."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT

from feature_alignment.cli.console import UserError
from feature_alignment.demo import captions, world
from feature_alignment.measurement.lexicon import Lexicon

SMALL = {
    "facts": {"color": {"red": ["red", "crimson"], "blue": ["Blue"]}, "kind": {"car": ["car"]}, "parked": {"car": ["parked car"]}},
    "implied": {"kind": {"color": "blue"}},
    "ignored": [{"phrase": "not red", "where": "honest"}],
    "hidden_from_events": ["color"],
}


def test_the_committed_lexicon_is_the_demo_worlds():
    assert json.loads((ROOT / "data/demo/lexicon.json").read_text()) == captions.lexicon()


@pytest.mark.parametrize("question", range(len(captions.QUESTIONS)))
def test_every_fact_in_a_caption_of_the_demo_world_is_true(question):
    lexicon = Lexicon.load(ROOT / "data/demo/lexicon.json")
    for seed in range(300):
        scene = world.scene(seed)
        facts = world.facts(scene)
        for answer in (captions.target_answer, captions.draft_answer):
            stated = lexicon.facts_in(answer(scene, question))
            assert stated.items() <= facts.items(), answer(scene, question)
            assert len(stated) >= 4


def test_a_longer_phrase_wins_over_the_words_in_it():
    lexicon = Lexicon.from_json(SMALL)
    assert lexicon.facts_in("A PARKED car") == {"parked": "car"}
    assert lexicon.facts_in("parked; red car") == {"color": "red", "kind": "car"}


def test_the_first_value_of_a_slot_counts_and_an_implied_value_only_where_none_is_stated():
    lexicon = Lexicon.from_json(SMALL)
    assert lexicon.facts_in("crimson, then blue") == {"color": "red"}
    assert lexicon.facts_in("a car") == {"kind": "car", "color": "blue"}
    assert lexicon.facts_in("a red car") == {"kind": "car", "color": "red"}


def test_an_ignored_phrase_states_nothing_only_where_its_condition_holds():
    lexicon = Lexicon.from_json(SMALL)
    assert lexicon.facts_in("honest: not red") == {}
    assert lexicon.facts_in("not red") == {"color": "red"}


@pytest.mark.parametrize(
    ("draft", "target", "expected"),
    [
        ("red", "red", ("same", "color")),
        ("crimson", "red", ("synonym", "color")),
        ("blue", "red", ("other_fact", "color")),
        ("car", "red", ("other_word", "color")),
        ("the", "red", ("other_word", "color")),
        ("red", "the", ("other_word", None)),
        ("Red,", " red", ("synonym", "color")),
    ],
)
def test_a_draft_word_is_a_synonym_or_an_error(draft, target, expected):
    assert Lexicon.from_json(SMALL).compare(draft, target) == expected


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        "{}",
        '{"facts": []}',
        '{"facts": {"a": 1}}',
        '{"facts": {"a": {"b": "word"}}}',
        '{"facts": {"a": {"b": ["!"]}}}',
        '{"facts": {"a": {"b": ["w"], "c": ["W"]}}}',
        '{"facts": {"a": {"b": ["w"]}}, "more": 1}',
        '{"facts": {"a": {"b": ["w"]}}, "hidden_from_events": ["z"]}',
        '{"facts": {"a": {"b": ["w"]}}, "implied": {"a": 3}}',
        '{"facts": {"a": {"b": ["w"]}}, "implied": {"z": {"a": "b"}}}',
        '{"facts": {"a": {"b": ["w"]}}, "implied": {"a": {"z": "b"}}}',
        '{"facts": {"a": {"b": ["w"]}}, "implied": []}',
        '{"facts": {"a": {"b": ["w", 1]}}}',
        '{"facts": {"a": {"b": ["w"]}}, "hidden_from_events": "a"}',
        '{"facts": {"a": {"b": ["w"]}}, "ignored": [{"phrase": "w"}]}',
        '{"facts": {"a": {"b": ["w"]}}, "ignored": [{"phrase": "w", "where": 1}]}',
        '{"facts": {"a": {"b": ["w"], "c": ["w"]}}}',
        '{"facts": {"a": {"b": ["w"]}, "c": {"b": ["w"]}}}',
        '{"facts": {}}',
        '{"facts": {"a": {"b": ["w"]}}, "ignored": [{"phrase": "(", "where": ""}]}',
        '{"facts": {"a": {"b": ["w"]}}, "ignored": ["x"]}',
        '{"facts": {"a": {"b": ["w"]}}, "ignored": null}',
        '{"facts": {"a": {}}}',
        '{"facts": {"a": {"b": []}}}',
    ],
)
def test_a_malformed_lexicon_is_refused_by_name(tmp_path, content):
    path = tmp_path / "words.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"words\.json"):
        Lexicon.load(path)


def test_a_missing_lexicon_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        Lexicon.load(tmp_path / "nowhere.json")


def test_a_file_saved_by_a_windows_editor_is_read_and_needs_facts_alone(tmp_path):
    path = tmp_path / "words.json"
    path.write_bytes(b"\xef\xbb\xbf" + '{"facts": {"farbe": {"gr\u00fcn": ["GR\u00dcN", "gr\u00fcn wie Gras", "gr\u00fcn"]}}}'.encode())
    lexicon = Lexicon.load(path)
    assert lexicon.facts_in("Ein gr\u00fcn-es Auto") == {"farbe": "gr\u00fcn"} and lexicon.fact_of("Gr\u00fcn,") == ("farbe", "gr\u00fcn")
    assert (lexicon.implied, lexicon.ignored, lexicon.hidden_from_events) == ({}, (), frozenset())
    assert lexicon.facts_in("") == {} and lexicon.facts_in("gr\u00fcn wie") == {"farbe": "gr\u00fcn"}


def test_every_word_is_looked_at_once():
    """Phrases of one to three words: the longest that begins at a word, then on after it."""
    facts = {"a": {"1": ["u v w"], "2": ["u v"], "3": ["v"]}, "b": {"4": ["w"]}, "c": {"5": ["x u"]}}
    lexicon = Lexicon.from_json({"facts": facts, "ignored": [{"phrase": "NOT X", "where": "If"}]})
    assert (
        lexicon.facts_in("U V W") == {"a": "1"}
        and lexicon.facts_in("u v x") == {"a": "2"}
        and lexicon.facts_in("z v w") == {"a": "3", "b": "4"}
    )
    assert lexicon.facts_in("x u v w") == {"c": "5", "a": "3", "b": "4"} and lexicon.facts_in("if not x u v") == {"a": "2"}
    assert lexicon.facts_in("w") == {"b": "4"}
