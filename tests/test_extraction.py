"""Extraction: each clip once, and the same bytes however it is killed, split, or helped with known answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
from conftest import ROOT, fork

from feature_alignment import compare_token_baseline, extract_hidden_states
from feature_alignment.cli.config import parse_config
from feature_alignment.cli.console import UserError
from feature_alignment.inputs.samples import read_samples
from feature_alignment.models import packed
from feature_alignment.models.batches import ClipBatch, plan_batches
from feature_alignment.models.pair import load_pair
from feature_alignment.storage.hidden_states import load_hidden_states

FILES = ("egpt_hidden_states.pt", "vl_hidden_states.pt", "egpt_event_states.pt", "positions.pt", "samples.jsonl")


def flags(run, out, *more):
    return ["--config", str(run / "tiny.yaml"), "--split", "train", "--batch_size", "3", "--output_dir", str(out), *more]


def hashes(out, split="train"):
    found = {name: hashlib.sha256((out / "hidden_states" / split / name).read_bytes()).hexdigest() for name in FILES}
    return found | {"token_pairs": json.loads((out / "token_pairs" / f"{split}.json").read_text())["results"]}


@pytest.fixture(scope="module")
def whole(tiny_run, tmp_path_factory):
    """One uninterrupted run: six clips, three questions each, in six batches."""
    out = tmp_path_factory.mktemp("whole")
    extract_hidden_states.main(flags(tiny_run, out))
    return out


@pytest.fixture(scope="module")
def pair_and_samples(tiny_run):
    cfg = parse_config(extract_hidden_states.ExtractConfig, flags(tiny_run, "unused"), "extract_hidden_states")
    return load_pair(cfg), read_samples(cfg.manifests, "train")


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 100])
def test_batches_cover_every_row_once_and_split_no_clip(pair_and_samples, size):
    samples = pair_and_samples[1]
    plan = plan_batches(samples, size)
    assert [row for rows in plan for row in rows] == list(range(len(samples))) and max(map(len, plan)) <= size
    if size >= 3:
        assert all(len({samples[row].video for row in rows}) * 3 == len(rows) for rows in plan)


@pytest.mark.parametrize("who", ["target", "draft"])
def test_a_batch_of_clips_says_and_thinks_what_each_question_alone_does(pair_and_samples, who):
    pair, samples = pair_and_samples
    model, seen = getattr(pair, who), []
    encode, model.encode_vision = model.encode_vision, lambda pixels: seen.append(1) or encode(pixels)
    try:
        batch = ClipBatch(model, samples[:6])
    finally:
        del model.encode_vision
    answers = batch.generate(12)
    assert len(seen) == 2 and len({len(p) for p in map(model.encode_prompt, {s.question for s in samples[:6]})}) > 1
    assert batch.predict_tokens(answers) == answers
    for sample, answer, states in zip(samples, answers, batch.states(answers), strict=False):
        state = model.prefill([model.prepare(sample)])
        assert model.generate(state, 12) == [answer]
        torch.testing.assert_close(states, model.teacher_force(state, torch.tensor([answer]))[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 12])
def test_generated_texts_are_not_read_again_and_known_ones_give_the_same_bits(pair_and_samples, monkeypatch, max_new_tokens):
    pair, samples = pair_and_samples
    asked = samples[:6]
    batch, other, forced = (ClipBatch(pair.target, asked) for _ in range(3))
    answers = batch.generate(max_new_tokens)
    other.replay(answers)
    read, steps = pair.target.step, []
    monkeypatch.setattr(pair.target, "step", lambda state, ids, **layout: (steps.append(ids.numel()), read(state, ids, **layout))[1])
    for cut in (None, 1):
        wanted = [answer[:cut] for answer in answers]
        for found, again in zip(batch.states(wanted, 2), other.states(wanted, 2), strict=True):
            assert torch.equal(found, again)
        assert not steps
    changed = [[*answers[0][:-1], answers[0][-1] ^ 1], *answers[1:]]  # the last token is not read, but it is another text
    for texts in (changed, answers):
        for found, wanted in zip(batch.states(texts, 2), forced.states(texts, 2), strict=True):
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    forced_steps = 2 * 3  # of `forced`: both times all texts, one of each clip at once
    assert len(steps) == forced_steps + 1


def test_on_a_gpu_a_text_is_read_by_one_pass_whether_it_was_generated_or_known(pair_and_samples):
    """A step costs there about as much as a pass over a whole text."""
    pair, samples = pair_and_samples
    batch, known = (ClipBatch(pair.target, samples[:6]) for _ in range(2))
    batch._keeps_states = known._keeps_states = False
    answers = batch.generate(12)
    known.replay(answers)
    assert all(map(torch.equal, batch.states(answers), known.states(answers)))
    assert batch._states_read == known._states_read == []


@pytest.mark.parametrize("before", [1, 3, 1000])
def test_states_of_a_prompts_end_are_those_of_its_prefill(pair_and_samples, before):
    """From any place on; where a prompt is shorter than what is asked for, zeros stand in front."""
    pair, samples = pair_and_samples
    batch = ClipBatch(pair.target, samples[:3])
    answers = batch.generate(4)
    for sample, answer, states in zip(samples, answers, batch.states(answers, before), strict=False):
        state = pair.target.prefill([pair.target.prepare(sample)])
        prompt = state.prompt[0, :-1]
        wanted = torch.cat([prompt, pair.target.teacher_force(state, torch.tensor([answer]))[0]])[-before - len(answer) :]
        assert len(states) == before + len(answer) and not states[: len(states) - len(wanted)].any()
        torch.testing.assert_close(states[len(states) - len(wanted) :], wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("counts", [(1, 3), (3, 1), (1, 3, 1, 1), (2, 3, 1)])
def test_clips_of_one_and_three_questions_make_whole_batches(pair_and_samples, counts):
    """At batch size 3: no clip is split, and each answer is what its question alone gives."""
    pair, samples = pair_and_samples
    clips = [samples[i : i + 3] for i in range(0, len(samples), 3)]
    rows = [s for clip, count in zip(clips, counts, strict=False) for s in clip[:count]]
    plan = plan_batches(rows, 3)
    assert [row for part in plan for row in part] == list(range(len(rows)))
    videos = [{rows[row].video for row in part} for part in plan]
    assert all(a.isdisjoint(b) for a, b in pairwise(videos)) and max(map(len, plan)) <= 3
    for part in plan:
        asked = [rows[row] for row in part]
        alone = [pair.target.generate(pair.target.prefill([pair.target.prepare(s)]), 6)[0] for s in asked]
        assert ClipBatch(pair.target, asked).generate(6) == alone


def test_a_batch_of_one_sample_is_that_sample(pair_and_samples):
    pair, samples = pair_and_samples
    for model in (pair.target, pair.draft):
        batch, state = ClipBatch(model, samples[:1]), model.prefill([model.prepare(samples[0])])
        answer = model.generate(state, 8)
        assert batch.generate(8) == answer
        torch.testing.assert_close(batch.states(answer)[0], model.teacher_force(state, torch.tensor(answer))[0], atol=2e-5, rtol=1e-4)


def test_masks_of_our_own_go_past_flash_attention(pair_and_samples):
    """Which takes none: these passes are sdpa's."""
    pair, samples = pair_and_samples
    config = pair.target.llama.config
    answers = ClipBatch(pair.target, samples[:3]).generate(6)
    batch = ClipBatch(pair.target, samples[:3])  # which has generated nothing, so it reads the answers
    wanted = batch.states(answers)
    config._attn_implementation = "flash_attention_2"  # as on a GPU; here it would fail
    try:
        found = batch.states(answers)
        assert config._attn_implementation == "flash_attention_2"
    finally:
        config._attn_implementation = "sdpa"
    torch.testing.assert_close(found, wanted)


