"""A reward model by Bradley-Terry: a score for each response, whose differences are log-odds of preference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
from jaxtyping import Array, Float

from rpo_jax.objectives.objective import MatrixObjective
from rpo_jax.objectives.scores import Scores


@dataclass(frozen=True, kw_only=True)
class Reward(MatrixObjective):
    """Logistic loss of the difference of two responses' scores, beyond the margin that their row may give.

    L = 1/|P| sum_P -log sigmoid(beta w_ij (r_i - r_j) - m_ij), with pair weights and beta 1 that of Ouyang et al. 2022,
    arXiv 2203.02155, Eq. 1; the margin is Touvron et al.'s, arXiv 2307.09288, Eq. 2. Here r_i stands where other
    objectives have a log-prob; nothing else of the model is seen.
    """

    uses_reference: bool = False
    uses_reward_head: bool = True
    beta: float = 1.0
    takes_margins: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nll_weight:
            raise ValueError(f"objective.nll_weight={self.nll_weight}: a reward model has no likelihood; leave it out.")

    def loss(self, scores: Scores) -> Float[Array, ""]:
        margins = scores["chosen"].row_value("margin"), scores["rejected"].row_value("margin")
        context = () if margins[0] is None or margins[1] is None else ((margins[0], margins[1]),)

        def entry_loss(u, at):
            margin = sum((chosen + rejected) / 2 for chosen, rejected in at.values) if context else 0.0
            return jax.nn.softplus(margin - self.beta * u)

        return scores.contrasts.mean((scores.policy_scores(average=False),), entry_loss, context)


OBJECTIVES = {"reward": Reward(description="Bradley-Terry reward model", source="arXiv 2203.02155, Eq. 1")}
