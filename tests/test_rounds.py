"""One round at a time: who drafted, why it stopped, what is told to the controller, where a text ends, what fails meanwhile."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace

import pytest
import torch
from conftest import EOS, VOCAB, as_decoder, noisy_copy, prompt_of, tiny_llama

from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.folded import FoldedChain
from feature_alignment.decoding import engine
from feature_alignment.decoding.baseline_drafters import HybridProposer, NGram, Previous, TableProposer
from feature_alignment.decoding.batch import speculate_batch
from feature_alignment.decoding.chained_proposer import ChainedProposer
from feature_alignment.decoding.draft_length import DraftLengthController
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.proposers import Draft, ModelProposer, Proposer
from feature_alignment.decoding.sampling import Sampler
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.decoding.token_selection import TokenSelector

PROMPT, MAX = (1, 5, 9, 13), 24


class Unsure(Proposer):
    """Drafts 10, 11, 12, … by position, each with the same confidence, and stops as the protocol asks."""

    def __init__(self, confidence: float) -> None:
        self.confidence, self.asked = confidence, []

    def start(self, prompt, watch):
        pass

    def propose(self, emitted, states, num_tokens, watch, confidence_floor=0.0):
        self.asked.append((len(emitted), num_tokens, confidence_floor))
        tokens, chance = [], 1.0
        while not tokens or (len(tokens) < num_tokens and chance >= confidence_floor):
            tokens.append(10 + len(emitted) + len(tokens))
            chance *= self.confidence
        return Draft(torch.tensor(tokens), confidence=[self.confidence] * len(tokens))


class Sure(NGram):
    """Sure of some positions' tokens, by position in the answer."""

    def __init__(self, known: dict[int, int], share: float = 1.0) -> None:
        self.known, self.share = known, share

    def guess(self, question, prefix):
        return (self.known[len(prefix)], self.share) if len(prefix) in self.known else (None, 0.0)


def drafted(proposer, floor: float, room: int = 3) -> list[int]:
    proposer.start(prompt_of(*PROMPT), watch := Stopwatch())
    return proposer.propose([7], torch.zeros(1, 1), room, watch, floor).token_ids.tolist()


def test_a_hybrids_model_selects_tokens_as_the_text_does():
    """With a sampler the loop sets a selector before each text: the model under the table draws from its distribution too."""
    model = as_decoder(tiny_llama(0))
    inner = ModelProposer(as_decoder(tiny_llama(1)), None, None)
    proposer, sampler = HybridProposer(Sure({}), inner), Sampler(1.0, seed=3)
    got = speculate(model, proposer, prompt_of(*PROMPT), prompt_of(*PROMPT), num_draft_tokens=3, max_new_tokens=12, sampler=sampler)
    assert proposer.selector is inner.selector and inner.selector.sampler is sampler and len(got.token_ids) > 1
    plain = ModelProposer(as_decoder(tiny_llama(1)), None, None)
    again = speculate(
        model, plain, prompt_of(*PROMPT), prompt_of(*PROMPT), num_draft_tokens=3, max_new_tokens=12, sampler=Sampler(1.0, seed=3)
    )
    assert [r.proposed for r in got.rounds] == [r.proposed for r in again.rounds]  # the table says nothing


def test_a_discarded_draft_does_not_make_the_chain_unsure():
    """The table overrides the first of three, the model is sure of the others: its doubt about the first is not held against them."""
    model = Unsure(0.25)
    model.propose = lambda text, states, n, watch, confidence_floor=0.0: (
        Draft(torch.tensor([11]), confidence=[0.25]) if len(text) == 1 else Draft(torch.tensor([12, 13][:n]), confidence=[0.9, 0.9][:n])
    )
    assert drafted(HybridProposer(Sure({1: 50}), model), floor=0.3) == [50, 12, 13]


def test_where_the_table_vouches_for_an_unsure_draft_the_model_goes_on():
    assert drafted(HybridProposer(Sure({1: 11, 2: 12}), Unsure(0.2)), floor=0.3) == [11, 12, 13]
    assert drafted(HybridProposer(Sure({}), Unsure(0.2)), floor=0.3) == [11]


