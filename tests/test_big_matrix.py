"""The contrast matrix in blocks of rows: everything that it gives is what the whole matrix gives."""

from dataclasses import replace
from typing import Any

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
    resolve,
)
from rpo_jax.core.records import Batch, Side
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.hosts import sharding
from rpo_jax.objectives import blocked, losses, metrics
from rpo_jax.training.micro_batches import LogProbs
from rpo_jax.training.scoring import make_scores
from rpo_jax.training.step import build_steps, put_batch
from tests.worlds import random_data, small_model

M, GROUPED = 21, 24  # neither a multiple of the rows of a block, nor of 8 devices; 24 falls into 3 groups
MODEL = small_model()


def make_mesh(*shape):
    data, fsdp, tensor = shape
    return sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])


def side(rng, slots, offset, width=6):
    """Responses to few prompts, so that prompts repeat, with slots that hold nothing."""
    valid = rng.random(slots) > 0.2
    prompts = rng.integers(0, 9, slots)
    embedding = np.random.default_rng(5).normal(size=(9, width))[prompts] + 0.2 * rng.normal(size=(slots, width))
    return Side(
        valid=valid,
        reference_log_prob=np.where(valid, rng.normal(-20, 3, slots), np.nan).astype(np.float32),
        embedding=np.where(valid[:, None], embedding, 0).astype(np.float32),
        prompt_id=np.where(valid, prompts, -1).astype(np.int32),
        text_id=np.where(valid, rng.integers(offset, offset + 30, slots), -1).astype(np.int32),
        example_index=np.arange(slots, dtype=np.int32),
        score=np.where(valid, rng.normal(0, 1, slots), np.nan).astype(np.float32),
    )


def world(num_chosen, num_rejected):
    """Both sides of a batch, without its rows, and the policy's log-probs, which are NaN where nothing is."""
    rng = np.random.default_rng(0)
    chosen, rejected = side(rng, num_chosen, 0), side(rng, num_rejected, 10)
    sides: Any = jax.tree.map(jnp.asarray, {"chosen": chosen, "rejected": rejected})
    valid = np.concatenate([chosen.valid, rejected.valid])
    log_prob = np.where(valid, rng.normal(-20, 8, valid.size), np.nan).astype(np.float32)
    log_probs = LogProbs(jnp.asarray(log_prob), jnp.asarray(rng.integers(1, 9, valid.size), jnp.int32))
    rows: Any = [jnp.zeros((1, 1), jnp.int32)] * 6
    return Batch(*rows, sides), log_probs


def refined(batch, log_probs):
    """The batch with its responses once more, which other log-probs belong to."""
    log_prob = jnp.concatenate([log_probs.log_prob, 0.9 * log_probs.log_prob[::-1]])
    valid = jnp.concatenate([batch.sides["chosen"].valid, batch.sides["rejected"].valid])
    log_prob = log_prob.at[valid.size :].set(jnp.where(valid, jnp.nan_to_num(log_prob[valid.size :]), jnp.nan))
    num_tokens = jnp.concatenate([log_probs.num_tokens] * 2)
    again = {f"refined_{kind}": batch.sides[kind] for kind in ("chosen", "rejected")}
    return batch._replace(sides={**batch.sides, **again}), LogProbs(log_prob, num_tokens)


def everything(config, mesh, batch, log_probs, paired=True):
    """Loss, count, its derivatives by all log-probs, and the metrics of the matrix."""
    method = resolve(config)
    objective = method.objective
    scores_of = make_scores(method, config.contrast.alpha, config.contrast.block, mesh)

    def loss(log_prob):
        scores, means = scores_of(log_probs._replace(log_prob=log_prob), batch, paired)
        assert isinstance(scores.matrix, blocked.BlockedMatrix) == (config.contrast.block != "dense")
        value = objective.loss(scores)
        return value, (metrics.finalize(means), objective.count(scores))

    with jax.set_mesh(mesh):
        (value, (told, count)), derivative = jax.jit(jax.value_and_grad(loss, has_aux=True))(log_probs.log_prob)
        alone = jax.jit(loss)(log_probs.log_prob)[0]
    np.testing.assert_allclose(alone, value, rtol=1e-6)
    return {"loss": value, "count": count, "derivative": derivative, **told}


def agree(config, shape, batch, log_probs, block=8, **kwargs):
    """Blocks on a mesh against the dense matrix on one device; returns what the latter gives."""
    dense, blocks = (replace(config, contrast=replace(config.contrast, block=kind)) for kind in ("dense", block))
    expected = everything(dense, make_mesh(1, 1, 1), batch, log_probs, **kwargs)
    got = everything(blocks, make_mesh(*shape), batch, log_probs, **kwargs)
    assert got.keys() == expected.keys()
    scale = float(jnp.max(jnp.abs(expected["derivative"])))
    assert scale > 0
    for name, value in expected.items():
        assert np.isfinite(value).all(), name
        np.testing.assert_allclose(
            got[name], value, rtol=1e-5, atol=1e-5 * scale if name == "derivative" else 1e-7, err_msg=name
        )
    return expected


