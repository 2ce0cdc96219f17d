"""Binary Classifier Optimization: chosen responses are told from rejected ones by a classifier whose logit is the
reward, less a shift between both."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rpo_jax.objectives.objective import Term, option
from rpo_jax.objectives.per_response import ResponseObjective
from rpo_jax.objectives.running import joined
from rpo_jax.objectives.scores import Scores, masked_mean


@dataclass(frozen=True, kw_only=True)
class BCOPair(ResponseObjective):
    """Binary cross-entropy of shifted rewards.

    L = mean_c(-log sigmoid(beta rho_c - delta)) + mean_r(-log sigmoid(-(beta rho_r - delta))), delta without gradient.
    Source: Jung et al. 2024, arXiv 2404.04656, as TRL's loss bco_pair: delta is the mean reward of all chosen and
    rejected responses so far, those of the batch at hand included. It is part of the training state, so a resumed run
    goes on with it; held-out pairs are shifted by it too and do not change it.
    """

    bco_shift: str = option(
        "running",
        "BCO's delta: the mean reward of all batches so far, that of the global batch alone, or none (0).",
        choices=("running", "batch", "none"),
    )

    @property
    def keeps_mean(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.bco_shift == "running"

    def kept(self, scores: Scores) -> Term:
        """The mean reward of the batch, without gradient."""
        sides = zip(scores.log_ratios(self.average_log_prob), ("chosen", "rejected"), strict=True)
        values, valid = zip(*((x.ravel(), scores[kind].valid.ravel()) for x, kind in sides), strict=True)
        mean = self.beta * masked_mean(jnp.concatenate(values), jnp.concatenate(valid))
        return Term(jax.lax.stop_gradient(mean), jnp.sum(jnp.concatenate(valid)))

    def shift(self, scores: Scores) -> Float[Array, ""] | float:
        """delta, without gradient."""
        if self.bco_shift == "none":
            return 0.0
        own = self.kept(scores)
        return own.mean if scores.before is None else joined(scores.before, *own)["mean"]

    def losses_of(self, scores: Scores) -> tuple[Float[Array, "*G M"], Float[Array, "*G N"]]:
        chosen, rejected = scores.log_ratios(self.average_log_prob)
        shift = self.shift(scores)
        return jax.nn.softplus(shift - self.beta * chosen), jax.nn.softplus(self.beta * rejected - shift)


OBJECTIVES = {"bco_pair": BCOPair(description="Binary Classifier Optimization", source="arXiv 2404.04656; TRL")}
