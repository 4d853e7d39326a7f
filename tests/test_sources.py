"""Drafters by name: what each is made of, which files it depends on, and what is refused before anything is decoded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import as_decoder, tiny_llama

from feature_alignment.adapters import tables
from feature_alignment.adapters.attending import AttendingAdapter
from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.cli.config import Common
from feature_alignment.cli.console import UserError
from feature_alignment.decoding.baseline_drafters import HybridProposer, Lookup, NGram, Previous, TableProposer, Template
from feature_alignment.decoding.best_table import BestTable
from feature_alignment.decoding.chained_proposer import ChainedProposer
from feature_alignment.decoding.proposers import ModelProposer
from feature_alignment.decoding.settings import DecodingConfig
from feature_alignment.decoding.sources import Sources, drafter_files
from feature_alignment.models import pair
from feature_alignment.models.pair import Pair
from feature_alignment.storage.files import save_pt, write_json


def opened(out: Path, taps=(3,), **more) -> Sources:
    target, draft = as_decoder(tiny_llama(0, layers=3)), as_decoder(tiny_llama(1, layers=3), taps)
    return Sources(Pair(target, draft), Common(output_dir=out), **more)


def with_texts(out: Path, tokens=(4, 5, 6), split: str = "train") -> None:
    rows = [{"sample_id": "a", "query": "q", "egpt_tokens": [7], "vl_tokens": list(tokens)}]
    write_json(out / "token_pairs" / f"{split}.json", {"results": rows})


def save_adapter(path: Path, adapter, layers, **meta) -> None:
    content = {"geometry": adapter.geometry, "draft_layers": list(layers), **meta}
    save_pt(path, {"meta": content, "state_dict": adapter.state_dict()})


def hidden(seed: int, d_draft: int = 32) -> HiddenAdapter:
    torch.manual_seed(seed)
    adapter = HiddenAdapter(d_draft, 32, 8)
    torch.nn.init.normal_(adapter.up.weight)
    return adapter


@pytest.mark.parametrize("chained", [False, True])
def test_each_drafter_names_the_files_it_depends_on(tmp_path, chained):
    texts, adapter = tmp_path / "token_pairs" / "other.json", tmp_path / "adapter" / "adapter.pt"
    chain = tmp_path / "chained_adapter" / "adapter.pt"
    if chained:
        save_adapter(chain, ChainedAdapter(32, 32, 1, 16), [3])
    model = {"chained_adapter": chain} if chained else {"adapter": adapter}
    wanted = {"own": {}, "aligned": {"adapter": adapter}, "chained": {"chained_adapter": chain}, "lookup": {}}
    wanted["attending"] = {"attending_adapter": tmp_path / "attending_adapter" / "adapter.pt"}
    wanted |= {name: {"texts": texts} for name in ("ngram", "template", "previous", "tables")} | {"hybrid": {**model, "texts": texts}}
    found = {name: drafter_files(DecodingConfig(output_dir=tmp_path, draft=name, train_split="other")) for name in wanted}
    assert found == wanted
    trimmed = drafter_files(DecodingConfig(output_dir=tmp_path, draft="chained", draft_vocabulary=3))
    assert trimmed == {"chained_adapter": chain, "texts": tmp_path / "token_pairs" / "train.json"}
    shared = drafter_files(DecodingConfig(output_dir=tmp_path, draft="attending", shared_adapter=tmp_path / "shared"))
    assert shared == {"attending_adapter": tmp_path / "shared" / "config.json"}
    assert opened(tmp_path).texts_path == tmp_path / "token_pairs" / "train.json"


def test_how_often_a_drafter_was_right_is_what_its_adapter_says(tmp_path):
    sources = opened(tmp_path)
    save_adapter(sources.adapter_path, hidden(0), [3], validation={"token_match": 0.25})
    assert sources.known_acceptance("aligned") == sources.known_acceptance("hybrid") == 0.25
    assert sources.known_acceptance("own") is sources.known_acceptance("ngram") is None
    save_adapter(sources.chained_path, ChainedAdapter(32, 32, 1, 16), [3], validation={"token_match": 0.75})
    assert sources.known_acceptance("chained") == sources.known_acceptance("hybrid") == 0.75
    save_adapter(sources.adapter_path, hidden(0), [3])
    assert sources.known_acceptance("aligned") is None


def test_an_adapter_that_is_given_must_fit_the_pair(tmp_path):
    """Its widths, the event tokens it reads, and every token id that it may draft or that its table holds."""
    sources = opened(tmp_path)
    with pytest.raises(UserError, match="the hidden adapter maps states of width 16 to 32"):
        sources.use_adapter(hidden(0, 16), {})
    for adapter, problem in ((ChainedAdapter(32, 16, 1, 16), "width 16 to 32"), (ChainedAdapter(32, 32, 2, 16), "reads 2 event tokens")):
        with pytest.raises(UserError, match=problem):
            sources.use_adapter(adapter, {})
    for drafted, in_table in ((64, 5), (5, 64), (63, 63)):
        adapter = AttendingAdapter(32, 32, 1, num_ids=2, num_entries=1, width=8)
        adapter.ids.copy_(torch.tensor([4, drafted]))
        adapter.table.copy_(
            torch.tensor([[1000] * (tables.CONTEXT + 1) + [in_table] + [1000] * (adapter.table.shape[1] - tables.CONTEXT - 2)])
        )
        if 64 in (drafted, in_table):
            with pytest.raises(UserError, match="token ids up to 64; this pair has ids below 64"):
                sources.use_adapter(adapter, {})
    sources.use_adapter(adapter, {"validation": {"token_match": 0.5}})
    assert sources.attending_adapter is adapter and sources.known_acceptance("attending") == 0.5
    sources.use_adapter(given := hidden(1), {})
    assert sources.adapter is given and sources.known_acceptance("aligned") is None


def test_drafters_are_made_of_what_their_names_say(tmp_path):
    sources = opened(tmp_path)
    target, draft = sources._pair.target, sources._pair.draft
    with_texts(tmp_path)
    target.tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens=True: [1] * add_special_tokens + [8, 9, 7])
    trained = hidden(3)
    save_adapter(sources.adapter_path, trained, [3])
    own, aligned = sources.open("own"), sources.open("aligned")
    assert type(own) is type(aligned) is ModelProposer and own._adapter is None and own._target_head is None
    assert aligned._adapter is sources.adapter and aligned._target_head == target.lm_head and own._draft is aligned._draft is draft
    assert torch.equal(sources.adapter.up.weight, trained.up.weight)
    compared = sources.open("own", predicts_states=True)
    assert compared._adapter is sources.adapter and compared._target_head is None
    hybrid = sources.open("hybrid")
    assert type(hybrid) is HybridProposer and hybrid._table is sources.ngram and hybrid._model._adapter is sources.adapter
    save_adapter(sources.chained_path, ChainedAdapter(32, 32, 1, 16), [3])
    assert type(sources.open("chained")) is type(sources.open("hybrid")._model) is ChainedProposer
    tables = {name: sources.open(name)._table for name in ("ngram", "lookup", "template", "previous", "tables")}
    kinds = {"ngram": NGram, "lookup": Lookup, "template": Template, "previous": Previous, "tables": BestTable}
    assert {name: type(t) for name, t in tables.items()} == kinds
    assert all(type(sources.open(name)) is TableProposer for name in tables) and tables["ngram"] is sources.ngram
    assert [tables[name].next_token("q", [4]) for name in tables] == [5, None, 5, 5, 5]
    assert (
        tables["lookup"].next_token("q", [8]) == 9 and tables["lookup"].next_token("q", [1]) is None
    )  # the question without a begin token


def test_a_rule_that_compares_states_is_refused_where_there_are_none(tmp_path):
    sources = opened(tmp_path)
    for name in ("ngram", "lookup", "template", "previous", "tables", "hybrid"):
        with pytest.raises(UserError, match=f"{name} drafts have none; pass --draft chained"):
            sources.open(name, predicts_states=True)
    with pytest.raises(UserError, match=r"own drafts have none before the drafter's last layer; pass --draft_layers 3"):
        opened(tmp_path, taps=(2,)).open("own", predicts_states=True)


def test_texts_of_another_vocabulary_are_refused(tmp_path):
    with_texts(tmp_path, [4, 63])
    assert opened(tmp_path).texts == [("q", [4, 63])]
    with_texts(tmp_path, [4, 64])
    with pytest.raises(UserError, match=r"holds token ids beyond the 64 of this pair"):
        opened(tmp_path).texts  # noqa: B018
    with_texts(tmp_path, [])
    assert opened(tmp_path).texts == [("q", [])]


@pytest.mark.parametrize(("size", "ids"), [(1, [2, 5]), (2, [2, 5]), (3, [2, 5, 9]), (4, [2, 5, 7, 9]), (63, [2, 4, 5, 7, 9])])
def test_a_draft_vocabulary_holds_the_most_frequent_ids_and_those_that_end_a_text(tmp_path, caplog, size, ids):
    with_texts(tmp_path, [5, 9, 5, 7, 9, 5, 4, 7])
    caplog.set_level("INFO")
    sources = opened(tmp_path, draft_vocabulary=size)
    assert sources._pair.target.eos_ids == {2} and sources.draft_ids.tolist() == ids
    covered = {2: 37.5, 3: 62.5, 4: 87.5, 5: 100}[len(ids)]
    assert f"{len(ids)} of 64 ids, which are {covered:.2f} % of the training answers" in caplog.text
    save_adapter(sources.chained_path, ChainedAdapter(32, 32, 1, 16), [3])
    chained = sources.open("chained")
    assert chained._chain.head.shape == (len(ids), 16)
    assert opened(tmp_path, draft_vocabulary=64).draft_ids is opened(tmp_path).draft_ids is None


def test_a_drafter_cut_off_early_drafts_its_own_words_at_full_depth(tmp_path, monkeypatch):
    """With the pair's vocabulary and steps; one that has its head is not loaded twice."""
    asked = []

    def load(cfg):
        asked.append(cfg.draft_layers)
        return as_decoder(tiny_llama(1, layers=3), cfg.draft_layers)

    monkeypatch.setattr(pair, "load_draft", load)
    sources = opened(tmp_path, taps=(2,))
    both = sources._pair
    both.target.restrict_vocabulary(40)
    both.use_steps("graphs")
    for layers, draft_of in ((None, lambda: sources.open("own")._draft), ([1], lambda: both.draft_with([1], Common()))):
        draft = draft_of()
        assert asked.pop() == layers and draft.vocab_size == 40 and draft.steps == "graphs" and draft.taps == tuple(layers or (3,))
    assert sources.full_draft is sources.full_draft and not asked
    whole = opened(tmp_path)
    assert whole.full_draft is whole._pair.draft and not asked


