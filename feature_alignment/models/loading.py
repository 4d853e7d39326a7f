"""Checkpoint directories in, complete models out: nothing missing, nothing random, a tokenizer that belongs to them.

Every gate is a UserError that says which file does not fit. Both checkpoints may be in the old or the new key layout, `.bin` or
safetensors, in one file or in shards; transformers reads them all, and `load_model` refuses what it would silently make up.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from feature_alignment.cli.config import Common
from feature_alignment.cli.console import UserError
from feature_alignment.inputs.video import clip_pixels
from feature_alignment.models.prompts import prepare_for_prompts, text_ids
from feature_alignment.storage.processes import check_device

log = logging.getLogger(__name__)

GPU_EXTRA = "pip install -e '.[gpu]'"
PROBE_QUESTION = "What are the key elements in this scene?"
LLAMA_VOCABULARY = 32_000  # of the released pair; prompt lengths are known for it
# What a stranger's config.json may say before anything is built from it
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
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # per weight: four bits, a byte for every 64, a float for every 256 of those


def find_checkpoint(path: Path, flag: str) -> Path:
    """The directory of a checkpoint; `hub:organisation/name` is downloaded by huggingface_hub, or found in its cache."""
    if str(path).startswith("hub:"):
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(str(path).removeprefix("hub:")))
        except Exception as error:  # network, name, access: errors of several libraries
            raise UserError(f"{flag} {path}: not in the cache and could not be downloaded: {_first_line(error)}") from None
    if not (path / "config.json").is_file():
        raise UserError(
            f"no checkpoint at {path} (no config.json there); {flag} wants a directory that from_pretrained can load, "
            "or hub:organisation/name."
        )
    refuse_executable_code(path)
    return path


def fetch_checkpoints(cfg: Common) -> None:
    """Download `hub:` checkpoints that are not in the local cache yet, so that their revisions are known before anything is compared."""
    for path, flag in ((cfg.target_id, "--target_id"), (cfg.draft_id, "--draft_id")):
        if str(path).startswith("hub:"):
            find_checkpoint(path, flag)


def refuse_executable_code(path: Path) -> None:
    """raises UserError for a checkpoint directory that asks for code of its own, for files outside itself, or for impossible sizes

    transformers would ask at the keyboard whether to run such code; here nobody is asked.
    """
    if (path / "adapter_config.json").exists():
        raise UserError(f"{path} holds a PEFT adapter, which names a model somewhere else; merge it into its model and save that.")
    for file in sorted(f for f in path.glob("*.json") if f.name not in ("tokenizer.json", "vocab.json")):
        try:
            content = json.loads(file.read_text())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is not valid JSON ({_first_line(error)}). Download it again, or point to another directory.") from None
        for key, value in _entries(content):
            if key in _RUNS_CODE and value:
                raise UserError(f"{file} asks to run code of its own ({key}: {str(value)[:80]}); only plain checkpoints are loaded.")
            if "attn_implementation" in key and "/" in str(value):
                raise UserError(f"{file} asks for attention code from elsewhere ({str(value)[:80]}); only plain checkpoints are loaded.")
            if key == "weight_map" and (outside := [n for n in _names(value) if Path(n).name != n]):
                raise UserError(f"{file} names weights outside its directory: {outside[0]!r}. Download it again.")
            sizes = value if isinstance(value, list) else [value]
            if key in LARGEST and any(type(v) is not int or not 1 <= v <= LARGEST[key] for v in sizes if v is not None):
                raise UserError(f"{file}: {key} is {str(value)[:80]}; wanted a number from 1 to {LARGEST[key]:,}.")


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
    what: str,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    device_map: str | None = None,
    quantize: str = "none",
    unquantised: Sequence[str] = (),
    attn_implementation: str = "sdpa",
    random_weights: bool = False,
    seed: int = 0,
    config: Any = None,
) -> PreTrainedModel:
    """A model in eval mode, complete, or a UserError. device "meta" reads names and shapes only, at no cost in memory.

    unquantised: modules 4-bit loading leaves alone, as full paths from the root (a bare name would silently match nothing)
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if device != "meta":
        check_device(device)
    if attn_implementation == "flash_attention_2" and not (is_flash_attn_2_available() and torch.device(device).type == "cuda"):
        log.warning("%s: flash_attention_2 needs flash-attn and a GPU; running sdpa instead.", what)
        attn_implementation = "sdpa"
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    if not random_weights:
        _refuse_promises(cls, Path(path), what, config)
    if random_weights:
        if quantize != "none":
            raise UserError("--random_weights and --quantize do not go together: there are no weights to read in 4 bits.")
        log.warning("%s has RANDOM WEIGHTS at the geometry of %s: only its speed and memory mean anything.", what, path)
        torch.manual_seed(seed)
        try:
            config = config or cls.config_class.from_pretrained(str(path))
            with torch.device(device):
                return cls._from_config(config, **options).eval()
        except (OSError, ValueError) as error:
            raise UserError(f"{path} could not be loaded as {what}: {_first_line(error)}") from None
    if quantize == "nf4" and device != "meta":
        options["quantization_config"] = _nf4(dtype, unquantised)
    if device_map or device != "cpu" or "quantization_config" in options:
        options["device_map"] = device_map or {"": device}  # straight to where it runs, without a copy in main memory
    model = load_complete(cls, path, what, config=config, **options).eval()
    if any(p.device.type == "meta" for p in model.parameters()) and device != "meta":
        raise UserError(f"{what} does not fit into the GPUs of --device_map {device_map}; type --quantize nf4, or use larger ones.")
    return model


