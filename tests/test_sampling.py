"""Sampling is lossless: with and without drafting, the first tokens have the joint distribution of sampling from the target alone.

Chi-square tests with fixed seeds; a correct sampler fails one with probability ERROR.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import EOS, as_decoder, noisy_copy, prompt_of, tiny_llama
from oracle import states_behind
from torch import Tensor

from feature_alignment.adapters.attending import AttendingAdapter
from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.adapters.tables import Answer, Counts, question_number
from feature_alignment.decoding import sampling
from feature_alignment.decoding.attending_proposer import AttendingProposer
from feature_alignment.decoding.baseline_drafters import BASELINE_DRAFTERS, HybridProposer, NGram, TableProposer
from feature_alignment.decoding.chained_proposer import ChainedProposer
from feature_alignment.decoding.draft_length import DraftLengthController
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.plain import decode_plainly
from feature_alignment.decoding.proposers import Draft, ModelProposer, Proposer
from feature_alignment.decoding.sampling import Sampler
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.decoding.token_selection import TokenSelector
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.state import State

ERROR = 1e-4
VOCAB, TEMPERATURE, LENGTH = 6, 1.3, 3
PROMPT = (1, 5, 9, 13)
TRIMMED = [0, 2, 3, 5]  # of a trimmed draft vocabulary: 1 and 4 are never drafted, and said as often as the target says them
TEXTS = [("", [3, 4, 5, 3, 2]), ("", [4, 5, 3, 2]), ("", [3, 4, 0, 2])]


def p_value(counts: Counter, distribution: dict) -> float:
    """Of Pearson's chi-square; cells expected fewer than five times are counted as one."""
    n = sum(counts.values())
    assert set(counts) <= set(distribution)
    cells = [(counts[x], p * n) for x, p in distribution.items() if p * n >= 5]
    rest = n - sum(c for c, _ in cells), n - sum(e for _, e in cells)
    cells += [rest] if rest[1] > 1 else []
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2.0), torch.tensor(statistic / 2.0)))


@pytest.fixture(scope="module")
def target():
    decoder = as_decoder(tiny_llama(5))
    decoder.restrict_vocabulary(VOCAB)
    return Remembered(decoder)


@pytest.fixture(scope="module")
@torch.inference_mode()
def distribution(target) -> dict[tuple[int, ...], float]:
    """Probability of every text prefix of LENGTH tokens, or fewer if EOS ends it."""
    done, open_ends = {}, {(): 1.0}
    for _ in range(LENGTH):
        longer = {}
        for text, p in open_ends.items():
            logits = target.lm_head(states_behind(target.llama, [*PROMPT, *text])[-1])
            longer |= {(*text, i): p * float(q) for i, q in enumerate((logits / TEMPERATURE).softmax(-1))}
        done |= {text: p for text, p in longer.items() if text[-1] == EOS}
        open_ends = {text: p for text, p in longer.items() if text[-1] != EOS}
    distribution = done | open_ends
    assert abs(sum(distribution.values()) - 1) < 1e-5 and sum(p > 0.01 for p in distribution.values()) > 15  # the distribution is broad
    return distribution


class Remembered(Decoder):
    """A decoder that computes the states of each text once: 20,000 texts in seconds."""

    def __init__(self, real: Decoder) -> None:
        vars(self).update(vars(real))
        self._real, self._known = real, {}

    def prefill(self, prompts):
        state = State(None, None, len(prompts[0].ids))
        state.text = tuple(prompts[0].ids.tolist())
        state.prompt = torch.stack([self._behind(state.text[:end]) for end in range(1, state.length + 1)])[None]
        state.last, state.inputs = state.prompt[:, -1], self.embeddings_of(list(state.text))[None]
        return state

    def step(self, state, token_ids):
        states = []
        for token in token_ids[0].tolist():
            state.text = (*state.text, token)
            states.append(self._behind(state.text))
        state.last = states[-1][None]
        return torch.stack(states)[None]

    def rollback(self, state, n):
        state.text = state.text[: len(state.text) - n]

    def _behind(self, text):
        if text not in self._known:
            self._known[text] = states_behind(self._real.llama, text)[-1]
        return self._known[text]


