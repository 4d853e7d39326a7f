"""The Python interface: answer, stream, adapters by directory."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import as_decoder, main_of, prompt_of, tiny_llama

from feature_alignment import SpeculativePair
from feature_alignment.adapters import share
from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.cli.console import UserError
from feature_alignment.decoding import speculative_pair
from feature_alignment.decoding.generation import Generation, Round
from feature_alignment.decoding.settings import DecodingConfig
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.pair import Pair


@pytest.fixture(scope="module")
def clip(finished):
    row = json.loads((finished / "scenes" / "test.jsonl").read_text().splitlines()[0])
    folder = finished / "scenes"
    return {"events": folder / row["events"], "video": str(folder / row["video"]), "question": row["question"]}


@pytest.fixture(scope="module")
def pair(finished):
    return SpeculativePair.from_config(finished / "tiny.yaml", draft="chained", num_draft_tokens=3)


def test_an_answer_is_that_of_the_script_and_of_plain_decoding(pair, clip, finished):
    answer, plain = pair.answer(**clip), pair.answer_plain(**clip)
    script = main_of("feature_sd_inference")(["--config", str(finished / "tiny.yaml"), "--draft", "chained", "--num_draft_tokens", "3"])
    assert answer.token_ids == plain.token_ids == script["token_ids"] and answer.text == plain.text == script["text"]
    assert [r.to_json()["proposed"] for r in answer.rounds] == [r["proposed"] for r in script["rounds"]] and plain.rounds == []
    assert answer.stats["passes"] == script["passes"] and answer.stats["total_ms"] > 0


def test_a_stream_yields_the_answer_in_pieces(pair, clip, monkeypatch):
    assert "".join(pieces := list(pair.stream(**clip))) == pair.answer(**clip).text and all(pieces)
    monkeypatch.setattr(pair, "text_of", lambda ids: "".join(f"<{i}>" for i in ids))
    assert "".join(pieces := list(pair.stream(**clip))) == pair.answer(**clip).text and len(pieces) > 1
    monkeypatch.setattr(pair, "text_of", lambda ids: "x" * (len(ids) // 4))  # most rounds add nothing to the text
    assert set(pieces := list(pair.stream(**clip))) <= {"x", "xx"} and "".join(pieces) == pair.answer(**clip).text


class Scripted:
    """A speculation that emits given tokens, some in each round."""

    def __init__(self, tokens, sizes):
        self.token_ids, self.sizes, self.emitted = tokens, sizes, tokens[:1]

    is_finished = property(lambda self: len(self.emitted) == len(self.token_ids))
    prefill = lambda self, *_: None  # noqa: E731
    finish = lambda self: self  # noqa: E731

    def advance(self):
        self.emitted = self.token_ids[: len(self.emitted) + next(self.sizes)]


def test_pieces_are_whole_characters_whatever_the_bytes_and_rounds(pair, clip, monkeypatch):
    """Valid and invalid UTF-8 in byte tokens between words: the pieces are the text, and none shows a character that is incomplete."""
    tokenizer, chance, valid = pair.target.tokenizer, random.Random(0), 0
    words = tokenizer.encode("the car is red", add_special_tokens=False)

    def begun(prompts):
        pair._speculating = Scripted(tokens, iter(lambda: chance.randint(1, 3), 0))
        return pair._speculating

    monkeypatch.setattr(pair, "_speculation", begun)
    for _ in range(300):
        tokens = []
        for _ in range(chance.randint(1, 6)):
            text = "".join(chance.choices("éü😀漢", k=chance.randint(1, 2))).encode()
            spoiled = text[: chance.randint(1, len(text))] if chance.random() < 0.3 else text
            tokens += [chance.choice(words)] + [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in spoiled]
        pieces, wanted = list(pair.stream(**clip)), pair.text_of(tokens)
        assert "".join(pieces) == wanted and all(pieces)
        if "\N{REPLACEMENT CHARACTER}" not in wanted:
            valid += 1
            assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
        assert all(not piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in pieces[:-1])
    assert 30 < valid < 270


def test_a_stream_is_not_continued_after_another_answer_was_begun(pair, clip, monkeypatch):
    monkeypatch.setattr(pair, "text_of", lambda ids: "".join(f"<{i}>" for i in ids))  # the tiny pair says bytes of no character
    stream = pair.stream(**clip)
    next(stream)
    answer = pair.answer(**clip)
    with pytest.raises(UserError, match="another answer of this pair was begun"):
        next(stream)
    assert pair.answer(**clip).token_ids == answer.token_ids


def test_a_stream_is_not_continued_after_a_batch_was_decoded(pair, clip, monkeypatch):
    monkeypatch.setattr(pair, "text_of", lambda ids: "".join(f"<{i}>" for i in ids))
    stream = pair.stream(**clip)
    next(stream)
    pair.decode_batch([pair.prepare(speculative_pair.sample_of(**clip))])
    with pytest.raises(UserError, match="another answer of this pair was begun"):
        next(stream)


@pytest.mark.parametrize("draft", ["aligned", "own"])
def test_a_batch_leaves_the_steps_of_the_drafter_as_they_are(opened, draft):
    pair = opened(draft=draft, steps="graphs", max_new_tokens=6)
    stepping = pair.sources.stepping_drafter(draft)
    before = stepping.steps, stepping.fixed_cache
    prompts = [speculative_pair.Prompts(prompt_of(1, 5, n), prompt_of(1, 5, n)) for n in (7, 9)]
    alone = [pair.decode(p).token_ids for p in prompts]
    assert pair.decode_batch(prompts).token_ids == alone
    assert (stepping.steps, stepping.fixed_cache) == before and before[0] == "graphs"
    assert [pair.decode(p).token_ids for p in prompts] == alone
    with pytest.raises(UserError, match="a batch of no prompts"):
        pair.decode_batch([])


SHARED = {"max_new_tokens": 12, "num_draft_tokens": 3, "threads": 1}


@pytest.mark.parametrize(("kind", "drafter"), [("chained", "chained"), ("hidden", "aligned"), ("attending", "attending")])
def test_a_shared_adapter_drafts_the_same_tokens(clip, finished, tmp_path, kind, drafter):
    target, draft = finished / "pair" / "video_llava", finished / "pair" / "eventgpt"
    share.main(["--config", str(finished / "tiny.yaml"), "--adapter", kind, "--to", str(tmp_path), "--license", "apache-2.0"])
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n") and "exact match 1.000" in card and "Not measured" not in card
    assert f"- {drafter} + token, 3: " in card and (kind == "attending") == ("AttendingAdapter.from_pretrained" in card)
    shared = SpeculativePair.from_pretrained(target, draft, tmp_path, **SHARED)
    own = SpeculativePair.from_config(finished / "tiny.yaml", draft=drafter, num_draft_tokens=3)
    a, b = shared.answer(**clip), own.answer(**clip)
    assert [r.proposed for r in a.rounds] == [r.proposed for r in b.rounds] and a.token_ids == b.token_ids
    assert shared.sources.known_acceptance(drafter) == own.sources.known_acceptance(drafter) is not None


def test_the_profile_of_a_drafter_is_on_the_card_with_its_interval(finished, tmp_path):
    share.main(["--config", str(finished / "tiny.yaml"), "--to", str(tmp_path)])
    profiles = json.loads((finished / "out" / "benchmark" / "speculation_profile.json").read_text())["profiles"]
    (profile,) = [p for p in profiles if p["draft"] == "chained"]
    low, high = profile["mean_acceptance_length_ci95"]
    line = f"{profile['mean_acceptance_length']:.2f} [{low:.2f}, {high:.2f}] tokens per round"
    assert f"- at draft length {profile['num_draft_tokens']}: {line}" in (tmp_path / "README.md").read_text()


def test_a_hub_checkpoint_is_named_with_its_revision(finished, tmp_path, monkeypatch):
    found = {"org/target": "abc123", "org/draft": "def456"}
    monkeypatch.setattr(share, "hub_revision", lambda path: f"{str(path)[4:]}@{found[str(path)[4:]]}")
    flags = [
        "--config",
        str(finished / "tiny.yaml"),
        "--to",
        str(tmp_path / "a"),
        "--target_id",
        "hub:org/target",
        "--draft_id",
        "hub:org/draft",
    ]
    share.main(flags)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "target org/target (revision abc123), draft org/draft (revision def456)" in card
    assert 'base_model: ["org/target", "org/draft"]' in card
    monkeypatch.setattr(share, "hub_revision", lambda path: f"{str(path)[4:]} (not in the cache)")
    with pytest.raises(UserError, match="hub:org/target is not in the local cache"):
        share.main(flags)


def test_a_shared_adapter_of_another_pair_is_refused(finished, tmp_path):
    from feature_alignment.adapters.attending import AttendingAdapter

    target, draft = finished / "pair" / "video_llava", finished / "pair" / "eventgpt"
    meta = {"draft_layers": [3]}
    ChainedAdapter(d_target=32, d_event=16, num_events=4, width=8).save_pretrained(tmp_path / "a", meta)
    with pytest.raises(UserError, match="states of width 16 to 32"):
        SpeculativePair.from_pretrained(target, draft, tmp_path / "a")
    ChainedAdapter(d_target=32, d_event=32, num_events=4, width=8).save_pretrained(tmp_path / "c", meta)
    with pytest.raises(UserError, match=r"reads 4 event tokens of a clip; this pair has \d\d"):
        SpeculativePair.from_pretrained(target, draft, tmp_path / "c")
    with pytest.raises(UserError, match="no adapter at"):
        SpeculativePair.from_pretrained(target, draft, tmp_path / "none")
    num_events = json.loads((finished / "out" / "chained_adapter" / "meta.json").read_text())["geometry"]["num_events"]
    adapter = AttendingAdapter(32, 32, num_events, num_ids=2, num_entries=1, width=8)
    adapter.ids.copy_(torch.tensor([5, 10**6]))
    adapter.save_pretrained(tmp_path / "b", meta)
    with pytest.raises(UserError, match="token ids up to 1000000; this pair has ids below"):
        SpeculativePair.from_pretrained(target, draft, tmp_path / "b")


def test_an_adapter_without_its_layers_needs_them_as_a_setting(finished, tmp_path):
    from feature_alignment.storage.pretrained import save_pretrained

    target, draft = finished / "pair" / "video_llava", finished / "pair" / "eventgpt"
    adapter = ChainedAdapter.from_pretrained(shared_chained(finished, tmp_path / "a"))
    adapter.save_pretrained(tmp_path / "b")
    with pytest.raises(UserError, match=r"records EventGPT's layers None, got draft_layers=None"):
        SpeculativePair.from_pretrained(target, draft, tmp_path / "b")
    layers = json.loads((finished / "out" / "chained_adapter" / "meta.json").read_text())["draft_layers"]
    SpeculativePair.from_pretrained(target, draft, tmp_path / "b", draft_layers=layers)
    with pytest.raises(UserError, match=r"got draft_layers=\[1\]; expected these layers"):
        SpeculativePair.from_pretrained(target, draft, tmp_path / "a", draft_layers=[1])
    save_pretrained(adapter, "quantum", {}, tmp_path / "c")
    with pytest.raises(UserError, match="type 'quantum', expected hidden, chained, attending"):
        SpeculativePair.from_pretrained(target, draft, tmp_path / "c")


def test_a_shared_adapter_drafts_in_the_script(finished, tmp_path, capfd):
    """For one sample and for a data set, whose rows are reused for the same adapter only."""
    directory, other = shared_chained(finished, tmp_path / "a"), tmp_path / "b"
    flags = ["--config", str(finished / "tiny.yaml"), "--num_draft_tokens", "3", "--draft", "chained"]
    script = main_of("feature_sd_inference")
    trained, data_set = script(flags), [*flags, "--output_dir", str(tmp_path / "out"), "--split", "test"]  # nothing was trained there
    shared = script([*data_set, "--shared_adapter", str(directory), "--sample", trained["sample"]["id"]])
    assert [r["proposed"] for r in shared["rounds"]] == [r["proposed"] for r in trained["rounds"]] and shared["exact_match"]
    assert shared["meta"]["made_from"]["chained_adapter"] != trained["meta"]["made_from"]["chained_adapter"]

    script([*data_set, "--shared_adapter", str(directory)])
    capfd.readouterr()
    script([*data_set, "--shared_adapter", str(directory)])
    assert '"tokens_per_s": null' in capfd.readouterr().out, "reused"
    adapter = ChainedAdapter.from_pretrained(directory)
    with torch.no_grad():
        adapter.out.bias += 1
    adapter.save_pretrained(other, json.loads((directory / "config.json").read_text())["meta"])
    with pytest.raises(UserError, match="chained_adapter"):
        script([*data_set, "--shared_adapter", str(other)])
    with pytest.raises(UserError, match="chained_adapter"):
        script(data_set)


@pytest.mark.parametrize("data_set", [[], ["--split", "test"]])
def test_a_shared_adapter_needs_the_drafter_that_reads_it(finished, tmp_path, data_set):
    directory = shared_chained(finished, tmp_path / "a")
    flags = ["--config", str(finished / "tiny.yaml"), *data_set, "--shared_adapter"]
    with pytest.raises(UserError, match="with --draft aligned: this adapter needs --draft chained"):
        main_of("feature_sd_inference")([*flags, str(directory)])
    with pytest.raises(UserError, match="no adapter at"):
        main_of("feature_sd_inference")([*flags, str(tmp_path / "none")])


def shared_chained(finished, directory):
    share.main(["--config", str(finished / "tiny.yaml"), "--to", str(directory)])
    return directory


def test_wrong_settings_and_files_are_refused_by_name(pair, clip, finished):
    with pytest.raises(UserError, match="threshhold"):
        SpeculativePair.from_config(finished / "tiny.yaml", threshhold=0.5)
    with pytest.raises(UserError, match=r"nothing at absent\.mp4"):
        pair.answer(**{**clip, "video": "absent.mp4"})


def test_a_trimmed_draft_vocabulary_changes_no_text(clip, finished, pair):
    trimmed = SpeculativePair.from_config(finished / "tiny.yaml", draft="chained", num_draft_tokens=3, draft_vocabulary=3)
    ids = set(trimmed.sources.draft_ids.tolist())
    assert len(ids) == 3 and trimmed.target.eos_ids <= ids
    answer = trimmed.answer(**clip)
    assert answer.token_ids == pair.answer(**clip).token_ids
    assert all(token in ids for r in answer.rounds for token in r.proposed) and any(r.proposed for r in answer.rounds)
    sampled = SpeculativePair.from_config(finished / "tiny.yaml", draft="chained", draft_vocabulary=3, temperature=1.0)
    assert all(token in ids for r in sampled.answer(**clip).rounds for token in r.proposed)


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """Opens a pair of tiny text models that drafts by EventGPT's own head, or by a table."""
    monkeypatch.setattr(speculative_pair, "load_pair", lambda cfg: Pair(as_decoder(tiny_llama(0)), as_decoder(tiny_llama(1))))
    trained = HiddenAdapter(32, 32, 8), {}
    return lambda trial=True, draft="own", **settings: SpeculativePair(
        DecodingConfig(output_dir=tmp_path, draft=draft, **settings), trained, trial
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"accept": "feature", "threshold": 0.7, "num_draft_tokens": 4, "max_new_tokens": 9, "overlap": True},
        {"accept": "typical", "adaptive": True},
        {"temperature": 0.5, "seed": 3},
        {"temperature": 2.0, "seed": 4, "adaptive": True},
    ],
)
def test_every_setting_reaches_the_decoding_loop(opened, monkeypatch, settings):
    pair, calls = opened(**settings), []

    class Recorded(Scripted):
        def __init__(self, *given, **named):
            super().__init__([5], iter([]))
            calls.extend([*given, named])

        prefill = lambda self, *given: calls.append(given)  # noqa: E731

    monkeypatch.setattr(speculative_pair, "Speculation", Recorded)
    monkeypatch.setattr(speculative_pair, "decode_plainly", lambda *given: given)
    prompts, cfg = speculative_pair.Prompts(prompt_of(1, 5), prompt_of(1, 6)), pair.cfg
    assert pair.decode(prompts).token_ids == [5]
    *loop, sampler, controller, named, prefill = calls
    rule = [cfg.accept, settings.get("threshold", 0.09 if cfg.accept == "typical" else 0.0), cfg.num_draft_tokens]
    assert loop == [pair.target, pair.proposer, prompts.target, cfg.max_new_tokens, *rule] and named == {"cosines": True}
    assert prefill == (prompts.draft, cfg.overlap) and (controller is not None) is cfg.adaptive and controller is pair._controller
    *plain, own_sampler = pair.decode_plainly(prompts)
    assert plain == [pair.target, prompts.target, cfg.max_new_tokens]
    for used in (sampler, own_sampler):
        found = used and (used.temperature, used._seed, used.shared_noise)
        assert found == ((cfg.temperature, cfg.seed, cfg.adaptive) if cfg.temperature else None)


