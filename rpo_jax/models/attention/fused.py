"""Attention for GPUs in three kernels of our own: scores stay on the chip, and blocks that see nothing are not visited.

Pallas kernels, lowered by Triton, which compiles for every NVIDIA GPU since Ampere (and for AMD's, which nobody has
tried). The mask is made from the tokens' ids inside the kernels; a plan, made once a batch (`visits.py`), lists which
blocks of keys each block of queries sees and the other way round, and which of them need no mask at all.

What JAX ships did not fit (read in 0.10.2):

- `pallas.ops.gpu.attention`: causal and equal segment ids only, so no prompt that several branches see; as many key as
  query heads; it visits everything before a block; its backward pass has blocks of 32, too small for Hopper's units.
- `pallas.ops.gpu.attention_mgpu` (Mosaic): Hopper alone, no segments, and no backward pass where it is causal.
- `jax.nn.dot_product_attention(implementation="cudnn")`: our mask only as a bias of [T, T], that is `cudnn.py`.
- splash attention: TPUs alone.

Source: arXiv 2205.14135 and 2307.08691.

Letters: R rows, T tokens, t of them whose queries a device has, H query heads, G key-value heads, K head dimension; N
LARGE blocks, M SMALL ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from rpo_jax.models import kernels
from rpo_jax.models.attention.kind import (
    ALL,
    ATTENTION_OUTPUT,
    TOKEN_IDS_AXES,
    Attend,
    AttentionKind,
    Share,
    Split,
    Windows,
    capped,
)
from rpo_jax.models.attention.masking import TokenIds, sees
from rpo_jax.models.attention.visits import LARGE, PLAN_AXES, SMALL, Plan, Visits, make_plan

EVERYTHING = 2**30  # a window that no position reaches
UNSEEN = -1e30  # a score that adds nothing; finite, so that a query that sees nothing yet gives no NaN
LOG2_E = math.log2(math.e)  # a GPU's exponential is of base 2
MOST_HEAD_DIM = 256
MOST_WIDE_HEAD_DIM = 64  # of float32, whose operands are held twice: registers are spilled beyond


class Tiles(NamedTuple):
    """How a kernel works.

    Attributes:
        kept: tokens of the block whose results a program keeps; divides LARGE.
        passing: tokens of the blocks that it goes through; divides SMALL.
        warps: of a program, 32 threads each.
        stages: blocks in flight between memory and chip.
    """

    kept: int
    passing: int
    warps: int
    stages: int


class _Saved(NamedTuple):
    """What the backward pass needs of the forward pass; log_sum is in units of log 2."""

    query: Float[Array, "R t H K"]
    key: Float[Array, "R T G K"]
    value: Float[Array, "R T G K"]
    sight: _Sight
    plan: Plan
    out: Float[Array, "R t H K"]
    log_sum: Float[Array, "R H t"]
    sinks: Float[Array, "H"] | None


class _How(NamedTuple):
    """What does not change between batches.

    Attributes:
        softcap: c of c tanh(scores / c); None for the scores as they are.
        windowed: whether any layer has a window; else positions are not looked at.
        interpret: run as plain JAX operations, on any backend.
        share: the device's part of a row.
    """

    softcap: float | None
    windowed: bool
    interpret: bool
    share: Share = ALL


class _Sight(NamedTuple):
    """What decides whether a query sees a key, beside their places: arrays, or references to a row's.

    Attributes:
        queries, keys: their ids.
        window: positions that a query sees back, its own included.
        device: which of the context's this is, which says where in the row its queries are.
    """

    queries: TokenIds
    keys: TokenIds
    window: Any
    device: Any


def tiles(kernel: str, head_dim: int, dtype: Any) -> Tiles:
    """Sizes for `forward`, `keys` or `queries` (the gradients of either).

    Chosen by what the compiler made of them (benchmarks/gpu_kernels.py): no register is spilled on Ampere, Hopper or
    Blackwell, and shared memory is enough on a consumer's card too. None of them was timed.
    """
    wide = kernels.padded(head_dim)
    if jnp.dtype(dtype).itemsize > 2:
        return Tiles(32, 32, 8, 1)
    if wide > 128:
        return Tiles(64, 64, 8, 1) if kernel == "forward" else Tiles(32, 32, 8, 2)
    return Tiles(128 if kernel == "forward" else 64, 64, 8, 2)


def fused_attention(
    query: Float[Array, "R t H K"],
    key: Float[Array, "R T G K"],
    value: Float[Array, "R T G K"],
    ids: TokenIds,
    plan: Plan,
    window: Int[Array, ""],
    sinks: Float[Array, "H"] | None = None,
    *,
    how: _How,
) -> Float[Array, "R t H K"]:
    """Grouped-query attention, softmax in float32; what dense attention gives where there are tokens.

    Blocks of padding alone give zeros.

    Args:
        ids: of T tokens, a multiple of LARGE.
        plan: of these ids and this window.
        window: positions that a query sees back, its own included.
        sinks: one more score in every head's softmax, which has no value; None for none.
    """
    sight = _Sight(how.share.own(ids), ids, window[None], how.share.device()[None])
    return _attend(how, query, key, value, sight, plan, sinks)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how, query, key, value, sight, plan, sinks) -> Array:
    return _forward(how, query, key, value, sight, plan, sinks)[0]


class _Block(NamedTuple):
    """What the kernels share: what they read of the plan and the ids, and how they score."""

    how: _How
    tiles: Tiles
    head_dim: int
    sight: _Sight
    visits: Visits
    first: Array  # of the tokens whose results this program keeps

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def read(self, reference: Any) -> Array:
        """A block of [tokens, K], zeros beyond the head dimension."""
        return kernels.load(reference, self.columns(reference))

    def write(self, reference: Any, values: Array) -> None:
        kernels.store(reference, values, self.columns(reference))

    def columns(self, reference: Any) -> Array | None:
        """Which columns of a block there are; None for all."""
        width = reference.shape[-1]
        return None if width == self.head_dim else (jnp.arange(width) < self.head_dim)[None, :]

    def dot(self, left: Array, right: Array, contract: tuple[int, int] = (1, 0)) -> Array:
        """Product summed in float32, over these axes of the two."""
        return kernels.dot(left, right, contract, interpret=self.how.interpret)

    def queries(self, place: Array, tokens: int, axis: int) -> tuple[TokenIds, Array]:
        """Ids and indices in the row of a block of queries, along an axis of the scores."""
        device = None if self.how.share.context == 1 else self.sight.device[0]
        return _along(self.sight.queries, place, self.how.share.index(place, device), tokens, axis)

    def keys(self, place: Array, tokens: int, axis: int) -> tuple[TokenIds, Array]:
        """Those of a block of keys."""
        return _along(self.sight.keys, place, place, tokens, axis)

    def scores(self, products: Array) -> Array:
        """Scores of queries times keys, as they are exponents of 2."""
        if self.how.softcap is None:
            return products * (self.scale * LOG2_E)
        return capped(products * self.scale, self.how.softcap) * LOG2_E

    def through_cap(self, scores: Array) -> Array | float:
        """The cap's derivative."""
        if self.how.softcap is None:
            return 1.0
        return 1 - jnp.square(scores / (self.how.softcap * LOG2_E))

    def sees(self, queries: tuple[TokenIds, Array], keys: tuple[TokenIds, Array]) -> Array:
        window = self.sight.window[0] if self.how.windowed else None
        return sees(queries[0], keys[0], queries[1], keys[1], window)

    def over(self, turn: Callable[[Array, Any, bool], Any], carry: Any) -> Any:
        """turn(first token of a block to go through, carry, whether it needs a mask), for all that there are."""
        mine = lax.div(self.first, LARGE)
        parts = SMALL // self.tiles.passing

        def one(number: Array, carry: Any, masked: bool) -> Any:
            if parts == 1:
                place = self.visits.order[mine, number] * SMALL
            else:
                block = self.visits.order[mine, lax.div(number, parts)]
                place = block * SMALL + lax.rem(number, parts) * self.tiles.passing
            return turn(place, carry, masked)

        masked, seen = self.visits.masked[mine] * parts, self.visits.seen[mine] * parts
        carry = lax.fori_loop(0, masked, partial(one, masked=True), carry)
        return lax.fori_loop(masked, seen, partial(one, masked=False), carry)


