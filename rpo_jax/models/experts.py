"""Mixtures of experts: which experts a token uses, and what these make of it, on one device or shared by several.

No token is dropped: every device sorts the rows of its own tokens by expert, and each expert multiplies its own. Where
experts are shared, devices that hold different ones exchange their tokens first, and what they made of them afterwards:
a device then multiplies the rows of its own experts alone, but has room for all.

Letters: R rows, T tokens, N = R T, D hidden, X experts, k of them a token, F width of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rpo_jax.models.architecture import Experts
from rpo_jax.models.attention.kind import Split
from rpo_jax.models.projection import Adapted, Kernel, WideGradient, gathered, narrowed, project_grouped


class Routing(NamedTuple):
    """Where tokens were sent: sums over those that are no padding, of every layer where layers are stacked.

    Attributes:
        chosen: how many of them use each expert; an expert's numbers sum to k times the tokens.
        probability: of each expert, as the router has it before any is chosen.
        tokens: how many there are.
    """

    chosen: Float[Array, "... X"]
    probability: Float[Array, "... X"]
    tokens: Float[Array, "..."]


class ExpertWeights(NamedTuple):
    """Of a layer. `up` is None where it is joined to `gate`, and biases are None where there are none."""

    router: Float[Array, "D X"]
    gate: Kernel  # [X, D, F], or [X, D, F, 2] joined
    up: Kernel | None
    down: Kernel  # [X, F, D]
    router_bias: Float[Array, "X"] | None = None
    gate_bias: Float[Array, "X ..."] | None = None
    down_bias: Float[Array, "X D"] | None = None

    def axes(self, split_mlp: bool, joined: bool) -> Any:
        """Names of the axes of every array, in its place, for Split.per_shard; None for what each device has whole."""
        mlp = "mlp" if split_mlp else None
        pair = (None,) if joined else ()

        def named(kernel: Kernel | None, inputs: str | None, *outputs: str | None) -> Any:
            if kernel is None:
                return None
            axes: Any = ("experts", inputs, *outputs)
            of_arrays = gathered(kernel, axes, 1, lambda x, names: cast(Any, names), groups=1)
            # What is not named there has nothing but experts to be split along.
            return jax.tree.map(
                lambda x: x if isinstance(x, tuple) else ("experts", *(None,) * (x.ndim - 1)),
                of_arrays,
                is_leaf=lambda x: isinstance(x, tuple) and all(isinstance(name, str | None) for name in x),
            )

        kernels = named(self.gate, None, mlp, *pair), named(self.up, None, mlp), named(self.down, mlp, None)
        biases = ((self.router_bias, (None,)), (self.gate_bias, ("experts", mlp, *pair)))
        biases += ((self.down_bias, ("experts", None)),)
        fields: Any = ((None, None), *kernels, *(None if bias is None else names for bias, names in biases))
        return ExpertWeights(*fields)


def mixture(
    experts: Experts,
    activation: Callable[[Array], Array],
    weights: ExpertWeights,
    x: Float[Array, "R T D"],
    real: Bool[Array, "R T"],
    split: Split,
    axes: tuple[str, str] = ("rows", "tokens"),
) -> tuple[Float[Array, "R T D"], Routing]:
    """What the layer adds, and where its tokens were sent.

    Args:
        real: tokens that are no padding.
        axes: names of theirs.
    """
    # A kernel in few bits is no array whose columns could be divided.
    kernels = (weights.gate, weights.up, weights.down)
    split_mlp = all(_is_divisible(kernel) for kernel in kernels) and not experts.intermediate_size % split.shards("mlp")
    tensor = split.mesh_axes("mlp") if split_mlp else ()
    among = split.mesh_axes("experts")

    def of_device(weights: ExpertWeights, x: Array, real: Array) -> tuple[Array, Routing]:
        flat = x.reshape(-1, x.shape[-1])
        share, chosen, probability = route(experts, weights, flat)
        counted = real.reshape(-1).astype(jnp.float32)
        routing = Routing(
            jnp.zeros(experts.count).at[chosen].add(counted[:, None]),
            jnp.einsum("nx,n->x", probability, counted),
            jnp.sum(counted),
        )
        if among:
            flat, share, chosen = (jax.lax.all_gather(one, among, tiled=True) for one in (flat, share, chosen))
        out = _mixed(experts, activation, weights, flat, share, chosen, among, tensor)
        if tensor:
            out = jax.lax.psum(out, tensor)
        if among:
            out = jax.lax.psum_scatter(out, among, tiled=True)
        return out.reshape(x.shape), jax.tree.map(lambda total: total[None], routing)

    # Before devices gather them: fewer bytes are sent.
    gate, up, down = (kernel if kernel is None else narrowed(kernel, x.dtype) for kernel in kernels)
    weights = weights._replace(gate=gate, up=up, down=down)
    of_tokens, own = (*axes, None), ("shards", None)
    of_routing = Routing(*cast(Any, (own, own, ("shards",))))
    of_inputs = (weights.axes(split_mlp, experts.joined), of_tokens, axes)
    run = split.per_shard(of_device, of_inputs, (of_tokens, of_routing))
    out, by_shard = run(weights, x, real)
    return out, jax.tree.map(lambda sums: jnp.sum(sums, axis=0), by_shard)


def route(
    experts: Experts, weights: ExpertWeights, x: Float[Array, "N D"]
) -> tuple[Float[Array, "N k"], Int[Array, "N k"], Float[Array, "N X"]]:
    """How much of which experts every token takes, and the router's softmax over all of them, in float32."""
    scores = jnp.matmul(x.astype(jnp.float32), weights.router.astype(jnp.float32))
    if weights.router_bias is not None:
        scores += weights.router_bias.astype(jnp.float32)
    probability = jax.nn.softmax(scores, axis=-1)
    share, chosen = jax.lax.top_k(probability, experts.per_token)
    if experts.weights_sum_to_one:
        share /= jnp.sum(share, axis=-1, keepdims=True)
    return share, chosen, probability


