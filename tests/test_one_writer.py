"""One run, one writer: whoever starts it a second time is refused by name, and the first goes on as if nobody had."""

import os
import signal
import socket
import threading

import pytest

import rpo_jax
from rpo_jax import train
from tests.processes import Processes
from tests.runs import configured, metric_lines, settings, without_timings, write_rows

CHANGES = {"objective.name": "dpo", "train.steps": 4, "train.save_every": 1, "tracking.tensorboard": False}
STARTS = {"anew": {}, "over it": {"run.overwrite": True}, "to go on": {"run.resume": "auto"}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    data = write_rows(folder / "pairs.jsonl")
    rpo_jax.run(configured(data, folder / "run", folder / "cache", CHANGES))
    return data, folder / "cache", without_timings(metric_lines(folder / "run"))


class Waiting(rpo_jax.Hook):
    """Holds a run after a step until it may go on."""

    def __init__(self, step):
        self.step, self.there, self.going_on = step, threading.Event(), threading.Event()

    def before_first_step(self, run):
        self._wait(run, 0)

    def after_step(self, run, finished):
        self._wait(run, finished.step)

    def _wait(self, run, step):
        if step == self.step:
            self.there.set()
            assert self.going_on.wait(300)


@pytest.mark.parametrize("step", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_start_is_refused_and_the_first_goes_on(alone, tmp_path, capsys, step):
    data, cache, expected = alone
    hook, run_dir = Waiting(step), tmp_path / "run"
    first = threading.Thread(target=rpo_jax.run, args=(configured(data, run_dir, cache, CHANGES), [hook]))
    first.start()
    assert hook.there.wait(300)
    try:
        for changes in STARTS.values():
            wanted = settings(data, run_dir, cache, {**CHANGES, **changes})
            assert train.main([f"--{setting}" for setting in wanted]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            owner = f"process {os.getpid()} on {socket.gethostname()}, since 20"
            assert line.startswith(f"error: run.dir={run_dir} is in use: {owner}")
    finally:
        hook.going_on.set()
        first.join()
    assert without_timings(metric_lines(run_dir)) == expected
    assert os.listdir(tmp_path) == ["run"], "the lock is gone"


def test_what_a_killed_run_leaves_locks_nobody_out(alone, tmp_path):
    data, cache, expected = alone
    run_dir = tmp_path / "run"
    (run_dir.parent / ".run.lock").write_text("")
    (tmp_path / ".run.partial-1").mkdir()
    rpo_jax.run(configured(data, run_dir, cache, CHANGES))
    assert without_timings(metric_lines(run_dir)) == expected
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [CHANGES, CHANGES | {"run.overwrite": True}, CHANGES | {"run.resume": "auto"}])
def test_of_three_real_starts_at_once_one_runs(alone, tmp_path, changes):
    data, cache, expected = alone
    changes = changes | {"train.steps": 40}
    wanted = settings(data, tmp_path / "run", cache, changes)
    with (
        Processes(wanted, tmp_path / "1", count=1, devices=8) as first,
        Processes(wanted, tmp_path / "2", count=1, devices=8) as second,
        Processes(wanted, tmp_path / "3", count=1, devices=8) as third,
    ):
        ended = [*first.wait(), *second.wait(), *third.wait()]
    assert sorted(process.status for process in ended) == [0, 2, 2], ended
    for process in ended:
        assert process.status == 0 or "is in use: process " in process.output.splitlines()[-1]
    lines = without_timings(metric_lines(tmp_path / "run"))
    assert [line for line in lines if line["step"] < 4] == [line for line in expected if line["step"] < 4]


@pytest.mark.slow
def test_a_killed_start_is_followed_at_once(alone, tmp_path):
    data, cache, expected = alone
    wanted = settings(data, tmp_path / "run", cache, {**CHANGES, "train.steps": 1000})
    with Processes(wanted, tmp_path / "1", count=1, devices=8) as first:
        first.until(lambda: (tmp_path / "run" / "checkpoints" / "1").exists())
        first.running[0].send_signal(signal.SIGKILL)
        first.wait()
    rpo_jax.run(configured(data, tmp_path / "run", cache, {**CHANGES, "train.steps": 4, "run.overwrite": True}))
    assert without_timings(metric_lines(tmp_path / "run")) == expected