def _along(references: TokenIds, place: Array, index: Array, tokens: int, axis: int) -> tuple[TokenIds, Array]:
    """A block of them, which is no longer than a stripe, and its indices, from the first one's."""
    at = (slice(None), None) if axis == 0 else (None, slice(None))
    ids = TokenIds(*(reference[pl.ds(place, tokens)][at] for reference in references))
    return ids, (index + jnp.arange(tokens))[at]


def _forward_kernel(query, key, value, *more: Any, make_block: Callable[..., _Block]) -> None:
    """One block of queries of one head: o = softmax(q k^T) v, and log2 of the softmax's sum."""
    *shared, out_of, log_sum_of = more
    block = make_block(*shared)
    kept, passing = block.tiles.kept, block.tiles.passing
    queries = block.queries(block.first, kept, 0)
    q = block.read(query)

    def turn(place: Array, carry: tuple[Array, Array, Array], masked: bool) -> tuple[Array, Array, Array]:
        out, most, total = carry
        block_slice = pl.ds(place, passing)
        scores = block.scores(block.dot(q, block.read(key.at[block_slice, :]), (1, 1)))
        mask = block.sees(queries, block.keys(place, passing, 1)) if masked else None
        if mask is not None:
            scores = jnp.where(mask, scores, UNSEEN)
        now = jnp.maximum(most, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - now[:, None])
        if mask is not None:
            weights = jnp.where(mask, weights, 0.0)
        before = jnp.exp2(most - now)
        v = block.read(value.at[block_slice, :])
        out = out * before[:, None] + block.dot(weights.astype(v.dtype), v)
        return out, now, total * before + jnp.sum(weights, axis=1)

    zeros = jnp.zeros(kept, jnp.float32)
    out, most, total = block.over(turn, (jnp.zeros(query.shape, jnp.float32), zeros + UNSEEN, zeros))
    total = jnp.where(total > 0, total, 1.0)
    block.write(out_of, out / total[:, None])
    log_sum_of[...] = most + jnp.log2(total)


