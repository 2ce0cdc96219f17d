"""What verdicts say: rates with their intervals, and what length and position had to do with them.

Letters: n prompts. A prompt's score is 1 where A won, 0 where B did, 1/2 for a tie, or the mean of both orders.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
Interval = tuple[float, float]


def wilson(successes: float, trials: int) -> Interval:
    """95 % score interval of a proportion.

    (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n).  Source: Wilson 1927, JASA 22, 209-212.
    Halves may be counted: ties spread less than wins and losses, so that the interval is then too wide, not too narrow.
    """
    if not trials:
        return math.nan, math.nan
    p, z2 = successes / trials, _Z**2 / trials
    middle = p + z2 / 2
    half = _Z * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials))
    # Rounding must not put a rate outside its own interval.
    return max(0.0, min(p, (middle - half) / (1 + z2))), min(1.0, max(p, (middle + half) / (1 + z2)))


def bootstrap(scores: Float[np.ndarray, "n"], seed: int, resamples: int = 10_000) -> Interval:
    """95 % percentile interval of the mean score, prompts drawn with replacement. Source: Efron 1979.

    Scores take few values, so that their counts in a resample are multinomial: the same draw, without n x resamples
    of memory.
    """
    if not len(scores):
        return math.nan, math.nan
    values, counts = np.unique(scores, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(scores), counts / len(scores), size=resamples)
    low, high = np.percentile(drawn @ values / len(scores), [2.5, 97.5])
    return float(low), float(high)


RIDGE = 0.01  # keeps the fit finite where lengths or verdicts separate perfectly; no weight beside a few prompts


def length_controlled(scores: Float[np.ndarray, "n"], differences: Float[np.ndarray, "n"]) -> tuple[float, float]:
    """The score to expect at equal lengths, and the log-odds that one unit of length adds.

    Fits P(A wins) = sigmoid(theta + phi tanh(d / std d)), d the difference of lengths, A's less B's, and gives
    sigmoid(theta) and phi.  Source: arXiv 2404.04475, Eq. 2, without its term for the difficulty of an instruction,
    which takes many models to fit; maximum likelihood with halves for ties and a ridge of 0.01, by Newton's method.
    """
    spread = float(np.std(differences))
    lengths = np.tanh(differences / spread) if spread > 0 else np.zeros_like(differences)
    features = np.stack([np.ones_like(lengths), lengths], axis=1)
    parameters = np.zeros(2)
    for _ in range(100):
        expected = 1 / (1 + np.exp(-np.clip(features @ parameters, -30, 30)))
        gradient = features.T @ (scores - expected) - RIDGE * parameters
        curvature = (features * (expected * (1 - expected))[:, None]).T @ features + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        # A full step from far away may overshoot.
        step *= min(1.0, 4.0 / max(float(np.abs(step).max()), 1e-12))
        parameters = parameters + step
        if float(np.abs(step).max()) < 1e-9:
            break
    return float(1 / (1 + math.exp(-parameters[0]))), float(parameters[1])


def length_controlled_bootstrap(
    scores: Float[np.ndarray, "n"], differences: Float[np.ndarray, "n"], seed: int, resamples: int = 1000
) -> Interval:
    """95 % percentile interval of the length-controlled rate, fitted anew to every resample of prompts."""
    n, random = len(scores), np.random.default_rng(seed)
    draws = (random.integers(n, size=n) for _ in range(resamples))
    rates = [length_controlled(scores[drawn], differences[drawn])[0] for drawn in draws]
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)
