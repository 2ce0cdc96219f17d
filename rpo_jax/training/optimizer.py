"""Optimizers and learning-rate schedules, from the `optim` section of the configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Bool, Float, Shaped

from rpo_jax.config import OptimConfig

Schedule = Callable[[Any], Array]  # steps done to learning rate

_DECAYS: dict[str, Callable[[Any, Any], Any]] = {  # of numpy or jax.numpy, and the share of the steps that is done
    "constant": lambda xp, done: xp.ones_like(done),
    "linear": lambda _, done: 1.0 - done,
    "cosine": lambda xp, done: 0.5 * (1.0 + xp.cos(xp.pi * done)),
}


def learning_rate_schedule(config: OptimConfig, total_steps: int) -> Schedule:
    """Learning rate of a step: linear warm-up, then constant or a decay that ends at `total_steps`.

    lr(s) = learning_rate * min(1, (s + 1) / (warmup_steps + 1)) * decay((s - warmup_steps) / (total - warmup_steps)).
    The warm-up is the authors' release's: the first step already moves.
    """

    def schedule(step: Shaped[ArrayLike, ""]) -> Float[Array, ""]:
        return _learning_rate(config, total_steps, jnp.asarray(step, jnp.float32), jnp)

    return schedule


def learning_rates(config: OptimConfig, total_steps: int) -> Float[np.ndarray, "s"]:
    """Those of all steps of a run, on the host: nothing is compiled for them."""
    return _learning_rate(config, total_steps, np.arange(total_steps, dtype=np.float32), np)


def _learning_rate(config: OptimConfig, total_steps: int, step: Any, xp: Any) -> Any:
    decay_steps = max(1, total_steps - config.warmup_steps)
    warm = xp.minimum(1.0, (step + 1.0) / (config.warmup_steps + 1.0))
    done = xp.clip((step - config.warmup_steps) / decay_steps, 0.0, 1.0)
    return config.learning_rate * warm * _DECAYS[config.schedule](xp, done)


def make_optimizer(config: OptimConfig, schedule: Schedule, decayed: Any) -> optax.GradientTransformation:
    """Gradient transformation: clip by global norm, precondition, decay weights, scale by the learning rate.

    Args:
        decayed: tree of bools, which parameters weight decay shrinks (rpo_jax.models.Policy.decayed).

    rmsprop has torch.optim.RMSprop's constants: v = decay * v + (1 - decay) * g^2 from v = 0, and
    g / (sqrt(v) + eps) with eps outside the root.
    """
    direction = {
        "rmsprop": lambda: optax.scale_by_rms(decay=config.decay, eps=config.eps, eps_in_sqrt=False),
        "adamw": lambda: optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        "lion": lambda: optax.scale_by_lion(b1=config.b1, b2=config.b2),
    }[config.name]()
    steps = [optax.clip_by_global_norm(config.max_grad_norm), direction]
    if config.name != "rmsprop" and config.weight_decay:
        steps.append(_decay_weights(config.weight_decay, decayed))
    return optax.chain(*steps, optax.scale_by_learning_rate(schedule))


def _decay_weights(rate: float, decayed: Any) -> optax.GradientTransformation:
    """optax.add_decayed_weights(rate, mask=decayed) with the state that it has without a mask.

    A mask would be one more level of it, and checkpoints of earlier runs could not be restored.
    """

    def update(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda shrinks, u, p: u + rate * p if shrinks else u, decayed, updates, params)

    return optax.stateless(update)


def accept_if(good: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The new parameters and optimizer state, or the old ones; the learning rate's count of steps always goes on.

    Each array is chosen as it is made, so that it can take the place of the old one.
    """

    def choose(new: Any, old: Any) -> Any:
        return new if isinstance(new, optax.ScaleByScheduleState) else jnp.where(good, new, old)

    return jax.tree.map(choose, new, old, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))
