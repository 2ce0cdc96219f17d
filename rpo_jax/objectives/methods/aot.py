"""Alignment via Optimal Transport: whole distributions are compared, sorted, and not response by response.

The sort is over the global batch, whatever the devices and micro-batches: the authors see its advantage only with many
pairs in one sort.

Letters: S slots, K quantiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rpo_jax.objectives.objective import Objective
from rpo_jax.objectives.scores import Scores, masked_mean, zero_where_invalid


def _in_order(x: Float[Array, "S"], valid: Bool[Array, "S"]) -> Float[Array, "S"]:
    """Valid values ascending, the others behind them."""
    x = zero_where_invalid(x, valid)
    return x[jnp.lexsort((jax.lax.stop_gradient(x), ~valid))]


def quantile_differences(
    first: Float[Array, "*G M"],
    second: Float[Array, "*H N"],
    first_valid: Bool[Array, "*G M"],
    second_valid: Bool[Array, "*H N"],
) -> tuple[Float[Array, "K"], Bool[Array, "K"]]:
    """The k-th smallest of the first less the k-th smallest of the second, and which k there are.

    Where there are more of the one, each of them is compared with what lies at its share of the other.
    """
    sides = (first, first_valid), (second, second_valid)
    counts = [jnp.sum(valid) for _, valid in sides]
    most = jnp.maximum(*counts)
    k = jnp.arange(max(first.size, second.size))
    first, second = (
        _in_order(x.ravel(), valid.ravel())[jnp.minimum((2 * k + 1) * count // (2 * jnp.maximum(most, 1)), x.size - 1)]
        for (x, valid), count in zip(sides, counts, strict=True)
    )
    return first - second, (k < most) & (jnp.minimum(*counts) > 0)


@dataclass(frozen=True, kw_only=True)
class AOTUnpaired(Objective):
    """The distribution of chosen log-ratios is to lie above that of rejected ones.

    L = mean_k of the smoothed logistic loss of sort(rho_c)_k - sort(rho_r)_k,
    (1 - eps) (-log sigmoid(beta d)) + eps (-log sigmoid(-beta d)).
    Source: Melnyk et al. 2024, arXiv 2406.05882, as TRL's loss aot_unpaired.
    """

    label_smoothing: float = 0.0

    def differences(self, scores: Scores) -> tuple[Float[Array, "K"], Bool[Array, "K"]]:
        """What is compared, nats, and which of it counts."""
        return quantile_differences(*scores.log_ratios(), scores["chosen"].valid, scores["rejected"].valid)

    def loss(self, scores: Scores) -> Float[Array, ""]:
        difference, valid = self.differences(scores)
        kept, flipped = (jax.nn.softplus(sign * self.beta * difference) for sign in (-1, 1))
        return masked_mean((1 - self.label_smoothing) * kept + self.label_smoothing * flipped, valid)

    def count(self, scores: Scores) -> Int[Array, ""]:
        return jnp.sum(self.differences(scores)[1])


@dataclass(frozen=True, kw_only=True)
class AOT(AOTUnpaired):
    """The distribution of the policy's margins is to lie above that of the reference's.

    d_k = sort(log pi_c - log pi_r)_k - sort(log ref_c - log ref_r)_k.  Source: as AOTUnpaired, TRL's loss aot.
    """

    needs_pairs: bool = True

    def differences(self, scores: Scores) -> tuple[Float[Array, "K"], Bool[Array, "K"]]:
        chosen, rejected = scores["chosen"], scores["rejected"]
        valid = chosen.valid & rejected.valid
        policy, reference = (
            zero_where_invalid(getattr(chosen, name), valid) - zero_where_invalid(getattr(rejected, name), valid)
            for name in ("log_prob", "reference_log_prob")
        )
        return quantile_differences(policy, reference, valid, valid)


OBJECTIVES = {
    "aot": AOT(description="Alignment via Optimal Transport of margins", source="arXiv 2406.05882; TRL"),
    "aot_unpaired": AOTUnpaired(
        description="Alignment via Optimal Transport of log-ratios", source="arXiv 2406.05882; TRL"
    ),
}
