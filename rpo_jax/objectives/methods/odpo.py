"""DPO with an offset: how much better a response is than another, by scores of the data, becomes a margin."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rpo_jax.objectives.objective import MatrixObjective, option
from rpo_jax.objectives.scores import Scores

# From differences of scores to offsets. The log of what is not positive is minus infinity, its limit: a rejected
# response that the data scores no lower asks nothing of the policy.
SCALES = {
    "log": lambda x: jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1.0)), -jnp.inf),
    "linear": lambda x: x,
}


@dataclass(frozen=True, kw_only=True)
class ODPO(MatrixObjective):
    """DPO that asks for a difference of rewards of at least an offset.

    L = 1/|P| sum_P -log sigmoid(beta w_ij (rho_chosen,i - rho_rejected,j) - alpha f(score_i - score_j)).
    Source: Amini, Vieira and Cotterell 2024, arXiv 2402.10571, with pair weights; f is the log in its experiments.
    With alpha 0 it is DPO, but for pairs whose difference has no log.
    """

    uses_scores: bool = True
    average_log_prob: bool = False
    odpo_alpha: float = option(1.0, "ODPO's alpha, the weight of the offset.", low=0)
    odpo_scale: str = option("log", "ODPO's f of the scores' difference: log or linear.", choices=tuple(SCALES))

    def loss(self, scores: Scores) -> Float[Array, ""]:
        chosen, rejected = scores["chosen"].score, scores["rejected"].score
        assert chosen is not None, "it uses scores"
        assert rejected is not None, "it uses scores"

        def entry_loss(u, at):
            ((chosen, rejected),) = at.values
            offset = self.odpo_alpha * SCALES[self.odpo_scale](chosen - rejected) if self.odpo_alpha else 0.0
            return jax.nn.softplus(offset - self.beta * u)

        return scores.contrasts.mean((scores.log_ratios(self.average_log_prob),), entry_loss, ((chosen, rejected),))


OBJECTIVES = {"odpo": ODPO(description="DPO with an offset", source="arXiv 2402.10571")}
