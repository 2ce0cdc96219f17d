"""Supervised fine-tuning on the chosen responses."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rpo_jax.objectives.objective import Objective, Term, likelihood_of
from rpo_jax.objectives.scores import Scores, zero_where_invalid


def sft_loss(
    chosen_log_prob: Float[Array, "*G M"],
    chosen_num_tokens: Int[Array, "*G M"],
    mask: Bool[Array, "*G M"] | None = None,
) -> Float[Array, ""]:
    """Negative log-likelihood of the chosen responses per token.  L = -sum_i log pi(y_i) / sum_i |y_i|.

    The mean is over the tokens of the whole batch, so a long response counts for more than a short one.
    """
    num_tokens = jnp.sum(zero_where_invalid(chosen_num_tokens, mask))
    return -jnp.sum(zero_where_invalid(chosen_log_prob, mask)) / jnp.maximum(num_tokens, 1)


def sft_term(scores: Scores, weight: float = 1.0) -> Term:
    """`sft_loss` of a batch times a weight, with the number of tokens that it is a mean over."""
    chosen = scores["chosen"]
    return Term(weight * sft_loss(*likelihood_of(chosen)), jnp.sum(jnp.where(chosen.valid, chosen.num_tokens, 0)))


@dataclass(frozen=True, kw_only=True)
class SFT(Objective):
    """`sft_loss` of a batch."""

    responses: tuple[str, ...] = ("chosen",)
    uses_reference: bool = False

    def loss(self, scores: Scores) -> Float[Array, ""]:
        return sft_term(scores).mean

    def count(self, scores: Scores) -> Int[Array, ""] | Float[Array, ""]:
        return sft_term(scores).count


OBJECTIVES = {"sft": SFT(description="supervised fine-tuning on chosen responses", source="-")}
