"""The content of acceptance.json and comparison.json. Rates come with intervals that resample clips."""

from __future__ import annotations

from dataclasses import dataclass, field

from feature_alignment.measurement.calibration import Certificate
from feature_alignment.measurement.metrics import Rate
from feature_alignment.measurement.records import OMIT_IF_NONE, Meta, Record

# ---- acceptance.json


@dataclass(frozen=True)
class PredictorRates(Record):
    """How well one predictor of the target's next state does.

    Args:
        cosine: of predicted and real state, mean over positions
        token_match: positions at which both states emit the same token
        acceptance_rate: accepted / reached draft tokens under the token rule
        consecutive_accept_token: accepted / offered draft tokens under the token rule
        tokens_per_pass: tokens per verification under the token rule
    """

    cosine: Rate
    token_match: Rate
    acceptance_rate: Rate
    consecutive_accept_token: Rate
    tokens_per_pass: float


@dataclass(frozen=True)
class PredictorReport(PredictorRates):
    """The rates of a predictor and what it takes.

    Args:
        params: number of parameters
        seconds: of training or fitting
    """

    params: int
    seconds: float


@dataclass(frozen=True)
class CosineRuleRates(Record):
    """Acceptance of the cosine rules at one threshold.

    Args:
        relaxed_accept: accepted positions / all positions
        consecutive_accept: accepted / offered draft tokens of the rounds that `feature` forms
        consecutive_length: accepted draft tokens per round
        token_match_given_accept: accepted positions whose token is the target's
    """

    relaxed_accept: Rate
    consecutive_accept: Rate
    consecutive_length: Rate
    token_match_given_accept: Rate


@dataclass(frozen=True)
class ReliabilityBin(Record):
    """One of several cosine ranges that hold the same number of positions.

    Args:
        cosine: mean of the range
        n: number of positions
        token_match: share of positions in this range with the target's token
        token_match_above: share of positions in this range and above with the target's token
        ci95: interval of `token_match`; files of earlier versions have none
    """

    cosine: float
    n: int
    token_match: float
    token_match_above: float
    ci95: tuple[float, float] | None = field(default=None, metadata=OMIT_IF_NONE)


@dataclass(frozen=True)
class PositionRates(Record):
    """Rates at one position of the answer.

    Args:
        position: index of the token, from 0
        n: texts that reach it
        cosine: mean over those texts
        token_match: share of those texts with the target's token, with `n_` = n and the bounds `_lo`, `_hi` of its interval
        token_match_given_earlier: the same over texts whose earlier positions all match
    """

    position: int
    n: int
    cosine: float
    n_token_match: int
    token_match: float
    token_match_lo: float
    token_match_hi: float
    n_token_match_given_earlier: int
    token_match_given_earlier: float
    token_match_given_earlier_lo: float
    token_match_given_earlier_hi: float


@dataclass(frozen=True)
class StepRates(Record):
    """Rates of one draft position of the chained adapter; `step` counts from 1."""

    step: int
    cosine: Rate
    token_match: Rate


@dataclass(frozen=True)
class ChainReport(Record):
    """One chained adapter: rates pooled over all steps of a chain, and each step on its own.

    Args:
        params: number of parameters
        seconds: of training
        num_draft_tokens: number of steps
        cosine, token_match, acceptance_rate, consecutive_accept_token, tokens_per_pass: as in `PredictorRates`
        thresholds: cosine threshold -> rates of the cosine rules
        auc_cosine_token_match: area under the ROC curve of the cosine as a predictor of token match
        reliability: token match by cosine
        accepted_lengths: number of rounds with 0, 1, 2, ... accepted draft tokens under the token rule
        steps: rates of each step
        calibration: certified threshold, if asked for
    """

    params: int
    seconds: float
    num_draft_tokens: int
    cosine: Rate
    token_match: Rate
    acceptance_rate: Rate
    consecutive_accept_token: Rate
    tokens_per_pass: float
    thresholds: dict[str, CosineRuleRates]
    auc_cosine_token_match: float
    reliability: list[ReliabilityBin]
    accepted_lengths: list[int]
    steps: list[StepRates]
    calibration: Certificate | None = None


@dataclass(frozen=True)
class AdapterSummary(Record):
    """The hidden adapter: number of parameters, and the layers of EventGPT that it reads."""

    params: int
    layer: list[int]


