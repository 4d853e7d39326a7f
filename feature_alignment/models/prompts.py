"""Prompts as token ids: BOS where the model was trained with it, never EOS, and the checkpoint's own chat template."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from feature_alignment.cli.console import UserError
from feature_alignment.cli.text_files import as_object, read_text, reason

log = logging.getLogger(__name__)

_SENTENCEPIECE_BOS = "<s>"


def prepare_for_prompts(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Load a chat template that the checkpoint stores with its processor, and log whether BOS is added to prompts.

    Args:
        tokenizer: Changed in place.
        path: Checkpoint directory.

    Raises:
        UserError: For a damaged chat_template.json.
    """
    template = path / "chat_template.json"  # tokenizers read only chat_template.jinja and their own config
    if tokenizer.chat_template is None and template.is_file():
        try:
            tokenizer.chat_template = as_object(json.loads(read_text(template)))["chat_template"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{template}: {reason(error)}; expected an object with chat_template.") from None
    if begin_ids(tokenizer) and not _adds_bos(tokenizer):
        log.info("%s: its tokenizer does not add %s; it is added to prompts.", path, tokenizer.bos_token)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text without the BOS and EOS that a tokenizer or chat template would add."""
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS id that a prompt starts with, or an empty list.

    LLaMA and its descendants were trained with `<s>` before every text, but a tokenizer that was saved without its post-processor no longer
    adds it. Another BOS token is used only if the tokenizer adds it.
    """
    if tokenizer.bos_token_id is None or not (_adds_bos(tokenizer) or tokenizer.bos_token == _SENTENCEPIECE_BOS):
        return []
    return [tokenizer.bos_token_id]


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return list(tokenizer("").input_ids)[:1] == [tokenizer.bos_token_id]


def prompt_text(tokenizer: PreTrainedTokenizerBase, default: str, contents: Sequence[Any], marker: str, question: str) -> str:
    """The prompt of one question, made by the tokenizer's chat template if it has one.

    Args:
        tokenizer: Of the checkpoint; `chat_template` is None where it has none.
        default: The model's own prompt with the question in it.
        contents: Message contents to try, as chat templates take them: a text, or a list of parts. The first that works is used.
        marker: Text that marks the video or the events; the prompt holds it once.
        question: The question.

    Raises:
        UserError: If the template fails, or does not render the marker once and the question.
    """
    if not getattr(tokenizer, "chat_template", None):
        return default
    why = ""
    for content in contents:
        messages = [{"role": "user", "content": content}]
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise any error of Jinja or its own
            why = why or str(error).strip().partition("\n")[0][:160]
            continue
        if text.count(marker) == 1 and question.strip() in text:
            return text
    raise UserError(
        f"{tokenizer.name_or_path}: its chat template does not make a prompt with one {marker} and the question{why and f' ({why})'}. "
        "Take the template of the released checkpoint, or remove it (chat_template.jinja, chat_template.json, or the key `chat_template` "
        "in tokenizer_config.json) to use the prompt the model was released with."
    )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a prompt or its first part, with one BOS, which a chat template may have added already."""
    ids, begin = text_ids(tokenizer, text), begin_ids(tokenizer)
    return ids if ids[:1] == begin else [*begin, *ids]
