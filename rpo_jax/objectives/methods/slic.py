"""Sequence likelihood calibration."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from rpo_jax.objectives.objective import MatrixObjective, Term, option, sft_term
from rpo_jax.objectives.scores import Scores


@dataclass(frozen=True, kw_only=True)
class SLiC(MatrixObjective):
    """Hinge on the policy's own log-probs, held near the chosen responses; there is no reference.

    L = 1/|P| sum_P max(0, delta - w_ij (log pi(y_chosen,i) - log pi(y_rejected,j))) + lambda NLL(chosen).
    Source: Zhao et al. 2023, arXiv 2305.10425, with pair weights. NLL is `sft_loss`, per token; the authors' release
    of RPO sums it over a response instead.
    """

    uses_reference: bool = False
    average_log_prob: bool = False
    slic_margin: float = option(1.0, "SLiC's delta, nats.", low=0)
    slic_nll_weight: float = option(
        1.0, "SLiC's lambda, the weight of the chosen responses' negative log-likelihood.", low=0
    )

    def loss(self, scores: Scores) -> Float[Array, ""]:
        return scores.contrasts.mean(
            (scores.policy_scores(self.average_log_prob),), lambda u, _: jnp.maximum(0.0, self.slic_margin - u)
        )

    def added(self, scores: Scores) -> tuple[Term, ...]:
        return sft_term(scores, self.slic_nll_weight), *super().added(scores)


OBJECTIVES = {"slic": SLiC(description="sequence likelihood calibration", source="arXiv 2305.10425")}
