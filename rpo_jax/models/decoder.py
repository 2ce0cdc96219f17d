"""The one decoder: every family is settings of it.

Parameters are a plain nested dict of arrays; those of a layer carry all layers along their first axis, and the
forward pass scans over it. Letters: B rows, T tokens, D hidden, V vocabulary, P pairs of a head's rotated
dimensions, N ropes, L layers.
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
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rpo_jax.core.shards import Shards
from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.attention.kind import ONE_DEVICE, Attend, Split, capped
from rpo_jax.models.attention.masking import TokenIds
from rpo_jax.models.attention.registry import Asked, make_attention
from rpo_jax.models.experts import ExpertWeights, Routing, mixture
from rpo_jax.models.projection import gathered, project
from rpo_jax.models.recompute import REMATS, WHOLE, Axes, in_chunks
from rpo_jax.models.rope import rotate, rotation

# By transformers' names.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
Params = dict[str, Any]
Constrain = Callable[[Array, tuple[str | None, ...]], Array]


class _Maker(NamedTuple):
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

    def __init__(self, make: _Maker, inputs: dict[str, int], outputs: dict[str, int], bias: bool):
        self.input_rank = len(inputs)
        self.axes = (*inputs, *outputs)
        self.kernel = make.normal(inputs | outputs)
        self.bias = make.constant(0.0, outputs) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = project(x, self.kernel.get_value(), self.input_rank)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def gather(self, gather: Constrain) -> None:
        """Have the kernel whole over the devices that share rows."""
        self.kernel.set_value(gathered(self.kernel.get_value(), self.axes, self.input_rank, gather))


class RMSNorm(nnx.Module):
    """y = scale * x / sqrt(mean(x^2) + eps) over all axes of the scale, in float32; 1 + scale where norms are centred.

    Source: arXiv 1910.07467.
    """

    def __init__(self, config: ModelConfig, make: _Maker, axes: dict[str, int]):
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

    def gather(self, gather: Constrain) -> None:
        """Have the scale whole over the devices that share rows."""
        self.scale.set_value(gather(self.scale.get_value(), self.axes))


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, make: _Maker):
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
    ) -> Float[Array, "B T D"]:
        if self.query_key_value is None:
            query, key, value = self.query(x), self.key(x), self.value(x)
        else:
            query, key, value = jnp.split(self.query_key_value(x), self.ends, axis=-2)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query = constrain(rotate(query, *cos_sin, self.query_scale), ("rows", "tokens", "heads", "head_dim"))
        key = constrain(rotate(key, *cos_sin), ("rows", "tokens", "kv_heads", "head_dim"))
        value = constrain(value, ("rows", "tokens", "kv_heads", "head_dim"))
        sinks = None if self.sinks is None else self.sinks[...]
        return self.output(constrain(attend(query, key, value, sinks), ("rows", "tokens", "heads", "head_dim")))


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)).  Source: arXiv 2002.05202 (SwiGLU, GeGLU)."""

    def __init__(self, config: ModelConfig, make: _Maker):
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

    def gather(self, gather: Constrain) -> None:
        for linear in (self.gate, self.up, self.down) if self.gate_up is None else (self.gate_up, self.down):
            linear.gather(gather)


class ExpertMLP(nnx.Module):
    """A mixture of experts in place of the MLP; rpo_jax.models.experts says what it computes."""

    def __init__(self, config: ModelConfig, make: _Maker):
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
        def value(param: nnx.Param | None) -> Any:
            return None if param is None else param.get_value()

        weights = ExpertWeights(
            value(self.router),
            value(self.gate_up if self.gate is None else self.gate),
            value(self.up),
            value(self.down),
            *map(value, (self.router_bias, self.gate_up_bias, self.down_bias)),
        )
        return mixture(self.experts, ACTIVATIONS[self.activation], weights, x, real, split, axes)

    def gather(self, gather: Constrain) -> None:
        pair = ("gate_up",) if self.experts.joined else ()
        kernels = ((self.gate, ("embed", "mlp")), (self.up, ("embed", "mlp")), (self.down, ("mlp", "embed")))
        for kernel, axes in (*kernels, (self.gate_up, ("embed", "mlp", *pair))):
            if kernel is not None:
                kernel.set_value(gathered(kernel.get_value(), ("experts", *axes), 1, gather, groups=1))
        vectors = ((self.router_bias, ("routed",)), (self.gate_up_bias, ("experts", "mlp", *pair)))
        vectors += ((self.down_bias, ("experts", "embed")), (self.router, ("embed", "routed")))
        for param, axes in vectors:
            if param is not None:
                param.set_value(gather(param.get_value(), axes))


