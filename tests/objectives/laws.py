"""What every loss on the contrast matrix owes: its equation, its derivatives, and nothing of what is not valid.

The equation is a test's own function in float64 NumPy with plain loops; derivatives are its central differences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rpo_jax.objectives import contrast
from rpo_jax.objectives.matrix import WholeMatrix
from rpo_jax.objectives.methods import OBJECTIVES
from rpo_jax.objectives.scores import Responses, Scores
from tests.objectives import oracle

M, N = 4, 5
STEP = 1e-5

Values = tuple[np.ndarray, ...]  # of one side's responses


def weightings(rng: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Weights and valid entries, the last row and column empty."""
    mask = rng.random((M, N)) > 0.3
    mask[np.diag_indices(M)] = True
    mask[-1], mask[:, -1] = False, False
    emb = rng.normal(size=(M, 8)), rng.normal(size=(N, 8))
    own = np.eye(M, N, dtype=bool) & mask
    return {
        "embedding": (oracle.embedding_weights(*emb, 0.5, mask), mask),
        "uniform": (oracle.uniform_weights(mask), mask),
        "pair": (own.astype(float), own),
    }


def check_law(
    loss: Callable[[Any, Any, Any, Any], Any],
    equation: Callable[[Values, Values, np.ndarray, np.ndarray, tuple[Values, Values]], float],
    draw: Callable[[np.random.Generator, int], Values],
    *,
    rtol: float = 2e-5,
) -> None:
    """Value and derivatives by the first of each side's values, on every weighting; then masked slots.

    Args:
        loss: of chosen and rejected values, weights and mask.
        equation: the same, and the values once more for terms without gradient.
        draw: random values of that many responses.
    """
    compiled = jax.jit(jax.value_and_grad(lambda c, r, *rest: loss(c, r, *rest), (0, 1)))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        for name, (weights, mask) in weightings(rng).items():
            chosen, rejected = (tuple(x.astype(np.float32) for x in draw(rng, size)) for size in (M, N))
            inputs = jnp.asarray(weights, jnp.float32), jnp.asarray(mask)
            value, gradients = compiled(chosen, rejected, *inputs)
            exact = tuple(tuple(x.astype(np.float64) for x in side) for side in (chosen, rejected))
            np.testing.assert_allclose(value, equation(*exact, weights, mask, exact), rtol=rtol, err_msg=name)
            expected = _differences(equation, exact, weights, mask)
            largest = max(np.abs(side).max() for side in expected)
            assert largest > 0
            for got, want in zip(gradients, expected, strict=True):
                np.testing.assert_allclose(got[0], want, rtol=1e-3, atol=1e-4 * largest, err_msg=name)
            _check_masked(compiled, chosen, rejected, inputs, (value, gradients))


def _differences(equation: Any, exact: tuple[Values, Values], weights: np.ndarray, mask: np.ndarray) -> list:
    slopes = []
    for side in (0, 1):
        slope = np.zeros(len(exact[side][0]))
        for k in range(len(slope)):
            found = []
            for sign in (1, -1):
                moved = exact[side][0].copy()
                moved[k] += sign * STEP
                point = list(exact)
                point[side] = (moved, *exact[side][1:])
                found.append(equation(*point, weights, mask, exact))
            slope[k] = (found[0] - found[1]) / (2 * STEP)
        slopes.append(slope)
    return slopes


def _check_masked(compiled: Any, chosen: Values, rejected: Values, inputs: Any, clean: Any) -> None:
    def spoilt(side: Values, garbage: float) -> Values:
        return tuple(np.concatenate([x[:-1], [garbage]]).astype(np.float32) for x in side)

    for garbage in (np.nan, np.inf, -1e30):
        dirty = compiled(spoilt(chosen, garbage), spoilt(rejected, garbage), *inputs)
        for got, want in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
            np.testing.assert_array_equal(got, want)
    nothing = compiled(spoilt(chosen, np.nan), spoilt(rejected, np.nan), inputs[0], jnp.zeros((M, N), bool))
    for leaf in jax.tree.leaves(nothing):
        np.testing.assert_array_equal(leaf, 0)
    wrong = (np.full(M, np.nan, np.float32), *chosen[1:])
    assert np.isnan(compiled(wrong, rejected, *inputs)[0]), "a NaN in a valid slot surfaces"


def named(name: str, **options: Any) -> Any:
    """The objective of that name with these options, beta 0.2 where not given."""
    return replace(OBJECTIVES[name], **{"beta": 0.2, **options})


def scores_of(chosen: Any, rejected: Any, weights: Any, mask: Any, **values: tuple[Any, Any]) -> Scores:
    """Scores of responses of one token whose log-probs and log-ratios are these, on this matrix.

    Args:
        values: what is known of chosen and rejected responses besides: other fields of Responses, or the log-ratio
            `refined` under refined prompts.
    """
    if mask is None:
        mask = jnp.ones((len(chosen), len(rejected)), bool)
    valid = {"chosen": jnp.any(mask, axis=1), "rejected": jnp.any(mask, axis=0)}
    refined = dict(zip(valid, values.pop("refined", (None, None)), strict=True))
    responses = {}
    for number, (kind, log_prob) in enumerate((("chosen", chosen), ("rejected", rejected))):
        zeros, ones = jnp.zeros(len(log_prob)), jnp.ones(len(log_prob), int)
        responses[kind] = Responses(log_prob, zeros, ones, valid[kind])
        responses[kind] = responses[kind]._replace(**{name: both[number] for name, both in values.items()})
        if refined[kind] is not None:
            responses[f"refined_{kind}"] = Responses(refined[kind], zeros, ones, valid[kind])
    return Scores(responses, WholeMatrix(jnp.asarray(weights), jnp.asarray(mask)))


def sides_of(scores: Scores) -> tuple[Responses, Responses]:
    return scores["chosen"], scores["rejected"]


def matrix_of(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Weights and valid entries."""
    assert isinstance(scores.matrix, WholeMatrix)
    return np.asarray(scores.matrix.weights), np.asarray(scores.matrix.mask)


def draw_scores(seed: int, fill: float = 0.0, size: int = 5) -> Scores:
    """Scores of so many slots a side on uniform weights, the last slot of each padded with `fill`."""
    rng = np.random.default_rng(seed)
    valid = np.arange(size) < size - 1

    def side(quality: float) -> Responses:
        log_probs = np.where(valid, rng.normal(-30, 5, (2, size)), fill).astype(np.float32)
        score = np.where(valid, rng.normal(quality, 1, size), fill).astype(np.float32)
        num_tokens = jnp.asarray(rng.integers(3, 9, size))
        return Responses(*jnp.asarray(log_probs), num_tokens, jnp.asarray(valid), score=jnp.asarray(score))

    mask = jnp.asarray(valid[:, None] & valid[None, :])
    responses = {kind: side(quality) for kind, quality in (("chosen", 1), ("rejected", 0), ("mismatched", 0))}
    return Scores(responses, WholeMatrix(contrast.uniform_weights(mask), mask))
