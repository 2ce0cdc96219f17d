"""Hooks of a user's own: called in order, at the same steps after a resume, and able to stop a run."""

import contextlib
import json
import math
import re
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import rpo_jax
from rpo_jax.config import GuardConfig, TrackingConfig
from rpo_jax.hosts.stopping import Stopped, Stopping
from rpo_jax.models.huggingface.folders import resolve_folder
from rpo_jax.runs.tracking import MetricsLog, Reporter
from rpo_jax.sampling.end_tokens import end_tokens
from rpo_jax.training.hooks.guard import Guard
from rpo_jax.training.hooks.hook import FinishedStep, Training
from rpo_jax.training.hooks.logging import Logging
from rpo_jax.training.loop import Programs
from tests.runs import configured, metric_lines, without_timings, write_rows

CHANGES = {
    "contrast.weights": "uniform",
    "tracking.tensorboard": False,
    "train.steps": 4,
    "train.eval_every": 2,
    "train.save_every": 2,
    "train.keep_best": 0,
}
ORDER = ["Guarding", "StopRequests", "Sampler", "Evaluation", "Logging", "Recorder", "Saving"]


class Recorder(rpo_jax.Hook):
    """What a hook hears, and what it can see then."""

    def __init__(self, stop_after=None, pause_at=()):
        self.heard, self.metrics, self.evaluations, self.states = [], {}, {}, {}
        self.stop_after, self.pause_at = stop_after, pause_at

    def before_first_step(self, run):
        self.heard.append(("before the first step", run.step))

    def after_step(self, run, finished):
        self.heard.append(("after", finished.step))
        assert run.step - finished.step in (0, 1)
        self.metrics[finished.step] = finished.metrics
        if finished.step == self.stop_after:
            run.stop("a hook")

    def wants_pause(self, run):
        return run.step in self.pause_at

    def at_pause(self, run):
        self.heard.append(("pause", run.step))
        self.states[run.step] = int(run.state.step)

    def before_evaluation(self, run):
        self.heard.append(("evaluating", run.step))

    def after_evaluation(self, run, metrics):
        self.heard.append(("evaluated", run.step))
        self.evaluations[run.step] = metrics

    def at_end(self, run):
        self.heard.append(("end", run.step))
        self.hooks = [type(hook).__name__ for hook in run.hooks]


class World:
    def __init__(self, folder):
        self.folder, self.data = folder, write_rows(folder / "pairs.jsonl")

    def run(self, name, hook, **changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        config = configured(self.data, self.folder / name, self.folder / "cache", {**CHANGES, **changes})
        return rpo_jax.run(config, hooks=[hook])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world):
    hook = Recorder(pause_at=(3,))
    world.run("whole", hook, train__sample_prompts=2, train__sample_tokens=4)
    return hook


def evaluation(step):
    return [("evaluating", step), ("evaluated", step), ("pause", step)]


def test_a_hook_hears_every_event_in_order(whole):
    assert whole.hooks == ORDER
    assert whole.heard == [
        *[("evaluating", 0), ("evaluated", 0), ("before the first step", 0)],
        *[("after", 1), ("after", 2), *evaluation(2)],
        *[("after", 3), ("pause", 3)],
        *[("after", 4), *evaluation(4), ("end", 4)],
    ]


def test_a_hook_sees_what_is_logged_and_the_state_of_the_step(world, whole):
    lines = metric_lines(world.folder / "whole")
    for line in (line for line in lines if "loss" in line):
        own = whole.metrics[line["step"]]
        assert own == {name: line[name] for name in own}
        assert {"loss", "grad_norm", "rewards/margins"} <= set(own)
    assert list(whole.evaluations.values()) == [line for line in lines if "eval_loss" in line]
    assert whole.states == {2: 2, 3: 3, 4: 4}


def test_a_hook_stops_a_run_which_is_saved_and_goes_on_as_if_never_stopped(world, whole):
    """The step after the one that it has read is under way by then, so that one is the last."""
    first, second = Recorder(stop_after=2), Recorder()
    result = world.run("parts", first, train__eval_every=4, train__save_every=4)
    assert (result.stopped, result.checkpoint.name) == ("a hook", "3")
    assert first.heard[-4:] == [("after", 2), ("after", 3), ("pause", 3), ("end", 3)]
    assert world.run("parts", second, train__eval_every=4, run__resume="auto").stopped is None
    assert second.heard == [("before the first step", 3), ("after", 4), *evaluation(4), ("end", 4)]
    expected = [line for line in metric_lines(world.folder / "whole") if line["step"] != 2 or "loss" in line]
    assert without_timings(metric_lines(world.folder / "parts")) == without_timings(expected)


def test_a_hook_may_stop_a_run_before_its_first_step(world):
    class Stop(rpo_jax.Hook):
        def before_first_step(self, run):
            run.stop("nothing to do")

    with pytest.raises(Stopped, match="stopped by nothing to do before the first step"):
        world.run("nothing", Stop())


