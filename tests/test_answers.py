"""Answers that are read instead of generated: which of a file's rows fit, and what is refused."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from feature_alignment.cli.console import UserError
from feature_alignment.storage.answers import (
    SETTINGS_WITHOUT_EFFECT_ON_TEXTS,
    earlier_answers,
    eos_ids,
    known_answers,
    load_answers,
    read_token_pairs,
    refuse_foreign_ids,
    write_token_pairs,
)
from feature_alignment.storage.files import content_hash, read_hashed_json, write_json
from feature_alignment.storage.identity import RunIdentity

IDENTITY = RunIdentity({"max_new_tokens": 3, "dtype": "float32", "split": "a"}, {"target": "t", "manifest": "m"}, {"models.pair": "c"})


def rows(number: int = 3, batch: str = "b"):
    return [{"id": f"s{i}", "question": f"q{i}", "identity": {"row": f"r{i}", "batch": f"{batch}{i}"}} for i in range(number)]


def result(i: int, vl=(4, 5), egpt=(6,), **more):
    return {
        "sample_id": f"s{i}",
        "query": f"q{i}",
        "vl_tokens": list(vl),
        "egpt_tokens": list(egpt),
        "identity": rows(i + 1)[i]["identity"],
    } | more


def pairs(path, results, meta=None):
    write_json(path, {"results": results} | ({} if meta is None else {"meta": meta}))
    return path


def as_lists(answers):
    return {name: [list(text) for text in texts] for name, texts in answers.items()}


@pytest.mark.parametrize("token", [-1, 2**31, True, 1.0, "1", None])
def test_a_token_id_is_a_whole_number_of_31_bits(tmp_path, token):
    path = pairs(tmp_path / "a.json", [result(0, vl=[0, 2**31 - 1])])
    assert read_token_pairs(path)[0]["vl_tokens"] == [0, 2**31 - 1]
    for key in ("vl_tokens", "egpt_tokens"):
        with pytest.raises(UserError, match=f"row 1: {key} must be a list of token ids"):
            read_token_pairs(pairs(path, [result(0), result(1) | {key: [3, token]}]))
    for nothing in ({}, {"results": []}, {"results": {}}, []):
        write_json(path, nothing)
        with pytest.raises(UserError, match="holds no rows"):
            read_token_pairs(path)


def test_files_of_our_own_name_sample_and_question(tmp_path):
    full = {
        "id": "s0",
        "sequence": "c",
        "question": "q0",
        "egpt_tokens": [6],
        "egpt_text": "e",
        "vl_tokens": [4, 2],
        "vl_text": "v",
        "more": 1,
    }
    write_token_pairs(
        tmp_path / "a.json", {"eos_token_ids": [2, 9], "bad": float("nan")}, [full, full | {"id": "s1", "identity": {"row": "r"}}]
    )
    content = read_hashed_json(tmp_path / "a.json", "make it")  # its hash is the whole's, though it was taken piece by piece
    wanted = {"sample_id": "s0", "sequence": "c", "query": "q0"} | {
        k: full[k] for k in ("egpt_tokens", "egpt_text", "vl_tokens", "vl_text")
    }
    assert content["results"] == [wanted, wanted | {"sample_id": "s1", "identity": {"row": "r"}}] and content["meta"]["bad"] is None
    assert eos_ids(tmp_path / "a.json") == [2, 9] and eos_ids(pairs(tmp_path / "b.json", [result(0)])) == [2]
    for missing in ("sample_id", "query"):
        broken = {"results": [result(0), {k: v for k, v in result(1).items() if k != missing}]}
        write_json(tmp_path / "c.json", broken)
        assert len(read_token_pairs(tmp_path / "c.json")) == 2  # of somebody else
        write_json(tmp_path / "c.json", broken | {"content_hash": content_hash(broken)})
        with pytest.raises(UserError, match="row 1: wanted sample_id and query"):
            read_token_pairs(tmp_path / "c.json")
    with pytest.raises(UserError, match=r"(?s)does not exist.*--split gone"):
        read_token_pairs(tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"vl_tokens": []}, "empty"),
        ({"egpt_tokens": []}, "empty"),
        ({"egpt_tokens": [4] * 4}, "too long"),
        ({"query": "another"}, "question"),
        ({"sample_id": "x"}, "id"),
    ],
)
def test_answers_of_somebody_else_are_taken_at_their_word_except_for_ids_questions_and_lengths(tmp_path, bad, why):
    path = tmp_path / "a.json"
    good = [result(0), result(1, vl=(4, 5, 6), egpt=(7, 8, 9)), result(2) | {"query": None}]
    found = load_answers(pairs(path, [result(9), *good]), IDENTITY, rows())
    assert as_lists(found) == {"s0": [[4, 5], [6]], "s1": [[4, 5, 6], [7, 8, 9]], "s2": [[4, 5], [6]]}
    with pytest.raises(UserError, match=r"answers of 1 to 3 tokens .* for 2 of 3 samples, none for 's1'"):
        load_answers(pairs(path, [good[0], good[1] | bad, good[2]]), IDENTITY, rows())


def test_answers_of_the_drafter_may_be_missing_where_they_are_not_asked_for(tmp_path):
    path = pairs(tmp_path / "a.json", [result(0, egpt=()), result(1)])
    without = dataclasses.replace(IDENTITY, settings=IDENTITY.settings | {"draft_answers": False})
    assert as_lists(load_answers(path, without, rows(2))) == {"s0": [[4, 5], []], "s1": [[4, 5], [6]]}
    with pytest.raises(UserError, match="for 1 of 2 samples, none for 's0'"):
        load_answers(path, dataclasses.replace(IDENTITY, settings=IDENTITY.settings | {"draft_answers": True}), rows(2))


def test_a_row_of_our_own_without_its_identity_is_not_read(tmp_path):
    for identity in (None, [], {}, "row"):
        results = [result(0), result(1) | {"identity": identity}]
        with pytest.raises(UserError, match="none for 's1'"):
            load_answers(pairs(tmp_path / "a.json", results, IDENTITY.as_dict()), IDENTITY, rows(2))
        assert len(load_answers(pairs(tmp_path / "a.json", results), IDENTITY, rows(2))) == 2


def test_answers_of_another_run_are_refused_by_name(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path, meta = tmp_path / "a.json", IDENTITY.as_dict()
    results = [result(i) for i in range(3)]
    changed_nothing = dataclasses.replace(
        IDENTITY,
        settings=IDENTITY.settings | dict.fromkeys(SETTINGS_WITHOUT_EFFECT_ON_TEXTS, "other"),
        made_from={"target": "t", "manifest": "n"},
    )
    for identity in (IDENTITY, changed_nothing):
        assert len(load_answers(pairs(path, results, meta), identity, rows())) == 3
        assert "the contents of target, the code of 1 modules, and every sample's question, clip and start" in caplog.text
        caplog.clear()
    other = dataclasses.replace(IDENTITY, settings=IDENTITY.settings | {"dtype": "bfloat16"})
    with pytest.raises(
        UserError, match=r"(?s)of another run:\n  dtype: float32 recorded, bfloat16 now\nLeave --answers out to generate them\.$"
    ):
        load_answers(path, other, rows())
    code = dataclasses.replace(IDENTITY, code={"models.pair": "d"})
    with pytest.raises(UserError, match=r"(?s)code: models.pair changed.*With --ignore_code they are read"):
        load_answers(path, code, rows())
    both = dataclasses.replace(other, code=code.code)
    with pytest.raises(UserError, match=r"(?s)dtype: .*code: models.pair changed\nLeave --answers out to generate them\.$"):
        load_answers(path, both, rows())
    assert len(load_answers(path, code, rows(), ignore_code=True)) == 3
    with pytest.raises(UserError, match="none for 's1'"):  # the row's own hash is what counts, whatever its batch
        load_answers(pairs(path, [results[0], results[1] | {"identity": {"row": "x", "batch": "b1"}}, results[2]], meta), IDENTITY, rows())
    assert len(load_answers(pairs(path, results, meta), IDENTITY, rows(batch="other"))) == 3
    assert load_answers(pairs(path, results[:1]), IDENTITY, rows(1)) and "a file without meta, and every sample's question" in caplog.text


def test_answers_of_an_earlier_run_are_kept_batch_by_batch(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path, meta = tmp_path / "a.json", IDENTITY.as_dict()
    results = [result(0), result(1) | {"identity": {"row": "r1", "batch": "x"}}, result(2)]
    assert set(earlier_answers(pairs(path, results, meta), IDENTITY, rows())) == {"s0", "s2"} and "2 of 3 answers" in caplog.text
    assert set(known_answers(None, path, IDENTITY, rows())) == {"s0", "s2"}
    assert known_answers(None, None, IDENTITY, rows()) == known_answers(None, tmp_path / "gone.json", IDENTITY, rows()) == {}
    with pytest.raises(UserError, match="none for 's1'"):
        known_answers(pairs(tmp_path / "b.json", results[:1]), path, IDENTITY, rows())
    for other in (meta | {"settings": {}}, {}, None):
        caplog.clear()
        assert earlier_answers(pairs(path, results, other), IDENTITY, rows()) == {} and "generated again" in caplog.text
    path.write_text("{")
    assert earlier_answers(path, IDENTITY, rows()) == {} and "All answers are generated." in caplog.text


def test_ids_outside_the_shared_vocabulary_are_refused():
    refuse_foreign_ids({"a": ([3, 9], [8]), "b": ([3], [])}, 10)
    for texts in (([3, 10], [8]), ([3], [10])):
        with pytest.raises(UserError, match="sample b hold ids beyond the 10"):
            refuse_foreign_ids({"a": ([3], [4]), "b": texts}, 10)
