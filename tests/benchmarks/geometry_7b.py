"""Directories with the released pair's geometry and no weights, for `--random_weights`: speed and memory on a GPU, nothing else.

    python tests/benchmarks/geometry_7b.py outputs/geometry_7b
    python -m feature_alignment.demo.scenes
    bash run_all.sh outputs/geometry_7b/random_7b.yaml
    python feature_alignment/benchmark_feature_sd.py --config outputs/geometry_7b/random_7b.yaml --steps graphs \\
        --planted_acceptance 0.6 0.7 0.8 --num_draft_tokens 1 2 3 5 8 12

The last one measures wall clock alone: a step of Video-LLaVA and its share of the memory bandwidth, v(k), the adapters, EventGPT's exits,
and the speed-up where drafts are kept by chance at the given rates.

Configs are the released ones, the vocabulary is the embedded pair's (the released tokenizers are not ours to copy), so prompts have a
few text tokens more or less; vision tokens, widths, depths and embedding rows are those of the 7B pair.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from feature_alignment.cli.console import run

LLAMA_7B = dict(hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32)
CLIP_L = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14, projection_dim=768)
CONFIG = """\
common:
  target_id: {out}/video_llava
  draft_id: {out}/eventgpt
  manifests:
    train: outputs/demo/scenes/train.jsonl
    validation: outputs/demo/scenes/validation.jsonl
    test: data/demo/test.jsonl
  device: cuda
  dtype: bfloat16
  random_weights: true
  draft_layers: [2]
  limit: 16
extract_hidden_states: {{max_new_tokens: 32, batch_size: 4}}
train_hidden_adapter: {{num_epochs: 2}}
train_hidden_adapter.chained: {{bottleneck: 192}}
feature_sd_inference: {{max_new_tokens: 32}}
benchmark_feature_sd: {{max_new_tokens: 32, limit: 4}}
"""


def write_geometry(out: Path, tokenizers: dict) -> None:
    """`out`/eventgpt, `out`/video_llava and a config for both. tokenizers: of the "draft" and the "target"."""
    from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from feature_alignment.models.eventgpt import EventGPTConfig

    draft = EventGPTConfig(**LLAMA_7B, vocab_size=32_000, max_position_embeddings=4096)
    image, video = tokenizers["target"].convert_tokens_to_ids(["<image>", "<video>"])
    text = LlamaConfig(**LLAMA_7B, vocab_size=32_064, max_position_embeddings=4096)
    target = VideoLlavaConfig(vision_config=CLIPVisionConfig(**CLIP_L), text_config=text, image_token_index=image, video_token_index=video)
    for name, config, tokenizer in (("eventgpt", draft, tokenizers["draft"]), ("video_llava", target, tokenizers["target"])):
        config.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    CLIPImageProcessorPil().save_pretrained(out / "video_llava")
    (out / "random_7b.yaml").write_text(CONFIG.format(out=out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    from feature_alignment.demo.students import tokenizers

    write_geometry(out, tokenizers())


if __name__ == "__main__":
    run(main)
