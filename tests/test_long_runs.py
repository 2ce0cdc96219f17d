"""Long runs hold no more at their end than after they have warmed up.

`pytest tests/test_long_runs.py -m slow -s` takes 5,000 steps and prints what it measured.
"""

import ctypes
import json
import math
import os
import subprocess
import sys

import pytest

from rpo_jax.runs.checkpoints import Checkpoints
from tests import quick_xla
from tests.processes import REPOSITORY
from tests.runs import metric_lines, preference_rows, settings, write_rows

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc what it has given out, and Linux's /proc"
)

PERIODS = 10  # of evaluations and saves
WARM = 2 / PERIODS  # part of the run until everything has happened twice
# Of the least that is held between saves, which one array of the model's size more or less may change by 2 %. Of the
# resident memory nothing is asked: by what malloc keeps for later, it may grow by a twentieth without a leak.
MAX_DRIFT = {"in_use_mib": 0.025, "python_blocks": 0.02, "handles": 0.0, "threads": 0.0}


def long_run(folder, steps):
    every = steps // PERIODS
    changes = {
        "contrast.weights": "uniform",
        "train.steps": steps,
        "train.log_every": max(1, steps // 500),
        "train.eval_every": every,
        "train.save_every": every,
        "train.keep_last": 2,
        "train.keep_best": 1,
    }
    data = write_rows(folder / "pairs.jsonl", preference_rows(72))
    arguments = [f"--{setting}" for setting in settings(data, folder / "run", folder / "cache", changes)]
    command = [sys.executable, "-m", "tests.long_run", *arguments]
    environment = os.environ | {"XLA_FLAGS": quick_xla.FLAGS}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    samples = json.loads(done.stdout.splitlines()[-1])
    assert samples[-1]["step"] == steps
    return [sample for sample in samples if sample["step"] > WARM * steps]


def assert_nothing_grows(folder, steps):
    samples = long_run(folder, steps)
    half = len(samples) // 2
    print()
    for key in samples[0].keys() - {"step"}:
        values = [sample[key] for sample in samples]
        before, after = min(values[:half]), min(values[half:])
        print(f"{steps} steps: {key} at least {before:.1f} in the first half and {after:.1f} in the second")
        assert after <= before * (1 + MAX_DRIFT.get(key, math.inf)), key
    assert samples[0]["compilations"] == samples[-1]["compilations"]
    assert_pruned(folder / "run", steps)


def assert_pruned(run_dir, steps):
    """The two newest checkpoints are left, and the best one, which may be one of them."""
    every = steps // PERIODS
    scores = {line["step"]: line["eval_rewards/accuracies"] for line in metric_lines(run_dir) if "eval_loss" in line}
    del scores[0]
    checkpoints = Checkpoints(run_dir / "checkpoints", read_only=True)
    left, best = checkpoints.steps(), checkpoints.best_step()
    checkpoints.close()
    assert scores[best] == max(scores.values())
    assert left == sorted({best, steps - every, steps})
    there = {path.name for path in (run_dir / "checkpoints").iterdir() if path.name not in ("removed", "metadata")}
    assert there == {str(step) for step in left}
    assert not list((run_dir / "checkpoints").glob("removed/*"))


@pytest.mark.slow
def test_a_run_of_three_hundred_steps_holds_no_more_at_its_end(tmp_path):
    assert_nothing_grows(tmp_path, 300)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_of_five_thousand_steps_holds_no_more_at_its_end(tmp_path):
    assert_nothing_grows(tmp_path, 5000)
