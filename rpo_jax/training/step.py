"""The sharded training step: log-probs of all responses, one loss on their contrast matrix, exact micro-batches.

Letters: R rows and T tokens of a packed batch; P response slots of all kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Float, Int

from rpo_jax import models
from rpo_jax.config import Config, resolve
from rpo_jax.core.records import Batch
from rpo_jax.hosts import sharding
from rpo_jax.models import ModelConfig
from rpo_jax.objectives import heads, metrics, partition, reward, running, value
from rpo_jax.objectives.losses import Objective
from rpo_jax.training.forward import make_log_probs
from rpo_jax.training.micro_batches import (
    ROW_FIELDS,
    Forward,
    LogProbs,
    TokenScores,
    all_log_probs,
    make_loss_and_gradient,
)
from rpo_jax.training.optimizer import accept_if, learning_rate_schedule, make_optimizer, with_anchor
from rpo_jax.training.scoring import Means, make_loss

Params = Any
NOTHING: Params = {}  # is frozen where all weights are trained


class TrainState(NamedTuple):
    """What training changes, and all that a checkpoint needs: float32 masters, optimizer state, steps done.

    With LoRA the parameters are the adapters alone; the base, which they are nothing without, is an argument apart.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any


class Gradient(NamedTuple):
    """What a step finds; the batch with the log-probs of a reference that runs beside the policy."""

    loss: Array
    means: Means
    gradient: Params
    batch: Batch


@dataclass(frozen=True)
class Steps:
    """The compiled functions of a run.

    Attributes:
        objective: what the run minimises.
        init: what the policy trains to a fresh TrainState, which has the heads besides; the parameters are given up.
        train: (state, batch, live reference's parameters or None) to (state, metrics); the state is given up. A step
            whose loss or gradient is not finite, or whose gradient norm exceeds `limit` where one is given, leaves
            parameters and moments as they are: `skipped` is then 1 in the metrics. `compared` is what the loss is a
            mean over.
        evaluate: (parameters, batch, live reference's parameters or None) to the metrics' means.
            Where adapters are trained both need the frozen weights besides, as `frozen`; `on` gives it to them.
        gradient: the same arguments, `frozen` too, to what a step finds before it changes anything; not compiled.
        state_shardings: where each part of the state lives.
        abstract_state: shapes, dtypes and shardings of the state, to restore a checkpoint into.
    """

    objective: Objective
    init: Callable[[Params], TrainState]
    train: Callable[..., tuple[TrainState, dict[str, Array]]]
    evaluate: Callable[..., Means]
    gradient: Callable[..., Gradient]
    state_shardings: Any
    abstract_state: Any

    @property
    def model_shardings(self) -> Any:
        """Where the parameters live that `init` takes."""
        return heads.split(self.state_shardings.params)[0]

    def on(self, frozen: Params) -> Steps:
        """The same with the policy's frozen weights, which stay the caller's."""
        return replace(self, train=partial(self.train, frozen=frozen), evaluate=partial(self.evaluate, frozen=frozen))


def _with_reference(batch: Batch, log_probs: LogProbs) -> Batch:
    """The batch with the reference's log-probs filled in."""
    filled = {
        kind: batch.sides[kind]._replace(reference_log_prob=log_probs.log_prob[at])
        for kind, at in batch.slots().items()
    }
    return batch._replace(sides=filled)


def check_experts(model_config: ModelConfig, mesh: Mesh, needed: bool = True) -> None:
    """Raise ValueError for experts that the mesh's axis does not divide, or, if they are needed for it, for none."""
    experts = model_config.parts.experts
    sharding.check_experts(experts and experts.count, mesh, f"the {model_config.family} model", needed=needed)


def check_policy(router_aux_loss_coef: float, model_config: ModelConfig, mesh: Mesh) -> None:
    """Raise ValueError for keys that a policy of this architecture does not go with."""
    check_experts(model_config, mesh)
    if router_aux_loss_coef and model_config.parts.experts is None:
        raise ValueError(
            f"model.router_aux_loss_coef={router_aux_loss_coef} weighs the load-balancing loss of a mixture of "
            f"experts, and the {model_config.family} model has no experts; leave it out."
        )


