"""Attention that visits only the blocks of keys that a block of queries can see: packed rows are mostly nothing else.

A row's queries are taken in blocks. All keys that a block sees lie between the beginning of its first segment and its
own end, so it reads that span alone, padded to one of a few widths: each width is a loop over its blocks, with as many
turns as the batch needs. No more than one block's scores exist at a time, in the forward and in the backward pass.

Letters: R rows, T tokens, t of them whose queries a device has, G key-value heads, q query heads of each, K head
dimension, n blocks of t, b tokens of a block, N = R * n, w widths, S tokens of a span.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from rpo_jax.models.attention.kind import (
    ALL,
    ATTENTION_OUTPUT,
    OWN,
    SHORT,
    TOKEN_IDS_AXES,
    Attend,
    AttentionKind,
    Share,
    Split,
    Windows,
    capped,
)
from rpo_jax.models.attention.masking import TokenIds, visible

# Measured on 2 CPU cores at 32, 64 and 128 tokens: smaller blocks see less that they must not, larger ones multiply
# faster; 64 is also what rows are multiples of.
BLOCK_TOKENS = 64
EVERYTHING = 2**30  # a window that no position reaches


class Plan(NamedTuple):
    """Which blocks take which width: block order[i] has width j for ends[j - 1] <= i < ends[j]."""

    order: Int[Array, "N"]
    ends: Int[Array, "w"]


class _Saved(NamedTuple):
    """What the backward pass needs of the forward pass."""

    query: Float[Array, "N G b*q K"]
    key: Float[Array, "R G T K"]
    value: Float[Array, "R G T K"]
    ids: TokenIds
    plan: Plan
    window: Int[Array, ""]
    out: Float[Array, "N G b*q K"]
    log_sum: Float[Array, "N G b*q"]
    sinks: Float[Array, "G b*q"] | None


def widths(num_blocks: int) -> tuple[int, ...]:
    """Spans' widths in blocks: every one up to 4, then steps of about a third, ending at the whole row."""
    narrower = [width for width in (1, 2, 3) if width < num_blocks]
    width = 4
    while width < num_blocks:
        narrower.append(width)
        width += max(1, width // 3)
    return (*narrower, num_blocks)


class _How(NamedTuple):
    """What does not change between batches: the scores' softcap, if any, and the device's part of a row."""

    softcap: float | None
    share: Share


def make_plan(ids: TokenIds, window: int | None, share: Share = ALL) -> Plan:
    """Sort the blocks of all rows by the width of what they see; blocks of padding alone come last and are not done."""
    rows, tokens = ids.segment_ids.shape
    num_blocks = tokens // share.context // BLOCK_TOKENS
    # Every token sees itself, so the first one that it sees is where its mask is first true.
    first_seen = jnp.argmax(share.visible(ids, window), axis=-1).reshape(rows, num_blocks, BLOCK_TOKENS)
    number = share.index(jnp.arange(num_blocks) * BLOCK_TOKENS) // BLOCK_TOKENS
    span = number + 1 - jnp.min(first_seen, axis=-1) // BLOCK_TOKENS
    sizes = jnp.array(widths(tokens // BLOCK_TOKENS))
    own = share.own(ids).segment_ids
    has_tokens = jnp.any(own.reshape(rows, num_blocks, BLOCK_TOKENS) > 0, axis=-1)
    which = jnp.where(has_tokens, jnp.searchsorted(sizes, span), len(sizes)).reshape(-1)
    order = jnp.argsort(which, stable=True)
    return Plan(order, jnp.searchsorted(which[order], jnp.arange(len(sizes)), side="right"))


def blockwise_attention(
    query: Float[Array, "R t H K"],
    key: Float[Array, "R T G K"],
    value: Float[Array, "R T G K"],
    ids: TokenIds,
    plan: Plan,
    window: Int[Array, ""],
    sinks: Float[Array, "H"] | None = None,
    softcap: float | None = None,
    share: Share = ALL,
) -> Float[Array, "R t H K"]:
    """Grouped-query attention, softmax in float32; what dense attention gives, but zeros in blocks of padding alone.

    Args:
        ids: of T tokens, a multiple of BLOCK_TOKENS.
        plan: of these ids and this window.
        window: positions that a query sees back, its own included.
        sinks: one more score in every head's softmax, which has no value; None for none.
        softcap: c of c tanh(scores / c); None for the scores as they are.
        share: the device's part of a row, whose t tokens the queries are of.
    """
    rows, tokens, heads, head_dim = query.shape
    groups, num_blocks = key.shape[2], tokens // BLOCK_TOKENS
    # The query heads of a key-value head become more queries: fewer and larger matrix products.
    split = (rows, num_blocks, BLOCK_TOKENS, groups, heads // groups, head_dim)
    blocks = query.reshape(split).transpose(0, 1, 3, 4, 2, 5).reshape(rows * num_blocks, groups, -1, head_dim)
    by_head = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    if sinks is not None:
        sinks = jnp.repeat(sinks.astype(jnp.float32).reshape(groups, -1), BLOCK_TOKENS, axis=1)
    out: Any = _attend(_How(softcap, share), blocks, *by_head, ids, plan, window, sinks)
    split = (rows, num_blocks, groups, heads // groups, BLOCK_TOKENS, head_dim)
    return out.reshape(split).transpose(0, 1, 4, 2, 3, 5).reshape(query.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    how: _How,
    query: Float[Array, "N G b*q K"],
    key: Float[Array, "R G T K"],
    value: Float[Array, "R G T K"],
    ids: TokenIds,
    plan: Plan,
    window: Int[Array, ""],
    sinks: Float[Array, "G b*q"] | None,
) -> Float[Array, "N G b*q K"]:
    return _forward(how, query, key, value, ids, plan, window, sinks)[0]


class _Block(NamedTuple):
    """One block of queries and its span of keys."""

    index: Int[Array, ""]  # among the N blocks
    start: tuple[Any, ...]  # of the span in [R, G, T, K]
    size: tuple[int, ...]
    mask: Bool[Array, "b*q S"]

    def of(self, blocks: Array) -> Array:
        return lax.dynamic_index_in_dim(blocks, self.index, keepdims=False)

    def put(self, blocks: Array, values: Array) -> Array:
        return lax.dynamic_update_index_in_dim(blocks, values.astype(blocks.dtype), self.index, 0)

    def span(self, keys: Array) -> Array:
        return lax.dynamic_slice(keys, self.start, self.size)[0]

    def add(self, keys: Array, values: Array) -> Array:
        return lax.dynamic_update_slice(keys, (self.span(keys) + values)[None], self.start)


def _block(share: Share, index: Array, span_tokens: int, saved: _Saved) -> _Block:
    query, key, ids, window = saved.query, saved.key, saved.ids, saved.window
    num_blocks = key.shape[2] // share.context // BLOCK_TOKENS
    row, number = index // num_blocks, share.index(index % num_blocks * BLOCK_TOKENS) // BLOCK_TOKENS
    # At the beginning of a row the span reaches past the block: the mask takes care of that.
    start = jnp.maximum((number + 1) * BLOCK_TOKENS - span_tokens, 0)
    queries = TokenIds(*(lax.dynamic_slice(array, (row, number * BLOCK_TOKENS), (1, BLOCK_TOKENS)) for array in ids))
    keys = TokenIds(*(lax.dynamic_slice(array, (row, start), (1, span_tokens)) for array in ids))
    places = jnp.arange(BLOCK_TOKENS) + number * BLOCK_TOKENS - start
    mask = visible(*queries, window, keys=keys, places=places)[0]
    mask = jnp.tile(mask, (query.shape[2] // BLOCK_TOKENS, 1))
    return _Block(index, (row, 0, start, 0), (1, key.shape[1], span_tokens, key.shape[3]), mask)


def _scores(softcap: float | None, block: _Block, query: Array, key: Array) -> Float[Array, "G b*q S"]:
    scaled = block.of(query) * key.shape[-1] ** -0.5
    return capped(jnp.einsum("gqk,gsk->gqs", scaled, block.span(key), preferred_element_type=jnp.float32), softcap)


def _over_blocks(share: Share, body: Callable[[_Block, Any], Any], carry: Any, saved: _Saved) -> Any:
    """Run `body` on every block that holds a token, one after another."""
    begin = jnp.zeros((), saved.plan.ends.dtype)
    for end, width in zip(saved.plan.ends, widths(saved.key.shape[2] // BLOCK_TOKENS), strict=True):

        def turn(number: Array, carry: Any, span_tokens: int = width * BLOCK_TOKENS) -> Any:
            index = saved.plan.order[number]
            return body(_block(share, index, span_tokens, saved), carry)

        carry, begin = lax.fori_loop(begin, end, turn, carry), end
    return carry


def _forward(how, query, key, value, ids, plan, window, sinks) -> tuple[Array, _Saved]:
    out, log_sum = jnp.zeros_like(query), jnp.zeros(query.shape[:-1], jnp.float32)
    saved = _Saved(query, key, value, ids, plan, window, out, log_sum, sinks)

    def body(block: _Block, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        scores = jnp.where(block.mask, _scores(how.softcap, block, query, key), jnp.finfo(jnp.float32).min)
        most = jnp.max(scores, axis=-1, keepdims=True)
        most = most if sinks is None else jnp.maximum(most, sinks[..., None])
        weights = jnp.exp(scores - most)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        total = total if sinks is None else total + jnp.exp(sinks[..., None] - most)
        mixed = jnp.einsum(
            "gqs,gsk->gqk", weights.astype(value.dtype), block.span(value), preferred_element_type=jnp.float32
        )
        return block.put(carry[0], mixed / total), block.put(carry[1], (most + jnp.log(total))[..., 0])

    out, log_sum = (checkpoint_name(x, ATTENTION_OUTPUT) for x in _over_blocks(how.share, body, (out, log_sum), saved))
    return out, saved._replace(out=out, log_sum=log_sum)


def _backward(how: _How, saved: _Saved, cotangent: Float[Array, "N G b*q K"]) -> tuple[Any, ...]:
    """With p = softmax(s), o = p v:  dv = p^T do;  ds = p (do v^T - sum_k(o do));  dq = ds k, dk = ds^T q.

    A cap c multiplies ds by 1 - (s / c)^2, s being the capped scores. A sink z has the weight p_z = exp(z - log_sum)
    and no value:  dz = -p_z sum_k(o do).
    """
    query, key, value, softcap = saved.query, saved.key, saved.value, how.softcap
    wide = partial(jnp.einsum, preferred_element_type=jnp.float32)
    inner = jnp.sum(cotangent.astype(jnp.float32) * saved.out.astype(jnp.float32), axis=-1)
    scale = key.shape[-1] ** -0.5

    def body(block: _Block, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        log_sum, out_gradient = block.of(saved.log_sum)[..., None], block.of(cotangent)
        scores = _scores(softcap, block, query, key)
        weights = jnp.where(block.mask, jnp.exp(scores - log_sum), 0.0)
        through = wide("gqk,gsk->gqs", out_gradient, block.span(value)) - block.of(inner)[..., None]
        if softcap is not None:
            through *= 1 - jnp.square(scores / softcap)
        scores = (weights * through * scale).astype(query.dtype)
        weights = weights.astype(query.dtype)
        return (
            block.put(carry[0], wide("gqs,gsk->gqk", scores, block.span(key))),
            block.add(carry[1], wide("gqs,gqk->gsk", scores, block.of(query))),
            block.add(carry[2], wide("gqs,gqk->gsk", weights, out_gradient)),
        )

    # Many blocks add to the same keys, in float32; a query is in one block.
    zeros = jnp.zeros_like(query), jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    query_gradient, key_gradient, value_gradient = _over_blocks(how.share, body, zeros, saved)
    of_sinks = None
    if saved.sinks is not None:
        # At most 1; blocks of padding alone, where nothing is in log_sum, have an `inner` of 0.
        weights = jnp.exp(jnp.minimum(saved.sinks - saved.log_sum, 0.0))
        of_sinks = -jnp.sum(weights * inner, axis=0)
    of_keys = key_gradient.astype(key.dtype), value_gradient.astype(value.dtype)
    return query_gradient, *of_keys, None, None, None, of_sinks


_attend.defvjp(_forward, _backward)


def _make(ids: TokenIds, windows: Windows, split: Split, softcap: float | None) -> Attend:
    padding = -ids.segment_ids.shape[1] % BLOCK_TOKENS
    ids = ids.padded(padding)
    sizes = jnp.array([EVERYTHING if window is None else window for window in windows], jnp.int32)
    plan_axes = Plan(OWN, OWN)
    plans = split.by_window(partial(make_plan, share=split.share), ids, windows, plan_axes)

    def attend(query: Array, key: Array, value: Array, which: Array, sinks: Array | None = None) -> Array:
        more = ids, jax.tree.map(lambda x: x[which], plans), sizes[which]
        run = partial(blockwise_attention, softcap=softcap, share=split.share)
        return split.attend(run, (query, key, value), more, (TOKEN_IDS_AXES, plan_axes, ()), padding, sinks)

    return attend


# On a CPU it took a fifth of dense's processor time.
KIND = AttentionKind(
    _make,
    "blocks that see something, one after another: CPU",
    auto=("cpu",),
    beyond=SHORT,
    skips=True,
    fused=True,
    backward_products=5,
    takes_sinks=True,
    shares_tokens=True,
)
