"""Self-Play Preference Optimization, with win probabilities of 1 and 0."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from rpo_jax.objectives.per_response import ResponseObjective
from rpo_jax.objectives.scores import Scores


@dataclass(frozen=True, kw_only=True)
class SPPOHard(ResponseObjective):
    """Log-ratios are drawn to what a response that always wins, or always loses, deserves.

    L = mean_c((rho_c - 1 / (2 beta))^2) + mean_r((rho_r + 1 / (2 beta))^2), nats^2.
    Source: Wu et al. 2024, arXiv 2405.00675, Eq. 4.7 with probabilities 1 and 0, as TRL's loss sppo_hard.
    """

    def losses_of(self, scores: Scores) -> tuple[Float[Array, "*G M"], Float[Array, "*G N"]]:
        chosen, rejected = scores.log_ratios(self.average_log_prob)
        return jnp.square(chosen - 0.5 / self.beta), jnp.square(rejected + 0.5 / self.beta)


OBJECTIVES = {
    "sppo_hard": SPPOHard(
        description="Self-Play Preference Optimization, hard labels", source="arXiv 2405.00675, Eq. 4.7; TRL"
    )
}
