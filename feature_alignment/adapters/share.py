"""Write a trained adapter as a directory that can be shared, with a model card made from the result files.

python -m feature_alignment.adapters.share --config configs/demo.yaml --adapter chained --to shared/chained --license apache-2.0
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from feature_alignment.cli.advice import command_for
from feature_alignment.cli.config import Common, parse_config
from feature_alignment.cli.console import UserError, print_json_line, rate_text, run_module

if __name__ == "__main__":
    run_module("feature_alignment.adapters.share")

from feature_alignment.adapters.attending import load_attending_adapter
from feature_alignment.adapters.chained import load_chained_adapter
from feature_alignment.adapters.hidden import load_adapter
from feature_alignment.storage.files import file_hash, read_hashed_json
from feature_alignment.storage.identity import hub_revision, is_hub
from feature_alignment.storage.pretrained import CONFIG, SharedModule, save_pretrained

PUBLISHED = (  # of an adapter's meta; not the paths and the machine of the run
    *("made_by", "settings", "made_from", "code", "packages", "created", "parameters", "weights_hash", "draft_layers"),
    *("prefix", "best_epoch", "epochs", "validation", "untrained", "seconds"),
)
_LOADERS: dict[str, Callable[[Path], tuple[SharedModule, dict[str, Any]]]] = {
    "hidden": load_adapter,
    "plain": load_adapter,
    "chained": load_chained_adapter,
    "attending": load_attending_adapter,
}


@dataclass(frozen=True)
class ShareConfig(Common):
    """Write a trained adapter as a directory with config.json, adapter.safetensors and a model card (README.md).

    The card's numbers come from acceptance.json and benchmark.json. Nothing is uploaded.

    Args:
        adapter: which of the trained adapters
        to: the directory to write (default: shared/<adapter> under the output directory)
        license: identifier for the model card, as on the Hugging Face Hub
    """

    adapter: Literal["hidden", "plain", "chained", "attending"] = "chained"
    to: Path | None = None
    license: str = "other"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Write the directory of one adapter."""
    cfg = parse_config(ShareConfig, argv, "adapters/share")
    folder = "adapter" if cfg.adapter == "hidden" else f"{cfg.adapter}_adapter"
    source = cfg.out / folder / "adapter.pt"
    adapter, meta = _LOADERS[cfg.adapter](source)
    published = {key: meta[key] for key in PUBLISHED if key in meta}
    published["base_models"] = {"target": _base(cfg.target_id), "draft": _base(cfg.draft_id)}
    directory = cfg.to or cfg.out / "shared" / cfg.adapter
    save_pretrained(adapter, adapter.kind, published, directory, model_card(cfg, source, published, type(adapter)))
    print(f"adapter   {directory}: {CONFIG}, adapter.safetensors, README.md")
    written = {"adapter": cfg.adapter, "parameters": meta["parameters"], "written": str(directory)}
    print_json_line(written)
    return written


def _base(checkpoint: Path) -> dict[str, str]:
    """Name and content hash of a base checkpoint, or its Hub id and its revision in the local cache."""
    if is_hub(checkpoint):
        name, _, revision = hub_revision(checkpoint).partition("@")
        if not revision:
            raise UserError(f"{checkpoint} is not in the local cache; the model card names its revision. Run the pipeline here first.")
        return {"id": name, "revision": revision}
    if not checkpoint.is_dir():
        raise UserError(f"no checkpoint at {checkpoint}; the model card names what the adapter was trained for.")
    return {"id": checkpoint.name, "hash": file_hash(checkpoint)}


