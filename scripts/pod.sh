#!/usr/bin/env bash
# What every pod of scripts/jobset_*.yaml runs: its own copy of the code, its own environment, one process of the run.
# A pod that is to leave its node (preempted, drained) saves with the others and ends with 143: all start again elsewhere.
#
# Arguments go to rpo_jax.train, with --resume auto: after a restart the run goes on after its newest checkpoint.
#
# SOURCE=FOLDER        the repository on the shared disk, that of this script where not given; copied, so that pods
#                      neither disturb each other nor see later changes
# WORK=FOLDER          where the copy and its environment go (/tmp/rpo_jax)
# CACHE=FOLDER         compiled programs, embeddings and reference log-probs, on the shared disk
# EXTRAS=cuda          optional dependencies to install: cuda or tpu
# COORDINATOR=H:PORT   with NUM_PROCESSES: where process 0 waits; this pod is process JOB_COMPLETION_INDEX. Without it
#                      the processes find each other by what GKE tells TPU pods.
# DRY_RUN=1            print the command and do nothing
set -euo pipefail
trap 'exit 143' TERM # process 1 ignores it else; heeded when the step of the setup that runs has ended
SOURCE=${SOURCE:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
WORK=${WORK:-/tmp/rpo_jax}

: "${CACHE:?error: set CACHE to a folder on the shared disk}"
if [ $# -eq 0 ]; then
  echo "error: nothing to run; give the options of rpo_jax.train, as in --config FILE --run.dir FOLDER." >&2
  exit 2
fi
# Pods wait for each other's nodes and environments, which takes longer than the processes' own 300 seconds.
run=(-m rpo_jax.train --distributed.timeout_seconds 1800 "$@" --resume auto --run.cache_dir "$CACHE")
if [ -n "${COORDINATOR:-}" ]; then
  : "${NUM_PROCESSES:?error: COORDINATOR needs NUM_PROCESSES}" "${JOB_COMPLETION_INDEX:?error: this is no indexed Job}"
  run+=(--distributed.coordinator "$COORDINATOR" --distributed.num_processes "$NUM_PROCESSES")
  run+=(--distributed.process_id "$JOB_COMPLETION_INDEX")
fi

if [ -n "${DRY_RUN:-}" ]; then
  printf 'cd %q && exec %q' "$WORK" "$WORK/.venv/bin/python"
  printf ' %q' "${run[@]}"
  echo
  exit 0
fi

mkdir -p "$WORK" "$CACHE"
tar -C "$SOURCE" --exclude=./.venv* --exclude=./.git --exclude=./runs --exclude=./.cache -cf - . | tar -C "$WORK" -xf -
cd "$WORK"
. scripts/environment.sh
"$python" "${run[@]}" &
process=$! stopped=""
trap 'stopped=1; kill -TERM "$process"' TERM
status=0
wait "$process" || status=$?
while kill -0 "$process" 2> /dev/null; do # the signal has ended the first wait
  status=0
  wait "$process" || status=$?
done
# A pod that ends with 0 counts as done, and a run that was asked to stop is not.
if [ -n "$stopped" ] && [ "$status" -eq 0 ]; then exit 143; fi
exit "$status"
