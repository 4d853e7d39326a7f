"""Time per named stage, as the device spent it. A GPU is not made to wait for the watch: it notes the moments itself, as events."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """`with watch("verify"): …` adds to `watch.ms["verify"]`. Stages must not nest, so that their sum is time that really ran."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._ms: dict[str, float] = defaultdict(float)
        self._spans: list[tuple[str, float, float]] = []
        self._noted: list[tuple[str, Any, Any]] = []  # stage and the events at its ends, not read off yet
        self._cuda = torch.device(device).type == "cuda"
        if self._cuda:
            self._began = self.now(), self._event()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        mark = self._event if self._cuda else self.now
        begin = mark()
        try:
            yield
        finally:
            self._noted.append((stage, begin, mark()))

    @property
    def ms(self) -> dict[str, float]:
        """Milliseconds of each stage so far."""
        self._read_off()
        return self._ms

    @property
    def spans(self) -> list[tuple[str, float, float]]:
        """(stage, begin, end) of everything that was measured, in `now`'s milliseconds."""
        self._read_off()
        return self._spans

    def now(self) -> float:
        """Milliseconds, after everything queued on the device has run."""
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3

    def _read_off(self) -> None:
        for stage, begin, end in self._noted:
            if self._cuda:
                end.synchronize()
                zero_ms, zero = self._began
                begin, end = zero_ms + zero.elapsed_time(begin), zero_ms + zero.elapsed_time(end)
            self._ms[stage] += end - begin
            self._spans.append((stage, begin, end))
        self._noted = []

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
