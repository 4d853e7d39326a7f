"""Generation settings of a checkpoint: the ids and strings that end a text, and the processors of its next-token logits.

Settings are transformers' `GenerationConfig`, read from `generation_config.json`, and are applied by transformers' own logits processors:
a text equals the one that `generate` returns for the same `input_ids`, prompt included. Settings that token-by-token decoding cannot
apply are refused by name. Sampling and the number of tokens are set by flags, not by the checkpoint.
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

# Settings that token-by-token decoding does not support, with the values at which they have no effect
REFUSED: dict[str, tuple[object, ...]] = {
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
    """A config's EOS ids (one, several or none) as a set."""
    return frozenset(() if ids is None else (ids,) if isinstance(ids, int) else ids)


def read_settings(path: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Read the generation settings of a checkpoint.

    Args:
        path: Checkpoint directory; generation_config.json in it is optional.
        config: The model's config, which names the EOS ids where the file does not.
        tokenizer: Names the EOS id where neither does.

    Raises:
        UserError: If the file is damaged or asks for settings that are not supported.
    """
    file = path / "generation_config.json"
    stated: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if not isinstance(stated, dict):
        raise UserError(f"{file}: expected a JSON object, got {type(stated).__name__}. Download it again.")
    found = stated.get("eos_token_id")
    for ids in (getattr(config, "eos_token_id", None), config.get_text_config().eos_token_id, tokenizer.eos_token_id):
        found = ids if found in (None, []) else found
    listed = found if isinstance(found, list) else [found]
    if not all(type(i) is int and i >= 0 for i in listed if found is not None):
        raise UserError(f"{file}: eos_token_id must be a token id or a list of them, got {str(found)[:80]}.")
    try:
        settings = GenerationConfig(**{**stated, "eos_token_id": found})
    except Exception as error:  # values of a wrong type raise different errors
        raise UserError(f"{file}: {str(error).splitlines()[0][:200]}") from None
    return check_settings(settings, str(file))


def check_settings(settings: GenerationConfig, source: str) -> GenerationConfig:
    """Return the settings if all of them are supported.

    Args:
        settings: From a checkpoint or from flags.
        source: Their origin, for error messages.

    Raises:
        UserError: For each setting that is not supported or that transformers' processors refuse.
    """
    wrong = {k: v for k, off in REFUSED.items() if (v := getattr(settings, k, None)) is not None and v not in off}
    if wrong:
        named = ", ".join(f"{k} = {str(v)[:60]}" for k, v in wrong.items())
        raise UserError(f"{source} asks for {named}, which token-by-token decoding does not support. Remove it there.")
    try:
        _processors(settings, 1, "cpu")
        _warpers(settings)
    except Exception as error:  # each processor validates its own values
        raise UserError(f"{source}: {str(error).splitlines()[0][:200]}") from None
    return settings


def with_flags(settings: GenerationConfig | None, **flags: Any) -> GenerationConfig:
    """Override a checkpoint's settings by flags.

    Args:
        settings: Of the checkpoint; None for transformers' defaults.
        **flags: Setting names and values; None means that the flag was not given.

    Raises:
        UserError: For a value that transformers' processors refuse.
    """
    merged = GenerationConfig() if settings is None else copy.deepcopy(settings)
    given = {name: value for name, value in flags.items() if value is not None}
    for name, value in given.items():
        setattr(merged, name, value)
    named = " ".join(f"--{'stop' if name == 'stop_strings' else name} {value}" for name, value in given.items())
    return check_settings(merged, named or "the checkpoint")


def _processors(s: GenerationConfig, prompt_length: int, device: torch.device | str) -> logits_process.LogitsProcessorList:
    """Logits processors for greedy decoding, in the order of `generate`."""
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


def _warpers(s: GenerationConfig) -> logits_process.LogitsProcessorList:
    """Logits processors for sampling, applied after the temperature, in the order of `generate`."""
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
def _stop_criterion(tokenizer: PreTrainedTokenizerBase, strings: tuple[str, ...]) -> StopStringCriteria:
    return StopStringCriteria(tokenizer, list(strings))


@dataclass(frozen=True)
class GenerationRules:
    """Generation settings applied to one text.

    Args:
        eos_ids: Token ids that end the text.
        prompt: [s], prompt ids including vision placeholders; some processors read them.
        rows: Number of ids that processors may refer to; logits are padded to it.
        processors: Logits processors of greedy decoding and sampling.
        warpers: Logits processors of sampling only, applied after the temperature.
        stop: Criterion for stop strings; None where there are none.
    """

    eos_ids: Collection[int] = ()
    prompt: Sequence[int] = ()
    rows: int = 0
    processors: logits_process.LogitsProcessorList = field(default_factory=logits_process.LogitsProcessorList)
    warpers: logits_process.LogitsProcessorList = field(default_factory=logits_process.LogitsProcessorList)
    stop: StopStringCriteria | None = None

    @classmethod
    def of(
        cls,
        settings: GenerationConfig | None,
        eos_ids: Collection[int],
        prompt: Sequence[int],
        rows: int,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
    ) -> GenerationRules:
        """Build the rules of a text.

        Args:
            settings: Of the checkpoint; None if only EOS ids apply.
            eos_ids: Token ids that end the text.
            prompt: [s], prompt ids; ids below 0 mark a prompt of embeddings, whose ids `generate` does not see.
            rows: Rows of the LM head.
            tokenizer: Spells tokens for stop strings.
            device: Device of the logits.
        """
        if settings is None:
            return cls(eos_ids)
        prompt = prompt if min(prompt, default=0) >= 0 else ()
        strings = [settings.stop_strings] if isinstance(settings.stop_strings, str) else settings.stop_strings
        stop = _stop_criterion(tokenizer, tuple(strings)) if strings else None
        ids = max(rows, max(prompt, default=0) + 1)
        return cls(eos_ids, prompt, ids, _processors(settings, len(prompt), device), _warpers(settings), stop)

    def scores(self, logits: Tensor, text: Sequence[int], block: Sequence[int] = ()) -> Tensor:
        """Apply the processors to next-token logits.

        Args:
            logits: [n, v]; row i predicts the token after the prompt, `text` and the first i tokens of `block`.
            text: Tokens emitted so far.
            block: n - 1 further tokens, for example draft tokens.

        Returns:
            [n, v], processed logits.
        """
        if not self.processors:
            return logits
        v = logits.shape[-1]
        padded = torch.nn.functional.pad(logits.float(), (0, max(0, self.rows - v)), value=-torch.inf)
        ids = torch.tensor([[*self.prompt, *text, *block]], dtype=torch.long, device=logits.device)
        start = len(self.prompt) + len(text)
        return torch.cat([self.processors(ids[:, : start + i], padded[i : i + 1])[:, :v] for i in range(len(padded))])

    def end_of(self, text: Sequence[int], new: Sequence[int]) -> int | None:
        """Find where a text ends.

        Args:
            text: Tokens emitted so far, which do not end it.
            new: Tokens after them.

        Returns:
            The number of tokens of `new` up to and including the first that ends the text; None if none does.
        """
        end = next((i + 1 for i, token in enumerate(new) if token in self.eos_ids), None)
        if self.stop is not None:
            ids = torch.tensor([[*self.prompt, *text, *new]])
            start = ids.shape[1] - len(new)
            for i in range(1, 1 + (len(new) if end is None else end)):
                if bool(self.stop(ids[:, : start + i], None)):
                    return i
        return end


def most_likely(rules: Sequence[GenerationRules], logits: Tensor, texts: Sequence[Sequence[int]]) -> list[int]:
    """The greedy next token of several texts, each under its own rules.

    Args:
        rules: n rules.
        logits: [n, v], next-token logits.
        texts: n texts emitted so far.
    """
    scores = torch.cat([rule.scores(row, text) for rule, row, text in zip(rules, logits.split(1), texts, strict=True)])
    tokens: list[int] = scores.float().argmax(-1).tolist()
    return tokens
