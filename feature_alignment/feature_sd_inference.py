"""Task 3.1. Answer questions: EventGPT drafts from the events, Video-LLaVA verifies on the frames.

reads   both checkpoints, files of the drafter (adapter/adapter.pt, chained_adapter/adapter.pt, token_pairs/<train split>.json), and
        one sample of a manifest, or --events, --video and --question; with --split all of a manifest, with --clips a folder of clips;
        with --shared_adapter the drafter is a directory that somebody shared
writes  sd/<sample id>.json: text, token ids, every round with its drafts, accepted tokens, cosine, extra token, milliseconds;
        with --split or --clips sd/<name>.jsonl: a row for each sample (docs/formats.md)

    python feature_alignment/feature_sd_inference.py --config configs/demo.yaml
    python feature_alignment/feature_sd_inference.py --config configs/demo.yaml --events e.npy --video v.mp4 --question "…"
    python feature_alignment/feature_sd_inference.py --config configs/demo.yaml --split test
    python feature_alignment/feature_sd_inference.py --config configs/demo.yaml --clips DIR --question "…"

A killed run of a data set can be resumed. Several machines take `--shard 1/3`, `2/3`, `3/3`; then copy their files under sd/ into one
folder and run the command with `--merge`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_alignment.cli.config import parse_config
from feature_alignment.cli.console import UserError, print_json_line, run
from feature_alignment.decoding.settings import DecodingConfig

if TYPE_CHECKING:
    from feature_alignment.decoding.generation import Generation
    from feature_alignment.decoding.speculative_pair import SpeculativePair
    from feature_alignment.inputs.samples import Sample
    from feature_alignment.storage.answer_rows import AnswersFile
    from feature_alignment.storage.identity import RunIdentity, Sources

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InferenceConfig(DecodingConfig):
    """Answer one question and compare it with plain decoding, or answer a whole data set (--split, --clips).

    Reads both checkpoints, files of the drafter and samples; writes sd/<sample id>.json, or sd/<split or folder>.jsonl.

    Args:
        split: answer all samples of this manifest; with --sample only that one (default: one sample of test). With --clips, the name of
            the file of answers (default: that of the folder)
        sample: id of a single sample to answer (default: the first)
        events: event file to use instead of a sample's, together with --video and --question
        video: video file or folder of frames to use instead of a sample's
        question: question about them, or about every clip of --clips
        clips: answer --question or --questions about every clip of this folder: files of one name, such as a.npy and a.mp4
        batch_size: samples of a data set that are decoded at once; greedily, by tokens, at a fixed draft length
        shard: answer only part i of n of a data set, e.g. 2/3
        merge: merge all shards of a data set
        fail_fast: stop at the first sample that cannot be read, instead of writing its error to its row
        verbose: print every round with its milliseconds per stage and the reason why drafting stopped, in color on a terminal
    """

    split: str | None = None
    sample: str | None = None
    events: Path | None = None
    video: Path | None = None
    question: str | None = None
    clips: Path | None = None
    batch_size: int = 1
    shard: str | None = None
    merge: bool = False
    fail_fast: bool = False
    verbose: bool = False

    @property
    def is_data_set(self) -> bool:
        """Whether a whole data set is answered."""
        return self.clips is not None or (self.split is not None and self.sample is None and self.events is None)


def refuse_combinations(cfg: InferenceConfig) -> None:
    """Raise UserError for flags that do not go together."""
    if cfg.clips is not None and cfg.sample is not None:
        raise UserError(f"--clips {cfg.clips} and --sample {cfg.sample}: wanted all samples of a folder, or one of a manifest.")
    if cfg.events is not None and (given := [f"--{name}" for name in ("sample", "split") if getattr(cfg, name) is not None]):
        raise UserError(
            f"--events {cfg.events} and {given[0]}: wanted files of your own, or a sample of a manifest. Leave one of them out."
        )
    if not cfg.is_data_set:
        given = [name for name, value in (("shard", cfg.shard), ("merge", cfg.merge), ("fail_fast", cfg.fail_fast)) if value]
        given += ["batch_size"] if cfg.batch_size > 1 else []
        if given:
            raise UserError(f"--{given[0]} is for a whole data set; wanted --split NAME (without --sample) or --clips DIR with it.")
        return
    if cfg.verbose:
        raise UserError("--verbose prints the rounds of one sample; with a whole data set leave it out, or name a sample with --sample.")
    if cfg.draft == "previous" and (cfg.shard or cfg.batch_size > 1):
        raise UserError("--draft previous drafts from the answer before, so samples are answered in order: no --shard, no --batch_size.")
    if cfg.batch_size > 1:
        modes = {"--accept": cfg.accept != "token", "--temperature": cfg.temperature, "--adaptive": cfg.adaptive}
        if given := [flag for flag, value in modes.items() if value]:
            raise UserError(
                f"--batch_size {cfg.batch_size} and {', '.join(given)}: batches are decoded greedily by the token rule, at a fixed draft "
                f"length. Leave out {', '.join(given)}, or pass --batch_size 1."
            )


def choose_sample(cfg: InferenceConfig) -> Sample:
    """The sample to answer: from --events, --video and --question if all are given, else from the manifest."""
    from feature_alignment.inputs.samples import Sample, read_samples

    if cfg.events and cfg.video and cfg.question:
        return Sample(id=f"{cfg.video.stem}--{cfg.events.stem}", sequence="user", question=cfg.question, events=cfg.events, video=cfg.video)
    split = cfg.split or "test"
    samples = read_samples(cfg.manifests, split, questions=cfg.questions, allow_outside=cfg.allow_outside)
    if cfg.sample is None:
        return samples[0]
    found = [s for s in samples if s.id == cfg.sample]
    if not found:
        raise UserError(f"no sample {cfg.sample!r} in {cfg.manifests[split]}; its ids go from {samples[0].id} to {samples[-1].id}.")
    return found[0]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Answer one sample, or a data set, a shard of it, or merge its shards; returns the written JSON, or the meta of a data set."""
    cfg = parse_config(InferenceConfig, argv, "feature_sd_inference")
    refuse_combinations(cfg)
    return answer_data_set(cfg) if cfg.is_data_set else answer_sample(cfg)


