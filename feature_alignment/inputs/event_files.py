"""Read event files of all known formats. The format is recognized from the content, not from the suffix; docs/formats.md lists them.

Each reader returns the stored arrays, or a way to read any part of them; `events.load_events` normalizes them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from feature_alignment.cli.console import UserError
from feature_alignment.inputs.event_arrays import read_npy, read_zip
from feature_alignment.inputs.event_cameras import read_aedat4, read_prophesee
from feature_alignment.inputs.event_h5 import SIGNATURE, is_h5, read_h5
from feature_alignment.inputs.event_text import is_text, read_text
from feature_alignment.inputs.event_units import NAMES, TimeUnit
from feature_alignment.inputs.event_windows import EventBlocks, EventTable, RawEvents, read_blocks, read_table

__all__ = ["READERS", "RawEvents", "read_event_file", "save_events"]

Reader = Callable[[Path, int, int | None], RawEvents | EventTable | EventBlocks]
READERS: dict[bytes, Reader] = {  # first bytes of a file -> reader(path, start_us, window_us)
    b"\x93NUMPY": read_npy,
    b"PK": read_zip,
    SIGNATURE: read_h5,
    b"#!AER-DAT4": read_aedat4,
    b"%": read_prophesee,
}
_UNSUPPORTED = {  # known formats that are not read
    b"#!AER-DAT": ("AEDAT {} of jAER or cAER", "Convert it to AEDAT4 with DV, or to text with jAER."),
    b"#ROSBAG": ("a ROS bag", "Extract its events to HDF5 or text first, for example with rpg_e2vid's extract_events_from_rosbag."),
    b"Event Stream": ("an Event Stream .es file", "Convert it to CSV or AEDAT4 with `faery` or `event_stream`."),
    b"MATLAB 5.0": ("a MATLAB 5 file", "Save it again with `save -v7.3` (HDF5), as text, or as .npz."),
    b"\x80\x04": ("a bare pickle", "Write its arrays with np.savez('events.npz', x=x, y=y, t=t, p=p)."),
}
_KNOWN = (
    "NumPy .npy and .npz (EventGPT, N-ImageNet, ...), HDF5 (DSEC, MVSEC, M3ED, v2e, Metavision), text (t x y p), "
    "Prophesee .dat and .raw in EVT2, EVT2.1 or EVT3, iniVation .aedat4"
)


def read_event_file(path: Path, start_us: int = 0, window_us: int | None = None, time_unit: TimeUnit | None = None) -> RawEvents:
    """Read an event file of any known format; of a long one, only the window.

    Args:
        path: Event file.
        start_us: Start of the window after the first event.
        window_us: Length of the window; None for all events.
        time_unit: Unit of the file's times; None for the stated or recognized unit.

    Raises:
        UserError: For a missing, unknown, truncated, unsafe or inconsistent file, or a library that is not installed.
    """
    if not path.is_file():
        raise UserError(f"no event file at {path}; --events wants an EventGPT .npy, .npz, DSEC .h5, Prophesee .dat or .raw, or .aedat4.")
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    found = _reader(path, head)(path, start_us, window_us)
    if isinstance(found, EventTable):
        try:
            return read_table(found, str(path), start_us, window_us, time_unit)
        finally:
            found.close()
    if isinstance(found, EventBlocks):
        return read_blocks(found, str(path), start_us, window_us, time_unit)
    if time_unit not in (None, "us"):
        raise UserError(f"{path} has times in microseconds, but --event_time_unit {time_unit} ({NAMES[time_unit]}) was given.")
    return found


def _reader(path: Path, head: bytes) -> Reader:
    for first_bytes, read in READERS.items():
        if head.startswith(first_bytes) and not (first_bytes == b"%" and is_text(head)):  # comments of a text may begin with "%"
            return read
    if is_h5(path, head):
        return read_h5
    for first_bytes, (what, remedy) in _UNSUPPORTED.items():
        if head.startswith(first_bytes):
            version = head[9:12].decode("latin-1").strip()
            raise UserError(f"{path} is not an event file this project reads: it is {what.format(version)}. {remedy}")
    if is_text(head):
        return read_text
    raise UserError(f"{path} is not an event file this project knows (it starts with {head[:12]!r}); known: {_KNOWN}.")


def save_events(path: Path, stream: dict[str, np.ndarray]) -> None:
    """Write a stream as EventGPT's `.npy`: a dict in an object array.

    NumPy can only pickle such an array. Writing a pickle is safe; files are read back by the restricted unpickler, not by NumPy's.

    Args:
        path: File to write.
        stream: x, y, t, p, each [n].
    """
    np.save(path, np.array(stream, dtype=object), allow_pickle=True)
