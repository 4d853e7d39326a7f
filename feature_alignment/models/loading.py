"""Load checkpoints and refuse unsafe, incomplete or damaged ones.

Every refusal is a UserError that names the file. Both checkpoints may have the old or the new key layout, `.bin` or safetensors files, one
file or shards: transformers reads them all. `load_model` refuses tensors that transformers would silently initialize or drop.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from feature_alignment.cli.config import Common
from feature_alignment.cli.console import UserError
from feature_alignment.storage.processes import check_device

log = logging.getLogger(__name__)

GPU_EXTRA = "pip install -e '.[gpu]'"
# Largest values accepted from a config.json, before any memory is allocated for them
LARGEST = {
    "num_hidden_layers": 512,
    "num_attention_heads": 1024,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 22,
    "image_size": 4096,
    "patch_size": 4096,
    "shortest_edge": 4096,
}
_RUNS_CODE = ("auto_map", "custom_pipelines", "trust" + "_remote_code")
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # per weight: 4 bits, one byte per 64 weights, one float per 256 such bytes


def find_checkpoint(path: Path, flag: str) -> Path:
    """Locate a checkpoint and refuse one that asks to run code; `hub:organization/name` is downloaded or taken from the local cache.

    Args:
        path: Directory, or `hub:organization/name` on the Hugging Face Hub.
        flag: Flag that set it, for error messages.

    Returns:
        The checkpoint's directory.

    Raises:
        UserError: If there is no checkpoint, or it is unsafe.
    """
    if str(path).startswith("hub:"):
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(str(path).removeprefix("hub:")))
        except Exception as error:  # network, name and access errors come from several libraries
            raise UserError(f"{flag} {path}: not in the cache and could not be downloaded: {first_line(error)}") from None
    if not (path / "config.json").is_file():
        raise UserError(
            f"no checkpoint at {path}: config.json is missing. {flag} expects a directory that from_pretrained can load, "
            "or hub:organization/name."
        )
    refuse_executable_code(path)
    return path


def fetch_checkpoints(cfg: Common) -> None:
    """Download `hub:` checkpoints that are not in the local cache, so that cached results can be compared with their revisions."""
    for path, flag in ((cfg.target_id, "--target_id"), (cfg.draft_id, "--draft_id")):
        if str(path).startswith("hub:"):
            find_checkpoint(path, flag)


def refuse_executable_code(path: Path) -> None:
    """Refuse a checkpoint that asks for its own code, for files outside its directory, or for impossible sizes.

    transformers would ask on the terminal whether to run such code.

    Raises:
        UserError: For such a checkpoint, or for one with a damaged JSON file.
    """
    if (path / "adapter_config.json").exists():
        raise UserError(f"{path} holds a PEFT adapter, which refers to another model; merge the two and save the result.")
    for file in sorted(f for f in path.glob("*.json") if f.name not in ("tokenizer.json", "vocab.json")):
        try:
            content = json.loads(file.read_text())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is not valid JSON ({first_line(error)}). Download it again, or point to another directory.") from None
        for key, value in _entries(content):
            if key in _RUNS_CODE and value:
                raise UserError(f"{file} asks to run code of its own ({key}: {str(value)[:80]}); only plain checkpoints are loaded.")
            if "attn_implementation" in key and "/" in str(value):
                raise UserError(
                    f"{file} asks for attention code from another source ({str(value)[:80]}); only plain checkpoints are loaded."
                )
            if key == "weight_map" and (outside := [n for n in _names(value) if Path(n).name != n]):
                raise UserError(f"{file} names weights outside its directory: {outside[0]!r}. Download it again.")
            sizes = value if isinstance(value, list) else [value]
            if key in LARGEST and any(type(v) is not int or not 1 <= v <= LARGEST[key] for v in sizes if v is not None):
                raise UserError(f"{file}: {key} is {str(value)[:80]}; expected a number from 1 to {LARGEST[key]:,}.")


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key of nested JSON with its value."""
    if isinstance(content, dict):
        yield from content.items()
    for part in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from _entries(part)


def _names(weight_map: Any) -> list[str]:
    return [str(name) for name in weight_map.values()] if isinstance(weight_map, dict) else ["/"]


