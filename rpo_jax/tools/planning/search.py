"""Which micro-batch, mesh and remat policy: one compilation per question, as few as answer it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from rpo_jax import models
from rpo_jax.config import Config, MeshConfig
from rpo_jax.models import ModelConfig
from rpo_jax.tools.planning.estimate import Estimate
from rpo_jax.tools.planning.targets import Target
from rpo_jax.training.needs import checkpoint_bytes


@dataclass(frozen=True)
class Trial:
    """One configuration that was tried: its estimate, or why there is none."""

    config: Config
    estimate: Estimate | None
    reason: str

    @property
    def fits(self) -> bool:
        return self.estimate is not None and self.estimate.fits


Try = Callable[[Config], Estimate]


def judged(config: Config, estimate: Estimate) -> Trial:
    reason = (
        "" if estimate.fits else f"takes {estimate.peak_bytes / 2**30:.1f} GiB of {estimate.memory_limit / 2**30:.1f}"
    )
    return Trial(config, estimate, reason)


def attempt(compile_one: Try, config: Config) -> Trial:
    try:
        return judged(config, compile_one(config))
    except ValueError as error:  # it does not fit, or the compiler or the mesh refuses it
        return Trial(config, None, str(error))


def with_micro_rows(config: Config, micro_rows: int | None) -> Config:
    return replace(config, batch=replace(config.batch, micro_rows=micro_rows))


def micro_sizes(rows: int, shards: int) -> list[int]:
    """Micro-batches to try, largest first: the rows that each device has at a time are halved, down to one."""
    sizes, each = [], rows // shards
    while each > 1:
        each = -(-each // 2)
        sizes.append(each * shards)
    return sizes


def largest_micro_batch(compile_one: Try, known: Trial, rows: int, shards: int) -> tuple[Trial | None, list[Trial]]:
    """The largest micro-batch that fits, of the whole batch, its halvings and the one known; everything that was tried.

    Args:
        known: the configuration, tried already.
    """
    tried, own = [], known.config.batch.micro_rows
    sizes = {*micro_sizes(rows, shards), *([own] if own is not None and own < rows else [])}
    for micro_rows in (None, *sorted(sizes, reverse=True)):
        config = with_micro_rows(known.config, micro_rows)
        tried.append(known if config == known.config else attempt(compile_one, config))
        if tried[-1].fits:
            return tried[-1], tried
    return None, tried


def meshes(config: Config, model: ModelConfig, devices: int) -> list[MeshConfig]:
    """Meshes whose axes divide what they split, those with most of the model's shards first.

    Experts and tokens of a row are shared as the configuration says.
    """
    fitting, expert, context = [], config.mesh.expert, config.mesh.context
    if expert < 1:
        raise ValueError("--search tries sizes of the other axes: give mesh.expert a number of its own.")
    for tensor in (1, 2, 4, 8):  # beyond, a layer has too little arithmetic for what its devices exchange
        if devices % (tensor * expert * context) or model.num_heads % tensor or model.intermediate_size % tensor:
            continue
        shards = devices // tensor // context
        if config.batch.pairs % shards:
            continue
        for data in (size for size in range(1, shards // expert + 1) if shards // expert % size == 0):
            fsdp = shards // expert // data
            if model.hidden_size % (fsdp * context) == 0:
                fitting.append(replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor))
    return sorted(fitting, key=lambda mesh: (-mesh.fsdp * mesh.tensor, mesh.tensor))


def least_bytes(config: Config, model: ModelConfig, mesh: MeshConfig) -> float:
    """Of parameters, the optimizer's state and a gradient, on each device."""
    whole = checkpoint_bytes(config, model) + 4 * models.count_params(model)
    return whole / (mesh.fsdp * mesh.tensor * mesh.expert * mesh.context)


def search(
    compile_one: Try, config: Config, model: ModelConfig, target: Target, rows_of: Callable[[Config], tuple[int, int]]
) -> Iterator[Trial]:
    """Every mesh that could hold the model, with the remat policies and the micro-batches that it needs.

    Args:
        rows_of: the batch's rows, and the number of devices that share them, in a configuration.
    """
    candidates = meshes(config, model, len(target.devices))
    if not candidates:
        raise ValueError(
            f"No mesh of {len(target.devices)} devices with mesh.expert={config.mesh.expert} and mesh.context="
            f"{config.mesh.context} divides batch.pairs={config.batch.pairs} and the model's {model.num_heads} heads; "
            "give more pairs, or fewer devices."
        )
    for mesh in candidates:
        meshed = with_micro_rows(replace(config, mesh=mesh), None)
        if config.lora.rank == 0 and (least := least_bytes(config, model, mesh)) > target.memory:
            yield Trial(meshed, None, f"its state alone takes {least / 2**30:.1f} GiB")
            continue
        whole = attempt(compile_one, _with_remat(meshed, "dots"))
        yield whole
        if whole.fits:
            yield attempt(compile_one, _with_remat(meshed, "none"))
            continue
        kept = attempt(compile_one, _with_remat(meshed, "attention"))
        yield kept
        if not kept.fits:
            yield attempt(compile_one, _with_remat(meshed, "full"))
        for micro_rows in micro_sizes(*rows_of(meshed)):
            smaller = attempt(compile_one, with_micro_rows(_with_remat(meshed, "dots"), micro_rows))
            yield smaller
            if smaller.fits:
                break


def _with_remat(config: Config, remat: str) -> Config:
    return replace(config, model=replace(config.model, remat=remat))


def ranked(trials: list[Trial]) -> list[Trial]:
    """Those that fit, by the time of a step without overlap and, where three digits of it are equal, by memory."""

    def place(trial: Trial) -> tuple[bool, float, float]:
        estimate = trial.estimate
        return (
            not trial.fits,
            float(f"{estimate.seconds_serial:.3g}") if estimate else 0.0,
            estimate.peak_bytes if estimate else 0.0,
        )

    return sorted(trials, key=place)
