"""One process or many: torchrun starts the same script several times and says so in the environment; what one process writes, no
other may write at the same time.
"""

from __future__ import annotations

import fcntl
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
from typing import Any

from feature_alignment.cli.console import UserError
from feature_alignment.cli.ranges import validate_text

log = logging.getLogger(__name__)


def process_group(device: str) -> tuple[int, int, str, Callable[[], None]]:
    """This process's number, how many there are, this one's device, and a call that waits until all have made it."""
    check_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1, device, lambda: None
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=timedelta(days=7))  # the last one may be hours behind the first
    return state.process_index, state.num_processes, str(state.device) if device == "cuda" else device, state.wait_for_everyone


def check_device(device: str) -> None:
    """Raise UserError unless `device` is cpu, or a GPU of this machine. Every script calls it before anything is loaded."""
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
    """Raise UserError unless the file `path` can be written: before hours of work, not after. Leaves nothing behind."""
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
    """Child processes started inside ignore Ctrl-C, which a terminal sends to all: only the parent reports it, and ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """What is written at `path` is ours alone while this lasts. `<path>.lock` says whose it is; the kernel lets go of it when its
    process ends, however it ends, so a lock that can be had again was left by a process that died.

    raises: UserError that names the owner and since when, or a folder that cannot be written
    """
    lock = path.with_name(path.name + ".lock")
    made = [folder for folder in lock.parents if not folder.exists()]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        stream = _take(lock, path)
    except OSError as error:
        raise UserError(f"nothing can be written to {lock.parent} ({error.strerror}). Give an --output_dir that can be written.") from None
    try:
        _sweep(path)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(stream)
        for folder in made:  # a refused run leaves no empty folders behind
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _take(lock: Path, path: Path) -> int:
    """The open, locked file at `lock`, with our name in it."""
    host = socket.gethostname()
    while True:
        stream = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(stream)
            os.close(stream)
            raise UserError(f"{path} is being written by {_name(owner)}. Wait for it, or give another --output_dir.") from None
        if lock.is_file() and os.fstat(stream).st_ino == lock.stat().st_ino:
            break
        os.close(stream)  # its owner removed it between our opening and locking it
    owner = _owner(stream)
    if owner and owner.get("host") != host:  # a shared disk: whether it still runs cannot be seen from here
        os.close(stream)
        raise UserError(f"{path} was claimed by {_name(owner)}. If that run has ended, type:\n  rm {lock}")
    if owner:
        log.warning("%s was being written by %s, which died; going on.", path, _name(owner))
    os.ftruncate(stream, 0)
    try:
        os.pwrite(stream, json.dumps({"pid": os.getpid(), "host": host, "since": time.time()}).encode(), 0)
    except OSError:  # a disk so full that not even a name fits
        lock.unlink(missing_ok=True)
        os.close(stream)
        raise
    return stream


def _owner(stream: int) -> dict[str, Any] | None:
    """Who wrote the lock; None for one that does not say."""
    content = os.pread(stream, 1000, 0)
    try:
        found = json.loads(content) if content else None
        return found if isinstance(found, dict) else None
    except ValueError:
        return None  # half written: its process died while doing so


def _name(owner: dict[str, Any] | None) -> str:
    if not owner or not isinstance(owner.get("since"), int | float) or not 0 < owner["since"] < 1e11:
        return "another process"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
    minutes = (time.time() - owner["since"]) / 60
    return f"process {owner.get('pid')} on {owner.get('host')}, since {when} ({minutes:.1f} minutes)"


def temporary_name(path: Path) -> Path:
    """Where this process writes a file before it gets its name."""
    return path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")


def _sweep(path: Path) -> None:
    """Remove what a killed owner left half written at `path` or in it."""
    for leftover in (*path.parent.glob(f".{path.stem}.*.tmp{path.suffix}"), *path.glob(".*.tmp*")):
        leftover.unlink(missing_ok=True)
