"""Frontiers as tables, as a picture and as a page: every method's beside the one that it is held to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from rpo_jax.core.pages import dot_chart, round_ticks
from rpo_jax.core.templates import render
from rpo_jax.tools.comparing.frontier import Measured, bootstrapped, interval
from rpo_jax.tools.comparing.tables import Interval, shown

KLS = (1, 2, 4, 8)  # nats, at which frontiers are compared
GRID = np.arange(0, 12.01, 0.25)  # nats, of the pictures; a policy that is farther is told, not drawn
AT = np.searchsorted(GRID, KLS)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 250, 46, 10, 28, 42  # of a panel and its margins


@dataclass(frozen=True)
class Frontier:
    """What was measured for one of a study's frontiers, of seeds that all its rows have.

    Attributes:
        against: label of the row that differences are taken to.
        rows: by label.
        is_test: of each held-out prompt.
    """

    name: str
    title: str
    against: str
    seeds: tuple[int, ...]
    rows: Mapping[str, Measured]
    is_test: Bool[np.ndarray, "n"]


def table(
    frontier: Frontier, curves: Mapping[str, Float[np.ndarray, "B K"]], gaps: Mapping[str, Interval]
) -> tuple[list[str], list[list[str]]]:
    """Titles and lines: reward at each of KLS, their mean, its difference to the row of reference, all KLs."""
    titles = ["", *(f"at KL {kl}" for kl in KLS), "mean", f"difference to {frontier.against}", "KL of policies, nats"]
    lines = []
    for label, measured in frontier.rows.items():
        at = curves[label][:, AT]
        kl = measured.kls[..., frontier.is_test].mean(axis=(1, 2))
        # Beyond its farthest policy a method was not asked: what it reached so far is the least that it can.
        least = ["≥ " if kl.max() < wanted else "" for wanted in KLS]
        lines.append(
            [
                label,
                *(mark + shown(interval(at[:, k]), 3) for k, mark in enumerate(least)),
                shown(interval(at.mean(axis=1)), 3),
                shown(gaps.get(label), 3, signed=True),
                f"{kl.min():.2f} to {kl.max():.2f}",
            ]
        )
    return titles, lines


def points(frontier: Frontier) -> tuple[list[str], list[list[str]]]:
    """Titles and lines of all policies: KL and reward on the prompts that test, beside those that choose."""
    lines = []
    for label, measured in frontier.rows.items():
        for number, (kls, rewards) in enumerate(zip(measured.kls, measured.rewards, strict=True), start=1):
            parts = [
                f"{values[:, part].mean():.{digits}f}"
                for part in (frontier.is_test, ~frontier.is_test)
                for values, digits in ((kls, 2), (rewards, 3))
            ]
            lines.append([f"{label}, {number}", *parts])
    return ["policy", "KL, test", "reward, test", "KL, tune", "reward, tune"], lines


def panels(frontier: Frontier, curves: Mapping[str, Float[np.ndarray, "B K"]]) -> list[dict[str, Any]]:
    """What frontier_parts.html draws, of every row, all on the same axes."""
    bands = {label: np.percentile(values[1:], [2.5, 97.5], axis=0) for label, values in curves.items()}
    tests, rows = frontier.is_test, frontier.rows
    far = {label: measured.kls[..., tests].mean(axis=(1, 2)) for label, measured in rows.items()}
    high = {label: measured.rewards[..., tests].mean(axis=(1, 2)) for label, measured in rows.items()}
    drawn = {label: kl <= GRID[-1] for label, kl in far.items()}
    ends = [*(band for both in bands.values() for band in both), *(high[label][drawn[label]] for label in high)]
    ticks = round_ticks(min(each.min(initial=1) for each in ends), max(each.max(initial=-1) for each in ends))

    def x(kl: float) -> float:
        return round(LEFT + kl / GRID[-1] * (WIDTH - LEFT - RIGHT), 1)

    def y(reward: float) -> float:
        return round(TOP + (ticks[-1] - reward) / (ticks[-1] - ticks[0]) * (HEIGHT - TOP - BOTTOM), 1)

    def line(values: Float[np.ndarray, "K"]) -> list[str]:
        return [f"{x(kl)},{y(reward)}" for kl, reward in zip(GRID, values, strict=True)]

    def curve(label: str) -> dict[str, str]:
        low, top = bands[label]
        return {"line": " ".join(line(curves[label][0])), "band": " ".join([*line(low), *reversed(line(top))])}

    return [
        {
            "label": label,
            "own": curve(label),
            "against": curve(frontier.against) if frontier.against in curves and label != frontier.against else None,
            "against_label": frontier.against,
            "points": [
                (x(max(kl, 0)), y(reward))
                for kl, reward, inside in zip(far[label], high[label], drawn[label], strict=True)
                if inside
            ],
            "outside": int((~drawn[label]).sum()),
            "x_ticks": [(f"{kl:g}", x(kl)) for kl in range(0, int(GRID[-1]) + 1, 2)],
            "y_ticks": [(f"{value:g}", y(value)) for value in ticks],
            "size": {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        }
        for label in frontier.rows
    ]


def shown_frontier(frontier: Frontier) -> dict[str, Any]:
    """All that page, picture and Markdown say of a frontier."""
    # Reward along GRID of every row, as measured and then of each draw.
    curves = {label: bootstrapped(measured, frontier.is_test, GRID) for label, measured in frontier.rows.items()}
    own = curves.get(frontier.against)
    gaps = {
        label: interval((values - own)[:, AT].mean(axis=1))
        for label, values in curves.items()
        if own is not None and label != frontier.against
    }
    axis = f"mean reward at KL {', '.join(map(str, KLS))}: difference to {frontier.against}"
    return {
        "name": frontier.name,
        "title": frontier.title,
        "seeds": ", ".join(map(str, frontier.seeds)),
        "prompts": (int((~frontier.is_test).sum()), int(frontier.is_test.sum())),
        "panels": panels(frontier, curves),
        "dots": dot_chart(axis, gaps, (frontier.against, 0.0)),
        "table": table(frontier, curves, gaps),
        "points": points(frontier),
    }


def picture(shown_one: Mapping[str, Any]) -> str:
    """All panels as one SVG file."""
    return render("frontier_picture.html", panels=shown_one["panels"])


def make_page(frontiers: Sequence[Mapping[str, Any]], effort: str) -> str:
    return render("frontier.html", title="Frontiers", frontiers=frontiers, effort=effort.replace("`", "").rstrip("."))
