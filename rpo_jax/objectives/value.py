"""A value for every token of a response: what reward the rest of the response is expected to bring.

The head is linear: V_t = v . h_(t-1) + b, h_(t-1) the final hidden state of the token before, which predicts token t.
It starts at zero. Its gradient reaches the model too, as in the authors' release, where its loss has a small weight.

Letters: R rows and T tokens of a packed batch, D hidden width.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rpo_jax.core.shards import ONE, Shards

NAME = "value"  # of the head among the trained parameters
AXES: dict[str, Any] = {NAME: {"kernel": ("embed",), "bias": ()}}


def token_values(
    hidden: Float[Array, "R T D"],
    head: dict[str, Array],
    previous: Int[Array, "R T"],
    response_ids: Int[Array, "R T"],
    shards: Shards = ONE,
) -> Float[Array, "R T"]:
    """The value of every scored token, float32; 0 for other tokens.

    Args:
        previous: index in the row of each token's predictor.
        response_ids: 0 or more for scored tokens, -1 elsewhere.
        shards: how devices share rows and their tokens, whose hidden states are then striped.
    """
    values = jnp.einsum("rtd,d->rt", hidden.astype(jnp.float32), head["kernel"], precision="highest") + head["bias"]
    return jnp.where(response_ids >= 0, jnp.take_along_axis(shards.in_order(values), previous, axis=1), 0.0)