def _is_divisible(kernel: Kernel | None) -> bool:
    whole = kernel.kernel if isinstance(kernel, Adapted) else kernel
    return isinstance(whole, jax.Array | WideGradient | None)


def _mixed(
    experts: Experts,
    activation: Callable[[Array], Array],
    weights: ExpertWeights,
    x: Float[Array, "N D"],
    share: Float[Array, "N k"],
    chosen: Int[Array, "N k"],
    among: tuple[str, ...],
    tensor: tuple[str, ...],
) -> Float[Array, "N D"]:
    """sum over the experts e of this device that a token uses of share_e down_e(activation(gate_e(x)) * up_e(x)).

    Source: arXiv 2401.04088, 2.1; with a clamp, transformers' gpt-oss.

    Args:
        among: mesh axes of the devices that share the experts.
        tensor: of those that share the columns of each.
    """
    per_token, number = chosen.shape[1], chosen.reshape(-1)
    count = experts.count
    if among:
        count //= jax.lax.axis_size(among)
        number -= count * jax.lax.axis_index(among)
        number = jnp.where((number >= 0) & (number < count), number, count)  # behind this device's own
    order = jnp.argsort(number, stable=True)
    number = number[order]
    rows_of = jnp.bincount(number, length=count).astype(jnp.int32)
    own = (number < count)[:, None]

    def only_own(rows: Array) -> Array:
        return jnp.where(own, rows, 0) if among else rows

    def biased(rows: Array, bias: Array | None) -> Array:
        if bias is None:
            return rows
        added = bias.astype(rows.dtype)[jnp.minimum(number, count - 1)]
        # Rows of other devices' experts hold anything, in the backward pass too.
        return rows + (jnp.where(own.reshape(-1, *(1,) * (added.ndim - 1)), added, 0) if among else added)

    rows = only_own(x[order // per_token])
    gate, down_bias = biased(project_grouped(rows, weights.gate, rows_of), weights.gate_bias), weights.down_bias
    if weights.up is None:
        gate, up = gate[..., 0], gate[..., 1]
    else:
        up = project_grouped(rows, weights.up, rows_of)
    if experts.clamp is None:
        inner = activation(gate) * up
    else:
        gate, up = jnp.minimum(gate, experts.clamp), jnp.clip(up, -experts.clamp, experts.clamp)
        inner = gate * jax.nn.sigmoid(experts.gate_slope * gate) * (1 + up)
    if down_bias is not None and tensor:
        down_bias = jnp.where(jax.lax.axis_index(tensor) == 0, down_bias, 0)  # once, of those that are added up
    out = only_own(biased(project_grouped(inner, weights.down, rows_of), down_bias))
    by_token = jnp.zeros_like(out).at[order].set(out).reshape(-1, per_token, x.shape[-1])
    return jnp.einsum("nkd,nk->nd", by_token, share.astype(x.dtype))
