"""Every objective through the step: LoRA, micro-batches and a mesh give what one device with all rows gives."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from rpo_jax import models
from rpo_jax.config import (
    BatchConfig,
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimConfig,
    PolicyConfig,
    ReferenceConfig,
    resolve,
)
from rpo_jax.core.records import PreferenceData
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.hosts import sharding
from rpo_jax.models import lora
from rpo_jax.objectives import running
from rpo_jax.objectives.losses import OBJECTIVES
from rpo_jax.training.step import build_steps, put_batch
from tests.worlds import random_data, small_model, with_more_responses

PAIRS, STEPS, MICRO_ROWS = 8, 2, 8
MODEL = small_model(num_layers=1)
LORA = LoraConfig(rank=4, alpha=16.0)


def scored(data: PreferenceData) -> PreferenceData:
    scores = np.random.default_rng(1).normal(size=data.num_responses).astype(np.float32)
    return dataclasses.replace(data, scores=scores)


def trained(config: Config, data: PreferenceData, shape: tuple[int, int, int]) -> list[dict[str, float]]:
    """Metrics of a few steps of adapters, against the model without them."""
    method = resolve(config)
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = sharding.make_mesh(MeshConfig(**dict(zip(sharding.MESH_AXES, shape, strict=True))), devices)
    batches = PreferenceBatches(
        data,
        pairs=PAIRS,
        pairing=config.data.pairing,
        responses=method.objective.responses,
        seed=0,
        row_tokens=64,
        rows_multiple=MICRO_ROWS,
    )
    reports = []
    with jax.set_mesh(mesh):
        params = models.init_params(MODEL, jax.random.key(0))
        base = jax.tree.map(
            jax.device_put,
            params,
            sharding.parameter_shardings(mesh, lora.base_axes(MODEL, "float32"), lora.abstract_base(MODEL, "float32")),
        )
        steps = build_steps(config, MODEL, mesh, total_steps=STEPS).on(base)
        init = jax.jit(lora.init_adapters, static_argnums=(0, 1), out_shardings=steps.model_shardings)
        # Adapters that change something, so that no log-ratio is 0 before the first step.
        adapters = jax.tree.map(lambda leaf: leaf + 0.02, init(MODEL, config.lora, jax.random.key(1)))
        state = steps.init(jax.tree.map(jax.device_put, adapters, steps.model_shardings))
        for step in range(STEPS):
            state, report = steps.train(state, put_batch(mesh, batches.batch_at(step)), None)
            kept = state.params.get(running.NAME, {})
            reports.append({name: float(value) for name, value in {**report, **kept}.items()})
    return reports


def config_of(name: str, pairing: Any, micro_rows: int | None, **changes: Any) -> Config:
    return Config(
        data=DataConfig(pairing=pairing),
        objective=ObjectiveConfig(name=name),
        batch=BatchConfig(pairs=PAIRS, micro_rows=micro_rows),
        model=PolicyConfig(path="not read here"),
        lora=LORA,
        reference=ReferenceConfig(mode="adapter"),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=0),
        **changes,
    )


def check(name: str, pairing: str, data: PreferenceData, **changes: Any) -> None:
    one, eight = (
        trained(config_of(name, pairing, micro_rows, **changes), data, shape)
        for micro_rows, shape in ((None, (1, 1, 1)), (MICRO_ROWS, (2, 2, 2)))
    )
    for metric in ("loss", "grad_norm"):
        got, expected = ([report[metric] for report in found] for found in (eight, one))
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6, err_msg=metric)
    assert all(report["grad_norm"] > 0 for report in one)


# Their losses see the model through seams of their own; every other one sees a log-prob for each response.
IN_EVERY_CHECK = ("wpo", "ld_dpo")
MADE_APART = {name for name, row in OBJECTIVES.items() if row.mixes_references or "refined_chosen" in row.responses}
NAMES = [
    pytest.param(name, marks=[] if name in IN_EVERY_CHECK else [pytest.mark.slow])
    for name in sorted(OBJECTIVES.keys() - MADE_APART)
]


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_on_a_mesh_give_what_one_device_gives(name):
    data = scored(random_data(12, mismatched="mismatched" in OBJECTIVES[name].responses))
    check(name, "grouped" if OBJECTIVES[name].uses_lists else "paired", data)


def test_bco_s_running_mean_is_part_of_the_state():
    config = config_of("bco_pair", "paired", None)
    first, second = trained(config, random_data(12), (1, 1, 1))
    rewards = [(one["rewards/chosen"] + one["rewards/rejected"]) / 2 for one in (first, second)]
    assert abs(rewards[0] - rewards[1]) > 1e-4
    np.testing.assert_allclose([first["mean"], first["count"]], [rewards[0], 16], rtol=1e-5)
    # Of 12 pairs the second step has 4.
    np.testing.assert_allclose([second["mean"], second["count"]], [(2 * rewards[0] + rewards[1]) / 3, 24], rtol=1e-5)


@pytest.mark.parametrize("name", [pytest.param("rpo", marks=[pytest.mark.slow]), "infonca"])
def test_so_does_a_batch_of_prompts_with_any_number_of_responses(name):
    check(name, "grouped", scored(with_more_responses(random_data(12))))
