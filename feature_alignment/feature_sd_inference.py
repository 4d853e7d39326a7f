"""Task 3.1. Answer one question: EventGPT drafts from the events, Video-LLaVA verifies on the frames.

reads   both checkpoints, files of the drafter (adapter/adapter.pt, chained_adapter/adapter.pt, token_pairs/<train split>.json),
        one sample of a manifest or --events, --video and --question
writes  sd/<sample id>.json: text, token ids, every round with its drafts, accepted tokens, cosine, extra token, milliseconds

    python feature_alignment/feature_sd_inference.py --config configs/demo.yaml
    python feature_alignment/feature_sd_inference.py --config configs/demo.yaml --events e.npy --video v.mp4 --question "…"
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_alignment.cli.config import parse_config
from feature_alignment.cli.console import UserError, print_json_line, print_table, run
from feature_alignment.decoding.settings import DecodingConfig

if TYPE_CHECKING:
    from feature_alignment.decoding.generation import Generation
    from feature_alignment.decoding.speculative_pair import SpeculativePair
    from feature_alignment.inputs.samples import Sample


@dataclass(frozen=True)
class InferenceConfig(DecodingConfig):
    """Decode one answer speculatively, show every round, and compare it with plain decoding.

    Reads both checkpoints, files of the drafter and one sample; writes sd/<sample id>.json.

    Args:
        split: manifest that holds the sample
        sample: id of the sample (default: the first)
        events: event file to use instead of a sample's, together with --video and --question
        video: video file or folder of frames to use instead of a sample's
        question: question about them
        verbose: print every round with its milliseconds per stage and the reason why drafting stopped, in color on a terminal
    """

    split: str = "test"
    sample: str | None = None
    events: Path | None = None
    video: Path | None = None
    question: str | None = None
    verbose: bool = False


def choose_sample(cfg: InferenceConfig) -> Sample:
    """The sample to answer: from --events, --video and --question if all are given, else from the manifest."""
    from feature_alignment.inputs.samples import Sample, read_samples

    if cfg.events and cfg.video and cfg.question:
        return Sample(id=f"{cfg.video.stem}--{cfg.events.stem}", sequence="user", question=cfg.question, events=cfg.events, video=cfg.video)
    samples = read_samples(cfg.manifests, cfg.split, questions=cfg.questions, allow_outside=cfg.allow_outside)
    if cfg.sample is None:
        return samples[0]
    found = [s for s in samples if s.id == cfg.sample]
    if not found:
        raise UserError(f"no sample {cfg.sample!r} in {cfg.manifests[cfg.split]}; its ids go from {samples[0].id} to {samples[-1].id}.")
    return found[0]


def print_trace(generation: Generation, decode: Callable[[list[int]], str], verbose: bool) -> None:
    """Print the rounds of a generation; in color on a terminal, unless NO_COLOR is set (no-color.org).

    Args:
        generation: Speculative generation.
        decode: Token ids -> text.
        verbose: Print each round with its stages instead of a table.
    """
    from feature_alignment.decoding.trace import legend, styled_tokens, trace_lines

    if verbose:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(f"\nrounds: {legend(color)}", *trace_lines(generation, decode, color), sep="\n")
        return
    rows = [
        (styled_tokens(r, decode, color=False), f"{i + 1}", f"{r.num_accepted}/{len(r.proposed)}", round(sum(r.ms.values()), 2))
        for i, r in enumerate(generation.rounds)
    ]
    print_table(f"rounds: {legend(color=False)}", ("draft tokens", "round", "accepted", "ms"), rows)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script with these arguments, default those of the command line; returns the written JSON."""
    cfg = parse_config(InferenceConfig, argv, "feature_sd_inference")
    from feature_alignment.storage.processes import check_device, check_writable

    check_device(cfg.device)
    sample = choose_sample(cfg)
    out = cfg.out / "sd" / f"{sample.id}.json"
    check_writable(out)
    from feature_alignment.decoding.speculative_pair import SpeculativePair
    from feature_alignment.storage.artifacts import provenance
    from feature_alignment.storage.files import write_hashed_json

    pair = SpeculativePair(cfg)
    generation, alone = decode_both_ways(pair, sample)
    files: dict[str, Path | Sequence[Path]] = {"target": cfg.target_id, "draft": cfg.draft_id, **pair.sources.files(cfg.draft)}
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


if __name__ == "__main__":
    run(main)
