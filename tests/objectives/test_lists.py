"""Objectives of scored lists: published numbers, slots that hold nothing, and no say in which responses are chosen."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax.objectives.methods import OBJECTIVES
from rpo_jax.objectives.scores import Responses, Scores

LOG_RATIOS, SCORES = (3.0, -1.0, 0.5, -4.0), (9.0, 6.0, 7.0, 2.0)
VALUES = {"exo_rewards": 0.323447627076, "infonca": 1.12620471337, "nca": 1.25818537239}


def lists(*lists_of, slots, fill=jnp.nan):
    """Scores of lists, each (log-ratios, scores) of its chosen and of its rejected responses, in so many slots each."""
    sides = {}
    for kind in (0, 1):
        rows = [of[kind] for of in lists_of]
        valid = jnp.array([[k < len(row[0]) for k in range(slots)] for row in rows])
        ratio, score = (
            jnp.array([[*row[part], *[fill] * (slots - len(row[part]))] for row in rows]) for part in (0, 1)
        )
        zeros = jnp.zeros(ratio.shape)
        sides[("chosen", "rejected")[kind]] = Responses(ratio, zeros, jnp.ones(ratio.shape, int), valid, score=score)
    return Scores(sides)


def parted(*chosen):
    """The list above, with these of its responses as the chosen ones."""
    both = [k for k in range(4) if k in chosen], [k for k in range(4) if k not in chosen]
    return [([LOG_RATIOS[k] for k in part], [SCORES[k] for k in part]) for part in both]


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize(("double", "rtol"), [(False, 1e-5), (True, 1e-9)])
def test_a_list_of_four_whichever_are_chosen(name, double, rtol):
    with jax.enable_x64(double):
        for chosen in ((0,), (0, 2), (1, 2, 3)):
            got = OBJECTIVES[name].loss(lists(parted(*chosen), slots=4))
            np.testing.assert_allclose(got, VALUES[name], rtol=rtol)


def test_lipo_of_a_list_is_its_equation():
    scores = [0.9, 0.6, 0.7, 0.2]
    ranks = [1 + sorted(LOG_RATIOS, reverse=True).index(x) for x in LOG_RATIOS]
    terms = [
        abs(2 ** scores[i] - 2 ** scores[j])
        * abs(1 / math.log(1 + ranks[i]) - 1 / math.log(1 + ranks[j]))
        * math.log1p(math.exp(-0.1 * (LOG_RATIOS[i] - LOG_RATIOS[j])))
        for i in range(4)
        for j in range(4)
        if scores[i] > scores[j]
    ]
    sides = [([LOG_RATIOS[k] for k in part], [scores[k] for k in part]) for part in ((1, 3), (0, 2))]
    got = OBJECTIVES["lipo_lists"].loss(lists(sides, slots=3))
    np.testing.assert_allclose(got, sum(terms) / len(terms), rtol=1e-6)


@pytest.mark.parametrize("name", [*VALUES, "lipo_lists"])
def test_lists_of_different_lengths_count_alike_and_empty_ones_not(name):
    """Four responses, two, one, and none."""
    pair, alone, nothing = [([1.0], [3.0]), ([-2.0], [1.0])], [([1.5], [2.0]), ([], [])], [([], [])] * 2
    objective = OBJECTIVES[name]
    parts = [objective.loss(lists(one, slots=4)) for one in (parted(0), pair, alone)]

    def loss(side, scores):
        changed = {**scores.responses, "chosen": scores["chosen"]._replace(log_prob=side)}
        return objective.loss(Scores(changed))

    scores = lists(parted(0), pair, alone, nothing, slots=4)
    value, gradient = jax.value_and_grad(loss)(scores["chosen"].log_prob, scores)
    np.testing.assert_allclose(value, np.mean(parts), rtol=1e-6)
    assert objective.count(scores) == 3
    valid = np.asarray(scores["chosen"].valid)
    assert np.all(gradient[~valid] == 0)
    assert np.all(np.isfinite(gradient))
    assert float(jnp.max(jnp.abs(gradient))) > 0
    assert objective.loss(lists(nothing, slots=2)) == 0
    spoilt = scores["chosen"].log_prob.at[1, 0].set(jnp.nan)
    assert np.isnan(loss(spoilt, scores))
