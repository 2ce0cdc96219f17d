"""Alpha-DPO: a margin that adapts to how far the policy has already moved on a pair."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rpo_jax.objectives.objective import MatrixObjective, option
from rpo_jax.objectives.scores import Scores

# Of the log-ratios' differences, nats a token: before the first step they are 0, but for what two programs round apart.
LEAST_SPREAD = 1e-5


@dataclass(frozen=True, kw_only=True)
class AlphaDPO(MatrixObjective):
    """SimPO with an adaptive margin from the reference.

    L = 1/|P| sum_P -log sigmoid(beta (u_ij - sg[margin + alpha M*_ij])),
    u_ij = w_ij (log pi(y_i) / |y_i| - log pi(y_j) / |y_j|),  M_ij = w_ij (rho_i / |y_i| - rho_j / |y_j|),
    M* = (M - mean M) / std M over the valid entries; sg stops the gradient. With weights on the losses, u and M have
    none, and the three means have them.
    Source: Wu et al. 2024, arXiv 2410.10148, in the form of its authors' release, with pair weights; beta 2.5, margin
    0.6 and alpha 0.2 are its authors'. Mean and standard deviation (with n - 1) are those of the batch; the release
    keeps moving averages of them.
    """

    beta: float = 2.5
    alpha_dpo_margin: float = option(0.6, "alpha-DPO's gamma over beta, nats per token.", low=0)
    alpha_dpo_alpha: float = option(0.2, "alpha-DPO's alpha, how much the margin adapts.", low=0)

    def loss(self, scores: Scores) -> Float[Array, ""]:
        ratios = jax.lax.stop_gradient(scores.log_ratios(average=True))
        matrix = scores.contrasts

        def everywhere(value):
            """A number as context: a matrix in blocks takes no traced value another way."""
            return jnp.broadcast_to(value, ratios[0].shape), jnp.broadcast_to(value, ratios[1].shape)

        centre = matrix.mean((ratios,), lambda m, _: m)
        variance = matrix.mean((ratios,), lambda m, at: jnp.square(m - at.values[0][0]), (everywhere(centre),))
        count, _ = matrix.counts()
        spread = jnp.maximum(jnp.sqrt(variance * count / jnp.maximum(count - 1, 1)), LEAST_SPREAD)

        def entry_loss(u, at):
            (chosen_ratio, rejected_ratio), (centre, _), (spread, _) = at.values
            # Where an entry is not valid the context is 0, and so is the spread that is divided by.
            spread = jnp.where(at.mask, spread, 1.0)
            normalised = (at.weights * (chosen_ratio - rejected_ratio) - centre) / spread
            return jax.nn.softplus(-self.beta * (u - self.alpha_dpo_margin - self.alpha_dpo_alpha * normalised))

        context = (ratios, everywhere(centre), everywhere(spread))
        return matrix.mean((scores.policy_scores(average=True),), entry_loss, context)


OBJECTIVES = {
    "alpha_dpo": AlphaDPO(
        description="alpha-DPO, an adaptive reward margin", source="arXiv 2410.10148 and its authors' release"
    )
}