def test_an_exit_reads_one_layer_by_an_adapter_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(pair, "load_draft", lambda cfg: as_decoder(tiny_llama(1, layers=3), cfg.draft_layers))
    sources, trained = opened(tmp_path), hidden(5)
    save_adapter(tmp_path / "exit.pt", trained, [2])
    layer, proposer = sources.load_exit_drafter(tmp_path / "exit.pt")
    assert layer == 2 and proposer._draft.taps == (2,) and proposer._target_head == sources._pair.target.lm_head
    assert torch.equal(proposer._adapter.up.weight, trained.up.weight)
    save_adapter(tmp_path / "exit.pt", hidden(5, 64), [1, 2])
    with pytest.raises(UserError, match=r"layers \[1, 2\]; --exit_adapters expects adapters of a single layer"):
        sources.load_exit_drafter(tmp_path / "exit.pt")


@pytest.mark.parametrize("untrained", [False, True])
def test_a_trained_adapter_is_used_wherever_there_is_one(tmp_path, untrained):
    sources, trained, chained = opened(tmp_path, untrained=untrained), hidden(7).double(), ChainedAdapter(32, 32, 1, 16).double()
    save_adapter(sources.adapter_path, trained, [3])
    save_adapter(sources.chained_path, chained, [3])
    assert torch.equal(sources.adapter.up.weight, trained.up.weight.float()) and sources.adapter.geometry == trained.geometry
    assert sources.chained_adapter.geometry == chained.geometry
    assert {p.dtype for m in (sources.adapter, sources.chained_adapter) for p in m.parameters()} == {torch.float32}
    other = opened(tmp_path, taps=(1, 3))
    for name in ("adapter", "chained_adapter"):
        if name == "adapter":
            with pytest.raises(UserError, match="reads states of width 32, these have width 64"):
                getattr(other, name)
        else:
            assert getattr(other, name).geometry == chained.geometry  # only the last layer's states are read
