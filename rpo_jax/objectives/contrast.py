"""Contrast weights: how much chosen response i is contrasted with rejected response j.

Letters: M chosen and N rejected responses of a contrast group, E embedding width, *G any leading group dimensions.
Groups are independent: weights never cross them. Embeddings are data, so weights carry no gradient to the policy.
Source of the equations: Relative Preference Optimization, arXiv 2402.10958.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Below the smaller one a weight would follow float32's rounding of the cosine (about 1e-7); at the larger one weights
# are uniform.
TEMPERATURE_BOUNDS = (1e-5, 1e3)
_BISECTIONS = 32  # more than the bits of a float32 log-temperature
# How far from the perplexity asked for a calibrated row may end: 1e-3, and beyond 100 this share of it, which two
# programs' float32 sums over thousands of entries differ by.
_TOLERANCE, _RELATIVE_TOLERANCE = 1e-3, 1e-5


def _unit(embedding: Float[Array, "*S E"]) -> Float[Array, "*S E"]:
    embedding = jnp.asarray(embedding, jnp.float32)
    square = jnp.sum(jnp.square(embedding), axis=-1, keepdims=True)
    # A zero vector is related to nothing; dividing it by 1 keeps its gradient finite.
    return embedding / jnp.sqrt(jnp.where(square > 0, square, 1.0))


def cosine(chosen_emb: Float[Array, "*G M E"], rejected_emb: Float[Array, "*G N E"]) -> Float[Array, "*G M N"]:
    """Cosine similarity of every chosen with every rejected prompt, float32.  cos_ij = e_i . e_j / (|e_i| |e_j|).

    A zero vector has similarity 0 to everything.
    """
    # Accelerators multiply float32 at reduced precision unless told otherwise; a small temperature magnifies that.
    products = jnp.einsum("...me,...ne->...mn", _unit(chosen_emb), _unit(rejected_emb), precision="highest")
    return jnp.clip(products, -1.0, 1.0)


def cosine_distance(chosen_emb: Float[Array, "*G M E"], rejected_emb: Float[Array, "*G N E"]) -> Float[Array, "*G M N"]:
    """Cosine distance, 0 to 2.  d_ij = 1 - cos_ij.  Source: Appendix G, line 32; Eq. 10 prints cos and means this."""
    return 1.0 - cosine(chosen_emb, rejected_emb)


def valid_entries(
    chosen_valid: Bool[Array, "*G M"],
    rejected_valid: Bool[Array, "*G N"],
    chosen_prompt_id: Int[Array, "*G M"],
    rejected_prompt_id: Int[Array, "*G N"],
    chosen_text_id: Int[Array, "*G M"],
    rejected_text_id: Int[Array, "*G N"],
) -> Bool[Array, "*G M N"]:
    """Which entries of the contrast matrix count: both responses exist, and they are not the same text.

    Contrasts across identical prompts are the method, so they stay; only the same text to the same prompt is left
    out, because it would contrast a response with itself.
    """
    same_prompt = chosen_prompt_id[..., :, None] == rejected_prompt_id[..., None, :]
    same_text = chosen_text_id[..., :, None] == rejected_text_id[..., None, :]
    return chosen_valid[..., :, None] & rejected_valid[..., None, :] & ~(same_prompt & same_text)


def _softmax(
    distance: Float[Array, "*G M N"], temperature: Float[Array, "*G M 1"] | float, mask: Bool[Array, "*G M N"]
) -> tuple[Float[Array, "*G M N"], Float[Array, "*G M"], Float[Array, "*G M"]]:
    """Weights softmax_j(-d_ij / tau_i) over valid j, and the two parts S and X of their perplexity S exp(X).

    With excess_j = (d_ij - min_j d_ij) / tau_i: S = sum_j exp(-excess_j) and X = sum_j w_j excess_j. All are 0 in a
    row without valid entries.
    """
    # Distances beyond the row's nearest: exp never overflows, and its sum is at least 1 where anything is valid.
    nearest = jnp.min(jnp.where(mask, distance, jnp.inf), axis=-1, keepdims=True)
    excess = jnp.where(mask, distance - jnp.where(mask, nearest, 0.0), 0.0) / temperature
    # Normalise over valid columns only: a padded one would steal weight from real ones.
    unnormalised = jnp.where(mask, jnp.exp(-excess), 0.0)
    total = jnp.sum(unnormalised, axis=-1, keepdims=True)
    weights = unnormalised / jnp.where(total == 0, 1.0, total)
    # It would be inf * 0 where exp underflows.
    expected_excess = jnp.sum(weights * jnp.where(weights > 0, excess, 0.0), axis=-1)
    return weights, total[..., 0], expected_excess


def _log_ratio_to(
    target: Float[Array, "..."] | float, total: Float[Array, "..."], expected_excess: Float[Array, "..."]
) -> Float[Array, "..."]:
    """log(S exp(X) / target): S is divided first, because log S would be rounded to more than 1e-3 of thousands."""
    return jnp.log(jnp.where(total == 0, target, total) / target) + expected_excess


def _row_temperature(temperature: Float[Array, "..."] | float, rank: int) -> Float[Array, "..."]:
    """A scalar, one value per row [*G, M], or [*G, M, 1], as something that divides [*G, M, N]."""
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature={temperature} must be greater than 0.")
    temperature = jnp.asarray(temperature, jnp.float32)
    return temperature[..., None] if temperature.ndim == rank - 1 else temperature


def embedding_weights(
    chosen_emb: Float[Array, "*G M E"],
    rejected_emb: Float[Array, "*G N E"],
    temperature: Float[Array, "..."] | float = 0.5,
    mask: Bool[Array, "*G M N"] | None = None,
) -> Float[Array, "*G M N"]:
    """Contrast weights by relatedness of the prompts.  w_ij = softmax over valid j of -d_ij / tau.  Eqs. 10 and 11.

    A row sums to 1 over its valid entries; invalid entries, and rows with no valid one, are 0.

    Args:
        temperature: tau, in units of cosine distance; a scalar, or one per row, [*G, M] or [*G, M, 1].
        mask: valid entries; all of them where not given.

    Raises:
        ValueError: a temperature that is not positive.
    """
    distance = cosine_distance(chosen_emb, rejected_emb)
    mask = jnp.ones(distance.shape, bool) if mask is None else mask
    return _softmax(distance, _row_temperature(temperature, distance.ndim), mask)[0]


def calibrated_temperature(
    distance: Float[Array, "*G M N"], mask: Bool[Array, "*G M N"] | None, perplexity: float
) -> Float[Array, "*G M"]:
    """Each row's temperature tau_i at which its weights have the given perplexity.  exp(H(w_i)) = perplexity.

    Source: van der Maaten & Hinton 2008 (t-SNE), for the bisection; entropy never falls as tau rises. A row that
    cannot reach it falls back on the nearest that it can, at one of TEMPERATURE_BOUNDS: with fewer valid entries than
    wanted on all of them alike, with more than that tied for the nearest on the tied ones alike.

    Raises:
        ValueError: a perplexity below 1.
    """
    if perplexity < 1:
        raise ValueError(f"perplexity={perplexity} must be at least 1: a row has that many contrasts.")
    mask = jnp.ones(distance.shape, bool) if mask is None else mask
    # Not above what the row can have: rounding would decide whether it gets there.
    target = jnp.clip(jnp.sum(mask, axis=-1).astype(jnp.float32), 1.0, perplexity)
    low, high = (jnp.full(distance.shape[:-1], jnp.log(bound), jnp.float32) for bound in TEMPERATURE_BOUNDS)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        _, *parts = _softmax(distance, jnp.exp(middle)[..., None], mask)
        too_flat = _log_ratio_to(target, *parts) > 0
        return jnp.where(too_flat, low, middle), jnp.where(too_flat, middle, high)

    low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, (low, high))
    return jnp.exp((low + high) / 2)


def row_perplexity(weights: Float[Array, "*G M N"], mask: Bool[Array, "*G M N"]) -> Float[Array, "*G M"]:
    """Effective number of contrasts of each row.  exp(-sum_j p_ij log p_ij), p the row's weights over their sum.

    Between 1 and the row's number of valid entries; 0 for a row without weight.
    """
    weights = jnp.where(mask, weights, 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    share = weights / jnp.where(total == 0, 1.0, total)
    entropy = -jnp.sum(share * jnp.log(jnp.where(share > 0, share, 1.0)), axis=-1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0.0)


def uniform_weights(mask: Bool[Array, "*G M N"]) -> Float[Array, "*G M N"]:
    """The same weight for every valid entry of a row.  w_ij = 1 / N, N the row's valid entries.  Section 3.2."""
    return mask / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1).astype(jnp.float32)


