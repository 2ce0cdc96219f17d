import jax
import jax.numpy as jnp
import numpy as np

from rpo_jax.objectives import losses
from rpo_jax.objectives.methods.minor_dpo import minor_dpo_loss
from tests.objectives import laws, oracle


def equation(chosen, rejected, weights, mask, _):
    found = [
        oracle.minus_log_sigmoid(0.2 * weights[i, j] * (chosen[0][i] - max(0.0, rejected[0][j])))
        for i, j in zip(*np.nonzero(mask), strict=True)
    ]
    return sum(found) / len(found)


def test_minor_dpo_is_its_equation():
    def loss(chosen, rejected, weights, mask):
        return minor_dpo_loss(chosen[0], rejected[0], weights, 0.2, mask)

    laws.check_law(loss, equation, lambda rng, size: (rng.normal(0, 5, size),))


def test_a_rejected_response_is_pushed_down_as_by_dpo_until_it_is_below_the_reference():
    def slope(loss, rejected):
        return jax.grad(loss, 1)(jnp.zeros(1), jnp.float32([rejected]), jnp.ones((1, 1)), 0.2)[0]

    for rejected in (0.0, 3.0):
        np.testing.assert_allclose(slope(minor_dpo_loss, rejected), slope(losses.pairwise_loss, rejected), rtol=1e-6)
    assert slope(minor_dpo_loss, -0.1) == 0


def test_the_row_computes_it():
    scores = laws.draw_scores(2, fill=np.nan)
    got = losses.OBJECTIVES["minor_dpo"].compute(scores, laws.settings())
    sides = [(np.asarray(s.log_ratio(), np.float64),) for s in (scores.chosen, scores.rejected)]
    np.testing.assert_allclose(got, equation(*sides, np.asarray(scores.weights), scores.mask, None), rtol=1e-5)
