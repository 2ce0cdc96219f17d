"""The real training step, compiled for devices that are not here."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rpo_jax import models
from rpo_jax.config import Config, resolve
from rpo_jax.core.records import KINDS, Batch, Side
from rpo_jax.hosts import sharding
from rpo_jax.models import ModelConfig
from rpo_jax.tools.planning.targets import Target, one_line
from rpo_jax.tools.planning.workload import EMBEDDING_WIDTH, BatchShape
from rpo_jax.training.needs import device_bytes
from rpo_jax.training.step import Steps, build_steps


class OutOfMemory(ValueError):
    """The compiler found that the step takes more than the device has."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
        params: float32 masters of what is trained.
        optimizer: the optimizer's state.
        frozen: LoRA's base, or a live reference.
        batch: the packed rows and the responses' records.
        arguments: all of these, as the compiler lays them out.
        output: of the step; the new state takes the old one's place.
        aliased: bytes of the output that do.
        temporary: activations, gradients, gathered weights.
    """

    params: int
    optimizer: int
    frozen: int
    batch: int
    arguments: int
    output: int
    aliased: int
    temporary: int

    @property
    def peak(self) -> int:
        return self.arguments + self.output - self.aliased + self.temporary


@dataclass(frozen=True)
class Compiled:
    """A compiled step.

    Attributes:
        memory: bytes on one device.
        text: the program, as the compiler made it for one device.
        seconds: that compiling took.
    """

    memory: Memory
    text: str
    seconds: float


def compile_step(config: Config, model: ModelConfig, target: Target, batch: BatchShape) -> Compiled:
    """Compile the training step of a configuration for a target.

    Raises:
        OutOfMemory: the compiler says that it does not fit.
        ValueError: a mesh or a batch that does not divide, or what else the compiler refuses.
    """
    mesh = sharding.make_mesh(config.mesh, target.devices)
    sharding.check_batch(config.batch.pairs, config.batch.micro_rows, mesh)
    started = time.perf_counter()
    precision = "float32" if config.model.compute_dtype == "float32" else None  # as in training
    with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
        steps = build_steps(config, model, mesh, total_steps=1000)
        policy = models.Policy(model, config.lora)
        frozen, weights = _abstract(mesh, policy.frozen), _abstract(mesh, policy.weights)
        packed = abstract_batch(config, steps, mesh, batch)
        reference = weights if resolve(config).reference == "live" else None
        try:
            done = steps.train.lower(steps.abstract_state, packed, reference, frozen).compile()
            text = done.as_text() or ""
        except jax.errors.JaxRuntimeError as error:
            kind = OutOfMemory if "RESOURCE_EXHAUSTED" in str(error) else ValueError
            raise kind(one_line(error)) from None
    stats: Any = done.memory_analysis()
    state = steps.abstract_state
    memory = Memory(
        params=device_bytes(state.params),
        optimizer=device_bytes(state.opt_state),
        frozen=device_bytes((reference, frozen)),
        batch=device_bytes(packed),
        arguments=stats.argument_size_in_bytes,
        output=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporary=stats.temp_size_in_bytes,
    )
    return Compiled(memory, text, time.perf_counter() - started)


def _abstract(mesh: jax.sharding.Mesh, parameters: models.Parameters) -> Any:
    """Shapes and places of parameters."""
    placed = sharding.parameter_shardings(mesh, *parameters)
    return jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), parameters.shapes, placed
    )


def abstract_batch(config: Config, steps: Steps, mesh: jax.sharding.Mesh, batch: BatchShape) -> Batch:
    """Shapes and places of a batch, as rpo_jax.training.step.put_batch places one."""
    width = EMBEDDING_WIDTH if resolve(config).embeds_all else 0
    rows, whole = sharding.by_rows(mesh), sharding.replicated(mesh)
    row = jax.ShapeDtypeStruct((batch.rows, batch.row_tokens), jnp.int32, sharding=rows)

    def side(kind: str) -> Side:
        slots, of = config.batch.pairs, partial(jax.ShapeDtypeStruct, sharding=whole)
        ids, numbers = of((slots,), jnp.int32), of((slots,), jnp.float32)
        score = numbers if steps.objective.uses_scores and KINDS[kind].made_by is None else None
        return Side(of((slots,), bool), numbers, of((slots, width), jnp.float32), ids, ids, ids, score)

    return Batch(row, row, row, row, row, row, {kind: side(kind) for kind in steps.objective.responses})
