"""Minor DPO: a rejected response is no longer pushed down once it is less likely than under the reference."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from rpo_jax.objectives.objective import MatrixObjective
from rpo_jax.objectives.pairwise import linked_mean
from rpo_jax.objectives.scores import Scores


@dataclass(frozen=True, kw_only=True)
class MinorDPO(MatrixObjective):
    """DPO whose rejected log-ratios count where they are positive.

    L = 1/|P| sum_P -log sigmoid(beta w_ij (rho_chosen,i - max(0, rho_rejected,j))).
    Source: Xie et al. 2024, arXiv 2408.09834, with pair weights. At rho = 0, where a policy starts that is its own
    reference, a rejected response has DPO's derivative.
    """

    average_log_prob: bool = False

    def loss(self, scores: Scores) -> Float[Array, ""]:
        chosen, rejected = scores.log_ratios(self.average_log_prob)
        rejected = jnp.where(rejected < 0, 0.0, rejected)
        return linked_mean(scores.contrasts, ((chosen, rejected),), "logistic", self.beta)


OBJECTIVES = {
    "minor_dpo": MinorDPO(description="DPO with a minor penalty of rejected responses", source="arXiv 2408.09834")
}
