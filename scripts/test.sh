#!/usr/bin/env bash
# Makes the environment, checks style and types, and runs the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

"$python" -m ruff check .
"$python" -m ruff format --check .
"$(dirname "$python")/basedpyright" --pythonpath "$python"
"$python" -m pytest "$@"
