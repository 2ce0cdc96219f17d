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
from jaxtyping import Array, Float, Int, PRNGKeyArray

from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.attention.kind import ONE_DEVICE, Attend, Split, capped
from rpo_jax.models.attention.masking import TokenIds
from rpo_jax.models.attention.registry import make_attention
from rpo_jax.models.projection import gathered, project, project_grouped
from rpo_jax.models.recompute import REMATS, in_chunks
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
        of_query, of_key = (heads, kv_heads) if parts.joint_qk_norm else (head, head)
        self.query_norm = RMSNorm(config, make, of_query) if config.qk_norm else None
        self.key_norm = RMSNorm(config, make, of_key) if config.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos_sin: tuple[Float[Array, "B T P"], Float[Array, "B T P"]],
        attend: Callable[[Array, Array, Array], Array],
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
        return self.output(constrain(attend(query, key, value), ("rows", "tokens", "heads", "head_dim")))


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

    def __call__(self, x: Float[Array, "B T D"], constrain: Constrain) -> Float[Array, "B T D"]:
        if self.gate_up is None:
            gate, up = self.gate(x), self.up(x)
        else:
            joined = self.gate_up(x)
            gate, up = joined[..., 0, :], joined[..., 1, :]
        return self.down(constrain(ACTIVATIONS[self.activation](gate) * up, ("rows", "tokens", "mlp")))

    def gather(self, gather: Constrain) -> None:
        for linear in (self.gate, self.up, self.down) if self.gate_up is None else (self.gate_up, self.down):
            linear.gather(gather)


class ExpertMLP(nnx.Module):
    """sum over the chosen experts e of p_e down_e(activation(gate_e(x)) * up_e(x)).  Source: arXiv 2401.04088, 2.1.

    p is the router's softmax over all experts, in float32, of those chosen. No token is dropped: the rows of all tokens
    are sorted by expert, and each expert multiplies its own.
    """

    def __init__(self, config: ModelConfig, make: _Maker):
        experts = config.parts.experts
        assert experts is not None
        self.experts, self.activation = experts, config.parts.activation
        count, hidden = {"experts": experts.count}, {"embed": config.hidden_size}
        inner = {"mlp": experts.intermediate_size}
        self.router = make.normal(hidden | count)
        self.gate = make.normal(count | hidden | inner)
        self.up = make.normal(count | hidden | inner)
        self.down = make.normal(count | inner | hidden)

    def __call__(self, x: Float[Array, "B T D"], constrain: Constrain) -> Float[Array, "B T D"]:
        flat, used = x.reshape(-1, x.shape[-1]), self.experts.per_token
        scores = jnp.matmul(flat.astype(jnp.float32), self.router[...].astype(jnp.float32))
        weights, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), used)
        if self.experts.weights_sum_to_one:
            weights /= jnp.sum(weights, axis=-1, keepdims=True)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        rows_of = jnp.bincount(chosen.reshape(-1), length=self.experts.count).astype(jnp.int32)

        def grouped(rows: Array, kernel: nnx.Param) -> Array:
            return project_grouped(rows, kernel.get_value(), rows_of)

        rows = flat[order // used]
        inner = ACTIVATIONS[self.activation](grouped(rows, self.gate)) * grouped(rows, self.up)
        out = grouped(inner, self.down)
        by_token = jnp.zeros_like(out).at[order].set(out).reshape(-1, used, x.shape[-1])
        return jnp.einsum("nkd,nk->nd", by_token, weights.astype(x.dtype)).reshape(x.shape)

    def gather(self, gather: Constrain) -> None:
        self.router.set_value(gather(self.router.get_value(), ("embed", "experts")))
        for kernel, axes in ((self.gate, ("embed", "mlp")), (self.up, ("embed", "mlp")), (self.down, ("mlp", "embed"))):
            kernel.set_value(gathered(kernel.get_value(), ("experts", *axes), 1, gather, groups=1))


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
        chunks: Split | None = None,
    ) -> Float[Array, "B T D"]:
        """Attention and MLP, each added to its input; the MLP in chunks, if devices so share it."""
        axes = ("rows", "tokens", "embed")

        def added(before: RMSNorm | None, block: Callable[[Array], Array], after: RMSNorm | None, x: Array) -> Array:
            change = block(x if before is None else before(x))
            change = change if after is None else after(change)
            return x + (change if self.residual_scale == 1.0 else change * self.residual_scale)

        def attention(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
            return self.attention(x, cos_sin, attend, constrain)

        def transform(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
            return added(self.mlp_norm, lambda x: self.mlp(x, constrain), self.mlp_output_norm, x)

        x = constrain(added(self.attention_norm, attention, self.attention_output_norm, x), axes)
        if chunks is None:
            return constrain(transform(x), axes)
        # Before the loop over chunks, or each of them would gather the weights again.
        for module in (self.mlp_norm, self.mlp, self.mlp_output_norm):
            if module is not None:
                module.gather(chunks.gather)
        return constrain(in_chunks(transform, x, chunks.shards("rows")), axes)


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
        remat: str,
        constrain: Constrain,
        split: Split,
    ) -> Float[Array, "B T D"]:
        """All layers and the final norm, on embedded tokens.

        Args:
            cos_sin: of every rope.
            of_layer: which of the distinct windows and of the ropes each layer has.
        """
        graphdef, stacked = nnx.split(self.layers)
        policy, in_chunks = REMATS[remat]
        chunks = split if in_chunks else None

        def body(x, inputs):
            weights, (window, rope) = inputs
            layer = nnx.merge(graphdef, weights)
            # A single one is indexed statically, so that a scan over layers need not copy it in every one.
            angles = tuple(of_ropes[rope if len(of_ropes) > 1 else 0] for of_ropes in cos_sin)
            return layer(x, angles, lambda q, k, v: attend(q, k, v, window), constrain, chunks), None

        # A scan already keeps XLA from merging the recomputation with the forward pass.
        step = body if policy is None else jax.checkpoint(body, policy=policy, prevent_cse=False)
        x, _ = jax.lax.scan(step, x, (stacked, of_layer))
        return divided(self.final_norm(x), self.logit_divisor)


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

    Names: layers, vocab, embed, heads, kv_heads, fused_heads, head_dim, gate_up, mlp, experts. Leaves are
    tuples: map with
    is_leaf=lambda x: isinstance(x, tuple).
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
        split: how devices share the attention.
    """
    if remat not in REMATS:
        raise ValueError(f"remat={remat!r} is not known; use one of {', '.join(REMATS)}.")
    constrain = constrain or (lambda x, axes: x)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    branch_ids = jnp.zeros_like(tokens) if branch_ids is None else branch_ids

    windows = tuple(dict.fromkeys(model_config.sliding_windows))
    ids = TokenIds(positions, segment_ids, branch_ids)
    softcap = model_config.parts.attention_softcap
    attend = make_attention(attention, platform or jax.default_backend(), ids, windows, split, softcap)
    window_of_layer = jnp.array([windows.index(window) for window in model_config.sliding_windows])
    cos_sin, rope_of_layer = rotations(model_config, positions), jnp.array(model_config.rope_of_layer)
    model = nnx.merge(_abstract(model_config)[0], params)
    # Whole over fsdp before rows are taken from it: a lookup in a table split both ways would be repeated everywhere.
    table = split.gather(model.embed[...], ("vocab", "embed"))
    x = constrain(embedded(model_config, table, tokens, compute_dtype), ("rows", "tokens", "embed"))
    return model(x, cos_sin, attend, (window_of_layer, rope_of_layer), remat, constrain, split)


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
