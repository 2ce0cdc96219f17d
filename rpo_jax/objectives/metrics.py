"""Statistics of a step or an evaluation, as sums that combine exactly over batches.

Letters: M chosen and N rejected responses of a contrast group, *G leading group dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rpo_jax.objectives.contrast import row_perplexity
from rpo_jax.objectives.losses import kl_estimate
from rpo_jax.objectives.scores import Scores, keep, masked_mean

_PER_BATCH = ("contrast/uncalibrated_rows", "contrast/tied_rows")  # numbers of rows, not means over rows
# Two programs round one log-prob to 1e-6 and more of its hundreds of nats: without a gap, a policy that is its own
# reference would have any accuracy.
TIE_NATS = 1e-4
RELATED_COSINE = 0.5  # the 99th percentile between random prompts of Anthropic-HH under MiniLM is 0.52


class Mean(NamedTuple):
    """A mean in two parts, so that batches of different sizes combine to the mean over all of them."""

    total: Float[Array, ""]
    count: Float[Array, ""]


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
    return {name: mean.total / jnp.maximum(mean.count, 1.0) for name, mean in means.items()}


def masked(x: Float[Array, "*S"] | Bool[Array, "*S"], mask: Bool[Array, "*S"]) -> Mean:
    """The mean of x over valid entries."""
    return Mean(jnp.sum(keep(x, mask)), jnp.sum(mask).astype(jnp.float32))


def preference_metrics(scores: Scores, beta: float, paired: bool) -> dict[str, Mean]:
    """How well the policy tells chosen from rejected responses.

    rewards/*: beta (log pi_policy - log pi_reference), over summed log-probs. rewards/margins is chosen minus
    rejected over same pairs, or over all couples of a group's chosen and rejected responses if unpaired.
    rewards/accuracies: share of same pairs whose chosen log-ratio is higher by more than TIE_NATS; logps/accuracies
    the same of the policy's own log-probs; both only if paired. logps/*: summed log-probs, nats. kl: KTO's estimate,
    in nats, where there are mismatched responses. partition/variance: of the learned log Z within a batch, nats^2,
    over chosen and rejected responses. A side without slots has no statistics.
    """
    sides = {"chosen": scores.chosen, "rejected": scores.rejected}
    rewards = {name: beta * side.log_ratio() for name, side in sides.items()}
    metrics = {}
    for name, side in sides.items():
        if side.valid.size:
            metrics[f"rewards/{name}"] = masked(rewards[name], side.valid)
            metrics[f"logps/{name}"] = masked(side.log_prob, side.valid)
    if len(metrics) == 4 and paired:
        both = scores.chosen.valid & scores.rejected.valid
        margin = scores.chosen.log_ratio() - scores.rejected.log_ratio()
        metrics["rewards/margins"] = masked(rewards["chosen"] - rewards["rejected"], both)
        metrics["rewards/accuracies"] = masked(margin > TIE_NATS, both)
        metrics["logps/accuracies"] = masked(scores.chosen.log_prob - scores.rejected.log_prob > TIE_NATS, both)
    elif len(metrics) == 4:
        num_chosen, num_rejected = (jnp.sum(side.valid, axis=-1) for side in sides.values())
        total = jnp.sum(rewards["chosen"], axis=-1) * num_rejected - jnp.sum(rewards["rejected"], axis=-1) * num_chosen
        metrics["rewards/margins"] = Mean(jnp.sum(total), jnp.sum(num_chosen * num_rejected).astype(jnp.float32))
    if scores.chosen.log_partition is not None and scores.rejected.log_partition is not None:
        valid = jnp.concatenate([side.valid.ravel() for side in sides.values()])
        value = jnp.concatenate([scores.chosen.log_partition.ravel(), scores.rejected.log_partition.ravel()])
        metrics["partition/variance"] = masked(jnp.square(value - masked_mean(value, valid)), valid)
    if scores.mismatched.valid.size:
        valid = scores.mismatched.valid
        count = jnp.sum(valid).astype(jnp.float32)
        metrics["kl"] = Mean(kl_estimate(scores.mismatched.log_ratio(), valid) * count, count)
    return metrics


def contrast_metrics(
    weights: Float[Array, "*G M N"],
    mask: Bool[Array, "*G M N"],
    temperature: Float[Array, "*G M"] | None,
    missed_by: Float[Array, "*G M"] | None,
    cosine: Float[Array, "*G M N"] | None,
    chosen_prompt_id: Int[Array, "*G M"],
    rejected_prompt_id: Int[Array, "*G N"],
    *,
    paired: bool,
    own: Bool[Array, "M N"] | None = None,
) -> dict[str, Mean]:
    """What the contrast matrix contrasts; means over the rows with a valid entry.

    contrast/diagonal_weight: weight on the row's own pair, if paired. contrast/perplexity: effective contrasts.
    contrast/temperature: tau, where the weights have one, over the rows that reach the perplexity asked for.
    contrast/uncalibrated_rows: where one was asked for, how many rows of a batch do not reach it; contrast/tied_rows:
    how many of them because more entries are tied for the nearest, the others have fewer valid ones.
    contrast/related_weight: weight on other prompts (another prompt id) with a cosine similarity above
    RELATED_COSINE, where prompts are embedded.
    """
    rows = jnp.any(mask, axis=-1)
    weights = keep(weights, mask)
    metrics = {"contrast/perplexity": masked(row_perplexity(weights, mask), rows)}
    if paired:
        own = jnp.eye(*mask.shape[-2:], dtype=bool) if own is None else own
        metrics["contrast/diagonal_weight"] = masked(jnp.sum(keep(weights, own & mask), axis=-1), rows)
    if temperature is not None:
        # A row that cannot be calibrated has its temperature at a bound, which would outweigh all others'.
        metrics["contrast/temperature"] = masked(temperature, rows if missed_by is None else rows & (missed_by == 0))
    if missed_by is not None:
        one_batch = jnp.ones((), jnp.float32)
        for name, missed in (("uncalibrated_rows", missed_by != 0), ("tied_rows", missed_by > 0)):
            metrics[f"contrast/{name}"] = Mean(jnp.sum(missed & rows).astype(jnp.float32), one_batch)
    if cosine is not None:
        other_prompt = chosen_prompt_id[..., :, None] != rejected_prompt_id[..., None, :]
        related = mask & other_prompt & (cosine > RELATED_COSINE)
        metrics["contrast/related_weight"] = masked(jnp.sum(keep(weights, related), axis=-1), rows)
    return metrics
