"""What the HTML pages have in common besides the template `kit.html`: axes with round ticks, means with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MOST_TICKS = 6


def round_ticks(low: float, high: float, most: int = MOST_TICKS) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, from `low` or below to `high` or above: two to `most` of them.

    >>> round_ticks(41.3, 78.2)
    [40.0, 50.0, 60.0, 70.0, 80.0]
    """
    span = high - low if high > low else max(abs(low), 1.0) * 0.1
    power = math.floor(math.log10(span)) - 1
    for step in (factor * 10.0 ** (power + k) for k in range(4) for factor in (1, 2, 5)):
        first, last = math.floor(low / step + 1e-9), math.ceil((low + span) / step - 1e-9)
        if last - first < most:
            return [float(f"{k * step:.12g}") for k in range(first, last + 1)]
    raise AssertionError("a step as wide as the span leaves three ticks at most")


def dot_chart(
    title: str, rows: Mapping[str, tuple[float, float, float]], baseline: tuple[str, float] | None = None
) -> dict[str, Any]:
    """What `dots` of kit_parts.html draws: a mean with its interval for each label, over one axis.

    Args:
        title: names the axis, with its unit.
        rows: mean and both ends of the interval; NaN ends where there is none.
        baseline: name and value of what the others stand beside.
    """
    values = [value for row in rows.values() for value in row if math.isfinite(value)]
    values += [] if baseline is None else [baseline[1]]
    ticks = round_ticks(min(values), max(values)) if values else [0.0, 1.0]

    def place(value: float) -> float:
        """Percent of the axis."""
        return round(100 * (value - ticks[0]) / (ticks[-1] - ticks[0]), 2)

    drawn = [
        {
            "label": label,
            "mean": place(mean),
            "shown": f"{mean:.4g}",
            "range": (place(low), round(place(high) - place(low), 2)) if math.isfinite(low) else None,
        }
        for label, (mean, low, high) in rows.items()
        if math.isfinite(mean)
    ]
    return {
        "title": title,
        "rows": drawn,
        "ticks": [(f"{value:g}", place(value)) for value in ticks],
        "baseline": None if baseline is None else (f"{baseline[0]}: {baseline[1]:.4g}", place(baseline[1])),
    }
