"""A learned log Z(x): what is left of the reward's normaliser when responses to different prompts are compared.

r(x, y) = beta (log pi(y|x) - log pi_ref(y|x)) + beta log Z(x), so that a contrast of prompts i and j has a term
log Z(x_i) - log Z(x_j) that a pair's own contrast has not.  Source: arXiv 2402.10958, Eq. 9 and Appendix A.

The head is one vector v: log Z(x) = v . h(x), h(x) the final hidden state of the prompt's last token, which predicts
the response's first one. It has no bias, because differences cancel one, and starts at zero, so that training starts as
it would without. Its gradient stops at the hidden state: Z belongs to the reference and the reward, and a policy that
could move it would lower its loss without changing a response.

Letters: R rows and T tokens of a packed batch, D hidden width, P responses.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rpo_jax.core.shards import ONE, Shards
from rpo_jax.objectives.logprobs import by_response

NAME = "partition"  # of the head among the trained parameters
AXES = {NAME: {"kernel": ("embed",)}}


def log_partition(
    hidden: Float[Array, "R T D"],
    head: Float[Array, "D"],
    previous: Int[Array, "R T"],
    response_ids: Int[Array, "R T"],
    num_responses: int,
    shards: Shards = ONE,
) -> Float[Array, "P"]:
    """log Z of every response's prompt, nats, float32; 0 for slots that these rows do not hold.

    Args:
        previous: index in the row of each token's predictor.
        response_ids: 0 to num_responses - 1 for scored tokens, -1 elsewhere.
        shards: how devices share rows and their tokens, whose hidden states are then striped.
    """
    scored = response_ids >= 0
    first = scored & ~jnp.take_along_axis(scored, previous, axis=1)
    value = jnp.einsum("rtd,d->rt", jax.lax.stop_gradient(hidden).astype(jnp.float32), head, precision="highest")
    value = jnp.take_along_axis(shards.in_order(value), previous, axis=1)
    return by_response(value, jnp.where(first, response_ids, -1), num_responses)[0]


def per_prompt(value: Float[Array, "P"], prompt_id: Int[Array, "P"], valid: Bool[Array, "P"]) -> Float[Array, "P"]:
    """The mean over the valid slots of a prompt, in each of them; 0 in others.

    Responses packed apart see their prompt computed apart, and may differ in rounding: log Z is made a function of the
    prompt, so that it cancels exactly where a prompt is compared with itself.
    """
    _, number = jnp.unique(prompt_id, return_inverse=True, size=prompt_id.size)
    number = number.reshape(prompt_id.shape)
    total, count = (
        jax.ops.segment_sum(x, number, prompt_id.size)
        for x in (jnp.where(valid, value, 0.0), valid.astype(jnp.float32))
    )
    return jnp.where(valid, (total / jnp.maximum(count, 1.0))[number], 0.0)
