import math

import jax.numpy as jnp
import numpy as np

from rpo_jax.objectives import losses
from rpo_jax.objectives.methods.lipo import lambda_weights
from tests.objectives import laws, oracle

BETA = 0.3


def ranks(chosen, rejected):
    """From 1, the best first; of equal ones the chosen first: position 0 of the list."""
    everyone = [chosen, *rejected]
    order = sorted(range(len(everyone)), key=lambda k: -everyone[k])
    return [order.index(k) + 1 for k in range(len(everyone))]


def equation(chosen, rejected, weights, mask, frozen):
    """Eq. 8 on every row: labels 1 and 0, gains 2^label - 1, discounts log(1 + rank)."""
    total = 0.0
    for i in range(len(chosen[0])):
        valid = np.nonzero(mask[i])[0]
        first, *others = ranks(frozen[0][0][i], [frozen[1][0][j] for j in valid])
        for j, other in zip(valid, others, strict=True):
            delta = abs((2**1 - 1) - (2**0 - 1)) * abs(1 / math.log(1 + first) - 1 / math.log(1 + other))
            total += delta * oracle.minus_log_sigmoid(BETA * weights[i, j] * (chosen[0][i] - rejected[0][j]))
    return total / mask.sum()


def test_lipo_is_its_equation():
    def loss(chosen, rejected, weights, mask):
        return laws.named("lipo", beta=BETA).loss(laws.scores_of(chosen[0], rejected[0], weights, mask))

    laws.check_law(loss, equation, lambda rng, size: (rng.normal(0, 5, size),))


def test_a_list_of_two_is_dpo_times_what_an_exchange_changes():
    rng = np.random.default_rng(0)
    chosen, rejected = (rng.normal(size=6).astype(np.float32) for _ in range(2))
    own = np.eye(6, dtype=bool)
    change = 1 / math.log(2) - 1 / math.log(3)
    scores = laws.scores_of(chosen, rejected, own.astype(np.float32), own)
    got = laws.named("lipo", beta=BETA).loss(scores)
    dpo = losses.pairwise_loss(chosen, rejected, own.astype(np.float32), BETA, mask=jnp.asarray(own))
    np.testing.assert_allclose(got, change * dpo, rtol=1e-5)


def test_equal_scores_rank_the_chosen_response_first_then_by_column():
    found = lambda_weights(jnp.zeros((1, 4)), jnp.asarray([[True, False, True, True]]))[0]
    expected = [1 / math.log(2) - 1 / math.log(1 + rank) for rank in (2, 3, 4)]
    np.testing.assert_allclose(found[jnp.array([0, 2, 3])], expected, rtol=1e-6)


def test_the_row_computes_it():
    scores = laws.draw_scores(5, fill=np.nan)
    got = laws.named("lipo", beta=BETA).loss(scores)
    sides = [(np.asarray(s.log_ratio(), np.float64),) for s in laws.sides_of(scores)]
    expected = equation(*sides, *laws.matrix_of(scores), sides)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
