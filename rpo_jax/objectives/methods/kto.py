"""Kahneman-Tversky Optimization: responses one by one, against a reference point."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rpo_jax.objectives.objective import Objective, option
from rpo_jax.objectives.scores import Scores, masked_mean, zero_where_invalid


def kl_estimate(
    mismatched_log_ratio: Float[Array, "*G K"], mask: Bool[Array, "*G K"] | None = None
) -> Float[Array, ""]:
    """KTO's reference point, nats, without gradient.  KL = max(0, mean over valid k of rho_mismatched,k).

    Each response belongs to another prompt than it is scored under. Source: Ethayarajh et al. 2024, arXiv 2402.01306.
    """
    return jax.lax.stop_gradient(jnp.maximum(0.0, masked_mean(mismatched_log_ratio, mask)))


def kto_loss(
    chosen_log_ratio: Float[Array, "*G M"],
    rejected_log_ratio: Float[Array, "*G N"],
    mismatched_log_ratio: Float[Array, "*H K"],
    beta: float = 0.1,
    chosen_mask: Bool[Array, "*G M"] | None = None,
    rejected_mask: Bool[Array, "*G N"] | None = None,
    mismatched_mask: Bool[Array, "*H K"] | None = None,
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, ""]:
    """Kahneman-Tversky loss: each response against one reference point, without pairs.

    L = mean over valid responses of w(y) (1 - h),  h = sigmoid(beta (rho - KL)) if chosen, sigmoid(beta (KL - rho))
    if rejected, KL from `kl_estimate` over the whole batch.  Source: arXiv 2402.10958, Eqs. 6-8.

    Returns:
        A scalar between 0 and the larger weight; it has no unit.
    """
    kl = kl_estimate(mismatched_log_ratio, mismatched_mask)
    chosen, rejected = (
        zero_where_invalid(chosen_log_ratio, chosen_mask),
        zero_where_invalid(rejected_log_ratio, rejected_mask),
    )
    # 1 - sigmoid(x) = exp(-softplus(x)): both it and its derivative keep their digits in either tail.
    chosen_losses = desirable_weight * jnp.exp(-jax.nn.softplus(beta * (chosen - kl)))
    rejected_losses = undesirable_weight * jnp.exp(-jax.nn.softplus(beta * (kl - rejected)))
    total = jnp.sum(zero_where_invalid(chosen_losses, chosen_mask)) + jnp.sum(
        zero_where_invalid(rejected_losses, rejected_mask)
    )
    count = sum(
        x.size if mask is None else jnp.sum(mask) for x, mask in ((chosen, chosen_mask), (rejected, rejected_mask))
    )
    return total / jnp.maximum(count, 1)


@dataclass(frozen=True, kw_only=True)
class KTO(Objective):
    """`kto_loss` of a batch."""

    responses: tuple[str, ...] = ("chosen", "rejected", "mismatched")
    average_log_prob: bool = False
    kto_desirable_weight: float = option(1.0, "KTO's weight of chosen responses.", low=0)
    kto_undesirable_weight: float = option(1.0, "KTO's weight of rejected responses.", low=0)

    def loss(self, scores: Scores) -> Float[Array, ""]:
        mismatched = scores["mismatched"]
        return kto_loss(
            *scores.log_ratios(self.average_log_prob),
            mismatched.log_ratio(self.average_log_prob),
            self.beta,
            scores["chosen"].valid,
            scores["rejected"].valid,
            mismatched.valid,
            desirable_weight=self.kto_desirable_weight,
            undesirable_weight=self.kto_undesirable_weight,
        )

    def count(self, scores: Scores) -> Int[Array, ""]:
        return jnp.sum(scores["chosen"].valid) + jnp.sum(scores["rejected"].valid)


OBJECTIVES = {"kto": KTO(description="Kahneman-Tversky Optimization", source="arXiv 2402.01306")}
