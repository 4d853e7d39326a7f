"""Weights in huge pages: moved where Linux can, unchanged in content, and left alone elsewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from feature_alignment.models import huge_pages, packed
from feature_alignment.models.huge_pages import HUGE_PAGE, use_huge_pages

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes(address: int) -> int:
    """Bytes in huge pages of the mapping that holds an address."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(found[1], 16) <= address < int(found[2], 16)
        elif here and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    return 0


@pytest.mark.skipif(not ENABLED.is_file() or "[never]" in ENABLED.read_text(), reason="this kernel gives no huge pages")
def test_weights_move_into_huge_pages_and_stay_what_they_are():
    weight = torch.arange(8 * HUGE_PAGE, dtype=torch.float32)
    address, before = weight.data_ptr(), huge_bytes(weight.data_ptr())
    if not use_huge_pages(address, weight.nbytes):
        pytest.skip("this kernel is older than Linux 6.1, or has no huge page free")
    assert huge_bytes(address + HUGE_PAGE) >= max(before, 31 * HUGE_PAGE)
    assert weight.data_ptr() == address and torch.equal(weight, torch.arange(8 * HUGE_PAGE, dtype=torch.float32))


def test_only_whole_huge_pages_within_the_memory_are_asked_for(monkeypatch):
    asked = []

    class Libc:
        @staticmethod
        def madvise(address, size, advice):
            asked.append((address, size, advice))
            return 0

    monkeypatch.setattr(huge_pages.ctypes, "CDLL", lambda name: Libc)
    monkeypatch.setattr(sys, "platform", "linux")
    assert use_huge_pages(HUGE_PAGE - 4, 3 * HUGE_PAGE)
    assert asked == [(HUGE_PAGE, 2 * HUGE_PAGE, 14), (HUGE_PAGE, 2 * HUGE_PAGE, 25)]
    assert not use_huge_pages(HUGE_PAGE + 4, 2 * HUGE_PAGE - 8) and len(asked) == 2
    monkeypatch.setattr(Libc, "madvise", staticmethod(lambda *_: -1))
    assert not use_huge_pages(0, HUGE_PAGE), "refused"
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(Libc, "madvise", staticmethod(lambda *_: 0))
    assert not use_huge_pages(0, HUGE_PAGE)


def test_both_kinds_of_weights_are_moved_before_their_trial(monkeypatch):
    moved = []
    monkeypatch.setattr(packed, "use_huge_pages", lambda address, size: moved.append((address, size)))
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Linear(512, 128))
    milliseconds = packed._milliseconds
    monkeypatch.setattr(packed, "_milliseconds", lambda *ways: moved.append("trial") or milliseconds(*ways))
    monkeypatch.setattr(packed, "TRIAL_SECONDS", 0.0)
    packed.best_cpu_linear(model)
    weights = [(layer.weight.data_ptr(), layer.weight.nbytes) for layer in model]
    before = moved[: moved.index("trial")]
    assert before[:2] == weights and [size for _, size in before[2:]] == [size for _, size in weights]
    assert not {address for address, _ in before[2:]} & {address for address, _ in weights}, "the copies' own memory"