def answer_sample(cfg: InferenceConfig) -> dict[str, Any]:
    """Answer one sample speculatively and plainly; returns the written JSON."""
    from feature_alignment.storage.processes import check_device, check_writable

    check_device(cfg.device)
    sample = choose_sample(cfg)
    out = cfg.out / "sd" / f"{sample.id}.json"
    check_writable(out)
    from feature_alignment.decoding.sources import drafter_files
    from feature_alignment.decoding.speculative_pair import SpeculativePair
    from feature_alignment.decoding.trace import print_trace
    from feature_alignment.storage.artifacts import provenance
    from feature_alignment.storage.files import write_hashed_json

    pair = SpeculativePair(cfg)
    generation, alone = decode_both_ways(pair, sample)
    files: dict[str, Path | Sequence[Path]] = {"target": cfg.target_id, "draft": cfg.draft_id, **drafter_files(cfg)}
    made_from = files | {"clip": [sample.events, sample.video]}
    result = {
        "meta": provenance("feature_sd_inference", cfg, made_from),
        "sample": {"id": sample.id, "question": sample.question, "events": str(sample.events), "video": str(sample.video)},
        "text": pair.text_of(generation.token_ids),
        **generation.to_json(),
        "plain_text": pair.text_of(alone.token_ids),
        "plain_ms": alone.total_ms,
        # Two sampled answers can only be compared if they share their noise.
        "exact_match": generation.token_ids == alone.token_ids if not cfg.temperature or cfg.adaptive else None,
    }
    write_hashed_json(out, result)
    print(f"question  {sample.question}\nanswer    {result['text']}")
    if not result["exact_match"]:
        print(f"plain     {result['plain_text']}")
    print_trace(generation, pair.target.tokenizer.decode, cfg.verbose)
    print_summary(result, generation, alone, out)
    return result


