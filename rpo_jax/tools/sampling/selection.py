"""Which of a prompt's scored answers become preference data, and against which others.

Rules are functions of the scores of one prompt's answers, which all differ as texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

Pair = tuple[int, int]  # numbers of the better answer and of the worse one
Rule = Callable[[Sequence[float], np.random.Generator], list[Pair]]


def accepted(scores: Sequence[float], n: int, beta: float, uniform: Callable[[], float]) -> list[int]:
    """Numbers of up to n answers, drawn from their softmax(score / beta) by statistical rejection sampling.

    Fewer where there are not n of them. Source: Algorithm 1 of RSO, arXiv 2309.06657: passes over those that are left,
    each accepted with probability exp((score - the pass's greatest) / beta).

    Args:
        beta: in units of the scores; small takes the best, large takes any.
        uniform: gives the next random number in [0, 1).
    """
    left, drawn = list(range(len(scores))), list[int]()
    while left and len(drawn) < n:
        greatest, taken = max(scores[number] for number in left), set[int]()
        for number in left:
            if uniform() < math.exp((scores[number] - greatest) / beta):
                drawn.append(number)
                taken.add(number)
                if len(drawn) == n:
                    break
        left = [number for number in left if number not in taken]
    return drawn


def best_worst(scores: Sequence[float], random: np.random.Generator) -> list[Pair]:
    """The best answer against the worst."""
    return _ranked([(int(np.argmax(scores)), int(np.argmin(scores)))], scores)


def first_round(scores: Sequence[float], random: np.random.Generator) -> list[Pair]:
    """Answers in pairs by chance, n / 2 of them. Source: RSO, section 3.3."""
    order = random.permutation(len(scores)).tolist()
    return _ranked(zip(order[::2], order[1::2], strict=False), scores)


def tournament(scores: Sequence[float], random: np.random.Generator) -> list[Pair]:
    """All matches of a knock-out tournament, n - 1 of them. Source: RSO, section 3.3."""
    matches, going = list[Pair](), random.permutation(len(scores)).tolist()
    while len(going) > 1:
        played = list(zip(going[::2], going[1::2], strict=False))
        matches += played
        going = [max(match, key=scores.__getitem__) for match in played] + going[2 * len(played) :]
    return _ranked(matches, scores)


def rso(n: int, beta: float) -> Rule:
    """The first round among n answers that rejection sampling accepts."""

    def select(scores: Sequence[float], random: np.random.Generator) -> list[Pair]:
        kept = accepted(scores, n, beta, random.random)
        pairs = first_round([scores[number] for number in kept], random)
        return [(kept[better], kept[worse]) for better, worse in pairs]

    return select


def _ranked(pairs: Iterator[Pair] | Sequence[Pair] | zip[Pair], scores: Sequence[float]) -> list[Pair]:
    """The better one first; ties are no preferences."""
    return [
        (first, second) if scores[first] > scores[second] else (second, first)
        for first, second in pairs
        if scores[first] != scores[second]
    ]


RULES: dict[str, Rule] = {"best_worst": best_worst, "first_round": first_round, "tournament": tournament}