def _diagonal(mask: Bool[Array, "*G M M"], weighting: str) -> Bool[Array, "M M"]:
    rows, columns = mask.shape[-2:]
    if rows != columns:
        raise ValueError(
            f"{weighting} weights need paired data, one rejected response for each chosen one, but the matrix is "
            f"{rows} by {columns}; use embedding or uniform weights."
        )
    return jnp.eye(rows, dtype=bool)


def diagonal_weights(
    m: int, alpha: float = 0.8, mask: Bool[Array, "*G B M"] | None = None, is_own_pair: Bool[Array, "B M"] | None = None
) -> Float[Array, "*G B M"]:
    """Emphasis on a pair's own entry.  w_ij = alpha if i = j, else (1 - alpha) / (M - 1).  Eq. 13.

    With a mask, M - 1 is the number of the row's other valid entries, so that they share 1 - alpha. A row without
    others (M = 1) keeps alpha on the diagonal, as printed: it is DPO with beta times alpha.

    Args:
        m: pairs in a group.
        alpha: weight of the diagonal, 0 to 1.
        mask: valid entries, [*G, m, m]; all of them where not given.
        is_own_pair: which entries are on the diagonal, where the mask is that of some rows only.

    Raises:
        ValueError: a mask that is not m by m.
    """
    mask = jnp.ones((m, m), bool) if mask is None else mask
    is_own_pair = _diagonal(mask, "diagonal") if is_own_pair is None else is_own_pair
    if is_own_pair.shape[-1] != m:
        raise ValueError(f"diagonal weights for m={m} pairs got a mask of {mask.shape[-2]} by {mask.shape[-1]}.")
    others = jnp.sum(mask & ~is_own_pair, axis=-1, keepdims=True)
    weights = jnp.where(is_own_pair, alpha, (1.0 - alpha) / jnp.maximum(others, 1))
    return jnp.where(mask, weights, 0.0).astype(jnp.float32)


