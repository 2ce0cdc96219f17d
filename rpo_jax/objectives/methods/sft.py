"""Supervised fine-tuning on the chosen responses."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from rpo_jax.objectives.objective import Objective, sft_term
from rpo_jax.objectives.scores import Scores


@dataclass(frozen=True, kw_only=True)
class SFT(Objective):
    """`sft_loss` of a batch."""

    responses: tuple[str, ...] = ("chosen",)
    uses_reference: bool = False

    def loss(self, scores: Scores) -> Float[Array, ""]:
        return sft_term(scores).mean

    def count(self, scores: Scores) -> Int[Array, ""] | Float[Array, ""]:
        return sft_term(scores).count


OBJECTIVES = {"sft": SFT(description="supervised fine-tuning on chosen responses", source="-")}
