"""Heads that are trained beside the model and live in its state and checkpoints; only a reward is exported with it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from rpo_jax.objectives import partition, reward, running, value
from rpo_jax.objectives.objective import Objective

# The names of their parameters' axes.
HEADS: dict[str, dict[str, Any]] = {**partition.AXES, **value.AXES, **reward.AXES, **running.AXES}


def wanted(objective: Objective, learns_log_z: bool) -> tuple[str, ...]:
    """Names of the heads that an objective trains; `learns_log_z` as objective.partition asks for."""
    trained = {
        partition.NAME: learns_log_z or objective.uses_prompt_values,
        value.NAME: objective.uses_values,
        reward.NAME: objective.uses_reward_head,
        running.NAME: objective.keeps_mean,
    }
    return tuple(name for name, is_trained in trained.items() if is_trained)


def init(names: tuple[str, ...], hidden_size: int) -> dict[str, Any]:
    """Fresh heads of these names: they start at zero, and training as it would without them."""
    return {
        name: {part: jnp.zeros((hidden_size,) * len(axes), jnp.float32) for part, axes in HEADS[name].items()}
        for name in names
    }


def axes(names: tuple[str, ...]) -> dict[str, Any]:
    return {name: HEADS[name] for name in names}


def decayed(names: tuple[str, ...]) -> dict[str, dict[str, bool]]:
    """Which of their parameters weight decay shrinks: not biases, nor means."""
    return {name: {part: bool(axes) for part, axes in HEADS[name].items()} for name in names}


def split(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trained parameters without the heads, and the heads by their names."""
    model = {name: part for name, part in params.items() if name not in HEADS}
    return model, {name: part for name, part in params.items() if name in HEADS}
