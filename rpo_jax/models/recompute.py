"""What the backward pass keeps of a layer, and what it computes again.

Letters: B rows, T tokens, D hidden; S shards of the rows, n chunks of c tokens of each shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rpo_jax.core.shards import Shards
from rpo_jax.models.attention.kind import ATTENTION_OUTPUT

# Tokens of a shard whose MLP activations exist at once where they are computed again anyway.
MLP_TOKENS = 2048
FEW_INPUTS = 16  # times as many outputs: matrices of models have fewer, adapters' second ones more
MOST_CHUNKS = 4  # times as many as needed: smaller chunks than that would waste the machine


Axes = tuple[str, str]
WHOLE, CHUNK = ("rows", "tokens"), ("shards", "chunk")


class Remat(NamedTuple):
    """What the backward pass keeps of a layer, and what it computes again.

    Attributes:
        policy: what is kept of a layer, besides its input; None keeps everything.
        chunks: whether the MLP runs on MLP_TOKENS at a time, in both passes. Its inner activations are most of what a
            layer computes again; in chunks the memory for them does not grow with the batch.
    """

    policy: Callable[..., bool] | None
    chunks: bool = False


def _products(primitive: Any, *operands: Any, **parameters: Any) -> bool:
    """Matrix products, but for those of so few inputs that they are cheaper computed again: an adapter's second one.

    To keep these would take as much memory again as what they are added to.
    """
    if not jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *operands, **parameters):
        return False
    left, right = operands[:2]
    (axes, _), _ = parameters["dimension_numbers"]
    inputs = math.prod(left.shape[axis] for axis in axes)
    return right.size < FEW_INPUTS * inputs**2  # outputs < FEW_INPUTS * inputs


_ATTENTION = jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT)

REMATS = {
    "none": Remat(None),
    "dots": Remat(jax.checkpoint_policies.save_from_both_policies(_products, _ATTENTION)),
    "attention": Remat(_ATTENTION, chunks=True),
    "full": Remat(jax.checkpoint_policies.nothing_saveable, chunks=True),
}


ByToken = Callable[[Float[Array, "S c D"], Bool[Array, "S c"], Axes], tuple[Float[Array, "S c D"], Any]]


def at_once(
    function: ByToken, x: Float[Array, "B T D"], real: Bool[Array, "B T"], shards: Shards
) -> tuple[Float[Array, "B T D"], Any]:
    """function(x, real, axes), which works on each token alone, on all of them."""
    if not shards.shares_tokens:
        return function(x, real, WHOLE)
    done, more = function(shards.split(x), shards.split(real), CHUNK)
    return shards.join(done, x.shape), more


def in_chunks(
    function: ByToken,
    x: Float[Array, "B T D"],
    real: Bool[Array, "B T"],
    shards: Shards,
) -> tuple[Float[Array, "B T D"], Any]:
    """function(x, real, axes), which works on each token alone, on about MLP_TOKENS of every shard at a time, in both
    passes; `axes` are the names of the first two axes of what it is given.

    What it gives besides is summed over the chunks. Where so many chunks do not divide a shard's tokens, the next
    number that does; if that is far, all at once.
    """
    rows, tokens, width = x.shape
    of_shard = rows * tokens // shards.count
    fewest = -(-of_shard // MLP_TOKENS)
    count = next((n for n in range(fewest, MOST_CHUNKS * fewest + 1) if of_shard % n == 0), 1)
    if count == 1 or rows % shards.rows:
        return at_once(function, x, real, shards)
    # Shards stay a dimension: each device has its own part of every chunk.
    chunks = shards.split(x).reshape(shards.count, count, -1, width).swapaxes(0, 1)
    which = shards.split(real).reshape(shards.count, count, -1).swapaxes(0, 1)
    # A loop already keeps XLA from merging the recomputation with the forward pass.
    step = jax.checkpoint(lambda part, held: function(part, held, CHUNK), prevent_cse=False)
    done, more = jax.lax.map(lambda chunk: step(*chunk), (chunks, which))
    return shards.join(done.swapaxes(0, 1), x.shape), jax.tree.map(lambda by_chunk: jnp.sum(by_chunk, axis=0), more)