def test_a_tables_own_doubt_counts():
    """Three tokens it is sure of by .5 each: the second is below a floor of .3."""
    assert drafted(HybridProposer(Sure({1: 50, 2: 51, 3: 52}, share=0.5), Unsure(0.9), sure=0.5), floor=0.6) == [50, 51, 52]
    model = Unsure(0.9)
    drafted(HybridProposer(Sure({1: 50}, share=0.5), model, sure=0.5), floor=0.6)
    assert [n for n, _, _ in model.asked] == [1]  # after the table's token the chance is below the floor: the model is not asked again


@pytest.mark.parametrize(("confidence", "chance"), [(0.9, 0.9), (None, 1.0)])
def test_the_model_goes_on_at_the_floor_divided_by_the_chance_so_far(confidence, chance):
    """The model's first token, then the table's, then the model is asked again; without confidences its tokens count as certain."""
    model = Unsure(0.9)
    if confidence is None:
        propose = model.propose
        model.propose = lambda *given: replace(propose(*given), confidence=None)
    assert drafted(HybridProposer(Sure({2: 50}, share=0.8), model, sure=0.5), floor=0.3, room=5) == [11, 50, 13, 14, 15]
    assert model.asked == [(1, 5, 0.3), (3, 3, pytest.approx(0.3 / (chance * 0.8)))]


@pytest.mark.parametrize(("floor", "length"), [(0.5, 2), (0.7, 1), (0.3, 3), (0.0, 5)])
def test_two_drafts_of_confidence_point_6_are_below_a_floor_of_point_5(floor, length, monkeypatch):
    """The draft whose chance, with all before it, is below the floor is the last: .6 is not, .36 is."""
    model = tiny_llama(0)
    target, prompt = as_decoder(model), prompt_of(*PROMPT)
    select = TokenSelector.select
    monkeypatch.setattr(
        TokenSelector, "select", lambda self, logits, text, confidence=False: select(self, logits, text)._replace(confidence=0.6)
    )
    sure = torch.full((1, 64), 0.4 / 63).index_fill(1, torch.tensor([9]), 0.6).log()
    monkeypatch.setattr(FoldedChain, "logits", lambda self, z: sure)
    chained = ChainedProposer(target, ChainedAdapter(32, 32, 1, 16).eval(), target.head_weight, target.embeddings)
    for proposer in (
        ModelProposer(as_decoder(model), None, None),
        chained,
        HybridProposer(Sure({}), ModelProposer(as_decoder(model), None, None)),
    ):
        proposer.start(prompt, watch := Stopwatch())
        assert len(proposer.propose([7], torch.zeros(1, 32), 5, watch, floor).token_ids) == length


@torch.inference_mode()
def test_the_chain_goes_on_after_an_override_as_one_begun_anew():
    """A stale chain: what was drafted after the overridden token is forgotten, and what the chain read of it too."""
    torch.manual_seed(0)
    target, adapter = as_decoder(tiny_llama(0)), ChainedAdapter(32, 32, 1, 16).eval()
    states, watch = torch.randn(2, 32), Stopwatch()

    def fresh():
        proposer = ChainedProposer(target, adapter, target.head_weight, target.embeddings)
        proposer.start(prompt_of(*PROMPT), watch)
        return proposer

    used = fresh()
    first = used.propose([4, 5], states, 4, watch).token_ids.tolist()
    for k in range(4):
        text = [4, 5, *first[:k], (first[k] + 1) % 60 + 3]
        again, anew = used.propose(text, states, 3, watch), fresh().propose(text, states, 3, watch)
        assert again.token_ids.tolist() == anew.token_ids.tolist()
        torch.testing.assert_close(again.predicted(), anew.predicted())
        used.propose([4, 5], states, 4, watch)


