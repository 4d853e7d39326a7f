"""Event files of every kind as raw arrays. The format is recognized from the content, never from the suffix; docs/formats.md lists them.

Each reader returns what the file says, or a way to read any part of it; `events.load_events` brings it into one form.
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
READERS: dict[bytes, Reader] = {  # by a file's first bytes: path, start_us, window_us -> events
    b"\x93NUMPY": read_npy,
    b"PK": read_zip,
    SIGNATURE: read_h5,
    b"#!AER-DAT4": read_aedat4,
    b"%": read_prophesee,
}
_OTHERS = {  # formats that are named and not read
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
    """Read any known event file, of long ones only [start_us, start_us + window_us) after their first event.

    time_unit: what the file's times are in; None: what it states, or what they are recognized as
    raises:    UserError for a missing, unknown, truncated, hostile or inconsistent file, or a library that is not installed
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
        if head.startswith(first_bytes) and not head.startswith(b"%geometry"):
            return read
    if is_h5(path, head):
        return read_h5
    for first_bytes, (what, remedy) in _OTHERS.items():
        if head.startswith(first_bytes):
            version = head[9:12].decode("latin-1").strip()
            raise UserError(f"{path} is not an event file this project reads: it is {what.format(version)}. {remedy}")
    if is_text(head):
        return read_text
    raise UserError(f"{path} is not an event file this project knows (it starts with {head[:12]!r}); known: {_KNOWN}.")


def save_events(path: Path, stream: dict[str, np.ndarray]) -> None:
    """Write a stream as EventGPT's own `.npy`: a dict in an object array, which NumPy can only pickle. Writing runs nothing; files
    are read back through the restricted unpickler, never through NumPy's."""
    np.save(path, np.array(stream, dtype=object), allow_pickle=True)
