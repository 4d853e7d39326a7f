"""Comparison of a method's texts with those of plain greedy decoding: mismatches, likelihood, and facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch

from feature_alignment.benchmark.results import AcceptedKinds, Fidelity, Mismatch
from feature_alignment.benchmark.timing import Timed
from feature_alignment.inputs.samples import Sample
from feature_alignment.measurement.lexicon import Lexicon
from feature_alignment.measurement.metrics import Counts, Rate
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.state import Prompt

LogLikelihood = Callable[[int, tuple[int, ...]], float]  # (index of a prompt, token ids) -> log-probability under the target


@torch.inference_mode()
def mismatches(target: Decoder, prompts: Sequence[Prompt], samples: Sequence[Sample], texts: Timed, plain: Timed) -> list[Mismatch]:
    """The first difference of each text from plain greedy decoding; a text that several repeats share is listed once.

    Args:
        target: target model
        prompts: its prompts
        samples: one for each prompt
        texts: runs of the method
        plain: runs of plain greedy decoding
    """
    found = []
    for prompt, sample, runs, own in zip(prompts, samples, texts.generations, plain.texts, strict=True):
        for text in sorted({tuple(g.token_ids) for g in runs} - {tuple(own)}):
            at = next((i for i, (a, b) in enumerate(zip(text, own, strict=False)) if a != b), min(len(text), len(own)))
            ids = torch.tensor([own], device=target.device)
            logits = target.lm_head(target.teacher_force(target.prefill([prompt]), ids))[0, min(at, len(own) - 1)]
            best = logits.float().topk(2).values
            found.append(Mismatch(sample.id, at, float(best[0] - best[1])))
    return found


def log_likelihoods(target: Decoder, prompts: Sequence[Prompt]) -> LogLikelihood:
    """A function that returns the target's log-probability of a text after a prompt, computed once for each text."""

    @cache
    @torch.inference_mode()
    def log_likelihood(i: int, tokens: tuple[int, ...]) -> float:
        ids = torch.tensor([tokens], device=target.device)
        log_p = target.lm_head(target.teacher_force(target.prefill([prompts[i]]), ids)).float().log_softmax(-1)
        return float(log_p.gather(-1, ids[..., None]).sum())

    return log_likelihood


def fidelity(
    target: Decoder,
    log_likelihood: LogLikelihood,
    samples: Sequence[Sample],
    texts: Timed,
    plain: Timed,
    lexicon: Lexicon | None = None,
) -> Fidelity:
    """Compare a method's texts with those of plain greedy decoding; counts are summed over the repeats of a prompt.

    Args:
        target: target model
        log_likelihood: result of `log_likelihoods`
        samples: one for each prompt
        texts: runs of the method
        plain: runs of plain greedy decoding
        lexicon: which words state which facts; facts are reported only with a lexicon and if every sample has facts
    """
    clips = [s.sequence for s in samples]
    own = [tokens for tokens, runs in zip(plain.texts, texts.generations, strict=True) for _ in runs]
    pairs = [(g.token_ids, tokens) for g, tokens in zip(texts.every, own, strict=True)]
    prompt_of = [i for i, runs in enumerate(texts.generations) for _ in runs]

    def rate(count: list[float], total: list[float]) -> Rate:
        count_of, total_of = (np.bincount(prompt_of, values, len(clips)) for values in (count, total))
        return Counts(count_of, total_of).rate(clips)

    visible, hidden, kinds = None, None, None
    if lexicon and all(s.facts for s in samples):
        visible, hidden = true_facts(lexicon, target, samples, texts)
        kinds = accepted_kinds(lexicon, target, texts)
    return Fidelity(
        exact_match=rate([float(a == b) for a, b in pairs], [1.0] * len(pairs)),
        token_agreement=rate(
            [float(sum(x == y for x, y in zip(a, b, strict=False))) for a, b in pairs], [float(max(len(a), len(b))) for a, b in pairs]
        ),
        log_likelihood=rate(
            [log_likelihood(i, tuple(a)) for i, (a, _) in zip(prompt_of, pairs, strict=True)], [float(len(a)) for a, _ in pairs]
        ),
        true_facts_visible=visible,
        true_facts_hidden=hidden,
        kept_drafts=kinds,
    )


def true_facts(lexicon: Lexicon, target: Decoder, samples: Sequence[Sample], texts: Timed) -> tuple[Rate, Rate]:
    """Share of stated facts that are true: of slots that events show, and of slots that they hide.

    Args:
        lexicon: which words state which facts
        target: target model, for its tokenizer
        samples: one for each prompt, with facts
        texts: runs of the method
    """
    true, stated = np.zeros((2, len(samples))), np.zeros((2, len(samples)))
    for i, sample in enumerate(samples):
        for g in texts.generations[i]:
            for slot, value in lexicon.facts_in(target.tokenizer.decode(g.token_ids, skip_special_tokens=True)).items():
                is_hidden = int(slot in lexicon.hidden_from_events)
                stated[is_hidden, i] += 1
                true[is_hidden, i] += str((sample.facts or {}).get(slot)) == value  # a manifest may hold numbers, a lexicon holds texts
    clips = [s.sequence for s in samples]
    return Counts(true[0], stated[0]).rate(clips), Counts(true[1], stated[1]).rate(clips)


def accepted_kinds(lexicon: Lexicon, target: Decoder, texts: Timed) -> AcceptedKinds:
    """Count the accepted draft tokens: the target's own token, a synonym of it, or an error.

    Args:
        lexicon: which words state which facts
        target: target model, for its tokenizer
        texts: runs of the method
    """
    counts, decode = {"kept": 0, "same": 0, "synonym": 0, "error": 0}, target.tokenizer.decode
    for r in (r for g in texts.every for r in g.rounds):
        for drafted, own, accepted in zip(r.proposed, r.target_tokens, r.accepted, strict=True):
            if accepted:
                fact = lexicon.fact_of(decode([drafted]))
                is_same_fact = fact is not None and fact == lexicon.fact_of(decode([own]))
                counts["kept"] += 1
                counts["same" if drafted == own else "synonym" if is_same_fact else "error"] += 1
    return AcceptedKinds(**counts)