def proposer_for(source: str, target):
    draft = as_decoder(noisy_copy(tiny_llama(5), 0.3))
    draft.restrict_vocabulary(VOCAB)
    draft = Remembered(draft)
    torch.manual_seed(0)
    if source in ("own", "aligned"):
        adapter = HiddenAdapter(32, 32, 8).eval()
        torch.nn.init.normal_(adapter.up.weight, std=0.1)
        return ModelProposer(draft, adapter, target.lm_head if source == "aligned" else None)
    if source in BASELINE_DRAFTERS:
        return TableProposer(BASELINE_DRAFTERS[source](TEXTS))
    ids = torch.tensor(TRIMMED) if source.endswith(", trimmed") else None
    if source.startswith("attending"):
        entries = Counts(Answer(str(i), question_number(""), text) for i, (_, text) in enumerate(TEXTS)).entries()
        every = torch.arange(VOCAB) if ids is None else ids
        attending = AttendingAdapter(32, 32, 1, len(every), len(entries), num_prompt=2, width=16).eval()
        attending.ids.copy_(every)
        attending.table.copy_(entries)
        return AttendingProposer(draft, attending, target)
    chained = ChainedProposer(draft, ChainedAdapter(32, 32, 1, 16).eval(), target.head_weight, target.embeddings, ids)
    return chained if source.startswith("chained") else HybridProposer(NGram(TEXTS), chained, sure=0.5)


@torch.inference_mode()
def counted(target, proposer, sampler, n: int, gamma: int = 2, controller=None) -> tuple[Counter, int]:
    """Prefixes of n texts and the number of accepted draft tokens. Rounds may cross the end of a prefix."""
    counts, kept, prompt = Counter(), 0, prompt_of(*PROMPT)
    for i in range(n):
        if sampler.shared_noise:
            sampler.restart(i)
        got = speculate(
            target, proposer, prompt, prompt, num_draft_tokens=gamma, max_new_tokens=LENGTH + 1, sampler=sampler, controller=controller
        )
        counts[tuple(got.token_ids[:LENGTH])] += 1
        kept += sum(r.num_accepted for r in got.rounds)
    return counts, kept


DRAWS = 20_000
ALL = [*(f"{name}{ids}" for name in ("chained", "attending", "hybrid") for ids in ("", ", trimmed")), "own", "aligned", *BASELINE_DRAFTERS]
FAST = [("chained", 1, 400, False), ("chained, trimmed", 2, 400, False), ("attending, trimmed", 2, 400, False)]
FAST += [("hybrid", 2, 400, False), ("own", 2, 400, True)]
CASES = [*FAST, *[pytest.param(s, g, DRAWS, shared, marks=pytest.mark.slow) for s in ALL for g, shared in ((3, False), (2, True))]]


@pytest.mark.parametrize(("source", "gamma", "n", "shared"), CASES)
def test_speculative_sampling_has_the_targets_distribution(target, distribution, source, gamma, n, shared):
    sampler = Sampler(TEMPERATURE, seed=1, shared_noise=shared)
    counts, kept = counted(target, proposer_for(source, target), sampler, n, gamma)
    assert kept > (0 if source == "lookup" else n / 20) and p_value(counts, distribution) > ERROR


class Drawn(Proposer):
    """Draws one token after another from q, the same distribution at every position."""

    def __init__(self, q: Tensor) -> None:
        self._logits = q.log()[None]

    def start(self, prompt, watch):
        pass

    def propose(self, emitted, states, num_tokens, watch, confidence_floor=0.0):
        picks, text = [], list(emitted)
        while len(picks) < num_tokens:
            picks.append(self.selector.select(self._logits, text, confidence=confidence_floor > 0))
            text.append(int(picks[-1].token))
        return Draft.of(picks, None)


class Says(NGram):
    def __init__(self, token: int, share: float) -> None:
        self._said = token, share

    def guess(self, question, prefix):
        return self._said


# the table's token and share, where the target's distribution is P and the model's is Q
P, Q = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.9, 0.05, 0.05, 0.0])
SHAPES = {"probable for both": (0, 1.0), "improbable for the model": (1, 1.0), "an impossible token": (3, 1.0), "nothing": (0, 0.2)}


@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_hybrid_is_lossless_for_any_table(shape, shared):
    """Draft tokens of the table are point masses, even where the model drew the same token."""
    sampler, proposer = Sampler(1.0, seed=7, shared_noise=shared), HybridProposer(Says(*SHAPES[shape]), Drawn(Q))
    proposer.selector = selector = TokenSelector(sampler=sampler)
    proposer.start(prompt_of(*PROMPT), watch := Stopwatch())
    counts, gamma = Counter(), 2
    for i in range(DRAWS):
        if shared:
            sampler.restart(i)
        draft = proposer.propose([0], P[None], gamma, watch)
        kept, after = selector.accept(draft.token_ids, draft.probs, P.log().expand(gamma + 1, -1), [0])
        text = [*draft.token_ids[: int(kept.sum())].tolist(), int(after)]
        text += [int(sampler.draw(P[None], 1 + len(text))) for _ in range(2 - len(text))]
        counts[tuple(text[:2])] += 1
    joint = {(a, b): float(P[a] * P[b]) for a in range(4) for b in range(4)}
    assert p_value(counts, joint) > ERROR


