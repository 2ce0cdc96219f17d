"""Grouped-query attention over all of a row: the definition that the other kinds are held to.

Letters: B rows, T query tokens, S key tokens, H query heads, G key-value heads, K head dimension.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from rpo_jax.models.attention.kind import (
    ATTENTION_OUTPUT,
    OWN,
    Attend,
    AttentionKind,
    Split,
    Windows,
    capped,
)
from rpo_jax.models.attention.masking import TokenIds, visible


def dense_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    mask: Bool[Array, "B T S"],
    sinks: Float[Array, "H"] | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T H K"]:
    """Grouped-query attention, softmax in float32.  softmax(q k^T / sqrt(K)) v.  Source: arXiv 2305.13245.

    With a softcap c the scores s are c tanh(s / c) before they are masked. A head's sink is one more score in its
    softmax, which has no value: the weights then sum to less than 1.  Source: arXiv 2508.10925, 2.2.

    Query head h reads key-value head h // (H / G). Each query must see at least one key.
    """
    rows, tokens, heads, head_dim = query.shape
    # Grouping the queries, rather than repeating keys and values, keeps the latter at G heads in memory.
    grouped = query.reshape(rows, tokens, key.shape[2], -1, head_dim)
    scores = jnp.einsum("btgrk,bsgk->bgrts", grouped, key, preferred_element_type=jnp.float32)
    # A finite minimum, not -inf: it keeps gradients finite where a whole row is masked.
    scores = jnp.where(mask[:, None, None], capped(scores * head_dim**-0.5, softcap), jnp.finfo(jnp.float32).min)
    if sinks is not None:
        of_heads = sinks.astype(jnp.float32).reshape(key.shape[2], -1)[:, :, None, None]
        scores = jnp.concatenate([scores, jnp.broadcast_to(of_heads, (*scores.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : key.shape[1]].astype(value.dtype)
    out = jnp.einsum("bgrts,bsgk->btgrk", weights, value).reshape(rows, tokens, heads, head_dim)
    return checkpoint_name(out, ATTENTION_OUTPUT)


def _make(ids: TokenIds, windows: Windows, split: Split, softcap: float | None) -> Attend:
    shared, run = split.share.context > 1, partial(dense_attention, softcap=softcap)
    if shared:
        masks = split.by_window(split.share.visible, ids, windows, OWN)
    else:
        masks = jnp.stack([visible(*ids, window) for window in windows])

    def attend(query: Array, key: Array, value: Array, which: Array, sinks: Array | None = None) -> Array:
        # A single mask is indexed statically, so that a scan over layers need not copy it in every one.
        mask = masks[which if len(masks) > 1 else 0]
        if shared:
            return split.attend(run, (query, key, value), (mask,), (OWN,), sinks=sinks)
        return run(query, key, value, mask, sinks)

    return attend


KIND = AttentionKind(
    _make,
    "all of a row against all of it: short rows, and where nothing else can be had",
    takes_sinks=True,
    shares_tokens=True,
)