def decode_both_ways(pair: SpeculativePair, sample: Sample) -> tuple[Generation, Generation]:
    """Decode the answer speculatively and by the target alone, each twice: the first run warms up and trains the adaptive draft length.

    Each run encodes the clip itself, so that both times include vision.

    Args:
        pair: Both models and the drafter.
        sample: Clip and question.

    Returns:
        The speculative generation and the plain one, both of the second run.
    """
    prompts = pair.prepare(sample)
    for _ in range(2):
        pair.forget_clips()
        alone = pair.decode_plainly(prompts)
        pair.forget_clips()
        generation = pair.decode(prompts)
    return generation, alone


def print_summary(result: dict[str, Any], generation: Generation, alone: Generation, out: Path) -> None:
    """Print text, speed and the path of the result as one line of JSON.

    Args:
        result: Written JSON.
        generation: Speculative generation.
        alone: Generation of the target alone.
        out: Written file.
    """
    print_json_line(
        {
            "text": result["text"],
            "exact_match": result["exact_match"],
            "tokens": len(generation.token_ids),
            "tokens_per_pass": round(generation.tokens_per_pass, 3) if generation.passes else None,
            "ms": round(generation.total_ms, 2),
            "plain_ms": round(alone.total_ms, 2),
            "written": str(out),
        }
    )


# ------------------------------------------------------------------------------------------------------------ a whole data set


def answer_data_set(cfg: InferenceConfig) -> dict[str, Any]:
    """Answer every sample that has no row yet, or merge shards.

    Returns:
        the meta of the file of answers

    Raises:
        UserError: at the end, if samples could not be read
    """
    from feature_alignment.inputs.clip_folder import read_data_set
    from feature_alignment.models.batches import plan_batches
    from feature_alignment.models.loading import fetch_checkpoints
    from feature_alignment.storage.answer_rows import Asked, merge_answers
    from feature_alignment.storage.artifacts import provenance
    from feature_alignment.storage.processes import check_device, check_writable, exclusive_lock
    from feature_alignment.storage.shards import parse_shard, shard_name

    shard, of = parse_shard(cfg.shard, cfg.merge)
    if not cfg.merge:  # a merge works without the GPU that the shards ran on
        check_device(cfg.device)
    name = cfg.split or (cfg.clips.resolve().name if cfg.clips else "") or "clips"
    samples = read_data_set(cfg, name, cfg.clips, cfg.question)
    fetch_checkpoints(cfg)
    identity, made_from = identity_of(cfg)
    parts = plan_batches(samples, cfg.batch_size)[shard - 1 :: of]
    if not parts:
        raise UserError(f"--shard {cfg.shard}: {len(samples)} samples, {cfg.batch_size} at once, leave none; expected fewer shards.")
    out = cfg.out / "sd" / f"{shard_name(name, shard, of) if cfg.shard else name}.jsonl"
    check_writable(out)
    with exclusive_lock(out):
        if cfg.merge:
            asked = [Asked(s.id, s.question) for s in samples]
            meta = provenance("feature_sd_inference", cfg, made_from, identity)
            file = merge_answers(out, identity, asked, meta, resume=cfg.resume, ignore_code=cfg.ignore_code)
            return report(file, None)
        return fill(cfg, name, out, [[samples[i] for i in part] for part in parts], identity, made_from)