def test_probabilities_of_table_tokens_are_on_the_models_device():
    """They join the model's rows, so the device of the token ids does not matter."""
    proposer = HybridProposer(Says(1, 1.0), Drawn(Q.to("meta")))
    proposer._model.propose = lambda *_: Draft(torch.tensor([0, 0, 2]), probs=Q.to("meta").expand(3, -1))
    proposer._table.guess = lambda question, prefix: (1, 1.0) if len(prefix) == 2 else (0, 0.0)
    proposer.selector = TokenSelector(sampler=Sampler(1.0))
    proposer.start(prompt_of(*PROMPT), watch := Stopwatch())
    assert proposer.propose([0], P[None], 2, watch).probs.device.type == "meta"


def test_with_shared_noise_the_text_equals_plain_sampling(target):
    """For any drafter, any draft lengths and any start of a round."""
    prompt, r = prompt_of(*PROMPT), random.Random(0)

    class RandomLengths(DraftLengthController):
        """Random draft lengths, as unpredictable timing might choose them."""

        def next_confidence_floor(self):
            return r.choice([None, 0.0, 0.3, 0.9])

        def max_draft_tokens(self, confidence_floor, has_confidence=True):
            lengths.add(length := r.randint(1, 5))
            return length

    texts, lengths = set(), set()
    for seed in range(30):
        sampler = Sampler(TEMPERATURE, seed, shared_noise=True)
        wanted = decode_plainly(target, prompt, 12, sampler).token_ids
        for source in ("own", "chained", "attending", "hybrid", "ngram"):
            got = speculate(
                target,
                proposer_for(source, target),
                prompt,
                prompt,
                sampler=sampler,
                controller=RandomLengths(0.9),
                overlap=seed % 2 == 0,
                max_new_tokens=12,
            )
            assert got.token_ids == wanted
        texts.add(tuple(wanted))
    assert len(texts) > 15 and lengths == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("shared", [False, True])
def test_acceptance_rates_of_both_couplings(shared):
    """The maximal coupling accepts sum(min(p, q)); shared noise somewhat less, and at least (1 - d) / (1 + d)."""
    sampler = Sampler(1.0, 3, shared_noise=shared)
    overlap = float(torch.minimum(P, Q).sum())
    kept = 0
    for i in range(DRAWS):
        if shared:
            sampler.restart(i)
        draft = sampler.draw(Q[None], 0)
        kept += int(sampler.accept(draft, Q[None], P.expand(2, -1), 0)[0].sum())
    rate = kept / DRAWS
    if shared:
        assert overlap / (2 - overlap) - 0.01 < rate < overlap + 0.01
    else:
        assert abs(rate - overlap) < 0.015


def test_plain_sampling_has_the_targets_distribution(target, distribution):
    sampler = Sampler(TEMPERATURE, seed=2)
    counts = Counter(tuple(decode_plainly(target, prompt_of(*PROMPT), LENGTH, sampler).token_ids) for _ in range(500))
    assert p_value(counts, distribution) > ERROR


class AcceptsTooMuch(Sampler):
    """Wrong: accepts with a probability above p / q."""

    def accept(self, draft_ids, draft_probs, target_probs, position=0):
        return super().accept(draft_ids, draft_probs, torch.cat([target_probs[:-1].sqrt(), target_probs[-1:]]), position)


class ReplacesFromP(Sampler):
    """Wrong: replaces rejected tokens by draws from p instead of max(0, p - q)."""

    def accept(self, draft_ids, draft_probs, target_probs, position=0):
        kept, _ = super().accept(draft_ids, draft_probs, target_probs, position)
        return kept, self.draw(target_probs[int(kept.sum())][None])[0]


@pytest.mark.parametrize("kind", [Sampler, AcceptsTooMuch, ReplacesFromP])
@pytest.mark.parametrize("drawn", [True, False])
def test_accepted_and_replacement_tokens_have_the_joint_distribution(kind, drawn):
    """Draft tokens from q, accepted by p: with the token after them they have the joint distribution p x p x p. Two wrong samplers fail."""
    torch.manual_seed(0)
    v, g, n, sampler = 4, 2, 4000, kind(1.0, seed=3)
    p, q = torch.randn(g + 1, v).softmax(-1), torch.randn(g, v).softmax(-1)
    counts: Counter = Counter()
    for _ in range(n):
        drafts = sampler.draw(q) if drawn else q.argmax(-1)
        kept, behind = sampler.accept(drafts, q if drawn else None, p)
        text = [*drafts[: int(kept.sum())].tolist(), int(behind)]
        text += [int(sampler.draw(p[i][None])) for i in range(len(text), g + 1)]
        counts[tuple(text)] += 1
    distribution = {(a, b, c): float(p[0, a] * p[1, b] * p[2, c]) for a in range(v) for b in range(v) for c in range(v)}
    assert (p_value(counts, distribution) > ERROR) is (kind is Sampler)


