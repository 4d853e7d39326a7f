"""A proposer, an acceptance rule and an event format of one's own, each added from outside. CONTRIBUTING.md points here."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from conftest import as_decoder, noisy_copy, prompt_of, tiny_llama

from feature_alignment.console import UserError
from feature_alignment.decoding.engine import greedy, speculate
from feature_alignment.decoding.proposers import Draft, ModelProposer, Proposer
from feature_alignment.hidden_adapter import HiddenAdapter
from feature_alignment.inputs import event_files
from feature_alignment.inputs.event_files import RawEvents
from feature_alignment.inputs.events import event_images, load_events

PROMPT, MAX = prompt_of(1, 5, 9, 13), 30


class Lookup(Proposer):
    """Proposes what followed the last token where it occurred before."""

    def start(self, prompt, watch):
        pass

    def propose(self, emitted, states, num_tokens, watch, floor=0.0):
        text = list(emitted)
        with watch("draft"):
            for _ in range(num_tokens):
                earlier = [i for i, token in enumerate(text[:-1]) if token == text[-1]]
                text.append(text[earlier[-1] + 1] if earlier else text[-1])
        return Draft(torch.tensor(text[len(emitted) :]), None)


def same_or_close(draft_ids, target_ids, cosine, threshold):
    """Keeps the target's own token, and any other whose expected state comes close. [g] bool; what follows a rejection is dropped."""
    return (draft_ids == target_ids) | (cosine > threshold)


def read_csv(path, start_us, window_us):
    """A text file of events, told by its first line."""
    table = np.loadtxt(path, delimiter=",", skiprows=1, dtype=np.int64, ndmin=2)
    return RawEvents({name: table[:, i] for i, name in enumerate("xytp")})


def test_a_proposer_is_an_object_with_two_methods():
    target = as_decoder(tiny_llama(0))
    plain = greedy(target, PROMPT, MAX)
    got = speculate(target, Lookup(), PROMPT, PROMPT, num_draft_tokens=3, max_new_tokens=MAX)
    drafted = [r.proposed for r in got.rounds]
    assert got.token_ids == plain.token_ids
    assert 0 < sum(r.num_accepted for r in got.rounds) < sum(map(len, drafted))


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.6, 2.0])
def test_an_acceptance_rule_is_a_function(threshold):
    torch.manual_seed(3)
    adapter = HiddenAdapter(32, 32, 8)
    torch.nn.init.normal_(adapter.up.weight, std=0.05)
    target = as_decoder(tiny_llama(0))
    proposer = ModelProposer(as_decoder(noisy_copy(tiny_llama(0), 0.3)), adapter, target.lm_head)
    rule = {"accept": same_or_close, "threshold": threshold, "num_draft_tokens": 4, "max_new_tokens": MAX}
    got = speculate(target, proposer, PROMPT, PROMPT, **rule)
    for r in got.rounds[:-1]:  # nothing behind EOS counts in the last
        wanted = [d == s or c > threshold for d, s, c in zip(r.proposed, r.target_says, r.cosine, strict=True)]
        leading = wanted.index(False) if False in wanted else len(wanted)
        assert r.kept == [True] * leading + [False] * (len(wanted) - leading)
    kept = sum(r.num_accepted for r in got.rounds)
    if threshold > 1:  # then only the target's own tokens are left
        assert got.token_ids == greedy(target, PROMPT, MAX).token_ids and kept
    if threshold == -1:
        assert kept == sum(len(r.proposed) for r in got.rounds)


def test_an_event_format_is_a_function_and_its_first_bytes(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    events = {"x": rng.integers(0, 40, 500), "y": rng.integers(0, 30, 500), "t": np.sort(rng.integers(0, 50_000, 500))}
    events["p"] = rng.integers(0, 2, 500)
    path = tmp_path / "events.bin"
    path.write_text("\0EVENTS\n" + "".join(f"{x},{y},{t},{p}\n" for x, y, t, p in zip(*events.values(), strict=True)))
    with pytest.raises(UserError, match="not an event file"):
        load_events(path)
    monkeypatch.setitem(event_files.READERS, b"\0EVENTS\n", read_csv)
    found = load_events(path, window_ms=20)
    early = events["t"] < events["t"][0] + 20_000
    assert all(np.array_equal(found[name], events[name][early]) for name in "xytp")
    assert len(event_images(found, 5)) == 5


@pytest.mark.parametrize("extension", [Lookup, same_or_close, read_csv])
def test_each_takes_less_than_forty_lines(extension):
    assert len(inspect.getsource(extension).splitlines()) < 40
