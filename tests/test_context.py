"""A mesh axis along which devices share the tokens of rows: the step's values and gradients are one device's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax import models
from rpo_jax.config import BatchConfig, Config, MeshConfig
from rpo_jax.hosts import sharding
from rpo_jax.models import recompute
from rpo_jax.objectives import heads
from rpo_jax.training.forward import make_log_probs
from rpo_jax.training.micro_batches import ROW_FIELDS
from rpo_jax.training.prepare import batches_of, reference_pass
from rpo_jax.training.step import build_steps, put_batch
from tests.runs import metric_lines, stopped_and_whole
from tests.test_packed import data_with_shared_prompts
from tests.test_step import PAIRS, batches_for, configured
from tests.worlds import random_data, small_model

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
        reference = heads.split(state.params)[0] if config.reference.mode == "live" else None
        found = jax.jit(built.gradient)(state.params, put_batch(mesh, batch), reference)
        return jax.tree.map(np.asarray, (found.loss, found.gradient))


def one_device():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def assert_alike(found, right):
    np.testing.assert_allclose(found[0], right[0], rtol=1e-5)
    for (path, got), want in zip(jax.tree.leaves_with_path(found[1]), jax.tree.leaves(right[1]), strict=True):
        atol = 1e-5 * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=atol, err_msg=jax.tree_util.keystr(path))


SHARED = MeshConfig(data=1, fsdp=2, context=2, tensor=2)


@pytest.mark.parametrize("attention", ["blockwise", pytest.param("dense", marks=pytest.mark.slow)])
def test_devices_that_share_rows_give_the_log_probs_and_gradient_of_one(attention, monkeypatch):
    """Prompts shared by many responses, a layer with a window, rows and heads shared too, the MLP in chunks."""
    monkeypatch.setattr(recompute, "MLP_TOKENS", 64)

    def found(mesh, **changes):
        config, weights = configured(**changes), np.linspace(-1, 1, 2 * PAIRS, dtype=np.float32)
        batch = batches_for(config, data_with_shared_prompts(4), rows_multiple=4, row_tokens=TOKENS).batch_at(0)
        forward = make_log_probs(config, MODEL, mesh)

        def total(params, rows):
            log_prob = forward(params, rows, 2 * PAIRS).log_prob
            return jnp.sum(log_prob * weights), log_prob

        with jax.set_mesh(mesh):
            params = models.init_params(MODEL, jax.random.key(0))
            params = jax.device_put(params, sharding.parameter_shardings(mesh, *models.Policy(MODEL).weights))
            rows = {name: getattr(put_batch(mesh, batch), name) for name in ROW_FIELDS}
            return jax.tree.map(np.asarray, jax.jit(jax.grad(total, has_aux=True))(params, rows)[::-1])

    one = found(one_device(), attention="dense")
    assert_alike(found(sharding.make_mesh(SHARED), attention=attention, remat="attention"), one)


@pytest.mark.slow
def test_the_step_s_gradient_is_that_of_one_device():
    found = [gradient_of(mesh, attention="dense") for mesh in (one_device(), sharding.make_mesh(SHARED))]
    assert_alike(found[1], found[0])


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ppo", "f_dpo", "reward", "wpo"])
def test_what_reads_single_tokens_or_has_a_head_of_its_own_is_the_same_too(objective):
    """Log-probs and values of every token, collisions, and a score of a response's last token, in micro-batches."""
    reference = "live" if objective == "ppo" else "cached"
    found = [
        gradient_of(mesh, objective=objective, attention="dense", micro_rows=4, reference=reference)
        for mesh in (one_device(), sharding.make_mesh(MeshConfig(data=1, fsdp=4, context=2)))
    ]
    assert_alike(found[1], found[0])


@pytest.mark.slow
def test_experts_and_tokens_are_shared_at_once():
    model = dataclasses.replace(small_model(family="mixtral"), initializer_range=0.1)
    mesh = sharding.make_mesh(MeshConfig(data=1, expert=2, context=2, tensor=2))
    found = [gradient_of(on, model, attention="blockwise", remat="full") for on in (one_device(), mesh)]
    assert_alike(found[1], found[0])


def test_rows_are_made_of_as_many_stripes_as_devices_share():
    config = Config(mesh=MeshConfig(context=2), batch=BatchConfig(pairs=8))
    data = random_data()
    assert {shape.tokens for shape in batches_of(config, data, ("chosen", "rejected"), 4).shapes} == {TOKENS}
    assert reference_pass(config, data, ("chosen", "rejected"), 4).shape.tokens == TOKENS


@pytest.mark.slow
def test_a_run_on_shared_rows_goes_on_where_they_are_whole(tmp_path):
    """Cached reference, evaluation and sampled answers on a context of two; the rest of the steps without one."""
    shared = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.context": 2, "mesh.tensor": 2, "train.sample_prompts": 2}
    run, lines = stopped_and_whole(tmp_path, {**shared, "objective.name": "dpo"})
    whole = {"mesh.data": 8, "mesh.fsdp": 1, "mesh.context": 1, "mesh.tensor": 1}
    run("other", **{"train.steps": 2})
    run("other", **{"run.resume": "auto", **whole})
    other = [line for line in metric_lines(tmp_path / "other") if "loss" in line]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([line[name] for line in other], [line[name] for line in lines], rtol=1e-4)
    assert (tmp_path / "whole" / "samples.jsonl").exists()
