"""Train a policy on preferences: `python -m rpo_jax.train --config configs/NAME.yaml [--section.key value ...]`."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rpo_jax import models, sharding
from rpo_jax.checkpoint import Checkpoints, check_architecture, comparable
from rpo_jax.config import Config
from rpo_jax.config_io import dump_config, parse_config
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.data.tokenizer import VOCABULARY_FILES, load_tokenizer
from rpo_jax.loop import TrainingLoop
from rpo_jax.models import ModelConfig
from rpo_jax.models.folders import written_whole
from rpo_jax.prepare import Prepared, batches_of, checked_objective, is_paired, prepare, sweep_of
from rpo_jax.reference import cached_log_probs, folder_fingerprint, params_fingerprint
from rpo_jax.step import Params, Steps, TrainState, build_log_probs, build_steps, put_batch
from rpo_jax.tracking import MetricsLog, Reporter, check_tracking, summary
from rpo_jax.types import PreferenceData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_CONFIG = "generation_config.json"
CHECKPOINTS = "checkpoints"  # folder of a run


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind.

    Attributes:
        run_dir: the run folder.
        checkpoint: the last step's checkpoint.
        metrics: the last training metrics and the last held-out ones (with `eval_` in front).
        initial_metrics: held-out metrics before the first step.
        phase_seconds: wall time of each phase.
    """

    run_dir: Path
    checkpoint: Path
    metrics: dict[str, float]
    initial_metrics: dict[str, float]
    phase_seconds: dict[str, float]


def run(config: Config) -> RunResult:
    """Train as configured and return where the result is.

    Raises:
        ValueError: for anything in the configuration, the data or the model folder that cannot be used; nothing has
            been compiled then, and no run folder made.
    """
    reporter = Reporter()
    run_dir = Path(config.run.dir).expanduser()
    checked_objective(config)
    check_tracking(config.tracking)
    resuming = _check_run_dir(config, run_dir)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.batch.pairs, config.batch.micro_rows, mesh)
    jax.config.update("jax_compilation_cache_dir", str(_cache_dir(config) / "compiled"))

    reporter.say(f"{config.objective.name} on {_describe(mesh)}, run folder {run_dir}")
    loaded = None if config.model.path is None else models.check_pretrained(config.model.path)
    prepared = prepare(config, reporter, run_dir / "model" if resuming else None)
    model_config = _policy_config(config, prepared, loaded)
    record = {"model": comparable(model_config), "config": dataclasses.asdict(config)}
    if resuming:
        _check_resumable(run_dir, record, reporter)
    # An accelerator may multiply float32 at less than float32's precision unless told otherwise.
    precision = "float32" if config.model.compute_dtype == "float32" else None
    with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
        policy = _start(config, model_config, prepared, mesh, reporter)
        if not resuming:
            _make_run_dir(config, model_config, prepared, run_dir)
        return _train(config, policy, mesh, run_dir, record, reporter)


def _cache_dir(config: Config) -> Path:
    return Path(config.run.cache_dir).expanduser()


def _describe(mesh: Mesh) -> str:
    kind = mesh.devices.flat[0].device_kind
    return f"{mesh.size} x {kind} (" + ", ".join(f"{name} {size}" for name, size in mesh.shape.items()) + ")"


