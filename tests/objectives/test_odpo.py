import math

import numpy as np
import pytest

from rpo_jax.objectives import losses
from rpo_jax.objectives.methods.odpo import odpo_loss
from tests.objectives import laws, oracle

BETA, ALPHA = 0.3, 0.7


def equation(chosen, rejected, weights, mask, scale):
    """Values are log-ratios and scores."""
    total = 0.0
    for i, j in zip(*np.nonzero(mask), strict=True):
        better = chosen[1][i] - rejected[1][j]
        if scale == "log" and better <= 0:
            continue  # an offset of minus infinity
        offset = ALPHA * (math.log(better) if scale == "log" else better)
        total += oracle.minus_log_sigmoid(BETA * weights[i, j] * (chosen[0][i] - rejected[0][j]) - offset)
    return total / mask.sum()


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_odpo_is_its_equation(scale):
    def loss(chosen, rejected, weights, mask):
        return odpo_loss(chosen[0], rejected[0], chosen[1], rejected[1], weights, BETA, ALPHA, scale, mask)

    def expected(chosen, rejected, weights, mask, _):
        return equation(chosen, rejected, weights, mask, scale)

    laws.check_law(loss, expected, lambda rng, size: (rng.normal(0, 5, size), rng.normal(0, 1, size)))


def test_without_an_offset_it_is_dpo():
    rng = np.random.default_rng(0)
    chosen, rejected, scored = (rng.normal(size=4).astype(np.float32) for _ in range(3))
    weights = np.eye(4, dtype=np.float32)
    got = odpo_loss(chosen, rejected, scored, -scored, weights, BETA, alpha=0.0)
    np.testing.assert_array_equal(got, losses.pairwise_loss(chosen, rejected, weights, BETA))


def test_the_row_reads_the_scores():
    scores = laws.draw_scores(4, fill=np.nan)
    options = laws.settings(beta=BETA, odpo_alpha=ALPHA, odpo_scale="linear")
    sides = [
        (np.asarray(s.log_prob - s.reference_log_prob, np.float64), np.asarray(s.score, np.float64))
        for s in (scores.chosen, scores.rejected)
    ]
    expected = equation(*sides, np.asarray(scores.weights), np.asarray(scores.mask), "linear")
    np.testing.assert_allclose(losses.OBJECTIVES["odpo"].compute(scores, options), expected, rtol=1e-5)
    assert losses.OBJECTIVES["odpo"].uses_scores
