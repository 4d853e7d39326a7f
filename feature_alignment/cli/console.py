"""Console output and exit codes: logs on stderr, results on stdout, errors that the user can fix as one message.

Exit codes: 0 success; 2 an error that the user can fix (wrong setting, damaged file, full disk, too little memory), reported in one
message; 130 Ctrl-C; 143 SIGTERM. Outputs are published atomically: a file under its final name is always complete.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import shutil
import signal
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

log = logging.getLogger(__name__)
STDOUT = "standard output"
TABLE_WIDTH = 100  # characters a table may be wide


_quiet = False


class UserError(Exception):
    """An error that the user can fix. The message says what was found, what was expected and which command to run next."""


def set_quiet(quiet: bool) -> None:
    """Print results and errors only (`quiet`), or logs and progress bars as well."""
    global _quiet
    _quiet = quiet
    logging.disable(logging.WARNING if quiet else logging.NOTSET)


def progress(iterable: Iterable[Any] | None = None, first: bool = True, **about: Any) -> Any:
    """A progress bar on stderr with rate and remaining time; nothing if stderr is no terminal, or with --quiet.

    Args:
        iterable: what to iterate over; without it, call `update` on the result
        first: whether this is the one process of the run that prints
        **about: `total`, `initial`, `desc`, `unit` of tqdm
    """
    from tqdm import tqdm

    return tqdm(iterable, disable=None if first and not _quiet else True, **about)


def run(main: Callable[[], object]) -> None:
    """Run a script's `main` and end with one of the exit codes above. SIGTERM, like Ctrl-C, removes locks and temporary files."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("transformers", "httpx", "matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.ERROR)

    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without a letter of an answer shows its number
        sys.stdout.reconfigure(errors="backslashreplace")

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    interrupts = _count_interrupts()
    try:
        try:
            main()
        finally:  # also after --help and --print_config, which exit
            with file_named(STDOUT):
                sys.stdout.flush()
    except UserError as error:
        _stop(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if interrupts:  # a library turned the KeyboardInterrupt into an error of its own
            sys.exit(130)
        _explain(error)


def run_module(name: str) -> NoReturn:
    """Import a module and `run` its `main`, so that Ctrl-C during a slow import ends without a traceback too."""
    run(lambda: import_module(name).main())
    sys.exit()


def _count_interrupts() -> list[int]:
    """Install a handler that records each Ctrl-C in the returned list and raises KeyboardInterrupt as Python's own does."""
    seen: list[int] = []

    def interrupted(number: int, _: object) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a parent process has it ignored
        signal.signal(signal.SIGINT, interrupted)
    return seen


def _explain(error: Exception) -> NoReturn:
    """End with exit code 2 if the disk, a permission or memory is missing; raise any other error again."""
    if isinstance(error, BrokenPipeError):  # `… | head` closed standard output, which is no error of this program
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    if isinstance(error, OSError):
        _stop(f"{disk_error(error)}. Files under their final names are complete; fix the cause and run the same command again.")
    signs = ("not enough memory", "out of memory", "defaultcpuallocator", "storage size calculation overflowed")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)):
        _stop(f"not enough memory ({str(error)[:200]}). Use smaller sizes or a smaller --batch_size.")
    raise error


@contextmanager
def file_named(path: Path | str) -> Iterator[None]:
    """Add `path` to an OSError raised inside: a failed write, unlike a failed open, does not name its file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def disk_error(error: OSError) -> str:
    """The file and the cause of an error; for a full disk also its mount point and free bytes."""
    said = f"{error.filename or 'a file or standard output'}: {error.strerror or error}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or error.filename in (None, STDOUT):
        return said
    folder = next((p for p in Path(error.filename).absolute().parents if p.is_dir()), None)
    if folder is None:
        return said
    disk = next(p for p in (folder, *folder.parents) if p.is_mount())
    return f"{said}; its disk, mounted at {disk}, has {shutil.disk_usage(disk).free:,} bytes free"


def _stop(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


_repairs: dict[str, dict[str, str]] = {}  # file -> kind -> message


def record_repair(path: str | Path, kind: str, message: str) -> None:
    """Log once that the content of an input file was repaired, and count it in the `meta` of every result made from the file.

    Args:
        path: input file
        kind: name under which repairs are counted, a few words
        message: what was changed, with numbers
    """
    known = _repairs.setdefault(str(path), {})
    if known.get(kind) != message:
        known[kind] = message
        log.warning("%s: %s", path, message)


def repairs_of(*paths: str | Path) -> list[str]:
    """The kinds of repairs made in these files."""
    return [kind for path in paths for kind in _repairs.get(str(path), {})]


def repaired_files() -> dict[str, int]:
    """Kind -> number of files that this process has repaired."""
    return dict(Counter(kind for kinds in _repairs.values() for kind in kinds))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print an aligned plain-text table on stdout, at most TABLE_WIDTH characters wide.

    Columns that do not fit follow in a block below, which repeats the first column; long texts are folded.

    Args:
        title: line above the table
        header: names of the columns
        rows: one value per column each; floats get four digits, or two from 10 on
    """
    cells = [list(map(str, header)), *[[_cell(c) for c in row] for row in rows]]
    first = max(len(row[0]) for row in cells)
    folded = [[[row[0]], *(textwrap.wrap(c, max(20, TABLE_WIDTH - first - 4)) or [""] for c in row[1:])] for row in cells]
    widths = [max(len(line) for row in folded for line in row[i]) for i in range(len(header))]
    text = [any(len(row[i]) > 1 for row in folded) for i in range(len(header))]
    blocks: list[list[int]] = [[0]]
    for i in range(1, len(header)):
        if len(blocks[-1]) > 1 and 2 + sum(widths[k] + 2 for k in blocks[-1]) + widths[i] > TABLE_WIDTH:
            blocks.append([0])
        blocks[-1].append(i)
    print(f"\n{title}")
    for block in blocks:
        for n, row in enumerate(folded):
            for line in zip_longest(*(row[i] for i in block), fillvalue=""):
                parts = (c.ljust(widths[i]) if i == 0 or text[i] else c.rjust(widths[i]) for i, c in zip(block, line, strict=True))
                print("  " + "  ".join(parts).rstrip())
            if n == 0:
                print("  " + "  ".join("-" * widths[i] for i in block))
        if block is not blocks[-1]:
            print()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown, with values formatted as in `print_table`."""
    lines = [header, ["---"] * len(header), *[[_cell(c) for c in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
    return str(value)


def rate_text(rate: dict[str, Any], digits: int = 4, scale: float = 1.0, unit: str = "") -> str:
    """A rate as text, `value unit [low, high]`.

    Args:
        rate: {"value", "ci95"}; a value of None or NaN, which was not measured, becomes a dash
        digits: digits after the decimal point
        scale: factor, e.g. 100 for percent
        unit: text after the value
    """
    numbers = [None if x is None or x != x else f"{scale * x:.{digits}f}" for x in (rate["value"], *rate["ci95"])]
    if numbers[0] is None:
        return "-"
    return f"{numbers[0]}{unit}" + ("" if None in numbers else f" [{numbers[1]}, {numbers[2]}]")


def print_json_line(summary: dict[str, Any]) -> None:
    """Print the last line on stdout, one JSON object that programs can read."""
    print(json.dumps(finite(summary), allow_nan=False, separators=(", ", ": ")))


def finite(value: Any) -> Any:
    """A JSON value with infinities and NaN as null, which strict JSON cannot hold."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
