"""Reading the drafter's prompts in a second thread while the target reads its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def drafter_reading(read: Callable[[], None], device: torch.device, overlap: bool) -> Iterator[Future[None] | None]:
    """With `overlap`, the drafter reads in a second thread while the block runs, which awaits the yielded future before it drafts.

    The thread has ended when the block has. An error of the block is raised after that, with a note if the drafter failed as well.

    Args:
        read: reads the drafter's prompts
        device: of the drafter
        overlap: otherwise nothing is read, and None is yielded
    """
    reading = _in_thread(device, read) if overlap else None
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
    stream = _stream_of(device) if device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))  # what the drafter read last may still be in use

    def run() -> None:
        with torch.cuda.stream(stream):  # None changes nothing
            call()
            if stream is not None:
                stream.synchronize()

    pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
    future = pool.submit(run)
    pool.shutdown(wait=False)
    return future


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """One stream per device: memory is kept per stream, and with a new one for each prompt it would grow."""
    return torch.cuda.Stream(device)
