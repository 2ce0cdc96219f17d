"""f-DPO: the distance from the reference is another divergence than the reverse KL, and rewards follow from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rpo_jax.objectives.matrix import BothSides
from rpo_jax.objectives.objective import option
from rpo_jax.objectives.pairwise import LinkObjective
from rpo_jax.objectives.scores import Scores

LARGEST_EXPONENT = 80.0  # e^80 is a float32 and so are sums of it; what is beyond has no gradient, as in TRL


def _power(log_ratio: Float[Array, "*S"], exponent: float) -> Float[Array, "*S"]:
    if abs(exponent) < 1e-6:  # the limit
        return log_ratio
    return jnp.exp(jnp.minimum(exponent * log_ratio, LARGEST_EXPONENT)) / exponent


# f'(pi / pi_ref) of the log-ratio and alpha, but for a constant that differences do not have.
DIVERGENCES: dict[str, Callable[[Float[Array, "*S"], float], Float[Array, "*S"]]] = {
    "reverse_kl": lambda log_ratio, _: log_ratio,
    "forward_kl": lambda log_ratio, _: _power(log_ratio, -1.0),
    "js": lambda log_ratio, _: -jax.nn.softplus(-log_ratio),
    "alpha": lambda log_ratio, alpha: _power(log_ratio, alpha - 1),
}


@dataclass(frozen=True, kw_only=True)
class FDPO(LinkObjective):
    """A link on differences of f'(pi / pi_ref).

    L = 1/|P| sum_P link(w_ij (phi(rho_i) - phi(rho_j))); phi(rho) is rho for the reverse KL, -e^(-rho) for the forward
    KL, log sigmoid(rho) for Jensen-Shannon, e^((alpha - 1) rho) / (alpha - 1) for the alpha divergence.
    Source: Wang et al. 2023, arXiv 2309.16240; alpha is TRL's f_alpha_divergence_coef, with 1 the reverse KL and 0 the
    forward one.
    """

    f_dpo_divergence: str = option(
        "js", "f-DPO's divergence: reverse_kl, forward_kl, js or alpha.", choices=tuple(DIVERGENCES)
    )
    f_dpo_alpha: float = option(0.5, "f-DPO's alpha, of the alpha divergence alone.", low=-10, high=10)
    compares_prompts: ClassVar[bool] = False  # log Z is the reverse KL's

    def terms_of(self, scores: Scores) -> BothSides:
        phi = DIVERGENCES[self.f_dpo_divergence]
        chosen, rejected = scores.log_ratios(self.average_log_prob)
        return ((phi(chosen, self.f_dpo_alpha), phi(rejected, self.f_dpo_alpha)),)


OBJECTIVES = {"f_dpo": FDPO(description="DPO under another divergence", source="arXiv 2309.16240; TRL")}
