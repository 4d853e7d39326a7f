"""Task 1.1. Hidden states of both models on the same tokens.

    prompt            | x1   x2   x3   </s>          tokens both models read
    EventGPT (events) | g0 → g1 → g2 → g3            g[t] emits x(t+1)
    Video-LLaVA       | v0 → v1 → v2 → v3            v[t] emits x(t+1)

reads   a manifest of clips and questions, both checkpoints
writes  hidden_states/<split>/{egpt,vl}_hidden_states.pt, positions.pt, samples.jsonl; token_pairs/<split>.json; vl_lm_head.pt;
        with --event_states also egpt_event_states.pt and vl_embeddings.pt, for the chained and the attending adapter; with
        --prompt_states also vl_prompt_states.pt, for the attending adapter

    python feature_alignment/extract_hidden_states.py --config configs/demo.yaml --split train
    torchrun --nproc_per_node 2 feature_alignment/extract_hidden_states.py --config configs/demo.yaml --split train

A killed run can be resumed. Machines without a shared disk take `--shard 1/3`, `2/3`, `3/3`; then copy their folders under
hidden_states/ into one and run the command with `--merge`. All variants give the same bytes.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from feature_alignment.cli.config import ClipsConfig, parse_config
from feature_alignment.cli.console import UserError, print_json_line, print_table, progress, run

if TYPE_CHECKING:
    from feature_alignment.inputs.samples import Sample
    from feature_alignment.models.decoder import Decoder
    from feature_alignment.models.pair import Pair
    from feature_alignment.storage.answers import Answers
    from feature_alignment.storage.earlier_rows import Row
    from feature_alignment.storage.hidden_states_writer import HiddenStatesWriter
    from feature_alignment.storage.identity import RunIdentity
    from feature_alignment.storage.processes import ProcessGroup

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExtractConfig(ClipsConfig):
    """Write hidden states of both models, teacher-forced on one token sequence.

    Reads the clips of a manifest and both checkpoints; writes hidden_states/<split>/ and token_pairs/<split>.json. A killed run can be
    resumed.

    Args:
        split: name of a manifest
        prefix: text that both models read: the greedy answer of the verifier (the target), that of the drafter, or each model's own
            (only to reproduce an earlier, misleading measurement)
        max_new_tokens: longest answer in tokens, EOS included
        max_positions: store at most this many states of each answer (default: all)
        batch_size: rows per forward pass
        store_dtype: number format of the files
        bfloat16_products: multiply in bfloat16 in linear layers where the CPU can: faster, and close enough for training data, but
            texts may differ from those of decoding
        separate_layers: store each of draft_layers in a separate file, egpt_hidden_states.layer02.pt, …, instead of concatenated
        event_states: store EventGPT's states over its event tokens as well, which the chained adapter reads (4.8 MB a clip at 7B)
        prompt_states: store Video-LLaVA's states on this many of the last prompt positions as well, which the attending adapter reads
            (160: 1.3 MB a row at 7B)
        draft_answers: decode EventGPT's own answers as well. Only the token-level comparison reads them; without them the training split
            takes a third less time
        own_drafts: store EventGPT's own next token after every prefix of the text, for token-level comparison; EventGPT runs at full depth
        answers: token pairs file whose answers are used instead of generating them (default: matching answers in output_dir)
        shard: extract only part i of n, e.g. 2/3
        merge: merge all shards of the split
    """

    split: str = "train"
    prefix: Literal["verifier", "drafter", "own"] = "verifier"
    max_new_tokens: int = 64
    max_positions: int | None = None
    batch_size: int = 32
    store_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    bfloat16_products: bool = False
    separate_layers: bool = False
    event_states: bool = False
    prompt_states: int = 0
    draft_answers: bool = True
    own_drafts: bool = False
    answers: Path | None = None
    shard: str | None = None
    merge: bool = False


def extract(
    pair: Pair,
    full_depth_draft: Decoder,
    samples: Sequence[Sample],
    own_batches: Sequence[range],
    cfg: ExtractConfig,
    writer: HiddenStatesWriter,
    answers: Answers,
    file_row: dict[int, int],
    entries: Sequence[Row],
    first: bool = True,
) -> None:
    """Extract every incomplete batch of `own_batches` into `writer`; whole batches only, because floats depend on their batch.

    Args:
        pair: both models, the drafter with its tapped layers
        full_depth_draft: the drafter with its own LM head, for its own texts
        samples: samples of the manifest
        own_batches: batches of this process, as rows of `samples`
        cfg: settings
        writer: receives the states
        answers: known texts of both models; a batch with an unknown text is generated
        file_row: row of `samples` -> row of the files
        entries: identity of each row of the files
        first: whether this process shows progress
    """
    from feature_alignment.cli.console import repairs_of
    from feature_alignment.models.stored_states import states_of
    from feature_alignment.storage.hidden_states import EVENT_STATES

    todo = [rows for rows in own_batches if any(file_row[row] not in writer.done for row in rows)]
    total, began = sum(map(len, todo)), time.perf_counter()
    with progress(total=total, first=first, desc=f"extract {cfg.split}", unit="row") as bar:
        for n, rows in enumerate(todo):
            asked = [samples[row] for row in rows]
            known = [answers.get(sample.id) for sample in asked]
            held = any(writer.holds(EVENT_STATES, file_row[row]) for row in rows)
            for row, sample, found in zip(rows, asked, states_of(pair, full_depth_draft, asked, known, cfg, held), strict=True):
                about: dict[str, Any] = dict(entries[file_row[row]])
                if repairs := repairs_of(sample.events, sample.video):
                    about["repaired"] = repairs
                for model, decoder, tokens in (("vl", pair.target, found.vl_tokens), ("egpt", pair.draft, found.egpt_tokens)):
                    about |= {f"{model}_tokens": tokens, f"{model}_text": decoder.tokenizer.decode(tokens, skip_special_tokens=True)}
                about["cut"] = cuts(found.vl_tokens, found.egpt_tokens, found.read, cfg, pair)
                writer.write(file_row[row], found.files, found.token_ids, {**about, **found.about})
            writer.commit()
            bar.update(len(rows))
            if n == 0 and first:
                seconds = (time.perf_counter() - began) / len(rows) * total
                log.info("extract  %s: about %.0f s for %d rows, judging by the first batch", cfg.split, seconds, total)


def cuts(vl_tokens: list[int], egpt_tokens: list[int], read: list[int], cfg: ExtractConfig, pair: Pair) -> list[str]:
    """Names of the limits that shortened a row, from both answers and the token ids `read`; counted in `meta` and printed."""
    ends = {"Video-LLaVA": pair.target.eos_ids, "EventGPT": pair.draft.eos_ids}
    named = {"Video-LLaVA": vl_tokens, "EventGPT": egpt_tokens}
    found = [f"{name}'s answer reached max_new_tokens" for name, tokens in named.items() if tokens and tokens[-1] not in ends[name]]
    is_complete = read[-1] in ends["EventGPT" if cfg.prefix == "drafter" else "Video-LLaVA"]
    return [*found, "states beyond max_positions not kept"] if len(read) == cfg.max_positions and not is_complete else found


def identity_of(cfg: ExtractConfig) -> RunIdentity:
    """The identity of a run apart from its rows. Files are compared by content, the manifest row by row."""
    from feature_alignment.storage.identity import identity_of

    sources = {"target": cfg.target_id, "draft": cfg.draft_id, **({} if cfg.clips else {"manifest": cfg.manifests[cfg.split]})}
    sources |= {name: path for name, path in {"answers": cfg.answers, "questions": cfg.questions}.items() if path}
    without = ["threads", "limit", "merge", "clips", "question", *(() if cfg.random_weights else ("seed",))]
    identity = identity_of("extract_hidden_states", cfg, sources, without=without)
    return dataclasses.replace(identity, not_compared=frozenset({"manifest"}))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Extract one split, a shard of it, or merge its shards; returns the meta."""
    cfg = parse_config(ExtractConfig, argv, "extract_hidden_states")
    if not cfg.draft_answers and cfg.prefix != "verifier":
        raise UserError(f"--prefix {cfg.prefix} needs EventGPT's answers; expected --draft_answers true, or --prefix verifier.")
    from feature_alignment.inputs.clip_folder import read_data_set
    from feature_alignment.inputs.row_identity import identify, refuse_missing_clips
    from feature_alignment.models.batches import plan_batches
    from feature_alignment.models.loading import fetch_checkpoints
    from feature_alignment.storage import earlier_rows, shards
    from feature_alignment.storage.processes import check_device, check_writable, exclusive_lock, process_group

    shard, of = shards.parse_shard(cfg.shard, cfg.merge)
    if not cfg.merge:  # a merge works without the GPU that the shards ran on
        check_device(cfg.device)
    samples = read_data_set(cfg, cfg.split, cfg.clips, cfg.question)
    fetch_checkpoints(cfg)
    identity = identity_of(cfg)
    parts = plan_batches(samples, cfg.batch_size)[shard - 1 :: of]
    if not parts:
        raise UserError(f"--shard {cfg.shard}: {len(samples)} rows in batches of {cfg.batch_size} leave no batch; expected fewer shards.")
    if cfg.merge:  # works without the clips
        rows = [{"id": s.id, "sequence": s.sequence, "question": s.question, "facts": s.facts} for s in samples]
    else:
        refuse_missing_clips(samples)
        rows = identify(samples, parts, cfg.clips or cfg.manifests[cfg.split], cfg.event_start_ms)
    out = cfg.out / "hidden_states" / (shards.shard_name(cfg.split, shard, of) if cfg.shard else cfg.split)
    rank = (process := process_group("cpu" if cfg.merge else cfg.device)).rank
    if cfg.resume and earlier_rows.find_complete_run(out, identity, rows, cfg.ignore_code):
        return report(cfg, out, reused=True, first=rank == 0)
    check_writable(cfg.out / "token_pairs" / f"{cfg.split}.json")
    with exclusive_lock(out) if rank == 0 else nullcontext():
        if cfg.merge:
            shards.merge_shards(out, identity, rows, cfg.out / "token_pairs" / f"{cfg.split}.json", cfg.resume, cfg.ignore_code)
        else:
            fill(cfg, samples, parts, rows, identity, out, process)
    return report(cfg, out, reused=False, first=rank == 0)