WEIGHTINGS = {
    "fixed": {"weights": "embedding", "temperature": 0.3},
    "calibrated": {"weights": "embedding", "perplexity": 4.0},
    "out of reach": {"weights": "embedding", "perplexity": 17.5},
    "uniform": {"weights": "uniform"},
    "diagonal": {"weights": "diagonal"},
    "calibrated on the loss": {"weights": "embedding", "perplexity": 4.0, "weights_on": "loss"},
    "diagonal on the loss": {"weights": "diagonal", "diagonal_on": "loss"},
}


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_blocks_give_what_the_whole_matrix_gives(name):
    """Loss, derivatives, number of entries and metrics; 3 rows a block of 8, padded to whole blocks and devices."""
    config = Config(contrast=ContrastConfig(**WEIGHTINGS[name]))
    got = agree(config, (2, 2, 2), *world(M, M))
    assert {"contrast/perplexity", "contrast/diagonal_weight", "contrast/related_weight"} <= got.keys()
    assert ("contrast/temperature" in got) == (WEIGHTINGS[name]["weights"] == "embedding")


MATRIX_LOSSES = [
    name for name, row in losses.OBJECTIVES.items() if row.weights is not None and "link" not in row.options()
]


@pytest.mark.parametrize(
    "objective", [{"name": "rpo", "link": link} for link in losses.LINKS] + [{"name": name} for name in MATRIX_LOSSES]
)
def test_every_link_and_every_loss_on_the_matrix_works_in_blocks(objective):
    responses = losses.OBJECTIVES[objective["name"]].responses
    config = Config(
        objective=ObjectiveConfig(**objective), contrast=ContrastConfig(weights="embedding", temperature=0.3)
    )
    agree(config, (4, 2, 1), *(world(M, M) if "refined_chosen" not in responses else refined(*world(M, M))))


def test_unpaired_responses_and_averaged_log_probs_work_in_blocks():
    config = Config(
        objective=ObjectiveConfig(average_log_prob=True), contrast=ContrastConfig(weights="embedding", perplexity=3)
    )
    got = agree(config, (2, 2, 2), *world(M, 13), paired=False)
    assert "contrast/diagonal_weight" not in got


@pytest.mark.parametrize("name", ["uniform", "diagonal on the loss"])
def test_numbers_of_rows_work_in_blocks(name):
    batch, log_probs = world(M, M)
    rng = np.random.default_rng(3)

    def numbered(side):
        weight, smoothing = (jnp.asarray(rng.uniform(0, most, M), jnp.float32) for most in (2, 0.5))
        return side._replace(row_values={"weight": weight, "label_smoothing": smoothing})

    config = Config(
        data=DataConfig(weight="w", label_smoothing="e"),
        objective=ObjectiveConfig(link="smoothed"),
        contrast=ContrastConfig(**WEIGHTINGS[name]),
    )
    batch = batch._replace(sides={kind: numbered(side) for kind, side in batch.sides.items()})
    weighed = agree(config, (2, 2, 2), batch, log_probs)
    assert weighed["count"] % 1 > 0, "a sum of weights, and no number of entries"


@pytest.mark.parametrize("objective", ["wpo", "f_dpo"])
def test_what_else_is_known_of_responses_works_in_blocks(objective):
    batch, log_probs = world(M, M)
    log_probs = log_probs._replace(collision=log_probs.log_prob - 0.1 * log_probs.num_tokens)
    config = Config(objective=ObjectiveConfig(name=objective), contrast=ContrastConfig(weights="uniform"))
    agree(config, (2, 2, 2), batch, log_probs)


@pytest.mark.parametrize(("name", "block"), [("calibrated", 5), ("diagonal", 1), ("uniform", 1000)])
def test_groups_work_in_blocks_of_any_size(name, block):
    """Blocks of three rows, of one, and one of more rows than there are."""
    config = Config(contrast=ContrastConfig(group=8, **WEIGHTINGS[name]), batch=BatchConfig(pairs=GROUPED))
    agree(config, (1, 1, 1), *world(GROUPED, GROUPED), block=block)


