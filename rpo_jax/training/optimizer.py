"""Optimizers and learning-rate schedules, from the `optim` section of the configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import Array, ArrayLike, Bool, Float, Shaped

from rpo_jax.config import OptimConfig
from rpo_jax.objectives import running

Schedule = Callable[[Any], Array]  # steps done to learning rate

# Of the configuration, numpy or jax.numpy, the steps since the warm-up and the share of all of them that is done.
_DECAYS: dict[str, Callable[[OptimConfig, Any, Any, Any], Any]] = {
    "constant": lambda _, xp, after, done: xp.ones_like(done),
    "linear": lambda _, xp, after, done: 1.0 - done,
    "cosine": lambda _, xp, after, done: 0.5 * (1.0 + xp.cos(xp.pi * done)),
    "wsd": lambda config, xp, after, done: xp.minimum(1.0, (1.0 - done) / config.decay_share),
    "inverse_sqrt": lambda config, xp, after, done: (1.0 + after / max(1, config.warmup_steps)) ** -0.5,
}
MUON_RMS = 0.2  # of a matrix's step, in learning rates: what AdamW's steps have (arXiv 2502.16982)
_BATCHED = ("layers", "experts")  # axes along which matrices are stacked
_VOCABULARY = "vocab"


def learning_rate_schedule(config: OptimConfig, total_steps: int) -> Schedule:
    """Learning rate of a step: linear warm-up, then constant or a decay that ends at `total_steps`.

    lr(s) = learning_rate * min(1, (s + 1) / (warmup_steps + 1)) * decay((s - warmup_steps) / (total - warmup_steps)).
    `wsd` (arXiv 2404.06395) stays constant up to the last decay_share of these steps and goes to zero linearly;
    `inverse_sqrt` (arXiv 1910.10683) is sqrt(warmup_steps / s), whatever the total. The warm-up is the authors'
    release's: the first step already moves.
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
    after = xp.maximum(step - config.warmup_steps, 0.0)
    done = xp.minimum(after / decay_steps, 1.0)
    return config.learning_rate * warm * _DECAYS[config.schedule](config, xp, after, done)


def make_optimizer(
    config: OptimConfig, schedule: Schedule, decayed: Any, axes: Any = None
) -> optax.GradientTransformation:
    """Gradient transformation: clip by global norm, precondition, decay weights, scale by the learning rate.

    Args:
        decayed: tree of bools, which parameters weight decay shrinks (rpo_jax.models.Policy.decayed).
        axes: the names of every parameter's axes (rpo_jax.models.Policy.trained), which only muon asks for.

    rmsprop has torch.optim.RMSprop's constants: v = decay * v + (1 - decay) * g^2 from v = 0, and
    g / (sqrt(v) + eps) with eps outside the root. adafactor (arXiv 1804.04235) has no momentum and no scaling by the
    parameters: its second moment is factored along the two largest axes, and a step's root mean square is at most the
    learning rate. muon (arXiv 2502.16982) orthogonalises the momentum of every matrix of the layers, and leaves the
    rest, embedding and head among it, to adamw; a matrix's step has a root mean square of 0.2 learning rates.
    """
    direction = {
        "rmsprop": lambda: optax.scale_by_rms(decay=config.decay, eps=config.eps, eps_in_sqrt=False),
        "adamw": lambda: optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        "lion": lambda: optax.scale_by_lion(b1=config.b1, b2=config.b2),
        "adafactor": lambda: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
        "muon": lambda: _muon(config, axes),
    }[config.name]()
    steps = [optax.clip_by_global_norm(config.max_grad_norm), direction]
    if config.name != "rmsprop" and config.weight_decay:
        steps.append(_decay_weights(config.weight_decay, decayed))
    return optax.chain(*steps, optax.scale_by_learning_rate(schedule))


class Anchor(NamedTuple):
    """The weights as they were at the start of the round, before they were extrapolated."""

    params: Any


def with_anchor(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer with an Anchor before its state: what rounds are extrapolated from is saved and placed with it."""

    def init(params: Any) -> Anchor:
        # A sum, so that the weights, which a step gives up, are not the same arrays.
        return Anchor(jax.tree.map(lambda leaf: leaf + 0, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return updates, state

    return optax.chain(optax.GradientTransformation(init, update), optimizer)


def extrapolated(state: Any, alpha: float) -> Any:
    """The training state after a round as the next one begins: theta = theta' + alpha (theta' - anchor).

    theta' are the weights of the state, and the anchor is then theta'. Source: accelerated preference optimisation,
    arXiv 2410.06293; that the sum is one of weights is how it is probably done in practice.
    """
    anchor, *rest = state.opt_state
    params = jax.tree.map(lambda now, before: now + alpha * (now - before), state.params, anchor.params)
    params |= {name: part for name, part in state.params.items() if name == running.NAME}  # no weights
    return state._replace(params=params, opt_state=(Anchor(state.params), *rest))


def _muon(config: OptimConfig, axes: Any) -> optax.GradientTransformation:
    """Muon's direction for the matrices among parameters of these axes, Adam's for the others."""
    # Not optax.contrib.muon: what finds the state's leaves for their shardings has no parameters to tell these by.
    sides = jax.tree.map(_sides, axes, is_leaf=lambda names: isinstance(names, tuple))

    def scaled(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda u, of: u * MUON_RMS * max(_size(u, of[0]), _size(u, of[1])) ** 0.5, updates, sides)

    return optax.partition(
        {
            "muon": optax.chain(optax.contrib.scale_by_muon(weight_dimension_numbers=sides), optax.stateless(scaled)),
            "adam": optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        },
        jax.tree.map(lambda of: "muon" if of else "adam", sides, is_leaf=lambda of: isinstance(of, tuple)),
    )


def _sides(names: tuple[str, ...]) -> Any:
    """Which axes of a parameter are a matrix's inputs and outputs; none where it is no matrix, or belongs to words.

    Heads and their dimensions are one side together.
    """
    sides: list[list[int]] = []
    for axis, name in enumerate(names):
        if name == "head_dim" and sides:
            sides[-1].append(axis)
        elif name not in _BATCHED:
            sides.append([axis])
    if len(sides) != 2 or _VOCABULARY in names:
        return optax.MaskedNode()
    return optax.contrib.MuonDimensionNumbers(*map(tuple, sides))


def _size(update: Array, axes: tuple[int, ...]) -> int:
    return math.prod(update.shape[axis] for axis in axes)


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
