"""A comparison as one HTML page: tables, and a chart of each with its intervals; nothing fetched, no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rpo_jax.core.pages import dot_chart
from rpo_jax.core.templates import render
from rpo_jax.tools.comparing.study import Study, Table
from rpo_jax.tools.comparing.tables import difference, filled, judged_by, shown, summarised

TRIED = "Tuning trials"


def make_page(
    study: Study,
    results: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    trials: tuple[Sequence[str], Sequence[Sequence[str]]],
    effort: str,
) -> str:
    """The page, from what `tried` and the tables' cells say."""
    tables = [
        (table.title, _chart(table, results[table.name]), filled(table, results[table.name])) for table in study.tables
    ]
    return render(
        "comparison.html",
        title="Comparison",
        verdict=" ".join(_sentence(table, results[table.name]) for table in study.tables[:1]),
        tables=tables,
        trials=trials,
        tried_title=TRIED,
        effort=effort.replace("`", "").rstrip("."),
    )


def _sentence(table: Table, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Which row of a table is best, and by how much beside the row of reference."""
    rows = [row.label for row in table.rows if results.get(row.label)]
    column = judged_by([result for label in rows for result in results[label]])
    means = {label: one[0] for label in rows if (one := summarised(column, results[label])) is not None}
    if not rows:
        return "Nothing is done yet."
    if not means:
        return "Its rows have neither a gold win rate nor a preference accuracy in common."
    best = max(means, key=means.__getitem__)
    sentence = f"{table.title}: {best} has the highest {column.title.rstrip(', %')}, {means[best]:.1f} %"
    gap = None if best == table.against else difference(results[best], results.get(table.against, ()))
    if gap is None:
        return f"{sentence}."
    chance = ", which chance alone may bring" if not gap[1] > 0 else ""
    return f"{sentence}; its difference to {table.against} is {shown(gap, 1, signed=True)} points{chance}."


def _chart(table: Table, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Every row's mean and interval in what the table is judged by, beside the row of reference."""
    rows = [row.label for row in table.rows if results.get(row.label)]
    column = judged_by([result for label in rows for result in results[label]])
    summaries = {label: one for label in rows if (one := summarised(column, results[label])) is not None}
    baseline = (table.against, summaries[table.against][0]) if table.against in summaries else None
    return dot_chart(column.title, summaries, baseline)
