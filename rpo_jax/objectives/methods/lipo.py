"""Listwise Preference Optimization, LiPO-lambda: a row of the contrast matrix is a list that the policy ranks."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rpo_jax.objectives.objective import MatrixObjective
from rpo_jax.objectives.scores import Scores


def lambda_weights(difference: Float[Array, "*G M N"], mask: Bool[Array, "*G M N"]) -> Float[Array, "*G M N"]:
    """What exchanging row i's chosen response with its rejected one j would change of the list's gain.

    Delta_ij = |G_i - G_j| |1 / log(1 + rank_i) - 1 / log(1 + rank_j)|,  G = 2^label - 1, which is 1 for the chosen
    response and 0 for rejected ones.  Source: Liu et al. 2024, arXiv 2402.01878, Eq. 8 and what follows it.

    Args:
        difference: score of the row's chosen response minus that of each rejected one. Ranks, from 1, are by scores
            over the row's valid entries; of equal scores the chosen one comes first, then the rejected by column.
    """
    # The best scored rejected response has the least difference; what is not valid comes last.
    order = jnp.argsort(jnp.where(mask, difference, jnp.inf), axis=-1, stable=True)
    place = jnp.argsort(order, axis=-1)  # among the rejected ones, from 0
    ahead = mask & (difference < 0)  # rejected ones ahead of the chosen one
    chosen_rank = 1 + jnp.sum(ahead, axis=-1, keepdims=True)
    rejected_rank = 1 + place + ~ahead
    return jnp.abs(1 / jnp.log1p(chosen_rank) - 1 / jnp.log1p(rejected_rank))


@dataclass(frozen=True, kw_only=True)
class LiPO(MatrixObjective):
    """LambdaLoss of every row's list: its chosen response, labelled 1, and its valid rejected ones, labelled 0.

    L = 1/|P| sum_P Delta_ij log(1 + exp(-beta w_ij (rho_chosen,i - rho_rejected,j))), Delta as in `lambda_weights`,
    without gradient, of the ranks by rho.  Source: Liu et al. 2024, arXiv 2402.01878, Eq. 8, with weights and with
    lists across prompts; its sum over the pairs of a list is a mean here. Uniform weights on rows of N valid entries
    are its scores with beta / N.
    """

    weights: str | None = "uniform"
    average_log_prob: bool = False

    def loss(self, scores: Scores) -> Float[Array, ""]:
        def entry_loss(u, at):
            ((chosen, rejected),) = at.values
            return lambda_weights(chosen - rejected, at.mask) * jax.nn.softplus(-self.beta * u)

        ratios = scores.log_ratios(self.average_log_prob)
        return scores.contrasts.mean((ratios,), entry_loss, (jax.lax.stop_gradient(ratios),))


OBJECTIVES = {
    "lipo": LiPO(description="listwise preference optimization, LiPO-lambda", source="arXiv 2402.01878, Eq. 8")
}