class Layer(nnx.Module):
    def __init__(self, config: ModelConfig, make: _Maker):
        parts = config.parts

        def norm(wanted: bool) -> RMSNorm | None:
            return RMSNorm(config, make, {"embed": config.hidden_size}) if wanted else None

        self.attention_norm, self.attention_output_norm = norm(parts.norm_before), norm(parts.norm_after)
        self.attention = Attention(config, make)
        self.mlp_norm, self.mlp_output_norm = norm(parts.norm_before), norm(parts.norm_after)
        self.mlp = GatedMLP(config, make) if parts.experts is None else ExpertMLP(config, make)
        self.residual_scale = parts.residual_scale

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos_sin: Any,
        attend: Callable[..., Array],
        constrain: Constrain,
        split: Split = ONE_DEVICE,
        real: Bool[Array, "B T"] | None = None,
        chunked: bool = False,
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """Attention and MLP, each added to its input; and where a mixture of experts sent the tokens.

        Args:
            real: tokens that are no padding; all where not given.
            chunked: whether the MLP is in chunks, if devices so share it.
        """
        axes = ("rows", "tokens", "embed")
        real = jnp.ones(x.shape[:2], bool) if real is None else real

        def added(before: RMSNorm | None, block: Callable[[Array], Any], after: RMSNorm | None, x: Array) -> Any:
            change, more = block(x if before is None else before(x))
            change = change if after is None else after(change)
            return x + (change if self.residual_scale == 1.0 else change * self.residual_scale), more

        def attention(x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], None]:
            return self.attention(x, cos_sin, attend, constrain), None

        def transform(x: Array, real: Array, axes: Axes = WHOLE) -> tuple[Array, Routing | None]:
            def mlp(x: Array) -> tuple[Array, Routing | None]:
                if isinstance(self.mlp, ExpertMLP):
                    return self.mlp(x, real, split, axes)
                return self.mlp(x, constrain, axes), None

            return added(self.mlp_norm, mlp, self.mlp_output_norm, x)

        x = constrain(added(self.attention_norm, attention, self.attention_output_norm, x)[0], axes)
        if not chunked:
            x, routing = transform(x, real)
            return constrain(x, axes), routing
        # Before the loop over chunks, or each of them would gather the weights again.
        for module in (self.mlp_norm, self.mlp, self.mlp_output_norm):
            if module is not None:
                module.gather(split.gather)
        x, routing = in_chunks(transform, x, real, Shards(split.shards("rows"), split.shards("tokens")))
        return constrain(x, axes), routing


