"""Where the time of a decoding step goes on a GPU: a LLaMA of 7B geometry with random weights, 2,110 tokens read, batch 1.

    python tests/benchmarks/steps.py

Prints milliseconds by the number of tokens and the way steps run, then the kernels of a step of 1 and of 6 tokens.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from geometry_7b import LLAMA_7B
from transformers import LlamaConfig, LlamaForCausalLM

from feature_alignment.benchmark.timing import step_ms
from feature_alignment.cli.console import UserError, print_json_line, print_table, run
from feature_alignment.models import fixed
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.state import Prompt

NUMBERS = (1, 2, 4, 6, 9, 13)


def decoder() -> Decoder:
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_7B, vocab_size=32_000, max_position_embeddings=4096)).eval()
    torch.set_default_dtype(torch.float32)
    embed = lambda ids, _: model.model.embed_tokens(ids)  # noqa: E731
    return Decoder(model.model, model.lm_head, None, None, None, lambda pixels: pixels, embed, placeholder=1, vision_tokens=1)


@torch.inference_mode()
def kernels(model: Decoder, prompt: Prompt, number: int) -> list[tuple[str, int, float]]:
    """Name, launches and microseconds of each kernel in one step of `number` tokens, the slowest first."""
    state, ids = model.prefill([prompt]), torch.full((1, number), 5, device="cuda")
    for _ in range(3):
        model.step(state, ids)
        model.rollback(state, number)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        model.step(state, ids)
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name[:90]].append(event.device_time)
    return sorted(((name, len(us), sum(us)) for name, us in found.items()), key=lambda row: -row[2])


def main() -> None:
    if not torch.cuda.is_available():
        raise UserError("torch sees no GPU here; this measures one.")
    model, prompt = decoder(), Prompt(torch.randint(3, 32_000, (2110,)), torch.zeros(1))
    rows, found = [], {}
    for steps in ("eager", "graphs", "compiled"):
        model.use_steps(steps)
        ms = step_ms(model, prompt, NUMBERS, repeats=20)
        rows.append((steps, *(f"{ms[k]:.3f} ({ms[k] / ms[1]:.3f})" for k in NUMBERS)))
        found[steps] = ms
    print_table("a step without its head, ms (in steps of one token)", ("tokens", *map(str, NUMBERS)), rows)
    for number in (1, 6):
        listed = kernels(model, prompt, number)
        shown = [(name, str(n), f"{us:.0f}") for name, n, us in listed[:14]]
        print_table(f"{number} tokens, compiled: {sum(us for *_, us in listed):.0f} us in kernels", ("kernel", "launches", "us"), shown)
    print_json_line({"ms": found, "eager_fallbacks": fixed.eager_fallbacks})


if __name__ == "__main__":
    run(main)
