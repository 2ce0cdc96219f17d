#!/usr/bin/env bash
# Makes the environment, checks style and types, and runs the tests. Arguments go to pytest.
# `scripts/test.sh tpu` runs all tests that compile for TPUs, the long ones too; `scripts/test.sh slow [FILE ...]` runs the
# long tests, of all files or of some, and notes in tests/slow_ledger.json when it did.
# Without arguments the step is compiled for TPUs as well, by libtpu in a folder of its own: in the environment it would
# make every other process look for chips.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

tpu_tests() {
  local libtpu=$root/.venv-libtpu pin
  pin=$("$python" -c 'from rpo_jax.tools.planning.compiled import libtpu_requirement as pin; print(pin())')
  if [ ! -f "$libtpu/.made-from" ] || [ "$(cat "$libtpu/.made-from")" != "$pin" ]; then
    rm -rf "$libtpu"
    if ! "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$libtpu" "$pin"; then
      echo "skipped: the tests that compile for TPUs, because pip could not install $pin (the reason is above)" >&2
      return
    fi
    echo "$pin" > "$libtpu/.made-from"
  fi
  PYTHONPATH=$libtpu TPU_LIBRARY_PATH=$libtpu/libtpu/libtpu.so "$python" -m pytest "$@"
}

tpu_files=(tests/models/test_tpu.py tests/test_plan_tpu.py)
if [ "$*" = tpu ]; then
  tpu_tests "${tpu_files[@]}" -m "slow or not slow" -s
  exit
fi
if [ "${1:-}" = slow ]; then
  shift
  ledger=(-m slow --timeout 0 --ledger tests/slow_ledger.json)
  "$python" -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile "${ledger[@]}" "$@"
  [ $# -gt 0 ] || tpu_tests "${tpu_files[@]}" "${ledger[@]}"
  exit
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
"$(dirname "$python")/basedpyright" --pythonpath "$python"
# Two at a time: most of a test is one thread's compiling.
"$python" -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile "$@"
[ $# -gt 0 ] || tpu_tests tests/models/test_tpu.py
