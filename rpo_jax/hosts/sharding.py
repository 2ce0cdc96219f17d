"""Where arrays live: the device mesh, and rules from logical axis names to mesh axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Bool

from rpo_jax.config import MeshConfig
from rpo_jax.core.shards import Shards
from rpo_jax.hosts.devices import devices as all_devices

MESH_AXES = ("data", "fsdp", "tensor")
EXPERT, CONTEXT = "expert", "context"  # axes before the last one, where experts, or a row's tokens, are shared
ROWS = ("data", "fsdp", EXPERT)  # packed rows are split over those that there are

# A parameter is split over fsdp along its embedding dimension and over tensor along heads, MLP or vocabulary; what
# belongs to no expert over the axis of experts too, as if that were more of fsdp; and all over that of the context.
_TENSOR = dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), "tensor")
PARAMETER_RULES: dict[str, str | tuple[str, ...]] = {
    "experts": EXPERT,
    "embed": ("fsdp", EXPERT, CONTEXT),
    "fused_heads": "tensor",  # of no activation: where such a parameter is used, it is whole
    **_TENSOR,
}
ACTIVATION_RULES: dict[str, str | tuple[str, ...]] = {
    "rows": ROWS,
    "tokens": CONTEXT,
    "shards": (*ROWS, CONTEXT),
    "experts": EXPERT,
    **_TENSOR,
}


def axis_sizes(config: MeshConfig) -> dict[str, int]:
    """The axes of a mesh in their order, with the sizes as configured: (data, fsdp, tensor), and before the last one
    expert and context where experts or tokens of a row are shared."""
    more = (name for name in (EXPERT, CONTEXT) if getattr(config, name) != 1)
    names = (*MESH_AXES[:-1], *more, MESH_AXES[-1])
    return {name: getattr(config, name) for name in names}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh (data, fsdp, tensor) over the given devices, or over all; a size of -1 takes what the others leave.

    With experts shared it is (data, fsdp, expert, tensor), with tokens of a row shared there is `context` before the
    last axis. Raises ValueError if the sizes do not multiply to the number of devices, or jax has no devices.
    """
    devices = all_devices() if devices is None else devices
    named = axis_sizes(config)
    names, sizes = tuple(named), list(named.values())
    if -1 in sizes:
        taken = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = len(devices) // taken
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"{config.described} do not multiply to the {len(devices)} devices here; set sizes whose product is "
            f"{len(devices)}, or one of them to -1."
        )
    return jax.make_mesh(tuple(sizes), names, axis_types=(AxisType.Auto,) * len(names), devices=devices)


def row_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of a mesh over which packed rows are split."""
    return tuple(name for name in ROWS if name in mesh.shape)


def row_shards(mesh: Mesh) -> int:
    """Number of devices among which packed rows are split."""
    return _size(mesh, row_axes(mesh))


def shards_of(mesh: Mesh) -> Shards:
    """Among how many devices packed rows are split, and the tokens of each."""
    return Shards(row_shards(mesh), mesh.shape.get(CONTEXT, 1))


def check_batch(pairs: int, micro_rows: int | None, mesh: Mesh) -> None:
    """Raise ValueError unless pairs and micro-batch rows divide evenly among the mesh's row shards."""
    shards = row_shards(mesh)
    axes = " x ".join(f"mesh.{name}={mesh.shape[name]}" for name in row_axes(mesh))
    for key, value in (("batch.pairs", pairs), ("batch.micro_rows", micro_rows)):
        if value is not None and value % shards:
            raise ValueError(
                f"{key}={value} is not divisible by the {shards} shards of {axes}; use a multiple of {shards}, or give "
                "more devices to mesh.tensor or mesh.context."
            )


def check_experts(count: int | None, mesh: Mesh, name: str = "The model", *, needed: bool = True) -> None:
    """Raise ValueError for a mesh whose axis of experts does not fit a model.

    Args:
        count: experts of a layer; None without a mixture.
        name: of the model, for messages.
        needed: whether it must have experts for such an axis.
    """
    shards = mesh.shape.get(EXPERT, 1)
    if shards > 1 and count is None and needed:
        raise ValueError(
            f"mesh.expert={shards} shares the experts of a layer, and {name} has none; give those devices to mesh.fsdp."
        )
    if count is not None and count % shards:
        fitting = ", ".join(str(size) for size in range(1, count + 1) if count % size == 0)
        raise ValueError(f"mesh.expert={shards} does not divide the {count} experts of {name}; use one of {fitting}.")


