#!/usr/bin/env bash
# Submit a whole run: the shards of every split, their merges, both trainings, then measurement and benchmark. From the repository's folder:
#   bash configs/slurm/submit.sh CONFIG SHARDS
set -euo pipefail
config=${1:?expected CONFIG SHARDS} shards=${2:?expected CONFIG SHARDS}
merges=()
for split in train validation test; do
  extract=$(sbatch --parsable --array="1-$shards" configs/slurm/extract.sbatch "$config" "$split")
  merge=$(sbatch --parsable --dependency="afterok:${extract%%;*}" configs/slurm/merge.sbatch "$config" "$split")
  merges+=("${merge%%;*}")
done
after=$(IFS=:; echo "${merges[*]}")
train=$(sbatch --parsable --dependency="afterok:$after" configs/slurm/train.sbatch "$config")
sbatch --dependency="afterok:${train%%;*}" configs/slurm/benchmark.sbatch "$config"