class Decoder(nnx.Module):
    def __init__(self, config: ModelConfig, key: PRNGKeyArray | int, dtype: DTypeLike = jnp.float32):
        make = _Maker(nnx.Rngs(params=key), config.initializer_range, dtype, {})
        embedding = {"vocab": config.vocab_size, "embed": config.hidden_size}
        self.embed = make.normal(embedding)
        self.layers = Layer(config, make._replace(stack={"layers": config.num_layers}))
        self.final_norm = RMSNorm(config, make, {"embed": config.hidden_size})
        self.logit_divisor = config.parts.logit_divisor
        head = {"embed": config.hidden_size, "vocab": config.vocab_size}
        self.head = None if config.tie_embeddings else make.normal(head)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos_sin: Any,
        attend: Attend,
        of_layer: tuple[Int[Array, "L"], Int[Array, "L"]],
        real: Bool[Array, "B T"],
        remat: str,
        constrain: Constrain,
        split: Split,
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """All layers and the final norm, on embedded tokens; and where each layer's experts have theirs from.

        Args:
            cos_sin: of every rope.
            of_layer: which of the distinct windows and of the ropes each layer has.
            real: tokens that are no padding.
        """
        graphdef, stacked = nnx.split(self.layers)
        policy, chunked = REMATS[remat]

        def body(x, inputs):
            weights, (window, rope) = inputs
            layer = nnx.merge(graphdef, weights)
            # A single one is indexed statically, so that a scan over layers need not copy it in every one.
            angles = tuple(of_ropes[rope if len(of_ropes) > 1 else 0] for of_ropes in cos_sin)
            return layer(x, angles, lambda q, k, v, z: attend(q, k, v, window, z), constrain, split, real, chunked)

        # A scan already keeps XLA from merging the recomputation with the forward pass.
        step = body if policy is None else jax.checkpoint(body, policy=policy, prevent_cse=False)
        x, routing = jax.lax.scan(step, x, (stacked, of_layer))
        return divided(self.final_norm(x), self.logit_divisor), routing


def divided(x: Float[Array, "..."], logit_divisor: float) -> Float[Array, "..."]:
    """What the head reads: a divisor of the logits divides the hidden states instead, of which there are fewer."""
    return x if logit_divisor == 1.0 else x / jnp.asarray(logit_divisor, x.dtype)


def rotations(
    model_config: ModelConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "N B T P"], Float[Array, "N B T P"]]:
    """cos and sin of the model's distinct ropes."""
    found = (rotation(rope, model_config.rotated_dim, positions) for rope in model_config.ropes)
    cos, sin = map(jnp.stack, zip(*found, strict=True))
    return cos, sin


def embedded(
    model_config: ModelConfig, table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: DTypeLike
) -> Float[Array, "B T D"]:
    """The tokens' rows of the embedding, scaled."""
    x, scale = table[tokens].astype(dtype), model_config.parts.embedding_scale
    # Rounded to the compute dtype first, as the models that have it were trained.
    return x if scale == 1.0 else x * jnp.asarray(scale, dtype)


@functools.cache
def _abstract(model_config: ModelConfig) -> tuple[Any, Any]:
    """The model's graph, and its parameters without values."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(model_config, 0)))


def abstract_params(model_config: ModelConfig) -> Params:
    """Parameters as jax.ShapeDtypeStruct, float32: nothing is allocated."""
    return nnx.to_pure_dict(_abstract(model_config)[1])


def param_axes(model_config: ModelConfig) -> Params:
    """For each parameter the names of its axes, in the tree of the parameters.

    Names: layers, vocab, embed, heads, kv_heads, fused_heads, head_dim, gate_up, mlp, experts, routed. Leaves are
    tuples: map with is_leaf=lambda x: isinstance(x, tuple).
    """
    state = _abstract(model_config)[1]
    axes = jax.tree.map(lambda v: v.get_metadata()["axes"], state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.to_pure_dict(axes)


def count_params(model_config: ModelConfig) -> int:
    """Number of parameters; a tied head is not counted twice."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(model_config)))