def pair_mask(mask: Bool[Array, "*G M M"]) -> Bool[Array, "*G M M"]:
    """The valid entries of pair-only contrast: a pair's own, and no other.  This is what makes the loss DPO's."""
    return mask & _diagonal(mask, "pair")


def pair_weights(mask: Bool[Array, "*G M M"]) -> Float[Array, "*G M M"]:
    """Weight 1 for a pair's own entry, 0 elsewhere; use it together with `pair_mask`."""
    return pair_mask(mask).astype(jnp.float32)


class ContrastWeights(NamedTuple):
    """Weights of a contrast matrix or of some of its rows, its valid entries, and each row's tau where there is one.

    perplexity_error: each row's perplexity minus the one asked for, 0 where it was reached: below 0 a row has fewer
    valid entries, above 0 more that are tied for its nearest. None where no perplexity was asked for.
    """

    weights: Float[Array, "*G M N"]
    mask: Bool[Array, "*G M N"]
    temperature: Float[Array, "*G M"] | None = None
    perplexity_error: Float[Array, "*G M"] | None = None


def _by_embedding(
    chosen_emb: Float[Array, "*G M E"],
    rejected_emb: Float[Array, "*G N E"],
    mask: Bool[Array, "*G M N"],
    temperature: Float[Array, "*G M"] | float | None,
    perplexity: float | None,
) -> ContrastWeights:
    if (temperature is None) == (perplexity is None):
        raise ValueError(
            f"embedding weights need a temperature or a perplexity to solve one for, and not both; "
            f"got temperature={temperature}, perplexity={perplexity}."
        )
    distance = cosine_distance(chosen_emb, rejected_emb)
    if perplexity is None:
        assert temperature is not None
        row_temperature = _row_temperature(temperature, distance.ndim)
    else:
        row_temperature = calibrated_temperature(distance, mask, perplexity)[..., None]
    weights, *parts = _softmax(distance, row_temperature, mask)
    row_temperature = jnp.broadcast_to(row_temperature, (*distance.shape[:-1], 1))[..., 0]
    if perplexity is None:
        return ContrastWeights(weights, mask, row_temperature)
    error = perplexity * jnp.expm1(_log_ratio_to(perplexity, *parts))
    missed = jnp.any(mask, axis=-1) & (jnp.abs(error) > max(_TOLERANCE, _RELATIVE_TOLERANCE * perplexity))
    return ContrastWeights(weights, mask, row_temperature, jnp.where(missed, error, 0.0))


class Weighting(NamedTuple):
    """What one way to fill the contrast matrix asks of the data."""

    needs_embeddings: bool = False
    needs_pairs: bool = False


WEIGHTS = {
    "embedding": Weighting(needs_embeddings=True),
    "uniform": Weighting(),
    "diagonal": Weighting(needs_pairs=True),
    "pair": Weighting(needs_pairs=True),
}


def make_weights(
    kind: str,
    chosen_emb: Float[Array, "*G M E"],
    rejected_emb: Float[Array, "*G N E"],
    mask: Bool[Array, "*G M N"],
    *,
    temperature: Float[Array, "*G M"] | float | None,
    perplexity: float | None,
    alpha: float,
    is_own_pair: Bool[Array, "M N"] | None = None,
) -> ContrastWeights:
    """The contrast matrix of a weighting by name: its weights, valid entries and temperatures.

    Args:
        kind: a name in WEIGHTS.
        chosen_emb, rejected_emb: read by `embedding` only; any width, 0 included, will do for the others.
        temperature: fixed tau of `embedding`; None to solve it for `perplexity`.
        perplexity: effective contrasts per row of `embedding`; None with a fixed temperature.
        alpha: weight on the diagonal, for `diagonal`.
        is_own_pair: which entries are a row's own pair, where the rows are not all of the matrix.

    Raises:
        ValueError: an unknown kind, both or neither of temperature and perplexity, or pairs where there are none.
    """
    if kind == "embedding":
        return _by_embedding(chosen_emb, rejected_emb, mask, temperature, perplexity)
    if kind == "uniform":
        return ContrastWeights(uniform_weights(mask), mask)
    if kind == "diagonal":
        return ContrastWeights(diagonal_weights(mask.shape[-1], alpha, mask, is_own_pair), mask)
    if kind == "pair":
        return ContrastWeights(pair_weights(mask), pair_mask(mask))
    raise ValueError(f"unknown contrast weights {kind!r}; use one of {', '.join(WEIGHTS)}.")
