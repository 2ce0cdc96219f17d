"""Devices, and room on the disk for the checkpoints that a run is going to keep."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import jax

from rpo_jax.config import Config
from rpo_jax.core.memory import size
from rpo_jax.hosts import sharding
from rpo_jax.hosts.devices import devices, unused_card
from rpo_jax.models import ModelConfig
from rpo_jax.tools.checkup.finding import Finding, failed, ok, warning
from rpo_jax.training.needs import SPARE, checkpoint_bytes, folder_bytes
from rpo_jax.training.step import check_policy


def check_devices(config: Config) -> list[Finding]:
    """The devices that JAX sees, and whether the mesh and the batch fit them."""
    try:
        seen = devices()
    except ValueError as error:
        return [failed("devices", error)]
    shown = f"{len(seen)} x {seen[0].device_kind}, {jax.default_backend()}"
    unused = unused_card()
    findings = [] if unused is None else [warning("devices", *unused.split(": ", 1))]
    if config.distributed.num_processes not in (None, 1):
        return [*findings, ok("devices", f"{shown}, in this process; the mesh spans all and is checked at the start")]
    try:
        mesh = sharding.make_mesh(config.mesh)
        sharding.check_batch(config.batch.pairs, config.batch.micro_rows, mesh)
    except ValueError as error:
        return [*findings, failed("devices", error)]
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return [*findings, ok("devices", f"{shown}: {axes}")]


def check_experts(config: Config, model_config: ModelConfig) -> list[Finding]:
    """Whether the model and the mesh have what keys about experts are for; nothing where there is no such key."""
    if config.mesh.expert == 1 and not config.model.router_aux_loss_coef:
        return []
    if config.distributed.num_processes not in (None, 1):
        return []  # the mesh spans all processes
    try:
        check_policy(config.model.router_aux_loss_coef, model_config, sharding.make_mesh(config.mesh))
    except ValueError as error:
        return [failed("experts", error)]
    return [
        ok("experts", f"mesh.expert={config.mesh.expert}, load-balancing loss {config.model.router_aux_loss_coef:g}")
    ]


def check_disk(config: Config, model_config: ModelConfig, run_dir: Path, existing: list[Path]) -> list[Finding]:
    """Whether the checkpoints that the run keeps, and the one being written, fit where they go.

    Args:
        existing: checkpoints that are there already; they make room as new ones come.
    """
    nearest = next(place for place in (run_dir, *run_dir.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        return [failed("disk space", f"{nearest} is no folder to write to", "choose another run.dir")]
    one = int(SPARE * checkpoint_bytes(config, model_config))
    count = config.train.keep_last + config.train.keep_best + 1
    need = max(count * one - sum(map(folder_bytes, existing)), one)
    free = shutil.disk_usage(nearest).free
    text = (
        f"{size(free)} free at {nearest}; {count} checkpoints of {size(one)} ({config.train.keep_last} newest, "
        f"{config.train.keep_best} best, one being written) need {size(need)} more"
    )
    fix = "free some, choose another run.dir, or lower train.keep_last and train.keep_best"
    if need > free:
        return [failed("disk space", text, fix)]
    if 2 * need > free:
        return [warning("disk space", f"{text}: more than half of it", fix)]
    return [ok("disk space", text)]
