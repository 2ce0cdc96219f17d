"""Rewards of the held-out responses under a run's checkpoint, as histograms."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from rpo_jax import models
from rpo_jax.config import Config, MeshConfig, resolve
from rpo_jax.hosts import sharding
from rpo_jax.objectives.metrics import TIE_NATS, TIE_SHARE
from rpo_jax.runs.folder import MODEL, base_record
from rpo_jax.runs.tracking import Reporter
from rpo_jax.sampling.policy import find_policy
from rpo_jax.training.prepare import Prepared
from rpo_jax.training.setup import make_setup, run_length
from rpo_jax.training.step import build_log_probs, put_batch

BINS = 32
SIDES = ("chosen", "rejected")


def _here(config: Config, base: Path | None) -> Config:
    """The configuration with which held-out data is scored once: on all devices here, the reference from the cache.

    Args:
        base: where a LoRA run's base is now; None for other runs.
    """
    mode = "none" if config.reference.mode == "none" else "cached"
    objective = resolve(config).objective
    if objective.uses_tokens:  # which the cache has not; a reward is of a whole response, as with any other objective
        plain = type(config.objective)(name="rpo", beta=objective.beta)
        uniform = dataclasses.replace(config.contrast, weights="uniform")
        data = dataclasses.replace(config.data, label_smoothing=None)  # a loss's, which is not wanted here
        config = dataclasses.replace(config, objective=plain, contrast=uniform, data=data)
    devices, batch = jax.device_count(), config.batch
    shards = math.gcd(devices, batch.pairs)
    rows = batch.micro_rows and -(-batch.micro_rows // shards) * shards
    return dataclasses.replace(
        config,
        mesh=MeshConfig(data=1, fsdp=shards, tensor=devices // shards),
        batch=dataclasses.replace(batch, micro_rows=rows),
        model=config.model if base is None else dataclasses.replace(config.model, path=str(base)),
        reference=dataclasses.replace(config.reference, mode=mode),
        train=dataclasses.replace(config.train, sample_prompts=0),
    )


def held_out_scores(
    run_dir: Path, config: Config, prepared: Prepared, reporter: Reporter, base: str | None = None
) -> tuple[dict[str, Float[np.ndarray, "n"]], Float[np.ndarray, "n"], int]:
    """Scores of every held-out example's responses under the newest checkpoint; below what its pair ties; its step.

    Rewards, that is beta times the log-ratio to the reference; summed log-probs in nats where the objective has no
    reference. NaN where an example has no such response. Reference log-probs come from the run's cache, or are
    computed into it.

    Args:
        base: of a LoRA run: where the model that it started from is now, if it has moved.

    Raises ValueError without held-out data, a checkpoint, or the base that a LoRA run was trained on.
    """
    if prepared.held_out is None:
        raise ValueError("the run has no held-out data; set data.eval_path or data.eval_rows.")
    policy = find_policy(str(run_dir), base=base)
    settings = _here(config, policy.folder)
    model_config = models.read_config(run_dir / MODEL)
    mesh = sharding.make_mesh(settings.mesh)
    precision = "float32" if config.model.compute_dtype == "float32" else None
    with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
        setup = make_setup(
            settings,
            model_config,
            prepared,
            mesh,
            reporter,
            total_steps=run_length(settings, prepared, mesh)[0],
            base=base_record(settings),
            resuming=True,
        )
        assert setup.held_out is not None, "there is held-out data"
        log_probs, _ = build_log_probs(settings, model_config, mesh)
        params = policy.load(mesh)
        method = resolve(settings)
        scores = {name: np.full(len(prepared.held_out.examples), np.nan) for name in SIDES}
        ties = np.full(len(prepared.held_out.examples), TIE_NATS)
        beta = 1.0 if method.reference is None else method.objective.beta
        for index in range(setup.held_out.steps_per_epoch):
            batch = setup.held_out.batch_at(index)
            row_log_probs = np.asarray(log_probs(params, put_batch(mesh, batch)).log_prob, np.float64)
            for name in (name for name in SIDES if name in batch.sides):
                side, values = batch.sides[name], row_log_probs[batch.slots()[name]]
                examples = side.example_index[side.valid]
                np.maximum.at(ties, examples, TIE_SHARE * np.abs(values[side.valid]))
                if method.reference is not None:
                    values = beta * (values - side.reference_log_prob)
                scores[name][examples] = values[side.valid]
    return scores, beta * ties, policy.step


def for_page(
    scores: dict[str, Float[np.ndarray, "n"]], ties: Float[np.ndarray, "n"], step: int, rewards: bool
) -> dict[str, Any] | str:
    """What the page draws: counts of both sides in the same bins, and of pairs' margins; or why there is nothing.

    rewards: whether the scores are these; otherwise they are log-probs.
    """
    margins = scores["chosen"] - scores["rejected"]
    pairs, tie = margins[np.isfinite(margins)], ties[np.isfinite(margins)]
    if not any(np.isfinite(values).any() for values in scores.values()):
        return f"No score of the held-out data is a finite number at step {step}: the run has diverged."
    return {
        "step": step,
        "score": "reward" if rewards else "log-prob",
        "unit": "" if rewards else "nats",
        "sides": _histogram({name: values[np.isfinite(values)] for name, values in scores.items()}),
        "margins": _histogram({"chosen − rejected": pairs}) if len(pairs) else None,
        "accuracy": float(np.mean(pairs > tie)) if len(pairs) else None,
        "tied": bool(np.all(np.abs(pairs) <= tie)),
    }


def _histogram(values: dict[str, Float[np.ndarray, "_"]]) -> dict[str, Any]:
    together = np.concatenate(list(values.values()))
    low, high = float(together.min()), float(together.max())
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # all alike, as before the first step
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    return {
        "edges": [float(f"{edge:.8g}") for edge in edges],
        "counts": {name: np.histogram(x, bins=edges)[0].tolist() for name, x in values.items() if len(x)},
        "means": {name: float(f"{np.mean(x):.5g}") for name, x in values.items() if len(x)},
    }
