import jax
import jax.numpy as jnp
import numpy as np

from tests.objectives import laws, oracle


def equation(chosen, rejected, weights, mask, _):
    found = [
        oracle.minus_log_sigmoid(0.2 * weights[i, j] * (chosen[0][i] - max(0.0, rejected[0][j])))
        for i, j in zip(*np.nonzero(mask), strict=True)
    ]
    return sum(found) / len(found)


def test_minor_dpo_is_its_equation():
    def loss(chosen, rejected, weights, mask):
        return laws.named("minor_dpo").loss(laws.scores_of(chosen[0], rejected[0], weights, mask))

    laws.check_law(loss, equation, lambda rng, size: (rng.normal(0, 5, size),))


def test_a_rejected_response_is_pushed_down_as_by_dpo_until_it_is_below_the_reference():
    def slope(name, rejected):
        def loss(rejected):
            return laws.named(name).loss(laws.scores_of(jnp.zeros(1), rejected, jnp.ones((1, 1)), None))

        return jax.grad(loss)(jnp.float32([rejected]))[0]

    for rejected in (0.0, 3.0):
        np.testing.assert_allclose(slope("minor_dpo", rejected), slope("dpo", rejected), rtol=1e-6)
    assert slope("minor_dpo", -0.1) == 0


def test_the_row_computes_it():
    scores = laws.draw_scores(2, fill=np.nan)
    got = laws.named("minor_dpo").loss(scores)
    sides = [(np.asarray(s.log_ratio(), np.float64),) for s in laws.sides_of(scores)]
    np.testing.assert_allclose(got, equation(*sides, *laws.matrix_of(scores), None), rtol=1e-5)
