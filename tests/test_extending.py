"""The drafter, the acceptance rule and the event format printed in docs/extending.md work as they are printed there."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, as_decoder, noisy_copy, prompt_of, tiny_llama

from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.cli.console import UserError
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.proposers import ModelProposer
from feature_alignment.inputs import event_files
from feature_alignment.inputs.events import event_images, load_events

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
PROMPT, MAX = prompt_of(1, 5, 9, 13), 30


def printed(definition: str):
    """The code block of docs/extending.md that defines `definition`, and the object it defines."""
    code = next(block for block in BLOCKS if re.search(rf"^(class|def) {definition}\b", block, re.MULTILINE))
    names: dict[str, Any] = {}
    exec(code, names)
    return code, names[definition]


@pytest.mark.parametrize("definition", ["RepeatDrafter", "same_or_close", "read_lines"])
def test_each_printed_extension_takes_less_than_forty_lines(definition):
    assert len(printed(definition)[0].splitlines()) < 40


def test_the_printed_drafter_is_lossless_and_partly_right():
    target = as_decoder(tiny_llama(0))
    plain = greedy(target, PROMPT, MAX)
    got = speculate(target, printed("RepeatDrafter")[1](), PROMPT, PROMPT, num_draft_tokens=3, max_new_tokens=MAX)
    drafted = [r.proposed for r in got.rounds]
    assert got.token_ids == plain.token_ids
    assert 0 < sum(r.num_accepted for r in got.rounds) < sum(map(len, drafted))


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.6, 2.0])
def test_the_printed_rule_accepts_the_target_s_tokens_and_close_states(threshold):
    torch.manual_seed(3)
    adapter = HiddenAdapter(32, 32, 8)
    torch.nn.init.normal_(adapter.up.weight, std=0.05)
    target = as_decoder(tiny_llama(0))
    proposer = ModelProposer(as_decoder(noisy_copy(tiny_llama(0), 0.3)), adapter, target.lm_head)
    rule = {"accept": printed("same_or_close")[1], "threshold": threshold, "num_draft_tokens": 4, "max_new_tokens": MAX}
    got = speculate(target, proposer, PROMPT, PROMPT, **rule)
    for r in got.rounds[:-1]:  # tokens after EOS do not count in the last
        wanted = [d == s or c > threshold for d, s, c in zip(r.proposed, r.target_tokens, r.cosine, strict=True)]
        leading = wanted.index(False) if False in wanted else len(wanted)
        assert r.accepted == [True] * leading + [False] * (len(wanted) - leading)
    kept = sum(r.num_accepted for r in got.rounds)
    if threshold > 1:  # then only the target's own tokens are accepted
        assert got.token_ids == greedy(target, PROMPT, MAX).token_ids and kept
    if threshold == -1:
        assert kept == sum(len(r.proposed) for r in got.rounds)


def test_the_printed_event_format_is_read_like_any_other(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    events = {"x": rng.integers(0, 40, 500), "y": rng.integers(0, 30, 500), "t": np.sort(rng.integers(0, 50_000, 500))}
    events["p"] = rng.integers(0, 2, 500)
    path = tmp_path / "events.bin"
    path.write_text("\0EVENTS\n" + "".join(f"{x},{y},{t},{p}\n" for x, y, t, p in zip(*events.values(), strict=True)))
    with pytest.raises(UserError, match="not an event file"):
        load_events(path)
    monkeypatch.setitem(event_files.READERS, b"\0EVENTS\n", printed("read_lines")[1])
    found = load_events(path, window_ms=20)
    early = events["t"] < events["t"][0] + 20_000
    assert all(np.array_equal(found[name], events[name][early]) for name in "xytp")
    assert len(event_images(found, 5)) == 5
