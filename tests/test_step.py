import re
from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax import models
from rpo_jax.config import (
    BatchConfig,
    Config,
    ContrastConfig,
    DataConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimConfig,
    PolicyConfig,
    ReferenceConfig,
)
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.hosts import sharding
from rpo_jax.models import recompute
from rpo_jax.objectives import metrics
from rpo_jax.training.micro_batches import make_loss_and_gradient
from rpo_jax.training.step import build_log_probs, build_steps, make_log_probs, put_batch
from tests.data.ragged import RESPONSES, embedded, embeddings_of, table_of
from tests.worlds import random_data, small_model

PAIRS, STEPS = 16, 5
MODEL = small_model()
OPTIM = OptimConfig(learning_rate=1e-3, warmup_steps=2)


def configured(
    pairing="paired", objective="rpo", micro_rows=None, remat="none", attention="auto", reference="cached", **contrast
) -> Config:
    return Config(
        data=DataConfig(pairing=pairing),
        objective=ObjectiveConfig(name=objective),
        contrast=ContrastConfig(**contrast),
        reference=ReferenceConfig(mode=reference),
        batch=BatchConfig(pairs=PAIRS, micro_rows=micro_rows),
        model=PolicyConfig(remat=remat, attention=attention),
        optim=OPTIM,
    )


def make_mesh(data=1, fsdp=1, tensor=1):
    devices = jax.devices()[: data * fsdp * tensor]
    return sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)


def batches_for(config: Config, data=None, rows_multiple=8, responses=("chosen", "rejected"), **changes):
    arguments = {"pairs": PAIRS, "pairing": config.data.pairing, "responses": responses, "seed": 0, "row_tokens": 64}
    return PreferenceBatches(
        random_data() if data is None else data, rows_multiple=rows_multiple, **arguments | changes
    )


def train(config: Config, mesh, batches, steps=STEPS, live=False):
    """Metrics of a few steps from the same initial weights, and the final parameters."""
    with jax.set_mesh(mesh):
        built = build_steps(config, MODEL, mesh, total_steps=steps)
        init = jax.jit(models.init_params, static_argnums=0, out_shardings=built.state_shardings.params)
        params = init(MODEL, jax.random.key(0))
        reference = jax.tree.map(jnp.copy, params) if live else None
        state, reports = built.init(params), []
        for step in range(steps):
            state, report = built.train(state, put_batch(mesh, batches.batch_at(step)), reference)
            reports.append({name: float(value) for name, value in report.items()})
        return reports, jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope="module")
def on_one_device():
    return {
        pairing: train(config := configured(pairing), make_mesh(), batches_for(config))[0]
        for pairing in ("paired", "unpaired")
    }


LONGER_SHAPES = [pytest.param(shape, marks=pytest.mark.slow) for shape in ((4, 2, 1), (1, 4, 2))]


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), *LONGER_SHAPES])
@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_any_mesh_gives_the_losses_of_one_device(shape, pairing, on_one_device):
    config = configured(pairing)
    reports, _ = train(config, make_mesh(*shape), batches_for(config))
    for name in ("loss", "grad_norm", "rewards/margins", "contrast/perplexity"):
        got, expected = ([report[name] for report in found] for found in (reports, on_one_device[pairing]))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7, err_msg=name)
    assert len({report["loss"] for report in reports}) == STEPS, "training must change the loss"


@pytest.mark.parametrize(
    "shape", [(2, 2, 2), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((1, 1, 1), (1, 2, 4)))]
)
def test_attention_by_blocks_gives_the_losses_of_dense_attention(shape, on_one_device):
    """Rows of three blocks, recomputed, in micro-batches: what `auto` does on a CPU where rows are long."""
    config = configured(attention="blockwise", remat="dots", micro_rows=8)
    reports, _ = train(config, make_mesh(*shape), batches_for(config, row_tokens=192, rows_multiple=16))
    for name in ("loss", "grad_norm", "rewards/margins", "contrast/perplexity"):
        got, expected = ([report[name] for report in found] for found in (reports, on_one_device["paired"]))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("remat", ["attention", "full"])
