"""What a run takes of the disk and of a device's memory, and what makes it less."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from rpo_jax import models
from rpo_jax.config import Config
from rpo_jax.core.memory import size
from rpo_jax.hosts import sharding
from rpo_jax.models import ModelConfig
from rpo_jax.training.optimizer import learning_rate_schedule, make_optimizer, with_anchor

SPARE = 1.1  # records, metrics and logs, and the storage's own tables
PLAN = "python -m rpo_jax.plan, with this configuration, --devices and --device-memory, says what fits"


def checkpoint_bytes(config: Config, model_config: ModelConfig) -> int:
    """Bytes of one checkpoint: what is trained, in float32, and the optimizer's state of it."""
    policy = models.Policy(model_config, config.lora)
    optimizer = make_optimizer(
        config.optim, learning_rate_schedule(config.optim, 1), policy.decayed, policy.trained.axes
    )
    if config.rounds.extrapolation:
        optimizer = with_anchor(optimizer)
    state = jax.eval_shape(optimizer.init, policy.trained.shapes)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves((policy.trained.shapes, state)))


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_room(config: Config, model_config: ModelConfig, folder: Path, *, resuming: bool) -> None:
    """ValueError where the disk of a run folder has no room for one checkpoint."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(nearest).free + (0 if resuming or not folder.exists() else folder_bytes(folder))
    if (one := SPARE * checkpoint_bytes(config, model_config)) > free:
        raise ValueError(
            f"run.dir={folder}: a checkpoint takes {size(one)}, and its disk has {size(free)} left; free some room "
            "there, choose another run.dir, or train less of the model (lora.rank)."
        )


def device_bytes(tree: Any) -> int:
    """Bytes of arrays, or of abstract ones with shardings, on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def total_bytes(tree: Any) -> int:
    """Bytes of arrays, or of abstract ones, on all devices together, once each."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def held_bytes(state: Any, others: Any) -> str:
    """What a device holds while it trains: the state, and frozen weights or a reference that runs beside."""
    parts = {"parameters": state.params, "the optimizer": state.opt_state, "frozen weights and reference": others}
    sizes = {name: device_bytes(tree) for name, tree in parts.items()}
    parts_held = ", ".join(f"{size(count)} of {name}" for name, count in sizes.items() if count)
    return f"a device holds {parts_held}, and a gradient and activations besides"


def less_memory(config: Config, mesh: Mesh) -> str:
    """What lets a step do with less memory, as far as it is not set yet."""
    (shards, context), micro, fsdp = sharding.shards_of(mesh), config.batch.micro_rows, mesh.shape["fsdp"]
    remedies = []
    if micro is None or micro > shards:
        remedies.append(f"a smaller batch.micro_rows ({micro or 'all rows at once'} now, {shards} at least)")
    if config.batch.micro_keep:
        remedies.append("batch.micro_keep=false")
    if config.model.remat != "full":
        remedies.append(f"model.remat=full ({config.model.remat} now)")
    if micro == shards > 1:
        remedies.append(f"mesh.context={2 * context} ({context} now), so that devices share the tokens of a row")
    # What is no expert's is split over that axis too, and over the context.
    most = mesh.size // mesh.shape.get(sharding.EXPERT, 1) // context
    split = f"mesh.fsdp={most} ({fsdp} now)" if fsdp < most else "more devices, and mesh.fsdp to match"
    return f"try {', '.join([*remedies, split])}; {PLAN}"
