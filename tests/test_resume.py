"""Stopped by a signal or by its time limit, at any step, and resumed: bit for bit the run that was never stopped."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

import rpo_jax
from rpo_jax import train
from rpo_jax.hosts.stopping import Stopped, Stopping
from rpo_jax.runs.checkpoints import Checkpoints
from rpo_jax.runs.folder import CHECKPOINTS
from rpo_jax.runs.tracking import MetricsLog
from rpo_jax.training import run as training_run
from tests.processes import REPOSITORY, Processes, start
from tests.runs import preference_rows, settings, without_timings, write_rows
from tests.test_train import World as TrainedWorld
from tests.test_train import assert_same_params

STEPS = 8
RUN = {
    "train.steps": STEPS,
    "train.save_every": 3,
    "train.eval_every": 4,
    "train.keep_last": 2,
    "train.keep_best": 0,
    "contrast.weights": "uniform",
    "tracking.tensorboard": False,
}
MINUTE = 60


class World(TrainedWorld):
    def settings(self, name, changes=None):
        return settings(self.data, self.folder / name, self.cache, {**RUN, **(changes or {})})

    def run(self, name, changes=None):
        return super().run(name, {**RUN, **(changes or {})})

    def assert_as_never_stopped(self, name, expected="never stopped"):
        assert without_timings(self.lines(name)) == without_timings(self.lines(expected))
        assert_same_params(self.params(name)[1], self.params(expected)[1])

    def saved(self, name):
        checkpoints = Checkpoints(self.folder / name / CHECKPOINTS, read_only=True)
        steps = checkpoints.steps()
        checkpoints.close()
        return steps


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"))
    world.run("never stopped")
    return world


def command_of(output):
    """The arguments of the one command that a stopped run prints."""
    [line] = [line for line in output.splitlines() if "to go on: " in line]
    python, m, module, *arguments = shlex.split(line.partition("to go on: ")[2])
    assert [python, m, module] == ["python", "-m", "rpo_jax.train"]
    return arguments


def signal_at_the_first_line(monkeypatch, number, wanted=lambda metrics: "loss" in metrics):
    """A real signal to this process when it logs its first line of this kind."""
    write, sent = MetricsLog.write, []

    def signalling(self, metrics):
        write(self, metrics)
        if not sent and wanted(metrics):
            sent.append(signal.raise_signal(number))

    monkeypatch.setattr(MetricsLog, "write", signalling)


def test_stopped_again_and_again_by_signals_equals_never_stopped(world, monkeypatch, capsys):
    """Each start gets a signal at its first step, those of evaluations and saves included; its command is the next."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    arguments, stops = [f"--{setting}" for setting in world.settings("stopped")], []
    for attempt in range(STEPS + 1):
        name = ("SIGTERM", "SIGINT")[attempt % 2]
        with monkeypatch.context() as patch:
            signal_at_the_first_line(patch, signal.Signals[name])
            assert train.main(arguments) == 0
        said = capsys.readouterr().out
        if "done: loss" in said:
            break
        stops.append(world.saved("stopped")[-1])
        assert f"stopped by {name}; saved in {world.folder}/stopped/checkpoints/{stops[-1]}\n" in said
        arguments = command_of(said)
        assert arguments == ["--config", f"{world.folder}/stopped/config.yaml", "--resume", "auto"]
    assert len(stops) >= 4
    assert stops == sorted(set(stops)), "every start gets further"
    assert {3, 4} & set(stops), "where a save or an evaluation is due too"
    world.assert_as_never_stopped("stopped")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.mark.slow
def test_an_evaluation_that_was_cut_short_is_made_up_for(world, monkeypatch):
    name = "cut short"
    with monkeypatch.context() as patch:
        signal_at_the_first_line(patch, signal.SIGTERM, lambda metrics: metrics["step"] == 4 and "loss" in metrics)
        result = world.run(name)
    assert result.stopped == "SIGTERM"
    assert result.checkpoint.name == "4"
    assert [line["step"] for line in world.lines(name) if "eval_loss" in line] == [0]
    resumed = world.run(name, {"run.resume": "auto"})
    assert resumed.stopped is None
    world.assert_as_never_stopped(name)


# Stopped after a step or two: within an epoch of 4 and between two lines of the log.
KINDS_OF_RUN = {
    "unpaired rows of two sources, neighbours together, Muon with a late decay": {
        "data.pairing": "unpaired",
        "data.path": "null",
        "data.mix": "",  # of the world's folder
        "data.eval_rows": 0,
        "batch.order": "related",
        "optim.name": "muon",
        "optim.schedule": "wsd",
    },
    "answers sampled, every third step logged, Adafactor, BCO with the mean of its rewards so far": {
        "objective.name": "bco_pair",
        "contrast.weights": "null",
        "optim.name": "adafactor",
        "optim.schedule": "inverse_sqrt",
        "train.sample_prompts": 2,
        "train.sample_tokens": 4,
        "train.log_every": 3,
    },
}
FIRST, *OTHERS = KINDS_OF_RUN