def test_the_settings_of_generation_are_those_of_the_flags(opened):
    flags = {"top_p": 0.5, "top_k": 7, "min_p": 0.25, "min_new_tokens": 3, "repetition_penalty": 1.5}
    found = opened(**flags, stop=["."]).target.settings
    assert {name: getattr(found, name) for name in flags} == flags and found.stop_strings == ["."]


@pytest.mark.parametrize(("steps", "trial", "asked"), [("auto", True, "choose"), ("auto", False, "pack"), ("graphs", False, None)])
def test_linear_layers_are_chosen_by_a_trial_or_packed_without_one(opened, monkeypatch, steps, trial, asked):
    """Both models'; captured steps need neither."""
    calls = []
    monkeypatch.setattr(Decoder, "choose_linear", lambda self: calls.append(("choose", self)))
    monkeypatch.setattr(Decoder, "pack_linear", lambda self: calls.append(("pack", self)))
    pair = opened(trial=trial, steps=steps)
    assert {pair.target.steps, pair.draft.steps} == {"eager" if steps == "auto" else steps}
    assert calls == ([(asked, pair.target), (asked, pair.draft)] if asked else [])


def test_a_batch_has_a_drafter_for_each_row_and_the_settings_of_the_pair(opened, monkeypatch):
    calls = []
    monkeypatch.setattr(speculative_pair, "speculate_batch", lambda *given, **named: calls.append((*given, named)))
    pair = opened(draft="lookup", num_draft_tokens=4, max_new_tokens=9, overlap=True)
    prompts = [speculative_pair.Prompts(prompt_of(1, n), prompt_of(1, 9, n)) for n in range(3)]
    for n in (2, 3, 1):
        pair.decode_batch(prompts[:n])
        target, proposers, own, drafters, named = calls.pop()
        assert target is pair.target and proposers[0] is pair.proposer and len({*proposers}) == n == len(proposers)
        assert own == [p.target for p in prompts[:n]] and drafters == [p.draft for p in prompts[:n]]
        assert named == {"num_draft_tokens": 4, "max_new_tokens": 9, "overlap": True}
    for settings in ({"accept": "typical"}, {"temperature": 0.5}, {"adaptive": True}):
        with pytest.raises(UserError, match="greedily, by tokens, at a fixed length"):
            opened(draft="lookup", **settings).decode_batch(prompts)
    assert not calls


