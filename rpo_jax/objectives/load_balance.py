"""How evenly a mixture of experts is used: the load-balancing loss, and what is told of it.

Letters: L layers, X experts.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from rpo_jax.objectives.metrics import Mean


def load_balancing_loss(
    chosen: Float[Array, "L X"], probability: Float[Array, "L X"], tokens: Float[Array, "L"]
) -> Float[Array, ""]:
    """X sum_e f_e p_e: f_e tokens that use expert e, p_e the router's probability of it, means over tokens and layers.

    As transformers' load_balancing_loss_func: k where all are used alike, k experts a token. Only p has a gradient.
    Source: arXiv 2101.03961, Equations 4 to 6, for one expert a token.

    Args:
        chosen: how many tokens use each expert.
        probability: the router's probabilities, summed over tokens.
        tokens: how many there are, padding left out.
    """
    count = jnp.maximum(jnp.sum(tokens), 1.0)
    used, likely = (jnp.sum(sums, axis=0) / count for sums in (chosen, probability))
    return chosen.shape[-1] * jnp.sum(used * likely)


def expert_metrics(
    chosen: Float[Array, "L X"], probability: Float[Array, "L X"], tokens: Float[Array, "L"]
) -> dict[str, Mean]:
    """What a batch shows of it; the arguments are `load_balancing_loss`'s. Batches combine by their tokens.

    aux_loss: that loss, without its weight. experts/largest_share and experts/smallest_share: of what a layer's
    tokens use, the share of the expert that is used most, or least, in any layer. experts/entropy: of these shares,
    nats, its mean over layers; log X where all are used alike.
    """
    share = chosen / jnp.maximum(jnp.sum(chosen, axis=-1, keepdims=True), 1.0)
    entropy = -jnp.sum(share * jnp.log(jnp.where(share > 0, share, 1.0)), axis=-1)
    values = {
        "aux_loss": load_balancing_loss(chosen, probability, tokens),
        "experts/largest_share": jnp.max(share),
        "experts/smallest_share": jnp.min(share),
        "experts/entropy": jnp.mean(entropy),
    }
    count = tokens[0]
    return {name: Mean(value * count, count) for name, value in values.items()}
