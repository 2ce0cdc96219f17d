"""Simple Preference Optimization: the policy's own log-probs per token, with a target margin."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

from rpo_jax.objectives.objective import MatrixObjective, option
from rpo_jax.objectives.scores import Scores


@dataclass(frozen=True, kw_only=True)
class SimPO(MatrixObjective):
    """Logistic loss of the policy's own log-probs per token beyond a margin; there is no reference.

    L = 1/|P| sum_P -log sigmoid(beta w_ij (log pi(y_i) / |y_i| - log pi(y_j) / |y_j|) - gamma).
    Source: Meng et al. 2024, arXiv 2405.14734, Eq. 6, with pair weights; beta 2 and gamma 0.5 are its authors'.
    """

    uses_reference: bool = False
    beta: float = 2.0
    simpo_margin: float = option(0.5, "SimPO's gamma, the margin of rewards.", low=0)

    def loss(self, scores: Scores) -> Float[Array, ""]:
        return scores.contrasts.mean(
            (scores.policy_scores(average=True),), lambda u, _: jax.nn.softplus(self.simpo_margin - self.beta * u)
        )


OBJECTIVES = {"simpo": SimPO(description="Simple Preference Optimization", source="arXiv 2405.14734, Eq. 6")}