@pytest.mark.parametrize("k", range(4))
@torch.inference_mode()
def test_the_kth_chained_draft_expects_the_state_t_plus_k(k):
    """A chain from position t: draft k expects the state of position t + k, which its cosine is taken with."""
    model = tiny_llama(0)
    target, prompt, taken = as_decoder(model), prompt_of(*PROMPT), []
    chained = ChainedProposer(target, ChainedAdapter(32, 32, 1, 16).eval(), target.head_weight, target.embeddings)
    got = speculate(target, chained, prompt, prompt, accept="relaxed", threshold=-1.0, num_draft_tokens=4, max_new_tokens=12)
    at = 1
    for r in got.rounds:
        ids = torch.tensor([[*PROMPT, *got.token_ids[: at + len(r.proposed)]]])
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
        fresh = ChainedProposer(target, ChainedAdapter(32, 32, 1, 16).eval(), target.head_weight, target.embeddings)
        fresh._adapter, fresh._chain = chained._adapter, chained._chain
        fresh.start(prompt, watch := Stopwatch())
        draft = fresh.propose(got.token_ids[:at], states[len(PROMPT) - 1 :][:at], len(r.proposed), watch)
        if k < len(r.proposed):
            state = states[len(PROMPT) - 1 + at + k]
            taken.append(float(torch.cosine_similarity(draft.predicted()[k], state, dim=0)) - r.cosine[k])
        at += len(r.proposed) + 1
    assert taken and max(map(abs, taken)) < 1e-4


class Scripted(Proposer):
    """Drafts these tokens, as many as there is room for."""

    def __init__(self, *drafts: list[int], has_confidence: bool = True) -> None:
        self.drafts, self.has_confidence = list(drafts), has_confidence

    def start(self, prompt, watch):
        pass

    def propose(self, emitted, states, num_tokens, watch, confidence_floor=0.0):
        return Draft(torch.tensor((self.drafts.pop(0) if self.drafts else [])[:num_tokens], dtype=torch.long))


class Floor(DraftLengthController):
    """Always drafts, above this floor."""

    def __init__(self, floor: float, limit: int = 99) -> None:
        super().__init__(0.9)
        self.floor, self.limit, self.told, self.asked = floor, limit, [], []

    def next_confidence_floor(self):
        return self.floor

    def record_round(self, *what):
        self.told.append(what)

    def max_draft_tokens(self, *asked):
        self.asked.append(asked)
        return self.limit


@pytest.mark.parametrize(
    ("drafts", "floor", "has_confidence", "wanted"),
    [
        ([9, 9, 9, 9], 0.0, True, "length"),
        ([9, 9, 9, EOS], 0.0, True, "EOS"),  # the last of exactly as many as there is room for
        ([9, EOS], 0.0, True, "EOS"),
        ([9, EOS], 0.4, True, "EOS"),
        ([9, 9], 0.4, True, "low confidence"),
        ([9, 9], 0.4, False, "no candidate"),  # a table that ran out knows no floor
        ([9, 9], 0.0, True, "no candidate"),
        ([], 0.4, True, "no candidate"),
        ([], 0.0, False, "no candidate"),
    ],
)
def test_a_trace_says_why_no_more_was_drafted(drafts, floor, has_confidence, wanted):
    target, prompt = as_decoder(tiny_llama(0)), prompt_of(*PROMPT)
    proposer = Scripted(drafts, has_confidence=has_confidence)
    controller = Floor(floor)
    got = speculate(target, proposer, prompt, prompt, num_draft_tokens=4, max_new_tokens=12, controller=controller)
    assert got.rounds[0].stop_reason == wanted and controller.asked[0] == (floor, has_confidence)
    assert Scripted.has_confidence and not TableProposer.has_confidence


@pytest.mark.parametrize("limit", [1, 2, 4, 9])
def test_a_round_is_no_longer_than_its_controller_allows(limit):
    target, prompt, proposer = as_decoder(tiny_llama(0)), prompt_of(*PROMPT), Unsure(1.0)
    speculate(target, proposer, prompt, prompt, num_draft_tokens=4, max_new_tokens=9, controller=Floor(0.3, limit))
    assert proposer.asked == [(n, min(4, limit, 8 - n), 0.3) for n, _, _ in proposer.asked] and proposer.asked[0][0] == 1


