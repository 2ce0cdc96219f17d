"""Long runs hold no more at their end than after they have warmed up.

`pytest tests/test_long_runs.py -m slow -s` takes 5,000 steps and prints what it measured.
"""

import json
import os
import statistics
import subprocess
import sys

import pytest

from rpo_jax.runs.checkpoints import Checkpoints
from tests.processes import REPOSITORY
from tests.runs import metric_lines, preference_rows, settings, write_rows

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")

PERIODS = 10  # of evaluations and saves
WARM = 2 / PERIODS  # part of the run until everything has happened twice
MAX_DRIFT = 0.02


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
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    samples = json.loads(done.stdout.splitlines()[-1])
    assert samples[-1]["step"] == steps
    return [sample for sample in samples if sample["step"] > WARM * steps]


def assert_nothing_grows(folder, steps):
    samples = long_run(folder, steps)
    tenth = len(samples) // 10
    early, late = samples[:tenth], samples[-tenth:]

    def medians(key):
        return [statistics.median(sample[key] for sample in part) for part in (early, late)]

    before, after = medians("resident_mib")
    print(
        f"\n{steps} steps: resident {before:.1f} MiB after warm-up, {after:.1f} at the end ({after / before - 1:+.2%}),"
    )
    print(f"at most {max(sample['resident_mib'] for sample in samples):.1f}")
    for key in ("handles", "threads", "compilations"):
        print(f"{key}: {medians(key)}, from {min(s[key] for s in samples)} to {max(s[key] for s in samples)}")
    assert after / before - 1 < MAX_DRIFT, "memory that is given back is no drift"
    assert samples[0]["compilations"] == samples[-1]["compilations"]
    # A save that is being written holds some for as long as the disk takes: what is kept is there between saves too.
    half = len(samples) // 2
    for key in ("handles", "threads"):
        assert min(s[key] for s in samples[half:]) <= min(s[key] for s in samples[:half])
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


def test_a_run_of_three_hundred_steps_holds_no_more_at_its_end(tmp_path):
    assert_nothing_grows(tmp_path, 300)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_of_five_thousand_steps_holds_no_more_at_its_end(tmp_path):
    assert_nothing_grows(tmp_path, 5000)
