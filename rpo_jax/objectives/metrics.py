"""Statistics of a step or an evaluation, as sums that combine exactly over batches.

Letters: M chosen and N rejected responses of a contrast group, *G leading group dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rpo_jax.objectives.contrast import ContrastWeights, row_perplexity
from rpo_jax.objectives.objective import Term
from rpo_jax.objectives.scores import Responses, Scores, masked_mean, zero_where_invalid

KL = "kl"
_PER_BATCH = ("contrast/uncalibrated_rows", "contrast/tied_rows")  # numbers of rows, not means over rows
# Two programs round a log-prob differently: without a gap, a policy that is its own reference would have any accuracy.
TIE_NATS = 1e-4
TIE_SHARE = 1e-6  # of the largest log-prob, where that is more: answers of hundreds of tokens have hundreds of nats
RELATED_COSINE = 0.5  # the 99th percentile between random prompts of Anthropic-HH under MiniLM is 0.52


class Mean(NamedTuple):
    """A mean in two parts, so that batches of different sizes combine to the mean over all of them.

    A sum of K means, each over something else, has an entry for each.
    """

    total: Float[Array, "*K"]
    count: Float[Array, "*K"]


def combine(first: dict[str, Mean], second: dict[str, Mean]) -> dict[str, Mean]:
    """The means over both batches together."""
    return jax.tree.map(jnp.add, first, second)


def of_one_batch(means: dict[str, Mean]) -> dict[str, Mean]:
    """The sum of `contrast_metrics` over blocks of a batch's rows as those of the batch."""
    return {
        name: Mean(mean.total, jnp.ones_like(mean.count)) if name in _PER_BATCH else mean
        for name, mean in means.items()
    }


def finalize(means: dict[str, Mean]) -> dict[str, Float[Array, ""]]:
    """The means as scalars; 0 where nothing was counted."""
    # A count is a sum of weights where rows have weights: anything above 0.
    scalars = {name: jnp.sum(mean.total / jnp.where(mean.count > 0, mean.count, 1.0)) for name, mean in means.items()}
    # Here and not before batches combine: the largest of 0 and a mean is no mean.
    return {name: jnp.maximum(value, 0.0) if name == KL else value for name, value in scalars.items()}


def in_parts(*terms: Term) -> Mean:
    """The sum of these terms, each weighted by what it is a mean over."""
    counts = jnp.stack([jnp.asarray(term.count, jnp.float32) for term in terms])
    return Mean(jnp.stack([term.mean for term in terms]) * counts, counts)


def masked(x: Float[Array, "*S"] | Bool[Array, "*S"], mask: Bool[Array, "*S"]) -> Mean:
    """The mean of x over valid entries."""
    return Mean(jnp.sum(zero_where_invalid(x, mask)), jnp.sum(mask).astype(jnp.float32))


def preference_metrics(scores: Scores, beta: float, paired: bool, prompts: int | None = None) -> dict[str, Mean]:
    """How well the policy tells chosen from rejected responses.

    rewards/*: beta (log pi_policy - log pi_reference), over summed log-probs. rewards/margins is chosen minus
    rejected over same pairs, or over all couples of a group's chosen and rejected responses if unpaired.
    rewards/accuracies: share of same pairs whose chosen log-ratio is higher by more than TIE_NATS, or TIE_SHARE of the
    pair's largest log-prob; logps/accuracies the same of the policy's own log-probs; rewards/ties: share of pairs whose
    log-ratios differ by no more. Where all responses of so many `prompts` come together, one prompt after another,
    these three are of all couples of a chosen and a rejected response to one prompt; where they come neither so nor in
    pairs there are none. logps/*: summed log-probs, nats. kl: KTO's estimate, in nats, where there are mismatched
    responses; `finalize` holds it above 0. partition/variance: of the learned log Z within a batch, nats^2, over chosen
    and rejected responses. A kind that the batch does not hold has no statistics.
    """
    sides = {kind: scores[kind] for kind in ("chosen", "rejected") if kind in scores.responses}
    rewards = {name: beta * side.log_ratio() for name, side in sides.items()}
    metrics = {}
    for name, side in sides.items():
        metrics[f"rewards/{name}"] = masked(rewards[name], side.valid)
        metrics[f"logps/{name}"] = masked(side.log_prob, side.valid)
    if len(sides) == 2:
        metrics |= _comparisons(scores, rewards, paired, prompts)
    if "mismatched" in scores.responses:
        metrics[KL] = masked(scores["mismatched"].log_ratio(), scores["mismatched"].valid)
    return metrics


