"""A comparison as one HTML page: tables, and a chart of each with its intervals; nothing fetched, no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rpo_jax.core.templates import render
from rpo_jax.tools.comparing.study import Study, Table
from rpo_jax.tools.comparing.tables import filled, judged_by, summarised

TRIED = "What was tried to tune the methods"
LEFT, WIDTH, LINE, RIGHT = 230, 700, 24, 20  # of a chart: labels, everything, a line's height, the margin


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
    return render("comparison.html", tables=tables, trials=trials, tried_title=TRIED, effort=effort.replace("`", ""))


def _chart(table: Table, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Places of mean and interval of every row in what the table is judged by, and of the row of reference."""
    rows = [row.label for row in table.rows if results.get(row.label)]
    column = judged_by([result for label in rows for result in results[label]])
    found = {label: one for label in rows if (one := summarised(column, results[label])) is not None}
    ends = [value for one in found.values() for value in one if value == value]
    low, high = min(ends, default=0.0), max(ends, default=0.0)
    room = max(high - low, 1e-9) * 0.06
    low, high = low - room, high + room

    def at(value: float) -> str:
        """Its x; empty for what is not a number."""
        return f"{LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT):.1f}" if value == value else ""

    ticks = [low + (high - low) * i / 4 for i in range(5)]
    return {
        "title": column.title,
        "rows": [(label, *map(at, interval)) for label, interval in found.items()],
        "against": at(found[table.against][0]) if table.against in found else "",
        "ticks": [(f"{value:.1f}", at(value)) for value in ticks],
        "left": LEFT,
        "middle": (LEFT + WIDTH - RIGHT) / 2,
        "width": WIDTH,
        "line_height": LINE,
    }
