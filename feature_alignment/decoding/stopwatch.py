"""Wall-clock time per named stage, synchronised with the device it measures."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """`with watch("verify"): …` adds to `watch.ms["verify"]`. Stages must not nest, so that their sum is time that really ran.

    spans: (stage, begin, end) of everything that was measured, in `now`'s milliseconds
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.ms: dict[str, float] = defaultdict(float)
        self.spans: list[tuple[str, float, float]] = []
        self._cuda = torch.device(device).type == "cuda"

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            end = self.now()
            self.ms[stage] += end - start
            self.spans.append((stage, start, end))

    def now(self) -> float:
        """Milliseconds, after everything queued on the device has run."""
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3
