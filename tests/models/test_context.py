"""Devices that share a row's tokens: every attention, with shared prompts and windows, against one device's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax.config import Config, MeshConfig, PolicyConfig
from rpo_jax.core.shards import STRIPE, Shards
from rpo_jax.hosts.sharding import Placement, make_mesh
from rpo_jax.models.attention import fused, splash
from rpo_jax.models.attention.kind import Split
from rpo_jax.models.attention.masking import TokenIds
from rpo_jax.models.attention.registry import ATTENTIONS
from rpo_jax.training.step import build_log_probs
from tests.models.test_blockwise import assert_same, packed_layout, tensors, value_and_gradients
from tests.worlds import small_model

ROWS, TOKENS = 2, 6 * STRIPE


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels of GPUs and TPUs, on the platform that there is."""
    for name, make in (("fused", fused.make), ("splash", splash.make)):
        kind = ATTENTIONS[name]._replace(make=partial(make, interpret=True), platforms=())
        monkeypatch.setitem(ATTENTIONS, name, kind)


@pytest.mark.parametrize(
    ("name", "which"),
    [
        *((name, 1) for name in ("dense", "blockwise", "fused")),
        pytest.param("splash", 1, marks=pytest.mark.slow),
        *(pytest.param(name, 0, marks=pytest.mark.slow) for name in ("dense", "blockwise", "fused", "splash")),
    ],
)
@pytest.mark.usefixtures("interpreted")
def test_what_devices_that_share_a_row_give_is_one_device_s(name, which):
    """Values, and gradients by queries, keys, values and sinks."""
    layout = packed_layout(ROWS, TOKENS, seed=3)
    *qkv, weight = tensors(ROWS, TOKENS)
    sinks, windows = jnp.array([0.5, -1.0, 3.0, 9.0]), (None, 150)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    at, shards = Placement(mesh), Shards(rows=2, context=2)
    *striped, striped_weight = map(shards.striped, (*qkv, weight))
    ids = TokenIds(*map(shards.striped, layout))
    split = Split(at.shards, at.per_shard, at.gather, at.mesh_axes)
    right = value_and_gradients("dense", layout, qkv, weight, windows, jnp.array(which), sinks=sinks)
    with jax.set_mesh(mesh):
        args = ids, striped, striped_weight, windows, jnp.array(which)
        *found, of_sinks = value_and_gradients(name, *args, split, sinks=sinks)
    assert_same((*map(shards.in_order, found), of_sinks), right, atol=1e-5)


def test_an_attention_that_cannot_share_a_row_is_refused_before_anything_compiles(monkeypatch):
    monkeypatch.setitem(ATTENTIONS, "own", ATTENTIONS["dense"]._replace(shares_tokens=False))
    config = Config(model=PolicyConfig(attention="own"))
    with pytest.raises(ValueError, match=r"model.attention=own needs mesh.context=1; here"):
        build_log_probs(config, small_model(), make_mesh(MeshConfig(context=2)))


def test_stripes_are_dealt_in_turn_and_put_back():
    shards, index = Shards(rows=2, context=3), np.arange(TOKENS)
    rows = np.stack([index, index + TOKENS])
    striped = shards.striped(rows)
    np.testing.assert_array_equal(striped[0, : 2 * STRIPE], [*index[:STRIPE], *index[3 * STRIPE : 4 * STRIPE]])
    np.testing.assert_array_equal(shards.in_order(striped), rows)
    np.testing.assert_array_equal(striped[0][shards.place(index, TOKENS)], index)
    parts = shards.split(striped[..., None])
    np.testing.assert_array_equal(parts[4, :, 0], striped[1, 2 * STRIPE : 4 * STRIPE])
    np.testing.assert_array_equal(shards.join(parts, (2, TOKENS, 1))[..., 0], striped)
