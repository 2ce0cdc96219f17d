"""Multi-Reference Preference Optimization: DPO against one virtual reference that is made of several.

The virtual reference is one log-prob per response, as a single one is, so every objective can have it, on every
weighting: it is made once from the cached log-probs (`reference.others`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rpo_jax.objectives.pairwise import LinkObjective

LEAST_DIFFERENCE = 1e-6  # nats, under the weights' division


def mixed_reference(
    log_probs: Float[Array, "K *S"],
    weights: Float[Array, "K"] | Float[Array, "K *S"],
    clip: float | Float[Array, "*S"] = 0.1,
) -> Float[Array, "*S"]:
    """Log-probs of the virtual reference of K references.

    log pi~(y) = -log sum_k alpha_k / pi_k(y), where log pi_k of k > 1 is held between (1 + epsilon) log pi_1 and
    (1 - epsilon) log pi_1.  Source: Le et al. 2024, arXiv 2405.16388, Proposition 1 and Eq. 8; the fixed weights and
    fixed clipping rate are its authors' release for two references (class MRefDPOTrainer).

    Args:
        log_probs: summed over a response's tokens, nats; the first is the reference that the others stay near. NaN
            where there is no such response, and so is the result.
        weights: alpha, which sum to 1; of all responses or of each.
        clip: epsilon, of all responses or of each.
    """
    first, others = log_probs[:1], log_probs[1:]
    held = jnp.clip(others, (1 + clip) * first, (1 - clip) * first)
    alpha = jnp.log(weights)
    alpha = alpha if alpha.ndim > 1 else alpha.reshape(-1, *[1] * (log_probs.ndim - 1))
    return -jax.nn.logsumexp(alpha - jnp.concatenate([first, held]), axis=0)


def adaptive_reference(
    log_probs: Float[Array, "2 S"],
    chosen: Int[Array, "S"],
    rejected: Int[Array, "S"],
    is_chosen: Bool[Array, "S"],
    clip: float = 0.1,
) -> Float[Array, "S"]:
    """`mixed_reference` of two references with weights and clipping rates of every pair's own.

    alpha = |a_2| / (|a_1| + |a_2| + 1e-6), the weight of the first,  a_k = log pi_k(y_w) - log pi_k(y_l);  epsilon is
    clip s for the chosen response and clip (1 - s) for the rejected one,  s = |b_w| / (|b_w| + |b_l|), b the mean of
    both references' log-probs.  Source: Le et al. 2024, arXiv 2405.16388, its adaptive parts, in its authors' release.

    Args:
        chosen, rejected: which responses each response's pair has. is_chosen: which of them it is like.
    """
    of_chosen, of_rejected = log_probs[:, chosen], log_probs[:, rejected]
    first, second = jnp.abs(of_chosen - of_rejected)
    alpha = second / (first + second + LEAST_DIFFERENCE)
    likely, other = (jnp.abs(jnp.mean(side, axis=0)) for side in (of_chosen, of_rejected))
    share = likely / jnp.maximum(likely + other, LEAST_DIFFERENCE)
    return mixed_reference(log_probs, jnp.stack([alpha, 1 - alpha]), clip * jnp.where(is_chosen, share, 1 - share))


OBJECTIVES = {
    "mrpo": LinkObjective(
        description="Multi-Reference Preference Optimization", source="arXiv 2405.16388, Eq. 7", mixes_references=True
    )
}