def fill(
    cfg: ExtractConfig,
    samples: Sequence[Sample],
    parts: Sequence[range],
    rows: Sequence[Row],
    identity: RunIdentity,
    out: Path,
    process: ProcessGroup,
) -> None:
    """Extract this process's batches into `out`; rank 0 creates the files, copies earlier rows and publishes the result.

    Args:
        cfg: settings
        samples: samples of the manifest
        parts: the batches of this run, as rows of `samples`
        rows: identity of each row of the files, in order
        identity: identity of this run
        out: folder of the split
        process: this process
    """
    import torch

    from feature_alignment.models.pair import load_pair
    from feature_alignment.models.stored_states import StateGeometry, depend_on_the_clip_alone, shapes_of
    from feature_alignment.storage import earlier_rows
    from feature_alignment.storage import hidden_states_writer as files
    from feature_alignment.storage.answers import known_answers, refuse_foreign_ids
    from feature_alignment.storage.files import save_pt
    from feature_alignment.storage.hidden_states import event_rows
    from feature_alignment.storage.progress_notes import rows_done

    rank, world, device, wait = process
    token_pairs = cfg.out / "token_pairs" / f"{cfg.split}.json"
    answers = known_answers(cfg.answers, token_pairs if cfg.resume else None, identity, rows, cfg.ignore_code)
    pair = load_pair(dataclasses.replace(cfg, device=device))
    refuse_foreign_ids(answers, pair.target.vocab_size)
    full_depth_draft = pair.draft
    if (cfg.own_drafts or (cfg.draft_answers and len(answers) < len(rows))) and not pair.draft.has_own_head:
        full_depth_draft = pair.draft_with(None, dataclasses.replace(cfg, device=device))
    for decoder in (pair.target, pair.draft, full_depth_draft):
        decoder.pack_linear(cfg.bfloat16_products)  # Without a trial, so that every process and every resumed run writes the same bytes.
    file_row = {row: i for i, row in enumerate(row for part in parts for row in part)}
    width, dtype = min(cfg.max_new_tokens, cfg.max_positions or cfg.max_new_tokens), getattr(torch, cfg.store_dtype)
    shapes = shapes_of(StateGeometry.of(pair), width, cfg.separate_layers, cfg.event_states, cfg.prompt_states)
    prompts = map(pair.draft.encode_prompt, {sample.question for sample in samples})
    if not (cfg.event_states and depend_on_the_clip_alone(prompts, pair.draft.placeholder)):
        rows = [{key: value for key, value in row.items() if key != "events"} for row in rows]
    clip_index = list(event_rows(rows))
    if cfg.resume:
        earlier_rows.refuse_changes(out, identity, rows, cfg.limit is not None, cfg.ignore_code)
        identity = earlier_rows.with_recorded_code(out, identity) if cfg.ignore_code else identity
    wait()  # all processes have read the earlier run before it changes
    if rank == 0:
        begun = rows_done(out) if cfg.resume else set()
        check_room(cfg, pair, shapes, clip_index, begun)
        may_keep = files.begin_run(out, identity, files.plan_hash(rows), cfg.resume)
        writer = files.HiddenStatesWriter(out, len(file_row), shapes, dtype, clip_index=clip_index)
        if may_keep:
            earlier_rows.copy_unchanged_rows(writer, identity, rows, cfg.ignore_code)
        log.info("extract  %s: %d of %d rows to do", cfg.split, len(file_row) - len(writer.done), len(file_row))
    wait()
    if rank:
        writer = files.HiddenStatesWriter(out, len(file_row), shapes, dtype, rank, clip_index)
    try:
        extract(pair, full_depth_draft, samples, parts[rank::world], cfg, writer, answers, file_row, rows, first=rank == 0)
        wait()
        if rank == 0:
            save_pt(cfg.out / "hidden_states" / "vl_lm_head.pt", pair.target.head_weight.detach().cpu().clone())
            if cfg.event_states:
                save_pt(cfg.out / "hidden_states" / "vl_embeddings.pt", pair.target.embeddings.cpu().clone())
            writer.finish(describe(pair, cfg, identity, len(file_row)), None if cfg.shard else token_pairs)
    finally:
        writer.close()
    wait()


