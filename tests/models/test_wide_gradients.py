"""Gradients in float32 of products in bfloat16: mesh.reduce_dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from rpo_jax import models
from rpo_jax.config import Config, LoraConfig, MeshConfig, PolicyConfig
from rpo_jax.hosts.sharding import make_mesh
from rpo_jax.models import lora
from rpo_jax.training.forward import make_log_probs
from tests.worlds import small_model

ROWS, TOKENS = 8, 16
ONE, SHARED = MeshConfig(data=1), MeshConfig(data=1, fsdp=4, tensor=2)


def packed():
    """One response a row, of its second half."""
    tokens = np.random.default_rng(0).integers(3, 90, (ROWS, TOKENS)).astype(np.int32)
    place = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), tokens.shape)
    scored = place >= TOKENS // 2
    return {
        "tokens": tokens,
        "positions": place,
        "segment_ids": np.ones_like(tokens),
        "branch_ids": scored.astype(np.int32),
        "previous": np.where(scored, place - 1, 0).astype(np.int32),
        "response_ids": np.where(scored, np.arange(ROWS, dtype=np.int32)[:, None], -1).astype(np.int32),
    }


def gradients(family, mesh, reduce_dtype, adapters, dtype="bfloat16"):
    """Of the log-probs' sum by what is trained, those of layers' matrices only."""
    model = small_model(family=family)
    mesh = make_mesh(mesh, jax.devices()[: mesh.fsdp * mesh.tensor])
    config = Config(
        model=PolicyConfig(compute_dtype=dtype, remat="full"),
        mesh=MeshConfig(reduce_dtype=reduce_dtype),
    )
    log_probs, rows = make_log_probs(config, model, mesh), packed()
    weights = models.init_params(model, jax.random.key(0))
    targets = tuple(models.FAMILIES[family].lora_targets)
    policy = models.Policy(model, LoraConfig(rank=4, alpha=16.0, targets=targets) if adapters else LoraConfig())
    trained = jax.tree.map(lambda x: x + 0.01, policy.init(jax.random.key(1))) if adapters else weights

    def total(trained):
        params = policy.combine(trained, weights)
        return jnp.sum(log_probs(params, rows, ROWS).log_prob)

    with jax.set_mesh(mesh):
        found = flatten_dict(jax.jit(jax.grad(total))(trained))
    matrices = {kernel.path for kernel in lora.matrices(model).values()}
    return {path: np.asarray(x) for path, x in found.items() if adapters or path in matrices}


def share_in_bfloat16(x):
    return np.mean(x == x.astype(jnp.bfloat16).astype(np.float32))


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow), "phi3"])
def test_a_product_s_gradient_is_not_rounded(family, adapters):
    narrow, wide = (gradients(family, ONE, kind, adapters) for kind in ("compute", "float32"))
    assert narrow.keys() == wide.keys()
    for path in narrow:
        assert share_in_bfloat16(narrow[path]) == 1, path
        assert share_in_bfloat16(wide[path]) < 0.1, path
        assert wide[path].dtype == np.float32
        assert np.linalg.norm(narrow[path] - wide[path]) < 2**-6 * np.linalg.norm(wide[path])


@pytest.mark.parametrize("family", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_in_float32_nothing_changes(family):
    narrow, wide = (gradients(family, ONE, kind, False, "float32") for kind in ("compute", "float32"))
    for path in narrow:
        np.testing.assert_allclose(narrow[path], wide[path], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_devices_add_it_in_float32(family):
    """Experts' products give bfloat16 on every device, and what is added is float32."""
    wide = gradients(family, SHARED, "float32", False)
    for path, x in wide.items():
        assert share_in_bfloat16(x) < 0.1, path
