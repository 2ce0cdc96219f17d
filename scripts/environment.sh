# shellcheck shell=bash
# Sourced by the other scripts: makes .venv in the repository from constraints.txt, once per content of the three
# files that say what goes into it, and sets $python to its interpreter.
# PYTHON=python3.12 chooses another interpreter for a new environment, VENV=FOLDER another place for it, EXTRAS=cuda
# (or tpu) installs these optional dependencies too; an environment that has them keeps them.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
python=$venv/bin/python
base=${PYTHON:-python3}

made=$(cat "$venv/.made-from" 2>/dev/null || true)
extras=$(cut -d' ' -f3 <<< "$made")
for extra in $(tr , ' ' <<< "${EXTRAS:-}"); do
  [[ ,$extras, = *,$extra,* ]] || extras=${extras:+$extras,}$extra
done
wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" "$root/scripts/environment.sh" | cksum)${extras:+ $extras}
if [ "$made" != "$wanted" ]; then
  if [ ! -x "$python" ] && ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "rpo_jax needs Python 3.11 or newer; '$base' is $("$base" --version 2>&1). Set PYTHON to another one." >&2
    exit 1
  fi
  echo "Making $venv (once; a few minutes) ..."
  [ -x "$python" ] || "$base" -m venv "$venv"
  pip=("$python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt")
  # torch first and alone: its pin must be settled before another package asks for any torch. Its CPU build is in
  # PyTorch's own index, which uv knows; where that cannot be reached, whatever pip is set up to find.
  if ! { "${pip[@]}" uv && UV_HTTP_RETRIES=0 "$venv/bin/uv" pip install --quiet --python "$python" \
    --torch-backend cpu -c "$root/constraints.txt" torch; } 2>/dev/null; then
    "${pip[@]}" torch
  fi
  "${pip[@]}" -e "${root}[test,minilm,quickstart${extras:+,$extras}]"
  echo "$wanted" > "$venv/.made-from"
fi
