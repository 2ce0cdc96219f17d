"""Alpha-DPO: a margin that adapts to how far the policy has already moved on a pair."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rpo_jax.objectives.blocked import Blocks
from rpo_jax.objectives.matrix import WeightsOn, matrix_loss
from rpo_jax.objectives.objective import Objective, Option

LEAST_SPREAD = 1e-8  # of the log-ratios' differences, nats: all are 0 before the first step


def alpha_dpo_loss(
    chosen_log_prob: Float[Array, "*G M"],
    rejected_log_prob: Float[Array, "*G N"],
    chosen_log_ratio: Float[Array, "*G M"],
    rejected_log_ratio: Float[Array, "*G N"],
    weights: Float[Array, "*G M N"] | float | Blocks,
    beta: float = 2.5,
    margin: float = 0.6,
    alpha: float = 0.2,
    mask: Bool[Array, "*G M N"] | None = None,
    *,
    weights_on: WeightsOn = "score",
) -> Float[Array, ""]:
    """SimPO with an adaptive margin from the reference.

    L = 1/|P| sum_P -log sigmoid(beta (u_ij - sg[margin + alpha M*_ij])),
    u_ij = w_ij (log pi(y_i) / |y_i| - log pi(y_j) / |y_j|),  M_ij = w_ij (rho_i / |y_i| - rho_j / |y_j|),
    M* = (M - mean M) / std M over the valid entries; sg stops the gradient.
    Source: Wu et al. 2024, arXiv 2410.10148, in the form of its authors' release, with pair weights. Mean and
    standard deviation (with n - 1) are those of the batch; the release keeps moving averages of them.

    Args:
        chosen_log_prob, rejected_log_prob: of a response, divided by its number of tokens, nats.
        chosen_log_ratio, rejected_log_ratio: the same of log pi_policy - log pi_reference.
        margin: the paper's gamma over beta, nats per token.
        alpha: how much of the normalised difference becomes margin, nats per token.
        weights, beta, mask, weights_on: as in `pairwise_loss`.
    """
    ratios = jax.lax.stop_gradient((chosen_log_ratio, rejected_log_ratio))

    def mean(entry, context=()):
        return matrix_loss(ratios[:1], ratios[1:], weights, entry, mask, "score", context)

    def everywhere(value):
        """A number as context: a matrix in blocks takes no traced value another way."""
        return jnp.broadcast_to(value, ratios[0].shape), jnp.broadcast_to(value, ratios[1].shape)

    centre = mean(lambda m, _: m)
    variance = mean(lambda m, at: jnp.square(m - at.context[0][0]), (everywhere(centre),))
    if isinstance(weights, Blocks):
        count = weights.entries
    else:
        shape = (*chosen_log_prob.shape, rejected_log_prob.shape[-1])
        count = jnp.sum(jnp.ones(shape) if mask is None else mask)
    spread = jnp.sqrt(variance * count / jnp.maximum(count - 1, 1))
    spread = jnp.maximum(spread, LEAST_SPREAD)

    def entry_loss(u, at):
        (chosen_ratio, rejected_ratio), (centre, _), (spread, _) = at.context
        # Where an entry is not valid the context is 0, and so is the spread that is divided by.
        spread = jnp.where(at.mask, spread, 1.0)
        normalised = (at.weights * (chosen_ratio - rejected_ratio) - centre) / spread
        return jax.nn.softplus(-beta * (u - margin - alpha * normalised))

    context = (ratios, everywhere(centre), everywhere(spread))
    return matrix_loss((chosen_log_prob,), (rejected_log_prob,), weights, entry_loss, mask, weights_on, context)


def _alpha_dpo(scores, options, *, weights_on: WeightsOn = "score"):
    return alpha_dpo_loss(
        scores.chosen.policy_score(True),
        scores.rejected.policy_score(True),
        scores.chosen.log_ratio(True),
        scores.rejected.log_ratio(True),
        scores.weights,
        options.beta,
        options.alpha_dpo_margin,
        options.alpha_dpo_alpha,
        scores.mask,
        weights_on=weights_on,
    )


OBJECTIVES: dict[str, Objective] = {
    "alpha_dpo": Objective(
        _alpha_dpo,
        "alpha-DPO, an adaptive reward margin",
        "arXiv 2410.10148 and its authors' release",
        weights="pair",
        averages=False,
        options={
            "alpha_dpo_margin": Option(
                0.6, "alpha-DPO's gamma over beta, nats per token; its authors use it with beta 2.5.", low=0
            ),
            "alpha_dpo_alpha": Option(0.2, "alpha-DPO's alpha, how much the margin adapts.", low=0),
        },
    )
}
