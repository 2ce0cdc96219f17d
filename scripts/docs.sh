#!/usr/bin/env bash
# Builds the documentation into site/: any warning fails it, as a link that leads nowhere. Its generator lives in an
# environment of its own, .venv-docs, made once per content of docs/requirements.txt.
# PYTHON=python3.12 chooses another interpreter for it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${DOCS_VENV:-.venv-docs}
wanted=$(cksum < docs/requirements.txt)
if [ "$(cat "$venv/.made-from" 2>/dev/null)" != "$wanted" ]; then
  "${PYTHON:-python3}" -m venv --clear "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
  echo "$wanted" > "$venv/.made-from"
fi
"$venv/bin/python" -m mkdocs build --strict --site-dir "${1:-site}"
