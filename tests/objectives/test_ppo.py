"""PPO's loss against the release's own order of computation, response by response."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from rpo_jax.objectives import losses
from rpo_jax.objectives.methods.ppo import advantages, ppo_loss
from rpo_jax.objectives.scores import Responses, Scores, Tokens

GAMMA, LAMBDA = 0.9, 0.8
STEP = 1e-6

# Two rows: prompts are -1, responses of 3, 1, 4 and 2 tokens, two of them side by side; the last columns are padding.
RESPONSE_IDS = np.array([[-1, 0, 0, 0, 2, -1, -1, -1, -1], [-1, -1, 1, 1, 1, 1, -1, 3, 3]])
REWARDS = np.array([1.0, 1.0, -1.0, -1.0])


def draw(seed):
    """Log-probs, values and the reference's log-probs, with garbage where nothing is scored."""
    rng = np.random.default_rng(seed)
    found = rng.uniform(-4, -0.1, RESPONSE_IDS.shape), rng.normal(0, 1, RESPONSE_IDS.shape)
    reference = found[0] + rng.normal(0, 0.8, RESPONSE_IDS.shape)  # some ratios beyond the clip
    return [np.where(RESPONSE_IDS >= 0, x, np.nan) for x in (*found, reference)]


def places(response):
    return list(zip(*np.nonzero(response == RESPONSE_IDS), strict=True))


def estimates(value):
    """The release's loop: from the last token of each response to its first."""
    found, target = {}, {}
    for response in range(4):
        gae, future, following = 0.0, 0.0, 0.0
        for number, place in enumerate(reversed(places(response))):
            reward = REWARDS[response] if number == 0 else 0.0
            gae = reward + GAMMA * following - value[place] + GAMMA * LAMBDA * gae
            found[place], target[place] = gae, future
            future, following = reward + GAMMA * future, value[place]
    return found, target


def equation(log_prob, value, reference, frozen_value, clip=0.5, critic=0.01, kl=0.1):
    found, target = estimates(frozen_value)
    mean = np.mean(list(found.values()))
    deviation = math.sqrt(np.mean([(a - mean) ** 2 for a in found.values()]) + 1e-8)
    total = 0.0
    for place, advantage in found.items():
        normal, ratio = (advantage - mean) / deviation, math.exp(log_prob[place] - reference[place])
        total += max(-normal * ratio, -normal * min(max(ratio, clip), 1 / clip))
        total += critic * 0.5 * (value[place] - target[place]) ** 2 + kl * (reference[place] - log_prob[place])
    return total / len(found)


def ours(log_prob, value, reference):
    return ppo_loss(
        log_prob, value, reference, jnp.asarray(RESPONSE_IDS), jnp.asarray(REWARDS), gamma=GAMMA, lam=LAMBDA
    )


def test_advantages_and_targets_are_the_releases():
    _, value, _ = draw(0)
    got = advantages(jnp.asarray(value), jnp.asarray(RESPONSE_IDS), jnp.asarray(REWARDS), GAMMA, LAMBDA)
    for ours_, expected in zip(got, estimates(value), strict=True):
        assert not np.asarray(ours_)[RESPONSE_IDS < 0].any()
        for place, want in expected.items():
            np.testing.assert_allclose(ours_[place], want, rtol=1e-5, atol=1e-6)
    # By hand: three tokens, the reward at the last; targets are of later tokens alone.
    np.testing.assert_allclose(got[1][0, 1:4], [GAMMA, 1.0, 0.0], rtol=1e-6)


def test_the_loss_and_its_derivatives_are_the_releases():
    for seed in range(3):
        log_prob, value, reference = draw(seed)
        got, (by_log_prob, by_value) = jax.value_and_grad(ours, (0, 1))(*map(jnp.asarray, (log_prob, value, reference)))
        np.testing.assert_allclose(got, equation(log_prob, value, reference, value), rtol=1e-5)
        ratios = np.exp(log_prob - reference)[RESPONSE_IDS >= 0]
        assert ((ratios < 0.5) | (ratios > 2)).any(), "the clip is at work"
        for place in zip(*np.nonzero(RESPONSE_IDS >= 0), strict=True):
            for which, found in ((0, by_log_prob), (1, by_value)):
                points = []
                for sign in (1, -1):
                    inputs = [log_prob.copy(), value.copy()]
                    inputs[which][place] += sign * STEP
                    points.append(equation(*inputs, reference, value))
                np.testing.assert_allclose(found[place], (points[0] - points[1]) / (2 * STEP), rtol=1e-3, atol=1e-6)
        for found in (by_log_prob, by_value):
            assert not np.asarray(found)[RESPONSE_IDS < 0].any(), "nor does garbage reach a derivative"


def test_a_batch_without_tokens_has_no_loss():
    nan = jnp.full((2, 3), jnp.nan)
    value, gradient = jax.value_and_grad(lambda x: ppo_loss(x, x, x, jnp.full((2, 3), -1), jnp.ones(1)))(nan)
    assert value == 0
    assert not gradient.any()


def test_a_token_that_became_far_likelier_has_a_finite_derivative():
    ids = jnp.zeros((1, 2), int)
    gradient = jax.grad(lambda x: ppo_loss(x, jnp.zeros((1, 2)), jnp.full((1, 2), -500.0), ids, jnp.ones(1)))
    assert np.isfinite(gradient(jnp.zeros((1, 2)))).all()


def test_the_row_rewards_chosen_responses_and_punishes_rejected_ones():
    log_prob, value, reference = (jnp.asarray(x) for x in draw(1))
    two, none = jnp.ones(2), jnp.zeros(0)
    kinds = {"chosen": two, "rejected": two, "mismatched": none}
    sides = {kind: Responses(n, n, n.astype(int), n.astype(bool)) for kind, n in kinds.items()}
    scores = Scores(sides, tokens=Tokens(log_prob, value, reference, jnp.asarray(RESPONSE_IDS)))
    row = losses.OBJECTIVES["ppo"]
    ours_of_batch = replace(row, ppo_gamma=GAMMA, ppo_lambda=LAMBDA).loss(scores)  # pyright: ignore[reportCallIssue]
    np.testing.assert_allclose(ours_of_batch, ours(log_prob, value, reference), rtol=1e-6)
    assert row.count(scores) == 10
    assert list(row.options().values())[1:] == [0.5, 0.99, 0.95, 0.01, 0.1], "the release's"
