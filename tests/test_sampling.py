"""Sampling is lossless: drafted or not, the first tokens have jointly the law of sampling from the target alone (chi-square tests, with
fixed seeds; a right sampler would fail one with probability ERROR)."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from conftest import EOS, as_decoder, noisy_copy, prompt_of, tiny_llama
from oracle import states_behind

from feature_alignment.chained_adapter import ChainedAdapter
from feature_alignment.decoding.engine import plain, speculate
from feature_alignment.decoding.null_drafters import NULL_DRAFTERS, HybridProposer, NGram, TableProposer
from feature_alignment.decoding.proposers import ChainedProposer, ModelProposer
from feature_alignment.decoding.sampling import Sampler
from feature_alignment.hidden_adapter import HiddenAdapter

ERROR = 1e-4
VOCAB, TEMPERATURE, LENGTH = 6, 1.3, 3
PROMPT = (1, 5, 9, 13)
TEXTS = [("", [3, 4, 5, 3, 2]), ("", [4, 5, 3, 2]), ("", [3, 4, 0, 2])]


def p_value(counts: Counter, law: dict) -> float:
    """Of Pearson's chi-square; cells expected fewer than five times are counted as one."""
    n = sum(counts.values())
    assert set(counts) <= set(law)
    cells = [(counts[x], p * n) for x, p in law.items() if p * n >= 5]
    rest = n - sum(c for c, _ in cells), n - sum(e for _, e in cells)
    cells += [rest] if rest[1] > 1 else []
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2.0), torch.tensor(statistic / 2.0)))


@pytest.fixture(scope="module")
def target():
    decoder = as_decoder(tiny_llama(5))
    decoder.restrict_vocabulary(VOCAB)
    return decoder


@pytest.fixture(scope="module")
@torch.inference_mode()
def law(target) -> dict[tuple[int, ...], float]:
    """The probability of every beginning of LENGTH tokens, or fewer that end."""
    done, open_ends = {}, {(): 1.0}
    for _ in range(LENGTH):
        longer = {}
        for text, p in open_ends.items():
            logits = target.lm_head(states_behind(target.llama, [*PROMPT, *text])[-1])
            longer |= {(*text, i): p * float(q) for i, q in enumerate((logits / TEMPERATURE).softmax(-1))}
        done |= {text: p for text, p in longer.items() if text[-1] == EOS}
        open_ends = {text: p for text, p in longer.items() if text[-1] != EOS}
    law = done | open_ends
    assert abs(sum(law.values()) - 1) < 1e-5 and sum(p > 0.01 for p in law.values()) > 15  # no foregone conclusion
    return law


def proposer_for(source: str, target):
    draft = as_decoder(noisy_copy(tiny_llama(5), 0.3))
    draft.restrict_vocabulary(VOCAB)
    torch.manual_seed(0)
    if source in ("own", "aligned"):
        adapter = HiddenAdapter(32, 32, 8).eval()
        torch.nn.init.normal_(adapter.up.weight, std=0.1)
        return ModelProposer(draft, adapter, target.lm_head if source == "aligned" else None)
    if source in NULL_DRAFTERS:
        return TableProposer(NULL_DRAFTERS[source](TEXTS))
    chained = ChainedProposer(draft, ChainedAdapter(32, 32, 1, 16).eval(), target.lm_head, target.embeddings)
    return chained if source == "chained" else HybridProposer(NGram(TEXTS), chained, sure=0.5)


def counted(target, proposer, sampler, n: int, gamma: int = 2) -> tuple[Counter, int]:
    """Beginnings of n texts, and how many drafts were kept in them. Two tokens more are drafted than looked at: a round may cross."""
    counts, kept = Counter(), 0
    for _ in range(n):
        prompt = prompt_of(*PROMPT)
        got = speculate(target, proposer, prompt, prompt, num_draft_tokens=gamma, max_new_tokens=LENGTH + 1, sampler=sampler)
        counts[tuple(got.token_ids[:LENGTH])] += 1
        kept += sum(r.num_accepted for r in got.rounds)
    return counts, kept


