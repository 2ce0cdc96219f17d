"""A learned log Z(x): it enters contrasts between prompts, never those of a pair, and trains with everything else."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax import export, models
from rpo_jax.config import (
    BatchConfig,
    Config,
    ConfigError,
    ContrastConfig,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimConfig,
    PolicyConfig,
    resolve,
)
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.hosts import sharding
from rpo_jax.models import lora
from rpo_jax.objectives import heads, losses, partition
from rpo_jax.training.micro_batches import make_loss_and_gradient
from rpo_jax.training.step import build_steps, make_log_probs, put_batch
from tests.objectives import oracle
from tests.runs import stopped_and_whole
from tests.worlds import random_data, small_model

PAIRS, STEPS = 16, 4
MODEL = small_model()


def configured(
    learned=True, pairing: Literal["paired", "unpaired"] = "paired", micro_rows=None, lora_rank=0, rate=1e-2, **contrast
) -> Config:
    return Config(
        data=DataConfig(pairing=pairing),
        objective=ObjectiveConfig(partition="learned" if learned else "none"),
        contrast=ContrastConfig(weights="embedding", **contrast),
        batch=BatchConfig(pairs=PAIRS, micro_rows=micro_rows),
        optim=OptimConfig(learning_rate=rate, warmup_steps=0),
        lora=LoraConfig(rank=lora_rank),
        model=PolicyConfig(path="somewhere" if lora_rank else None),
    )


def make_mesh(data=1, fsdp=1, tensor=1):
    devices = jax.devices()[: data * fsdp * tensor]
    return sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)


def batches_for(config):
    return PreferenceBatches(
        random_data(),
        pairs=PAIRS,
        pairing=config.data.pairing,
        responses=("chosen", "rejected"),
        seed=0,
        row_tokens=64,
        rows_multiple=16,
    )


def train(config, mesh, steps=STEPS):
    """Metrics of a few steps, and what was trained."""
    batches = batches_for(config)
    with jax.set_mesh(mesh):
        built = build_steps(config, MODEL, mesh, total_steps=steps)
        params = jax.jit(models.init_params, static_argnums=0)(MODEL, jax.random.key(0))
        if config.lora.rank:
            built = built.on(jax.device_put(params, sharding.replicated(mesh)))
            params = jax.jit(lora.init_adapters, static_argnums=(0, 1))(MODEL, config.lora, jax.random.key(1))
        state, reports = built.init(jax.tree.map(jax.device_put, params, built.model_shardings)), []
        for step in range(steps):
            state, report = built.train(state, put_batch(mesh, batches.batch_at(step)), None)
            reports.append({name: float(value) for name, value in report.items()})
        return reports, jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope="module")
def learned():
    return train(configured(), make_mesh())


@pytest.fixture(scope="module")
def without():
    return train(configured(learned=False), make_mesh())


def test_it_is_the_hidden_state_before_a_responses_first_token():
    batch = batches_for(configured()).batch_at(0)
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(*batch.tokens.shape, 8)), rng.normal(size=8)
    got = partition.log_partition(
        jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32), batch.previous, batch.response_ids, 2 * PAIRS
    )
    expected = np.zeros(2 * PAIRS)
    for slot in range(2 * PAIRS):
        (row, first), *_ = np.argwhere(batch.response_ids == slot)
        before = batch.previous[row, first]
        assert batch.branch_ids[row, before] == 0, "the prompt's last token"
        assert batch.branch_ids[row, first] > 0
        expected[slot] = hidden[row, before] @ head
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_its_gradient_reaches_the_head_and_stops_at_the_hidden_state():
    batch = batches_for(configured()).batch_at(0)
    hidden = jax.random.normal(jax.random.key(0), (*batch.tokens.shape, 8))

    def total(hidden, head):
        return jnp.sum(partition.log_partition(hidden, head, batch.previous, batch.response_ids, 2 * PAIRS) ** 2)

    by_hidden, by_head = jax.grad(total, (0, 1))(hidden, jnp.ones(8))
    assert not by_hidden.any()
    assert by_head.all()


def test_all_responses_to_a_prompt_share_one_value():
    value = jnp.array([1.0, 2.0, 4.0, jnp.nan, 3.0])
    got = partition.per_prompt(value, jnp.array([7, 5, 7, -1, 7]), jnp.array([True, True, True, False, False]))
    np.testing.assert_array_equal(got, [2.5, 2.0, 2.5, 0.0, 0.0])


@pytest.mark.parametrize("link", losses.LINKS)
@pytest.mark.parametrize("weights_on", ["score", "loss"])
def test_the_loss_agrees_with_the_oracle(link, weights_on):
    """Eq. 16: s_ij + beta w_ij (log Z_i - log Z_j) is the score of rewards with log Z in them."""
    rng = np.random.default_rng(1)
    chosen, rejected = rng.normal(0, 5, 4), rng.normal(0, 5, 5)
    weights = jnp.asarray(rng.random((4, 5)), jnp.float32)
    z = rng.normal(0, 3, 4), rng.normal(0, 3, 5)
    mask = rng.random((4, 5)) > 0.2

    def loss(chosen, rejected, *z):
        return losses.pairwise_loss(
            chosen, rejected, weights, 0.3, link, jnp.asarray(mask), weights_on=weights_on, log_partition=z
        )

    value, found = jax.value_and_grad(loss, (0, 1, 2, 3))(*map(jnp.asarray, (chosen, rejected, *z)))
    expected, *by = oracle.pairwise(chosen + z[0], rejected + z[1], weights, mask, 0.3, link, weights_on=weights_on)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, want in zip(found, by + by, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_the_diagonal_is_untouched_bit_by_bit():
    """However large log Z is: a pair's own entry has the loss and the derivatives that it has without."""
    rng = np.random.default_rng(2)
    chosen, rejected = (jnp.asarray(rng.normal(0, 9, 6), jnp.float32) for _ in range(2))
    z = jnp.asarray(rng.normal(0, 1e6, 6), jnp.float32)
    own = jnp.eye(6, dtype=bool)

    def loss(chosen, rejected, z=None):
        pair = None if z is None else (z, z)
        return losses.pairwise_loss(chosen, rejected, own.astype(jnp.float32), mask=own, log_partition=pair)

    plain = jax.value_and_grad(loss, (0, 1))(chosen, rejected)
    value, (by_chosen, by_rejected, by_z) = jax.value_and_grad(loss, (0, 1, 2))(chosen, rejected, z)
    assert value == plain[0]
    np.testing.assert_array_equal((by_chosen, by_rejected), plain[1])
    assert not by_z.any()


