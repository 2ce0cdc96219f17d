"""Where arrays live: the device mesh, and rules from logical axis names to mesh axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool

from rpo_jax.config import MeshConfig
from rpo_jax.hosts.devices import devices as all_devices

MESH_AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # packed rows are split over both

# A parameter is split over fsdp along its embedding dimension and over tensor along heads, MLP or vocabulary.
PARAMETER_RULES: dict[str, str] = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "fused_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}
ACTIVATION_RULES: dict[str, str | tuple[str, ...]] = {
    "rows": ROWS,
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh (data, fsdp, tensor) over the given devices, or over all; a size of -1 takes what the others leave.

    Raises ValueError if the sizes do not multiply to the number of devices, or jax has no devices.
    """
    devices = all_devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        named = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = len(devices) // named
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh.data={config.data}, mesh.fsdp={config.fsdp}, mesh.tensor={config.tensor} do not multiply to the "
            f"{len(devices)} devices here; set sizes whose product is {len(devices)}, or one of them to -1."
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def row_shards(mesh: Mesh) -> int:
    """Number of devices among which packed rows are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(pairs: int, micro_rows: int | None, mesh: Mesh) -> None:
    """Raise ValueError unless pairs and micro-batch rows divide evenly among the mesh's row shards."""
    shards = row_shards(mesh)
    for key, value in (("batch.pairs", pairs), ("batch.micro_rows", micro_rows)):
        if value is not None and value % shards:
            raise ValueError(
                f"{key}={value} is not divisible by the {shards} shards of mesh.data={mesh.shape['data']} x "
                f"mesh.fsdp={mesh.shape['fsdp']}; use a multiple of {shards}, or give more devices to mesh.tensor."
            )


def _spec(mesh: Mesh, rules: dict[str, Any], axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """Partition of one array; a dimension that its mesh axes do not divide stays whole."""
    parts = []
    for name, size in zip(axes, shape, strict=True):
        target = rules.get(name) if name else None
        parts.append(target if size % _size(mesh, target) == 0 else None)
    return PartitionSpec(*parts)


def _size(mesh: Mesh, target: str | tuple[str, ...] | None) -> int:
    """Devices along one or several axes of a mesh."""
    names = (target,) if isinstance(target, str) else target or ()
    return int(np.prod([mesh.shape[name] for name in names]))


def parameter_shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """Shardings of a parameter tree.

    Args:
        axes: tree of tuples of logical axis names, one name per dimension.
        shapes: tree of the same structure whose leaves have a `shape`.
    """
    return jax.tree.map(
        lambda leaf, names: NamedSharding(mesh, _spec(mesh, PARAMETER_RULES, names, leaf.shape)), shapes, axes
    )


_GATHERED = (ACTIVATION_RULES, PARAMETER_RULES)  # of a parameter where it is used, of its gradient


# The gradient of a sharding constraint is pinned to the same sharding: every device would sum all of it.
@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(whole: NamedSharding, split: NamedSharding, x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, whole)


def _gathered_forward(whole: NamedSharding, split: NamedSharding, x: jax.Array) -> tuple[jax.Array, None]:
    return _gathered(whole, split, x), None


def _gathered_backward(whole: NamedSharding, split: NamedSharding, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, split),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


@dataclass(frozen=True)
class Placement:
    """Where activations live on a mesh, by the names of their axes."""

    mesh: Mesh

    def constrain(self, x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
        """Pin an activation to the mesh."""
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(self.mesh, _spec(self.mesh, ACTIVATION_RULES, axes, x.shape))
        )

    def gather(self, x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
        """A parameter whole over the devices that share rows; its gradient is split as the parameter is."""
        shardings = (NamedSharding(self.mesh, _spec(self.mesh, rules, axes, x.shape)) for rules in _GATHERED)
        return _gathered(*shardings, x)

    def shards(self, axis: str) -> int:
        """Among how many devices an axis is split."""
        return _size(self.mesh, ACTIVATION_RULES.get(axis))

    def per_shard(self, function: Callable[..., Any], in_axes: Any, out_axes: Any) -> Callable[..., Any]:
        """The function, run by each device on its own part alone.

        The axes are trees of tuples of names, one tuple per array; every axis must divide by its shards.
        """

        def specs(axes: Any) -> Any:
            return jax.tree.map(
                lambda names: PartitionSpec(*(ACTIVATION_RULES.get(name) for name in names)),
                axes,
                is_leaf=lambda x: isinstance(x, tuple) and all(isinstance(name, str | None) for name in x),
            )

        return jax.shard_map(
            function, mesh=self.mesh, in_specs=specs(in_axes), out_specs=specs(out_axes), check_vma=False
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """Sharding of [R, T] arrays."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def own_rows(mesh: Mesh, num_rows: int) -> Bool[np.ndarray, "R"]:
    """Which of a batch's rows live on devices of this process."""
    owned = np.zeros(num_rows, bool)
    for index in by_rows(mesh).addressable_devices_indices_map((num_rows,)).values():
        owned[index] = True
    return owned
