"""What an objective is: a small frozen class whose fields are its options, and the loss of a batch's scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rpo_jax.objectives.scores import Responses, Scores, masked_mean, zero_where_invalid


@dataclass(frozen=True)
class Option:
    """A setting that only some objectives have; it becomes `objective.NAME` of the configuration.

    default: its type is the option's. doc: a line for --help. low, high: bounds of a number, excluded where `open`.
    choices: the values of a string; any text where there are none.
    """

    default: float | str
    doc: str
    low: float | None = None
    high: float | None = None
    open: bool = False
    choices: tuple[str, ...] = ()

    def fault(self, value: float | str) -> str | None:
        """What the value must be and is not; None where it can be used."""
        if isinstance(value, str) and not self.choices:
            return None if value.strip() else "must not be empty"
        if isinstance(value, str):
            return None if value in self.choices else f"must be one of {', '.join(self.choices)}"
        low = self.low is None or (value > self.low if self.open else value >= self.low)
        high = self.high is None or (value < self.high if self.open else value <= self.high)
        if low and high and value == value:
            return None
        if self.high is None:
            return f"must be {'greater than' if self.open else 'at least'} {self.low:g}"
        return f"must lie between {self.low:g} and {self.high:g}{', both excluded' if self.open else ''}"


def option(default: Any, doc: str, **limits: Any) -> Any:
    """The field of an Option; `limits` are its low, high, open and choices."""
    return field(default=default, metadata={"option": Option(default, doc, **limits)})


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What an objective is, and what must be prepared for it, whatever its options.

    responses: the kinds of response that must be scored. weights: the contrast weights by default, a name in
    contrast.WEIGHTS; None without a contrast matrix. needs_pairs: whether slot i of chosen and rejected must be one
    pair, whatever the weights. uses_scores: whether the data must score the responses. uses_tokens: whether it sees
    every token instead of the sums over responses alone. uses_values: whether a head predicts a value for each of them.
    uses_prompt_values: whether a head predicts a value of each prompt, in the place of Responses.log_partition.
    uses_confidence: whether it sees how concentrated the policy is, as Responses.log_collision.
    uses_reward_head: whether a head's score of each response stands where others have its log-prob.
    uses_lists: whether all responses to a prompt are a group of their own. mixes_references: whether it needs more
    references than one.
    """

    description: str
    source: str
    responses: tuple[str, ...] = ("chosen", "rejected")
    weights: str | None = None
    uses_reference: bool = True
    needs_pairs: bool = False
    uses_scores: bool = False
    uses_tokens: bool = False
    uses_values: bool = False
    uses_prompt_values: bool = False
    uses_confidence: bool = False
    uses_lists: bool = False
    uses_reward_head: bool = False
    mixes_references: bool = False


class Term(NamedTuple):
    """A mean that is part of a loss, and what it is a mean over: batches of different size combine term by term."""

    mean: Float[Array, ""]
    count: Int[Array, ""] | Float[Array, ""]


def total(terms: Sequence[Term]) -> Float[Array, ""]:
    first, *others = (term.mean for term in terms)
    return sum(others, start=first)


@dataclass(frozen=True, kw_only=True)
class Objective(Traits, ABC):
    """What training minimises. The fields that a subclass adds are its options, with its own defaults.

    beta: inverse temperature of the implicit reward, 1/nats.
    """

    beta: float = 0.1
    keeps_mean: ClassVar[bool] = False  # Scores.before is needed; a property where an option decides
    compares_prompts: ClassVar[bool] = False  # rewards of different prompts, so that a learned log Z enters

    def __post_init__(self) -> None:
        """ValueError for an option out of its range."""
        for entry in fields(self):
            if "option" in entry.metadata and (fault := entry.metadata["option"].fault(getattr(self, entry.name))):
                raise ValueError(f"objective.{entry.name}={getattr(self, entry.name)} {fault}.")

    @abstractmethod
    def loss(self, scores: Scores) -> Float[Array, ""]:
        """The objective's own loss, a mean and a scalar that jax can differentiate."""

    @abstractmethod
    def count(self, scores: Scores) -> Int[Array, ""] | Float[Array, ""]:
        """What `loss` is a mean over."""

    def added(self, scores: Scores) -> tuple[Term, ...]:
        """Means over something else that are added to the loss, their weights in them."""
        return ()

    def kept(self, scores: Scores) -> Term | None:
        """What the loss needs the mean of over all batches so far, of this batch; None where it needs none."""
        return None

    def terms(self, scores: Scores) -> tuple[Term, ...]:
        """What the minimised value is the sum of."""
        return Term(self.loss(scores), self.count(scores)), *self.added(scores)

    def total_loss(self, scores: Scores) -> Float[Array, ""]:
        """What is minimised: the loss, and what is added to it."""
        return total(self.terms(scores))

    def options(self) -> dict[str, Any]:
        """Its options with their values."""
        traits = {entry.name for entry in fields(Traits)}
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in traits}

    def options_in_use(self) -> dict[str, Any]:
        """Those that have a say in the loss as the others are."""
        return self.options()