@pytest.mark.parametrize("shape", [pytest.param((1, 1, 1), marks=pytest.mark.slow), (2, 2, 2), (1, 8, 1)])
def test_an_mlp_in_chunks_gives_the_losses_of_a_whole_one(shape, remat, on_one_device, monkeypatch):
    monkeypatch.setattr(recompute, "MLP_TOKENS", 16)
    config = configured(remat=remat)
    reports, _ = train(config, make_mesh(*shape), batches_for(config))
    for name in ("loss", "grad_norm", "rewards/margins", "contrast/perplexity"):
        got, expected = ([report[name] for report in found] for found in (reports, on_one_device["paired"]))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7, err_msg=name)


def test_chunks_of_the_mlp_gather_no_weights(monkeypatch):
    """Split over fsdp, the weights are gathered once a layer, before its loop over chunks."""
    mesh = make_mesh(1, 8)
    config = configured(remat="full")

    def gathers_and_loops():
        with jax.set_mesh(mesh):
            built = build_steps(config, MODEL, mesh, total_steps=1)
            batch = put_batch(mesh, batches_for(config).batch_at(0))
            program = built.train.lower(built.abstract_state, batch, None).compile().as_text()
        inner = re.findall(r'all-gather[^\n]*op_name="[^"]*while/body[^"]*while/body', program)
        return len(inner), program.count(" while(")

    whole = gathers_and_loops()
    monkeypatch.setattr(recompute, "MLP_TOKENS", 16)
    chunked = gathers_and_loops()
    assert chunked[1] > whole[1], "there are loops to look into"
    assert chunked[0] <= whole[0]


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_what_optimizers_keep_in_other_shapes_is_placed(name):
    """Adafactor's moments are factored from 128 by 128 on; Muon has some of some parameters, Adam's of the others."""
    model = small_model(hidden_size=128, intermediate_size=128, num_layers=1)
    config = replace(configured(), optim=replace(OPTIM, name=name))
    state = build_steps(config, model, make_mesh(2, 2, 2), total_steps=1).abstract_state
    for leaf in jax.tree.leaves(state):
        leaf.sharding.shard_shape(leaf.shape)  # an error where the mesh cannot divide it so
    kept = {(leaf.shape, tuple(leaf.sharding.spec)) for leaf in jax.tree.leaves(state.opt_state)}
    mlp, of_mlp = (1, 128, 128), state.params["layers"]["mlp"]["up"]["kernel"]
    assert of_mlp.shape == mlp
    assert (mlp, tuple(of_mlp.sharding.spec)) in kept if name == "muon" else ((1, 128), ()) in kept


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_optimizers_that_keep_other_shapes_give_the_losses_of_one_device(name, monkeypatch):
    monkeypatch.setitem(globals(), "MODEL", small_model(hidden_size=128, intermediate_size=128, num_layers=1))
    config = replace(configured(), optim=replace(OPTIM, name=name))
    reports = [train(config, make_mesh(*shape), batches_for(config), steps=3)[0] for shape in ((1, 1, 1), (2, 2, 2))]
    got, expected = ([report["loss"] for report in found] for found in reports)
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert len(set(got)) == 3


def test_parameters_and_optimizer_state_are_split():
    mesh = make_mesh(2, 2, 2)
    placed = build_steps(configured(), MODEL, mesh, total_steps=1).state_shardings
    head = placed.params["head"].spec
    assert tuple(head) == ("fsdp", "tensor")
    split = [s for s in jax.tree.leaves(placed.opt_state) if any(s.spec)]
    assert len(split) == len([s for s in jax.tree.leaves(placed.params) if any(s.spec)])


def test_data_parallel_devices_gather_nothing():
    """Every device has the model and its own rows: sums over devices are all that they exchange."""
    mesh = make_mesh(8)
    config = configured()
    with jax.set_mesh(mesh):
        built = build_steps(config, MODEL, mesh, total_steps=1)
        batch = put_batch(mesh, batches_for(config).batch_at(0))
        program = built.train.lower(built.abstract_state, batch, None).compile().as_text()
    assert " all-reduce(" in program
    assert " all-gather(" not in program