ALL = ["own", "aligned", "chained", "hybrid", *NULL_DRAFTERS]
FAST = [("chained", 1, 400), ("hybrid", 2, 400), ("own", 2, 400)]
CASES = [*FAST, *[pytest.param(s, g, 6000, marks=pytest.mark.slow) for s in ALL for g in (1, 3)]]


@pytest.mark.parametrize(("source", "gamma", "n"), CASES)
def test_drafts_do_not_change_the_law(target, law, source, gamma, n):
    sampler = Sampler(TEMPERATURE, seed=1)
    counts, kept = counted(target, proposer_for(source, target), sampler, n, gamma)
    assert kept > (0 if source == "lookup" else n / 20) and p_value(counts, law) > ERROR


def test_plain_sampling_has_the_law(target, law):
    sampler = Sampler(TEMPERATURE, seed=2)
    counts = Counter(tuple(plain(target, prompt_of(*PROMPT), LENGTH, sampler).token_ids) for _ in range(500))
    assert p_value(counts, law) > ERROR


class KeepsTooMuch(Sampler):
    def judge(self, draft_ids, draft_probs, target_probs, position=0):
        return super().judge(draft_ids, draft_probs, torch.cat([target_probs[:-1].sqrt(), target_probs[-1:]]), position)


class ReplacesFromP(Sampler):
    """Not from what is left of p."""

    def judge(self, draft_ids, draft_probs, target_probs, position=0):
        kept, _ = super().judge(draft_ids, draft_probs, target_probs, position)
        return kept, self.draw(target_probs[int(kept.sum())][None])[0]


@pytest.mark.parametrize("kind", [Sampler, KeepsTooMuch, ReplacesFromP])
@pytest.mark.parametrize("drawn", [True, False])
def test_judging_drafts(kind, drawn):
    """Drafts from q, judged by p in every place: the kept ones and the token behind them have the joint law p x p x p. Two wrong ways
    of judging are found out."""
    torch.manual_seed(0)
    v, g, n, sampler = 4, 2, 4000, kind(1.0, seed=3)
    p, q = torch.randn(g + 1, v).softmax(-1), torch.randn(g, v).softmax(-1)
    counts: Counter = Counter()
    for _ in range(n):
        drafts = sampler.draw(q) if drawn else q.argmax(-1)
        kept, behind = sampler.judge(drafts, q if drawn else None, p)
        text = [*drafts[: int(kept.sum())].tolist(), int(behind)]
        text += [int(sampler.draw(p[i][None])) for i in range(len(text), g + 1)]
        counts[tuple(text)] += 1
    law = {(a, b, c): float(p[0, a] * p[1, b] * p[2, c]) for a in range(v) for b in range(v) for c in range(v)}
    assert (p_value(counts, law) > ERROR) is (kind is Sampler)


def test_the_same_seed_says_the_same(target):
    texts = []
    for seed in (1, 1, 2):
        sampler = Sampler(TEMPERATURE, seed)
        prompt = prompt_of(*PROMPT)
        texts.append(
            speculate(target, proposer_for("chained", target), prompt, prompt, max_new_tokens=40, sampler=sampler).token_ids
        )
    assert texts[0] == texts[1] != texts[2]


def test_hardly_any_temperature_is_greedy():
    target = as_decoder(tiny_llama(0))
    sampler, prompt = Sampler(1e-4), prompt_of(*PROMPT)
    proposer = ModelProposer(as_decoder(noisy_copy(tiny_llama(0), 0.05)), None, None)
    greedy = plain(target, prompt, 30).token_ids
    assert speculate(target, proposer, prompt, prompt, max_new_tokens=30, sampler=sampler).token_ids == greedy
    assert any(a != b for a, b in pairwise(greedy))


def test_what_is_not_lossless_is_refused(target):
    with pytest.raises(ValueError, match="temperature above 0"):
        Sampler(0.0)
    prompt = prompt_of(*PROMPT)
    with pytest.raises(ValueError, match="token rule only"):
        speculate(target, proposer_for("aligned", target), prompt, prompt, accept="feature", sampler=Sampler(1.0))