def _spec(mesh: Mesh, rules: dict[str, Any], axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """Partition of one array; a dimension that its mesh axes do not divide is split over the first ones that do.

    What an earlier dimension is split over, a later one is not.
    """
    parts: list[Any] = []
    used: set[str] = set()
    for name, size in zip(axes, shape, strict=True):
        target = tuple(axis for axis in _axes(mesh, rules.get(name) if name else None) if axis not in used)
        while size % _size(mesh, target):
            target = target[:-1]
        used.update(target)
        parts.append(target[0] if len(target) == 1 else target or None)
    return PartitionSpec(*parts)


def _axes(mesh: Mesh, target: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Those axes of a rule that a mesh has."""
    names = (target,) if isinstance(target, str) else target or ()
    return tuple(name for name in names if name in mesh.shape)


def _size(mesh: Mesh, target: str | tuple[str, ...] | None) -> int:
    """Devices along one or several axes of a mesh."""
    return int(np.prod([mesh.shape[name] for name in _axes(mesh, target)]))


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
@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gathered(whole: NamedSharding, split: NamedSharding, sent: DTypeLike, x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x.astype(sent), whole).astype(x.dtype)


def _gathered_forward(*arguments: Any) -> tuple[jax.Array, None]:
    return _gathered(*arguments), None


def _gathered_backward(
    whole: NamedSharding, split: NamedSharding, sent: DTypeLike, _: None, gradient: jax.Array
) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, split),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


@dataclass(frozen=True)
class Placement:
    """Where activations live on a mesh, by the names of their axes.

    Attributes:
        shares_tokens: whether devices along `context` share a row's tokens; else each of them does the same.
    """

    mesh: Mesh
    shares_tokens: bool = True

    @property
    def rules(self) -> dict[str, str | tuple[str, ...]]:
        return ACTIVATION_RULES if self.shares_tokens else ACTIVATION_RULES | {"tokens": (), "shards": ROWS}

    def constrain(self, x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
        """Pin an activation to the mesh."""
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(self.mesh, _spec(self.mesh, self.rules, axes, x.shape))
        )

    def gather(self, x: jax.Array, axes: Sequence[str | None], used_in: DTypeLike | None = None) -> jax.Array:
        """A parameter whole over the devices that share rows; its gradient is split as the parameter is.

        Args:
            used_in: the dtype that it is cast to where it is used, in which it is sent if that is narrower; its
                gradient is added in its own.
        """
        whole, split = (NamedSharding(self.mesh, _spec(self.mesh, rules, axes, x.shape)) for rules in _GATHERED)
        narrower = used_in is not None and jnp.dtype(used_in).itemsize < x.dtype.itemsize
        is_sent = whole.shard_shape(x.shape) != split.shard_shape(x.shape)
        return _gathered(whole, split, used_in if narrower and is_sent else x.dtype, x)

    def shards(self, axis: str) -> int:
        """Among how many devices an axis is split."""
        return _size(self.mesh, self.rules.get(axis))

    def mesh_axes(self, axis: str) -> tuple[str, ...]:
        """The mesh axes over which an axis is split: whom a device that runs its own part exchanges with."""
        return _axes(self.mesh, self.rules.get(axis))

    def per_shard(self, function: Callable[..., Any], in_axes: Any, out_axes: Any) -> Callable[..., Any]:
        """The function, run by each device on its own part alone.

        The axes are trees of tuples of names, one tuple per array; every axis must divide by its shards.
        """

        def specs(axes: Any) -> Any:
            return jax.tree.map(
                lambda names: PartitionSpec(*(self.mesh_axes(name or "") or None for name in names)),
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
    return NamedSharding(mesh, PartitionSpec(row_axes(mesh)))


def own_rows(mesh: Mesh, num_rows: int) -> Bool[np.ndarray, "R"]:
    """Which of a batch's rows live on devices of this process."""
    owned = np.zeros(num_rows, bool)
    for index in by_rows(mesh).addressable_devices_indices_map((num_rows,)).values():
        owned[index] = True
    return owned