def test_solving_for_temperatures_is_part_of_the_one_program_and_exchanges_nothing():
    """The same collectives as with a fixed temperature, in number and size, and no call back to the host."""
    mesh, found = make_mesh(2, 2, 2), []
    for settings in ({"perplexity": 6.0}, {"temperature": 0.5}):
        config = configured(**settings)
        with jax.set_mesh(mesh):
            built = build_steps(config, MODEL, mesh, total_steps=1)
            batch = put_batch(mesh, batches_for(config).batch_at(0))
            program = built.train.lower(built.abstract_state, batch, None).compile().as_text()
        assert "callback" not in program
        exchanges = re.findall(
            r"= (\S+) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", program
        )
        found.append((Counter(exchanges), program.count(" while(")))
    (calibrated, loops), (fixed, loops_of_fixed) = found
    assert calibrated == fixed
    assert calibrated
    assert loops == loops_of_fixed + 1, "the bisection is in the program"


def gradient_of(config, batch, mesh, micro_rows, keep=False):
    """Loss and gradient for a loss that is nonlinear in all responses together."""
    forward = make_log_probs(config, MODEL, mesh)
    weights = jnp.linspace(-1, 1, 2 * PAIRS)

    def loss(log_probs):
        return jnp.tanh(jnp.sum(weights * log_probs.log_prob) / 50) + jnp.sum(log_probs.log_prob**2) / 1e4, None

    params = models.init_params(MODEL, jax.random.key(0))
    function = jax.jit(partial(make_loss_and_gradient, forward, loss, micro_rows=micro_rows, keep=keep))
    with jax.set_mesh(mesh):
        value, _, gradient = function(params, put_batch(mesh, batch))
    return value, gradient


LONGER = [pytest.param(remat, marks=pytest.mark.slow) for remat in ("attention", "full", "none")]


@pytest.mark.parametrize("remat", ["dots", *LONGER])
def test_micro_batches_are_exact(remat, monkeypatch):
    monkeypatch.setattr(recompute, "MLP_TOKENS", 64)
    config = configured(remat=remat)
    batch = batches_for(config, rows_multiple=16).batch_at(0)
    assert batch.tokens.shape[0] == 16
    whole, expected = gradient_of(config, batch, make_mesh(), None)
    for shape, micro_rows, keep in (((1, 1, 1), 4, False), ((2, 1, 1), 2, False), ((2, 1, 1), 4, True)):
        value, gradient = gradient_of(config, batch, make_mesh(*shape), micro_rows, keep)
        np.testing.assert_allclose(value, whole, rtol=1e-6)
        scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
        for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * scale)


def test_rpo_in_groups_of_one_is_dpo():
    batches = batches_for(configured())
    rpo, _ = train(configured(group=1), make_mesh(), batches)
    dpo, _ = train(configured(objective="dpo"), make_mesh(), batches)
    np.testing.assert_allclose([r["loss"] for r in rpo], [r["loss"] for r in dpo], rtol=1e-6)


def test_a_group_does_not_see_the_others():
    """Groups are filled in batch order: permuting pairs inside a group changes nothing, swapping across does."""
    data = random_data(PAIRS)

    mesh = make_mesh()
    params = models.init_params(MODEL, jax.random.key(0))
    plain = np.arange(PAIRS)
    within = np.concatenate([plain[:4][::-1], plain[4:]])
    across = plain.copy()
    across[[0, 4]] = across[[4, 0]]

    def losses(group):
        config = configured(group=group)
        evaluate = build_steps(config, MODEL, mesh, total_steps=1).evaluate
        for order in (plain, within, across):
            reference = table_of(data, data.reference_log_probs)[order]
            examples = [data.examples[i] for i in order]
            shuffled = embedded(examples, embeddings_of(data, "chosen")[order], reference=reference)
            batch = batches_for(config, shuffled, order="sequential").batch_at(0)
            yield float(metrics.finalize(evaluate(params, put_batch(mesh, batch), None))["loss"])

    with jax.set_mesh(mesh):
        in_order, permuted_within, swapped_across = losses(4)
        assert permuted_within == pytest.approx(in_order, rel=1e-6)
        assert abs(swapped_across / in_order - 1) > 1e-5
        in_order, _, swapped_across = losses("global")
        assert swapped_across == pytest.approx(in_order, rel=1e-6)


