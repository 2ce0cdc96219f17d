from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax.objectives import losses
from tests.objectives import laws, oracle

BETA, LAMBDA = 0.3, 0.6
NAMES = {"sr_dpo": "logistic", "sr_ipo": "squared"}


def equation(chosen, rejected, weights, mask, fixed, link):
    """Values are log-ratios and refined ones; of these the loss has no derivative."""
    total = 0.0
    for i, j in zip(*np.nonzero(mask), strict=True):
        delta = BETA * (fixed[0][1][i] - fixed[1][1][j])
        rho = chosen[0][i] - rejected[0][j]
        if link == "logistic":
            total += oracle.minus_log_sigmoid(weights[i, j] * (BETA * rho - LAMBDA * delta))
        else:
            total += (weights[i, j] * (rho - LAMBDA * delta) - 1 / (2 * BETA)) ** 2
    return total / mask.sum()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_its_equation(name):
    def loss(chosen, rejected, weights, mask):
        scores = laws.scores_of(chosen[0], rejected[0], weights, mask, refined=(chosen[1], rejected[1]))
        return laws.named(name, beta=BETA, sr_lambda=LAMBDA).loss(scores)

    def expected(*values):
        return equation(*values, NAMES[name])

    laws.check_law(loss, expected, lambda rng, size: (rng.normal(0, 5, size), rng.normal(0, 5, size)))


@pytest.mark.parametrize("name", NAMES)
def test_the_refinement_has_no_gradient_and_without_it_the_loss_is_dpo_or_ipo(name):
    rng = np.random.default_rng(0)
    chosen, rejected, refined = (rng.normal(size=4).astype(np.float32) for _ in range(3))

    def loss(chosen_refined, rejected_refined, lam):
        refined = chosen_refined, rejected_refined
        scores = laws.scores_of(chosen, rejected, jnp.eye(4), jnp.eye(4, dtype=bool), refined=refined)
        return laws.named(name, beta=BETA, sr_lambda=lam).loss(scores)

    for slope in jax.grad(loss, (0, 1))(refined, -refined, LAMBDA):
        np.testing.assert_array_equal(slope, 0)
    plain = losses.pairwise_loss(chosen, rejected, jnp.eye(4), BETA, NAMES[name], jnp.eye(4, dtype=bool))
    np.testing.assert_array_equal(loss(refined, -refined, 0.0), plain)
    assert abs(loss(refined, -refined, LAMBDA) - plain) > 0.01


@pytest.mark.parametrize("name", ["sr_dpo", "sr_ipo"])
def test_the_rows_read_the_refined_responses(name):
    scores = laws.draw_scores(3, fill=np.nan)
    other = laws.draw_scores(5, fill=np.nan)
    refined = {"refined_chosen": other["chosen"], "refined_rejected": other["rejected"]}
    scores = replace(scores, responses={**scores.responses, **refined})
    sides = [
        tuple(np.asarray(s.log_ratio(), np.float64) for s in both)
        for both in ((scores[kind], other[kind]) for kind in ("chosen", "rejected"))
    ]
    expected = equation(*sides, *laws.matrix_of(scores), sides, NAMES[name])
    np.testing.assert_allclose(laws.named(name, beta=BETA, sr_lambda=LAMBDA).loss(scores), expected, rtol=1e-5)
    assert losses.OBJECTIVES[name].responses == ("chosen", "rejected", "refined_chosen", "refined_rejected")
