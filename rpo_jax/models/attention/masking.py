"""Which tokens of a packed row see which: the one definition that every attention follows.

Letters: B rows, T query tokens, S key tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class TokenIds(NamedTuple):
    """Where the tokens of packed rows are and whom they see."""

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    branch_ids: Int[Array, "B T"]

    def padded(self, tokens: int) -> TokenIds:
        """The same with so many tokens of padding at the end of every row."""
        return TokenIds(*(jnp.pad(ids, ((0, 0), (0, tokens))) for ids in self))


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
