"""The benchmark: formulas against closed forms, time stamps, transformers' `generate`, two runs compared."""

from __future__ import annotations

import dataclasses
import json
import shutil
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, as_decoder, main_of, noisy_copy, prompt_of, tiny_llama

from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.benchmark import chain_loop, fidelity, planted_report, report, speed_model, targets, timing
from feature_alignment.benchmark.chain_loop import ChainLoop, DraftedRound, tokens_read
from feature_alignment.benchmark.compare import compare
from feature_alignment.benchmark.costs import LoopCosts
from feature_alignment.benchmark.results import BenchmarkReport, BenchmarkRow, PlantedReport
from feature_alignment.benchmark.rows import Mode, acceptance_of, timed_row
from feature_alignment.benchmark.speed_model import Costs, RoundCost, drafter_of
from feature_alignment.benchmark.timing import Timed, fastest
from feature_alignment.cli.console import UserError
from feature_alignment.decoding.baseline_drafters import BASELINE_DRAFTERS
from feature_alignment.decoding.chained_proposer import ChainedProposer
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.generation import DRAFT_STAGES, Generation, Round
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.proposers import ModelProposer
from feature_alignment.decoding.settings import DEFAULT_THRESHOLDS
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.inputs.samples import Sample
from feature_alignment.storage.files import content_hash

V = {"1": 1.0, "6": 1.25, "32": 2.0}
LOOP = LoopCosts(t_target_ms=4.0, c=0.2, c_chained=0.05, v=V)
CHAINED = Mode("chained", "token", 5)
DRAFTER = drafter_of(CHAINED)


def row_name(row):
    return BenchmarkRow.from_json(row).name


def round_of(kept, drafts=5, draft_ms=1.0, verify_ms=5.0, recompute_ms=None):
    """A round of `drafts` drafts with the given ones kept, each draft taking draft_ms."""
    ms = {"draft": 0.5 * drafts * draft_ms, "head": 0.5 * drafts * draft_ms, "verify": verify_ms}
    ms |= {} if recompute_ms is None else {"recompute": recompute_ms}
    return Round([7] * drafts, [7] * drafts, [i in kept for i in range(drafts)], None, 8, recompute_ms is not None, ms, "length")


def drafted(rounds, tokens, rest_ms=0.2, prefill_ms=50.0, single=0, step_ms=4.0):
    """A text of so many tokens out of these rounds and `single` passes without drafts; rest_ms is what a round takes besides."""
    ms = {"target_prefill": prefill_ms}
    for r in rounds:
        for stage, spent in r.ms.items():
            ms[stage] = ms.get(stage, 0.0) + spent
    ms["verify"] = ms.get("verify", 0.0) + single * step_ms
    passes = len(rounds) + single + sum(r.recomputed for r in rounds)
    return Generation([7] * tokens, passes, sum(ms.values()) + rest_ms * len(rounds), ms, rounds)


def plain_of(tokens, step_ms=4.0, prefill_ms=50.0):
    return Generation([7] * tokens, tokens - 1, prefill_ms + (tokens - 1) * step_ms, {"target_prefill": prefill_ms})


def costs_of(*rows, plain):
    return Costs.of(rows, plain, LOOP.v)


def test_the_corrected_formula_of_equal_rounds_is_its_closed_form():
    """Ten rounds of five drafts, three kept: S = 4 / (5 c + v(6) + r), and a pass without drafts costs one."""
    rows = Timed([[drafted([round_of(range(3))] * 10, 41)] for _ in range(2)])
    costs = costs_of((CHAINED, rows), plain=Timed([[plain_of(41)], [plain_of(41)]]))
    assert costs.all.round_cost(DRAFTER) == pytest.approx((0.25, 0.05))
    assert costs.corrected(DRAFTER, rows) == pytest.approx(4 / (5 * 0.25 + 1.25 + 0.05))
    more = Timed([[drafted([round_of(range(3))] * 10, 43, single=2)] for _ in range(2)])
    costs = costs_of((CHAINED, more), plain=Timed([[plain_of(43)], [plain_of(43)]]))
    assert costs.corrected(DRAFTER, more) == pytest.approx(42 / (10 * (1.25 + 1.25 + 0.05) + 2))


