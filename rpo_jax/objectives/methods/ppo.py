"""PPO as the authors' baseline: one step, offline, on the data's own responses, with a value for every token.

Letters: R rows and T tokens of a packed batch, P responses.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rpo_jax.core.records import KINDS
from rpo_jax.objectives.objective import Objective, option
from rpo_jax.objectives.scores import Scores, masked_mean, zero_where_invalid

LEAST_VARIANCE = 1e-8  # of the advantages
LARGEST_LOG_RATIO = 60.0  # nats; exp of more has a derivative that is not finite, even where the clip leaves it out


def _discounted(values: Float[Array, "R T"], discount: Float[Array, "R T"]) -> Float[Array, "R T"]:
    """x_t = values_t + discount_t x_(t+1), from the last token of a row to its first."""

    def combine(later, earlier):
        return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]

    return jax.lax.associative_scan(combine, (discount, values), reverse=True, axis=1)[1]


def advantages(
    value: Float[Array, "R T"],
    response_ids: Int[Array, "R T"],
    rewards: Float[Array, "P"],
    gamma: float = 0.99,
    lam: float = 0.95,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """Generalised advantage estimates of scored tokens, and what their values are to be; 0 for other tokens.

    A_t = sum_(k >= t) (gamma lambda)^(k - t) delta_k,  delta_t = r_t + gamma V_(t+1) - V_t, within a response, after
    whose last token V is 0; r_t is the response's reward at its last token and 0 before. The target is the discounted
    reward of later tokens alone, sum_(k > t) gamma^(k - t - 1) r_k: 0 at the last token.
    Source: Schulman et al. 2015, arXiv 1506.02438, Eq. 16, and the authors' release.
    """
    scored = response_ids >= 0
    value = zero_where_invalid(value, scored)
    following = jnp.concatenate([response_ids[:, 1:], jnp.full_like(response_ids[:, :1], -1)], axis=1)
    goes_on = (scored & (following == response_ids)).astype(value.dtype)

    def next_of(x):
        return goes_on * jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1)

    reward = zero_where_invalid((1 - goes_on) * rewards[jnp.maximum(response_ids, 0)], scored)
    delta = reward + gamma * next_of(value) - value
    return _discounted(delta, gamma * lam * goes_on), next_of(_discounted(reward, gamma * goes_on))


def ppo_loss(
    log_prob: Float[Array, "R T"],
    value: Float[Array, "R T"],
    reference_log_prob: Float[Array, "R T"],
    response_ids: Int[Array, "R T"],
    rewards: Float[Array, "P"],
    *,
    clip: float = 0.5,
    gamma: float = 0.99,
    lam: float = 0.95,
    critic_weight: float = 0.01,
    kl_weight: float = 0.1,
) -> Float[Array, ""]:
    """Clipped policy loss, squared error of the values and distance from the reference: means over scored tokens.

    L = mean max(-A q, -A clip(q, c, 1/c)) + c_V 1/2 mean (V - G)^2 + c_KL mean (log pi_ref - log pi),
    q = pi / pi_ref of a token; A are `advantages`, less their mean and over their standard deviation in the batch, and
    G the targets, neither with gradient.  Source: the release of arXiv 2402.10958, class PPOTrainer (clip 0.5, gamma
    0.99, lambda 0.95, c_V 0.01, c_KL 0.1), which goes back to arXiv 1707.06347, Eq. 7. The release takes mean and
    deviation over a device's share of the batch, this over the whole batch.

    Args:
        log_prob, value, reference_log_prob: of scored tokens, nats and reward; anything elsewhere.
        response_ids: 0 to P - 1 for scored tokens, those of a response side by side and in order; -1 elsewhere.
        rewards: of each response.
        clip: c, between 0 and 1.
    """
    scored = response_ids >= 0
    log_prob, value, reference_log_prob = (zero_where_invalid(x, scored) for x in (log_prob, value, reference_log_prob))
    advantage, target = advantages(jax.lax.stop_gradient(value), response_ids, rewards, gamma, lam)
    centred = zero_where_invalid(advantage - masked_mean(advantage, scored), scored)
    advantage = centred * jax.lax.rsqrt(masked_mean(jnp.square(centred), scored) + LEAST_VARIANCE)
    ratio = jnp.exp(jnp.minimum(log_prob - reference_log_prob, LARGEST_LOG_RATIO))
    policy = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, clip, 1 / clip))
    critic = 0.5 * jnp.square(value - target)
    losses = policy + critic_weight * critic + kl_weight * (reference_log_prob - log_prob)
    return masked_mean(losses, scored)


@dataclass(frozen=True, kw_only=True)
class PPO(Objective):
    """`ppo_loss` of a batch: the reward of a chosen response is 1, of a rejected one -1, of others 0."""

    uses_tokens: bool = True
    uses_values: bool = True
    ppo_clip: float = option(0.5, "PPO's clip c: ratios are held between c and 1/c.", low=0, high=1, open=True)
    ppo_gamma: float = option(0.99, "PPO's discount of a later token's reward.", low=0, high=1)
    ppo_lambda: float = option(0.95, "PPO's lambda of the generalised advantage estimate.", low=0, high=1)
    ppo_critic_weight: float = option(0.01, "PPO's weight of the values' squared error.", low=0)
    ppo_kl_weight: float = option(0.1, "PPO's weight of the distance from the reference.", low=0)

    def loss(self, scores: Scores) -> Float[Array, ""]:
        tokens = scores.tokens
        assert tokens is not None, "it uses tokens"
        assert tokens.value is not None, "it uses values"
        reward = {"chosen": 1, "rejected": -1}
        kinds = [kind for kind in KINDS if kind in scores.responses]  # in the order of their slots
        rewards = [jnp.full(scores[kind].valid.size, reward.get(kind, 0), jnp.float32) for kind in kinds]
        return ppo_loss(
            tokens.log_prob,
            tokens.value,
            tokens.reference_log_prob,
            tokens.response_ids,
            jnp.concatenate(rewards),
            clip=self.ppo_clip,
            gamma=self.ppo_gamma,
            lam=self.ppo_lambda,
            critic_weight=self.ppo_critic_weight,
            kl_weight=self.ppo_kl_weight,
        )

    def count(self, scores: Scores) -> Int[Array, ""]:
        assert scores.tokens is not None, "it uses tokens"
        return jnp.sum(scores.tokens.response_ids >= 0)


OBJECTIVES = {
    "ppo": PPO(
        description="one-step, offline PPO with a value head",
        source="the authors' release of arXiv 2402.10958; arXiv 1707.06347, Eq. 7",
    )
}