def model_card(cfg: ShareConfig, source: Path, meta: dict[str, Any], build: type[SharedModule]) -> str:
    """The model card: front matter of the Hub, training, measured numbers with intervals, how to load.

    Args:
        cfg: settings
        source: the adapter.pt, whose hash says whether a result file measured this very adapter
        meta: what is published of its meta
        build: class of the adapter
    """
    bases = meta["base_models"]
    hub_ids = [base["id"] for base in bases.values() if "revision" in base]
    front = ["---", f"license: {cfg.license}", "library_name: feature_alignment", "tags: [speculative-decoding, event-camera, video]"]
    front += [f"base_model: {json.dumps(hub_ids)}"] * bool(hub_ids) + ["---"]
    version = {role: f"revision {base['revision']}" if "revision" in base else f"hash {base['hash']}" for role, base in bases.items()}
    described = ", ".join(f"{role} {base['id']} ({version[role]})" for role, base in bases.items())
    validation = ", ".join(f"{name} {value:.4f}" for name, value in meta["validation"].items())
    data = ", ".join(f"{name} {value}" for name, value in meta["made_from"].items())
    body = [
        f"# {cfg.adapter} adapter for speculative decoding",
        "",
        "It predicts hidden states of the target (Video-LLaVA) for drafting with EventGPT; the target verifies every draft token.",
        "",
        f"- Models: {described}. It fits no other pair.",
        f"- Parameters: {meta['parameters']:,}; EventGPT's layers read: {meta['draft_layers']}; text prefix: {meta['prefix']}.",
        f"- Training data, by hash: {data}. Epoch {meta['best_epoch']} of {meta['epochs']}, {meta['seconds']:.0f} s.",
        f"- On validation: {validation}.",
        "",
        "## Measured on test clips",
        "",
        *_measured(cfg, source),
        "",
        "## Use",
        "",
        "```python",
        f"from {build.__module__} import {build.__name__}",
        "",
        f'adapter = {build.__name__}.from_pretrained("DIRECTORY")',
        "```",
    ]
    return "\n".join([*front, "", *body]) + "\n"


def _measured(cfg: ShareConfig, source: Path) -> list[str]:
    """Lines of the card with test numbers, taken only from result files that measured this very adapter."""
    this, lines = file_hash(source), list[str]()
    path = cfg.out / "acceptance" / "acceptance.json"
    if path.is_file() and cfg.adapter != "plain":
        result = read_hashed_json(path, command_for("measure_feature_acceptance"))
        if result["meta"]["made_from"].get("adapter" if cfg.adapter == "hidden" else cfg.adapter) == this:
            scores = result if cfg.adapter == "hidden" else result["chains"][cfg.adapter]
            lines += [f"- cosine: {rate_text(scores['cosine'], 3)}", f"- draft token correct: {rate_text(scores['token_match'], 3)}"]
            lines += [f"- tokens per pass at draft length {result['num_draft_tokens']}: {scores['tokens_per_pass']:.2f}"]
    path = cfg.out / "benchmark" / "benchmark.json"
    if path.is_file():
        result = read_hashed_json(path, command_for("benchmark_feature_sd"))
        if result["meta"]["made_from"].get("adapter" if cfg.adapter == "hidden" else f"{cfg.adapter}_adapter") == this:
            profiles = read_hashed_json(path.with_name("speculation_profile.json"), command_for("benchmark_feature_sd"))["profiles"]
            lines += _benchmarked("aligned" if cfg.adapter == "hidden" else cfg.adapter, result, profiles)
    return lines or ["Not measured: no result file of this run measured this adapter."]


def _benchmarked(draft: str, result: Mapping[str, Any], profiles: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines of the card with the lossless rows and the profile of one drafter."""
    lines = []
    for row in result["rows"]:
        if row["draft"] == draft and row["accept"] == "token" and row["exit_layer"] is None:
            speeds = f"{rate_text(row['speedup'], 2)} end to end, {rate_text(row['decode_speedup'], 2)} decoding"
            counts = f"{row['tokens_per_pass']:.2f} tokens per pass, exact match {row['exact_match']:.3f}"
            lines.append(f"- {draft} + token, {row['drafts_per_round']}: {speeds}, {counts}")
    for profile in profiles:
        if profile["draft"] == draft:
            length = {"value": profile["mean_acceptance_length"], "ci95": profile.get("mean_acceptance_length_ci95") or (None, None)}
            counts = f"{rate_text(length, 2)} tokens per round, {rate_text(profile['draft_acceptance_rate'], 3)} of draft tokens accepted"
            lines.append(f"- at draft length {profile['num_draft_tokens']}: {counts}")
    return [*lines, f"- {result['baselines'][0]['prompts']} prompts, {result['meta']['device']}, {result['meta']['dtype']}."]