def test_off_by_default_and_the_first_loss_is_the_same_bit_by_bit(learned, without):
    assert Config().objective.partition == "none"
    assert partition.NAME not in without[1]
    assert "partition/variance" not in without[0][0]
    first, plain = learned[0][0], without[0][0]
    assert first["loss"] == plain["loss"]
    assert first["partition/variance"] == 0
    assert first["grad_norm"] > plain["grad_norm"], "the head has a gradient"


def test_it_learns(learned, without):
    """Differences between prompts grow, and the loss goes down faster than without."""
    reports, params = learned
    assert reports[-1]["partition/variance"] > 1e-3
    assert np.abs(params[partition.NAME]["kernel"]).max() > 1e-3
    assert reports[-1]["loss"] < without[0][-1]["loss"]


@pytest.mark.parametrize("pairing", ["paired", pytest.param("unpaired", marks=pytest.mark.slow)])
def test_any_mesh_and_blocks_give_the_losses_of_one_device(pairing):
    """At a small rate: RMSProp's first steps have one length for all gradients, also for those that are rounding."""
    expected = train(configured(pairing=pairing, rate=3e-4), make_mesh())
    got = train(configured(pairing=pairing, rate=3e-4, block=6, micro_rows=8), make_mesh(2, 2, 2))
    for one, other in zip(got[0], expected[0], strict=True):
        assert one.keys() == other.keys()
        for name in ("loss", "grad_norm", "partition/variance", "contrast/perplexity", "rewards/margins"):
            np.testing.assert_allclose(one[name], other[name], rtol=2e-5, atol=1e-6, err_msg=name)


