"""A training run, from its configuration to its result."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from rpo_jax import models
from rpo_jax.config import Config
from rpo_jax.hosts import processes, sharding
from rpo_jax.hosts.memory import trim_after_compiling
from rpo_jax.hosts.stopping import Stopped, Stopping
from rpo_jax.runs.checkpoints import Checkpoints, set_aside_damaged, to_json_dict
from rpo_jax.runs.folder import (
    CHECKPOINTS,
    MODEL,
    RUN_ID,
    base_record,
    check_resumable,
    check_run_folder,
    check_shared,
    make_run_folder,
    resume_command,
)
from rpo_jax.runs.tracking import MetricsLog, Reporter, check_tracking
from rpo_jax.runs.versions import installed_versions
from rpo_jax.training.guard import FILE as GUARD_FILE
from rpo_jax.training.guard import Guard
from rpo_jax.training.loop import TrainingLoop
from rpo_jax.training.prepare import checked_objective, prepare
from rpo_jax.training.setup import Start, make_start, policy_config


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind.

    Attributes:
        run_dir: the run folder.
        checkpoint: the last step's checkpoint.
        stopped: what asked the run to stop early, a signal's name or train.max_minutes; None where it is finished.
        metrics: the last training metrics and the last held-out ones (with `eval_` in front).
        initial_metrics: held-out metrics before the first step.
        phase_seconds: wall time of each phase.
    """

    run_dir: Path
    checkpoint: Path
    metrics: dict[str, float]
    initial_metrics: dict[str, float]
    phase_seconds: dict[str, float]
    stopped: str | None = None


def run(config: Config) -> RunResult:
    """Train as configured and return where the result is; every process of a run calls this.

    In a main thread, SIGTERM and SIGINT, which is what interrupts a notebook's cell, save and return early; a second
    one ends the process at once, or, in a notebook, the cell.

    Raises:
        ValueError: for anything in the configuration, the data or the model folder that cannot be used, on every
            process; nothing has been compiled then, and no run folder made.
        Diverged: for numbers that go wrong too often (the guard section); its message is a report.
        Stopped: a KeyboardInterrupt, for a run that is asked to stop before its first step.
    """
    stopping = Stopping(config.train.max_minutes)
    checked_objective(config)
    check_tracking(config.tracking)
    chosen = processes.initialize(config)
    with processes.stopping_together(), stopping.listening():
        reporter = Reporter(silent=not processes.is_main())
        reporter.say(chosen)
        try:
            return _run(config, reporter, stopping)
        except Stopped as stopped:
            reporter.say(f"{stopped}; to go on: {resume_command(config, stopping.started)}")
            raise


def _run(config: Config, reporter: Reporter, stopping: Stopping) -> RunResult:
    run_dir = Path(config.run.dir).expanduser()
    if config.run.resume == "auto" and processes.is_main():
        set_aside_damaged(run_dir / CHECKPOINTS, reporter.say)
    resuming = stopping.started = check_run_folder(config, run_dir)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.batch.pairs, config.batch.micro_rows, mesh)
    trim_after_compiling()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # jax's own setting goes before ours
        jax.config.update("jax_compilation_cache_dir", str(_cache_dir(config) / "compiled"))

    reporter.say(f"{config.objective.name} on {_describe(mesh)}, run folder {run_dir}")
    loaded = None if config.model.path is None else models.check_pretrained(config.model.path)
    prepared = prepare(config, reporter, run_dir / MODEL if resuming else None)
    model_config = policy_config(config, prepared, loaded, reporter)
    base = base_record(config)
    record = {
        "model": to_json_dict(model_config),
        "config": to_json_dict(config),
        "base": base,
        "versions": installed_versions(),
    }
    if resuming:
        check_resumable(run_dir, record, reporter)
    # An accelerator may multiply float32 at less than float32's precision unless told otherwise.
    precision = "float32" if config.model.compute_dtype == "float32" else None
    with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
        fingerprint = None if base is None else base["fingerprint"]
        start = make_start(
            config, model_config, prepared, mesh, reporter, base_fingerprint=fingerprint, resuming=resuming
        )
        if not resuming:
            make_run_folder(config, model_config, prepared.tokenizer, run_dir)
        check_shared(run_dir)
        stopping.started = True
        result = _train(config, start, mesh, run_dir, record, reporter, stopping)
    if result.stopped is None:
        return result
    reporter.say(f"stopped by {result.stopped}; saved in {result.checkpoint}")
    reporter.say(f"to go on: {resume_command(config, stopping.started)}")
    return result


def _cache_dir(config: Config) -> Path:
    return Path(config.run.cache_dir).expanduser()


def _describe(mesh: Mesh) -> str:
    kind = mesh.devices.flat[0].device_kind
    return f"{mesh.size} x {kind} (" + ", ".join(f"{name} {size}" for name, size in mesh.shape.items()) + ")"


def _train(
    config: Config,
    start: Start,
    mesh: Mesh,
    run_dir: Path,
    record: dict[str, Any],
    reporter: Reporter,
    stopping: Stopping,
) -> RunResult:
    checkpoints = Checkpoints(
        run_dir / CHECKPOINTS,
        keep_last=config.train.keep_last,
        keep_best=config.train.keep_best,
        warn=reporter.say,
    )
    state, first_step, num_tokens, guarded = start.state, 0, 0, {}
    newest = checkpoints.latest_step()
    if newest is not None:
        state, first_step = checkpoints.restore(newest, state), newest
        told = checkpoints.record(newest)
        num_tokens, guarded = told["num_tokens"], told.get("guard", {})  # absent from older checkpoints
        reporter.say(f"resuming after step {newest} of {start.total_steps}")
    run_id = (run_dir / RUN_ID).read_text(encoding="utf-8")
    log = MetricsLog(run_dir, config.tracking, first_step, run_id, record["config"], writing=processes.is_main())
    bad_steps = run_dir / GUARD_FILE if processes.is_main() else None
    loop = TrainingLoop(
        config=config.train,
        steps=start.steps,
        mesh=mesh,
        batches=start.batches,
        held_out=start.held_out,
        reference=start.live_reference,
        checkpoints=checkpoints,
        log=log,
        reporter=reporter,
        record=record,
        total_steps=start.total_steps,
        guard=Guard(config.guard, bad_steps, first_step, guarded),
        diagnosis=start.diagnosis,
        stopping=stopping,
        sampler=start.sampler,
    )
    stopping.defer()
    try:
        with reporter.phase("train and evaluate"):
            initial, last = loop.run(state, first_step, num_tokens)
        newest = checkpoints.latest_step()
        assert newest is not None, "the last step is saved"
        newest_path = checkpoints.path(newest)
    except ValueError as error:
        # Nothing that a user gave is read in here: this is a fault of ours, and its traceback is wanted.
        raise RuntimeError(f"training stopped: {error}") from error
    finally:
        log.close()
        checkpoints.close()
    return RunResult(run_dir, newest_path, last, initial, reporter.phase_seconds, stopping.reason)
