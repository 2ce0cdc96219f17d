"""Attention by JAX's splash kernel for TPUs, with the packed, branched mask given as an array.

The kernel keeps scores in a core's own memory and passes over blocks that see nothing. Its segment ids cannot say that
a prompt is seen by all of its branches while they do not see each other, so each row brings its own mask, [T, T] of
booleans once for all heads and layers, in the tiles that the forward and the backward kernels read.

The kernel is experimental in JAX, and this module alone touches it and its inner parts (the mask's infos, the keyword
arguments of its tree): pyproject.toml bounds JAX's version for that reason.

Letters: R rows, T tokens, H query heads, G key-value heads, K head dimension.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
from jaxtyping import Array, Float

from rpo_jax.models.attention.kind import (
    ALL,
    ATTENTION_OUTPUT,
    OWN,
    SHORT,
    Attend,
    AttentionKind,
    Share,
    Split,
    Windows,
)
from rpo_jax.models.attention.masking import TokenIds

LANES = 128  # the kernel's blocks are multiples of a TPU register's width
MOST_TOKENS = 512  # of a block: large enough that its arithmetic, not the step from block to block, takes the time


def block_tokens(tokens: int) -> int:
    """Tokens of a block: rows are cut into as few as there can be, all alike and padded little."""
    blocks = -(-tokens // MOST_TOKENS)
    return -(-tokens // (blocks * LANES)) * LANES


def whole_block_tokens(tokens: int) -> int:
    """Tokens of a block where nothing can be padded: the most that divide so many, which LANES do."""
    return next(block for block in range(MOST_TOKENS, 0, -LANES) if tokens % block == 0)


def padding(tokens: int) -> int:
    """Tokens to add to a row to make it whole blocks."""
    return -tokens % block_tokens(tokens)


def make_kernels(
    ids: TokenIds,
    window: int | None,
    softcap: float | None = None,
    interpret: bool = False,
    share: Share = ALL,
) -> library.SplashAttentionKernel:
    """The kernel with the masks of all rows: a tree of arrays whose first axis is R.

    Args:
        ids: of T tokens, whole blocks.
        window: positions that a query sees back, its own included; None for all.
        softcap: c of c tanh(scores / c); None for the scores as they are.
        interpret: run as plain JAX operations, on any backend.
        share: the device's part of a row.
    """
    tokens, block = ids.segment_ids.shape[1], block_tokens if share.context == 1 else whole_block_tokens
    queries, keys = block(tokens // share.context), block(tokens)
    sizes = library.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_q_dq=queries,
        block_kv_dq=keys,
    )

    def of_row(mask: Array) -> library.SplashAttentionKernel:
        # One head's mask serves all.
        kernel = library.make_splash_mha_single_device(
            mask[None],
            block_sizes=sizes,
            attn_logits_soft_cap=softcap,
            residual_checkpoint_name=ATTENTION_OUTPUT,
            interpret=interpret,
        )
        infos: tuple[Any, ...] = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
        # The flag only names a scope in profiles, and one that is traced cannot be read.
        return type(kernel)(*(info._replace(is_dynamic_mask=None) for info in infos), **kernel.kwargs)

    return jax.vmap(of_row)(share.visible(ids, window))


def splash_attention(
    query: Float[Array, "R T H K"],
    key: Float[Array, "R T G K"],
    value: Float[Array, "R T G K"],
    kernels: library.SplashAttentionKernel,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "R T H K"]:
    """Grouped-query attention, softmax in float32; T and the masks are those of the kernels."""
    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    by_head = (x.swapaxes(1, 2) for x in (query, key, value))
    if sinks is None:
        return jax.vmap(lambda kernel, *qkv: kernel(*qkv))(kernels, *by_head).swapaxes(1, 2)
    return jax.vmap(_with_sinks, (0, 0, 0, 0, None))(kernels, *by_head, sinks.astype(jnp.float32)).swapaxes(1, 2)


@jax.custom_vjp
def _with_sinks(kernel, query, key, value, sinks) -> Array:
    """The kernel with sinks, whose gradient is a sum in float32: JAX's own multiplies and gives it in query's dtype."""
    return kernel(query, key, value, sinks=sinks)


def _forward(kernel, query, key, value, sinks) -> tuple[Array, tuple[Any, ...]]:
    infos = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info
    keeping = type(kernel)(*infos, **kernel.kwargs | {"save_residuals": True})
    out, (log_sum,) = keeping(query, key, value, sinks=sinks)
    return out, (kernel, query, key, value, sinks, out, log_sum)


def _backward(saved: tuple[Any, ...], cotangent: Float[Array, "H T K"]) -> tuple[Any, ...]:
    """A sink z has the weight p_z = exp(z - log_sum) and no value:  dz = -p_z sum(o do)."""
    kernel, query, key, value, sinks, out, log_sum = saved

    def tiles_in_one(info: Any) -> Any:  # as the kernel's own call has them
        blocks = info.partial_mask_blocks
        return info._replace(partial_mask_blocks=blocks.reshape(-1, *blocks.shape[-2:]))

    infos = map(tiles_in_one, (kernel.dq_mask_info, kernel.dkv_mask_info))
    of_library = query, key, value, None, sinks, out, log_sum, *infos
    gradients = library._splash_attention_bwd(**kernel.kwargs, res=of_library, do=cotangent)[3:6]
    inner = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    return None, *gradients, -jnp.sum(jnp.exp(sinks[:, None] - log_sum) * inner, axis=-1)


_with_sinks.defvjp(_forward, _backward)


def make(
    ids: TokenIds, windows: Windows, split: Split, softcap: float | None = None, interpret: bool = False
) -> Attend:
    """AttentionKind.make; `interpret` as for make_kernels."""
    pad = 0 if split.share.context > 1 else padding(ids.segment_ids.shape[1])
    ids = ids.padded(pad)
    kernels_of = partial(make_kernels, softcap=softcap, interpret=interpret, share=split.share)
    kernels = split.by_window(kernels_of, ids, windows, OWN)

    def attend(query: Array, key: Array, value: Array, which: Array, sinks: Array | None = None) -> Array:
        kernel = jax.tree.map(lambda x: x[which if len(windows) > 1 else 0], kernels)
        return split.attend(splash_attention, (query, key, value), (kernel,), (OWN,), pad, sinks)

    return attend


# That it is best on TPUs is a guess, timed on none: compiled for one, a step takes less memory than with dense
# attention and about as much as with blockwise, whose blocks half fill a matrix unit.
KIND = AttentionKind(
    make,
    "JAX's fused kernel, which passes over blocks that see nothing: TPUs",
    auto=("tpu",),
    beyond=SHORT,
    skips=True,
    fused=True,
    backward_products=7,  # two kernels, as `fused` has; JAX's single one is opt-in
    platforms=("tpu",),
    takes_sinks=True,
    shares_tokens=True,
)
