"""A comparison as one HTML page: tables, and a chart of each with its intervals; nothing fetched, no script."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from rpo_jax.tools.comparing.study import Study, Table
from rpo_jax.tools.comparing.tables import filled, judged_by, summarised

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1b1f24; --soft: #57606a; --line: #d5dae0;
  --mark: #0b62c4; --zero: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1c2026; --ink: #e8eaed; --soft: #a8b0ba;
  --line: #3a414b; --mark: #74aeff; --zero: #ff9d6b; } }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.45rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; } .soft { color: var(--soft); }
code { overflow-wrap: anywhere; } .wide { overflow-x: auto; } svg { display: block; max-width: 46rem; width: 100%; }
table { border-collapse: collapse; font-size: .88rem; } svg text { fill: var(--ink); font-size: 13px; }
th, td { text-align: right; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  font-variant-numeric: tabular-nums; } th:first-child, td:first-child { text-align: left; }
svg .range { stroke: var(--mark); stroke-width: 2; } svg .mean { fill: var(--mark); }
svg .own { stroke: var(--zero); stroke-dasharray: 4 3; } svg .axis { stroke: var(--line); }
svg .tick { fill: var(--soft); font-size: 12px; }
"""
TRIED = "What was tried to tune the methods"
LEFT, WIDTH, HEIGHT, RIGHT = 230, 700, 24, 20  # of a chart: labels, everything, a line, the margin


def make_page(
    study: Study,
    results: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    trials: tuple[Sequence[str], Sequence[Sequence[str]]],
    told: str,
) -> str:
    """The page, from what `tried` and the tables' cells say."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'><title>rpo_jax comparison</title>",
        f"<style>{_STYLE}</style></head><body><h1>Comparison</h1>",
        f"<p class='soft'>{html.escape(told.replace('`', ''))}. Intervals are of 95 %.</p>",
    ]
    for table in study.tables:
        parts += [f"<h2>{html.escape(table.title)}</h2>", _chart(table, results[table.name])]
        parts.append(_table(*filled(table, results[table.name])))
    parts += [f"<h2>{TRIED}</h2>", _table(*trials), "</body></html>\n"]
    return "\n".join(parts)


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"


def _chart(table: Table, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Mean and interval of every row in what the table is judged by; a dashed line at the row of reference."""
    rows = [row.label for row in table.rows if results.get(row.label)]
    column = judged_by([result for label in rows for result in results[label]])
    found = {label: summarised(column, results[label]) for label in rows}
    drawn = {label: one for label, one in found.items() if one is not None}
    if not drawn:
        return f"<p class='soft'>No row has a {html.escape(column.title)} yet.</p>"
    ends = [value for one in drawn.values() for value in one if value == value]
    low, high = min(ends), max(ends)
    room = max(high - low, 1e-9) * 0.06
    low, high = low - room, high + room

    def at(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    bottom = HEIGHT * len(drawn) + 8
    parts = [f"<svg viewBox='0 0 {WIDTH} {bottom + 40}' role='img' aria-label='{html.escape(column.title)}'>"]
    for i in range(5):
        value = low + (high - low) * i / 4
        parts.append(f"<line class='axis' x1='{at(value):.1f}' x2='{at(value):.1f}' y1='0' y2='{bottom}'/>")
        parts.append(
            f"<text class='tick' x='{at(value):.1f}' y='{bottom + 16}' text-anchor='middle'>{value:.1f}</text>"
        )
    if table.against in drawn:
        own = at(drawn[table.against][0])
        parts.append(f"<line class='own' x1='{own:.1f}' x2='{own:.1f}' y1='0' y2='{bottom}'/>")
    for i, (label, (mean, least, most)) in enumerate(drawn.items()):
        y = HEIGHT * (i + 0.5) + 4
        parts.append(f"<text x='{LEFT - 12}' y='{y + 4:.0f}' text-anchor='end'>{html.escape(label)}</text>")
        if least == least:
            parts.append(f"<line class='range' x1='{at(least):.1f}' x2='{at(most):.1f}' y1='{y}' y2='{y}'/>")
        parts.append(f"<circle class='mean' cx='{at(mean):.1f}' cy='{y}' r='4.5'/>")
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f"<text x='{middle}' y='{bottom + 34}' text-anchor='middle'>{html.escape(column.title)}</text></svg>")
    return "".join(parts)