def forked(argv, environment=None) -> int:
    """A process of its own that runs the script, without the seconds that imports take; returns its pid."""
    pid = fork()
    if pid == 0:
        code = 1
        try:
            os.environ.update(environment or {})
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            extract_hidden_states.main(argv)
            code = 0
        finally:
            os._exit(code)
    return pid


def test_kills_at_random_moments_change_nothing(tiny_run, whole, tmp_path):
    """Each kill comes some time after one more batch was noted: while states are computed, written or noted."""
    notes, moments = tmp_path / "hidden_states" / "train.unfinished" / "progress-0.txt", random.Random(0)
    for kill in range(4):
        pid = forked(flags(tiny_run, tmp_path))
        while not (notes.is_file() and notes.read_bytes().count(b"\n") >= 3 * (kill + 1)):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert not (tmp_path / "hidden_states" / "train").exists()
    extract_hidden_states.main(flags(tiny_run, tmp_path))
    assert hashes(tmp_path) == hashes(whole)
    assert sorted(p.name for p in (tmp_path / "hidden_states").iterdir()) == ["train", "vl_embeddings.pt", "vl_lm_head.pt"]


def test_two_processes_fill_one_file(tiny_run, whole, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    pids = [forked(flags(tiny_run, tmp_path), {**place, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert hashes(tmp_path) == hashes(whole)


@pytest.mark.slow
def test_torchrun(tiny_run, whole, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "feature_alignment/extract_hidden_states.py",
    ]
    done = subprocess.run([*command, *flags(tiny_run, tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == 18 and hashes(tmp_path) == hashes(whole)


def test_shards_merge_to_the_whole(tiny_run, whole, tmp_path):
    extract_hidden_states.main(flags(tiny_run, tmp_path, "--shard", "2/2"))
    with pytest.raises(UserError, match=r"lacks train\.shard-1-of-2"):
        extract_hidden_states.main(flags(tiny_run, tmp_path, "--merge"))
    extract_hidden_states.main(flags(tiny_run, tmp_path, "--shard", "1/2"))
    assert not (tmp_path / "token_pairs").exists()
    with pytest.raises(UserError, match=r"max_new_tokens: 12 recorded, 9 now"):
        extract_hidden_states.main(flags(tiny_run, tmp_path, "--merge", "--max_new_tokens", "9"))
    extract_hidden_states.main(flags(tiny_run, tmp_path, "--merge"))
    assert hashes(tmp_path) == hashes(whole)
    assert extract_hidden_states.main(flags(tiny_run, tmp_path))["merged_shards"] == 2  # recognised as the complete run


def test_known_answers_are_read_and_change_nothing(tiny_run, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(ClipBatch, "generate", None)
    known = ["--answers", str(whole / "token_pairs" / "train.json")]
    extract_hidden_states.main(flags(tiny_run, tmp_path, *known))
    assert hashes(tmp_path) == hashes(whole)
    with pytest.raises(UserError, match="max_new_tokens: 12 recorded, 9 now"):
        extract_hidden_states.main(flags(tiny_run, tmp_path / "b", *known, "--max_new_tokens", "9"))


def test_training_data_with_bfloat16_products_is_a_run_of_its_own(tiny_run, whole, tmp_path, monkeypatch):
    """Close to the usual states, and never taken for them."""
    monkeypatch.setattr(packed, "SMALLEST", 1)  # layers of the tiny models count as large enough
    known = str(whole / "token_pairs" / "train.json")
    states = {}
    for name, more in (("usual", ()), ("rounded", ("--bfloat16_products", "true"))):
        rows = json.loads((whole / "token_pairs" / "train.json").read_text())["results"]
        (tmp_path / "texts.json").write_text(json.dumps({"results": rows}))  # without meta: the same texts for both
        extract_hidden_states.main(flags(tiny_run, tmp_path / name, "--answers", str(tmp_path / "texts.json"), *more))
        states[name] = load_hidden_states(tmp_path / name / "hidden_states" / "train").target
    error = (states["rounded"] - states["usual"]).norm() / states["usual"].norm()
    assert 1e-4 < error < 3e-2 if packed.multiplies_bfloat16() else error == 0
    with pytest.raises(UserError, match="bfloat16_products: False recorded, True now"):
        extract_hidden_states.main(flags(tiny_run, tmp_path / "b", "--answers", known, "--bfloat16_products", "true"))


def test_without_the_drafters_answers_the_states_are_the_same(tiny_run, whole, tmp_path):
    silent = ["--draft_answers", "false", "--own_drafts", "false", "--event_states"]
    extract_hidden_states.main(flags(tiny_run, tmp_path, *silent))
    got, wanted = (load_hidden_states(out / "hidden_states" / "train") for out in (tmp_path, whole))
    assert got.token_ids.equal(wanted.token_ids)
    torch.testing.assert_close(got.target, wanted.target, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(got.draft, wanted.draft, atol=2e-5, rtol=1e-4)
    assert {(*r["egpt_tokens"], r["egpt_text"]) for r in got.rows} == {("",)}
    (tmp_path / "hidden_states" / "train" / "vl_hidden_states.pt").unlink()  # its answers are complete: they are not generated again
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClipBatch, "generate", None)
        extract_hidden_states.main(flags(tiny_run, tmp_path, *silent))
    with pytest.raises(UserError, match=r"--prefix own needs EventGPT's answers"):
        extract_hidden_states.main(flags(tiny_run, tmp_path, *silent, "--prefix", "own"))
    with pytest.raises(UserError, match=r"(?s)no answers of EventGPT.*--draft_answers true"):
        compare_token_baseline.main(["--token_pairs", str(tmp_path / "token_pairs" / "train.json"), "--output_dir", str(tmp_path)])


def test_layers_apart_are_the_layers_together(tiny_run, whole, tmp_path):
    known = ["--answers", str(whole / "token_pairs" / "train.json"), "--draft_layers", "1,3"]
    extract_hidden_states.main(flags(tiny_run, tmp_path / "together", *known))
    meta = extract_hidden_states.main(flags(tiny_run, tmp_path / "apart", *known, "--separate_layers"))
    assert meta["draft_norms"] == {"1": "pre", "3": "post"}
    folder = tmp_path / "apart" / "hidden_states" / "train"
    parts = [load_hidden_states(folder, [k]).draft for k in (1, 3)]
    assert torch.equal(torch.cat(parts, -1), load_hidden_states(tmp_path / "together" / "hidden_states" / "train").draft)
    last = load_hidden_states(whole / "hidden_states" / "train")
    torch.testing.assert_close(parts[1], last.draft)


def test_fewer_positions_are_the_first_ones(tiny_run, whole, tmp_path):
    extract_hidden_states.main(flags(tiny_run, tmp_path, "--max_positions", "4"))
    few, all_ = (load_hidden_states(out / "hidden_states" / "train") for out in (tmp_path, whole))
    assert few.draft.shape[1] == 4 and few.lengths.tolist() == all_.lengths.clamp(max=4).tolist()
    torch.testing.assert_close(few.target[few.mask], all_.target[:, :4][few.mask])
    assert [r["vl_tokens"] for r in few.rows] == [r["vl_tokens"] for r in all_.rows]


def test_changed_settings_are_named(tiny_run, whole):
    with pytest.raises(UserError, match=r"store_dtype: float32 → bfloat16"):
        extract_hidden_states.main(flags(tiny_run, whole, "--store_dtype", "bfloat16"))


def test_a_missing_clip_is_named_before_anything_is_written(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "scenes", tmp_path / "scenes")
    rows = [json.loads(line) for line in (tmp_path / "scenes" / "train.jsonl").read_text().splitlines()]
    (tmp_path / "scenes" / rows[-1]["events"]).unlink()
    words = ["--manifests", json.dumps({"train": str(tmp_path / "scenes" / "train.jsonl")})]
    with pytest.raises(UserError, match=rf"sample {rows[-3]['id']}: nothing at .*{rows[-1]['events']}, nor 2 other files\. Put the clips"):
        extract_hidden_states.main(flags(tiny_run, tmp_path / "out", *words))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--shard", "0/2"], ["--shard", "3/2"], ["--shard", "x"], ["--shard", "1/2", "--merge"]])
def test_shards_that_cannot_be_are_refused(tiny_run, tmp_path, words):
    with pytest.raises(UserError, match="--shard wants i/n"):
        extract_hidden_states.main(flags(tiny_run, tmp_path, *words))
    assert not any(tmp_path.iterdir())


def test_a_full_disk_stops_before_the_work(tiny_run, tmp_path, monkeypatch):
    from feature_alignment.storage import hidden_states_writer

    room = dataclasses.make_dataclass("Room", ["free"])(100)
    monkeypatch.setattr(hidden_states_writer.shutil, "disk_usage", lambda _: room)
    with pytest.raises(UserError, match=r"100 free"):
        extract_hidden_states.main(flags(tiny_run, tmp_path))