def check_room(cfg: ExtractConfig, pair: Pair, shapes: Mapping[str, tuple[int, int]], clip_index: Sequence[int], begun: set[int]) -> None:
    """Log the size of every file of states, and raise UserError if the disk has too little room.

    Args:
        cfg: settings
        pair: both models
        shapes: file name -> (positions, size) of a row in it
        clip_index: for each row, its row of event states
        begun: rows whose states are on the disk already
    """
    import torch

    from feature_alignment.storage.hidden_states_writer import check_disk_space, states_bytes

    dtype = getattr(torch, cfg.store_dtype)
    sizes = states_bytes(shapes, dtype, clip_index)
    each = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in sizes.items())
    counted = f"{len(clip_index):,} rows" + (f" about {max(clip_index) + 1:,} clips" if cfg.event_states else "")
    log.info("extract  %s: %s, at most %s MB: %s", cfg.split, counted, f"{sum(sizes.values()) / 1e6:,.1f}", each)
    heads = pair.target.head_weight.nbytes + (pair.target.embeddings.nbytes if cfg.event_states else 0)
    check_disk_space(cfg.out, sum(states_bytes(shapes, dtype, clip_index, begun).values()) + heads)


def describe(pair: Pair, cfg: ExtractConfig, identity: RunIdentity, rows: int) -> dict[str, Any]:
    """The `meta` of a run."""
    from feature_alignment.storage.artifacts import provenance

    return provenance(
        "extract_hidden_states",
        cfg,
        {"target": cfg.target_id, "draft": cfg.draft_id, "manifest": cfg.clips.resolve() if cfg.clips else cfg.manifests[cfg.split]},
        identity,
        **{name: getattr(cfg, name) for name in ("prefix", "separate_layers", "event_states", "prompt_states")},
        rows=rows,
        draft_layers=list(pair.draft.taps),
        draft_norm=pair.draft.norm,
        draft_norms=pair.draft.norms,
        target_layers=[pair.target.num_layers],
        target_norm="post",
        eos_token_ids=sorted(pair.target.eos_ids),
        draft_eos_token_ids=sorted(pair.draft.eos_ids),
        hidden_size_draft=pair.draft.hidden_size,
        hidden_size_target=pair.target.hidden_size,
        dtype=cfg.store_dtype,
    )


