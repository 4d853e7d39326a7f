"""Random cases: `token` is plain greedy decoding, and every rule proposes and keeps what the oracle does. Double precision, so that
a difference is an error and never a near-tie."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from conftest import EOS, VOCAB, as_decoder, noisy_copy, prompt_of, tiny_llama
from oracle import by_attending, by_both, by_chain, by_model, by_table, oracle

from feature_alignment.adapters.attending import AttendingAdapter
from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.adapters.tables import Answer, Counts, question_number
from feature_alignment.decoding.attending_proposer import AttendingProposer
from feature_alignment.decoding.baseline_drafters import BASELINE_DRAFTERS, HybridProposer, Lookup, NGram, TableProposer
from feature_alignment.decoding.batch import speculate_batch
from feature_alignment.decoding.chained_proposer import ChainedProposer
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.proposers import ModelProposer

PER_TEST, FAST, ALL = 20, 4, 100  # cases of one test; tests by default, and with the slow ones
D = 32


@cache
def a_target(seed: int):
    return tiny_llama(seed, layers=1 + seed % 3).double()


@cache
def a_drafter(seed: int, noise: float):
    return noisy_copy(a_target(seed), noise, seed)


@cache
def an_adapter(width: int, scale: float) -> HiddenAdapter:
    torch.manual_seed(width)
    adapter = HiddenAdapter(width, D, 8).double().eval()
    torch.nn.init.normal_(adapter.up.weight, std=scale)
    return adapter


@cache
def a_chained(seed: int) -> ChainedAdapter:
    torch.manual_seed(seed)
    adapter = ChainedAdapter(D, D, 1, 16).double().eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter *= 4  # as it begins, it would say the same whatever it reads
    return adapter


@cache
def an_attending(seed: int) -> AttendingAdapter:
    r = random.Random(seed)
    texts = [r.choices(range(3, VOCAB), k=12) for _ in range(20)]
    entries = Counts(Answer(str(i), question_number(""), text) for i, text in enumerate(texts)).entries()
    torch.manual_seed(seed)
    ids = torch.randperm(VOCAB)[: (VOCAB, VOCAB - 10, VOCAB - 20, VOCAB // 4, 3)[seed]].sort().values
    without = ((), ("prompt",), ("candidates", "events"))[seed % 3]
    adapter = AttendingAdapter(D, D, 1, len(ids), len(entries), num_prompt=3, width=16, without=without).double().eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter *= 3
    adapter.ids.copy_(ids)
    adapter.table.copy_(entries)
    return adapter


class Case:
    """One random case: a target, a proposer, and the proposer's definition for the oracle.

    like: a case whose target and lengths this one shares, a row of the same batch
    trimmed: the token rule, and an adapter that drafts from some token ids only
    """

    def __init__(self, seed: int, like: Case | None = None, trimmed: bool = False) -> None:
        self.seed, r = seed, random.Random(seed)
        self.accept = "token" if like or trimmed else r.choice(["token", "token", "feature", "relaxed"])
        sources = ["own", "aligned", "chained", "attending"] + (["hybrid"] * 4 + [*BASELINE_DRAFTERS] if self.accept == "token" else [])
        self.source = r.choice(["chained", "attending", "hybrid"] if trimmed else sources)
        self.gamma, self.limit = (like.gamma, like.limit) if like else (r.randint(1, 6), r.randint(1, 16))
        self.threshold = r.choice([-1.0, 0.0, 0.3, 0.7, 0.9, 0.97])
        some_ids = lambda: (1, *r.choices(range(3, VOCAB), k=r.randint(1, 6)))  # noqa: E731
        self.prompt = some_ids()
        draft_prompt = self.prompt if r.random() < 0.6 else some_ids()
        self.which, noise = like.which if like else r.randrange(6), r.choice([0.0, 0.02, 0.1, 1.0])
        model, drafter = a_target(self.which), a_drafter(self.which, noise)
        self.target = target = like.target if like else as_decoder(model)
        if like is None and r.random() < 0.6:  # a text that ends: EOS is said instead of one of its tokens
            token = r.choice(greedy(target, prompt_of(*self.prompt), 12).token_ids)
            with torch.no_grad():
                target.head_weight[EOS] = target.head_weight[token] * 1.01
        self.draft_prompt = prompt_of(*draft_prompt)
        texts = [
            ("", greedy(target, prompt_of(*p), self.limit).token_ids) for p in (some_ids(), some_ids(), self.prompt[:-1] or self.prompt)
        ]
        table = BASELINE_DRAFTERS[self.source](texts) if self.source in BASELINE_DRAFTERS else NGram(texts)
        if self.source == "lookup":
            table = Lookup(encode=lambda question: self.prompt)
        layers = model.config.num_hidden_layers
        model_source = r.choice(["aligned", "chained", "attending"][trimmed:]) if self.source == "hybrid" else self.source
        own_expects = self.accept != "token"
        taps = (layers,) if model_source == "own" else tuple(sorted(r.sample(range(1, layers + 1), r.randint(1, layers))))
        draft = as_decoder(drafter, taps)
        adapter = an_adapter(D * len(taps), r.choice([0.02, 0.3]))
        if self.source in BASELINE_DRAFTERS:
            self.proposer, self.definition = TableProposer(table), by_table(table)
            return
        if model_source == "chained":
            chained = a_chained(r.randrange(3))
            size = r.choice([None, None, 2, VOCAB // 4, VOCAB // 2][2 * trimmed :])  # of the draft vocabulary
            ids = None if size is None else torch.tensor(sorted({EOS, *r.sample(range(VOCAB), size - 1)}))
            proposer = ChainedProposer(draft, chained, target.head_weight, target.embeddings, ids)
            definition = by_chain(draft, self.draft_prompt, chained, target, self.prompt, ids)
        elif model_source == "attending":
            attending = an_attending(r.randrange(1, 5) if trimmed else r.randrange(3))
            proposer = AttendingProposer(draft, attending, target)
            definition = by_attending(draft, self.draft_prompt, attending, target, self.prompt)
        else:
            adapter = adapter if model_source == "aligned" or own_expects else None
            head = target.lm_head if model_source == "aligned" else None
            proposer = ModelProposer(draft, adapter, head)
            definition = by_model(drafter, taps, draft_prompt, adapter, head)
        if self.source == "hybrid":
            sure = r.choice([0.0, 0.4, 0.6, 1.0])
            proposer, definition = HybridProposer(table, proposer, sure), by_both(table, definition, sure)
        self.proposer, self.definition = proposer, definition

    def __repr__(self) -> str:
        return f"case {self.seed}: {self.source} + {self.accept}, {self.gamma} drafts, at most {self.limit} tokens"


@pytest.mark.parametrize("number", [pytest.param(i, marks=[] if i < FAST else [pytest.mark.slow]) for i in range(ALL)])
@pytest.mark.parametrize("trimmed", [False, True], ids=["", "trimmed"])
@torch.inference_mode()
def test_random_cases(number, trimmed):
    kept = 0
    for seed in range(number * PER_TEST, (number + 1) * PER_TEST):
        case = Case(seed + 100_000 * trimmed, trimmed=trimmed)
        rule = {"accept": case.accept, "threshold": case.threshold, "num_draft_tokens": case.gamma, "max_new_tokens": case.limit}
        got = speculate(case.target, case.proposer, prompt_of(*case.prompt), case.draft_prompt, **rule)
        if case.accept == "token":
            assert got.token_ids == greedy(case.target, prompt_of(*case.prompt), case.limit).token_ids, case
        wanted = oracle(case.target, case.prompt, case.definition, case.accept, case.threshold, case.gamma, case.limit)
        assert (got.token_ids, [r.proposed for r in got.rounds], [r.num_accepted for r in got.rounds]) == wanted, case
        kept += sum(r.num_accepted for r in got.rounds)
    assert kept > 0 or (trimmed and number >= FAST)  # of few ids, 20 cases may keep nothing


@pytest.mark.parametrize("number", [pytest.param(i, marks=[] if i < FAST else [pytest.mark.slow]) for i in range(ALL)])
@torch.inference_mode()
def test_random_batches(number):
    """Every row of a batch is what decoding its prompt alone gives, to the token and to the kept draft."""
    kept = 0
    for seed in range(number * 5, number * 5 + 5):
        cases = [first := Case(10_000 + seed)]
        cases += [Case(20_000 + 10 * seed + i, like=first) for i in range(seed % 5)]
        rule = {"num_draft_tokens": first.gamma, "max_new_tokens": first.limit}
        prompts, draft_prompts = [prompt_of(*c.prompt) for c in cases], [c.draft_prompt for c in cases]
        alone = [speculate(c.target, c.proposer, p, c.draft_prompt, **rule) for c, p in zip(cases, prompts, strict=True)]
        got = speculate_batch(first.target, [c.proposer for c in cases], prompts, draft_prompts, overlap=seed % 2 == 0, **rule)
        assert got.token_ids == [g.token_ids for g in alone], cases
        for case, accepted, g in zip(cases, got.accepted, alone, strict=True):
            rounds = [r.num_accepted for r in g.rounds]
            assert accepted[: len(rounds)] == rounds and not any(accepted[len(rounds) :]), case  # a last token without drafts
        assert got.passes == max(g.passes for g in alone)
        kept += sum(map(sum, got.accepted))
    assert kept > 0 or number >= FAST  # five batches may well keep nothing


def test_a_plain_batch_is_greedy_decoding():
    target = as_decoder(a_target(0))
    prompts = [prompt_of(1, 5, 9, 13), prompt_of(1, 40), prompt_of(1, 7, 7, 7, 20, 33)]
    got = speculate_batch(target, [TableProposer(Lookup())] * 3, prompts, prompts, num_draft_tokens=0, max_new_tokens=12)
    assert got.token_ids == [greedy(target, p, 12).token_ids for p in prompts] and not any(map(sum, got.accepted))
    with pytest.raises(ValueError, match="3 prompts, 2 draft prompts and 1 proposers"):
        speculate_batch(target, [TableProposer(Lookup())], prompts, prompts[:2])


@pytest.mark.parametrize("seed", range(3))
@torch.inference_mode()
def test_drafters_that_share_event_gpt_read_all_clips_of_a_batch_at_once(seed, monkeypatch):
    """They draft, and keep, what each would alone."""
    target, draft, chained = as_decoder(a_target(seed)), as_decoder(a_drafter(seed, 0.02)), a_chained(seed)
    encode, seen = draft._encode_vision, []
    monkeypatch.setattr(draft, "_encode_vision", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    prompts = [prompt_of(1, 5, 9, 13), prompt_of(1, 40), prompt_of(1, 7, 7, 7, 20, 33)]
    proposers = [ChainedProposer(draft, chained, target.head_weight, target.embeddings) for _ in prompts]
    alone = [speculate(target, p, x, x, num_draft_tokens=3, max_new_tokens=20) for p, x in zip(proposers, prompts, strict=True)]
    for _ in range(2):  # the second time their buffers exist
        seen.clear()
        got = speculate_batch(target, proposers, prompts[::-1], prompts[::-1], num_draft_tokens=3, max_new_tokens=20)
        assert seen == [3] and got.token_ids == [g.token_ids for g in reversed(alone)]
        for accepted, g in zip(got.accepted, reversed(alone), strict=True):
            assert accepted[: len(g.rounds)] == [r.num_accepted for r in g.rounds]
