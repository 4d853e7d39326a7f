"""What a file holds and what made it.

Tensors are `.pt` files that open with `torch.load(path, mmap=True, weights_only=True)`; beside each file or directory lies a
`meta.json`. Everything is written under a temporary name and renamed, so a final name always means a complete file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from feature_alignment.config import Common, as_plain
from feature_alignment.console import UserError, finite

SCHEMA = 2  # of the JSON files: what an older version left is made anew, not reused
Module = TypeVar("Module", bound=nn.Module)
EVENT_STATES = "egpt_event_states.pt"
EXTRACT = "python feature_alignment/extract_hidden_states.py --config configs/demo.yaml --split {split}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it on success and removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, content: Any) -> None:
    """JSON with `inf` and `nan` as null, so that every reader accepts it."""
    write_text(path, json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


def read_json(path: Path, make_it: str) -> Any:
    """A JSON file, or a UserError that names the command that makes it."""
    if not path.is_file():
        raise UserError(f"{path} is not there. Make it first:\n  {make_it}")
    try:
        return json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}). Make it again:\n  {make_it}") from None


def load_pt(path: Path, make_it: str) -> Any:
    """A `.pt` file, memory-mapped, plain tensors and containers only; UserError if missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} is not there. Make it first:\n  {make_it}")
    try:
        return torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, OSError, … for damaged files
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(f"{path} could not be read ({reason}). Make it again:\n  {make_it}") from None


def save_pt(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        torch.save(content, temporary)


def file_hash(path: Path) -> str:
    """SHA-256 of a file; of a directory, of its files' names and hashes."""
    digest = hashlib.sha256()
    if path.is_dir():
        for child in sorted(p for p in path.iterdir() if p.is_file() and p.name != "README.md"):
            digest.update(f"{child.name}:{file_hash(child)}\n".encode())
    else:
        with path.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def config_hash(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def provenance(script: str, cfg: Common, made_from: dict[str, Path], **facts: Any) -> dict[str, Any]:
    """The `meta` of everything a script writes. `made_from`: name -> file or checkpoint directory, stored as hashes."""
    return {
        "made_by": script,
        "argv": sys.argv[1:],
        "config": as_plain(cfg),
        **_identity(cfg, made_from),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **facts,
    }


def _identity(cfg: Common, made_from: dict[str, Path]) -> dict[str, Any]:
    settings = {k: v for k, v in as_plain(cfg).items() if k != "resume"}
    hashes = {name: file_hash(path) for name, path in made_from.items() if path.exists()}
    return {"schema": SCHEMA, "config_hash": config_hash(settings), "made_from": hashes}


def identity_of(cfg: Common, made_from: dict[str, Path]) -> str:
    """One short hash of the settings and the files something is made from."""
    return config_hash(_identity(cfg, made_from))


def reusable(path: Path, cfg: Common, made_from: dict[str, Path]) -> dict[str, Any] | None:
    """The JSON at `path` if `--resume` is on and it was made with these settings from these very files, else None."""
    if not (cfg.resume and path.is_file()):
        return None
    content = read_json(path, f"rm {path}")
    meta = content.get("meta", content)
    same = all(meta.get(key) == value for key, value in _identity(cfg, made_from).items())
    return content if same else None


def _git_commit() -> str | None:
    try:
        here = Path(__file__).resolve().parent
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# ------------------------------------------------------------------------------------------------------------- hidden states


@dataclass(frozen=True)
class HiddenStates:
    """One split of paired hidden states, memory-mapped.

    draft:     [n, s, d_draft]   EventGPT's states (its tapped layers side by side, or the one asked for), zero where padded
    target:    [n, s, d_target]  Video-LLaVA's, post-norm
    token_ids: [n, s] int64      the tokens both models read; state t *emits* token t
    mask:      [n, s] bool       real positions, EOS included
    lengths:   [n] int64
    rows:      one dict per row: id, sequence, question, both texts
    events:    [n, e, d_event]   EventGPT's states over its event tokens, if asked for: of the last tapped layer
    """

    draft: Tensor
    target: Tensor
    token_ids: Tensor
    mask: Tensor
    lengths: Tensor
    rows: list[dict[str, Any]]
    meta: dict[str, Any]
    events: Tensor | None = None

    @property
    def ended(self) -> Tensor:
        """[n] bool: texts that end with EOS, not at the length limit."""
        return self.token_ids[torch.arange(len(self.lengths)), self.lengths - 1] == 2

    @property
    def clips(self) -> list[str]:
        """The cluster each row belongs to: intervals resample these."""
        return [row["sequence"] for row in self.rows]


def load_trained(path: Path, kind: str, build: Callable[..., Module], size: str, make_it: str) -> tuple[Module, dict[str, Any]]:
    """A trained module and its meta: `build(**meta["geometry"])`, filled and ready to use.

    kind: its name in messages; size: a key its geometry must have, so that no other kind is taken for it
    raises: UserError for a file of another kind, or a damaged one
    """
    saved = load_pt(path, make_it)
    geometry = saved.get("meta", {}).get("geometry", {}) if isinstance(saved, dict) else {}
    if size not in geometry or "state_dict" not in saved:
        raise UserError(f"{path} is not {kind} (wanted meta with its geometry, and state_dict). Train one:\n  {make_it}")
    module = build(**geometry)
    try:
        module.load_state_dict(saved["state_dict"])
    except RuntimeError as error:
        raise UserError(f"{path} is damaged: {error}. Train it again:\n  {make_it}") from None
    return module.eval(), saved["meta"]


def layer_file(layer: int) -> str:
    """Where one of several separately stored draft layers lies."""
    return f"egpt_hidden_states.layer{layer:02d}.pt"


def load_hidden_states(directory: Path, layers: Sequence[int] | None = None, events: bool = False) -> HiddenStates:
    """One split of a complete extraction; refuses an incomplete directory or files that do not fit each other.

    layers: EventGPT's layers that are wanted (default: what is there). Where they were stored apart (`--separate_layers`) it must be
            one of them, and `meta` then speaks of this layer alone
    events: read EventGPT's event states as well
    """
    command = EXTRACT.format(split=directory.name)
    meta = read_json(directory / "meta.json", command)
    name, there = "egpt_hidden_states.pt", meta["draft_layers"]
    if meta.get("separate_layers"):
        if layers is None or len(layers) != 1 or layers[0] not in there:
            raise UserError(
                f"{directory} holds EventGPT's layers {there} apart; wanted one of them, got {layers}: --draft_layers {there[-1]}"
            )
        name = layer_file(layers[0])
        norm, width = meta["draft_norms"][str(layers[0])], meta["hidden_size_draft"] // len(there)
        meta = {**meta, "draft_layers": list(layers), "draft_norm": norm, "hidden_size_draft": width}
    elif layers is not None and list(layers) != list(there):
        raise UserError(
            f"{directory} holds EventGPT's layers {there} as one state, not {list(layers)}. Extract those, or all with --separate_layers."
        )
    draft, target = (load_pt(directory / file, command) for file in (name, "vl_hidden_states.pt"))
    positions = load_pt(directory / "positions.pt", command)
    try:
        rows = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / 'samples.jsonl'}: {error}. Make it again:\n  {command}") from None
    shapes = {"egpt": tuple(draft.shape), "vl": tuple(target.shape), "token_ids": tuple(positions["token_ids"].shape), "rows": len(rows)}
    if draft.ndim != 3 or draft.shape[:2] != target.shape[:2] or draft.shape[:2] != positions["token_ids"].shape or len(rows) != len(draft):
        raise UserError(f"the files in {directory} do not fit each other: {shapes}. Make them again:\n  {command}")
    for file, tensor, width in ((name, draft, "hidden_size_draft"), ("vl_hidden_states.pt", target, "hidden_size_target")):
        if tensor.shape[-1] != meta[width]:
            raise UserError(f"{directory}/{file} is {tensor.shape[-1]} wide, its meta.json says {meta[width]}: files swapped?")
    seen = None
    if events:
        if not meta.get("event_states"):
            raise UserError(
                f"{directory} holds no event states, which the chained adapter reads. Extract them:\n  {command} --event_states"
            )
        seen = load_pt(directory / EVENT_STATES, command)
    return HiddenStates(draft, target, **{k: positions[k] for k in ("token_ids", "mask", "lengths")}, rows=rows, meta=meta, events=seen)


# ------------------------------------------------------------------------------------------------------- answers of both models


def write_token_pairs(path: Path, meta: dict[str, Any], rows: Iterable[dict[str, Any]]) -> None:
    """{meta, results: [{sample_id, sequence, query, and of both models the tokens and the text of its own answer}]}, row by row."""
    keys = ("egpt_tokens", "egpt_text", "vl_tokens", "vl_text")
    with replacing(path) as temporary, temporary.open("w") as stream:
        stream.write('{"meta": ' + json.dumps(finite(meta), allow_nan=False) + ',\n"results": [')
        for i, r in enumerate(rows):
            result = {"sample_id": r["id"], "sequence": r["sequence"], "query": r["question"], **{k: r[k] for k in keys}}
            stream.write(",\n" * bool(i) + json.dumps(result))
        stream.write("]}\n")


def read_token_pairs(path: Path) -> list[dict[str, Any]]:
    """Rows with `egpt_tokens` and `vl_tokens`, from `{"results": [...]}`."""
    content = read_json(path, EXTRACT.format(split="test"))
    rows = content.get("results") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f'{path} holds no rows; wanted {{"results": [{{"egpt_tokens": […], "vl_tokens": […], …}}]}}.')
    for i, row in enumerate(rows):
        for key in ("egpt_tokens", "vl_tokens"):
            tokens = row.get(key) if isinstance(row, dict) else None
            if not isinstance(tokens, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in tokens):
                raise UserError(f"{path}, row {i}: {key} must be a list of token ids.")
    return rows


