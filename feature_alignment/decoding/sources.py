"""Drafters by name: which adapters and tables each needs, where they are, and the proposer they make."""

from __future__ import annotations

from collections import Counter
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from feature_alignment.adapters import tables
from feature_alignment.adapters.attending import AttendingAdapter, load_attending_adapter
from feature_alignment.adapters.attending_texts import MOST_IDS
from feature_alignment.adapters.chained import ChainedAdapter, load_chained_adapter
from feature_alignment.adapters.hidden import HiddenAdapter, load_adapter
from feature_alignment.cli.advice import command_for
from feature_alignment.cli.config import Common, DraftVocabulary
from feature_alignment.cli.console import UserError, log
from feature_alignment.decoding import draft_vocabulary
from feature_alignment.decoding.attending_proposer import AttendingProposer
from feature_alignment.decoding.baseline_drafters import BASELINE_DRAFTERS, SEARCH_THE_QUESTION, HybridProposer, NGram, TableProposer
from feature_alignment.decoding.chained_proposer import ChainedProposer
from feature_alignment.decoding.proposers import ModelProposer, Proposer
from feature_alignment.decoding.settings import DecodingConfig
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.pair import Pair
from feature_alignment.storage.answers import read_token_pairs
from feature_alignment.storage.files import load_pt
from feature_alignment.storage.pretrained import CONFIG

SharedAdapter = HiddenAdapter | ChainedAdapter | AttendingAdapter
DRAFTER_OF = {"hidden": "aligned", "chained": "chained", "attending": "attending"}  # kind of adapter -> drafter that reads it
UNKNOWN_ACCEPTANCE = 0.8  # of an adapter whose file records none


