#!/usr/bin/env bash
# One training run on the GPUs of several SLURM nodes; sbatch it in the repository, on a disk that all nodes share:
#
#   sbatch --nodes=4 scripts/slurm.sh --config configs/hh_small.yaml --run.dir /shared/runs/mine
#
# One process per GPU, because that is how jax reads SLURM (a task takes the GPU of its SLURM_LOCALID), and because each
# process then packs and reads its share of the data on its own cores. Every task must see all GPUs of its node: ask for
# --gpus-per-node, not --gpus-per-task. The processes find each other by SLURM's own variables.
#
# What follows the script's name goes to every process of rpo_jax.train, with --resume auto: a job that was requeued, or
# submitted again, goes on after its newest checkpoint, also on another number of nodes. Five minutes before its time is
# up (a short job gives less, as in sbatch --signal=TERM@30) the processes are told to save, and the job ends: submit it
# again, or chain jobs by --dependency=afterany.
#
# CACHE=FOLDER   compiled programs, embeddings and reference log-probs (.cache/rpo_jax here), shared by all nodes
# VENV=FOLDER    the environment (.venv here); where compute nodes reach no registry, make it first on a login node:
#                EXTRAS=cuda bash -c '. scripts/environment.sh'
# DRY_RUN=1      print the command of every process and do nothing: DRY_RUN=1 bash scripts/slurm.sh ...
#
#SBATCH --job-name=rpo_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail

# sbatch runs a copy of this file from elsewhere.
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
if [ ! -f "$root/scripts/environment.sh" ]; then
  echo "error: $root is not the repository; submit the job from there." >&2
  exit 2
fi
if [ $# -eq 0 ]; then
  echo "error: nothing to run; give the options of rpo_jax.train, as in --config FILE --run.dir FOLDER." >&2
  exit 2
fi
if [ -z "${SLURM_JOB_ID:-}" ] && [ -z "${DRY_RUN:-}" ]; then
  echo "error: this is no SLURM job; submit it with sbatch, or set DRY_RUN=1 to see its commands." >&2
  exit 2
fi

export EXTRAS=${EXTRAS-cuda}
cache=${CACHE:-$root/.cache/rpo_jax}
run=(-m rpo_jax.train "$@" --resume auto --run.cache_dir "$cache")

if [ -n "${DRY_RUN:-}" ]; then
  python=${VENV:-$root/.venv}/bin/python
  asked() { sed -n "s/^#SBATCH --$1=//p" "${BASH_SOURCE[0]}"; }
  nodes=${SLURM_NNODES:-$(asked nodes)} per_node=${SLURM_NTASKS_PER_NODE:-$(asked ntasks-per-node)}
  for ((i = 0; i < nodes * per_node; i++)); do
    printf 'process %d on node %d, GPU %d: cd %q && exec %q' "$i" $((i / per_node)) $((i % per_node)) "$root" "$python"
    printf ' %q' "${run[@]}"
    echo
  done
  exit 0
fi

cd "$root"
# Here, on the first node, before any process starts: they share the folder.
. scripts/environment.sh
# A process that fails makes the others leave with its message; srun sees to those that cannot.
# Newer versions of srun do not read from the job how many cores a task has.
exec srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=1 --wait=90 --label "$python" "${run[@]}"