def report(cfg: ExtractConfig, out: Path, reused: bool, first: bool = True) -> dict[str, Any]:
    """Print a summary of a complete run, or of a cached one (`reused`), in the `first` process; returns its meta."""
    from feature_alignment.storage.files import read_json

    meta: dict[str, Any] = read_json(out / "meta.json", "the same command with --no_resume")
    if not first:
        return meta
    models = (
        ("EventGPT", meta["hidden_size_draft"], meta["draft_layers"], meta["draft_norm"]),
        ("Video-LLaVA", meta["hidden_size_target"], meta["target_layers"], meta["target_norm"]),
    )
    rows = [(model, meta["rows"], meta["positions"], size, "+".join(map(str, layers)), norm) for model, size, layers, norm in models]
    if not reused:
        print_table(f"hidden states of {out.name}, prefix: {cfg.prefix}", ("model", "rows", "positions", "width", "layers", "norm"), rows)
    for kind, count in {**meta["repaired"], **meta["cut"]}.items():
        log.info("extract  %s: %d of %d rows", kind, count, meta["rows"])
    if cfg.shard:
        log.info("extract  with the folders of all shards under %s, run the command with --merge instead of --shard", out.parent)
    counted = {key: meta[key] for key in ("rows", "positions", "repaired", "cut")}
    print_json_line({"split": cfg.split, **counted, "reused": reused, "written": str(out)})
    return meta


if __name__ == "__main__":
    run(main)
