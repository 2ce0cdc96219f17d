"""DPO with an offset: how much better a response is than another, by scores of the data, becomes a margin."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rpo_jax.objectives.blocked import Blocks
from rpo_jax.objectives.matrix import WeightsOn, matrix_loss
from rpo_jax.objectives.objective import Objective, Option

# From differences of scores to offsets. The log of what is not positive is minus infinity, its limit: a rejected
# response that the data scores no lower asks nothing of the policy.
SCALES = {
    "log": lambda x: jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1.0)), -jnp.inf),
    "linear": lambda x: x,
}


def odpo_loss(
    chosen_log_ratio: Float[Array, "*G M"],
    rejected_log_ratio: Float[Array, "*G N"],
    chosen_score: Float[Array, "*G M"],
    rejected_score: Float[Array, "*G N"],
    weights: Float[Array, "*G M N"] | float | Blocks,
    beta: float = 0.1,
    alpha: float = 1.0,
    scale: str = "log",
    mask: Bool[Array, "*G M N"] | None = None,
    *,
    weights_on: WeightsOn = "score",
) -> Float[Array, ""]:
    """DPO that asks for a difference of rewards of at least an offset.

    L = 1/|P| sum_P -log sigmoid(beta w_ij (rho_chosen,i - rho_rejected,j) - alpha f(score_i - score_j)).
    Source: Amini, Vieira and Cotterell 2024, arXiv 2402.10571, with pair weights; f is the log in its experiments.

    Args:
        chosen_score, rejected_score: how good the data says that each response is.
        alpha: 0 is DPO, but for pairs whose difference has no log.
        scale: f, a name in SCALES.
        others: as in `pairwise_loss`.
    """

    def entry_loss(u, at):
        ((chosen, rejected),) = at.context
        offset = alpha * SCALES[scale](chosen - rejected) if alpha else 0.0
        return jax.nn.softplus(offset - beta * u)

    context = ((chosen_score, rejected_score),)
    return matrix_loss((chosen_log_ratio,), (rejected_log_ratio,), weights, entry_loss, mask, weights_on, context)


def _odpo(scores, options, *, weights_on: WeightsOn = "score"):
    chosen, rejected = scores.chosen, scores.rejected
    return odpo_loss(
        chosen.log_ratio(options.average_log_prob),
        rejected.log_ratio(options.average_log_prob),
        chosen.score,
        rejected.score,
        scores.weights,
        options.beta,
        options.odpo_alpha,
        options.odpo_scale,
        scores.mask,
        weights_on=weights_on,
    )


OBJECTIVES: dict[str, Objective] = {
    "odpo": Objective(
        _odpo,
        "DPO with an offset",
        "arXiv 2402.10571",
        weights="pair",
        uses_scores=True,
        options={
            "odpo_alpha": Option(1.0, "ODPO's alpha, the weight of the offset.", low=0),
            "odpo_scale": Option("log", "ODPO's f of the scores' difference: log or linear.", choices=tuple(SCALES)),
        },
    )
}
