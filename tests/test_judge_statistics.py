"""Intervals against scipy's and published ones, the length-controlled rate against scikit-learn's fit."""

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression

from rpo_jax.tools.judging import statistics


@pytest.mark.parametrize("trials", [1, 2, 10, 256, 10_000])
def test_wilson_is_scipys(trials):
    for successes in sorted({0, 1, trials // 3, trials // 2, trials - 1, trials}):
        theirs = stats.binomtest(successes, trials).proportion_ci(method="wilson")
        assert statistics.wilson(successes, trials) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_is_the_published_one():
    # Newcombe 1998, Statistics in Medicine 17, 857-872, Table I, method 3.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (successes, trials), interval in published.items():
        assert statistics.wilson(successes, trials) == pytest.approx(interval, abs=5e-5)


def test_the_bootstrap_is_scipys_and_the_binomials():
    scores = np.random.default_rng(0).choice([0, 0.5, 1], size=256, p=[0.3, 0.2, 0.5])
    ours = statistics.bootstrap(scores, seed=0)
    theirs = stats.bootstrap((scores,), np.mean, method="percentile", n_resamples=10_000, rng=1).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.004)
    wins = np.repeat([1.0, 0.0], [180, 76])  # the resampled mean of wins and losses is a binomial proportion
    exact = stats.binom(256, 180 / 256).ppf([0.025, 0.975]) / 256
    assert statistics.bootstrap(wins, seed=0) == pytest.approx(tuple(exact), abs=1 / 256)
    assert statistics.bootstrap(np.ones(9), seed=0) == (1.0, 1.0)
    assert statistics.bootstrap(scores, seed=0) == ours


def test_the_intervals_hold_the_truth_as_often_as_they_say():
    random, held = np.random.default_rng(0), {"wilson": 0, "bootstrap": 0}
    for trial in range(400):
        scores = (random.random(100) < 0.7).astype(float)
        for name, (low, high) in {
            "wilson": statistics.wilson(scores.sum(), 100),
            "bootstrap": statistics.bootstrap(scores, seed=trial, resamples=1000),
        }.items():
            held[name] += low <= 0.7 <= high
    assert all(0.92 <= count / 400 <= 0.98 for count in held.values()), held


def test_the_length_controlled_fit_is_scikit_learns():
    random = np.random.default_rng(0)
    differences = random.normal(40, 100, size=500)
    lengths = np.tanh(differences / differences.std())
    scores = (random.random(500) < 1 / (1 + np.exp(-0.3 - 1.5 * lengths))).astype(float)
    # Their penalty is on the slope only; the intercept becomes a feature to be penalised as ours is.
    features = np.stack([np.ones(500), lengths], axis=1)
    theirs = LogisticRegression(C=1 / statistics.RIDGE, fit_intercept=False, tol=1e-10).fit(features, scores)
    rate, slope = statistics.length_controlled(scores, differences)
    assert (rate, slope) == pytest.approx((1 / (1 + np.exp(-theirs.coef_[0, 0])), theirs.coef_[0, 1]), abs=1e-5)


def test_a_tie_counts_as_a_win_and_a_loss_of_half_weight():
    random = np.random.default_rng(1)
    scores, differences = random.choice([0, 0.5, 1], size=80), random.normal(size=80)
    tied = scores == 0.5
    split = np.concatenate([scores[~tied], np.ones(tied.sum()), np.zeros(tied.sum())])
    doubled = np.concatenate([differences[~tied], differences[tied], differences[tied]])
    weights = np.concatenate([np.ones((~tied).sum()), np.full(2 * tied.sum(), 0.5)])
    spread = differences.std() / doubled.std()  # the features divide by the spread of what they are given
    ours = statistics.length_controlled(scores, differences)
    theirs = LogisticRegression(C=1 / statistics.RIDGE, fit_intercept=False, tol=1e-10).fit(
        np.stack([np.ones(len(split)), np.tanh(doubled / doubled.std() / spread)], axis=1), split, sample_weight=weights
    )
    assert ours[1] == pytest.approx(theirs.coef_[0, 1], abs=1e-5)


def test_length_alone_gives_an_even_rate_and_no_length_effect_changes_nothing():
    random = np.random.default_rng(2)
    differences = random.normal(50, 30, size=4000)  # A is longer nearly always
    chance = 1 / (1 + np.exp(-3 * np.tanh(differences / differences.std())))
    scores = (random.random(4000) < chance).astype(float)
    assert scores.mean() > 0.85
    assert statistics.length_controlled(scores, differences)[0] == pytest.approx(0.5, abs=0.08)
    scores = (random.random(4000) < 0.7).astype(float)
    differences = random.normal(0, 30, size=4000)
    assert statistics.length_controlled(scores, differences)[0] == pytest.approx(scores.mean(), abs=0.005)


@pytest.mark.parametrize("n", [1, 2, 50])
def test_the_fit_is_finite_where_everything_is_separable(n):
    differences = np.arange(n) - n / 2.0
    for scores in (np.ones(n), np.zeros(n), (differences > 0).astype(float)):
        rate, slope = statistics.length_controlled(scores, differences)
        assert 0 < rate < 1
        assert np.isfinite(slope)
        low, high = statistics.length_controlled_bootstrap(scores, differences, seed=0, resamples=20)
        assert 0 < low <= high < 1
    assert statistics.length_controlled(np.ones(50), np.zeros(50))[0] > 0.98
