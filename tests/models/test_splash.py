"""The TPU's kernel, interpreted on CPU, against dense attention: values, gradients, windows, padding, devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from rpo_jax.hosts.sharding import MESH_AXES, Placement
from rpo_jax.models.attention import splash
from rpo_jax.models.attention.kind import Split
from rpo_jax.models.attention.masking import TokenIds, visible
from rpo_jax.models.attention.registry import ATTENTIONS, Asked, attention_kind, check_attention, make_attention
from tests.models.test_blockwise import assert_same, packed_layout, tensors, value_and_gradients

TOKENS = 2 * splash.LANES + 64  # three blocks, the last padded


@pytest.fixture
def interpreted(monkeypatch):
    """Small blocks, so that rows have several, on the platform that there is."""
    monkeypatch.setattr(splash, "MOST_TOKENS", splash.LANES)
    kind = ATTENTIONS["splash"]._replace(make=partial(splash.make, interpret=True), platforms=())
    monkeypatch.setitem(ATTENTIONS, "splash", kind)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.usefixtures("interpreted")
def test_the_kernel_gives_what_dense_attention_gives(kv_heads):
    layout = packed_layout(2, TOKENS)
    *qkv, weight = tensors(2, TOKENS, kv_heads)
    args = layout, qkv, weight, (None,), jnp.array(0)
    assert_same(value_and_gradients("splash", *args), value_and_gradients("dense", *args), atol=1e-5)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.usefixtures("interpreted")
def test_every_layer_gets_its_own_window(which):
    layout = packed_layout(2, TOKENS, seed=1)
    *qkv, weight = tensors(2, TOKENS)
    args = layout, qkv, weight, (None, 5), jnp.array(which)
    assert_same(value_and_gradients("splash", *args), value_and_gradients("dense", *args), atol=1e-5)


@pytest.mark.usefixtures("interpreted")
def test_capped_scores_are_those_of_dense_attention():
    layout = packed_layout(2, TOKENS, seed=1)
    *qkv, weight = tensors(2, TOKENS)
    args = layout, qkv, weight, (40,), jnp.array(0)
    capped, dense = (value_and_gradients(name, *args, softcap=0.7) for name in ("splash", "dense"))
    assert_same(capped, dense, atol=1e-5)


@pytest.mark.usefixtures("interpreted")
def test_bfloat16_is_as_near_to_float32_as_dense_attention_is():
    layout = packed_layout(2, TOKENS, seed=3)
    *qkv, weight = tensors(2, TOKENS)
    sinks = jnp.array([0.5, -1.0, 3.0, 9.0])
    exact = value_and_gradients("dense", layout, qkv, weight, (None,), jnp.array(0), sinks=sinks)
    narrow = layout, [x.astype(jnp.bfloat16) for x in qkv], weight, (None,), jnp.array(0)
    dense, kernel = (value_and_gradients(name, *narrow, sinks=sinks) for name in ("dense", "splash"))
    for right, one, other in zip(exact, dense, kernel, strict=True):
        assert other.dtype == one.dtype
        error = [np.abs(np.asarray(x, np.float32) - right).mean() for x in (one, other)]
        assert error[1] < 1.5 * error[0]
    assert [x.dtype.name for x in kernel] == [*["bfloat16"] * 4, "float32"]


@pytest.mark.usefixtures("interpreted")
def test_a_batch_of_padding_is_finite():
    *qkv, weight = tensors(2, TOKENS)
    layout = TokenIds(*(jnp.zeros((2, TOKENS), jnp.int32),) * 3)
    attended = make_attention("splash", "cpu", layout, (None,), Split())
    gradients = jax.jit(jax.grad(lambda *x: jnp.sum(attended(*x, jnp.array(0)) * weight), argnums=(0, 1, 2)))(*qkv)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4)])
@pytest.mark.usefixtures("interpreted")
def test_devices_share_rows_and_heads(shape):
    layout = packed_layout(4, TOKENS, seed=5)
    *qkv, weight = tensors(4, TOKENS)
    args = layout, qkv, weight, (None, 40), jnp.array(1)
    mesh = jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    placement = Placement(mesh)
    with jax.set_mesh(mesh):
        split = Split(placement.shards, placement.per_shard)
        found = value_and_gradients("splash", *args, split, sinks=jnp.array([0.5, -1.0, 3.0, 9.0]))
    assert_same(found, value_and_gradients("dense", *args, sinks=jnp.array([0.5, -1.0, 3.0, 9.0])), atol=1e-5)


def test_blocks_are_few_alike_and_padded_little():
    for tokens in range(64, 4097, 64):
        block = splash.block_tokens(tokens)
        padded = tokens + splash.padding(tokens)
        assert padded % block == 0
        assert block % splash.LANES == 0
        assert block <= splash.MOST_TOKENS
        assert padded // block == -(-tokens // splash.MOST_TOKENS)
        assert padded - tokens < splash.LANES * (padded // block)


def test_blocks_that_nothing_sees_are_passed_over():
    """One mask per row for all heads, and 0 where a block of it is empty, in the forward and both backward kernels."""
    tokens = 4 * splash.MOST_TOKENS
    layout = packed_layout(2, tokens, seed=6)
    kernels = splash.make_kernels(layout, 100)
    tiles = np.asarray(visible(*layout, 100)).reshape(2, 4, splash.MOST_TOKENS, 4, splash.MOST_TOKENS)
    seen = tiles.any(axis=(2, 4))
    assert 0 < seen.sum() < np.tril(np.ones((4, 4))).sum() * 2
    for info in (kernels.fwd_mask_info, kernels.dq_mask_info, kernels.dkv_mask_info):
        assert info.block_mask.shape == (2, 1, 4, 4)
        np.testing.assert_array_equal(np.asarray(info.block_mask)[:, 0] > 0, seen)


def test_the_kernel_is_the_choice_on_tpus_and_for_them_only():
    assert attention_kind("auto", "tpu") is ATTENTIONS["splash"]
    for name, platform in (("splash", "cpu"), ("splash", "gpu"), ("cudnn", "cpu"), ("cudnn", "tpu")):
        with pytest.raises(ValueError, match=f"model.attention={name} is for [a-z]+, but this is {platform}; use auto"):
            attention_kind(name, platform)


CUDNN = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"


def lowered_for_cuda(monkeypatch, dtype: str, tokens: int = 256, head_dim: int = 64) -> str:
    """The program of cuDNN's attention and its gradients; there is no GPU here to run it on."""
    monkeypatch.setattr(CUDNN, lambda: 91000)
    layout = packed_layout(2, tokens)
    qkv = [jax.ShapeDtypeStruct((2, tokens, heads, head_dim), dtype) for heads in (4, 2, 2)]

    def total(query, key, value, layout):
        attended = make_attention("cudnn", "gpu", layout, (None,), Split())
        return jnp.sum(attended(query, key, value, jnp.array(0)).astype(jnp.float32))

    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(*qkv, layout)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_cudnn_gets_one_mask_for_all_heads_and_unrepeated_keys(monkeypatch):
    program = lowered_for_cuda(monkeypatch, "bfloat16")
    (forward,) = [line for line in program.splitlines() if "@__cudnn$fmhaScaleBiasSoftmax(" in line]
    (backward,) = [line for line in program.splitlines() if "@__cudnn$fmhaScaleBiasSoftmaxBackward(" in line]
    for line in (forward, backward):
        assert "tensor<2x1x256x256xbf16>" in line
        assert "tensor<2x256x2x64xbf16>" in line
        assert "tensor<2x4x256x256" not in line


@pytest.mark.parametrize(
    ("asked", "need"),
    [
        (("float32", 64, None), "model.compute_dtype=bfloat16; here model.compute_dtype=float32"),
        (("bfloat16", 20, None), "head dimensions that 8 divides, at most 128; .* head dimension is 20"),
        (("bfloat16", 64, 77), "an even batch.row_tokens; .* batch.row_tokens=77"),
    ],
)
def test_cudnn_says_what_it_needs(asked, need):
    check_attention("cudnn", "gpu", Asked("bfloat16", 64))
    with pytest.raises(ValueError, match=r"cudnn cannot cap attention scores, and this model's are capped at 50\.0"):
        check_attention("cudnn", "gpu", Asked("bfloat16", 64, softcap=50.0))
    with pytest.raises(ValueError, match=r"model.attention=cudnn needs a model without attention sinks; here"):
        check_attention("cudnn", "gpu", Asked("bfloat16", 64, sinks=True))
    assert attention_kind("auto", "gpu", Asked("bfloat16", 64, 4096, sinks=True)) is ATTENTIONS["fused"]
    with pytest.raises(ValueError, match=f"model.attention=cudnn needs {need}"):
        check_attention("cudnn", "gpu", Asked(*asked))
