import numpy as np

from rpo_jax.objectives import losses
from tests.objectives import laws, oracle


def equation(chosen, rejected, weights, mask, _):
    """Eq. 6 with beta 2 and gamma 0.7."""
    found = [
        oracle.minus_log_sigmoid(2 * weights[i, j] * (chosen[0][i] - rejected[0][j]) - 0.7)
        for i, j in zip(*np.nonzero(mask), strict=True)
    ]
    return sum(found) / len(found)


def test_simpo_is_its_equation():
    def loss(chosen, rejected, weights, mask):
        objective = laws.named("simpo", beta=2.0, simpo_margin=0.7)
        return objective.loss(laws.scores_of(chosen[0], rejected[0], weights, mask))

    laws.check_law(loss, equation, lambda rng, size: (rng.uniform(-3, 0, size),))


def test_the_row_divides_by_lengths_and_needs_no_reference():
    scores = laws.draw_scores(0, fill=np.nan)
    got = laws.named("simpo", beta=2.0, simpo_margin=0.7).loss(scores)
    sides = [(np.asarray(s.log_prob, np.float64) / s.num_tokens,) for s in laws.sides_of(scores)]
    np.testing.assert_allclose(got, equation(*sides, *laws.matrix_of(scores), None), rtol=1e-5)
    assert not losses.OBJECTIVES["simpo"].uses_reference


def test_its_own_defaults_are_its_authors():
    objective = losses.OBJECTIVES["simpo"]
    assert (objective.beta, objective.options()["simpo_margin"]) == (2.0, 0.5)
