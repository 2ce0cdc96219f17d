"""Section on rounds of sampling and training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rpo_jax.config.checks import ConfigError, in_range, positive


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """Rounds (train.rounds): in each the policy answers prompts of data.path, the answers are scored, and it is trained
    on them.

    Args:
        score: rule:MODULE.py:FUNCTION, reward:FOLDER or judge:openai:MODEL, as of the command sample.
        prompts: answered in a round, drawn without replacement until all have had their turn, and none twice in a
            round; all where not given.
        steps: of a round; where not given, train.epochs passes over its prompts. 1 is the on-policy limit.
        samples: answers to each prompt.
        select: which answers a round trains on: `all` with their scores (data.ranked_rule says which are chosen), or
            pairs of the `best_worst`, of the `first_round`, of a `tournament`, or of those that rejection sampling
            accepts (`rso`).
        accept: answers to a prompt that rejection sampling keeps, for select=rso.
        rso_beta: of rejection sampling, in units of the scores.
        temperature: of sampling.
        top_k: sample from the k likeliest tokens alone.
        top_p: sample from the likeliest tokens that make up this probability.
        max_tokens: most tokens of an answer.
        keep_unfinished: train also on answers that reached the most tokens.
        reference: of a round's training: the policy at the `start` of the run, or at the start of the round, which is
            the `last` round's.
        extrapolation: alpha of accelerated rounds (arXiv 2410.06293): after a round the weights go on by alpha times
            the way from those after the round before; the last round's stay as they are.
        eval_prompts: held-out prompts (data.eval_rows, data.eval_path) that are answered, for the reward and the KL to
            the start.
        eval_every: rounds between these evaluations.
        judge: settings of the judge: task, both_orders, price_in, price_out, max_cost, yes, cache, request, seed,
            endpoint. One that is an endpoint needs `yes: true` or max_cost, the most dollars of all rounds together.
    """

    score: str | None = None
    prompts: int | None = None
    steps: int | None = None
    samples: int = 4
    select: Literal["all", "best_worst", "first_round", "tournament", "rso"] = "best_worst"
    accept: int = 8
    rso_beta: float = 0.5
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    max_tokens: int = 128
    keep_unfinished: bool = False
    reference: Literal["start", "last"] = "start"
    extrapolation: float = 0.0
    eval_prompts: int = 64
    eval_every: int = 1
    judge: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive("rounds", prompts=self.prompts, steps=self.steps, max_tokens=self.max_tokens, top_k=self.top_k)
        positive("rounds", eval_prompts=self.eval_prompts, eval_every=self.eval_every)
        positive("rounds", temperature=self.temperature, rso_beta=self.rso_beta, top_p=self.top_p)
        if self.top_p is not None:
            in_range("rounds", "top_p", self.top_p, 0.0, 1.0)
        in_range("rounds", "extrapolation", self.extrapolation, 0.0, 1.0)
        for name in ("samples", "accept"):
            if getattr(self, name) < 2:
                raise ConfigError(f"rounds.{name}={getattr(self, name)} answers to a prompt make no pair; 2 at least.")
