"""Unified Preference Optimization: KTO, and a likelihood weighted by what scores of the data say beside preferences."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rpo_jax.objectives.methods.kto import KTO
from rpo_jax.objectives.objective import Term, option
from rpo_jax.objectives.scores import Scores, masked_mean, zero_where_invalid


@dataclass(frozen=True, kw_only=True)
class UPO(KTO):
    """A reconstruction: the form is the paper's, what it leaves open is an option.

    L = L_KTO - gamma mean(sg(exp(A / alpha)) log pi(y)) + L_V,  A = R - V(x),
    L_V = mean |tau - 1(u < 0)| u^2,  u = R - V(x);  R is the response's score by the data, V a linear head on the
    prompt's last hidden state, which L_V alone trains; means are over chosen and rejected responses together.
    Source: arXiv 2405.17956. Certain are KTO's loss, the advantage-weighted likelihood (the forward KL's) and the
    expectile regression of V; not certain are gamma, alpha, tau, the bound of the weights, and whether log pi is a sum.
    """

    uses_scores: bool = True
    uses_prompt_values: bool = True
    upo_gamma: float = option(0.1, "UPO's gamma, the weight of its likelihood.", low=0)
    upo_alpha: float = option(0.5, "UPO's alpha, the temperature of advantages.", low=0, open=True)
    upo_tau: float = option(0.7, "UPO's tau, the expectile that values are.", low=0, high=1, open=True)
    upo_most: float = option(0.0, "UPO's bound of a response's weight; 0 for none.", low=0)

    def values_of(self, scores: Scores) -> tuple[Float[Array, "P"], Float[Array, "P"], Float[Array, "P"], Array]:
        """Log-prob, score and value of chosen and rejected responses, and which are valid."""
        parts = []
        for side in (scores["chosen"], scores["rejected"]):
            assert side.score is not None, "it uses scores"
            assert side.log_partition is not None, "it uses values of prompts"
            of_side = (side.policy_score(self.average_log_prob), side.score, side.log_partition)
            parts.append([zero_where_invalid(x, side.valid).ravel() for x in of_side] + [side.valid.ravel()])
        log_prob, score, value, valid = map(jnp.concatenate, zip(*parts, strict=True))
        return log_prob, score, value, valid

    def weights_of(
        self, score: Float[Array, "P"], value: Float[Array, "P"], valid: Bool[Array, "P"]
    ) -> Float[Array, "P"]:
        """exp(A / alpha) of valid responses, without gradient."""
        weight = jnp.exp(jax.lax.stop_gradient(zero_where_invalid(score - value, valid)) / self.upo_alpha)
        return jnp.minimum(weight, self.upo_most) if self.upo_most else weight

    def added(self, scores: Scores) -> tuple[Term, ...]:
        log_prob, score, value, valid = self.values_of(scores)
        likelihood = masked_mean(self.weights_of(score, value, valid) * log_prob, valid)
        surprise = score - value
        expectile = jnp.abs(self.upo_tau - (surprise < 0)) * jnp.square(surprise)
        count = jnp.sum(valid)
        return Term(-self.upo_gamma * likelihood, count), Term(masked_mean(expectile, valid), count)


OBJECTIVES = {"upo": UPO(description="Unified Preference Optimization, a reconstruction", source="arXiv 2405.17956")}