def _queries_kernel(query, key, value, gradient, log_sum, inner, *more: Any, make_block: Callable[..., _Block]) -> None:
    """One block of queries of one head: dq = sum over keys of ds k, ds = p (do v^T - sum(o do))."""
    *shared, out_of = more
    block = make_block(*shared)
    kept, passing = block.tiles.kept, block.tiles.passing
    queries = block.queries(block.first, kept, 0)
    q, do = block.read(query), block.read(gradient)
    log_sums, inners = log_sum[...], inner[...]

    def turn(place: Array, total: Array, masked: bool) -> Array:
        block_slice = pl.ds(place, passing)
        k = block.read(key.at[block_slice, :])
        scores = block.scores(block.dot(q, k, (1, 1)))
        weights = jnp.exp2(scores - log_sums[:, None])
        if masked:
            weights = jnp.where(block.sees(queries, block.keys(place, passing, 1)), weights, 0.0)
        through = block.dot(do, block.read(value.at[block_slice, :]), (1, 1)) - inners[:, None]
        through = weights * through * block.through_cap(scores)
        return total + block.dot(through.astype(k.dtype), k)

    block.write(out_of, block.over(turn, jnp.zeros(query.shape, jnp.float32)) * block.scale)


def _keys_kernel(query, key, value, gradient, log_sum, inner, *more: Any, make_block: Callable[..., _Block]) -> None:
    """One block of keys of one key-value head: dv = sum over queries and their heads of p^T do, dk = of ds^T q.

    Scores are held as keys by queries: then no weight is transposed.
    """
    *shared, key_out, value_out = more
    block = make_block(*shared)
    kept, passing = block.tiles.kept, block.tiles.passing
    keys = block.keys(block.first, kept, 0)
    k, v = block.read(key), block.read(value)

    def of_head(head: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        def turn(place: Array, carry: tuple[Array, Array], masked: bool) -> tuple[Array, Array]:
            block_slice = pl.ds(place, passing)
            q, do = block.read(query.at[block_slice, head, :]), block.read(gradient.at[block_slice, head, :])
            scores = block.scores(block.dot(k, q, (1, 1)))
            weights = jnp.exp2(scores - log_sum[head, block_slice][None, :])
            if masked:
                weights = jnp.where(block.sees(block.queries(place, passing, 1), keys), weights, 0.0)
            dv = carry[1] + block.dot(weights.astype(do.dtype), do)
            through = block.dot(v, do, (1, 1)) - inner[head, block_slice][None, :]
            through = weights * through * block.through_cap(scores)
            return carry[0] + block.dot(through.astype(q.dtype), q), dv

        return block.over(turn, carry)

    zeros = jnp.zeros(key.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, query.shape[1], of_head, (zeros, zeros))
    block.write(key_out, dk * block.scale)
    block.write(value_out, dv)


class _Call(NamedTuple):
    """A kernel's sizes, and which part of each array its programs get: program (i, h, r) block i of head h of row r.

    `tokens` are those of a row whose results are kept, `others` those that its programs go through.
    """

    how: _How
    tiles: Tiles
    tokens: int
    others: int
    head_dim: int
    group: int  # query heads of a key-value head

    def block(self) -> pl.BlockSpec:
        """A block of [R, T, heads, K]."""
        shape = (None, self.tiles.kept, None, kernels.padded(self.head_dim))
        return pl.BlockSpec(shape, lambda i, h, r: (r, i, h, 0))

    def key_row(self) -> pl.BlockSpec:
        """A whole row of [R, T, G, K], of the key-value head of a query head."""
        shape = (None, self.others, None, kernels.padded(self.head_dim))
        return pl.BlockSpec(shape, lambda i, h, r: (r, 0, lax.div(h, self.group), 0))

    def group_row(self) -> pl.BlockSpec:
        """A whole row of [R, T, H, K] with all heads of a group."""
        shape = (None, self.others, self.group, kernels.padded(self.head_dim))
        return pl.BlockSpec(shape, lambda i, h, r: (r, 0, h, 0))

    def number(self) -> pl.BlockSpec:
        """A block of [R, H, T]."""
        return pl.BlockSpec((None, None, self.tiles.kept), lambda i, h, r: (r, h, i))

    def group_numbers(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.group, self.others), lambda i, h, r: (r, h, 0))

    def run(self, kernel: Any, specs: list[Any], outs: list[Any], shapes: list[Any], *arrays: Any) -> list[Array]:
        *tensors, sight, visits = arrays
        rest, tree = jax.tree.flatten((sight, visits))

        def whole(x: Array) -> pl.BlockSpec:
            if x.ndim == 1:
                return pl.BlockSpec((1,), lambda i, h, r: (0,))
            return pl.BlockSpec((None, *x.shape[1:]), lambda i, h, r: (r, *[0] * (x.ndim - 1)))

        def block(*more: Any) -> _Block:
            first = pl.program_id(0) * self.tiles.kept
            sight, visits = jax.tree.unflatten(tree, more)
            return _Block(self.how, self.tiles, self.head_dim, sight, visits, first)

        rows, heads = shapes[0].shape[0], shapes[0].shape[2]
        return pl.pallas_call(
            partial(kernel, make_block=block),
            grid=(self.tokens // self.tiles.kept, heads, rows),
            in_specs=[*specs, *map(whole, rest)],
            out_specs=outs,
            out_shape=shapes,
            compiler_params=kernels.options(self.tiles.warps, self.tiles.stages),
            interpret=self.how.interpret,
        )(*tensors, *rest)


def _call(kernel: str, how: _How, query: Array, key: Array) -> _Call:
    heads, head_dim = query.shape[2:]
    kept, others = (key, query) if kernel == "keys" else (query, key)
    of_heads = head_dim, heads // key.shape[2]
    return _Call(how, tiles(kernel, head_dim, query.dtype), kept.shape[1], others.shape[1], *of_heads)


def _forward(how, query, key, value, sight, plan, sinks) -> tuple[Array, _Saved]:
    call = _call("forward", how, query, key)
    shapes = [
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        jax.ShapeDtypeStruct((query.shape[0], query.shape[2], query.shape[1]), jnp.float32),
    ]
    specs, outs = [call.block(), call.key_row(), call.key_row()], [call.block(), call.number()]
    results = call.run(_forward_kernel, specs, outs, shapes, query, key, value, sight, plan.of_queries)
    if sinks is not None:
        # A sink adds to a softmax's sum alone: all weights of a query become smaller by one factor.
        out, log_sum = results
        more = jnp.logaddexp2(log_sum, _exponents(sinks))
        share = jnp.exp2(log_sum - more).swapaxes(1, 2)[..., None]
        results = [(out * share).astype(out.dtype), more]
    out, log_sum = (checkpoint_name(x, ATTENTION_OUTPUT) for x in results)
    return out, _Saved(query, key, value, sight, plan, out, log_sum, sinks)


def _exponents(sinks: Float[Array, "H"]) -> Float[Array, "H 1"]:
    """Sinks as exponents of 2."""
    return sinks.astype(jnp.float32)[:, None] * LOG2_E


def _backward(how: _How, saved: _Saved, cotangent: Float[Array, "R T H K"]) -> tuple[Any, ...]:
    """Two kernels, each of which writes only what is its own: no sum depends on who comes first.

    A sink z has the weight p_z = exp(z - log_sum) and no value:  dz = -p_z sum(o do).
    """
    query, key, value, sight, plan, out, log_sum, sinks = saved
    inner = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    arrays = query, key, value, cotangent.astype(query.dtype), log_sum, inner, sight
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)]

    call = _call("queries", how, query, key)
    specs = [call.block(), call.key_row(), call.key_row(), call.block(), call.number(), call.number()]
    (dq,) = call.run(_queries_kernel, specs, [call.block()], like[:1], *arrays, plan.of_queries)

    call = _call("keys", how, query, key)
    specs = [call.group_row(), call.block(), call.block(), call.group_row(), call.group_numbers(), call.group_numbers()]
    outs = [call.block(), call.block()]
    dk, dv = call.run(_keys_kernel, specs, outs, like[1:], *arrays, plan.of_keys)
    of_sinks = None
    if sinks is not None:
        of_sinks = -jnp.sum(jnp.exp2(_exponents(sinks) - log_sum) * inner, axis=(0, 2)).astype(sinks.dtype)
    return dq, dk, dv, None, None, of_sinks


