"""Two questions about the chained adapter's draft tokens on a finished run; one thread.

    python tests/benchmarks/chained_draft.py bfloat16     do folding and bfloat16 change which tokens are drafted?
    python tests/benchmarks/chained_draft.py gap          why does a draft token cost more during decoding than in a loop of its own?

Both read the outputs of `bash run_all.sh`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path

import torch
from draft_step import Unfolded
from torch import Tensor

from feature_alignment.adapters.chained import ChainedAdapter, EventKeyValues, Texts, load_chained_adapter, text_batches
from feature_alignment.adapters.folded import EventContext, FoldedChain
from feature_alignment.cli.console import print_json_line, print_table, run
from feature_alignment.storage.files import load_pt
from feature_alignment.storage.hidden_states import load_hidden_states

STEPS = 5  # draft tokens of a chain
LENGTHS = (3, 5, 8)
REFERENCE = "unfolded, float32"


class Way:
    """One way to compute the chain. The weights are rounded to bfloat16 in all of them, so only the arithmetic differs."""

    def __init__(self, adapter: ChainedAdapter, head: Tensor, embeddings: Tensor, dtype: torch.dtype, folded: bool) -> None:
        self.adapter, self.dtype, self.folded = adapter, dtype, folded
        self.head, self.embeddings = head.to(dtype), embeddings.to(dtype)
        self.chain, self.tokens = FoldedChain(adapter, self.head, self.embeddings), adapter.tokens(self.embeddings)

    def draft(self, texts: Texts, n: int) -> tuple[Tensor, Tensor]:
        """Draft tokens [n, STEPS] from each of the first n positions of one text, and the gap of the two best logits at each."""
        seen = self.adapter.encode_events(texts.events.to(self.dtype))
        states, ids = texts.states[:, :n].to(self.dtype), texts.token_ids[:, :n]
        memory = self.chain.read(states, ids, None)[0] if self.folded else self.adapter.read(states, self.tokens[ids], None)[0]
        tokens: list[Tensor] = []
        gaps = []
        if self.folded:
            context = EventContext(*(x.expand(n, *x.shape[1:]) for x in self.chain.context(seen)))
            z = self.chain.expect(memory, context)
        else:
            old = Unfolded(self.adapter, self.head, self.embeddings, EventKeyValues(*(x.expand(n, -1, -1, -1) for x in seen)))
            z = self.adapter.predict(memory[:, None], old.seen)[:, 0]
        for i in range(STEPS):
            if self.folded:
                if i:
                    memory = self.chain.go_on(z, tokens[-1], memory)
                    z = self.chain.expect(memory, context)
                logits = self.chain.logits(z)
            else:
                if i:
                    memory, z = old.step(z, tokens[-1], memory)
                logits = old.logits(z)
            best = logits.float().topk(2).values
            tokens.append(logits.argmax(-1))
            gaps.append(best[:, 0] - best[:, 1])
        return torch.stack(tokens, 1), torch.stack(gaps, 1)


@torch.inference_mode()
def agreement(outputs: Path) -> dict[str, object]:
    """Draft tokens of every way, chained from every position of a run's test texts, each way reading its own draft tokens.

    Args:
        outputs: output directory of a run with a chained adapter
    """
    folder = outputs / "hidden_states"
    adapter, _ = load_chained_adapter(outputs / "chained_adapter" / "adapter.pt")
    head, embeddings = (load_pt(folder / f"{name}.pt", "run_all.sh").bfloat16() for name in ("vl_lm_head", "vl_embeddings"))
    rounded = adapter.bfloat16()
    exact, _ = load_chained_adapter(outputs / "chained_adapter" / "adapter.pt")
    exact.load_state_dict(rounded.state_dict())  # the rounded weights in float32
    ways = {
        f"{'folded' if folded else 'unfolded'}, {str(dtype).removeprefix('torch.')}": Way(a, head, embeddings, dtype, folded)
        for a, dtype in ((exact, torch.float32), (rounded, torch.bfloat16))
        for folded in (False, True)
    }
    states = load_hidden_states(folder / "test", events=True)
    drafted: dict[str, list[Tensor]] = {name: [] for name in ways}
    real, gaps = [], []
    for texts in text_batches(states, torch.arange(len(states.mask)).split(1), "cpu"):
        n = int(texts.mask.sum()) - STEPS
        if n < 1:
            continue
        real.append(texts.token_ids[0, 1 : n + STEPS].unfold(0, STEPS, 1))
        for name, way in ways.items():
            tokens, gap = way.draft(texts, n)
            drafted[name].append(tokens)
            gaps += [gap] if name == REFERENCE else []
    every = {name: torch.cat(found) for name, found in drafted.items()}
    wanted, gap = torch.cat(real), torch.cat(gaps)
    pairs = {f"{a} | {b}": same_tokens(every[a], every[b], gap) for a, b in itertools.combinations(ways, 2)}
    accepted = {name: same_tokens(found, wanted, gap)["share"] for name, found in every.items()}
    return {"positions": len(wanted), "draft_tokens_per_position": STEPS, "pairs": pairs, "acceptance_rate": accepted}


def same_tokens(a: Tensor, b: Tensor, gap: Tensor) -> dict[str, float | int]:
    """How often two ways draft the same token [n, STEPS], up to and including the first difference of each chain.

    Args:
        a, b: draft tokens
        gap: difference of the reference's two best logits at each
    """
    differs = a != b
    reached = differs.long().cumsum(1) - differs.long() == 0
    at = gap[differs & reached]
    found: dict[str, float | int] = {"compared": int(reached.sum()), "different": len(at)}
    found["share"] = 1 - found["different"] / found["compared"]
    return found | ({"median_gap": float(at.median()), "max_gap": float(at.max())} if len(at) else {})


@torch.inference_mode()
def gap(outputs: Path, config: Path, prompts: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of a draft token: alone, alone but each block after a pass of the target, and live; in turns.

    Args:
        outputs: output directory of a run with a chained adapter
        config: its config
        prompts: number of prompts
    """
    from feature_alignment.benchmark.chain_loop import ChainLoop, repeat_alone
    from feature_alignment.benchmark_feature_sd import BenchmarkConfig
    from feature_alignment.cli.config import parse_config
    from feature_alignment.decoding.engine import speculate
    from feature_alignment.decoding.sources import Sources
    from feature_alignment.inputs.samples import read_samples
    from feature_alignment.models.pair import load_pair

    argv = ["--config", str(config), "--output_dir", str(outputs), "--threads", "1"]
    cfg = parse_config(BenchmarkConfig, argv, "benchmark_feature_sd")
    pair = load_pair(cfg)
    pair.choose_linear()
    proposer = Sources(pair, cfg).open("chained")
    samples = read_samples(cfg.manifests, "test")
    ready = [(pair.target.prepare(s), pair.draft.prepare(s)) for s in samples[:: max(1, len(samples) // prompts)][:prompts]]
    chains = {length: ChainLoop() for length in LENGTHS}
    after_pass: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for repeat in range(3):
        for i, (prompt, _) in enumerate(ready):
            state = pair.target.prefill([prompt])
            for length in LENGTHS:
                run_once = chains[length].after(
                    lambda i, g=length: speculate(pair.target, proposer, *ready[i], num_draft_tokens=g, cosines=False), proposer, length, 64
                )
                run_once(i)
                for _ in range(8):
                    pair.target.lm_head(pair.target.step(state, torch.full((1, length + 1), 5)))
                    pair.target.rollback(state, length + 1)
                    after_pass[length] += [ms for _, ms in repeat_alone(proposer, [0], [length], warm=False)]
        if not repeat:  # a warm-up
            for length in LENGTHS:
                chains[length].rounds.clear()
                after_pass[length].clear()
    found = {}
    for length, chain in chains.items():
        rounds = [r for r in chain.rounds if r.length == length]
        of = {"alone": [r.alone_ms for r in rounds], "alone, after a pass": after_pass[length], "live": [r.live_ms for r in rounds]}
        found[str(length)] = {name: statistics.median(ms) / length for name, ms in of.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bfloat16", "gap"))
    parser.add_argument("--outputs", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--prompts", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "gap":
        found = gap(args.outputs, args.config, args.prompts)
        columns = list(found[str(LENGTHS[0])])
        rows = [(length, *(f"{of[name]:.4f}" for name in columns)) for length, of in found.items()]
        print_table("a chained draft token, ms (medians)", ("draft length", *columns), rows)
        print_json_line(found)
        return
    result = agreement(args.outputs)
    pairs: dict[str, dict[str, float]] = result["pairs"]  # type: ignore[assignment]
    cells = [(name, p["compared"], p["different"], f"{p['share']:.5f}", f"{p.get('max_gap', 0):.4f}") for name, p in pairs.items()]
    print_table("the same draft token", ("ways", "compared", "different", "share", "largest logit gap where different"), cells)
    accepted: dict[str, float] = result["acceptance_rate"]  # type: ignore[assignment]
    print_table("acceptance rate", ("way", ""), [(name, f"{rate:.4f}") for name, rate in accepted.items()])
    print_json_line(result)


if __name__ == "__main__":
    run(main)
