from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax.objectives import contrast, metrics
from rpo_jax.objectives.objective import Term
from rpo_jax.objectives.scores import Responses, Scores
from tests.data.ragged import RESPONSES


def responses(log_prob, reference, valid):
    count = len(log_prob)
    return Responses(
        jnp.asarray(log_prob, jnp.float32),
        jnp.asarray(reference, jnp.float32),
        jnp.ones(count, int),
        jnp.asarray(valid),
    )


def scores_of(*sides):
    return Scores(dict(zip(RESPONSES, sides, strict=False)))


def draw(seed=0, size=5):
    rng = np.random.default_rng(seed)
    chosen_valid, rejected_valid = rng.random((2, size)) > 0.3
    chosen_valid[0] = rejected_valid[0] = True
    side = [rng.normal(-20, 5, (2, size)) for _ in range(3)]
    return scores_of(
        responses(*np.where(chosen_valid, side[0], np.nan), chosen_valid),
        responses(*np.where(rejected_valid, side[1], np.inf), rejected_valid),
        responses(*side[2], np.ones(size, bool)),
    )


def valid_rewards(side, beta):
    keep = np.asarray(side.valid)
    return beta * (np.asarray(side.log_prob, np.float64)[keep] - np.asarray(side.reference_log_prob)[keep])


def test_rewards_and_log_probs_are_means_over_valid_responses():
    scores = draw()
    got = metrics.finalize(metrics.preference_metrics(scores, 0.1, paired=True))
    both = np.asarray(scores["chosen"].valid & scores["rejected"].valid)
    pairs = [side._replace(valid=both) for side in (scores["chosen"], scores["rejected"])]
    margins = valid_rewards(pairs[0], 0.1) - valid_rewards(pairs[1], 0.1)
    log_probs = [np.asarray(side.log_prob)[both] for side in pairs]
    expected = {
        "rewards/chosen": valid_rewards(scores["chosen"], 0.1).mean(),
        "rewards/rejected": valid_rewards(scores["rejected"], 0.1).mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0.1 * metrics.TIE_NATS).mean(),
        "rewards/ties": (abs(margins) <= 0.1 * metrics.TIE_NATS).mean(),
        "logps/chosen": np.asarray(scores["chosen"].log_prob)[np.asarray(scores["chosen"].valid)].mean(),
        "logps/rejected": np.asarray(scores["rejected"].log_prob)[np.asarray(scores["rejected"].valid)].mean(),
        "logps/accuracies": (log_probs[0] - log_probs[1] > metrics.TIE_NATS).mean(),
        "kl": max(0.0, valid_rewards(scores["mismatched"], 1.0).mean()),
    }
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


def test_a_tie_is_no_success():
    side = responses([-3.0, -3.0], [-3.0, -3.0], [True, True])
    got = metrics.finalize(metrics.preference_metrics(scores_of(side, side, side), 0.1, paired=True))
    assert got["rewards/accuracies"] == got["logps/accuracies"] == 0


@pytest.mark.parametrize(("difference", "accuracy"), [(9e-5, 0.0), (-9e-5, 0.0), (1.1e-4, 1.0), (-1.1e-4, 0.0)])
def test_a_difference_of_rounding_is_a_tie_whatever_beta(difference, accuracy):
    chosen = responses([-3.0 + difference], [-3.0], [True])
    rejected = responses([-3.0], [-3.0], [True])
    for beta in (0.01, 0.1, 10.0):
        got = metrics.finalize(metrics.preference_metrics(scores_of(chosen, rejected, chosen), beta, paired=True))
        assert got["rewards/accuracies"] == got["logps/accuracies"] == accuracy
        assert got["rewards/ties"] == (abs(difference) < metrics.TIE_NATS)


def test_a_mean_over_small_weights_is_theirs():
    parts = metrics.in_parts(*(Term(jnp.asarray(value), jnp.asarray(0.01)) for value in (1.0, 3.0)))
    both = metrics.combine({"loss": parts}, {"loss": parts})
    assert metrics.finalize(both)["loss"] == pytest.approx(4.0)
    assert metrics.finalize({"loss": metrics.in_parts(Term(jnp.zeros(()), jnp.zeros(())))})["loss"] == 0.0


@pytest.mark.parametrize(("difference", "accuracy"), [(2e-4, 0.0), (7e-4, 1.0)])
def test_long_answers_round_more(difference, accuracy):
    chosen, rejected = (responses([-600.0 + more], [-600.0], [True]) for more in (difference, 0.0))
    got = metrics.finalize(metrics.preference_metrics(scores_of(chosen, rejected, chosen), 0.1, paired=True))
    assert (got["rewards/accuracies"], got["rewards/ties"]) == (accuracy, 1 - accuracy)