def test_an_exception_of_a_hook_ends_the_run_and_that_step_is_not_saved(world):
    class Fails(rpo_jax.Hook):
        def at_pause(self, run):
            return run.step / 0

    with pytest.raises(ZeroDivisionError):
        world.run("fails", Fails())
    assert not any((world.folder / "fails" / "checkpoints").glob("[0-9]*"))


def test_a_hook_that_overrides_nothing_does_nothing(world, whole):
    world.run("plain", rpo_jax.Hook())
    plain, recorded = (without_timings(metric_lines(world.folder / name)) for name in ("plain", "whole"))
    assert plain == recorded
    assert all(math.isfinite(line["loss"]) for line in plain if "loss" in line)


def test_samples_end_where_generate_s_answers_do(world, whole):
    """At a further end token of generation_config.json, too: here every token is one."""
    from rpo_jax import export

    folder = resolve_folder(export.export(world.folder / "whole", world.folder / "hf"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(300))}), encoding="utf-8")
    changes = {"model__path": folder, "train__sample_prompts": 2, "train__sample_tokens": 4, "train__steps": 1}
    world.run("ended", rpo_jax.Hook(), **changes)
    kinds = {}
    for name in ("whole", "ended"):
        rows = [json.loads(line) for line in (world.folder / name / "samples.jsonl").read_text().splitlines()]
        kinds[name] = {(row["finish_reason"], row["tokens"]) for row in rows}
    assert kinds["whole"] != kinds["ended"] == {("eos", 1)}


def test_end_tokens_are_those_of_the_model_its_folder_and_the_tokenizer(tmp_path):
    model, tokenizer = SimpleNamespace(eos_token_id=(3, 4)), SimpleNamespace(eos_token_id=5, chat_template=None)
    assert end_tokens(None, model, tokenizer) == end_tokens(tmp_path, model, tokenizer) == {3, 4, 5}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 6}', encoding="utf-8")
    assert end_tokens(tmp_path, model, tokenizer) == {3, 4, 5, 6}
    (tmp_path / "generation_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="is not a JSON object"):
        end_tokens(tmp_path, model, tokenizer)


@pytest.mark.parametrize(("earlier", "reason"), [(signal.SIG_DFL, "SIGHUP"), (signal.SIG_IGN, None)])
def test_a_closed_connection_asks_to_stop_unless_nohup_has_it_ignored(earlier, reason):
    before = signal.signal(signal.SIGHUP, earlier)
    stopping = Stopping(None)
    stopping.defer()
    try:
        with stopping.listening():
            signal.raise_signal(signal.SIGHUP)
            assert stopping.requested("here") == reason
        assert signal.getsignal(signal.SIGHUP) == earlier
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_step_that_compares_nothing_is_not_the_run_s_result(tmp_path, capsys):
    """As one whose responses are all of one kind: its loss, a mean of nothing, is 0."""
    log = MetricsLog(tmp_path, TrackingConfig(tensorboard=False), 0, "id", {})
    hook = Logging(1, log, Reporter(), Guard(GuardConfig()), contextlib.ExitStack())
    run = Training(None, 0, 0, 3, 3, Stopping(None), [hook])  # pyright: ignore[reportArgumentType]
    hook.before_first_step(run)
    sides = {"chosen": SimpleNamespace(valid=np.ones(2, bool)), "rejected": SimpleNamespace(valid=np.zeros(2, bool))}
    for step, compared in ((1, 4), (2, 0), (3, 0)):
        report = {"loss": np.float32(0.5 if compared else 0.0), "compared": np.float32(compared), "skipped": 0.0}
        batch: Any = SimpleNamespace(sides=sides)
        hook.after_step(run, FinishedStep(step, batch, 9 * step, 0.5, None, report, 1.0))
    log.close()
    assert [line.get("loss") for line in metric_lines(tmp_path)] == [0.5, None, None]
    assert log.training["step"] == 1
    told = capsys.readouterr().out
    assert told.count("had nothing to compare in its 2 chosen and 0 rejected responses") == 1
    assert "batch.order=shuffled" in told


def test_a_compilation_is_told_once_for_each_shape_of_batch():
    said = []
    steps: Any = SimpleNamespace(train=lambda *_, **__: said.append("trained"))
    programs = Programs(steps, None, None, None, None, said.append)  # pyright: ignore[reportArgumentType]
    for shape in ((8, 64), (8, 64), (16, 64)):
        programs.train(None, SimpleNamespace(tokens=np.zeros(shape)), None)  # pyright: ignore[reportArgumentType]
    told = [re.sub(r"\d+\.\d s", "S", line) for line in said]
    assert told == [
        "compiling the step (8 rows of 64 tokens)",
        "trained",
        "compiled the step (8 rows of 64 tokens) in S",
        "trained",
        "compiling the step (16 rows of 64 tokens)",
        "trained",
        "compiled the step (16 rows of 64 tokens) in S",
    ]
