"""Sequence likelihood calibration."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rpo_jax.objectives.blocked import Blocks
from rpo_jax.objectives.matrix import WeightsOn, matrix_loss
from rpo_jax.objectives.methods.sft import sft, sft_loss
from rpo_jax.objectives.objective import Objective, Option


def slic_loss(
    chosen_log_prob: Float[Array, "*G M"],
    rejected_log_prob: Float[Array, "*G N"],
    chosen_num_tokens: Int[Array, "*G M"],
    weights: Float[Array, "*G M N"] | float | Blocks,
    margin: float = 1.0,
    nll_weight: float = 1.0,
    mask: Bool[Array, "*G M N"] | None = None,
    *,
    chosen_mask: Bool[Array, "*G M"] | None = None,
    weights_on: WeightsOn = "score",
) -> Float[Array, ""]:
    """Hinge on the policy's own log-probs, held near the chosen responses; there is no reference.

    L = 1/|P| sum_P max(0, delta - w_ij (log pi(y_chosen,i) - log pi(y_rejected,j))) + lambda NLL(chosen).
    Source: Zhao et al. 2023, arXiv 2305.10425, with pair weights. NLL is `sft_loss`, per token; the authors' release
    of RPO sums it over a response instead.

    Args:
        chosen_log_prob, rejected_log_prob: summed over a response's tokens, nats.
        chosen_num_tokens: tokens summed over.
        weights: w, as in `pairwise_loss`.
        margin: delta, nats.
        nll_weight: lambda.
        mask: valid entries of the matrix; all of them where not given.
        chosen_mask: responses that count in NLL; those with a valid entry where not given.
        weights_on: as in `pairwise_loss`.
    """
    if chosen_mask is None and mask is not None:
        chosen_mask = jnp.any(mask, axis=-1)

    def hinge(u, _):
        return jnp.maximum(0.0, margin - u)

    calibration = matrix_loss((chosen_log_prob,), (rejected_log_prob,), weights, hinge, mask, weights_on)
    return calibration + nll_weight * sft_loss(chosen_log_prob, chosen_num_tokens, chosen_mask)


def _slic(scores, options, *, weights_on: WeightsOn = "score"):
    chosen, rejected = scores.chosen, scores.rejected
    calibration = slic_loss(
        chosen.policy_score(options.average_log_prob),
        rejected.policy_score(options.average_log_prob),
        chosen.num_tokens,
        scores.weights,
        options.slic_margin,
        0.0,
        scores.mask,
        weights_on=weights_on,
    )
    return calibration + options.slic_nll_weight * sft(scores, options)


OBJECTIVES: dict[str, Objective] = {
    "slic": Objective(
        _slic,
        "sequence likelihood calibration",
        "arXiv 2305.10425",
        weights="pair",
        uses_reference=False,
        options={
            "slic_margin": Option(1.0, "SLiC's delta, nats.", low=0),
            "slic_nll_weight": Option(
                1.0, "SLiC's lambda, the weight of the chosen responses' negative log-likelihood.", low=0
            ),
        },
    )
}
