#!/usr/bin/env bash
# Builds the documentation into site/, or the folder given: any warning fails it, as does a link that leads nowhere. Its
# generator lives in an environment of its own, .venv-docs, made once per content of docs/requirements.txt.
# Exit status 75 where that environment cannot be had. PYTHON=python3.12 chooses another interpreter for it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${DOCS_VENV:-.venv-docs}
wanted=$(cksum < docs/requirements.txt)
if [ "$(cat "$venv/.made-from" 2>/dev/null)" != "$wanted" ]; then
  "${PYTHON:-python3}" -m venv --clear "$venv"
  if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt; then
    echo "skipped: the documentation, because pip could not install docs/requirements.txt (the reason is above)" >&2
    exit 75
  fi
  echo "$wanted" > "$venv/.made-from"
fi
export NO_MKDOCS_2_WARNING=1 # a notice of the theme's, on other generators
"$venv/bin/python" -m mkdocs build --strict --quiet --site-dir "${1:-site}"
