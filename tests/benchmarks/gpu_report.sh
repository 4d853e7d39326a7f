#!/usr/bin/env bash
# The planted table of docs/gpu.md on this machine's GPU: wall clock at 7B geometry with random weights, draft tokens accepted at random
# with probability 0.6, 0.7 and 0.8, draft lengths 3 to 12. Writes planted.json, planted.md and run.txt (what was run) to a new directory.
#
#   bash tests/benchmarks/gpu_report.sh                    7B geometry; writes to data/results/<name of the GPU>_random_7b
#   bash tests/benchmarks/gpu_report.sh OUT [7b|small]     OUT: relative to the repository; small: on the CPU, to test this script
set -euo pipefail
cd "$(dirname "$0")/../.."
size=${2:-7b}
fail() { echo "gpu_report: $*" >&2; exit 2; }
[[ $size =~ ^(7b|small)$ ]] || fail "geometry '$size': expected 7b or small"
gpu=cpu
if [ "$size" = 7b ]; then
  gpu=$(python -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
  [ -n "$gpu" ] || fail "torch sees no GPU here; 7B geometry needs one. Try: bash tests/benchmarks/gpu_report.sh OUT small"
fi
out=${1:-data/results/$(tr 'A-Z -' 'a-z__' <<< "$gpu")_random_7b}
[ ! -e "$out" ] || fail "$out exists; expected a new directory. Name another one: bash tests/benchmarks/gpu_report.sh OUT"
trap 'rm -rf "$out/work"; rmdir "$out" 2>/dev/null || true' EXIT

steps=auto limit=4 tokens=64
if [ "$size" = small ]; then steps=graphs limit=2 tokens=24; fi   # the fixed cache that a GPU uses, uncaptured
command=(python feature_alignment/benchmark_feature_sd.py --config "$out/work/random_$size.yaml" --output_dir "$out/work" --steps "$steps"
  --planted_acceptance 0.6 0.7 0.8 --num_draft_tokens 3 4 5 6 8 10 12 --limit "$limit" --repeats 2 --warmup 1 --max_new_tokens "$tokens")
python tests/benchmarks/geometry_7b.py "$out/work" --size "$size"
"${command[@]}"
mv "$out/work/benchmark/planted.json" "$out/work/benchmark/planted.md" "$out/"
changed=$([ -z "$(git status --porcelain --untracked-files=no)" ] || echo " with changes")
python - "$out" "$SECONDS" "$changed" "${command[*]}" << 'PYTHON' | tee "$out/run.txt"
import json, sys
from pathlib import Path

out, seconds, changed, command = sys.argv[1:]
meta = json.loads((Path(out) / "planted.json").read_text())["meta"]
packages, device = meta["packages"], meta["machine"].get("gpu") or meta["device"]
versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers"))
print(f"{meta['created']}  {device}, {meta['dtype']}, {versions}, commit {meta['git_commit']}{changed}, {seconds} s")
print(command)
PYTHON
