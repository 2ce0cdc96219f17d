#!/usr/bin/env bash
# Compares the paper's methods on Anthropic-HH with a pretrained model of 135M parameters: configs/compare_hh_gpu.yaml.
# Makes the environment, fetches the data once, and goes on where it was stopped. EXTRAS=cuda installs JAX for GPUs.
# Arguments go to rpo_jax.compare, as in: bash scripts/compare_gpu.sh --report
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

data=runs/data/hh-harmless-base.jsonl
if [ ! -f "$data" ]; then
  mkdir -p "$(dirname "$data")"
  "$python" -c 'import sys, datasets
datasets.load_dataset("Anthropic/hh-rlhf", data_dir="harmless-base", split="train").to_json(sys.argv[1])' "$data.part"
  mv "$data.part" "$data"
fi
"$python" -m rpo_jax.compare --config configs/compare_hh_gpu.yaml --out runs/compare_hh_gpu "$@"
