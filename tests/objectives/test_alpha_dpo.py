from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from rpo_jax.objectives import losses
from tests.objectives import laws, oracle

BETA, MARGIN, ALPHA = 2.0, 0.4, 0.3
OBJECTIVE = laws.named("alpha_dpo", beta=BETA, alpha_dpo_margin=MARGIN, alpha_dpo_alpha=ALPHA)


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
    reference = chosen[0] - chosen[1], rejected[0] - rejected[1]
    scores = laws.scores_of(chosen[0], rejected[0], weights, mask, reference_log_prob=reference)
    return OBJECTIVE.loss(scores)


def test_alpha_dpo_is_its_equation():
    laws.check_law(loss, equation, lambda rng, size: (rng.uniform(-3, 0, size), rng.normal(0, 1, size)))


def test_with_weights_on_the_losses_neither_part_has_them():
    rng = np.random.default_rng(2)
    chosen, rejected = ((rng.uniform(-3, 0, n), rng.normal(0, 1, n)) for n in (3, 4))
    weights = rng.dirichlet(np.ones(4), 3)
    scores = laws.scores_of(
        jnp.asarray(chosen[0]), jnp.asarray(rejected[0]), weights, None,
        reference_log_prob=(jnp.asarray(chosen[0] - chosen[1]), jnp.asarray(rejected[0] - rejected[1])),
    )  # fmt: skip
    on_losses = replace(scores, matrix=replace(scores.contrasts, weights_on="loss"))
    moved = chosen[1][:, None] - rejected[1][None, :]
    share = weights / weights.sum()
    mean = np.sum(share * moved)
    std = np.sqrt(np.sum(share * (moved - mean) ** 2) * 12 / 11)
    u = chosen[0][:, None] - rejected[0][None, :]
    losses_of = np.logaddexp(0, -BETA * (u - MARGIN - ALPHA * (moved - mean) / std))
    np.testing.assert_allclose(OBJECTIVE.loss(on_losses), np.sum(share * losses_of), rtol=1e-5)


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
    simpo = laws.named("simpo", beta=BETA, simpo_margin=BETA * MARGIN)
    np.testing.assert_allclose(got, simpo.loss(laws.scores_of(chosen, rejected, jnp.ones((3, 4)), None)), rtol=1e-6)


def test_the_row_divides_by_lengths():
    scores = laws.draw_scores(3, fill=np.nan)
    got = OBJECTIVE.loss(scores)
    sides = [
        tuple(np.asarray(x, np.float64) / s.num_tokens for x in (s.log_prob, s.log_prob - s.reference_log_prob))
        for s in laws.sides_of(scores)
    ]
    expected = equation(*sides, *laws.matrix_of(scores), sides)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_its_own_defaults_are_its_authors():
    objective = losses.OBJECTIVES["alpha_dpo"]
    own = {"beta": 2.5, "nll_weight": 0.0, "alpha_dpo_margin": 0.6, "alpha_dpo_alpha": 0.2}
    assert objective.options_in_use() == own
