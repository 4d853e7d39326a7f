"""Both models and a drafter as one object: answer a question about a clip from Python.

from feature_alignment import SpeculativePair

pair = SpeculativePair.from_config("configs/demo.yaml", draft="chained")
print(pair.answer(events="e.npy", video="v.mp4", question="What is happening?").text)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from feature_alignment.cli.config import parse_config
from feature_alignment.cli.console import UserError
from feature_alignment.decoding.batch import BatchGeneration, speculate_batch
from feature_alignment.decoding.draft_length import DraftLengthController
from feature_alignment.decoding.engine import Speculation
from feature_alignment.decoding.generation import Generation, Round
from feature_alignment.decoding.plain import decode_plainly
from feature_alignment.decoding.sampling import Sampler
from feature_alignment.decoding.settings import COSINE_RULES, DecodingConfig
from feature_alignment.decoding.shared_adapter import drafter_of, load_shared_adapter
from feature_alignment.decoding.sources import SharedAdapter, Sources
from feature_alignment.inputs.samples import Sample
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.generation import with_flags
from feature_alignment.models.pair import load_pair
from feature_alignment.models.state import Prompt
from feature_alignment.models.vision_cache import VisionCache

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what tokenizers write for an incomplete UTF-8 sequence
FIRST_BYTE = "<0xC3>"  # token of the first byte of a character of two bytes
SETTINGS = ("top_p", "top_k", "min_p", "min_new_tokens", "repetition_penalty")


class Prompts(NamedTuple):
    """One sample, ready for both models."""

    target: Prompt
    draft: Prompt


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Args:
        text: without special tokens
        token_ids: up to and including the end of the text
        rounds: of speculative decoding; empty for plain decoding
        stats: `tokens_per_pass`, `passes`, `total_ms`, `decode_ms`, `ms` per stage, and `vision_reused`: how many models did not have to
            encode the clip, because they had for an earlier question; `total_ms` is then without it
    """

    text: str
    token_ids: list[int]
    rounds: list[Round]
    stats: dict[str, Any]


