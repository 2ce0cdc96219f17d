"""The mean of something over all batches so far, kept beside the trained parameters, where checkpoints have it.

No gradient reaches it: a step adds its batch once its parameters are updated, and one that is skipped adds nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NAME = "running"  # of the head among the trained parameters
AXES: dict[str, Any] = {NAME: {"mean": (), "count": ()}}
Running = dict[str, Float[Array, ""]]  # mean, and how many values it is of; of none the mean is 0


def joined(before: Running, mean: Float[Array, ""], count: Float[Array, ""]) -> Running:
    """The mean over the batches before and one more, whose own mean and number of values are given; no gradient."""
    total = before["count"] + count
    share = count / jnp.maximum(total, 1.0)
    return jax.lax.stop_gradient({"mean": before["mean"] + (mean - before["mean"]) * share, "count": total})


def fixed(before: Running) -> Running:
    """The same as a mean that no batch changes: for evaluation."""
    return {**before, "count": jnp.full_like(before["count"], jnp.inf)}
