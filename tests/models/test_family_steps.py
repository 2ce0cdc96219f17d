"""A training step of the families whose layers differ from Llama's: any mesh gives one device's losses."""

import jax
import numpy as np
import pytest

from rpo_jax import models
from rpo_jax.config import MeshConfig
from rpo_jax.hosts import sharding
from rpo_jax.models import recompute
from rpo_jax.training.step import build_steps, put_batch
from tests.test_step import batches_for, configured, make_mesh
from tests.worlds import VOCAB

from .conftest import OF_FAMILY, SIZES

STEPS = 2
# Caps and norms on both sides; fused matrices and part of a head rotated. The others take minutes; mixtures of experts
# are on a mesh in test_experts.py too.
QUICK = ("gemma2", "phi4 mini")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in OF_FAMILY.values() if name not in QUICK]


def losses(name, mesh, folder):
    model_config, _ = models.load_pretrained(folder)
    config = configured(remat="full")
    batches = batches_for(config)
    with jax.set_mesh(mesh):
        built = build_steps(config, model_config, mesh, total_steps=STEPS)
        params = models.load_sharded(folder, built.state_shardings.params)
        state, reports = built.init(params), []
        for step in range(STEPS):
            state, report = built.train(state, put_batch(mesh, batches.batch_at(step)), None)
            reports.append({key: float(value) for key, value in report.items()})
    return reports


@pytest.mark.parametrize("mesh", [(2, 2, 2), pytest.param((8, 1, 1), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_a_mesh_gives_the_losses_of_one_device(name, mesh, hf_folder, monkeypatch):
    monkeypatch.setattr(recompute, "MLP_TOKENS", 16)  # in chunks, for which weights are gathered by name
    assert SIZES["vocab_size"] >= VOCAB
    one, split = (losses(name, make_mesh(*shape), hf_folder(name)) for shape in ((1, 1, 1), mesh))
    assert_same(split, one)
    assert one[0]["loss"] != one[1]["loss"]
    experts = models.read_config(hf_folder(name)).parts.experts
    if experts is not None and experts.count % 2 == 0:
        shared = sharding.make_mesh(MeshConfig(data=2, expert=2, tensor=2))
        assert_same(losses(name, shared, hf_folder(name)), one)


def assert_same(found, one):
    for key in ("loss", "grad_norm", "rewards/margins"):
        got, expected = ([report[key] for report in reports] for reports in (found, one))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6, err_msg=key)