def init_params(model_config: ModelConfig, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> Params:
    """New parameters: weights normal with standard deviation initializer_range, norms the identity, biases 0.

    A pure function: under jax.jit with out_shardings each device makes only its own part.
    """
    return nnx.to_pure_dict(nnx.state(Decoder(model_config, key, dtype), nnx.Param))


def hidden_states(
    model_config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    branch_ids: Int[Array, "B T"] | None = None,
    *,
    compute_dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    attention: str = "auto",
    platform: str | None = None,
    constrain: Constrain | None = None,
    split: Split = ONE_DEVICE,
) -> Float[Array, "B T D"]:
    """Residual stream after the final norm, in compute_dtype: with output_head the logits, before their cap if any.

    A token sees earlier tokens of its own segment that are of branch 0 or of its own branch (core.records.Batch);
    the sliding window counts positions. An attention mask of ones and zeros is a valid segment_ids.

    Args:
        model_config: the architecture.
        params: as init_params or load_pretrained gives them; cast to compute_dtype where they are used.
        tokens: token ids.
        positions: rotary positions; 0, 1, ... where not given.
        segment_ids: 0 is padding; one segment per row where not given.
        branch_ids: 0 is seen by the whole segment; all 0 where not given.
        compute_dtype: dtype of matrix products and of the residual stream; norms, rotation and softmax are float32.
        remat: a key of REMATS: none, dots, attention or full.
        attention: a key of ATTENTIONS, or auto: what is best on the platform.
        platform: cpu, gpu or tpu, where it is not the default one that this is compiled for.
        constrain: called on activations with their axes' names (rows, tokens, embed, heads, kv_heads, head_dim, mlp),
            returns them, possibly with a sharding constraint.
        split: how devices share attention and experts; where they share a row's tokens too, all that is given of
            tokens is striped (core.shards), and so is what comes out.
    """
    arguments = (model_config, params, tokens, positions, segment_ids, branch_ids)
    how = (compute_dtype, remat, attention, platform, constrain, split)
    return hidden_states_and_routing(*arguments, *how)[0]


def hidden_states_and_routing(
    model_config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None,
    segment_ids: Int[Array, "B T"] | None,
    branch_ids: Int[Array, "B T"] | None,
    compute_dtype: DTypeLike,
    remat: str,
    attention: str,
    platform: str | None,
    constrain: Constrain | None,
    split: Split,
) -> tuple[Float[Array, "B T D"], Routing | None]:
    """hidden_states, and where the experts of every layer have their tokens from; None without experts."""
    if remat not in REMATS:
        raise ValueError(f"remat={remat!r} is not known; use one of {', '.join(REMATS)}.")
    constrain = constrain or (lambda x, axes: x)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    branch_ids = jnp.zeros_like(tokens) if branch_ids is None else branch_ids

    windows = tuple(dict.fromkeys(model_config.sliding_windows))
    ids = TokenIds(positions, segment_ids, branch_ids)
    asked = Asked.of(model_config, compute_dtype)
    attend = make_attention(attention, platform or jax.default_backend(), ids, windows, split, asked)
    window_of_layer = jnp.array([windows.index(window) for window in model_config.sliding_windows])
    cos_sin, rope_of_layer = rotations(model_config, positions), jnp.array(model_config.rope_of_layer)
    model = nnx.merge(_abstract(model_config)[0], params)
    # Whole over fsdp before rows are taken from it: a lookup in a table split both ways would be repeated everywhere.
    table = split.gather(model.embed[...], ("vocab", "embed"))
    x = constrain(embedded(model_config, table, tokens, compute_dtype), ("rows", "tokens", "embed"))
    of_layer = (window_of_layer, rope_of_layer)
    return model(x, cos_sin, attend, of_layer, segment_ids > 0, remat, constrain, split)


def output_head(model_config: ModelConfig, params: Params) -> Float[Array, "D V"]:
    """The matrix that turns hidden states into logits: the transposed embedding where tied."""
    return params["embed"].T if model_config.tie_embeddings else params["head"]


@functools.partial(jax.jit, static_argnames=("model_config", "compute_dtype", "remat", "attention", "constrain"))
def apply(
    model_config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    branch_ids: Int[Array, "B T"] | None = None,
    *,
    compute_dtype: DTypeLike = "float32",
    remat: str = "none",
    attention: str = "auto",
    constrain: Constrain | None = None,
) -> Float[Array, "B T V"]:
    """Logits of every token's successor, float32; the arguments are those of hidden_states. Compiled."""
    x = hidden_states(
        model_config,
        params,
        tokens,
        positions,
        segment_ids,
        branch_ids,
        compute_dtype=compute_dtype,
        remat=remat,
        attention=attention,
        constrain=constrain,
    )
    head = output_head(model_config, params).astype(compute_dtype)
    logits = jnp.einsum("btd,dv->btv", x, head, preferred_element_type=jnp.float32)
    logits = capped(logits, model_config.parts.logit_softcap)
    return logits if constrain is None else constrain(logits, ("rows", "tokens", "vocab"))
