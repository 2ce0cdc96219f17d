"""DiscoPOP: a loss that a language model found, logistic for what is wrong and exponential for what is right."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rpo_jax.objectives.objective import MatrixObjective, option
from rpo_jax.objectives.scores import Scores


@dataclass(frozen=True, kw_only=True)
class DiscoPOP(MatrixObjective):
    """Log-ratio modulated loss.

    L = 1/|P| sum_P (1 - m) (-log sigmoid(s)) + m e^(-s),  m = sigmoid(s / tau),  s = beta w_ij (rho_i - rho_j).
    Source: Lu et al. 2024, arXiv 2406.08414, with pair weights; tau 0.05 is its authors'.
    """

    average_log_prob: bool = False
    discopop_tau: float = option(0.05, "DiscoPOP's tau, the width of the blend of its two losses.", low=0, open=True)

    def loss(self, scores: Scores) -> Float[Array, ""]:
        def entry_loss(u, _):
            s = self.beta * u
            logistic = jnp.exp(-jax.nn.softplus(s / self.discopop_tau)) * jax.nn.softplus(-s)
            # One exponent: e^(-s) alone overflows where m is 0.
            return logistic + jnp.exp(-s - jax.nn.softplus(-s / self.discopop_tau))

        return scores.contrasts.mean((scores.log_ratios(self.average_log_prob),), entry_loss)


OBJECTIVES = {"discopop": DiscoPOP(description="DiscoPOP, a discovered loss", source="arXiv 2406.08414; TRL")}
