import math

import numpy as np
import pytest

from rpo_jax.objectives import losses
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
        objective = laws.named("odpo", beta=BETA, odpo_alpha=ALPHA, odpo_scale=scale)
        score = chosen[1], rejected[1]
        return objective.loss(laws.scores_of(chosen[0], rejected[0], weights, mask, score=score))

    def expected(chosen, rejected, weights, mask, _):
        return equation(chosen, rejected, weights, mask, scale)

    laws.check_law(loss, expected, lambda rng, size: (rng.normal(0, 5, size), rng.normal(0, 1, size)))


def test_without_an_offset_it_is_dpo():
    rng = np.random.default_rng(0)
    chosen, rejected, scored = (rng.normal(size=4).astype(np.float32) for _ in range(3))
    weights = np.eye(4, dtype=np.float32)
    scores = laws.scores_of(chosen, rejected, weights, None, score=(scored, -scored))
    got = laws.named("odpo", beta=BETA, odpo_alpha=0.0).loss(scores)
    np.testing.assert_array_equal(got, losses.pairwise_loss(chosen, rejected, weights, BETA))


def test_the_row_reads_the_scores():
    scores = laws.draw_scores(4, fill=np.nan)
    objective = laws.named("odpo", beta=BETA, odpo_alpha=ALPHA, odpo_scale="linear")
    sides = [
        (np.asarray(s.log_prob - s.reference_log_prob, np.float64), np.asarray(s.score, np.float64))
        for s in laws.sides_of(scores)
    ]
    expected = equation(*sides, *laws.matrix_of(scores), "linear")
    np.testing.assert_allclose(objective.loss(scores), expected, rtol=1e-5)
    assert losses.OBJECTIVES["odpo"].uses_scores
