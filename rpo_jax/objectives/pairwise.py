"""Every pairwise loss: a choice of weights, valid entries and link function on one contrast matrix.

Letters: M chosen and N rejected responses of a contrast group, S entries, *G leading group dimensions; a mean is over
the valid entries of all groups together. Quantities are in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rpo_jax.objectives.matrix import BothSides, ContrastMatrix, WeightsOn, WholeMatrix
from rpo_jax.objectives.objective import MatrixObjective
from rpo_jax.objectives.scores import Scores

# From u = w_ij (rho_chosen,i - rho_rejected,j), beta and label smoothing to a loss per entry.
Link = Callable[[Float[Array, "*S"], float, Any], Float[Array, "*S"]]


def _robust(u, beta, label_smoothing):
    """Unbiased under flipped labels: the mean over the flips is the logistic link's."""
    kept, flipped = jax.nn.softplus(-beta * u), jax.nn.softplus(beta * u)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def _exo(u, beta, label_smoothing):
    """KL of the policy's choice between both responses from the labels' (1 - eps, eps)."""
    kept, flipped = -jax.nn.softplus(-beta * u), -jax.nn.softplus(beta * u)
    # exp of a log-probability: a sigmoid's own derivative loses its digits in the upper tail.
    return jnp.exp(kept) * (kept - jnp.log1p(-label_smoothing)) + jnp.exp(flipped) * (
        flipped - jnp.log(label_smoothing)
    )


LINKS: dict[str, Link] = {
    "logistic": lambda u, beta, _: jax.nn.softplus(-beta * u),
    "smoothed": lambda u, beta, eps: (1 - eps) * jax.nn.softplus(-beta * u) + eps * jax.nn.softplus(beta * u),
    "squared": lambda u, beta, _: jnp.square(u - 1 / (2 * beta)),
    "hinge": lambda u, beta, _: jnp.maximum(0.0, 1 - beta * u),
    "robust": _robust,
    "exo": _exo,
}

# What label smoothing may be for the links that have one, in words and as a test.
SMOOTHING: dict[str, tuple[str, Callable[[float], bool]]] = {
    "smoothed": ("between 0 and 0.5", lambda eps: 0 <= eps <= 0.5),
    "robust": ("at least 0 and below 0.5", lambda eps: 0 <= eps < 0.5),
    "exo": ("above 0 and at most 0.5", lambda eps: 0 < eps <= 0.5),
}


def linked_mean(
    matrix: ContrastMatrix, terms: BothSides, link: str, beta: float, label_smoothing: float = 0.1
) -> Float[Array, ""]:
    """`pairwise_loss` on a matrix in either form; `terms` of the responses' scores as in ContrastMatrix.mean."""
    return matrix.mean(terms, lambda u, _: LINKS[link](u, beta, label_smoothing))


