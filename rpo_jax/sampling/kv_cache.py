"""The decoder one token at a time: keys and values of what was read are kept, and the layers are the decoder's own.

Parameters come here with a list of layers instead of stacked ones: between two tokens there is little else to do than
to read them, and taking a layer out of a stack would copy it every time.
A cache is made of blocks of two slices of SLICE slots. A row's prompt ends with a slice, and every SLICE tokens after
it are kept apart until they fill a slice of their own: so a row's arithmetic depends on its own tokens alone, whoever
lies beside it and however long the others are. Slots beyond a row's own change nothing, not even a last bit.
Letters: B rows, P prompt slots, N blocks of a part, I slices of a block, S slots of a slice, D hidden, H query heads, G
key-value heads, K head dimension, J pairs of rotated dimensions, M ropes, R query heads of a key-value head.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.attention.kind import ONE_DEVICE, Split, capped
from rpo_jax.models.attention.masking import TokenIds
from rpo_jax.models.attention.registry import Asked, make_attention
from rpo_jax.models.decoder import Decoder, Params, divided, embedded, rotations
from rpo_jax.models.modules import Constrain
from rpo_jax.models.projection import Blockwise, Quantized, Transposed

SLICE = 32  # slots
BLOCK_SLICES = 2
BLOCK = BLOCK_SLICES * SLICE
# Blocks of a cache on CPU that are parts of their own: each is a piece of program, and takes time to compile.
APART = 16
_KEY_AXES = ("rows", "kv_heads", "head_dim", None)
_VALUE_AXES = ("rows", "kv_heads", None, "head_dim")
_BLOCK_KEY_AXES = (None, "rows", "kv_heads", "head_dim", None, None)
_BLOCK_VALUE_AXES = (None, "rows", "kv_heads", None, None, "head_dim")
KeyParts = tuple[Float[Array, "N B G K I S"], ...]
ValueParts = tuple[Float[Array, "N B G I S K"], ...]


class Recent(NamedTuple):
    """Keys, rotated, and values of every layer for the tokens that do not fill a slice yet.

    Keys lie with their slots last, values with their slots before the head dimension: both products of a single query
    then run along memory.
    """

    keys: tuple[Float[Array, "B G K S"], ...]
    values: tuple[Float[Array, "B G S K"], ...]
    # Of all slots: XLA would compute them in every layer.
    cos_sin: tuple[Float[Array, "M B S J"], Float[Array, "M B S J"]]


class Cache(NamedTuple):
    """Keys and values of every layer; of row b the first filled[b] slices, with tokens from slot starts[b] on.

    A layer's blocks lie in one part after another. On CPU the first blocks are parts of their own: XLA would copy a
    block out of a larger part each time it is looked at.
    """

    keys: tuple[KeyParts, ...]
    values: tuple[ValueParts, ...]
    starts: Int[Array, "B"]
    filled: Int[Array, "B"]

    @property
    def blocks(self) -> int:
        return sum(map(len, self.keys[0]))

    def grown(self, blocks: int, apart: int) -> Cache:
        """The same with room for more; the first `apart` blocks are parts of their own."""

        def more(parts: tuple[Array, ...]) -> tuple[Array, ...]:
            sizes = _part_sizes(self.blocks, blocks, apart)
            return (*parts, *(jnp.zeros((size, *parts[0].shape[1:]), parts[0].dtype) for size in sizes))

        keys, values = (tuple(map(more, layers)) for layers in (self.keys, self.values))
        return self._replace(keys=keys, values=values)

    def followed_by(self, recent: Recent) -> Cache:
        """The same with one slice more in every row; rows without room for it, which are done, stay as they are."""
        rows = jnp.arange(len(self.filled))
        block, place = jnp.divmod(self.filled, BLOCK_SLICES)

        def put(parts: tuple[Array, ...], new: Array, slots: tuple[Any, ...]) -> tuple[Array, ...]:
            written, first = [], 0
            for part in parts:
                slot = jnp.where(block >= first, block - first, len(part))  # a negative index would count from the end
                written.append(part.at[slot, rows, :, *slots].set(new, mode="drop"))
                first += len(part)
            return tuple(written)

        keys = tuple(put(*layer, (slice(None), place)) for layer in zip(self.keys, recent.keys, strict=True))
        values = tuple(put(*layer, (place,)) for layer in zip(self.values, recent.values, strict=True))
        return Cache(keys, values, self.starts, self.filled + 1)

    def with_rows(self, rows: Int[Array, "R"], new: Cache) -> Cache:
        """The same with other contents in these rows, which lie in one part; numbers that no row has are left out."""

        def put(parts: tuple[Array, ...], others: tuple[Array, ...]) -> tuple[Array, ...]:
            written, first = [], 0
            for part in parts:
                own_part = others[0][first : first + len(part)]
                written.append(part.at[: len(own_part), rows].set(own_part, mode="drop"))
                first += len(part)
            return tuple(written)

        keys, values = (tuple(map(put, *layers)) for layers in ((self.keys, new.keys), (self.values, new.values)))
        starts, filled = (
            x.at[rows].set(y, mode="drop") for x, y in ((self.starts, new.starts), (self.filled, new.filled))
        )
        return Cache(keys, values, starts, filled)


def _part_sizes(first: int, blocks: int, apart: int) -> tuple[int, ...]:
    """Blocks of each part from the first block on."""
    alone = max(0, min(apart, blocks) - first)
    rest = blocks - first - alone
    return (1,) * alone + ((rest,) if rest else ())


def empty_cache(model_config: ModelConfig, rows: int, blocks: int, dtype: DTypeLike, apart: int) -> Cache:
    """A cache with room for so many blocks, the first `apart` of which are parts of their own."""
    keys, values = (
        tuple(
            tuple(
                jnp.zeros((size, rows, model_config.num_kv_heads, *last), dtype)
                for size in _part_sizes(0, blocks, apart)
            )
            for _ in range(model_config.num_layers)
        )
        for last in ((model_config.head_dim, BLOCK_SLICES, SLICE), (BLOCK_SLICES, SLICE, model_config.head_dim))
    )
    return Cache(keys, values, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.int32))


def no_tokens(model_config: ModelConfig, cache: Cache) -> Recent:
    """No recent tokens yet, beside such a cache."""
    keys = tuple(jnp.zeros_like(parts[0][0, ..., 0, :]) for parts in cache.keys)
    values = tuple(jnp.zeros_like(parts[0][0, :, :, 0]) for parts in cache.values)
    positions = (cache.filled * SLICE - cache.starts)[:, None] + jnp.arange(SLICE)
    return Recent(keys, values, rotations(model_config, positions))


def to_decode_layout(params: Params, compute_dtype: DTypeLike, platform: str) -> Params:
    """Parameters as prefill and extend read them: a list of layers, the head with a row for each token.

    What compute_dtype rounds in a matrix product is rounded here, once; norms, routers and sinks stay as they are. On
    CPU kernels are transposed besides.
    """

    def cast(path: tuple[Any, ...], leaf: Any) -> Any:
        if _is_quantized(leaf):
            return leaf
        name = getattr(path[-1], "key", getattr(path[-1], "name", ""))
        kept = name in ("scale", "router", "router_bias", "sinks") or not jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf if kept else leaf.astype(compute_dtype)

    rounded = jax.tree_util.tree_map_with_path(cast, params, is_leaf=_is_quantized)

    def layer(number: int) -> Params:
        return jax.tree.map(lambda leaf: leaf[number], rounded["layers"])

    count = jax.tree.leaves(rounded["layers"])[0].shape[0]
    layers = [layer(number) for number in range(count)]
    if platform == "cpu":
        layers = [jax.tree_util.tree_map_with_path(_transposed, layer, is_leaf=_is_quantized) for layer in layers]
    head = {"head": rounded["head"].T} if "head" in rounded else {}
    return rounded | {"layers": layers} | head


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized | Blockwise)


def _transposed(path: tuple[Any, ...], leaf: Any) -> Any:
    # Of an adapted matrix of experts only the field is called so: it has no place of its own, and stays as it is.
    places = [getattr(key, "key", "") for key in path]
    last = places[-1] or getattr(path[-1], "name", "")
    if "kernel" not in places or last != "kernel" or _is_quantized(leaf):
        return leaf
    inputs = 2 if "output" in places else 1  # heads and head_dim
    return Transposed(leaf.transpose(*range(inputs, leaf.ndim), *range(inputs)))


@functools.cache
def _graphs(model_config: ModelConfig) -> tuple[Any, Any]:
    """The graphs of a layer and of the final norm."""
    model = nnx.eval_shape(lambda: Decoder(model_config, 0))
    return nnx.split(model.layers)[0], nnx.split(model.final_norm)[0]


def prefill(
    model_config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B P"],
    starts: Int[Array, "B"],
    *,
    compute_dtype: DTypeLike = jnp.float32,
    platform: str | None = None,
    constrain: Constrain | None = None,
    split: Split = ONE_DEVICE,
) -> tuple[Float[Array, "B D"], Cache]:
    """Read prompts that end in the last column; those of a row begin at its start. SLICE must divide P.

    Returns the last token's hidden state and a cache of one part with the prompts. The rest as for
    models.hidden_states.
    """
    constrain = constrain or (lambda x, axes: x)
    graph, _ = _graphs(model_config)
    column = jnp.arange(tokens.shape[1])
    positions = jnp.maximum(column - starts[:, None], 0)
    segment_ids = (column >= starts[:, None]).astype(jnp.int32)
    windows = tuple(dict.fromkeys(model_config.sliding_windows))
    ids = TokenIds(positions, segment_ids, jnp.zeros_like(tokens))
    asked = Asked.of(model_config, compute_dtype)
    attend = make_attention("auto", platform or jax.default_backend(), ids, windows, split, asked)
    cos_sin = rotations(model_config, positions)
    x = _embedded(model_config, params, tokens, compute_dtype, constrain)
    keys: list[Array] = []
    values: list[Array] = []
    of_layer = zip(params["layers"], model_config.sliding_windows, model_config.rope_of_layer, strict=True)
    for layer, window, rope in of_layer:
        which = jnp.array(windows.index(window))

        def keeping(query: Array, key: Array, value: Array, sinks: Array | None, which: Array = which) -> Array:
            # [B, P, G, K] to [N, B, G, K, I, S] and [N, B, G, I, S, K]
            unused = ((0, 0), (0, -key.shape[1] % BLOCK), (0, 0), (0, 0))
            blocks = (len(tokens), -1, BLOCK_SLICES, SLICE, *key.shape[2:])
            padded = (jnp.pad(x, unused).reshape(blocks) for x in (key, value))
            keys.append(next(padded).transpose(1, 0, 4, 5, 2, 3))
            values.append(next(padded).transpose(1, 0, 4, 2, 3, 5))
            return attend(query, key, value, which, sinks)

        x, _ = nnx.merge(graph, layer)(x, tuple(angles[rope] for angles in cos_sin), keeping, constrain, split)
    filled = jnp.full(len(tokens), tokens.shape[1] // SLICE, jnp.int32)
    cache = Cache(tuple((x,) for x in keys), tuple((x,) for x in values), starts, filled)
    return _normed(model_config, params, x[:, -1:]), placed(cache, constrain)


def extend(
    model_config: ModelConfig,
    params: Params,
    cache: Cache,
    recent: Recent,
    tokens: Int[Array, "B"],
    number: Int[Array, ""],
    used: Int[Array, ""] | None,
    *,
    compute_dtype: DTypeLike = jnp.float32,
    constrain: Constrain | None = None,
    split: Split = ONE_DEVICE,
) -> tuple[Float[Array, "B D"], Recent]:
    """Read one more token in every row, the recent one of that number; returns its hidden state, and all recent ones.

    Args:
        used: the most blocks that a row has which still matters; all are looked at where not given.
    """
    constrain = constrain or (lambda x, axes: x)
    graph, _ = _graphs(model_config)
    cos_sin = tuple(jax.lax.dynamic_slice_in_dim(x, number, 1, axis=2) for x in recent.cos_sin)
    x = _embedded(model_config, params, tokens[:, None], compute_dtype, constrain)
    keys, values = list(recent.keys), list(recent.values)
    of_layer = zip(params["layers"], model_config.sliding_windows, model_config.rope_of_layer, strict=True)
    for layer_number, (layer, window, rope) in enumerate(of_layer):

        def attend(
            query: Array,
            key: Array,
            value: Array,
            sinks: Array | None,
            at: int = layer_number,
            window: int | None = window,
        ) -> Array:
            keys[at] = jax.lax.dynamic_update_slice(keys[at], key.transpose(0, 2, 3, 1), (0, 0, 0, number))
            values[at] = jax.lax.dynamic_update_slice(values[at], value.swapaxes(1, 2), (0, 0, number, 0))
            blocks = (cache.keys[at], cache.values[at], cache.starts, cache.filled, used)
            softcap = model_config.parts.attention_softcap
            return _attend(query, keys[at], values[at], number, blocks, window, softcap, sinks)

        x, _ = nnx.merge(graph, layer)(x, tuple(angles[rope] for angles in cos_sin), attend, constrain, split)
    recent = recent._replace(keys=_place(keys, _KEY_AXES, constrain), values=_place(values, _VALUE_AXES, constrain))
    return _normed(model_config, params, x), recent


def next_token_logits(
    model_config: ModelConfig, params: Params, hidden: Float[Array, "B D"], constrain: Constrain | None = None
) -> Float[Array, "B V"]:
    """float32, from what prefill and extend return."""
    # Tokens first, as in Transposed.
    head = params["embed"] if model_config.tie_embeddings else params["head"]
    head = head.astype(hidden.dtype)
    logits = jax.lax.optimization_barrier(jnp.einsum("vd,bd->vb", head, hidden, preferred_element_type=jnp.float32)).T
    logits = capped(logits, model_config.parts.logit_softcap)
    return logits if constrain is None else constrain(logits, ("rows", "vocab"))


def _embedded(
    model_config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    compute_dtype: DTypeLike,
    constrain: Constrain,
) -> Array:
    # As in training: whole over fsdp before rows are taken from it.
    table = constrain(params["embed"], ("vocab", "embed"))
    return constrain(embedded(model_config, table, tokens, compute_dtype), ("rows", "tokens", "embed"))


def _normed(model_config: ModelConfig, params: Params, x: Float[Array, "B 1 D"]) -> Float[Array, "B D"]:
    normed = nnx.merge(_graphs(model_config)[1], params["final_norm"])(x[:, 0])
    return divided(normed, model_config.parts.logit_divisor)


def _place(arrays: Sequence[Array], axes: tuple[str | None, ...], constrain: Constrain) -> tuple[Array, ...]:
    return tuple(constrain(array, axes) for array in arrays)


def placed(cache: Cache, constrain: Constrain) -> Cache:
    """The cache where `constrain` has its axes."""
    return Cache(
        tuple(_place(parts, _BLOCK_KEY_AXES, constrain) for parts in cache.keys),
        tuple(_place(parts, _BLOCK_VALUE_AXES, constrain) for parts in cache.values),
        *(constrain(x, ("rows",)) for x in (cache.starts, cache.filled)),
    )


class _Sum(NamedTuple):
    """A softmax's weighted sum of values as far as it has come: the greatest score, and both sums relative to it."""

    top: Float[Array, "B G R"]
    weights: Float[Array, "B G R"]
    values: Float[Array, "B G R K"]