def _check_run_dir(config: Config, run_dir: Path) -> bool:
    """Whether there is a run to resume; ValueError for one that neither resume nor overwrite was asked for."""
    nearest = next(place for place in (run_dir, *run_dir.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"run.dir={run_dir} cannot be made: {nearest} is no folder to write to; choose another.")
    occupied = run_dir.exists() and any(run_dir.iterdir())
    if occupied and not (run_dir / "config.yaml").exists():
        raise ValueError(f"run.dir={run_dir} is not empty and holds no run; choose another folder.")
    if occupied and config.run.resume == "never" and not config.run.overwrite:
        raise ValueError(
            f"run.dir={run_dir} holds a run already; go on with it (--resume auto), replace it (--overwrite), or "
            "choose another folder."
        )
    return occupied and config.run.resume == "auto"


def _reference_config(path: str, tokenizer: PreTrainedTokenizerBase) -> ModelConfig:
    """Architecture of a reference of its own; ValueError unless it reads the policy's tokens as the policy does."""
    reference_config, folder = models.check_pretrained(path), models.resolve_folder(path)
    if len(tokenizer) > reference_config.vocab_size:
        raise ValueError(
            f"reference.path={path} has a vocabulary of {reference_config.vocab_size} tokens, the policy's tokenizer "
            f"{len(tokenizer)}; use a reference that was trained with the policy's tokenizer."
        )
    if any((folder / name).is_file() for name in VOCABULARY_FILES):
        theirs = load_tokenizer(folder).get_vocab()
        for token, number in tokenizer.get_vocab().items():
            if theirs.get(token) != number:
                raise ValueError(
                    f"reference.path={path} has another vocabulary than the policy: token {token!r} has id "
                    f"{theirs.get(token)} there and {number} in the policy's tokenizer; use a reference that was "
                    "trained with the policy's tokenizer."
                )
    return reference_config


def _policy_config(config: Config, prepared: Prepared, loaded: ModelConfig | None) -> ModelConfig:
    tokenizer, size = prepared.tokenizer, config.model
    if loaded is not None:
        if len(tokenizer) > loaded.vocab_size:
            raise ValueError(
                f"The tokenizer in {size.path} has {len(tokenizer)} tokens, its model only {loaded.vocab_size}; "
                "use the tokenizer that belongs to the model."
            )
        return loaded
    return models.new_config(
        family=size.family,
        # Rounded up so that a tensor axis can split it.
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        num_kv_heads=size.num_kv_heads,
        tie_embeddings=size.tie_embeddings,
        rope_theta=size.rope_theta,
        max_position_embeddings=config.data.max_tokens,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    )


def _load(path: str, shardings: Any) -> Params:
    _, host = models.load_pretrained(path)
    return jax.tree.map(jax.device_put, host, shardings)


def _initial_params(config: Config, model_config: ModelConfig, shardings: Any) -> Params:
    if config.model.path is not None:
        return _load(config.model.path, shardings)
    # Compiled with its output's shardings: each device makes only its own part.
    init = jax.jit(models.init_params, static_argnums=0, out_shardings=shardings)
    return init(model_config, jax.random.key(config.run.seed))


def _provide_reference(
    config: Config, reference_config: ModelConfig, params: Params, prepared: Prepared, mesh: Mesh, reporter: Reporter
) -> tuple[Params | None, Prepared]:
    """Parameters of a live reference, or None; and the data, with the reference's log-probs where they are cached."""
    mode = config.reference.mode
    if mode == "none" or not checked_objective(config).uses_reference:
        return None, prepared
    log_probs, shardings = build_log_probs(config, reference_config, mesh)
    if mode == "live":
        if config.reference.path is not None:
            return _load(config.reference.path, shardings), prepared
        # The step gives its state's buffers up: the reference needs its own.
        return jax.tree.map(jnp.copy, params), prepared

    source = config.reference.path or config.model.path
    weights = params_fingerprint(params) if source is None else folder_fingerprint(models.resolve_folder(source))

    @functools.cache  # loaded at most once, and only where a cache is missing
    def reference_params() -> Params:
        return params if config.reference.path is None else _load(config.reference.path, shardings)

    filled = {}
    with reporter.phase("reference log-probs") as notes:
        for name, responses in (("train", prepared.responses), ("held_out", prepared.eval_responses)):
            data: PreferenceData | None = getattr(prepared, name)
            if data is None:
                continue
            sweep = sweep_of(config, data, responses, sharding.row_shards(mesh))
            with reporter.progress(f"reference, {name}", sweep.steps_per_epoch) as update:
                filled[name], found = cached_log_probs(
                    data,
                    sweep,
                    (weights, reference_config, config.model.compute_dtype),
                    _cache_dir(config),
                    lambda batch: log_probs(reference_params(), put_batch(mesh, batch)),
                    update,
                )
            notes.append(f"{name} {'from the cache' if found else 'computed'}")
    return None, dataclasses.replace(prepared, **filled)


@dataclass(frozen=True)
class _Start:
    """Everything that the first step needs."""

    steps: Steps
    state: TrainState
    live_reference: Params | None
    batches: PreferenceBatches
    held_out: PreferenceBatches | None
    total_steps: int


def _start(config: Config, model_config: ModelConfig, prepared: Prepared, mesh: Mesh, reporter: Reporter) -> _Start:
    shards = sharding.row_shards(mesh)
    reference_config = model_config
    if config.reference.path is not None:
        reference_config = _reference_config(config.reference.path, prepared.tokenizer)
    steps_per_epoch = batches_of(config, prepared.train, prepared.responses, shards).steps_per_epoch
    total_steps = config.train.steps or max(1, round(config.train.epochs * steps_per_epoch))
    steps = build_steps(
        config,
        model_config,
        mesh,
        total_steps,
        eval_paired=prepared.held_out is not None and is_paired(prepared.held_out),
        reference_config=reference_config,
    )
    with reporter.phase("load model") as notes:
        params = jax.block_until_ready(_initial_params(config, model_config, steps.state_shardings.params))
        notes.append(f"{models.count_params(model_config):,} parameters, {model_config.family}")
    live, prepared = _provide_reference(config, reference_config, params, prepared, mesh, reporter)
    held_out = None
    if prepared.held_out is not None:
        held_out = sweep_of(config, prepared.held_out, prepared.eval_responses, shards)
    batches = batches_of(config, prepared.train, prepared.responses, shards)
    return _Start(steps, steps.init(params), live, batches, held_out, total_steps)


def _make_run_dir(config: Config, model_config: ModelConfig, prepared: Prepared, run_dir: Path) -> None:
    """A new run folder: config.yaml, and in `model` all of a Hugging Face folder but the weights."""
    with written_whole(run_dir, overwrite=True) as folder:
        models.to_transformers(model_config, model_config.dtype).save_pretrained(folder / "model")
        prepared.tokenizer.save_pretrained(folder / "model")
        if config.model.path is not None:
            settings = models.resolve_folder(config.model.path) / GENERATION_CONFIG
            if settings.is_file():
                shutil.copyfile(settings, folder / "model" / GENERATION_CONFIG)
        (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")


def _check_resumable(run_dir: Path, record: dict[str, Any], reporter: Reporter) -> None:
    """ValueError where the newest checkpoint is of another model or optimizer; says which other settings differ."""
    checkpoints = Checkpoints(run_dir / CHECKPOINTS, read_only=True)
    newest = checkpoints.latest_step()
    saved = None if newest is None else checkpoints.record(newest)
    checkpoints.close()
    if saved is None:
        return
    check_architecture(saved["model"], record["model"], run_dir)
    changed = {
        f"{section}.{key}": (before, now)
        for section, values in record["config"].items()
        for key, now in values.items()
        if (before := saved["config"][section].get(key)) != now
        # Where, how long and on what a run goes on may change without changing what its steps compute.
        and section not in ("mesh", "train", "tracking")
        and key not in ("dir", "cache_dir", "resume", "overwrite")
    }
    if "optim.name" in changed:
        before, now = changed["optim.name"]
        raise ValueError(
            f"The checkpoint in {run_dir} holds the state of optim.name={before}, not of {now}; resume with {before}, "
            "or choose another run.dir."
        )
    for key, (before, now) in changed.items():
        reporter.say(f"resuming with another {key}: {before} until now, {now} from here on")


def _train(
    config: Config, start: _Start, mesh: Mesh, run_dir: Path, record: dict[str, Any], reporter: Reporter
) -> RunResult:
    checkpoints = Checkpoints(run_dir / CHECKPOINTS, keep_last=config.train.keep_last, keep_best=config.train.keep_best)
    state, first_step, num_tokens = start.state, 0, 0
    newest = checkpoints.latest_step()
    if newest is not None:
        state, first_step = checkpoints.restore(newest, state), newest
        num_tokens = checkpoints.record(newest)["num_tokens"]
        reporter.say(f"resuming after step {newest} of {start.total_steps}")
    log = MetricsLog(run_dir, config.tracking, first_step, record["config"])
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
    )
    try:
        with reporter.phase("train and evaluate"):
            initial, last = loop.run(state, first_step, num_tokens)
    except ValueError as error:
        # Nothing that a user gave is read in here: this is a fault of ours, and its traceback is wanted.
        raise RuntimeError(f"training stopped: {error}") from error
    finally:
        log.close()
        checkpoints.close()
    newest_path = checkpoints.path(max(first_step, start.total_steps))  # a run may be resumed with fewer steps
    return RunResult(run_dir, newest_path, last, initial, reporter.phase_seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `run`; exit status 2 and one line for what a user can mend."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells of every save and restore
    try:
        result = run(parse_config(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"done: {summary(result.metrics)}")
    print(f"checkpoint {result.checkpoint}")
    print(f"export it: python -m rpo_jax.export --run {result.run_dir} --out {result.run_dir}/hf")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
