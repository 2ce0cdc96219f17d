"""From log-probs of a batch's responses to what an objective sees, its loss, and the metrics of a step.

Letters: P response slots, kinds side by side in the order of records.KINDS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from rpo_jax.config import Method
from rpo_jax.core.records import Batch, Side
from rpo_jax.objectives import blocked, contrast, load_balance, metrics, partition, running
from rpo_jax.objectives.matrix import ContrastMatrix, WholeMatrix
from rpo_jax.objectives.objective import Term, total
from rpo_jax.objectives.scores import Responses, Scores, Tokens
from rpo_jax.training.micro_batches import LogProbs, TokenScores

Means = dict[str, metrics.Mean]  # they combine over batches

# From log-probs, batch, whether it is of pairs, and what a reference says of every token.
ScoresOf = Callable[[LogProbs, Batch, bool, TokenScores | None], tuple[Scores, Means]]


def weigh(
    method: Method,
    alpha: float,
    chosen: Side,
    rejected: Side,
    is_own_pair: Bool[Array, "B N"] | None = None,
    temperature: Float[Array, "B"] | None = None,
) -> contrast.ContrastWeights:
    """The contrast weights of these responses, which may be some rows of a matrix.

    Args:
        alpha: of the diagonal weighting.
        is_own_pair, temperature: as in blocked.FillRows.
    """
    mask = contrast.valid_entries(
        chosen.valid, rejected.valid, chosen.prompt_id, rejected.prompt_id, chosen.text_id, rejected.text_id
    )
    return contrast.make_weights(
        str(method.weights),
        chosen.embedding,
        rejected.embedding,
        mask,
        temperature=method.temperature if temperature is None else temperature,
        perplexity=method.perplexity if temperature is None else None,
        alpha=alpha,
        is_own_pair=is_own_pair,
    )


def make_scores(method: Method, alpha: float, block: int | str, mesh: Mesh) -> ScoresOf:
    """Function to what an objective sees of a batch, and the contrast metrics.

    Args:
        alpha: of the diagonal weighting.
        block: as contrast.block.
    """
    size = method.matrix_group

    def grouped(x: Array) -> Array:
        groups = method.groups_of(x.shape[0], size)
        # Spelt out, because embeddings that nothing needs have width 0, which leaves a -1 undetermined.
        return x if groups <= 1 < size else x.reshape(groups, x.shape[0] // groups, *x.shape[1:])

    def fill(
        chosen: Side,
        rejected: Side,
        is_own_pair: Array | None = None,
        temperature: Array | None = None,
        *,
        paired: bool,
    ) -> tuple[contrast.ContrastWeights, Means]:
        """A matrix or some of its rows, as blocked.FillRows."""
        weights = weigh(method, alpha, chosen, rejected, is_own_pair, temperature)
        embedded = chosen.embedding.shape[-1] > 0
        cosine = contrast.cosine(chosen.embedding, rejected.embedding) if embedded else None
        ids = chosen.prompt_id, rejected.prompt_id
        return weights, metrics.contrast_metrics(weights, cosine, *ids, paired=paired, is_own_pair=is_own_pair)

    def matrix_of(sides: dict[str, Side], paired: bool) -> tuple[ContrastMatrix | None, Means]:
        if method.weights is None:
            return None, {}
        chosen, rejected = (jax.tree.map(grouped, sides[kind]) for kind in ("chosen", "rejected"))
        entries = chosen.valid.size * rejected.valid.shape[-1]
        filled = partial(fill, paired=paired)
        if method.weights != "pair" and blocked.needs_blocks(entries, block):
            matrix, means = blocked.scan_rows(filled, chosen, rejected, block, mesh, method.weights_on)
            return matrix, metrics.of_one_batch(means)
        weights, means = filled(chosen, rejected)
        return WholeMatrix(weights.weights, weights.mask, weights_on=method.weights_on), means

    def scores_of(
        log_probs: LogProbs, batch: Batch, paired: bool, reference: TokenScores | None = None
    ) -> tuple[Scores, Means]:
        log_z, responses = log_probs.log_partition, {}
        if log_z is not None:
            ids, valid = (jnp.concatenate(batch.joined(name)) for name in ("prompt_id", "valid"))
            log_z = partition.per_prompt(log_z, ids, valid)
        for kind, slots in batch.slots().items():
            side = batch.sides[kind]
            z = None if log_z is None else log_z[slots]
            ungrouped = Responses(
                log_probs.log_prob[slots],
                side.reference_log_prob,
                log_probs.num_tokens[slots],
                side.valid,
                z,
                side.score,
                side.row_values,
                None if log_probs.collision is None else log_probs.collision[slots],
            )
            responses[kind] = jax.tree.map(grouped, ungrouped)
        matrix, means = matrix_of(batch.sides, paired)
        if matrix is not None:
            weights = responses["chosen"].row_value("weight"), responses["rejected"].row_value("weight")
            if weights[0] is not None and weights[1] is not None:
                matrix = replace(matrix, sample_weights=(weights[0], weights[1]))
        return Scores(responses, matrix, _tokens(log_probs.tokens, reference, batch)), means

    return scores_of


def _tokens(policy: TokenScores | None, reference: TokenScores | None, batch: Batch) -> Tokens | None:
    if policy is None:
        return None
    assert reference is not None, "checked with the configuration: a cache knows no tokens"
    return Tokens(policy.log_prob, policy.value, reference.log_prob, batch.response_ids)


def make_loss(
    method: Method, alpha: float, block: int | str, mesh: Mesh, balance_weight: float = 0.0
) -> Callable[..., tuple[Array, Means]]:
    """Function from batch, what a reference says of its tokens, whether it is of pairs, and log-probs to the loss.

    With it come the metrics of the batch; arguments are `make_scores`'. An objective that keeps a mean takes that of
    the batches before besides, and the batch's own is then among the metrics, as `running.NAME`.

    Args:
        balance_weight: of the load-balancing loss beside the objective's, where the policy has experts.
    """
    objective, scores_of = method.objective, make_scores(method, alpha, block, mesh)

    def loss(
        batch: Batch,
        reference: TokenScores | None,
        paired: bool,
        log_probs: LogProbs,
        before: running.Running | None = None,
    ) -> tuple[Array, Means]:
        scores, means = scores_of(log_probs, batch, paired, reference)
        scores = replace(scores, before=before)
        terms = objective.terms(scores)
        if before is not None and (kept := objective.kept(scores)) is not None:
            means |= {running.NAME: metrics.in_parts(kept)}
        if log_probs.routing is not None:
            means |= load_balance.expert_metrics(*log_probs.routing)
            if balance_weight:
                balance = balance_weight * load_balance.load_balancing_loss(*log_probs.routing)
                terms = (*terms, Term(balance, log_probs.routing.tokens[0]))
        preferences = metrics.preference_metrics(scores, objective.beta, paired, method.prompts)
        if objective.uses_reward_head:  # what stands for a log-prob is the reward
            preferences = {name: mean for name, mean in preferences.items() if not name.startswith("logps/")}
        elif not objective.uses_reference:  # a reward is a log-ratio: without a reference there is none
            preferences = {name: mean for name, mean in preferences.items() if not name.startswith("rewards/")}
        return total(terms), {"loss": metrics.in_parts(*terms), **means, **preferences}

    return loss
