"""Tokenizer and image preprocessing of a checkpoint, and whether the pair's tokenizers agree."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from feature_alignment.cli.console import UserError
from feature_alignment.inputs.clip_pixels import clip_pixels
from feature_alignment.models.loading import GPU_EXTRA, first_line
from feature_alignment.models.prompts import prepare_for_prompts, text_ids

log = logging.getLogger(__name__)

PROBE_QUESTION = "What are the key elements in this scene?"
LLAMA_VOCABULARY = 32_000  # of the released pair, whose prompt lengths are known


def load_tokenizer(path: Path, num_rows: int | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint.

    Args:
        path: Checkpoint directory.
        num_rows: Embedding rows of the model; None skips the check.

    Raises:
        UserError: If it is damaged, needs packages that are not installed, or has more ids than `num_rows`.
    """
    only_sentencepiece = not (path / "tokenizer.json").is_file() and (path / "tokenizer.model").is_file()
    missing = [name for name in ("sentencepiece", "google.protobuf") if only_sentencepiece and not _installed(name)]
    if missing:
        raise UserError(f"{path} has only a tokenizer.model, which needs {' and '.join(missing)}. Type:\n  {GPU_EXTRA}")
    try:
        kind = LlamaTokenizer if only_sentencepiece else AutoTokenizer
        tokenizer = kind.from_pretrained(str(path))
    except Exception as error:  # damaged files raise errors of several libraries
        raise UserError(f"{path}: its tokenizer could not be loaded: {first_line(error)}") from None
    prepare_for_prompts(tokenizer, path)
    if num_rows is not None and len(tokenizer) > num_rows:
        raise UserError(
            f"{path}: the tokenizer has {len(tokenizer)} ids, the model {num_rows} embedding rows; expected at most as many ids as rows. "
            "The tokenizer belongs to another checkpoint."
        )
    return tokenizer


def load_processor(path: Path, image_size: int, default: bool = False) -> CLIPImageProcessorPil:
    """Load the image preprocessing of a checkpoint.

    Args:
        path: Checkpoint directory.
        image_size: Side of the vision tower's input in pixels.
        default: Use CLIP's preprocessing where there is no preprocessor_config.json.

    Raises:
        UserError: If preprocessor_config.json is damaged or does not give images of this size.
    """
    if default and not (path / "preprocessor_config.json").is_file():
        log.info("%s has no preprocessor_config.json; using CLIP's at %d pixels, as the released code does.", path, image_size)
        side = {"height": image_size, "width": image_size}
        return CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=side)
    try:
        processor = CLIPImageProcessorPil.from_pretrained(str(path))
    except Exception as error:  # damaged files raise many different errors
        raise UserError(f"{path}: its preprocessor_config.json could not be loaded: {first_line(error)}") from None
    try:
        pixels = clip_pixels([np.zeros((image_size // 2 + 1, image_size, 3), np.uint8)], processor)
        crop = processor.crop_size["height"], processor.crop_size["width"]
    except Exception as error:  # settings that Pillow or NumPy cannot apply
        raise UserError(f"{path}: its preprocessor_config.json gives no pixels: {first_line(error)}") from None
    if not np.isfinite(pixels).all():
        raise UserError(f"{path}: its preprocessor_config.json gives pixels that are not finite.")
    if crop != (image_size, image_size):
        raise UserError(
            f"{path}: preprocessor_config.json crops to {crop[0]} x {crop[1]}, the vision tower expects {image_size} x {image_size} pixels."
        )
    return processor


def check_prompt(path: Path, tokenizer: PreTrainedTokenizerBase, text_tokens: int, known: Sequence[int]) -> None:
    """Compare the length of the probe question's prompt with the released tokenizer's.

    Nothing is compared for a vocabulary of another size or a tokenizer with a chat template.

    Args:
        path: Checkpoint directory, for error messages.
        tokenizer: Of the checkpoint.
        text_tokens: Number of text tokens in the prompt.
        known: Numbers that the released tokenizer gives.

    Raises:
        UserError: If the number differs.
    """
    if getattr(tokenizer, "chat_template", None):
        return
    if LLAMA_VOCABULARY <= len(tokenizer) < LLAMA_VOCABULARY + 64 and text_tokens not in known:
        raise UserError(
            f"{path}: the prompt for {PROBE_QUESTION!r} has {text_tokens} text tokens, the released tokenizer gives "
            f"{' or '.join(map(str, known))}. Take the tokenizer files of the released checkpoint."
        )


def check_shared_ids(
    draft_path: Path, draft_tokenizer: PreTrainedTokenizerBase, target_path: Path, target_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Check that shared token ids stand for the same text in both models: the target verifies draft token ids as they are.

    Args:
        draft_path: Drafter's checkpoint, for error messages.
        draft_tokenizer: Of the drafter.
        target_path: Target's checkpoint, for error messages.
        target_tokenizer: Of the target.

    Raises:
        UserError: If the tokenizers differ.
    """
    shared = range(min(len(draft_tokenizer), len(target_tokenizer)))
    draft_pieces, target_pieces = (t.convert_ids_to_tokens(list(shared)) for t in (draft_tokenizer, target_tokenizer))
    different = [i for i, (a, b) in enumerate(zip(draft_pieces, target_pieces, strict=True)) if a != b]
    if different:
        i = different[0]
        raise UserError(
            f"{draft_path} and {target_path} do not share ids: {len(different)} of {len(shared)} differ, e.g. {i} is {draft_pieces[i]!r} "
            f"in the former and {target_pieces[i]!r} in the latter; drafting needs one vocabulary."
        )
    probe = "USER: What is in the scene? ASSISTANT: A car, 3 people."
    if text_ids(draft_tokenizer, probe) != text_ids(target_tokenizer, probe):
        raise UserError(f"{draft_path} and {target_path} tokenize text differently; drafting needs one vocabulary.")


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False
