"""Prompts as token ids: a begin token where the model was trained with one, never an end token, the checkpoint's own chat template."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feature_alignment.cli.console import UserError
from feature_alignment.cli.text_files import as_object, read_text, reason

log = logging.getLogger(__name__)

_SENTENCEPIECE_BOS = "<s>"


def prepare_for_prompts(tokenizer: Any, path: Path) -> None:
    """Give a tokenizer the chat template that a processor keeps for it, and say in the log what its prompts begin with.

    Raises:
        UserError: For a damaged chat_template.json.
    """
    template = path / "chat_template.json"  # tokenizers read chat_template.jinja and their own configuration only
    if tokenizer.chat_template is None and template.is_file():
        try:
            tokenizer.chat_template = as_object(json.loads(read_text(template)))["chat_template"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{template}: {reason(error)}; wanted an object with chat_template.") from None
    if begin_ids(tokenizer) and not _adds_bos(tokenizer):
        log.info("%s: its tokenizer adds no %s; prompts begin with it all the same.", path, tokenizer.bos_token)


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text alone, whatever begin or end token the tokenizer would put around it, or a chat template after it."""
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def begin_ids(tokenizer: Any) -> list[int]:
    """The begin token that a prompt starts with, or none.

    LLaMA and its descendants were trained with `<s>` in front of every text. A tokenizer that was saved without its post-processor
    no longer adds it. A vocabulary with another begin token gets it only if its tokenizer adds it.
    """
    if tokenizer.bos_token_id is None or not (_adds_bos(tokenizer) or tokenizer.bos_token == _SENTENCEPIECE_BOS):
        return []
    return [tokenizer.bos_token_id]


def _adds_bos(tokenizer: Any) -> bool:
    return list(tokenizer("").input_ids)[:1] == [tokenizer.bos_token_id]


def prompt_text(tokenizer: Any, default: str, contents: Sequence[Any], marker: str, question: str) -> str:
    """The prompt of one question, `marker` in it once: by the tokenizer's chat template if it has one, else the default.

    Args:
        tokenizer: Of the checkpoint; `chat_template` is None where it has none.
        default: The model's own prompt with the question in it.
        contents: What the user says, as chat templates take it: a text, or a list of parts. The first that the template shows counts.
        marker: The text that stands for the video or the events.
        question: The question.

    Raises:
        UserError: For a template that fails, or that does not show the marker once and the question.
    """
    if not getattr(tokenizer, "chat_template", None):
        return default
    why = ""
    for content in contents:
        messages = [{"role": "user", "content": content}]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise any error of Jinja, or its own
            why = why or str(error).strip().partition("\n")[0][:160]
            continue
        if text.count(marker) == 1 and question.strip() in text:
            return text
    raise UserError(
        f"{tokenizer.name_or_path}: its chat template does not make a prompt with one {marker} and the question{why and f' ({why})'}. "
        "Take the template of the released checkpoint, or remove it (chat_template.jinja, chat_template.json, or the key `chat_template` "
        "in tokenizer_config.json) to use the prompt the model was released with."
    )


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a whole prompt or its first part: one begin token, which a chat template may have written already."""
    ids, begin = text_ids(tokenizer, text), begin_ids(tokenizer)
    return ids if ids[:1] == begin else [*begin, *ids]
