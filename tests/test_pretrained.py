"""Adapters as directories that can be shared."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from feature_alignment.adapters.attending import AttendingAdapter
from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.cli.console import UserError
from feature_alignment.storage.files import write_hashed_json

META = {"draft_layers": [1, 2], "parameters": 1}


def hidden() -> HiddenAdapter:
    torch.manual_seed(0)
    adapter = HiddenAdapter(24, 12, 8)
    torch.nn.init.normal_(adapter.up.weight)
    return adapter.eval()


def chained() -> ChainedAdapter:
    torch.manual_seed(0)
    return ChainedAdapter(d_target=12, d_event=10, num_events=5, width=8).eval()


def attending(**more) -> AttendingAdapter:
    torch.manual_seed(0)
    adapter = AttendingAdapter(12, 10, num_events=5, num_ids=4, num_entries=3, num_prompt=6, width=16, **more)
    adapter.ids.copy_(torch.tensor([2, 5, 7, 11]))
    adapter.table.copy_(torch.arange(adapter.table.numel()).view_as(adapter.table))
    return adapter.eval()


@pytest.mark.parametrize("make", [hidden, chained, attending, lambda: attending(without=["prompt", "events"])])
def test_a_saved_adapter_loads_with_the_same_weights_and_geometry(make, tmp_path):
    adapter = make()
    adapter.save_pretrained(tmp_path / "a", META)
    loaded = type(adapter).from_pretrained(tmp_path / "a")
    assert loaded.geometry == adapter.geometry and not loaded.training
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert json.loads((tmp_path / "a" / "config.json").read_text())["meta"] == META
    adapter.save_pretrained(tmp_path / "b")
    assert type(adapter).from_pretrained(tmp_path / "b").geometry == adapter.geometry


def test_an_adapter_in_training_is_not_saved_without_its_scales(tmp_path):
    adapter = chained()
    adapter.standardize(torch.randn(9, 12), torch.randn(9, 12), torch.randn(3, 5, 10))
    with pytest.raises(ValueError, match=r"adapter\.folded"):
        adapter.save_pretrained(tmp_path / "a", META)
    adapter.folded().save_pretrained(tmp_path / "a", META)


def test_saving_again_replaces_the_directory_and_keeps_foreign_files_safe(tmp_path):
    hidden().save_pretrained(tmp_path / "a", META)
    hidden().save_pretrained(tmp_path / "a", {**META, "parameters": 2})
    assert json.loads((tmp_path / "a" / "config.json").read_text())["meta"]["parameters"] == 2
    (tmp_path / "a" / "thesis.tex").write_text("dear")
    before = (tmp_path / "a" / "config.json").read_bytes()
    with pytest.raises(UserError, match=re.escape("thesis.tex")):
        hidden().save_pretrained(tmp_path / "a", META)
    assert (tmp_path / "a" / "config.json").read_bytes() == before


def flip_weights(folder):
    data = bytearray((folder / "adapter.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "adapter.safetensors").write_bytes(data)


def other_geometry(folder):
    config = json.loads((folder / "config.json").read_text())
    config["geometry"]["width"] = 16
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_weights, "is not the file that config.json describes"),
        (other_geometry, "was altered after it was written"),
        (lambda folder: (folder / "adapter.safetensors").unlink(), "is not the file that config.json describes"),
        (lambda folder: (folder / "config.json").unlink(), "no adapter at"),
        (lambda folder: (folder / "config.json").write_text("{}"), "records no hash of itself|record"),
        (lambda folder: shutil.rmtree(folder), "no adapter at"),
    ],
)
def test_an_altered_directory_is_refused_in_one_message(tmp_path, damage, said):
    folder = tmp_path / "a"
    chained().save_pretrained(folder, META)
    damage(folder)
    with pytest.raises(UserError, match=said):
        ChainedAdapter.from_pretrained(folder)


def test_another_kind_of_adapter_is_refused_by_name(tmp_path):
    hidden().save_pretrained(tmp_path / "a", META)
    with pytest.raises(UserError, match="type 'hidden', expected 'chained'"):
        ChainedAdapter.from_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match="type 'hidden', expected 'attending'"):
        AttendingAdapter.from_pretrained(tmp_path / "a")


def test_a_file_instead_of_a_directory_and_weights_that_are_not_finite_are_refused(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(UserError, match="is a file"):
        hidden().save_pretrained(tmp_path / "a", META)
    adapter = hidden()
    adapter.up.weight.data[0, 0] = torch.nan
    adapter.save_pretrained(tmp_path / "b", META)
    with pytest.raises(UserError, match="not finite"):
        HiddenAdapter.from_pretrained(tmp_path / "b")


def test_a_directory_whose_weights_could_not_be_written_holds_no_adapter(tmp_path, monkeypatch):
    """The old config.json does not describe new weights: it is removed first, and written last."""
    hidden().save_pretrained(tmp_path / "a", META)

    def full(*_, **__):
        raise OSError(28, "no space")

    monkeypatch.setattr("feature_alignment.storage.pretrained.save", full)
    with pytest.raises(OSError, match="no space"):
        hidden().save_pretrained(tmp_path / "a", META)
    with pytest.raises(UserError, match="no adapter at"):
        HiddenAdapter.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"geometry": [4, 4, 2]}, "describes an adapter of type 'hidden', expected 'hidden'"),
        ({"meta": None}, "describes an adapter of type 'hidden', expected 'hidden'"),
        ({"adapter_type": None}, "describes an adapter of type None, expected 'hidden'"),
        ({"geometry": {"width": 3}}, "is damaged"),
    ],
)
def test_a_config_that_describes_no_adapter_is_refused(tmp_path, change, said):
    hidden().save_pretrained(tmp_path / "a", META)
    path = tmp_path / "a" / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("files", "content_hash")}
    write_hashed_json(path, config | change, ["adapter.safetensors"])
    with pytest.raises(UserError, match=said):
        HiddenAdapter.from_pretrained(tmp_path / "a")


def test_weights_of_another_shape_or_name_are_refused(tmp_path):
    hidden().save_pretrained(tmp_path / "a", META)
    path, config = tmp_path / "a" / "adapter.safetensors", json.loads((tmp_path / "a" / "config.json").read_text())
    whole = load_file(path)
    name = next(iter(whole))
    for state in (whole | {name: whole[name][:1]}, whole | {"more": torch.ones(2)}, {k: v for k, v in whole.items() if k != name}):
        save_file(state, path)
        write_hashed_json(tmp_path / "a" / "config.json", {k: config[k] for k in ("adapter_type", "geometry", "meta")}, [path.name])
        with pytest.raises(UserError, match="is damaged: its weights do not fit its geometry"):
            HiddenAdapter.from_pretrained(tmp_path / "a")
