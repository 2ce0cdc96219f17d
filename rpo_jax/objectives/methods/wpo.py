"""Weighted Preference Optimization: pairs count by how likely the policy is to say them, as if it had."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rpo_jax.objectives.objective import option
from rpo_jax.objectives.pairwise import LinkObjective
from rpo_jax.objectives.scores import Responses, Scores, zero_where_invalid


def log_weight(responses: Responses) -> Float[Array, "*G S"]:
    """log w(y) = mean over tokens of log p(y_t) - log sum_v p_v^2, without gradient; 0 where there is no response.

    A response of which every token is what the policy says at random, on average, weighs 1.
    """
    assert responses.log_collision is not None, "it uses confidence"
    log_prob, collision = (
        zero_where_invalid(x, responses.valid) for x in (responses.log_prob, responses.log_collision)
    )
    return jax.lax.stop_gradient((log_prob - collision) / jnp.maximum(responses.num_tokens, 1))


@dataclass(frozen=True, kw_only=True)
class WPO(LinkObjective):
    """Every entry's loss times the weights of its two responses.

    L = 1/|P| sum_P w(y_i) w(y_j) link(w_ij (rho_chosen,i - rho_rejected,j)),  w(y) as exp of `log_weight`.
    Source: Zhou et al. 2024, arXiv 2406.11827, with pair weights, and TRL's use_weighting, which holds a pair's weight
    at 1 at most: wpo_most.
    """

    uses_confidence: bool = True
    wpo_most: float = option(0.0, "WPO's bound of a pair's weight, 1 in TRL; 0 for none.", low=0)

    def loss(self, scores: Scores) -> Float[Array, ""]:
        def entry_loss(u, at):
            (chosen, rejected), *smoothing = at.values
            weight = jnp.exp(chosen + rejected)
            if self.wpo_most:
                weight = jnp.minimum(weight, self.wpo_most)
            return weight * self.linked(u, tuple(smoothing))

        weights = log_weight(scores["chosen"]), log_weight(scores["rejected"])
        return scores.contrasts.mean(self.terms_of(scores), entry_loss, (weights, *self.smoothing_of(scores)))


OBJECTIVES = {"wpo": WPO(description="Weighted Preference Optimization", source="arXiv 2406.11827; TRL")}
