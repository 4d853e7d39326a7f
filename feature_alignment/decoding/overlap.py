"""Reading the drafter's prompt in a second thread while the target reads its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from feature_alignment.decoding.proposers import Proposer
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.models.state import Prompt


@contextmanager
def drafter_reading(
    proposer: Proposer, prompt: Prompt, watch: Stopwatch, device: torch.device, overlap: bool
) -> Iterator[Future[None] | None]:
    """With `overlap`, the drafter reads its prompt in a second thread while the block runs.

    The thread has ended when the block has. An error of the block is raised after that, with a note if the drafter failed as well.
    """
    reading = _in_thread(device, lambda: proposer.start(prompt, watch)) if overlap else None
    try:
        yield reading
    except BaseException as error:
        if reading is not None and (other := reading.exception()) is not None and other is not error:
            error.add_note(f"the drafter also failed, while reading its own prompt: {type(other).__name__}: {other}")
        raise


def _in_thread(device: torch.device, call: Callable[[], None]) -> Future[None]:
    """Run a call in a second thread, on a GPU on a stream of its own; torch releases Python's lock during products.

    The thread uses as many torch threads as this one.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run() -> None:
        with torch.cuda.stream(stream):  # None changes nothing
            call()
            if stream is not None:
                stream.synchronize()

    pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
    future = pool.submit(run)
    pool.shutdown(wait=False)
    return future