def test_the_same_seed_gives_the_same_text(target):
    texts = []
    for seed in (1, 1, 2):
        sampler = Sampler(TEMPERATURE, seed)
        prompt = prompt_of(*PROMPT)
        texts.append(speculate(target, proposer_for("chained", target), prompt, prompt, max_new_tokens=40, sampler=sampler).token_ids)
    assert texts[0] == texts[1] != texts[2]


def test_a_temperature_near_zero_is_greedy():
    target = as_decoder(tiny_llama(0))
    sampler, prompt = Sampler(1e-4), prompt_of(*PROMPT)
    proposer = ModelProposer(as_decoder(noisy_copy(tiny_llama(0), 0.05)), None, None)
    greedy = decode_plainly(target, prompt, 30).token_ids
    assert speculate(target, proposer, prompt, prompt, max_new_tokens=30, sampler=sampler).token_ids == greedy
    assert any(a != b for a, b in pairwise(greedy))


def test_lossy_sampling_is_refused(target):
    with pytest.raises(ValueError, match="temperature above 0"):
        Sampler(0.0)
    prompt = prompt_of(*PROMPT)
    with pytest.raises(ValueError, match="token rule only"):
        speculate(target, proposer_for("aligned", target), prompt, prompt, accept="feature", sampler=Sampler(1.0))


def test_confidence_is_computed_only_on_request():
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    for sampler, temperature in ((None, 1.0), (Sampler(2.0), 2.0)):
        first = float((logits[0] / temperature).softmax(-1)[1])
        selector = TokenSelector(sampler=sampler)
        assert selector.select(logits, []).confidence == 1.0
        asked = selector.select(logits, [], confidence=True)
        assert asked.confidence == pytest.approx(first)
        if sampler is None:
            assert asked.token.tolist() == [1] and asked.probs is None
        else:
            torch.testing.assert_close(asked.probs, (logits / 2.0).softmax(-1))


def test_an_empty_residual_is_replaced_by_the_targets_distribution():
    """q is above p everywhere, as rounding may cause: the draft token is rejected, and p - q has no positive part."""
    p, q = torch.tensor([[0.25, 0.75, 0.0]] * 2), torch.tensor([[250.0, 750.0, 0.0]])
    sampler, counts = Sampler(1.0, 5), Counter()
    for _ in range(300):
        kept, after = sampler.accept(torch.tensor([0]), q, p)
        counts[bool(kept[0]), int(after)] += 1
    assert counts[False, 1] > counts[False, 0] > 0 and not any(token == 2 for _, token in counts)
    assert sum(n for (kept, _), n in counts.items() if kept) < 10


def test_noise_depends_on_every_bit_of_the_seed_and_on_the_position(monkeypatch):
    probs = torch.full((1, 1000), 1e-3)
    draw = lambda seed, position: int(Sampler(1.0, seed, shared_noise=True).draw(probs, position))  # noqa: E731
    assert draw(3, 4) == draw(3, 4) and draw(-1, 0) == draw(2**64 - 1, 0)
    seeds = (0, 1, 32, 64, 128, 2**32, 2**62)
    assert len({draw(seed, 4) for seed in seeds}) == len(seeds) and len({draw(3, position) for position in range(20)}) > 15
    two = Sampler(1.0, 3, shared_noise=True).draw(probs.expand(2, -1), 7)
    assert two.tolist() == [draw(3, 7), draw(3, 8)]  # successive positions
    assert len({draw(2**63 + seed, 0) for seed in range(8)} | {draw(-seed, 0) for seed in range(1, 9)}) > 13  # none is rounded
    monkeypatch.setattr(sampling.np, "random", SimpleNamespace(Generator=lambda bits: SilentNoise(), Philox=lambda key: None))
    assert int(Sampler(1.0, 0, shared_noise=True).draw(torch.tensor([[0.0, 0.3, 0.7]]))) == 2  # zero noise never draws an impossible token


class SilentNoise:
    def standard_exponential(self, v):
        return np.zeros(v)


def test_a_restarted_sampler_draws_like_a_new_one():
    probs = torch.rand(50, 9, generator=torch.Generator().manual_seed(0))
    for shared in (False, True):
        used = Sampler(1.0, 4, shared_noise=shared)
        first = used.draw(probs).tolist()
        assert (used.draw(probs).tolist() == first) is shared
        used.restart(4)
        assert used.draw(probs).tolist() == first == Sampler(1.0, 4, shared_noise=shared).draw(probs).tolist()
        used.restart(5)
        assert used.draw(probs).tolist() == Sampler(1.0, 5, shared_noise=shared).draw(probs).tolist() != first
