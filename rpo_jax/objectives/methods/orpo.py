"""Odds Ratio Preference Optimization: supervised fine-tuning with a penalty, in one stage and without a reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rpo_jax.objectives.blocked import Blocks
from rpo_jax.objectives.matrix import WeightsOn, matrix_loss
from rpo_jax.objectives.methods.sft import sft
from rpo_jax.objectives.objective import Objective, Option

LEAST_SURPRISE = 1e-6  # nats per token: a certain response has finite odds, and so has a slot that holds none


def log_odds(log_prob: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """log (p / (1 - p)) of p = exp(log_prob), of probabilities up to 1 - LEAST_SURPRISE."""
    unknown = jnp.isnan(log_prob)  # as in a slot that holds nothing: not to be differentiated, for 0 * nan is nan
    log_prob = jnp.minimum(jnp.where(unknown, -1.0, log_prob), -LEAST_SURPRISE)
    found = log_prob - jnp.log(-jnp.expm1(log_prob))  # expm1: 1 - p keeps its digits where p is near 1
    return jnp.where(unknown, jnp.nan, found)


def odds_ratio_loss(
    chosen_log_prob: Float[Array, "*G M"],
    rejected_log_prob: Float[Array, "*G N"],
    weights: Float[Array, "*G M N"] | float | Blocks,
    mask: Bool[Array, "*G M N"] | None = None,
    *,
    weights_on: WeightsOn = "score",
) -> Float[Array, ""]:
    """Logistic loss of the log of the responses' odds ratio.

    L_OR = 1/|P| sum_P -log sigmoid(w_ij (log odds(y_i) - log odds(y_j))),  odds(y) = p / (1 - p),
    p = exp(log pi(y) / |y|).  Source: Hong et al. 2024, arXiv 2403.07691, Eq. 7, with pair weights.

    Args:
        chosen_log_prob, rejected_log_prob: of a response, divided by its number of tokens, nats.
        weights, mask, weights_on: as in `pairwise_loss`.
    """

    def entry_loss(u, _):
        return jax.nn.softplus(-u)

    chosen, rejected = log_odds(chosen_log_prob), log_odds(rejected_log_prob)
    return matrix_loss((chosen,), (rejected,), weights, entry_loss, mask, weights_on)


def _orpo(scores, options, *, weights_on: WeightsOn = "score"):
    """L = L_SFT + lambda L_OR, Eq. 6."""
    penalty = odds_ratio_loss(
        scores.chosen.policy_score(True),
        scores.rejected.policy_score(True),
        scores.weights,
        scores.mask,
        weights_on=weights_on,
    )
    return sft(scores, options) + options.orpo_weight * penalty


OBJECTIVES: dict[str, Objective] = {
    "orpo": Objective(
        _orpo,
        "Odds Ratio Preference Optimization",
        "arXiv 2403.07691, Eqs. 6 and 7",
        weights="pair",
        uses_reference=False,
        averages=False,
        options={"orpo_weight": Option(0.1, "ORPO's lambda, the weight of the odds ratio's loss.", low=0)},
    )
}
