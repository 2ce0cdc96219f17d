"""Bases in 4 bits: bitsandbytes' numbers, their products and gradients, experts, sampling, and what they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from rpo_jax import models
from rpo_jax.config import LoraConfig, MeshConfig
from rpo_jax.hosts import sharding
from rpo_jax.models import lora, quantization
from rpo_jax.models.projection import NF4, NF4_LEVELS, Int4, Quantized, project, project_grouped
from rpo_jax.sampling import kv_cache
from rpo_jax.tools.planning.compiled import _abstract
from rpo_jax.training.needs import device_bytes
from tests.worlds import quantized, small_model, widened

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 9))
BITSANDBYTES = {
    "values": (
        "7e1c4600f12f22f0073a0f9f092901f45f65f10c140fef030e14ecdbddd84f002cfb301fbe5ff1ff2fec71d170e4d5fe"
        "08514419c0fee204bfe020c00f11f008270fef020f4abef3ff4fed61e160f8e2ea1217006121be3e6f081c13ece8ff8e"
        "de41d160f8e1d8210a00b0135b0fdf010f7d6ff0ee0ff3fdf103bfc100f25eabe96f1092a1f7e1d7210d00e00a130efc"
        "403dff0a62214231ae1fcf010fae3fe0a809b0ef5d5f050e4c7ff0dc0cd0ff9b3e171e3b9ff0dc0cd0ff7c4e050f5d5f"
    ),
    "scales": [203, 203, 0, 204, 203, 62],
    "steps": [0.0009770989418029785],
    "offset": 0.9997208714485168,
}
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def test_nf4_is_what_bitsandbytes_makes_of_the_same_weights():
    """bitsandbytes 0.50.2, quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True) on a CPU."""
    w = np.sin(np.arange(3 * 128, dtype=np.float64) ** 2).astype(np.float32).reshape(3, 128)  # [outputs, inputs]
    blocks = quantization.in_blocks(w.T, 1)
    values = quantization.packed(blocks, NF4_LEVELS)
    codes, steps, offset = quantization.rounded_scales(np.max(np.abs(blocks), axis=1))
    ours = np.concatenate([values & 15, values >> 4], axis=1).reshape(128, 3).T
    theirs = np.frombuffer(bytes.fromhex(BITSANDBYTES["values"]), np.uint8)
    np.testing.assert_array_equal(ours.reshape(-1), np.stack([theirs >> 4, theirs & 15], axis=1).reshape(-1))
    assert codes.T.reshape(-1).tolist() == BITSANDBYTES["scales"]
    assert offset == pytest.approx(BITSANDBYTES["offset"], rel=1e-6)
    np.testing.assert_allclose(steps, BITSANDBYTES["steps"], rtol=1e-4)  # of differences from that mean


@pytest.mark.parametrize(
    ("dtype", "compute", "tolerance"),
    [
        ("nf4", "float32", 1e-5),
        ("int4", "float32", 1e-5),
        pytest.param("nf4", "bfloat16", 3e-2, marks=pytest.mark.slow),
    ],
)
def test_the_gradient_of_adapters_is_that_on_the_weights_that_the_base_stands_for(dtype, compute, tolerance):
    targets = ("q_proj", "o_proj", "down_proj")
    model_config, config = small_model(**SIZES), LoraConfig(rank=3, alpha=12.0, base_dtype=dtype, targets=targets)
    params = jax.tree.map(lambda leaf: 3 * leaf, models.init_params(model_config, jax.random.key(0)))
    base = quantized(model_config, params, dtype)
    shapes = lora.abstract_adapters(model_config, config)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    adapters = jax.tree.map(lambda leaf: 0.1 * jax.random.normal(next(keys), leaf.shape), shapes)

    def loss(adapters, base):
        params = lora.combine(base, adapters, config)
        logits = models.apply(model_config, params, TOKENS, compute_dtype=compute, remat="attention")
        return jnp.sum(jnp.tanh(logits))

    wide = widened(model_config, base)
    (got, found), (expected, wanted) = (jax.value_and_grad(loss)(adapters, tree) for tree in (base, wide))
    assert got == pytest.approx(float(expected), rel=tolerance, abs=tolerance)
    for path, gradient in flatten_dict(wanted).items():
        largest = float(jnp.max(jnp.abs(gradient)))
        assert largest > 1e-3
        np.testing.assert_allclose(flatten_dict(found)[path], gradient, atol=tolerance * largest, err_msg=str(path))
    rounding = flatten_dict(params)[("layers", "mlp", "up", "kernel")]
    error = flatten_dict(wide)[("layers", "mlp", "up", "kernel")] - rounding
    assert 0.05 < np.std(error) / np.std(rounding) < 0.15, "four bits are no more than that"


def test_experts_are_multiplied_by_what_they_stand_for():
    model_config = small_model(family="mixtral", **SIZES)
    params = models.init_params(model_config, jax.random.key(0))
    rows_of = jnp.array([3, 0, 5, 1, 0, 0, 4, 2], jnp.int32)
    x = jax.random.normal(jax.random.key(1), (15, 64))
    exact = params["layers"]["mlp"]["up"][0]
    for dtype in quantization.ROUNDED:
        kernel = quantized(model_config, params, dtype)["layers"]["mlp"]["up"]
        if dtype == "int8":
            wide = kernel.values * kernel.scale[:, :, None]
        else:
            wide = widened(model_config, quantized(model_config, params, dtype))["layers"]["mlp"]["up"]
        first = jax.tree.map(lambda leaf: leaf[0], kernel)
        got, expected = (
            jax.value_and_grad(lambda x, kernel=kernel: jnp.sum(jnp.tanh(project_grouped(x, kernel, rows_of))))(x)
            for kernel in (first, jnp.asarray(wide[0]))
        )
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(got[1], expected[1], atol=1e-6)
        assert 0 < np.max(np.abs(wide[0] - exact)) < {"int8": 0.01, "nf4": 0.2, "int4": 0.1}[dtype] * np.max(exact)


@pytest.mark.parametrize("kind", [NF4, Int4])
def test_a_product_over_two_input_axes_of_which_a_block_takes_several(kind):
    """Zeros too: a block of nothing but zeros, and scales that are all the same."""
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(4, 32, 6)).astype(np.float32)
    wide[:2, :, 1] = 0
    levels = quantization.BY_BLOCKS[kind.__name__.lower()][1]
    blocks = quantization.in_blocks(wide, 2)
    scales = quantization.rounded_scales(np.max(np.abs(blocks), axis=1))
    kernel = kind(quantization.packed(blocks, levels), *scales)
    x = rng.normal(size=(2, 5, 4, 32)).astype(np.float32)
    got = project(jnp.asarray(x), kernel, 2)
    np.testing.assert_allclose(got, np.tensordot(x, wide, axes=2), atol=0.2 * np.std(got) * 3)
    assert not np.any(project(jnp.asarray(x).at[:, :, 2:].set(0), kernel, 2)[..., 1])
    same = quantization.rounded_scales(np.full((2, 3), 0.5, np.float32))
    assert same[1].tolist() == [0.0]
    assert float(same[2]) == 0.5


@pytest.mark.parametrize("family", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_the_sampler_reads_what_training_reads(family):
    model_config = small_model(family=family, **SIZES)
    base = quantized(model_config, models.init_params(model_config, jax.random.key(0)), "nf4")
    tokens, starts = TOKENS[:, :8], jnp.zeros(2, jnp.int32)
    prompts = np.zeros((2, kv_cache.SLICE), np.int32)
    prompts[:, -8:] = tokens
    params = kv_cache.to_decode_layout(base, "float32", "cpu")
    hidden, _ = kv_cache.prefill(model_config, params, prompts, starts + kv_cache.SLICE - 8)
    got = kv_cache.next_token_logits(model_config, params, hidden)
    np.testing.assert_allclose(got, models.apply(model_config, base, tokens)[:, -1], atol=1e-5)


@pytest.mark.parametrize("dtype", quantization.ROUNDED)
def test_a_weight_takes_as_much_memory_as_is_said(dtype):
    """Of every matrix of a mixture of experts; a step's table and a mean are small change in matrices of any size."""
    model_config = small_model(family="mixtral", hidden_size=1024, intermediate_size=2048, num_heads=8, num_kv_heads=8)
    base = flatten_dict(lora.abstract_base(model_config, dtype))
    for path, matrix in lora.matrices(model_config).items():
        assert isinstance(base[path], Quantized | NF4 | Int4), path
        weights = np.prod([*matrix.layers.values(), *matrix.inputs.values(), *matrix.outputs.values()])
        kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(base[path]))
        assert kept / weights == pytest.approx(quantization.bytes_per_weight(dtype), rel=5e-3), path
    router = base[("layers", "mlp", "router")]
    assert router.dtype == base[("embed",)].dtype == np.float32
    # What a plan and a run say that a device holds: its share of all of that.
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    policy = models.Policy(model_config, LoraConfig(rank=1, targets=("q_proj",), base_dtype=dtype))
    held = device_bytes(_abstract(mesh, policy.frozen))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(policy.frozen.shapes))
    assert held == pytest.approx(whole / 8, rel=0.02)
