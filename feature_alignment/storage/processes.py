"""Processes that share one output folder: ranks started by torchrun, the device of each, and exclusive locks on outputs."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from feature_alignment.cli.console import UserError
from feature_alignment.cli.ranges import validate_text

log = logging.getLogger(__name__)


class ProcessGroup(NamedTuple):
    """This process among those that torchrun started.

    Args:
        rank: number of this process, from 0
        size: number of processes
        device: device of this process
        wait: blocks until all processes have called it
    """

    rank: int
    size: int
    device: str
    wait: Callable[[], None]


def process_group(device: str) -> ProcessGroup:
    """The processes that torchrun started, or this process alone.

    Args:
        device: setting `--device`; with `cuda`, each process gets a GPU of its own
    """
    check_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ProcessGroup(0, 1, device, lambda: None)
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=timedelta(days=7))  # the slowest process may finish hours after the fastest
    return ProcessGroup(
        state.process_index, state.num_processes, str(state.device) if device == "cuda" else device, state.wait_for_everyone
    )


def check_device(device: str) -> None:
    """Raise UserError unless `device` is cpu or a GPU of this machine. Every script calls it before it loads anything."""
    validate_text("device", device)
    if device == "cpu":
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise UserError(f"--device {device}: torch {torch.__version__} sees no GPU. Pass --device cpu, or install torch's CUDA build.")
    if int(device.partition(":")[2] or 0) >= count:
        raise UserError(f"--device {device}: this machine has {count} GPU(s), cuda:0 to cuda:{count - 1}.")


def check_writable(path: Path) -> None:
    """Raise UserError unless the file `path` can be written, so that hours of work are not lost at their end."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; wanted to write a file there. Remove it, or give another --output_dir.")
    try:
        folder = next(p for p in path.absolute().parents if p.exists() or p.is_symlink())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"nothing can be written to {path.parent} ({error.strerror}). Give an --output_dir that can be written.") from None


@contextmanager
def children_ignore_interrupts() -> Iterator[None]:
    """Let child processes started inside ignore Ctrl-C, which a terminal sends to all: the parent alone reports it and ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold the exclusive lock on the output `path`, and remove temporary files that a killed process left there.

    The operating system releases the lock of a process that dies. `<path>.lock` names the process that holds it and is deleted
    afterwards.

    Args:
        path: file or folder that only this process may write

    Raises:
        UserError: another process holds the lock, or the folder cannot be written
    """
    from filelock import FileLock, Timeout

    lock = path.with_name(path.name + ".lock")
    made = [folder for folder in lock.parents if not folder.exists()]
    held = FileLock(lock, timeout=0)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
        _record_owner(lock, path)
    except Timeout:
        raise UserError(f"{path} is being written by {_name(_owner(lock))}. Wait for it, or give another --output_dir.") from None
    except OSError as error:
        held.release()
        raise UserError(f"nothing can be written to {lock.parent} ({error.strerror}). Give an --output_dir that can be written.") from None
    except UserError:
        held.release()
        raise
    try:
        _remove_temporary_files(path)
        yield
    finally:
        lock.unlink(missing_ok=True)  # before the release: a process that waits for this file notices that it is gone
        held.release()
        for folder in made:  # a refused run leaves no empty folders
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _record_owner(lock: Path, path: Path) -> None:
    """Write this process into a lock file it holds; UserError if the file names a process of another machine, which may still run."""
    owner, host = _owner(lock), socket.gethostname()
    if owner and owner.get("host") != host:
        raise UserError(f"{path} is locked by {_name(owner)}. If that run has ended, type:\n  rm {lock}")
    if owner:
        log.warning("%s was being written by %s, which died; going on.", path, _name(owner))
    try:
        lock.write_text(json.dumps({"pid": os.getpid(), "host": host, "since": time.time()}))
    except OSError:  # the disk is too full for even this
        lock.unlink(missing_ok=True)
        raise


def _owner(lock: Path) -> dict[str, Any] | None:
    """The process recorded in a lock file; None if none is, or if it died while it wrote the file."""
    try:
        found = json.loads(lock.read_bytes()[:1000])
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _name(owner: dict[str, Any] | None) -> str:
    """A recorded process in words, for messages."""
    if not owner or not isinstance(owner.get("since"), int | float) or not 0 < owner["since"] < 1e11:
        return "another process"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
    minutes = (time.time() - owner["since"]) / 60
    return f"process {owner.get('pid')} on {owner.get('host')}, since {when} ({minutes:.1f} minutes)"


def temporary_name(path: Path) -> Path:
    """Name under which this process writes a file before it is renamed to `path`."""
    return path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")


def _remove_temporary_files(path: Path) -> None:
    """Remove unfinished files that a killed process left next to `path` or in it."""
    for leftover in (*path.parent.glob(f".{path.stem}.*.tmp{path.suffix}"), *path.glob(".*.tmp*")):
        leftover.unlink(missing_ok=True)
