"""Runs with rounds: what scores their answers, given to training, which knows no scorer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from rpo_jax.config import Config, RoundsConfig
from rpo_jax.config.reading import in_words
from rpo_jax.hosts import processes
from rpo_jax.runs.tracking import Reporter
from rpo_jax.tools.judging.comparisons import JudgingFailed
from rpo_jax.tools.judging.cost import Spending
from rpo_jax.tools.judging.endpoint import EndpointError, EndpointSettings
from rpo_jax.tools.judging.judge import JudgeConfig
from rpo_jax.tools.judging.pairs import prompt_of
from rpo_jax.tools.sampling.sample import Choice, NoPreferences, preferences
from rpo_jax.tools.sampling.scorers import JUDGE, Asked, Scorer, make_scorer, renamed
from rpo_jax.training import run as training
from rpo_jax.training.hooks.hook import Hook
from rpo_jax.training.rounds import FOLDER, RoundFailed
from rpo_jax.training.run import RunResult

T = TypeVar("T")
SPENT = "judge.json"  # in the folder of the rounds: dollars that the run's judge has cost
_JUDGE = ("task", "both_orders", "price_in", "price_out", "max_cost", "yes", "cache", "request", "seed")
_ENDPOINT_KEYS = {name: kind for name, kind in get_type_hints(EndpointSettings).items() if name != "model"}
_KEYS = {name: kind for name, kind in get_type_hints(JudgeConfig).items() if name in _JUDGE}
_KEYS["endpoint"] = dict[str, Any]
# What the options of the command judge are called here.
_NAMES = {
    "--judge": "rounds.score",
    "--score": "rounds.score",
    "--n": "rounds.prompts",
    **{f"--{name.replace('_', '-')}": f"rounds.judge.{name}" for name in _KEYS},
    **{f"--{name.replace('_', '-')}": f"rounds.judge.endpoint.{name}" for name in _ENDPOINT_KEYS},
}


def run(config: Config, hooks: Sequence[Hook] = ()) -> RunResult:
    """As rpo_jax.training.run.run, with what train.rounds scores by; ValueError too where that cannot be used."""
    if not config.train.rounds:
        return training.run(config, hooks)
    rounds, folder = config.rounds, Path(config.run.dir).expanduser() / FOLDER
    settings = _judge_settings(config.rounds)
    with contextlib.ExitStack() as stack:
        reporter = Reporter(silent=not processes.is_main())
        judge = {"seed": config.run.seed, **settings}
        try:
            score = make_scorer(str(rounds.score), judge, reporter, stack, Spending(folder / SPENT))
        except ValueError as error:
            raise ValueError(renamed(error, _NAMES)) from error
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


def _judge_settings(rounds: RoundsConfig) -> dict[str, Any]:
    """rounds.judge; ValueError for a setting that there is none of, or of another type."""
    # In YAML 1.1 the word yes is true, as a key too.
    judge = {"yes" if str(name).lower() == "true" else name: value for name, value in rounds.judge.items()}
    if judge and not str(rounds.score).startswith(f"{JUDGE}:"):
        raise ValueError(f"rounds.judge would not be read with rounds.score={rounds.score}; leave it out.")
    _check_types(judge, _KEYS, "rounds.judge")
    _check_types(judge.get("endpoint", {}), _ENDPOINT_KEYS, "rounds.judge.endpoint")
    return judge


def _check_types(settings: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    for name, value in settings.items():
        if name not in kinds:
            raise ValueError(f"{where}.{name} is unknown; there are {', '.join(kinds)}.")
        if not _fits(value, kinds[name]):
            raise ValueError(f"{where}.{name} is {value!r}, and must be {in_words(kinds[name])}.")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    plain = tuple(get_origin(part) or part for part in parts)
    if isinstance(value, bool):
        return bool in plain
    return isinstance(value, plain) or (float in plain and isinstance(value, int))


@dataclass(frozen=True)
class AnswerRater:
    """Rates the answers of rounds, as rpo_jax.training.rounds.Rater has it."""

    choice: Choice
    score: Scorer
    reporter: Reporter

    def rows(self, answers: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, float]]:
        selected = _told(lambda: preferences(answers, self.choice, self.score, self.reporter.say))
        metrics = {
            "reward": float(np.mean(selected.values)),
            "reward_std": float(np.std(selected.values)),
            "completions/mean_length": float(np.mean([answer["tokens"] for answer in answers])),
            "rounds/distinct": len(selected.values),
            "rounds/rows": len(selected.rows),
        }
        return selected.rows, metrics

    def scores(self, answers: Sequence[dict[str, Any]]) -> list[float]:
        asked = [
            Asked(answer["row_id"], prompt_of(answer, answer["row_id"]), (answer["response"],)) for answer in answers
        ]
        return [score for (score,) in _told(lambda: self.score(asked)).of if score is not None]


def _told(work: Callable[[], T]) -> T:
    """What the work gives; where the scorer fails or leaves nothing, RoundFailed with its reason."""
    try:
        return work()
    except (JudgingFailed, NoPreferences, EndpointError) as error:
        raise RoundFailed(renamed(error, _NAMES)) from error