def build_log_probs(
    config: Config, model_config: ModelConfig, mesh: Mesh
) -> tuple[Callable[[Params, Batch], LogProbs], Any]:
    """Compiled function from parameters and batch to the responses' log-probs, and the parameters' shardings.

    The parameters may also be a frozen base, or a base with adapters, placed as their own axes say.
    """
    forward = make_log_probs(config, model_config, mesh)

    def log_probs(params: Params, batch: Batch) -> LogProbs:
        return all_log_probs(forward, config.batch.micro_rows, params, batch)

    shardings = sharding.parameter_shardings(mesh, *models.Policy(model_config).weights)
    return jax.jit(log_probs, out_shardings=sharding.replicated(mesh)), shardings


def build_steps(
    config: Config,
    model_config: ModelConfig,
    mesh: Mesh,
    total_steps: int,
    *,
    eval_paired: bool = True,
    reference_config: ModelConfig | None = None,
    pad_id: int | None = None,
) -> Steps:
    """Compile-on-first-use functions of a run on a mesh.

    Args:
        total_steps: where a decaying learning rate ends.
        eval_paired: whether slot i of chosen and rejected is one pair in held-out batches.
        reference_config: architecture of a live reference; the policy's where not given.
        pad_id: the tokenizer's padding token, which a reward is not read from.

    Raises ValueError for what the architecture, or its experts on this mesh, do not go with.
    """
    check_policy(config.model.router_aux_loss_coef, model_config, mesh)
    if reference_config is not None:
        check_experts(reference_config, mesh, needed=False)
    method, policy = resolve(config), models.Policy(model_config, config.lora)
    objective = method.objective
    schedule = learning_rate_schedule(config.optim, total_steps)
    all_axes = {**policy.trained.axes, **heads.axes(method.heads)}
    optimizer = make_optimizer(config.optim, schedule, {**policy.decayed, **heads.decayed(method.heads)}, all_axes)
    if config.rounds.extrapolation:
        optimizer = with_anchor(optimizer)
    sees = {"tokens": objective.uses_tokens, "collisions": objective.uses_confidence}
    forward = make_log_probs(config, model_config, mesh, pad_id=pad_id, **sees)
    reference_forward = make_log_probs(config, reference_config or model_config, mesh, tokens=objective.uses_tokens)
    balance = config.model.router_aux_loss_coef
    scored = make_loss(method, config.contrast.alpha, config.contrast.block, mesh, balance)
    micro_rows, micro_keep = config.batch.micro_rows, config.batch.micro_keep

    def forward_on(frozen: Params) -> Forward:
        """The forward pass as a function of what is trained."""
        assert bool(frozen) == policy.trains_adapters, "adapters are trained on frozen weights, and only they"

        def of_trained(trained: Params, rows: dict[str, Array], num_responses: int) -> LogProbs:
            params, of_heads = heads.split(trained)
            log_z = of_heads[partition.NAME]["kernel"] if partition.NAME in of_heads else None
            other_heads = of_heads.get(value.NAME), of_heads.get(reward.NAME)
            return forward(policy.combine(params, frozen), rows, num_responses, log_z, *other_heads)

        return of_trained

    def referenced(batch: Batch, reference: Params | None, frozen: Params) -> tuple[Batch, TokenScores | None]:
        """The batch with a reference's log-probs that runs beside the policy, and what it says of every token."""
        if method.reference == "adapter":
            reference = frozen
        if reference is None:
            return batch, None
        log_probs = all_log_probs(reference_forward, micro_rows, reference, batch)
        return _with_reference(batch, log_probs), log_probs.tokens

    def gradient(params: Params, batch: Batch, reference: Params | None, frozen: Params = NOTHING) -> Gradient:
        batch, of_tokens = referenced(batch, reference, frozen)
        scored_batch = partial(scored, batch, of_tokens, method.paired, before=params.get(running.NAME))
        loss_and_gradient = make_loss_and_gradient(
            forward_on(frozen), scored_batch, params, batch, micro_rows, micro_keep
        )
        return Gradient(*loss_and_gradient, batch)

    def train(
        state: TrainState,
        batch: Batch,
        reference: Params | None,
        frozen: Params = NOTHING,
        limit: Float[ArrayLike, ""] | None = None,
    ) -> tuple[TrainState, dict[str, Array]]:
        value, means, changes, _ = gradient(state.params, batch, reference, frozen)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(changes)
            # Of the gradient alone, which clipping needs whole before any update: asking about the new parameters would
            # keep the old ones beside them.
            good = jnp.isfinite(value) & jnp.isfinite(grad_norm)
            if limit is not None:
                good &= grad_norm <= limit
            updates, opt_state = optimizer.update(changes, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, updates)
            if running.NAME in params:
                of_batch = means.pop(running.NAME)
                mean = metrics.finalize({running.NAME: of_batch})[running.NAME]
                params[running.NAME] = running.joined(state.params[running.NAME], mean, of_batch.count[0])
        report = {
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step),
            **metrics.finalize(means),
            "loss": value,
            "compared": means["loss"].count[0],
            "skipped": 1.0 - good.astype(jnp.float32),
        }
        with jax.named_scope("optimizer"):
            kept = accept_if(good, (params, opt_state), (state.params, state.opt_state))
        return TrainState(state.step + 1, *kept), report

    def evaluate(params: Params, batch: Batch, reference: Params | None, frozen: Params = NOTHING) -> Means:
        batch, of_tokens = referenced(batch, reference, frozen)
        log_probs = all_log_probs(forward_on(frozen), micro_rows, params, batch)
        before = running.fixed(params[running.NAME]) if running.NAME in params else None
        means = scored(batch, of_tokens, eval_paired, log_probs, before)[1]
        return {name: mean for name, mean in means.items() if name != running.NAME}

    def init(params: Params) -> TrainState:
        return _fresh_state(optimizer, {**params, **heads.init(method.heads, model_config.hidden_size)})

    of_heads = jax.eval_shape(partial(heads.init, method.heads, model_config.hidden_size))
    abstract_state = _abstract_state(optimizer, {**policy.trained.shapes, **of_heads}, all_axes, mesh)
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    whole = sharding.replicated(mesh)
    return Steps(
        objective=objective,
        init=jax.jit(init, out_shardings=state_shardings, donate_argnums=0),
        train=jax.jit(train, out_shardings=(state_shardings, whole), donate_argnums=0),
        evaluate=jax.jit(evaluate, out_shardings=whole),
        gradient=gradient,
        state_shardings=state_shardings,
        abstract_state=abstract_state,
    )


