"""acceptance.json as other scripts read it: only if it measured their split, and the adapters and hidden states that are there now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from feature_alignment.cli.advice import command_for
from feature_alignment.cli.console import UserError
from feature_alignment.measurement.records import read_record
from feature_alignment.measurement.reports import AcceptanceReport
from feature_alignment.storage.files import file_hash

ADAPTERS = {"adapter": "adapter", "chained": "chained_adapter", "attending": "attending_adapter"}  # name in acceptance.json -> folder


def current_acceptance(out: Path, split: str, adapters: Sequence[str], num_draft_tokens: int) -> AcceptanceReport:
    """The measured acceptance of a run.

    Args:
        out: folder of the run's outputs
        split: split of the script that reads it
        adapters: keys of `ADAPTERS`; those that are not trained may be missing
        num_draft_tokens: draft length that it must have been measured at

    Raises:
        UserError: nothing is measured, or another split, draft length, adapter or extraction was
    """
    path = out / "acceptance" / "acceptance.json"
    again = command_for("measure_feature_acceptance", split=split, num_draft_tokens=num_draft_tokens)
    report = read_record(path, AcceptanceReport, again)
    measured = report.meta["made_from"]
    files = {name: out / ADAPTERS[name] / "adapter.pt" for name in adapters} | {"test": out / "hidden_states" / split / "meta.json"}
    found = {name: file for name, file in files.items() if file.is_file()}
    differs = []
    if report.meta["split"] != split:
        differs.append(f"split {report.meta['split']!r}, wanted {split!r}")
    elif "test" in found and measured["test"] != file_hash(found["test"]):
        differs.append(f"other hidden states than those at {found['test'].parent}")
    if report.num_draft_tokens != num_draft_tokens:
        differs.append(f"draft length {report.num_draft_tokens}, wanted {num_draft_tokens}")
    for name in (name for name in adapters if name in found):
        if name not in measured:
            differs.append(f"no {found[name]}")
        elif measured[name] != file_hash(found[name]):
            differs.append(f"another adapter than {found[name]}")
    if differs:
        raise UserError(f"{path} measured {'; '.join(differs)}. Measure again:\n  {again}")
    return report
