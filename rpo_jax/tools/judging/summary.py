"""Verdicts as numbers, as JSON and Markdown, on disk."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rpo_jax.core.files import atomic_write
from rpo_jax.core.jsonl import write_jsonl
from rpo_jax.core.pages import dot_chart
from rpo_jax.core.templates import render
from rpo_jax.tools.judging import statistics
from rpo_jax.tools.judging.comparisons import Comparison, Verdict, as_json

FILES = VERDICTS, SUMMARY, REPORT, PAGE = "verdicts.jsonl", "summary.json", "summary.md", "summary.html"
SHOWN = 12  # comparisons of the page
LENGTH_METHOD = (
    "logistic regression of the score on tanh(length difference / its standard deviation), predicted at equal lengths; "
    "lengths in characters (arXiv 2404.04475, Eq. 2, without instruction difficulty)"
)
# By their names on the page: what is drawn, and its interval.
_RATES = {
    "win rate, Wilson interval": ("win_rate", "win_rate_wilson_95"),
    "win rate, bootstrap interval": ("win_rate", "win_rate_bootstrap_95"),
    "length-controlled win rate": ("length_controlled_win_rate", "length_controlled_bootstrap_95"),
}
_SCORE = {"a": 1.0, "tie": 0.5, "b": 0.0}


def summarize(
    comparisons: Sequence[Comparison], verdicts: Sequence[Verdict], *, sees_order: bool, seed: int
) -> dict[str, Any]:
    """Counts and rates over prompts; without a single verdict the rates are None.

    A prompt judged in both orders has the mean of both scores, and is won above 1/2. Verdicts that cannot be read, and
    comparisons that were refused, count for nothing but themselves.
    """
    outcomes = [verdict.outcome(comparison) for comparison, verdict in zip(comparisons, verdicts, strict=True)]
    counts = Counter(outcomes)
    by_prompt: dict[str, list[float]] = {}
    pairs = {comparison.pair.key: comparison.pair for comparison in comparisons}
    for comparison, outcome in zip(comparisons, outcomes, strict=True):
        if outcome in _SCORE:
            by_prompt.setdefault(comparison.pair.key, []).append(_SCORE[outcome])
    scores = np.array([np.mean(values) for values in by_prompt.values()])
    lengths = np.array([[len(pairs[key].a), len(pairs[key].b)] for key in by_prompt], dtype=float).reshape(-1, 2)
    return {
        "prompts": len(pairs),
        "comparisons": len(comparisons),
        "unparsable": counts["unparsable"],
        "refused": counts["refused"],
        "judged_prompts": len(scores),
        "win": int(np.sum(scores > 0.5)),
        "tie": int(np.sum(scores == 0.5)),
        "loss": int(np.sum(scores < 0.5)),
        **_rates(scores, lengths, seed),
        "length": _lengths(scores, lengths),
        "position": _position(comparisons, outcomes) if sees_order else None,
    }


def _rates(scores: np.ndarray, lengths: np.ndarray, seed: int) -> dict[str, Any]:
    names = ("win_rate", "win_rate_wilson_95", "win_rate_bootstrap_95", "length_controlled_win_rate")
    if not len(scores):
        return dict.fromkeys((*names, "length_controlled_bootstrap_95", "length_log_odds"))
    differences = lengths[:, 0] - lengths[:, 1]
    controlled, log_odds = statistics.length_controlled(scores, differences)
    return {
        "win_rate": float(scores.mean()),
        "win_rate_wilson_95": list(statistics.wilson(float(scores.sum()), len(scores))),
        "win_rate_bootstrap_95": list(statistics.bootstrap(scores, seed)),
        "length_controlled_win_rate": controlled,
        "length_controlled_bootstrap_95": list(statistics.length_controlled_bootstrap(scores, differences, seed)),
        "length_log_odds": log_odds,
        "length_controlled_method": LENGTH_METHOD,
    }


def _lengths(scores: np.ndarray, lengths: np.ndarray) -> dict[str, Any] | None:
    """Characters of both sides, and how the longer response fared."""
    if not len(scores):
        return None
    longer, shorter = lengths[:, 0] > lengths[:, 1], lengths[:, 0] < lengths[:, 1]
    return {
        "a_mean_characters": float(lengths[:, 0].mean()),
        "b_mean_characters": float(lengths[:, 1].mean()),
        "a_median_characters": float(np.median(lengths[:, 0])),
        "b_median_characters": float(np.median(lengths[:, 1])),
        "a_longer": int(longer.sum()),
        "a_shorter": int(shorter.sum()),
        "win_rate_where_a_is_longer": float(scores[longer].mean()) if longer.any() else None,
        "win_rate_where_a_is_shorter": float(scores[shorter].mean()) if shorter.any() else None,
    }


def _position(comparisons: Sequence[Comparison], outcomes: Sequence[str]) -> dict[str, Any] | None:
    """How often the response shown first won, of those where one won; how often both orders agreed."""
    decided = [
        (outcome == "a") == comparison.a_first
        for comparison, outcome in zip(comparisons, outcomes, strict=True)
        if outcome in ("a", "b") and comparison.pair.a != comparison.pair.b
    ]
    if not decided:
        return None
    orders: dict[str, list[str]] = {}
    for comparison, outcome in zip(comparisons, outcomes, strict=True):
        if outcome in _SCORE and comparison.pair.a != comparison.pair.b:
            orders.setdefault(comparison.pair.key, []).append(outcome)
    both = [verdicts for verdicts in orders.values() if len(verdicts) == 2]
    return {
        "decided": len(decided),
        "first_won": float(np.mean(decided)),
        "first_won_wilson_95": list(statistics.wilson(sum(decided), len(decided))),
        "judged_in_both_orders": len(both),
        "same_verdict_in_both_orders": float(np.mean([len(set(verdicts)) == 1 for verdicts in both])) if both else None,
    }


def write(
    folder: Path, comparisons: Sequence[Comparison], verdicts: Sequence[Verdict], summary: Mapping[str, Any]
) -> None:
    """Verdicts and summary into a folder; each file is replaced whole."""
    rows = (_row(comparison, verdict) for comparison, verdict in zip(comparisons, verdicts, strict=True))
    write_jsonl(folder / VERDICTS, rows, ascii_only=False)
    atomic_write(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    atomic_write(folder / REPORT, markdown(summary))
    atomic_write(folder / PAGE, page(summary, comparisons, verdicts))


def _row(comparison: Comparison, verdict: Verdict) -> dict[str, Any]:
    return {
        "row_id": comparison.pair.row_id,
        "prompt": as_json(comparison.pair.prompt),
        "a": comparison.pair.a,
        "b": comparison.pair.b,
        "first": "a" if comparison.a_first else "b",
        "winner": verdict.outcome(comparison),
        "answer": verdict.answer,
        "cached": verdict.cached,
    }


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f} %"


def _range(interval: Sequence[float] | None) -> str:
    return "none" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def markdown(summary: Mapping[str, Any]) -> str:
    """The summary as a page, also what the command prints."""
    return render("judge_summary.md", **summary, percent=_percent, range=_range, length_method=LENGTH_METHOD)


def page(summary: Mapping[str, Any], comparisons: Sequence[Comparison], verdicts: Sequence[Verdict]) -> str:
    """The summary as an HTML page, with some of the comparisons."""
    a, b = summary["a"], summary["b"]
    rows = {
        label: (100 * summary[mean], *(100 * end for end in summary[interval]))
        for label, (mean, interval) in _RATES.items()
        if summary[mean] is not None
    }
    step = -(-len(comparisons) // SHOWN) or 1
    winners = {"a": a, "b": b, "tie": "tie", "unparsable": "answer that cannot be read", "refused": "refused"}
    shown = [
        {**_row(comparison, verdict), "winner": winners[verdict.outcome(comparison)]}
        for comparison, verdict in list(zip(comparisons, verdicts, strict=True))[::step]
    ]
    return render(
        "judge_summary.html",
        title=f"{a} against {b}",
        verdict=_sentence(summary),
        chart=dot_chart(f"win rate of {a}, %", rows, ("even", 50.0)),
        facts=_facts(summary),
        shown=shown,
        **{name: summary[name] for name in ("a", "b", "task", "judge", "prompts", "comparisons", "seed")},
        length_method=LENGTH_METHOD,
    )


def _sentence(summary: Mapping[str, Any]) -> str:
    """What came out, and whether chance alone may have brought it."""
    a, b, interval = summary["a"], summary["b"], summary["win_rate_wilson_95"]
    if interval is None:
        return f"{summary['judge']} gave no verdict that can be read."
    low, high = interval
    side = "more often than not" if low > 0.5 else "less often than not" if high < 0.5 else "about as often as not"
    chance = ", which chance alone may bring" if low <= 0.5 <= high else ""
    rate = f"{_percent(summary['win_rate'])} of {summary['judged_prompts']} prompts ({_range(interval)})"
    return f"{a} wins against {b} {side}, by {summary['judge']}: {rate}{chance}."


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of the table."""
    a, length, position = summary["a"], summary["length"], summary["position"]
    rates = {name: f"{_percent(summary[mean])} ({_range(summary[ends])})" for name, (mean, ends) in _RATES.items()}
    facts = [
        *rates.items(),
        ("wins, ties, losses", " / ".join(str(summary[name]) for name in ("win", "tie", "loss"))),
        ("unreadable answers", str(summary["unparsable"])),
        ("refused comparisons", str(summary["refused"])),
    ]
    if length:
        means = f"{length['a_mean_characters']:.0f} / {length['b_mean_characters']:.0f}"
        facts += [
            ("mean length, characters", means),
            (f"win rate where {a} is longer", _percent(length["win_rate_where_a_is_longer"])),
            (f"win rate where {a} is shorter", _percent(length["win_rate_where_a_is_shorter"])),
        ]
    if position:
        facts.append(("wins of the response shown first", _percent(position["first_won"])))
        if position["judged_in_both_orders"]:
            facts.append(("agreement of both orders", _percent(position["same_verdict_in_both_orders"])))
    return facts