def _comparisons(
    scores: Scores, rewards: dict[str, Float[Array, "*G S"]], paired: bool, prompts: int | None
) -> dict[str, Mean]:
    """What `preference_metrics` says of chosen and rejected responses together."""
    sides = chosen, rejected = scores["chosen"], scores["rejected"]
    metrics = {}
    if paired:
        both = chosen.valid & rejected.valid
        metrics["rewards/margins"] = masked(rewards["chosen"] - rewards["rejected"], both)
        metrics |= _accuracies(chosen, rejected)
    else:
        num_chosen, num_rejected = (jnp.sum(side.valid, axis=-1) for side in sides)
        total = jnp.sum(rewards["chosen"], axis=-1) * num_rejected - jnp.sum(rewards["rejected"], axis=-1) * num_chosen
        metrics["rewards/margins"] = Mean(jnp.sum(total), jnp.sum(num_chosen * num_rejected).astype(jnp.float32))
    if not paired and prompts is not None:
        metrics |= _accuracies(
            jax.tree.map(lambda x: x.reshape(prompts, -1, 1), chosen),
            jax.tree.map(lambda x: x.reshape(prompts, 1, -1), rejected),
        )
    if chosen.log_partition is not None and rejected.log_partition is not None:
        valid = jnp.concatenate([side.valid.ravel() for side in sides])
        value = jnp.concatenate([chosen.log_partition.ravel(), rejected.log_partition.ravel()])
        metrics["partition/variance"] = masked(jnp.square(value - masked_mean(value, valid)), valid)
    return metrics


def _accuracies(chosen: Responses, rejected: Responses) -> dict[str, Mean]:
    """How often the chosen one of a couple is ahead, by log-ratios and by log-probs; their slots make couples."""
    both = chosen.valid & rejected.valid
    margin = chosen.log_ratio() - rejected.log_ratio()
    largest = jnp.maximum(jnp.abs(chosen.log_prob), jnp.abs(rejected.log_prob))
    tie = jnp.maximum(TIE_NATS, TIE_SHARE * largest)
    return {
        "rewards/accuracies": masked(margin > tie, both),
        "rewards/ties": masked(jnp.abs(margin) <= tie, both),
        "logps/accuracies": masked(chosen.log_prob - rejected.log_prob > tie, both),
    }


def contrast_metrics(
    matrix: ContrastWeights,
    cosine: Float[Array, "*G M N"] | None,
    chosen_prompt_id: Int[Array, "*G M"],
    rejected_prompt_id: Int[Array, "*G N"],
    *,
    paired: bool,
    is_own_pair: Bool[Array, "M N"] | None = None,
) -> dict[str, Mean]:
    """What the contrast matrix contrasts; means over the rows with a valid entry.

    contrast/diagonal_weight: weight on the row's own pair, if paired. contrast/perplexity: effective contrasts.
    contrast/temperature: tau, where the weights have one, over the rows that reach the perplexity asked for.
    contrast/uncalibrated_rows: where one was asked for, how many rows of a batch do not reach it; contrast/tied_rows:
    how many of them because more entries are tied for the nearest, the others have fewer valid ones.
    contrast/related_weight: weight on other prompts (another prompt id) with a cosine similarity above
    RELATED_COSINE, where prompts are embedded.
    """
    mask, error = matrix.mask, matrix.perplexity_error
    rows = jnp.any(mask, axis=-1)
    weights = zero_where_invalid(matrix.weights, mask)
    metrics = {"contrast/perplexity": masked(row_perplexity(weights, mask), rows)}
    if paired:
        is_own_pair = jnp.eye(*mask.shape[-2:], dtype=bool) if is_own_pair is None else is_own_pair
        own_weight = jnp.sum(zero_where_invalid(weights, is_own_pair & mask), axis=-1)
        metrics["contrast/diagonal_weight"] = masked(own_weight, rows)
    if matrix.temperature is not None:
        # A row that cannot be calibrated has its temperature at a bound, which would outweigh all others'.
        metrics["contrast/temperature"] = masked(matrix.temperature, rows if error is None else rows & (error == 0))
    if error is not None:
        one_batch = jnp.ones((), jnp.float32)
        for name, missed in (("uncalibrated_rows", error != 0), ("tied_rows", error > 0)):
            metrics[f"contrast/{name}"] = Mean(jnp.sum(missed & rows).astype(jnp.float32), one_batch)
    if cosine is not None:
        other_prompt = chosen_prompt_id[..., :, None] != rejected_prompt_id[..., None, :]
        related = mask & other_prompt & (cosine > RELATED_COSINE)
        metrics["contrast/related_weight"] = masked(jnp.sum(zero_where_invalid(weights, related), axis=-1), rows)
    return metrics
