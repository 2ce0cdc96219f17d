import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax.core.shards import Shards
from rpo_jax.models import recompute
from rpo_jax.models.recompute import in_chunks


def by_token(weights):
    return lambda x: jnp.tanh(x @ weights)


@pytest.mark.parametrize(("rows", "tokens", "shards"), [(4, 6, 1), (4, 6, 2), (8, 5, 4), (2, 3, 1)])
def test_chunks_give_the_whole_and_its_gradient(rows, tokens, shards, monkeypatch):
    monkeypatch.setattr(recompute, "MLP_TOKENS", 4)
    x, weights = (jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate([(rows, tokens, 3), (3, 3)]))
    sizes = []

    def total(x, weights, chunked):
        def function(x):
            sizes.append(x.shape)
            return by_token(weights)(x)

        if not chunked:
            return jnp.sum(jnp.cos(function(x))) + jnp.sum(x[:, ::2] ** 2)
        real = jnp.broadcast_to(jnp.arange(tokens) % 2 == 0, (rows, tokens))

        def with_sum(x, real, axes):
            return function(x), jnp.sum(jnp.where(real[..., None], x, 0) ** 2)

        done, squares = in_chunks(with_sum, x, real, Shards(shards))
        return jnp.sum(jnp.cos(done)) + squares

    expected = jax.value_and_grad(total, argnums=(0, 1))(x, weights, False)
    sizes.clear()
    got = jax.value_and_grad(total, argnums=(0, 1))(x, weights, True)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    assert sizes
    assert all(size[0] == shards and size[1] <= 4 for size in sizes)


@pytest.mark.parametrize(("rows", "tokens", "shards"), [(2, 2, 1), (1, 37, 1), (3, 4, 2)])
def test_few_tokens_a_prime_number_of_them_and_rows_that_shards_do_not_divide_run_at_once(
    rows, tokens, shards, monkeypatch
):
    monkeypatch.setattr(recompute, "MLP_TOKENS", 8)
    sizes = []
    whole = lambda x, real, axes: (x, sizes.append(x.shape))  # noqa: E731
    in_chunks(whole, jnp.ones((rows, tokens, 3)), jnp.ones((rows, tokens), bool), Shards(shards))
    assert sizes == [(rows, tokens, 3)]
