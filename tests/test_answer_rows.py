"""The answers file of a data set as plain data: which rows are kept, what is refused, what a merge needs."""

from __future__ import annotations

import json
import re

import pytest

from feature_alignment.cli.console import UserError
from feature_alignment.storage.answer_rows import AnswersFile, Asked, merge_answers, meta_path_of, read_rows, refuse_other_runs
from feature_alignment.storage.files import read_json
from feature_alignment.storage.identity import RunIdentity

IDENTITY = RunIdentity({"a": 1}, {"target": "t"}, {"m": "c"})


def asked(number, **changed):
    """Samples s0, s1, …; `changed` gives some another hash of their question and clip."""
    return [Asked(f"s{i}", f"q{i}", changed.get(f"s{i}", f"h{i}")) for i in range(number)]


def row(i, **more):
    return {"id": f"s{i}", "question": f"q{i}", "input_hash": f"h{i}", "text": f"answer {i}"} | more


def groups(number, size=1, **changed):
    samples = asked(number, **changed)
    return [samples[i : i + size] for i in range(0, number, size)]


def answered(path, rows, number=None, identity=IDENTITY, is_complete=True, **options):
    file = AnswersFile(path, identity, groups(number or len(rows)), **options)
    file.begin(identity.as_dict())
    for one in rows:
        file.append([one])
    if is_complete:
        file.finish(tokens=7)
    return file


