"""Products by groups as GPUs do them, interpreted on CPU, against JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax.config import MeshConfig
from rpo_jax.hosts import sharding
from rpo_jax.models import experts, grouped, projection
from rpo_jax.models.architecture import Experts
from rpo_jax.models.attention.kind import ONE_DEVICE, Split

BEHIND = 7  # rows of no group


@jax.custom_vjp
def interpreted(x, kernel, rows_of):
    return grouped.product(x, kernel, rows_of, interpret=True)


interpreted.defvjp(
    lambda *given: (interpreted(*given), given),
    lambda saved, cotangent: (*grouped.gradient(*saved, cotangent, interpret=True), None),
)


@pytest.mark.parametrize(
    ("rows_of", "inputs", "outputs", "dtype"),
    [
        ((50, 0, 70, 3, 0), 72, 136, "float32"),  # parts of tiles on every axis
        ((0, 200, 0, 0, 1), 16, 64, "float32"),
        ((5, 150, 0, 0, 100), 24, 200, "bfloat16"),
    ],
)
def test_products_and_gradients_are_those_of_ragged_dot(rows_of, inputs, outputs, dtype):
    total, rng = sum(rows_of), np.random.default_rng(0)
    shapes = (total + BEHIND, inputs), (len(rows_of), inputs, outputs), (total + BEHIND, outputs)
    x, kernel, cotangent = (jnp.array(rng.normal(size=shape), dtype) for shape in shapes)
    cotangent = cotangent.at[total:].set(jnp.nan)  # nobody else's
    found = []
    for product in (interpreted, jax.lax.ragged_dot):
        many = jnp.array(rows_of, jnp.int32)
        if product is jax.lax.ragged_dot:
            x, cotangent = x[:total], cotangent[:total]
        out, back = jax.vjp(lambda x, kernel, product=product, many=many: product(x, kernel, many), x, kernel)
        of_rows, of_kernel = back(cotangent)
        found.append([np.asarray(one, np.float32) for one in (out[:total], of_rows[:total], of_kernel)])
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5 if dtype == "float32" else 1e-2, atol=1e-4)
    np.testing.assert_array_equal(found[0][2][np.array(rows_of) == 0], 0)


def test_devices_that_share_experts_keep_what_kernels_leave_unwritten_apart(monkeypatch):
    """Rows of other devices' experts are NaN in interpreted kernels' results."""
    described = Experts(count=4, per_token=2, intermediate_size=16, weights_sum_to_one=True)
    rng = np.random.default_rng(0)
    weights = experts.ExpertWeights(
        *(jnp.array(rng.normal(size=shape), jnp.float32) for shape in ((16, 4), (4, 16, 16), (4, 16, 16), (4, 16, 16)))
    )
    x, real = jnp.array(rng.normal(size=(4, 24, 16)), jnp.float32), jnp.ones((4, 24), bool)

    def gradient_of(split):
        def total(weights, x):
            out, _ = experts.mixture(described, jax.nn.silu, weights, x, real, split)
            return jnp.sum(jnp.tanh(out))

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(weights, x)

    expected = gradient_of(ONE_DEVICE)
    monkeypatch.setattr(projection, "grouped_product", interpreted)
    at = sharding.Placement(sharding.make_mesh(MeshConfig(data=1, expert=4), jax.devices()[:4]))
    found = gradient_of(Split(at.shards, at.per_shard, at.gather, at.mesh_axes))
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
