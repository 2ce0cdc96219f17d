"""The GPU's kernels, interpreted on CPU, against dense attention: values, gradients, windows, odd rows, devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from benchmarks.gpu_kernels import row_of_a_pair
from rpo_jax.hosts.sharding import MESH_AXES, Placement
from rpo_jax.models.attention import fused, visits
from rpo_jax.models.attention.kind import Split
from rpo_jax.models.attention.masking import TokenIds, visible
from rpo_jax.models.attention.registry import ATTENTIONS, Asked, attention_name, check_attention, make_attention
from tests.models.test_blockwise import assert_same, packed_layout, tensors, value_and_gradients

LARGE, SMALL = 64, 32  # quicker than a GPU's blocks; those of float32 fit in them
TOKENS = 3 * LARGE


@pytest.fixture(autouse=True)
def interpreted(request, monkeypatch):
    """On the platform that there is."""
    if "real_blocks" not in request.fixturenames:
        for module in (fused, visits):
            monkeypatch.setattr(module, "LARGE", LARGE)
            monkeypatch.setattr(module, "SMALL", SMALL)
    kind = ATTENTIONS["fused"]._replace(make=partial(fused.make, interpret=True), platforms=())
    monkeypatch.setitem(ATTENTIONS, "fused", kind)


@pytest.fixture
def real_blocks():
    """Those of a GPU."""


def odd_rows() -> TokenIds:
    """Rows of: nothing; one token; one segment without branches, full; a prompt and five branches; padding first."""
    prompt, answer = 70, 20
    positions, segments, branches = np.zeros((3, 5, TOKENS), np.int32)
    segments[1, 0] = 1
    segments[2], positions[2] = 1, np.arange(TOKENS)
    segments[3, : prompt + 5 * answer], positions[3, :prompt] = 1, np.arange(prompt)
    for branch in range(1, 6):
        here = slice(prompt + (branch - 1) * answer, prompt + branch * answer)
        positions[3, here], branches[3, here] = prompt + np.arange(answer), branch
    segments[4, 100:], positions[4, 100:] = 1, np.arange(TOKENS - 100)
    return TokenIds(*map(jnp.array, (positions, segments, branches)))


def compiled(name, layout, windows, softcap=None):
    """Output and gradients of an attention of these rows, by query, key, value, sinks, weight of outputs and window."""

    def total(query, key, value, sinks, weight, which):
        attend = make_attention(name, "cpu", layout, windows, Split(), Asked(softcap=softcap))
        out = attend(query, key, value, which, sinks)
        return jnp.sum(out * weight), out

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True))


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "windows", "softcap", "sinks"),
    [(2, 24, (None, 50), None, None), (4, 16, (None,), 0.7, (0.5, -1.0, 3.0, 9.0))],
)
def test_the_kernels_give_what_dense_attention_gives(kv_heads, head_dim, windows, softcap, sinks):
    """On odd rows, and two of several segments with up to five branches each that end within a block."""
    ragged = packed_layout(2, TOKENS - 20, branches=5).padded(20)
    layout = TokenIds(*(jnp.concatenate(ids) for ids in zip(odd_rows(), ragged, strict=True)))
    *qkv, weight = tensors(7, TOKENS, kv_heads, head_dim=head_dim)
    given = (*qkv, None if sinks is None else jnp.array(sinks))
    live = (layout.segment_ids > 0)[..., None, None]
    kernels, dense = (compiled(name, layout, windows, softcap) for name in ("fused", "dense"))
    for which in range(len(windows)):
        (_, out), gradients = kernels(*given, jnp.where(live, weight, 0), jnp.array(which))
        (_, right), right_gradients = dense(*given, jnp.where(live, weight, 0), jnp.array(which))
        wanted = jax.tree.leaves((jnp.where(live, right, 0), right_gradients))
        assert_same(jax.tree.leaves((jnp.where(live, out, 0), gradients)), wanted)
    np.testing.assert_array_equal(out[0], 0)
    # Whatever a loss asks of padding: nothing of it reaches a token.
    for gradient in kernels(*given, jnp.where(live, 0, weight), jnp.array(0))[1][:3]:
        np.testing.assert_array_equal(np.where(live, gradient, 0), 0)


@pytest.mark.parametrize("head_dim", [64, pytest.param(256, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("real_blocks")
def test_bfloat16_is_as_near_to_float32_as_dense_attention_is(head_dim):
    """A prompt of more than a block and two answers: some blocks need no mask, some are not visited."""
    tokens = 3 * visits.LARGE
    layout = row_of_a_pair(tokens)
    *qkv, weight = tensors(1, tokens, 1, 2, head_dim)
    exact = value_and_gradients("dense", layout, qkv, weight, (None,), jnp.array(0))
    args = layout, [x.astype(jnp.bfloat16) for x in qkv], weight, (None,), jnp.array(0)
    found = (value_and_gradients(name, *args) for name in ("fused", "dense"))
    for right, kernel, dense in zip(exact, *found, strict=True):
        assert kernel.dtype == jnp.bfloat16
        error = [np.abs(np.asarray(x, np.float32) - right).mean() for x in (dense, kernel)]
        assert error[1] < 1.5 * error[0]


@pytest.mark.parametrize("window", [None, 70])
def test_the_plan_has_the_blocks_that_see_something_and_no_others(window):
    tokens = 4 * LARGE
    layout = packed_layout(3, tokens, seed=4)
    mask = np.asarray(visible(*layout, window)) & (np.asarray(layout.segment_ids) > 0)[:, :, None]
    plan = jax.jit(partial(visits.make_plan, window=window))(layout)
    for found, seen in ((plan.of_queries, mask), (plan.of_keys, mask.swapaxes(1, 2))):
        order, masked, count = (np.asarray(x) for x in found)
        assert 0 < count.sum() < 3 * np.tril(np.ones((8, 8))).sum()
        blocks = seen.reshape(3, 4, LARGE, 8, SMALL).swapaxes(2, 3)
        for row, block in np.ndindex(count.shape):
            found = blocks[row, block, order[row, block, : count[row, block]]]
            assert found.any(axis=(1, 2)).all()
            assert found[masked[row, block] :].all()
            assert found.sum() == blocks[row, block].sum()


def test_devices_share_rows_and_heads():
    layout = packed_layout(2, TOKENS - 20, seed=5)
    *qkv, weight = tensors(2, TOKENS - 20)
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
    assert [chosen(4096, "float32", head_dim) for head_dim in (64, 128)] == ["fused", "dense"]
    assert chosen(4096, platform="cpu") == "blockwise"
    assert attention_name("auto", "gpu", Asked(row_tokens=2048)) == "fused"
    assert attention_name("auto", "gpu") == "dense", "rows of a length that is not known"


@pytest.mark.parametrize(
    ("asked", "need"),
    [
        (("bfloat16", 72), "head dimensions that 16 divides, at most 256, in float32 64; .* head dimension is 72"),
        (("bfloat16", 288), "head dimensions that 16 divides, at most 256, in float32 64; .* head dimension is 288"),
        (("float32", 128), "head dimensions that .*, in float32 64; here model.compute_dtype=float32, the head"),
        (("float64", 64), "model.compute_dtype=bfloat16, float16 or float32; here model.compute_dtype=float64"),
    ],
)
def test_it_says_what_it_needs(asked, need):
    check_attention("fused", "gpu", Asked("bfloat16", 64, softcap=50.0))
    with pytest.raises(ValueError, match=f"model.attention=fused needs {need}"):
        check_attention("fused", "gpu", Asked(*asked))
