"""A number for each answer: from a user's rule, a reward model, or how often a judge prefers it to the others."""

from __future__ import annotations

import contextlib
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

from rpo_jax.runs.tracking import Reporter
from rpo_jax.tools.judging.comparisons import JudgingFailed, Pair, Prompt
from rpo_jax.tools.judging.cost import Spending
from rpo_jax.tools.judging.endpoint import EndpointJudge
from rpo_jax.tools.judging.judge import JudgeConfig, agree_on_cost, check_consent, judge_all, make_judge
from rpo_jax.tools.judging.local import RewardJudge, RuleJudge
from rpo_jax.tools.judging.pairs import comparisons

RULE, REWARD, JUDGE = "rule", "reward", "judge"
KINDS = f"{RULE}:MODULE.py:FUNCTION, {REWARD}:HF_DIR or {JUDGE}:openai:MODEL"
_WON = {"a": 1.0, "tie": 0.5, "b": 0.0}


class Asked(NamedTuple):
    """A prompt and its answers, no two of which are equal; `place` names it in messages."""

    place: str
    prompt: Prompt
    answers: tuple[str, ...]


@dataclass
class Scores:
    """Scores of all answers, prompt by prompt; None for those that have none.

    Attributes:
        reason: why the first of those has none; empty where all have one.
    """

    of: list[list[float | None]]
    reason: str = ""
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.missing = sum(score is None for scores in self.of for score in scores)


Scorer = Callable[[Sequence[Asked]], Scores]


def make_scorer(
    spec: str,
    judge: Mapping[str, object],
    reporter: Reporter,
    stack: contextlib.ExitStack,
    spending: Spending | None = None,
) -> Scorer:
    """The scorer that is named, as KINDS has it; checked before anything is sampled.

    The scorer raises JudgingFailed or EndpointError where it fails on all that it is asked.

    Args:
        judge: settings of JudgeConfig, for a judge.
        stack: closes what the scorer opens.
        spending: what a judge has cost in earlier processes, and will; nobody is asked to agree to more where it is
            given.

    Raises ValueError for a rule, model or judge that cannot be used.
    """
    kind, _, name = spec.partition(":")
    if kind == RULE and name:
        rule = RuleJudge(name)
        if rule.sees_order:
            raise ValueError(f"--score {spec}: {rule.name} compares two responses; give FUNCTION(prompt, response).")
        return lambda asked: _by_rule(rule, asked, reporter)
    if kind == REWARD and name:
        model = RewardJudge(name, reporter.say)
        return lambda asked: _by_reward(model, asked, reporter)
    if kind == JUDGE and name:
        settings = {"a": "", "b": "", "task": "dialogue", "judge": name, **judge}
        config = JudgeConfig(**settings)  # pyright: ignore[reportArgumentType]
        made, spent = make_judge(config, reporter, stack), spending or Spending()
        if isinstance(made, EndpointJudge):
            check_consent(config, attended=spending is None and sys.stdin.isatty())

        def score(asked: Sequence[Asked]) -> Scores:
            compared = comparisons(list(_all_pairs(asked)), config.seed, both_orders=config.both_orders)
            if isinstance(made, EndpointJudge):
                agree_on_cost(made, compared, config, reporter, spent.dollars)
            verdicts = judge_all(made, compared, config, reporter, spent)
            won: dict[tuple[str, str], list[float]] = defaultdict(list)
            for comparison, verdict in zip(compared, verdicts, strict=True):
                share = _WON.get(verdict.outcome(comparison))
                if share is not None:
                    won[comparison.pair.row_id, comparison.pair.a].append(share)
                    won[comparison.pair.row_id, comparison.pair.b].append(1 - share)
            results = [[won.get((one.place, answer)) for answer in one.answers] for one in asked]
            shares = [[None if values is None else sum(values) / len(values) for values in some] for some in results]
            return Scores(shares, "no verdict on it can be read")

        return score
    raise ValueError(f"--score {spec} is unknown; use {KINDS}.")


def renamed(error: Exception, names: Mapping[str, str]) -> str:
    """An error's message with the options of the command judge, as `--max-cost`, called what the user calls them."""
    return re.sub(r"--[a-z][a-z-]*", lambda option: names.get(option[0], option[0]), str(error))


def _all_pairs(asked: Sequence[Asked]) -> list[Pair]:
    return [
        Pair(f"{one.place} {first} {second}", one.place, one.prompt, one.answers[first], one.answers[second])
        for one in asked
        for first, second in combinations(range(len(one.answers)), 2)
    ]


def _by_rule(rule: RuleJudge, asked: Sequence[Asked], reporter: Reporter) -> Scores:
    by_prompt, reasons = list[list[float | None]](), list[str]()
    with reporter.progress("scored", len(asked)) as update:
        for number, one in enumerate(asked, start=1):
            scores: list[float | None] = []
            for answer in one.answers:
                try:
                    scores.append(rule.score(one.prompt, answer))
                except JudgingFailed as error:
                    scores.append(None)
                    reasons.append(f"{one.place}: {error}")
            by_prompt.append(scores)
            update(number, {})
    return Scores(by_prompt, next(iter(reasons), ""))


def _by_reward(model: RewardJudge, asked: Sequence[Asked], reporter: Reporter) -> Scores:
    wanted = list(dict.fromkeys((one.prompt, answer) for one in asked for answer in one.answers))
    scores: dict[tuple[Prompt, str], float] = {}
    with reporter.progress("scored", len(wanted)) as update:
        for some in model.scores(wanted):
            scores |= some
            update(len(scores), {})
    return Scores([[scores[one.prompt, answer] for answer in one.answers] for one in asked])
