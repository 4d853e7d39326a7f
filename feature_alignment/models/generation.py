"""Generation settings of a checkpoint: which ids and strings end a text, and what changes the logits of its next token.

Settings are transformers' own `GenerationConfig`, read from `generation_config.json`, and so are the logits processors that carry them
out: a text is the one that `generate` gives for the same `input_ids`, prompt included. Settings that cannot be carried out token by
token are refused by their names. Whether tokens are drawn, and how many there are, is decided by flags, not by the checkpoint.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import StopStringCriteria

from feature_alignment.cli.console import UserError

# Settings that decoding token by token does not carry out, and the values at which they do nothing
REFUSED: dict[str, tuple] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "constraints": ([],),
    "force_words_ids": ([],),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "dola_layers": (),
    "forced_eos_token_id": (),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    "top_h": (),
    "max_time": (),
    "use_mtp": (False,),
}


def eos_set(ids: int | Collection[int] | None) -> frozenset[int]:
    """End-of-text ids as a config states them: one, several or none."""
    return frozenset(() if ids is None else (ids,) if isinstance(ids, int) else ids)


def read_settings(path: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The settings of a checkpoint directory; ids that end a text come from its config or its tokenizer where they do not say.

    Raises:
        UserError: for settings that are damaged, or that are not carried out.
    """
    file = path / "generation_config.json"
    stated: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if not isinstance(stated, dict):
        raise UserError(f"{file}: wanted a JSON object, got {type(stated).__name__}. Download it again.")
    found = stated.get("eos_token_id")
    for ids in (getattr(config, "eos_token_id", None), config.get_text_config().eos_token_id, tokenizer.eos_token_id):
        found = ids if found in (None, []) else found
    listed = found if isinstance(found, list) else [found]
    if not all(type(i) is int and i >= 0 for i in listed if found is not None):
        raise UserError(f"{file}: eos_token_id must be a token id or a list of them, got {str(found)[:80]}.")
    try:
        settings = GenerationConfig(**{**stated, "eos_token_id": found})
    except Exception as error:  # values of a wrong kind raise errors of several
        raise UserError(f"{file}: {str(error).splitlines()[0][:200]}") from None
    return checked(settings, str(file))


def checked(settings: GenerationConfig, source: str) -> GenerationConfig:
    """The settings themselves, if all of them are carried out.

    Args:
        settings: of a checkpoint or of flags.
        source: their name in messages.

    Raises:
        UserError: naming each setting that is not, or that transformers' own processors refuse.
    """
    wrong = {k: v for k, off in REFUSED.items() if (v := getattr(settings, k, None)) is not None and v not in off}
    if wrong:
        named = ", ".join(f"{k} = {str(v)[:60]}" for k, v in wrong.items())
        raise UserError(f"{source} asks for {named}, which decoding token by token does not carry out. Remove it there.")
    try:
        _changes(settings, 1, "cpu")
        _narrows(settings)
    except Exception as error:  # each processor checks its own values
        raise UserError(f"{source}: {str(error).splitlines()[0][:200]}") from None
    return settings


def with_flags(settings: GenerationConfig | None, **flags: Any) -> GenerationConfig:
    """A checkpoint's settings, with those of the flags that were given (not None) in their place.

    Raises:
        UserError: for a value that transformers' own processors refuse.
    """
    merged = GenerationConfig() if settings is None else copy.deepcopy(settings)
    given = {name: value for name, value in flags.items() if value is not None}
    for name, value in given.items():
        setattr(merged, name, value)
    named = " ".join(f"--{'stop' if name == 'stop_strings' else name} {value}" for name, value in given.items())
    return checked(merged, named or "the checkpoint")


