"""Directories with the released pair's geometry and no weights, for `--random_weights`: speed and memory on a GPU, nothing else.

    python tests/benchmarks/geometry_7b.py outputs/geometry_7b
    python -m feature_alignment.demo.scenes
    bash run_all.sh outputs/geometry_7b/random_7b.yaml
    bash tests/benchmarks/gpu_report.sh

The last one measures wall clock alone: a step of Video-LLaVA and its share of the memory bandwidth, v(k), the adapters, EventGPT's exits,
and the speed-up where draft tokens are accepted at random. `--size small` writes a geometry of seconds on the CPU, which tests that script.

Configs are the released ones, the vocabulary is the embedded pair's (the released tokenizers are not ours to copy), so prompts have a
few text tokens more or less; vision tokens, widths, depths and embedding rows are those of the 7B pair.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from feature_alignment.cli.console import run

DEMO = Path(__file__).resolve().parents[2] / "data" / "demo"
LLAMA_7B = dict(hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32)
CLIP_L = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14, projection_dim=768)
SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2)
SMALL_CLIP = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
CONFIG = """\
common:
  target_id: {out}/video_llava
  draft_id: {out}/eventgpt
  manifests:
    train: outputs/demo/scenes/train.jsonl
    validation: outputs/demo/scenes/validation.jsonl
    test: data/demo/test.jsonl
  device: {device}
  dtype: {dtype}
  random_weights: true
  draft_layers: [2]
  limit: 16
extract_hidden_states: {{max_new_tokens: 32, batch_size: 4}}
train_hidden_adapter: {{num_epochs: 2}}
train_hidden_adapter.chained: {{bottleneck: 192}}
feature_sd_inference: {{max_new_tokens: 32}}
benchmark_feature_sd: {{max_new_tokens: 32, limit: 4}}
"""


def write_geometry(out: Path, tokenizers: dict, size: str = "7b") -> None:
    """Write `out`/eventgpt, `out`/video_llava and a config for both.

    Args:
        out: directory
        tokenizers: of the "draft" and the "target"
        size: "7b", for a GPU, or "small", for the CPU
    """
    from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from feature_alignment.models.eventgpt import EventGPTConfig

    is_small = size == "small"
    llama, clip, rows, target_rows = (SMALL, SMALL_CLIP, 1024, 1088) if is_small else (LLAMA_7B, CLIP_L, 32_000, 32_064)
    shape = dict(**llama, max_position_embeddings=4096)
    draft = EventGPTConfig(**shape, vocab_size=rows, vision_config=clip if is_small else None)  # None: CLIP-L/14-336, as released
    image, video = tokenizers["target"].convert_tokens_to_ids(["<image>", "<video>"])
    text, vision = LlamaConfig(**shape, vocab_size=target_rows), CLIPVisionConfig(**clip)
    target = VideoLlavaConfig(vision_config=vision, text_config=text, image_token_index=image, video_token_index=video)
    for name, config, tokenizer in (("eventgpt", draft, tokenizers["draft"]), ("video_llava", target, tokenizers["target"])):
        config.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    side = vision.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor.save_pretrained(out / "video_llava")
    device, dtype = ("cpu", "float32") if is_small else ("cuda", "bfloat16")
    (out / f"random_{size}.yaml").write_text(CONFIG.format(out=out, device=device, dtype=dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=("7b", "small"), default="7b")
    args = parser.parse_args()
    from feature_alignment.models.preprocessing import load_tokenizer

    tokenizers = {role: load_tokenizer(DEMO / name) for role, name in (("draft", "eventgpt"), ("target", "video_llava"))}
    write_geometry(args.out, tokenizers, args.size)


if __name__ == "__main__":
    run(main)
