"""Read HDF5 event files: DSEC, MVSEC, M3ED, v2e, Metavision, and others with the same layouts under other names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from feature_alignment.cli.console import UserError
from feature_alignment.inputs.event_columns import columns_by_name, order_of
from feature_alignment.inputs.event_units import TimeUnit
from feature_alignment.inputs.event_windows import EVENT_FIELDS, EventTable

INSTALL = "pip install -e '.[events]'"
SIGNATURE = b"\x89HDF\r\n\x1a\n"
MAX_CHUNK_BYTES = 1 << 26  # HDF5 unpacks a whole chunk to read one number
_ECF = 0x8ECF  # Prophesee's own compression, which no Python package can read
_GROUPS = (  # candidates in order; of a stereo rig, the left camera first
    "events",
    "CD/events",
    "davis/left/events",
    "prophesee/left",
    "davis/events",
    "dvs/events",
    "davis/right/events",
    "prophesee/right",
    "",
)


def is_h5(path: Path, head: bytes) -> bool:
    """Whether a file is HDF5; after a user block, its signature is at byte 512, 1024, 2048, ..."""
    if head.startswith(SIGNATURE):
        return True
    size, at = path.stat().st_size, 512
    with open(path, "rb") as file:
        while at < min(size, 1 << 26):
            file.seek(at)
            if file.read(8) == SIGNATURE:
                return True
            at *= 2
    return False


def read_h5(path: Path, *_: Any) -> EventTable:
    """Read the events of an HDF5 file; the file's `t_offset` is added to t.

    Raises:
        UserError: For another layout, a missing library, or a compression that only Metavision can read.
    """
    try:
        import h5py
        import hdf5plugin  # noqa: F401  registers the blosc codec DSEC is compressed with
    except ImportError as error:
        raise UserError(f"{path} is HDF5, and {error.name} is not installed. Type:\n  {INSTALL}") from None
    file = None
    try:
        file = h5py.File(path, "r")
        table = _find(file, path, h5py)
        if table is None:
            raise UserError(
                f"{path} holds {sorted(file)[:20]}; wanted DSEC's layout: events/x, events/y, events/t, events/p, "
                "or a table in `events` (v2e), `davis/left/events` (MVSEC), `prophesee/left` (M3ED) or `CD/events` (Metavision)."
            )
        return _guarded(table, path, file)
    except BaseException as error:
        if file is not None:
            file.close()
        if isinstance(error, UserError) or not isinstance(error, Exception):
            raise
        raise _unreadable(path, error) from None  # the library raises many different errors


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} could not be read: {str(error)[:300]}\nIf it names a filter or a plugin, type:\n  {INSTALL}")


def _guarded(table: EventTable, path: Path, file: Any) -> EventTable:
    """The table with errors of the library turned into UserErrors; closing it closes the file."""

    def guard(read: Any) -> Any:
        def guarded(rows: slice) -> Any:
            try:
                return read(rows)
            except Exception as error:
                raise _unreadable(path, error) from None

        return guarded

    return EventTable(
        table.count, guard(table.times), guard(table.rows), table.sensor_hw, table.unit, table.offset, table.row_bytes, file.close
    )


def _find(file: Any, path: Path, h5py: Any) -> EventTable | None:
    for group_path in _GROUPS:
        node = file
        for part in filter(None, group_path.split("/")):
            node = _own(node, part, (h5py.Group, h5py.Dataset)) if isinstance(node, h5py.Group) and part in node else None
            if node is None:
                break
        if isinstance(node, h5py.Group) and (table := _group(node, file, path, h5py)):
            return table
        if isinstance(node, h5py.Dataset) and (table := _dataset(node, group_path, path)):
            return table
    return None


def _own(group: Any, name: str, kinds: tuple[type, ...]) -> Any:
    """A group or dataset of this file; ValueError for a link into another file."""
    if type(group.get(name, getlink=True)).__name__ != "HardLink" or not isinstance(group[name], kinds):
        raise ValueError(f"{name} is not a {kinds[0].__name__.lower()} of this file")
    return group[name]


def _group(group: Any, file: Any, path: Path, h5py: Any) -> EventTable | None:
    """The events of a group with four datasets."""
    named = columns_by_name(group)
    if named is None:
        return None
    columns = {k: _column(_own(group, named[0][k], (h5py.Dataset,))) for k in EVENT_FIELDS}
    lengths = {k: c.shape for k, c in columns.items()}
    if len(set(lengths.values())) != 1 or len(columns["t"].shape) != 1:
        raise UserError(f"{path}: x, y, t, p must be flat and equally long, got shapes {lengths}.")
    has_offset, has_index = "t_offset" in file, any(k in file or k in group for k in ("ms_to_idx", "ms_map_idx"))
    whole = columns["t"].dtype.kind in "iu"
    unit: TimeUnit | None = named[1] or ("us" if (has_offset or has_index) and whole else None)  # names that only DSEC and M3ED use
    return EventTable(
        len(columns["t"]),
        times=lambda rows: columns["t"][rows],
        rows=lambda rows: {k: c[rows] for k, c in columns.items()},
        sensor_hw=_sensor(group, file, h5py),
        unit=unit,
        offset=_offset(file, h5py) if has_offset else 0,
        row_bytes=sum(c.dtype.itemsize for c in columns.values()),
    )


def _offset(file: Any, h5py: Any) -> int:
    """DSEC's `t_offset`: one number, in whatever shape."""
    value = np.asarray(_own(file, "t_offset", (h5py.Dataset,))[()])
    if value.size != 1 or value.dtype.kind not in "iuf" or not np.isfinite(value).all():
        raise ValueError(f"t_offset holds {value.size} values of type {value.dtype}; wanted one number")
    return int(value.item())


