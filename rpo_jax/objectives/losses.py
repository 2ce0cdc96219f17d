"""Losses of preference learning, and the registry of objectives that the training step reads.

Every pairwise loss is a choice of weights, valid entries and link function on one contrast matrix (`pairwise_loss`).
A loss sees the model through one log-prob per response, so everything here costs nothing beside a forward pass.

Quantities are in nats. Masked inputs may hold anything, NaN included, without reaching value or gradient; a NaN in a
valid slot surfaces. With nothing valid a loss is 0 and its gradient too.
"""

from __future__ import annotations

from rpo_jax.objectives.methods import OBJECTIVES, OPTIONS
from rpo_jax.objectives.methods.kto import kl_estimate, kto_loss
from rpo_jax.objectives.objective import Objective, nll_loss, sft_loss
from rpo_jax.objectives.pairwise import LINKS, pairwise_loss

__all__ = [
    "LINKS",
    "OBJECTIVES",
    "OPTIONS",
    "Objective",
    "kl_estimate",
    "kto_loss",
    "nll_loss",
    "pairwise_loss",
    "sft_loss",
]
