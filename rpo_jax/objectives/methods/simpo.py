"""Simple Preference Optimization: the policy's own log-probs per token, with a target margin."""

from __future__ import annotations

import jax
from jaxtyping import Array, Bool, Float

from rpo_jax.objectives.blocked import Blocks
from rpo_jax.objectives.matrix import WeightsOn, matrix_loss
from rpo_jax.objectives.objective import Objective, Option


def simpo_loss(
    chosen_log_prob: Float[Array, "*G M"],
    rejected_log_prob: Float[Array, "*G N"],
    weights: Float[Array, "*G M N"] | float | Blocks,
    beta: float = 2.0,
    margin: float = 0.5,
    mask: Bool[Array, "*G M N"] | None = None,
    *,
    weights_on: WeightsOn = "score",
) -> Float[Array, ""]:
    """Logistic loss of the policy's own log-probs per token beyond a margin; there is no reference.

    L = 1/|P| sum_P -log sigmoid(beta w_ij (log pi(y_i) / |y_i| - log pi(y_j) / |y_j|) - gamma).
    Source: Meng et al. 2024, arXiv 2405.14734, Eq. 6, with pair weights.

    Args:
        chosen_log_prob, rejected_log_prob: of a response, divided by its number of tokens, nats.
        margin: gamma.
        weights, beta, mask, weights_on: as in `pairwise_loss`.
    """

    def entry_loss(u, _):
        return jax.nn.softplus(margin - beta * u)

    return matrix_loss((chosen_log_prob,), (rejected_log_prob,), weights, entry_loss, mask, weights_on)


def _simpo(scores, options, *, weights_on: WeightsOn = "score"):
    return simpo_loss(
        scores.chosen.policy_score(True),
        scores.rejected.policy_score(True),
        scores.weights,
        options.beta,
        options.simpo_margin,
        scores.mask,
        weights_on=weights_on,
    )


OBJECTIVES: dict[str, Objective] = {
    "simpo": Objective(
        _simpo,
        "Simple Preference Optimization",
        "arXiv 2405.14734, Eq. 6",
        weights="pair",
        uses_reference=False,
        averages=False,
        options={
            "simpo_margin": Option(
                0.5, "SimPO's gamma, the margin of rewards; its authors' defaults are beta 2 and gamma 0.5.", low=0
            )
        },
    )
}
