"""kill -9 at any instant: the run goes on to the same end, and nothing half-written is ever taken for whole.

`pytest tests/test_crashes.py -m slow -s` kills 200 times and prints where.
"""

import json
import os
import subprocess
import sys

import pytest

from tests import quick_xla
from tests.processes import REPOSITORY

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": quick_xla.FLAGS,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # a start compiles nothing that an earlier one has compiled
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def killed(*arguments):
    command = [sys.executable, "-m", "tests.killed", *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_file_or_folder_is_ever_half_there(tmp_path):
    kills = killed("writes", tmp_path)
    assert set(kills) == {"embeddings", "reference", "folder", "metrics"}
    assert all(count >= 3 for count in kills.values()), kills


@pytest.mark.slow  # where a kill lands is chance: a slow machine may never reach a checkpoint between two
def test_a_run_survives_kills(tmp_path):
    found = killed("run", tmp_path, 8, 0)
    assert sum(found["kills"].values()) >= 7, "an export may be faster than its killer"
    assert found["resumed"] >= 3


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_run_survives_two_hundred_kills(tmp_path):
    found = killed("run", tmp_path, 200, 1)
    print(f"\n{found}")
    assert sum(found["kills"].values()) >= 195
    assert found["kills"]["in a save"] >= 20
    assert found["resumed"] >= 100
