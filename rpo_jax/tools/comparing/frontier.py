"""Frontiers of reward over KL, with their bootstrap: pure functions of what was measured.

Letters: P policies of one method, S seeds of each, n held-out prompts, K values of KL, B draws of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

RESAMPLES = 1000


@dataclass(frozen=True)
class Measured:
    """What a method's policies gave, beside the model that they started from.

    Attributes:
        rewards: of one answer of each policy to each prompt; kls: its log-ratio to the start, nats.
        start: rewards of the start's answers.
    """

    rewards: Float[np.ndarray, "P S n"]
    kls: Float[np.ndarray, "P S n"]
    start: Float[np.ndarray, "S n"]


def upper_hull(kl: Sequence[float], reward: Sequence[float]) -> list[int]:
    """Points of the least concave function that lies above all points and never falls, by KL: numbers of its corners.

    Between two corners lies what a mixture of both policies reaches (KL is convex: its KL is at most as much); beyond
    the last corner a larger budget of KL buys nothing.  Source: Andrew 1979, the monotone chain.
    """
    corners: list[int] = []
    best = -np.inf
    for i in sorted(range(len(kl)), key=lambda i: (kl[i], -reward[i])):
        if reward[i] <= best:
            continue
        best = reward[i]
        while len(corners) > 1:
            a, b = corners[-2:]
            # b lies on or below the line from a to i
            if (reward[b] - reward[a]) * (kl[i] - kl[a]) > (reward[i] - reward[a]) * (kl[b] - kl[a]):
                break
            corners.pop()
        corners.append(i)
    return corners


def frontier_at(
    points: tuple[Float[np.ndarray, "P"], Float[np.ndarray, "P"]],
    chosen_by: tuple[Float[np.ndarray, "P"], Float[np.ndarray, "P"]],
    at: Float[np.ndarray, "K"],
) -> Float[np.ndarray, "K"]:
    """Reward at each KL: linear between the policies that are corners of another sample's hull, constant beyond.

    The highest of several noisy points is too high: who chooses the corners must not say how high they are.

    Args:
        points: KL and reward of every policy, the start among them.
        chosen_by: the same of the sample that chooses.
    """
    corners = upper_hull(chosen_by[0].tolist(), chosen_by[1].tolist())
    kl, reward = points[0][corners], points[1][corners]
    order = np.argsort(kl, kind="stable")
    return np.interp(at, kl[order], reward[order])


def draws(seeds: int, is_test: Bool[np.ndarray, "n"]) -> Iterator[tuple[Int[np.ndarray, "S"], Int[np.ndarray, "n"]]]:
    """Seeds and prompts: those that there are, then RESAMPLES times as many with replacement.

    The same whatever the method: differences between methods are paired by seed and by prompt.
    """
    random = np.random.default_rng(0)
    tune, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    yield np.arange(seeds), np.arange(len(is_test))
    for _ in range(RESAMPLES):
        drawn = np.empty(len(is_test), int)
        for part in (tune, test):
            drawn[part] = random.choice(part, len(part))
        yield random.integers(0, seeds, seeds), drawn


def bootstrapped(
    measured: Measured, is_test: Bool[np.ndarray, "n"], at: Float[np.ndarray, "K"]
) -> Float[np.ndarray, "B K"]:
    """The frontier's reward at each KL, as measured and then of every draw.

    Corners are chosen by the prompts that are not `is_test`, their KL and reward are those of the others. A policy's
    KL is the mean over prompts and seeds, never less than 0.
    """
    curves = []
    for seeds, prompts in draws(len(measured.start), is_test):
        halves = []
        for part in (prompts[is_test], prompts[~is_test]):
            of = np.ix_(seeds, part)
            kl = np.array([0.0, *(max(kls[of].mean(), 0.0) for kls in measured.kls)])
            reward = np.array([measured.start[of].mean(), *(rewards[of].mean() for rewards in measured.rewards)])
            halves.append((kl, reward))
        curves.append(frontier_at(halves[0], halves[1], at))
    return np.array(curves)


def interval(values: Float[np.ndarray, "B"]) -> tuple[float, float, float]:
    """What was measured and its 95 % percentile interval."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return float(values[0]), float(low), float(high)
