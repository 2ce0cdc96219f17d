"""PPO in the trainer: a value head in the state, every token through micro-batches and meshes, a reference beside."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax import export, models
from rpo_jax.config import (
    BatchConfig,
    Config,
    ConfigError,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimConfig,
    PolicyConfig,
    ReferenceConfig,
)
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.hosts import sharding
from rpo_jax.models import lora
from rpo_jax.objectives import value
from rpo_jax.training.forward import make_log_probs
from rpo_jax.training.micro_batches import make_loss_and_gradient
from rpo_jax.training.step import build_steps, put_batch
from tests.runs import stopped_and_whole
from tests.worlds import random_data, small_model

PAIRS, STEPS = 8, 4
MODEL = small_model()


def configured(pairing="paired", micro_rows=None, lora_rank=0, rate=1e-2, micro_keep=False):
    return Config(
        data=DataConfig(pairing=pairing),
        objective=ObjectiveConfig(name="ppo"),
        reference=ReferenceConfig(mode="adapter" if lora_rank else "live"),
        batch=BatchConfig(pairs=PAIRS, micro_rows=micro_rows, micro_keep=micro_keep),
        optim=OptimConfig(learning_rate=rate, warmup_steps=0),
        lora=LoraConfig(rank=lora_rank),
        model=PolicyConfig(path="somewhere" if lora_rank else None),
    )


def make_mesh(data=1, fsdp=1, tensor=1):
    return sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])


def batches_for(config):
    return PreferenceBatches(
        random_data(), pairs=PAIRS, pairing=config.data.pairing, seed=0, row_tokens=64, rows_multiple=16
    )


def train(config, mesh, steps=STEPS):
    """Metrics of a few steps, and what was trained."""
    batches = batches_for(config)
    with jax.set_mesh(mesh):
        built = build_steps(config, MODEL, mesh, total_steps=steps)
        params = jax.jit(models.init_params, static_argnums=0)(MODEL, jax.random.key(0))
        reference = None
        if config.lora.rank:
            built = built.on(jax.device_put(params, sharding.replicated(mesh)))
            params = jax.jit(lora.init_adapters, static_argnums=(0, 1))(MODEL, config.lora, jax.random.key(1))
        else:
            reference = jax.tree.map(jnp.copy, params)
        state, reports = built.init(jax.tree.map(jax.device_put, params, built.model_shardings)), []
        for step in range(steps):
            state, report = built.train(state, put_batch(mesh, batches.batch_at(step)), reference)
            reports.append({name: float(number) for name, number in report.items()})
        held_out = built.evaluate(state.params, put_batch(mesh, batches.batch_at(0)), reference)
        assert held_out["loss"].count > 2 * PAIRS, "a mean over tokens"
        return reports, jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope="module")
def alone():
    return train(configured(rate=3e-4), make_mesh())


def test_the_first_loss_is_known(alone):
    """All ratios are 1 and the normalised advantages have mean 0; with values of 0 the critic's error is the targets'.

    The targets of a response of n tokens are the discounted rewards 0.99^(n - 2), ..., 1, 0, all with its sign.
    """
    batch, squares, tokens = batches_for(configured()).batch_at(0), 0.0, 0
    for slot in range(2 * PAIRS):
        size = int((batch.response_ids == slot).sum())
        squares += sum(0.99 ** (2 * k) for k in range(size - 1))
        tokens += size
    assert alone[0][0]["loss"] == pytest.approx(0.01 * 0.5 * squares / tokens, rel=1e-4, abs=1e-6)
    assert alone[0][0]["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_the_policy_learns_which_responses_are_chosen():
    reports, params = train(configured(), make_mesh(), steps=8)
    assert reports[-1]["rewards/margins"] > 0.1
    assert params[value.NAME]["kernel"].any()
    assert params[value.NAME]["bias"] != 0


@pytest.mark.parametrize("pairing", ["paired", pytest.param("unpaired", marks=pytest.mark.slow)])
def test_any_mesh_and_micro_batches_give_the_losses_of_one_device(pairing, alone):
    """At a small rate: RMSProp's first steps have one length for all gradients, also for those that are rounding."""
    expected = alone if pairing == "paired" else train(configured(pairing, rate=3e-4), make_mesh())
    got = train(configured(pairing, micro_rows=8, rate=3e-4), make_mesh(2, 2, 2))
    for one, other in zip(got[0], expected[0], strict=True):
        assert one.keys() == other.keys()
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("keep", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_micro_batches_are_exact(keep):
    """For a loss that is nonlinear in all tokens together, with the tokens where they lie in the whole batch."""
    config = configured(micro_rows=4, micro_keep=keep)
    batch = batches_for(config).batch_at(0)
    forward = make_log_probs(config, MODEL, make_mesh(), tokens=True)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=batch.tokens.shape), jnp.float32)
    params = models.init_params(MODEL, jax.random.key(0))
    head = jax.random.normal(jax.random.key(1), (MODEL.hidden_size,)), jnp.float32(0.3)
    params[value.NAME] = dict(zip(("kernel", "bias"), head, strict=True))

    def of_trained(trained, rows, num_responses):
        model = {name: part for name, part in trained.items() if name != value.NAME}
        return forward(model, rows, num_responses, None, trained[value.NAME])

    def loss(log_probs):
        found = log_probs.tokens
        assert found.log_prob.shape == found.value.shape == batch.tokens.shape
        both = jnp.sum(weights * found.log_prob) / 50 + jnp.sum(jnp.sin(found.value) * weights)
        sums = jnp.sum(log_probs.log_prob**2) / 1e4
        return jnp.tanh(both / 10) + sums + jnp.sum(found.log_prob * found.value) / 1e3, None

    found = []
    for micro_rows in (None, 4):
        function = jax.jit(
            partial(make_loss_and_gradient, of_trained, loss, micro_rows=micro_rows, keep=keep and micro_rows == 4)
        )
        with jax.set_mesh(mesh := make_mesh()):
            result, _, gradient = function(params, put_batch(mesh, batch))
        found.append((result, gradient))
    (whole, expected), (got, gradient) = found
    np.testing.assert_allclose(got, whole, rtol=1e-6)
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected[value.NAME]))
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.slow
def test_it_trains_next_to_adapters_with_the_base_for_reference():
    reports, trained = train(configured(lora_rank=2), make_mesh(2, 1, 1), steps=2)
    assert np.isfinite(reports[-1]["loss"])
    assert trained[value.NAME]["kernel"].any()


@pytest.mark.slow
def test_a_run_resumes_with_it_and_exports_without(tmp_path):
    changes = {"objective.name": "ppo", "reference.mode": "live", "batch.micro_rows": 8}
    run, lines = stopped_and_whole(tmp_path, changes)
    assert lines[-1]["rewards/margins"] > 0
    with pytest.raises(ValueError, match=r"objective\.name=ppo, not dpo, and one of them has a value head"):
        run("stopped", **{"run.resume": "auto", "objective.name": "dpo"})
    folder = export.export(tmp_path / "stopped", tmp_path / "hf")
    model_config, params = models.load_pretrained(folder)
    assert jax.tree.structure(params) == jax.tree.structure(models.abstract_params(model_config))


@pytest.mark.parametrize("mode", ["cached", "none"])
def test_a_reference_without_tokens_is_refused(mode):
    with pytest.raises(ConfigError, match=rf"reference\.mode={mode} has no log-probs of single tokens; set .*live"):
        Config(objective=ObjectiveConfig(name="ppo"), reference=ReferenceConfig(mode=mode))
