"""Which tokens see which, and grouped-query attention over all of a row.

Letters: B rows, T query tokens, S key tokens, H query heads, G key-value heads, K head dimension.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

# What a backward pass keeps of attention under the `dots` policy: to run it again would cost more than all the rest.
ATTENTION_OUTPUT = "attention output"


def visible(
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    branch_ids: Int[Array, "B T"],
    window: int | Int[Array, ""] | None,
    *,
    keys: tuple[Int[Array, "B S"], Int[Array, "B S"], Int[Array, "B S"]] | None = None,
    offset: int | Int[Array, ""] = 0,
) -> Bool[Array, "B T S"]:
    """Whether query t sees key s: s <= t, same segment, branch_s in {0, branch_t}, position_t - position_s < window.

    Every token sees itself, padding (segment 0) included, so no softmax is ever over nothing; padding sees only
    padding, and nothing else sees padding.

    Args:
        keys: positions, segments and branches of the keys; those of the queries where not given.
        offset: index of the first query among the keys.
    """
    key_positions, key_segments, key_branches = keys or (positions, segment_ids, branch_ids)
    causal = (jnp.arange(positions.shape[1]) + offset)[:, None] >= jnp.arange(key_positions.shape[1])[None, :]
    same_segment = segment_ids[:, :, None] == key_segments[:, None, :]
    key_branch = key_branches[:, None, :]
    mask = causal & same_segment & ((key_branch == 0) | (key_branch == branch_ids[:, :, None]))
    if window is not None:
        mask &= positions[:, :, None] - key_positions[:, None, :] < window
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
    out = jnp.einsum("bgrts,bsgk->btgrk", weights, value).reshape(rows, tokens, heads, head_dim)
    return checkpoint_name(out, ATTENTION_OUTPUT)
