"""What an objective sees of the model, and masked sums over it.

Letters: S response slots of one kind, *G leading group dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

if TYPE_CHECKING:
    from rpo_jax.objectives.matrix import ContrastMatrix
    from rpo_jax.objectives.running import Running


def at_least_float32(x: Float[Array, "..."] | Int[Array, "..."] | float) -> Float[Array, "..."]:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def zero_where_invalid(x: Float[Array, "*S"] | Int[Array, "*S"], mask: Bool[Array, "*S"] | None) -> Float[Array, "*S"]:
    """x where valid, 0 elsewhere, whatever is there; without a mask everything is valid."""
    x = at_least_float32(x)
    return x if mask is None else jnp.where(mask, x, 0.0)


def masked_mean(x: Float[Array, "*S"], mask: Bool[Array, "*S"] | None) -> Float[Array, ""]:
    """Mean over the valid entries; 0 where there are none."""
    count = x.size if mask is None else jnp.sum(mask)
    return jnp.sum(zero_where_invalid(x, mask)) / jnp.maximum(count, 1)


class Responses(NamedTuple):
    """The responses of one kind; slots that are not valid may hold anything."""

    log_prob: Float[Array, "*G S"]  # the policy's, summed over scored tokens, nats
    reference_log_prob: Float[Array, "*G S"]  # the same of the reference; zeros without one
    num_tokens: Int[Array, "*G S"]
    valid: Bool[Array, "*G S"]
    log_partition: Float[Array, "*G S"] | None = None  # learned log Z of the prompt, nats; None where none is learned
    score: Float[Array, "*G S"] | None = None  # how good the data says the response is; None where nothing needs it
    row_values: Mapping[str, Float[Array, "*G S"]] | None = None  # numbers of the response's row; None without any
    log_collision: Float[Array, "*G S"] | None = None  # of the policy, log sum_v p_v^2 summed over tokens; or None

    def row_value(self, name: str) -> Float[Array, "*G S"] | None:
        """A number of the response's row; None where the data has none of this name."""
        return None if self.row_values is None else self.row_values.get(name)

    def policy_score(self, average: bool) -> Float[Array, "*G S"]:
        """Log-prob of valid slots, 0 elsewhere; divided by the number of tokens if `average`."""
        return self._per_token(zero_where_invalid(self.log_prob, self.valid), average)

    def log_ratio(self, average: bool = False) -> Float[Array, "*G S"]:
        """rho = log pi_policy - log pi_reference of valid slots, 0 elsewhere; per token if `average`."""
        policy, reference = (zero_where_invalid(x, self.valid) for x in (self.log_prob, self.reference_log_prob))
        return self._per_token(policy - reference, average)

    def _per_token(self, score: Float[Array, "*G S"], average: bool) -> Float[Array, "*G S"]:
        return score / jnp.maximum(self.num_tokens, 1) if average else score


class Tokens(NamedTuple):
    """Scored tokens where they lie in the packed rows, R by T; anything at other places."""

    log_prob: Float[Array, "R T"]  # the policy's, nats
    value: Float[Array, "R T"] | None  # what a value head expects of the rest of the response; None without one
    reference_log_prob: Float[Array, "R T"]
    response_ids: Int[Array, "R T"]  # slot of the token's response, kinds in the order of records.KINDS; -1 elsewhere


@dataclass(frozen=True)
class Scores:
    """Everything that an objective sees of a batch.

    responses: by kind (records.KINDS), those that the objective asked for. matrix: None for objectives without one.
    tokens: only for objectives that say that they need them. before: the mean of what the objective keeps one of
    (Objective.kept), over the batches before; None where it keeps none.
    """

    responses: Mapping[str, Responses]
    matrix: ContrastMatrix | None = None
    tokens: Tokens | None = None
    before: Running | None = None

    def __getitem__(self, kind: str) -> Responses:
        return self.responses[kind]

    @property
    def contrasts(self) -> ContrastMatrix:
        """The matrix of an objective that has one."""
        assert self.matrix is not None, "whoever has contrast weights gets a matrix"
        return self.matrix

    def log_ratios(self, average: bool = False) -> tuple[Float[Array, "*G M"], Float[Array, "*G N"]]:
        """rho of chosen and rejected responses, as Responses.log_ratio."""
        return self["chosen"].log_ratio(average), self["rejected"].log_ratio(average)

    def policy_scores(self, average: bool) -> tuple[Float[Array, "*G M"], Float[Array, "*G N"]]:
        """The policy's log-probs of chosen and rejected responses, as Responses.policy_score."""
        return self["chosen"].policy_score(average), self["rejected"].policy_score(average)
