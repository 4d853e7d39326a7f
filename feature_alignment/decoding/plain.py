"""Plain decoding: the baseline of every measurement."""

from __future__ import annotations

import torch

from feature_alignment.decoding.generation import Generation, relative_spans
from feature_alignment.decoding.sampling import Sampler
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.decoding.token_selection import TokenSelector
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.state import Prompt


@torch.inference_mode()
def decode_plainly(target: Decoder, prompt: Prompt, max_new_tokens: int, sampler: Sampler | None = None) -> Generation:
    """The baseline: the target alone, one token per pass, up to and including the end of the text.

    Args:
        target: the model
        prompt: of one sample
        max_new_tokens: longest answer, EOS included
        sampler: draws tokens; None for greedy decoding
    """
    watch = Stopwatch(target.device)
    start = watch.now()
    selector = TokenSelector.of(target, prompt, sampler)
    with watch("target_prefill"):
        state = target.prefill([prompt])
        token = selector.select(target.lm_head(state.last), []).token
    emitted = [int(token)]
    with watch("verify"):
        while selector.rules.end_of(emitted[:-1], emitted[-1:]) is None and len(emitted) < max_new_tokens:
            token = selector.select(target.lm_head(target.step(state, token[None])[:, -1]), emitted).token
            emitted.append(int(token))
    return Generation(emitted, len(emitted) - 1, watch.now() - start, watch.ms, spans=relative_spans(watch.spans, start))


def greedy(target: Decoder, prompt: Prompt, max_new_tokens: int) -> Generation:
    """Plain greedy decoding."""
    return decode_plainly(target, prompt, max_new_tokens)
