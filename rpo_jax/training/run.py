"""A training run, from its configuration to its result."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from rpo_jax import models
from rpo_jax.config import Config, check_unread, options_taken, resolve, with_defaults_taken
from rpo_jax.core.files import WriteFailed, atomic_write
from rpo_jax.core.memory import explaining_memory
from rpo_jax.hosts import processes, sharding
from rpo_jax.hosts.compiled import keeping_compiled
from rpo_jax.hosts.devices import unused_card
from rpo_jax.hosts.memory import trim_after_compiling
from rpo_jax.hosts.stopping import Stopped, Stopping
from rpo_jax.runs.checkpoints import Checkpoints, set_aside_damaged, to_json_dict
from rpo_jax.runs.folder import (
    CHECKPOINTS,
    DATA_COUNTS,
    MODEL,
    RUN_ID,
    base_record,
    check_resumable,
    check_run_folder,
    check_shared,
    make_run_folder,
    resume_command,
    writing,
)
from rpo_jax.runs.loggers import check_installed, check_login
from rpo_jax.runs.tracking import MetricsLog, Reporter
from rpo_jax.runs.versions import installed_versions
from rpo_jax.training.advice import advise
from rpo_jax.training.hooks.evaluation import Evaluation
from rpo_jax.training.hooks.guard import FILE as GUARD_FILE
from rpo_jax.training.hooks.guard import Guard, Guarding
from rpo_jax.training.hooks.hook import Hook, Training
from rpo_jax.training.hooks.logging import Logging
from rpo_jax.training.hooks.saving import Saving
from rpo_jax.training.hooks.stopping import StopRequests
from rpo_jax.training.loop import Programs, train
from rpo_jax.training.needs import check_room, held_bytes, less_memory, total_bytes
from rpo_jax.training.prepare import labels_of, prepare
from rpo_jax.training.rounds import Extrapolation, Rater, RoundFailed
from rpo_jax.training.setup import TrainingSetup, make_setup, policy_config, run_length
from rpo_jax.training.step import check_experts, check_policy


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


@dataclass(frozen=True)
class _Asked:
    """What a run was asked for, and where it says how it gets on."""

    config: Config
    hooks: Sequence[Hook]
    reporter: Reporter
    stopping: Stopping
    rater: Rater | None

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run.dir).expanduser()


def run(config: Config, hooks: Sequence[Hook] = (), rater: Rater | None = None) -> RunResult:
    """Train as configured and return where the result is; every process of a run calls this.

    In a main thread, SIGTERM, SIGHUP and SIGINT, which is what interrupts a notebook's cell, save and return early; a
    second one ends the process at once, or, in a notebook, the cell.

    Args:
        hooks: called while the run trains, besides its own; their order is that of rpo_jax.Hook.
        rater: scores what rounds sample; needed with train.rounds alone (rpo_jax.run brings the one of rounds.score).

    Raises:
        ValueError: for anything in the configuration, the data or the model folder that cannot be used, on every
            process; nothing has been compiled then, and no run folder made.
        WriteFailed, SaveFailed: OSErrors, where the last checkpoint or metrics are not on disk in the end.
        OutOfMemory: an OSError, where the host's memory or a device's is not enough; its message says what to try.
        PeerFailure: an OSError, where something of that kind stopped another process, at whatever time.
        Diverged: for numbers that go wrong too often (the guard section); its message is a report.
        Stopped: a KeyboardInterrupt, for a run that is asked to stop before its first step.
    """
    stopping = Stopping(config.train.max_minutes)
    models.check_choices(config.model, config.lora)
    check_installed(config.tracking)
    chosen = processes.initialize(config)
    with processes.stopping_together(), stopping.listening():
        reporter = Reporter(silent=not processes.is_main())
        reporter.say(chosen)
        asked = _Asked(config, hooks, reporter, stopping, rater)
        compiled = Path(config.run.cache_dir).expanduser() / "compiled"
        try:
            with writing(asked.run_dir), keeping_compiled(compiled, reporter.say):
                return _run(asked)
        except Stopped as stopped:
            reporter.say(f"{stopped}; to go on: {resume_command(config, stopping.started)}")
            raise


def _run(asked: _Asked) -> RunResult:
    config, reporter, stopping, run_dir = asked.config, asked.reporter, asked.stopping, asked.run_dir
    if config.train.rounds and processes.num_processes() > 1:
        raise ValueError(
            f"train.rounds={config.train.rounds} samples on one process only, and there are "
            f"{processes.num_processes()}; start one with all devices of a host, or make data with rpo_jax.sample."
        )
    if config.train.sample_prompts and processes.num_processes() > 1:
        raise ValueError(
            f"train.sample_prompts={config.train.sample_prompts} samples on one process only so far; set it to 0, and "
            "sample the checkpoints with rpo_jax.generate."
        )
    if processes.is_main():
        check_login(config.tracking)
    if config.run.resume == "auto" and processes.is_main():
        set_aside_damaged(run_dir / CHECKPOINTS, reporter.say)
    resuming = stopping.started = check_run_folder(config, run_dir)
    if not resuming:
        check_unread(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.batch.pairs, config.batch.micro_rows, mesh)
    trim_after_compiling()
    reporter.say(f"{config.objective.name} on {_describe(mesh)}, run folder {run_dir}")
    if (note := unused_card()) is not None:
        reporter.say(note)
    if taken := options_taken(config):
        reporter.say(f"objective {config.objective.name}: {taken}")
    loaded = None if config.model.path is None else models.check_pretrained(config.model.path)
    # A new model at its smallest: its vocabulary, which may still be learnt, as that of bytes.
    planned = loaded or models.configured(config.model, min(config.model.vocab_size, 256), config.data.max_tokens)
    check_policy(config.model.router_aux_loss_coef, planned, mesh)
    for path in (config.reference.path, *config.reference.others):
        if path is not None and resolve(config).reference is not None:
            # Before anything is computed: the hub may not give it.
            check_experts(models.check_pretrained(path), mesh, needed=False)
    check_room(config, planned, run_dir, resuming=resuming)
    prepared = prepare(config, reporter, run_dir / MODEL if resuming else None)
    model_config = policy_config(config.model, config.data.max_tokens, prepared.tokenizer, loaded, reporter)
    steps, draws = run_length(config, prepared, mesh)
    for advice in advise(config, draws, steps, model_config.initializer_range):
        reporter.say(str(advice))
    base = base_record(config)
    record = {
        "model": to_json_dict(model_config),
        "config": to_json_dict(with_defaults_taken(config)),
        "base": base,
        "rendered": prepared.rendered,
        "versions": installed_versions(),
        "data": prepared.origins["train"]["data"],
        "labels": labels_of(prepared.train),
        "total_steps": steps,
    }
    if resuming:
        check_resumable(run_dir, record, reporter, config.run.force)
    # An accelerator may multiply float32 at less than float32's precision unless told otherwise.
    precision = "float32" if config.model.compute_dtype == "float32" else None
    with (
        jax.set_mesh(mesh),
        jax.default_matmul_precision(precision),
        explaining_memory(lambda: less_memory(config, mesh)),
    ):
        setup = make_setup(
            config, model_config, prepared, mesh, reporter, total_steps=steps, base=base, resuming=resuming
        )
        if not resuming:
            make_run_folder(config, model_config, prepared.tokenizer, run_dir)
            if processes.is_main():
                atomic_write(run_dir / DATA_COUNTS, json.dumps(prepared.counts, indent=2) + "\n")
        check_shared(run_dir)
        stopping.started = True
        result = _train(asked, setup, mesh, record)
    if result.stopped is None:
        return result
    reporter.say(f"stopped by {result.stopped}; saved in {result.checkpoint}")
    reporter.say(f"to go on: {resume_command(config, stopping.started)}")
    return result


def _describe(mesh: Mesh) -> str:
    kind = mesh.devices.flat[0].device_kind
    return f"{mesh.size} x {kind} (" + ", ".join(f"{name} {size}" for name, size in mesh.shape.items()) + ")"


def _train(asked: _Asked, setup: TrainingSetup, mesh: Mesh, record: dict[str, Any]) -> RunResult:
    config, reporter, stopping, run_dir = asked.config, asked.reporter, asked.stopping, asked.run_dir
    settings = config.train
    checkpoints = Checkpoints(
        run_dir / CHECKPOINTS,
        keep_last=settings.keep_last,
        keep_best=settings.keep_best,
        marker=run_dir / RUN_ID,
        save_bytes=total_bytes(setup.steps.abstract_state),
        warn=reporter.say,
    )
    state, first_step = setup.state, 0
    saved: dict[str, Any] = {"num_tokens": 0}
    newest = checkpoints.latest_step()
    if newest is not None:
        state, first_step, saved = checkpoints.restore(newest, state), newest, checkpoints.record(newest)
        reporter.say(f"resuming after step {newest} of {setup.total_steps}")
    run_id = (run_dir / RUN_ID).read_text(encoding="utf-8")
    main, resolved = processes.is_main(), record["config"]
    # Absent from older checkpoints, as is what the guard knows.
    unwritten = saved.get("unwritten_metrics", ())
    log = MetricsLog(
        run_dir, config.tracking, first_step, run_id, resolved, unwritten=unwritten, writing=main, say=reporter.say
    )
    bad_steps = run_dir / GUARD_FILE if main else None
    guard = Guard(config.guard, bad_steps, first_step, saved.get("guard", {}), reporter.say)
    stopping.defer()
    programs = Programs(setup.steps, mesh, setup.live_reference, setup.diagnosis, setup.batches, reporter.say)
    # A checkpoint is ranked by an evaluation of its own.
    evaluations = (settings.eval_every, settings.save_every if settings.keep_best else 0)

    def too_large() -> str:
        held = held_bytes(setup.steps.abstract_state, (setup.live_reference, setup.frozen))
        return f"at {programs.largest} {held}; {less_memory(config, mesh)}"

    try:
        with reporter.phase("train and evaluate"), explaining_memory(too_large), contextlib.ExitStack() as closing:
            # The order is part of an exact resume: a skipped step is counted before its line has the count, an
            # evaluation is sampled, made, logged and heard of before the checkpoint that it ranks, and a checkpoint is
            # the last of its step: all else of that step is on disk before a run can go on after it.
            saving = Saving(settings.save_every, checkpoints, record, programs, guard, log, reporter)
            extrapolation, rounds = list[Hook](), list[Hook]()
            if setup.rounds is not None:
                assert asked.rater is not None, "rpo_jax.run brings it"
                sampled = setup.rounds(asked.rater, saving, log)
                alpha, steps = config.rounds.extrapolation, sampled.batches.steps
                extrapolation, rounds = [Extrapolation(alpha, steps, setup.steps.state_shardings)], [sampled]
            stops = StopRequests(checkpoints)
            hooks = [
                Guarding(guard, lambda: programs.source.data, reporter),
                stops,
                *([] if setup.sampler is None else [setup.sampler]),
                Evaluation(evaluations, setup.held_out, programs, log.held_out.get("step"), guard, reporter, stops),
                Logging(settings.log_every, log, reporter, guard, closing),
                *asked.hooks,
                *extrapolation,
                saving,
                *rounds,  # their own files are complete before a step is taken on them
            ]
            epoch = setup.batches.steps_per_epoch
            progress = Training(state, first_step, saved["num_tokens"], setup.total_steps, epoch, stopping, hooks)
            train(progress, setup.batches, programs, guard.limit)
        newest = checkpoints.latest_step()
        assert newest is not None, "the last step is saved"
        newest_path = checkpoints.path(newest)
        if log.fault is not None:
            raise WriteFailed(
                f"{log.fault}; the run is finished and saved in {newest_path}, which has its last lines: "
                "start it once more with --resume auto to write them"
            )
    except RoundFailed:
        raise
    except ValueError as error:
        # Nothing that a user gave is read in here: this is a fault of ours, and its traceback is wanted.
        raise RuntimeError(f"training stopped: {error}") from error
    finally:
        log.close()
        checkpoints.close()
    processes.agree()  # process 0 may have more to put away, and jax would not wait for it
    metrics = {**log.training, **log.held_out, **log.round}
    return RunResult(run_dir, newest_path, metrics, log.initial, reporter.phase_seconds, stopping.reason)
