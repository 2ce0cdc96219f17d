"""The parts of a decoder's layer, as modules: projections, norms, attention, the MLP and the mixture of experts.

Letters: B rows, T tokens, D hidden, P pairs of a head's rotated dimensions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from rpo_jax.core.shards import ONE, Shards
from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.attention.kind import Split
from rpo_jax.models.experts import ExpertWeights, Routing, mixture
from rpo_jax.models.projection import project, whole
from rpo_jax.models.recompute import WHOLE, Axes
from rpo_jax.models.rope import rotate

# By transformers' names.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
Constrain = Callable[[Array, tuple[str | None, ...]], Array]


class Maker(NamedTuple):
    """Makes parameters from named axes; `stack` holds axes that lead all of them."""

    rngs: nnx.Rngs
    scale: float
    dtype: DTypeLike
    stack: dict[str, int]

    def normal(self, axes: dict[str, int]) -> nnx.Param:
        axes = self.stack | axes
        value = self.scale * jax.random.normal(self.rngs.params(), tuple(axes.values()), jnp.float32)
        return nnx.Param(value.astype(self.dtype), axes=tuple(axes))

    def constant(self, value: float, axes: dict[str, int]) -> nnx.Param:
        axes = self.stack | axes
        return nnx.Param(jnp.full(tuple(axes.values()), value, self.dtype), axes=tuple(axes))


class Linear(nnx.Module):
    """y = x W + b, contracting all input axes at once; W may be any rpo_jax.models.projection.Kernel."""

    def __init__(self, make: Maker, inputs: dict[str, int], outputs: dict[str, int], bias: bool):
        self.input_rank = len(inputs)
        self.axes = (*inputs, *outputs)
        self.kernel = make.normal(inputs | outputs)
        self.bias = make.constant(0.0, outputs) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = project(x, self.kernel.get_value(), self.input_rank)
        if self.bias is None:
            return y
        # Added in float32, which rounds to the same, so that its gradient is summed in float32.
        bias = self.bias[...].astype(x.dtype).astype(jnp.float32)
        return (y.astype(jnp.float32) + bias).astype(x.dtype)

    def gather(self, gather: Constrain, dtype: DTypeLike) -> None:
        """Have the kernel whole over the devices that share rows, sent in this dtype if that is narrower."""
        self.kernel.set_value(whole(self.kernel.get_value(), self.axes, self.input_rank, gather, dtype))


class RMSNorm(nnx.Module):
    """y = scale * x / sqrt(mean(x^2) + eps) over all axes of the scale, in float32; 1 + scale where norms are centred.

    Source: arXiv 1910.07467.
    """

    def __init__(self, config: ModelConfig, make: Maker, axes: dict[str, int]):
        self.eps = config.rms_norm_eps
        self.axes = tuple(axes)
        self.centred = config.parts.centred_norms
        self.scale = make.constant(0.0 if self.centred else 1.0, axes)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        wide = x.astype(jnp.float32)
        over = tuple(range(-len(self.axes), 0))
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=over, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        return (wide * inverse * (1 + scale if self.centred else scale)).astype(x.dtype)

    def gather(self, gather: Constrain, dtype: DTypeLike) -> None:
        """Have the scale whole over the devices that share rows; it is used as it is."""
        self.scale.set_value(gather(self.scale.get_value(), self.axes))


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, make: Maker):
        hidden = {"embed": config.hidden_size}
        head = {"head_dim": config.head_dim}
        heads = {"heads": config.num_heads} | head
        kv_heads = {"kv_heads": config.num_kv_heads} | head
        parts = config.parts
        # The kernels divide scores by sqrt(head_dim); what more there is to it goes into the queries.
        scale = 1.0 if parts.attention_scale is None else parts.attention_scale * config.head_dim**0.5
        self.query_scale = 1.0 if math.isclose(scale, 1.0) else scale
        # Where queries, keys and values end in the joined heads, as files have them.
        self.ends = (config.num_heads, config.num_heads + config.num_kv_heads)
        if parts.fused_projections:
            joined = {"fused_heads": config.num_heads + 2 * config.num_kv_heads} | head
            self.query_key_value = Linear(make, hidden, joined, config.qkv_bias)
        else:
            self.query_key_value = None
            self.query = Linear(make, hidden, heads, config.qkv_bias)
            self.key = Linear(make, hidden, kv_heads, config.qkv_bias)
            self.value = Linear(make, hidden, kv_heads, config.qkv_bias)
        self.output = Linear(make, heads, hidden, config.output_bias)
        self.sinks = make.normal({"heads": config.num_heads}) if parts.sinks else None
        of_query, of_key = (heads, kv_heads) if parts.joint_qk_norm else (head, head)
        self.query_norm = RMSNorm(config, make, of_query) if config.qk_norm else None
        self.key_norm = RMSNorm(config, make, of_key) if config.qk_norm else None

    @jax.named_scope("attention")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos_sin: tuple[Float[Array, "B T P"], Float[Array, "B T P"]],
        attend: Callable[..., Array],
        constrain: Constrain,
        shards: Shards = ONE,
    ) -> Float[Array, "B T D"]:
        if self.query_key_value is None:
            query, key, value = (shards.each(linear, x) for linear in (self.query, self.key, self.value))
        else:
            query, key, value = jnp.split(shards.each(self.query_key_value, x), self.ends, axis=-2)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query = constrain(rotate(query, *cos_sin, self.query_scale), ("rows", "tokens", "heads", "head_dim"))
        key = constrain(rotate(key, *cos_sin), ("rows", "tokens", "kv_heads", "head_dim"))
        value = constrain(value, ("rows", "tokens", "kv_heads", "head_dim"))
        sinks = None if self.sinks is None else self.sinks[...]
        attended = constrain(attend(query, key, value, sinks), ("rows", "tokens", "heads", "head_dim"))
        return shards.each(self.output, attended)


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)).  Source: arXiv 2002.05202 (SwiGLU, GeGLU)."""

    def __init__(self, config: ModelConfig, make: Maker):
        hidden, inner = {"embed": config.hidden_size}, {"mlp": config.intermediate_size}
        self.activation = config.parts.activation
        if config.parts.fused_projections:
            self.gate_up = Linear(make, hidden, {"gate_up": 2} | inner, config.mlp_bias)
        else:
            self.gate_up = None
            self.gate = Linear(make, hidden, inner, config.mlp_bias)
            self.up = Linear(make, hidden, inner, config.mlp_bias)
        self.down = Linear(make, inner, hidden, config.mlp_bias)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "B T D"], constrain: Constrain, axes: Axes = WHOLE) -> Float[Array, "B T D"]:
        if self.gate_up is None:
            gate, up = self.gate(x), self.up(x)
        else:
            joined = self.gate_up(x)
            gate, up = joined[..., 0, :], joined[..., 1, :]
        return self.down(constrain(ACTIVATIONS[self.activation](gate) * up, (*axes, "mlp")))

    def gather(self, gather: Constrain, dtype: DTypeLike) -> None:
        for linear in (self.gate, self.up, self.down) if self.gate_up is None else (self.gate_up, self.down):
            linear.gather(gather, dtype)