def load_model(
    cls: type[PreTrainedModel],
    path: str | Path,
    model_name: str,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    device_map: str | None = None,
    quantize: str = "none",
    unquantized: Sequence[str] = (),
    attn_implementation: str = "sdpa",
    random_weights: bool = False,
    seed: int = 0,
    config: Any = None,
) -> PreTrainedModel:
    """Load a complete model in eval mode.

    Args:
        cls: Model class of transformers or of this package.
        path: Checkpoint directory.
        model_name: For error messages.
        dtype: Of the weights.
        device: Where the model runs; "meta" reads names and shapes only.
        device_map: Spread the layers over several GPUs; None puts all on `device`.
        quantize: "none", or "nf4" for 4-bit weights (bitsandbytes).
        unquantized: Modules that stay in `dtype`, as full paths from the root; a bare name would silently match nothing.
        attn_implementation: Of transformers; flash_attention_2 falls back to sdpa where it is not available.
        random_weights: Initialize at random at the checkpoint's geometry instead of reading weights.
        seed: Of random weights.
        config: Overrides the checkpoint's config.json.

    Raises:
        UserError: If the checkpoint is incomplete or damaged, or the model does not fit.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if device != "meta":
        check_device(device)
    if attn_implementation == "flash_attention_2" and not (is_flash_attn_2_available() and torch.device(device).type == "cuda"):
        log.warning("%s: flash_attention_2 needs flash-attn and a GPU; falling back to sdpa.", model_name)
        attn_implementation = "sdpa"
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    if not random_weights:
        _refuse_missing_weights(cls, Path(path), model_name, config)
    if random_weights:
        if quantize != "none":
            raise UserError(
                "--random_weights and --quantize cannot be combined: random weights are not quantized. Remove one of the two flags."
            )
        if device != "meta":
            log.warning("%s has RANDOM WEIGHTS at the geometry of %s: only its speed and memory are meaningful.", model_name, path)
        torch.manual_seed(seed)
        try:
            config = config or cls.config_class.from_pretrained(str(path))
            with torch.device(device):
                return cls._from_config(config, **options).eval()
        except (OSError, ValueError) as error:
            raise UserError(f"{path} could not be loaded as {model_name}: {first_line(error)}") from None
    if quantize == "nf4" and device != "meta":
        options["quantization_config"] = _nf4(dtype, unquantized)
    if device_map or device != "cpu" or "quantization_config" in options:
        options["device_map"] = device_map or {"": device}  # load directly to the device, without a copy in main memory
    model = load_complete(cls, path, model_name, config=config, **options).eval()
    if any(p.device.type == "meta" for p in model.parameters()) and device != "meta":
        raise UserError(f"{model_name} does not fit into the GPUs of --device_map {device_map}; pass --quantize nf4, or use larger GPUs.")
    return model


def _refuse_missing_weights(cls: type[PreTrainedModel], path: Path, model_name: str, config: Any) -> None:
    """Refuse a config.json whose model has far more parameters than the weight files hold, before memory for them is allocated."""
    try:
        with torch.device("meta"):
            skeleton = cls._from_config(config or cls.config_class.from_pretrained(str(path)))
    except Exception as error:  # a damaged config raises many different errors
        raise UserError(f"{path} could not be loaded as {model_name}: {first_line(error)}") from None
    num_parameters = sum(p.numel() for p in skeleton.parameters())
    num_bytes = sum(f.stat().st_size for f in path.iterdir() if f.suffix in (".safetensors", ".bin"))
    if num_parameters > 4 * num_bytes:  # a parameter takes at least half a byte
        raise UserError(
            f"{path}: config.json describes {num_parameters:,} parameters, but the weight files have {num_bytes:,} bytes. "
            "Download it again."
        )


def load_complete(cls: type[PreTrainedModel], path: str | Path, model_name: str, **options: Any) -> PreTrainedModel:
    """Load by `from_pretrained`, but refuse a checkpoint of which transformers would silently initialize or drop a tensor.

    Args:
        cls: Model class.
        path: Checkpoint directory.
        model_name: For error messages.
        **options: Of `from_pretrained`.

    Raises:
        UserError: If tensors are missing, unexpected or of the wrong shape.
    """
    try:
        model, info = cls.from_pretrained(str(path), output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except Exception as error:  # damaged JSON or weights raise errors of many libraries
        raise UserError(f"{path} could not be loaded as {model_name}: {first_line(error)}") from None
    wrong = {k: sorted(map(str, info.get(k) or ())) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any("query_embed" in k or "attention_layers" in k for k in wrong["unexpected_keys"]):
        raise UserError(f"{path} is an EventGPT with a Q-Former, whose code was never released; use the checkpoint without a Q-Former.")
    if any(wrong.values()):
        lines = "\n".join(f"  {k.replace('_', ' ')}: {len(v)}, e.g. {', '.join(v[:3])}" for k, v in wrong.items() if v)
        raise UserError(f"{path} does not hold a complete {model_name}:\n{lines}\nDownload it again, or point to another directory.")
    return model


@contextmanager
def report_load_errors(path: Path) -> Iterator[list[torch.Tensor]]:
    """Turn errors of a loaded model's first forward passes into UserErrors; the caller appends their outputs to the yielded list.

    Raises:
        UserError: If config.json does not fit the weights, or an output is not finite.
    """
    outputs: list[torch.Tensor] = []
    try:
        yield outputs
    except Exception as error:  # any layer may fail
        raise UserError(f"{path}: its config.json does not fit its weights: {first_line(error)}") from None
    if not all(torch.isfinite(states).all() for states in outputs):
        raise UserError(f"{path}: its weights give states that are not finite in {str(outputs[0].dtype)[6:]}. Try another --dtype.")


def _nf4(dtype: torch.dtype, unquantized: Sequence[str]) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--quantize nf4: bitsandbytes is not installed. Type:\n  {GPU_EXTRA}")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(unquantized),
    )


def weight_bytes(model: nn.Module, dtype: torch.dtype, quantize: str, unquantized: Sequence[str]) -> int:
    """Memory of a model's weights.

    Args:
        model: On any device, "meta" included.
        dtype: Of weights that are not quantized.
        quantize: "none" or "nf4".
        unquantized: Modules whose linear layers stay in `dtype` under nf4.

    Returns:
        Bytes.
    """
    in_4_bits = {
        id(m.weight)
        for name, m in model.named_modules()
        if quantize == "nf4" and isinstance(m, nn.Linear) and not any(name == u or name.startswith(u + ".") for u in unquantized)
    }
    return round(sum(p.numel() * (NF4_BYTES if id(p) in in_4_bits else dtype.itemsize) for p in model.parameters()))


def available_memory(device: str, device_map: str | None) -> int:
    """Free memory where models would run.

    Args:
        device: "cpu" or a CUDA device.
        device_map: Any value counts all GPUs instead of one.

    Returns:
        Bytes; 0 for CUDA without a GPU.
    """
    if torch.device(device).type == "cuda":
        if not torch.cuda.is_available():
            return 0
        check_device(device)
        gpus = range(torch.cuda.device_count()) if device_map else [torch.device(device)]
        return sum(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus)
    import psutil

    available: int = psutil.virtual_memory().available
    return available


def first_line(error: Exception) -> str:
    """The first line of an error's text, at most 200 characters; its class name if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
