"""What a run will store and hold in memory, computed from the checkpoints' geometry and the manifests. No weights are read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from feature_alignment.adapters.attending import AttendingAdapter
from feature_alignment.adapters.attending_texts import MOST_IDS
from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.cli.config import Common
from feature_alignment.inputs.samples import Sample
from feature_alignment.models.batches import plan_batches
from feature_alignment.models.eventgpt import EVENT_TOKEN_INDEX
from feature_alignment.models.pair import ANSWER_TOKENS, ModelReport, PairReport
from feature_alignment.models.stored_states import StateGeometry, depend_on_the_clip_alone, shapes_of
from feature_alignment.storage.hidden_states import event_rows
from feature_alignment.storage.hidden_states_writer import states_bytes

Settings = SimpleNamespace  # the merged settings of one script
FRAME_BYTES = 1700  # of a .pt file, next to its numbers
CHARACTERS_PER_TOKEN = 5  # of English text in a vocabulary of LLaMA's kind
ENTRY_BYTES = 330  # keys and hashes of a row of samples.jsonl, next to its texts
PAIR_BYTES = 250  # keys and hashes of a row of token_pairs
QUESTION_TOKENS = 32  # of the longest questions, for memory


@dataclass(frozen=True)
class PlannedSplit:
    """The rows of one split.

    Args:
        name: Of the split.
        samples: Its rows.
        batches: Its batches, as rows of `samples`.
        clip_index: For each row, its row of event states.
    """

    name: str
    samples: Sequence[Sample]
    batches: Sequence[range]
    clip_index: Sequence[int]

    @property
    def clips(self) -> int:
        """Number of rows of event states."""
        return max(self.clip_index) + 1

    @property
    def largest_batch(self) -> tuple[int, int]:
        """Most clips in a batch, and most questions about one clip in a batch."""
        counts = [Counter((self.samples[row].events, self.samples[row].event_start_ms) for row in batch) for batch in self.batches]
        return max(map(len, counts)), max(max(count.values()) for count in counts)


def planned_split(name: str, samples: Sequence[Sample], batch_size: int, encode_prompt: Callable[[str], Tensor]) -> PlannedSplit:
    """The batches and clips of a split.

    Args:
        name: Of the split.
        samples: Its rows.
        batch_size: Of the extraction.
        encode_prompt: The drafter's prompt ids of a question.
    """
    shared = depend_on_the_clip_alone(map(encode_prompt, {s.question for s in samples}), EVENT_TOKEN_INDEX)
    windows = [{"events": (s.events, s.event_start_ms, s.event_time_unit)} if shared else {} for s in samples]
    return PlannedSplit(name, samples, plan_batches(samples, batch_size), list(event_rows(windows)))


def taps_of(cfg: Common, draft: ModelReport) -> list[int]:
    """The drafter's layers whose states are stored."""
    return list(cfg.draft_layers or [draft.layers])


