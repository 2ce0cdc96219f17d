"""Noise Contrastive Alignment of pairs: rewards that are likelihoods in themselves, not only differences."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

from rpo_jax.objectives.per_response import ResponseObjective
from rpo_jax.objectives.scores import Scores


@dataclass(frozen=True, kw_only=True)
class NCAPair(ResponseObjective):
    """A chosen response is told from noise, and both responses of a pair are noise alike.

    L = mean_c(-log sigmoid(beta rho_c) - 1/2 log sigmoid(-beta rho_c)) + mean_r(-1/2 log sigmoid(-beta rho_r)).
    Source: Chen et al. 2024, arXiv 2402.05369, for pairs, as TRL's loss nca_pair.
    """

    def losses_of(self, scores: Scores) -> tuple[Float[Array, "*G M"], Float[Array, "*G N"]]:
        chosen, rejected = scores.log_ratios(self.average_log_prob)
        noise = [0.5 * jax.nn.softplus(self.beta * x) for x in (chosen, rejected)]
        return jax.nn.softplus(-self.beta * chosen) + noise[0], noise[1]


OBJECTIVES = {"nca_pair": NCAPair(description="Noise Contrastive Alignment of pairs", source="arXiv 2402.05369; TRL")}