@pytest.mark.parametrize("kind", [FIRST, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)])
def test_every_kind_of_run_goes_on_bit_for_bit(world, kind):
    class Stop(rpo_jax.Hook):
        def after_step(self, run, finished):
            if finished.step == 1:
                run.stop("a hook")

    whole, name = f"whole, {kind}", f"stopped, {kind}"
    changes = dict(KINDS_OF_RUN[kind])
    if "data.mix" in changes:
        few = write_rows(world.folder / "few.jsonl", preference_rows(5))
        changes["data.mix"] = f"{{{world.data}: 0.4, {few}: 2}}"
    world.run(whole, changes)
    config = world.configured(name, {**RUN, **changes})
    assert rpo_jax.run(config, hooks=[Stop()]).checkpoint.name in ("1", "2")
    world.run(name, {**changes, "run.resume": "auto"})
    world.assert_as_never_stopped(name, whole)
    samples = [world.folder / run / "samples.jsonl" for run in (name, whole)]
    assert samples[0].exists() == samples[1].exists() == ("train.sample_prompts" in KINDS_OF_RUN[kind])
    if samples[0].exists():
        assert samples[0].read_bytes() == samples[1].read_bytes()


def other_rows(world):
    """The same file with the first row's responses swapped."""
    first, *rest = world.data.read_text().splitlines()
    row = json.loads(first)
    row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    path = world.folder / "swapped.jsonl"
    path.write_text("\n".join([json.dumps(row), *rest]))
    return {"data.path": path}


SHORT = {"optim.schedule": "cosine", "train.steps": 2, "train.save_every": 1, "train.eval_every": 2}


@pytest.fixture(scope="module")
def short(world):
    """A run of 2 steps that has lost its last checkpoint."""
    world.run("short", SHORT)
    shutil.rmtree(world.folder / "short" / CHECKPOINTS / "2")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (lambda world: {"objective.name": "ipo"}, "objective.name=rpo, not ipo"),
        (lambda world: {"data.pairing": "unpaired"}, "data.pairing=paired, not unpaired"),
        (other_rows, "other training data"),
        (lambda world: {"train.steps": 3}, "a learning rate that decays over 2 steps, not 3"),
    ],
    ids=["objective", "pairing", "data", "schedule"],
)
def test_what_would_be_another_run_is_refused(world, short, changes, reason):
    with pytest.raises(ValueError, match=re.escape(f"was trained with {reason}; resume with its own, or with --force")):
        world.run("short", {**SHORT, "run.resume": "auto", **changes(world)})


def test_labels_the_other_way_round_are_other_data(world):
    """Texts alone do not tell: of unpaired rows a label is all that says which are good."""
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    answers = [(row["prompt"], row[kind], kind == "chosen") for row in rows for kind in ("chosen", "rejected")]
    settings = {**SHORT, "objective.name": "kto", "contrast.weights": "null", "data.pairing": "unpaired"}
    for name, flipped in (("labelled", False), ("flipped", True)):
        rows = [{"prompt": p, "completion": text, "label": label != flipped} for p, text, label in answers]
        (world.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    world.run("labels", {**settings, "train.steps": 1, "data.path": world.folder / "labelled.jsonl"})
    (world.folder / "flipped.jsonl").replace(world.folder / "labelled.jsonl")
    with pytest.raises(ValueError, match="was trained with other labels, scores or weights of the same training data"):
        world.run(
            "labels",
            {**settings, "train.steps": 1, "data.path": world.folder / "labelled.jsonl", "run.resume": "auto"},
        )


@pytest.mark.parametrize(("name", "head"), [("reward", "a reward head"), ("bco_pair", "a running mean of rewards")])
def test_a_head_that_a_checkpoint_has_not_is_refused_by_force_too(world, short, name, head):
    changes = {"objective.name": name, "contrast.weights": "null", "run.resume": "auto", "run.force": True}
    with pytest.raises(
        ValueError, match=rf"objective\.name=rpo, not {name}, and one of them has {head}; resume with its"
    ):
        world.run("short", {**SHORT, **changes})


def test_another_run_goes_on_by_force_and_says_so(world, short, capsys):
    world.run("short", {**SHORT, "run.resume": "auto", "run.force": True, **other_rows(world)})
    assert "resuming by --force what was trained with other training data" in capsys.readouterr().out
    checkpoints = Checkpoints(world.folder / "short" / CHECKPOINTS, read_only=True)
    assert checkpoints.record(checkpoints.latest_step())["forced"] == ["other training data"]
    checkpoints.close()


def test_an_interrupted_cell_of_a_notebook_saves(world, monkeypatch):
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    signal_at_the_first_line(monkeypatch, signal.SIGINT)
    result = world.run("notebook")
    assert result.stopped == "SIGINT"
    assert result.checkpoint.is_dir()
    assert int(result.checkpoint.name) < STEPS


def test_a_run_in_another_thread_leaves_signals_alone(world):
    handler, results = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: results.append(world.run("thread", {"train.steps": 2})))
    thread.start()
    assert signal.getsignal(signal.SIGTERM) == handler
    thread.join()
    assert results[0].stopped is None


