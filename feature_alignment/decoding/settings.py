"""Settings of decoding, shared by feature_sd_inference.py and the Python interface. No slow import, so that --help is fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from feature_alignment.cli.config import Common, DraftVocabulary, StepsSetting

DrafterName = Literal["own", "aligned", "chained", "attending", "hybrid", "ngram", "template", "lookup", "previous", "tables"]
RuleName = Literal["token", "feature", "relaxed", "typical", "kl"]  # acceptance rules; all but token are lossy
COSINE_RULES: tuple[RuleName, ...] = ("feature", "relaxed")  # they compare hidden states
DEFAULT_THRESHOLDS = {"feature": 0.9, "relaxed": 0.9, "typical": 0.09, "kl": 0.1}


@dataclass(frozen=True)
class DecodingConfig(Common):
    """How one answer is decoded.

    Args:
        draft: drafter: own = EventGPT's own tokens; aligned = its adapted states through the target's head; chained = the chained adapter
            from the target's last state; attending = the attending adapter, from there as well; ngram, template,
            lookup and previous read no image; hybrid = ngram where it is confident, else chained (aligned where no chained adapter has
            been trained)
        shared_adapter: directory of a shared adapter, which drafts instead of one trained in this run (docs/sharing.md)
        train_split: split whose answers ngram, template and previous are built from
        accept: token is lossless; the others are lossy. feature and relaxed accept draft tokens by the cosine of hidden states, typical by
            their probability under Video-LLaVA, kl by the divergence of the drafter's distribution from Video-LLaVA's
        threshold: feature and relaxed accept above this cosine (default: 0.9), typical at this epsilon (default: 0.09), kl below this
            many nats (default: 0.1)
        num_draft_tokens: draft tokens per round; with --adaptive the maximum
        adaptive: choose the draft length of each round by expected gain and cost, down to no drafting at all
        overlap: prefill EventGPT in a thread of its own while Video-LLaVA prefills; needs a second core
        draft_vocabulary: chained drafts only this many token ids, those most frequent in training answers, which makes the head
            cheaper and changes no text that is not sampled; auto = as many as pay, by measured cost and coverage (default: all)
        max_new_tokens: longest answer, EOS included
        temperature: above 0 the answer is sampled from the same distribution as from Video-LLaVA alone; --accept token only. The same
            --seed gives the same answer; with --adaptive it is the answer of Video-LLaVA alone, at a somewhat lower acceptance
        top_p: sample from the most likely tokens with this total probability; this flag and the next five default to the checkpoint's
            generation_config.json
        top_k: sample from this many of the most likely tokens
        min_p: sample from tokens with at least this fraction of the most likely token's probability
        min_new_tokens: shortest answer
        repetition_penalty: above 1, tokens of prompt and answer become less likely
        stop: the answer also ends with the first of these strings
        steps: how models step: auto = compiled on a GPU, eager on a CPU; eager; graphs = CUDA graphs over a cache of fixed size (on
            other devices the fixed cache alone); compiled = also fused by torch.compile, which takes a minute
    """

    draft: DrafterName = "aligned"
    shared_adapter: Path | None = None
    train_split: str = "train"
    accept: RuleName = "token"
    threshold: float | None = None
    num_draft_tokens: int = 5
    adaptive: bool = False
    overlap: bool = False
    draft_vocabulary: DraftVocabulary = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    min_new_tokens: int | None = None
    repetition_penalty: float | None = None
    stop: list[str] | None = None
    steps: StepsSetting = "auto"

    @property
    def acceptance_threshold(self) -> float:
        """The threshold of the acceptance rule; `token` has none."""
        return DEFAULT_THRESHOLDS.get(self.accept, 0.0) if self.threshold is None else self.threshold
