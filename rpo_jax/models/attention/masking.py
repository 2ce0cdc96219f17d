"""Which tokens of a packed row see which: the one definition that every attention follows.

Letters: B rows, T query tokens, S key tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class TokenIds(NamedTuple):
    """Where the tokens of packed rows are and whom they see; B rows of T, or any other shape that all three have."""

    positions: Int[Array, "..."]
    segment_ids: Int[Array, "..."]
    branch_ids: Int[Array, "..."]

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
    places: Int[Array, "T"] | None = None,
) -> Bool[Array, "B T S"]:
    """Whether query t sees key s: s <= t, same segment, branch_s in {0, branch_t}, position_t - position_s < window.

    Every token sees itself, padding (segment 0) included, so no softmax is ever over nothing; padding sees only
    padding, and nothing else sees padding.

    Args:
        keys: positions, segments and branches of the keys; those of the queries where not given.
        places: indices of the queries among the keys; 0, 1, ... where not given.
    """
    queries = TokenIds(positions, segment_ids, branch_ids)
    seen_by = TokenIds(*(ids[:, :, None] for ids in queries))
    seen = TokenIds(*(ids[:, None, :] for ids in keys or queries))
    places = jnp.arange(positions.shape[1]) if places is None else places
    return sees(seen_by, seen, places[:, None], jnp.arange(seen.positions.shape[2])[None, :], window)


def sees(
    query: TokenIds, key: TokenIds, query_place: Array, key_place: Array, window: int | Int[Array, ""] | None
) -> Bool[Array, "..."]:
    """The rule of `visible`, of arrays that broadcast; places are indices in the row. A kernel can call it."""
    mask = (query_place >= key_place) & (query.segment_ids == key.segment_ids)
    mask &= (key.branch_ids == 0) | (key.branch_ids == query.branch_ids)
    if window is not None:
        mask &= query.positions - key.positions < window
    return mask
