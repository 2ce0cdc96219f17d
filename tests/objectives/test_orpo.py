import math

import jax
import jax.numpy as jnp
import numpy as np

from rpo_jax.objectives.methods.orpo import log_odds
from tests.objectives import laws, oracle


def equation(chosen, rejected, weights, mask, _):
    """Eq. 7."""

    def odds(log_prob):
        return math.exp(log_prob) / (1 - math.exp(log_prob))

    found = [
        oracle.minus_log_sigmoid(weights[i, j] * math.log(odds(chosen[0][i]) / odds(rejected[0][j])))
        for i, j in zip(*np.nonzero(mask), strict=True)
    ]
    return sum(found) / len(found)


def test_the_odds_ratios_loss_is_its_equation():
    def loss(chosen, rejected, weights, mask):
        return laws.named("orpo").odds_ratio_loss(laws.scores_of(chosen[0], rejected[0], weights, mask))

    laws.check_law(loss, equation, lambda rng, size: (rng.uniform(-4, -0.1, size),))


def test_odds_stay_finite_at_certainty_and_keep_their_digits_near_it():
    value, slope = jax.vmap(jax.value_and_grad(log_odds))(jnp.float32([0.0, -1e-4, -1.0, -50.0]))
    assert np.isfinite(value).all()
    assert np.isfinite(slope).all()
    exact = [x - math.log(-math.expm1(x)) for x in (float(np.float32(-1e-4)), -1.0, -50.0)]
    np.testing.assert_allclose(value[1:], exact, rtol=1e-6)


def test_the_row_is_supervised_fine_tuning_and_the_penalty():
    scores = laws.draw_scores(1, fill=np.nan)
    got = laws.named("orpo", orpo_weight=0.3).total_loss(scores)
    sides = [(np.asarray(s.log_prob, np.float64) / s.num_tokens,) for s in laws.sides_of(scores)]
    nll = oracle.sft(scores["chosen"].log_prob, scores["chosen"].num_tokens, np.asarray(scores["chosen"].valid))[0]
    penalty = equation(*sides, *laws.matrix_of(scores), None)
    np.testing.assert_allclose(got, nll + 0.3 * penalty, rtol=1e-5)
