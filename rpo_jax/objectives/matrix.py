"""The contrast matrix behind one interface: the mean loss of its entries. Held whole here, in blocks in `blocked`.

Letters: M chosen and N rejected responses of a contrast group, *G leading group dimensions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rpo_jax.objectives.scores import at_least_float32, zero_where_invalid

WeightsOn = Literal["score", "loss"]

# From the scores of rows and columns (trees of arrays), weights and valid entries to the sum of the entries' losses.
RowsLoss = Callable[[Any, Any, Array, Array], Array]


class EntryContext(NamedTuple):
    """What a loss of entries may look at besides the weighted differences: of a matrix, or of some whole rows of one.

    weights: on the scores; 1 where they are on the losses. values: further values of the responses, such as scores of
    the data, each as [*G, M, N] of the chosen ones and of the rejected ones; 0 where the entry is not valid.
    """

    weights: Float[Array, "*G M N"]
    mask: Bool[Array, "*G M N"]
    values: tuple[tuple[Float[Array, "*G M N"], Float[Array, "*G M N"]], ...]


# Values of the chosen and of the rejected responses, as many as there are.
BothSides = tuple[tuple[Float[Array, "*G M"], Float[Array, "*G N"]], ...]

# From weighted differences and the rest of the entries to a loss per entry.
EntryLoss = Callable[[Float[Array, "*G M N"], EntryContext], Float[Array, "*G M N"]]


@dataclass(frozen=True)
class ContrastMatrix(ABC):
    """Weights and valid entries of all contrasts of a batch.

    weights_on: whether weights multiply scores (Eq. 13) or losses (the authors' release). sample_weights: how much each
    chosen and each rejected response counts, an entry by the geometric mean v_ij of both, a pair's own by its weight;
    all alike where None.
    """

    weights_on: WeightsOn = field(default="score", kw_only=True)
    sample_weights: tuple[Float[Array, "*G M"], Float[Array, "*G N"]] | None = field(default=None, kw_only=True)

    @abstractmethod
    def valid(self) -> tuple[Int[Array, ""] | Float[Array, ""], Int[Array, ""] | Float[Array, ""]]:
        """Valid entries, and rows with a valid entry."""

    def counts(self) -> tuple[Int[Array, ""] | Float[Array, ""], Int[Array, ""] | Float[Array, ""]]:
        """What means are over: sums of v_ij over the valid entries, and of w_ij v_ij, which is over rows.

        Without sample weights as many as `valid` says.
        """
        if self.sample_weights is None:
            return self.valid()
        roots = [at_least_float32(jnp.sqrt(weights)) for weights in self.sample_weights]
        return self.sum(_sum_of_weights, *roots), self.sum(_weighted_sum_of_weights, *roots)

    @abstractmethod
    def sum(self, rows_loss: RowsLoss, chosen: Any, rejected: Any) -> Float[Array, ""]:
        """The sum over all rows, differentiable by the scores: float32 trees of [*G, M] and [*G, N]."""

    def mean(self, terms: BothSides, entry_loss: EntryLoss, context: BothSides = ()) -> Float[Array, ""]:
        """Mean over valid entries of the loss of weighted differences, or weighted mean of the differences' losses.

        Args:
            terms: of the responses' scores; a score is their sum, a difference is taken term by term.
            entry_loss: what it closes over must not be traced: blocks are differentiated by the arguments alone.
            context: values that the loss sees as EntryContext.values.
        """
        entries, valid_rows = self.counts()
        rows, columns = (
            tuple(tuple(at_least_float32(x[k]) for x in part) for part in (terms, context)) for k in (0, 1)
        )
        if self.sample_weights is not None:
            rows, columns = (
                (*side, jnp.sqrt(weights)) for side, weights in zip((rows, columns), self.sample_weights, strict=True)
            )
        total = self.sum(partial(_loss_of_rows, entry_loss, self.weights_on), rows, columns)
        count = entries if self.weights_on == "score" else valid_rows
        if self.sample_weights is not None:
            return total / jnp.where(count > 0, count, 1)
        return total / jnp.maximum(count, 1)


@dataclass(frozen=True)
class WholeMatrix(ContrastMatrix):
    """All of it in memory."""

    weights: Float[Array, "*G M N"]
    mask: Bool[Array, "*G M N"]

    def valid(self) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """As ContrastMatrix.valid."""
        return jnp.sum(self.mask), jnp.sum(jnp.any(self.mask, axis=-1))

    def sum(self, rows_loss: RowsLoss, chosen: Any, rejected: Any) -> Float[Array, ""]:
        """As ContrastMatrix.sum."""
        return rows_loss(chosen, rejected, self.weights, self.mask)


def _loss_of_rows(
    entry_loss: EntryLoss, weights_on: WeightsOn, rows: Any, columns: Any, weights: Array, mask: Array
) -> Float[Array, ""]:
    """The sum over a matrix, or over a block of its rows.

    Each term's difference is taken first: what is the same for both drops out of the score exactly.
    """
    (chosen, chosen_values, *chosen_root), (rejected, rejected_values, *rejected_root) = rows, columns

    def sides(of_chosen: Array, of_rejected: Array) -> tuple[Array, Array]:
        # Masked before the difference as well as after the loss: a gradient through 0 * nan is nan.
        return zero_where_invalid(of_chosen[..., :, None], mask), zero_where_invalid(of_rejected[..., None, :], mask)

    first, *others = (c - r for c, r in map(sides, chosen, rejected))
    difference = sum(others, start=first)
    weights = zero_where_invalid(weights, mask)
    values = tuple(map(sides, chosen_values, rejected_values))
    counted = [c * r for c, r in map(sides, chosen_root, rejected_root)]  # the sample weights, where there are any
    if weights_on == "score":
        losses = zero_where_invalid(entry_loss(weights * difference, EntryContext(weights, mask, values)), mask)
    else:
        losses = zero_where_invalid(entry_loss(difference, EntryContext(jnp.ones_like(weights), mask, values)), mask)
        counted.append(weights)
    return jnp.sum(math.prod(counted, start=losses))


def _sum_of_weights(chosen: Array, rejected: Array, weights: Array, mask: Array) -> Float[Array, ""]:
    return jnp.sum(zero_where_invalid(chosen[..., :, None] * rejected[..., None, :], mask))


def _weighted_sum_of_weights(chosen: Array, rejected: Array, weights: Array, mask: Array) -> Float[Array, ""]:
    return jnp.sum(zero_where_invalid(weights * chosen[..., :, None] * rejected[..., None, :], mask))
