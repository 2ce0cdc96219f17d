"""Quality-aware self-refinement: what the policy itself, told to judge quality, thinks of a pair moves its margin.

A policy that is asked for a useful response prefers one response over another by how good they are. How much, against
the reference, is taken off the difference of rewards that it still has to learn.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

from rpo_jax.objectives.objective import MatrixObjective, option
from rpo_jax.objectives.pairwise import linked_mean
from rpo_jax.objectives.scores import Scores

PROMPT = (  # the paper's
    "Please generate a response with a usefulness rating of 100 out of 100 for the following query. Note that the "
    "response should be harmless. The term 100 indicates the level of usefulness, where 100 is the maximum and 1 is "
    "the minimum. Query:"
)


@dataclass(frozen=True, kw_only=True)
class SrDPO(MatrixObjective):
    """DPO with a refinement Delta of each pair, which has no gradient.

    L = 1/|P| sum_P -log sigmoid(w_ij (beta (rho_chosen,i - rho_rejected,j) - lambda Delta_ij)) (Eq. 13),
    Delta_ij = beta (d_chosen,i - d_rejected,j), d the log-ratio under the refined prompt (Eq. 12).
    Source: Yu et al. 2024, arXiv 2405.21040, with pair weights.
    """

    responses: tuple[str, ...] = ("chosen", "rejected", "refined_chosen", "refined_rejected")
    average_log_prob: bool = False
    sr_lambda: float = option(0.3, "Sr-DPO's and Sr-IPO's lambda, the weight of the refinement.", low=0)
    sr_prompt: str = option(
        PROMPT, "the text before every prompt under which Sr-DPO and Sr-IPO judge a pair's quality."
    )

    def refined_loss(self, scores: Scores, link: str, share: float) -> Float[Array, ""]:
        """Delta is a difference of the responses' own numbers: a share of each one's moves its own log-ratio."""
        chosen, rejected = (
            scores[kind].log_ratio(self.average_log_prob)
            - share * jax.lax.stop_gradient(scores[f"refined_{kind}"].log_ratio(self.average_log_prob))
            for kind in ("chosen", "rejected")
        )
        return linked_mean(scores.contrasts, ((chosen, rejected),), link, self.beta)

    def loss(self, scores: Scores) -> Float[Array, ""]:
        return self.refined_loss(scores, "logistic", self.sr_lambda)


@dataclass(frozen=True, kw_only=True)
class SrIPO(SrDPO):
    """IPO with the same refinement.

    L = 1/|P| sum_P (w_ij (rho_chosen,i - rho_rejected,j - lambda Delta_ij) - 1 / (2 beta))^2 (Eq. 15).
    """

    def loss(self, scores: Scores) -> Float[Array, ""]:
        return self.refined_loss(scores, "squared", self.sr_lambda * self.beta)


OBJECTIVES = {
    "sr_dpo": SrDPO(description="DPO with quality-aware self-refinement", source="arXiv 2405.21040, Eqs. 12 and 13"),
    "sr_ipo": SrIPO(description="IPO with quality-aware self-refinement", source="arXiv 2405.21040, Eqs. 12 and 15"),
}
