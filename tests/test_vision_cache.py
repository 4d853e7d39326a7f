"""A clip is encoded once for all questions about it, and never without being paid for in a timed comparison."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import as_decoder, prompt_of, tiny_llama

from feature_alignment import SpeculativePair
from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.benchmark import timing
from feature_alignment.cli.config import parse_config
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.proposers import ModelProposer
from feature_alignment.decoding.settings import DecodingConfig
from feature_alignment.feature_sd_inference import decode_both_ways
from feature_alignment.inputs.samples import read_samples
from feature_alignment.models.pair import load_pair
from feature_alignment.models.vision_cache import VisionCache


def counted(decoder):
    """The clips that a decoder encodes from now on."""
    encoded, encode = [], decoder._encode_vision
    decoder._encode_vision = lambda pixels: encoded.append(pixels) or encode(pixels)
    return encoded


def pair_of(root, **settings):
    torch.manual_seed(0)
    words = [f"--{name}={value}" for name, value in settings.items()]
    cfg = parse_config(DecodingConfig, ["--config", str(root / "tiny.yaml"), *words], "feature_sd_inference")
    return SpeculativePair(cfg, (ChainedAdapter(d_target=32, d_event=32, num_events=42, width=8).eval(), {}))


@pytest.fixture
def pair(tiny_run):
    return pair_of(tiny_run, draft="chained", num_draft_tokens=3)


@pytest.fixture(scope="module")
def samples(tiny_run):
    """Two questions about each of two clips."""
    cfg = parse_config(DecodingConfig, ["--config", str(tiny_run / "tiny.yaml")], "feature_sd_inference")
    found = read_samples(cfg.manifests, "test")
    clips = {s.video: s for s in found}
    first, second = list(clips.values())[:2]
    return [dataclasses.replace(s, question=q) for q in ("What is moving?", "Where is it?") for s in (first, second)]


def asked(sample):
    return {"events": sample.events, "video": sample.video, "question": sample.question}


def test_a_clip_is_known_by_its_content_and_the_clip_used_last_is_kept():
    cache, encoded = VisionCache(size=2), []
    a, b, c = (torch.full((1, 2, 3, 4, 4), value) for value in (0.0, 1.0, 2.0))

    def tokens(clip):
        return cache.vision(clip, lambda: encoded.append(float(clip[0, 0, 0, 0, 0])) or clip.sum()[None])

    for clip in (a, b, a.clone(), c, a.clone(), b):
        assert tokens(clip) == clip.sum()
    assert encoded == [0, 1, 2, 1] and cache.hits == 2, "b was used least recently when c came"
    almost = b.clone()
    almost[0, -1, -1, -1, -1] += 1e-6
    assert tokens(almost) == almost.sum() and len(encoded) == 5, "another clip, if in one value only"
    tokens(almost.double())
    assert len(encoded) == 6, "another number format is another clip"
    b += 1
    tokens(b)
    assert len(encoded) == 7, "the cache keeps pixels of its own"
    cache.clear()
    tokens(b)
    assert len(encoded) == 8
    with pytest.raises(ValueError, match="at least one clip"):
        VisionCache(0)


def test_states_are_those_of_the_clip_and_of_the_prompt_before_it():
    cache, read = VisionCache(size=1), []
    clips = [cache.vision(torch.full((1, 1), value), lambda v=value: torch.full((1, 1), v)) for value in (0.0, 1.0)]

    def states(vision, *prefix):
        return cache.states(vision, prefix, lambda: read.append(prefix) or vision + len(prefix))

    assert [float(states(clips[1], *prefix)) for prefix in ((7,), (7,), (7, 8), (7, 8), (7,))] == [2, 2, 3, 3, 2]
    assert read == [(7,), (7, 8), (7,)]
    assert [float(states(clips[0], 7)) for _ in range(2)] == [1, 1] and len(read) == 5, "a clip that is no longer kept is read again"


def test_further_questions_about_a_clip_do_not_encode_it_and_have_the_same_answers(pair, samples):
    target, draft, read, forward = counted(pair.target), counted(pair.draft), [], pair.draft._forward
    pair.draft._forward = lambda *inputs: read.append(1) or forward(*inputs)
    found = [pair.answer(**asked(s)) for s in samples]
    assert len(target) == len(draft) == len(read) == 2, "four questions about two clips"
    assert [answer.stats["vision_reused"] for answer in found] == [0, 0, 2, 2]
    assert pair.answer_plain(**asked(samples[0])).stats["vision_reused"] == 1 and len(target) == 2
    pair.forget_clips()
    assert pair.answer(**asked(samples[0])).stats["vision_reused"] == 0 and len(target) == len(draft) == 3
    for sample, answer in zip(samples, found, strict=True):
        pair.forget_clips()
        again = pair.answer(**asked(sample))
        assert again.token_ids == answer.token_ids and [r.proposed for r in again.rounds] == [r.proposed for r in answer.rounds]


def test_the_own_head_of_eventgpt_reuses_clips_too(samples, tiny_run):
    pair = pair_of(tiny_run, draft="own", draft_layers="[1]")
    encoded = counted(pair.sources.full_draft)
    found = [pair.answer(**asked(s)).stats["vision_reused"] for s in samples[::2]]
    assert found == [0, 2] and len(encoded) == 1


def test_times_that_the_inference_script_prints_include_vision(pair, samples):
    target, draft = counted(pair.target), counted(pair.draft)
    decode_both_ways(pair, samples[0])
    assert (len(target), len(draft)) == (4, 2), "every run of both ways"


def test_every_timed_run_of_a_benchmark_encodes_its_clip(tiny_run):
    cfg = parse_config(DecodingConfig, ["--config", str(tiny_run / "tiny.yaml")], "feature_sd_inference")
    loaded = load_pair(cfg)
    assert loaded.target.vision_cache is None and loaded.draft.vision_cache is None
    target, drafter, prompt = as_decoder(tiny_llama(0)), as_decoder(tiny_llama(0)), prompt_of(1, 5, 9)
    by_target, by_drafter, proposer = counted(target), counted(drafter), ModelProposer(drafter, None, None)
    methods = {
        "plain": lambda i: greedy(target, prompt, 4),
        "own": lambda i: speculate(target, proposer, prompt, prompt, max_new_tokens=4),
    }
    timing.run_in_turns(methods, 2, 3, iter)
    assert (len(by_target), len(by_drafter)) == (12, 6)