Answers = dict[str, tuple[array, array]]  # sample id -> Video-LLaVA's tokens, EventGPT's tokens


def load_answers(path: Path, settings: dict[str, Any], sample_ids: Sequence[str]) -> Answers:
    """Both models' own answers from a token pairs file.

    settings: of the run that wants them; a file that says it was made by other models, clips or limits is refused
    raises:   UserError if they do not fit, or a sample has none
    """
    content = read_json(path, "leave --answers out, and they are generated")
    made = content.get("meta", {}).get("settings", {})
    wrong = [k for k in ("target", "draft", "manifest", "dtype", "max_new_tokens") if k in made and made[k] != settings[k]]
    if wrong:
        lines = "".join(f"\n  {k}: {made[k]} there, {settings[k]} now" for k in wrong)
        raise UserError(f"{path} holds answers of another run:{lines}\nLeave --answers out to generate them.")
    try:
        found = {str(r["sample_id"]): (array("i", r["vl_tokens"]), array("i", r["egpt_tokens"])) for r in content["results"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: {error!r}; wanted results with sample_id, vl_tokens, egpt_tokens.") from None
    answers = {i: found[i] for i in sample_ids if i in found and all(1 <= len(a) <= settings["max_new_tokens"] for a in found[i])}
    if len(answers) < len(sample_ids):
        without = next(i for i in sample_ids if i not in answers)
        raise UserError(
            f"{path} has answers of 1 to {settings['max_new_tokens']} tokens for {len(answers)} of {len(sample_ids)} samples, "
            f"none for {without!r}. Leave --answers out to generate them."
        )
    return answers