class Sources:
    """The drafters of one pair. Adapters and training answers are loaded once, when a drafter first needs them.

    Args:
        pair: target and drafter
        cfg: settings
        train_split: split whose answers the tables know
        untrained: use a new adapter where none has been trained
        draft_vocabulary: the chained adapter drafts only so many token ids, those most frequent in training answers; "auto" for as many
            as are expected to be fastest; None for all
    """

    def __init__(
        self, pair: Pair, cfg: Common, train_split: str = "train", untrained: bool = False, draft_vocabulary: DraftVocabulary = None
    ) -> None:
        self._pair, self._cfg, self._untrained = pair, cfg, untrained
        self._train_split, self._draft_vocabulary = train_split, draft_vocabulary
        self._acceptance: dict[str, float | None] = {}  # of adapters that were given
        self.texts_path = texts_path(cfg, train_split)
        self.adapter_path = trained_path(cfg, "adapter")
        self.chained_path = trained_path(cfg, "chained_adapter")
        self.attending_path = trained_path(cfg, "attending_adapter")

    @cached_property
    def adapter(self) -> HiddenAdapter:
        """The hidden adapter on the target's device."""
        draft, target = self._pair.draft, self._pair.target
        if self._untrained and not self.adapter_path.is_file():
            adapter = HiddenAdapter(draft.hidden_size, target.hidden_size)
        else:
            adapter = load_adapter(self.adapter_path, draft.hidden_size, draft.taps)[0]
        return adapter.to(target.device, target.head_weight.dtype)

    @cached_property
    def chained_adapter(self) -> ChainedAdapter:
        """The chained adapter on the target's device."""
        draft, target = self._pair.draft, self._pair.target
        if self._untrained and not self.chained_path.is_file():
            adapter = ChainedAdapter(target.hidden_size, draft.width, draft.vision_tokens)
        else:
            adapter = load_chained_adapter(self.chained_path, draft.taps)[0]
        return adapter.to(target.device, target.head_weight.dtype)

    def use_adapter(self, adapter: SharedAdapter, meta: dict[str, Any]) -> None:
        """Use this adapter instead of the one under the output directory.

        Args:
            adapter: hidden, chained or attending
            meta: of the adapter

        Raises:
            UserError: it does not fit the pair's widths, events or vocabulary
        """
        draft, target = self._pair.draft, self._pair.target
        reads, width = ("d_draft", draft.hidden_size) if adapter.kind == "hidden" else ("d_event", draft.width)
        if (adapter.geometry[reads], adapter.geometry["d_target"]) != (width, target.hidden_size):
            raise UserError(
                f"the {adapter.kind} adapter maps states of width {adapter.geometry[reads]} to {adapter.geometry['d_target']}; "
                f"the states of this pair have widths {width} and {target.hidden_size}."
            )
        if (events := adapter.geometry.get("num_events", draft.vision_tokens)) != draft.vision_tokens:
            raise UserError(f"the {adapter.kind} adapter reads {events} event tokens of a clip; this pair has {draft.vision_tokens}.")
        if isinstance(adapter, AttendingAdapter):
            largest = max([*adapter.ids.tolist(), *adapter.table[:, tables.CONTEXT + 1].tolist()])
            if largest >= target.vocab_size:
                raise UserError(f"the attending adapter drafts token ids up to {largest}; this pair has ids below {target.vocab_size}.")
        name = "adapter" if adapter.kind == "hidden" else f"{adapter.kind}_adapter"
        self.__dict__[name] = adapter.to(target.device, target.head_weight.dtype)  # in place of the cached property
        self._acceptance[DRAFTER_OF[adapter.kind]] = meta.get("validation", {}).get("token_match")

    @cached_property
    def attending_adapter(self) -> AttendingAdapter:
        """The attending adapter on the target's device."""
        draft, target = self._pair.draft, self._pair.target
        if self._untrained and not self.attending_path.is_file():
            num_ids = min(MOST_IDS, target.vocab_size)
            adapter = AttendingAdapter(target.hidden_size, draft.width, draft.vision_tokens, num_ids)
            adapter.ids.copy_(torch.arange(num_ids))
        else:
            adapter = load_attending_adapter(self.attending_path, draft.taps)[0]
        return adapter.to(target.device, target.head_weight.dtype).eval()

    @cached_property
    def texts(self) -> list[tuple[str, list[int]]]:
        """(question, token ids) of the target's answers on the training split; UserError for ids outside the vocabulary."""
        texts = [(r["query"], r["vl_tokens"]) for r in read_token_pairs(self.texts_path)]
        if max((max(tokens, default=0) for _, tokens in texts)) >= self._pair.target.vocab_size:
            raise UserError(
                f"{self.texts_path} holds token ids beyond the {self._pair.target.vocab_size} of this pair: it belongs to another pair. "
                f"Make it again:\n  {command_for('extract_hidden_states')}"
            )
        return texts

    @cached_property
    def draft_ids(self) -> Tensor | None:
        """The token ids [n] that the chained adapter may draft, ascending; None for all. The ids that end a text are always included.

        An id outside is never drafted; the target may still emit it, so the text does not change (FR-Spec, Zhao et al. 2502.14856).
        """
        target, size = self._pair.target, self._draft_vocabulary
        if size == "auto":
            size = self._paying_vocabulary()
        if size is None or size >= target.vocab_size:
            return None
        counts = Counter(token for _, tokens in self.texts for token in tokens)
        ids = draft_vocabulary.frequent_ids(counts, size, self._ends)
        covered = sum(counts[i] for i in ids) / max(1, counts.total())
        log.info("draft vocabulary  %d of %d ids, which are %.2f %% of the training answers", len(ids), target.vocab_size, 100 * covered)
        return torch.tensor(ids, device=target.device)

    def _paying_vocabulary(self) -> int:
        """The number of ids that is expected to be fastest, by measured cost and coverage; all ids where fewer do not pay."""
        target, texts = self._pair.target, self.texts
        numbers = draft_vocabulary.sizes(target.vocab_size)
        costs = draft_vocabulary.draft_ms(self.chained_adapter, target, numbers, self._pair.draft.steps)
        coverages = draft_vocabulary.coverages([tokens for _, tokens in texts], numbers, self._ends)
        candidates = [draft_vocabulary.Candidate(*row) for row in zip(numbers, coverages, costs, strict=True)]
        acceptance = self.known_acceptance("chained") or UNKNOWN_ACCEPTANCE
        size, gain = draft_vocabulary.best_size(candidates, acceptance, draft_vocabulary.step_ms(target, texts[0][0]))
        chosen = next(c for c in candidates if c.size == size)
        if size == target.vocab_size:
            log.info("draft vocabulary  auto: all %d ids, because no smaller number is expected to be faster", size)
        else:
            log.info(
                "draft vocabulary  auto: %d of %d ids, %.2f %% of held-out training answers; a draft token takes %.3f instead of %.3f ms; "
                "expected to decode %.2f times as fast",
                *(size, target.vocab_size, 100 * chosen.coverage, chosen.draft_ms, costs[-1], gain),
            )
        return size

    @property
    def _ends(self) -> list[int]:
        """The shared ids that end a text."""
        return [i for i in self._pair.target.eos_ids if i < self._pair.target.vocab_size]

    @cached_property
    def full_draft(self) -> Decoder:
        """EventGPT at full depth: its own draft tokens need its own head."""
        if self._pair.draft.has_own_head:
            return self._pair.draft
        return self._pair.draft_with(None, self._cfg)

    def load_exit_drafter(self, path: Path) -> tuple[int, Proposer]:
        """An aligned drafter that reads a single layer of EventGPT.

        Args:
            path: hidden adapter of that layer

        Returns:
            the layer and the drafter

        Raises:
            UserError: the adapter reads several layers
        """
        adapter, meta = load_adapter(path)
        layers, target = meta["draft_layers"], self._pair.target
        if len(layers) != 1:
            raise UserError(f"{path} reads EventGPT's layers {layers}; --exit_adapters expects adapters of a single layer each.")
        draft = self._pair.draft_with(layers, self._cfg)
        adapter = load_adapter(path, draft.hidden_size, layers)[0].to(target.device, target.head_weight.dtype)
        return layers[0], ModelProposer(draft, adapter, target.lm_head)

    def open(self, name: str, predicts_states: bool = False, has_distribution: bool = False) -> Proposer:
        """Make a drafter.

        Args:
            name: as in `--draft`
            predicts_states: the acceptance rule compares hidden states, so the drafter must predict them
            has_distribution: the acceptance rule compares distributions, so the drafter must have one over all token ids

        Raises:
            UserError: a file that the drafter needs is missing, it predicts no states, or it has no distribution
        """
        target, draft = self._pair.target, self._pair.draft
        if has_distribution:
            self._check_distribution(name)
        if predicts_states and (name not in ("own", "aligned", "chained", "attending") or (name == "own" and not draft.has_own_head)):
            raise UserError(
                f"the feature and relaxed rules compare hidden states, {name} drafts have none"
                + (
                    f" before the drafter's last layer; pass --draft_layers {draft.num_layers}."
                    if name == "own"
                    else "; pass --draft chained."
                )
            )
        if name == "own":
            return ModelProposer(draft if predicts_states else self.full_draft, self.adapter if predicts_states else None, None)
        if name == "aligned":
            return ModelProposer(draft, self.adapter, target.lm_head)
        if name == "chained":
            return ChainedProposer(draft, self.chained_adapter, target.head_weight, target.embeddings, self.draft_ids)
        if name == "attending":
            return AttendingProposer(draft, self.attending_adapter, target)
        if name == "hybrid":
            return HybridProposer(self.ngram, self.open(self._hybrid_model))
        if name == "ngram":
            return TableProposer(self.ngram)
        if name in SEARCH_THE_QUESTION:
            texts = [] if name == "lookup" else self.texts
            encode = cache(lambda question: target.tokenizer.encode(question, add_special_tokens=False))
            return TableProposer(SEARCH_THE_QUESTION[name](texts, encode))
        return TableProposer(BASELINE_DRAFTERS[name](self.texts))

    def stepping_drafter(self, name: str) -> Decoder | None:
        """EventGPT where a drafter runs it for every draft token, so that each text needs a cache of its own; None for other drafters."""
        name = self._hybrid_model if name == "hybrid" else name
        if name == "own":
            return self.full_draft
        return self._pair.draft if name == "aligned" else None

    def _check_distribution(self, name: str) -> None:
        """Raise UserError for a drafter without a distribution over all token ids, which the rule `kl` compares."""
        if name not in ("own", "aligned", "chained"):
            has = "covers only the ids of its draft vocabulary" if name == "attending" else "comes from a table or is corrected by one"
            raise UserError(
                f"--draft {name} --accept kl: compares the drafter's distribution over all token ids with Video-LLaVA's; what {name} "
                f"drafts {has}. Pass --draft own, aligned or chained, or --accept typical, which needs Video-LLaVA's distribution alone."
            )
        if name == "chained" and self.draft_ids is not None:
            raise UserError(
                f"--draft_vocabulary {self._draft_vocabulary} --accept kl: the other ids have probability 0, so every divergence is "
                "infinite. Leave --draft_vocabulary out, or pass --accept typical."
            )

    @cached_property
    def ngram(self) -> NGram:
        """The n-gram table of the training answers."""
        return NGram(self.texts)

    def known_acceptance(self, name: str) -> float | None:
        """Share of a drafter's correct draft tokens on the clips its adapter was validated on; None where no adapter records it."""
        name = self._hybrid_model if name == "hybrid" else name
        if name in self._acceptance:
            return self._acceptance[name]
        path = {"aligned": self.adapter_path, "chained": self.chained_path, "attending": self.attending_path}.get(name)
        if path is None:
            return None
        acceptance: float | None = load_pt(path, command_for("train_hidden_adapter"))["meta"].get("validation", {}).get("token_match")
        return acceptance

    @property
    def _hybrid_model(self) -> str:
        """The drafter that the n-gram table corrects: the chained adapter if one has been trained."""
        return "chained" if self.chained_path.is_file() else "aligned"


def drafter_files(cfg: DecodingConfig) -> dict[str, Path]:
    """The files that the draft tokens of a run depend on, found without loading a model."""

    def adapter(folder: str) -> dict[str, Path]:
        return {folder: trained_path(cfg, folder) if cfg.shared_adapter is None else cfg.shared_adapter / CONFIG}

    texts = {"texts": texts_path(cfg, cfg.train_split)}
    chained = adapter("chained_adapter") | ({} if cfg.draft_vocabulary is None else texts)
    if cfg.draft == "hybrid":
        return (chained if chained["chained_adapter"].is_file() else adapter("adapter")) | texts
    others = {"own": {}, "aligned": adapter("adapter"), "chained": chained, "attending": adapter("attending_adapter"), "lookup": {}}
    return others.get(cfg.draft, texts)


def texts_path(cfg: Common, train_split: str) -> Path:
    """File of the answers that the tables know."""
    return cfg.out / "token_pairs" / f"{train_split}.json"


def trained_path(cfg: Common, folder: str) -> Path:
    """File of a trained adapter."""
    return cfg.out / folder / "adapter.pt"
