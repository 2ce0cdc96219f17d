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
from rpo_jax.models.experts import Routing
from rpo_jax.models.modules import Attention, Constrain, ExpertMLP, GatedMLP, Maker, RMSNorm
from rpo_jax.models.recompute import REMATS, WHOLE, Axes, at_once, in_chunks
from rpo_jax.models.rope import rotation

Params = dict[str, Any]


class Execution(NamedTuple):
    """How a decoder is run; the fields are the arguments of hidden_states."""

    compute_dtype: DTypeLike = jnp.float32
    remat: str = "none"
    attention: str = "auto"
    platform: str | None = None
    constrain: Constrain | None = None
    split: Split = ONE_DEVICE


class Layer(nnx.Module):
    def __init__(self, config: ModelConfig, make: Maker):
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
        shards = Shards(split.shards("rows"), split.shards("tokens"))

        def added(before: RMSNorm | None, block: Callable[[Array], Any], after: RMSNorm | None, x: Array) -> Any:
            change, more = block(x if before is None else before(x))
            change = change if after is None else after(change)
            return x + (change if self.residual_scale == 1.0 else change * self.residual_scale), more

        def attention(x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], None]:
            return self.attention(x, cos_sin, attend, constrain, shards), None

        def transform(x: Array, real: Array, axes: Axes = WHOLE) -> tuple[Array, Routing | None]:
            def mlp(x: Array) -> tuple[Array, Routing | None]:
                if isinstance(self.mlp, ExpertMLP):
                    return self.mlp(x, real, split, axes)
                return self.mlp(x, constrain, axes), None

            return added(self.mlp_norm, mlp, self.mlp_output_norm, x)

        x = constrain(added(self.attention_norm, attention, self.attention_output_norm, x)[0], axes)
        if not chunked:
            x, routing = at_once(transform, x, real, shards)
            return constrain(x, axes), routing
        # Before the loop over chunks, or each of them would gather the weights again.
        for module in (self.mlp_norm, self.mlp, self.mlp_output_norm):
            if module is not None:
                module.gather(split.gather, x.dtype)
        x, routing = in_chunks(transform, x, real, shards)
        return constrain(x, axes), routing


class Decoder(nnx.Module):
    def __init__(self, config: ModelConfig, key: PRNGKeyArray | int, dtype: DTypeLike = jnp.float32):
        make = Maker(nnx.Rngs(params=key), config.initializer_range, dtype, {})
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
    pairs = (rotation(rope, model_config.rotated_dim, positions) for rope in model_config.ropes)
    cos, sin = map(jnp.stack, zip(*pairs, strict=True))
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
    how = Execution(compute_dtype, remat, attention, platform, constrain, split)
    return hidden_states_and_routing(model_config, params, tokens, positions, segment_ids, branch_ids, how)[0]


def hidden_states_and_routing(
    model_config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None,
    segment_ids: Int[Array, "B T"] | None,
    branch_ids: Int[Array, "B T"] | None,
    how: Execution,
) -> tuple[Float[Array, "B T D"], Routing | None]:
    """hidden_states, and where the experts of every layer have their tokens from; None without experts."""
    if how.remat not in REMATS:
        raise ValueError(f"remat={how.remat!r} is not known; use one of {', '.join(REMATS)}.")
    compute_dtype, split, constrain = how.compute_dtype, how.split, how.constrain or (lambda x, axes: x)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    branch_ids = jnp.zeros_like(tokens) if branch_ids is None else branch_ids

    windows = tuple(dict.fromkeys(model_config.sliding_windows))
    ids = TokenIds(positions, segment_ids, branch_ids)
    asked = Asked.of(model_config, compute_dtype)
    attend = make_attention(how.attention, how.platform or jax.default_backend(), ids, windows, split, asked)
    window_of_layer = jnp.array([windows.index(window) for window in model_config.sliding_windows])
    cos_sin, rope_of_layer = rotations(model_config, positions), jnp.array(model_config.rope_of_layer)
    model = nnx.merge(_abstract(model_config)[0], params)
    # Whole over fsdp before rows are taken from it: a lookup in a table split both ways would be repeated everywhere.
    table = split.gather(model.embed[...], ("vocab", "embed"), compute_dtype)
    x = constrain(embedded(model_config, table, tokens, compute_dtype), ("rows", "tokens", "embed"))
    of_layer = (window_of_layer, rope_of_layer)
    return model(x, cos_sin, attend, of_layer, segment_ids > 0, how.remat, constrain, split)


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
    how = Execution(compute_dtype, remat, attention, constrain=constrain)
    x, _ = hidden_states_and_routing(model_config, params, tokens, positions, segment_ids, branch_ids, how)
    head = output_head(model_config, params).astype(compute_dtype)
    logits = jnp.einsum("btd,dv->btv", x, head, preferred_element_type=jnp.float32)
    logits = capped(logits, model_config.parts.logit_softcap)
    return logits if constrain is None else constrain(logits, ("rows", "tokens", "vocab"))