def _fresh_state(optimizer: optax.GradientTransformation, params: Params) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def _abstract_state(optimizer: optax.GradientTransformation, params: Params, axes: Any, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the state: what the optimizer keeps for a parameter lives where that does.

    What has another shape than its parameter, as factored moments have, is small and lives everywhere.
    """
    param_shardings, whole = sharding.parameter_shardings(mesh, axes, params), sharding.replicated(mesh)
    shapes = jax.eval_shape(partial(_fresh_state, optimizer), params)

    def absent(kept: Any) -> bool:  # of a parameter of which this part of the state keeps nothing
        return isinstance(kept, optax.MaskedNode)

    # optax finds its parameter-like leaves by a trial run, which needs a device, and the mesh may be one that is only
    # compiled for.
    with jax.set_mesh(jax.make_mesh((1,), ("trial",), devices=jax.local_devices()[:1])):
        opt_state = optax.tree.map_params(
            optimizer,
            lambda kept, param, placed: kept if absent(kept) else placed if kept.shape == param.shape else whole,
            shapes.opt_state,
            params,
            param_shardings,
            transform_non_params=lambda _: whole,
            is_leaf=absent,
        )
    placed: Any = shapes._replace(step=whole, params=param_shardings, opt_state=opt_state)
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, placed)


def put_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Place a host batch on the mesh: rows split over data and fsdp, the responses' records everywhere."""
    rows, whole = sharding.by_rows(mesh), sharding.replicated(mesh)

    def place(target: jax.sharding.NamedSharding, values: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(target, values, values.shape)

    return Batch(
        **{name: place(rows, getattr(batch, name)) for name in ROW_FIELDS},
        sides=jax.tree.map(partial(place, whole), batch.sides),
    )
