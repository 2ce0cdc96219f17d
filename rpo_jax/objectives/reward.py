"""The score of a response: a linear head on its last hidden state, as transformers' sequence-classification models.

r = v . h, h the final hidden state of the response's last token that is no padding token. Where the tokenizer pads with
its end token, that is the token before the end, as for transformers, which takes every such token for padding. The head
has no bias, because differences cancel one, and starts at zero.

Letters: R rows and T tokens of a packed batch, D hidden width, P responses.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rpo_jax.core.shards import ONE, Shards

NAME = "reward"  # of the head among the trained parameters
AXES: dict[str, Any] = {NAME: {"kernel": ("embed",)}}


def response_rewards(
    hidden: Float[Array, "R T D"],
    kernel: Float[Array, "D"],
    tokens: Int[Array, "R T"],
    previous: Int[Array, "R T"],
    response_ids: Int[Array, "R T"],
    num_responses: int,
    pad_id: int | None,
    shards: Shards = ONE,
) -> tuple[Float[Array, "P"], Int[Array, "P"]]:
    """The score of every response, float32, 0 for slots that these rows do not hold; and its scored tokens.

    Args:
        previous: index in the row of the token before each in its own sequence.
        response_ids: 0 to num_responses - 1 for scored tokens, -1 elsewhere.
        pad_id: the tokenizer's padding token; None where it has none.
        shards: how devices share rows and their tokens, whose hidden states are then striped.
    """
    scored = response_ids >= 0
    slot = jnp.where(scored, response_ids, num_responses)  # one slot more, for all other tokens
    own = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    # The token itself, or, where it counts as padding, the one before it: of all of a response's the last.
    candidate = own if pad_id is None else jnp.where(tokens == pad_id, previous, own)
    last = jnp.full(num_responses + 1, -1, jnp.int32).at[slot].max(jnp.where(scored, candidate, -1))
    row = jnp.zeros(num_responses + 1, jnp.int32).at[slot].max(jnp.arange(len(tokens))[:, None] * scored)
    count = jnp.zeros(num_responses + 1, jnp.int32).at[slot].add(1)[:num_responses]
    # Of every token, so that of rows that lie on several devices scalars are sent, not hidden states.
    scores = shards.in_order(jnp.einsum("rtd,d->rt", hidden.astype(jnp.float32), kernel, precision="highest"))
    return jnp.where(count > 0, scores[row[:num_responses], last[:num_responses]], 0.0), count