def test_a_complete_file_has_its_rows_in_order_and_its_facts(tmp_path):
    path = tmp_path / "test.jsonl"
    answered(path, [row(2), row(0), row(1, error="broken")], number=3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [row(0), row(1, error="broken"), row(2)]
    meta = read_json(meta_path_of(path), "")
    assert meta_path_of(path).name == "test.meta.json"
    assert (meta["rows"], meta["failed"], meta["tokens"], list(meta["files"])) == (3, 1, 7, ["test.jsonl"])
    again = AnswersFile(path, IDENTITY, groups(3))
    assert again.todo == [False, True, False] and not again.is_complete  # a sample that failed is answered again
    answered(path, [row(1)], number=3)
    again = AnswersFile(path, IDENTITY, groups(3))
    assert again.is_complete and again.ordered_rows == [row(0), row(1), row(2)]
    assert not AnswersFile(path, IDENTITY, groups(4)).is_complete
    assert AnswersFile(path, IDENTITY, groups(3), resume=False).todo == [True] * 3


def test_an_unfinished_file_is_recorded_as_such_and_goes_on(tmp_path):
    path = tmp_path / "test.jsonl"
    first = answered(path, [row(1)], number=3, is_complete=False)
    meta = read_json(meta_path_of(path), "")
    assert meta["rows"] == 3 and not meta["files"] and first.todo == [True, False, True]
    again = AnswersFile(path, IDENTITY, groups(3))
    assert again.todo == [True, False, True] and not again.is_complete and again.meta["settings"] == {"a": 1}
    again.append([row(2), row(0, error="broken")])
    last = AnswersFile(path, IDENTITY, groups(3))
    last.begin(last.meta)
    assert read_rows(path) == last.ordered_rows == [row(1), row(2)]  # a sample that failed is forgotten
    last.append([row(0)])
    assert not AnswersFile(path, IDENTITY, groups(3)).is_complete  # it was killed before it could say so
    whole = AnswersFile(path, IDENTITY, groups(4, 2), resume=False)
    whole.append([row(1), row(2), row(3)])
    assert whole.todo == [True, False]  # of the first group, a row is missing


def test_lines_that_are_no_rows_are_named_and_left_out(tmp_path, caplog):
    path = tmp_path / "test.jsonl"
    bad = ["[1]", '{"id": 1, "input_hash": "h"}', '{"id": "s5"}', '{"id": "s6", "input_hash": 3}', '{"id": "s7", "inp']
    path.write_text("\n".join([json.dumps(row(0)), "", *bad, json.dumps(row(1))]))
    assert read_rows(path) == [row(0), row(1)]
    assert [int(n) for n in re.findall(r"line (\d+): incomplete", caplog.text)] == [3, 4, 5, 6, 7]
    assert read_rows(tmp_path / "absent.jsonl") == []


def test_a_group_is_kept_whole_or_not_at_all(tmp_path):
    path = tmp_path / "test.jsonl"
    answered(path, [row(i) for i in range(6)])
    kept = lambda **changed: list(AnswersFile(path, IDENTITY, groups(6, 2, **changed)).rows)  # noqa: E731
    assert kept() == [f"s{i}" for i in range(6)]
    assert kept(s1="other") == ["s2", "s3", "s4", "s5"] and kept(s4="other") == ["s0", "s1", "s2", "s3"]
    assert kept(s0="other", s2="other", s4="other") == []  # half of the answers may be lost
    with pytest.raises(UserError, match=r"has 6 answers, and this run would drop 4 of them, e\.g\. s0"):
        kept(s0="other", s2="other", s3="other", s4="other")
    with pytest.raises(UserError, match=r"would drop 1 of them, e\.g\. s5"):
        AnswersFile(path, IDENTITY, groups(5), limited=True)
    assert len(AnswersFile(path, IDENTITY, groups(5)).rows) == 5
    assert len(AnswersFile(path, IDENTITY, groups(6), limited=True).rows) == 6


def test_answers_of_other_code_are_kept_under_the_code_that_made_them(tmp_path):
    path = tmp_path / "test.jsonl"
    assert AnswersFile(path, IDENTITY, groups(1), ignore_code=True).identity == IDENTITY  # there is no file yet
    answered(path, [row(0)])
    code, both = RunIdentity({"a": 1}, {"target": "t"}, {"m": "d"}), RunIdentity({"a": 2}, {"target": "t"}, {"m": "d"})
    with pytest.raises(UserError, match=r"(?s)code: m changed.*keep its rows with --ignore_code.*--no_resume"):
        AnswersFile(path, code, groups(1))
    for identity in (both, RunIdentity({"a": 2}, {"target": "t"}, {"m": "c"})):
        with pytest.raises(UserError, match=r"(?s)a: 1 → 2.*give the old values"):
            AnswersFile(path, identity, groups(1))
    assert AnswersFile(path, code, groups(1), ignore_code=True).identity.code == {"m": "c"}
    assert AnswersFile(path, code, groups(1), resume=False).identity == code
    refuse_other_runs(path, {}, code)
    with pytest.raises(UserError, match="a: 1 → 2"):
        refuse_other_runs(path, IDENTITY.as_dict(), both, ignore_code=True)


def shards(tmp_path, parts, identity=IDENTITY):
    for i, rows in enumerate(parts, 1):
        of_shard = RunIdentity({**identity.settings, "shard": f"{i}/{len(parts)}"}, identity.made_from, identity.code)
        file = AnswersFile(
            tmp_path / f"test.shard-{i}-of-{len(parts)}.jsonl",
            of_shard,
            [[Asked(r["id"], r["question"], r["input_hash"])] for r in rows],
            resume=False,
        )
        file.begin(of_shard.as_dict())
        file.append(rows)
        file.finish()


def merge(tmp_path, number=3, identity=IDENTITY, **options):
    samples = [Asked(f"s{i}", f"q{i}") for i in range(number)]  # a merge does not read the clips
    return merge_answers(tmp_path / "test.jsonl", identity, samples, identity.as_dict(), **options)


@pytest.mark.parametrize("parts", [[[2, 0, 1]], [[2], [0, 1]], [[1], [2], [0]]])
def test_a_merge_writes_the_file_of_one_run(tmp_path, parts):
    shards(tmp_path, [[row(i) for i in part] for part in parts])
    merged = merge(tmp_path)
    answered(tmp_path / "whole.jsonl", [row(i) for i in range(3)])
    assert (tmp_path / "test.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert merged.meta["merged_shards"] == len(parts) and merged.meta["failed"] == 0
    assert AnswersFile(tmp_path / "test.jsonl", IDENTITY, groups(3)).is_complete


def test_a_merge_refuses_what_is_not_one_complete_set_of_shards_of_this_run(tmp_path):
    with pytest.raises(UserError, match="lacks every shard"):
        merge(tmp_path)
    shards(tmp_path, [[row(0)], [row(1)], [row(2)]])
    (tmp_path / "test.shard-x-of-y.jsonl").write_text("of nobody")
    with pytest.raises(UserError, match=r"hold 3 samples, the data set 2; 0 of these differ\. Run"):
        merge(tmp_path, 2)
    with pytest.raises(UserError, match=r"hold 3 samples, the data set 4; 1 of these differ, e\.g\. s3\. Run"):
        merge(tmp_path, 4)
    third = tmp_path / "test.shard-3-of-3.jsonl"
    third.rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"lacks test\.shard-3-of-3\.jsonl\. Run"):
        merge(tmp_path)
    (tmp_path / "away").rename(third)
    other = RunIdentity({"a": 2}, {"target": "t"}, {"m": "d"})
    with pytest.raises(UserError, match=r"(?s)shard-1-of-3\.jsonl cannot be merged:\n  a: 1 recorded, 2 now\n  code: m changed"):
        merge(tmp_path, identity=other)
    assert len(merge(tmp_path, identity=RunIdentity({"a": 1}, {"target": "t"}, {"m": "d"}), ignore_code=True).rows) == 3
    with pytest.raises(UserError, match="made with other settings"):
        merge(tmp_path, identity=other)  # the merged file is of another run


def test_a_merge_refuses_as_many_rows_of_other_samples(tmp_path):
    for other in (row(5), row(2, question="another")):
        shards(tmp_path, [[row(0), row(1)], [other]])
        with pytest.raises(UserError, match=r"hold 3 samples, the data set 3; 1 of these differ, e\.g\. s2\. Run"):
            merge(tmp_path)


def test_a_merge_replaces_an_altered_file_only_if_asked(tmp_path):
    shards(tmp_path, [[row(0), row(1)], [row(2)]])
    merge(tmp_path)
    merge(tmp_path)
    whole = (tmp_path / "test.jsonl").read_bytes()
    (tmp_path / "test.jsonl").write_bytes(whole[:-9])
    with pytest.raises(UserError, match="was altered after it was written"):
        merge(tmp_path)
    merge(tmp_path, resume=False)
    assert (tmp_path / "test.jsonl").read_bytes() == whole
    meta_path_of(tmp_path / "test.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no test\.meta\.json"):
        merge(tmp_path)
    (tmp_path / "test.jsonl").write_bytes(b"")  # of a run that was killed before it recorded anything
    merge(tmp_path)


def test_a_merge_refuses_sets_of_several_runs_and_shards_that_are_altered_or_unfinished(tmp_path):
    shards(tmp_path, [[row(0)], [row(1)], [row(2)]])
    shards(tmp_path, [[row(0)], [row(1), row(2)]])
    with pytest.raises(UserError, match="the shards of several runs, 2 and 3 parts"):
        merge(tmp_path)
    (tmp_path / "test.shard-3-of-3.jsonl").unlink()
    (tmp_path / "test.shard-2-of-2.jsonl").write_text("")
    with pytest.raises(UserError, match=r"shard-2-of-2\.jsonl was altered"):
        merge(tmp_path)
    of_shard = RunIdentity({"a": 1, "shard": "2/2"}, {"target": "t"}, {"m": "c"})
    answered(tmp_path / "test.shard-2-of-2.jsonl", [row(0)], identity=of_shard, is_complete=False, resume=False)
    with pytest.raises(UserError, match=r"shard-2-of-2\.jsonl is unfinished"):
        merge(tmp_path)
