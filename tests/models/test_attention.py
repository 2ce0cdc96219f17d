"""Attention against a loop in float64, and visibility against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax.models.attention.dense import dense_attention
from rpo_jax.models.attention.masking import visible


def _oracle(query, key, value, mask, sinks=None):
    rows, tokens, heads, head_dim = query.shape
    out = np.zeros(query.shape)
    for b in range(rows):
        for h in range(heads):
            g = h // (heads // key.shape[2])
            for t in range(tokens):
                seen = np.flatnonzero(mask[b, t])
                scores = key[b, seen, g].astype(np.float64) @ query[b, t, h] / np.sqrt(head_dim)
                weights = np.exp(scores - scores.max())
                of_sink = 0 if sinks is None else np.exp(sinks[h] - scores.max())
                out[b, t, h] = weights @ value[b, seen, g] / (weights.sum() + of_sink)
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_equals_a_loop_over_heads(kv_heads):
    rng = np.random.default_rng(kv_heads)
    query = rng.normal(size=(2, 7, 6, 4)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, 7, kv_heads, 4)).astype(np.float32)
    mask = (rng.random((2, 7, 7)) < 0.5) | np.eye(7, dtype=bool)
    got = dense_attention(*map(jnp.array, (query, key, value, mask)))
    np.testing.assert_allclose(got, _oracle(query, key, value, mask), atol=1e-5)
    sinks = rng.normal(size=6).astype(np.float32)
    got = dense_attention(*map(jnp.array, (query, key, value, mask)), sinks=jnp.array(sinks))
    np.testing.assert_allclose(got, _oracle(query, key, value, mask, sinks), atol=1e-5)


def test_softmax_is_float32_under_bfloat16_inputs():
    # 512 equal keys: bfloat16 cannot sum 512 ones (it stalls at 256), so the mean would be wrong by a factor.
    ones = jnp.ones((1, 512, 1, 2), jnp.bfloat16)
    out = dense_attention(jnp.zeros((1, 512, 1, 2), jnp.bfloat16), ones, ones, jnp.ones((1, 512, 512), bool))
    np.testing.assert_allclose(out.astype(jnp.float32), 1.0, atol=0.01)


def test_a_wholly_masked_query_is_finite_in_value_and_gradient():
    x = jnp.ones((1, 3, 2, 4))
    value, gradient = jax.value_and_grad(lambda q: dense_attention(q, x, x, jnp.zeros((1, 3, 3), bool)).sum())(x)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("window", [None, 1, 3])
def test_visible_is_its_definition(window):
    rng = np.random.default_rng(0)
    positions, segments, branches = (rng.integers(0, n, (3, 9)) for n in (6, 3, 3))
    got = np.asarray(visible(jnp.array(positions), jnp.array(segments), jnp.array(branches), window))
    for b, t, s in np.ndindex(got.shape):
        expected = s <= t and segments[b, s] == segments[b, t] and branches[b, s] in (0, branches[b, t])
        if window is not None:
            expected = expected and positions[b, t] - positions[b, s] < window
        assert got[b, t, s] == expected
    assert got[:, np.arange(9), np.arange(9)].all()  # every token sees itself, padding too
