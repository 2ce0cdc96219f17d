"""Objectives of lists: all responses to a prompt, however many, and what the data scores them.

Letters: K responses of a list, chosen and rejected side by side, *G leading dimensions of lists.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rpo_jax.objectives.objective import Objective, option
from rpo_jax.objectives.scores import Scores, masked_mean, zero_where_invalid

NOTHING = -1e30  # a logit of what is not there, finite because it has a derivative


class Lists(NamedTuple):
    reward: Float[Array, "*G K"]  # beta times the log-ratio
    score: Float[Array, "*G K"]  # the data's
    valid: Bool[Array, "*G K"]

    def log_share(self, x: Float[Array, "*G K"]) -> Float[Array, "*G K"]:
        """log softmax over a list's responses; 0 in slots that hold none."""
        return zero_where_invalid(jax.nn.log_softmax(jnp.where(self.valid, x, NOTHING), axis=-1), self.valid)

    def share(self, x: Float[Array, "*G K"]) -> Float[Array, "*G K"]:
        """softmax over a list's responses; 0 in slots that hold none."""
        return zero_where_invalid(jnp.exp(self.log_share(x)), self.valid)


@dataclass(frozen=True, kw_only=True)
class ListObjective(Objective):
    """A mean over lists. Which of their responses are chosen makes no difference."""

    uses_scores: bool = True
    uses_lists: bool = True
    average_log_prob: bool = False

    @abstractmethod
    def list_loss(self, lists: Lists) -> Float[Array, "*G"]:
        """Of each list; finite where it is empty."""

    def lists(self, scores: Scores) -> Lists:
        both = scores["chosen"], scores["rejected"]
        score = [zero_where_invalid(side.score, side.valid) for side in both if side.score is not None]
        assert len(score) == 2, "it uses scores"
        parts = scores.log_ratios(self.average_log_prob), score, [side.valid for side in both]
        ratio, score, valid = (jnp.concatenate(part, axis=-1) for part in parts)
        return Lists(self.beta * ratio, score, valid)

    def loss(self, scores: Scores) -> Float[Array, ""]:
        lists = self.lists(scores)
        return masked_mean(self.list_loss(lists), jnp.any(lists.valid, axis=-1))

    def count(self, scores: Scores) -> Int[Array, ""]:
        return jnp.sum(jnp.any(self.lists(scores).valid, axis=-1))


@dataclass(frozen=True, kw_only=True)
class ExoRewards(ListObjective):
    """EXO with rewards: the reverse KL of the policy's choice among a list's responses from the scores'.

    L = mean over lists of sum_k q_k (log q_k - log p_k),  q = softmax(beta rho), p = softmax(score / beta_r).
    Source: Ji et al. 2024, arXiv 2402.00856, and its authors' code.
    """

    exo_rewards_temperature: float = option(2.0, "beta_r of exo_rewards, of the data's scores.", low=0, open=True)

    def list_loss(self, lists: Lists) -> Float[Array, "*G"]:
        log_q, log_p = map(lists.log_share, (lists.reward, lists.score / self.exo_rewards_temperature))
        return jnp.sum(lists.share(lists.reward) * (log_q - log_p), axis=-1)


@dataclass(frozen=True, kw_only=True)
class InfoNCA(ListObjective):
    """Cross-entropy of the policy's choice among a list's responses with the scores'.

    L = mean over lists of -sum_k p_k log softmax_k(beta rho),  p = softmax(score / alpha).
    Source: Chen et al. 2024, arXiv 2402.05369, and its authors' code.
    """

    nca_alpha: float = option(1.0, "alpha of infonca and nca, the temperature of the data's scores.", low=0, open=True)

    def list_loss(self, lists: Lists) -> Float[Array, "*G"]:
        return -jnp.sum(lists.share(lists.score / self.nca_alpha) * lists.log_share(lists.reward), axis=-1)


@dataclass(frozen=True, kw_only=True)
class NCA(InfoNCA):
    """Each response is told from noise, by how much the scores choose it.

    L = mean over lists of -sum_k p_k log sigmoid(beta rho_k) - 1/K sum_k log sigmoid(-beta rho_k), p as in InfoNCA.
    """

    def list_loss(self, lists: Lists) -> Float[Array, "*G"]:
        noise = zero_where_invalid(jax.nn.softplus(lists.reward), lists.valid)
        kept = lists.share(lists.score / self.nca_alpha) * jax.nn.softplus(-lists.reward)
        return jnp.sum(kept, axis=-1) + jnp.sum(noise, axis=-1) / jnp.maximum(jnp.sum(lists.valid, axis=-1), 1)


@dataclass(frozen=True, kw_only=True)
class LiPOLists(ListObjective):
    """LambdaLoss of a list: every pair of which one scores higher, by what exchanging them would change of the gain.

    L = mean over lists of the mean over pairs r_i > r_j of Delta_ij log(1 + exp(-beta (rho_i - rho_j))),
    Delta_ij = |2^(r_i) - 2^(r_j)| |1 / log(1 + rank_i) - 1 / log(1 + rank_j)|, ranks by rho, without gradient, and r
    the data's scores, which are probabilities in the paper: gains of much larger ones outweigh all others.
    Source: Liu et al. 2024, arXiv 2402.01878, Eq. 8, whose sum over pairs is a mean here.
    """

    def list_loss(self, lists: Lists) -> Float[Array, "*G"]:
        order = jnp.argsort(jnp.where(lists.valid, -jax.lax.stop_gradient(lists.reward), jnp.inf), axis=-1, stable=True)
        discount = 1 / jnp.log1p(1 + jnp.argsort(order, axis=-1))
        gain = jnp.exp2(lists.score)

        def differences(x: Float[Array, "*G K"]) -> Float[Array, "*G K K"]:
            return x[..., :, None] - x[..., None, :]

        better = (differences(lists.score) > 0) & lists.valid[..., :, None] & lists.valid[..., None, :]
        change = jnp.abs(differences(gain) * differences(discount))
        losses = zero_where_invalid(change * jax.nn.softplus(-differences(lists.reward)), better)
        return jnp.sum(losses, axis=(-2, -1)) / jnp.maximum(jnp.sum(better, axis=(-2, -1)), 1)


OBJECTIVES = {
    "exo_rewards": ExoRewards(description="EXO of scored lists", source="arXiv 2402.00856 and its authors' code"),
    "infonca": InfoNCA(description="InfoNCA of scored lists", source="arXiv 2402.05369 and its authors' code"),
    "lipo_lists": LiPOLists(description="LiPO-lambda of scored lists", source="arXiv 2402.01878, Eq. 8"),
    "nca": NCA(description="Noise Contrastive Alignment of scored lists", source="arXiv 2402.05369"),
}