def run_bytes(
    cfg: Common,
    settings: Mapping[str, Settings],
    pair: PairReport,
    splits: Sequence[PlannedSplit],
    tokens: tuple[float, float] | None = None,
) -> dict[str, int]:
    """File, named from the output directory on -> its bytes: hidden states, texts, heads and adapters. Results are a few MB more.

    Args:
        cfg: Settings that all scripts share.
        settings: Script -> its settings; `train_hidden_adapter.<kind>` for each adapter that is trained.
        pair: The checked pair.
        splits: Splits that are extracted.
        tokens: Mean lengths of the target's and the drafter's answers; None for the longest.
    """
    extract, (draft, target) = settings["extract_hidden_states"], pair.models.values()
    dtype, taps = getattr(torch, extract.store_dtype), taps_of(cfg, draft)
    width = min(extract.max_new_tokens, extract.max_positions or extract.max_new_tokens)
    geometry = StateGeometry(taps, draft.hidden_size, draft.vision_tokens, target.hidden_size)
    shapes = shapes_of(geometry, width, extract.separate_layers, extract.event_states, extract.prompt_states)
    vocabulary = min(draft.embedding_rows, target.embedding_rows)
    found: dict[str, int] = {}
    for split in splits:
        folder, rows = f"hidden_states/{split.name}", len(split.samples)
        for name, size in states_bytes(shapes, dtype, split.clip_index).items():
            found[f"{folder}/{name}"] = size + FRAME_BYTES
        found[f"{folder}/positions.pt"] = rows * (9 * width + 8 * (1 + extract.event_states)) + FRAME_BYTES
        entry, answers = text_bytes(split.samples, extract, vocabulary, tokens or (extract.max_new_tokens,) * 2)
        found[f"{folder}/samples.jsonl"] = rows * (entry + len(shapes) * 45)
        found[f"token_pairs/{split.name}.json"] = rows * answers
    head = vocabulary * target.hidden_size * getattr(torch, cfg.dtype).itemsize + FRAME_BYTES
    found["hidden_states/vl_lm_head.pt"] = head
    if extract.event_states:
        found["hidden_states/vl_embeddings.pt"] = head
    entries = next(len(split.samples) for split in splits if split.name == "train") * (tokens[0] if tokens else extract.max_new_tokens)
    return found | adapter_bytes(settings, pair, len(taps), round(entries))


def adapter_bytes(settings: Mapping[str, Settings], pair: PairReport, num_taps: int, num_entries: int) -> dict[str, int]:
    """File -> bytes of every adapter that is trained.

    Args:
        settings: Script -> its settings.
        pair: The checked pair.
        num_taps: Layers of the drafter that the hidden adapter reads.
        num_entries: Rows of the attending adapter's table; training texts have about one for each token.
    """
    draft, target = pair.models.values()
    event = target.hidden_size, draft.hidden_size, draft.vision_tokens
    ids = min(MOST_IDS, draft.embedding_rows, target.embedding_rows)
    build: dict[str, Callable[[Settings], torch.nn.Module]] = {
        "hidden": lambda s: HiddenAdapter(draft.hidden_size * num_taps, target.hidden_size, s.bottleneck),
        "chained": lambda s: ChainedAdapter(*event, s.bottleneck),
        "attending": lambda s: AttendingAdapter(*event, ids, num_entries, settings["extract_hidden_states"].prompt_states, s.bottleneck),
    }
    with torch.device("meta"):
        return {
            f"{'adapter' if kind == 'hidden' else f'{kind}_adapter'}/adapter.pt": sum(
                tensor.nbytes for tensor in make(settings[f"train_hidden_adapter.{kind}"]).state_dict().values()
            )
            for kind, make in build.items()
            if f"train_hidden_adapter.{kind}" in settings
        }


def text_bytes(samples: Sequence[Sample], extract: Settings, vocabulary: int, tokens: tuple[float, float]) -> tuple[int, int]:
    """Bytes of a row of samples.jsonl without its hashes of states, and of a row of token_pairs; means over the rows."""
    asked = sum(len(json.dumps([s.id, s.sequence, s.question])) for s in samples) / len(samples)
    facts = sum(len(json.dumps(s.facts)) for s in samples) / len(samples)
    files = sum(len(s.events.name) + len(s.video.name) for s in samples) / len(samples)
    an_id = len(str(vocabulary - 1)) + 1.2  # with comma and space; some ids have fewer digits
    prompt = (extract.prompt_states + 1) * 4.5 * bool(extract.prompt_states)
    answers = (tokens[0] + tokens[1] * extract.draft_answers) * (an_id + CHARACTERS_PER_TOKEN)
    entry = ENTRY_BYTES + asked + facts + files + answers + tokens[0] * an_id * extract.own_drafts + prompt
    return round(entry), round(PAIR_BYTES + asked + answers)


