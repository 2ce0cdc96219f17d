"""RPO with its link on a whole row: a chosen response against all it is contrasted with at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rpo_jax.objectives.objective import MatrixObjective
from rpo_jax.objectives.scores import Scores, at_least_float32, zero_where_invalid

NOTHING = -1e30  # log of the weight of what is not there, finite because it has a derivative


def _sum_of_rows(
    beta: float,
    chosen: Float[Array, "*G M"],
    rejected: Float[Array, "*G N"],
    weights: Float[Array, "*G M N"],
    mask: Bool[Array, "*G M N"],
) -> Float[Array, ""]:
    difference = zero_where_invalid(chosen[..., :, None], mask) - zero_where_invalid(rejected[..., None, :], mask)
    weighed = mask & (weights > 0)
    logits = jnp.where(weighed, jnp.log(jnp.where(weighed, weights, 1.0)) - beta * difference, NOTHING)
    return jnp.sum(jax.nn.softplus(jax.nn.logsumexp(logits, axis=-1)))


@dataclass(frozen=True, kw_only=True)
class RPONCE(MatrixObjective):
    """The logistic link on every row, over the weighted sum of its entries' odds.

    L = 1/rows sum_i log(1 + sum_j w_ij e^(-beta (rho_chosen,i - rho_rejected,j))), over rows with a valid entry.
    Weights on scores scale a contrast's pull by w_ij, so that the distance from the start changes with the size of the
    matrix; here a row pulls as one pair does, whatever its length. With pair weights it is DPO.
    Source: this project; the form is that of noise contrastive estimation (arXiv 1807.03748).
    """

    weights: str | None = "embedding"
    average_log_prob: bool = False
    averages_entries: ClassVar[bool] = False  # a row has

    def loss(self, scores: Scores) -> Float[Array, ""]:
        ratios = map(at_least_float32, scores.log_ratios(self.average_log_prob))
        total = scores.contrasts.sum(partial(_sum_of_rows, self.beta), *ratios)
        return total / jnp.maximum(self.count(scores), 1)

    def count(self, scores: Scores) -> Int[Array, ""] | Float[Array, ""]:
        return scores.contrasts.valid()[1]


OBJECTIVES = {
    "rpo_nce": RPONCE(description="Relative Preference Optimization with the link on the row", source="this project")
}
