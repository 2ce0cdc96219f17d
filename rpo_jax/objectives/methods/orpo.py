"""Odds Ratio Preference Optimization: supervised fine-tuning with a penalty, in one stage and without a reference."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rpo_jax.objectives.objective import MatrixObjective, Term, option, sft_term
from rpo_jax.objectives.scores import Scores

LEAST_SURPRISE = 1e-6  # nats per token: a certain response has finite odds, and so has a slot that holds none


def log_odds(log_prob: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """log (p / (1 - p)) of p = exp(log_prob), of probabilities up to 1 - LEAST_SURPRISE."""
    unknown = jnp.isnan(log_prob)  # as in a slot that holds nothing: not to be differentiated, for 0 * nan is nan
    log_prob = jnp.minimum(jnp.where(unknown, -1.0, log_prob), -LEAST_SURPRISE)
    logit = log_prob - jnp.log(-jnp.expm1(log_prob))  # expm1: 1 - p keeps its digits where p is near 1
    return jnp.where(unknown, jnp.nan, logit)


@dataclass(frozen=True, kw_only=True)
class ORPO(MatrixObjective):
    """Supervised fine-tuning, and the logistic loss of the log of the responses' odds ratio.

    L = L_SFT + lambda L_OR,  L_OR = 1/|P| sum_P -log sigmoid(w_ij (log odds(y_i) - log odds(y_j))),
    odds(y) = p / (1 - p), p = exp(log pi(y) / |y|), L_SFT as in `sft_loss`.
    Source: Hong et al. 2024, arXiv 2403.07691, Eqs. 6 and 7, with pair weights.
    """

    uses_reference: bool = False
    orpo_weight: float = option(0.1, "ORPO's lambda, the weight of the odds ratio's loss.", low=0)

    def odds_ratio_loss(self, scores: Scores) -> Float[Array, ""]:
        chosen, rejected = map(log_odds, scores.policy_scores(average=True))
        return scores.contrasts.mean(((chosen, rejected),), lambda u, _: jax.nn.softplus(-u))

    def loss(self, scores: Scores) -> Float[Array, ""]:
        return self.orpo_weight * self.odds_ratio_loss(scores)

    def added(self, scores: Scores) -> tuple[Term, ...]:
        return sft_term(scores), *super().added(scores)


OBJECTIVES = {"orpo": ORPO(description="Odds Ratio Preference Optimization", source="arXiv 2403.07691, Eqs. 6 and 7")}
