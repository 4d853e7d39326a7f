"""One process or many: torchrun starts the same script several times and says so in the environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta


def processes(device: str) -> tuple[int, int, str, Callable[[], None]]:
    """This process's number, how many there are, this one's device, and a call that waits until all have made it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1, device, lambda: None
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=timedelta(days=7))  # the last one may be hours behind the first
    return state.process_index, state.num_processes, str(state.device) if device == "cuda" else device, state.wait_for_everyone