def _attend(
    query: Float[Array, "B 1 H K"],
    key: Float[Array, "B G K S"],
    value: Float[Array, "B G S K"],
    number: Int[Array, ""],
    blocks: tuple[KeyParts, ValueParts, Array, Array, Array | None],
    window: int | None,
    softcap: float | None,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "B 1 H K"]:
    """What dense attention computes, for the recent token of this number, which sees all before it in its row.

    Args:
        key, value: of recent tokens.
        blocks: the parts of the layer's keys and values, starts, filled, and how many blocks to look at.
    """
    rows, _, heads, head_dim = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, head_dim) * head_dim**-0.5
    keys, values, starts, filled, used = blocks
    filled = filled * SLICE  # slots
    at = filled + number  # the query's own slot

    def sees(slots: Array, end: Array) -> Array:
        seen = slots < end[:, None]
        # Within a row slots count as positions do.
        return seen if window is None else seen & (at[:, None] - slots < window)

    def add(before: _Sum, key: Array, value: Array, seen: Array) -> _Sum:
        scores = capped(jnp.einsum("bgrk,bgks->bgrs", grouped, key, preferred_element_type=jnp.float32), softcap)
        seen = seen[:, None, None]
        top = jnp.maximum(before.top, jnp.max(scores, axis=-1, initial=jnp.finfo(jnp.float32).min, where=seen))
        # Exactly 0 where nothing is seen, and then top is as before: such a block changes no bit.
        weights = jnp.exp(jnp.where(seen, scores - top[..., None], -jnp.inf))
        rest = jnp.exp(before.top - top)
        mixed = jnp.einsum("bgrs,bgsk->bgrk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return _Sum(top, before.weights * rest + jnp.sum(weights, axis=-1), before.values * rest[..., None] + mixed)

    def add_block(index: Array | int, before: _Sum, first: int, keys: Array, values: Array) -> _Sum:
        slots = (first + index) * BLOCK + jnp.arange(BLOCK)
        seen = sees(slots, filled) & (slots >= starts[:, None])
        key, value = keys[index], values[index]
        return add(before, key.reshape(*key.shape[:3], BLOCK), value.reshape(*value.shape[:2], BLOCK, head_dim), seen)

    def add_part(before: _Sum, first: int, keys: Array, values: Array) -> _Sum:
        add_one = functools.partial(add_block, first=first, keys=keys, values=values)
        if used is None:
            return jax.lax.fori_loop(0, len(keys), add_one, before)
        if len(keys) > 1:
            return jax.lax.fori_loop(0, jnp.clip(used - first, 0, len(keys)), add_one, before)
        return jax.lax.cond(first < used, functools.partial(add_one, 0), lambda before: before, before)

    nothing = jnp.zeros(grouped.shape[:3], jnp.float32)
    nothing_seen = _Sum(nothing + jnp.finfo(jnp.float32).min, nothing, jnp.zeros(grouped.shape, jnp.float32))
    if sinks is not None:  # a score that is there before any key's, with a value of nothing
        of_heads = sinks.astype(jnp.float32).reshape(key.shape[1], -1)
        nothing_seen = nothing_seen._replace(top=nothing + of_heads, weights=nothing + 1)
    total = add(nothing_seen, key, value, sees(filled[:, None] + jnp.arange(SLICE), at + 1))
    first = 0
    for part in zip(keys, values, strict=True):
        total = add_part(total, first, *part)
        first += len(part[0])
    return (total.values / total.weights[..., None]).astype(query.dtype).reshape(rows, 1, heads, head_dim)