@dataclass(frozen=True)
class Memory:
    """Memory of one process on its device, in bytes.

    Args:
        weights: Of both models, or of the target's head and embeddings in training.
        caches: Keys and values.
        batch: Activations of the largest batch, logits and adapters.
    """

    weights: int
    caches: int
    batch: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return self.weights + self.caches + self.batch


def memory_of(cfg: Common, settings: Mapping[str, Settings], pair: PairReport, splits: Sequence[PlannedSplit]) -> dict[str, Memory]:
    """Script -> memory that it needs at most. Activations are estimated from widths; everything else follows from the geometry."""
    extract, (draft, target) = settings["extract_hidden_states"], pair.models.values()
    size, last = getattr(torch, cfg.dtype).itemsize, taps_of(cfg, draft)[-1]
    exit_weights = draft.weight_bytes - (draft.layers - last) * draft.layer_bytes
    both = target.weight_bytes + exit_weights
    writes = both + draft.weight_bytes * (last < draft.layers)  # EventGPT at full depth writes its own texts
    a_position = {m: m.cache_bytes / (m.prompt_tokens + ANSWER_TOKENS) for m in (draft, target)}

    clips, questions = (max(counts) for counts in zip(*(split.largest_batch for split in splits), strict=True))
    room = questions * (QUESTION_TOKENS + extract.max_new_tokens)
    prompts = sum(clips * m.prompt_tokens * a_position[m] for m in (draft, target))  # one copy stays, another has room for answers
    answers = max(clips * (m.prompt_tokens + room) * a_position[m] for m in (draft, target))
    batch = clips * activations(target, size) + 4 * extract.batch_size * target.embedding_rows
    own_texts = extract.own_drafts or extract.draft_answers
    found = {"extract_hidden_states": Memory(writes if own_texts else both, round(prompts + answers), round(batch))}

    longest = max(settings[name].max_new_tokens for name in ("feature_sd_inference", "benchmark_feature_sd"))
    one = sum((m.prompt_tokens + longest) * a_position[m] for m in (draft, target)) * 2  # and a cache of fixed size
    found["feature_sd_inference, benchmark_feature_sd"] = Memory(writes, round(one), activations(target, size))

    head = 4 * min(draft.embedding_rows, target.embedding_rows) * target.hidden_size
    for kind, matrices in (("hidden", 1), ("chained", 2), ("attending", 2)):
        if (training := settings.get(f"train_hidden_adapter.{kind}")) is not None:
            found[f"train_hidden_adapter, {kind}"] = Memory(matrices * head, 0, training_batch(kind, training, extract, draft, target))
    return found


def training_batch(kind: str, training: Settings, extract: Settings, draft: ModelReport, target: ModelReport) -> int:
    """Bytes of one batch of a training: its states, logits and their gradients.

    Args:
        kind: Of adapter.
        training: Settings of the training.
        extract: Settings of the extraction.
        draft: The drafter.
        target: The target.
    """
    rows, length = training.batch_size, extract.max_new_tokens
    ids = min(MOST_IDS, draft.embedding_rows, target.embedding_rows)
    events: int = rows * draft.vision_tokens * draft.hidden_size * (kind != "hidden")
    if kind != "attending":
        positions: int = rows * length * (training.roll_out_steps if kind == "chained" else 1)
        return 4 * (positions * (4 * target.hidden_size + 5 * target.embedding_rows) + events)  # both logits, softmax, gradients
    drafts: int = rows * training.origins * training.roll_out_steps * (4 * target.hidden_size + 5 * ids)
    texts: int = rows * length * (4 * target.hidden_size + 2 * ids)
    prompts: int = rows * extract.prompt_states * (2 * target.hidden_size + 8 * training.bottleneck)
    return 4 * (drafts + texts + prompts + events)


def activations(model: ModelReport, itemsize: int) -> int:
    """Bytes that the prefill of one clip holds at most: hidden states, and three widths of the MLP, which is 2.7 times as wide."""
    return round(model.prompt_tokens * model.hidden_size * itemsize * (4 + 3 * 2.7))
