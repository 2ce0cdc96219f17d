"""Which blocks of a row's tokens see each other: what the fused kernels go through, made once a batch.

A kernel keeps a LARGE block, or a part of it, and goes through SMALL ones, or parts of them. Source: arXiv 2412.05496
(lists of blocks that need a mask or none).

Letters: R rows, T tokens, N LARGE blocks, M SMALL ones.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from rpo_jax.models.attention.kind import ALL, OWN, Share
from rpo_jax.models.attention.masking import TokenIds

LARGE, SMALL = 128, 64


class Visits(NamedTuple):
    """For each LARGE block the SMALL ones that it has to do with: first those that need a mask, then those that do not.

    Attributes:
        order: indices of SMALL blocks; what follows the first `seen` of them is not visited.
        masked: how many need a mask.
        seen: how many there are.
    """

    order: Int[Array, "R N M"]
    masked: Int[Array, "R N"]
    seen: Int[Array, "R N"]


class Plan(NamedTuple):
    """What blocks of queries see, and by what blocks of keys are seen."""

    of_queries: Visits
    of_keys: Visits


PLAN_AXES = Plan(Visits(OWN, OWN, OWN), Visits(OWN, OWN, OWN))


def make_plan(ids: TokenIds, window: int | None, share: Share = ALL) -> Plan:
    """Which blocks have to do with which.

    Args:
        ids: of T tokens, a multiple of LARGE.
        window: positions that a query sees back, its own included.
        share: the device's part of the queries.
    """
    rows, tokens = ids.segment_ids.shape
    blocks = (rows, -1, SMALL, tokens // SMALL, SMALL)
    # Reduced where it is made: the mask of all tokens by all is never in memory. Padding needs nothing.
    mask = (share.visible(ids, window) & (share.own(ids).segment_ids > 0)[:, :, None]).reshape(blocks)
    some, every = jnp.any(mask, axis=(2, 4)), jnp.all(mask, axis=(2, 4))
    return Plan(_visits(some, every), _visits(some.swapaxes(1, 2), every.swapaxes(1, 2)))


def _visits(some: Array, every: Array) -> Visits:
    """From whether some and all pairs of two SMALL blocks see each other; [R, M, M]."""
    joined = (some.shape[0], -1, LARGE // SMALL, some.shape[2])
    some, every = jnp.any(some.reshape(joined), axis=2), jnp.all(every.reshape(joined), axis=2)
    rank = jnp.where(every, 1, jnp.where(some, 0, 2))
    order = jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)
    return Visits(order, *(jnp.sum(x, axis=-1, dtype=jnp.int32) for x in (some & ~every, some)))
