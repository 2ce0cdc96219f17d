"""From cells to tables: means over seeds and prompts, each with its interval, and differences between rows.

Letters: S seeds, n held-out prompts of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from rpo_jax.core.text import table_cell
from rpo_jax.tools.comparing.cells import ACCURACY, LOG_PROB_ACCURACY
from rpo_jax.tools.comparing.study import Settings, StudyRow, Table

RESAMPLES = 4000
Interval = tuple[float, float, float]  # mean, and the ends of its 95 % interval
Result = Mapping[str, Any]


def over_seeds_and_prompts(scores: Float[np.ndarray, "S n"], seed: int = 0) -> Interval:
    """Mean and 95 % percentile interval: seeds drawn with replacement, then prompts of each.

    Both are samples of what might have been: other data and another start, and other questions.
    """
    random = np.random.default_rng(seed)
    seeds, prompts = scores.shape
    chosen = random.integers(0, seeds, (RESAMPLES, seeds))
    means = np.empty(RESAMPLES)
    for i, rows in enumerate(chosen):
        columns = random.integers(0, prompts, (seeds, prompts))
        means[i] = scores[rows[:, None], columns].mean()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(scores.mean()), float(low), float(high)


def over_seeds(values: Float[np.ndarray, "S"]) -> Interval:
    """Mean and 95 % interval by Student's t: for numbers that are known per seed only; NaN ends for a single one."""
    from scipy.stats import t

    count = len(values)
    mean = float(np.mean(values))
    if count < 2:
        return mean, float("nan"), float("nan")
    half = float(t.ppf(0.975, count - 1)) * float(np.std(values, ddof=1)) / count**0.5
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Column:
    """A number of a row's cells.

    Attributes:
        values: from a cell's result to a number, or to one for each prompt; None where the cell has none.
        digits: printed behind the point, after `scale`.
        varies: whether the seeds' interval says something; not of seconds, which depend on what else runs.
    """

    title: str
    values: Callable[[Result], Any]
    digits: int = 1
    scale: float = 1.0
    varies: bool = True


def _metric(name: str) -> Callable[[Result], Any]:
    return lambda result: result["metrics"].get(name)


COLUMNS = (
    Column("gold win rate against chosen, %", lambda result: result.get("wins"), 1, 100.0),
    Column("preference accuracy of rewards, %", _metric(ACCURACY), 1, 100.0),
    Column("preference accuracy of log-probs, %", _metric(LOG_PROB_ACCURACY), 1, 100.0),
    Column("reward margin", _metric("eval_rewards/margins"), 2),
    Column("KL to the start, nats", lambda result: result.get("divergence"), 2),
    Column("answer length, tokens", lambda result: result.get("answer_tokens"), 1),
    Column("training time, s, median", lambda result: result.get("train_seconds"), 0, varies=False),
)


def summarised(column: Column, results: Sequence[Result]) -> Interval | None:
    """A column's mean and interval over the seeds' results, or its median; None where there is nothing to tell."""
    values = [column.values(result) for result in results]
    if not values or any(value is None for value in values):
        return None
    numbers = np.asarray(values, np.float64) * column.scale
    if not column.varies:
        return float(np.median(numbers)), float("nan"), float("nan")
    return over_seeds_and_prompts(numbers) if numbers.ndim == 2 else over_seeds(numbers)


def difference(results: Sequence[Result], others: Sequence[Result]) -> Interval | None:
    """Of the judged column, in its unit, paired by seed and by prompt: what both have in common cancels."""
    column = judged_by([*results, *others])
    mine, theirs = ([column.values(result) for result in each] for each in (results, others))
    if len(mine) != len(theirs) or any(value is None for value in (*mine, *theirs)):
        return None
    gap = (np.asarray(mine, np.float64) - np.asarray(theirs, np.float64)) * column.scale
    return over_seeds_and_prompts(gap) if gap.ndim == 2 else over_seeds(gap)


def judged_by(results: Sequence[Result]) -> Column:
    """The gold win rate where all have one, otherwise the preference accuracy of rewards, otherwise that of log-probs.

    Objectives without a reference have no rewards. The gold win rate where they have nothing in common.
    """
    common = (column for column in COLUMNS[:3] if all(column.values(result) is not None for result in results))
    return next(common, COLUMNS[0])


def shown(interval: Interval | None, digits: int, signed: bool = False) -> str:
    if interval is None:
        return ""
    mean, low, high = interval
    sign = "+" if signed else ""
    if np.isnan(low):
        return f"{mean:{sign}.{digits}f}"
    return f"{mean:{sign}.{digits}f} ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})"


def filled(table: Table, results: Mapping[str, Sequence[Result]]) -> tuple[list[str], list[list[str]]]:
    """Titles and lines of a table, from the results of each row's seeds by its label; rows without any are left out."""
    columns = _columns([results[row.label] for row in table.rows if results.get(row.label)])
    against = results.get(table.against, ())
    titles = ["", *(column.title for column in columns), f"difference to {table.against}", "seeds"]
    lines = [_line(row, results[row.label], columns, table, against) for row in table.rows if results.get(row.label)]
    return titles, lines


def tried(
    trials: Mapping[str, Sequence[tuple[Settings, Result | None]]], tuned: Mapping[str, Settings]
) -> tuple[list[str], list[list[str]]]:
    """Titles and lines of every point of the methods' grids that was tried, with the chosen ones marked."""
    done = [
        (method, settings, result)
        for method, points in trials.items()
        for settings, result in points
        if result is not None
    ]
    columns = _columns([[result] for _, _, result in done])
    lines = [
        [
            method,
            ", ".join(f"{key}={value}" for key, value in settings.items()),
            *(shown(summarised(column, [result]), column.digits) for column in columns),
            "chosen" if tuned.get(method) == settings else "",
        ]
        for method, settings, result in done
    ]
    return ["method", "settings", *(column.title for column in columns), ""], lines


def _columns(rows: Sequence[Sequence[Result]]) -> list[Column]:
    """Those that some row has numbers for."""
    return [column for column in COLUMNS if any(summarised(column, results) is not None for results in rows)]


def _line(
    row: StudyRow, results: Sequence[Result], columns: Sequence[Column], table: Table, against: Sequence[Result]
) -> list[str]:
    cells = [shown(summarised(column, results), column.digits) for column in columns]
    gap = "" if row.label == table.against else shown(difference(results, against), 1, signed=True)
    return [row.label, *cells, gap, str(len(results))]


def markdown(title: str, titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table with its title."""
    first, *rest = ("| " + " | ".join(map(table_cell, line)) + " |" for line in (titles, *lines))
    return "\n".join([f"### {title}", "", first, "|" + "---|" * len(titles), *rest]) + "\n"
