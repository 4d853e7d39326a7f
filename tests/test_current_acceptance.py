"""Other scripts read acceptance.json only if it measured what they use: split, draft length, adapters, hidden states."""

from __future__ import annotations

import shutil

import pytest
from conftest import main_of

from feature_alignment.cli.console import UserError
from feature_alignment.measurement.current_acceptance import ADAPTERS, current_acceptance
from feature_alignment.storage.files import read_hashed_json, write_hashed_json

NAMES = tuple(ADAPTERS)


@pytest.fixture
def out(finished, tmp_path):
    shutil.copytree(finished / "out", tmp_path / "out")
    return tmp_path / "out"


def refusal(*given) -> str:
    with pytest.raises(UserError) as error:
        current_acceptance(*given)
    return str(error.value)


def test_a_measurement_of_what_is_there_is_read(out):
    assert current_acceptance(out, "test", NAMES, 5).num_draft_tokens == 5
    (out / "attending_adapter" / "adapter.pt").unlink()
    assert "attending" in current_acceptance(out, "test", NAMES, 5).chains


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_adapter_is_measured_again(out, name):
    path = out / ADAPTERS[name] / "adapter.pt"
    path.write_bytes(path.read_bytes() + b"\0")
    others = tuple(other for other in NAMES if other != name)
    assert current_acceptance(out, "test", others, 5)
    said = refusal(out, "test", NAMES, 5)
    assert f"measured another adapter than {path}. Measure again:\n  python feature_alignment/measure_feature_acceptance.py" in said


def test_an_adapter_that_was_trained_later_is_named(out):
    path = out / "acceptance" / "acceptance.json"
    content = read_hashed_json(path, "")
    del content["meta"]["made_from"]["attending"]
    write_hashed_json(path, content)
    assert f"measured no {out / 'attending_adapter' / 'adapter.pt'}" in refusal(out, "test", NAMES, 5)


def test_another_split_draft_length_or_extraction_is_named(out):
    said = refusal(out, "validation", NAMES, 8)
    assert "split 'test', wanted 'validation'; draft length 5, wanted 8" in said and "--split validation --num_draft_tokens 8" in said
    path = out / "hidden_states" / "test" / "meta.json"
    path.write_text(path.read_text() + " ")
    assert "other hidden states than those at" in refusal(out, "test", NAMES, 5)


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("compare_token_baseline", ["--num_draft_tokens", "8"], "draft length 5, wanted 8"),
        ("compare_token_baseline", ["--split", "validation"], "split 'test', wanted 'validation'"),
        ("benchmark_feature_sd", ["--split", "train"], "split 'test', wanted 'train'"),
        ("benchmark_feature_sd", ["--adapter_changed"], "another adapter than"),
    ],
)
def test_scripts_refuse_numbers_of_something_else(finished, out, script, words, message):
    if words == ["--adapter_changed"]:
        path, words = out / "chained_adapter" / "adapter.pt", []
        path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match=message):
        main_of(script)(["--config", str(finished / "tiny.yaml"), "--output_dir", str(out), *words])
