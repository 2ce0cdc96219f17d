"""Rotary embeddings: frequencies of transformers, and relative positions."""

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rpo_jax.models.rope import Rope, frequencies, rotate, rotation

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 4096}
LONGROPE = YARN | {
    "short_factor": tuple(np.linspace(1, 3, 64).tolist()),
    "long_factor": tuple(np.linspace(1, 50, 64).tolist()),
}


@pytest.mark.parametrize(
    ("kind", "scaling"),
    [
        ("linear", {"factor": 4.0}),
        ("llama3", LLAMA3),
        ("llama3", LLAMA3 | {"factor": 32.0, "low_freq_factor": 2.0, "original_max_position_embeddings": 64}),
        ("yarn", YARN),
        ("yarn", YARN | {"attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2}),
        ("yarn", YARN | {"mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False}),
        ("longrope", LONGROPE),
        ("longrope", LONGROPE | {"attention_factor": 1.3}),
    ],
)
def test_frequencies_are_those_of_transformers(kind, scaling):
    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": kind, "rope_theta": 500_000.0, **scaling},
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[kind](config)
    rope = Rope(theta=500_000.0, kind=kind, scaling=tuple(sorted(scaling.items())))
    got, factor = frequencies(rope, 128)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)
    assert factor == pytest.approx(expected_factor, rel=1e-12)
    assert got.dtype == np.float32
    plain, _ = frequencies(Rope(theta=500_000.0), 128)
    assert np.abs(got / plain - 1).max() > 0.5  # the scaling does something


def test_scores_depend_on_the_distance_only():
    rng = np.random.default_rng(0)
    query, key = jnp.array(rng.normal(size=(2, 1, 1, 1, 8)), jnp.float32)

    def score(query_position, key_position):
        at = [rotation(Rope(theta=100.0), 8, jnp.array([[p]])) for p in (query_position, key_position)]
        return float((rotate(query, *at[0]) * rotate(key, *at[1])).sum())

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_position_zero_is_not_rotated():
    x = jnp.arange(8.0).reshape(1, 1, 1, 8)
    np.testing.assert_array_equal(rotate(x, *rotation(Rope(theta=100.0), 8, jnp.array([[0]]))), x)


def test_a_part_of_a_head_is_rotated_and_all_of_it_scaled():
    x = jnp.arange(12.0).reshape(1, 1, 1, 12)
    cos, sin = rotation(Rope(theta=100.0), 8, jnp.array([[3]]))
    np.testing.assert_allclose(rotate(x, cos, sin, 0.5)[..., :8], 0.5 * rotate(x[..., :8], cos, sin), rtol=1e-6)
    np.testing.assert_array_equal(rotate(x, cos, sin, 0.5)[..., 8:], 0.5 * x[..., 8:])
    np.testing.assert_array_equal(rotate(x, *rotation(None, 8, jnp.array([[3]]))), x)


def test_longrope_needs_a_divisor_for_each_pair():
    rope = Rope(theta=100.0, kind="longrope", scaling=tuple(sorted(LONGROPE.items())))
    with pytest.raises(ValueError, match="short_factor has 64 numbers for 4 pairs of rotated dimensions"):
        frequencies(rope, 8)


def test_unknown_kind_and_wrong_parameters_are_refused():
    with pytest.raises(ValueError, match="rope type 'dynamic' is not supported; known types: default, linear, llama3"):
        Rope(theta=1.0, kind="dynamic")
    with pytest.raises(ValueError, match=r"'linear' does not go with the parameters {}: missing .* 'factor'"):
        Rope(theta=1.0, kind="linear")
    with pytest.raises(ValueError, match="unexpected keyword argument 'mrope_section'"):
        Rope(theta=1.0, scaling=(("mrope_section", 1),))