@pytest.mark.slow
def test_before_the_first_step_there_is_nothing_to_save(world, monkeypatch, capsys):
    """Also where another run is to be replaced: its folder stays, and the command still replaces it."""
    world.run("replaced", {"train.steps": 1})
    before = world.lines("replaced")
    prepare = training_run.prepare

    def signalling(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return prepare(*arguments)

    monkeypatch.setattr(training_run, "prepare", signalling)
    with pytest.raises(Stopped, match="stopped by SIGTERM before the first step"):
        world.run("replaced", {"run.overwrite": True})
    capsys.readouterr()
    assert train.main([f"--{setting}" for setting in world.settings("replaced", {"run.overwrite": True})]) == 0
    again = command_of(capsys.readouterr().out)
    assert world.lines("replaced") == before
    monkeypatch.undo()
    assert train.main(again) == 0
    world.assert_as_never_stopped("replaced")


@pytest.mark.slow
def test_a_time_limit_leaves_time_for_the_save(world, capsys):
    prepared = world.run("timed", {"train.steps": 1}).phase_seconds["first step"]
    seconds = 3 * prepared + 5
    started = time.monotonic()
    endless = {"train.steps": 1_000_000, "train.save_every": 0, "train.eval_every": 0, "train.log_every": 100}
    result = world.run("limited", {**endless, "train.max_minutes": seconds / MINUTE})
    assert result.stopped == "train.max_minutes"
    assert time.monotonic() - started < seconds + 1
    assert world.saved("limited") == [int(result.checkpoint.name)]
    resumed = world.run("limited", {**endless, "train.steps": int(result.checkpoint.name) + 1, "run.resume": "auto"})
    assert resumed.stopped is None
    assert f"resuming after step {result.checkpoint.name}" in capsys.readouterr().out


def test_a_limit_that_is_over_stops_before_the_first_step():
    stopping = Stopping(max_minutes=1)
    assert stopping.requested("steps", save_seconds=50) is None
    assert stopping.requested("steps", save_seconds=61) == "train.max_minutes"
    assert stopping.requested("steps") == "train.max_minutes", "it stays so"


BLOCKED = """
import hashlib, time
from rpo_jax.hosts.stopping import Stopping
stopping = Stopping()
with stopping.listening():
    stopping.defer()
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)  # no Python runs meanwhile, as in a compiler
"""


def test_a_second_signal_ends_the_process_at_once_whatever_it_waits_for():
    numbers = (signal.SIGTERM, signal.SIGINT)
    running = [subprocess.Popen([sys.executable, "-c", BLOCKED], stdout=-1, cwd=REPOSITORY) for _ in numbers]
    for process, number in zip(running, numbers, strict=True):
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        process.send_signal(number)  # as timeout does, which signals the process and its group
    time.sleep(1)
    for process, number in zip(running, numbers, strict=True):
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(MINUTE) == 128 + number
        process.stdout.close()


def test_a_process_that_gets_sigterm_saves_and_leaves_with_status_0(world, tmp_path):
    endless = {"train.steps": 200_000, "train.save_every": 0, "train.eval_every": 0}
    arguments = [f"--{setting}" for setting in world.settings("process", endless)]
    metrics, output = world.folder / "process" / "metrics.jsonl", tmp_path / "said"
    process = start(arguments, 8, output)
    try:
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert process.poll() is None, output.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5 * MINUTE) == 0
    finally:
        process.kill()
        process.wait()
    said = output.read_text()
    [saved] = world.saved("process")
    assert f"stopped by SIGTERM; saved in {world.folder}/process/checkpoints/{saved}" in said
    assert command_of(said) == ["--config", f"{world.folder}/process/config.yaml", "--resume", "auto"]
    assert [line["step"] for line in world.lines("process") if "loss" in line][-1] == saved


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_at_one_step(world):
    """And the resumed run, again of two processes, is bit for bit one of two that was never stopped."""
    changes = {"train.steps": 40, "train.save_every": 0, "train.eval_every": 20}
    for name, victim in (("two", None), ("two stopped", 1)):
        with Processes(world.settings(name, changes), world.folder / f"said by {name}", count=2) as processes:
            if victim is not None:
                metrics = world.folder / name / "metrics.jsonl"
                processes.until(lambda metrics=metrics: metrics.exists() and metrics.read_text().count("\n") > 3)
                processes.running[victim].send_signal(signal.SIGINT)
            ended = processes.wait()
        assert [process.status for process in ended] == [0, 0], [process.output for process in ended]
    assert "stopped by SIGINT; saved in" in ended[0].output
    assert 3 < world.saved("two stopped")[-1] < 40
    resuming = world.settings("two stopped", {**changes, "run.resume": "auto"})
    with Processes(resuming, world.folder / "said by two resumed", count=2) as processes:
        assert [process.status for process in processes.wait()] == [0, 0]
    world.assert_as_never_stopped("two stopped", "two")
