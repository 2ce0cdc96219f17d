"""A reward model's loss, and where it reads its score."""

import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax.objectives import contrast
from rpo_jax.objectives.losses import OBJECTIVES
from rpo_jax.objectives.matrix import WholeMatrix
from rpo_jax.objectives.reward import response_rewards
from rpo_jax.objectives.scores import Responses, Scores

REWARD = OBJECTIVES["reward"]


def scores_of(chosen, rejected, margins=None):
    count = len(chosen)

    def side(values):
        row_values = None if margins is None else {"margin": jnp.asarray(margins)}
        zeros, valid = jnp.zeros(count), jnp.ones(count, bool)
        return Responses(jnp.asarray(values), zeros, jnp.ones(count, int), valid, row_values=row_values)

    whole = jnp.ones((count, count), bool)
    matrix = WholeMatrix(contrast.pair_weights(whole), contrast.pair_mask(whole), weights_on="score")
    return Scores({"chosen": side(chosen), "rejected": side(rejected)}, matrix)


def test_the_loss_is_bradley_terry_s_with_and_without_margins():
    chosen, rejected, margins = np.array([1.5, -0.2]), np.array([0.3, 0.4]), np.array([0.5, 0.0])
    plain = np.log1p(np.exp(-(chosen - rejected))).mean()
    held = np.log1p(np.exp(margins - (chosen - rejected))).mean()
    assert REWARD.loss(scores_of(chosen, rejected)) == pytest.approx(plain, rel=1e-6)
    assert REWARD.loss(scores_of(chosen, rejected, margins)) == pytest.approx(held, rel=1e-6)


def test_the_score_is_read_at_the_last_token_that_is_no_padding():
    """A prompt of two tokens and two responses behind it; token 9 ends both, and pads."""
    tokens = jnp.array([[5, 6, 7, 9, 9, 0]])
    previous = jnp.array([[0, 0, 1, 2, 1, 0]])
    ids = jnp.array([[-1, -1, 0, 0, 1, -1]])
    hidden = jnp.arange(6.0).reshape(1, 6, 1)

    def rewards(pad_id):
        return response_rewards(hidden, jnp.ones(1), tokens, previous, ids, 3, pad_id)[0].tolist()

    assert rewards(None) == [3, 4, 0]
    assert rewards(0) == [3, 4, 0]
    assert rewards(9) == [2, 1, 0], "before the end, and the prompt's last where there is nothing before it"
