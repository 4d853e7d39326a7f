"""Draft sources by name: which adapters and tables each needs, where they lie, and the proposer they make."""

from __future__ import annotations

from functools import cache, cached_property
from pathlib import Path

from feature_alignment.adapters.attending import AttendingAdapter, load_attending_adapter
from feature_alignment.adapters.chained import ChainedAdapter, load_chained_adapter
from feature_alignment.adapters.hidden import HiddenAdapter, load_adapter
from feature_alignment.cli.advice import command_for
from feature_alignment.cli.config import Common
from feature_alignment.cli.console import UserError
from feature_alignment.decoding.attending_proposer import AttendingProposer
from feature_alignment.decoding.baseline_drafters import NULL_DRAFTERS, HybridProposer, Lookup, NGram, TableProposer
from feature_alignment.decoding.proposers import ChainedProposer, ModelProposer, Proposer
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.pair import Pair
from feature_alignment.storage.answers import read_token_pairs
from feature_alignment.storage.artifacts import load_pt


class Sources:
    """The proposers of one pair. Adapters and texts are loaded once, when a source first asks for them.

    train_split: whose answers the tables know; untrained: where an adapter has not been trained, a new one will do
    """

    def __init__(self, pair: Pair, cfg: Common, train_split: str = "train", untrained: bool = False) -> None:
        self._pair, self._cfg, self._untrained = pair, cfg, untrained
        self.texts_path = cfg.out / "token_pairs" / f"{train_split}.json"
        self.adapter_path = cfg.out / "adapter" / "adapter.pt"
        self.chained_path = cfg.out / "chained_adapter" / "adapter.pt"
        self.attending_path = cfg.out / "attending_adapter" / "adapter.pt"

    @cached_property
    def adapter(self) -> HiddenAdapter:
        draft, target = self._pair.draft, self._pair.target
        if self._untrained and not self.adapter_path.is_file():
            adapter = HiddenAdapter(draft.hidden_size, target.hidden_size)
        else:
            adapter = load_adapter(self.adapter_path, draft.hidden_size, draft.taps)[0]
        return adapter.to(target.device, target.head_weight.dtype)

    @cached_property
    def chained_adapter(self) -> ChainedAdapter:
        draft, target = self._pair.draft, self._pair.target
        if self._untrained and not self.chained_path.is_file():
            adapter = ChainedAdapter(target.hidden_size, draft.width, draft.vision_tokens)
        else:
            adapter = load_chained_adapter(self.chained_path, draft.taps)[0]
        return adapter.to(target.device, target.head_weight.dtype)

    @cached_property
    def attending_adapter(self) -> AttendingAdapter:
        target = self._pair.target
        return load_attending_adapter(self.attending_path, self._pair.draft.taps)[0].to(target.device, target.head_weight.dtype)

    @cached_property
    def texts(self) -> list[tuple[str, list[int]]]:
        """(question, tokens) of the target's answers on the training split."""
        texts = [(r["query"], r["vl_tokens"]) for r in read_token_pairs(self.texts_path)]
        if max((max(tokens, default=0) for _, tokens in texts)) >= self._pair.target.vocab_size:
            raise UserError(f"{self.texts_path} holds ids beyond the {self._pair.target.vocab_size} of this pair: texts of another one.")
        return texts

    @cached_property
    def full_draft(self) -> Decoder:
        """The drafter at full depth: its own drafts need its own head."""
        if self._pair.draft.has_own_head:
            return self._pair.draft
        return self._pair.draft_with(None, self._cfg)

    def load_exit_drafter(self, path: Path) -> tuple[int, Proposer]:
        """Aligned drafts from one layer of EventGPT, by the hidden adapter at `path` that reads it alone: the layer and the proposer."""
        adapter, meta = load_adapter(path)
        layers, target = meta["draft_layers"], self._pair.target
        if len(layers) != 1:
            raise UserError(f"{path} reads EventGPT's layers {layers}; --exit_adapters wants adapters of a single layer each.")
        draft = self._pair.draft_with(layers, self._cfg)
        adapter = load_adapter(path, draft.hidden_size, layers)[0].to(target.device, target.head_weight.dtype)
        return layers[0], ModelProposer(draft, adapter, target.lm_head)

    def open(self, name: str, compares: bool = False) -> Proposer:
        """A source's proposer; raises UserError if what it needs is not there.

        compares: it must say which target states it expects, because the acceptance rule looks at them
        """
        target, draft = self._pair.target, self._pair.draft
        if compares and (name not in ("own", "aligned", "chained", "attending") or (name == "own" and not draft.has_own_head)):
            raise UserError(
                f"the feature and relaxed rules compare hidden states, {name} drafts have none"
                + (
                    f" before the drafter's last layer; pass --draft_layers {draft.num_layers}."
                    if name == "own"
                    else "; pass --draft chained."
                )
            )
        if name == "own":
            return ModelProposer(draft if compares else self.full_draft, self.adapter if compares else None, None)
        if name == "aligned":
            return ModelProposer(draft, self.adapter, target.lm_head)
        if name == "chained":
            return ChainedProposer(draft, self.chained_adapter, target.lm_head, target.embeddings)
        if name == "attending":
            return AttendingProposer(draft, self.attending_adapter, target)
        if name == "hybrid":
            return HybridProposer(self.ngram, self.open(self._hybrid_model))
        if name == "ngram":
            return TableProposer(self.ngram)
        if name == "lookup":
            return TableProposer(Lookup(encode=cache(lambda question: target.tokenizer.encode(question, add_special_tokens=False))))
        return TableProposer(NULL_DRAFTERS[name](self.texts))

    @cached_property
    def ngram(self) -> NGram:
        return NGram(self.texts)

    def known_acceptance(self, name: str) -> float | None:
        """How many of a source's drafts were right on the clips its adapter was validated on; None where no adapter says so."""
        name = self._hybrid_model if name == "hybrid" else name
        path = {"aligned": self.adapter_path, "chained": self.chained_path, "attending": self.attending_path}.get(name)
        return None if path is None else load_pt(path, command_for("train_hidden_adapter"))["meta"].get("validation", {}).get("token_match")

    @property
    def _hybrid_model(self) -> str:
        """Who drafts where the table is not sure: the chained adapter, if one has been trained."""
        return "chained" if self.chained_path.is_file() else "aligned"

    def files(self, name: str) -> dict[str, Path]:
        """The files a source's drafts depend on."""
        models: dict[str, dict[str, Path]] = {
            "own": {},
            "aligned": {"adapter": self.adapter_path},
            "chained": {"chained_adapter": self.chained_path},
            "attending": {"attending_adapter": self.attending_path},
            "lookup": {},
        }
        texts = {"texts": self.texts_path}
        return models[self._hybrid_model] | texts if name == "hybrid" else models.get(name, texts)