def test_no_token_follows_a_drafted_end():
    """An accepted EOS ends the text: the target's own token after it is not emitted, nor counted, nor shown."""
    model = tiny_llama(2)
    with torch.no_grad():
        plain = greedy(as_decoder(model), prompt_of(*PROMPT), 12).token_ids
        model.lm_head.weight[EOS] = model.lm_head.weight[plain[5]] * 1.01
    target, prompt = as_decoder(model), prompt_of(*PROMPT)
    wanted = greedy(target, prompt, MAX).token_ids
    assert wanted[-1] == EOS

    class All(Scripted):
        def propose(self, *args, **kwargs):
            draft = super().propose(*args, **kwargs)
            states = target.head_weight[draft.token_ids]
            return replace(draft, predicted=lambda: states, logits=lambda: target.lm_head(states))

    for accept in ("token", "feature", "relaxed", "typical", "kl"):
        rule = {"accept": accept, "threshold": math.inf if accept == "kl" else -1.0}
        got = speculate(target, All([*wanted[1:], 9, 9]), prompt, prompt, **rule, num_draft_tokens=40, max_new_tokens=MAX)
        last = got.rounds[-1]
        assert {len(x) for x in (last.proposed, last.target_tokens, last.cosine, last.score or last.cosine)} == {len(wanted) - 1}
        assert got.token_ids == wanted and last.extra_token is None and last.num_accepted == len(wanted) - 1 == sum(last.accepted)
    got = speculate_batch(target, [Scripted([*wanted[1:], 9])], [prompt], [prompt], num_draft_tokens=40, max_new_tokens=MAX)
    assert got.token_ids == [wanted] and got.accepted == [[len(wanted) - 1]]


def test_cosines_that_no_one_requests_are_computed_where_the_rule_compares_them():
    model = tiny_llama(0)
    target, prompt = as_decoder(model), prompt_of(*PROMPT)
    aligned = ModelProposer(as_decoder(noisy_copy(model, 0.05)), lambda states: states, target.lm_head)
    for accept in ("token", "typical", "feature", "relaxed", lambda drafts, own, cosine, threshold: (cosine > threshold) | (drafts == own)):
        rounds = [
            speculate(target, aligned, prompt, prompt, accept=accept, threshold=0.5, max_new_tokens=12, cosines=cosines).rounds
            for cosines in (True, False)
        ]
        assert [r.accepted for r in rounds[0]] == [r.accepted for r in rounds[1]] and all(r.cosine for r in rounds[0][:-1])
        assert [r.cosine for r in rounds[1]] == [None if accept in ("token", "typical") else r.cosine for r in rounds[0]]


def test_the_previous_answer_is_learned_in_the_loop():
    """Another prompt's answer is drafted from the one before it; without `finish` and `finished` nothing would be."""
    target, table = as_decoder(tiny_llama(0)), Previous([])
    proposer = TableProposer(table)
    for i, kept in ((0, False), (1, True)):
        prompt = prompt_of(*PROMPT)  # another prompt with the same answer
        got = speculate(target, proposer, prompt, prompt, num_draft_tokens=3, max_new_tokens=MAX)
        assert (sum(r.num_accepted for r in got.rounds) > 10) is kept, i
    assert table._last[""] == got.token_ids  # the first answer, told when the second prompt began
    batch = TableProposer(Previous([]))
    for kept in (False, True):
        prompts = [prompt_of(*PROMPT)]
        found = speculate_batch(target, [batch], prompts, prompts, num_draft_tokens=3, max_new_tokens=MAX)
        assert (sum(map(sum, found.accepted)) > 10) is kept


class Clock:
    """A clock that moves only when it is told to, and began long ago."""

    def __init__(self) -> None:
        self.ms = 54_000.0

    def perf_counter(self) -> float:
        return self.ms / 1e3


def test_the_pace_is_told_each_rounds_milliseconds(monkeypatch):
    """Drafting takes 7 ms a round, the target 100 a pass, prompts 1,000 and 300: each is told as what it was, and all of it."""
    clock = Clock()
    monkeypatch.setattr("feature_alignment.decoding.stopwatch.time", clock)
    target, prompt = as_decoder(tiny_llama(0)), prompt_of(*PROMPT)
    step, prefill = target.step, target.prefill
    target.step = lambda *a, **k: (setattr(clock, "ms", clock.ms + 100), step(*a, **k))[1]
    target.prefill = lambda *a: (setattr(clock, "ms", clock.ms + 1000), prefill(*a))[1]
    wanted = greedy(target, prompt, MAX).token_ids

    class Costly(Scripted):
        def start(self, prompt, watch):
            with watch("draft_prefill"):
                clock.ms += 300

        def propose(self, *args, **kwargs):
            with args[3]("draft"):
                clock.ms += 7
            return super().propose(*args, **kwargs)

    class Told(Floor):
        prompts: tuple = ()

        def record_prefill(self, ms):
            self.prompts += (("target", pytest.approx(ms, abs=1e-6)),)

        def record_draft_prefill(self, ms):
            self.prompts += (("drafter", pytest.approx(ms, abs=1e-6)),)

        def next_confidence_floor(self):
            return None if len(self.told) == 2 else 0.1

        plain_steps = 2

    controller = Told(0.1)
    got = speculate(target, Costly(wanted[1:4], [9, 9], [wanted[8]]), prompt, prompt, controller=controller, max_new_tokens=12)
    assert controller.prompts == (("target", 1000), ("drafter", 300)) and got.token_ids == wanted[:12]
    told = [pytest.approx(t, abs=1e-6) for t in controller.told]
    assert told[:4] == [(3, 4, 7, 100), (2, 1, 7, 100), (0, 2, 0, 200), (1, 2, 7, 100)]
    assert told[4:] and all(t == (0, 1, 7, 100) for t in told[4:-1])  # asked, and had no idea: that time is drafting's too