def test_unpaired_margins_compare_all_couples():
    scores = draw(1)
    got = metrics.finalize(metrics.preference_metrics(scores, 0.1, paired=False))
    chosen, rejected = valid_rewards(scores["chosen"], 0.1), valid_rewards(scores["rejected"], 0.1)
    np.testing.assert_allclose(got["rewards/margins"], (chosen[:, None] - rejected[None, :]).mean(), rtol=1e-5)
    assert "rewards/accuracies" not in got


def test_of_prompts_with_all_their_responses_each_good_one_is_compared_with_each_bad_one():
    """Three prompts, the last without a bad response; a couple of different prompts does not count."""
    chosen = responses(
        [-1.0, -9.0, -5.0, 0.0, -2.0, 0.0], [-2.0] * 6, np.array([1, 1, 1, 0, 1, 0], bool)
    )  # ratios 1, -7, -3; 0
    rejected = responses(
        [-1.0, -3.0, -6.0, -4.0, 0.0, 0.0], [-2.0] * 6, np.array([1, 1, 1, 1, 0, 0], bool)
    )  # 1, -1; -4, -2
    got = metrics.finalize(metrics.preference_metrics(scores_of(chosen, rejected), 0.1, paired=False, prompts=3))
    # Of the first prompt 1 against 1 and -1, -7 against them; of the second -3 against -4 and -2.
    expected = {"rewards/accuracies": 2 / 6, "rewards/ties": 1 / 6, "logps/accuracies": 2 / 6}
    assert {name: pytest.approx(float(got[name])) for name in expected} == expected


def test_a_kind_that_is_not_there_has_no_statistics():
    got = metrics.preference_metrics(scores_of(draw()["chosen"]), 0.1, paired=True)
    assert got.keys() == {"rewards/chosen", "logps/chosen"}


def test_batches_combine_to_the_mean_over_all_of_them():
    batches = [draw(seed, size) for seed, size in ((2, 3), (3, 6), (4, 1))]
    sides = [[batch[kind] for batch in batches] for kind in RESPONSES]
    joined = scores_of(*(jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts) for parts in sides))
    parts = [metrics.preference_metrics(batch, 0.1, paired=True) for batch in batches]
    got = metrics.finalize(reduce(metrics.combine, parts))
    expected = metrics.finalize(metrics.preference_metrics(joined, 0.1, paired=True))
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, err_msg=name)


def test_nothing_valid_is_zero():
    empty = responses([np.nan], [np.nan], [False])
    got = metrics.finalize(metrics.preference_metrics(scores_of(empty, empty, empty), 0.1, paired=True))
    assert got
    assert all(value == 0 for value in got.values())


def test_contrast_metrics_describe_the_rows_with_a_contrast():
    weights = jnp.array([[0.5, 0.3, 0.2], [0.25, 0.75, 9.0], [9.0, 9.0, 9.0]])
    mask = jnp.array([[1, 1, 1], [1, 1, 0], [0, 0, 0]], bool)
    cosine = jnp.array([[1.0, 0.6, 0.4], [0.6, 1.0, 0.9], [1.0, 1.0, 1.0]])
    described = metrics.contrast_metrics(
        contrast.ContrastWeights(weights, mask, jnp.array([0.5, 0.7, 99.0])),
        cosine,
        jnp.array([1, 2, 3]),
        jnp.array([1, 2, 3]),
        paired=True,
    )
    got = metrics.finalize(described)
    expected = {
        "contrast/diagonal_weight": (0.5 + 0.75) / 2,
        "contrast/perplexity": np.mean(contrast.row_perplexity(weights, mask)[:2]),
        "contrast/temperature": 0.6,
        "contrast/related_weight": (0.3 + 0.25) / 2,
    }
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6, err_msg=name)


def test_contrast_metrics_leave_out_what_a_weighting_lacks():
    mask, ids = jnp.ones((2, 3), bool), jnp.arange(3)
    got = metrics.contrast_metrics(
        contrast.ContrastWeights(contrast.uniform_weights(mask), mask), None, ids[:2], ids, paired=False
    )
    assert got.keys() == {"contrast/perplexity"}
    np.testing.assert_allclose(metrics.finalize(got)["contrast/perplexity"], 3, rtol=1e-6)


def test_rows_that_miss_their_perplexity_are_counted_and_left_out_of_the_mean_temperature():
    mask = jnp.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
    temperatures = jnp.array([0.4, 1e3, 1e-5, 9.0])
    perplexity_error = jnp.array([0.0, -4.0, 1.0, 7.0])  # the last row has no contrast at all
    ids = jnp.arange(4)
    described = metrics.contrast_metrics(
        contrast.ContrastWeights(contrast.uniform_weights(mask), mask, temperatures, perplexity_error),
        None,
        ids,
        ids[:3],
        paired=False,
    )
    got = metrics.finalize(described)
    assert got["contrast/uncalibrated_rows"] == 2
    assert got["contrast/tied_rows"] == 1
    np.testing.assert_allclose(got["contrast/temperature"], 0.4, rtol=1e-6)
    twice = metrics.finalize(metrics.combine(described, described))
    assert twice["contrast/uncalibrated_rows"] == 2  # of an average batch
