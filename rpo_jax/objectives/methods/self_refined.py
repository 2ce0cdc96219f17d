"""Quality-aware self-refinement: what the policy itself, told to judge quality, thinks of a pair moves its margin.

A policy that is asked for a useful response prefers one response over another by how good they are. How much, against
the reference, is taken off the difference of rewards that it still has to learn.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Bool, Float

from rpo_jax.objectives.blocked import Blocks
from rpo_jax.objectives.matrix import WeightsOn
from rpo_jax.objectives.objective import Objective, Option
from rpo_jax.objectives.pairwise import pairwise_loss

PROMPT = (  # the paper's
    "Please generate a response with a usefulness rating of 100 out of 100 for the following query. Note that the "
    "response should be harmless. The term 100 indicates the level of usefulness, where 100 is the maximum and 1 is "
    "the minimum. Query:"
)


def self_refined_loss(
    chosen_log_ratio: Float[Array, "*G M"],
    rejected_log_ratio: Float[Array, "*G N"],
    chosen_refined: Float[Array, "*G M"],
    rejected_refined: Float[Array, "*G N"],
    weights: Float[Array, "*G M N"] | float | Blocks,
    beta: float = 0.1,
    lam: float = 0.3,
    link: str = "logistic",
    mask: Bool[Array, "*G M N"] | None = None,
    *,
    weights_on: WeightsOn = "score",
) -> Float[Array, ""]:
    """DPO (link logistic) or IPO (squared) with a refinement Delta of each pair, which has no gradient.

    Delta_ij = beta (d_chosen,i - d_rejected,j), d the log-ratio under the refined prompt (Eq. 12).
    Sr-DPO: L = 1/|P| sum_P -log sigmoid(w_ij (beta (rho_chosen,i - rho_rejected,j) - lambda Delta_ij)) (Eq. 13).
    Sr-IPO: L = 1/|P| sum_P (w_ij (rho_chosen,i - rho_rejected,j - lambda Delta_ij) - 1 / (2 beta))^2 (Eq. 15).
    Source: Yu et al. 2024, arXiv 2405.21040, with pair weights.

    Args:
        chosen_refined, rejected_refined: d of each response, nats.
        lam: lambda; 0 is DPO or IPO.
        others: as in `pairwise_loss`.
    """
    # Delta is a difference of the responses' own numbers, so each one's share moves its own log-ratio.
    share = lam if link == "logistic" else lam * beta
    chosen = chosen_log_ratio - share * jax.lax.stop_gradient(chosen_refined)
    rejected = rejected_log_ratio - share * jax.lax.stop_gradient(rejected_refined)
    return pairwise_loss(chosen, rejected, weights, beta, link, mask, weights_on=weights_on)


def _self_refined(link: str):
    def compute(scores, options, *, weights_on: WeightsOn = "score"):
        chosen, rejected = scores.refined
        return self_refined_loss(
            scores.chosen.log_ratio(options.average_log_prob),
            scores.rejected.log_ratio(options.average_log_prob),
            chosen.log_ratio(options.average_log_prob),
            rejected.log_ratio(options.average_log_prob),
            scores.weights,
            options.beta,
            options.sr_lambda,
            link,
            scores.mask,
            weights_on=weights_on,
        )

    return compute


RESPONSES = ("chosen", "rejected", "refined_chosen", "refined_rejected")
SHARED = {
    "sr_lambda": Option(0.3, "Sr-DPO's and Sr-IPO's lambda, the weight of the refinement.", low=0),
    "sr_prompt": Option(PROMPT, "the text before every prompt under which Sr-DPO and Sr-IPO judge a pair's quality."),
}

OBJECTIVES: dict[str, Objective] = {
    "sr_dpo": Objective(
        _self_refined("logistic"),
        "DPO with quality-aware self-refinement",
        "arXiv 2405.21040, Eqs. 12 and 13",
        responses=RESPONSES,
        weights="pair",
        options=SHARED,
    ),
    "sr_ipo": Objective(
        _self_refined("squared"),
        "IPO with quality-aware self-refinement",
        "arXiv 2405.21040, Eqs. 12 and 15",
        responses=RESPONSES,
        weights="pair",
        options=SHARED,
    ),
}