def test_an_answer_is_what_decoding_returned(opened, monkeypatch, tmp_path):
    pair = opened(draft="lookup")
    pair.target.tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens=False: f"{ids}, {skip_special_tokens}")
    rounds = [Round([5, 6], [5, 7], [True, False], None, 7, False, {"verify": 2.0}, "length")]
    made = Generation([4, 5, 7, 8], 2, 40.0, {"target_prefill": 20.0, "draft_prefill": 5.0, "verify": 10.0}, rounds)
    samples = []
    monkeypatch.setattr(pair, "prepare", lambda sample: samples.append(sample))
    monkeypatch.setattr(pair, "decode", lambda prompts: made)
    events, video = tmp_path / "e.npy", tmp_path / "v.mp4"
    for path in (events, video):
        path.touch()
    answer = pair.answer(events=str(events), video=video, question="Where?")
    stats = {"tokens_per_pass": 1.5, "passes": 2, "total_ms": 40.0, "decode_ms": 15.0, "ms": made.ms, "vision_reused": 0}
    assert answer == speculative_pair.Answer("[4, 5, 7, 8], True", [4, 5, 7, 8], rounds, stats)
    (sample,) = samples
    assert (sample.id, sample.question, sample.events, sample.video) == ("v--e", "Where?", events, video)


def test_settings_by_name_are_those_of_flags(monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr(SpeculativePair, "__init__", lambda self, cfg: found.append(cfg))
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({"feature_sd_inference": {"max_new_tokens": 7, "top_k": 5, "batch_size": 8}, "common": {"seed": 9}}))
    given = {"overlap": True, "stop": ["a b", "c"], "top_p": 0.5, "temperature": 0.5, "draft": "own", "max_new_tokens": 8}
    more = {"threshold": None, "manifests": {"test": tmp_path / "a.jsonl"}}
    SpeculativePair.from_config(config, **given, **more, draft_layers=(1, 2))
    wanted = given | more | {"draft_layers": [1, 2], "top_k": 5, "seed": 9}
    assert {name: getattr(found[0], name) for name in wanted} == wanted
    with pytest.raises(UserError, match="batch_size"):  # a setting of the script alone, which a file may have
        SpeculativePair.from_config(config, batch_size=2)
