"""Runs with rounds: what scores their answers, given to training, which knows no scorer."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rpo_jax.config import Config
from rpo_jax.hosts import processes
from rpo_jax.runs.tracking import Reporter
from rpo_jax.tools.judging.pairs import prompt_of
from rpo_jax.tools.sampling.sample import Choice, preferences
from rpo_jax.tools.sampling.scorers import Asked, Scorer, make_scorer
from rpo_jax.training import run as training
from rpo_jax.training.hooks.hook import Hook
from rpo_jax.training.run import RunResult


def run(config: Config, hooks: Sequence[Hook] = ()) -> RunResult:
    """As rpo_jax.training.run.run, with what train.rounds scores by; ValueError too where that cannot be used."""
    if not config.train.rounds:
        return training.run(config, hooks)
    rounds, judge = config.rounds, {"seed": config.run.seed, **config.rounds.judge}
    with contextlib.ExitStack() as stack:
        reporter = Reporter(silent=not processes.is_main())
        try:
            score = make_scorer(str(rounds.score), judge, reporter, stack)
        except (TypeError, ValueError) as error:
            raise ValueError(f"rounds.score={rounds.score}: {error}") from None
        choice = Choice(
            score=str(rounds.score),
            select=rounds.select,
            accept=rounds.accept,
            beta=rounds.rso_beta,
            keep_unfinished=rounds.keep_unfinished,
            seed=config.run.seed,
            option=lambda name: f"rounds.{name}",
        )
        return training.run(config, hooks, AnswerRater(choice, score, reporter))


@dataclass(frozen=True)
class AnswerRater:
    """Rates the answers of rounds, as rpo_jax.training.rounds.Rater has it."""

    choice: Choice
    score: Scorer
    reporter: Reporter

    def rows(self, answers: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, float]]:
        found = preferences(answers, self.choice, self.score, self.reporter.say)
        metrics = {
            "reward": float(np.mean(found.values)),
            "reward_std": float(np.std(found.values)),
            "completions/mean_length": float(np.mean([answer["tokens"] for answer in answers])),
            "rounds/distinct": len(found.values),
            "rounds/rows": len(found.rows),
        }
        return found.rows, metrics

    def scores(self, answers: Sequence[dict[str, Any]]) -> list[float]:
        asked = [
            Asked(answer["row_id"], prompt_of(answer, answer["row_id"]), (answer["response"],)) for answer in answers
        ]
        return [score for (score,) in self.score(asked).of if score is not None]
