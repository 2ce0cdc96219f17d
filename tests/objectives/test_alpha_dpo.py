import jax
import jax.numpy as jnp
import numpy as np

from rpo_jax.objectives import losses
from rpo_jax.objectives.methods.alpha_dpo import alpha_dpo_loss
from rpo_jax.objectives.methods.simpo import simpo_loss
from tests.objectives import laws, oracle

BETA, MARGIN, ALPHA = 2.0, 0.4, 0.3


def equation(chosen, rejected, weights, mask, frozen):
    """Values are log-probs and log-ratios per token; the margin is of the frozen ones."""
    entries = list(zip(*np.nonzero(mask), strict=True))
    moved = {(i, j): weights[i, j] * (frozen[0][1][i] - frozen[1][1][j]) for i, j in entries}
    mean, std = np.mean(list(moved.values())), np.std(list(moved.values()), ddof=1)
    found = [
        oracle.minus_log_sigmoid(
            BETA * (weights[i, j] * (chosen[0][i] - rejected[0][j]) - MARGIN - ALPHA * (moved[i, j] - mean) / std)
        )
        for i, j in entries
    ]
    return sum(found) / len(found)


def loss(chosen, rejected, weights, mask):
    return alpha_dpo_loss(chosen[0], rejected[0], chosen[1], rejected[1], weights, BETA, MARGIN, ALPHA, mask)


def test_alpha_dpo_is_its_equation():
    laws.check_law(loss, equation, lambda rng, size: (rng.uniform(-3, 0, size), rng.normal(0, 1, size)))


def test_the_margin_has_no_gradient():
    rng = np.random.default_rng(0)
    sides = [(jnp.asarray(rng.normal(size=n)), jnp.asarray(rng.normal(size=n))) for n in (3, 4)]
    by_chosen, by_rejected = jax.grad(loss, (0, 1))(*sides, jnp.ones((3, 4)), jnp.ones((3, 4), bool))
    assert by_chosen[0].any()
    assert not by_chosen[1].any()
    assert not by_rejected[1].any()


def test_a_policy_that_is_its_reference_has_simpos_loss():
    rng = np.random.default_rng(1)
    chosen, rejected = jnp.asarray(rng.uniform(-3, 0, 3)), jnp.asarray(rng.uniform(-3, 0, 4))
    zeros = jnp.zeros(3), jnp.zeros(4)
    got = loss((chosen, zeros[0]), (rejected, zeros[1]), jnp.ones((3, 4)), None)
    np.testing.assert_allclose(got, simpo_loss(chosen, rejected, jnp.ones((3, 4)), BETA, BETA * MARGIN), rtol=1e-6)


def test_the_row_divides_by_lengths():
    scores = laws.draw_scores(3, fill=np.nan)
    options = laws.settings(beta=BETA, alpha_dpo_margin=MARGIN, alpha_dpo_alpha=ALPHA)
    got = losses.OBJECTIVES["alpha_dpo"].compute(scores, options)
    sides = [
        tuple(np.asarray(x, np.float64) / s.num_tokens for x in (s.log_prob, s.log_prob - s.reference_log_prob))
        for s in (scores.chosen, scores.rejected)
    ]
    expected = equation(*sides, np.asarray(scores.weights), np.asarray(scores.mask), sides)
    np.testing.assert_allclose(got, expected, rtol=1e-4)