def _changes(s: GenerationConfig, prompt_length: int, device: torch.device | str) -> logits_process.LogitsProcessorList:
    """The processors of greedy decoding, in `generate`'s order."""
    found, eos = logits_process.LogitsProcessorList(), sorted(eos_set(s.eos_token_id))
    ends = torch.tensor(eos, device=device)
    if s.sequence_bias:
        found.append(logits_process.SequenceBiasLogitsProcessor(s.sequence_bias))
    if s.repetition_penalty not in (None, 1.0):
        found.append(logits_process.RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    if s.no_repeat_ngram_size:
        found.append(logits_process.NoRepeatNGramLogitsProcessor(s.no_repeat_ngram_size))
    if s.bad_words_ids is not None:
        found.append(logits_process.NoBadWordsLogitsProcessor(s.bad_words_ids, ends))
    if s.min_length and eos:
        found.append(logits_process.MinLengthLogitsProcessor(s.min_length, ends, device=str(device)))
    if s.min_new_tokens and eos:
        found.append(logits_process.MinNewTokensLengthLogitsProcessor(prompt_length, s.min_new_tokens, ends, device=str(device)))
    if s.exponential_decay_length_penalty is not None:
        found.append(logits_process.ExponentialDecayLengthPenalty(s.exponential_decay_length_penalty, ends, prompt_length))
    if s.suppress_tokens:
        found.append(logits_process.SuppressTokensLogitsProcessor(s.suppress_tokens, device=str(device)))
    if s.begin_suppress_tokens:
        found.append(logits_process.SuppressTokensAtBeginLogitsProcessor(s.begin_suppress_tokens, prompt_length, device=str(device)))
    return found


def _narrows(s: GenerationConfig) -> logits_process.LogitsProcessorList:
    """The processors of sampling after the temperature, in `generate`'s order."""
    found = logits_process.LogitsProcessorList()
    if s.top_k:
        found.append(logits_process.TopKLogitsWarper(s.top_k))
    if s.top_p is not None and s.top_p != 1.0:
        found.append(logits_process.TopPLogitsWarper(s.top_p))
    if s.min_p:
        found.append(logits_process.MinPLogitsWarper(s.min_p))
    if s.typical_p is not None and s.typical_p < 1.0:
        found.append(logits_process.TypicalLogitsWarper(s.typical_p))
    if s.epsilon_cutoff:
        found.append(logits_process.EpsilonLogitsWarper(s.epsilon_cutoff))
    if s.eta_cutoff:
        found.append(logits_process.EtaLogitsWarper(s.eta_cutoff))
    return found


@lru_cache(maxsize=8)
def _stopping(tokenizer: PreTrainedTokenizerBase, strings: tuple[str, ...]) -> StopStringCriteria:
    return StopStringCriteria(tokenizer, list(strings))


@dataclass(frozen=True)
class GenerationRules:
    """The settings at work on one text.

    Args:
        eos_ids: token ids that end it.
        prompt: ids of the prompt [s], which some processors read as well; placeholders of vision included.
        rows: ids that the processors may name; scores are filled up to as many.
        processors: logits_process of every decoding; narrows: those of sampling, after the temperature.
        stop: whether a text ends with one of some strings.
    """

    eos_ids: Collection[int] = ()
    prompt: Sequence[int] = ()
    rows: int = 0
    processors: logits_process.LogitsProcessorList = field(default_factory=logits_process.LogitsProcessorList)
    warpers: logits_process.LogitsProcessorList = field(default_factory=logits_process.LogitsProcessorList)
    stop: StopStringCriteria | None = None

    @classmethod
    def of(
        cls, s: GenerationConfig | None, eos_ids: Collection[int], prompt: Sequence[int], rows: int, tokenizer, device
    ) -> GenerationRules:
        """The rules of a text after this prompt. Ids below 0 stand for a prompt of embeddings, of which `generate` sees no ids."""
        if s is None:
            return cls(eos_ids)
        prompt = prompt if min(prompt, default=0) >= 0 else ()
        stop = (
            None
            if not s.stop_strings
            else _stopping(tokenizer, tuple([s.stop_strings] if isinstance(s.stop_strings, str) else s.stop_strings))
        )
        return cls(eos_ids, prompt, max(rows, max(prompt, default=0) + 1), _changes(s, len(prompt), device), _narrows(s), stop)

    def scores(self, logits: Tensor, text: Sequence[int], block: Sequence[int] = ()) -> Tensor:
        """Logits [n, v] as the processors change them; row i follows the prompt, `text` and the first i of the n - 1 tokens of `block`."""
        if not self.processors:
            return logits
        v = logits.shape[-1]
        wide = torch.nn.functional.pad(logits.float(), (0, max(0, self.rows - v)), value=-torch.inf)
        ids = torch.tensor([[*self.prompt, *text, *block]], dtype=torch.long, device=logits.device)
        start = len(self.prompt) + len(text)
        return torch.cat([self.processors(ids[:, : start + i], wide[i : i + 1])[:, :v] for i in range(len(wide))])

    def end_of(self, text: Sequence[int], new: Sequence[int]) -> int | None:
        """How many of the tokens `new` after `text` there are up to and including the first that ends it; None: none does."""
        end = next((i + 1 for i, token in enumerate(new) if token in self.eos_ids), None)
        if self.stop is not None:
            ids = torch.tensor([[*self.prompt, *text, *new]])
            start = ids.shape[1] - len(new)
            for i in range(1, 1 + (len(new) if end is None else end)):
                if bool(self.stop(ids[:, : start + i], None)):
                    return i
        return end


def most_likely(rules: Sequence[GenerationRules], logits: Tensor, texts: Sequence[Sequence[int]]) -> list[int]:
    """The most likely next token of several texts, from their logits [n, v], each under its own rules."""
    return (
        torch.cat([rule.scores(row, text) for rule, row, text in zip(rules, logits.split(1), texts, strict=True)])
        .float()
        .argmax(-1)
        .tolist()
    )
