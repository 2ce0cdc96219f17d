#!/usr/bin/env bash
# Makes the environment, trains a small model by SFT and then by RPO on the bundled preferences, and shows what it
# learnt. A second run reuses the environment, the SFT model, the embeddings and the reference log-probs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
runs=runs/quickstart

"$python" -m rpo_jax.train --config configs/quickstart_sft.yaml --resume auto
"$python" -m rpo_jax.export --run $runs/sft --out $runs/sft/hf --overwrite
"$python" -m rpo_jax.train --config configs/quickstart.yaml --overwrite
"$python" -m rpo_jax.export --run $runs/rpo --out $runs/rpo/hf --overwrite
"$python" scripts/quickstart_report.py