class Stuck(Proposer):
    """Reads its prompt for a while in a thread, then perhaps fails."""

    def __init__(self, fails: bool) -> None:
        self.fails, self.done = fails, False

    def start(self, prompt, watch):
        time.sleep(0.2)
        self.done = True
        if self.fails:
            raise ArithmeticError("no events")


def decode_batch(target, proposer, prompt, draft_prompt, **settings):
    return speculate_batch(target, [proposer], [prompt], [draft_prompt], **settings)


BOTH_LOOPS = pytest.mark.parametrize(("decode", "prefill"), [(speculate, "prefill"), (decode_batch, "prefill_encoded")])


@BOTH_LOOPS
def test_an_overlapping_drafter_reads_while_the_target_does_with_as_many_torch_threads(decode, prefill):
    target, prompt, begun, found = as_decoder(tiny_llama(0)), prompt_of(*PROMPT), threading.Event(), []
    original, number = getattr(target, prefill), torch.get_num_threads()

    class Reading(Scripted):
        def start(self, prompt, watch):
            found.append((begun.wait(5), torch.get_num_threads(), threading.current_thread() is threading.main_thread()))

    setattr(target, prefill, lambda *given: begun.set() or original(*given))
    try:
        for threads in (1, 2):
            begun.clear()
            torch.set_num_threads(threads)
            decode(target, Reading(), prompt, prompt, overlap=True, max_new_tokens=2)
    finally:
        torch.set_num_threads(number)
    assert found == [(True, 1, False), (True, 2, False)]


@BOTH_LOOPS
@pytest.mark.parametrize("fails", [False, True])
def test_a_target_that_fails_waits_for_its_drafter_and_both_are_heard(decode, prefill, fails):
    target, prompt, proposer = as_decoder(tiny_llama(0)), prompt_of(*PROMPT), Stuck(fails)

    def fail(*given):
        raise MemoryError("the target's prompt")

    setattr(target, prefill, fail)
    threads = threading.active_count()
    with pytest.raises(MemoryError, match="the target's prompt") as found:
        decode(target, proposer, prompt, prompt, overlap=True)
    assert proposer.done and threading.active_count() == threads
    assert any("ArithmeticError: no events" in note for note in getattr(found.value, "__notes__", [])) is fails
    with pytest.raises(MemoryError, match="the target's prompt") as found:
        decode(target, proposer, prompt, prompt)
    assert not hasattr(found.value, "__notes__")


@BOTH_LOOPS
def test_a_failing_drafter_is_raised_once_and_as_itself(decode, prefill):
    target, prompt, proposer = as_decoder(tiny_llama(0)), prompt_of(*PROMPT), Stuck(True)
    with pytest.raises(ArithmeticError, match="no events") as found:
        decode(target, proposer, prompt, prompt, overlap=True)
    assert not getattr(found.value, "__notes__", [])


def test_a_batch_of_one_is_decoding_alone():
    target = as_decoder(tiny_llama(0))
    for noise in (0.0, 0.05):
        proposer = ModelProposer(as_decoder(noisy_copy(tiny_llama(0), noise)), None, None)
        prompt = prompt_of(*PROMPT)
        alone = speculate(target, proposer, prompt, prompt, num_draft_tokens=3, max_new_tokens=MAX)
        got = speculate_batch(target, [proposer], [prompt], [prompt], num_draft_tokens=3, max_new_tokens=MAX)
        rounds = [r.num_accepted for r in alone.rounds]
        assert got.token_ids == [alone.token_ids] and got.passes == alone.passes
        assert got.accepted[0][: len(rounds)] == rounds and not any(got.accepted[0][len(rounds) :])  # a last token without drafts


