"""Binary Classifier Optimization: chosen responses are told from rejected ones by a classifier whose logit is the
reward, less a shift between both."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rpo_jax.objectives.objective import option
from rpo_jax.objectives.per_response import ResponseObjective
from rpo_jax.objectives.scores import Scores, masked_mean


@dataclass(frozen=True, kw_only=True)
class BCOPair(ResponseObjective):
    """Binary cross-entropy of shifted rewards.

    L = mean_c(-log sigmoid(beta rho_c - delta)) + mean_r(-log sigmoid(-(beta rho_r - delta))), delta without gradient.
    Source: Jung et al. 2024, arXiv 2404.04656, as TRL's loss bco_pair. There delta is the mean reward of the batches so
    far, which estimates the mean under a policy that is no more; here it is that of the whole global batch, of chosen
    and rejected responses together, so that a step stays a function of its parameters and its batch.
    """

    bco_shift: str = option(
        "batch", "BCO's delta: the mean reward of the global batch, or none (0).", choices=("batch", "none")
    )

    def shift(self, scores: Scores) -> Float[Array, ""]:
        """delta, without gradient."""
        sides = zip(scores.log_ratios(self.average_log_prob), ("chosen", "rejected"), strict=True)
        values, valid = zip(*((x.ravel(), scores[kind].valid.ravel()) for x, kind in sides), strict=True)
        return jax.lax.stop_gradient(self.beta * masked_mean(jnp.concatenate(values), jnp.concatenate(valid)))

    def losses_of(self, scores: Scores) -> tuple[Float[Array, "*G M"], Float[Array, "*G N"]]:
        chosen, rejected = scores.log_ratios(self.average_log_prob)
        shift = self.shift(scores) if self.bco_shift == "batch" else 0.0
        return jax.nn.softplus(shift - self.beta * chosen), jax.nn.softplus(self.beta * rejected - shift)


OBJECTIVES = {"bco_pair": BCOPair(description="Binary Classifier Optimization", source="arXiv 2404.04656; TRL")}
