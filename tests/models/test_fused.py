"""The GPU's kernels, interpreted on CPU, against dense attention: values, gradients, windows, odd rows, devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from rpo_jax.hosts.sharding import MESH_AXES, Placement
from rpo_jax.models.attention import fused
from rpo_jax.models.attention.kind import Split
from rpo_jax.models.attention.masking import TokenIds, visible
from rpo_jax.models.attention.registry import ATTENTIONS, Asked, attention_name, check_attention, make_attention
from tests.models.test_blockwise import assert_same, packed_layout, tensors, value_and_gradients

TOKENS = 2 * fused.LARGE + 44  # the last block is padded


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """On the platform that there is."""
    kind = ATTENTIONS["fused"]._replace(make=partial(fused.make, interpret=True), platforms=())
    monkeypatch.setitem(ATTENTIONS, "fused", kind)


def both(*args, **more):
    return (value_and_gradients(name, *args, **more) for name in ("fused", "dense"))


def odd_rows() -> TokenIds:
    """Rows of: nothing; one token; one segment without branches, full; a prompt and five branches; padding first."""
    tokens = 3 * fused.LARGE
    positions, segments, branches = np.zeros((3, 5, tokens), np.int32)
    segments[1, 0] = 1
    segments[2], positions[2] = 1, np.arange(tokens)
    column, prompt = 150, 150
    segments[3, : column + 5 * 40], positions[3, :prompt] = 1, np.arange(prompt)
    for branch in range(1, 6):
        here = slice(column, column + 40)
        positions[3, here], branches[3, here] = prompt + np.arange(40), branch
        column += 40
    segments[4, 200:], positions[4, 200:] = 1, np.arange(tokens - 200)
    return TokenIds(*map(jnp.array, (positions, segments, branches)))


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 8), (2, 96), (4, 16)])
def test_the_kernels_give_what_dense_attention_gives(kv_heads, head_dim):
    layout = packed_layout(2, TOKENS, branches=5)
    *qkv, weight = tensors(2, TOKENS, kv_heads, head_dim=head_dim)
    assert_same(*both(layout, qkv, weight, (None,), jnp.array(0)))


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("which", [0, 1])
def test_rows_of_every_shape_with_windows_and_caps(which, softcap):
    layout = odd_rows()
    *qkv, weight = tensors(*layout.positions.shape)
    assert_same(*both(layout, qkv, weight, (None, 50), jnp.array(which), softcap=softcap))


@pytest.mark.parametrize("head_dim", [64, 256])
def test_bfloat16_is_as_near_to_float32_as_dense_attention_is(head_dim):
    """In the blocks that GPUs get; the row without branches has some that need no mask."""
    layout = odd_rows()
    *qkv, weight = tensors(*layout.positions.shape, head_dim=head_dim)
    exact = value_and_gradients("dense", layout, qkv, weight, (None,), jnp.array(0))
    found = both(layout, [x.astype(jnp.bfloat16) for x in qkv], weight, (None,), jnp.array(0))
    for right, kernel, dense in zip(exact, *found, strict=True):
        assert kernel.dtype == jnp.bfloat16
        error = [np.abs(np.asarray(x, np.float32) - right).mean() for x in (dense, kernel)]
        assert error[1] < 1.5 * error[0]


def test_padding_gives_zeros_and_takes_no_gradient_from_tokens():
    """Whatever a loss asks of padding: nothing of it reaches a token."""
    layout = odd_rows()
    *qkv, weight = tensors(*layout.positions.shape)
    padding = (layout.segment_ids == 0)[..., None, None]

    def total(*x):
        out = make_attention("fused", "cpu", layout, (None,), Split())(*x, jnp.array(0))
        return jnp.sum(jnp.where(padding, out * weight, 0)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*qkv)
    np.testing.assert_array_equal(out[0], 0)
    for gradient in gradients:
        np.testing.assert_array_equal(np.where(padding, 0, gradient), 0)


@pytest.mark.parametrize("window", [None, 70])
def test_the_plan_has_the_blocks_that_see_something_and_no_others(window):
    tokens = 4 * fused.LARGE
    layout = packed_layout(3, tokens, seed=4)
    mask = np.asarray(visible(*layout, window)) & (np.asarray(layout.segment_ids) > 0)[:, :, None]
    plan = jax.jit(partial(fused.make_plan, window=window))(layout)
    for visits, seen in ((plan.of_queries, mask), (plan.of_keys, mask.swapaxes(1, 2))):
        order, masked, count = (np.asarray(x) for x in visits)
        assert 0 < count.sum() < 3 * np.tril(np.ones((8, 8))).sum()
        blocks = seen.reshape(3, 4, fused.LARGE, 8, fused.SMALL).swapaxes(2, 3)
        for row, block in np.ndindex(count.shape):
            found = blocks[row, block, order[row, block, : count[row, block]]]
            assert found.any(axis=(1, 2)).all()
            assert found[masked[row, block] :].all()
            assert found.sum() == blocks[row, block].sum()


def test_devices_share_rows_and_heads():
    layout = packed_layout(2, TOKENS, seed=5)
    *qkv, weight = tensors(2, TOKENS)
    args = layout, qkv, weight, (None, 40), jnp.array(1)
    mesh = jax.make_mesh((1, 2, 4), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    placement = Placement(mesh)
    with jax.set_mesh(mesh):
        split = value_and_gradients("fused", *args, Split(placement.shards, placement.per_shard))
    assert_same(split, value_and_gradients("dense", *args))


def test_long_rows_on_gpus_are_its_own_where_it_can():
    def chosen(tokens, dtype="bfloat16", head_dim=128, platform="gpu"):
        return attention_name("auto", platform, Asked(dtype, head_dim, tokens))

    assert [chosen(tokens) for tokens in (64, 1024, 1025, 32768)] == ["dense", "dense", "fused", "fused"]
    assert chosen(4096, head_dim=20) == chosen(4096, head_dim=512) == "dense"
    assert chosen(4096, dtype="float32") == "fused"
    assert chosen(4096, platform="cpu") == "blockwise"
    assert attention_name("auto", "gpu", Asked(row_tokens=2048)) == "fused"
    assert attention_name("auto", "gpu") == "dense", "rows of a length that is not known"


@pytest.mark.parametrize(
    ("asked", "need"),
    [
        (("bfloat16", 72), "head dimensions that 16 divides, at most 256; .* head dimension is 72"),
        (("bfloat16", 288), "head dimensions that 16 divides, at most 256; .* head dimension is 288"),
        (("float64", 64), "model.compute_dtype=bfloat16, float16 or float32; here model.compute_dtype=float64"),
    ],
)
def test_it_says_what_it_needs(asked, need):
    check_attention("fused", "gpu", Asked("bfloat16", 64, softcap=50.0))
    with pytest.raises(ValueError, match=f"model.attention=fused needs {need}"):
        check_attention("fused", "gpu", Asked(*asked))