def test_every_text_ends_where_the_targets_set_says():
    """Several ids end a text, in plain decoding, drafted, and in a batch; a drafter's own set does not."""
    model = tiny_llama(0)
    text = greedy(as_decoder(model), prompt_of(*PROMPT), MAX).token_ids
    first = {token: text.index(token) for token in text}
    ids = sorted(first, key=first.get)[3:5]
    assert VOCAB - 1 not in text and len(ids) == 2
    target, prompt = as_decoder(model), prompt_of(*PROMPT)
    target.eos_ids = frozenset({VOCAB - 1, *ids})
    draft = as_decoder(model)
    draft.eos_ids = frozenset(text[:1])
    wanted = text[: first[ids[0]] + 1]
    assert greedy(target, prompt, MAX).token_ids == wanted == target.generate(target.prefill([prompt]), MAX)[0]
    proposers = [
        ModelProposer(draft, None, None),
        TableProposer(NGram([("", text)])),
        HybridProposer(NGram([("", text)]), ModelProposer(draft, None, None)),
    ]
    for proposer in proposers:
        for gamma in (2, 9):
            got = speculate(target, proposer, prompt, prompt, num_draft_tokens=gamma, max_new_tokens=MAX)
            assert got.token_ids == wanted
            assert not any(target.eos_ids & {*r.proposed[:-1]} for r in got.rounds)  # nothing is drafted after an end
    got = speculate_batch(target, proposers, [prompt] * 3, [prompt] * 3, max_new_tokens=MAX)
    assert got.token_ids == [wanted] * 3
    assert engine.TokenSelector.of(target, prompt).eos_ids == target.eos_ids


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("feature_alignment.decoding.stopwatch.time", clock)
    return clock


def slow_target(clock: Clock, *calls: tuple[str, float]):
    """A target whose calls take so many milliseconds."""
    target = as_decoder(tiny_llama(0))
    for name, ms in calls:
        call = getattr(target, name)
        setattr(target, name, lambda *a, call=call, ms=ms, **k: (setattr(clock, "ms", clock.ms + ms), call(*a, **k))[1])
    return target


class Slow(Scripted):
    """Reads a prompt in 300 ms, drafts in 7 and ends in 40; notes what it is asked for."""

    def __init__(self, clock: Clock, *drafts: list[int], reads_prompt: bool = True) -> None:
        super().__init__(*drafts)
        self.clock, self.calls, self.reads_prompt = clock, [], reads_prompt

    def start(self, prompt, watch):
        self.calls.append("start")
        with watch("draft_prefill"):
            self.clock.ms += 300

    def propose(self, *args, **kwargs):
        self.calls.append("propose")
        with args[3]("draft"):
            self.clock.ms += 7
        return super().propose(*args, **kwargs)

    def finish(self, emitted):
        self.calls.append("finish")
        self.clock.ms += 40


def test_the_whole_time_is_from_before_the_prompt_to_after_the_last_token(clock):
    target, prompt = slow_target(clock, ("step", 100), ("prefill", 1000)), prompt_of(*PROMPT)
    alone = greedy(target, prompt, 12)
    assert alone.total_ms == pytest.approx(1000 + 11 * 100) and alone.decode_ms == pytest.approx(1100)
    assert [(stage, round(begin), round(end)) for stage, begin, end in alone.spans] == [("target_prefill", 0, 1000), ("verify", 1000, 2100)]
    got = speculate(target, Slow(clock, alone.token_ids[1:4]), prompt, prompt, num_draft_tokens=3, max_new_tokens=6)
    assert got.token_ids == alone.token_ids[:6] and got.passes == 2
    assert got.total_ms == pytest.approx(1000 + 300 + 7 + 2 * 100 + 40) and got.decode_ms == pytest.approx(7 + 200 + 40)
    assert {k: round(v) for k, v in got.ms.items() if v > 1} == {"target_prefill": 1000, "draft_prefill": 300, "draft": 7, "verify": 200}
    assert got.spans[0][1:] == pytest.approx((0, 1000)) and got.spans[-1][2] == pytest.approx(1507)
    assert [r.ms for r in got.rounds] == [pytest.approx({"draft": 7, "verify": 100})]
    batch = slow_target(clock, ("step", 100), ("prefill_encoded", 1000))
    found = speculate_batch(batch, [Slow(clock, alone.token_ids[1:4])], [prompt], [prompt], num_draft_tokens=3, max_new_tokens=6)
    assert found.token_ids == [alone.token_ids[:6]] and found.total_ms == pytest.approx(1000 + 100 + 300 + 7 + 2 * 100 + 40)
    assert {k: round(v) for k, v in found.ms.items() if v > 1} == {"target_prefill": 1100, "draft_prefill": 300, "draft": 7, "verify": 200}


