"""Losses of preference learning, and the table of objectives that the training step reads.

Every pairwise loss is a choice of weights, valid entries and link function on one contrast matrix (`pairwise_loss`).
A loss sees the model through one log-prob per response, so everything here costs nothing beside a forward pass.

Letters: M chosen responses of a contrast group, *G leading group dimensions. Quantities are in nats. Masked inputs may
hold anything, NaN included, without reaching value or gradient; a NaN in a valid slot surfaces. With nothing valid a
loss is 0 and its gradient too.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rpo_jax.objectives.contrast import WEIGHTS
from rpo_jax.objectives.matrix import LINKS, SMOOTHING, WeightsOn
from rpo_jax.objectives.methods import OBJECTIVES, OPTIONS
from rpo_jax.objectives.methods.kto import kl_estimate, kto_loss
from rpo_jax.objectives.methods.sft import sft_loss
from rpo_jax.objectives.methods.slic import slic_loss
from rpo_jax.objectives.objective import Objective
from rpo_jax.objectives.pairwise import pairwise_loss
from rpo_jax.objectives.scores import Scores, keep, masked_mean

__all__ = [
    "LINKS",
    "OBJECTIVES",
    "OPTIONS",
    "Objective",
    "check_options",
    "kl_estimate",
    "kto_loss",
    "minimised",
    "nll_loss",
    "objective_named",
    "pairwise_loss",
    "sft_loss",
    "slic_loss",
]


def nll_loss(
    chosen_log_prob: Float[Array, "*G M"],
    chosen_num_tokens: Int[Array, "*G M"],
    mask: Bool[Array, "*G M"] | None = None,
) -> Float[Array, ""]:
    """Mean over the chosen responses of their negative log-likelihood per token.  L = 1/M sum_i -log pi(y_i) / |y_i|.

    Source: Pang et al. 2024, arXiv 2404.19733, the term beside DPO. Each response counts alike, which `sft_loss`'s
    tokens do.
    """
    return masked_mean(-keep(chosen_log_prob, mask) / jnp.maximum(chosen_num_tokens, 1), mask)


def minimised(objective: Objective, scores: Scores, options: Any, *, weights_on: WeightsOn = "score") -> Any:
    """The objective's loss, with its options' weight of the chosen responses' NLL beside it."""
    loss = objective.compute(scores, options, weights_on=weights_on)
    if not options.nll_weight:
        return loss
    return loss + options.nll_weight * nll_loss(scores.chosen.log_prob, scores.chosen.num_tokens, scores.chosen.valid)


def objective_named(
    name: str, *, link: str | None = None, weights: str | None = None, partition: str = "none"
) -> Objective:
    """The objective of that name, after checking that an override of its link or its weights means something.

    Raises:
        ValueError: an unknown name, link or weights, an override that the objective has no place for, or a learned
            partition where it would do nothing.
    """
    if name not in OBJECTIVES:
        nearest = difflib.get_close_matches(name, OBJECTIVES, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown objective {name!r}; did you mean {nearest!r}? There are {', '.join(OBJECTIVES)}.")
    objective = OBJECTIVES[name]
    overrides = (("link", link, objective.link, LINKS), ("weights", weights, objective.weights, WEIGHTS))
    for kind, value, default, table in overrides:
        if value is None:
            continue
        if value not in table:
            raise ValueError(f"unknown {kind} {value!r}; use one of {', '.join(table)}.")
        if default is None:
            usable = [other for other, row in OBJECTIVES.items() if getattr(row, kind) is not None]
            raise ValueError(
                f"objective {name!r} takes no {kind}, but got {kind}={value!r}; leave it out, or use one of the "
                f"objectives {', '.join(usable)}."
            )
    if partition == "learned":
        _check_partition(name, objective, weights or objective.weights)
    return objective


def check_options(settings: Any, defaults: Mapping[str, Any]) -> str | None:
    """What is wrong with the options of an objective's settings; None where all mean something to it.

    Args:
        settings: `name`, the shared options, and one attribute for each of OPTIONS.
        defaults: of all options: what differs from them has been asked for.
    """
    objective = OBJECTIVES.get(settings.name)
    for name, option in OPTIONS.items():
        value = getattr(settings, name)
        if fault := option.fault(value):
            return f"objective.{name}={value} {fault}."
        if objective is not None and name not in objective.options and value != defaults[name]:
            return _no_option(settings.name, name, value, [o for o, row in OBJECTIVES.items() if name in row.options])
    if objective is None:  # told apart, with the names that there are
        return None
    link = settings.link or objective.link
    if settings.label_smoothing != defaults["label_smoothing"] and link not in SMOOTHING:
        usable = [other for other, row in OBJECTIVES.items() if row.link in SMOOTHING]
        return _no_option(settings.name, "label_smoothing", settings.label_smoothing, usable)
    if link in SMOOTHING and not SMOOTHING[link][1](settings.label_smoothing):
        return f"objective.label_smoothing={settings.label_smoothing} must be {SMOOTHING[link][0]} for the link {link}."
    if settings.average_log_prob and not objective.averages:
        usable = [other for other, row in OBJECTIVES.items() if row.averages]
        return _no_option(settings.name, "average_log_prob", True, usable)
    if settings.nll_weight and objective.weights is None:
        usable = [other for other, row in OBJECTIVES.items() if row.weights is not None]
        return _no_option(settings.name, "nll_weight", settings.nll_weight, usable)
    return None


def _no_option(objective: str, name: str, value: Any, usable: list[str]) -> str:
    return (
        f"objective.{name}={value} means nothing to objective.name={objective}; leave it out, or use one of the "
        f"objectives {', '.join(usable)}."
    )


def _check_partition(name: str, objective: Objective, weights: str | None) -> None:
    """ValueError where no rewards of different prompts are compared."""
    usable = ", ".join(other for other, row in OBJECTIVES.items() if row.link is not None)
    if objective.link is None:
        raise ValueError(
            f"objective.partition=learned compares the rewards of different prompts, which objective {name!r} does "
            f"not; set objective.partition=none, or use one of the objectives {usable}."
        )
    if weights == "pair":
        raise ValueError(
            f"objective.partition=learned does nothing with contrast.weights=pair ({name!r} has it unless told "
            "otherwise): log Z is the same for both responses of a pair; set objective.partition=none, or "
            "contrast.weights to embedding, uniform or diagonal."
        )
