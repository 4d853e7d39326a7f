"""Milliseconds per named stage. On a GPU, stages are marked by CUDA events, so that measuring does not synchronize the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """`with watch("verify"): …` adds to `watch.ms["verify"]`. Stages must not nest, so that their sum is elapsed time."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._ms: dict[str, float] = defaultdict(float)
        self._spans: list[tuple[str, float, float]] = []
        self._pending: list[tuple[str, Any, Any]] = []  # stage, and its begin and end that have not been read yet
        self._cuda = torch.device(device).type == "cuda"
        if self._cuda:
            self._origin = self.now(), self._event()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        mark = self._event if self._cuda else self.now
        begin = mark()
        try:
            yield
        finally:
            self._pending.append((stage, begin, mark()))

    @property
    def ms(self) -> dict[str, float]:
        """Milliseconds of each stage so far."""
        self._read_pending()
        return self._ms

    @property
    def spans(self) -> list[tuple[str, float, float]]:
        """(stage, begin, end) of every measured interval, in milliseconds on the clock of `now`."""
        self._read_pending()
        return self._spans

    def now(self) -> float:
        """Milliseconds, after everything queued on the device has run."""
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3

    def _read_pending(self) -> None:
        for stage, begin, end in self._pending:
            if self._cuda:
                end.synchronize()
                origin_ms, origin = self._origin
                begin, end = origin_ms + origin.elapsed_time(begin), origin_ms + origin.elapsed_time(end)
            self._ms[stage] += end - begin
            self._spans.append((stage, begin, end))
        self._pending = []

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