def test_micro_batches_are_exact():
    """For a loss that is nonlinear in all log-probs and all log Z together."""
    config = configured()
    batch = batches_for(config).batch_at(0)
    forward = make_log_probs(config, MODEL, make_mesh())
    weights = jnp.linspace(-1, 1, 2 * PAIRS)

    def of_trained(trained, rows, num_responses):
        params, beside = heads.split(trained)
        head = beside[partition.NAME]["kernel"]
        return forward(params, rows, num_responses, head)

    def loss(log_probs):
        both = jnp.sum(weights * log_probs.log_prob) / 50 + jnp.sum(log_probs.log_partition * weights[::-1])
        return jnp.tanh(both) + jnp.sum(log_probs.log_prob * log_probs.log_partition) / 1e3, None

    params = models.init_params(MODEL, jax.random.key(0))
    params[partition.NAME] = {"kernel": 0.1 * jax.random.normal(jax.random.key(1), (MODEL.hidden_size,))}
    found = []
    for micro_rows in (None, 4):
        function = jax.jit(partial(make_loss_and_gradient, of_trained, loss, micro_rows=micro_rows))
        with jax.set_mesh(mesh := make_mesh()):
            value, _, gradient = function(params, put_batch(mesh, batch))
        found.append((value, gradient))
    (value, gradient), (whole, expected) = found
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    assert np.abs(expected[partition.NAME]["kernel"]).max() > 0
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * scale)


def test_it_trains_next_to_adapters():
    reports, trained = train(configured(lora_rank=2), make_mesh(2, 1, 1), steps=2)
    assert reports[-1]["partition/variance"] > 0
    assert trained[partition.NAME]["kernel"].any()
    assert set(trained) > {partition.NAME}


@pytest.mark.slow
def test_a_run_resumes_with_it_and_exports_without(tmp_path):
    run, lines = stopped_and_whole(tmp_path, {"contrast.weights": "uniform", "objective.partition": "learned"})
    assert lines[-1]["partition/variance"] > 0
    with pytest.raises(ValueError, match=r"trained with objective\.partition=learned, not none; resume with its own"):
        run("stopped", **{"run.resume": "auto", "objective.partition": "none"})
    folder = export.export(tmp_path / "stopped", tmp_path / "hf")
    model_config, params = models.load_pretrained(folder)
    assert jax.tree.structure(params) == jax.tree.structure(models.abstract_params(model_config))


@pytest.mark.parametrize("name", ["kto", "sft", "slic"])
def test_objectives_without_rewards_of_several_prompts_refuse_it(name):
    with pytest.raises(ValueError, match=f"objective.partition=learned .* objective '{name}' does not; .* rpo, dpo"):
        Config(objective=ObjectiveConfig(name=name, partition="learned"))


def test_a_pairs_own_contrast_refuses_it():
    def learned(name, weights):
        objective = ObjectiveConfig(name=name, partition="learned")
        return resolve(Config(objective=objective, contrast=ContrastConfig(weights=weights)))

    assert learned("dpo", "uniform").heads == (partition.NAME,)
    for name, weights in (("dpo", None), ("rpo", "pair")):
        with pytest.raises(ValueError, match=r"objective\.partition=learned does nothing with contrast\.weights=pair"):
            learned(name, weights)
    with pytest.raises(ConfigError, match=r"objective\.partition=learned does nothing with contrast\.group=1"):
        configured(group=1)