def test_nothing_valid_is_zero_in_blocks():
    batch, log_probs = world(M, M)
    empty = batch.sides["chosen"]._replace(valid=jnp.zeros(M, bool))
    config = Config(contrast=ContrastConfig(weights="embedding", block=8))
    got = everything(config, make_mesh(2, 1, 1), batch._replace(sides={**batch.sides, "chosen": empty}), log_probs)
    assert got["loss"] == got["count"] == 0
    assert not got["derivative"].any()


def test_a_nan_in_a_valid_slot_surfaces_from_blocks():
    batch, log_probs = world(M, M)
    slot = int(jnp.argmax(batch.sides["chosen"].valid))
    log_probs = log_probs._replace(log_prob=log_probs.log_prob.at[slot].set(jnp.nan))
    config = Config(contrast=ContrastConfig(weights="uniform", block=8))
    contrast = config.contrast
    scores, _ = make_scores(resolve(config), contrast.alpha, contrast.block, make_mesh(1, 1, 1))(log_probs, batch, True)
    assert np.isnan(resolve(config).objective.loss(scores))


@pytest.mark.parametrize("weights", ["embedding", "uniform"])
def test_weights_on_losses_sum_to_one_a_row(weights):
    """Where all rejected responses are as likely, a row's loss is that of any of its pairs, whatever the weights."""
    batch, log_probs = world(M, M)
    chosen, rejected = batch.sides["chosen"], batch.sides["rejected"]
    rejected = rejected._replace(reference_log_prob=log_probs.log_prob[M:] + 2)
    config = Config(contrast=ContrastConfig(weights=weights, weights_on="loss"))
    got = agree(config, (2, 2, 2), batch._replace(sides={"chosen": chosen, "rejected": rejected}), log_probs)
    ratios = (log_probs.log_prob[:M] - chosen.reference_log_prob)[chosen.valid]
    np.testing.assert_allclose(got["loss"], np.mean(np.logaddexp(0, -0.1 * (ratios + 2))), rtol=1e-5)
    assert got["count"] == np.sum(chosen.valid)


def test_large_matrices_are_taken_in_blocks_and_ordinary_ones_whole():
    assert not blocked.needs_blocks(4096 * 4096, "auto")
    assert blocked.needs_blocks(4096 * 4096 + 1, "auto")
    assert not blocked.needs_blocks(10**12, "dense")
    assert blocked.needs_blocks(1, 64)


def test_a_block_has_no_more_entries_than_its_square_and_devices_have_equal_shares():
    unused: Any = None
    for rows, columns, block, devices in ((65_536, 65_536, 2048, 8), (100, 7, 3, 8), (5, 1000, 2, 1), (1, 1, 64, 8)):
        mesh = None if devices == 1 else make_mesh(devices, 1, 1)
        row_blocks = blocked.RowBlocks(unused, block, mesh)
        shards, count, size = row_blocks.cut(rows, columns)
        assert shards == devices
        assert size == 1 or size * columns <= block**2
        assert rows <= shards * count * size < rows + shards * count


def training(contrast, shape=(2, 2, 2), pairs=16, lower=False):
    """Losses of some steps, or the compiled program of one."""
    config = Config(
        data=DataConfig(pairing="paired"),
        contrast=ContrastConfig(weights="embedding", **contrast),
        batch=BatchConfig(pairs=pairs),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=2),
    )
    batches = PreferenceBatches(
        random_data(pairs + 4),
        pairs=pairs,
        pairing="paired",
        responses=("chosen", "rejected"),
        seed=0,
        row_tokens=64,
        rows_multiple=8,
    )
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        built = build_steps(config, MODEL, mesh, total_steps=3)
        if lower:
            batch = put_batch(mesh, batches.batch_at(0))
            return built.train.lower(built.abstract_state, batch, None).compile().as_text()
        init = jax.jit(models.init_params, static_argnums=0, out_shardings=built.state_shardings.params)
        state, reports = built.init(init(MODEL, jax.random.key(0))), []
        for step in range(3):
            state, report = built.train(state, put_batch(mesh, batches.batch_at(step)), None)
            reports.append({name: float(value) for name, value in report.items()})
    return reports


def test_training_in_blocks_gives_the_losses_of_the_whole_matrix():
    expected = training({"block": "dense"}, (1, 1, 1))
    got = training({"block": 6})
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys()
        for name in other:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_no_device_holds_the_matrix_or_its_share_of_rows():
    """104 pairs on 8 devices: 13 rows each, in blocks of 2 rows by 104 columns; whole, the program has 104 by 104."""
    pairs, rows = 104, 104 // 8
    whole, blocks = (training({"block": block}, (2, 2, 2), pairs, lower=True) for block in ("dense", 15))
    assert f"[{pairs},{pairs}]" in whole
    for size in (pairs, rows, rows + 1):
        assert f"[{size},{pairs}]" not in blocks
    assert f"[2,{pairs}]" in blocks