def _refuse_promises(cls: type[PreTrainedModel], path: Path, what: str, config: Any) -> None:
    """raises UserError for a config.json whose model has far more parameters than the weights beside it: what is missing would be
    made up, in full size, before it is found missing"""
    try:
        with torch.device("meta"):
            skeleton = cls._from_config(config or cls.config_class.from_pretrained(str(path)))
    except Exception as error:  # a damaged config raises errors of many kinds
        raise UserError(f"{path} could not be loaded as {what}: {_first_line(error)}") from None
    promised = sum(p.numel() for p in skeleton.parameters())
    there = sum(f.stat().st_size for f in path.iterdir() if f.suffix in (".safetensors", ".bin"))
    if promised > 4 * there:  # a parameter takes at least half a byte
        raise UserError(f"{path}: its config.json promises {promised:,} parameters, its weights are {there:,} bytes. Download it again.")


def load_complete(cls: type[PreTrainedModel], path: str | Path, what: str, **options):
    """`from_pretrained` that refuses (UserError) a checkpoint of which transformers would silently initialise or drop a tensor."""
    try:
        model, info = cls.from_pretrained(str(path), output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except Exception as error:  # damaged JSON or weights raise errors of many libraries
        raise UserError(f"{path} could not be loaded as {what}: {_first_line(error)}") from None
    wrong = {k: sorted(map(str, info.get(k) or ())) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any("query_embed" in k or "attention_layers" in k for k in wrong["unexpected_keys"]):
        raise UserError(f"{path} is an EventGPT with a Q-Former, whose code was never released; use the checkpoint without it.")
    if any(wrong.values()):
        lines = "\n".join(f"  {k.replace('_', ' ')}: {len(v)}, e.g. {', '.join(v[:3])}" for k, v in wrong.items() if v)
        raise UserError(f"{path} does not hold a complete {what}:\n{lines}\nDownload it again, or point to another directory.")
    return model


@contextmanager
def report_load_errors(path: Path) -> Iterator[list[torch.Tensor]]:
    """Try a loaded model, putting what it makes into the list: a config.json that loads and does not work, or weights whose states are
    not finite, are a UserError"""
    made: list[torch.Tensor] = []
    try:
        yield made
    except Exception as error:  # whatever layer stumbles over it
        raise UserError(f"{path}: its config.json does not fit its weights: {_first_line(error)}") from None
    if not all(torch.isfinite(states).all() for states in made):
        raise UserError(f"{path}: its weights make states that are not finite in {str(made[0].dtype)[6:]}.")


def _nf4(dtype: torch.dtype, unquantised: Sequence[str]):
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--quantize nf4: bitsandbytes is not installed. Type:\n  {GPU_EXTRA}")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(unquantised),
    )


def load_tokenizer(path: Path, num_rows: int | None = None):
    """The tokenizer of a checkpoint. Refuses one that needs libraries that are not there, or more rows than the embedding's `num_rows`."""
    only_sentencepiece = not (path / "tokenizer.json").is_file() and (path / "tokenizer.model").is_file()
    missing = [name for name in ("sentencepiece", "google.protobuf") if only_sentencepiece and not _installed(name)]
    if missing:
        raise UserError(f"{path} has only a tokenizer.model, which needs {' and '.join(missing)}. Type:\n  {GPU_EXTRA}")
    try:
        kind = LlamaTokenizer if only_sentencepiece else AutoTokenizer
        tokenizer = kind.from_pretrained(str(path))
    except Exception as error:  # damaged files raise errors of several libraries
        raise UserError(f"{path}: its tokenizer could not be loaded: {_first_line(error)}") from None
    prepare_for_prompts(tokenizer, path)
    if num_rows is not None and len(tokenizer) > num_rows:
        raise UserError(
            f"{path}: the tokenizer has {len(tokenizer)} ids, the model {num_rows} embedding rows; wanted no more ids than rows. "
            "The tokenizer belongs to another checkpoint."
        )
    return tokenizer


def load_processor(path: Path, image_size: int, default: bool = False) -> CLIPImageProcessorPil:
    """The image preprocessing of a checkpoint. default: without a preprocessor_config.json, CLIP's own at the tower's size."""
    if default and not (path / "preprocessor_config.json").is_file():
        log.info("%s has no preprocessor_config.json; CLIP's own at %d pixels is used, as the released code does.", path, image_size)
        side = {"height": image_size, "width": image_size}
        return CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=side)
    try:
        processor = CLIPImageProcessorPil.from_pretrained(str(path))
    except Exception as error:  # damaged files raise errors of many kinds
        raise UserError(f"{path}: its preprocessor_config.json could not be loaded: {_first_line(error)}") from None
    try:
        pixels = clip_pixels([np.zeros((image_size // 2 + 1, image_size, 3), np.uint8)], processor)
        crop = processor.crop_size["height"], processor.crop_size["width"]
    except Exception as error:  # settings that Pillow or NumPy stumble over
        raise UserError(f"{path}: its preprocessor_config.json makes no pixels: {_first_line(error)}") from None
    if not np.isfinite(pixels).all():
        raise UserError(f"{path}: its preprocessor_config.json makes pixels that are not finite.")
    if crop != (image_size, image_size):
        raise UserError(
            f"{path}: preprocessor_config.json crops to {crop[0]} x {crop[1]}, the vision tower wants {image_size} x {image_size} pixels."
        )
    return processor


def check_prompt(path: Path, tokenizer, text_tokens: int, known: Sequence[int]) -> None:
    """Text tokens of the probe question's prompt, known for the released vocabulary; a vocabulary of another size has none known, and
    neither has a chat template."""
    if getattr(tokenizer, "chat_template", None):
        return
    if LLAMA_VOCABULARY <= len(tokenizer) < LLAMA_VOCABULARY + 64 and text_tokens not in known:
        raise UserError(
            f"{path}: the prompt for {PROBE_QUESTION!r} has {text_tokens} text tokens, the released tokenizer gives "
            f"{' or '.join(map(str, known))}. Take the tokenizer files of the released checkpoint."
        )


def check_shared_ids(draft_path: Path, draft_tokenizer, target_path: Path, target_tokenizer) -> None:
    """Drafted ids are handed to the verifier as they are: the same id must be the same piece of text in both."""
    shared = range(min(len(draft_tokenizer), len(target_tokenizer)))
    ours, theirs = (t.convert_ids_to_tokens(list(shared)) for t in (draft_tokenizer, target_tokenizer))
    other = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    if other:
        i = other[0]
        raise UserError(
            f"{draft_path} and {target_path} do not share ids: {len(other)} of {len(shared)} differ, e.g. {i} is {ours[i]!r} in the one "
            f"and {theirs[i]!r} in the other; drafting needs one vocabulary."
        )
    probe = "USER: What is in the scene? ASSISTANT: A car, 3 people."
    if text_ids(draft_tokenizer, probe) != text_ids(target_tokenizer, probe):
        raise UserError(f"{draft_path} and {target_path} tokenise text differently; drafting needs one vocabulary.")


def weight_bytes(model: nn.Module, dtype: torch.dtype, quantize: str, unquantised: Sequence[str]) -> int:
    """Memory the weights take; nf4 holds every linear layer outside `unquantised` in 4 bits."""
    in_4_bits = {
        id(m.weight)
        for name, m in model.named_modules()
        if quantize == "nf4" and isinstance(m, nn.Linear) and not any(name == u or name.startswith(u + ".") for u in unquantised)
    }
    return round(sum(p.numel() * (NF4_BYTES if id(p) in in_4_bits else dtype.itemsize) for p in model.parameters()))


def available_memory(device: str, device_map: str | None) -> int:
    """Free bytes where models would run: all GPUs with a device map, one GPU, or main memory; 0 where there is no GPU."""
    if torch.device(device).type == "cuda":
        if not torch.cuda.is_available():
            return 0
        check_device(device)
        gpus = range(torch.cuda.device_count()) if device_map else [torch.device(device)]
        return sum(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus)
    import psutil

    return psutil.virtual_memory().available


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
