"""Adaptive DPO: every contrast has its own temperature, which its own margin decides."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rpo_jax.objectives.objective import MatrixObjective, option
from rpo_jax.objectives.scores import Scores

LEAST, MOST, NEWTON_STEPS = 0.1, 5.0, 5  # of tau; the authors'
EPSILON = 1e-6  # the authors', in logarithms and under divisions


def scale(d: Float[Array, "*S"], rho0: float, *, quadratic: bool) -> Float[Array, "*S"]:
    """tau of every margin d: what minimises -tau log sigmoid(d / tau) + rho0 tau, or rho0 tau^2 where `quadratic`.

    Five Newton steps from 1, held between 0.1 and 5, as in the authors' code.
    """
    tau, more = jnp.ones_like(d), 2 * rho0 if quadratic else 0.0
    for _ in range(NEWTON_STEPS):
        s = jax.nn.sigmoid(d / tau)
        slope = -jnp.log(2 * s + EPSILON) + (1 - s) * d / tau + (more * tau if quadratic else rho0)
        curvature = jnp.maximum(jnp.square(d) / tau**3 * s * (1 - s) + more, EPSILON)
        tau = jnp.clip(tau - slope / curvature, LEAST, MOST)
    return tau


@dataclass(frozen=True, kw_only=True)
class AdaDPO(MatrixObjective):
    """DPO whose margins are scaled by temperatures of their own.

    L = 1/|P| sum_P -tau_ij log(sigmoid(s_ij / tau_ij) + 1e-6),  s_ij = beta w_ij (rho_i - rho_j), tau_ij = `scale` of
    s_ij, without gradient.  Source: arXiv 2406.02764 and its authors' code, with pair weights.
    """

    average_log_prob: bool = False
    ada_dpo_rho: float = option(0.1, "Ada-DPO's rho_0, the price of a temperature.", low=0, open=True)
    ada_dpo_price: str = option(
        "linear", "how Ada-DPO prices temperatures: linear or quadratic.", choices=("linear", "quadratic")
    )

    def loss(self, scores: Scores) -> Float[Array, ""]:
        def entry_loss(u, _):
            s = self.beta * u
            tau = scale(jax.lax.stop_gradient(s), self.ada_dpo_rho, quadratic=self.ada_dpo_price == "quadratic")
            return -tau * jnp.log(jax.nn.sigmoid(s / tau) + EPSILON)

        return scores.contrasts.mean((scores.log_ratios(self.average_log_prob),), entry_loss)


OBJECTIVES = {"ada_dpo": AdaDPO(description="DPO with adaptive temperatures", source="arXiv 2406.02764, authors' code")}