def test_a_live_reference_equals_its_cached_log_probs():
    config = configured()
    data, mesh = random_data(), make_mesh()
    sweep = batches_for(config, data, order="sequential")
    with jax.set_mesh(mesh):
        log_probs, _ = build_log_probs(config, MODEL, mesh)
        params = models.init_params(MODEL, jax.random.key(0))
        cached = np.zeros((len(data.examples), len(RESPONSES)), np.float32)
        for step in range(sweep.steps_per_epoch):
            batch = sweep.batch_at(step)
            values = np.asarray(log_probs(params, put_batch(mesh, batch)).log_prob)
            for column, side in enumerate((batch.sides["chosen"], batch.sides["rejected"])):
                slots = values[column * PAIRS :][:PAIRS]
                cached[side.example_index[side.valid], column] = slots[side.valid]
    with_cache = embedded(data.examples, embeddings_of(data, "chosen"), reference=cached)
    live, _ = train(config, mesh, batches_for(config, data), live=True)
    stored, _ = train(config, mesh, batches_for(config, with_cache))
    np.testing.assert_allclose([r["loss"] for r in live], [r["loss"] for r in stored], rtol=1e-5)
    np.testing.assert_allclose(live[0]["rewards/margins"], 0.0, atol=1e-5)


@pytest.mark.parametrize(
    "objective",
    ["sft", "dpo", "kto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ipo", "cdpo", "slic"))],
)
def test_every_objective_learns(objective):
    data = random_data(PAIRS, mismatched=objective == "kto")
    responses = {"sft": ("chosen",), "kto": RESPONSES}.get(objective, ("chosen", "rejected"))
    config = configured(objective=objective)
    live = objective in ("dpo", "ipo", "cdpo", "kto")
    batches = batches_for(config, data, responses=responses, order="sequential")
    reports, _ = train(config, make_mesh(), batches, steps=8, live=live)
    assert reports[-1]["loss"] < reports[0]["loss"]
    assert all(np.isfinite(list(report.values())).all() for report in reports)
    assert ("kl" in reports[0]) == (objective == "kto")


def test_empty_slots_of_the_last_batch_change_nothing():
    """20 examples in batches of 16: the second holds 4, and is the same as a batch of 4."""
    config = configured(group="global")
    data = random_data(20)
    last = batches_for(config, data, order="sequential").batch_at(1)
    assert int(last.sides["chosen"].valid.sum()) == 4
    reference = table_of(data, data.reference_log_probs)[16:]
    tail = embedded(data.examples[16:], embeddings_of(data, "chosen")[16:], reference=reference)
    alone = batches_for(config, tail, order="sequential", pairs=4).batch_at(0)
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        built = build_steps(config, MODEL, mesh, total_steps=1)
        params = models.init_params(MODEL, jax.random.key(0))
        found = [built.evaluate(params, put_batch(mesh, batch), None) for batch in (last, alone)]
    for name in found[0]:
        np.testing.assert_allclose(found[0][name].total, found[1][name].total, rtol=1e-5, atol=1e-6, err_msg=name)
        assert found[0][name].count == found[1][name].count


@pytest.mark.parametrize("objective", ["sft", "rpo", "kto"])
def test_held_out_means_do_not_depend_on_the_batch_size(objective):
    """20 examples in batches of 16, the last of 4, or in batches of 4: the same, where groups do not change either."""
    data, mesh = random_data(20, mismatched=True), make_mesh()
    responses = RESPONSES if objective == "kto" else ("chosen", "rejected")
    config = configured(objective=objective, **({"group": 4} if objective == "rpo" else {}))
    with jax.set_mesh(mesh):
        evaluate = build_steps(config, MODEL, mesh, total_steps=1).evaluate
        params = models.init_params(MODEL, jax.random.key(0))
        found = []
        for pairs in (16, 4):
            sweep = batches_for(config, data, responses=responses, order="sequential", pairs=pairs)
            total = None
            for step in range(sweep.steps_per_epoch):
                means = evaluate(params, put_batch(mesh, sweep.batch_at(step)), None)
                total = means if total is None else metrics.combine(total, means)
            found.append(metrics.finalize(total))
    # KTO's loss has the batch's reference point, and how many of rpo's rows could not be calibrated is a count.
    of_a_batch = {"loss"} if objective == "kto" else {"contrast/uncalibrated_rows", "contrast/tied_rows"}
    for name in found[0].keys() - of_a_batch:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert ("rewards/margins" in found[0]) == (objective != "sft")