def _dataset(dataset: Any, group_path: str, path: Path) -> EventTable | None:
    """The events of one dataset: rows with fields, or a table [n, 4] whose order is recognized from its content."""
    if dataset.id.get_create_plist().get_nfilters() and _ECF in _filters(dataset):
        raise UserError(
            f"{path} is a Metavision recording compressed with ECF, which only Prophesee's SDK reads. Convert it with one of:\n"
            f"  metavision_file_to_dat -i {path.name}\n  metavision_file_to_csv -i {path.name}"
        )
    _refuse_external(dataset)
    if dataset.dtype.names:
        named = columns_by_name(dataset.dtype.names)
        if named is None or len(dataset.shape) != 1 or any(dataset.dtype[v].kind not in "iufb" for v in named[0].values()):
            return None
        names = named[0]
        return EventTable(
            len(dataset),
            times=lambda rows: dataset[rows][names["t"]],
            rows=lambda rows: (lambda part: {k: part[names[k]] for k in EVENT_FIELDS})(dataset[rows]),
            sensor_hw=_sensor_of_attributes(dataset, dataset.file),
            unit="us" if group_path == "CD/events" else named[1],
            row_bytes=dataset.dtype.itemsize,
        )
    if len(dataset.shape) != 2 or dataset.shape[1] != 4 or dataset.dtype.kind not in "iuf":
        return None
    head = dataset[: min(len(dataset), 4096)]
    order = order_of([head[:, i] for i in range(4)], str(path))
    return EventTable(
        len(dataset),
        times=lambda rows: dataset[rows, order.index("t")],
        rows=lambda rows: (lambda part: {k: part[:, order.index(k)] for k in EVENT_FIELDS})(dataset[rows]),
        sensor_hw=_sensor_of_attributes(dataset, dataset.file),
        row_bytes=4 * dataset.dtype.itemsize,
    )


def _filters(dataset: Any) -> set[int]:
    properties = dataset.id.get_create_plist()
    return {properties.get_filter(i)[0] for i in range(properties.get_nfilters())}


def _column(dataset: Any) -> Any:
    """A dataset of numbers, checked to be stored in this file in chunks of moderate size."""
    _refuse_external(dataset)
    if dataset.dtype.kind not in "iufb":
        raise ValueError(f"{dataset.name} holds {dataset.dtype}; wanted numbers")
    return dataset


def _refuse_external(dataset: Any) -> None:
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"{dataset.name} is stored in another file")
    if dataset.chunks and math.prod(dataset.chunks) * dataset.dtype.itemsize > MAX_CHUNK_BYTES:
        raise ValueError(f"{dataset.name} has chunks of {dataset.chunks} numbers; at most {MAX_CHUNK_BYTES:,} bytes are unpacked at once")


def _sensor(group: Any, file: Any, h5py: Any) -> tuple[int, int] | None:
    """Height and width that the file states next to its events, as datasets or attributes."""
    if "width" in group and "height" in group:
        sides = [np.asarray(_own(group, side, (h5py.Dataset,))[()]).ravel() for side in ("height", "width")]
        return _sides(*sides)
    return _sensor_of_attributes(group, file)


def _sensor_of_attributes(*nodes: Any) -> tuple[int, int] | None:
    for node in nodes:
        if "width" in node.attrs and "height" in node.attrs:
            return _sides(*(np.asarray(node.attrs[side]).ravel() for side in ("height", "width")))
        geometry = node.attrs.get("geometry")  # of Metavision: 1280x720
        text = geometry.decode("latin-1") if isinstance(geometry, bytes) else str("" if geometry is None else geometry)
        width, _, height = text.partition("x")
        if width.isdigit() and height.isdigit() and len(text) < 12:
            return int(height), int(width)
    return None


def _sides(height: np.ndarray, width: np.ndarray) -> tuple[int, int] | None:
    numbers = [side[0].item() for side in (height, width) if side.size == 1 and side.dtype.kind in "iuf" and np.isfinite(side).all()]
    return (int(numbers[0]), int(numbers[1])) if len(numbers) == 2 and min(numbers) > 0 else None
