"""Length-Desensitised DPO: what a response says beyond the shorter one's length counts for less.

Letters: R rows and T tokens of a packed batch, P responses.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rpo_jax.core.records import KINDS
from rpo_jax.objectives.logprobs import by_response
from rpo_jax.objectives.matrix import BothSides
from rpo_jax.objectives.objective import option
from rpo_jax.objectives.pairwise import LinkObjective
from rpo_jax.objectives.scores import Scores, zero_where_invalid


def desensitised(
    log_prob: Float[Array, "R T"], response_ids: Int[Array, "R T"], shared_tokens: Int[Array, "P"], alpha: float
) -> Float[Array, "P"]:
    """Every response's log-prob, nats: of its first `shared_tokens` whole, of the others alpha times.

    Args:
        log_prob: of scored tokens; anything elsewhere.
        response_ids: 0 to P - 1 for scored tokens, those of a response side by side and in order; -1 elsewhere.
    """
    scored, place = response_ids >= 0, jnp.arange(response_ids.shape[1])
    before = jnp.pad(response_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    first = jax.lax.cummax(jnp.where(response_ids != before, place, 0), axis=1)
    share = jnp.where(place - first < shared_tokens[response_ids], 1.0, alpha)
    return by_response(share * zero_where_invalid(log_prob, scored), response_ids, len(shared_tokens))[0]


@dataclass(frozen=True, kw_only=True)
class LDDPO(LinkObjective):
    """A link on differences of log-ratios whose tokens beyond the pair's shorter response count alpha times.

    log pi(y) = sum_(t <= l) log p_t + alpha sum_(t > l) log p_t,  l = min(|y_chosen|, |y_rejected|) of the pair, of the
    policy and of the reference.  Source: Liu et al. 2024, arXiv 2409.06411; TRL's ld_alpha. With alpha 1 it is DPO.
    """

    needs_pairs: bool = True
    uses_tokens: bool = True
    ld_dpo_alpha: float = option(0.5, "LD-DPO's alpha, what tokens beyond the shorter response count.", low=0, high=1)

    def terms_of(self, scores: Scores) -> BothSides:
        tokens = scores.tokens
        assert tokens is not None, "it uses tokens"
        pair = [scores[kind].num_tokens.ravel() for kind in ("chosen", "rejected")]
        own = {"chosen": jnp.minimum(*pair), "rejected": jnp.minimum(*pair)}
        kinds = [kind for kind in KINDS if kind in scores.responses]  # in the order of their slots
        shared = jnp.concatenate([own.get(kind, scores[kind].num_tokens.ravel()) for kind in kinds])
        policy, reference = (
            desensitised(log_prob, tokens.response_ids, shared, self.ld_dpo_alpha)
            for log_prob in (tokens.log_prob, tokens.reference_log_prob)
        )
        ratios, start = {}, 0
        for kind in kinds:
            side = scores[kind]
            ratio = (policy - reference)[start : start + side.valid.size].reshape(side.valid.shape)
            ratios[kind] = ratio / jnp.maximum(side.num_tokens, 1) if self.average_log_prob else ratio
            start += side.valid.size
        return ((ratios["chosen"], ratios["rejected"]), *super().terms_of(scores)[1:])


OBJECTIVES = {"ld_dpo": LDDPO(description="length-desensitised DPO", source="arXiv 2409.06411; TRL")}
