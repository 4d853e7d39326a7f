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
from typing import TYPE_CHECKING, Any, Literal

from feature_alignment.cli.config import Common, StepsSetting, parse_config
from feature_alignment.cli.console import UserError, print_json_line, print_table, run

if TYPE_CHECKING:
    from feature_alignment.decoding.generation import Generation
    from feature_alignment.decoding.sources import Sources
    from feature_alignment.inputs.samples import Sample
    from feature_alignment.models.decoder import Decoder
    from feature_alignment.models.pair import Pair


@dataclass(frozen=True)
class InferenceConfig(Common):
    """Decode one answer speculatively, show every round, and compare it with plain decoding.

    Reads both checkpoints, files of the drafter and one sample; writes sd/<sample id>.json.

    Args:
        split: manifest that holds the sample
        sample: id of the sample (default: the first)
        events: event file to use instead of a sample's, together with --video and --question
        video: video file or folder of frames to use instead of a sample's
        question: question about them
        draft: drafter: own = EventGPT's own tokens; aligned = its adapted states through the target's head; chained = the chained adapter
            from the target's last state; ngram, template, lookup and previous read no image; hybrid = ngram where it is confident,
            else chained (aligned where no chained adapter has been trained)
        train_split: split whose answers ngram, template and previous are built from
        accept: token is lossless; feature and relaxed accept draft tokens by cosine
        threshold: cosine above which feature and relaxed accept a draft token
        num_draft_tokens: draft tokens per round; with --adaptive the maximum
        adaptive: choose the draft length of each round by expected gain and cost, down to no drafting at all
        overlap: prefill EventGPT in a thread of its own while Video-LLaVA prefills; needs a second core
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
        draft_vocabulary: the chained adapter drafts only this many token ids, the most frequent ones of the training answers; the text
            stays the same, because Video-LLaVA may emit any id. Default: all ids
        verbose: print every round with its milliseconds per stage and the reason why drafting stopped, in color on a terminal
    """

    split: str = "test"
    sample: str | None = None
    events: Path | None = None
    video: Path | None = None
    question: str | None = None
    draft: Literal["own", "aligned", "chained", "hybrid", "ngram", "template", "lookup", "previous"] = "aligned"
    train_split: str = "train"
    accept: Literal["token", "feature", "relaxed"] = "token"
    threshold: float = 0.9
    num_draft_tokens: int = 5
    adaptive: bool = False
    overlap: bool = False
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    min_new_tokens: int | None = None
    repetition_penalty: float | None = None
    stop: list[str] | None = None
    steps: StepsSetting = "auto"
    draft_vocabulary: int | None = None
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
    from feature_alignment.decoding.sources import Sources
    from feature_alignment.models.generation import with_flags
    from feature_alignment.models.pair import load_pair
    from feature_alignment.storage.artifacts import provenance
    from feature_alignment.storage.files import write_hashed_json

    pair = load_pair(cfg)
    pair.use_steps(cfg.steps)
    pair.choose_linear()
    flags = {name: getattr(cfg, name) for name in ("top_p", "top_k", "min_p", "min_new_tokens", "repetition_penalty")}
    pair.target.settings = with_flags(pair.target.settings, **flags, stop_strings=cfg.stop)
    sources = Sources(pair, cfg, cfg.train_split, draft_vocabulary=cfg.draft_vocabulary)
    generation, alone = decode_both_ways(cfg, pair, sources, sample)
    files: dict[str, Path | Sequence[Path]] = {"target": cfg.target_id, "draft": cfg.draft_id, **sources.files(cfg.draft)}
    made_from = files | {"clip": [sample.events, sample.video]}
    result = {
        "meta": provenance("feature_sd_inference", cfg, made_from),
        "sample": {"id": sample.id, "question": sample.question, "events": str(sample.events), "video": str(sample.video)},
        "text": _text(pair.target, generation.token_ids),
        **generation.to_json(),
        "plain_text": _text(pair.target, alone.token_ids),
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


def decode_both_ways(cfg: InferenceConfig, pair: Pair, sources: Sources, sample: Sample) -> tuple[Generation, Generation]:
    """Decode the answer speculatively and by the target alone, each twice: the first run warms up and trains the adaptive draft length.

    Args:
        cfg: Settings.
        pair: Both models.
        sources: Drafters by name.
        sample: Clip and question.

    Returns:
        The speculative generation and the plain one, both of the second run.
    """
    from feature_alignment.decoding.draft_length import DraftLengthController
    from feature_alignment.decoding.engine import speculate
    from feature_alignment.decoding.plain import decode_plainly
    from feature_alignment.decoding.sampling import Sampler

    sampler = Sampler(cfg.temperature, cfg.seed, pair.target.device, shared_noise=cfg.adaptive) if cfg.temperature else None
    proposer = sources.open(cfg.draft, cfg.accept != "token")
    prompt, draft_prompt = pair.target.prepare(sample), pair.draft.prepare(sample)
    controller = DraftLengthController(sources.known_acceptance(cfg.draft)) if cfg.adaptive else None
    for _ in range(2):
        if sampler is not None:
            sampler.restart(cfg.seed)
        alone = decode_plainly(pair.target, prompt, cfg.max_new_tokens, sampler)
        if sampler is not None:
            sampler.restart(cfg.seed)
        generation = speculate(
            pair.target,
            proposer,
            prompt,
            draft_prompt,
            accept=cfg.accept,
            threshold=cfg.threshold,
            num_draft_tokens=cfg.num_draft_tokens,
            max_new_tokens=cfg.max_new_tokens,
            sampler=sampler,
            controller=controller,
            overlap=cfg.overlap,
        )
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


def _text(target: Decoder, token_ids: list[int]) -> str:
    text: str = target.tokenizer.decode(token_ids, skip_special_tokens=True)
    return text


if __name__ == "__main__":
    run(main)