def test_no_run_enters_its_own_prediction():
    """A run that stalls is measured as slow, and priced as if it had not stalled."""
    usual, stalled = drafted([round_of(range(3))] * 10, 41), drafted([round_of(range(3), 5, 9.0, 50.0)] * 10, 41, rest_ms=7.0)
    plain = Timed([[plain_of(41), plain_of(41)]])
    costs = costs_of((CHAINED, Timed([[stalled, usual]])), plain=plain)
    assert costs.halves[1].price_ms(DRAFTER, stalled) == costs.halves[1].price_ms(DRAFTER, usual)
    assert costs.halves[1].price_ms(DRAFTER, stalled) == pytest.approx(usual.decode_ms)
    assert costs.halves[0].price_ms(DRAFTER, usual) == pytest.approx(stalled.decode_ms)


def test_a_load_that_comes_and_goes_hits_formula_and_rows_alike():
    """Every other minute the machine is three times slower: costs of the same turns stay right, costs of a quiet minute would not."""

    def slowed(by):
        fast = drafted([round_of(range(3), 5, by, 5.0 * by)] * 10, 41, 0.2 * by)
        return fast, plain_of(41, 4.0 * by)

    pairs = [slowed(3.0 if i // 4 % 2 else 1.0) for i in range(16)]
    rows, plain = (Timed([[g] for g in some]) for some in zip(*pairs, strict=True))
    measured = sum(g.decode_ms for g in plain.every) / sum(g.decode_ms for g in rows.every)
    assert costs_of((CHAINED, rows), plain=plain).corrected(DRAFTER, rows) == pytest.approx(measured, rel=1e-6)


def test_costs_are_pooled_over_rows_of_a_drafter_and_verification_over_all():
    """v(6) of a row comes from the rounds of another drafter too; c does not."""
    other = Mode("ngram", "token", 5)
    rows, table = (Timed([[drafted([round_of(range(3), 5, c, v)] * 40, 161)] for _ in range(2)]) for c, v in ((1.0, 5.0), (0.0, 7.0)))
    costs = costs_of((CHAINED, rows), (other, table), plain=Timed([[plain_of(161)]] * 2))
    assert costs.all.verification_ms(6) == pytest.approx(6.0)
    assert costs.all.round_cost(DRAFTER).c == pytest.approx(0.25) and costs.all.round_cost(drafter_of(other)).c == 0
    assert costs.all.verification_ms(32) == pytest.approx(6.0 * 2.0 / 1.25), "never verified: by the shape of the loop"
    report = costs.report(LOOP, ["a", "b"])
    assert report.t_target_ms == pytest.approx(4.0) and report.c_chained == pytest.approx(0.25) and report.c == LOOP.c
    assert report.v["6"] == pytest.approx(1.5) and report.rounds.verify_ms["6"].total == 160
    assert report.rounds.step_ms.ci95 == pytest.approx((4.0, 4.0))


def test_without_a_second_run_nothing_is_predicted():
    rows, plain = Timed([[drafted([round_of(range(3))], 5)]]), Timed([[plain_of(5)]])
    assert costs_of((CHAINED, rows), plain=plain).corrected(DRAFTER, rows) is None
    assert costs_of((CHAINED, plain), plain=plain).corrected(DRAFTER, plain) is None
    assert costs_of((CHAINED, plain), plain=plain).all.round_cost(DRAFTER) is None


def test_relaxed_reaches_draft_tokens_up_to_the_end_of_the_text():
    """Five draft tokens of which the text ended at the third, which the target replaced; then five without an end."""
    at_end = Round([5, 6, 7, 8, 9], [5, 6, 2, 8, 9], [True, True, False, False, False], None, None, True, {}, "length", num_before_end=3)
    whole = Round([5, 6, 7, 8, 9], [5, 6, 4, 8, 1], [True, True, False, True, False], None, 3, True, {}, "length")
    runs = Timed([[Generation([1] * 4, 1, 1.0, {}, [r])] for r in (at_end, whole)])
    assert acceptance_of(runs, ["a", "b"], "relaxed").value == pytest.approx((2 + 3) / (3 + 5))
    assert acceptance_of(runs, ["a", "b"], "feature").value == pytest.approx((2 + 3) / (3 + 4))


def test_both_formulas_of_a_relaxed_row_with_one_recompute():
    """Two rounds of four drafts: all kept; then the second replaced, so three tokens are read again in 6 ms."""
    mode = Mode("chained", "relaxed", 4, threshold=0.9)
    rounds = [round_of(range(4), 4), round_of((0, 2, 3), 4, recompute_ms=6.0)]
    rows = Timed([[drafted(rounds, 11)] for _ in range(2)])
    plain = Timed([[plain_of(11)]] * 2)
    costs = costs_of((mode, rows), plain=plain)
    assert costs.all.reread_ms(3) == pytest.approx(6.0)
    spent = 2 * (4 * 0.25 + 1.25 + 0.05) + 6.0 / 4.0
    assert costs.corrected(DRAFTER, rows) == pytest.approx(10 / spent)
    row = timed_row(mode, rows, plain, ["a", "b"])
    assert speed_model.modelled(row, rows, 0.25, 4.0) == pytest.approx(3.5 / (1 + 4 * 0.25 + 6.0 / 2 / 4.0))


def test_a_row_counts_all_its_repeats_in_every_figure():
    """One repeat of ten tokens in two rounds, one of ten in five: sums over both; the adapter's time is of a draft, not of a prompt."""
    few = drafted([round_of(range(4)), round_of(range(3))], 10)
    many = drafted([round_of((0,)), *[round_of((0,))] * 3, round_of(())], 10)
    for g in (few, many):
        g.ms["adapter"] = 0.5 * len(g.rounds)
        g.total_ms += g.ms["adapter"]
    rows, plain = Timed([[few, many]] * 2), Timed([[plain_of(10), plain_of(10, 6.0, 70.0)]] * 2)
    row = timed_row(CHAINED, rows, plain, ["a", "b"])
    assert row.tokens_per_pass == pytest.approx(18 / 7)
    assert row.acceptance_rate.value == pytest.approx((4 + 3 + 4) / (5 + 4 + 4 * 2 + 1))
    assert row.adapter_ms_per_draft == pytest.approx(3.5 / 35)
    assert row.ms["adapter"] == pytest.approx(3.5 / 2)
    total, prefill = few.total_ms + many.total_ms, 100.0
    assert row.speedup.value == pytest.approx((50 + 36 + 70 + 54) / total)
    assert row.decode_speedup.value == pytest.approx((36 + 54) / (total - prefill)), "prefill is not decoding"


def test_the_fastest_row_is_measured_on_clips_that_did_not_choose_it():
    """Twelve rows that are equal but for noise: an interval on the clips that chose the fastest lies above 1 far more often than 2.5 % of
    the time, one on the others does not."""
    naive = honest = 0
    clips, what = [str(i) for i in range(30)], lambda g: g.total_ms
    for seed in range(60):
        took = np.random.default_rng(seed).normal(10.0, 1.0, (13, 30))
        baseline, *methods = (Timed([[Generation([1], 0, float(ms), {})] for ms in row]) for row in took)
        found = fastest(methods, baseline, clips, what)
        naive += timing.speedup(baseline, methods[found.best], clips, what).ci95[0] > 1
        honest += timing.speedup(baseline, found.runs, clips, what).ci95[0] > 1
    assert naive >= 9 and honest <= 5


def test_the_choice_of_one_half_is_timed_on_the_other():
    """Clips a and c choose the first row, b and d the second: each is timed where the other chose."""
    row = lambda *ms: Timed([[Generation([1], 0, m, {})] for m in ms])  # noqa: E731
    one, two, plain = row(1.0, 9.0, 1.0, 9.0), row(8.0, 2.0, 8.0, 2.0), row(*[10.0] * 4)
    found = fastest([one, two], plain, ["a", "b", "c", "d"], lambda g: g.total_ms)
    assert found.chosen == (0, 1) and [g.total_ms for g in found.runs.every] == [8.0, 9.0, 8.0, 9.0]
    alone = fastest([one, two], plain, ["a"] * 4, lambda g: g.total_ms)
    assert alone.chosen == (0, 0) and alone.best == 0 and alone.runs.every == one.every


def chained_proposer(target):
    torch.manual_seed(3)
    adapter = ChainedAdapter(32, 32, 1, width=8).eval()
    return ChainedProposer(as_decoder(tiny_llama(1)), adapter, target.head_weight, target.embeddings)


def test_the_cost_of_a_draft_beyond_that_of_its_loop_has_a_part_per_round_and_a_part_per_draft():
    """0.2 ms a draft alone; live 0.5 ms a round and 0.01 ms a draft more; the last round counts two of its eight drafts."""
    loop, lengths = ChainLoop(), [3, 3, 5, 8, 8]
    loop.rounds = [DraftedRound(n, n, 0.5 + 0.21 * n, 0.2 * n, 0.3) for n in lengths[:-1]] + [DraftedRound(8, 2, 0.5 + 0.21 * 8, 1.6, 0.3)]
    found = loop.costs(4.0)
    assert found.alone == pytest.approx(0.2 * 27 / 21 / 4)
    assert found.live == pytest.approx((5 * 0.5 + 0.21 * 27) / 21 / 4)
    assert found.reading == pytest.approx(5 * 0.3 / 21 / 4)
    assert found.once == pytest.approx(5 * 0.5 / 21 / 4)
    loop.rounds = loop.rounds[:2]
    assert loop.costs(4.0).once is None, "one draft length does not tell the two parts apart"
    assert ChainLoop().costs(4.0) == (None,) * 4


def test_the_loop_repeats_the_rounds_of_the_run_and_leaves_the_run_as_it_is():
    target, prompt = as_decoder(tiny_llama(0)), prompt_of(1, 5, 9)
    proposer, loop, asked, found = chained_proposer(target), ChainLoop(), [], []

    def answer(i):
        return speculate(target, proposer, prompt, prompt, num_draft_tokens=4, max_new_tokens=12)

    read, counted = proposer._chain.read, []
    proposer._chain.read = lambda states, *more: counted.append(states.shape[1]) or read(states, *more)
    alone, redraft, reread = answer(0), proposer.redraft, proposer.reread
    proposer.redraft = lambda length: asked.append(length) or redraft(length)
    proposer.reread = lambda number: found.append(number) or reread(number)
    live = counted.copy()
    got = loop.after(answer, proposer, 4, 12)(0)
    assert got.token_ids == alone.token_ids and [r.proposed for r in got.rounds] == [r.proposed for r in alone.rounds]
    assert len(redraft(3)) == 3
    drafted = [r for r in got.rounds if r.proposed]
    lengths = [len(r.proposed) for r in drafted]
    assert asked == [lengths[0], *lengths] and [r.length for r in loop.rounds] == lengths
    assert found == [live[0], *live] and counted == [*live, *live, *found] and reread(3).shape == (1, 8)
    assert min(r.reading_ms for r in loop.rounds) > 0
    assert [r.live_ms for r in loop.rounds] == [sum(r.ms.get(stage, 0) for stage in DRAFT_STAGES) for r in drafted]
    assert min(r.alone_ms for r in loop.rounds) > 0
    assert loop.after(answer, ModelProposer(as_decoder(tiny_llama(1)), None, None), 4, 12) is answer


def test_on_a_gpu_the_loop_drafts_on_after_the_end_of_the_text_as_far_as_the_run_did():
    """Up to the draft length, or to the longest answer: 1 + 5 + 2 tokens before the last round leave room for three of twelve."""
    loop, lengths = ChainLoop(), []
    proposer = chained_proposer(as_decoder(tiny_llama(0)))
    proposer.redraft, proposer.reread = lambda length: lengths.append(length), lambda number: None
    rounds = [
        Round([5] * 4, [5] * 4, [True] * 4, None, 7, False, {}, "length"),
        Round([5] * 4, [6] * 4, [True, *[False] * 3], None, 7, False, {}, "length"),
    ]
    rounds += [Round([5, 2], [5, 2], [True, True], None, None, False, {}, "EOS")]
    for device, last in (("cuda", 3), ("cpu", 2)):
        lengths.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(proposer), "device", torch.device(device))
            patch.setattr(chain_loop, "Stopwatch", lambda _: Stopwatch())
            loop.after(lambda i: Generation([5] * 10, 3, 1.0, {}, rounds), proposer, 4, 12)(0)
        assert lengths == [4, 4, 4, last]


def test_what_a_round_reads_is_what_was_emitted_since_the_last_one_that_drafted():
    def of(proposed, accepted, recomputed=False):
        return Round([5] * proposed, [5] * proposed, [True] * accepted + [False] * (proposed - accepted), None, 7, recomputed, {}, "length")

    assert tokens_read([of(4, 2), of(0, 0), of(0, 0), of(3, 3), of(4, 1, recomputed=True), of(2, 0)]) == [1, 5, 4, 5]
    assert tokens_read([]) == tokens_read([of(0, 0)]) == []


def test_the_report_says_how_far_live_and_alone_are_apart_and_why(finished):
    result = BenchmarkReport.from_json(json.loads((finished / "out" / "benchmark" / "benchmark.json").read_text()))
    (fixed,) = (d for d in result.cost.rounds.drafters if (d.draft, d.adaptive) == ("chained", False))
    assert result.cost.c_chained_live == pytest.approx(fixed.c) and result.cost.c_chained_alone > 0
    assert result.cost.c_chained_once is not None, "two draft lengths"
    assert result.cost.c_chained_reading > 0
    cost = dataclasses.replace(result.cost, c_chained_live=0.03, c_chained_alone=0.02, c_chained_once=0.004, c_chained_reading=0.005)
    for rows in (report.decoding_cost_table(cost)[2], planted_report.chained_rows(cost)):
        cells = dict(row for row in rows if "live" in row[0] or "alone" in row[0])
        assert [*cells.values()][:2] == ["0.0300", "0.0200"]
        assert cells["live / alone"].startswith("1.50 times; the difference is 0.0100: 0.0040 is spent once a round")
        assert "0.0060 with each draft token. That loop reads as many tokens in 0.0050; with it" in cells["live / alone"]
        assert cells["live / alone"].endswith("live is 1.20 times alone")
    text = (finished / "out" / "benchmark" / "report.md").read_text()
    assert "| live / alone |" in text and "live / alone" in (finished / "out" / "benchmark" / "report.html").read_text()
    earlier = dataclasses.replace(cost, c_chained_live=None, c_chained_alone=None)
    labels = [row[0] for row in report.decoding_cost_table(earlier)[2]]
    assert planted_report.chained_rows(earlier) == [] and "c of a chained draft token, in a loop of nothing else" in labels


def test_an_eager_fallback_is_a_table_of_both_reports():
    folder = ROOT / "data" / "results" / "h100_random_7b"
    for kind, name, tables in (
        (BenchmarkReport, "benchmark.json", report.tables),
        (PlantedReport, "planted.json", planted_report.tables),
    ):
        result = kind.from_json(json.loads((folder / name).read_text()))
        assert not [title for title, *_ in tables(result) if "EAGER" in title]
        meta = {**result.meta, "eager_fallbacks": ["steps cannot be compiled: no C compiler: here"]}
        ((title, _, rows),) = (table for table in tables(dataclasses.replace(result, meta=meta)) if "EAGER" in table[0])
        assert f"--steps {meta['config']['steps']}" in title and rows == [["steps cannot be compiled", "no C compiler: here"]]


def test_only_rows_of_the_runs_own_adapters_can_be_the_target():
    """Neither a row of another exit of EventGPT, nor a table, nor a lossy rule."""
    usual = Mode("aligned", "token", 5)
    assert targets.is_candidate(usual) and targets.is_candidate(Mode("own", "token", 5))
    assert not targets.is_candidate(dataclasses.replace(usual, exit_layer=2))
    assert not targets.is_candidate(Mode("ngram", "token", 5))
    for rule, threshold in DEFAULT_THRESHOLDS.items():
        assert not targets.is_candidate(Mode("aligned", rule, 5, threshold=threshold))


@pytest.mark.parametrize("draft", ["aligned", "chained"])
def test_the_wide_adapter_is_timed_stepping_as_the_run_does(draft, monkeypatch):
    asked = []
    monkeypatch.setattr(targets, "WIDTH", 16)
    monkeypatch.setattr(targets, "hidden_ms", lambda adapter, steps, repeats=0: asked.append((adapter.d_target, steps)) or 1.0)
    monkeypatch.setattr(targets, "chained_ms", lambda adapter, steps, repeats=0: asked.append((adapter.geometry["d_target"], steps)) or 1.0)
    acceptance = SimpleNamespace(chained=SimpleNamespace(num_draft_tokens=5), cosine=SimpleNamespace(value=0.5), positions="here")
    row = SimpleNamespace(adapter_ms_per_draft=0.1, adapter_ms_ci95=(0.08, 0.12), draft=draft)
    cost = SimpleNamespace(t_adapter_ms=0.1, loop=SimpleNamespace(c_chained=0.5, t_target_ms=4.0))
    adapters = HiddenAdapter(8, 8, 4), ChainedAdapter(8, 8, 3, 4)
    found = targets.adapter_in_use(row, [], *adapters, acceptance, cost, "graphs")
    assert asked == [(16, "graphs")] and found.where.startswith("here")
    is_chained = draft == "chained"
    assert (found.overhead_loop_ms, found.head) == ((2.0, "folded head included") if is_chained else (0.1, "without the head"))


def test_the_overhead_of_hybrid_is_that_of_the_adapters_own_draft_tokens():
    """A hybrid row also drafts from a table, which costs nothing: its time per draft token is not the adapter's."""

    def row(draft, length, adaptive=False, **more):
        usual = {"accept": "token", "exit_layer": None, "overlap": False}
        return SimpleNamespace(draft=draft, num_draft_tokens=length, adaptive=adaptive, **{**usual, **more})

    hybrid, best = row("hybrid", 24, True), row("chained", 24, True)
    others = [row("chained", 24, True, overlap=True), row("aligned", 5), row("chained", 5), row("chained", 24, True, accept="feature")]
    assert targets.overhead_row(hybrid, [hybrid, *others, best]) is best
    assert targets.overhead_row(hybrid, [hybrid, *others]).draft == "chained" and targets.overhead_row(others[1], [best]) is others[1]
    assert targets.overhead_row(hybrid, [hybrid]) is hybrid


def test_one_draft_a_round_may_be_the_best():
    """Half of the drafts are kept and reading more than two tokens is dear: the second draft never pays."""
    found = speed_model.bound(0.5, RoundCost(0.2, 0.0), {"1": 1.0, "2": 1.0, "3": 2.0, "32": 9.0})
    assert found.num_draft_tokens == 1 and found.speedup == pytest.approx(1.5 / 1.2)


def test_the_bound_is_the_best_length_and_warns_when_nothing_can_win():
    best = speed_model.bound(0.9, RoundCost(0.05, 0.0), V)
    speedups = [speed_model.speedup_at(0.9, g, RoundCost(0.05, 0.0), V) for g in range(1, 32)]
    assert best.speedup == max(speedups) and speedups[best.num_draft_tokens - 1] == max(speedups)
    cost_with = lambda v, bound: SimpleNamespace(v=v, bound={"aligned": bound})  # noqa: E731
    assert speed_model.warnings(cost_with(V, best)) == []
    hopeless = speed_model.bound(0.5, RoundCost(0.6, 0.0), V)
    assert hopeless.speedup < 1
    (found,) = speed_model.warnings(cost_with(V, hopeless))
    assert found.startswith("aligned: a draft token costs 0.600 passes and is accepted at a rate of 0.500: no draft length can be faster")
    dear = {"1": 1.0, "2": 3.0, "32": 93.0}  # verifying costs so much that good draft tokens do not help
    (found,) = speed_model.warnings(cost_with(dear, speed_model.bound(0.9, RoundCost(0.05, 0.25), dear)))
    assert "0.900; the rest of a round with 1 of them takes 3.25 passes: no draft length" in found and "(0.58x at best)" in found
    costly = {"1": 1.0, "8": 1.6, "32": 2.5}  # eight tokens at 1.6 passes still pay
    assert speed_model.warnings(cost_with(costly, speed_model.bound(0.9, RoundCost(0.05, 0.0), costly))) == []


@pytest.mark.parametrize("overlap", [False, True])
def test_time_stamps_lie_inside_the_whole_and_do_not_overlap(overlap):
    model = tiny_llama(0)
    target, prompt = as_decoder(model), prompt_of(1, 5, 9)
    proposer = ModelProposer(as_decoder(noisy_copy(model, 0.05)), None, None)
    got = speculate(target, proposer, prompt, prompt, num_draft_tokens=3, max_new_tokens=20, overlap=overlap)
    own = [(begin, end) for stage, begin, end in got.spans if not stage.endswith(", overlapped")]
    assert len(own) < len(got.spans) if overlap else len(own) == len(got.spans)
    assert all(0 <= begin <= end <= got.total_ms for begin, end in own)
    assert all(a[1] <= b[0] for a, b in pairwise(own))
    assert sum(end - begin for begin, end in own) == pytest.approx(sum(got.ms.values()))
    assert all(0 <= begin <= end <= plain.total_ms for plain in [greedy(target, prompt, 20)] for _, begin, end in plain.spans)


def test_a_text_that_differs_in_one_repeat_is_seen():
    """Two repeats, of which the second differs: half an exact match, and the difference is named."""
    target, prompt = as_decoder(tiny_llama(0)), prompt_of(1, 5, 9)
    own = greedy(target, prompt, 8)
    other = Generation([*own.token_ids[:3], (own.token_ids[3] + 1) % 64, *own.token_ids[4:]], 1, 1.0, {})
    sample = Sample(id="a", sequence="s", question="q", events=None, video=None)
    runs, plain = Timed([[own, other]]), Timed([[own, own]])
    found = fidelity.fidelity(target, fidelity.log_likelihoods(target, [prompt]), [sample], runs, plain)
    assert found.exact_match.value == 0.5
    assert found.token_agreement.value == pytest.approx(1 - 0.5 / len(own.token_ids))
    assert [m.position for m in fidelity.mismatches(target, [prompt], [sample], runs, plain)] == [3]


def test_a_mismatch_is_reported_with_its_gap():
    target, prompt = as_decoder(tiny_llama(0)), prompt_of(1, 5, 9)
    own = greedy(target, prompt, 12)
    other = [*own.token_ids[:4], (own.token_ids[4] + 1) % 64, *own.token_ids[5:]]
    texts, plain = (Timed([[Generation(t, 1, 1.0, {})]]) for t in (other, own.token_ids))
    sample = Sample(id="a", sequence="s", question="q", events=None, video=None)
    (found,) = fidelity.mismatches(target, [prompt], [sample], texts, plain)
    state = target.prefill([prompt])
    logits = target.lm_head(target.teacher_force(state, torch.tensor([own.token_ids])))[0, 4].topk(2).values
    assert found.sample == "a" and found.position == 4
    assert found.top2_gap == pytest.approx(float(logits[0] - logits[1]))
    assert fidelity.mismatches(target, [prompt], [sample], plain, plain) == []


def test_generate_baselines_have_the_same_texts(finished):
    """transformers' generate, prompt lookup and assistance: the same texts, each with our fastest row over it."""
    report = json.loads((finished / "out" / "benchmark" / "benchmark.json").read_text())
    plain, *others = report["baselines"]
    chosen = report["fastest_lossless"]
    assert plain["name"] == "plain greedy" and plain["best_over_it"] == chosen["speedup"]
    speed = {row_name(r): r["speedup"] for r in report["rows"] if r["accept"] == "token" and r["draft"] not in BASELINE_DRAFTERS}
    assert chosen["row"] == max(speed, key=lambda name: speed[name]["value"]) and set(chosen["chosen"]) <= set(speed)
    if set(chosen["chosen"]) == {chosen["row"]}:
        assert chosen["speedup"] == speed[chosen["row"]]
    assert report["targets"][-1]["ci95"] == chosen["speedup"]["ci95"] and chosen["how"] in report["targets"][-1]["note"]
    assert [o["name"] for o in others] == ["generate", "generate, prompt lookup", "generate, assisted by its first 1 layer"]
    for other in others:
        assert other["exact_match"] == 1.0 and other["mismatches"] == [] and other["best_over_it"]["value"] > 0


def test_two_runs_are_compared_or_refused(finished, tmp_path, capsys):
    path = finished / "out" / "benchmark" / "benchmark.json"
    found = main_of("benchmark_feature_sd")(["compare", str(path), str(path)])
    assert found["differ"] == [] and found["only_in_one"] == 0 and "+0.0%" in capsys.readouterr().out

    def changed(change) -> str:
        report = json.loads(path.read_text())
        change(report)
        report["content_hash"] = content_hash({k: v for k, v in report.items() if k != "content_hash"})
        (tmp_path / "other.json").write_text(json.dumps(report))
        return str(tmp_path / "other.json")

    def faster(report):
        report["rows"][0]["speedup"] |= {"value": 99.0, "ci95": [98.0, 100.0]}

    first = json.loads(path.read_text())["rows"][0]
    assert compare([str(path), changed(faster)])["differ"] == [f"{first['draft']} + {first['accept']}, {first['drafts_per_round']}"]
    with pytest.raises(UserError, match="dtype: 'float32' and 'bfloat16'"):
        compare([str(path), changed(lambda report: report["meta"].update(dtype="bfloat16"))])
    with pytest.raises(UserError, match="not a benchmark"):
        compare([str(path), str(finished / "out" / "acceptance" / "acceptance.json")])
    with pytest.raises(UserError, match="wants two files"):
        compare([str(path)])


def test_drafters_that_are_asked_for_have_the_rows_they_have_in_a_whole_benchmark(finished, tmp_path):
    """And the chained adapter, which costs and pictures are about."""
    shutil.copytree(finished / "out", tmp_path / "out")
    argv = ["--config", str(finished / "tiny.yaml"), "--output_dir", str(tmp_path / "out"), "--limit", "1"]
    found = main_of("benchmark_feature_sd")([*argv, "--drafters", "attending", "tables"])
    whole = json.loads((finished / "out" / "benchmark" / "benchmark.json").read_text())["rows"]
    keys = ("draft", "accept", "num_draft_tokens", "adaptive", "overlap", "threshold")
    wanted = [[row[key] for key in keys] for row in whole if row["draft"] in ("chained", "attending", "tables")]
    assert [[row[key] for key in keys] for row in found["rows"]] == wanted and len(wanted) < len(whole)
    (tmp_path / "out" / "attending_adapter" / "adapter.pt").unlink()
    with pytest.raises(UserError, match=r"--drafters attending: nothing at .*\n  .*train_hidden_adapter.py .*--adapter attending"):
        main_of("benchmark_feature_sd")([*argv, "--drafters", "attending"])


def test_several_data_sets_share_one_table_and_a_geometric_mean(finished, tmp_path, caplog):
    first = finished / "out"
    report = json.loads((first / "benchmark" / "benchmark.json").read_text())
    value = report["fastest_lossless"]["speedup"]["value"]
    report["fastest_lossless"]["speedup"]["value"] = 4 * value
    report["content_hash"] = content_hash(report)
    other = tmp_path / "other" / "benchmark" / "benchmark.json"
    other.parent.mkdir(parents=True)
    other.write_text(json.dumps(report))
    (tmp_path / "empty").mkdir()
    found = main_of("benchmark_feature_sd")(["summary", str(first), str(tmp_path / "other"), str(tmp_path / "empty")])
    assert [d["name"] for d in found["data_sets"]] == ["out", "other"] and "no benchmark in" in caplog.text
    assert found["geometric_mean"]["speedup"] == pytest.approx(2 * value)  # of v and 4 v
    best = next(r for r in report["rows"] if row_name(r) == report["fastest_lossless"]["row"])
    assert found["data_sets"][0]["tokens_per_pass"] == best["tokens_per_pass"]
    for paths, said in (
        ([], "wants directories"),
        ([str(tmp_path / "empty")], "no benchmark in"),
        ([str(tmp_path / "none")], "nothing at"),
    ):
        with pytest.raises(UserError, match=said):
            main_of("benchmark_feature_sd")(["summary", *paths])
    with pytest.raises(UserError, match="the same benchmark"):
        main_of("benchmark_feature_sd")(["summary", str(first), str(first / "benchmark" / "benchmark.json")])
    with pytest.raises(UserError, match="not a benchmark"):
        main_of("benchmark_feature_sd")(["summary", str(first / "acceptance" / "acceptance.json")])