def identity_of(cfg: InferenceConfig) -> tuple[RunIdentity, Sources]:
    """The identity of a run over a data set apart from its samples, which are compared row by row, and the files that it is made from."""
    from feature_alignment.decoding.shared_adapter import check_shared_adapter
    from feature_alignment.decoding.sources import drafter_files
    from feature_alignment.storage.identity import identity_of

    check_shared_adapter(cfg)
    sources: dict[str, Path | Sequence[Path]] = {"target": cfg.target_id, "draft": cfg.draft_id}
    sources |= drafter_files(cfg)
    if cfg.split is not None and cfg.clips is None:
        sources["manifest"] = cfg.manifests[cfg.split]
    of_samples = ("split", "sample", "events", "video", "question", "clips", "limit")
    without = [*of_samples, "threads", "merge", "fail_fast", "verbose", *(() if cfg.random_weights or cfg.temperature else ("seed",))]
    any_gpu = dataclasses.replace(cfg, device=cfg.device.partition(":")[0])  # shards may run on several GPUs of one machine
    identity = identity_of("feature_sd_inference", any_gpu, sources, without=without)
    return dataclasses.replace(identity, not_compared=frozenset({"manifest"})), sources


def fill(
    cfg: InferenceConfig, name: str, out: Path, groups: Sequence[Sequence[Sample]], identity: RunIdentity, made_from: Sources
) -> dict[str, Any]:
    """Answer the missing samples of `groups` into `out`; those of a group are decoded together. Returns the meta.

    Args:
        cfg: settings
        name: of the data set
        out: file of answers
        groups: samples of this run
        identity: identity of this run
        made_from: files that it is made from
    """
    from feature_alignment.inputs.row_identity import identify
    from feature_alignment.storage.answer_rows import AnswersFile, Asked
    from feature_alignment.storage.artifacts import provenance

    flat = [sample for group in groups for sample in group]
    hash_of = {
        row["id"]: row["identity"]["row"]
        for row in identify(flat, [range(len(flat))], cfg.clips or cfg.manifests[name], cfg.event_start_ms)
    }
    asked = [[Asked(sample.id, sample.question, hash_of[sample.id]) for sample in group] for group in groups]
    file = AnswersFile(out, identity, asked, resume=cfg.resume, limited=cfg.limit is not None, ignore_code=cfg.ignore_code)
    if file.is_complete:
        log.info("reused  %s: unchanged are %s, and all %d samples", out, identity.compared(cfg.ignore_code), len(flat))
        return report(file, None)
    from feature_alignment.decoding.answer_all import answer_missing
    from feature_alignment.decoding.speculative_pair import SpeculativePair

    pair = SpeculativePair(cfg, trial=False)
    log.info("answer  %s: %d of %d samples to do", name, len(flat) - len(file.rows), len(flat))
    file.begin(provenance("feature_sd_inference", cfg, made_from, file.identity))
    with_hashes = [[(sample, hash_of[sample.id]) for sample in group] for group in groups]
    totals, seconds = answer_missing(pair, file, with_hashes, name, cfg.fail_fast)
    file.finish()
    return report(file, totals.tokens / seconds)


def report(file: AnswersFile, tokens_per_s: float | None) -> dict[str, Any]:
    """Print the totals of a finished file as one line of JSON; returns its meta.

    Args:
        file: complete
        tokens_per_s: of the samples that this run answered; None if it answered none

    Raises:
        UserError: samples could not be read
    """
    from feature_alignment.decoding.answer_all import Totals

    rows = file.ordered_rows
    totals = Totals().add(rows)
    print_json_line(
        {
            "samples": len(rows),
            "failed": totals.failed,
            "tokens": totals.tokens,
            "tokens_per_pass": round(totals.tokens_per_pass, 4),
            "mean_accepted": round(totals.mean_accepted, 4),
            "tokens_per_s": tokens_per_s,
            "written": str(file.path),
        }
    )
    if failed := [row for row in rows if "error" in row]:
        raise UserError(
            f"{len(failed)} of {len(rows)} samples could not be answered; their rows in {file.path} hold the errors. The first, "
            f"{failed[0]['id']}: {failed[0]['error']}\nRepair the files and run "
            + ("every shard, then --merge, again" if "merged_shards" in file.meta else "the same command again")
            + ": only these, and those of their batch, are answered."
        )
    return file.meta


if __name__ == "__main__":
    run(main)
