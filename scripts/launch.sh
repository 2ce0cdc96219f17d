#!/usr/bin/env bash
# Starts one training run as several processes, on hosts over ssh or on this machine, and waits for all of them.
#
#   bash scripts/launch.sh --hosts node0,node1 -- --config configs/hh_small.yaml --run.dir /shared/runs/mine
#   bash scripts/launch.sh --local 2 -- --config configs/hh_small.yaml --run.dir runs/mine
#
# What follows -- goes to every process of rpo_jax.train, with --resume auto: started again, a run goes on after its
# newest checkpoint. Process 0 runs on the first host.
#
#   --hosts A,B,...   one process on each, in this folder's path there; ssh must need no password
#   --local N         N processes here
#   --port PORT       where process 0 waits for the others (7777)
#   --coordinator H   name or address of process 0's host as the others reach it (the first host; 127.0.0.1 if local)
#   --no-setup        environments exist: do not look after them
#   --program CMD     run CMD in place of `.venv/bin/python -m rpo_jax.train`
#
# CACHE=FOLDER   compiled programs, embeddings and reference log-probs (.cache/rpo_jax; best on a disk all hosts share)
# EXTRAS=cuda    optional dependencies to install: cuda or tpu
# RPO_JAX_SECRET keeps strangers out of the run; ssh carries it to no host: set it there, as in ~/.ssh/environment
# GRACE_SECONDS  how long processes may take to save and leave when the launcher is stopped, or one of them fails (90);
#                with --hosts a stopped launcher's connections end at once, and the processes there save by themselves
# DRY_RUN=1      print the command of every process and do nothing
#
# One process per host, because a process drives all devices of its host. Ends with 0 if all processes do; where one
# fails the others are stopped, and its status is the launcher's. Wrong usage ends with 2.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${CACHE:-$root/.cache/rpo_jax}
GRACE_SECONDS=${GRACE_SECONDS:-90} # a process that learns of another's death says so and leaves within a minute

fail() {
  echo "error: $1" >&2
  exit 2
}

hosts=() local_count="" port=7777 coordinator="" setup=1 program=""
need() { [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value; see the top of scripts/launch.sh."; }
while [ $# -gt 0 ]; do
  case $1 in
    --hosts) need "$@"; IFS=, read -ra hosts <<< "$2"; shift 2 ;;
    --local) need "$@"; local_count=$2; shift 2 ;;
    --port) need "$@"; port=$2; shift 2 ;;
    --coordinator) need "$@"; coordinator=$2; shift 2 ;;
    --no-setup) setup=""; shift ;;
    --program) need "$@"; program=$2; shift 2 ;;
    --) shift; break ;;
    *) fail "unknown option '$1'; it takes --hosts, --local, --port, --coordinator, --no-setup and --program, and after -- the options of rpo_jax.train." ;;
  esac
done

[ "${#hosts[@]}" -eq 0 ] || [ -z "$local_count" ] || fail "give --hosts or --local, not both."
[ "${#hosts[@]}" -gt 0 ] || [ -n "$local_count" ] || fail "no hosts; give --hosts node0,node1 or --local 2."
for host in "${hosts[@]}"; do
  [[ $host =~ ^[A-Za-z0-9_.@:-]+$ && $host != -* ]] || fail "--hosts has '$host', which is no host's name."
done
[ "$(printf '%s\n' "${hosts[@]}" | sort | uniq -d)" = "" ] || fail "--hosts names a host twice; a process drives all devices of its host."
[[ -z $local_count || $local_count =~ ^[1-9][0-9]*$ ]] || fail "--local $local_count must be a number of processes, 1 or more."
[[ $port =~ ^[0-9]+$ && $port -gt 0 && $port -lt 65536 ]] || fail "--port $port must lie between 1 and 65535."
[ $# -gt 0 ] || fail "nothing to run; give the options of rpo_jax.train after --, as in -- --config FILE --run.dir FOLDER."
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then fail "bash $BASH_VERSION is too old; 5.1 or newer is needed."; fi

count=${local_count:-${#hosts[@]}}
first=${hosts[0]:-127.0.0.1}
coordinator=${coordinator:-${first#*@}}
program=${program:-$(printf '%q' "${VENV:-$root/.venv}/bin/python") -m rpo_jax.train}

# Quoted for the shell that runs it: this one's child or the host's.
command_of() {
  printf 'cd %q && exec %s' "$root" "$program"
  printf ' %q' "${@:2}" --resume auto --run.cache_dir "$cache" --distributed.coordinator "$coordinator:$port" \
    --distributed.num_processes "$count" --distributed.process_id "$1"
}

setup_command="cd $(printf '%q' "$root") && EXTRAS=$(printf '%q' "${EXTRAS:-}") VENV=$(printf '%q' "${VENV:-}") PYTHON=$(printf '%q' "${PYTHON:-}") bash -euo pipefail -c '. scripts/environment.sh'"

if [ -n "${DRY_RUN:-}" ]; then
  for ((i = 0; i < count; i++)); do
    [ -z "$setup" ] || echo "set up ${hosts[i]:-here}: $setup_command"
  done | sort -u
  for ((i = 0; i < count; i++)); do echo "process $i on ${hosts[i]:-this machine}: $(command_of "$i" "$@")"; done
  exit 0
fi

become() { # HOST COMMAND; with a terminal, so that what runs there ends with the connection
  if [ -n "$1" ]; then exec ssh -tt -o BatchMode=yes -o ConnectTimeout=30 "$1" "$2"; else exec bash -c "$2"; fi
}

if [ -n "$setup" ]; then # one after another: hosts may share this folder
  for host in "${hosts[@]:-}"; do
    (become "$host" "$setup_command") < /dev/null || fail "no environment on ${host:-this machine}; see above, or use --no-setup."
  done
fi

declare -A number # of each process id that runs
stop_all() {
  local pid
  for pid in "${!number[@]}"; do kill -s "$1" -- "-$pid" 2> /dev/null || true; done
}
end_all() { # let them leave by themselves if they are about to, then make them
  local deadline=$((SECONDS + $1)) pid
  while [ "${#number[@]}" -gt 0 ] && [ $SECONDS -lt $deadline ]; do
    for pid in "${!number[@]}"; do kill -0 "$pid" 2> /dev/null || unset "number[$pid]"; done
    sleep 0.2
  done
}
interrupted() {
  trap '' INT TERM HUP
  echo "stopping ${#number[@]} processes" >&2 || true # with a terminal that is gone too
  exec 2> /dev/null # bash would tell of every job that it ends
  stop_all TERM; end_all "$GRACE_SECONDS"; stop_all KILL
  exit 130
}
trap interrupted INT TERM HUP

set -m # a process group each, so that what a process has started ends with it
for ((i = 0; i < count; i++)); do
  become "${hosts[i]:-}" "$(command_of "$i" "$@")" < /dev/null > >(trap '' INT TERM HUP; exec sed -u "s/^/[$i] /") 2>&1 &
  number[$!]=$i
done

while [ "${#number[@]}" -gt 0 ]; do
  status=0
  wait -n -p ended "${!number[@]}" || status=$?
  i=${number[$ended]}
  unset "number[$ended]"
  [ $status -eq 0 ] && continue
  echo "error: process $i on ${hosts[i]:-this machine} ended with status $status; stopping the others." >&2
  exec 2> /dev/null # bash would tell of every job that it ends
  end_all "$GRACE_SECONDS"; stop_all TERM; end_all 20; stop_all KILL
  exit "$status"
done
