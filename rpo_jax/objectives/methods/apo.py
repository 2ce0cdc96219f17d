"""Anchored Preference Optimization: where both responses go, and not only their difference, is part of the loss."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rpo_jax.objectives.objective import MatrixObjective
from rpo_jax.objectives.per_response import ResponseObjective
from rpo_jax.objectives.scores import Scores


def sigmoid(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """exp of a log-probability: it and its derivative keep their digits in either tail."""
    return jnp.exp(-jax.nn.softplus(-x))


@dataclass(frozen=True, kw_only=True)
class APOZero(ResponseObjective):
    """Chosen responses become more likely and rejected ones less: for data that is better than the model.

    L = mean_c(1 - sigmoid(beta rho_c)) + mean_r(sigmoid(beta rho_r)).
    Source: D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 7.
    """

    def losses_of(self, scores: Scores) -> tuple[Float[Array, "*G M"], Float[Array, "*G N"]]:
        chosen, rejected = scores.log_ratios(self.average_log_prob)
        return sigmoid(-self.beta * chosen), sigmoid(self.beta * rejected)


@dataclass(frozen=True, kw_only=True)
class APODown(MatrixObjective):
    """Both become less likely, rejected ones more so: for data that is worse than the model.

    L = 1/|P| sum_P sigmoid(beta rho_chosen,i) + 1 - sigmoid(beta w_ij (rho_chosen,i - rho_rejected,j)).
    Source: D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 8, with pair weights.
    """

    average_log_prob: bool = False

    def loss(self, scores: Scores) -> Float[Array, ""]:
        def entry_loss(u, at):
            ((chosen, _),) = at.values
            return sigmoid(self.beta * chosen) + sigmoid(-self.beta * u)

        ratios = scores.log_ratios(self.average_log_prob)
        return scores.contrasts.mean((ratios,), entry_loss, (ratios,))


OBJECTIVES = {
    "apo_zero": APOZero(description="Anchored Preference Optimization, zero", source="arXiv 2408.06266, Eq. 7"),
    "apo_down": APODown(description="Anchored Preference Optimization, down", source="arXiv 2408.06266, Eq. 8"),
}
