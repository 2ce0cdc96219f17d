"""The cache of keys and values: however its blocks lie, a token read by it has the decoder's own hidden state."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax import models
from rpo_jax.sampling import kv_cache
from tests.worlds import VOCAB, small_model

PROMPT, READ = (
    3 * kv_cache.SLICE,
    2 * kv_cache.SLICE + 5,
)  # a half block, then enough to fill it and to begin another one
STARTS = np.array([0, 7, 70])


@functools.cache
def case(window):
    """Model, parameters, tokens and hidden states of the last token of rows that begin at STARTS."""
    model = replace(small_model(max_position_embeddings=256), sliding_windows=(window, None))
    params = models.init_params(model, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(3, VOCAB, (len(STARTS), PROMPT + READ)).astype(np.int32)
    alone = [models.hidden_states(model, params, tokens[row : row + 1, start:]) for row, start in enumerate(STARTS)]
    return model, params, tokens, np.concatenate([x[:, -1] for x in alone])


MORE = [(None, 4, False), (None, 0, False), (40, 4, True), (40, 0, True)]


@pytest.mark.parametrize(
    ("window", "apart", "all_blocks"),
    [(40, 2, False), (None, 1, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_blocks_may_lie_in_any_parts(window, apart, all_blocks):
    model, params, tokens, expected = case(window)
    readable = kv_cache.to_decode_layout(params, "float32", "cpu")
    _, read = jax.jit(kv_cache.prefill, static_argnums=0)(model, readable, tokens[:, :PROMPT], STARTS)
    # In other rows than they were read in, beside one that has nothing.
    rows = jnp.array([2, 0, 3])
    cache = kv_cache.empty_cache(model, 4, 2, "float32", apart).with_rows(rows, read).grown(4, apart)
    assert cache.blocks == 4
    recent, hidden = kv_cache.no_tokens(model, cache), jnp.zeros(0)
    extend = jax.jit(kv_cache.extend, static_argnums=0)
    for number in range(READ):
        within = number % kv_cache.SLICE
        if number and not within:
            cache = cache.followed_by(recent)
            recent = kv_cache.no_tokens(model, cache)
        used = None if all_blocks else jnp.array(-(-int(cache.filled.max()) // kv_cache.BLOCK_SLICES))
        last = jnp.zeros(4, jnp.int32).at[rows].set(tokens[:, PROMPT + number])
        hidden, recent = extend(model, readable, cache, recent, last, jnp.array(within), used)
    np.testing.assert_allclose(hidden[rows], expected, atol=1e-5)
