"""What adapters are worth on states they were not trained on: another text, and the running decoder.

    python feature_alignment/extract_hidden_states.py --config configs/demo.yaml --split test --prefix drafter \\
        --output_dir outputs/drafter_prefix
    python tests/benchmarks/served.py

Both adapters learnt on Video-LLaVA's own texts (`--prefix verifier`). Here they read the test clips with those texts, with EventGPT's
texts, and in decoding itself, where the acceptance that is served must be the acceptance that was measured offline on the same clips.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from feature_alignment.benchmark.rows import acceptance_of
from feature_alignment.benchmark.timing import Timed
from feature_alignment.cli.config import parse_config
from feature_alignment.cli.console import print_json_line, print_table, run
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.sources import Sources
from feature_alignment.feature_sd_inference import InferenceConfig
from feature_alignment.inputs.samples import read_samples
from feature_alignment.measurement import scoring
from feature_alignment.measurement.reports import PredictorRates
from feature_alignment.models.pair import load_pair
from feature_alignment.storage.files import load_pt
from feature_alignment.storage.hidden_states import load_hidden_states


def offline(folder: Path, sources: Sources, drafts: int, ids: set[str] | None = None) -> dict[str, PredictorRates]:
    """Rates of the hidden and the chained adapter on one folder of states; ids: of these samples only."""
    states = load_hidden_states(folder, events=True)
    if ids is not None:
        rows = [i for i, r in enumerate(states.rows) if r["id"] in ids]
        some = {k: getattr(states, k)[rows] for k in ("draft", "target", "token_ids", "mask", "lengths")}
        some |= {"events": states.events_of(torch.tensor(rows)), "clip_index": None}
        states = dataclasses.replace(states, rows=[states.rows[i] for i in rows], **some)
    head, embeddings = (load_pt(folder.parent / f"{name}.pt", "extraction").float() for name in ("vl_lm_head", "vl_embeddings"))
    hidden = scoring.score({"hidden": lambda some: sources.adapter(some.draft)}, states, head)["hidden"]
    chained, valid = scoring.chain_scores(sources.chained_adapter, states, head, embeddings, drafts)
    return {
        "aligned": scoring.rates(hidden, states.mask, states, drafts),
        "chained": scoring.rates(chained, valid, states, drafts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--drafter_prefix", type=Path, default=Path("outputs/drafter_prefix"))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--drafts", type=int, default=5)
    args = parser.parse_args()
    cfg = parse_config(InferenceConfig, ["--config", "configs/demo.yaml", "--output_dir", str(args.run)], "feature_sd_inference")
    pair = load_pair(cfg)
    sources, samples = Sources(pair, cfg), read_samples(cfg.manifests, "test")
    samples = [samples[i * len(samples) // args.prompts] for i in range(args.prompts)]
    verifier, drafter = (folder / "hidden_states" / "test" for folder in (args.run, args.drafter_prefix))
    measured = {
        "verifier's texts": offline(verifier, sources, args.drafts),
        "drafter's texts": offline(drafter, sources, args.drafts),
        f"verifier's texts of {args.prompts} prompts": offline(verifier, sources, args.drafts, {s.id for s in samples}),
    }
    lines, gaps = [], {}
    for name in ("aligned", "chained"):
        for where, found in measured.items():
            r = found[name]
            lines.append((f"{name}, {where}", *(rate.text(3) for rate in (r.cosine, r.token_match, r.acceptance_rate))))
        proposer, timed = sources.open(name), Timed()
        for sample in samples:
            prompts = pair.target.prepare(sample), pair.draft.prepare(sample)
            run_ = speculate(pair.target, proposer, *prompts, num_draft_tokens=args.drafts, max_new_tokens=cfg.max_new_tokens)
            timed.generations.append([run_])
        served = acceptance_of(timed, [s.sequence for s in samples], "token")
        lines.append((f"{name}, served to these prompts", "-", "-", served.text(3)))
        gaps[name] = served.value / found[name].acceptance_rate.value - 1
    print_table(
        f"adapters off their training texts, {args.drafts} drafts a round", ("drafts", "cosine", "token match", "acceptance rate"), lines
    )
    for name, gap in gaps.items():
        print(f"  {name}: served acceptance is {gap:+.2%} of what was measured offline on the same prompts")
    print_json_line({"gap": gaps})


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(main)
