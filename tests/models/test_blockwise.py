"""Attention by blocks against dense attention: values, gradients, windows, padding, devices."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from rpo_jax.hosts.sharding import MESH_AXES, Placement
from rpo_jax.models.attention.blockwise import BLOCK_TOKENS, EVERYTHING, make_plan, widths
from rpo_jax.models.attention.kind import SHORT, Split
from rpo_jax.models.attention.masking import TokenIds
from rpo_jax.models.attention.registry import ATTENTIONS, Asked, make_attention

HEADS, HEAD_DIM = 4, 8


def packed_layout(rows: int, tokens: int, seed: int = 0, branches: int = 3) -> TokenIds:
    """Rows of segments of random lengths: a prompt and up to `branches` responses each, padding at the end."""
    rng = np.random.default_rng(seed)
    positions, segments, branch_ids = np.zeros((3, rows, tokens), np.int32)
    for row in range(rows):
        column, segment = 0, 0
        while True:
            pieces = rng.integers(3, 90, 1 + rng.integers(1, branches + 1))
            if column + pieces.sum() > tokens:
                break
            segment += 1
            for branch, length in enumerate(pieces):
                here = slice(column, column + length)
                first = 0 if branch == 0 else pieces[0]
                positions[row, here] = first + np.arange(length)
                segments[row, here], branch_ids[row, here] = segment, branch
                column += length
    return TokenIds(*map(jnp.array, (positions, segments, branch_ids)))


def tensors(rows: int, tokens: int, kv_heads: int = 2, num_heads: int = HEADS, head_dim: int = HEAD_DIM):
    rng = np.random.default_rng(7)
    return tuple(
        jnp.array(rng.normal(size=(rows, tokens, heads, head_dim)).astype(np.float32))
        for heads in (num_heads, kv_heads, kv_heads, num_heads)
    )


def value_and_gradients(name, layout, qkv, weight, windows, which, split=None, softcap=None, sinks=None):
    """Output and gradients where there are tokens: what padding gives is nobody's business.

    The gradient by sinks is among them where there are some.
    """
    live = (layout.segment_ids > 0)[..., None, None]

    def total(qkv, sinks, layout):
        attend = make_attention(name, "cpu", layout, windows, split or Split(), Asked(softcap=softcap))
        out = jnp.where(live, attend(*qkv, which, sinks), 0)
        return jnp.sum(out * weight), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(tuple(qkv), sinks, layout)
    return out, *jax.tree.leaves(gradients)


def assert_same(got, want, atol=2e-5):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_blocks_give_what_dense_attention_gives(kv_heads):
    layout = packed_layout(3, 5 * BLOCK_TOKENS)
    *qkv, weight = tensors(3, 5 * BLOCK_TOKENS, kv_heads)
    args = layout, qkv, weight, (None,), jnp.array(0)
    assert_same(value_and_gradients("blockwise", *args), value_and_gradients("dense", *args))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_every_layer_gets_its_own_window(which):
    layout = packed_layout(2, 4 * BLOCK_TOKENS, seed=1)
    *qkv, weight = tensors(2, 4 * BLOCK_TOKENS)
    args = layout, qkv, weight, (None, 5, 70), jnp.array(which)
    assert_same(value_and_gradients("blockwise", *args), value_and_gradients("dense", *args))


def test_capped_scores_are_those_of_dense_attention():
    layout = packed_layout(2, 4 * BLOCK_TOKENS, seed=1)
    *qkv, weight = tensors(2, 4 * BLOCK_TOKENS)
    args = layout, qkv, weight, (None, 40), jnp.array(1)
    capped, dense = (value_and_gradients(name, *args, softcap=0.7) for name in ("blockwise", "dense"))
    assert_same(capped, dense)
    assert np.abs(dense[0] - value_and_gradients("dense", *args)[0]).max() > 0.1, "the cap does something"


def test_sinks_and_their_gradient_are_those_of_dense_attention():
    layout = packed_layout(2, 4 * BLOCK_TOKENS, seed=1)
    *qkv, weight = tensors(2, 4 * BLOCK_TOKENS)
    args = layout, qkv, weight, (None, 40), jnp.array(1)
    sinks = jnp.array([0.5, -1.0, 3.0, 9.0])
    blocks, dense = (value_and_gradients(name, *args, sinks=sinks) for name in ("blockwise", "dense"))
    assert len(blocks) == 5
    assert_same(blocks, dense)
    assert np.abs(dense[0] - value_and_gradients("dense", *args)[0]).max() > 0.1, "sinks do something"


def test_rows_need_not_be_whole_blocks():
    layout = packed_layout(2, 3 * BLOCK_TOKENS - 17, seed=2)
    *qkv, weight = tensors(2, 3 * BLOCK_TOKENS - 17)
    args = layout, qkv, weight, (None,), jnp.array(0)
    assert_same(value_and_gradients("blockwise", *args), value_and_gradients("dense", *args))


def test_a_batch_of_padding_is_zero_and_finite():
    *qkv, weight = tensors(2, 3 * BLOCK_TOKENS)
    layout = TokenIds(*(jnp.zeros((2, 3 * BLOCK_TOKENS), jnp.int32),) * 3)
    attend = make_attention("blockwise", "cpu", layout, (None,), Split())
    gradients = jax.jit(jax.grad(lambda *x: jnp.sum(attend(*x, jnp.array(0)) * weight), argnums=(0, 1, 2)))(*qkv)
    np.testing.assert_array_equal(attend(*qkv, jnp.array(0)), 0)
    assert all((np.asarray(gradient) == 0).all() for gradient in gradients)


def test_bfloat16_is_as_near_to_float32_as_dense_attention_is():
    layout = packed_layout(2, 4 * BLOCK_TOKENS, seed=3)
    *qkv, weight = tensors(2, 4 * BLOCK_TOKENS)
    exact = value_and_gradients("dense", layout, qkv, weight, (None,), jnp.array(0))
    narrow = layout, [x.astype(jnp.bfloat16) for x in qkv], weight, (None,), jnp.array(0)
    dense, blocks = (value_and_gradients(name, *narrow) for name in ("dense", "blockwise"))
    for right, one, other in zip(exact, dense, blocks, strict=True):
        assert other.dtype == jnp.bfloat16
        error = [np.abs(np.asarray(x, np.float32) - right).mean() for x in (one, other)]
        assert error[1] < 1.5 * error[0]


@pytest.mark.parametrize("tokens", [4, 5, 9])
def test_only_blocks_that_are_seen_are_visited(tokens):
    """The plan's widths reach back to the first segment of each block, and no further than the ladder rounds."""
    layout = packed_layout(3, tokens * BLOCK_TOKENS, seed=4)
    plan = make_plan(layout, EVERYTHING)
    segments = np.asarray(layout.segment_ids)
    order, ends, begin = np.asarray(plan.order), np.asarray(plan.ends), 0
    seen = set()
    for end, width in zip(ends, widths(tokens), strict=True):
        for block in order[begin:end].tolist():
            row, number = divmod(block, tokens)
            inside = segments[row, number * BLOCK_TOKENS : (number + 1) * BLOCK_TOKENS]
            first = np.flatnonzero(segments[row] == inside[0])[0] // BLOCK_TOKENS if inside[0] else number
            needed = number + 1 - first
            assert needed <= width == min(size for size in widths(tokens) if size >= needed)
            seen.add(block)
        begin = end
    held = {row * tokens + column // BLOCK_TOKENS for row, column in zip(*np.nonzero(segments), strict=True)}
    assert seen == held


def test_widths_end_with_the_row_and_are_few():
    for blocks in range(1, 200):
        ladder = widths(blocks)
        assert ladder[-1] == blocks
        assert list(ladder) == sorted(set(ladder))
        assert all(after <= max(before + 1, 1.5 * before) for before, after in pairwise(ladder))
    assert len(widths(128)) <= 20


@pytest.mark.parametrize(
    ("shape", "num_heads", "kv_heads"), [((2, 2, 2), 4, 2), ((1, 2, 4), 4, 2), ((8, 1, 1), 4, 2), ((1, 2, 4), 6, 3)]
)
def test_devices_share_rows_and_heads(shape, num_heads, kv_heads):
    """Four devices on the tensor axis: two key-value heads are repeated, so that heads can be split; of six and three
    heads every device has all."""
    layout = packed_layout(8, 4 * BLOCK_TOKENS, seed=5)
    *qkv, weight = tensors(8, 4 * BLOCK_TOKENS, kv_heads, num_heads)
    args = layout, qkv, weight, (None, 40), jnp.array(1)
    mesh = jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    placement = Placement(mesh)
    with jax.set_mesh(mesh):
        split, sinks = Split(placement.shards, placement.per_shard), jnp.linspace(-1, 4, num_heads)
        found = value_and_gradients("blockwise", *args, split, sinks=sinks)
    assert_same(found, value_and_gradients("dense", *args, sinks=sinks))


def test_no_array_of_all_tokens_by_all_tokens_per_head():
    tokens = 16 * BLOCK_TOKENS
    layout = packed_layout(1, tokens)
    *qkv, weight = tensors(1, tokens)

    def largest(name: str) -> int:
        def total(*x):
            return jnp.sum(make_attention(name, "cpu", layout, (None,), Split())(*x, jnp.array(0)) * weight)

        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*qkv).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    scores = 4 * HEADS * tokens * tokens
    assert largest("dense") > scores
    assert largest("blockwise") < scores


def test_an_unknown_attention_names_the_known_ones():
    layout = packed_layout(1, 64)
    with pytest.raises(
        ValueError,
        match=r"model.attention=flash is not known; use auto or one of blockwise, cudnn, dense, fused, splash",
    ):
        make_attention("flash", "cpu", layout, (None,), Split())


def test_every_kind_says_why():
    assert all(kind.why for kind in ATTENTIONS.values())


def test_every_platform_has_one_kind_of_its_own_and_short_rows_are_two_blocks():
    assert sorted(platform for kind in ATTENTIONS.values() for platform in kind.auto) == ["cpu", "gpu", "tpu"]
    assert all(kind.stand_in in {"", *ATTENTIONS} for kind in ATTENTIONS.values())
    assert SHORT == 2 * BLOCK_TOKENS
