"""The real training step, compiled for devices that are not here."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import time
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp

from rpo_jax import models
from rpo_jax.config import Config, resolve
from rpo_jax.core.records import KINDS, Batch, Side
from rpo_jax.hosts import sharding
from rpo_jax.models import ModelConfig
from rpo_jax.tools.planning.chips import CHIPS, TPUS, Chip
from rpo_jax.tools.planning.workload import EMBEDDING_WIDTH, BatchShape
from rpo_jax.training.needs import device_bytes
from rpo_jax.training.step import Steps, build_steps

# Who the machine is, where there is none to ask; more than one compiler at a time is no harm where no chip is held.
_NOWHERE = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
_KNOWN = {
    "v4": "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8 ...",
    "v5e": "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16",
    "v5p": "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 4x8x8, 8x8x8 ...",
    "v6e": "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16",
}


@dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
        name: as the user gave it.
        chip: their rates.
        devices: JAX's, TPUs that are not here or virtual CPU devices.
        memory: bytes that a program may take on each.
        platform: tpu, gpu: what the step is written for.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    memory: float
    platform: str

    @property
    def exact(self) -> bool:
        """Whether the target's own compiler says what it takes."""
        return self.platform == "tpu"


class CompileError(ValueError):
    """The compiler refused, in one line."""


class OutOfMemory(CompileError):
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


def libtpu_requirement() -> str:
    """The libtpu that belongs to the JAX that is installed: another one's programs may not be readable."""
    asked = (line.partition(";") for line in metadata.requires("jax") or ())
    return next((name.strip() for name, _, extra in asked if name.startswith("libtpu") and "tpu" in extra), "libtpu")


def tpu_target(topology: str) -> Target:
    """The chips of a slice such as v5p:4x4x4, by libtpu; raises ValueError where libtpu is missing or knows none."""
    generation, _, layout = topology.partition(":")
    known = "; ".join(f"{name}: {_KNOWN[name]}" for name in TPUS)
    if generation not in TPUS or not re.fullmatch(r"\d+(x\d+){1,2}", layout):
        raise ValueError(f"--topology {topology} is not known; give a generation and its layout, as v5p:4x4x4. {known}")
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ValueError(
            f"--topology needs libtpu, which compiles for TPUs without one: pip install '{libtpu_requirement()}'."
        )
    for name, value in _NOWHERE.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    # One device a chip: of the generations with two cores, v4 has to be asked for that.
    options = {"chip_config_name": "megacore"} if generation == "v4" else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except Exception as error:  # jaxlib raises several kinds
        raise ValueError(f"--topology {topology}: {one_line(error)}. {generation} has {_KNOWN[generation]}") from None
    expected = math.prod(int(part) for part in layout.split("x"))
    assert len(devices) == expected, f"{topology} has {len(devices)} devices"
    chip = CHIPS[generation]
    return Target(topology, chip, tuple(devices), chip.memory, "tpu")


def gpu_target(count: int, memory: float, chip: Chip) -> Target:
    """Virtual CPU devices that stand for GPUs; the process must not have used JAX before with fewer."""
    with contextlib.suppress(RuntimeError):  # JAX is running already
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(f"--devices {count}: this process already runs JAX with {len(devices)} devices; start anew.")
    return Target(f"{count} x {chip.name}", chip, tuple(devices[:count]), memory, "gpu")


def one_line(error: BaseException) -> str:
    """The first line of a compiler's message, without its codes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = re.sub(r"^([A-Z_]+: )?(E\d+: )?([A-Za-z]+Oom: )?", "", lines[0])
    return line.partition(" HLO module:")[0].rstrip(".")


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
            kind = OutOfMemory if "RESOURCE_EXHAUSTED" in str(error) else CompileError
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
