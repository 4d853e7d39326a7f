"""Token against token and draft against draft: how far two texts agree, what a rule keeps of any drafts, and how wrong what it keeps is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feature_alignment.decoding.baseline_drafters import BASELINE_DRAFTERS, Lookup
from feature_alignment.measurement import metrics
from feature_alignment.measurement.lexicon import Lexicon

EXAMPLES = 10  # of each draft source


def clips_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [str(row.get("sequence", row.get("sample_id", i))) for i, row in enumerate(rows)]


def free_running_agreement(rows: Sequence[dict[str, Any]], num_draft_tokens: int) -> dict[str, Any]:
    """How far the two free-running texts agree, each pair compared up to the shorter one.

    position_match: same token at the same place; mean_prefix: leading tokens in common; consecutive_accept: those among the
    first num_draft_tokens, as a share of them; first_token_differs: share of rows
    """
    same, total, prefix = [], [], []
    for row in rows:
        pairs = list(zip(row["egpt_tokens"], row["vl_tokens"], strict=False))
        equal = [a == b for a, b in pairs]
        same.append(sum(equal))
        total.append(len(equal))
        prefix.append(equal.index(False) if False in equal else len(equal))
    clips, ones = clips_of(rows), np.ones(len(rows))
    capped = np.minimum(prefix, num_draft_tokens).astype(float)
    return {
        "position_match": metrics.Counts(np.array(same, float), np.array(total, float)).rate(clips),
        "mean_prefix": metrics.Counts(np.array(prefix, float), ones).rate(clips),
        "consecutive_accept": metrics.Counts(capped, ones * num_draft_tokens).rate(clips),
        "first_token_differs": metrics.Counts((np.array(prefix) == 0).astype(float), ones).rate(clips),
        "params": 0,
        "overhead_ms": 0.0,
    }


def verified(bits: Tensor, rows: Sequence[dict[str, Any]], num_draft_tokens: int, eos_ids: Collection[int]) -> dict[str, Any]:
    """Drafts of the target's texts under the token rule. bits: [n, s], right at this place if all before it is the target's text.

    eos_ids: token ids that end a text
    leading_tokens: right ones before the first wrong one, from the text's very first token on
    """
    lengths = torch.tensor([len(r["vl_tokens"]) for r in rows])
    mask = torch.arange(bits.shape[1]) < lengths[:, None]
    ended = torch.tensor([r["vl_tokens"][-1] in eos_ids for r in rows])
    blocks, clips, n = metrics.decoding_blocks(bits, mask, num_draft_tokens, ended), clips_of(rows), len(rows)
    return {
        "token_match": metrics.counts(bits, mask).rate(clips),
        "acceptance_rate": blocks.acceptance_rate(n).rate(clips),
        "consecutive_accept": blocks.consecutive_accept(n).rate(clips),
        "leading_tokens": metrics.counts(metrics.leading_run(bits, mask)[:, None], torch.ones(n, 1)).rate(clips),
        "tokens_per_pass": blocks.tokens_per_pass(lengths),
    }


def right(drafts: Sequence[Sequence[int | None]], rows: Sequence[dict[str, Any]]) -> Tensor:
    """Where drafts are the target's tokens: [n, longest text] bool."""
    bits = torch.zeros(len(rows), max(len(r["vl_tokens"]) for r in rows), dtype=torch.bool)
    for i, (draft, row) in enumerate(zip(drafts, rows, strict=True)):
        same = [a == b for a, b in zip(draft, row["vl_tokens"], strict=False)]
        bits[i, : len(same)] = torch.tensor(same)
    return bits


def null_drafter_reports(
    train: Sequence[dict],
    rows: Sequence[dict],
    num_draft_tokens: int,
    eos_ids: Collection[int],
    encode: Callable[[str], Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Each null drafter on the target's own texts, in their order (the trace identity makes that exact for lossless decoding).

    eos_ids: token ids that end a text
    encode: question -> token ids, which `lookup` reads as it does while decoding; without it, it reads the answer only
    """
    reports = {}
    for name, fit in BASELINE_DRAFTERS.items():
        table = Lookup(encode=cache(encode)) if encode and name == "lookup" else fit([(r["query"], r["vl_tokens"]) for r in train])
        drafts = []
        for row in rows:
            tokens = row["vl_tokens"]
            drafts.append([table.next_token(row["query"], tokens[:t]) for t in range(len(tokens))])
            table.finished(row["query"], tokens)
        reports[name] = {**verified(right(drafts, rows), rows, num_draft_tokens, eos_ids), "params": 0}
    return reports


def halves(rows: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """Rows of the first half of the sequences, in the order they come, and of the second."""
    clips = clips_of(rows)
    order = list(dict.fromkeys(clips))
    first = set(order[: len(order) // 2])
    return [r for r, c in zip(rows, clips, strict=True) if c in first], [r for r, c in zip(rows, clips, strict=True) if c not in first]


def accepted_drafts(
    sources: Mapping[str, Mapping[str, Tensor]],
    token_ids: Tensor,
    word: Callable[[int], str],
    sample_ids: Sequence[str],
    lexicon: Lexicon,
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """Per draft source and threshold, what a cosine keeps: the target's own word, a synonym, another fact (of a slot that events
    show, or hide), another word. Second, kept words that are not the target's, highest cosine first, as examples.

    sources:   name -> cosine, says, there [n, s], or [n, s, steps] of rounds that begin anywhere (scores.pt)
    token_ids: [n, s] the target's text
    word:      token id -> word
    lexicon:   which words state which facts
    """
    sweeps, examples = {}, []
    thresholds = torch.arange(0.5, 0.991, 0.02, dtype=torch.float64)
    for name, s in sources.items():
        there = s["there"].nonzero()
        at = there[:, 1] + (there[:, 2] if there.shape[1] == 3 else 0)
        says, said = s["says"][s["there"]].tolist(), token_ids[there[:, 0], at].tolist()
        cosine = s["cosine"][s["there"]].double()
        known = {pair: lexicon.compare(*map(word, pair)) for pair in set(zip(says, said, strict=True))}
        kinds = [known[pair] for pair in zip(says, said, strict=True)]
        masks = {k: torch.tensor([kind == k for kind, _ in kinds]) for k in ("same", "synonym", "other_fact", "other_word")}
        masks["other_fact_hidden"] = masks["other_fact"] & torch.tensor([slot in lexicon.hidden_from_events for _, slot in kinds])
        sweeps[name] = [
            {"threshold": float(t), "drafted": len(cosine), "kept": int((cosine > t).sum())}
            | {k: int((m & (cosine > t)).sum()) for k, m in masks.items()}
            for t in thresholds
        ]
        differ = (~masks["same"]).nonzero()[:, 0]
        shown: set[tuple[int, int]] = set()  # a place of a text may be drafted at several steps of a chain
        for i in differ[cosine[differ].argsort(descending=True)].tolist():
            row, place = int(there[i, 0]), int(at[i])
            if (row, place) in shown or len(shown) == EXAMPLES:
                continue
            shown.add((row, place))
            before = " ".join(word(t) for t in token_ids[row, max(0, place - 6) : place].tolist())
            about = {"source": name, "sample": sample_ids[row], "before": before, "drafted": word(says[i]), "said": word(said[i])}
            examples.append(about | {"verdict": kinds[i][0], "cosine": float(cosine[i])})
    return sweeps, examples
