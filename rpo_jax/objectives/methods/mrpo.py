"""Multi-Reference Preference Optimization: DPO against one virtual reference that is made of several.

The virtual reference is one log-prob per response, as a single one is, so every objective can have it, on every
weighting: it is made once from the cached log-probs (`reference.others`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rpo_jax.objectives.pairwise import LinkObjective


def mixed_reference(
    log_probs: Float[Array, "K *S"], weights: Float[Array, "K"], clip: float = 0.1
) -> Float[Array, "*S"]:
    """Log-probs of the virtual reference of K references.

    log pi~(y) = -log sum_k alpha_k / pi_k(y), where log pi_k of k > 1 is held between (1 + epsilon) log pi_1 and
    (1 - epsilon) log pi_1.  Source: Le et al. 2024, arXiv 2405.16388, Proposition 1 and Eq. 8; the fixed weights and
    fixed clipping rate are its authors' release for two references (class MRefDPOTrainer).

    Args:
        log_probs: summed over a response's tokens, nats; the first is the reference that the others stay near. NaN
            where there is no such response, and so is the result.
        weights: alpha, which sum to 1.
        clip: epsilon.
    """
    first, others = log_probs[:1], log_probs[1:]
    held = jnp.clip(others, (1 + clip) * first, (1 - clip) * first)
    alpha = jnp.log(weights).reshape(-1, *[1] * (log_probs.ndim - 1))
    return -jax.nn.logsumexp(alpha - jnp.concatenate([first, held]), axis=0)


OBJECTIVES = {
    "mrpo": LinkObjective(
        description="Multi-Reference Preference Optimization", source="arXiv 2405.16388, Eq. 7", mixes_references=True
    )
}
