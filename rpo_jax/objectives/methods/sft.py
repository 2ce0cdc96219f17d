"""Supervised fine-tuning on the chosen responses."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rpo_jax.objectives.matrix import WeightsOn
from rpo_jax.objectives.objective import Objective, count_chosen_tokens
from rpo_jax.objectives.scores import Scores, keep


def sft_loss(
    chosen_log_prob: Float[Array, "*G M"],
    chosen_num_tokens: Int[Array, "*G M"],
    mask: Bool[Array, "*G M"] | None = None,
) -> Float[Array, ""]:
    """Negative log-likelihood of the chosen responses per token.  L = -sum_i log pi(y_i) / sum_i |y_i|.

    The mean is over the tokens of the whole batch, so a long response counts for more than a short one.
    """
    num_tokens = jnp.sum(keep(chosen_num_tokens, mask))
    return -jnp.sum(keep(chosen_log_prob, mask)) / jnp.maximum(num_tokens, 1)


def sft(scores: Scores, options, *, weights_on: WeightsOn = "score") -> Float[Array, ""]:
    return sft_loss(scores.chosen.log_prob, scores.chosen.num_tokens, scores.chosen.valid)


OBJECTIVES: dict[str, Objective] = {
    "sft": Objective(
        sft,
        "supervised fine-tuning on chosen responses",
        "-",
        responses=("chosen",),
        count=count_chosen_tokens,
        uses_reference=False,
        averages=False,
    )
}
