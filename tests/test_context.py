"""A mesh axis along which devices share the tokens of rows: the step's values and gradients are one device's."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from rpo_jax import models
from rpo_jax.config import Config, ConfigError, MeshConfig, load_config
from rpo_jax.hosts import sharding
from rpo_jax.models import recompute
from rpo_jax.training.step import build_steps, put_batch
from tests.test_packed import data_with_shared_prompts
from tests.test_step import batches_for, configured
from tests.worlds import small_model

MODEL = dataclasses.replace(small_model(), sliding_windows=(None, 9))
TOKENS = 256  # a stripe for each of two devices


def gradient_of(mesh, model=MODEL, objective="rpo", data=None, **changes):
    config = configured(objective=objective, **changes)
    data = data_with_shared_prompts(4) if data is None else data
    batch = batches_for(config, data, rows_multiple=4, row_tokens=TOKENS).batch_at(0)
    assert batch.branch_ids.max() > 3
    with jax.set_mesh(mesh):
        built = build_steps(config, model, mesh, total_steps=1)
        init = jax.jit(models.init_params, static_argnums=0, out_shardings=built.model_shardings)
        state = built.init(init(model, jax.random.key(0)))
        found = jax.jit(built.gradient)(state.params, put_batch(mesh, batch), None)
        return jax.tree.map(np.asarray, (found.loss, found.gradient))


def one_device():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def assert_alike(found, right):
    np.testing.assert_allclose(found[0], right[0], rtol=1e-5)
    for (path, got), want in zip(jax.tree.leaves_with_path(found[1]), jax.tree.leaves(right[1]), strict=True):
        atol = 1e-5 * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def right():
    return gradient_of(one_device(), attention="dense")


@pytest.mark.parametrize("attention", ["dense", "blockwise"])
def test_devices_that_share_rows_give_the_gradient_of_one(attention, right, monkeypatch):
    """Prompts shared by many responses, a layer with a window, rows and heads shared too, the MLP in chunks."""
    monkeypatch.setattr(recompute, "MLP_TOKENS", 64)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    assert_alike(gradient_of(mesh, attention=attention, remat="attention"), right)
