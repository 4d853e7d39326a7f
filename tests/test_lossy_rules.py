"""The rules `typical` and `kl` do what their papers write, and the sweep of all lossy rules is what decoding at each threshold gives."""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import as_decoder, main_of, noisy_copy, prompt_of, tiny_llama
from oracle import states_behind
from test_decoding import PROMPTS, proposer_for, small_adapter

from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.benchmark import plots
from feature_alignment.benchmark import sweep as sweep_module
from feature_alignment.benchmark.results import Fidelity
from feature_alignment.benchmark.sweep import THRESHOLDS, LossySweep, SweepPoint, decode_range
from feature_alignment.cli.config import parse_config
from feature_alignment.cli.console import UserError
from feature_alignment.decoding.acceptance import accepted_drafts, kl_divergence, rule_score, typical_score
from feature_alignment.decoding.baseline_drafters import TableProposer, Template
from feature_alignment.decoding.chained_proposer import ChainedProposer
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.settings import DEFAULT_THRESHOLDS, DecodingConfig
from feature_alignment.measurement.metrics import Rate
from feature_alignment.measurement.records import read_record
from feature_alignment.storage.files import read_hashed_json

LOSSY = list(DEFAULT_THRESHOLDS)


def law(logits: torch.Tensor) -> np.ndarray:
    """softmax in float64"""
    e = np.exp(logits.double().numpy() - logits.double().numpy().max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("epsilon", [1e-4, 0.01, 0.09, 0.25, 0.7])
def test_typical_accepts_above_the_smaller_of_epsilon_and_its_root_times_exp_of_minus_the_entropy(epsilon):
    torch.manual_seed(0)
    logits = torch.randn(400, 30) * torch.rand(400, 1) * 8  # flat and peaked
    logits[::7, 3:9] = -torch.inf
    drafts = torch.randint(9, 30, (400,))
    p = law(logits)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    x = p[np.arange(400), drafts]
    wanted = x > np.minimum(epsilon, np.sqrt(epsilon) * np.exp(-entropy))
    assert (typical_score(drafts, logits) > epsilon).tolist() == wanted.tolist() and 0 < wanted.sum() < 400
    own = logits.argmax(-1)
    assert (typical_score(own, logits) > epsilon).all(), "the target's own token is always accepted"


def test_divergence_is_that_of_the_drafter_from_the_target():
    torch.manual_seed(1)
    target, draft = torch.randn(50, 20) * 2, torch.randn(50, 20) * 2
    p, q = law(target), law(draft)
    assert kl_divergence(target, draft).numpy() == pytest.approx((p * np.log(p / q)).sum(-1), rel=1e-4)
    assert kl_divergence(target, target + 3).abs().max() < 1e-6
    target[:, 4] = -torch.inf
    p = law(target)
    wanted = (p * np.log(np.where(p > 0, p, 1) / q)).sum(-1)
    assert kl_divergence(target, draft).numpy() == pytest.approx(wanted, rel=1e-4)
    draft[:, 5] = -torch.inf  # the drafter excludes what the target may say
    assert kl_divergence(target, draft).isinf().all()


def test_kl_accepts_below_its_threshold_and_all_others_above():
    ids, score = torch.tensor([1, 1, 1]), torch.tensor([0.1, 0.3, 0.1])
    assert accepted_drafts("kl", ids, ids + 1, score, 0.2).tolist() == [True, False, False]
    assert accepted_drafts("kl", ids, ids + 1, score, 0.1).tolist() == [False, False, False]
    assert accepted_drafts("typical", ids, ids + 1, score, 0.05).tolist() == [True, True, True]
    with pytest.raises(ValueError, match="compares distributions, and this drafter has none"):
        accepted_drafts("kl", ids, ids, None, 0.1)
    logits = torch.zeros(3, 4)
    assert rule_score("token", ids, logits, None, score) is None and rule_score("kl", ids, logits, None, score) is None
    assert rule_score("feature", ids, logits, None, score) is score


def chained_proposer(model, target):
    torch.manual_seed(5)
    adapter = ChainedAdapter(32, 32, 1, 16).eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return ChainedProposer(as_decoder(model), adapter, target.head_weight, target.embeddings)


def drafts_of(source: str, noise: float = 0.05, seed: int = 0):
    """A target, its drafter and a function: emitted text, draft tokens -> the drafter's logits [g, v] from its definition."""
    model = tiny_llama(seed)
    other, target = noisy_copy(model, noise, seed), as_decoder(model)
    if source == "chained":
        return target, chained_proposer(other, target), None
    proposer = proposer_for(source, other, target, small_adapter(seed))

    def logits(prompt, text, drafts):
        states = states_behind(other.model, [*prompt, *text, *drafts[:-1]])[-len(drafts) :]
        return other.lm_head(states) if source == "own" else target.lm_head(small_adapter(seed)(states))

    return target, proposer, logits


@pytest.mark.parametrize(("accept", "threshold"), [("typical", 0.02), ("typical", 0.3), ("kl", 0.05), ("kl", 0.6)])
@pytest.mark.parametrize("source", ["own", "aligned"])
@torch.inference_mode()
def test_every_decision_of_a_text_follows_from_both_distributions(accept, threshold, source):
    """Without caches: at each round, p and q of one full pass over the text so far decide which draft tokens are accepted."""
    decided = set()
    for seed, prompt in enumerate(PROMPTS):
        target, proposer, draft_logits = drafts_of(source, 0.05 if accept == "kl" else 0.3, seed)
        rule = {"accept": accept, "threshold": threshold, "num_draft_tokens": 4, "max_new_tokens": 25}
        got = speculate(target, proposer, prompt_of(*prompt), prompt_of(*prompt), **rule)
        text = got.token_ids[:1]
        for r in got.rounds:
            g = len(r.proposed)
            states = states_behind(target.llama, [*prompt, *text, *r.proposed])[-g - 1 :]
            p, q = law(target.lm_head(states)[:g]), law(draft_logits(prompt, text, r.proposed))
            if accept == "kl":
                accepts = (p * np.log(p / q)).sum(-1) < threshold
            else:
                entropy = -(p * np.log(p)).sum(-1)
                accepts = p[np.arange(g), r.proposed] > np.minimum(threshold, np.sqrt(threshold) * np.exp(-entropy))
            n = min([*np.flatnonzero(~accepts), g])
            assert r.num_accepted == n
            decided |= {*accepts.tolist()}
            text = got.token_ids[: len(text) + n + 1]
        assert len(got.token_ids) - len(text) <= 1  # a last token, for which there is no room to draft
    assert decided == {True, False}


def test_typical_accepts_at_least_as_many_draft_tokens_as_token_and_none_that_are_unlikely():
    for seed, prompt in enumerate(PROMPTS):
        target, proposer, _ = drafts_of("aligned", 0.1, seed)
        plain = greedy(target, prompt_of(*prompt), 25)
        exact = speculate(target, proposer, prompt_of(*prompt), prompt_of(*prompt), num_draft_tokens=4, max_new_tokens=25)
        first = {}
        for epsilon in (0.999, 1e-6):
            rule = {"accept": "typical", "threshold": epsilon, "num_draft_tokens": 4, "max_new_tokens": 25}
            got = speculate(target, proposer, prompt_of(*prompt), prompt_of(*prompt), **rule)
            first[epsilon] = got.rounds[0].num_accepted
            assert all(score > epsilon for r in got.rounds for score, a in zip(r.score, r.accepted, strict=True) if a)
        assert exact.rounds[0].num_accepted <= first[0.999] <= first[1e-6] and exact.token_ids == plain.token_ids


def test_tables_have_no_distribution_for_kl_but_can_be_judged_by_typical():
    target, _, _ = drafts_of("own")
    table = TableProposer(Template([("", greedy(target, prompt_of(*PROMPTS[0]), 25).token_ids)]))
    rule = {"num_draft_tokens": 4, "max_new_tokens": 25}
    got = speculate(target, table, prompt_of(*PROMPTS[0]), prompt_of(*PROMPTS[0]), accept="typical", threshold=0.3, **rule)
    assert got.token_ids == greedy(target, prompt_of(*PROMPTS[0]), 25).token_ids and got.passes < 10
    with pytest.raises(ValueError, match="this drafter has none"):
        speculate(target, table, prompt_of(*PROMPTS[0]), prompt_of(*PROMPTS[0]), accept="kl", threshold=0.3, **rule)


def test_each_rule_has_a_default_threshold_of_its_own():
    for rule, threshold in DEFAULT_THRESHOLDS.items():
        assert parse_config(DecodingConfig, ["--accept", rule], "feature_sd_inference").acceptance_threshold == threshold
        assert threshold in THRESHOLDS[rule], "the sweep's picture marks it"
    assert parse_config(DecodingConfig, ["--accept", "kl", "--threshold", "0.5"], "feature_sd_inference").acceptance_threshold == 0.5
    for rule in ("typical", "kl"):
        for value in ("0", "-0.5"):
            with pytest.raises(UserError, match="wanted a number above 0"):
                parse_config(DecodingConfig, ["--accept", rule, f"--threshold={value}"], "feature_sd_inference")
        with pytest.raises(UserError, match="--accept token"):
            parse_config(DecodingConfig, ["--accept", rule, "--temperature", "0.5"], "feature_sd_inference")


@pytest.mark.parametrize("source", ["aligned", "chained"])
@pytest.mark.parametrize("rule", LOSSY)
def test_a_sweep_is_what_decoding_at_each_threshold_gives(rule, source):
    decoded, total = [], 0
    for seed, prompt in enumerate(PROMPTS):
        target, proposer, _ = drafts_of(source, 0.05, seed)

        def decode(threshold, target=target, proposer=proposer, prompt=prompt):
            settings = {"accept": rule, "threshold": threshold, "num_draft_tokens": 4, "max_new_tokens": 20}
            return speculate(target, proposer, prompt_of(*prompt), prompt_of(*prompt), **settings)

        def counted(threshold, decode=decode):
            decoded.append(decode(threshold))
            return decoded[-1]

        scores = [score for r in decode(1e-9).rounds for score in r.score]
        thresholds = [t for q in (0.95, 0.8, 0.5, 0.2) for t in [float(np.quantile(scores, 1 - q if rule == "kl" else q))] * 2]
        found, before = decode_range(rule, thresholds, [partial(counted, t) for t in thresholds]), len(decoded)
        result = [(g.token_ids, g.passes, [r.accepted for r in g.rounds]) for g in found]
        assert result == [(g.token_ids, g.passes, [r.accepted for r in g.rounds]) for g in map(decode, thresholds)]
        assert len(decoded) == before and {id(g) for g in found} <= {id(g) for g in decoded}
        total += len(thresholds)
    assert len(PROMPTS) < len(decoded) <= total / 2, "what decides alike is decoded once"


@pytest.mark.parametrize("rule", LOSSY)
def test_a_sweep_goes_from_strict_to_loose(rule):
    assert all((a < b) == (rule == "kl") for a, b in pairwise(THRESHOLDS[rule]))


def test_the_benchmark_writes_the_sweep_next_to_its_lossless_point(finished):
    out = finished / "out" / "benchmark"
    sweep, report = read_record(out / "lossy_rules.json", LossySweep, ""), read_hashed_json(out / "benchmark.json", "")
    assert (sweep.draft, sweep.num_draft_tokens, sweep.prompts) == ("chained", 3, 4) and sweep.rules == LOSSY
    assert [p.threshold for rule in LOSSY for p in sweep.of_rule(rule)] == [t for rule in LOSSY for t in THRESHOLDS[rule]]
    lossless, token = sweep.lossless, next(r for r in report["rows"] if r["accept"] == "token" and r["num_draft_tokens"] == 3)
    assert lossless.fidelity.exact_match.value == lossless.fidelity.token_agreement.value == 1
    assert lossless.tokens_per_pass.value == pytest.approx(token["tokens_per_pass"])
    rows = {(r["accept"], r["threshold"]): r for r in report["rows"] if r["draft"] == "chained" and r["accept"] != "token"}
    for rule in LOSSY:  # a swept point is the timed row of the same threshold
        row = rows[rule, DEFAULT_THRESHOLDS[rule]]
        point = next(p for p in sweep.of_rule(rule) if p.threshold == DEFAULT_THRESHOLDS[rule])
        assert point.tokens_per_pass.value == pytest.approx(row["tokens_per_pass"])
        assert point.fidelity.to_json() == row["fidelity"]
    assert "kl < 0.1" in (out / "report.md").read_text() and "lossy_rules.png" in (out / "report.md").read_text()
    assert json.loads((out / "benchmark.json").read_text())["fastest_lossless"]["row"].split(" + ")[1].startswith("token")


def test_a_swept_prompt_is_one_of_few_spread_over_all(monkeypatch):
    monkeypatch.setattr(sweep_module, "MOST_PROMPTS", 3)
    assert sweep_module.spread(10) == [0, 3, 6] and sweep_module.spread(2) == [0, 1]


def rate(value: float, margin: float = 0.1) -> Rate:
    return Rate(value, value, 1.0, (value - margin, value + 2 * margin))


def point(accept: str, threshold: float | None, tokens: float, agreement: float) -> SweepPoint:
    return SweepPoint(accept, threshold, rate(tokens), rate(0.5), Fidelity(rate(0.5), rate(agreement), rate(-agreement)))


def test_the_picture_has_a_line_for_each_rule_and_a_star_for_the_lossless_one(monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.update({path.name: figure}))
    points = [point(rule, THRESHOLDS[rule][i], 2 + i + n / 10, 1 - i / 10) for n, rule in enumerate(LOSSY) for i in range(4)]
    plots.lossy_rules(LossySweep("chained", 5, 16, 400, point("token", None, 5.0, 1.0), points), tmp_path / "lossy_rules.png")
    figure = drawn["lossy_rules.png"]
    for axis, sign in zip(figure.axes, (1, -1), strict=True):
        for n, (rule, bars) in enumerate(zip(LOSSY, axis.containers, strict=True)):
            line, _, (x_bars, y_bars) = bars
            assert bars.get_label() == rule and list(line.get_xdata()) == pytest.approx([2 + i + n / 10 for i in range(4)])
            assert list(line.get_ydata()) == pytest.approx([sign * (1 - i / 10) for i in range(4)])
            ends = [segment[:, 0].tolist() for segment in x_bars.get_segments()]
            assert ends == [pytest.approx([x - 0.1, x + 0.2]) for x in line.get_xdata()] and len(y_bars.get_segments()) == 4
        stars = [line for line in axis.lines if line.get_marker() == "*"]
        assert [(list(s.get_xdata()), list(s.get_ydata())) for s in stars] == [([5.0], [sign])]
        large = [line for line in axis.lines if line.get_markersize() == 9]
        wanted = [p for p in points if p.threshold == DEFAULT_THRESHOLDS[p.accept]]
        assert [line.get_xdata()[0] for line in large] == [p.tokens_per_pass.value for p in wanted] and len(wanted) == 4
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert set(labels) == {*LOSSY, "token (lossless)"} and "16 prompts" in figure.get_suptitle()
    plt.close("all")


@pytest.mark.parametrize("accept", ["typical", "kl"])
@pytest.mark.parametrize("draft", ["own", "aligned", "chained"])
def test_inference_under_the_rules_that_compare_distributions(finished, accept, draft):
    result = main_of("feature_sd_inference")(["--config", str(finished / "tiny.yaml"), "--accept", accept, "--draft", draft])
    assert result["rounds"] and all(len(r["score"]) == len(r["proposed"]) for r in result["rounds"] if r["proposed"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *[(["--draft", name], "comes from a table or is corrected by one") for name in ("ngram", "template", "lookup", "hybrid")],
        (["--draft", "attending"], "covers only the ids of its draft vocabulary"),
        (["--draft", "chained", "--draft_vocabulary", "50"], "every divergence is infinite"),
    ],
)
def test_kl_is_refused_where_the_drafter_has_no_distribution_over_all_ids(finished, words, message):
    with pytest.raises(UserError, match=message):
        main_of("feature_sd_inference")(["--config", str(finished / "tiny.yaml"), "--accept", "kl", *words])