def pairwise_loss(
    chosen_log_ratio: Float[Array, "*G M"],
    rejected_log_ratio: Float[Array, "*G N"],
    weights: Float[Array, "*G M N"] | float,
    beta: float = 0.1,
    link: str = "logistic",
    mask: Bool[Array, "*G M N"] | None = None,
    *,
    label_smoothing: float = 0.1,
    weights_on: WeightsOn = "score",
    log_partition: tuple[Float[Array, "*G M"], Float[Array, "*G N"]] | None = None,
) -> Float[Array, ""]:
    """Mean link loss over the valid entries P of the contrast matrix.

    L = 1/|P| sum_P link(u_ij),  u_ij = w_ij (rho_chosen,i - rho_rejected,j).  Source: arXiv 2402.10958, Eqs. 12, 14.

    Links, with s = beta u: logistic -log sigmoid(s); smoothed (1 - eps) (-log sigmoid(s)) + eps (-log sigmoid(-s));
    squared (u - 1 / (2 beta))^2; hinge max(0, 1 - s); robust ((1 - eps) (-log sigmoid(s)) - eps (-log sigmoid(-s))) /
    (1 - 2 eps); exo sigmoid(s) log(sigmoid(s) / (1 - eps)) + sigmoid(-s) log(sigmoid(-s) / eps). With
    contrast.pair_weights and pair_mask they are DPO (Eq. 3), cDPO, IPO (Eq. 5), RSO's hinge, robust DPO and EXO.

    Args:
        chosen_log_ratio, rejected_log_ratio: log pi_policy - log pi_reference of each response, nats.
        weights: w, from rpo_jax.objectives.contrast.
        beta: inverse temperature of the implicit reward, 1/nats.
        link: a name in LINKS.
        mask: valid entries; all of them where not given.
        label_smoothing: eps, the probability that a label is flipped; as SMOOTHING says.
        weights_on: `score` as above. `loss` is the authors' release for the diagonal weighting: weights multiply the
            losses instead, L = 1/rows sum_i sum_j w_ij link(rho_chosen,i - rho_rejected,j), over rows with a valid
            entry. Rows of weights sum to 1, so this is the mean of their weighted averages: N times less diluted
            than a mean over entries.
        log_partition: log Z of the prompts of chosen and rejected responses, nats; with it
            u_ij = w_ij (rho_chosen,i - rho_rejected,j + log Z_i - log Z_j), Eqs. 16 and 17, where the paper's e^Z
            is Z here, as in its Eq. 9.

    Returns:
        A scalar in nats (squared: nats^2).

    Raises:
        ValueError: an unknown link or weights_on.
    """
    if link not in LINKS:
        raise ValueError(f"unknown link {link!r}; use one of {', '.join(LINKS)}.")
    if weights_on not in ("score", "loss"):
        raise ValueError(f"weights_on={weights_on!r} must be 'score' or 'loss'.")
    shape = (*jnp.shape(chosen_log_ratio), jnp.shape(rejected_log_ratio)[-1])
    mask = jnp.ones(shape, bool) if mask is None else jnp.broadcast_to(mask, shape)
    matrix = WholeMatrix(jnp.broadcast_to(weights, shape), mask, weights_on=weights_on)
    terms = ((chosen_log_ratio, rejected_log_ratio), *(() if log_partition is None else (log_partition,)))
    return linked_mean(matrix, terms, link, beta, label_smoothing)


@dataclass(frozen=True, kw_only=True)
class LinkObjective(MatrixObjective):
    """`pairwise_loss` with a link and a weighting of its own; both can be exchanged.

    link: a name in LINKS. label_smoothing: probability that a label is flipped, of the links that have one.
    average_log_prob: divide each response's log-ratio by its number of tokens.
    """

    link: str = "logistic"
    label_smoothing: float = 0.1
    average_log_prob: bool = False
    compares_prompts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.link not in LINKS:
            raise ValueError(f"unknown link {self.link!r}; use one of {', '.join(LINKS)}.")
        bounds, inside = SMOOTHING.get(self.link, ("", lambda _: True))
        if not inside(self.label_smoothing):
            raise ValueError(
                f"objective.label_smoothing={self.label_smoothing} must be {bounds} for the link {self.link}."
            )

    def options_in_use(self) -> dict[str, Any]:
        options = super().options_in_use()
        return options if self.link in SMOOTHING else {k: v for k, v in options.items() if k != "label_smoothing"}

    def terms_of(self, scores: Scores) -> BothSides:
        """What the responses' scores are the sum of, as ContrastMatrix.mean takes it: rho, and log Z where learned."""
        log_z = scores["chosen"].log_partition, scores["rejected"].log_partition
        learned = () if log_z[0] is None or log_z[1] is None else ((log_z[0], log_z[1]),)
        return scores.log_ratios(self.average_log_prob), *learned

    def loss(self, scores: Scores) -> Float[Array, ""]:
        """`pairwise_loss`; where the data has a label smoothing, an entry's is the mean of both responses' rows."""
        smoothing = self.smoothing_of(scores)
        if not smoothing:
            return linked_mean(scores.contrasts, self.terms_of(scores), self.link, self.beta, self.label_smoothing)
        return scores.contrasts.mean(self.terms_of(scores), lambda u, at: self.linked(u, at.values), smoothing)

    def smoothing_of(self, scores: Scores) -> BothSides:
        """The label smoothing of the responses' rows, where the data has one."""
        chosen, rejected = (scores[kind].row_value("label_smoothing") for kind in ("chosen", "rejected"))
        return () if chosen is None or rejected is None else ((chosen, rejected),)

    def linked(self, u: Float[Array, "*G M N"], smoothing: BothSides) -> Float[Array, "*G M N"]:
        """The link of weighted differences, an entry's label smoothing the mean of what `smoothing_of` has of both."""
        if not smoothing:
            return LINKS[self.link](u, self.beta, self.label_smoothing)
        ((chosen, rejected),) = smoothing
        return LINKS[self.link](u, self.beta, (chosen + rejected) / 2)