class Late(Floor):
    """Does not want the drafter to read its prompt; one pass without drafts, then drafts."""

    needs_prefill, plain_steps = False, 1

    def __init__(self) -> None:
        super().__init__(0.1)
        self.read = []

    def record_prefill(self, ms):
        self.read.append(("target", pytest.approx(ms, abs=1e-6)))

    def record_draft_prefill(self, ms):
        self.read.append(("drafter", pytest.approx(ms, abs=1e-6)))

    def next_confidence_floor(self):
        return 0.1 if self.told else None


@pytest.mark.parametrize("reads_prompt", [True, False])
def test_a_drafter_reads_its_prompt_when_it_is_first_asked(clock, reads_prompt):
    """Its prompt is no part of that round's time; one that reads none begins at once. `finish` ends what has begun."""
    target, prompt, controller = slow_target(clock, ("step", 100), ("prefill", 1000)), prompt_of(*PROMPT), Late()
    proposer = Slow(clock, [9], [9], reads_prompt=reads_prompt)
    got = speculate(target, proposer, prompt, prompt, num_draft_tokens=2, max_new_tokens=4, controller=controller)
    told = [pytest.approx(t, abs=1e-6) for t in controller.told]
    assert told[:2] == [(0, 1, 0, 100), (1, 1, 7, 100)] and controller.read == [("target", 1000), ("drafter", 300)]
    assert proposer.calls[:2] == ["start", "propose"] and proposer.calls[-1] == "finish" and proposer.calls.count("start") == 1
    assert got.rounds[0].stop_reason == "off" and got.rounds[0].ms == pytest.approx({"verify": 100})
    late = {"draft_prefill": 300} if reads_prompt else {}
    assert got.rounds[1].ms == pytest.approx(late | {"draft": 7, "verify": 100})
    idle = Slow(clock, reads_prompt=reads_prompt)
    speculate(target, idle, prompt, prompt, num_draft_tokens=2, max_new_tokens=2, controller=Late(), overlap=reads_prompt)
    assert idle.calls == ([] if reads_prompt else ["start", "finish"])
    early, idle = Late(), Slow(clock, reads_prompt=reads_prompt)
    early.needs_prefill = True
    speculate(target, idle, prompt, prompt, num_draft_tokens=2, max_new_tokens=2, controller=early)
    assert idle.calls == ["start", "finish"]
    free = Late()
    speculate(target, Scripted(), prompt, prompt, num_draft_tokens=2, max_new_tokens=4, controller=free)
    assert free.read == [("target", 1000), ("drafter", 0)] and free.told[1] == pytest.approx((0, 1, 0, 100), abs=1e-6)


def test_passes_without_drafts_share_their_time(clock):
    """Three passes at once: a round for each, of a third of the milliseconds; fewer where the text ends before."""

    class Off(Late):
        plain_steps = 3

        def next_confidence_floor(self):
            return None

    target, prompt, controller = slow_target(clock, ("step", 100), ("prefill", 1000)), prompt_of(*PROMPT), Off()
    got = speculate(target, Slow(clock), prompt, prompt, num_draft_tokens=2, max_new_tokens=6, controller=controller)
    assert [(drafts, tokens) for drafts, tokens, _, _ in controller.told] == [(0, 3), (0, 2)] and got.passes == 5
    assert [other for *_, other in controller.told] == pytest.approx([300, 200])
    assert [r.extra_token for r in got.rounds] == got.token_ids[1:6]
    assert all(
        r.ms == pytest.approx({"verify": 100}) and r.stop_reason == "off" and not r.recomputed and r.cosine is None for r in got.rounds
    )
