"""Minor DPO: a rejected response is no longer pushed down once it is less likely than under the reference."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rpo_jax.objectives.blocked import Blocks
from rpo_jax.objectives.matrix import WeightsOn
from rpo_jax.objectives.objective import Objective
from rpo_jax.objectives.pairwise import pairwise_loss


def minor_dpo_loss(
    chosen_log_ratio: Float[Array, "*G M"],
    rejected_log_ratio: Float[Array, "*G N"],
    weights: Float[Array, "*G M N"] | float | Blocks,
    beta: float = 0.1,
    mask: Bool[Array, "*G M N"] | None = None,
    *,
    weights_on: WeightsOn = "score",
) -> Float[Array, ""]:
    """DPO whose rejected log-ratios count where they are positive.

    L = 1/|P| sum_P -log sigmoid(beta w_ij (rho_chosen,i - max(0, rho_rejected,j))).
    Source: Xie et al. 2024, arXiv 2408.09834, with pair weights. At rho = 0, where a policy starts that is its own
    reference, a rejected response has DPO's derivative.

    Args: as in `pairwise_loss`.
    """
    rejected = jnp.where(rejected_log_ratio < 0, 0.0, rejected_log_ratio)
    return pairwise_loss(chosen_log_ratio, rejected, weights, beta, mask=mask, weights_on=weights_on)


def _minor_dpo(scores, options, *, weights_on: WeightsOn = "score"):
    return minor_dpo_loss(
        scores.chosen.log_ratio(options.average_log_prob),
        scores.rejected.log_ratio(options.average_log_prob),
        scores.weights,
        options.beta,
        scores.mask,
        weights_on=weights_on,
    )


OBJECTIVES: dict[str, Objective] = {
    "minor_dpo": Objective(
        _minor_dpo, "DPO with a minor penalty of rejected responses", "arXiv 2408.09834", weights="pair"
    )
}