_attend.defvjp(_forward, _backward)


def make(
    ids: TokenIds, windows: Windows, split: Split, softcap: float | None = None, interpret: bool = False
) -> Attend:
    """AttentionKind.make; `interpret`: run as plain JAX operations, on any backend."""
    padding = -ids.segment_ids.shape[1] % LARGE
    ids = ids.padded(padding)
    how = _How(softcap, any(window is not None for window in windows), interpret, split.share)
    sizes = jnp.array([EVERYTHING if window is None else window for window in windows], jnp.int32)
    plan = split.by_window(partial(make_plan, share=split.share), ids, windows, PLAN_AXES)

    def attend(query: Array, key: Array, value: Array, which: Array, sinks: Array | None = None) -> Array:
        one = which if len(windows) > 1 else 0
        more = ids, jax.tree.map(lambda x: x[one], plan), sizes[one]
        run = partial(fused_attention, how=how)
        return split.attend(run, (query, key, value), more, (TOKEN_IDS_AXES, PLAN_AXES, ()), padding, sinks)

    return attend


def _head_dim_fits(dtype: str, head_dim: int, tokens: int | None) -> bool:
    return head_dim % 16 == 0 and head_dim <= (MOST_WIDE_HEAD_DIM if dtype == "float32" else MOST_HEAD_DIM)


# From where on it pays is a guess, timed on no GPU: to 1,024 tokens the scores are few, and dense attention's products
# are the vendor's.
KIND = AttentionKind(
    make,
    "our kernels, which pass over blocks that see nothing: GPUs, long rows",
    auto=("gpu",),
    beyond=1024,
    skips=True,
    fused=True,
    backward_products=7,  # scores and do v^T in both kernels
    platforms=("gpu",),
    takes_sinks=True,
    shares_tokens=True,
    needs=(
        (
            f"head dimensions that 16 divides, at most {MOST_HEAD_DIM}, in float32 {MOST_WIDE_HEAD_DIM}",
            _head_dim_fits,
        ),
        (
            "model.compute_dtype=bfloat16, float16 or float32",
            lambda dtype, *_: dtype in ("bfloat16", "float16", "float32"),
        ),
    ),
)
