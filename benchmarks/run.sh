#!/usr/bin/env bash
# Benchmark rpo_jax beside its peers: bash benchmarks/run.sh [options]; --help lists them.
# bash benchmarks/run.sh real-model [options] compares a real model's numbers instead of speed.
# DEV_PYTHON and PEERS_PYTHON name interpreters to use instead of .venv and .venv-peers.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ -z "${DEV_PYTHON:-}" ]; then
  . "$root/scripts/environment.sh"
  DEV_PYTHON=$python
fi

if [ -z "${PEERS_PYTHON:-}" ]; then
  pins=$root/benchmarks/peers-constraints.txt
  PEERS_PYTHON=$root/.venv-peers/bin/python
  wanted=$(cksum < "$pins")
  if [ "$(cat "$root/.venv-peers/.made-from" 2>/dev/null)" != "$wanted" ]; then
    echo "Making $root/.venv-peers (once; a few minutes) ..."
    [ -x "$PEERS_PYTHON" ] || "${PYTHON:-python3}" -m venv "$root/.venv-peers"
    # torch first and alone: its pin must be settled before another package asks for any torch.
    "$PEERS_PYTHON" -m pip install --quiet --disable-pip-version-check -c "$pins" torch
    "$PEERS_PYTHON" -m pip install --quiet --disable-pip-version-check -c "$pins" trl peft
    echo "$wanted" > "$root/.venv-peers/.made-from"
  fi
fi

cd "$root"
export DEV_PYTHON PEERS_PYTHON
module=benchmarks.suite
if [ "${1:-}" = real-model ]; then
  module=benchmarks.real_model
  shift
fi
exec "$DEV_PYTHON" -m "$module" "$@"
