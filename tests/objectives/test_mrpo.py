import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax.config import Config, ConfigError, ObjectiveConfig, ReferenceConfig
from rpo_jax.objectives import losses
from rpo_jax.objectives.methods.mrpo import adaptive_reference, mixed_reference

WEIGHTS = (0.5, 0.3, 0.2)


def equation(log_probs, clip):
    found = []
    for first, *others in zip(*log_probs, strict=True):
        held = [min(max(x, (1 + clip) * first), (1 - clip) * first) for x in others]
        largest = max(-x for x in (first, *held))  # of the terms, which a float64 would not hold
        terms = [w * math.exp(-x - largest) for w, x in zip(WEIGHTS, (first, *held), strict=True)]
        found.append(-largest - math.log(sum(terms)))
    return found


@pytest.mark.parametrize("clip", [0.1, 0.5])
def test_the_virtual_reference_is_its_equation(clip):
    rng = np.random.default_rng(0)
    first = rng.uniform(-900, -1, 40)
    log_probs = np.stack([first, *(first * rng.uniform(0.6, 1.4, (2, 40)))]).astype(np.float32)
    got = mixed_reference(jnp.asarray(log_probs), jnp.asarray(WEIGHTS), clip)
    np.testing.assert_allclose(got, equation(log_probs.astype(np.float64), clip), rtol=1e-5)


def test_two_references_are_the_releases_formula():
    """log pi_1 + log pi_2 - log(a pi_2 + (1 - a) pi_1), with the weight a of the first."""
    first, second, a = -3.0, -2.9, 0.3
    expected = first + second - math.log(a * math.exp(second) + (1 - a) * math.exp(first))
    got = mixed_reference(jnp.float32([[first], [second]]), jnp.float32([a, 1 - a]), clip=0.1)
    np.testing.assert_allclose(got[0], expected, rtol=1e-6)


@pytest.mark.parametrize(("double", "rtol"), [(False, 1e-5), (True, 1e-9)])
def test_a_pairs_own_weights_and_clipping_rates(double, rtol):
    """By the equations, of two pairs; the second response of the data is of the second pair."""
    table = np.array([[-3.0, -20.0, -5.0, -22.0], [-2.0, -31.0, -9.0, -19.0]])
    pairs, eta = ((0, 2), (1, 3)), 0.4
    expected = np.zeros(4)
    for chosen, rejected in pairs:
        a = np.abs(table[:, chosen] - table[:, rejected])
        alpha = a[1] / (a[0] + a[1] + 1e-6)
        b = np.abs(table[:, [chosen, rejected]].mean(axis=0))
        share = b[0] / b.sum()
        for response, rate in ((chosen, eta * share), (rejected, eta * (1 - share))):
            first, other = table[:, response]
            other = min(max(other, (1 + rate) * first), (1 - rate) * first)
            expected[response] = -math.log(alpha * math.exp(-first) + (1 - alpha) * math.exp(-other))
    with jax.enable_x64(double):
        is_chosen = jnp.array([True, True, False, False])
        got = adaptive_reference(jnp.array(table), jnp.array([0, 1, 0, 1]), jnp.array([2, 3, 2, 3]), is_chosen, eta)
        np.testing.assert_allclose(got, expected, rtol=rtol)


def test_references_that_agree_are_one_and_what_is_missing_stays_so():
    log_probs = jnp.tile(jnp.float32([-2.0, -700.0, jnp.nan]), (3, 1))
    np.testing.assert_allclose(mixed_reference(log_probs, jnp.asarray(WEIGHTS)), log_probs[0], rtol=1e-6)


def test_the_row_is_dpo_on_it():
    row, dpo = losses.OBJECTIVES["mrpo"], losses.OBJECTIVES["dpo"]
    assert (row.options(), row.weights, row.uses_reference) == (dpo.options(), "pair", True)
    assert row.mixes_references
    assert not dpo.mixes_references


OTHERS = {"others": ("a",)}


@pytest.mark.parametrize(
    ("name", "reference", "message"),
    [
        ("mrpo", {}, "objective.name=mrpo mixes several references, but reference.others names none"),
        ("sft", OTHERS, "objective.name=sft uses no reference, so reference.others would not be read"),
        ("dpo", OTHERS | {"mode": "live"}, "reference.others needs reference.mode=cached, got live"),
        ("dpo", OTHERS | {"weights": (0.5, 0.3, 0.2)}, r"weights=\[0.5, 0.3, 0.2\] must be 2 positive numbers"),
        ("dpo", OTHERS | {"weights": (0.9, 0.2)}, "that sum to 1"),
        ("dpo", {"weights": (1.0,)}, "reference.weights is given, but reference.others names no reference"),
        ("mrpo", {"adaptive": True}, "reference.adaptive weighs two references by every pair: give it one folder"),
        ("mrpo", OTHERS | {"adaptive": True, "weights": (0.5, 0.5)}, "and no reference.weights"),
        ("dpo", OTHERS | {"clip": 1.0}, "reference.clip=1.0 must be at least 0 and below 1"),
    ],
)
def test_references_that_mean_nothing_are_refused(name, reference, message):
    with pytest.raises(ConfigError, match=message):
        Config(objective=ObjectiveConfig(name=name), reference=ReferenceConfig(**reference))


def test_weights_are_even_unless_told():
    assert ReferenceConfig(others=("a", "b", "c")).mixture == (0.25,) * 4
    assert ReferenceConfig(others=("a",), weights=(0.7, 0.3)).mixture == (0.7, 0.3)