class ExpertMLP(nnx.Module):
    """A mixture of experts in place of the MLP; rpo_jax.models.experts says what it computes."""

    def __init__(self, config: ModelConfig, make: Maker):
        experts = config.parts.experts
        assert experts is not None
        self.experts, self.activation = experts, config.parts.activation
        count, hidden = {"experts": experts.count}, {"embed": config.hidden_size}
        inner = {"mlp": experts.intermediate_size}
        first = inner | ({"gate_up": 2} if experts.joined else {})
        # Named apart from the axis that devices share experts along: every one of them routes its own tokens.
        routed = {"routed": experts.count}
        self.router = make.normal(hidden | routed)
        self.gate_up = make.normal(count | hidden | first) if experts.joined else None
        self.gate = None if experts.joined else make.normal(count | hidden | inner)
        self.up = None if experts.joined else make.normal(count | hidden | inner)
        self.down = make.normal(count | inner | hidden)
        assert experts.joined or not experts.biases, "no family has biases of gate and up projection apart"
        self.router_bias = make.constant(0.0, routed) if experts.biases else None
        self.gate_up_bias = make.constant(0.0, count | first) if experts.biases else None
        self.down_bias = make.constant(0.0, count | hidden) if experts.biases else None

    @jax.named_scope("mlp")
    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"], split: Split, axes: Axes = WHOLE
    ) -> tuple[Float[Array, "B T D"], Routing]:
        params = (self.router, self.gate_up if self.gate is None else self.gate, self.up, self.down)
        biases = (self.router_bias, self.gate_up_bias, self.down_bias)
        values: Any = (None if param is None else param.get_value() for param in (*params, *biases))
        weights = ExpertWeights(*values)
        return mixture(self.experts, ACTIVATIONS[self.activation], weights, x, real, split, axes)

    def gather(self, gather: Constrain, dtype: DTypeLike) -> None:
        pair = ("gate_up",) if self.experts.joined else ()
        kernels = ((self.gate, ("embed", "mlp")), (self.up, ("embed", "mlp")), (self.down, ("mlp", "embed")))
        for kernel, axes in (*kernels, (self.gate_up, ("embed", "mlp", *pair))):
            if kernel is not None:
                kernel.set_value(whole(kernel.get_value(), ("experts", *axes), 1, gather, dtype, groups=1))
        vectors = ((self.router_bias, ("routed",)), (self.gate_up_bias, ("experts", "mlp", *pair)))
        vectors += ((self.down_bias, ("experts", "embed")), (self.router, ("embed", "routed")))
        for param, axes in vectors:
            if param is not None:
                param.set_value(gather(param.get_value(), axes))
