"""Losses of responses one by one: what a chosen one loses and what a rejected one does, whichever they come with.

Nothing is contrasted, so these need no pairs. Of pairs, the sum of the two means is the mean over pairs of the sum.

Letters: M chosen and N rejected responses, *G leading group dimensions.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rpo_jax.objectives.objective import Objective, Term
from rpo_jax.objectives.scores import Scores, masked_mean


@dataclass(frozen=True, kw_only=True)
class ResponseObjective(Objective):
    """A mean over the chosen responses, and one over the rejected ones.

    average_log_prob: divide each response's log-ratio by its number of tokens.
    """

    average_log_prob: bool = False

    @abstractmethod
    def losses_of(self, scores: Scores) -> tuple[Float[Array, "*G M"], Float[Array, "*G N"]]:
        """Of each chosen and of each rejected response; anything in slots that are not valid, but finite."""

    def loss(self, scores: Scores) -> Float[Array, ""]:
        return masked_mean(self.losses_of(scores)[0], scores["chosen"].valid)

    def count(self, scores: Scores) -> Int[Array, ""]:
        return jnp.sum(scores["chosen"].valid)

    def added(self, scores: Scores) -> tuple[Term, ...]:
        valid = scores["rejected"].valid
        return (Term(masked_mean(self.losses_of(scores)[1], valid), jnp.sum(valid)),)