class SpeculativePair:
    """A target, a drafter and how they decode. Questions about the last two clips do not encode them again; see `forget_clips`.

    Args:
        cfg: settings, as of feature_sd_inference.py
        trained: adapter and its meta to use instead of the one under the output directory
        trial: choose the product of linear layers by a trial of speed; without it the choice, and so every bit, is the same in each process

    Raises:
        UserError: a checkpoint or a file of the drafter is missing or does not fit
    """

    def __init__(self, cfg: DecodingConfig, trained: tuple[SharedAdapter, dict[str, Any]] | None = None, trial: bool = True) -> None:
        if cfg.shared_adapter is not None and trained is None:
            trained = load_shared_adapter(cfg)
            cfg = dataclasses.replace(cfg, draft_layers=cfg.draft_layers or trained[1].get("draft_layers"))
        self.cfg = cfg
        pair = load_pair(cfg)
        pair.use_steps(cfg.steps)
        if trial:
            pair.choose_linear()
        elif pair.target.steps == "eager":
            pair.target.pack_linear()
            pair.draft.pack_linear()
        self.target, self.draft = pair.target, pair.draft
        flags = {name: getattr(cfg, name) for name in SETTINGS}
        self.target.settings = with_flags(self.target.settings, **flags, stop_strings=cfg.stop)
        self.sources = Sources(pair, cfg, cfg.train_split, draft_vocabulary=cfg.draft_vocabulary)
        if trained is not None:
            self.sources.use_adapter(*trained)
        self._speculating: Speculation | None = None  # the answer that was begun last
        self.proposer = self.sources.open(cfg.draft, cfg.accept in COSINE_RULES, cfg.accept == "kl")
        self._proposers = [self.proposer]  # of the rows of a batch
        self._controller = DraftLengthController(self.sources.known_acceptance(cfg.draft)) if cfg.adaptive else None
        self._vision_caches = (VisionCache(), VisionCache())
        self.target.vision_cache, drafter_cache = self._vision_caches
        for draft in (self.draft, *([self.sources.full_draft] if cfg.draft == "own" else [])):
            draft.vision_cache = drafter_cache

    @classmethod
    def from_config(cls, config: Path | str, **settings: Any) -> SpeculativePair:
        """Load a pair from a config file.

        Args:
            config: YAML file; its sections `common` and `feature_sd_inference` are read
            **settings: settings by name that win over the file, for example draft="chained"

        Raises:
            UserError: an unknown or invalid setting, and as the class
        """
        return cls(parse_config(DecodingConfig, ["--config", str(config), *_words(settings)], "feature_sd_inference"))

    @classmethod
    def from_pretrained(cls, target: Path | str, draft: Path | str, adapter: Path | str, **settings: Any) -> SpeculativePair:
        """Load a pair from checkpoint directories and a shared adapter directory.

        Args:
            target: checkpoint of Video-LLaVA
            draft: checkpoint of EventGPT
            adapter: directory that `save_pretrained` or `python -m feature_alignment.adapters.share` wrote
            **settings: settings by name

        Raises:
            UserError: as the class; the adapter directory is altered or does not fit the pair
        """
        words = _words({"target_id": target, "draft_id": draft, "draft": drafter_of(adapter), "shared_adapter": adapter, **settings})
        return cls(parse_config(DecodingConfig, words, "feature_sd_inference"))

    def answer(self, *, events: Path | str, video: Path | str, question: str) -> Answer:
        """Answer a question about a clip speculatively.

        Args:
            events: event file
            video: video file or folder of frames
            question: what is asked

        Raises:
            UserError: a file cannot be read
        """
        return self._answer(self.decode, sample_of(events, video, question))

    def answer_plain(self, *, events: Path | str, video: Path | str, question: str) -> Answer:
        """Answer by the target alone: the baseline. Arguments as in `answer`."""
        return self._answer(self.decode_plainly, sample_of(events, video, question))

    def stream(self, *, events: Path | str, video: Path | str, question: str) -> Iterator[str]:
        """Answer a question and yield pieces of the text as rounds end; only whole characters. Arguments as in `answer`.

        Raises:
            UserError: another answer was begun before the last piece was read
        """
        speculation = self._speculation(prompts := self.prepare(sample_of(events, video, question)))
        speculation.prefill(prompts.draft, self.cfg.overlap)
        shown = ""
        while not speculation.is_finished:
            text = self.text_of(speculation.emitted)
            if text != shown and self._is_whole(text, speculation.emitted):
                yield text[len(shown) :]
                shown = text
            if speculation is not self._speculating:
                raise UserError("another answer of this pair was begun; read a stream to its end first, or open a second pair")
            speculation.advance()
        if (text := self.text_of(speculation.finish().token_ids)) != shown:
            yield text[len(shown) :]

    def _is_whole(self, text: str, token_ids: list[int]) -> bool:
        """Whether no later token changes a text.

        Incomplete UTF-8 is shown as a replacement character. A tokenizer with byte tokens shows a whole run of them as such characters if
        any of it is incomplete, so the text is compared with what it is before an incomplete character.
        """
        incomplete = self.target.tokenizer.convert_tokens_to_ids(FIRST_BYTE)  # None, or the unknown token, where there is none
        return not text.endswith(REPLACEMENT) and (incomplete is None or self.text_of([*token_ids, incomplete]).startswith(text))

    def prepare(self, sample: Sample) -> Prompts:
        """Read a sample's files for both models."""
        return Prompts(self.target.prepare(sample), self.draft.prepare(sample))

    def decode(self, prompts: Prompts) -> Generation:
        """Decode speculatively."""
        speculation = self._speculation(prompts)
        speculation.prefill(prompts.draft, self.cfg.overlap)
        while not speculation.is_finished:
            speculation.advance()
        return speculation.finish()

    def decode_batch(self, prompts: Sequence[Prompts]) -> BatchGeneration:
        """Decode several prompts at once, under the token rule and at a fixed draft length; each text equals that of its prompt alone.

        Args:
            prompts: at least one

        Raises:
            UserError: no prompts, other settings than that, or a prompt that asks before it shows its clip
        """
        cfg = self.cfg
        if cfg.accept != "token" or cfg.temperature or cfg.adaptive:
            raise UserError(
                "a batch is decoded greedily, by tokens, at a fixed length; "
                f"got accept={cfg.accept}, temperature={cfg.temperature}, adaptive={cfg.adaptive}. Decode one prompt at a time."
            )
        if not prompts:
            raise UserError("a batch of no prompts; wanted at least one.")
        self._speculating = None  # of a stream, which cannot go on after this
        stepping = self.sources.stepping_drafter(cfg.draft)
        with _eager_steps(stepping) if stepping is not None and len(prompts) > 1 else nullcontext():
            while len(self._proposers) < len(prompts):
                self._proposers.append(self.sources.open(cfg.draft))
            return speculate_batch(
                self.target,
                self._proposers[: len(prompts)],
                [p.target for p in prompts],
                [p.draft for p in prompts],
                num_draft_tokens=cfg.num_draft_tokens,
                max_new_tokens=cfg.max_new_tokens,
                overlap=cfg.overlap,
            )

    def decode_plainly(self, prompts: Prompts) -> Generation:
        """Decode by the target alone."""
        return decode_plainly(self.target, prompts.target, self.cfg.max_new_tokens, self._sampler())

    def forget_clips(self) -> None:
        """Encode the next clip again even if it was the last one: for times that include vision."""
        for cache in self._vision_caches:
            cache.clear()

    def text_of(self, token_ids: list[int]) -> str:
        """Text of an answer, without special tokens."""
        text: str = self.target.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def _speculation(self, prompts: Prompts) -> Speculation:
        cfg = self.cfg
        self._speculating = speculation = Speculation(
            self.target,
            self.proposer,
            prompts.target,
            cfg.max_new_tokens,
            cfg.accept,
            cfg.acceptance_threshold,
            cfg.num_draft_tokens,
            self._sampler(),
            self._controller,
            cosines=True,
        )
        return speculation

    def _sampler(self) -> Sampler | None:
        """A sampler that starts with the seed, so that every answer is reproducible; None for greedy decoding."""
        cfg = self.cfg
        return Sampler(cfg.temperature, cfg.seed, self.target.device, shared_noise=cfg.adaptive) if cfg.temperature else None

    def _answer(self, decode: Callable[[Prompts], Generation], sample: Sample) -> Answer:
        prompts, hits = self.prepare(sample), sum(cache.hits for cache in self._vision_caches)
        generation = decode(prompts)
        stats: dict[str, Any] = {
            "tokens_per_pass": generation.tokens_per_pass,
            "passes": generation.passes,
            "total_ms": generation.total_ms,
        }
        stats |= {"decode_ms": generation.decode_ms, "ms": dict(generation.ms)}
        stats["vision_reused"] = sum(cache.hits for cache in self._vision_caches) - hits
        return Answer(self.text_of(generation.token_ids), generation.token_ids, generation.rounds, stats)


@contextmanager
def _eager_steps(draft: Decoder) -> Iterator[None]:
    """Eager steps within the block, for several texts at once: captured steps hold one."""
    before = draft.steps, draft.fixed_cache
    draft.steps, draft.fixed_cache = "eager", None
    try:
        yield
    finally:
        draft.steps, draft.fixed_cache = before


def sample_of(events: Path | str, video: Path | str, question: str) -> Sample:
    """A sample that belongs to no manifest."""
    events, video = Path(events), Path(video)
    for path in (events, video):
        if not path.exists():
            raise UserError(f"nothing at {path}: expected an event file and a video file or a folder of frames.")
    return Sample(id=f"{video.stem}--{events.stem}", sequence="user", question=question, events=events, video=video)


def _words(settings: dict[str, Any]) -> list[str]:
    """Settings as flags: texts and paths as they are, anything else as JSON."""
    shown = {name: value if isinstance(value, str | Path) else json.dumps(value, default=str) for name, value in settings.items()}
    return [f"--{name}={value}" for name, value in shown.items()]
