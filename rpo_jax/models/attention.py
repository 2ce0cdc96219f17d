"""Which tokens see which, and grouped-query attention.

Letters: B rows, T query tokens, S key tokens, H query heads, G key-value heads, K head dimension.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def visible(
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    branch_ids: Int[Array, "B T"],
    window: int | None,
) -> Bool[Array, "B T T"]:
    """Whether query t sees key s: s <= t, same segment, branch_s in {0, branch_t}, position_t - position_s < window.

    Every token sees itself, padding (segment 0) included, so no softmax is ever over nothing; padding sees only
    padding, and nothing else sees padding.
    """
    index = jnp.arange(positions.shape[1])
    causal = index[:, None] >= index[None, :]
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
    key_branch = branch_ids[:, None, :]
    mask = causal & same_segment & ((key_branch == 0) | (key_branch == branch_ids[:, :, None]))
    if window is not None:
        mask &= positions[:, :, None] - positions[:, None, :] < window
    return mask


def attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H K"]:
    """Grouped-query attention, softmax in float32.  softmax(q k^T / sqrt(K)) v.  Source: arXiv 2305.13245.

    Query head h reads key-value head h // (H / G). Each query must see at least one key.
    """
    rows, tokens, heads, head_dim = query.shape
    # Grouping the queries, rather than repeating keys and values, keeps the latter at G heads in memory.
    grouped = query.reshape(rows, tokens, key.shape[2], -1, head_dim)
    scores = jnp.einsum("btgrk,bsgk->bgrts", grouped, key, preferred_element_type=jnp.float32)
    # A finite minimum, not -inf: it keeps gradients finite where a whole row is masked.
    scores = jnp.where(mask[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bgrts,bsgk->btgrk", weights, value).reshape(rows, tokens, heads, head_dim)
