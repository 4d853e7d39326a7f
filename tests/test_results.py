"""Results survive JSON: every record equals what is read back from it, and result files of the project are read without loss."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from conftest import ROOT

from feature_alignment.benchmark import costs, profile, results, summary, sweep
from feature_alignment.benchmark.compare import read_benchmark
from feature_alignment.benchmark.results import BenchmarkReport, PlantedReport
from feature_alignment.cli.console import UserError
from feature_alignment.measurement import calibration, metrics, reports
from feature_alignment.measurement.records import OMIT_IF_NONE, Record, read_record
from feature_alignment.measurement.reports import AcceptanceReport, ComparisonReport
from feature_alignment.storage.files import write_hashed_json

MODULES = (metrics, calibration, reports, costs, results, profile, summary, sweep)
RECORDS = {c for m in MODULES for c in vars(m).values() if isinstance(c, type) and issubclass(c, Record) and c is not Record}
MEASURED_7B = ROOT / "data" / "results" / "h100_random_7b"


def random_value(kind: Any, rng: random.Random) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return random_value(rng.choice(args), rng)
    if isinstance(kind, type) and issubclass(kind, Record):
        return random_record(kind, rng)
    if origin is list:
        return [random_value(args[0], rng) for _ in range(rng.randrange(3))]
    if origin is tuple:
        return tuple(random_value(a, rng) for a in args)
    if origin is dict:
        return {str(k): random_value(args[1], rng) for k in range(rng.randrange(3))}
    simple = {
        int: rng.randrange(99),
        float: rng.random(),
        str: str(rng.random()),
        bool: rng.random() < 0.5,
        types.NoneType: None,
        Any: "any",
    }
    return simple[kind]


def random_record(cls: type[Record], rng: random.Random) -> Record:
    hints = get_type_hints(cls)
    values = {f.name: random_value(hints[f.name], rng) for f in dataclasses.fields(cls)}
    return cls(**values | ({"planted": True} if cls is PlantedReport else {}))


def through_json(record: Record) -> Record:
    return type(record).from_json(json.loads(json.dumps(record.to_json(), allow_nan=False)))


@pytest.mark.parametrize("cls", sorted(RECORDS, key=lambda c: c.__name__), ids=lambda c: c.__name__)
def test_a_record_equals_what_is_read_back_from_its_json(cls):
    assert len(RECORDS) > 30
    for seed in range(30):
        record = random_record(cls, random.Random(seed))
        assert through_json(record) == record


def test_keys_are_the_names_of_the_fields_in_their_order():
    rate = metrics.Rate(0.5, 1.0, 2.0, (0.25, 0.75))
    assert json.dumps(rate.to_json()) == '{"value": 0.5, "count": 1.0, "total": 2.0, "ci95": [0.25, 0.75]}'
    with pytest.raises(dataclasses.FrozenInstanceError):
        rate.value = 1.0


def test_a_number_that_is_not_finite_is_null_in_json_and_nan_again():
    rate = metrics.Rate(math.nan, 0.0, 0.0, (math.nan, math.inf))
    assert rate.to_json() == {"value": None, "count": 0.0, "total": 0.0, "ci95": [None, None]}
    again = through_json(rate)
    assert math.isnan(again.value) and all(map(math.isnan, again.ci95)) and again.text() == "-"


@dataclasses.dataclass(frozen=True)
class Omitting(Record):
    always: int | None
    sometimes: int | None = dataclasses.field(default=None, metadata=OMIT_IF_NONE)


def test_a_field_may_have_no_key_while_it_is_none():
    assert Omitting(None).to_json() == {"always": None} and Omitting(None, 3).to_json() == {"always": None, "sometimes": 3}
    assert Omitting.from_json({"always": None, "unknown": 1}) == Omitting(None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "Bandwidth is an object"),
        ({"step_bytes": 1, "share": 0.5}, "Bandwidth without step_gb_per_s, copy_gb_per_s"),
    ],
)
def test_another_layout_is_refused_by_name(content, message):
    with pytest.raises(ValueError, match=message):
        costs.Bandwidth.from_json(content)


def test_lists_and_objects_inside_a_record_are_checked():
    row = {"value": 1.0, "count": 1.0, "total": 1.0}
    with pytest.raises(ValueError, match="expected a list"):
        metrics.Rate.from_json(row | {"ci95": 3})
    with pytest.raises(ValueError, match="expected an object"):
        profile.ProfileCosts.from_json({"c": 1.0, "r": 1.0, "v": [1]})


def without_hashes(content: dict) -> dict:
    return {k: v for k, v in content.items() if k not in ("files", "content_hash")}


def unread(content: Any, again: Any, path: str = "") -> list[str]:
    """Paths of values in `content` that are missing or different in `again`."""
    if isinstance(content, dict) and isinstance(again, dict):
        return [p for k, v in content.items() for p in (unread(v, again[k], f"{path}/{k}") if k in again else [f"{path}/{k}"])]
    if isinstance(content, list) and isinstance(again, list) and len(content) == len(again):
        return [p for i, (a, b) in enumerate(zip(content, again, strict=True)) for p in unread(a, b, f"{path}[{i}]")]
    return [] if content == again else [path]


@pytest.mark.parametrize(
    ("kind", "name"), [(BenchmarkReport, "benchmark.json"), (PlantedReport, "planted.json"), (PlantedReport, "step/planted.json")]
)
def test_result_files_of_the_repository_are_read_without_loss(kind, name):
    content = without_hashes(json.loads((MEASURED_7B / name).read_text()))
    assert kind.from_json(content).to_json() == content


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (BenchmarkReport, "benchmark/benchmark.json"),
        (AcceptanceReport, "acceptance/acceptance.json"),
        (ComparisonReport, "token_baseline/comparison.json"),
    ],
)
def test_result_files_of_a_run_are_read_without_loss(finished, kind, name):
    content = without_hashes(json.loads((finished / "out" / name).read_text()))
    again = kind.from_json(content).to_json()
    assert json.dumps(again) == json.dumps(content), "keys, their order and their values"
    demo = ROOT / "outputs" / "demo" / name
    if demo.is_file():  # perhaps made by an earlier version: keys may have been added since
        content = without_hashes(json.loads(demo.read_text()))
        assert unread(content, kind.from_json(content).to_json()) == []


def test_a_file_of_another_kind_or_version_is_refused(tmp_path):
    path = tmp_path / "acceptance.json"
    write_hashed_json(path, {"meta": {}, "cosine": 0.5})
    with pytest.raises(UserError, match=r"(?s)AcceptanceReport without adapter, .*Make it again:\n  make it"):
        read_record(path, AcceptanceReport, "make it")
    with pytest.raises(UserError, match="is not a benchmark"):
        read_benchmark(path)
    with pytest.raises(UserError, match="holds planted acceptance"):
        read_benchmark(MEASURED_7B / "planted.json")
