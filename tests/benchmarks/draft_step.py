"""What one draft token of the chained adapter costs: folded (as in decoding) and unfolded (the adapter as it was trained), in turns.

    python tests/benchmarks/draft_step.py                       # random weights: demo size, and width 4096 with 32,000 ids
    python tests/benchmarks/draft_step.py --outputs outputs/demo    # also a finished run: equal draft tokens, cost in the decoding loop

One thread. `with head` includes logits and argmax. The unfolded way is the reference: it is kept here, not in the package.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from feature_alignment.adapters.chained import ChainedAdapter, EventKeyValues, load_chained_adapter, text_batches
from feature_alignment.adapters.folded import FoldedChain
from feature_alignment.cli.console import print_json_line, print_table, run
from feature_alignment.decoding.chained_proposer import ChainedProposer
from feature_alignment.decoding.proposers import Draft, Proposer
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.models.state import Prompt
from feature_alignment.storage.files import load_pt
from feature_alignment.storage.hidden_states import load_hidden_states

SIZES = {  # d_target, d_event, event tokens, vocabulary
    "embedded pair": (160, 160, 42, 1024),
    "width 4096": (4096, 4096, 582, 32_000),
}
BLOCK, TIES = 8, 1e-4


class Unfolded:
    """The chained adapter as it was trained: a predicted state for every draft token, then the target's head."""

    def __init__(self, adapter: ChainedAdapter, head: Tensor, embeddings: Tensor, seen: EventKeyValues) -> None:
        self.adapter, self.head, self.tokens, self.seen = adapter, head, adapter.tokens(embeddings), seen

    def step(self, state: Tensor, token: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Read a state [b, d_target] and its token [b]; returns the memory [b, w] and the next predicted state [b, d_target]."""
        memory = self.adapter.read(state[:, None], self.tokens[token][:, None], memory)[:, -1]
        return memory, self.adapter.predict(memory[:, None], self.seen)[:, 0]

    def logits(self, state: Tensor) -> Tensor:
        return state @ self.head.T


@torch.inference_mode()
def in_turns(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each call; the calls take turns for about so many seconds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 8:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(found[3:]) for name, found in times.items()}


@torch.inference_mode()
def cost(name: str, seconds: float) -> dict[str, float]:
    """Milliseconds of one draft token at a size, with random weights."""
    d_target, d_event, num_events, vocabulary = SIZES[name]
    torch.manual_seed(0)
    adapter = ChainedAdapter(d_target, d_event, num_events).eval()
    head, embeddings = torch.randn(vocabulary, d_target) * d_target**-0.5, torch.randn(vocabulary, d_target)
    seen = adapter.encode_events(torch.randn(1, num_events, d_event))
    old, new = Unfolded(adapter, head, embeddings, seen), FoldedChain(adapter, head, embeddings)
    context = new.context(seen)
    memory, token = torch.randn(1, adapter.geometry["width"]), torch.tensor([5])
    state, z = torch.randn(1, d_target), torch.randn(1, adapter.geometry["width"])

    def folded_step() -> Tensor:
        return new.expect(new.go_on(z, token, memory), context)

    def block() -> Tensor:
        m, best, hidden = memory, token, z
        for _ in range(BLOCK):
            m = new.go_on(hidden, best, m)
            hidden = new.expect(m, context)
            best = new.logits(hidden).argmax(-1)
        return best

    ms = in_turns(
        {
            "unfolded": lambda: old.step(state, token, memory),
            "folded": folded_step,
            "unfolded with head": lambda: old.logits(old.step(state, token, memory)[1]).argmax(-1),
            "folded with head": lambda: new.logits(folded_step()).argmax(-1),
            "folded with head, a block of 8": block,
        },
        seconds,
    )
    ms["folded with head, a block of 8"] /= BLOCK
    return ms


@torch.inference_mode()
def differences(outputs: Path, steps: int = 5) -> dict[str, object]:
    """Draft tokens of both ways, chained from every position of a run's test texts, each way reading its own draft tokens.

    Args:
        outputs: output directory of a run with a chained adapter
        steps: draft tokens of a chain
    """
    folder = outputs / "hidden_states"
    adapter, _ = load_chained_adapter(outputs / "chained_adapter" / "adapter.pt")
    head, embeddings = (load_pt(folder / f"{name}.pt", "run_all.sh").float() for name in ("vl_lm_head", "vl_embeddings"))
    old_tokens, new = adapter.tokens(embeddings), FoldedChain(adapter, head, embeddings)
    states = load_hidden_states(folder / "test", events=True)
    compared, gaps = 0, []
    for texts in text_batches(states, torch.arange(len(states.mask)).split(1), "cpu"):
        n = int(texts.mask.sum()) - 1
        if n < 1:
            continue
        seen = adapter.encode_events(texts.events)
        old, context = Unfolded(adapter, head, embeddings, EventKeyValues(*(x.expand(n, -1, -1, -1) for x in seen))), new.context(seen)
        context = type(context)(*(x.expand(n, *x.shape[1:]) for x in context))
        old_memory = adapter.read(texts.states[:, :n], old_tokens[texts.token_ids[:, :n]], None)[0]
        new_memory = new.read(texts.states[:, :n], texts.token_ids[:, :n], None)[0]
        state, z = adapter.predict(old_memory[:, None], old.seen)[:, 0], new.expect(new_memory, context)
        same = torch.ones(n, dtype=torch.bool)
        for _ in range(steps):
            a, b = old.logits(state), new.logits(z)
            differs = same & (a.argmax(-1) != b.argmax(-1))
            for logits in a[differs]:
                best = logits.topk(2).values
                gaps.append(float(best[0] - best[1]))
            compared += int(same.sum())
            same &= ~differs
            old_memory, state = old.step(state, a.argmax(-1), old_memory)
            new_memory = new.go_on(z, b.argmax(-1), new_memory)
            z = new.expect(new_memory, context)
    return {"compared": compared, "different": len(gaps), "logit_gaps": gaps, "only_ties": all(gap < TIES for gap in gaps)}


class Recorder(Proposer):
    """A chained drafter that keeps what each round asked of it."""

    def __init__(self, proposer: ChainedProposer) -> None:
        self._proposer, self.calls = proposer, list[tuple[list[int], Tensor, int]]()

    def start(self, prompt: Prompt, watch: Stopwatch) -> None:
        self._proposer.selector = self.selector
        self._proposer.start(prompt, watch)

    def propose(self, emitted: Sequence[int], states: Tensor, num_tokens: int, watch: Stopwatch, confidence_floor: float = 0.0) -> Draft:
        self.calls.append((list(emitted), states.clone(), num_tokens))
        return self._proposer.propose(emitted, states, num_tokens, watch, confidence_floor)


@torch.inference_mode()
def live(outputs: Path, config: Path, prompts: int) -> dict[str, float]:
    """Milliseconds of a draft token while a finished run's pair decodes, and in loops of their own, in turns.

    Each loop repeats the rounds of one answer: `same work` reads the round's accepted tokens and drafts, as decoding does, without the
    target's pass in between; `drafting only` drafts as many tokens from one memory.
    """
    from feature_alignment.benchmark_feature_sd import BenchmarkConfig
    from feature_alignment.cli.config import parse_config
    from feature_alignment.decoding.engine import speculate
    from feature_alignment.decoding.sources import Sources
    from feature_alignment.inputs.samples import read_samples
    from feature_alignment.models.pair import load_pair

    argv = ["--config", str(config), "--output_dir", str(outputs), "--threads", "1"]
    cfg = parse_config(BenchmarkConfig, argv, "benchmark_feature_sd")
    pair = load_pair(cfg)
    proposer = Sources(pair, cfg).open("chained")
    assert isinstance(proposer, ChainedProposer)
    samples = read_samples(cfg.manifests, "test")[:: max(1, 64 // prompts)][:prompts]
    ready = [(pair.target.prepare(s), pair.draft.prepare(s)) for s in samples]
    ms: dict[str, list[float]] = {"live": [], "same work": [], "drafting only": []}
    drafted = 0
    for repeat in range(6):
        for prompt, draft_prompt in ready:
            recorder = Recorder(proposer)
            got = speculate(pair.target, recorder, prompt, draft_prompt, num_draft_tokens=BLOCK, cosines=False)
            again = Stopwatch(pair.target.device)
            proposer._begin(proposer.event_context)
            drafts = [proposer.propose(*call, again).token_ids for call in recorder.calls]
            assert [d.tolist() for d in drafts] == [r.proposed for r in got.rounds if r.proposed]
            start = time.perf_counter()
            for draft in drafts:
                proposer.redraft(len(draft))
            if repeat:  # the first turn warms up
                drafted += sum(map(len, drafts))
                ms["drafting only"].append((time.perf_counter() - start) * 1e3)
                ms["same work"].append(sum(again.ms.values()))
                ms["live"].append(got.ms["read"] + got.ms["adapter"])
    found = {name: sum(times) / drafted for name, times in ms.items()}
    return found | {f"live / {name}": found["live"] / found[name] for name in ("same work", "drafting only")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, help="output directory of a finished run, for example outputs/demo")
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--seconds", type=float, default=10.0, help="for each size")
    parser.add_argument("--prompts", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, object] = {name: cost(name, args.seconds) for name in SIZES}
    columns = list(next(iter(found.values())))  # type: ignore[call-overload]
    print_table("one draft token, ms (medians)", ("size", *columns), [(n, *(f"{ms[c]:.3f}" for c in columns)) for n, ms in found.items()])
    if args.outputs:
        found["tokens"] = differences(args.outputs)
        found["decoding loop"] = live(args.outputs, args.config, args.prompts)
    print_json_line(found)


if __name__ == "__main__":
    run(main)