@dataclass(frozen=True, kw_only=True)
class MatrixObjective(Objective):
    """A mean over the entries of the contrast matrix.

    nll_weight: weight of the chosen responses' negative log-likelihood per token beside it. nll_mean: what that is a
    mean over, `responses` (`nll_loss`) or `tokens` (`sft_loss`).
    """

    weights: str | None = "pair"
    nll_weight: float = 0.0
    averages_entries: ClassVar[bool] = True  # else no entry has a loss of its own
    takes_margins: ClassVar[bool] = False
    nll_mean: str = "responses"

    def added(self, scores: Scores) -> tuple[Term, ...]:
        """`nll_weight` times the likelihood loss of the chosen responses, where it has a weight."""
        if not self.nll_weight:
            return ()
        chosen = scores["chosen"]
        if self.nll_mean == "tokens":
            return (sft_term(scores, self.nll_weight),)
        return (Term(self.nll_weight * nll_loss(*likelihood_of(chosen)), jnp.sum(chosen.valid)),)

    def options_in_use(self) -> dict[str, Any]:
        unused = () if self.nll_weight else ("nll_mean",)
        return {name: value for name, value in self.options().items() if name not in unused}

    def count(self, scores: Scores) -> Int[Array, ""] | Float[Array, ""]:
        """What the matrix's mean is over: its valid entries, or its rows where weights are on the losses."""
        entries, rows = scores.contrasts.counts()
        return entries if scores.contrasts.weights_on == "score" else rows


def nll_loss(
    chosen_log_prob: Float[Array, "*G M"],
    chosen_num_tokens: Int[Array, "*G M"],
    mask: Bool[Array, "*G M"] | None = None,
) -> Float[Array, ""]:
    """Mean over the chosen responses of their negative log-likelihood per token.  L = 1/M sum_i -log pi(y_i) / |y_i|.

    Source: Pang et al. 2024, arXiv 2404.19733, the term beside DPO. Each response counts alike, which `sft_loss`'s
    tokens do.
    """
    return masked_mean(-zero_where_invalid(chosen_log_prob, mask) / jnp.maximum(chosen_num_tokens, 1), mask)


def sft_loss(
    chosen_log_prob: Float[Array, "*G M"],
    chosen_num_tokens: Int[Array, "*G M"],
    mask: Bool[Array, "*G M"] | None = None,
) -> Float[Array, ""]:
    """Negative log-likelihood of the chosen responses per token.  L = -sum_i log pi(y_i) / sum_i |y_i|.

    The mean is over the tokens of the whole batch, so a long response counts for more than a short one.
    """
    num_tokens = jnp.sum(zero_where_invalid(chosen_num_tokens, mask))
    return -jnp.sum(zero_where_invalid(chosen_log_prob, mask)) / jnp.maximum(num_tokens, 1)


def sft_term(scores: Scores, weight: float = 1.0) -> Term:
    """`sft_loss` of a batch times a weight, with the number of tokens that it is a mean over."""
    chosen = scores["chosen"]
    return Term(weight * sft_loss(*likelihood_of(chosen)), jnp.sum(jnp.where(chosen.valid, chosen.num_tokens, 0)))


def likelihood_of(responses: Responses) -> tuple[Float[Array, "*G S"], Int[Array, "*G S"], Bool[Array, "*G S"]]:
    """What `nll_loss` and `sft_loss` take."""
    return responses.log_prob, responses.num_tokens, responses.valid