@dataclass(frozen=True, kw_only=True)
class AcceptanceReport(Record):
    """Content of acceptance.json. Its own rates are those of the hidden adapter.

    Args:
        meta: provenance
        adapter: the hidden adapter
        cosine, token_match, acceptance_rate, consecutive_accept_token, tokens_per_pass, params, seconds: as in `PredictorReport`
        plain: the adapter trained by TASKS.md's recipe, if there is one
        nulls: null predictor -> its report
        absent_controls: controls that need a second clip
        thresholds, auc_cosine_token_match, reliability, accepted_lengths: as in `ChainReport`
        per_position: rates by position of the answer
        num_draft_tokens: draft length
        calibration: certified threshold of the hidden adapter, if asked for
        chains: chained adapter -> its report
    """

    meta: Meta
    adapter: AdapterSummary
    cosine: Rate
    token_match: Rate
    acceptance_rate: Rate
    consecutive_accept_token: Rate
    tokens_per_pass: float
    params: int
    seconds: float
    plain: PredictorReport | None
    nulls: dict[str, PredictorReport]
    absent_controls: list[str] = field(default_factory=list)
    thresholds: dict[str, CosineRuleRates]
    auc_cosine_token_match: float
    reliability: list[ReliabilityBin]
    accepted_lengths: list[int]
    per_position: list[PositionRates]
    num_draft_tokens: int
    calibration: Certificate | None
    chains: dict[str, ChainReport]

    @property
    def positions(self) -> str:
        """The measured positions in words, e.g. "test positions, same prefix"."""
        prefix = "same prefix" if self.meta["prefix"] == "verifier" else f"prefix: {self.meta['prefix']}"
        return f"{self.meta['split']} positions, {prefix}"

    @property
    def chained(self) -> ChainReport | None:
        """Report of the chained adapter that sees events; None if none is trained."""
        return self.chains.get("chained")


# ---- comparison.json


@dataclass(frozen=True)
class TextAgreement(Record):
    """Agreement of the two models' free-running texts, each pair compared up to the shorter text.

    Args:
        position_match: same token at the same position
        mean_prefix: leading tokens in common
        consecutive_accept: those among the first num_draft_tokens, as a share of num_draft_tokens
        first_token_differs: share of pairs
        params: 0, because nothing is trained
        overhead_ms: 0
    """

    position_match: Rate
    mean_prefix: Rate
    consecutive_accept: Rate
    first_token_differs: Rate
    params: int = 0
    overhead_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DraftReport(Record):
    """Draft tokens on the target's own texts, under the token rule.

    Args:
        token_match: draft tokens that are the target's
        acceptance_rate: accepted / reached
        consecutive_accept: accepted / offered
        leading_tokens: correct draft tokens before the first wrong one, from the first token of the text
        tokens_per_pass: tokens per verification
        params: parameters of the drafter
        params_7b: the same at the size of the released models
        overhead_ms: milliseconds of drafting one text
        seconds: of training
    """

    token_match: Rate
    acceptance_rate: Rate
    consecutive_accept: Rate
    leading_tokens: Rate | None = field(default=None, metadata=OMIT_IF_NONE)
    tokens_per_pass: float
    params: int
    params_7b: int | None = field(default=None, metadata=OMIT_IF_NONE)
    overhead_ms: float | None = field(default=None, metadata=OMIT_IF_NONE)
    seconds: float | None = field(default=None, metadata=OMIT_IF_NONE)


@dataclass(frozen=True)
class FeatureLevel(Record):
    """Acceptance of the cosine rules with the hidden adapter, at one threshold."""

    consecutive: Rate
    relaxed: Rate
    threshold: float
    params: int


@dataclass(frozen=True)
class ThresholdCounts(Record):
    """Draft tokens that a cosine above `threshold` accepts, by what they say.

    Args:
        threshold: cosine
        drafted: draft tokens in all
        kept: accepted draft tokens, the sum of the next four
        same: the target's own word
        synonym: another word for the same fact
        other_fact: a word for another value of the same slot
        other_word: any other word
        other_fact_hidden: those of `other_fact` whose slot an event camera cannot show
    """

    threshold: float
    drafted: int
    kept: int
    same: int
    synonym: int
    other_fact: int
    other_word: int
    other_fact_hidden: int


@dataclass(frozen=True)
class DifferingDraft(Record):
    """A draft token that is not the target's, of high cosine.

    Args:
        source: drafter
        sample: id of the sample
        before: the words before it
        drafted: the drafter's word
        said: the target's word
        verdict: as `Lexicon.compare` returns it
        cosine: of predicted and real state
    """

    source: str
    sample: str
    before: str
    drafted: str
    said: str
    verdict: str
    cosine: float


@dataclass(frozen=True)
class ComparisonReport(Record):
    """Content of comparison.json.

    Args:
        meta: provenance
        token_level: agreement of the free-running texts
        feature_level: the cosine rules with the hidden adapter
        aligned_token_level, chained_token_level: draft tokens of the hidden and the chained adapter under the token rule
        token_adapter: the earlier attempt's token-level adapter, if it is trained
        own_drafts: EventGPT's own draft tokens, if extraction stored them
        feature_rules: adapter -> cosine threshold -> rates
        kept_by_cosine: drafter -> counts at each threshold, if there is a lexicon
        examples: accepted draft tokens that are not the target's, highest cosine first
        nulls: baseline drafter -> its report
        rows: every line of every table that is printed
    """

    meta: Meta
    token_level: TextAgreement
    feature_level: FeatureLevel | None = None
    aligned_token_level: DraftReport | None = None
    chained_token_level: DraftReport | None = None
    token_adapter: DraftReport | None = None
    own_drafts: DraftReport | None = None
    feature_rules: dict[str, dict[str, CosineRuleRates]] = field(default_factory=dict)
    kept_by_cosine: dict[str, list[ThresholdCounts]] = field(default_factory=dict)
    examples: list[DifferingDraft] = field(default_factory=list)
    nulls: dict[str, DraftReport] = field(default_factory=dict)
    rows: list[dict[str, str | int]] = field(default_factory=list)
